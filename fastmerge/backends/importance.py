"""The importance family by plain torch, in blocks that stay in the cache: the definition's own steps, so its own bits.

For backends that have no kernel of it. On GPUs each step is torch's own kernel; none of them fuses or approximates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..reference import importance as reference
from .rule import L1_LIMBS

_BLOCK = 1 << 17
_GPU_BLOCK = 1 << 22
"""Elements at once, a multiple of 8: a GPU must be told each step."""


def _blocks(numel: int, device: torch.device, unit: int = 1) -> Iterator[slice]:
    """Slices of whole units that cover the elements."""
    size = _BLOCK if device.type == "cpu" else _GPU_BLOCK
    size = max(size // unit, 1) * unit
    for start in range(0, numel, size):
        yield slice(start, min(start + size, numel))


def _of(part: slice, base: Tensor, tensors: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    return base.view(-1)[part], [x.view(-1)[part] for x in tensors]


def _concatenated(
    base: Tensor, tensors: list[Tensor], unit: int, found: Callable[[Tensor, list[Tensor], slice], Tensor]
) -> Tensor:
    parts = [found(*_of(part, base, tensors), part) for part in _blocks(base.numel(), base.device, unit)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float32, device=base.device)


def nearswap(base: Tensor, tensors: list[Tensor], t: float, out: Tensor) -> None:
    """One model's merge; see `fastmerge.ops.nearswap`."""
    for part in _blocks(out.numel(), out.device):
        reference.nearswap(*_of(part, base, tensors), t, out.view(-1)[part])


def ram_apply(base: Tensor, tensors: list[Tensor], factors: list[float], epsilon: float, out: Tensor) -> None:
    """The merge of one chunk into `out`; see `fastmerge.ops.ram_apply`."""
    for part in _blocks(out.numel(), out.device):
        reference.ram_apply(*_of(part, base, tensors), factors, epsilon, out.view(-1)[part])


def ram_counts(base: Tensor, tensors: list[Tensor], epsilon: float) -> Tensor:
    """Where each model takes part; see `fastmerge.ops.ram_counts`."""
    total = torch.zeros(len(tensors), 2, dtype=torch.int64, device=base.device)
    for part in _blocks(base.numel(), base.device):
        total += reference.ram_counts(*_of(part, base, tensors), epsilon)
    return total


def model_variance(base: Tensor, tensors: list[Tensor]) -> Tensor:
    """The variance over the models; see `fastmerge.ops.model_variance`."""
    return _concatenated(base, tensors, 1, lambda own, xs, part: reference.model_variance(own, xs))


def energy_sums(base: Tensor, tensors: list[Tensor], mask: Tensor | None) -> Tensor:
    """Exact sums of squares; see `fastmerge.ops.energy_sums`."""
    total = torch.zeros(len(tensors), L1_LIMBS, dtype=torch.int64, device=base.device)
    for part in _blocks(base.numel(), base.device, 8):
        kept = None if mask is None else mask[part.start // 8 : -(-part.stop // 8)]
        total += reference.energy_sums(*_of(part, base, tensors), kept)
    return total


def divergences(base: Tensor, tensors: list[Tensor], row_length: int) -> Tensor:
    """The divergence of each row; see `fastmerge.ops.divergences`."""
    return _concatenated(base, tensors, row_length, lambda own, xs, part: reference.divergences(own, xs, row_length))


def importance(base: Tensor, tensors: list[Tensor], divergence: Tensor, row_length: int) -> Tensor:
    """How much each element matters; see `fastmerge.ops.importance`."""

    def found(own: Tensor, xs: list[Tensor], part: slice) -> Tensor:
        rows = divergence[part.start // row_length : part.stop // row_length]
        return reference.importance(own, xs, rows, row_length)

    return _concatenated(base, tensors, row_length, found)
