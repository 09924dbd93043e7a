"""What a plan consists of: a job for each output tensor, the readings that it takes, a GPU's share."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import torch

from fastmerge.engine.buffers import aligned
from fastmerge.engine.matching import Input, Match
from fastmerge.methods.base import TensorContext

READ_BYTES = 2 << 20
"""Bytes of one read; each is checked for NaN and Inf while it is still in the cache."""
SAMPLE_RUN = 1024
"""Neighbours that a sample of a large tensor takes together."""


@dataclass(frozen=True)
class Job:
    """One output tensor.

    held: the dtype in which each input is kept in memory. merged: the dtype that the method's result is rounded to.
    out: the output's dtype. cuts: the flat indices at which the loads begin and end. whole: the one load is all of it,
    so that statistics need no sweep of their own. sweeps: how often each load is read, unless a statistic takes its
    fallback; most_sweeps: with every fallback. sampled: a statistic looks at a sample first. piece: elements merged at
    once. counted: statistics of the whole model count it; a second copy of a tied tensor they do not.
    """

    match: Match
    shape: tuple[int, ...]
    held: tuple[torch.dtype, ...]
    merged: torch.dtype
    out: torch.dtype
    context: TensorContext | None
    cuts: tuple[int, ...]
    whole: bool
    sweeps: int
    most_sweeps: int
    sampled: bool
    piece: int
    counted: bool = True
    most_sampled: int = 0

    @property
    def name(self) -> str:
        """The output tensor's name."""
        return self.match.name

    @property
    def inputs(self) -> tuple[Input, ...]:
        """Base first, then the models."""
        return self.match.inputs

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def bytes_per_element(self) -> int:
        """In memory, over all inputs."""
        return sum(dtype.itemsize for dtype in self.held)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the inputs in their files."""
        return sum(one.info.nbytes for one in self.inputs)

    @property
    def bytes_read(self) -> int:
        """Bytes read over all sweeps."""
        return self.sweeps * self.stored_bytes

    def load_bytes(self, elements: int) -> int:
        """Memory of a load of so many elements."""
        return sum(aligned(elements * dtype.itemsize) for dtype in self.held)


@dataclass(frozen=True)
class Load:
    """One reading of elements [start, stop) of a job's inputs, in sweep number `sweep` (from 0).

    With `sample`, before any sweep, `stop` elements from all over the tensor are read instead, in runs of `run`. With
    `model`, it is read for a statistic of the whole model; `last`: and no more is to come for this one.
    """

    job: Job
    sweep: int
    start: int
    stop: int
    sample: bool = False
    run: int = SAMPLE_RUN
    model: bool = False
    last: bool = False

    @property
    def numel(self) -> int:
        """The number of elements."""
        return self.stop - self.start

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return self.job.load_bytes(self.numel)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Which elements these are: (first, number) of each run."""
        if not self.sample:
            return [(self.start, self.numel)]
        run = min(self.run, self.numel)
        stride = self.job.numel // (self.numel // run)
        # Scattered within its stride, lest the runs line up with the rows of a matrix; elsewhere in each tensor, lest
        # tensors that are alike are all seen in the same places.
        salt = zlib.crc32(self.job.name.encode())
        runs = [
            (i * stride + (((i + salt) * 2654435761 & 0xFFFFFFFF) * (stride - run + 1) >> 32), run)
            for i in range(self.numel // run)
        ]
        return runs if self.numel % run == 0 else [*runs, (0, self.numel % run)]


@dataclass(frozen=True)
class GpuShare:
    """What a merge takes of a GPU's memory, and how its inputs get there.

    budget: bytes that may be taken. in_bytes, out_bytes: memory for loads and for merged pieces. state_bytes: allowed
    for statistics, within the budget. staging_bytes, slot_bytes: pinned memory of the host for inputs on their way, and
    how much of it goes at once.
    """

    budget: int
    in_bytes: int
    out_bytes: int
    state_bytes: int
    staging_bytes: int
    slot_bytes: int

    @property
    def peak_memory(self) -> int:
        """Bytes of the GPU's memory at most."""
        return self.in_bytes + self.out_bytes + self.state_bytes
