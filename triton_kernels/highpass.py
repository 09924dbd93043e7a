"""Products and masks of the frequency filter: what `fastmerge/backends/highpass_on_gpus.py` asks of a floor, in Triton.

This family alone does not have the reference's bits, but a tolerance (docs/numbers.md), and so it alone multiplies
matrices by the hardware's instructions for that. On NVIDIA GPUs a float32 product is three products of TF32 numbers
(PRECISION "tf32x3": of both factors what TF32 holds of them, and what it holds of the rest), which is as exact as
float32; what a tile adds up to is added to what came before as float32, apart from those instructions, which truncate.

Of a matrix both halves of the rows are loaded together, because what is projected is their sum and their difference,
and both products are at hand when a program writes its rows above and below: the matrix passes through once.
"""

import triton
import triton.language as tl

from . import numbers


@triton.jit
def tile(pointer, row, rows, column, columns, stride):
    """Where a tile of a matrix with rows of `stride` elements lies, and which of it is there."""
    at = pointer + row.to(tl.int64)[:, None] * stride + column[None, :]
    return at, (row < rows)[:, None] & (column < columns)[None, :]


@triton.jit
def loaded(pointer, row, rows, column, columns, stride):
    """A tile as float32, 0 where nothing is there."""
    at, there = tile(pointer, row, rows, column, columns, stride)
    return numbers.widen(tl.load(at, mask=there, other=0.0))


@triton.jit
def stored(pointer, row, rows, column, columns, stride, value):
    """Store what is there of a tile, rounded once."""
    at, there = tile(pointer, row, rows, column, columns, stride)
    tl.store(at, numbers.narrowed(value, pointer.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["rows", "span", "splits", "matrices"])
def project(
    x, even, odd, out, rows, width, even_ranks, odd_ranks, span, splits, matrices,
    CLASSES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of each class its basis, transposed, times the sums, or differences, of both halves of the rows.

    x: [matrices, CLASSES * rows, width]. even, odd: float32[rows, ranks] of each class; with CLASSES 1 the whole matrix
    is `even`. out: float32[splits, matrices, ranks of both, width]: each split adds up `span` rows, a multiple of ROWS.
    A program takes COLUMNS columns of one split, and RANKS vectors of each class; those beside it take other vectors of
    the same columns, which are in the cache then.
    """
    blocks = tl.cdiv(tl.maximum(even_ranks, odd_ranks), RANKS)
    across = tl.cdiv(width, COLUMNS)
    program = tl.program_id(0)
    rank = program % blocks * RANKS + tl.arange(0, RANKS)
    column = program // blocks % across * COLUMNS + tl.arange(0, COLUMNS)
    rest = program // blocks // across
    split = rest % splits
    matrix = (rest // splits).to(tl.int64)
    upper = x + matrix * CLASSES * rows * width
    first = split * span
    last = tl.minimum(first + span, rows)
    sums = tl.zeros((RANKS, COLUMNS), tl.float32)
    differences = tl.zeros((RANKS, COLUMNS), tl.float32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        above = loaded(upper, row, last, column, width, width)
        basis = loaded(even, row, last, rank, even_ranks, even_ranks)
        if CLASSES == 2:
            below = loaded(upper + rows.to(tl.int64) * width, row, last, column, width, width)
            other = loaded(odd, row, last, rank, odd_ranks, odd_ranks)
            differences = tl.dot(tl.trans(other), above - below, differences, input_precision=PRECISION)
            above = above + below
        sums = tl.dot(tl.trans(basis), above, sums, input_precision=PRECISION)
    target = out + (split * matrices.to(tl.int64) + matrix) * (even_ranks + odd_ranks) * width
    stored(target, rank, even_ranks, column, width, width, sums)
    if CLASSES == 2:
        stored(target + even_ranks.to(tl.int64) * width, rank, odd_ranks, column, width, width, differences)


@triton.jit
def product(
    basis, coefficients, row, rows, column, width, ranks,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of basis [rows, ranks] times coefficients [ranks, width]."""
    result = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, ranks, RANKS):
        rank = start + tl.arange(0, RANKS)
        left = loaded(basis, row, rows, rank, ranks, ranks)
        right = loaded(coefficients, rank, ranks, column, width, width)
        result = tl.dot(left, right, result, input_precision=PRECISION)
    return result


@triton.jit(do_not_specialize=["rows"])
def subtract(
    x, even, odd, coefficients, out, rows, width, even_ranks, odd_ranks,
    CLASSES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Take both classes' bases times coefficients off the rows above; the lower half has the second one negated.

    x, out: [matrices, CLASSES * rows, width]; the rest as in `project`, with coefficients in the place of one split.
    A program takes ROWS rows of the upper half and those of the lower half, COLUMNS columns each.
    """
    across = tl.cdiv(width, COLUMNS)
    down = tl.cdiv(rows, ROWS)
    program = tl.program_id(0)
    column = program % across * COLUMNS + tl.arange(0, COLUMNS)
    row = program // across % down * ROWS + tl.arange(0, ROWS)
    matrix = (program // across // down).to(tl.int64)
    start = matrix * CLASSES * rows * width
    own = coefficients + matrix * (even_ranks + odd_ranks) * width
    alike = product(even, own, row, rows, column, width, even_ranks, ROWS, COLUMNS, RANKS, PRECISION)
    if CLASSES == 2:
        own += even_ranks.to(tl.int64) * width
        opposed = product(odd, own, row, rows, column, width, odd_ranks, ROWS, COLUMNS, RANKS, PRECISION)
        lower = start + rows.to(tl.int64) * width
        below = loaded(x + lower, row, rows, column, width, width)
        stored(out + lower, row, rows, column, width, width, below - (alike - opposed))
        alike += opposed
    above = loaded(x + start, row, rows, column, width, width)
    stored(out + start, row, rows, column, width, width, above - alike)


@triton.jit
def square(index, size, WRAPPED: tl.constexpr):
    """What an index of so many adds to a squared distance: int64."""
    if WRAPPED:
        away = tl.minimum(index, size - index)
    else:
        away = index - size // 2
    return away.to(tl.int64) * away


@triton.jit
def mirrored(index, size):
    """The index of the opposite frequency."""
    return tl.where(index == 0, 0, size - index)


@triton.jit
def mask_of(squared, least, most, ring):
    """What the mask is at a squared distance: 0, 1 or 2, float32."""
    inside = (squared >= least) & (squared <= most)
    return tl.where(inside, tl.where(squared == ring, 2.0, 1.0), 0.0)


@triton.jit(do_not_specialize=["lines", "first", "size", "across", "least", "most", "ring"])
def mask(
    spectrum, lines, first, size, across, least: "i64", most: "i64", ring: "i64", scale: "fp32",
    WRAPPED: tl.constexpr, MIRRORED: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Multiply lines of a spectrum by `scale` times the symmetrised mask, in place; see `filters.Limits`.

    spectrum: float32[matrices, lines, across, 2]. A program takes BLOCK numbers of a line, the parts of half as many.
    EVEN: lines begin at multiples of 16 bytes.
    """
    blocks = tl.cdiv(2 * across, BLOCK)
    program = tl.program_id(0)
    owner = program // blocks
    line = first + owner % lines
    start = program % blocks * BLOCK
    part = start + tl.arange(0, BLOCK)
    place = part // 2
    least = least.to(tl.int64)
    most = most.to(tl.int64)
    ring = ring.to(tl.int64)
    squared = square(line, size, WRAPPED) + square(place, across, WRAPPED)
    weight = mask_of(squared, least, most, ring)
    if MIRRORED:
        opposite = square(mirrored(line, size), size, False) + square(mirrored(place, across), across, False)
        weight = 0.5 * (weight + mask_of(opposite, least, most, ring))
    offset = owner.to(tl.int64) * across * 2
    if EVEN:
        offset = tl.multiple_of(offset, 4)
    at = spectrum + offset + part
    if start + BLOCK <= 2 * across:
        tl.store(at, tl.load(at) * (weight * scale))
    else:
        there = part < 2 * across
        tl.store(at, tl.load(at, mask=there, other=0.0) * (weight * scale), mask=there)
