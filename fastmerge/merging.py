"""Merging, for callers: state dicts in memory, or checkpoints from files to a directory. One plan, one executor."""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastmerge import backends, methods
from fastmerge.engine import fresh
from fastmerge.engine.checkpoint import Checkpoint, open_checkpoint
from fastmerge.engine.config import MergeConfig, ModelEntry, load_config
from fastmerge.engine.device import GPU_MEMORY_SHARE, Device, host_backend, open_device, place_of
from fastmerge.engine.executor import DictSink, Outcome, ProgressLike, execute
from fastmerge.engine.loading import LoadedSource
from fastmerge.engine.manifest import build_manifest, merge_digest, package_version
from fastmerge.engine.parameters import ParameterTable, count_layers
from fastmerge.engine.plan import NUMERICS, Plan, make_plan
from fastmerge.engine.report import MergeReport, copy_fraction
from fastmerge.engine.shared import Shared
from fastmerge.engine.sources import TORCH_DTYPES, Source, StateDictSource
from fastmerge.engine.statistics_file import StatisticsFile
from fastmerge.engine.writer import ModelWriter, OutputTensor
from fastmerge.errors import ArgumentError, ArgumentTypeError, CheckpointError, ConfigError, MergeError
from fastmerge.sizes import parse_size

__all__ = ["merge", "merge_checkpoints", "merge_many", "plan_checkpoints"]

ON_NONFINITE = ("error", "warn", "zero")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STATISTICS_SUFFIX = ".statistics.json"
_PLENTY = 1 << 62
"""The budget where nothing is read: the inputs are in memory already."""


# -- in memory


def merge(
    models: Sequence[Mapping[str, torch.Tensor] | torch.nn.Module],
    *,
    base: Mapping[str, torch.Tensor] | torch.nn.Module | None = None,
    method: str = "ties",
    backend: str | None = "auto",
    device: torch.device | str | None = None,
    gpu_memory: str | int | None = None,
    dtype: torch.dtype | str | None = None,
    numerics: str = "fp32",
    seed: int = 0,
    exclude: str | Iterable[str] = (),
    on_nonfinite: str = "error",
    **parameters: Any,
) -> dict[str, torch.Tensor]:
    """Merge models in memory.

    Args:
        models: state dicts (name -> tensor) or modules, all with the same names and shapes. Any strides; float32,
            bfloat16, float16 or float64 (computed in float32), mixed as you like. They are not changed.
        base: what the models were fine-tuned from; most methods need it. linear, karcher and passthrough know none:
            to them it is one model more, the last, with parameters of its own.
        method: a name from `fastmerge.methods.names()`.
        backend: "auto" (the fastest that works), "cuda", "triton", "cpu" or "reference".
        device: where to compute, and where the result is: "cpu", "cuda", "cuda:1"; "auto" for a GPU if one works, else
            the CPU; None for the GPU that any of the tensors is on, else the CPU. Tensors on the CPU are brought to a
            GPU piece by piece.
        gpu_memory: bytes that may be taken of the GPU for that, such as "8GiB", besides the result; None for 80 % of
            what is free.
        dtype: the output's dtype (float32, bfloat16 or float16); None for the base's, tensor by tensor, and for linear
            the one in which the inputs' dtypes meet.
        numerics: "fp32", or "mergekit" to round as mergekit does.
        seed: of the random methods; the same seed drops the same elements whatever the machine.
        exclude: regular expressions; tensors whose name one of them finds are copied from the base (the first model).
        on_nonfinite: "error" where an input holds NaN or Inf, "warn", or "zero" to merge zeros in their place.
        **parameters: the method's, see `fastmerge.methods.describe(method)`: a number, or for those that are per model
            a list with one per model. lambda is written `lambda_`.

    Returns:
        name -> tensor, contiguous, never an alias of an input. Tensors of integers and bools are copied from the base.
        The values are the bits that `merge_checkpoints` writes for the same models.

    Raises:
        ArgumentError, ArgumentTypeError: models that do not fit together, or parameters that the method cannot take.
        MergeError: NaN or Inf in an input; a GPU that fails or runs out of memory.

    Sources: `fastmerge.methods.describe(method)["source"]`.
    """
    chosen = methods.get(method)
    _check_common(numerics, seed, on_nonfinite)
    based, sources = _in_memory(base, models)
    merges = _Resident([*sources, *([] if based is None else [based])], device, backend, gpu_memory, on_nonfinite)

    def planned(gpu_budget: int | None) -> Plan:
        return merges.plan(
            chosen, based, sources, parameters, gpu_budget, dtype=dtype, numerics=numerics, seed=seed, exclude=exclude
        )

    tensors, outcome = merges.merged(planned, planned(None))
    if outcome.nonfinite and on_nonfinite == "warn":
        warnings.warn(_nonfinite_sentence(outcome), stacklevel=2)
    return tensors


def merge_many(
    models: Sequence[Mapping[str, torch.Tensor] | torch.nn.Module],
    candidates: Iterable[Mapping[str, Any]],
    *,
    base: Mapping[str, torch.Tensor] | torch.nn.Module | None = None,
    method: str = "ties",
    backend: str | None = "auto",
    device: torch.device | str | None = None,
    gpu_memory: str | int | None = None,
    dtype: torch.dtype | str | None = None,
    numerics: str = "fp32",
    seed: int = 0,
    exclude: str | Iterable[str] = (),
    on_nonfinite: str = "error",
    reuse: bool = False,
    **parameters: Any,
) -> Iterator[tuple[dict[str, Any], dict[str, torch.Tensor]]]:
    """Merge the same models in several ways, one after the other, with what these have in common found once.

    Thresholds of all densities are found in one sweep over a tensor, when it is first merged; L1 sums, inner products
    and statistics of whole models, and that no input holds NaN or Inf, are found once, too. What is left of each merge
    is one pass over the models. Beside the models and the result next to nothing is held.

    Args:
        models: as of `merge`; they must stay as they are until the last candidate is merged.
        candidates: of each the parameters, as `merge` takes them: `{"density": 0.3, "weight": [1.0, 0.5]}`. A method
            of its own stands among them as "method".
        base: as of `merge`.
        method: of the candidates that do not name one.
        backend: as of `merge`.
        device: as of `merge`.
        gpu_memory: as of `merge`.
        dtype: as of `merge`.
        numerics: as of `merge`.
        seed: as of `merge`.
        exclude: as of `merge`.
        on_nonfinite: as of `merge`.
        reuse: merge each candidate into the memory of the one before, which saves the time in which the system makes
            fresh memory ready. The tensors that came with a candidate hold its values until the next one is asked for.
        **parameters: what all candidates share; what a candidate says itself goes before.

    Returns:
        An iterator of (candidate, name -> tensor), in the order given. The bits of each are those of `merge` with the
        same parameters. A candidate is merged when it is asked for.

    Raises:
        ArgumentError, ArgumentTypeError: at once, before any tensor is looked at; the message names the candidate.
        MergeError: as of `merge`, from the iterator.

    Sources: `fastmerge.methods.describe(method)["source"]`.
    """
    _check_common(numerics, seed, on_nonfinite)
    given = _candidates(candidates)
    based, sources = _in_memory(base, models)
    merges = _Resident([*sources, *([] if based is None else [based])], device, backend, gpu_memory, on_nonfinite)

    def planner(index: int, one: dict[str, Any]) -> Callable[[int | None], Plan]:
        def planned(gpu_budget: int | None) -> Plan:
            try:
                chosen = methods.get(one.get("method", method))
                # Of lambda and lambda_ the one that comes last holds, which is the candidate's.
                merged = {name: value for name, value in {**parameters, **one}.items() if name != "method"}
                return merges.plan(
                    chosen, based, sources, merged, gpu_budget,
                    dtype=dtype, numerics=numerics, seed=seed, exclude=exclude,
                )  # fmt: skip
            except ArgumentError as error:
                raise ArgumentError(f"candidates[{index}]: {error}") from None

        return planned

    planners = [planner(index, one) for index, one in enumerate(given)]
    plans = [planned(None) for planned in planners]

    def each() -> Iterator[tuple[dict[str, Any], dict[str, torch.Tensor]]]:
        series = merges.series(planners, plans, reuse)
        for number, one in enumerate(given):
            tensors, outcome = series.merge(number)
            if outcome.nonfinite and on_nonfinite == "warn":
                warnings.warn(_nonfinite_sentence(outcome), stacklevel=2)
            yield one, tensors
            # Whoever has dropped a result by now needs no memory for two.
            del tensors

    return each()


def _candidates(candidates: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if isinstance(candidates, str | Mapping) or not isinstance(candidates, Iterable):
        raise ArgumentTypeError("candidates must be a list of dicts, each with the parameters of one merge.")
    found = []
    for index, one in enumerate(candidates):
        if not isinstance(one, Mapping) or not all(isinstance(name, str) for name in one):
            raise ArgumentTypeError(f"candidates[{index}] must be a dict of parameters, such as {{'density': 0.3}}.")
        found.append(dict(one))
    if not found:
        raise ArgumentError("candidates is empty; list the parameters of at least one merge.")
    return found


def _in_memory(base: Any, models: Any) -> tuple[StateDictSource | None, list[StateDictSource]]:
    if isinstance(models, Mapping | torch.nn.Module) or not isinstance(models, Sequence):
        raise ArgumentTypeError("models must be a list of state dicts or modules; wrap a single one as [model].")
    sources = [StateDictSource(f"models[{index}]", model) for index, model in enumerate(models)]
    return None if base is None else StateDictSource("base", base), sources


class _Resident:
    """Merges of models in memory: where they are computed, and how."""

    def __init__(
        self,
        sources: Sequence[StateDictSource],
        device: torch.device | str | None,
        backend: str | None,
        gpu_memory: str | int | None,
        on_nonfinite: str,
    ) -> None:
        """sources: of all merges."""
        place = None if device is None else place_of(device, backend)
        self.backend = backend
        self.place = _place_together(place, sources)
        backends.resolve(backend, self.place)
        self.elsewhere = any(source.places.keys() - {self.place} for source in sources)
        self.device_name = open_device(self.place).name
        self.budget = None if gpu_memory is None else parse_size(gpu_memory, name="gpu_memory")
        self.on_nonfinite = on_nonfinite

    def plan(
        self,
        method: methods.Method,
        base: StateDictSource | None,
        models: Sequence[StateDictSource],
        parameters: Mapping[str, Any],
        gpu_budget: int | None,
        *,
        dtype: torch.dtype | str | None,
        numerics: str,
        seed: int,
        exclude: str | Iterable[str],
    ) -> Plan:
        """The plan of one merge whose parameters are the same for every tensor."""
        sources = list(models)
        if base is not None and not (method.needs_base or method.takes_base):
            sources.append(base)
            base = None
        if sources:
            method.check_count(len(sources))
        try:
            return make_plan(
                method,
                base,
                sources,
                _fixed_parameters(method, parameters, len(sources)),
                budget=_PLENTY,
                numerics=numerics,
                seed=seed % (1 << 64),
                out_dtype=_dtype(dtype),
                exclude=[exclude] if isinstance(exclude, str) else list(exclude),
                backend=self.backend or "auto",
                device=self.device_name,
                gpu_budget=gpu_budget,
            )
        except CheckpointError as error:
            raise ArgumentError(str(error)) from None

    def merged(
        self,
        planned: Callable[[int | None], Plan],
        plan: Plan,
        shared: Shared | None = None,
        again: Mapping[str, torch.Tensor] | None = None,
    ) -> tuple[dict[str, torch.Tensor], Outcome]:
        """Carry a plan out. planned: makes it anew for so many bytes of a GPU. again: tensors to merge over."""
        computer = open_device(self.place)
        sink = _dict_sink(plan, computer, again)
        if computer.stages and self.elsewhere:
            # What the result takes is gone by now.
            plan = planned(self.budget if self.budget is not None else int(GPU_MEMORY_SHARE * computer.free_bytes()))
        outcome = execute(
            plan,
            sink,
            on_nonfinite=self.on_nonfinite,  # type: ignore[arg-type]
            backend=self.backend or "auto",
            device=computer,
            shared=shared,
        )
        return sink.tensors, outcome

    def series(self, planners: Sequence[Callable[[int | None], Plan]], plans: Sequence[Plan], reuse: bool) -> Series:
        """Several merges, with what they have in common found once."""
        return Series(self, planners, plans, reuse)


class Series:
    """Merges of the same models in memory, each of which is made when it is asked for."""

    def __init__(
        self, where: _Resident, planners: Sequence[Callable[[int | None], Plan]], plans: Sequence[Plan], reuse: bool
    ) -> None:
        self._where, self._planners, self._plans, self._reuse = where, planners, plans, reuse
        self._shared = Shared(plans)
        self._last: dict[str, torch.Tensor] | None = None

    def merge(self, number: int) -> tuple[dict[str, torch.Tensor], Outcome]:
        """One of them; with `reuse` in the memory of the one before, whose values are gone then."""
        tensors, outcome = self._where.merged(self._planners[number], self._plans[number], self._shared, self._last)
        if self._reuse:
            self._last = dict(tensors)
        return tensors, outcome


def _place_together(place: torch.device | None, sources: Sequence[StateDictSource]) -> torch.device:
    """Where tensors are merged that may be in several places."""
    elsewhere = {where: (source.ref, name) for source in sources for where, name in source.places.items()}
    gpus = [where for where in elsewhere if where.type != "cpu"]
    if place is None:
        place = gpus[0] if gpus else torch.device("cpu")
    for where in gpus:
        if where != place:
            ref, name = elsewhere[where]
            raise ArgumentError(
                f"{name!r} of {ref} is on {where}, but the merge is on {place}; move it there with .to({str(place)!r})."
            )
    return place


def _dict_sink(plan: Plan, device: Device, again: Mapping[str, torch.Tensor] | None) -> DictSink:
    try:
        return DictSink(plan, device.place, again)
    except RuntimeError as error:
        told = device.explain(error)
        if told is None:
            raise
        raise told from error


def _fixed_parameters(method: methods.Method, given: Mapping[str, Any], models: int) -> Any:
    """Resolves keyword arguments: the same values for every tensor."""
    known = methods.parameters(method.name)
    by_python_name = {parameter.python_name: parameter for parameter in known.values()}
    shared: dict[str, Any] = {}
    each: list[dict[str, Any]] = [{} for _ in range(models)]
    for name, value in given.items():
        parameter = by_python_name.get(name) or known.get(name)
        if parameter is None:
            raise ArgumentError(methods.explain_unknown_parameter(name.removesuffix("_"), method.name))
        if isinstance(value, torch.Tensor):
            value = value.tolist()
        if not parameter.per_model:
            shared[parameter.name] = value
            continue
        values = list(value) if isinstance(value, list | tuple) else [value] * models
        if len(values) != models:
            raise ArgumentError(
                f"{name} has {len(values)} values for {models} models; give one number or one per model."
            )
        for mapping, one in zip(each, values, strict=True):
            mapping[parameter.name] = one
    return lambda tensor: (shared, each)


# -- checkpoints


def merge_checkpoints(
    config: Path | str | Mapping[str, Any],
    out: Path | str,
    *,
    device: torch.device | str = "auto",
    memory_budget: str | int = "4GiB",
    gpu_memory: str | int | None = None,
    shard_size: str | int = "5GB",
    numerics: str = "fp32",
    seed: int = 0,
    on_nonfinite: str = "error",
    backend: str | None = None,
    threads: int | None = None,
    statistics: Path | str | None = None,
    progress: ProgressLike | None = None,
) -> MergeReport:
    """Merge checkpoints into a new Hugging Face directory, reading, merging and writing at the same time.

    Args:
        config: a YAML file, YAML text or a dict, in mergekit's `models:` form.
        out: the directory to make: absent, or an empty directory. It appears when everything is on the disk.
        device: where to compute: "auto" (a GPU if a backend works on one, else the CPU), "cpu", "cuda" or
            "cuda:1".
        memory_budget: bytes of buffers, such as "4GiB" or an int; Python and torch themselves come on top.
        gpu_memory: bytes that may be taken of a GPU; None for 80 % of what is free. Models and tensors may be larger.
        shard_size: most bytes per output file.
        numerics: "fp32", or "mergekit" to round as mergekit does.
        seed: of the random methods.
        on_nonfinite: "error" where an input holds NaN or Inf, "warn" to count them in the report, or "zero" to merge
            zeros in their place.
        backend: None or "auto" (the fastest that works), "cuda", "triton", "cpu" or "reference".
        threads: of the kernels; None for all that the process may use.
        statistics: where statistics of the whole model are kept for the next merge of the same models, which need not
            find them again (None: `OUT.statistics.json`). Only methods that need some write it.
        progress: told about the bytes read; see `fastmerge.engine.report.Progress`.

    Returns:
        What was done, with a digest of the result. The bits depend on the models, the config, numerics and seed alone.

    Raises:
        ConfigError, CheckpointError, ArgumentError: found before any tensor is read.
        MergeError: the merge failed, or the GPU did; nothing half-written is left. Ctrl-C leaves nothing either.
    """
    began = time.perf_counter()
    settings = load_config(config)
    with ExitStack() as stack:
        opened, plan, computer = _open_and_plan(
            stack, settings, device, memory_budget, gpu_memory, shard_size, numerics, seed, on_nonfinite, backend
        )
        plan, kept = _with_statistics(plan, opened, _statistics_path(statistics, out), on_nonfinite)
        kernels = backends.resolve(backend, computer.place)
        on_host = backends.resolve(host_backend(backend or "auto"), "cpu") if computer.stages else kernels
        stack.enter_context(_threads(on_host, threads))
        first = opened[0]
        writer = ModelWriter(
            Path(out),
            plan.outputs,
            shard_size=plan.shard_size,
            config=_output_config(first.config, plan),
            side_files=first.side_files(),
            side_root=first.root,
        )
        started = time.perf_counter()
        try:
            outcome = execute(
                plan,
                _WriterSink(writer),
                on_nonfinite=on_nonfinite,  # type: ignore[arg-type]
                backend=backend or "auto",
                progress=progress,
                device=computer,
            )
            finishing = time.perf_counter()
            name = backends.name_of(kernels)
            digest = merge_digest(plan.outputs, writer.digests)
            writer.finish(
                manifest=build_manifest(
                    method=plan.method.name,
                    config=settings.source,
                    inputs=[checkpoint.identity() for checkpoint in opened],
                    tensors=plan.outputs,
                    digests=writer.digests,
                    numerics=numerics,
                    seed=seed,
                    backend=name,
                    nonfinite=outcome.nonfinite,
                ),
                card_yaml=settings.source,
                card_info=_card_info(settings, plan, digest, Path(out)),
            )
        except KeyboardInterrupt:
            writer.abort()
            raise KeyboardInterrupt("The merge was interrupted; nothing of it is left behind.") from None
        except BaseException:
            writer.abort()
            raise
        notes = list(plan.notes)
        if kept is not None:
            try:
                kept.write(plan.model_statistics, outcome.statistics)
            except MergeError as error:
                notes.append(f"The merge is done, but its statistics were not kept: {error}")
    ended = time.perf_counter()
    moved = outcome.bytes_read + plan.bytes_written
    bandwidth = outcome.copy_bandwidth
    seconds = {"start_up": started - began, **outcome.seconds, "total": ended - began}
    seconds["writing"] += ended - finishing
    return MergeReport(
        out=str(out),
        method=plan.method.name,
        tensors=len(plan.jobs),
        parameters=sum(job.numel for job in plan.jobs),
        bytes_read=outcome.bytes_read,
        bytes_written=plan.bytes_written,
        passes=plan.passes,
        model_passes=plan.model_passes,
        seconds=seconds,
        nonfinite=outcome.nonfinite,
        digest=digest,
        backend=name,
        device=computer.name,
        notes=notes,
        copy_fraction=None if bandwidth is None else copy_fraction(moved, ended - started, bandwidth),
    )


def plan_checkpoints(
    config: Path | str | Mapping[str, Any],
    out: Path | str | None = None,
    *,
    device: torch.device | str = "auto",
    memory_budget: str | int = "4GiB",
    gpu_memory: str | int | None = None,
    shard_size: str | int = "5GB",
    numerics: str = "fp32",
    seed: int = 0,
    on_nonfinite: str = "error",
    backend: str | None = None,
    statistics: Path | str | None = None,
) -> Plan:
    """Decide a merge of checkpoints and stop there: `merge_checkpoints` without reading a tensor or writing a byte.

    The arguments and errors are those of `merge_checkpoints`; when `out` is given, it and the disk's free space are
    checked, too.
    """
    with ExitStack() as stack:
        settings = load_config(config)
        opened, plan, _ = _open_and_plan(
            stack, settings, device, memory_budget, gpu_memory, shard_size, numerics, seed, on_nonfinite, backend
        )
        plan, _ = _with_statistics(plan, opened, _statistics_path(statistics, out), on_nonfinite)
        if out is not None:
            from fastmerge.engine.atomic import check_target

            side_bytes = sum(file.stat().st_size for file in opened[0].side_files())
            place = check_target(Path(out), plan.bytes_written + side_bytes)
            while not place.exists():
                place = place.parent
            plan = replace(plan, disk_free=shutil.disk_usage(place).free)
    return plan


def _statistics_path(given: Path | str | None, out: Path | str | None) -> Path | None:
    """The file of statistics: the one that is named, or the one beside the output."""
    if given is not None:
        return Path(given).expanduser()
    if out is None:
        return None
    path = Path(out).expanduser().absolute()
    if path.name == "..":
        path = path.resolve()
    # The root has no name, and nothing is beside it.
    return path.with_name(path.name + STATISTICS_SUFFIX) if path.name else None


def _with_statistics(
    plan: Plan, opened: Sequence[Checkpoint], path: Path | None, on_nonfinite: str
) -> tuple[Plan, StatisticsFile | None]:
    """The plan with what a file knows already, and that file; where the method needs nothing of the kind, as it is."""
    if path is None or not plan.model_statistics:
        return plan, None
    kept = StatisticsFile(path, opened, plan, on_nonfinite)
    known, note = kept.read(plan.model_statistics)
    notes = [*plan.notes, *([] if note is None else [note])]
    if known:
        notes.append(f"{len(known)} statistic(s) of the whole model are taken from {path}.")
    return replace(plan, known=known, notes=notes), kept


def _open_and_plan(
    stack: ExitStack,
    config: MergeConfig,
    device: torch.device | str,
    memory_budget: str | int,
    gpu_memory: str | int | None,
    shard_size: str | int,
    numerics: str,
    seed: int,
    on_nonfinite: str,
    backend: str | None,
) -> tuple[list[Checkpoint], Plan, Device]:
    """Check everything that needs no model, open the models, and plan. The first one opened says what is taken over."""
    _check_common(numerics, seed, on_nonfinite)
    budget = parse_size(memory_budget, name="memory_budget")
    gpu_budget = None if gpu_memory is None else parse_size(gpu_memory, name="gpu_memory")
    place = place_of(device, backend)
    kernels = backends.resolve(backend, place)
    computer = open_device(place)
    if computer.stages:
        fresh.release()
        gpu_budget = int(GPU_MEMORY_SHARE * computer.free_bytes()) if gpu_budget is None else gpu_budget
    else:
        gpu_budget = None
    shard_bytes = parse_size(shard_size, name="shard_size")
    wanted = _wanted(config)
    opened = [stack.enter_context(open_checkpoint(ref)) for ref in wanted.refs]
    plan = _plan_config(
        config,
        wanted,
        opened,
        budget=budget,
        shard_size=shard_bytes,
        numerics=numerics,
        seed=seed,
        backend=backend,
        device=computer.name,
        gpu_budget=gpu_budget,
    )
    if computer.stages and backends.name_of(kernels) == "reference" and backend != "reference":
        reasons = "; ".join(f"{name}: {' '.join(str(backends.reason(name)).split())}" for name in backends.FOR_GPUS)
        plan.notes.append(f"no backend for GPUs works here ({reasons}): plain torch computes, much more slowly.")
    return opened, plan, computer


@dataclass(frozen=True)
class _Wanted:
    """What a config merges: the method, and the models, base first if it is a base to the method."""

    method: methods.Method
    entries: Sequence[ModelEntry]
    base: str | None

    @property
    def refs(self) -> list[str]:
        return ([self.base] if self.base is not None else []) + [entry.model for entry in self.entries]


def _wanted(config: MergeConfig) -> _Wanted:
    method, entries = _check_method(config)
    try:
        method.check_count(len(entries))
    except ArgumentError as error:
        raise ConfigError(f"{config.where(('models',))}: {error}") from None
    return _Wanted(method, entries, config.base_model if method.needs_base or method.takes_base else None)


def _plan_config(
    config: MergeConfig,
    wanted: _Wanted,
    sources: Sequence[Source],
    *,
    budget: int,
    shard_size: int,
    numerics: str,
    seed: int,
    backend: str | None,
    device: str,
    gpu_budget: int | None,
) -> Plan:
    """The plan of a config. sources: its models, in the order of `wanted.refs`."""
    method, entries = wanted.method, wanted.entries
    base = sources[0] if wanted.base is not None else None
    models = sources if base is None else sources[1:]
    layers = count_layers(sources[0].tensors, sources[0].config)
    known = methods.parameters(method.name)
    table = ParameterTable(
        config, layers, kinds={name: parameter.kind for name, parameter in known.items()}, entries=entries
    )
    try:
        plan = make_plan(
            method,
            base,
            models,
            table.for_tensor,
            budget=budget,
            shard_size=shard_size,
            numerics=numerics,
            seed=seed % (1 << 64),
            dtype=_dtype(config.dtype),
            out_dtype=_dtype(config.out_dtype),
            exclude=config.exclude,
            backend=backend or "auto",
            device=device,
            gpu_budget=gpu_budget,
        )
    except methods.ParameterError as error:
        raise ConfigError(f"{_where(config, entries, error)}: {error}") from None
    plan.notes.extend(_notes(config, entries, known))
    return plan


def _notes(config: MergeConfig, entries: Sequence[ModelEntry], known: Mapping[str, Any]) -> list[str]:
    """Settings without effect, as in the peer: parameters of the whole merge that stand with one model."""
    return [
        f"{config.where((*entry.path, 'parameters', name))}: {name} is a parameter of the whole merge and has no "
        "effect with one model; move it to the top-level parameters."
        for entry in entries
        for name in entry.parameters
        if not known[name].per_model
    ]


def _where(config: MergeConfig, entries: Sequence[ModelEntry], error: methods.ParameterError) -> str:
    """The line of the config from which a refused value came: the model's own setting, or the global one."""
    for entry in entries:
        if entry.model == error.model and error.parameter in entry.parameters:
            return config.where((*entry.path, "parameters", error.parameter))
    if error.parameter in config.parameters:
        return config.where(("parameters", error.parameter))
    return config.where()


def _check_method(config: MergeConfig) -> tuple[methods.Method, Sequence[ModelEntry]]:
    """The method, and the models that it merges; its parameters' names and the base are checked on the way."""
    try:
        method = methods.get(config.merge_method)
    except ArgumentError as error:
        raise ConfigError(f"{config.where(('merge_method',))}: {error}") from None
    known = methods.parameters(method.name)
    places: list[tuple[tuple[str | int, ...], dict[str, Any]]] = [(("parameters",), config.parameters)]
    places += [((*entry.path, "parameters"), entry.parameters) for entry in config.entries]
    for path, settings in places:
        for name in settings:
            if name not in known:
                sentence = methods.explain_unknown_parameter(name, method.name)
                raise ConfigError(f"{config.where((*path, name))}: {sentence}")
    if not (method.needs_base or (method.takes_base and config.base_model is not None)):
        entries = list(config.entries)
        if config.base_model is not None and len(config.entries) == len(config.models):
            # The peer adds a base that is not listed as one model more, with the global parameters.
            entries.append(ModelEntry(config.base_model))
        return method, entries
    if config.base_model is None:
        raise ConfigError(f"{config.where()}: {method.name} needs a base; add `base_model:`.")
    if not config.models:
        raise ConfigError(
            f"{config.where(('models',))}: the base is the only model listed, there is nothing to merge; list others."
        )
    return method, config.models


class _WriterSink:
    """A directory being written."""

    def __init__(self, writer: ModelWriter) -> None:
        self._writer = writer

    def target(self, name: str, start: int, stop: int) -> None:
        """Files lend no memory."""
        return None

    def write(self, name: str, start_byte: int, data: memoryview) -> None:
        """Write and digest."""
        self._writer.write(name, start_byte, data)


def _output_config(config: Mapping[str, Any] | None, plan: Plan) -> dict[str, Any] | None:
    """The first model's config with the dtype of what is written, and without a tie that no longer holds."""
    if config is None:
        return None
    result = dict(config)
    sizes: dict[str, int] = {}
    for tensor, job in zip(plan.outputs, plan.jobs, strict=True):
        if job.out.is_floating_point:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    if sizes:
        most = str(TORCH_DTYPES[max(sizes, key=sizes.__getitem__)]).removeprefix("torch.")
        keys = [key for key in ("dtype", "torch_dtype") if key in result] or ["torch_dtype"]
        result |= dict.fromkeys(keys, most)
    if plan.untied:
        holder = result.get("text_config")
        if isinstance(holder, Mapping) and "tie_word_embeddings" in holder:
            result["text_config"] = {**holder, "tie_word_embeddings": False}
        result["tie_word_embeddings"] = False
    return result


def _card_info(config: MergeConfig, plan: Plan, digest: str, out: Path) -> dict[str, Any]:
    dtypes: list[OutputTensor] = plan.outputs
    return {
        "name": out.name,
        "method": plan.method.name,
        "summary": plan.method.title,
        "source": plan.method.source,
        "base_model": config.base_model,
        "models": [entry.model for entry in config.entries],
        "numerics": plan.numerics,
        "seed": plan.seed,
        "dtype": max({tensor.dtype for tensor in dtypes}, key=[tensor.dtype for tensor in dtypes].count),
        "version": package_version("fastmerge"),
        "digest": digest,
    }


# -- checkpoints that are merged in memory, several times


class CandidateMerges:
    """Merges of checkpoints that are read once, each as a config of its own says.

    Each has the bits that `merge_checkpoints` writes for its config. configs: of one folder of models, as a sweep makes
    them. numerics, seed, on_nonfinite, backend: as of `merge_checkpoints`.

    Raises ConfigError, CheckpointError, ArgumentError: what does not fit, from headers alone.

    Attributes:
        refs: the checkpoints. identities: what tells each from other files. input_bytes, output_bytes: of all models
        together, and of the largest result: what is held in memory. notes: what a person should know.
    """

    def __init__(
        self,
        configs: Sequence[MergeConfig],
        *,
        numerics: str = "fp32",
        seed: int = 0,
        on_nonfinite: str = "error",
        backend: str | None = None,
    ) -> None:
        _check_common(numerics, seed, on_nonfinite)
        backends.resolve(backend, "cpu")
        self._configs, self._backend, self._on_nonfinite = configs, backend, on_nonfinite
        self._numbers: dict[str, Any] = {"numerics": numerics, "seed": seed, "backend": backend}
        self._wanted = [_wanted(config) for config in configs]
        self.refs = list(dict.fromkeys(ref for wanted in self._wanted for ref in wanted.refs))
        with ExitStack() as stack:
            opened = {ref: stack.enter_context(open_checkpoint(ref)) for ref in self.refs}
            plans = self._plans(opened, range(len(configs)))
            self.identities = [opened[ref].identity() for ref in self.refs]
            self.input_bytes = sum(one.nbytes for one in opened.values())
        self.output_bytes = max((plan.bytes_written for plan in plans), default=0)
        self.notes = list(dict.fromkeys(note for plan in plans for note in plan.notes))

    def _plans(self, sources: Mapping[str, Source], numbers: Iterable[int]) -> list[Plan]:
        return [
            _plan_config(
                self._configs[number],
                self._wanted[number],
                [sources[ref] for ref in self._wanted[number].refs],
                budget=_PLENTY,
                shard_size=_PLENTY,
                device="cpu",
                gpu_budget=None,
                **self._numbers,
            )
            for number in numbers
        ]

    def load(self, numbers: Sequence[int]) -> Callable[[int], dict[str, torch.Tensor]]:
        """Read the models; returns what merges the candidate of a number, one of these, over the one before."""
        sources = {}
        for ref in dict.fromkeys(ref for number in numbers for ref in self._wanted[number].refs):
            with open_checkpoint(ref) as opened:
                sources[ref] = LoadedSource(opened)
        plans = self._plans(sources, numbers)
        where = _Resident(list(sources.values()), None, self._backend, None, self._on_nonfinite)
        series = where.series([lambda budget, plan=plan: plan for plan in plans], plans, reuse=True)  # type: ignore[misc]
        places = {number: place for place, number in enumerate(numbers)}
        return lambda number: series.merge(places[number])[0]


# -- arguments


def _check_common(numerics: str, seed: int, on_nonfinite: str) -> None:
    if numerics not in NUMERICS:
        raise ArgumentError(f"numerics must be one of {', '.join(NUMERICS)}, not {numerics!r}.")
    if on_nonfinite not in ON_NONFINITE:
        raise ArgumentError(f"on_nonfinite must be one of {', '.join(ON_NONFINITE)}, not {on_nonfinite!r}.")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ArgumentTypeError(f"seed must be an int, not {seed!r}.")


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None:
        return None
    found = _DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ArgumentError(f"dtype must be one of {', '.join(_DTYPES)}, not {dtype!r}.")
    return found


@contextmanager
def _threads(kernels: Any, threads: int | None) -> Iterator[None]:
    """Let the kernels use so many threads, and as many as before afterwards."""
    if threads is None:
        yield
        return
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise ArgumentError(f"threads must be a whole number from 1 on, not {threads!r}.")
    count = getattr(kernels, "threads", torch.get_num_threads)
    set_count = getattr(kernels, "set_threads", torch.set_num_threads)
    before = count()
    set_count(threads)
    try:
        yield
    finally:
        set_count(before)


def _nonfinite_sentence(outcome: Outcome) -> str:
    found = [(ref, name, *counts) for ref, tensors in outcome.nonfinite.items() for name, counts in tensors.items()]
    ref, name, nan, inf = found[0]
    more = f" and {len(found) - 1} more tensors" if len(found) > 1 else ""
    return f"NaN or Inf in the inputs: {name!r} of {ref} ({nan} NaN, {inf} Inf){more}."
