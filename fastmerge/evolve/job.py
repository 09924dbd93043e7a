"""A search from a config to a directory: history, picture, and the best model as a checkpoint."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastmerge.engine.atomic import replacing
from fastmerge.engine.checkpoint import open_checkpoint
from fastmerge.engine.manifest import build_manifest, merge_digest, package_version
from fastmerge.engine.sources import SAFETENSORS_NAMES, TORCH_DTYPES
from fastmerge.engine.writer import ModelWriter, OutputTensor
from fastmerge.errors import ConfigError
from fastmerge.evolve import objects, picture
from fastmerge.evolve.coefficients import SearchReport, search
from fastmerge.evolve.config import SEARCHES, EvolveConfig
from fastmerge.evolve.evolution import EvolveReport, evolve
from fastmerge.evolve.lock import Occupied
from fastmerge.evolve.members import raw_bytes
from fastmerge.evolve.progress import GenerationReport
from fastmerge.sizes import parse_size

BEST = "best"
PICTURE = "scores.png"

_SOURCES = {
    "evolver": "Evolver, arXiv 2406.12208",
    "de": "SaDE, Qin, Huang, Suganthan 2009",
    "cade": "CADE, differential evolution with cosine-annealed coefficients",
    "cma": "CMA-ES, arXiv 1604.00772",
    "optuna": "Optuna, arXiv 1907.10902",
}


def run(
    config: EvolveConfig,
    out: Path,
    *,
    shard_size: str | int = "5GB",
    backend: str = "auto",
    progress: Callable[[GenerationReport], None] | None = None,
    name: str = "evolve.yml",
) -> dict[str, Any]:
    """Search as a config says, in the directory `out`, which holds the history that a run goes on from.

    The directory is this run's alone: ArgumentError where another one is at work in it.
    Returns what the report says as plain values, with `out`, `best` (the checkpoint's directory) and `notes`.
    """
    with Occupied(out):
        with objects.importable(config.folder):
            first = config.models[0]
            score = objects.score(config.score, first)
            final = None if config.final is None else objects.score(config.final, first)
            report = _search(config, score, final, objects.live_model(config.model, first), out, backend, progress)
        notes = []
        with replacing(out / PICTURE) as beside:
            undrawn = picture.draw(report.history, beside)
        if undrawn is not None:
            notes.append(undrawn)
        _write(config, report, out, shard_size, backend, name)
    return report.to_dict() | {"out": str(out), "best": str(out / BEST), "strategy": config.strategy, "notes": notes}


def _search(
    config: EvolveConfig, score: Any, final: Any, model: Any, out: Path, backend: str, progress: Any
) -> EvolveReport | SearchReport:
    common: dict[str, Any] = {
        "base": config.base_model,
        "seed": config.seed,
        "model": model,
        "final_score": final,
        "state": out,
        "backend": backend,
        "progress": progress,
    }
    try:
        if config.strategy in SEARCHES:
            return search(
                config.models, score, method=config.merge_method, space=config.space, sampler=config.strategy,
                evaluations=config.evaluations, **common, **_python_names(config.parameters),
            )  # fmt: skip
        return evolve(
            config.models, score, strategy=config.strategy, generations=config.generations, merger=config.merger,
            exclude=config.exclude, members=config.members, **common, **config.parameters,
        )  # fmt: skip
    except TypeError as error:
        # `parameters` that repeat a key of the config's own.
        if "multiple values" in str(error):
            raise ConfigError(f"`parameters` holds what has a key of its own: {error}.") from None
        raise


def _python_names(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {"lambda_" if name == "lambda" else name: value for name, value in parameters.items()}


def _write(
    config: EvolveConfig, report: EvolveReport | SearchReport, out: Path, shard_size: str | int, backend: str, name: str
) -> None:
    state: dict[str, Tensor] = report.state
    with open_checkpoint(config.models[0]) as opened:
        order = [each for each in opened.tensors if each in state]
        # What a search among weights found has the members' dtypes, whatever dtype the module has that held it.
        evolved = isinstance(report, EvolveReport)
        outputs = [
            OutputTensor(
                each,
                opened.tensors[each].dtype if evolved else SAFETENSORS_NAMES[state[each].dtype],
                tuple(state[each].shape),
            )
            for each in order
        ]
        inputs = [opened.identity()]
        for ref in config.models[1:]:
            with open_checkpoint(ref) as other:
                inputs.append(other.identity())
        writer = ModelWriter(
            out / BEST,
            outputs,
            shard_size=parse_size(shard_size, name="--shard-size"),
            config=opened.config,
            side_files=opened.side_files(),
            side_root=opened.root,
        )
        with writer:
            for tensor in outputs:
                if tensor.nbytes:
                    values = state[tensor.name]
                    writer.write(tensor.name, 0, raw_bytes(values.to(TORCH_DTYPES[tensor.dtype])))
            digest = merge_digest(outputs, writer.digests)
            writer.finish(
                manifest=build_manifest(
                    method=config.strategy,
                    config=config.source,
                    inputs=inputs,
                    tensors=outputs,
                    digests=writer.digests,
                    numerics="fp32",
                    seed=config.seed,
                    backend=backend,
                    scores={"development": report.score, "final": report.final},
                ),
                card_yaml=config.source,
                card_info={
                    "name": out.name,
                    "method": config.strategy,
                    "summary": "a model found by a search that was guided by a development score",
                    "source": _SOURCES[config.strategy],
                    "base_model": config.base_model,
                    "models": config.models,
                    "version": package_version("fastmerge"),
                    "command": shlex.join(["fastmerge", "evolve", name, out.name, "--seed", str(config.seed)]),
                    "digest": digest,
                },
            )
