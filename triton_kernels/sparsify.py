"""Which elements of a delta are kept, as bits; NaN and Inf: `fastmerge/reference/sparsify.py` in Triton.

What a rule keeps is decided tile by tile, by programs that know nothing of each other. That takes care with ties at the
end of a band, whose order in the tensor counts: how many lie before each tie block is given, and unless the cut goes
through the block at hand, all of its ties are on one side. Then a band is an interval of bit patterns, two operations.
Only in the one block that a cut goes through, a tile counts the ties between the block's beginning and its own.
"""

import triton
import triton.language as tl

from . import numbers, random, select, tables

NONE = tl.constexpr(0)
BAND = tl.constexpr(1)
BERNOULLI = tl.constexpr(2)
MASK = tl.constexpr(4)

COUNTED = tl.constexpr(1024)
UNROLLED = tl.constexpr(1)
"""Elements that are counted at once where a cut goes through a block, and how often that is done between waits."""

SOUGHT = tl.constexpr(512)
"""Elements among which a cut is sought at once: few, since the registers for it are taken from all programs."""

LANES = tl.constexpr(32)
NEVER = tl.constexpr(0x7FFFFFFF)


@triton.jit
def aligned(pointer, ALIGN: tl.constexpr):
    """A pointer that is known to be a multiple of ALIGN bytes (1: nothing is known), which makes loads wide.

    Triton finds that out of arguments itself, but then each combination of alignments is a kernel to be compiled. And
    it heeds what it is told only where it is told of a pointer that an operation has made.
    """
    if ALIGN == 1:
        return pointer
    else:
        made = pointer.to(tl.int64, bitcast=True).to(pointer.dtype, bitcast=True)
        return tl.multiple_of(made, ALIGN)


@triton.jit
def all_aligned(pointers, COUNT: tl.constexpr, ALIGN: tl.constexpr):
    """The first COUNT pointers, `aligned`."""
    made = ()
    for i in tl.static_range(COUNT):
        made = made + (aligned(pointers[i], ALIGN),)
    return made


@triton.jit
def raw(pointer, start, n, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """BLOCK values as they are stored; 0 from `n` on. WHOLE: there are that many, and no mask is needed."""
    place = tl.arange(0, BLOCK)
    if WHOLE:
        return tl.load(pointer + start + place)
    else:
        return tl.load(pointer + start + place, mask=place < n - start, other=0.0)


# -- bands -------------------------------------------------------------------------------------------------------------


@triton.jit
def cut(bound, ties_before, last):
    """Bounds as they are within one tie block: keys below the limit are past it; and whether the cut is in the block.

    bound, ties_before: pointers to the bounds and to what lies before the block. limit: uint32. last: nothing is
    known of the next block, so that the cut may lie in this one.
    """
    limit = tl.load(bound).to(tl.uint32)
    ties = tl.load(bound + 1)
    before = tl.load(ties_before)
    after = tl.load(ties_before + (1 - last.to(tl.int32)))
    tied = ties > 0
    passed = tied & (before >= ties)
    return limit + passed.to(tl.uint32), tied & (before < ties) & (last | (after > ties))


@triton.jit
def bits_below(limit):
    """A limit of keys as one of bit patterns without sign, of which there are many above infinity: NaN has one key."""
    least_nan = numbers.INF_KEY + 1
    return tl.where(limit > numbers.NAN_KEY, 0x80000000, tl.where(limit > least_nan, least_nan, limit)).to(tl.uint32)


@triton.jit
def interval(high, low):
    """What `inside` needs to know of a band: the keys from one limit to another, uint32."""
    high = bits_below(high)
    low = bits_below(low)
    some = low < high
    # Doubled bits are even: no difference to 1 is 0.
    least = tl.where(some, low << 1, 1)
    span = tl.where(some, ((high - low) << 1) - 1, 0)
    return least.to(tl.int32, bitcast=True), span.to(tl.int32, bitcast=True)


@triton.jit
def inside(delta, least, span):
    """Which magnitudes are in an interval of bit patterns: low <= bits < high, least 2 low, span 2 (high - low) - 1.

    Doubling shifts the sign out. least, span: the bits of uint32 as int32.
    """
    bits = delta.to(tl.uint32, bitcast=True)
    return (bits * 2 - least.to(tl.uint32, bitcast=True)) <= span.to(tl.uint32, bitcast=True)


@triton.jit
def intervals(bounds, ties_before, stride, block, last, first, models):
    """`interval` of the bands of the models first .. first + 31 in a tie block, and whether a cut goes through it.

    stride: numbers in a row of ties_before; block: which of them is this block's; last: whether the next one is of
    another tensor, or there is none. A lane of each warp works out one model. Where a cut goes through the block,
    the intervals do not hold.
    """
    model = tl.minimum(first + tl.arange(0, LANES), models - 1)
    bound = bounds + 4 * model
    at = ties_before + model * (2 * stride) + block
    high, high_split = cut(bound, at, last)
    low, low_split = cut(bound + 2, at + stride, last)
    least, span = interval(high, low)
    split = tl.max((high_split | low_split).to(tl.int32), axis=0) != 0
    return least, span, split


@triton.jit
def of_lane(values, i):
    """One of the int32 numbers that lanes have."""
    return tl.sum(tl.where(tl.arange(0, LANES) == i, values, 0), axis=0)


@triton.jit
def ties_between(base, x, limit, begin, end, SUBTRACT: tl.constexpr, COMPUTE: tl.constexpr):
    """How many keys from `begin` to `end`, multiples of 16 elements, equal a threshold."""
    place = tl.arange(0, COUNTED)
    # By sixteens, so that the mask does not narrow the loads.
    group = place // 16 * 16
    count = tl.zeros((COUNTED,), tl.int32)
    for at in tl.range(begin, end, COUNTED, loop_unroll_factor=UNROLLED):
        there = group < end - at
        value = numbers.widen(tl.load(x + at + place, mask=there, other=0.0))
        subtracted = value
        if SUBTRACT:
            subtracted = numbers.widen(tl.load(base + at + place, mask=there, other=0.0))
        key = numbers.magnitude_key(numbers.difference(subtracted, value, SUBTRACT, COMPUTE))
        count += (there & (key == limit)).to(tl.int32)
    return tl.sum(count, axis=0)


@triton.jit
def turn(
    base, x, bounds, ties_before, stride, block, last, row, start, end,
    SUBTRACT: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """A bound's threshold, and from which element on those that equal it are past it: int32 both.

    row: model * 2 + which of its bounds. start, end: of the elements, which are counted from `start`.
    """
    limit = tl.minimum(tl.load(bounds + 2 * row), 0x7FFFFFFF).to(tl.int32)
    ties = tl.load(bounds + 2 * row + 1)
    before = ties_before + row * stride + block
    left = ties - tl.load(before)
    after = tl.load(before + (1 - last.to(tl.int32)))
    element = tl.full((), NEVER, tl.int32)
    if (ties > 0) & (left <= 0):
        element = tl.zeros((), tl.int32)
    if (ties > 0) & (left > 0) & (last | (after > ties)):
        begin = start // select.TIE_BLOCK * select.TIE_BLOCK
        left -= ties_between(base, x, limit, begin, start, SUBTRACT, COMPUTE)
        if left <= 0:
            element = tl.zeros((), tl.int32)
        place = tl.arange(0, SOUGHT)
        for at in range(start, end, SOUGHT):
            if left > 0:
                there = place < end - at
                value = numbers.widen(tl.load(x + at + place, mask=there, other=0.0))
                subtracted = value
                if SUBTRACT:
                    subtracted = numbers.widen(tl.load(base + at + place, mask=there, other=0.0))
                key = numbers.magnitude_key(numbers.difference(subtracted, value, SUBTRACT, COMPUTE))
                tied = (there & (key == limit)).to(tl.int32)
                count = tl.sum(tied, axis=0)
                if count >= left:
                    so_far = tl.cumsum(tied, axis=0)
                    element = (at - start).to(tl.int32) + tl.sum((so_far <= left).to(tl.int32), axis=0)
                left -= count
    return limit, element


@triton.jit
def turns(
    base, x, bounds, ties_before, stride, block, last, model, start, end,
    SUBTRACT: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """`turn` of a model's two bounds."""
    first, first_element = turn(
        base, x, bounds, ties_before, stride, block, last, 2 * model, start, end, SUBTRACT, COMPUTE
    )
    second, second_element = turn(
        base, x, bounds, ties_before, stride, block, last, 2 * model + 1, start, end, SUBTRACT, COMPUTE
    )
    return (first, first_element, second, second_element)


@triton.jit
def between(delta, turns, by, BLOCK: tl.constexpr):
    """Which elements of a tile lie in a model's band, wherever its cuts lie; the tile is `by` elements past `turns`."""
    key = numbers.magnitude_key(delta)
    place = tl.arange(0, BLOCK) + by
    first = key < turns[0] + (place >= turns[1]).to(tl.int32)
    last = key < turns[2] + (place >= turns[3]).to(tl.int32)
    return first & (last == 0)


# -- the other rules ---------------------------------------------------------------------------------------------------


@triton.jit
def drawn(first, key, tensor_low, draw, BLOCK: tl.constexpr, FOURS: tl.constexpr):
    """Which of the elements first .. first + BLOCK - 1 random words keep.

    draw: int64, the stream in the high half, the greatest word that keeps in the low; negative keeps nothing.
    """
    greatest = (draw & 0xFFFFFFFF).to(tl.uint32)
    word = random.words(first, key, tensor_low, draw >> 32, BLOCK, FOURS)
    return (word <= greatest) & (draw >= 0)


@triton.jit
def masked(masks, start, n, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """What a row of bits says of a tile; start: a multiple of 8."""
    at = tl.arange(0, BLOCK // 8)
    if WHOLE:
        byte = tl.load(masks + start // 8 + at)
    else:
        byte = tl.load(masks + start // 8 + at, mask=at * 8 < n - start, other=0)
    bit = tl.arange(0, 8)
    kept = (byte.to(tl.int32)[:, None] >> bit[None, :]) & 1
    return tl.reshape(kept, (BLOCK,)) != 0


@triton.jit
def packed(kept, BLOCK: tl.constexpr):
    """Bits of bools, low bit first: uint8[BLOCK // 8]."""
    byte = tl.reshape(kept.to(tl.int32), (BLOCK // 8, 8))
    return tl.sum(byte << tl.arange(0, 8)[None, :], axis=1).to(tl.uint8)


# -- all rules ---------------------------------------------------------------------------------------------------------


@triton.jit
def kept(
    delta, start, n, given, stride, model, band, by, key, tensor_low, offset, draw,
    METHOD: tl.constexpr, FOURS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Which elements of one model's tile a rule (not NONE) keeps.

    given: (masks,) of masks; stride: bytes of a row of theirs. band: (least, span) of bands, or where a tile is not
    WHOLE its `turns`, from which it is `by` elements away. key, tensor_low, draw: see `drawn`. offset: flat index of
    the chunk's first element in its tensor.
    """
    if METHOD == BAND:
        if WHOLE:
            return inside(delta, band[0], band[1])
        else:
            return between(delta, band, by, BLOCK)
    elif METHOD == BERNOULLI:
        return drawn(offset + start, key, tensor_low, draw, BLOCK, FOURS)
    else:
        return masked(given[0] + model * stride, start, n, BLOCK, WHOLE)


@triton.jit
def bands_of(given, stride, block, last, MODELS: tl.constexpr, METHOD: tl.constexpr):
    """`interval` of each model's band in a tie block, and whether a cut goes through it."""
    bands = ()
    split = False
    if METHOD == BAND:
        least, span, split = intervals(given[0], given[1], stride, block, last, 0, MODELS)
        for i in tl.static_range(MODELS):
            bands = bands + ((of_lane(least, i), of_lane(span, i)),)
    else:
        for _ in tl.static_range(MODELS):
            bands = bands + (0,)
    return bands, split


@triton.jit
def turns_of(
    base, xs, given, stride, block, last, start, end,
    MODELS: tl.constexpr, METHOD: tl.constexpr, SUBTRACT: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """`turns` of each model, from `start` on."""
    found = ()
    for i in tl.static_range(MODELS):
        if METHOD == BAND:
            found = found + (
                turns(base, xs[i], given[0], given[1], stride, block, last, i, start, end, SUBTRACT, COMPUTE),
            )
        else:
            found = found + (0,)
    return found


# -- one model after the other -----------------------------------------------------------------------------------------
#
# What is found out about each model's delta by itself is found by programs that take one model each, from a table with
# three numbers for each model: its address, what `drawn` takes, and its row in bounds and masks. Neighbours read the
# same piece of the base, which only the first of them has to wait for.


@triton.jit
def mine(listed, models, SPAN: tl.constexpr, DTYPE: tl.constexpr, ALIGN: tl.constexpr):
    """(where the program begins, its place among the models, their tensor, what `drawn` takes, row of the rule)."""
    program = tl.program_id(0).to(tl.int64)
    place = program % models
    start = program // models * SPAN
    x = aligned(tables.address_of(tl.load(listed + 3 * place), DTYPE, False), ALIGN)
    return start, place, x, tl.load(listed + 3 * place + 1), tl.load(listed + 3 * place + 2)


@triton.jit
def band_of(given, stride, start, model, METHOD: tl.constexpr):
    """`interval` of one model's band in the tie block at `start`, and whether a cut goes through it."""
    least = tl.zeros((), tl.int32)
    span = tl.zeros((), tl.int32)
    split = tl.zeros((), tl.int32) != 0
    if METHOD == BAND:
        block = start // select.TIE_BLOCK
        last = block + 1 >= stride
        at = given[1] + model * (2 * stride) + block
        high, high_split = cut(given[0] + 4 * model, at, last)
        low, low_split = cut(given[0] + 4 * model + 2, at + stride, last)
        least, span = interval(high, low)
        split = high_split | low_split
    return (least, span), split


@triton.jit
def turns_in(
    base, x, given, stride, model, start, end,
    METHOD: tl.constexpr, SUBTRACT: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """`turns` of one model from `start` on."""
    if METHOD == BAND:
        block = start // select.TIE_BLOCK
        return turns(
            base, x, given[0], given[1], stride, block, block + 1 >= stride, model, start, end,
            SUBTRACT, COMPUTE,
        )  # fmt: skip
    else:
        zero = tl.zeros((), tl.int32)
        return (zero, zero, zero, zero)


@triton.jit
def delta_of(
    base, x, start, n,
    SUBTRACT: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """A tile of one model's delta; +0 from `n` on."""
    loaded = raw(x, start, n, BLOCK, WHOLE)
    if SUBTRACT:
        reference = numbers.widen(raw(base, start, n, BLOCK, WHOLE))
        return numbers.difference(reference, numbers.widen(loaded), True, COMPUTE)
    else:
        value = numbers.widen(loaded)
        return numbers.difference(value, value, False, COMPUTE)


# -- what is kept, as bits ---------------------------------------------------------------------------------------------


@triton.jit
def bits_tile(
    base, x, out, start, n, given, stride, model, band, by, key, tensor_low, offset, draw,
    METHOD: tl.constexpr, FOURS: tl.constexpr, SUBTRACT: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One tile of a model's mask; start: a multiple of 8."""
    delta = tl.zeros((BLOCK,), tl.float32)
    if METHOD == BAND:
        # The other rules do not look at the values.
        delta = delta_of(base, x, start, n, SUBTRACT, COMPUTE, BLOCK, WHOLE)
    if METHOD == NONE:
        keep = delta == 0.0
    else:
        keep = kept(
            delta, start, n, given, stride, model, band, by, key, tensor_low, offset, draw,
            METHOD, FOURS, BLOCK, WHOLE,
        )  # fmt: skip
    at = tl.arange(0, BLOCK // 8)
    if WHOLE:
        tl.store(out + start // 8 + at, packed(keep, BLOCK))
    else:
        keep = keep & (tl.arange(0, BLOCK) < n - start)
        tl.store(out + start // 8 + at, packed(keep, BLOCK), mask=at * 8 < n - start)


@triton.jit(
    do_not_specialize=["models", "n", "stride", "key", "tensor_low", "offset"],
    do_not_specialize_on_alignment=["base"],
)
def keep_bits(
    base, listed, models: "i64", out, n: "i64", given, stride: "i64", key: "i64", tensor_low: "i64", offset: "i64",
    METHOD: tl.constexpr, FOURS: tl.constexpr, SUBTRACT: tl.constexpr, COMPUTE: tl.constexpr,
    SPAN: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr, ALIGN: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Masks uint8[rows, ceil(n / 8)] of what is kept of the listed models; the arguments are those of the merge."""
    models = models.to(tl.int64)
    n = n.to(tl.int64)
    stride = stride.to(tl.int64)
    key = key.to(tl.int64)
    tensor_low = tensor_low.to(tl.int64)
    offset = offset.to(tl.int64)
    start, _, x, draw, model = mine(listed, models, SPAN, DTYPE, ALIGN)
    if SUBTRACT:
        base = aligned(base, ALIGN)
    row = out + model * ((n + 7) // 8)
    end = tl.minimum(start + SPAN, n)
    band, split = band_of(given, stride, start, model, METHOD)
    whole = tl.where(split, start, start + (end - start) // BLOCK * BLOCK)
    for at in range(start, whole, BLOCK):
        bits_tile(
            base, x, row, at, n, given, stride, model, band, 0, key, tensor_low, offset, draw,
            METHOD, FOURS, SUBTRACT, COMPUTE, BLOCK, True,
        )  # fmt: skip
    if whole < end:
        turning = turns_in(base, x, given, stride, model, whole, end, METHOD, SUBTRACT, COMPUTE)
        for at in range(whole, end, PIECE):
            bits_tile(
                base, x, row, at, n, given, stride, model, turning, (at - whole).to(tl.int32), key, tensor_low,
                offset, draw, METHOD, FOURS, SUBTRACT, COMPUTE, PIECE, False,
            )  # fmt: skip


# -- NaN and Inf -------------------------------------------------------------------------------------------------------


@triton.jit
def greatest(x, start, n, end, BLOCK: tl.constexpr, PIECE: tl.constexpr):
    """The greatest bits without sign from `start` to `end`: from 0x7F800000 on something is not finite."""
    most = tl.zeros((BLOCK,), tl.int32)
    rest = tl.zeros((PIECE,), tl.int32)
    whole = start + (end - start) // BLOCK * BLOCK
    for at in range(start, whole, BLOCK):
        value = numbers.widen(raw(x, at, n, BLOCK, True))
        most = tl.maximum(most, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    for at in range(whole, end, PIECE):
        value = numbers.widen(raw(x, at, n, PIECE, False))
        rest = tl.maximum(rest, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    return tl.maximum(tl.max(most, axis=0), tl.max(rest, axis=0))


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["x"])
def count_nonfinite(
    x, counts, n: "i64", SPAN: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr, ALIGN: tl.constexpr
):
    """Add how many NaNs and how many infinities there are to counts: int64[2]."""
    n = n.to(tl.int64)
    x = aligned(x, ALIGN)
    start = tl.program_id(0).to(tl.int64) * SPAN
    end = tl.minimum(start + SPAN, n)
    # Nearly always there is none, and nothing is counted.
    if greatest(x, start, n, end, BLOCK, PIECE) >= numbers.INF_KEY:
        nans = tl.zeros((PIECE,), tl.int32)
        infinities = tl.zeros((PIECE,), tl.int32)
        for at in range(start, end, PIECE):
            value = numbers.widen(raw(x, at, n, PIECE, False))
            bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
            nans += (bits > numbers.INF_KEY).to(tl.int32)
            infinities += (bits == numbers.INF_KEY).to(tl.int32)
        tl.atomic_add(counts, tl.sum(nans, axis=0).to(tl.int64), sem="relaxed")
        tl.atomic_add(counts + 1, tl.sum(infinities, axis=0).to(tl.int64), sem="relaxed")


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["x"])
def zero_nonfinite(x, n: "i64", SPAN: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr, ALIGN: tl.constexpr):
    """Store +0 where x is NaN or infinite, and nothing elsewhere."""
    n = n.to(tl.int64)
    x = aligned(x, ALIGN)
    start = tl.program_id(0).to(tl.int64) * SPAN
    end = tl.minimum(start + SPAN, n)
    if greatest(x, start, n, end, BLOCK, PIECE) >= numbers.INF_KEY:
        place = tl.arange(0, PIECE)
        for at in range(start, end, PIECE):
            value = numbers.widen(raw(x, at, n, PIECE, False))
            wrong = (value.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >= numbers.INF_KEY
            zero = tl.zeros((PIECE,), x.dtype.element_ty)
            tl.store(x + at + place, zero, mask=wrong & (place < n - at))


# -- ranks within rows -------------------------------------------------------------------------------------------------
#
# DELLA keeps an element with a probability that depends on how many keys of its row are smaller, and how many are not
# larger. Rows are cut into chunks of a length that one program can sort; an element's rank is the sum of its ranks in
# the sorted chunks of its row, found by bisection. Most elements need none: their word alone decides.
#
# The table has five numbers for each model: its address, the bits of the least probability and of what the ranks add to
# it, both float64, the stream of its random words, and its row in the mask.


@triton.jit(do_not_specialize=["models", "begin", "rows", "length", "chunks"], do_not_specialize_on_alignment=["base"])
def sort_rows(
    base, listed, models: "i64", keys, begin: "i64", rows: "i64", length: "i64", chunks: "i64",
    SUBTRACT: tl.constexpr, COMPUTE: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, SORT: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Keys of each chunk of the rows from element `begin` on, sorted: int32[models, rows, chunks, CHUNK].

    A program takes one chunk of ROWS rows. Behind a row's end follow keys above all others. SORT: else the keys are
    left as they are, and chunks follow each other without a gap.
    """
    models = models.to(tl.int64)
    rows = rows.to(tl.int64)
    length = length.to(tl.int64)
    program = tl.program_id(0).to(tl.int64)
    model = program % models
    program = program // models
    chunk = program % chunks
    first = program // chunks * ROWS
    x = tables.address_of(tl.load(listed + 5 * model), DTYPE, False)
    row = first + tl.arange(0, ROWS)[:, None]
    place = chunk * CHUNK + tl.arange(0, CHUNK)[None, :]
    there = (row < rows) & (place < length)
    at = begin + row * length + place
    value = numbers.widen(tl.load(x + at, mask=there, other=0.0))
    subtracted = value
    if SUBTRACT:
        subtracted = numbers.widen(tl.load(base + at, mask=there, other=0.0))
    key = numbers.magnitude_key(numbers.difference(subtracted, value, SUBTRACT, COMPUTE))
    if SORT:
        key = tl.sort(tl.where(there, key, 0x7FFFFFFF), dim=1)
        tl.store(keys + (model * rows + row) * (chunks * CHUNK) + place, key, mask=row < rows)
    else:
        tl.store(keys + (model * rows + row) * length + place, key, mask=there)


@triton.jit
def smaller(keys, length, highest, key, sought):
    """How many of `length` sorted keys are below each key: int32. highest: a power of two that is not below length."""
    count = tl.zeros_like(key)
    step = highest.to(tl.int32)
    while step > 0:
        probe = count + step
        inside = sought & (probe <= length)
        found = tl.load(keys + probe - 1, mask=inside, other=0x7FFFFFFF)
        count = tl.where(inside & (found < key), probe, count)
        step = step // 2
    return count


@triton.jit
def keep_limit(probability):
    """floor(p * 2**32), int64 from 0 to 2**32."""
    limit = (probability * 4294967296.0).to(tl.int64)
    return tl.minimum(tl.maximum(limit, 0), tl.full((), 1 << 32, tl.int64))


@triton.jit(
    do_not_specialize=["models", "begin", "rows", "length", "chunks", "chunk", "highest", "n", "key", "tensor_low",
                       "offset"],
    do_not_specialize_on_alignment=["base"],
)  # fmt: skip
def keep_by_rank(
    base, listed, models: "i64", keys, out, begin: "i64", rows: "i64", length: "i64", chunks: "i64", chunk: "i64",
    highest: "i64", n: "i64", key: "i64", tensor_low: "i64", offset: "i64",
    FOURS: tl.constexpr, SUBTRACT: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """What DELLA keeps of the rows from element `begin` on, in out: uint8[., ceil(n / 8)].

    keys: what `sort_rows` has left, chunks of `chunk` keys. highest: a power of two, at least `chunk`.
    """
    models = models.to(tl.int64)
    rows = rows.to(tl.int64)
    length = length.to(tl.int64)
    begin = begin.to(tl.int64)
    n = n.to(tl.int64)
    row_keys = chunks.to(tl.int64) * chunk
    program = tl.program_id(0).to(tl.int64)
    model = program % models
    start = program // models * BLOCK
    stop = rows * length
    entry = listed + 5 * model
    x = tables.address_of(tl.load(entry), DTYPE, False)
    least = tl.load(entry + 1).to(tl.float64, bitcast=True)
    spread = tl.load(entry + 2).to(tl.float64, bitcast=True)
    stream = tl.load(entry + 3)
    number = tl.load(entry + 4)
    place = tl.arange(0, BLOCK)
    there = place < stop - start
    first = begin + start
    word = random.words(offset.to(tl.int64) + first, key.to(tl.int64), tensor_low.to(tl.int64), stream, BLOCK, FOURS)
    word = word.to(tl.int64)
    zero = tl.zeros((BLOCK,), tl.float64)
    # Ranks are between 0 and 1, and rounding keeps the order, so that these are the limits' extremes.
    one_end = keep_limit(zero + least)
    other_end = keep_limit((zero + least) + spread)
    always = word < tl.minimum(one_end, other_end)
    never = word >= tl.maximum(one_end, other_end)
    sought = there & (always == 0) & (never == 0)
    value = numbers.widen(tl.load(x + first + place, mask=sought, other=0.0))
    subtracted = value
    if SUBTRACT:
        subtracted = numbers.widen(tl.load(base + first + place, mask=sought, other=0.0))
    magnitude = numbers.magnitude_key(numbers.difference(subtracted, value, SUBTRACT, COMPUTE))
    below = tl.zeros((BLOCK,), tl.int64)
    at_most = tl.zeros((BLOCK,), tl.int64)
    row = keys + (model * rows + (start + place) // length) * row_keys
    for number_of_chunk in range(0, chunks):
        sorted_keys = row + number_of_chunk * chunk
        below += smaller(sorted_keys, chunk, highest, magnitude, sought)
        at_most += smaller(sorted_keys, chunk, highest, magnitude + 1, sought)
    twice = (below + at_most - 1).to(tl.float64)
    rank = twice / (zero + 2.0 * (length - 1).to(tl.float64))
    probability = least + spread * rank
    keep = there & (always | (sought & (word < keep_limit(probability))))
    at = tl.arange(0, BLOCK // 8)
    tl.store(out + number * ((n + 7) // 8) + first // 8 + at, packed(keep, BLOCK), mask=at * 8 < stop - start)
