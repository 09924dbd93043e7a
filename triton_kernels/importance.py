"""How much each place matters, and the merges that follow from it: `fastmerge/reference/importance.py` in Triton.

Up to eight models come by value (`xs`), are loaded together and read once. More come as a table (`xs` is empty), with
two numbers for each: its address, and the bits of its factor. What is added up over the models begins with -0, to which
adding is exact for every value.

Rows are added up by halves. A row of up to WIDTH elements is a tile, in registers, and -0 stands behind its end. In
longer ones a tile's element and the one half a row further on are added first, and what that leaves is halved in
memory, until it is one tile.
"""

import triton
import triton.language as tl

from . import exact, functions, numbers, sparsify, tables

SMALLEST_DISTANCE = tl.constexpr(float.fromhex("0x1.0c6f7ap-20"))  # 1e-6 as float32
SMALLEST_SHARE = tl.constexpr(float.fromhex("0x1.5798eep-27"))  # 1e-8
NEAR = tl.constexpr(0.25)

LANE = tl.constexpr(8)
"""Neighbours whose counts are added up before anything else is: those that a thread has loaded."""

BELOW = tl.constexpr(35)
"""Binades below a window of `exact` that a second window has: squares differ twice as much as what is squared."""


@triton.jit
def magnitude(x):
    """|x|, by its bits."""
    return (x.to(tl.uint32, bitcast=True) & 0x7FFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def minus_zeros(like):
    """As many -0 as there are numbers."""
    return tl.zeros_like(like) * -1.0


# -- models ------------------------------------------------------------------------------------------------------------


@triton.jit
def deltas(based, xs, start, n, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """A tile of the deltas of all models that come by value; +0 from `n` on."""
    # All loads before the first use, so that they are under way together.
    loaded = ()
    for i in tl.static_range(len(xs)):
        loaded = loaded + (sparsify.raw(xs[i], start, n, BLOCK, WHOLE),)
    rows = ()
    for i in tl.static_range(len(xs)):
        rows = rows + (numbers.widen(loaded[i]) - based,)
    return rows


@triton.jit
def listed_delta(
    based, listed, i, start, n, BLOCK: tl.constexpr, WHOLE: tl.constexpr, ALIGN: tl.constexpr, DTYPE: tl.constexpr
):
    """The same of model i of a table."""
    x = sparsify.aligned(tables.address_of(tl.load(listed + 2 * i), DTYPE, False), ALIGN)
    return numbers.loaded(x, start, n, BLOCK, WHOLE) - based


@triton.jit
def changed(delta, epsilon):
    """Where a delta takes part: it is further from 0 than epsilon. NaN is, too."""
    return (magnitude(delta) <= epsilon) == 0


# -- NearSwap ----------------------------------------------------------------------------------------------------------


@triton.jit
def nearswap_tile(base, x, out, t, start, n, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """A tile of w x + (1 - w) base."""
    own = sparsify.raw(x, start, n, BLOCK, WHOLE)
    based = numbers.loaded(base, start, n, BLOCK, WHOLE)
    own = numbers.widen(own)
    distance = magnitude(based - own)
    nearest = tl.where(distance < SMALLEST_DISTANCE, SMALLEST_DISTANCE, distance)
    weight = tl.div_rn(tl.zeros_like(nearest) + t, nearest)
    weight = tl.where(weight < 0.0, 0.0, tl.where(weight > 1.0, 1.0, weight))
    numbers.stored(out, start, n, weight * own + (1.0 - weight) * based, BLOCK, WHOLE)


@triton.jit(do_not_specialize=["n"])
def nearswap(base, x, out, t: "fp32", n: "i64", BLOCK: tl.constexpr):
    """The merge of one model, to out."""
    n = n.to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    if start + BLOCK <= n:
        nearswap_tile(base, x, out, t, start, n, BLOCK, True)
    else:
        nearswap_tile(base, x, out, t, start, n, BLOCK, False)


# -- RAM ---------------------------------------------------------------------------------------------------------------


@triton.jit
def with_part(count, total, factor, delta, own, epsilon):
    """How many take part, the sum of their deltas, and that of their factors, with one more model."""
    part = changed(delta, epsilon)
    count = count + tl.where(part, 1.0, 0.0)
    total = total + tl.where(part, delta, 0.0)
    return count, total, factor + tl.where(part, own, 0.0)


@triton.jit
def ram_tile(
    base, xs, factors, listed, models, out, epsilon, start, n,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr, ALIGN: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """A tile of the merge."""
    based = numbers.loaded(base, start, n, BLOCK, WHOLE)
    count = minus_zeros(based)
    total = count
    factor = count
    if len(xs) > 0:
        rows = deltas(based, xs, start, n, BLOCK, WHOLE)
        for i in tl.static_range(len(xs)):
            count, total, factor = with_part(count, total, factor, rows[i], factors[i], epsilon)
    else:
        for i in range(models):
            delta = listed_delta(based, listed, i, start, n, BLOCK, WHOLE, ALIGN, DTYPE)
            own = tables.float_of(tl.load(listed + 2 * i + 1))
            count, total, factor = with_part(count, total, factor, delta, own, epsilon)
    # Where a model is alone, the sum of the factors is its own.
    mean = tl.div_rn(total, tl.where(count < 1.0, 1.0, count))
    mixed = tl.where(count == 1.0, total * factor, mean)
    numbers.stored(out, start, n, based + mixed, BLOCK, WHOLE)


@triton.jit(do_not_specialize=["models", "n"])
def ram_apply(
    base, xs, factors, listed, models: "i64", out, epsilon: "fp32", n: "i64",
    BLOCK: tl.constexpr, ALIGN: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The merge of any number of models, to out. factors: as many numbers as xs has models."""
    models = models.to(tl.int64)
    n = n.to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    if start + BLOCK <= n:
        ram_tile(base, xs, factors, listed, models, out, epsilon, start, n, BLOCK, True, ALIGN, DTYPE)
    else:
        ram_tile(base, xs, factors, listed, models, out, epsilon, start, n, BLOCK, False, ALIGN, DTYPE)


@triton.jit
def by_lanes(flags):
    """How many of each LANE neighbours are set: int32."""
    return tl.sum(tl.reshape(flags.to(tl.int32), (flags.shape[0] // LANE, LANE)), axis=1)


@triton.jit
def parts_of(rows, epsilon):
    """Where each delta takes part, and how many do: int32."""
    parts = ()
    count = tl.zeros_like(rows[0]).to(tl.int32)
    for i in tl.static_range(len(rows)):
        part = changed(rows[i], epsilon)
        parts = parts + (part,)
        count += part.to(tl.int32)
    return parts, count


@triton.jit
def counted(state, parts, count):
    """Counts so far, two for each model, with those of a tile: where it takes part with others, and where alone."""
    result = ()
    for i in tl.static_range(len(parts)):
        shared = state[2 * i] + by_lanes(parts[i] & (count > 1))
        alone = state[2 * i + 1] + by_lanes(parts[i] & (count == 1))
        result = result + (shared, alone)
    return result


@triton.jit
def add_count(counts, number):
    """Add a number that is often 0."""
    tl.atomic_add(counts, number.to(tl.int64), mask=number > 0, sem="relaxed")


@triton.jit
def count_listed(
    base, listed, models, counts, epsilon, start, n,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr, ALIGN: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Add a tile's counts of all models of a table, which are loaded twice: the second time from the cache."""
    based = numbers.loaded(base, start, n, BLOCK, WHOLE)
    count = tl.zeros((BLOCK,), tl.int32)
    for i in range(models):
        delta = listed_delta(based, listed, i, start, n, BLOCK, WHOLE, ALIGN, DTYPE)
        count += changed(delta, epsilon).to(tl.int32)
    for i in range(models):
        part = changed(listed_delta(based, listed, i, start, n, BLOCK, WHOLE, ALIGN, DTYPE), epsilon)
        add_count(counts + 2 * i, tl.sum((part & (count > 1)).to(tl.int32), axis=0))
        add_count(counts + 2 * i + 1, tl.sum((part & (count == 1)).to(tl.int32), axis=0))


@triton.jit(do_not_specialize=["models", "n"])
def ram_counts(
    base, xs, listed, models: "i64", counts, epsilon: "fp32", n: "i64",
    SPAN: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """counts: int64[models, 2], added to: where each model takes part with others, and where alone."""
    models = models.to(tl.int64)
    n = n.to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * SPAN
    end = tl.minimum(start + SPAN, n)
    whole = start + (end - start) // BLOCK * BLOCK
    if len(xs) > 0:
        state = ()
        for _ in tl.static_range(2 * len(xs)):
            state = state + (tl.zeros((BLOCK // LANE,), tl.int32),)
        for at in range(start, whole, BLOCK):
            based = numbers.loaded(base, at, n, BLOCK, True)
            parts, count = parts_of(deltas(based, xs, at, n, BLOCK, True), epsilon)
            state = counted(state, parts, count)
        if whole < end:
            # Past the end all deltas are 0, and none takes part.
            based = numbers.loaded(base, whole, n, BLOCK, False)
            parts, count = parts_of(deltas(based, xs, whole, n, BLOCK, False), epsilon)
            state = counted(state, parts, count)
        for i in tl.static_range(2 * len(xs)):
            add_count(counts + i, tl.sum(state[i], axis=0))
    else:
        for at in range(start, whole, BLOCK):
            count_listed(base, listed, models, counts, epsilon, at, n, BLOCK, True, ALIGN, DTYPE)
        if whole < end:
            count_listed(base, listed, models, counts, epsilon, whole, n, BLOCK, False, ALIGN, DTYPE)


# -- variances ---------------------------------------------------------------------------------------------------------


@triton.jit
def variance_tile(
    base, xs, listed, models, out, start, n,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr, ALIGN: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """A tile of the variances: deltas are taken about the first one."""
    based = numbers.loaded(base, start, n, BLOCK, WHOLE)
    number = tl.zeros_like(based) + models.to(tl.float32)
    mean = minus_zeros(based)
    spread = mean
    if len(xs) > 0:
        rows = deltas(based, xs, start, n, BLOCK, WHOLE)
        for i in tl.static_range(len(xs)):
            mean = mean + (rows[i] - rows[0])
        mean = tl.div_rn(mean, number)
        for i in tl.static_range(len(xs)):
            apart = (rows[i] - rows[0]) - mean
            spread = spread + apart * apart
    else:
        first = listed_delta(based, listed, 0, start, n, BLOCK, WHOLE, ALIGN, DTYPE)
        for i in range(models):
            mean = mean + (listed_delta(based, listed, i, start, n, BLOCK, WHOLE, ALIGN, DTYPE) - first)
        mean = tl.div_rn(mean, number)
        for i in range(models):
            apart = (listed_delta(based, listed, i, start, n, BLOCK, WHOLE, ALIGN, DTYPE) - first) - mean
            spread = spread + apart * apart
    numbers.stored(out, start, n, tl.div_rn(spread, number), BLOCK, WHOLE)


@triton.jit(do_not_specialize=["models", "n"])
def model_variance(
    base, xs, listed, models: "i64", out, n: "i64", BLOCK: tl.constexpr, ALIGN: tl.constexpr, DTYPE: tl.constexpr
):
    """The variance over the models of each element, to out: float32."""
    models = models.to(tl.int64)
    n = n.to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    if start + BLOCK <= n:
        variance_tile(base, xs, listed, models, out, start, n, BLOCK, True, ALIGN, DTYPE)
    else:
        variance_tile(base, xs, listed, models, out, start, n, BLOCK, False, ALIGN, DTYPE)


# -- energies ----------------------------------------------------------------------------------------------------------


@triton.jit
def square_tile(base, x, mask, start, n, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """Mantissas and places of the squares of a tile of a model's delta; mantissa 0 where the mask keeps nothing."""
    delta = sparsify.delta_of(base, x, start, n, True, numbers.FLOAT32, BLOCK, WHOLE)
    mantissa, place = exact.parts(delta * delta)
    if mask is not None:
        mantissa = tl.where(sparsify.masked(mask, start, n, BLOCK, WHOLE), mantissa, 0)
    return mantissa, place


@triton.jit(do_not_specialize=["models", "n"])
def add_energies(
    base, listed, models: "i64", sums, mask, n: "i64",
    SPAN: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Add the squares of the listed models' deltas to sums: int64[rows, COPIES, ROW].

    listed: as of `sparsify.mine`. mask: a bit for each element, or None. As `exact.add_l1`, with a second window of
    binades below the first.
    """
    models = models.to(tl.int64)
    n = n.to(tl.int64)
    start, _, x, _, model = sparsify.mine(listed, models, SPAN, DTYPE, ALIGN)
    base = sparsify.aligned(base, ALIGN)
    end = tl.minimum(start + SPAN, n)
    words = tl.zeros((exact.ROW,), tl.int64)
    plain = start + SPAN <= n
    if plain:
        unit = tl.full((), -1, tl.int32)
        slots = tl.zeros((BLOCK,), tl.int64)
        low_slots = tl.zeros((BLOCK,), tl.int64)
        odd = tl.zeros((BLOCK,), tl.int32)
        for at in range(start, end, BLOCK):
            mantissa, place = square_tile(base, x, mask, at, n, BLOCK, True)
            if unit < 0:
                unit = tl.maximum(tl.max(place, axis=0) - (exact.WINDOW - exact.ABOVE), 0)
            low_unit = tl.maximum(unit - BELOW, 0)
            # Unsigned, a negative shift is too large as well.
            shift = place - unit
            fits = shift.to(tl.uint32, bitcast=True) <= exact.WINDOW
            low_shift = place - low_unit
            fits_low = (fits == 0) & (low_shift.to(tl.uint32, bitcast=True) <= exact.WINDOW)
            odd = odd | tl.where(fits | fits_low, 0, mantissa)
            mass = mantissa.to(tl.int64) << tl.where(fits, shift, tl.where(fits_low, low_shift, 0)).to(tl.int64)
            slots += tl.where(fits, mass, 0)
            low_slots += tl.where(fits_low, mass, 0)
        plain = tl.max(odd, axis=0) == 0
        if plain:
            words = exact.in_limbs(slots, unit) + exact.in_limbs(low_slots, tl.maximum(unit - BELOW, 0))
    if plain == 0:
        for at in range(start, end, BLOCK):
            mantissa, place = square_tile(base, x, mask, at, n, BLOCK, False)
            words += exact.by_limb(mantissa, mantissa, place)[0]
    copy = (start // SPAN) % exact.COPIES
    row = sums + (model * exact.COPIES + copy) * exact.ROW + tl.arange(0, exact.ROW)
    tl.atomic_add(row, words, mask=words != 0, sem="relaxed")


# -- rows --------------------------------------------------------------------------------------------------------------


@triton.jit
def halved(x, ROWS: tl.constexpr, WIDTH: tl.constexpr, HALVINGS: tl.constexpr):
    """The upper half of each row of [ROWS, WIDTH] is added to the lower half, until one is left: float32[ROWS]."""
    for i in tl.static_range(HALVINGS):
        x = tl.sum(tl.reshape(x, (ROWS, 2, WIDTH >> (i + 1))), axis=1)
    return tl.reshape(x, (ROWS,))


@triton.jit
def or_nothing(x, there):
    """Keep x where there is an element, else -0: adding it changes nothing."""
    return tl.where(there, x, minus_zeros(x))


@triton.jit
def divergence_term(p, q):
    """The term p log(p / q) - p + q; where p is near q by the logarithm's series: nothing cancels."""
    apart = p - q
    z = tl.div_rn(apart, q)
    ratio = tl.div_rn(p, q)
    near = (apart * z) * (0.5 + z * (ratio * functions.log_polynomial(z) - 0.5))
    return tl.where(magnitude(z) <= NEAR, near, p * functions.log(ratio) - apart)


@triton.jit
def shares(x, there, ROWS: tl.constexpr, WIDTH: tl.constexpr, HALVINGS: tl.constexpr):
    """The softmax of each row of [ROWS, WIDTH] plus 1e-8."""
    # A NaN need not be the greatest: it makes its row's sum NaN.
    most = tl.max(tl.where(there, x, float("-inf")), axis=1)
    powers = functions.exp(x - most[:, None])
    total = halved(or_nothing(powers, there), ROWS, WIDTH, HALVINGS)
    return tl.div_rn(powers, tl.broadcast_to(total[:, None], (ROWS, WIDTH))) + SMALLEST_SHARE


@triton.jit(do_not_specialize=["rows", "length"])
def divergences(
    base, x, out, rows: "i64", length: "i64", ROWS: tl.constexpr, WIDTH: tl.constexpr, HALVINGS: tl.constexpr
):
    """The divergence of each row from the base's, to out: float32[rows]; a program has ROWS of up to WIDTH elements."""
    rows = rows.to(tl.int64)
    length = length.to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, WIDTH)
    there = (row[:, None] < rows) & (lane[None, :] < length)
    place = row[:, None] * length + lane[None, :]
    p = shares(numbers.widen(tl.load(x + place, mask=there, other=0.0)), there, ROWS, WIDTH, HALVINGS)
    q = shares(numbers.widen(tl.load(base + place, mask=there, other=0.0)), there, ROWS, WIDTH, HALVINGS)
    sums = halved(or_nothing(divergence_term(p, q), there), ROWS, WIDTH, HALVINGS)
    tl.store(out + row, numbers.canonical(sums), mask=row < rows)


@triton.jit
def row_tile(x, tile, length, WIDTH: tl.constexpr):
    """A tile of a long row, and which of its elements are there."""
    place = tile * WIDTH + tl.arange(0, WIDTH)
    there = place < length
    return numbers.widen(tl.load(x + place, mask=there, other=0.0)), there


@triton.jit
def halved_in_memory(halves, tiles, WIDTH: tl.constexpr, HALVINGS: tl.constexpr):
    """The sum of so many tiles of memory, a power of two, which are overwritten."""
    lane = tl.arange(0, WIDTH)
    while tiles > 1:
        tiles = tiles // 2
        tl.debug_barrier()
        for tile in range(0, tiles):
            at = halves + tile * WIDTH + lane
            tl.store(at, tl.load(at) + tl.load(at + tiles * WIDTH))
    tl.debug_barrier()
    total = halved(tl.reshape(tl.load(halves + lane), (1, WIDTH)), 1, WIDTH, HALVINGS)
    # The next sum's halves are written there.
    tl.debug_barrier()
    return tl.sum(total, axis=0)


@triton.jit
def greatest(x, length, WIDTH: tl.constexpr):
    """A long row's greatest element."""
    most = tl.full((WIDTH,), float("-inf"), tl.float32)
    for tile in range(0, (length + (WIDTH - 1)) // WIDTH):
        value, there = row_tile(x, tile, length, WIDTH)
        most = tl.maximum(most, tl.where(there, value, float("-inf")))
    return tl.max(most, axis=0)


@triton.jit
def powers_of(x, tile, length, most, WIDTH: tl.constexpr):
    """A tile of a long row's e^(x - most), and which of them are there."""
    value, there = row_tile(x, tile, length, WIDTH)
    return functions.exp(value - most), there


@triton.jit
def sum_of_powers(x, length, most, halves, tiles, WIDTH: tl.constexpr, HALVINGS: tl.constexpr):
    """The sum of a long row's powers. tiles: half of those that the row has, counted up to a power of two."""
    lane = tl.arange(0, WIDTH)
    for tile in range(0, tiles):
        low, low_there = powers_of(x, tile, length, most, WIDTH)
        high, high_there = powers_of(x, tile + tiles, length, most, WIDTH)
        tl.store(halves + tile * WIDTH + lane, or_nothing(low, low_there) + or_nothing(high, high_there))
    return halved_in_memory(halves, tiles, WIDTH, HALVINGS)


@triton.jit
def terms_of(base, x, tile, length, most_base, most, total_base, total, WIDTH: tl.constexpr):
    """A tile of a long row's divergence, -0 past its end."""
    powers, there = powers_of(x, tile, length, most, WIDTH)
    p = tl.div_rn(powers, tl.zeros_like(powers) + total) + SMALLEST_SHARE
    powers, there = powers_of(base, tile, length, most_base, WIDTH)
    q = tl.div_rn(powers, tl.zeros_like(powers) + total_base) + SMALLEST_SHARE
    return or_nothing(divergence_term(p, q), there)


@triton.jit(do_not_specialize=["first", "length", "tiles"])
def divergences_of_long_rows(
    base, x, out, memory, first: "i64", length: "i64", tiles: "i64", WIDTH: tl.constexpr, HALVINGS: tl.constexpr
):
    """The same of rows from `first` on, a program each. memory: float32[programs, tiles * WIDTH], half a row each."""
    length = length.to(tl.int64)
    tiles = tiles.to(tl.int64)
    program = tl.program_id(0).to(tl.int64)
    row = first.to(tl.int64) + program
    halves = memory + program * (tiles * WIDTH)
    x = x + row * length
    base = base + row * length
    most = greatest(x, length, WIDTH)
    total = sum_of_powers(x, length, most, halves, tiles, WIDTH, HALVINGS)
    most_base = greatest(base, length, WIDTH)
    total_base = sum_of_powers(base, length, most_base, halves, tiles, WIDTH, HALVINGS)
    lane = tl.arange(0, WIDTH)
    for tile in range(0, tiles):
        low = terms_of(base, x, tile, length, most_base, most, total_base, total, WIDTH)
        high = terms_of(base, x, tile + tiles, length, most_base, most, total_base, total, WIDTH)
        tl.store(halves + tile * WIDTH + lane, low + high)
    tl.store(out + row, numbers.canonical(halved_in_memory(halves, tiles, WIDTH, HALVINGS)))


@triton.jit
def importance_tile(
    base, x, divergence, out, start, n, length, BLOCK: tl.constexpr, WHOLE: tl.constexpr, LONG: tl.constexpr
):
    """A tile of |x - base| times the divergence of its row."""
    own = sparsify.raw(x, start, n, BLOCK, WHOLE)
    based = numbers.loaded(base, start, n, BLOCK, WHOLE)
    lane = tl.arange(0, BLOCK)
    if LONG:
        row = start // length
        # A tile has the end of one row at most.
        row = row + (lane >= (row + 1) * length - start).to(tl.int64)
    else:
        row = (start + lane) // length
    if WHOLE:
        factor = tl.load(divergence + row)
    else:
        factor = tl.load(divergence + row, mask=lane < n - start, other=0.0)
    numbers.stored(out, start, n, magnitude(numbers.widen(own) - based) * factor, BLOCK, WHOLE)


@triton.jit(do_not_specialize=["n", "length"])
def importance(base, x, divergence, out, n: "i64", length: "i64", BLOCK: tl.constexpr, LONG: tl.constexpr):
    """How much each element matters, to out: float32. LONG: rows have at least as many elements as a tile."""
    n = n.to(tl.int64)
    length = length.to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    if start + BLOCK <= n:
        importance_tile(base, x, divergence, out, start, n, length, BLOCK, True, LONG)
    else:
        importance_tile(base, x, divergence, out, start, n, length, BLOCK, False, LONG)
