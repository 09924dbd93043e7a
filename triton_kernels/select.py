"""Histograms of magnitudes, order statistics, and elements whose rank lies in a range: `reference/select.py` in Triton.

A bound (T, c) describes a rank b: an element's rank is at least b when its key is below T, or, where c > 0, equals T
and at least c equal ones come before it in the tensor. Which c those are depends on what lies before, so that a program
takes a block of TIE_BLOCK elements tile by tile, counts the ties that it passes, and knows those of earlier blocks from
a table. Only in the one tile of a tensor in which the c-th tie lies is their order within the tile worked out.
"""

import triton
import triton.language as tl

TIE_BLOCK = tl.constexpr(65536)


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
