"""The same config through fastmerge and through mergekit's own methods, on a sample of its tensors, in memory.

One tensor at a time is read, whole or in part, merged by both, and compared; `agreement` says what may differ and why.
Nothing is written. Methods that drop elements at random draw other ones in mergekit, so two things are compared there:
the merge with nothing dropped, and, model by model, how much each tool keeps and what it makes of that.
"""

from __future__ import annotations

import dataclasses
import math
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmerge.engine.config import MergeConfig, load_config
from fastmerge.engine.device import GPU_MEMORY_SHARE, Device, open_device
from fastmerge.engine.executor import DictSink, execute
from fastmerge.engine.jobs import Job
from fastmerge.engine.matching import Input
from fastmerge.engine.parameters import count_layers, layer_position
from fastmerge.engine.plan import Plan, make_plan
from fastmerge.engine.sources import TORCH_DTYPES, StateDictSource
from fastmerge.errors import ArgumentError
from fastmerge.integrations.mergekit import agreement
from fastmerge.integrations.mergekit.agreement import Case, Comparison, compare
from fastmerge.integrations.mergekit.patches import MergekitError
from fastmerge.integrations.mergekit.peer import Group, Peer, Values, open_peer
from fastmerge.merging import plan_checkpoints
from fastmerge.methods.parameters import parameters_of

TENSORS = 16
ELEMENTS = 1 << 22
"""How many tensors are compared, and how many elements of each at most, where nothing else is asked for."""

SIGMAS = 5.0
"""How far the count of what is kept at random may be from its mean: beyond it lies one draw of two millions."""

_QUANTILES_OF_ALL = 1_000_000
"""Of more elements than these mergekit's arcee_fusion draws some at random, and takes the quartiles of those."""
_TINY = 1e-30
"""What stands for deltas of 0 where it is counted what is kept of them."""
_PLENTY = 1 << 62
_FIRST_KINDS = ("embed", "wte", "lm_head", "norm")
_FINE = 1e-4
"""What float32 sums over millions of elements may be wrong by."""


@dataclass
class Kept:
    """What a random method keeps of one model's delta: fractions, and how many elements disagree with its formula.

    wrong: elements that are kept with another value than the formula gives, and one more where a fraction is further
    from `density` than chance would have it.
    """

    model: str
    density: float
    here: float
    mergekit: float
    wrong: int


@dataclass
class Row:
    """One tensor's comparison. Of `of` elements so many were compared.

    refused: why mergekit's own function could not merge it, else None: nothing was compared then.
    """

    name: str
    shape: tuple[int, ...]
    of: int
    found: Comparison
    kept: list[Kept] = field(default_factory=list)
    refused: str | None = None

    @property
    def right(self) -> bool:
        """Whether all is within what is promised."""
        return not self.found.wrong and not any(each.wrong for each in self.kept)


@dataclass
class Report:
    """What was found. compared: tensors; merged: tensors that the config merges; copied: those that it only copies.

    why_not: why nothing can be compared, where that is so.
    """

    config: str
    method: str
    numerics: str
    mergekit: str
    seed: int
    device: str
    merged: int
    copied: int
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    why_not: str | None = None
    seconds: float = 0.0

    @property
    def wrong(self) -> list[str]:
        """Names of the tensors that differ by more than is promised."""
        return [row.name for row in self.rows if not row.right]

    @property
    def reasons(self) -> dict[str, int]:
        """Elements that differ, by reason, over all rows."""
        counts: Counter[str] = Counter()
        for row in self.rows:
            counts.update(row.found.reasons)
        return dict(counts)

    def to_dict(self) -> dict[str, Any]:
        """The report as a dict that `json.dumps` accepts. Numbers that are none are None."""
        rows = [
            {
                "name": row.name,
                "shape": list(row.shape),
                "elements_of_tensor": row.of,
                **_plain(dataclasses.asdict(row.found)),
                "kept": [_plain(dataclasses.asdict(each)) for each in row.kept],
                "refused": row.refused,
                "right": row.right,
            }
            for row in self.rows
        ]
        known = {name: getattr(self, name) for name in ("config", "method", "numerics", "mergekit", "seed", "device")}
        return {
            **known,
            "tensors_merged": self.merged,
            "tensors_copied": self.copied,
            "tensors": rows,
            "elements": sum(row.found.elements for row in self.rows),
            "differ": sum(row.found.differ for row in self.rows),
            "reasons": {name: {"elements": n, "means": means(name)} for name, n in self.reasons.items()},
            "wrong": self.wrong,
            "notes": self.notes,
            "why_not": self.why_not,
            "seconds": self.seconds,
        }


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in values.items()}


def means(reason: str) -> str:
    """What a reason says of elements."""
    return agreement.REASONS.get(reason, "differ without a reason that is known")


def verify(
    config: Path | str | Mapping[str, Any],
    *,
    tensors: int = TENSORS,
    elements: int = ELEMENTS,
    numerics: str = "fp32",
    seed: int = 0,
    device: torch.device | str = "cpu",
    backend: str | None = None,
    told: Callable[[str], None] = lambda name: None,
) -> Report:
    """Merge a sample of a config's tensors by fastmerge and by the mergekit that is installed, and compare.

    Args:
        config: as for `fastmerge.merge_checkpoints`.
        tensors: most tensors to compare. Largest, smallest, one of each kind and of each set of parameters come first.
        elements: most elements of a tensor; of a larger one a part is merged by both: neighbouring slices of its first
            dimension, at least one. Memory grows with this, and with the number of models.
        numerics: as for `merge_checkpoints`.
        seed: of the sample, and of the random methods on both sides.
        device: where fastmerge computes. mergekit computes on the CPU.
        backend: as for `merge_checkpoints`.
        told: called with each tensor's name before it is merged.

    Raises:
        ConfigError, CheckpointError, ArgumentError: as `merge_checkpoints`, before any tensor is read.
        MergekitError: mergekit is missing or of an unknown version, or cannot read the config.
        MergeError: NaN or Inf in an input, or a merge that fails.
    """
    began = time.perf_counter()
    for name, value in (("tensors", tensors), ("elements", elements)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ArgumentError(f"{name} must be a whole number from 1 on, not {value!r}.")
    settings = load_config(config)
    plan = plan_checkpoints(config, device=device, numerics=numerics, seed=seed, backend=backend)
    peer = open_peer(settings)
    jobs = [job for job in plan.jobs if job.context is not None and job.numel]
    report = Report(
        config=settings.name,
        method=plan.method.name,
        numerics=numerics,
        mergekit=peer.version,
        seed=seed,
        device=plan.device,
        merged=len(jobs),
        copied=len(plan.jobs) - len(jobs),
        why_not=_why_not(plan, peer),
    )
    if report.copied:
        report.notes.append(f"{report.copied} tensor(s) are copied or empty, and are not compared.")
    if report.why_not is None:
        comparer = _Comparer(settings, plan, peer, seed, backend, elements)
        try:
            for job in sample(jobs, tensors, seed):
                told(job.name)
                report.rows.append(comparer.row(job))
        finally:
            for source in {id(one.source): one.source for job in jobs for one in job.inputs}.values():
                getattr(source, "close", lambda: None)()
        if report.rows and all(row.refused for row in report.rows):
            report.why_not = f"mergekit merges none of these tensors: {report.rows[0].refused}"
    report.seconds = time.perf_counter() - began
    return report


def _why_not(plan: Plan, peer: Peer) -> str | None:
    """Why there is nothing to compare this merge with, if that is so."""
    name = plan.method.name
    if not peer.has(name):
        return f"mergekit {peer.version} has no method {name}, so there is nothing to compare it with."
    if plan.model_statistics:
        return f"mergekit's {name} knows no thresholds over the whole model (scope: model), only those of each tensor."
    return None


# -- the sample


def sample(jobs: Sequence[Job], count: int, seed: int) -> list[Job]:
    """Up to `count` of the jobs, in their order: the largest and the smallest, then in turns one of each kind of name
    (embeddings, heads and norms first) and of each set of parameters, then others. The seed decides among equals.
    """
    if len(jobs) <= count:
        return list(jobs)
    shuffled = list(jobs)
    random.Random(seed).shuffle(shuffled)
    kinds = _first_of_each(shuffled, lambda job: re.sub(r"\d+", "#", job.name))
    kinds.sort(key=lambda job: not any(word in job.name for word in _FIRST_KINDS))
    sets = _first_of_each(shuffled, _parameters_of)
    turns = [job for pair in zip(kinds, sets, strict=False) for job in pair]
    turns += kinds[len(sets) :] + sets[len(kinds) :]
    wanted = [max(shuffled, key=lambda job: job.numel), min(shuffled, key=lambda job: job.numel), *turns, *shuffled]
    chosen = {job.name for job in list({job.name: job for job in wanted}.values())[:count]}
    return [job for job in jobs if job.name in chosen]


def _first_of_each(jobs: Sequence[Job], kind: Callable[[Job], Any]) -> list[Job]:
    found: dict[Any, Job] = {}
    for job in jobs:
        found.setdefault(kind(job), job)
    return list(found.values())


def _parameters_of(job: Job) -> str:
    assert job.context is not None
    return f"{job.context.parameters!r} {job.held}"


# -- one tensor


class _Comparer:
    """Merges one tensor after the other by both tools."""

    def __init__(
        self, config: MergeConfig, plan: Plan, peer: Peer, seed: int, backend: str | None, elements: int
    ) -> None:
        self.plan = plan
        self.peer = peer
        self.seed = seed
        self.backend = backend or "auto"
        self.dtype = None if config.dtype is None else getattr(torch, config.dtype)
        self.out_dtype = None if config.out_dtype is None else getattr(torch, config.out_dtype)
        self.elements = elements
        if plan.method.name == "arcee_fusion":
            self.elements = min(elements, _QUANTILES_OF_ALL)
        self.computer: Device = open_device(torch.device(plan.device))
        first = plan.jobs[0].inputs[0].source
        self.layers = count_layers(first.tensors, first.config)

    def row(self, job: Job) -> Row:
        """Read, merge twice and compare."""
        start, stop = self._part(job)
        tensors = tuple(_read(one, job, start, stop) for one in job.inputs)
        group = Group(
            name=job.name,
            refs=tuple(one.source.ref for one in job.inputs),
            tensors=tensors,
            has_base=job.match.base is not None,
            position=layer_position(job.name, self.layers),
        )
        row = Row(job.name, job.shape, job.numel, Comparison(0))
        method = self.plan.method.name
        try:
            values = self.peer.values(method, group)
            drops = [float(density) < 1 for density in values.get("density", ())]
            draws = method in agreement.RANDOM and any(drops)
            judged = {**values, "density": [1.0] * len(drops), "rescale": False} if draws else values
            case = Case(
                method,
                self.plan.numerics,
                tensors,
                group.has_base,
                judged,
                self._peers_dtype(tensors),
                self.peer.does_otherwise(method, group, values, self.plan.numerics),
            )
            seen, judge = self._theirs(group, case)
        except MergekitError:
            raise
        except Exception as error:  # whatever mergekit's function raises on tensors that it does not take
            row.refused = " ".join(f"{type(error).__name__}: {error}".split())
            return row
        shared, each = _given(job)
        ours = self._ours(group, shared, [{**given, "density": 1.0} for given in each] if draws else each)
        row.found = compare(case, ours, seen, judge)
        if draws:
            row.kept = [
                self._draws(group, index, shared, each[index], values) for index, lost in enumerate(drops) if lost
            ]
            row.found.reasons.setdefault("draws", 0)
        return row

    def _part(self, job: Job) -> tuple[int, int]:
        """First and last slice of the first dimension, as many as are looked at."""
        if not job.shape:
            return 0, 1
        most = max(1, self.elements // max(job.numel // job.shape[0], 1))
        if most >= job.shape[0]:
            return 0, job.shape[0]
        start = random.Random(f"{self.seed} {job.name}").randrange(job.shape[0] - most + 1)
        return start, start + most

    def _peers_dtype(self, tensors: Sequence[Tensor]) -> torch.dtype:
        if self.dtype is not None:
            found: torch.dtype = self.dtype
            return found
        meeting = tensors[0].dtype
        for tensor in tensors[1:]:
            meeting = torch.promote_types(meeting, tensor.dtype)
        return meeting

    def _theirs(self, group: Group, case: Case) -> tuple[Tensor, Tensor]:
        """What mergekit's command would write but for out_dtype, and what its function gives for the comparison."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(self.seed)
            seen = self._merged(group, case, self.dtype)
            if case.judged_in == case.compute:
                return seen, seen
            wide = dataclasses.replace(group, tensors=tuple(tensor.to(case.judged_in) for tensor in group.tensors))
            return seen, self._merged(wide, case, case.judged_in)

    def _merged(self, group: Group, case: Case, dtype: torch.dtype | None) -> Tensor:
        merged = self.peer.merge(case.method, group, case.values, dtype)
        if merged.shape != group.tensors[0].shape:
            raise ValueError(f"its {case.method} gives a tensor of shape {list(merged.shape)}")
        return merged

    def _ours(
        self, group: Group, shared: Mapping[str, Any], each: Sequence[Mapping[str, Any]], **others: Any
    ) -> Tensor:
        """The same plan and executor as for files, for this tensor alone."""
        sources = [
            StateDictSource(ref, {group.name: tensor}) for ref, tensor in zip(group.refs, group.tensors, strict=True)
        ]
        options: dict[str, Any] = {"numerics": self.plan.numerics, "dtype": self.dtype, "out_dtype": self.out_dtype}
        plan = make_plan(
            self.plan.method,
            sources[0] if group.has_base else None,
            sources[int(group.has_base) :],
            lambda tensor: (shared, each),
            budget=_PLENTY,
            seed=self.plan.seed,
            backend=self.backend,
            device=self.computer.name,
            gpu_budget=int(GPU_MEMORY_SHARE * self.computer.free_bytes()) if self.computer.stages else None,
            **(options | others),
        )
        sink = DictSink(plan, self.computer.place)
        execute(plan, sink, backend=self.backend, device=self.computer)
        return sink.tensors[group.name].cpu()

    def _draws(
        self, group: Group, index: int, shared: Mapping[str, Any], each: Mapping[str, Any], values: Values
    ) -> Kept:
        """One model's delta by itself, in float32: how much of it each tool keeps, and with which values."""
        base = group.tensors[0].float()
        delta = group.tensors[index + 1].float() - base
        delta = torch.where(delta == 0, _TINY, delta)
        alone = dataclasses.replace(
            group,
            refs=(group.refs[0], group.refs[index + 1]),
            tensors=(torch.zeros_like(base), delta),
        )
        plain = {"normalize": False, "lambda": 1.0}
        theirs = {name: [value[index]] if isinstance(value, list) else value for name, value in values.items()} | {
            **plain,
            "weight": [1.0],
        }
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(self.seed)
            peers = self.peer.merge(self.plan.method.name, alone, theirs, torch.float32)
        ours = self._ours(
            alone, {**shared, **plain}, [{**each, "weight": 1.0}], numerics="fp32", dtype=torch.float32, out_dtype=None
        )
        density, rescale = float(each["density"]), bool(shared["rescale"])
        here, there = (_law(delta, one, density, rescale) for one in (ours, peers))
        return Kept(group.refs[index + 1], density, here[0], there[0], here[1] + there[1])


def _law(delta: Tensor, merged: Tensor, density: float, rescale: bool) -> tuple[float, int]:
    """Which fraction of a delta was kept, and how many elements disagree with what the method says of those."""
    kept = merged != 0
    count, total = int(kept.sum()), delta.numel()
    scale = 1.0
    if rescale:
        before, after = float(delta.double().abs().sum()), float(delta.double()[kept].abs().sum())
        scale = before / after if min(before, after) >= 1e-7 else 1.0
    expected = delta[kept].double() * scale
    off = (merged[kept].double() - expected).abs() > (_FINE * expected.abs() if rescale else 0.0)
    unlikely = abs(count - density * total) > SIGMAS * math.sqrt(total * density * (1 - density)) + 1
    return count / total, int(off.sum()) + int(unlikely)


def _read(one: Input, job: Job, start: int, stop: int) -> Tensor:
    """Slices [start, stop) of an input; float64 as float32, in which both compute it."""
    stored = TORCH_DTYPES[one.info.dtype]
    shape = (stop - start, *job.shape[1:]) if job.shape else ()
    inner = math.prod(job.shape[1:])
    memory = bytearray((stop - start) * inner * stored.itemsize)
    one.source.read_into(one.info, start * inner * stored.itemsize, memoryview(memory))
    tensor = torch.frombuffer(memory, dtype=stored).reshape(shape)
    return tensor.float() if stored == torch.float64 else tensor


def _given(job: Job) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The parameters that the plan has for a tensor, as a config would give them."""
    assert job.context is not None
    bound = job.context.parameters
    shared: dict[str, Any] = {}
    each: list[dict[str, Any]] = [{} for _ in job.match.models]
    for name, parameter in parameters_of(type(bound)).items():
        value = getattr(bound, parameter.python_name)
        if not parameter.per_model:
            shared[name] = value
            continue
        for given, one in zip(each, value, strict=True):
            given[name] = one
    return shared, each
