"""`fastmerge sweep`: candidates of one merge, each scored as soon as it is merged, in a table and a picture."""

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
    from fastmerge.sweep.config import SweepConfig

LEFT = "the results are kept, and the same command goes on from there"


def sweep(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yml", help="A merge, with what varies and its score.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory of the sweep; one begun there goes on.")],
    write_best: Annotated[
        bool, typer.Option("--write-best", help="Also merge the best candidate to OUT/best, as `fastmerge merge` does.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the candidates and the memory, and stop; only headers are read.")
    ] = False,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Instead of the config's seed.")] = None,
    numerics: Annotated[
        str, typer.Option(metavar="fp32|mergekit", help="How intermediate results are rounded, as of a merge.")
    ] = "fp32",
    shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Most bytes per file of the best model.")] = "5GB",
    backend: Annotated[str, typer.Option(metavar="NAME", help="Kernels to use; see `fastmerge env`.")] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Merge and score every candidate of CONFIG.yml, from one read of the models."""

    def work() -> None:
        settings = _check_early(config, out, shard_size)
        if seed is not None:
            settings = replace(settings, seed=seed)
        best_too = write_best or settings.write_best
        _check_finished(out, best_too)
        # A library that prints to standard output must not spoil the JSON.
        with contextlib.redirect_stdout(sys.stderr):
            with import_quietly():
                from fastmerge.sweep import job

            prepared = job.Sweep(settings, numerics=numerics, backend=backend)

            def tell(scored: Any) -> None:
                if not (quiet or as_json):
                    print(scored.line(), file=sys.stderr, flush=True)

            if not dry_run:
                try:
                    report = prepared.run(out, write_best=best_too, shard_size=shard_size, tell=tell)
                except KeyboardInterrupt as interrupt:
                    interrupt.left = LEFT  # type: ignore[attr-defined]
                    raise
        if dry_run:
            print(json.dumps(prepared.plan()) if as_json else "\n".join(prepared.plan_lines()))
        elif as_json:
            print(json.dumps(report))
        elif not quiet:
            _print(report)

    return guarded(work, as_json)


def _check_early(config: Path, out: Path, shard_size: str) -> SweepConfig:
    """Refuse what can be refused before torch is imported."""
    from fastmerge.engine.atomic import check_target
    from fastmerge.sizes import parse_size
    from fastmerge.sweep.config import load

    parse_size(shard_size, name="--shard-size")
    settings = load(config)
    if not (out / "results.jsonl").exists():
        check_target(out)
    return settings


def _check_finished(out: Path, write_best: bool) -> None:
    from fastmerge.errors import ArgumentError

    if write_best and (out / "best").exists():
        raise ArgumentError(f"The best model of this sweep lies in {out / 'best'} already; choose another name.")


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from fastmerge.sweep.config import shown

    names = list(dict.fromkeys(name for one in report["candidates"] for name in one))
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False)
    for name in [*names, "score", ""]:
        table.add_column(name, justify="right" if name == "score" else "left")
    for number, one in enumerate(report["candidates"]):
        score, best = report["scores"][number], number == report["best"]
        result = f"failed: {report['errors'][number]}" if score is None else f"{score:.6g}"
        cells = [*(shown(one[name]) if name in one else "" for name in names), result, "best" if best else ""]
        table.add_row(*(Text(cell, style="bold" if best else "") for cell in cells))
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    console.print(table)
    for line in _lines(report):
        print(line)


def _lines(report: dict[str, Any]) -> list[str]:
    rows = []
    if report["final"] is not None:
        rows.append(("final score", f"{report['final']:.6g}"))
    elif report["final_error"]:
        rows.append(("final score", f"failed: {report['final_error']}"))
    if report["resumed"]:
        rows.append(("resumed", f"{report['resumed']} of {len(report['scores'])} were scored before"))
    rows += [("note", note) for note in report["notes"]]
    if "digest" in report:
        rows.append(("digest", report["digest"]))
    rows.append(("output", report.get("written", report["out"])))
    return [f"{name:<11}  {value}" for name, value in rows]
