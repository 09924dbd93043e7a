"""`fastmerge evolve`: a search from a config, told generation by generation, that goes on where it was stopped."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastmerge.cli_run import guarded, import_quietly

if TYPE_CHECKING:
    from fastmerge.evolve.config import EvolveConfig

RESUMES = "the history is kept, and the same command goes on from there"


def evolve(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yml", help="The models, the strategy and the score.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory of the search; one begun there goes on.")],
    seed: Annotated[int | None, typer.Option(metavar="N", help="Instead of the config's seed.")] = None,
    shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Most bytes per output file.")] = "5GB",
    backend: Annotated[str, typer.Option(metavar="NAME", help="Kernels to use; see `fastmerge env`.")] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Evolve models as CONFIG.yml says; the best one is written to OUT/best."""

    def work() -> None:
        settings = _check_early(config, out, shard_size)
        if seed is not None:
            settings = replace(settings, seed=seed)
        # A library that prints to standard output must not spoil the JSON.
        with contextlib.redirect_stdout(sys.stderr):
            with import_quietly():
                from fastmerge.evolve import job

            def tell(generation: Any) -> None:
                if not (quiet or as_json):
                    print(generation.line(), file=sys.stderr, flush=True)

            try:
                report = job.run(settings, out, shard_size=shard_size, backend=backend, progress=tell, name=config.name)
            except KeyboardInterrupt as interrupt:
                interrupt.left = RESUMES  # type: ignore[attr-defined]
                raise
        if as_json:
            print(json.dumps(report))
        elif not quiet:
            print("\n".join(_lines(report)))

    return guarded(work, as_json)


def _check_early(config: Path, out: Path, shard_size: str) -> EvolveConfig:
    """Refuse what can be refused before torch is imported."""
    from fastmerge.engine.atomic import check_target
    from fastmerge.errors import ArgumentError
    from fastmerge.evolve.config import load
    from fastmerge.sizes import parse_size

    parse_size(shard_size, name="--shard-size")
    settings = load(config)
    if (out / "best").exists():
        raise ArgumentError(f"The search in {out} is finished, its model lies in {out / 'best'}; choose another name.")
    if not (out / "history.jsonl").exists():
        check_target(out)
    return settings


def _lines(report: dict[str, Any]) -> list[str]:
    rows = [("strategy", report["strategy"]), ("score", _number(report["score"]))]
    if report.get("first_score") is not None:
        rows.append(("at first", _number(report["first_score"])))
    if "parameters" in report:
        rows.append(("parameters", ", ".join(f"{name} {value}" for name, value in report["parameters"].items())))
    if report["final"] is not None:
        rows.append(("final score", _number(report["final"])))
    elif report["final_error"]:
        rows.append(("final score", f"failed: {report['final_error']}"))
    again = f", {report['resumed']} of them from the history" if report["resumed"] else ""
    failed = f", {report['failures']} failed" if report["failures"] else ""
    rows.append(("evaluations", f"{report['evaluations']}{failed}{again}"))
    rows += [("note", note) for note in report["notes"]]
    rows += [("digest", report["digest"]), ("output", report["best"])]
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {value}" for name, value in rows]


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.6g}"
