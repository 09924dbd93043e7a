"""Light experts in Triton, with the reference's bits: a launch for all tensors, one more for those of several parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._triton import expert as kernels
from ..gpu import loadable
from ..rule import ExpertPart, saved_layout
from .launch import CODES, aligned, block, launch, table, tiles

__all__ = ["expert_apply_", "expert_revert_"]

BLOCK = 1024
"""Entries of a part that a program takes: eight for each thread, whose gathers are under way together."""

SHARED_BLOCK = 512
"""Where a tensor has several parts: fewer, since each thread has more to remember."""


def expert_apply_(tensors: list[Tensor], parts: list[ExpertPart]) -> Tensor:
    """Put experts onto tensors; see `fastmerge.ops.expert_apply_`."""
    layout = saved_layout(tensors, parts)
    saved = torch.zeros(layout[-1][1] if layout else 0, dtype=torch.uint8, device=tensors[0].device)
    with _Worn(tensors, parts, layout, saved) as worn:
        worn.launch(kernels.apply)
    return saved


def expert_revert_(tensors: list[Tensor], parts: list[ExpertPart], saved: Tensor) -> Tensor:
    """Take experts off tensors; see `fastmerge.ops.expert_revert_`."""
    changed = torch.zeros(len(tensors), dtype=torch.int64, device=saved.device)
    some = torch.zeros(1, dtype=torch.int64, device=saved.device)
    with _Worn(tensors, parts, saved_layout(tensors, parts), saved) as worn:
        worn.launch(kernels.count_changed, changed, some)
        worn.launch(kernels.revert, some)
    return changed


class _Group(NamedTuple):
    """Parts that one launch takes: rows of the table from `first` on, so many programs of `block` entries."""

    first: int
    parts: int
    programs: int
    alone: bool
    block: int


class _Worn:
    """Parts and their tensors as kernels find them; on leaving, tensors that had to be copied get what was written."""

    def __init__(
        self, tensors: list[Tensor], parts: list[ExpertPart], layout: list[tuple[int, int]], saved: Tensor
    ) -> None:
        self._tensors = tensors
        self._loadable = [loadable(x) for x in tensors]
        # Old bits begin at multiples of 8 among them.
        self._saved = saved if saved.data_ptr() % 8 == 0 else saved.clone()
        self._given: list[Tensor] = []
        live = [(part, first) for part, (first, _) in zip(parts, layout) if part.columns.numel()]
        number_of = Counter(part.of for part, _ in live)
        alone = [each for each in live if number_of[each[0].of] == 1]
        shared = [each for each in live if number_of[each[0].of] > 1]
        self._groups: list[_Group] = []
        rows: list[int] = []
        counts: list[int] = []
        for group, size in ((alone, block(BLOCK)), (shared, min(SHARED_BLOCK, block(BLOCK)))):
            if not group:
                continue
            own = [tiles(part.columns.numel(), size) for part, _ in group]
            rows += self._rows(group, own, len(counts))
            self._groups.append(_Group(len(counts), len(group), sum(own), group is alone, size))
            counts += own
        self._table = table([*rows, *counts], saved.device)
        self._counts = self._table[len(rows) :]
        self._aligned = aligned(self._given)

    def _rows(self, group: list[tuple[ExpertPart, int]], counts: list[int], before: int) -> Iterator[int]:
        """The rows of some parts, whose old bits begin there. counts: of programs. before: as many rows come first."""
        scales = torch.tensor([part.scale for part, _ in group], dtype=torch.float32).view(torch.int32).tolist()
        end = {part.of: before + at + 1 for at, (part, _) in enumerate(group)}
        begin = {part.of: before + at for at, (part, _) in reversed(list(enumerate(group)))}
        for (part, first), program, scale in zip(group, accumulate(counts, initial=0), scales):
            yield from (program, *self._part(part, first), scale, self._dtypes(part))
            yield from (begin[part.of], end[part.of], part.of, part.columns.shape[1].bit_length())

    def _part(self, part: ExpertPart, first: int) -> tuple[int, ...]:
        """The fields 1 to 9 of a part's row. first: where its old bits begin."""
        given = [loadable(x) for x in (part.columns, part.values, part.base) if x is not None]
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
        device = self._saved.device
        for group in self._groups:
            part_of = torch.arange(group.first, group.first + group.parts, dtype=torch.int32, device=device)
            repeats = self._counts[group.first : group.first + group.parts]
            # Told how many programs there are, nothing waits for the GPU.
            part_of = part_of.repeat_interleave(repeats, output_size=group.programs)
            constants = {"ALONE": group.alone, "ALIGN": 16 if self._aligned else 1, "BLOCK": group.block}
            # The assembler would put some aside in memory to have more threads.
            registers = None if group.alone else 128
            arguments = (self._table, part_of, *counts)
            launch(kernel, (group.programs,), device, *arguments, registers=registers, **constants)

    def __enter__(self) -> _Worn:
        return self

    def __exit__(self, *_: object) -> None:
        for x, copy in zip(self._tensors, self._loadable):
            if copy is not x:
                x.copy_(copy)
