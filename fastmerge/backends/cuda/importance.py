"""The importance family in CUDA C++: the functions of `fastmerge/reference/importance.py`, with the same bits."""

from __future__ import annotations

import torch
from torch import Tensor

from ..gpu import loadable, rounded
from ..rule import L1_LIMBS, SparsifyRule
from .launch import compiled, place, ref
from .sparsify import few, given

__all__ = ["divergences", "energy_sums", "importance", "model_variance", "nearswap", "ram_apply", "ram_counts"]

if not hasattr(compiled, "row_memory"):
    raise ImportError("fastmerge._cuda was built from other sources than this package; build it again")

MEMORY = 1 << 24
"""Numbers of memory that rows take together which have no room in shared memory: 64 MB."""


def nearswap(base: Tensor, tensors: list[Tensor], t: float, out: Tensor) -> None:
    """One model's merge; see `fastmerge.ops.nearswap`."""
    compiled.nearswap(place(out.device), ref(base), ref(tensors[0]), out.numel(), rounded([t])[0], ref(out))


def ram_apply(base: Tensor, tensors: list[Tensor], factors: list[float], epsilon: float, out: Tensor) -> None:
    """The merge of one chunk into `out`; see `fastmerge.ops.ram_apply`."""
    few(len(tensors))
    models = [ref(x) for x in tensors]
    compiled.ram_apply(
        place(out.device), ref(base), models, out.numel(), rounded(factors), rounded([epsilon])[0], ref(out)
    )


def ram_counts(base: Tensor, tensors: list[Tensor], epsilon: float) -> Tensor:
    """Where each model takes part; see `fastmerge.ops.ram_counts`."""
    few(len(tensors))
    counts = torch.zeros(len(tensors), 2, dtype=torch.int64, device=base.device)
    models = [ref(x) for x in tensors]
    compiled.ram_counts(place(base.device), ref(base), models, base.numel(), rounded([epsilon])[0], counts.data_ptr())
    return counts


def model_variance(base: Tensor, tensors: list[Tensor]) -> Tensor:
    """The variance over the models; see `fastmerge.ops.model_variance`."""
    few(len(tensors))
    out = torch.empty(base.numel(), dtype=torch.float32, device=base.device)
    compiled.model_variance(place(out.device), ref(base), [ref(x) for x in tensors], out.numel(), out.data_ptr())
    return out


def energy_sums(base: Tensor, tensors: list[Tensor], mask: Tensor | None) -> Tensor:
    """Exact sums of squares; see `fastmerge.ops.energy_sums`."""
    few(len(tensors))
    sums = torch.zeros(len(tensors), 2, L1_LIMBS, dtype=torch.int64, device=base.device)
    if base.numel():
        # One row of bits for all models: the step from one to the next is 0.
        rule = SparsifyRule() if mask is None else SparsifyRule("mask", masks=mask[None])
        kept, _alive = given(rule, len(tensors))
        kept = (*kept[:-1], 0)
        models = [ref(x) for x in tensors]
        compiled.energy_sums(place(base.device), ref(base), models, base.numel(), kept, sums.data_ptr())
    return sums[:, 1].contiguous()


def divergences(base: Tensor, tensors: list[Tensor], row_length: int) -> Tensor:
    """The divergence of each row; see `fastmerge.ops.divergences`."""
    where = place(base.device)
    rows = base.numel() // row_length
    out = torch.empty(rows, dtype=torch.float32, device=base.device)
    base, x = loadable(base), loadable(tensors[0])
    each = compiled.row_memory(where, row_length)
    together = max(1, MEMORY // each) if each else max(rows, 1)
    memory = torch.empty(min(together, rows) * each, dtype=torch.float32, device=base.device)
    for first in range(0, rows, together):
        some = min(together, rows - first)
        own = memory.data_ptr() if each else 0
        compiled.divergences(where, ref(base), ref(x), row_length, first, some, own, out.data_ptr())
    return out


def importance(base: Tensor, tensors: list[Tensor], divergence: Tensor, row_length: int) -> Tensor:
    """How much each element matters; see `fastmerge.ops.importance`."""
    out = torch.empty(base.numel(), dtype=torch.float32, device=base.device)
    divergence = loadable(divergence)
    x = tensors[0]
    compiled.importance(
        place(out.device), ref(base), ref(x), out.numel(), divergence.data_ptr(), row_length, out.data_ptr()
    )
    return out
