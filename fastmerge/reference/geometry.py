"""Inner products: all that methods on spheres and planes need to know of the tensors that they combine.

    G_ij = sum_e x_i[e] x_j[e]        x_i = the delta model_i - base, rounded to float32, or the model itself

The product of two float32 numbers is exact in float64 (48 bits, no exponent is out of its range), so that a fused
multiply-add would not change a bit. Only additions round, and their order is fixed: a row is cut into blocks of 4096
elements, counted from its beginning. Within a block element e goes to lane e % 64, each lane adds in rising order,
starting from +0, and then the upper half of the lanes is added to the lower half until one is left. What a block lacks
of 4096 elements counts as zeros, which change nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .numbers import canonical_nan, difference

BLOCK = 4096
LANES = 64


def block_sums(x: Tensor, y: Tensor) -> Tensor:
    """The sums of the products of float64[rows, blocks, steps, LANES] over each block: float64[rows, blocks]."""
    lanes = torch.zeros_like(x[:, :, 0])  # [rows, blocks, LANES]
    for step in range(x.shape[2]):
        lanes = lanes + x[:, :, step] * y[:, :, step]
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]


def gram(base: Tensor | None, tensors: list[Tensor], row_length: int) -> Tensor:
    """Inner products of all pairs (i, j), i <= j, block by block: float64[pairs, rows, blocks of a row]."""
    blocks = -(-row_length // BLOCK)
    steps = BLOCK // LANES if blocks > 1 else -(-row_length // LANES)
    cut = []
    for x in tensors:
        rows = difference(base, x, torch.float32).reshape(-1, row_length).to(torch.float64)
        cut.append(pad(rows, (0, blocks * steps * LANES - row_length)).reshape(-1, blocks, steps, LANES))
    pairs = [(i, j) for i in range(len(cut)) for j in range(i, len(cut))]
    return canonical_nan(torch.stack([block_sums(cut[i], cut[j]) for i, j in pairs]))
