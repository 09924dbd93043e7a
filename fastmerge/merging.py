"""Merging, for callers: state dicts in memory, or checkpoints from files to a directory. One plan, one executor."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastmerge import backends, methods
from fastmerge.engine import fresh
from fastmerge.engine.checkpoint import Checkpoint, open_checkpoint
from fastmerge.engine.config import MergeConfig, ModelEntry, load_config
from fastmerge.engine.device import GPU_MEMORY_SHARE, Device, host_backend, open_device, place_of
from fastmerge.engine.executor import ProgressLike, execute
from fastmerge.engine.manifest import build_manifest, merge_digest, package_version
from fastmerge.engine.parameters import ParameterTable, count_layers
from fastmerge.engine.plan import Plan, make_plan
from fastmerge.engine.report import MergeReport, copy_fraction
from fastmerge.engine.sources import TORCH_DTYPES, Source
from fastmerge.engine.statistics_file import StatisticsFile
from fastmerge.engine.writer import ModelWriter, OutputTensor
from fastmerge.errors import ArgumentError, ConfigError, MergeError
from fastmerge.merging_arguments import check_common, dtype_of, using_threads
from fastmerge.merging_in_memory import merge, merge_many
from fastmerge.sizes import parse_size

__all__ = ["merge", "merge_checkpoints", "merge_many", "plan_checkpoints"]

STATISTICS_SUFFIX = ".statistics.json"


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
        stack.enter_context(using_threads(on_host, threads))
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
    check_common(numerics, seed, on_nonfinite)
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
    wanted = wanted_by(config)
    opened = [stack.enter_context(open_checkpoint(ref)) for ref in wanted.refs]
    plan = plan_config(
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
class Wanted:
    """What a config merges: the method, and the models, base first if it is a base to the method."""

    method: methods.Method
    entries: Sequence[ModelEntry]
    base: str | None

    @property
    def refs(self) -> list[str]:
        """The models that are read."""
        return ([self.base] if self.base is not None else []) + [entry.model for entry in self.entries]


def wanted_by(config: MergeConfig) -> Wanted:
    """ConfigError: the method does not take these models."""
    method, entries = _check_method(config)
    try:
        method.check_count(len(entries))
    except ArgumentError as error:
        raise ConfigError(f"{config.where(('models',))}: {error}") from None
    return Wanted(method, entries, config.base_model if method.needs_base or method.takes_base else None)


def plan_config(
    config: MergeConfig,
    wanted: Wanted,
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
            dtype=dtype_of(config.dtype),
            out_dtype=dtype_of(config.out_dtype),
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
