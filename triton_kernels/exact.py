"""Exact sums of magnitudes, as `reference/sparsify.py` has them: integers in units of 2**-149, limbs of 32 bits.

A finite magnitude is mantissa * 2**place in those units, with a mantissa of 24 bits. A program adds the magnitudes of
its elements as 64-bit integers in a unit of its own, which is chosen by the greatest of its first tile: numbers within
WINDOW binades fit. Of other numbers there are hardly ever any; a program that meets one adds all of its numbers limb by
limb. What it has found it adds to one of COPIES copies of the limbs: an element adds less than 2**32 to a limb, so that
2**31 elements a copy may follow before one overflows. At the end one program adds the copies and carries.
"""

import triton
import triton.language as tl

from . import numbers, sparsify

LIMBS = tl.constexpr(12)
COPIES = tl.constexpr(32)
ROW = tl.constexpr(16)
"""int64 numbers that the limbs of one sum take in memory."""

WINDOW = tl.constexpr(34)
ABOVE = tl.constexpr(6)
"""A mantissa takes 24 bits, the window 34, and 16 tiles 4: 62. Up to 6 binades above the first tile's greatest fit."""


@triton.jit
def parts(x):
    """Mantissa and place of each magnitude, int32; mantissa 0 of what is not finite."""
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    bits = tl.where(bits < numbers.INF_KEY, bits, 0)
    exponent = bits >> 23
    normal = tl.minimum(exponent, 1)
    return (bits & 0x7FFFFF) | (normal << 23), exponent - normal


@triton.jit
def in_limbs(slots, place):
    """The sum of int64 numbers of less than 63 bits, times 2**place, as limbs: int64[ROW]."""
    low = tl.sum(slots & 0xFFFFFFFF, axis=0)
    high = tl.sum(slots >> 32, axis=0) + (low >> 32)
    shift = (place & 31).to(tl.int64)
    low = (low & 0xFFFFFFFF) << shift
    top = high >> 32
    high = ((high & 0xFFFFFFFF) << shift) + (low >> 32)
    top = (top << shift) + (high >> 32)
    limb = tl.arange(0, ROW) - (place >> 5)
    words = tl.where(limb == 0, low & 0xFFFFFFFF, 0) + tl.where(limb == 1, high & 0xFFFFFFFF, 0)
    return words + tl.where(limb == 2, top, 0)


@triton.jit
def by_limb(mantissa, kept, place):
    """The sums of mantissas and of the kept ones, each at its place, limb by limb: int64[ROW] both."""
    shift = (place & 31).to(tl.int64)
    shifted = mantissa.to(tl.int64) << shift
    shifted_kept = kept.to(tl.int64) << shift
    limb = place >> 5
    lane = tl.arange(0, ROW)
    words = tl.zeros((ROW,), tl.int64)
    kept_words = tl.zeros((ROW,), tl.int64)
    least = tl.min(tl.where(mantissa > 0, limb, LIMBS), axis=0)
    most = tl.max(tl.where(mantissa > 0, limb, -1), axis=0)
    for number in range(least, most + 1):
        here = tl.where(limb == number, shifted, 0)
        words += tl.where(lane == number, tl.sum(here & 0xFFFFFFFF, axis=0), 0)
        words += tl.where(lane == number + 1, tl.sum(here >> 32, axis=0), 0)
        here = tl.where(limb == number, shifted_kept, 0)
        kept_words += tl.where(lane == number, tl.sum(here & 0xFFFFFFFF, axis=0), 0)
        kept_words += tl.where(lane == number + 1, tl.sum(here >> 32, axis=0), 0)
    return words, kept_words


@triton.jit
def kept_tile(
    base, x, start, n, given, stride, model, band, by, key, tensor_low, offset, draw,
    METHOD: tl.constexpr, FOURS: tl.constexpr, SUBTRACT: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Mantissas and places of a tile of a model's delta, and the mantissas of what is kept."""
    delta = sparsify.delta_of(base, x, start, n, SUBTRACT, COMPUTE, BLOCK, WHOLE)
    mantissa, place = parts(delta)
    kept = mantissa
    if METHOD != sparsify.NONE:
        keep = sparsify.kept(
            delta, start, n, given, stride, model, band, by, key, tensor_low, offset, draw,
            METHOD, FOURS, BLOCK, WHOLE,
        )  # fmt: skip
        kept = tl.where(keep, mantissa, 0)
    return mantissa, place, kept


@triton.jit(
    do_not_specialize=["models", "n", "stride", "key", "tensor_low", "offset"],
    do_not_specialize_on_alignment=["base"],
)
def add_l1(
    base, listed, models: "i64", sums, n: "i64", given, stride: "i64", key: "i64", tensor_low: "i64", offset: "i64",
    METHOD: tl.constexpr, FOURS: tl.constexpr, SUBTRACT: tl.constexpr, COMPUTE: tl.constexpr,
    SPAN: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr, ALIGN: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Add the magnitudes of the listed models' deltas, all and kept, to sums: int64[rows, 2, COPIES, ROW]."""
    models = models.to(tl.int64)
    n = n.to(tl.int64)
    stride = stride.to(tl.int64)
    key = key.to(tl.int64)
    tensor_low = tensor_low.to(tl.int64)
    offset = offset.to(tl.int64)
    start, _, x, draw, model = sparsify.mine(listed, models, SPAN, DTYPE, ALIGN)
    if SUBTRACT:
        base = sparsify.aligned(base, ALIGN)
    end = tl.minimum(start + SPAN, n)
    band, split = sparsify.band_of(given, stride, start, model, METHOD)
    plain = (start + SPAN <= n) & (split == 0)
    lane = tl.arange(0, ROW)
    words = tl.zeros((ROW,), tl.int64)
    kept_words = tl.zeros((ROW,), tl.int64)
    if plain:
        unit = tl.full((), -1, tl.int32)
        slots = tl.zeros((BLOCK,), tl.int64)
        kept_slots = tl.zeros((BLOCK,), tl.int64)
        odd = tl.zeros((BLOCK,), tl.int32)
        for at in range(start, end, BLOCK):
            mantissa, place, kept = kept_tile(
                base, x, at, n, given, stride, model, band, 0, key, tensor_low, offset, draw,
                METHOD, FOURS, SUBTRACT, COMPUTE, BLOCK, True,
            )  # fmt: skip
            if unit < 0:
                unit = tl.maximum(tl.max(place, axis=0) - (WINDOW - ABOVE), 0)
            shift = place - unit
            # Unsigned, a negative shift is too large as well.
            fits = shift.to(tl.uint32, bitcast=True) <= WINDOW
            odd = odd | tl.where(fits, 0, mantissa)
            shift = tl.where(fits, shift, 0).to(tl.int64)
            slots += mantissa.to(tl.int64) << shift
            if METHOD != sparsify.NONE:
                kept_slots += kept.to(tl.int64) << shift
        plain = tl.max(odd, axis=0) == 0
        if plain:
            words = in_limbs(slots, unit)
            kept_words = words
            if METHOD != sparsify.NONE:
                kept_words = in_limbs(kept_slots, unit)
    if plain == 0:
        turning = sparsify.turns_in(base, x, given, stride, model, start, end, METHOD, SUBTRACT, COMPUTE)
        for at in range(start, end, PIECE):
            mantissa, place, kept = kept_tile(
                base, x, at, n, given, stride, model, turning, (at - start).to(tl.int32), key, tensor_low, offset,
                draw, METHOD, FOURS, SUBTRACT, COMPUTE, PIECE, False,
            )  # fmt: skip
            more, more_kept = by_limb(mantissa, kept, place)
            words += more
            kept_words += more_kept
    copy = (start // SPAN) % COPIES
    row = sums + model * (2 * COPIES * ROW) + copy * ROW + lane
    tl.atomic_add(row, words, mask=words != 0, sem="relaxed")
    tl.atomic_add(row + COPIES * ROW, kept_words, mask=kept_words != 0, sem="relaxed")


@triton.jit
def carry(sums, out):
    """Add the copies of one sum, and carry: limbs below 2**32. sums: int64[., COPIES, ROW]. out: int64[., LIMBS]."""
    number = tl.program_id(0).to(tl.int64)
    limb = tl.arange(0, ROW)
    low = tl.zeros((ROW,), tl.int64)
    high = tl.zeros((ROW,), tl.int64)
    for copy in range(COPIES):
        word = tl.load(sums + (number * COPIES + copy) * ROW + limb)
        low += word & 0xFFFFFFFF
        high += word >> 32
    carried = tl.zeros((), tl.int64)
    for i in tl.static_range(LIMBS):
        carried += tl.sum(tl.where(limb == i, low, 0), axis=0)
        tl.store(out + number * LIMBS + i, carried & 0xFFFFFFFF)
        carried = (carried >> 32) + tl.sum(tl.where(limb == i, high, 0), axis=0)
