"""Inner products of models or of their deltas: `fastmerge/reference/geometry.py` in Triton.

A program takes TOGETHER blocks of rows, and a tile has one step of each of them: LANES elements that follow each other.
Up to four models are multiplied with each other, or with up to four others, and the sums of all these pairs stay in
registers while the steps go by; more models take several launches. Nothing is added across lanes before the end, where
halves are added: two numbers at a time, whose sum has no order.
"""

import triton
import triton.language as tl

from . import numbers

BLOCK = tl.constexpr(4096)
LANES = tl.constexpr(64)

INF_BITS = tl.constexpr(0x7FF0000000000000)
NAN_BITS = tl.constexpr(0x7FF8000000000000)


@triton.jit
def canonical_double(x):
    """float64 with every NaN replaced by the one without a payload."""
    bits = x.to(tl.int64, bitcast=True)
    return tl.where((bits & 0x7FFFFFFFFFFFFFFF) > INF_BITS, NAN_BITS, bits).to(tl.float64, bitcast=True)


@triton.jit
def step_of(x, place, inside, WHOLE: tl.constexpr):
    """The values at these places, float32; +0 where there are none. WHOLE: all are there, and no mask is needed."""
    if WHOLE:
        return numbers.widen(tl.load(x + place))
    else:
        return numbers.widen(tl.load(x + place, mask=inside, other=0.0))


@triton.jit
def deltas(base, xs, place, inside, WHOLE: tl.constexpr):
    """What is multiplied of each of these models: its deltas, or its own values, as float64."""
    rows = ()
    if base is None:
        for i in tl.static_range(len(xs)):
            rows = rows + (step_of(xs[i], place, inside, WHOLE).to(tl.float64),)
    else:
        based = step_of(base, place, inside, WHOLE)
        for i in tl.static_range(len(xs)):
            rows = rows + ((step_of(xs[i], place, inside, WHOLE) - based).to(tl.float64),)
    return rows


@triton.jit
def with_products(sums, left, right):
    """Sums of lanes, to which the products of one step are added: of all pairs of left and right, or within left."""
    result = ()
    if len(right) == 0:
        L: tl.constexpr = len(left)
        for i in tl.static_range(L):
            for j in tl.static_range(i, L):
                result = result + (sums[i * L - i * (i - 1) // 2 + (j - i)] + left[i] * left[j],)
    else:
        R: tl.constexpr = len(right)
        for i in tl.static_range(len(left)):
            for j in tl.static_range(R):
                result = result + (sums[i * R + j] + left[i] * right[j],)
    return result


@triton.jit
def over_steps(base, left, right, place, end, steps, PAIRS: tl.constexpr, TOGETHER: tl.constexpr, WHOLE: tl.constexpr):
    """The sums of the lanes of all pairs, after so many steps from `place` on: float64[TOGETHER, LANES] each."""
    sums = ()
    for _ in tl.static_range(PAIRS):
        sums = sums + (tl.zeros((TOGETHER, LANES), tl.float64),)
    for step in range(0, steps):
        here = place + step * LANES
        inside = here < end
        rows = deltas(base, left, here, inside, WHOLE)
        sums = with_products(sums, rows, deltas(base, right, here, inside, WHOLE))
    return sums


@triton.jit
def folded(lanes, TOGETHER: tl.constexpr):
    """The upper half of the lanes is added to the lower half, until one is left: float64[TOGETHER]."""
    lanes = tl.sum(tl.reshape(lanes, (TOGETHER, 2, 32)), axis=1)
    lanes = tl.sum(tl.reshape(lanes, (TOGETHER, 2, 16)), axis=1)
    lanes = tl.sum(tl.reshape(lanes, (TOGETHER, 2, 8)), axis=1)
    lanes = tl.sum(tl.reshape(lanes, (TOGETHER, 2, 4)), axis=1)
    lanes = tl.sum(tl.reshape(lanes, (TOGETHER, 2, 2)), axis=1)
    return tl.sum(lanes, axis=1)


@triton.jit
def store_sums(out, sums, blocks, first_left, first_right, models, number, LEFT: tl.constexpr, RIGHT: tl.constexpr,
               TOGETHER: tl.constexpr):  # fmt: skip
    """Store what is left of each pair's lanes: out float64[pairs, blocks]."""
    there = number < blocks
    if RIGHT == 0:
        for i in tl.static_range(LEFT):
            for j in tl.static_range(i, LEFT):
                left = first_left + i
                pair = left * models - left * (left - 1) // 2 + (j - i)
                total = canonical_double(folded(sums[i * LEFT - i * (i - 1) // 2 + (j - i)], TOGETHER))
                tl.store(out + pair * blocks + number, total, mask=there)
    else:
        for i in tl.static_range(LEFT):
            for j in tl.static_range(RIGHT):
                left = first_left + i
                pair = left * models - left * (left - 1) // 2 + (first_right + j - left)
                total = canonical_double(folded(sums[i * RIGHT + j], TOGETHER))
                tl.store(out + pair * blocks + number, total, mask=there)


@triton.jit(do_not_specialize=["row_length", "in_row", "blocks", "first_left", "first_right", "models"])
def gram(
    base, left, right, out, row_length: "i64", in_row: "i64", blocks: "i64", first_left: "i64", first_right: "i64",
    models: "i64", PAIRS: tl.constexpr, TOGETHER: tl.constexpr, ONE_ROW: tl.constexpr,
):  # fmt: skip
    """Inner products within blocks of rows, of some pairs of models: to out, float64[pairs, rows, blocks of a row].

    left: up to four models from number first_left on. right: as many from first_right on, which all of left are
    multiplied with; none: those of left with each other. in_row: blocks of a row; blocks: of all rows. ONE_ROW: there
    is one row, and its blocks follow each other without a gap.
    """
    row_length = row_length.to(tl.int64)
    in_row = in_row.to(tl.int64)
    blocks = blocks.to(tl.int64)
    models = models.to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * TOGETHER
    number = first + tl.arange(0, TOGETHER)
    lane = tl.arange(0, LANES)
    steps = (tl.minimum(row_length, BLOCK) + (LANES - 1)) // LANES
    if ONE_ROW:
        place = first * BLOCK + (tl.arange(0, TOGETHER)[:, None] * BLOCK + lane[None, :])
        end = tl.zeros_like(place) + row_length
        if (first + TOGETHER) * BLOCK <= row_length:
            sums = over_steps(base, left, right, place, end, BLOCK // LANES, PAIRS, TOGETHER, True)
            store_sums(out, sums, blocks, first_left, first_right, models, number, len(left), len(right), TOGETHER)
        else:
            sums = over_steps(base, left, right, place, end, steps, PAIRS, TOGETHER, False)
            store_sums(out, sums, blocks, first_left, first_right, models, number, len(left), len(right), TOGETHER)
    else:
        row = number // in_row
        begin = row * row_length + (number - row * in_row) * BLOCK
        stop = tl.minimum(begin + BLOCK, (row + 1) * row_length)
        # Past the last block there is nothing.
        stop = tl.where(number < blocks, stop, begin)
        place = begin[:, None] + lane[None, :]
        sums = over_steps(base, left, right, place, stop[:, None], steps, PAIRS, TOGETHER, False)
        store_sums(out, sums, blocks, first_left, first_right, models, number, len(left), len(right), TOGETHER)
