"""Histograms of magnitudes, order statistics, and elements whose rank lies in a range: `reference/select.py` in Triton.

An order statistic is found digit by digit. One sweep counts the leading digit of every key; one program for each rank
then finds the digit in which the rank falls, and leaves it, and the rank that remains among keys with that digit, in
the GPU's memory; the next sweep counts the next digit of the keys that begin like that. Nothing comes back to the host.
Digits have 7 or 8 bits, so that `tl.histogram` can count them in shared memory. It either lets a warp vote on each bit
or adds with an instruction that takes equal addresses at once (Triton 3.6 and 3.9): keys that are all equal, which
deltas of half-precision models often are, take no longer than others.

A bound (T, c) describes a rank b: an element's rank is at least b when its key is below T, or, where c > 0, equals T
and at least c equal ones come before it in the tensor. Which c those are depends on what lies before, so that a program
takes a block of TIE_BLOCK elements tile by tile, counts the ties that it passes, and knows those of earlier blocks from
a table. Only in the one tile of a tensor in which the c-th tie lies is their order within the tile worked out; and in
all blocks but the one in which that tile lies, one comparison of keys decides.

All sweeps work in blocks of TIE_BLOCK elements, one for each program. Where they take several models, the programs that
read one block of the base are neighbours, so that only the first of them has to wait for memory.
"""

import triton
import triton.language as tl

from . import numbers, tables

TIE_BLOCK = tl.constexpr(65536)

# How keys are represented: all 31 bits; those of values that are bfloat16, of which the 15 leading ones count; or the
# 15-bit keys of float16 itself, for the keys of widened float16 have 18 bits that count.
WIDE_KEYS = tl.constexpr(0)
BFLOAT16_KEYS = tl.constexpr(1)
FLOAT16_KEYS = tl.constexpr(2)

ABOVE_ALL_KEYS = tl.constexpr(1 << 31)
NOWHERE = tl.constexpr(0x7FFFFFFF)


@triton.jit
def past(key, threshold, ties, before):
    """Which elements' rank is at least that of the bound (threshold, ties), and how many elements equal the threshold.

    key: int32[BLOCK]. threshold, ties, before: int64; `before`: how many equals come before this tile in the tensor.
    """
    # Every key is below 2**31 - 1, so that this bound stands for 2**31, too.
    limit = tl.minimum(threshold, 0x7FFFFFFF).to(tl.int32)
    tied = key == limit
    result = key < limit
    count = tl.sum(tied.to(tl.int32), axis=0)
    if ties > 0:
        if before >= ties:
            result = key <= limit
        elif before + count > ties:
            ordinal = tl.cumsum(tied.to(tl.int32), axis=0) - 1
            result = result | (tied & (ordinal >= (ties - before).to(tl.int32)))
    return result, count


# -- keys ------------------------------------------------------------------------------------------------------------


@triton.jit
def key_of(value, KIND: tl.constexpr):
    """The keys of float32 values, int32; with FLOAT16_KEYS all of them are float16 numbers."""
    if KIND == FLOAT16_KEYS:
        bits = value.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.int32) & 0x7FFF
        return tl.where(bits > 0x7C00, 0x7E00, bits)
    else:
        return numbers.magnitude_key(value)


@triton.jit
def wide_key(key, KIND: tl.constexpr):
    """The 31-bit key, int64, of a single key that has been put together from all its digits."""
    if KIND == FLOAT16_KEYS:
        value = key.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        return numbers.magnitude_key(value).to(tl.int64)
    elif KIND == BFLOAT16_KEYS:
        return key << 16
    else:
        return key


@triton.jit
def tile_keys(
    base, x, start, stop,
    HAS_BASE: tl.constexpr, COMPUTE: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The keys of BLOCK deltas from `start` on, int32; -1 from `stop` on, which no key is."""
    value = numbers.loaded(x, start, stop, BLOCK, WHOLE)
    if HAS_BASE:
        delta = numbers.difference(numbers.loaded(base, start, stop, BLOCK, WHOLE), value, True, COMPUTE)
    else:
        delta = numbers.difference(value, value, False, COMPUTE)
    key = key_of(delta, KIND)
    if WHOLE:
        return key
    else:
        return tl.where(tl.arange(0, BLOCK) < stop - start, key, -1)


# -- order statistics ------------------------------------------------------------------------------------------------
#
# The table of a descent over T tensors of n models, all int64 (a row of the counts and the state is a tensor, a model,
# and which of its two ranks):
#
#   2 n numbers           the slots (2 * model + which), those in which some rank is to be found first
#   for each tensor       n addresses of the models, 2 n ranks, and with CHUNKED also:
#                         the address of the base, the number of elements, the first of its blocks
#
# Without CHUNKED there is one tensor, and what the table lacks are arguments.


@triton.jit
def block_and_model(models):
    """Which block, and which of so many models or slots, a program takes: int64."""
    program = tl.program_id(0)
    count = models.to(tl.int32)
    return (program // count).to(tl.int64), (program % count).to(tl.int64)


@triton.jit
def tensor_entry(table, tensor, models):
    """Where a tensor's part of the table begins."""
    return table + 2 * models + tensor * (3 * models + 3)


@triton.jit
def tensor_length(entry, models, numel, CHUNKED: tl.constexpr):
    """How many elements a tensor has."""
    if CHUNKED:
        return tl.load(entry + 3 * models + 1)
    else:
        return numel


@triton.jit
def first_block(entry, models, CHUNKED: tl.constexpr):
    """The first block of a tensor among those of all tensors."""
    if CHUNKED:
        return tl.load(entry + 3 * models + 2)
    else:
        return models * 0


@triton.jit
def base_pointer(entry, models, base, HAS_BASE: tl.constexpr, CHUNKED: tl.constexpr, ALIGNED: tl.constexpr):
    """A tensor's base."""
    if HAS_BASE and CHUNKED:
        return tables.address_of(tl.load(entry + 3 * models), base.dtype.element_ty, ALIGNED)
    else:
        return base


@triton.jit
def digit_counts(key, prefix, SHIFT: tl.constexpr, WIDTH: tl.constexpr, FIRST: tl.constexpr, WHOLE: tl.constexpr):
    """How many of the keys that begin with `prefix` have each digit (of WIDTH bits from bit SHIFT on), int32[bins]."""
    digit = (key >> SHIFT) & ((1 << WIDTH) - 1)
    if FIRST and WHOLE:
        return tl.histogram(digit, 1 << WIDTH)
    elif FIRST:
        return tl.histogram(digit, 1 << WIDTH, mask=key >= 0)
    else:
        return tl.histogram(digit, 1 << WIDTH, mask=(key >> (SHIFT + WIDTH)) == prefix)


@triton.jit
def block_digit_counts(
    base, x, start, stop, prefix,
    HAS_BASE: tl.constexpr, COMPUTE: tl.constexpr, KIND: tl.constexpr,
    SHIFT: tl.constexpr, WIDTH: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`digit_counts` of all elements from start to stop: at most a block, so that no count overflows."""
    counted = tl.zeros([1 << WIDTH], tl.int32)
    whole = ((stop - start) // BLOCK).to(tl.int32)
    for tile in range(0, whole):
        key = tile_keys(base, x, start + tile * BLOCK, stop, HAS_BASE, COMPUTE, KIND, BLOCK, True)
        counted += digit_counts(key, prefix, SHIFT, WIDTH, FIRST, True)
    rest = start + whole * BLOCK
    if rest < stop:
        key = tile_keys(base, x, rest, stop, HAS_BASE, COMPUTE, KIND, BLOCK, False)
        counted += digit_counts(key, prefix, SHIFT, WIDTH, FIRST, False)
    return counted


@triton.jit(do_not_specialize=["models", "slots", "numel", "blocks"])
def count_digit(
    table, tensor_of, base, state, counts, found, models: "i64", slots: "i64", numel: "i64", blocks: "i64",
    X: tl.constexpr, HAS_BASE: tl.constexpr, COMPUTE: tl.constexpr, KIND: tl.constexpr,
    SHIFT: tl.constexpr, WIDTH: tl.constexpr, FIRST: tl.constexpr, KEPT: tl.constexpr,
    CHUNKED: tl.constexpr, TOGETHER: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count one digit of the keys that begin with the row's prefix. One program for each block and slot.

    table: see above. tensor_of: with CHUNKED, int32[blocks], the tensor of each block. state: int64[rows, 2], each
    row's prefix and remaining rank; not read where FIRST. counts: int64[rows, 1 << WIDTH], added to. found:
    int32[slots, blocks, 1 << WIDTH], the counts of each block, with KEPT. X: the models' type. TOGETHER: all tensors
    are parts of one vector and share row 0.
    """
    models = models.to(tl.int64)
    blocks = blocks.to(tl.int64)
    block, active = block_and_model(slots)
    slot = tl.load(table + active)
    tensor = models * 0
    if CHUNKED:
        tensor = tl.load(tensor_of + block).to(tl.int64)
    entry = tensor_entry(table, tensor, models)
    length = tensor_length(entry, models, numel.to(tl.int64), CHUNKED)
    rank = tl.load(entry + models + slot)
    row = models * 0 if TOGETHER else tensor * 2 * models + slot
    if TOGETHER or (rank > 0 and rank < length):
        prefix = tl.full([], 0, tl.int32) if FIRST else tl.load(state + 2 * row).to(tl.int32)
        x = tables.address_of(tl.load(entry + slot // 2), X, ALIGNED)
        start = (block - first_block(entry, models, CHUNKED)) * TIE_BLOCK
        counted = block_digit_counts(
            base_pointer(entry, models, base, HAS_BASE, CHUNKED, ALIGNED), x, start,
            tl.minimum(start + TIE_BLOCK, length), prefix,
            HAS_BASE, COMPUTE, KIND, SHIFT, WIDTH, FIRST, BLOCK,
        )  # fmt: skip
        digit = tl.arange(0, 1 << WIDTH)
        tl.atomic_add(counts + (row << WIDTH) + digit, counted.to(tl.int64), mask=counted > 0, sem="relaxed")
        if KEPT:
            tl.store(found + ((active * blocks + block) << WIDTH) + digit, counted)


@triton.jit
def located(counts, rank, WIDTH: tl.constexpr):
    """The digit in which a rank (1 is the largest key) falls, the rank among the keys of that digit, and their number.

    counts: int64[1 << WIDTH], which is cleared for the next digit.
    """
    digit = tl.arange(0, 1 << WIDTH)
    equal = tl.load(counts + digit)
    above = tl.sum(equal, axis=0) - tl.cumsum(equal, axis=0)
    here = (above < rank) & (rank <= above + equal)
    tl.store(counts + digit, tl.zeros_like(equal))
    where = tl.sum(tl.where(here, digit, 0), axis=0).to(tl.int64)
    return where, rank - tl.sum(tl.where(here, above, 0), axis=0), tl.sum(tl.where(here, equal, 0), axis=0)


@triton.jit(do_not_specialize=["models", "slots"])
def descend(table, state, counts, models: "i64", slots: "i64", WIDTH: tl.constexpr, FIRST: tl.constexpr):
    """Choose the digit in which each row's remaining rank falls. One program for each tensor and slot."""
    models = models.to(tl.int64)
    tensor, active = block_and_model(slots)
    slot = tl.load(table + active)
    row = tensor * 2 * models + slot
    if FIRST:
        prefix = models * 0
        rank = tl.load(tensor_entry(table, tensor, models) + models + slot)
    else:
        prefix = tl.load(state + 2 * row)
        rank = tl.load(state + 2 * row + 1)
    digit, rank, _ = located(counts + (row << WIDTH), rank, WIDTH)
    tl.store(state + 2 * row, prefix << WIDTH | digit)
    tl.store(state + 2 * row + 1, rank)


@triton.jit(do_not_specialize=["models", "numel", "blocks"])
def settle(
    table, state, counts, found, bounds, ties_before, models: "i64", numel: "i64", blocks: "i64",
    KIND: tl.constexpr, WIDTH: tl.constexpr, CHUNKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Choose the last digit, write each row's bound, and how many ties come before each block.

    One program for each tensor and slot, those where nothing is to be found included. found: the last digit's counts
    for each block; that of the digit chosen is the number of ties. bounds: int64[rows, 2]. ties_before: int64[2 n,
    blocks].
    """
    models = models.to(tl.int64)
    blocks = blocks.to(tl.int64)
    tensor, active = block_and_model(2 * models)
    slot = tl.load(table + active)
    row = tensor * 2 * models + slot
    entry = tensor_entry(table, tensor, models)
    length = tensor_length(entry, models, numel.to(tl.int64), CHUNKED)
    rank = tl.load(entry + models + slot)
    threshold = tl.where(rank <= 0, models * 0 + ABOVE_ALL_KEYS, models * 0)
    ties = models * 0
    digit = models * 0
    if rank > 0 and rank < length:
        digit, remaining, equal = located(counts + (row << WIDTH), tl.load(state + 2 * row + 1), WIDTH)
        threshold = wide_key(tl.load(state + 2 * row) << WIDTH | digit, KIND)
        ties = tl.where(remaining < equal, remaining, 0)
    tl.store(bounds + 2 * row, threshold)
    tl.store(bounds + 2 * row + 1, ties)

    first = first_block(entry, models, CHUNKED)
    own = tl.maximum((length + TIE_BLOCK - 1) // TIE_BLOCK, 1)
    before = models * 0
    for start in range(0, own.to(tl.int32), BLOCK):
        block = start + tl.arange(0, BLOCK)
        inside = block < own
        tied = tl.zeros([BLOCK], tl.int64)
        if ties > 0:
            tied = tl.load(found + ((active * blocks + first + block) << WIDTH) + digit, mask=inside, other=0).to(
                tl.int64
            )
        tl.store(ties_before + slot * blocks + first + block, before + tl.cumsum(tied, axis=0) - tied, mask=inside)
        before += tl.sum(tied, axis=0)


@triton.jit
def write_magnitude(state, counts, out, KIND: tl.constexpr, WIDTH: tl.constexpr):
    """Choose the last digit of row 0, and write the magnitude: float32[1]."""
    digit, _, _ = located(counts, tl.load(state + 1), WIDTH)
    key = wide_key(tl.load(state) << WIDTH | digit, KIND)
    tl.store(out, key.to(tl.uint32).to(tl.float32, bitcast=True))


# -- histograms ------------------------------------------------------------------------------------------------------
#
# The table of a histogram over n models: for each the address, a number (a prefix, or a window's first key), and the
# row of the result.


@triton.jit
def tally(counts, place, counted):
    """Add to counts[place] the number of elements there, of those that are `counted`.

    Atomic additions to one address wait for each other, and many elements of a delta are equal: zero above all. So the
    tile's least and greatest place are added as sums; nothing else is left where all its keys are equal.
    """
    one: tl.constexpr = counts.dtype.element_ty
    least = tl.min(tl.where(counted, place, NOWHERE), axis=0)
    if least < NOWHERE:
        greatest = tl.max(tl.where(counted, place, -1), axis=0)
        tl.atomic_add(counts + least, tl.sum((place == least).to(tl.int32), axis=0).to(one), sem="relaxed")
        if greatest > least:
            tl.atomic_add(counts + greatest, tl.sum((place == greatest).to(tl.int32), axis=0).to(one), sem="relaxed")
            between = counted & (place > least) & (place < greatest)
            tl.atomic_add(counts + place, between.to(one), mask=between, sem="relaxed")


@triton.jit
def tally_digit(key, prefix, counts, SHIFT: tl.constexpr, WIDTH: tl.constexpr):
    """Count the digit of those keys that begin with a prefix; with the leading digit that is 0."""
    counted = (key >> (SHIFT + WIDTH)) == prefix
    tally(counts, tl.where(counted, (key >> SHIFT) & ((1 << WIDTH) - 1), -1), counted)


@triton.jit(do_not_specialize=["models", "numel", "copies"])
def count_keys(
    table, base, counts, models: "i64", numel: "i64", copies: "i64",
    X: tl.constexpr, HAS_BASE: tl.constexpr, COMPUTE: tl.constexpr, KIND: tl.constexpr,
    SHIFT: tl.constexpr, WIDTH: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count a wide digit of the keys that begin with each model's prefix. One program for each block and model.

    counts: [rows, copies, 1 << WIDTH], added to. Programs take turns with the copies, to meet less often.
    """
    models = models.to(tl.int64)
    numel = numel.to(tl.int64)
    block, model = block_and_model(models)
    entry = table + 3 * model
    x = tables.address_of(tl.load(entry), X, ALIGNED)
    prefix = tl.load(entry + 1).to(tl.int32)
    mine = counts + ((tl.load(entry + 2) * copies.to(tl.int64) + block % copies.to(tl.int64)) << WIDTH)
    start = block * TIE_BLOCK
    stop = tl.minimum(start + TIE_BLOCK, numel)
    whole = ((stop - start) // BLOCK).to(tl.int32)
    for tile in range(0, whole):
        key = tile_keys(base, x, start + tile * BLOCK, stop, HAS_BASE, COMPUTE, KIND, BLOCK, True)
        tally_digit(key, prefix, mine, SHIFT, WIDTH)
    rest = start + whole * BLOCK
    if rest < stop:
        key = tile_keys(base, x, rest, stop, HAS_BASE, COMPUTE, KIND, BLOCK, False)
        tally_digit(key, prefix, mine, SHIFT, WIDTH)


@triton.jit
def tally_window(key, low, width, counts):
    """Count the keys inside a window of `width` keys from `low` on, and return how many lie past it."""
    place = key - low
    # A key of -1 is none; it lies before every window, for `low` is no less than 0.
    inside = (place >= 0) & (place < width)
    tally(counts, tl.where(inside, place, -1), inside)
    return tl.sum((place >= width).to(tl.int32), axis=0)


@triton.jit(do_not_specialize=["models", "numel", "width"])
def count_window(
    table, base, counts, models: "i64", numel: "i64", width: "i64",
    X: tl.constexpr, HAS_BASE: tl.constexpr, COMPUTE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count keys past and inside each model's window. One program for each block and model.

    counts: int64[rows, 1 + width], added to: first the keys past the window, then each key in it.
    """
    models = models.to(tl.int64)
    numel = numel.to(tl.int64)
    width = width.to(tl.int64)
    block, model = block_and_model(models)
    entry = table + 3 * model
    x = tables.address_of(tl.load(entry), X, ALIGNED)
    # Every key is below 2**31 - 1, so that a window that begins there is as empty as one that begins at 2**31.
    low = tl.minimum(tl.load(entry + 1), 0x7FFFFFFF).to(tl.int32)
    most = tl.minimum(width, 0x7FFFFFFF).to(tl.int32)
    mine = counts + tl.load(entry + 2) * (width + 1)
    start = block * TIE_BLOCK
    stop = tl.minimum(start + TIE_BLOCK, numel)
    whole = ((stop - start) // BLOCK).to(tl.int32)
    beyond = tl.full([], 0, tl.int32)
    for tile in range(0, whole):
        key = tile_keys(base, x, start + tile * BLOCK, stop, HAS_BASE, COMPUTE, WIDE_KEYS, BLOCK, True)
        beyond += tally_window(key, low, most, mine + 1)
    rest = start + whole * BLOCK
    if rest < stop:
        key = tile_keys(base, x, rest, stop, HAS_BASE, COMPUTE, WIDE_KEYS, BLOCK, False)
        beyond += tally_window(key, low, most, mine + 1)
    if beyond > 0:
        tl.atomic_add(mine, beyond.to(tl.int64), sem="relaxed")


# -- ties and masks --------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["models", "numel", "blocks"])
def count_ties(
    table, base, bounds, out, models: "i64", numel: "i64", blocks: "i64",
    X: tl.constexpr, HAS_BASE: tl.constexpr, COMPUTE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """How many keys equal each bound that cuts a group of equals. One program for each block and model.

    bounds: int64[rows, 2, 2]. out: int64[rows, 2, blocks].
    """
    models = models.to(tl.int64)
    numel = numel.to(tl.int64)
    blocks = blocks.to(tl.int64)
    block, model = block_and_model(models)
    entry = table + 3 * model
    row = tl.load(entry + 2)
    bound = bounds + 4 * row
    # -2 is no key, nor what stands behind the last one.
    first = tl.where(tl.load(bound + 1) > 0, tl.load(bound), -2).to(tl.int32)
    last = tl.where(tl.load(bound + 3) > 0, tl.load(bound + 2), -2).to(tl.int32)
    at_first = tl.zeros([BLOCK], tl.int32)
    at_last = tl.zeros([BLOCK], tl.int32)
    if first >= 0 or last >= 0:
        x = tables.address_of(tl.load(entry), X, ALIGNED)
        start = block * TIE_BLOCK
        stop = tl.minimum(start + TIE_BLOCK, numel)
        whole = ((stop - start) // BLOCK).to(tl.int32)
        for tile in range(0, whole):
            key = tile_keys(base, x, start + tile * BLOCK, stop, HAS_BASE, COMPUTE, WIDE_KEYS, BLOCK, True)
            at_first += (key == first).to(tl.int32)
            at_last += (key == last).to(tl.int32)
        rest = start + whole * BLOCK
        if rest < stop:
            key = tile_keys(base, x, rest, stop, HAS_BASE, COMPUTE, WIDE_KEYS, BLOCK, False)
            at_first += (key == first).to(tl.int32)
            at_last += (key == last).to(tl.int32)
    tl.store(out + 2 * row * blocks + block, tl.sum(at_first, axis=0).to(tl.int64))
    tl.store(out + (2 * row + 1) * blocks + block, tl.sum(at_last, axis=0).to(tl.int64))


@triton.jit
def block_limit(threshold, ties, ties_before, block, blocks):
    """The greatest key whose rank in a block is at least that of the bound, how many equals come before the block, and
    whether there is such a key: in the block that the c-th tie divides there is none.
    """
    before = tl.load(ties_before + block)
    # Past the last block nothing is known.
    after = tl.load(ties_before + block + 1, mask=block + 1 < blocks, other=NOWHERE)
    all_past = (ties > 0) & (before >= ties)
    limit = tl.minimum(threshold - 1 + all_past.to(tl.int64), NOWHERE).to(tl.int32)
    return limit, before, (ties == 0) | all_past | ((block + 1 < blocks) & (after <= ties))


@triton.jit
def store_mask(out, start, stop, kept, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """Store one tile of a mask as uint8."""
    place = tl.arange(0, BLOCK)
    if WHOLE:
        tl.store(out + start + place, kept.to(tl.uint8))
    else:
        tl.store(out + start + place, kept.to(tl.uint8), mask=place < stop - start)


@triton.jit
def mask_by_limits(x, out, start, stop, first, last, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """Mark the keys of one tile that lie in (last, first]."""
    key = tile_keys(x, x, start, stop, False, numbers.FLOAT32, WIDE_KEYS, BLOCK, WHOLE)
    store_mask(out, start, stop, (key <= first) & (key > last), BLOCK, WHOLE)


@triton.jit(do_not_specialize=["numel", "blocks"])
def mask_band(
    x, bounds, ties_before, out, numel: "i64", blocks: "i64", BLOCK: tl.constexpr, WALKED: tl.constexpr
):  # fmt: skip
    """Mark the elements whose rank lies between two bounds. One program for each block.

    bounds: int64[2, 2]. ties_before: int64[2, blocks]. out: uint8[numel]. A block is compared with two keys, in tiles
    of BLOCK elements. Only that in which a bound cuts a group of equals is walked through, in tiles of WALKED.
    """
    numel = numel.to(tl.int64)
    blocks = blocks.to(tl.int64)
    block = tl.program_id(0).to(tl.int64)
    first = tl.load(bounds)
    first_ties = tl.load(bounds + 1)
    last = tl.load(bounds + 2)
    last_ties = tl.load(bounds + 3)
    first_limit, first_before, first_known = block_limit(first, first_ties, ties_before, block, blocks)
    last_limit, last_before, last_known = block_limit(last, last_ties, ties_before + blocks, block, blocks)
    start = block * TIE_BLOCK
    stop = tl.minimum(start + TIE_BLOCK, numel)
    if first_known & last_known:
        whole = ((stop - start) // BLOCK).to(tl.int32)
        for tile in range(0, whole):
            mask_by_limits(x, out, start + tile * BLOCK, stop, first_limit, last_limit, BLOCK, True)
        rest = start + whole * BLOCK
        if rest < stop:
            mask_by_limits(x, out, rest, stop, first_limit, last_limit, BLOCK, False)
    else:
        for tile in range(0, ((stop - start + WALKED - 1) // WALKED).to(tl.int32)):
            here = start + tile * WALKED
            key = tile_keys(x, x, here, stop, False, numbers.FLOAT32, WIDE_KEYS, WALKED, False)
            after_first, equal_first = past(key, first, first_ties, first_before)
            after_last, equal_last = past(key, last, last_ties, last_before)
            store_mask(out, here, stop, after_first & (after_last == 0), WALKED, False)
            first_before += equal_first
            last_before += equal_last
