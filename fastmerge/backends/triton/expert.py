"""Light experts in Triton: put on and taken off by one launch for all tensors, with the bits of the reference."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..._triton import expert as kernels
from ..rule import ExpertPart, saved_layout
from .launch import CODES, aligned, block, launch, table, tiles
from .sparsify import usable

__all__ = ["expert_apply_", "expert_revert_"]

BLOCK = 1024
"""Entries of a part that a program takes: eight for each thread, whose gathers are under way together."""


def expert_apply_(tensors: list[Tensor], parts: list[ExpertPart]) -> Tensor:
    """Put experts onto tensors; see `fastmerge.ops.expert_apply_`."""
    layout = saved_layout(tensors, parts)
    saved = torch.zeros(layout[-1][1] if layout else 0, dtype=torch.uint8, device=tensors[0].device)
    with _Worn(tensors, parts, saved) as worn:
        worn.launch(kernels.apply)
    return saved


def expert_revert_(tensors: list[Tensor], parts: list[ExpertPart], saved: Tensor) -> Tensor:
    """Take experts off tensors; see `fastmerge.ops.expert_revert_`."""
    changed = torch.zeros(len(tensors), dtype=torch.int64, device=saved.device)
    some = torch.zeros(1, dtype=torch.int64, device=saved.device)
    with _Worn(tensors, parts, saved) as worn:
        worn.launch(kernels.count_changed, changed, some)
        worn.launch(kernels.revert, some)
    return changed


class _Worn:
    """Parts and their tensors as kernels find them; on leaving, tensors that had to be copied get what was written."""

    def __init__(self, tensors: list[Tensor], parts: list[ExpertPart], saved: Tensor) -> None:
        self._tensors = tensors
        self._loadable = [usable(x) for x in tensors]
        # Old bits begin at multiples of 8 among them.
        self._saved = saved if saved.data_ptr() % 8 == 0 else saved.clone()
        self._given: list[Tensor] = []
        self._block = block(BLOCK)
        layout = saved_layout(tensors, parts)
        live = [(part, first) for part, (first, _) in zip(parts, layout) if part.columns.numel()]
        counts = [tiles(part.columns.numel(), self._block) for part, _ in live]
        self._programs = sum(counts)
        if not live:
            return
        scales = torch.tensor([part.scale for part, _ in live], dtype=torch.float32).view(torch.int32).tolist()
        owners = [part.of for part, _ in live]
        begin = {owner: at for at, owner in reversed(list(enumerate(owners)))}
        end = {owner: at + 1 for at, owner in enumerate(owners)}
        firsts = accumulate(counts, initial=0)
        listed: list[int] = []
        for (part, first), program, scale in zip(live, firsts, scales):
            listed += (program, *self._part(part, first), scale, self._dtypes(part))
            listed += (begin[part.of], end[part.of], part.of, part.columns.shape[1].bit_length())
        self._table = table([*listed, *counts], saved.device)
        self._aligned = aligned(self._given)
        part_of = torch.arange(len(live), dtype=torch.int32, device=saved.device)
        # Told how many programs there are, nothing waits for the GPU.
        repeats = self._table[len(listed) : len(listed) + len(live)]
        self._part_of = part_of.repeat_interleave(repeats, output_size=self._programs)

    def _part(self, part: ExpertPart, first: int) -> tuple[int, ...]:
        """The fields 1 to 9 of a part's row. first: where its old bits begin."""
        given = [usable(x) for x in (part.columns, part.values, part.base) if x is not None]
        self._given += given
        x = self._tensors[part.of]
        return (
            self._loadable[part.of].data_ptr(),
            *(each.data_ptr() for each in given),
            *[0] * (3 - len(given)),
            self._saved.data_ptr() + first,
            part.columns.numel(),
            part.columns.shape[1],
            x.shape[-1] if x.dim() else 1,
            int(part.columns.dtype == torch.int32),
        )

    def _dtypes(self, part: ExpertPart) -> int:
        """The field 11."""
        base = 0 if part.base is None else CODES[part.base.dtype]
        return CODES[self._tensors[part.of].dtype] | CODES[part.values.dtype] << 2 | base << 4

    def launch(self, kernel: Any, *counts: Tensor) -> None:
        """Launch a kernel over all entries."""
        if self._programs:
            constants = {"ALIGNED": self._aligned, "BLOCK": self._block}
            device = self._saved.device
            launch(kernel, (self._programs,), device, self._table, self._part_of, *counts, **constants)

    def __enter__(self) -> _Worn:
        return self

    def __exit__(self, *_: object) -> None:
        for x, copy in zip(self._tensors, self._loadable):
            if copy.data_ptr() != x.data_ptr():
                x.copy_(copy.view(x.shape))
