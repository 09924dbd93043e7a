"""Parts of light experts put onto tensors and taken off again: `fastmerge/reference/expert.py` in Triton.

One launch takes all parts that are ALONE on their tensor, one all others. A part is a row of a table, int64[parts,
FIELDS], those of a tensor one after the other:

    0 its launch's first program for it       8 its tensor's width
    1 its tensor's address                    9 whether columns have 32 bits
    2 the address of its columns             10 the bits of its scale
    3 of its values                          11 the dtypes of the tensor, the values and the base's values: as COMPUTE
    4 of the base's values, or 0                names them, in two bits each, from the lowest on
    5 of its old bits                        12 the first part of its tensor
    6 how many entries it has                13 the part behind its tensor's last one
    7 how many of them each row has          14 the tensor's number
                                             15 how often its columns are halved to find one

Where several parts of a tensor hold one place, the last of them owns it: its thread alone reads and writes there, adds
up all of them from the first to its own, and saves the old bits for all. Since columns rise within a row, the others'
entries are found by halving. The common tensor has one part, and a kernel of a third of the registers.

A column beyond its row names no place: nothing is put there, and nothing is taken off. To refuse it would be to wait.
"""

import triton
import triton.language as tl

from . import numbers, tables

FIELDS = tl.constexpr(16)

FIRST = tl.constexpr(0)
TENSOR = tl.constexpr(1)
COLUMNS = tl.constexpr(2)
VALUES = tl.constexpr(3)
BASE = tl.constexpr(4)
SAVED = tl.constexpr(5)
ENTRIES = tl.constexpr(6)
KEPT = tl.constexpr(7)
WIDTH = tl.constexpr(8)
WIDE_COLUMNS = tl.constexpr(9)
SCALE = tl.constexpr(10)
DTYPES = tl.constexpr(11)
FROM = tl.constexpr(12)
TO = tl.constexpr(13)
NUMBER = tl.constexpr(14)
STEPS = tl.constexpr(15)


# -- numbers of a dtype that the table names ---------------------------------------------------------------------------


@triton.jit
def dtype_of(part, WHICH: tl.constexpr):
    """The dtype of a part's tensor (0), values (1) or base's values (2)."""
    return (tl.load(part + DTYPES) >> (2 * WHICH)).to(tl.int32) & 3


@triton.jit
def pointer_to(address, like: tl.constexpr, ALIGN: tl.constexpr):
    """An address of a table, a multiple of so many bytes, as a pointer; 1: nothing is known of it."""
    pointer = address.to(tl.pointer_type(like))
    if ALIGN == 1:
        return pointer
    else:
        return tl.multiple_of(pointer, ALIGN)


@triton.jit
def bits_at(address, wide, place, there, WHOLE: tl.constexpr, ALIGN: tl.constexpr):
    """The bits of numbers of 32 bits, or 16 where they are not `wide`, at these places: uint32, 0 where not `there`.

    WHOLE: there are all of them, and no mask is needed.
    """
    result = tl.zeros(place.shape, tl.uint32)
    if wide:
        longs = pointer_to(address, tl.uint32, ALIGN)
        if WHOLE:
            result = tl.load(longs + place)
        else:
            result = tl.load(longs + place, mask=there, other=0)
    else:
        shorts = pointer_to(address, tl.uint16, ALIGN)
        if WHOLE:
            result = tl.load(shorts + place).to(tl.uint32)
        else:
            result = tl.load(shorts + place, mask=there, other=0).to(tl.uint32)
    return result


@triton.jit
def put_bits(address, wide, place, bits, there, WHOLE: tl.constexpr):
    """The inverse of `bits_at`; the old bits of parts, of which alone there are whole ones, begin at multiples of 8."""
    if wide:
        longs = pointer_to(address, tl.uint32, 8 if WHOLE else 1)
        if WHOLE:
            tl.store(longs + place, bits)
        else:
            tl.store(longs + place, bits, mask=there)
    else:
        shorts = pointer_to(address, tl.uint16, 8 if WHOLE else 1)
        if WHOLE:
            tl.store(shorts + place, bits.to(tl.uint16))
        else:
            tl.store(shorts + place, bits.to(tl.uint16), mask=there)


@triton.jit
def widened(bits, dtype):
    """The float32 of these bits of a dtype."""
    whole = tl.where(dtype == numbers.BFLOAT16, bits << 16, bits).to(tl.float32, bitcast=True)
    half = bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    return tl.where(dtype == numbers.FLOAT16, half, whole)


@triton.jit
def rounded(value, dtype):
    """The bits of float32 values rounded once to a dtype, uint32."""
    half = numbers.rounded_float16(value).to(tl.uint16, bitcast=True)
    short = numbers.rounded_bfloat16(value).to(tl.uint16, bitcast=True)
    narrow = tl.where(dtype == numbers.FLOAT16, half, short).to(tl.uint32)
    return tl.where(dtype == numbers.FLOAT32, numbers.canonical(value).to(tl.uint32, bitcast=True), narrow)


@triton.jit
def values_of(part, entry, there, WHOLE: tl.constexpr, ALIGN: tl.constexpr):
    """Values of a part, float32."""
    dtype = dtype_of(part, 1)
    bits = bits_at(tl.load(part + VALUES), dtype == numbers.FLOAT32, entry, there, WHOLE, ALIGN)
    return widened(bits, dtype)


@triton.jit
def base_values_of(part, entry, there, WHOLE: tl.constexpr, ALIGN: tl.constexpr):
    """The base's values of a part, float32."""
    dtype = dtype_of(part, 2)
    bits = bits_at(tl.load(part + BASE), dtype == numbers.FLOAT32, entry, there, WHOLE, ALIGN)
    return widened(bits, dtype)


@triton.jit
def columns_of(part, entry, there, WHOLE: tl.constexpr, ALIGN: tl.constexpr):
    """Columns of a part, int32."""
    bits = bits_at(tl.load(part + COLUMNS), tl.load(part + WIDE_COLUMNS) != 0, entry, there, WHOLE, ALIGN)
    return bits.to(tl.int32, bitcast=True)


# -- who holds a place -------------------------------------------------------------------------------------------------


@triton.jit
def found(part, row, column, wanted):
    """Which of the columns a part holds in these rows, and at which of its entries: int64."""
    kept = tl.load(part + KEPT)
    start = row * kept
    low = tl.zeros(column.shape, tl.int32)
    high = low + kept.to(tl.int32)
    for _ in range(0, tl.load(part + STEPS).to(tl.int32)):
        middle = low + (high - low) // 2
        left = low < high
        below = columns_of(part, start + middle, wanted & left, False, 1) < column
        low = tl.where(left & below, middle + 1, low)
        high = tl.where(left & (below == 0), middle, high)
    there = wanted & (low < kept.to(tl.int32))
    return there & (columns_of(part, start + low, there, False, 1) == column), start + low


@triton.jit
def places(
    table, number, start,
    ALONE: tl.constexpr, WHOLE: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK entries of a part: which they are, their rows and columns; whether they are there, and whether they own.

    start: the first of them, int64. WHOLE: the part has that many.
    """
    part = table + number * FIELDS
    index = tl.arange(0, BLOCK)
    entry = start + index
    there = entry < tl.load(part + ENTRIES)
    kept = tl.load(part + KEPT)
    first_row = start // kept
    # Counted from the first row, what is divided is small.
    row = first_row + ((start - first_row * kept).to(tl.uint32) + index.to(tl.uint32)) // kept.to(tl.uint32)
    column = columns_of(part, entry, there, WHOLE, ALIGN)
    owned = there & (column >= 0) & (column < tl.load(part + WIDTH))
    if not ALONE:
        for later in range(number + 1, tl.load(part + TO)):
            also, _ = found(table + later * FIELDS, row, column, owned)
            owned = owned & (also == 0)
    return entry, row, column, there, owned


@triton.jit
def worn(
    table, number, entry, row, column, old, owned,
    SAVE: tl.constexpr, ALONE: tl.constexpr, WHOLE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """The bits of the places that a part owns, with all parts on them, where their own bits are `old`.

    SAVE: the parts before get `old` for their entries.
    """
    part = table + number * FIELDS
    first = tl.load(part + FROM)
    dtype = dtype_of(part, 0)
    total = widened(old, dtype)
    value = values_of(part, entry, owned, WHOLE, ALIGN)
    if tl.load(part + BASE) != 0:
        if not ALONE:
            for earlier in range(first, number):
                other = table + earlier * FIELDS
                also, place = found(other, row, column, owned)
                counts = also & (values_of(other, place, also, False, 1) != 0.0)
                total = tl.where(counts, base_values_of(other, place, also, False, 1), total)
        total = tl.where(value != 0.0, base_values_of(part, entry, owned, WHOLE, ALIGN), total)
    if not ALONE:
        for earlier in range(first, number):
            other = table + earlier * FIELDS
            also, place = found(other, row, column, owned)
            term = values_of(other, place, also, False, 1) * tables.float_of(tl.load(other + SCALE))
            total = tl.where(also, total + term, total)
            if SAVE:
                put_bits(tl.load(other + SAVED), dtype == numbers.FLOAT32, place, old, also, False)
    return rounded(total + value * tables.float_of(tl.load(part + SCALE)), dtype)


# -- kernels -----------------------------------------------------------------------------------------------------------


@triton.jit
def work_of(table, part_of, BLOCK: tl.constexpr):
    """Which part a program works for, its first entry, and whether the part has a whole block from there on."""
    program = tl.program_id(0)
    number = tl.load(part_of + program).to(tl.int64)
    part = table + number * FIELDS
    start = (program - tl.load(part + FIRST)) * BLOCK
    return number, start, start + BLOCK <= tl.load(part + ENTRIES)


@triton.jit
def apply_block(
    table, number, start,
    ALONE: tl.constexpr, WHOLE: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`apply` for a block of a part's entries."""
    part = table + number * FIELDS
    wide = dtype_of(part, 0) == numbers.FLOAT32
    address, saved = tl.load(part + TENSOR), tl.load(part + SAVED)
    entry, row, column, there, owned = places(table, number, start, ALONE, WHOLE, ALIGN, BLOCK)
    place = row * tl.load(part + WIDTH) + column
    old = bits_at(address, wide, place, owned, False, 1)
    new = worn(table, number, entry, row, column, old, owned, True, ALONE, WHOLE, ALIGN)
    put_bits(address, wide, place, new, owned, False)
    if ALONE:
        put_bits(saved, wide, entry, old, there, WHOLE)
    else:
        put_bits(saved, wide, entry, old, owned, False)


@triton.jit
def apply(table, part_of, ALONE: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr):
    """Put parts onto their tensors, and save the old bits.

    table: see above. part_of: int32[programs]. ALONE: each is its tensor's only one. ALIGN: columns, values and bases
    begin at multiples of so many bytes.
    """
    number, start, whole = work_of(table, part_of, BLOCK)
    if whole:
        apply_block(table, number, start, ALONE, True, ALIGN, BLOCK)
    else:
        apply_block(table, number, start, ALONE, False, ALIGN, BLOCK)


@triton.jit
def changed_block(
    table, number, start,
    ALONE: tl.constexpr, WHOLE: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """How many places that a block of entries owns do not hold what was put there."""
    part = table + number * FIELDS
    wide = dtype_of(part, 0) == numbers.FLOAT32
    entry, row, column, there, owned = places(table, number, start, ALONE, WHOLE, ALIGN, BLOCK)
    place = row * tl.load(part + WIDTH) + column
    old = bits_at(tl.load(part + SAVED), wide, entry, there, WHOLE, 8)
    new = worn(table, number, entry, row, column, old, owned, False, ALONE, WHOLE, ALIGN)
    now = bits_at(tl.load(part + TENSOR), wide, place, owned, False, 1)
    return tl.sum((owned & (now != new)).to(tl.int32), axis=0)


@triton.jit
def count_changed(table, part_of, changed, any, ALONE: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr):
    """Count the places of each tensor that do not hold what was put there.

    changed: int64[tensors], added to. any: int64[1], made other than 0 where there is such a place.
    """
    number, start, whole = work_of(table, part_of, BLOCK)
    count = tl.zeros((), tl.int32)
    if whole:
        count = changed_block(table, number, start, ALONE, True, ALIGN, BLOCK)
    else:
        count = changed_block(table, number, start, ALONE, False, ALIGN, BLOCK)
    if count > 0:
        tl.atomic_add(changed + tl.load(table + number * FIELDS + NUMBER), count.to(tl.int64), sem="relaxed")
        tl.store(any, count.to(tl.int64))


@triton.jit
def revert_block(
    table, number, start,
    ALONE: tl.constexpr, WHOLE: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`revert` for a block of a part's entries."""
    part = table + number * FIELDS
    wide = dtype_of(part, 0) == numbers.FLOAT32
    entry, row, column, there, owned = places(table, number, start, ALONE, WHOLE, ALIGN, BLOCK)
    old = bits_at(tl.load(part + SAVED), wide, entry, there, WHOLE, 8)
    put_bits(tl.load(part + TENSOR), wide, row * tl.load(part + WIDTH) + column, old, owned, False)


@triton.jit
def revert(table, part_of, any, ALONE: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr):
    """Give all places their old bits back, if `count_changed` has found none to be changed."""
    number, start, whole = work_of(table, part_of, BLOCK)
    if tl.load(any) == 0:
        if whole:
            revert_block(table, number, start, ALONE, True, ALIGN, BLOCK)
        else:
            revert_block(table, number, start, ALONE, False, ALIGN, BLOCK)
