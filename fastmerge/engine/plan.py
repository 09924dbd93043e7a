"""The plan of a merge: everything that is decided before any tensor is read, from headers alone.

It says what each output tensor is made from and with which parameters, in which pieces it passes through memory, how
often each piece is read, and what that costs in bytes, memory and disk. The executor only follows it.
"""

from __future__ import annotations

import math
import re
import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fastmerge import methods
from fastmerge.backends.rule import TIE_BLOCK
from fastmerge.engine.buffers import ALIGNMENT, aligned
from fastmerge.engine.device import host_backend
from fastmerge.engine.matching import Input, Match, match_models
from fastmerge.engine.sources import SAFETENSORS_NAMES, TORCH_DTYPES, Source, StateDictSource
from fastmerge.engine.writer import OutputTensor, layout_shards
from fastmerge.errors import ArgumentError, CheckpointError
from fastmerge.methods.base import Method, Statistic, TensorContext
from fastmerge.sizes import format_size

NUMERICS = ("fp32", "mergekit")

CHUNK_ELEMENTS = 1 << 21
"""Elements merged at once: a few MiB per model, which stay in the cache from the read to the merge."""
READ_BYTES = 2 << 20
"""Bytes of one read; each is checked for NaN and Inf while it is still in the cache."""
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
SAMPLE_RUN = 1024
SAMPLE_RUNS = 256
"""Runs of neighbours that a sample of a large tensor is made of."""
MODEL_SAMPLE = 1 << 20
MODEL_SAMPLE_BYTES = 64 << 20
MODEL_SAMPLE_RUN = 256
"""Elements of a sample of a whole model, memory for it as float32, and its runs: shorter, since there are more."""

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

ParametersOf = Callable[[str], tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]]
"""Resolves a tensor's parameters: the shared ones, and those of each model in order."""


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


@dataclass(frozen=True)
class Plan:
    """A merge, decided. `describe` says it to a person.

    outputs: the output's tensors in file order. jobs: what to do, in that order. resident: the inputs are in memory
    already. in_bytes, out_bytes: memory for loads and for merged pieces; with a GPU, of the host's for what does not go
    there, and for what comes back. device: where it is merged. gpu: how inputs are brought to a GPU. untied:
    config.json must say that the head is not tied. notes: what a person should know. disk_free: bytes free where the
    output goes, if that is known. model_statistics: what must be known about the whole model, each from a pass over it;
    known: results among them that need not be found again.
    """

    method: Method
    numerics: str
    seed: int
    jobs: list[Job]
    resident: bool
    budget: int
    in_bytes: int
    out_bytes: int
    shard_size: int
    untied: bool = False
    notes: list[str] = field(default_factory=list)
    disk_free: int | None = None
    model_statistics: list[Statistic] = field(default_factory=list)
    known: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    gpu: GpuShare | None = None

    @property
    def gpu_budget(self) -> int | None:
        """Bytes of the GPU's memory that may be taken; None where nothing is brought to a GPU."""
        return None if self.gpu is None else self.gpu.budget

    @property
    def counted(self) -> list[Job]:
        """The jobs that statistics of the whole model look at."""
        return [job for job in self.jobs if job.context is not None and job.counted and job.numel]

    @property
    def model_passes(self) -> int:
        """Passes over the whole model for statistics, unless one of them takes its fallback."""
        return sum(not one.fallback and one.name not in self.known for one in self.model_statistics)

    @property
    def outputs(self) -> list[OutputTensor]:
        """The output's tensors in file order."""
        return [OutputTensor(job.name, SAFETENSORS_NAMES[job.out], job.shape) for job in self.jobs]

    @property
    def shards(self) -> list[list[OutputTensor]]:
        """The output's tensors, file by file."""
        return layout_shards(self.outputs, self.shard_size)

    @property
    def passes(self) -> int:
        """The most sweeps over any tensor's files."""
        return self.model_passes + max((job.sweeps for job in self.jobs), default=1)

    @property
    def bytes_read(self) -> int:
        """Bytes that will be read, over all sweeps."""
        once = sum(job.stored_bytes for job in self.counted) if self.model_passes else 0
        return self.model_passes * once + sum(job.bytes_read for job in self.jobs)

    @property
    def bytes_written(self) -> int:
        """Bytes of tensors that will be written: the disk space that is needed, but for a megabyte or so."""
        return sum(tensor.nbytes for tensor in self.outputs)

    @property
    def peak_memory(self) -> int:
        """Bytes of buffers at most, to which Python and torch themselves are added."""
        staging = 0 if self.gpu is None else self.gpu.staging_bytes
        return self.in_bytes + self.out_bytes + staging + 2 * READ_BYTES

    def staged(self, load: Load) -> bool:
        """Whether this load is brought to a GPU. Samples, and tensors that are only copied, stay on the host."""
        return self.gpu is not None and load.job.context is not None and not load.sample

    def loads(
        self,
        more: Callable[[Job, int], bool] = lambda job, sweep: False,
        more_passes: Callable[[int], bool] | None = None,
    ) -> Iterator[Load]:
        """Every reading, in order. Tensors that must merely be equal come first: a refusal should be quick.

        more: whether a job needs this sweep, asked for those that only a fallback needs. more_passes: whether the whole
        model's statistics need one more pass than so many; without it, the passes that are planned.
        """
        yield from self._model_loads(more_passes or (lambda done: done < self.model_passes))
        for job in sorted(self.jobs, key=lambda job: job.match.action != "same"):
            if job.numel == 0:
                continue
            if job.sampled:
                yield Load(job, 0, 0, min(_sample_size(job.numel), job.most_sampled), sample=True)
            for sweep in range(job.most_sweeps):
                if sweep >= job.sweeps and not more(job, sweep):
                    break
                for start, stop in zip(job.cuts, job.cuts[1:], strict=False):
                    yield Load(job, sweep, start, stop)

    def _model_loads(self, more_passes: Callable[[int], bool]) -> Iterator[Load]:
        """A sample of the whole model, then a pass over it for each statistic."""
        counted = self.counted
        if not counted or not self.model_passes:
            return
        if any(statistic.samples for statistic in self.model_statistics):
            total = sum(job.numel for job in counted)
            most = MODEL_SAMPLE_BYTES // (4 * max(len(job.inputs) for job in counted))
            fraction = min(1.0, min(MODEL_SAMPLE, most) / total)
            for job in counted:
                size = min(max(1, round(job.numel * fraction)), job.most_sampled)
                yield Load(job, 0, 0, size, sample=True, run=MODEL_SAMPLE_RUN, model=True)
        done = 0
        while more_passes(done):
            spans = [(job, *span) for job in counted for span in zip(job.cuts, job.cuts[1:], strict=False)]
            for number, (job, start, stop) in enumerate(spans, 1):
                yield Load(job, 0, start, stop, model=True, last=number == len(spans))
            done += 1

    def describe(self) -> dict[str, Any]:
        """The plan in numbers, ready for JSON; sizes in bytes."""
        swept = [job.name for job in self.jobs if job.sweeps > 1]
        return {
            "method": self.method.name,
            "numerics": self.numerics,
            "seed": self.seed,
            "tensors": len(self.jobs),
            "parameters": sum(job.numel for job in self.jobs),
            "passes": self.passes,
            "model_passes": self.model_passes,
            "swept_tensors": swept,
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "memory_budget": self.budget,
            "peak_buffers": self.peak_memory,
            "device": self.device,
            "gpu_budget": self.gpu_budget,
            "gpu_buffers": None if self.gpu is None else self.gpu.peak_memory,
            "disk_needed": self.bytes_written,
            "disk_free": self.disk_free,
            "shards": len(self.shards),
            "notes": list(self.notes),
        }

    def lines(self) -> list[str]:
        """The plan as a person reads it."""
        said = self.describe()
        swept = said["swept_tensors"]
        passes = str(self.model_passes + 1)
        if self.model_passes:
            passes += ", all but the last for statistics of the whole model"
        if swept:
            names = ", ".join(swept[:3]) + (f" and {len(swept) - 3} more" if len(swept) > 3 else "")
            passes += f", but {self.passes} over {len(swept)} tensor(s) too large to be held within the budget: {names}"
        return [
            f"method         {self.method.name}, numerics {self.numerics}, seed {self.seed}",
            f"tensors        {said['tensors']} ({said['parameters'] / 1e9:.3f}B parameters)",
            f"passes         {passes}",
            f"to read        {format_size(self.bytes_read)}",
            f"to write       {format_size(self.bytes_written)} in {said['shards']} shard(s)",
            f"memory         {format_size(self.peak_memory, binary=True)} of buffers within a budget of "
            f"{format_size(self.budget, binary=True)}, and some 300 MiB for Python and torch",
            *self._gpu_lines(),
            f"disk           {format_size(self.bytes_written)} needed"
            + ("" if self.disk_free is None else f", {format_size(self.disk_free)} free"),
            *(f"note           {note}" for note in self.notes),
        ]

    def _gpu_lines(self) -> list[str]:
        if self.gpu is None:
            return []
        peak, budget = (format_size(size, binary=True) for size in (self.gpu.peak_memory, self.gpu.budget))
        return [f"gpu memory     {peak} of buffers on {self.device} within a budget of {budget}"]


def make_plan(
    method: Method,
    base: Source | None,
    models: Sequence[Source],
    parameters_of: ParametersOf,
    *,
    budget: int,
    shard_size: int = 5_000_000_000,
    numerics: str = "fp32",
    seed: int = 0,
    dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    exclude: Sequence[str] = (),
    backend: str = "auto",
    chunk_elements: int | None = None,
    device: str = "cpu",
    gpu_budget: int | None = None,
) -> Plan:
    """Decide a merge.

    base: None for a method that takes none. models: without the base. budget: bytes of buffers. device: where it is
    merged. gpu_budget: bytes of a GPU's memory, if that is where inputs must be brought. dtype, out_dtype: as in
    the config: `dtype` is what mergekit's numerics compute in, and the output's dtype unless `out_dtype` is given.
    exclude: regular expressions; tensors whose name one of them finds are copied from the base (the first model where
    there is none). chunk_elements: cut every tensor into chunks of so many elements (tests).

    Raises CheckpointError where the models do not fit together, ArgumentError where parameters or budget do not.
    """
    if method.needs_base and base is None:
        raise CheckpointError(
            f"{method.name} merges what the models changed in a base, and no base is given; name the base model."
        )
    if not models:
        raise CheckpointError("There is nothing to merge: every model given is the base; name at least one other.")
    matching = match_models(base, models, _excluder(exclude))
    kernels = backend, backend if device == "cpu" else host_backend(backend)
    drafts = [
        _draft(match, method, parameters_of, numerics, seed, dtype, out_dtype, kernels) for match in matching.matches
    ]
    contexts = [draft.context for draft in drafts if draft.context is not None and not draft.match.again]
    wanted = method.model_statistics([context for context in contexts if context.numel])
    resident = isinstance(models[0], StateDictSource)
    cutter = _Cutter(method, budget, resident, chunk_elements, len(models), device, gpu_budget)
    jobs, in_bytes, out_bytes = cutter.cut(drafts)
    plan = Plan(
        method=method,
        numerics=numerics,
        seed=seed,
        jobs=jobs,
        resident=resident,
        budget=budget,
        in_bytes=in_bytes,
        out_bytes=out_bytes,
        shard_size=shard_size,
        untied=matching.untied,
        notes=matching.notes,
        model_statistics=wanted,
        device=device,
        gpu=cutter.gpu_share(jobs),
    )
    if plan.gpu is None or resident:
        return plan
    sampled = max((load.nbytes for load in plan.loads() if load.sample), default=0)
    return replace(plan, in_bytes=max(in_bytes, sampled))


def _sample_size(numel: int) -> int:
    """A sixteenth of the tensor, in whole runs, up to what SAMPLE_RUNS hold; all of it where it is small."""
    if numel < 16 * SAMPLE_RUN:
        return min(numel, SAMPLE_RUN)
    return min(SAMPLE_RUNS, numel // (16 * SAMPLE_RUN)) * SAMPLE_RUN


def _excluder(patterns: Sequence[str]) -> Callable[[str], bool]:
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except (re.error, TypeError) as error:
            raise ArgumentError(f"exclude holds {pattern!r}, which is not a regular expression ({error}).") from None
    return lambda name: any(pattern.search(name) for pattern in compiled)


@dataclass(frozen=True)
class _Draft:
    """A job without its cuts."""

    match: Match
    held: tuple[torch.dtype, ...]
    merged: torch.dtype
    out: torch.dtype
    context: TensorContext | None


def _draft(
    match: Match,
    method: Method,
    parameters_of: ParametersOf,
    numerics: str,
    seed: int,
    dtype: torch.dtype | None,
    out_dtype: torch.dtype | None,
    kernels: tuple[str, str],
) -> _Draft:
    stored = tuple(TORCH_DTYPES[one.info.dtype] for one in match.inputs)
    if match.action == "same" or not stored[0].is_floating_point:
        return _Draft(match, stored, stored[0], stored[0], None)
    if match.action == "copy":
        out = out_dtype or dtype or stored[0]
        # float64 is copied as it is, but converted by way of float32 like all that is computed.
        kept = stored[0] if out == stored[0] else _single(stored[0])
        return _Draft(match, (kept,), kept, out, None)

    meeting = dtype or _promoted(stored)
    follows_peer = numerics == "mergekit"
    held = tuple(_narrowed(_single(one), meeting) if follows_peer else _single(one) for one in stored)
    natural = meeting if follows_peer else dtype or (stored[0] if match.base is not None else _promoted(stored))
    out = out_dtype or natural
    labels = [one.source.ref for one in match.models]
    shared, each = parameters_of(match.name)
    context = TensorContext(
        name=match.name,
        shape=match.models[0].info.shape,
        parameters=methods.bind(method, shared, each, tensor=match.name, labels=labels),
        positions=tuple(range(len(match.models))),
        compute=method.compute_dtype(meeting, numerics),
        numerics=numerics,
        seed=seed,
        backend=kernels[0],
        host_backend=kernels[1],
    )
    method.check(context, labels)
    # The peer rounds to the dtype in which it computes and then converts; otherwise the output is rounded once.
    return _Draft(match, held, natural if follows_peer else _single(out), out, context)


def _single(dtype: torch.dtype) -> torch.dtype:
    """float64 is computed in float32."""
    return torch.float32 if dtype == torch.float64 else dtype


def _promoted(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    meeting = _single(dtypes[0])
    for dtype in dtypes[1:]:
        meeting = torch.promote_types(meeting, _single(dtype))
    return meeting


def _narrowed(dtype: torch.dtype, meeting: torch.dtype) -> torch.dtype:
    """What an input must be converted to so that its values are those of `meeting`: itself, where they are already."""
    return dtype if torch.promote_types(dtype, meeting) == meeting else meeting


class _Cutter:
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

    def cut(self, drafts: Sequence[_Draft]) -> tuple[list[Job], int, int]:
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

    def _staged(self, draft: _Draft) -> bool:
        return self.gpu_budget is not None and draft.context is not None

    @staticmethod
    def _out_itemsize(draft: _Draft) -> int:
        return draft.out.itemsize + (draft.merged.itemsize if draft.merged != draft.out else 0)

    def _unit(self, draft: _Draft) -> int:
        return 1 if draft.context is None else self.method.cut_unit(draft.context)

    def _piece(self, draft: _Draft) -> int:
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

    def _job(self, draft: _Draft, piece: int) -> Job:
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

    def _most_sampled(self, draft: _Draft, load: int) -> int:
        """A sample is read where a load is; if that is on the GPU, there must be room on the host."""
        if self.gpu_budget is None or self.resident:
            return load
        room = self.share - len(draft.held) * ALIGNMENT
        return max(1, min(load, room // sum(dtype.itemsize for dtype in draft.held)))

    def _check_fits(self, draft: _Draft, job: Job, load: int) -> None:
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

    def _fits_whole(self, draft: _Draft, numel: int, piece: int) -> bool:
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

    def _workspace(self, draft: _Draft, numel: int) -> int:
        """Bytes that a chunk of so many elements needs on a GPU besides; the host's is not counted."""
        if not self._staged(draft) or draft.context is None:
            return 0
        return self.method.workspace(draft.context, numel)

    @staticmethod
    def _held_bytes(draft: _Draft) -> int:
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
