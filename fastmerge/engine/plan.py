"""The plan of a merge: everything that is decided before any tensor is read, from headers alone.

It says what each output tensor is made from and with which parameters, in which pieces it passes through memory, how
often each piece is read, and what that costs in bytes, memory and disk. The executor only follows it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fastmerge import methods
from fastmerge.engine.cutting import Cutter, Draft
from fastmerge.engine.device import host_backend
from fastmerge.engine.jobs import READ_BYTES, SAMPLE_RUN, GpuShare, Job, Load
from fastmerge.engine.matching import Match, match_models
from fastmerge.engine.sources import SAFETENSORS_NAMES, TORCH_DTYPES, Source, StateDictSource
from fastmerge.engine.writer import OutputTensor, layout_shards
from fastmerge.errors import ArgumentError, CheckpointError
from fastmerge.methods.base import Method, Statistic, TensorContext
from fastmerge.sizes import format_size

NUMERICS = ("fp32", "mergekit")

SAMPLE_RUNS = 256
"""Runs of neighbours that a sample of a large tensor is made of."""
MODEL_SAMPLE = 1 << 20
MODEL_SAMPLE_BYTES = 64 << 20
MODEL_SAMPLE_RUN = 256
"""Elements of a sample of a whole model, memory for it as float32, and its runs: shorter, since there are more."""

ParametersOf = Callable[[str], tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]]
"""Resolves a tensor's parameters: the shared ones, and those of each model in order."""


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

    @property
    def workspace(self) -> int:
        """Bytes of the host's memory that the method takes beside these buffers, at most."""
        if self.device != "cpu":
            return 0
        there = [(job, job.context) for job in self.jobs if job.context is not None and job.numel]
        return max((self.method.workspace(context, job.cuts[1]) for job, context in there), default=0)

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
            "workspace": self.workspace,
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
        beside = f"{format_size(self.workspace, binary=True)} for the largest tensor, " if self.workspace else ""
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
            f"{format_size(self.budget, binary=True)}, {beside}and some 300 MiB for Python and torch",
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
        raise CheckpointError(f"{method.name} needs a base, and no base is given; name the base model.")
    if not models:
        raise CheckpointError("There is nothing to merge: every model given is the base; name at least one other.")
    matching = match_models(base, models, _excluder(exclude))
    kernels = backend, backend if device == "cpu" else host_backend(backend)
    drafts = [
        _draft(match, method, parameters_of, numerics, seed, dtype, out_dtype, kernels, device)
        for match in matching.matches
    ]
    contexts = [draft.context for draft in drafts if draft.context is not None and not draft.match.again]
    wanted = method.model_statistics([context for context in contexts if context.numel])
    resident = isinstance(models[0], StateDictSource)
    cutter = Cutter(method, budget, resident, chunk_elements, len(models), device, gpu_budget)
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


def _draft(
    match: Match,
    method: Method,
    parameters_of: ParametersOf,
    numerics: str,
    seed: int,
    dtype: torch.dtype | None,
    out_dtype: torch.dtype | None,
    kernels: tuple[str, str],
    device: str,
) -> Draft:
    stored = tuple(TORCH_DTYPES[one.info.dtype] for one in match.inputs)
    if match.action == "same" or not stored[0].is_floating_point:
        return Draft(match, stored, stored[0], stored[0], None)
    if match.action == "copy":
        out = out_dtype or dtype or stored[0]
        # float64 is copied as it is, but converted by way of float32 like all that is computed.
        kept = stored[0] if out == stored[0] else _single(stored[0])
        return Draft(match, (kept,), kept, out, None)

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
        device=device,
    )
    method.check(context, labels)
    # The peer rounds to the dtype in which it computes and then converts; otherwise the output is rounded once.
    return Draft(match, held, natural if follows_peer else _single(out), out, context)


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
