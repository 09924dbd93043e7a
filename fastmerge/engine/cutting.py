"""How the budgets of memory are divided, and tensors cut into loads and merged pieces that fit."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastmerge.backends.rule import TIE_BLOCK
from fastmerge.engine.buffers import ALIGNMENT, aligned
from fastmerge.engine.jobs import READ_BYTES, GpuShare, Job
from fastmerge.engine.matching import Match
from fastmerge.errors import ArgumentError
from fastmerge.methods.base import Method, TensorContext
from fastmerge.sizes import format_size

CHUNK_ELEMENTS = 1 << 21
"""Elements merged at once: a few MiB per model, which stay in the cache from the read to the merge."""
AHEAD_BYTES = 128 << 20
"""So much may be read ahead of the merge in more than three loads; larger loads are at most three."""
OUT_BLOCKS = 3
"""Merged pieces in memory: one being made, one waiting, one being written."""

PIECE_SLACK = 256
"""A merged piece that is yet to be converted lies behind the place of its output, at a multiple of so many bytes."""

HELD_BYTES = 128 << 20
HELD_OFTEN = 6
"""Memory touched for the first time costs as much as reading a warm file several times. So a tensor whose inputs take
more than HELD_BYTES is held whole, to be read once, only if the same memory serves at least HELD_OFTEN tensors."""

GPU_CHUNK_ELEMENTS = 1 << 23
"""Elements merged at once on a GPU: enough to keep it busy for much longer than it takes to tell it."""
STAGING_BYTES = 32 << 20
"""Pinned slots, each for one read, through which inputs go to a GPU. A power of two, as torch rounds to one."""
STATE_BYTES = 64 << 20
STATE_BYTES_PER_MODEL = 2 << 20
"""Allowed for what statistics count on a GPU: a window of keys and its copy, and histograms for each model. It is part
of the GPU's budget where that is at least STATE_SHARE times as large, and on top of it where it is not."""
STATE_SHARE = 4
GPU_ALIGNED_ELEMENTS = 128
"""Merged pieces begin at multiples of so many elements, so at multiples of 256 bytes, where rows allow it."""


@dataclass(frozen=True)
class Draft:
    """A job without its cuts."""

    match: Match
    held: tuple[torch.dtype, ...]
    merged: torch.dtype
    out: torch.dtype
    context: TensorContext | None


class Cutter:
    """Divides the budgets, and the tensors into loads that fit their share.

    What is merged on a GPU is held there, and its budget says how much of it at once. The host's is for what passes by:
    inputs on their way up, merged pieces on their way down, and tensors that are only copied.
    """

    def __init__(
        self,
        method: Method,
        budget: int,
        resident: bool,
        chunk_elements: int | None,
        models: int,
        device: str,
        gpu_budget: int | None,
    ) -> None:
        self.method = method
        self.budget = budget
        self.resident = resident
        self.forced = chunk_elements
        self.chunk = CHUNK_ELEMENTS if device == "cpu" else GPU_CHUNK_ELEMENTS
        self.gpu_budget = gpu_budget
        self.sizes: list[int] = []
        usable = budget - 2 * READ_BYTES if budget > 16 * READ_BYTES else budget
        self.staging = self.state = self.gpu_usable = self.gpu_out = 0
        if gpu_budget is not None:
            self.staging = max(2 * ALIGNMENT, _power_of_two_within(min(STAGING_BYTES, usable // 4)))
            state = STATE_BYTES + models * STATE_BYTES_PER_MODEL
            self.state = state if gpu_budget >= STATE_SHARE * state else 0
            self.gpu_usable = gpu_budget - self.state
        self.usable = usable - self.staging
        self.share = self.gpu_share_of_loads = 0

    def cut(self, drafts: Sequence[Draft]) -> tuple[list[Job], int, int]:
        """The jobs, and the host's memory for loads and for merged pieces."""
        pieces = [self._piece(draft) for draft in drafts]
        sizes = [
            aligned(piece * self._out_itemsize(draft) + PIECE_SLACK)
            for draft, piece in zip(drafts, pieces, strict=True)
        ]
        largest = max(sizes, default=0)
        out_bytes = max(largest, min(OUT_BLOCKS * largest, self.usable // 4))
        self.share = self.usable - out_bytes
        if self.gpu_budget is not None:
            out_bytes = max(_power_of_two_within(out_bytes), aligned(largest))
            there = max((size for draft, size in zip(drafts, sizes, strict=True) if self._staged(draft)), default=0)
            if not self.resident:
                self.gpu_out = max(there, _whole_pages(min(OUT_BLOCKS * there, self.gpu_usable // 4)))
            self.gpu_share_of_loads = self.gpu_usable - self.gpu_out
        self.sizes = sorted(self._held_bytes(draft) for draft in drafts)
        jobs = [self._job(draft, piece) for draft, piece in zip(drafts, pieces, strict=True)]
        if self.resident:
            return jobs, 0, 0
        here = jobs if self.gpu_budget is None else [job for job in jobs if job.context is None]
        return jobs, min(self.share, self._wanted(here)) if here else 0, out_bytes

    def gpu_share(self, jobs: Sequence[Job]) -> GpuShare | None:
        """What is taken of the GPU."""
        if self.gpu_budget is None:
            return None
        there = [(job, job.context) for job in jobs if job.context is not None and job.numel]
        largest = max((job.load_bytes(job.cuts[1]) for job, _ in there), default=ALIGNMENT)
        beside = max((self.method.workspace(context, job.cuts[1]) for job, context in there), default=0)
        room = _whole_pages(self.gpu_share_of_loads - beside)
        return GpuShare(
            budget=self.gpu_budget,
            in_bytes=max(largest, min(room, self._wanted([job for job, _ in there]))),
            out_bytes=self.gpu_out,
            state_bytes=self.state,
            staging_bytes=self.staging,
            slot_bytes=max(ALIGNMENT, _whole_pages(min(READ_BYTES, self.staging // 4))),
        )

    def _staged(self, draft: Draft) -> bool:
        return self.gpu_budget is not None and draft.context is not None

    @staticmethod
    def _out_itemsize(draft: Draft) -> int:
        return draft.out.itemsize + (draft.merged.itemsize if draft.merged != draft.out else 0)

    def _unit(self, draft: Draft) -> int:
        return 1 if draft.context is None else self.method.cut_unit(draft.context)

    def _piece(self, draft: Draft) -> int:
        """Elements to merge at once: a few MiB, fewer in a small budget; whole units, and tie blocks if possible."""
        numel = math.prod(draft.match.inputs[0].info.shape)
        unit = self._unit(draft)
        most = self.forced or self.chunk
        held = sum(dtype.itemsize for dtype in draft.held)
        if not self.resident:
            most = min(most, self.usable // (4 * OUT_BLOCKS * self._out_itemsize(draft)))
        if self._staged(draft):
            most = min(most, self.gpu_usable // (4 * OUT_BLOCKS * self._out_itemsize(draft)))
            most = min(most, self.gpu_usable // (4 * (held + self._workspace(draft, 1024) // 1024)))
        elif not self.resident:
            most = min(most, self.usable // (4 * held))
        if not self.forced and most > TIE_BLOCK and unit == 1:
            most -= most % TIE_BLOCK
        whole_lines = math.lcm(unit, GPU_ALIGNED_ELEMENTS)
        if self._staged(draft) and not self.forced and most >= whole_lines:
            unit = whole_lines
        return min(max(most // unit, 1) * unit, max(numel, 1))

    def _job(self, draft: Draft, piece: int) -> Job:
        shape = draft.match.inputs[0].info.shape
        numel = math.prod(shape)
        sweeps = most_sweeps = 1
        sampled = False
        whole = True
        if draft.context is not None:
            whole = numel <= piece or (not self.forced and self._fits_whole(draft, numel, piece))
            if not whole:
                needed = self.method.statistics(draft.context, whole=False)
                sweeps += sum(not statistic.fallback for statistic in needed)
                most_sweeps += len(needed)
                sampled = any(statistic.samples for statistic in needed)
            whole = whole and bool(self.method.statistics(draft.context, whole=True))
        load = numel if whole else piece
        job = Job(
            match=draft.match,
            shape=shape,
            held=draft.held,
            merged=draft.merged,
            out=draft.out,
            context=draft.context,
            cuts=(*range(0, numel, max(load, 1)), numel),
            whole=whole,
            sweeps=sweeps,
            most_sweeps=most_sweeps,
            sampled=sampled,
            piece=piece,
            counted=not draft.match.again,
            most_sampled=self._most_sampled(draft, min(load, numel)),
        )
        self._check_fits(draft, job, min(load, numel))
        return job

    def _most_sampled(self, draft: Draft, load: int) -> int:
        """A sample is read where a load is; if that is on the GPU, there must be room on the host."""
        if self.gpu_budget is None or self.resident:
            return load
        room = self.share - len(draft.held) * ALIGNMENT
        return max(1, min(load, room // sum(dtype.itemsize for dtype in draft.held)))

    def _check_fits(self, draft: Draft, job: Job, load: int) -> None:
        held = job.load_bytes(load) + self._workspace(draft, load)
        if self._staged(draft):
            name, budget, share = "gpu_memory", self.gpu_budget or 0, self.gpu_share_of_loads
        elif self.resident:
            return
        else:
            name, budget, share = "memory_budget", self.budget, self.share
        if held > share:
            least = 3 * held + (self.state if self._staged(draft) else 2 * READ_BYTES)
            raise ArgumentError(
                f"{name} of {format_size(budget, binary=True)} is too small for {job.name}, of which "
                f"{format_size(held, binary=True)} must be held at once; give at least "
                f"{format_size(least, binary=True)}."
            )

    def _fits_whole(self, draft: Draft, numel: int, piece: int) -> bool:
        """Whether two loads of the whole tensor fit, so that one is read while the other is merged, and it pays."""
        if draft.context is None or (piece < TIE_BLOCK and self._unit(draft) == 1):
            return False
        held = self._held_bytes(draft)
        if self._staged(draft):
            return 2 * held + self._workspace(draft, numel) <= self.gpu_share_of_loads
        if self.resident:
            return True
        as_large = len(self.sizes) - bisect_left(self.sizes, held)
        return 2 * held <= self.share and (held <= HELD_BYTES or as_large >= HELD_OFTEN)

    def _workspace(self, draft: Draft, numel: int) -> int:
        """Bytes that a chunk of so many elements needs on a GPU besides; the host's is not counted."""
        if not self._staged(draft) or draft.context is None:
            return 0
        return self.method.workspace(draft.context, numel)

    @staticmethod
    def _held_bytes(draft: Draft) -> int:
        numel = math.prod(draft.match.inputs[0].info.shape)
        return sum(aligned(numel * dtype.itemsize) for dtype in draft.held)

    def _wanted(self, jobs: Sequence[Job]) -> int:
        """Memory with which the reader never waits for room: three loads in a row, wherever they are the largest."""
        loads = [job.load_bytes(job.cuts[1]) for job in jobs if job.numel for _ in range(min(len(job.cuts) - 1, 3))]
        total = sum(loads)
        three = max((sum(loads[i : i + 3]) for i in range(len(loads))), default=0)
        return aligned(max(three, min(AHEAD_BYTES, total)))


def _whole_pages(nbytes: int) -> int:
    """What of it is whole pages."""
    return nbytes // ALIGNMENT * ALIGNMENT


def _power_of_two_within(nbytes: int) -> int:
    """The largest power of two that is no larger; what torch pins is rounded up to one."""
    return 1 << max(nbytes, 1).bit_length() - 1
