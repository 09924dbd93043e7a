"""Jobs on files of experts: extract one, put it into a copy of a checkpoint, take it out again, describe it.

All of them are reached through `fastmerge.experts`.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmerge.engine.checkpoint import Checkpoint, open_checkpoint
from fastmerge.engine.expert_file import ExpertFile, ExpertWriter, ModelExpert
from fastmerge.engine.expert_model import (
    Piece,
    changed_tensors,
    check_fits,
    check_ties,
    extract,
    open_kind,
    plan_extraction,
    put_back,
    put_on,
    restore_about,
    selected,
)
from fastmerge.engine.manifest import build_manifest, merge_digest, package_version
from fastmerge.engine.report import Progress
from fastmerge.engine.sources import Source, StateDictSource
from fastmerge.engine.writer import ModelWriter, OutputTensor
from fastmerge.errors import ArgumentError, ArgumentTypeError, CheckpointError, MergeError
from fastmerge.ops import Expert
from fastmerge.sizes import parse_size

RESTORE_FILE = "expert.restore"
"""What `apply_to_checkpoint` leaves in its output: the old bits, which `remove_from_checkpoint` puts back."""

_SOURCE = "FREE-Merging, arXiv 2411.16815"

Model = str | Path | Mapping[str, Tensor] | torch.nn.Module


def load(path: Path | str) -> ModelExpert:
    """An expert from its file. CheckpointError: it is no such file, or it is damaged."""
    with open_kind(Path(path).expanduser(), "expert") as file:
        return file.load()


def extract_expert(
    base: Model,
    model: Model,
    *,
    keep: float = 0.01,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    backend: str = "auto",
) -> ModelExpert:
    """The expert of a fine-tuned model, in memory: of each row of its delta the int(width * keep) largest elements.

    base, model: checkpoints (a directory, a file, or org/name of the hub), state dicts, or modules.
    include, exclude: regular expressions that find the names of tensors, one or several; no `include`: all are.
    Errors: FastmergeError, in a sentence: models that do not fit together, NaN or Inf, arguments.
    """
    tensors: dict[str, Expert] = {}
    with ExitStack() as stack:
        plan = plan_extraction(
            source_of(base, "base", stack), source_of(model, "model", stack), keep, selected(include, exclude)
        )
        mu, digests = extract(plan, tensors.__setitem__, lambda nbytes, name: None, backend)
    about = plan.about
    listed = {name: replace(one, digest=digests[name]) for name, one in about.tensors.items()}
    return ModelExpert(replace(about, tensors=listed, mu=mu), tensors)


def extract_to_file(
    base: str | Path,
    model: str | Path,
    out: str | Path,
    *,
    keep: float = 0.01,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    backend: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Extract the expert of a checkpoint into a file, in bounded memory. The arguments are those of `extract_expert`.

    out: the file to make; it must not exist, and appears whole or not at all.
    Returns what `describe` says of the file, and what it took: seconds, bytes_read, model_bytes, notes.
    """
    began = time.perf_counter()
    with ExitStack() as stack:
        opened = [stack.enter_context(open_checkpoint(ref)) for ref in (base, model)]
        plan = plan_extraction(opened[0], opened[1], keep, selected(include, exclude))
        with ExpertWriter(Path(out).expanduser(), plan.about) as writer:
            told = progress or Progress(quiet=True)
            told.begin(plan.nbytes, 1)
            mu, digests = extract(plan, writer.add, told.advance, backend)
            writer.finish(mu, digests)
    took = {"bytes_read": plan.nbytes, "model_bytes": plan.model_bytes, "seconds": time.perf_counter() - began}
    return describe(out) | took | {"notes": plan.notes}


def describe(path: str | Path) -> dict[str, Any]:
    """What a file of an expert says of itself. CheckpointError: it is no such file, or it is damaged."""
    with ExpertFile(Path(path).expanduser()) as file:
        about = file.about
        entries = sum(one.entries for one in about.tensors.values())
        return {
            "path": str(path),
            "kind": about.kind,
            "model": about.model,
            "base": about.base,
            "base_digest": about.digest,
            "keep": about.keep,
            "scope": about.scope,
            "mu": about.mu,
            "tensors": len(about.tensors),
            "rows": about.rows,
            "empty_rows": about.empty_rows,
            "empty": about.empty,
            "kept": entries,
            "file_bytes": file.size,
        }


def apply_to_checkpoint(
    model: str | Path,
    expert: str | Path,
    out: str | Path,
    *,
    scale: float = 1.0,
    rescale: bool = True,
    shard_size: str | int = "5GB",
    backend: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a copy of a checkpoint that wears an expert. The output holds the old bits, too, in `expert.restore`.

    model: the checkpoint, mostly a merge of several models. expert: its file. out: a directory to make.
    scale: how much of the expert; with `rescale`, times the factor mu that the file holds.
    Errors: FastmergeError, in a sentence; nothing is left behind then.
    """
    began = time.perf_counter()
    with ExitStack() as stack:
        file = stack.enter_context(open_kind(Path(expert).expanduser(), "expert"))
        opened = stack.enter_context(open_checkpoint(model))
        belongs = check_fits(file.about, opened)
        check_ties(file, opened)
        factor = finite("scale", scale) * (file.about.mu if rescale else 1.0)
        writer = stack.enter_context(_writer(opened, out, shard_size))
        restore = ExpertWriter(writer.place(RESTORE_FILE), restore_about(file.about, belongs, opened), inside=True)
        stack.enter_context(restore)
        saved: list[Tensor] = []
        whole: dict[str, Expert] = {}

        def read(name: str) -> Expert:
            whole.clear()
            whole[name] = file.read(name)
            return whole[name]

        def change(name: str, rows: Expert, piece: Piece) -> None:
            saved.append(put_on(rows, piece.tensors[0], factor, backend))
            if piece.last:
                one = whole[belongs[name]]
                restore.add(name, Expert(one.shape, one.columns, torch.cat(saved)))
                saved.clear()

        told = progress or Progress(quiet=True)
        told.begin(opened.nbytes, 1)
        changed_tensors(opened, belongs, change, read, writer.write, told.advance)
        restore.finish(file.about.mu, {name: writer.digests[name] for name in belongs})
        settings = {"expert": str(expert), "scale": scale, "rescale": rescale}
        words = ["apply", model, expert, "-o", out, "--scale", scale, *([] if rescale else ["--no-rescale"])]
        about = {"method": "expert", "title": "a light expert put onto a model", "command": _command(words)}
        return _finish(writer, opened, about, settings, [file.about.model], backend, began) | {
            "out": str(out),
            "scale": scale,
            "factor": factor,
            "changed_tensors": _changed(file, belongs),
        }


def remove_from_checkpoint(
    model: str | Path,
    out: str | Path,
    *,
    restore: str | Path | None = None,
    shard_size: str | int = "5GB",
    backend: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the checkpoint that an expert was put onto, bit for bit, from the one that wears it.

    model: what `apply_to_checkpoint` wrote. restore: the file of old bits; None: the one in the model's directory.
    Errors: FastmergeError, in a sentence, also where the model has been changed since; nothing is left behind then.
    """
    began = time.perf_counter()
    with ExitStack() as stack:
        opened = stack.enter_context(open_checkpoint(model))
        path = opened.root / RESTORE_FILE if restore is None else Path(restore).expanduser()
        if not path.exists():
            raise CheckpointError(
                f"{path} does not exist, and without the old bits no expert can be taken out; name the file that "
                "`fastmerge expert apply` left in its output."
            )
        file = stack.enter_context(open_kind(path, "restore"))
        belongs = {name: name for name in check_fits(file.about, opened) if name in file.about.tensors}
        for name, one in file.about.tensors.items():
            if opened.tensors[name].dtype != one.dtype:
                raise CheckpointError(
                    f"Tensor {name!r} is {opened.tensors[name].dtype} in {opened.ref}, but its old bits are "
                    f"{one.dtype}: they are of another model."
                )

        def change(name: str, old: Expert, piece: Piece) -> None:
            if piece.last and piece.digest != file.about.tensors[name].digest:
                raise MergeError(
                    f"Tensor {name!r} of {opened.ref} is not what the expert's application wrote: the model has been "
                    "changed since, or the old bits are of another one."
                )
            put_back(old, piece.tensors[0])

        writer = stack.enter_context(_writer(opened, out, shard_size))
        told = progress or Progress(quiet=True)
        told.begin(opened.nbytes, 1)
        changed_tensors(opened, belongs, change, file.read, writer.write, told.advance, digests=True)
        about = {
            "method": "expert",
            "title": "a model from which a light expert was taken out",
            "command": _command(["remove", model, "-o", out, *([] if restore is None else ["--restore", restore])]),
        }
        settings = {"restore": str(path)}
        report = _finish(writer, opened, about, settings, [file.about.model], backend, began)
        return report | {"out": str(out), "changed_tensors": _changed(file, belongs)}


def _writer(opened: Checkpoint, out: str | Path, shard_size: str | int) -> ModelWriter:
    outputs = [OutputTensor(name, info.dtype, info.shape) for name, info in opened.tensors.items()]
    return ModelWriter(
        Path(out).expanduser(),
        outputs,
        shard_size=parse_size(shard_size, name="shard_size"),
        config=opened.config,
        side_files=opened.side_files(),
        side_root=opened.root,
    )


def _finish(
    writer: ModelWriter,
    opened: Checkpoint,
    about: Mapping[str, str],
    settings: Mapping[str, Any],
    experts: list[str],
    backend: str,
    began: float,
) -> dict[str, Any]:
    """Write what lies beside the weights, and rename the output into place."""
    outputs = [OutputTensor(name, info.dtype, info.shape) for name, info in opened.tensors.items()]
    digest = merge_digest(outputs, writer.digests)
    writer.finish(
        manifest=build_manifest(
            method=about["method"],
            config=dict(settings),
            inputs=[opened.identity()],
            tensors=outputs,
            digests=writer.digests,
            numerics="fp32",
            seed=0,
            backend=backend,
        ),
        card_yaml="\n".join(f"{key}: {value}" for key, value in settings.items()),
        card_info={
            "name": writer.target.name,
            "method": about["method"],
            "summary": about["title"],
            "source": _SOURCE,
            "base_model": opened.ref,
            "models": experts,
            "version": package_version("fastmerge"),
            "command": about["command"],
            "digest": digest,
        },
    )
    return {
        "tensors": len(outputs),
        "bytes_read": opened.nbytes,
        "bytes_written": sum(one.nbytes for one in outputs),
        "digest": digest,
        "seconds": time.perf_counter() - began,
    }


def _changed(file: ExpertFile, belongs: Mapping[str, str]) -> int:
    """How many of a model's tensors an expert reaches: those that keep nothing are left as they are."""
    return sum(file.about.tensors[name].entries > 0 for name in belongs.values())


def _command(words: Sequence[Any]) -> str:
    """What a shell is told to do the same again."""
    return shlex.join(["fastmerge", "expert", *map(str, words)])


def source_of(model: Model, what: str, stack: ExitStack) -> Source:
    """Where a model's tensors come from: a checkpoint, which `stack` closes, or memory; `what` names it in messages."""
    if isinstance(model, (str, Path)):
        return stack.enter_context(open_checkpoint(model))
    return StateDictSource(what, model)


def finite(name: str, value: Any) -> float:
    """A number that is neither NaN nor infinite, as a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ArgumentTypeError(f"{name} must be a number, not {type(value).__name__}; pass a float.")
    if value != value or value in (float("inf"), float("-inf")):
        raise ArgumentError(f"{name}={value} is not finite; pass a finite number.")
    return float(value)
