"""The merge of n deltas, tile by tile: `fastmerge/reference/consensus.py` in Triton.

Every input is read once, and nothing is stored but the result. What such a merge costs besides is instructions: with
three models the election needs about as many as a GPU has time for while the memory delivers. Hence

- up to eight models are handed over by value and their deltas kept in registers; turned by the elected sign, what takes
  part is what is positive, and adding the greater of each and 0 needs no comparison; turning is exact;
- of more models, which come from a table, the sums of those with a positive and of those with a negative sign are taken
  side by side, with what each is divided by, and at the end the vote picks one;
- a program takes several tiles, so that what is the same for all of them is worked out once.

All sums add the models in their order, and what does not take part adds 0, as in the reference.
"""

import triton
import triton.language as tl

from . import numbers, select, sparsify, tables

ELECT_NONE = tl.constexpr(0)
WEIGHTED = tl.constexpr(1)
TOTAL = tl.constexpr(2)
FREQUENCY = tl.constexpr(3)

DIVIDE_NONE = tl.constexpr(0)
WEIGHTS = tl.constexpr(1)
COUNT = tl.constexpr(2)
VALUE = tl.constexpr(3)

GROUP = tl.constexpr(8)
"""Models of a table whose values are loaded together."""


# -- steps that all share ----------------------------------------------------------------------------------------------


@triton.jit
def sparsified(
    x, reference, scale, start, n, given, stride, model, band, by, key, tensor_low, offset, draw,
    METHOD: tl.constexpr, FOURS: tl.constexpr, SUBTRACT: tl.constexpr, COMPUTE: tl.constexpr, SCALED: tl.constexpr,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One model's delta of a tile, with the dropped elements at +0 and the others times `scale`."""
    delta = numbers.difference(reference, numbers.widen(x), SUBTRACT, COMPUTE)
    if METHOD != sparsify.NONE:
        kept = sparsify.kept(
            delta, start, n, given, stride, model, band, by, key, tensor_low, offset, draw,
            METHOD, FOURS, BLOCK, WHOLE,
        )  # fmt: skip
        delta = tl.where(kept, delta, 0.0)
    if SCALED:
        delta = numbers.round_to(delta * scale, COMPUTE)
    return delta


@triton.jit
def finished(
    total, share, reference, divisor_value, lambda_, out, start, n,
    DIVISOR: tl.constexpr, ADD: tl.constexpr, COMPUTE: tl.constexpr, SCALED: tl.constexpr,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Divide the sum, scale it, add the base, where there is one, and store the tile."""
    result = numbers.round_to(total, COMPUTE)
    if DIVISOR == VALUE:
        result = numbers.round_to(tl.div_rn(result, tl.zeros_like(result) + divisor_value), COMPUTE)
    elif DIVISOR != DIVIDE_NONE:
        if DIVISOR == WEIGHTS:
            share = numbers.round_to(share, COMPUTE)
        result = numbers.round_to(tl.div_rn(result, tl.where(share == 0.0, 1.0, share)), COMPUTE)
    if SCALED:
        result = numbers.round_to(result * lambda_, COMPUTE)
    if ADD:
        result = numbers.round_to(numbers.round_to(reference, COMPUTE) + result, COMPUTE)
    numbers.stored(out, start, n, result, BLOCK, WHOLE)


@triton.jit
def elected(votes, ZERO_SIGN: tl.constexpr):
    """The sign that the votes elect, as a number; a sum that is NaN elects minus."""
    if ZERO_SIGN == 1:
        return tl.where(votes >= 0.0, 1.0, -1.0)
    elif ZERO_SIGN == -1:
        return tl.where(votes > 0.0, 1.0, -1.0)
    else:
        return tl.where(votes == 0.0, 0.0, tl.where(votes > 0.0, 1.0, -1.0))


# -- deltas in registers -----------------------------------------------------------------------------------------------


@triton.jit
def merged(
    deltas, weights, ELECTION: tl.constexpr, ZERO_SIGN: tl.constexpr, DIVISOR: tl.constexpr, COMPUTE: tl.constexpr
):
    """The sum of the weighted deltas that take part, and what it is to be divided by."""
    terms = ()
    for i in tl.static_range(len(weights)):
        terms = terms + (numbers.round_to(deltas[i] * weights[i], COMPUTE),)
    if ELECTION == ELECT_NONE:
        total = terms[0]
        for i in tl.static_range(1, len(weights)):
            total = total + terms[i]
        return total, total
    else:
        voters = terms if ELECTION == WEIGHTED else deltas
        votes = numbers.sign(deltas[0]) if ELECTION == FREQUENCY else voters[0]
        for i in tl.static_range(1, len(weights)):
            votes = votes + (numbers.sign(deltas[i]) if ELECTION == FREQUENCY else voters[i])
        sign = elected(votes, ZERO_SIGN)
        total = tl.zeros_like(votes)
        share = tl.zeros_like(votes)
        for i in tl.static_range(len(weights)):
            turned = voters[i] * sign
            part = turned > 0.0
            if ELECTION == WEIGHTED:
                # Of NaN and 0 the greater is 0.
                total = total + tl.maximum(turned, 0.0)
            else:
                total = total + tl.where(part, terms[i], 0.0)
            if DIVISOR == WEIGHTS:
                share = share + tl.where(part, weights[i], 0.0)
            elif DIVISOR == COUNT:
                share = share + tl.where(part, 1.0, 0.0)
        if ELECTION == WEIGHTED:
            # Turned back; where nobody takes part that is +0, not -0.
            total = total * sign + 0.0
        return total, share


@triton.jit
def merge_tile(
    base, xs, weights, scales, out, start, n, given, stride, bands, by, key, tensor_low, offset, draws,
    divisor_value, lambda_,
    METHOD: tl.constexpr, FOURS: tl.constexpr, ELECTION: tl.constexpr, ZERO_SIGN: tl.constexpr, DIVISOR: tl.constexpr,
    SUBTRACT: tl.constexpr, ADD: tl.constexpr, COMPUTE: tl.constexpr, SCALED: tl.constexpr,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One tile of the merge of some models."""
    # All loads before the first use, so that they are under way together.
    loaded = ()
    for i in tl.static_range(len(weights)):
        loaded = loaded + (sparsify.raw(xs[i], start, n, BLOCK, WHOLE),)
    reference = tl.zeros((BLOCK,), tl.float32)
    if SUBTRACT or ADD:
        reference = numbers.widen(sparsify.raw(base, start, n, BLOCK, WHOLE))
    deltas = ()
    for i in tl.static_range(len(weights)):
        delta = sparsified(
            loaded[i], reference, scales[i], start, n, given, stride, i, bands[i], by, key, tensor_low, offset,
            draws[i], METHOD, FOURS, SUBTRACT, COMPUTE, SCALED, BLOCK, WHOLE,
        )  # fmt: skip
        deltas = deltas + (delta,)
    total, share = merged(deltas, weights, ELECTION, ZERO_SIGN, DIVISOR, COMPUTE)
    finished(
        total, share, reference, divisor_value, lambda_, out, start, n,
        DIVISOR, ADD, COMPUTE, SCALED, BLOCK, WHOLE,
    )  # fmt: skip


@triton.jit
def merge_span(
    base, xs, weights, scales, out, start, n, given, stride, block, last, key, tensor_low, offset, draws,
    divisor_value, lambda_,
    METHOD: tl.constexpr, FOURS: tl.constexpr, ELECTION: tl.constexpr, ZERO_SIGN: tl.constexpr, DIVISOR: tl.constexpr,
    SUBTRACT: tl.constexpr, ADD: tl.constexpr, COMPUTE: tl.constexpr, SCALED: tl.constexpr,
    SPAN: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Merge the SPAN elements from `start` on, as far as there are any, tile by tile.

    SPAN divides a tie block. stride: numbers in a row of ties_before, or bytes in one of masks; block, last: see
    `sparsify.intervals`.
    """
    end = tl.minimum(start + SPAN, n)
    bands, split = sparsify.bands_of(given, stride, block, last, len(weights), METHOD)
    whole = tl.where(split, start, start + (end - start) // BLOCK * BLOCK)
    for at in range(start, whole, BLOCK):
        merge_tile(
            base, xs, weights, scales, out, at, n, given, stride, bands, 0, key, tensor_low, offset, draws,
            divisor_value, lambda_, METHOD, FOURS, ELECTION, ZERO_SIGN, DIVISOR, SUBTRACT, ADD, COMPUTE, SCALED,
            BLOCK, True,
        )  # fmt: skip
    if whole < end:
        # In small pieces, since the registers that this takes are taken from all programs.
        turns = sparsify.turns_of(
            base, xs, given, stride, block, last, whole, end, len(weights), METHOD, SUBTRACT, COMPUTE
        )
        for at in range(whole, end, PIECE):
            merge_tile(
                base, xs, weights, scales, out, at, n, given, stride, turns, (at - whole).to(tl.int32), key,
                tensor_low, offset, draws, divisor_value, lambda_, METHOD, FOURS, ELECTION, ZERO_SIGN, DIVISOR,
                SUBTRACT, ADD, COMPUTE, SCALED, PIECE, False,
            )  # fmt: skip


@triton.jit(
    do_not_specialize=["n", "stride", "key", "tensor_low", "offset", "d0", "d1", "d2", "d3", "d4", "d5", "d6", "d7"],
    do_not_specialize_on_alignment=["base", "x0", "x1", "x2", "x3", "x4", "x5", "x6", "x7", "out"],
)
def merge(
    base, x0, x1, x2, x3, x4, x5, x6, x7, weights, scales, out, n: "i64",
    given, stride: "i64", key: "i64", tensor_low: "i64", offset: "i64",
    d0: "i64", d1: "i64", d2: "i64", d3: "i64", d4: "i64", d5: "i64", d6: "i64", d7: "i64",
    divisor_value: "fp32", lambda_: "fp32",
    METHOD: tl.constexpr, FOURS: tl.constexpr, ELECTION: tl.constexpr, ZERO_SIGN: tl.constexpr, DIVISOR: tl.constexpr,
    SUBTRACT: tl.constexpr, ADD: tl.constexpr, COMPUTE: tl.constexpr, SCALED: tl.constexpr,
    SPAN: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Merge up to eight models by value: x_i is None beyond them, weights and scales have as many numbers as there are.

    base: None without one. given: bounds int64[models, 2, 2] and ties_before int64[models, 2, stride] of bands, masks
    uint8[models, stride] of masks, or nothing. d_i: see `sparsify.drawn`. SUBTRACT: the models are no deltas. ADD: the
    base is added. SCALED: a scale, or lambda_, is not 1. ALIGN: all addresses are multiples of so many bytes.
    """
    n = n.to(tl.int64)
    stride = stride.to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * SPAN
    block = start // select.TIE_BLOCK
    xs = sparsify.all_aligned((x0, x1, x2, x3, x4, x5, x6, x7), len(weights), ALIGN)
    if SUBTRACT or ADD:
        base = sparsify.aligned(base, ALIGN)
    merge_span(
        base, xs, weights, scales, sparsify.aligned(out, ALIGN), start, n, given, stride, block,
        block + 1 >= stride, key.to(tl.int64), tensor_low.to(tl.int64), offset.to(tl.int64),
        (d0.to(tl.int64), d1.to(tl.int64), d2.to(tl.int64), d3.to(tl.int64),
         d4.to(tl.int64), d5.to(tl.int64), d6.to(tl.int64), d7.to(tl.int64)),
        divisor_value, lambda_, METHOD, FOURS, ELECTION, ZERO_SIGN, DIVISOR, SUBTRACT, ADD, COMPUTE, SCALED,
        SPAN, BLOCK, PIECE,
    )  # fmt: skip


# -- any number of models: sums of both signs --------------------------------------------------------------------------


@triton.jit
def minus_zeros(BLOCK: tl.constexpr):
    """-0 as float32; written as a number Triton takes it for +0."""
    return tl.full((BLOCK,), 0x80000000, tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def added(
    votes, above, above_share, below, below_share, delta, weight, live,
    ELECTION: tl.constexpr, DIVISOR: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The sums with one more model: of the votes, and of the terms and the shares of those above and below 0.

    live: whether there is such a model.
    """
    term = numbers.round_to(delta * weight, COMPUTE)
    if ELECTION == ELECT_NONE:
        # The sum begins with -0, to which adding is exact for every value.
        votes = votes + tl.where(live, term, minus_zeros(delta.shape[0]))
    else:
        voter = term if ELECTION == WEIGHTED else delta
        positive = live & (voter > 0.0)
        negative = live & (voter < 0.0)
        votes = votes + tl.where(live, numbers.sign(delta) if ELECTION == FREQUENCY else voter, 0.0)
        above = above + tl.where(positive, term, 0.0)
        below = below + tl.where(negative, term, 0.0)
        if DIVISOR == WEIGHTS:
            above_share = above_share + tl.where(positive, weight, 0.0)
            below_share = below_share + tl.where(negative, weight, 0.0)
        elif DIVISOR == COUNT:
            above_share = above_share + tl.where(positive, 1.0, 0.0)
            below_share = below_share + tl.where(negative, 1.0, 0.0)
    return votes, above, above_share, below, below_share


@triton.jit
def listed_tile(
    base, listed, models, out, start, n, end, given, stride, block, last, key, tensor_low, offset,
    divisor_value, lambda_,
    METHOD: tl.constexpr, FOURS: tl.constexpr, ELECTION: tl.constexpr, ZERO_SIGN: tl.constexpr, DIVISOR: tl.constexpr,
    SUBTRACT: tl.constexpr, ADD: tl.constexpr, COMPUTE: tl.constexpr, SCALED: tl.constexpr,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr, ALIGN: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One tile of the merge of listed models; not WHOLE: the only one for which cuts of bands are looked for."""
    reference = tl.zeros((BLOCK,), tl.float32)
    if SUBTRACT or ADD:
        reference = numbers.widen(sparsify.raw(base, start, n, BLOCK, WHOLE))
    votes = minus_zeros(BLOCK)
    above = tl.zeros((BLOCK,), tl.float32)
    above_share = tl.zeros((BLOCK,), tl.float32)
    below = tl.zeros((BLOCK,), tl.float32)
    below_share = tl.zeros((BLOCK,), tl.float32)
    # One after the other where it does not matter: fewer registers.
    TOGETHER: tl.constexpr = GROUP if WHOLE else 1
    for first in range(0, models, TOGETHER):
        loaded = ()
        for j in tl.static_range(TOGETHER):
            # Beyond the last model it is the last one again, whose values are at hand.
            address = tl.load(listed + 4 * tl.minimum(first + j, models - 1))
            x = sparsify.aligned(tables.address_of(address, DTYPE, False), ALIGN)
            loaded = loaded + (sparsify.raw(x, start, n, BLOCK, WHOLE),)
        least = 0
        span = 0
        if METHOD == sparsify.BAND and WHOLE:
            least, span, _ = sparsify.intervals(given[0], given[1], stride, block, last, first, models)
        for j in tl.static_range(TOGETHER):
            live = first + j < models
            model = tl.minimum(first + j, models - 1)
            weight = tables.float_of(tl.load(listed + 4 * model + 1))
            scale = tables.float_of(tl.load(listed + 4 * model + 2))
            draw = tl.load(listed + 4 * model + 3)
            if METHOD != sparsify.BAND:
                band = (0, 0)
            elif WHOLE:
                band = (sparsify.of_lane(least, j), sparsify.of_lane(span, j))
            else:
                address = tl.load(listed + 4 * model)
                x = sparsify.aligned(tables.address_of(address, DTYPE, False), ALIGN)
                band = sparsify.turns(
                    base, x, given[0], given[1], stride, block, last, model,
                    start, end, SUBTRACT, COMPUTE,
                )  # fmt: skip
            delta = sparsified(
                loaded[j], reference, scale, start, n, given, stride, model, band, 0, key, tensor_low,
                offset, draw, METHOD, FOURS, SUBTRACT, COMPUTE, SCALED, BLOCK, WHOLE,
            )  # fmt: skip
            votes, above, above_share, below, below_share = added(
                votes, above, above_share, below, below_share, delta, weight, live, ELECTION, DIVISOR, COMPUTE
            )
    total = votes
    share = votes
    if ELECTION != ELECT_NONE:
        sign = elected(votes, ZERO_SIGN)
        total = tl.where(sign > 0.0, above, tl.where(sign < 0.0, below, 0.0))
        share = tl.where(sign > 0.0, above_share, tl.where(sign < 0.0, below_share, 0.0))
    finished(
        total, share, reference, divisor_value, lambda_, out, start, n,
        DIVISOR, ADD, COMPUTE, SCALED, BLOCK, WHOLE,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["models", "n", "stride", "key", "tensor_low", "offset"],
    do_not_specialize_on_alignment=["base", "out"],
)
def merge_listed(
    base, listed, models: "i64", out, n: "i64",
    given, stride: "i64", key: "i64", tensor_low: "i64", offset: "i64",
    divisor_value: "fp32", lambda_: "fp32",
    METHOD: tl.constexpr, FOURS: tl.constexpr, ELECTION: tl.constexpr, ZERO_SIGN: tl.constexpr, DIVISOR: tl.constexpr,
    SUBTRACT: tl.constexpr, ADD: tl.constexpr, COMPUTE: tl.constexpr, SCALED: tl.constexpr,
    SPAN: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr, ALIGN: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """As `merge`, for any number of models of one dtype.

    listed: for each its address, the bits of its weight and of its scale, and what `sparsify.drawn` takes: int64.
    """
    models = models.to(tl.int64)
    n = n.to(tl.int64)
    stride = stride.to(tl.int64)
    key = key.to(tl.int64)
    tensor_low = tensor_low.to(tl.int64)
    offset = offset.to(tl.int64)
    out = sparsify.aligned(out, ALIGN)
    if SUBTRACT or ADD:
        base = sparsify.aligned(base, ALIGN)
    start = tl.program_id(0).to(tl.int64) * SPAN
    end = tl.minimum(start + SPAN, n)
    block = start // select.TIE_BLOCK
    last = block + 1 >= stride
    whole = start + (end - start) // BLOCK * BLOCK
    if METHOD == sparsify.BAND:
        for first in range(0, models, sparsify.LANES):
            _, _, split = sparsify.intervals(given[0], given[1], stride, block, last, first, models)
            whole = tl.where(split, start, whole)
    for at in range(start, whole, BLOCK):
        listed_tile(
            base, listed, models, out, at, n, end, given, stride, block, last, key, tensor_low, offset,
            divisor_value, lambda_, METHOD, FOURS, ELECTION, ZERO_SIGN, DIVISOR, SUBTRACT, ADD, COMPUTE, SCALED,
            BLOCK, True, ALIGN, DTYPE,
        )  # fmt: skip
    for piece in range(whole, end, PIECE):
        at = tl.zeros((), tl.int64) + piece
        stop = tl.minimum(at + PIECE, n)
        listed_tile(
            base, listed, models, out, at, n, stop, given, stride, block, last, key, tensor_low, offset,
            divisor_value, lambda_, METHOD, FOURS, ELECTION, ZERO_SIGN, DIVISOR, SUBTRACT, ADD, COMPUTE, SCALED,
            PIECE, False, ALIGN, DTYPE,
        )  # fmt: skip


# -- many tensors ------------------------------------------------------------------------------------------------------


@triton.jit(
    do_not_specialize=["stride", "d0", "d1", "d2", "d3", "d4", "d5", "d6", "d7"],
)
def merge_tensors(
    listed, tensor_of, weights, scales, given, stride: "i64",
    d0: "i64", d1: "i64", d2: "i64", d3: "i64", d4: "i64", d5: "i64", d6: "i64", d7: "i64",
    divisor_value: "fp32", lambda_: "fp32",
    METHOD: tl.constexpr, ELECTION: tl.constexpr, ZERO_SIGN: tl.constexpr, DIVISOR: tl.constexpr,
    SUBTRACT: tl.constexpr, ADD: tl.constexpr, COMPUTE: tl.constexpr, SCALED: tl.constexpr,
    SPAN: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr, ALIGN: tl.constexpr,
    DTYPE: tl.constexpr, BASE_DTYPE: tl.constexpr, OUT_DTYPE: tl.constexpr,
):  # fmt: skip
    """As `merge`, for many tensors of up to eight models.

    tensor_of: int32, the tensor that each program works for. listed: for each tensor its first program, its length, the
    key and the low word of its random words, its first tie block, and the addresses of its base, of its result and of
    the models' tensors: int64. stride: tie blocks of all tensors together.
    """
    program = tl.program_id(0)
    tensor = tl.load(tensor_of + program).to(tl.int64)
    row = listed + tensor * (7 + len(weights))
    start = (program - tl.load(row)) * SPAN
    n = tl.load(row + 1)
    first_block = tl.load(row + 4)
    block = start // select.TIE_BLOCK
    last = (block + 1) * select.TIE_BLOCK >= n
    base = sparsify.aligned(tables.address_of(tl.load(row + 5), BASE_DTYPE, False), ALIGN)
    out = sparsify.aligned(tables.address_of(tl.load(row + 6), OUT_DTYPE, False), ALIGN)
    xs = ()
    for i in tl.static_range(len(weights)):
        xs = xs + (sparsify.aligned(tables.address_of(tl.load(row + 7 + i), DTYPE, False), ALIGN),)
    own = given
    if METHOD == sparsify.BAND:
        own = (given[0] + tensor * (4 * len(weights)), given[1])
    merge_span(
        base, xs, weights, scales, out, start, n, own, stride.to(tl.int64), first_block + block, last,
        tl.load(row + 2), tl.load(row + 3), tl.zeros((), tl.int64),
        (d0.to(tl.int64), d1.to(tl.int64), d2.to(tl.int64), d3.to(tl.int64),
         d4.to(tl.int64), d5.to(tl.int64), d6.to(tl.int64), d7.to(tl.int64)),
        divisor_value, lambda_, METHOD, True, ELECTION, ZERO_SIGN, DIVISOR, SUBTRACT, ADD, COMPUTE, SCALED,
        SPAN, BLOCK, PIECE,
    )  # fmt: skip
