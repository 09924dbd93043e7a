"""Trials of evolutionary search: `fastmerge/reference/evolve.py` in Triton.

Every tensor is read once, whatever its places: they are numbers of four bits that kernels are compiled for, the first
in the lowest bits, and 0 is x.
"""

import triton
import triton.language as tl

from . import numbers, sparsify, tables

BLEND = tl.constexpr(0)

ROW = tl.constexpr(6)
"""Numbers of a tensor in a table before its addresses."""


@triton.jit
def bits_of(x):
    """Stored values as integers, so that no NaN is touched."""
    if x.dtype == tl.float32:
        return x.to(tl.uint32, bitcast=True)
    else:
        return x.to(tl.uint16, bitcast=True)


@triton.jit
def mixed(values, factors, KIND: tl.constexpr, PLACES: tl.constexpr):
    """What crossing over puts in x's place."""
    if KIND == BLEND:
        return (factors[0] * values[0]) + (factors[1] * values[PLACES & 15])
    else:
        total = values[PLACES & 15]
        for i in tl.static_range(len(factors)):
            plus = values[(PLACES >> (8 * i + 4)) & 15]
            minus = values[(PLACES >> (8 * i + 8)) & 15]
            total = total + factors[i] * (plus - minus)
        return total


@triton.jit
def trial_tile(
    xs, factors, out, start, n, key, tensor_low, offset, draw, forced,
    KIND: tl.constexpr, PLACES: tl.constexpr, FOURS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One tile. forced: of the chunk's elements the one that always crosses over, or -1."""
    # All loads before the first use, so that they are under way together.
    loaded = ()
    for i in tl.static_range(len(xs)):
        loaded = loaded + (sparsify.raw(xs[i], start, n, BLOCK, WHOLE),)
    crosses = sparsify.drawn(offset + start, key, tensor_low, draw, BLOCK, FOURS)
    place = tl.arange(0, BLOCK)
    crosses = crosses | (place == forced - start)
    values = ()
    for i in tl.static_range(len(xs)):
        values = values + (numbers.widen(loaded[i]),)
    dtype: tl.constexpr = out.dtype.element_ty
    fresh = bits_of(numbers.narrowed(mixed(values, factors, KIND, PLACES), dtype))
    if xs[0].dtype.element_ty == dtype:
        old = bits_of(loaded[0])
    else:
        old = bits_of(numbers.narrowed(values[0], dtype))
    chosen = tl.where(crosses, fresh, old).to(dtype, bitcast=True)
    if WHOLE:
        tl.store(out + start + place, chosen)
    else:
        tl.store(out + start + place, chosen, mask=place < n - start)


@triton.jit(
    do_not_specialize=["n", "key", "tensor_low", "offset", "draw", "forced"],
    do_not_specialize_on_alignment=["x0", "x1", "x2", "x3", "x4", "x5", "x6", "x7", "out"],
)
def trial(
    x0, x1, x2, x3, x4, x5, x6, x7, factors, out, n: "i64",
    key: "i64", tensor_low: "i64", offset: "i64", draw: "i64", forced: "i64",
    COUNT: tl.constexpr, KIND: tl.constexpr, PLACES: tl.constexpr, FOURS: tl.constexpr,
    BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """The trial of one tensor, of COUNT distinct ones; those beyond are None. draw: see `sparsify.drawn`."""
    n = n.to(tl.int64)
    offset = offset.to(tl.int64)
    key = key.to(tl.int64)
    tensor_low = tensor_low.to(tl.int64)
    draw = draw.to(tl.int64)
    forced = forced.to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    xs = sparsify.all_aligned((x0, x1, x2, x3, x4, x5, x6, x7), COUNT, ALIGN)
    out = sparsify.aligned(out, ALIGN)
    if start + BLOCK <= n:
        trial_tile(
            xs, factors, out, start, n, key, tensor_low, offset, draw, forced, KIND, PLACES, FOURS, BLOCK, True
        )  # fmt: skip
    else:
        trial_tile(
            xs, factors, out, start, n, key, tensor_low, offset, draw, forced, KIND, PLACES, FOURS, BLOCK, False
        )  # fmt: skip


@triton.jit
def typed(number, DTYPE: tl.constexpr, ALIGN: tl.constexpr):
    """An address of a table as a pointer to a dtype, which is given as `numbers` has it."""
    if DTYPE == numbers.BFLOAT16:
        return sparsify.aligned(tables.address_of(number, tl.bfloat16, False), ALIGN)
    elif DTYPE == numbers.FLOAT16:
        return sparsify.aligned(tables.address_of(number, tl.float16, False), ALIGN)
    else:
        return sparsify.aligned(tables.address_of(number, tl.float32, False), ALIGN)


@triton.jit(do_not_specialize=["draw"])
def trial_tensors(
    listed, tensor_of, factors, draw: "i64",
    COUNT: tl.constexpr, KIND: tl.constexpr, PLACES: tl.constexpr, DTYPES: tl.constexpr, OUT_DTYPE: tl.constexpr,
    BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """The trials of many whole tensors.

    listed: for each its first program, elements, key, the low half of its number, the element that always crosses over,
    and the addresses of its result and of the COUNT distinct tensors. tensor_of: each program's tensor. DTYPES: of the
    distinct tensors, two bits each.
    """
    program = tl.program_id(0)
    row = listed + tl.load(tensor_of + program).to(tl.int64) * (ROW + COUNT)
    start = (program - tl.load(row)).to(tl.int64) * BLOCK
    n = tl.load(row + 1)
    key = tl.load(row + 2)
    tensor_low = tl.load(row + 3)
    forced = tl.load(row + 4)
    out = typed(tl.load(row + 5), OUT_DTYPE, ALIGN)
    xs = ()
    for i in tl.static_range(COUNT):
        xs = xs + (typed(tl.load(row + ROW + i), (DTYPES >> (2 * i)) & 3, ALIGN),)
    draw = draw.to(tl.int64)
    offset = tl.zeros((), tl.int64)
    if start + BLOCK <= n:
        trial_tile(xs, factors, out, start, n, key, tensor_low, offset, draw, forced, KIND, PLACES, True, BLOCK, True)
    else:
        trial_tile(xs, factors, out, start, n, key, tensor_low, offset, draw, forced, KIND, PLACES, True, BLOCK, False)
