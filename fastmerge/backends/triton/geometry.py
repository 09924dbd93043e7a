"""Inner products in Triton: the function of `fastmerge/reference/geometry.py`, with the same bits."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._triton import geometry as kernels
from ..gpu import pairs
from ..rule import GRAM_BLOCK
from .launch import block, launch, tiles
from .sparsify import usable

__all__ = ["gram"]

GROUP = 4
"""Models that a launch takes by value, on each side."""

EACH = {1: 8, 3: 8, 6: 4}
"""Elements of a tile that a thread has, by pairs; 2 where there are more, for every one has a sum in registers."""

WARPS = 4
LANES = 64


def gram(base: Tensor | None, tensors: list[Tensor], row_length: int) -> Tensor:
    """Inner products of all pairs of models, block by block; see `fastmerge.ops.gram`."""
    count, rows = len(tensors), tensors[0].numel() // row_length
    in_row = tiles(row_length, GRAM_BLOCK)
    out = torch.empty(pairs(count), rows, in_row, dtype=torch.float64, device=tensors[0].device)
    base = None if base is None else usable(base)
    models = [usable(x) for x in tensors]
    for first in range(0, count, GROUP):
        left = tuple(models[first : first + GROUP])
        for other in range(first, count, GROUP):
            right = () if other == first else tuple(models[other : other + GROUP])
            made = len(left) * len(right) if right else pairs(len(left))
            size = block(EACH.get(made, 2) * 32 * WARPS)
            together = max(1, size // LANES)
            launch(
                kernels.gram,
                (tiles(rows * in_row, together),),
                out.device,
                base,
                left,
                right,
                out,
                row_length,
                in_row,
                rows * in_row,
                first,
                other,
                count,
                num_warps=WARPS,
                PAIRS=made,
                TOGETHER=together,
                ONE_ROW=rows == 1,
            )
    return out
