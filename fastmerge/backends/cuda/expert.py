"""Light experts in CUDA C++: the functions of `fastmerge/reference/expert.py`, with the same bits.

All tensors and parts of a call are one launch, or two where experts are taken off: a table in the GPU's memory says
where they are. What is kept of a tensor is found by torch, which needs only a few of a row's elements in order.

A column beyond its row is nowhere: nothing is put there, and nothing is taken off. To refuse it would be to wait.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...reference.expert import expert_extract
from ..rule import ExpertPart, saved_layout
from .launch import CODES, address, compiled, place, table

__all__ = ["expert_apply_", "expert_extract", "expert_revert_"]


def _parts(tensors: list[Tensor], parts: list[ExpertPart], saved: Tensor) -> tuple[Tensor, int, int] | None:
    """The table of the parts that are not empty, as `ExpertPart` in csrc/cuda/kernels.h; their number; blocks."""
    given = [(part, at) for part, (at, _) in zip(parts, saved_layout(tensors, parts)) if part.columns.numel()]
    if not given:
        return None
    scales = torch.tensor([part.scale for part, _ in given], dtype=torch.float64).to(torch.float32)
    numbers: list[int] = []
    blocks, first, start = 0, 0, saved.data_ptr()
    ends = {part.of: number + 1 for number, (part, _) in enumerate(given)}
    for number, ((part, at), scale) in enumerate(zip(given, scales.view(torch.int32).tolist())):
        x, columns, base = tensors[part.of], part.columns, part.base
        first = number if number == 0 or given[number - 1][0].of != part.of else first
        numbers += [x.data_ptr(), columns.data_ptr(), part.values.data_ptr(), address(base), start + at]
        numbers += [CODES[x.dtype], CODES[part.values.dtype], 0 if base is None else CODES[base.dtype]]
        numbers += [
            columns.dtype == torch.int32,
            scale,
            columns.shape[1],
            columns.numel(),
            x.shape[-1] if x.dim() else 1,
        ]
        numbers += [first, ends[part.of], part.of, blocks]
        blocks += -(-columns.numel() // compiled.EXPERT_ENTRIES)
    return table(numbers, saved.device), len(given), blocks


def expert_apply_(tensors: list[Tensor], parts: list[ExpertPart]) -> Tensor:
    """Put parts of experts onto tensors; see `fastmerge.ops.expert_apply_`."""
    layout = saved_layout(tensors, parts)
    # Between the parts there are bytes that belong to none.
    saved = torch.zeros(layout[-1][1] if layout else 0, dtype=torch.uint8, device=tensors[0].device)
    if (described := _parts(tensors, parts, saved)) is not None:
        rows, count, blocks = described
        compiled.expert_apply(place(saved.device), rows.data_ptr(), count, blocks)
    return saved


def expert_revert_(tensors: list[Tensor], parts: list[ExpertPart], saved: Tensor) -> Tensor:
    """Take parts of experts off tensors; see `fastmerge.ops.expert_revert_`."""
    changed = torch.zeros(len(tensors) + 1, dtype=torch.int64, device=saved.device)
    if (described := _parts(tensors, parts, saved)) is not None:
        rows, count, blocks = described
        compiled.expert_revert(place(saved.device), rows.data_ptr(), count, blocks, changed.data_ptr(), len(tensors))
    return changed[:-1]
