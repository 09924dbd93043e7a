"""PCB-Merging: scores, what is counted and summed of them, and the merge that they weigh: `reference/pcb.py` in Triton.

A tile's scores are made again for every sweep rather than kept. Up to eight rows come by value (`xs`), are read once
and stay in registers, every step unrolled; a term that two rows have in common is made once. More rows come as a table
of addresses (`xs` is empty), and loops over it read them again and again, from cache. What a sweep does with the scores
of a row is a function that is handed to `each_tile`.

An element of eight rows takes some two thousand instructions: these kernels wait for arithmetic, never for memory. So a
thread has one element at a time, which leaves registers for all rows and keeps the unrolled code short, and a program
takes TILES tiles in a loop. Loads are no wider than an element, and have no masks: past the end they read the last
element again, and stores write it again, the same; only what is counted must know which elements are there (`valid`).

Inside kernels a score's key is shifted by -2**31: an int32 that orders as the scores do, NaN lowest.
"""

import triton
import triton.language as tl

from . import exact, functions, numbers, tables

SCRIPT = tl.constexpr(0)  # and nlp
VISION = tl.constexpr(1)
VISION_ES = tl.constexpr(2)
PAPER = tl.constexpr(3)

MIXED = tl.constexpr(3)  # rows of a table that have several dtypes; the codes of single ones are 0 to 2

LARGEST = tl.constexpr(3.4028234663852886e38)
LARGEST_PRODUCT = tl.constexpr(1.7014117331926443e38)
SMALLEST_DIVISOR = tl.constexpr(1e-12)

INF_ORDERED = tl.constexpr(0x7F800000)
MINUS_INF_ORDERED = tl.constexpr(-0x7F800001)
NAN_ORDERED = tl.constexpr(-0x80000000)
KEY_OF_ZERO = tl.constexpr(0x80000000)
FIELD = tl.constexpr(0xFFFFF)  # of three numbers that are added at once

DIGIT_BINS = tl.constexpr(256)
RUN = tl.constexpr(64)  # neighbours that are sampled together

LIMB = tl.constexpr(0xFFFFFFFF)


# -- numbers ----------------------------------------------------------------------------------------------------------


@triton.jit
def between(x, low, high):
    """Clip x to [low, high]; NaN stays NaN, and `low` wins where the bounds are out of order."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def normalised(x, low, width):
    """Scale x so that `low` becomes 0 and `low` + `width` 1; all 0 where there is no width."""
    return tl.where(width == 0.0, 0.0, tl.div_rn(x - low, tl.zeros_like(x) + width))


@triton.jit
def direction(delta):
    """+1, -1 or +0; NaN stays NaN."""
    return tl.where(delta > 0.0, 1.0, tl.where(delta < 0.0, -1.0, tl.where(delta == 0.0, 0.0, delta)))


@triton.jit
def ordered(x):
    """float32 as int32 that order as the numbers do, -0 below +0; NaN is the lowest."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(numbers.is_nan(x), NAN_ORDERED, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def score_key(x):
    """The keys of scores, int64 from 0 to 2**32 - 1."""
    return ordered(x).to(tl.int64) + KEY_OF_ZERO


@triton.jit
def pair_number(i, j, models):
    """The place of the pair (i, j), i <= j, among all pairs."""
    return i * models - i * (i - 1) // 2 + (j - i)


# -- rows -------------------------------------------------------------------------------------------------------------


@triton.jit
def base_tile(base, place):
    """The base's values at these places (int64); where there is no base, zeros that no one subtracts."""
    if base is None:
        return tl.zeros_like(place).to(tl.float32)
    else:
        return numbers.widen(tl.load(base + place))


@triton.jit
def delta_at(base, x, based, place):
    """One row's delta; `based` is the base's tile."""
    value = numbers.widen(tl.load(x + place))
    if base is None:
        return value
    else:
        return value - based


@triton.jit
def deltas(base, xs, based, place):
    """The deltas of all rows that come by value."""
    rows = ()
    for i in tl.static_range(len(xs)):
        rows = rows + (delta_at(base, xs[i], based, place),)
    return rows


@triton.jit
def delta_of(base, table, models, i, based, place, DTYPE: tl.constexpr):
    """The delta of row i of a table: `models` addresses, then as many dtype codes where DTYPE is MIXED."""
    address = tl.load(table + i)
    if DTYPE == MIXED:
        code = tl.load(table + models + i)
        if code == numbers.FLOAT32:
            delta = delta_at(base, tables.address_of(address, tl.float32, False), based, place)
        elif code == numbers.BFLOAT16:
            delta = delta_at(base, tables.address_of(address, tl.bfloat16, False), based, place)
        else:
            delta = delta_at(base, tables.address_of(address, tl.float16, False), based, place)
        return delta
    elif DTYPE == numbers.FLOAT32:
        return delta_at(base, tables.address_of(address, tl.float32, False), based, place)
    elif DTYPE == numbers.BFLOAT16:
        return delta_at(base, tables.address_of(address, tl.bfloat16, False), based, place)
    else:
        return delta_at(base, tables.address_of(address, tl.float16, False), based, place)


@triton.jit
def replaced(rows, PLACE: tl.constexpr, row):
    """A tuple with another entry at one place."""
    result = ()
    for i in tl.static_range(len(rows)):
        if i == PLACE:
            result = result + (row,)
        else:
            result = result + (rows[i],)
    return result


@triton.jit
def copies(tile, COUNT: tl.constexpr):
    """A tuple of COUNT times the same tile."""
    result = ()
    for _ in tl.static_range(COUNT):
        result = result + (tile,)
    return result


@triton.jit
def sum_of_nothing(like):
    """Tiles of -0, to which adding anything gives just that: how sums begin."""
    return tl.zeros_like(like).to(tl.float32) * -1.0  # tl.full makes +0 of -0


# -- scores -----------------------------------------------------------------------------------------------------------


@triton.jit
def clipped(delta, clip, i):
    """c, z and u of a row. clip: float32[n, 2]."""
    low = tl.load(clip + 2 * i)
    high = tl.load(clip + 2 * i + 1)
    magnitude = between((delta.to(tl.uint32, bitcast=True) & 0x7FFFFFFF).to(tl.float32, bitcast=True), low, high)
    z = normalised(magnitude, low, high - low)
    sign = direction(delta)
    return sign * magnitude, z, sign * z


@triton.jit
def strength(z, count, shift):
    """How much a row's own z counts. count: n as float32."""
    return functions.exp((z * z) * count - shift)


@triton.jit
def product_of(x, y):
    """The product of two deltas, within half of what float32 holds."""
    return between(x * y, -LARGEST_PRODUCT, LARGEST_PRODUCT)


@triton.jit
def spread_of(x, y, extremes, pair):
    """The product of two deltas, scaled by the extremes float32[pairs, 2] of the pair."""
    low = tl.load(extremes + 2 * pair)
    high = tl.load(extremes + 2 * pair + 1)
    return normalised(product_of(x, y), low, high - low)


@triton.jit
def released_by_value(rows, clip, count, shift, VARIANT: tl.constexpr):
    """The scores b and the values c of all rows, by the formulas of the released code."""
    N: tl.constexpr = len(rows)
    together = sum_of_nothing(rows[0])
    values = ()
    factors = ()
    directed = ()
    for i in tl.static_range(N):
        c, z, u = clipped(rows[i], clip, i)
        values = values + (c,)
        factors = factors + (strength(z, count, shift),)
        directed = directed + (u,)
        if VARIANT == VISION:
            together = together + u
        elif VARIANT == SCRIPT:
            together = together + rows[i]
    if VARIANT == SCRIPT:
        together = between(together, -LARGEST, LARGEST)
    scores = ()
    if VARIANT == VISION_ES:
        inter = copies(sum_of_nothing(rows[0]), N)
        for i in tl.static_range(N):
            for j in tl.static_range(i, N):
                shared = functions.tanh(directed[i] * directed[j])
                inter = replaced(inter, i, inter[i] + shared)
                if i != j:
                    inter = replaced(inter, j, inter[j] + shared)
        for i in tl.static_range(N):
            scores = scores + (factors[i] * inter[i] + 0.0,)
    else:
        for i in tl.static_range(N):
            scores = scores + (factors[i] * functions.tanh(rows[i] * together) + 0.0,)
    return scores, values


@triton.jit
def paper_by_value(rows, extremes, means, count, shift):
    """The scores of all rows by the paper's formula."""
    N: tl.constexpr = len(rows)
    inter = copies(sum_of_nothing(rows[0]), N)
    own = ()
    for i in tl.static_range(N):
        for j in tl.static_range(i, N):
            pair = i * N - i * (i - 1) // 2 + (j - i)
            spread = spread_of(rows[i], rows[j], extremes, pair)
            mean = tl.load(means + N + pair)
            shared = tl.div_rn(functions.exp(spread), tl.zeros_like(spread) + mean)
            inter = replaced(inter, i, inter[i] + shared)
            if i == j:
                strongest = functions.exp(spread * count - shift)
                own = own + (tl.div_rn(strongest, tl.zeros_like(spread) + tl.load(means + i)),)
            else:
                inter = replaced(inter, j, inter[j] + shared)
    scores = ()
    for i in tl.static_range(N):
        scores = scores + (own[i] * inter[i] + 0.0,)
    return scores


@triton.jit
def scored_by_value(rows, edges, means, count, shift, VARIANT: tl.constexpr):
    """The scores of all rows, and what is merged of them. edges: the rule's clip, or for `paper` its extremes."""
    if VARIANT == PAPER:
        return paper_by_value(rows, edges, means, count, shift), rows
    else:
        return released_by_value(rows, edges, count, shift, VARIANT)


@triton.jit
def together_in_table(base, table, models, edges, based, place, VARIANT: tl.constexpr, DTYPE: tl.constexpr):
    """script, vision: the sum over all rows that each of them is compared with."""
    together = sum_of_nothing(based)
    if VARIANT == VISION:
        for j in range(models):
            _, _, u = clipped(delta_of(base, table, models, j, based, place, DTYPE), edges, j)
            together = together + u
    elif VARIANT == SCRIPT:
        for j in range(models):
            together = together + delta_of(base, table, models, j, based, place, DTYPE)
        together = between(together, -LARGEST, LARGEST)
    return together


@triton.jit
def scored_in_table(
    base, table, models, edges, means, count, shift, i, together, based, place,
    VARIANT: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The score of row i, and what is merged of it."""
    delta = delta_of(base, table, models, i, based, place, DTYPE)
    inter = sum_of_nothing(based)
    if VARIANT == PAPER:
        for j in range(models):
            other = delta_of(base, table, models, j, based, place, DTYPE)
            pair = pair_number(tl.minimum(i, j), tl.maximum(i, j), models)
            spread = spread_of(delta, other, edges, pair)
            inter = inter + tl.div_rn(functions.exp(spread), tl.zeros_like(spread) + tl.load(means + models + pair))
        spread = spread_of(delta, delta, edges, pair_number(i, i, models))
        own = tl.div_rn(functions.exp(spread * count - shift), tl.zeros_like(spread) + tl.load(means + i))
        return own * inter + 0.0, delta
    else:
        c, z, u = clipped(delta, edges, i)
        if VARIANT == VISION_ES:
            for j in range(models):
                other = delta_of(base, table, models, j, based, place, DTYPE)
                _, _, v = clipped(other, edges, j)
                inter = inter + functions.tanh(u * v)
        else:
            inter = functions.tanh(delta * together)
        return strength(z, count, shift) * inter + 0.0, c


# -- sweeps -----------------------------------------------------------------------------------------------------------


@triton.jit
def each_row(
    base, xs, table, edges, means, models, shift, place, valid, SINK: tl.constexpr, args, state,
    VARIANT: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Hand the scores of every row of a tile to SINK(i, scores, place, valid, args, state), which returns the state.

    base: None where the rows are deltas. xs: the rows, or where they are in a table, none. place: the tile's elements,
    int64; valid: which of them count.
    """
    based = base_tile(base, place)
    count = models.to(tl.float32)
    if len(xs) > 0:
        scores, _ = scored_by_value(deltas(base, xs, based, place), edges, means, count, shift, VARIANT)
        for i in tl.static_range(len(xs)):
            state = SINK(i, scores[i], place, valid, args, state)
    else:
        together = together_in_table(base, table, models, edges, based, place, VARIANT, DTYPE)
        for i in range(models):
            score, _ = scored_in_table(
                base, table, models, edges, means, count, shift, i, together, based, place, VARIANT, DTYPE
            )
            state = SINK(i, score, place, valid, args, state)
    return state


@triton.jit
def each_tile(
    base, xs, table, edges, means, models, shift, numel, SINK: tl.constexpr, args, state,
    VARIANT: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """`each_row` of the TILES tiles of this program."""
    first = tl.program_id(0).to(tl.int64) * (TILES * BLOCK)
    for start in range(first, tl.minimum(first + TILES * BLOCK, numel), BLOCK):
        place = start + tl.arange(0, BLOCK).to(tl.int64)
        valid = place < numel
        place = tl.minimum(place, numel - 1)
        state = each_row(base, xs, table, edges, means, models, shift, place, valid, SINK, args, state, VARIANT, DTYPE)
    return state


@triton.jit
def put_scores(i, score, place, valid, args, state):
    """Store a row's scores."""
    out, stride = args
    tl.store(out + i * stride + place, numbers.canonical(score))
    return state


@triton.jit(do_not_specialize=["models", "shift", "numel"])
def pcb_scores(
    base, xs, table, edges, means, models: "i64", shift: "fp32", numel: "i64", out,
    VARIANT: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """out: float32[n, numel]."""
    models = models.to(tl.int64)
    numel = numel.to(tl.int64)
    each_tile(
        base, xs, table, edges, means, models, shift, numel, put_scores, (out, numel), (),
        VARIANT, DTYPE, BLOCK, TILES,
    )  # fmt: skip


# -- counting scores --------------------------------------------------------------------------------------------------


@triton.jit
def count_places(counts, place, inside, past, hot, zero):
    """Add 1 to counts[place] for each element that is inside, and return how many are past.

    Of what may be all over a tile, what is at the places `hot` and `zero`, the tile's sum is added at once: programs
    would otherwise queue at a single counter.
    """
    is_hot = inside & (place == hot)
    is_zero = inside & (place == zero) & (place != hot)
    three = tl.sum(is_hot.to(tl.int64) + (is_zero.to(tl.int64) << 20) + (past.to(tl.int64) << 40), axis=0)
    hot_count = three & FIELD
    zero_count = (three >> 20) & FIELD
    tl.atomic_add(counts + hot, hot_count, mask=hot_count > 0, sem="relaxed")
    tl.atomic_add(counts + zero, zero_count, mask=zero_count > 0, sem="relaxed")
    rest = inside & (place != hot) & (place != zero)
    tl.atomic_add(counts + place, tl.full(place.shape, 1, tl.int64), mask=rest, sem="relaxed")
    return three >> 40


@triton.jit
def count_window(i, score, place, valid, args, state):
    """Count a row's scores past its window and in it, and raise its highest key."""
    low, counts, highest, width = args
    key = score_key(score)
    most = tl.max(tl.where(valid, key, 0), axis=0)
    tl.atomic_max(highest + i, most, sem="relaxed")
    first = tl.load(low + i)
    at = key - first
    row = counts + i * (width + 1)
    inside = valid & (at >= 0) & (at < width)
    past = count_places(row + 1, at, inside, valid & (at >= width), most - first, KEY_OF_ZERO - first)
    tl.atomic_add(row, past, mask=past > 0, sem="relaxed")
    return state


@triton.jit(do_not_specialize=["models", "shift", "numel", "width"])
def pcb_window(
    base, xs, table, edges, means, models: "i64", shift: "fp32", numel: "i64", low, counts, highest, width: "i64",
    VARIANT: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """low: int64[n], the first keys of the windows. counts: int64[n, width + 1]. highest: int64[n]."""
    models = models.to(tl.int64)
    numel = numel.to(tl.int64)
    each_tile(
        base, xs, table, edges, means, models, shift, numel, count_window, (low, counts, highest, width.to(tl.int64)),
        (), VARIANT, DTYPE, BLOCK, TILES,
    )  # fmt: skip


@triton.jit
def half_of(key, wanted):
    """The half of keys that is counted, and which keys are; wanted: -1, or the high half of those whose low one is."""
    return tl.where(wanted == -1, key >> 16, key & 0xFFFF), (wanted == -1) | (key >> 16 == wanted)


@triton.jit
def count_halves(i, score, place, valid, args, state):
    """Count the high halves of a row's keys, or the low ones of those that begin with its prefix."""
    prefix, counts = args
    key = score_key(score)
    wanted = tl.load(prefix + i)
    half, inside = half_of(key, wanted)
    hot, _ = half_of(tl.max(tl.where(valid, key, 0), axis=0), wanted)
    zero, _ = half_of(KEY_OF_ZERO + tl.zeros_like(hot), wanted)
    count_places(counts + i * 65536, half, valid & inside, inside & (half < 0), hot, zero)
    return state


@triton.jit(do_not_specialize=["models", "shift", "numel"])
def pcb_histogram(
    base, xs, table, edges, means, models: "i64", shift: "fp32", numel: "i64", prefix, counts,
    VARIANT: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """prefix: int64[n], -1 or a high half. counts: int64[n, 65536]."""
    models = models.to(tl.int64)
    numel = numel.to(tl.int64)
    each_tile(
        base, xs, table, edges, means, models, shift, numel, count_halves, (prefix, counts), (),
        VARIANT, DTYPE, BLOCK, TILES,
    )  # fmt: skip


# -- the k-th highest score, on the device ----------------------------------------------------------------------------
#
# By radix descent: the digits of the key from the top, 8 bits each. A sweep counts the next digit among the keys that
# begin with the digits found so far, and `pick` chooses the one in which the rank lies. Four such sweeps are enough for
# any scores. One sweep is enough where a sample says between which two keys the rank must lie: it counts the keys above
# and at both, writes down the few between them, and the descent goes on among those alone.


@triton.jit
def digits_of(key, inside, prefix, bits):
    """How often each value of the 8 bits from `bits` on comes among the keys that begin with `prefix`: int32[256]."""
    matching = inside & ((key >> (bits + 8)) == prefix)
    return tl.histogram(((key >> bits) & 0xFF).to(tl.int32), DIGIT_BINS, mask=matching)


@triton.jit
def add_digits(counts, i, found):
    """Add a histogram to row i of counts."""
    bins = counts + i * DIGIT_BINS + tl.arange(0, DIGIT_BINS)
    tl.atomic_add(bins, found.to(tl.int64), mask=found > 0, sem="relaxed")


@triton.jit
def count_digits(i, score, place, valid, args, state):
    """Count the next digit of a row's keys, for rows by value in the state, which is added in the end."""
    prefix, counts, highest, bits = args
    key = score_key(score)
    found = digits_of(key, valid, tl.load(prefix + i), bits)
    if bits == 24:
        tl.atomic_max(highest + i, tl.max(tl.where(valid, key, 0), axis=0), sem="relaxed")
    if len(state) > 0:
        return replaced(state, i, state[i] + found)
    else:
        add_digits(counts, i, found)
        return state


@triton.jit(do_not_specialize=["models", "shift", "numel", "bits"])
def pcb_digits(
    base, xs, table, edges, means, models: "i64", shift: "fp32", numel: "i64", prefix, counts, highest, bits: "i64",
    missing,
    VARIANT: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """prefix: int64[n], the digits above `bits`. counts: int64[n, 256]. highest: int64[n], of the first sweep.

    missing: int32[1], for how many rows this is needed; none, and nothing is done.
    """
    models = models.to(tl.int64)
    numel = numel.to(tl.int64)
    if tl.load(missing) > 0:
        state = each_tile(
            base, xs, table, edges, means, models, shift, numel, count_digits,
            (prefix, counts, highest, bits.to(tl.int64)), copies(tl.zeros((DIGIT_BINS,), tl.int32), len(xs)),
            VARIANT, DTYPE, BLOCK, TILES,
        )  # fmt: skip
        for i in tl.static_range(len(xs)):
            add_digits(counts, i, state[i])


@triton.jit
def pcb_pick(counts, prefix, rank):
    """A program per row: add the digit to the prefix in which the rank lies, and take from the rank what lies above.

    counts: int64[n, 256]. prefix, rank: int64[n]; rank 1 is the highest.
    """
    i = tl.program_id(0)
    bins = tl.arange(0, DIGIT_BINS)
    count = tl.load(counts + i * DIGIT_BINS + bins)
    not_below = tl.sum(count, axis=0) - tl.cumsum(count, axis=0) + count
    wanted = tl.load(rank + i)
    digit = tl.maximum(tl.sum((not_below >= wanted).to(tl.int64), axis=0) - 1, 0)
    above = tl.sum(tl.where(bins > digit, count, 0), axis=0)
    tl.store(prefix + i, tl.load(prefix + i) * DIGIT_BINS + digit)
    tl.store(rank + i, wanted - above)


@triton.jit(do_not_specialize=["models", "shift", "numel", "runs", "first", "stride"])
def pcb_sample(
    base, xs, table, edges, means, models: "i64", shift: "fp32", numel: "i64", out, runs: "i64", first: "i64",
    stride: "i64",
    VARIANT: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The keys of runs of RUN neighbours, shifted, one run somewhere in each of so many equal parts of the chunk.

    out: int32[n, stride]; these runs begin at number `first`. numel // runs must be at least RUN.
    """
    models = models.to(tl.int64)
    runs = runs.to(tl.int64)
    part = numel.to(tl.int64) // runs
    first_slot = tl.program_id(0).to(tl.int64) * (TILES * BLOCK)
    for start in range(first_slot, tl.minimum(first_slot + TILES * BLOCK, runs * RUN), BLOCK):
        slot = tl.minimum(start + tl.arange(0, BLOCK).to(tl.int64), runs * RUN - 1)
        run = slot // RUN
        jitter = ((run * 0x9E3779B1) & 0x7FFFFFFF) * (part - RUN + 1) >> 31
        place = run * part + jitter + slot % RUN
        args = (out + (first.to(tl.int64) * RUN + slot), stride.to(tl.int64))
        each_row(base, xs, table, edges, means, models, shift, place, slot >= 0, put_keys, args, (), VARIANT, DTYPE)


@triton.jit
def put_keys(i, score, place, valid, args, state):
    """Store a row's shifted keys. args: where row 0's go, and how far it is from row to row."""
    target, stride = args
    tl.store(target + i * stride, ordered(score))
    return state


@triton.jit
def add_tally(i, tally, most, counts, highest):
    """Add up what `collect` has counted of a row, each of three numbers below 256 for an element."""
    wide = tally.to(tl.int64)
    three = tl.sum((wide & 0xFF) + ((wide & 0xFF00) << 12) + ((wide & 0xFF0000) << 24), axis=0)
    row = counts + 4 * i
    tl.atomic_add(row, three & FIELD, sem="relaxed")
    tl.atomic_add(row + 1, (three >> 20) & FIELD, sem="relaxed")
    tl.atomic_add(row + 2, three >> 40, sem="relaxed")
    tl.atomic_max(highest + i, tl.max(most, axis=0).to(tl.int64) + KEY_OF_ZERO, sem="relaxed")


@triton.jit
def collect(i, score, place, valid, args, state):
    """Count a row's keys above its window and at both ends, and write down those between them.

    state: for rows by value two tiles each, the three counts of an element packed, and its highest key.
    """
    window, counts, highest, keys, capacity = args
    key = ordered(score)
    low = tl.load(window + 2 * i)
    high = tl.load(window + 2 * i + 1)
    at_low = (key == low) & (low < high)
    tally = (key > high).to(tl.int32) | (key == high).to(tl.int32) << 8 | at_low.to(tl.int32) << 16
    tally = tl.where(valid, tally, 0)
    inside = valid & (key > low) & (key < high)
    cursor = counts + 4 * i + 3
    slot = tl.atomic_add(cursor + tl.zeros_like(key), tl.full(key.shape, 1, tl.int64), mask=inside, sem="relaxed")
    tl.store(keys + i * capacity + slot, key, mask=inside & (slot < capacity))
    if len(state) > 0:
        state = replaced(state, 2 * i, state[2 * i] + tally)
        return replaced(state, 2 * i + 1, tl.maximum(state[2 * i + 1], key))
    else:
        add_tally(i, tally, key, counts, highest)
        return state


@triton.jit(do_not_specialize=["models", "shift", "numel", "capacity"])
def pcb_collect(
    base, xs, table, edges, means, models: "i64", shift: "fp32", numel: "i64", window, counts, highest, keys,
    capacity: "i64",
    VARIANT: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """window: int32[n, 2], two shifted keys. highest: int64[n]. keys: int32[n, capacity], those between the two.

    counts: int64[n, 4], added to: how many are above, at the upper one, at the lower one where it is another, between.
    """
    models = models.to(tl.int64)
    numel = numel.to(tl.int64)
    zeros = tl.zeros((BLOCK,), tl.int32)
    args = (window, counts, highest, keys, capacity.to(tl.int64))
    begin = ()
    for _ in tl.static_range(len(xs)):
        begin = begin + (zeros, zeros + NAN_ORDERED)
    state = each_tile(
        base, xs, table, edges, means, models, shift, numel, collect, args, begin, VARIANT, DTYPE, BLOCK, TILES
    )
    for i in tl.static_range(len(xs)):
        add_tally(i, state[2 * i], state[2 * i + 1], counts, highest)


@triton.jit(do_not_specialize=["capacity", "bits"])
def pcb_collected_digits(keys, collected, capacity: "i64", prefix, counts, bits: "i64", BLOCK: tl.constexpr):
    """The next digit of the collected keys. collected: int64[n, 4], of which the last says how many there are."""
    capacity = capacity.to(tl.int64)
    row = tl.program_id(1)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    there = tl.minimum(tl.load(collected + 4 * row + 3), capacity)
    if start < there:
        place = start + tl.arange(0, BLOCK)
        key = tl.load(keys + row * capacity + place, mask=place < there, other=0).to(tl.int64) + KEY_OF_ZERO
        add_digits(counts, row, digits_of(key, place < there, tl.load(prefix + row), bits.to(tl.int64)))


@triton.jit(do_not_specialize=["capacity"])
def pcb_settle(rank, window, collected, capacity: "i64", prefix, found, missing):
    """A program per row: the key of its rank-th highest score, or -1 and one more is missing.

    rank: int64[n]. window, collected, capacity: as in `pcb_collect`. prefix: int64[n], what the descent among the
    collected keys found.
    """
    i = tl.program_id(0)
    wanted = tl.load(rank + i)
    above = tl.load(collected + 4 * i)
    at_high = above + tl.load(collected + 4 * i + 1)
    between_them = tl.load(collected + 4 * i + 3)
    at_low = at_high + between_them + tl.load(collected + 4 * i + 2)
    low = tl.load(window + 2 * i).to(tl.int64) + KEY_OF_ZERO
    high = tl.load(window + 2 * i + 1).to(tl.int64) + KEY_OF_ZERO
    key = tl.where(wanted <= at_low, low, -1)
    collected_all = between_them <= capacity.to(tl.int64)
    key = tl.where(wanted <= at_high + between_them, tl.where(collected_all, tl.load(prefix + i), -1), key)
    key = tl.where(wanted <= at_high, high, key)
    key = tl.where(wanted <= above, -1, key)
    tl.store(found + i, key)
    tl.atomic_add(missing, 1, mask=key < 0, sem="relaxed")


# -- extremes and sums of the paper's formula -------------------------------------------------------------------------


@triton.jit
def ordered_product(x, y):
    """The ordered bits of a product, of zeros those of +0, twice: NaN above every number, and below."""
    low = ordered(product_of(x, y) + 0.0)
    return tl.where(low == NAN_ORDERED, INF_ORDERED, low), low


@triton.jit
def widen_extremes(out, pair, least, most):
    """Widen the extremes of a pair to those of a tile."""
    tl.atomic_min(out + 2 * pair, tl.min(least, axis=0), sem="relaxed")
    tl.atomic_max(out + 2 * pair + 1, tl.max(most, axis=0), sem="relaxed")


@triton.jit(do_not_specialize=["models", "numel"])
def pcb_extremes(
    base, xs, table, models: "i64", numel: "i64", out,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """out: int32[pairs, 2], ordered bits of the least and the greatest product, which are widened."""
    models = models.to(tl.int64)
    numel = numel.to(tl.int64)
    N: tl.constexpr = len(xs)
    zeros = tl.zeros((BLOCK,), tl.int32)
    state = ()
    for _ in tl.static_range(N * (N + 1) // 2):
        state = state + (zeros + INF_ORDERED, zeros + MINUS_INF_ORDERED)
    first = tl.program_id(0).to(tl.int64) * (TILES * BLOCK)
    for start in range(first, tl.minimum(first + TILES * BLOCK, numel), BLOCK):
        place = tl.minimum(start + tl.arange(0, BLOCK).to(tl.int64), numel - 1)
        based = base_tile(base, place)
        if N > 0:
            state = wider_by_value(deltas(base, xs, based, place), state)
        else:
            for i in range(models):
                delta = delta_of(base, table, models, i, based, place, DTYPE)
                for j in range(i, models):
                    other = delta_of(base, table, models, j, based, place, DTYPE)
                    least, most = ordered_product(delta, other)
                    widen_extremes(out, pair_number(i, j, models), least, most)
    for pair in tl.static_range(N * (N + 1) // 2):
        widen_extremes(out, pair, state[2 * pair], state[2 * pair + 1])


@triton.jit
def wider_by_value(rows, state):
    """The least and greatest products so far, two tiles for each pair, with those of a tile."""
    result = ()
    for i in tl.static_range(len(rows)):
        for j in tl.static_range(i, len(rows)):
            least, most = ordered_product(rows[i], rows[j])
            both = (tl.minimum(state[len(result)], least), tl.maximum(state[len(result) + 1], most))
            result = result + both
    return result


@triton.jit
def add_limbs(limbs, value, place):
    """Add value * 2**place, value an int64 that is not negative, to a sum of 32-bit limbs, little end first."""
    first = limbs + (place >> 5)
    shift = (place & 31).to(tl.int64)
    low = (value & LIMB) << shift
    high = (value >> 32) << shift
    tl.atomic_add(first, low & LIMB, sem="relaxed")
    tl.atomic_add(first + 1, (low >> 32) + (high & LIMB), sem="relaxed")
    tl.atomic_add(first + 2, high >> 32, sem="relaxed")


@triton.jit
def sum_tile(limbs, x, valid):
    """Add a tile of finite magnitudes to an exact sum; what is not finite, or not valid, is left out.

    Those within 26 binades of the largest are added at once, as integers of 50 bits, then those within 26 binades of
    the largest that is left, and so on.
    """
    mantissa, place = exact.parts(x)
    mantissa = tl.where(valid, mantissa, 0)
    top = tl.max(tl.where(mantissa > 0, place, -1), axis=0)
    while top >= 0:
        unit = tl.maximum(top - 26, 0)
        now = place >= unit
        total = tl.sum(tl.where(now, mantissa.to(tl.int64) << tl.maximum(place - unit, 0).to(tl.int64), 0), axis=0)
        add_limbs(limbs, total, unit)
        mantissa = tl.where(now, 0, mantissa)
        top = tl.max(tl.where(mantissa > 0, place, -1), axis=0)


@triton.jit(do_not_specialize=["models", "shift", "numel"])
def pcb_sums(
    base, xs, table, extremes, means, models: "i64", shift: "fp32", numel: "i64", limbs,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """limbs: int64[n + pairs, 12], added to; `pcb_carry` makes them 32-bit again.

    Rows come as a table, however few: adding up a tile takes long enough that it may have more elements per thread, and
    one pair at a time.
    """
    models = models.to(tl.int64)
    numel = numel.to(tl.int64)
    count = models.to(tl.float32)
    first = tl.program_id(0).to(tl.int64) * (TILES * BLOCK)
    for start in range(first, tl.minimum(first + TILES * BLOCK, numel), BLOCK):
        place = start + tl.arange(0, BLOCK).to(tl.int64)
        valid = place < numel
        place = tl.minimum(place, numel - 1)
        based = base_tile(base, place)
        for i in range(models):
            delta = delta_of(base, table, models, i, based, place, DTYPE)
            spread = spread_of(delta, delta, extremes, pair_number(i, i, models))
            sum_tile(limbs + i * exact.LIMBS, functions.exp(spread * count - shift), valid)
            for j in range(i, models):
                other = delta_of(base, table, models, j, based, place, DTYPE)
                pair = pair_number(i, j, models)
                spread = spread_of(delta, other, extremes, pair)
                sum_tile(limbs + (models + pair) * exact.LIMBS, functions.exp(spread), valid)


@triton.jit
def pcb_carry(limbs):
    """A program per sum: limbs of any size become 32-bit ones."""
    row = limbs + tl.program_id(0) * exact.LIMBS
    carry = tl.zeros((), tl.int64)
    for limb in tl.static_range(exact.LIMBS):
        value = tl.load(row + limb) + carry
        tl.store(row + limb, value & LIMB)
        carry = value >> 32


# -- the merge --------------------------------------------------------------------------------------------------------


@triton.jit
def share_of(score, thresholds, i, VARIANT: tl.constexpr):
    """S of row i, from its scores. thresholds: float32[n, 2]."""
    least = tl.load(thresholds + 2 * i)
    most = tl.load(thresholds + 2 * i + 1)
    if VARIANT == PAPER:
        return tl.where(score >= least, score, 0.0)
    else:
        scaled = tl.div_rn(between(score, least, most) - least, tl.zeros_like(score) + (most - least))
        return tl.where(most > least, scaled, 0.0)


@triton.jit
def put_share(scale, stride, i, place, share):
    """Store S where somebody wants it."""
    if scale is not None:
        tl.store(scale + i * stride + place, numbers.canonical(share))


@triton.jit(do_not_specialize=["models", "shift", "numel"])
def pcb_apply(
    base, xs, table, edges, means, models: "i64", shift: "fp32", numel: "i64", thresholds, weights, out, scale,
    VARIANT: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """weights: a tuple of numbers where rows come by value, else a table of float bits. scale: float32[n, numel]."""
    models = models.to(tl.int64)
    numel = numel.to(tl.int64)
    count = models.to(tl.float32)
    first = tl.program_id(0).to(tl.int64) * (TILES * BLOCK)
    for start in range(first, tl.minimum(first + TILES * BLOCK, numel), BLOCK):
        place = tl.minimum(start + tl.arange(0, BLOCK).to(tl.int64), numel - 1)
        based = base_tile(base, place)
        mixed = sum_of_nothing(based)
        divisor = mixed
        if len(xs) > 0:
            rows = deltas(base, xs, based, place)
            scores, values = scored_by_value(rows, edges, means, count, shift, VARIANT)
            for i in tl.static_range(len(xs)):
                share = share_of(scores[i], thresholds, i, VARIANT)
                put_share(scale, numel, i, place, share)
                mixed = mixed + (values[i] * share) * weights[i]
                divisor = divisor + share
        else:
            together = together_in_table(base, table, models, edges, based, place, VARIANT, DTYPE)
            for i in range(models):
                score, value = scored_in_table(
                    base, table, models, edges, means, count, shift, i, together, based, place, VARIANT, DTYPE
                )
                share = share_of(score, thresholds, i, VARIANT)
                put_share(scale, numel, i, place, share)
                mixed = mixed + (value * share) * tables.float_of(tl.load(weights + i))
                divisor = divisor + share
        if VARIANT == PAPER:
            merged = tl.where(divisor == 0.0, 0.0, tl.div_rn(mixed, divisor))
        else:
            merged = tl.div_rn(mixed, tl.where(divisor < SMALLEST_DIVISOR, SMALLEST_DIVISOR, divisor))
        if base is not None:
            merged = based + merged
        tl.store(out + place, numbers.narrowed(merged, out.dtype.element_ty))
