"""`fastmerge verify`: a config through fastmerge and through mergekit, on a sample of its tensors."""

from __future__ import annotations

import contextlib
import enum
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastmerge.cli_run import guarded, import_quietly

if TYPE_CHECKING:
    from fastmerge.integrations.mergekit.verify import Report, Row

DIFFERS = 1
"""The exit code where a tensor differs by more than is promised."""

_WIDTH = 180
"""Columns of the table where it is not for a terminal."""


class Numerics(str, enum.Enum):
    """How intermediate results are rounded."""

    fp32 = "fp32"
    mergekit = "mergekit"


def verify(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yml", help="The merge, as mergekit writes it.")],
    tensors: Annotated[int, typer.Option(min=1, metavar="N", help="Most tensors to compare.")] = 16,
    elements: Annotated[
        int, typer.Option(min=1, metavar="N", help="Most elements of a tensor; of larger ones a part is merged.")
    ] = 1 << 22,
    numerics: Annotated[
        Numerics, typer.Option(help="fp32: round once, at the end. mergekit: round where mergekit does.")
    ] = Numerics.fp32,
    seed: Annotated[int, typer.Option(help="Seed of the sample and of the random methods.")] = 0,
    device: Annotated[
        str, typer.Option(metavar="auto|cpu|cuda|cuda:N", help="Where fastmerge computes; mergekit: on the CPU.")
    ] = "cpu",
    backend: Annotated[str, typer.Option(metavar="NAME", help="Kernels to use; see `fastmerge env`.")] = "auto",
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the report there, too.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
) -> int:
    """Merge sampled tensors of CONFIG.yml by fastmerge and by the installed mergekit, and report the differences."""
    wrong: list[str] = []

    def work() -> None:
        from fastmerge.engine.config import load_config

        # Mistakes are told at once, and none when the work is done.
        load_config(config)
        if json_file is not None:
            _check_file(json_file.expanduser())
        # A library that prints to standard output must not spoil what is printed here.
        with contextlib.redirect_stdout(sys.stderr):
            with import_quietly():
                from fastmerge.integrations.mergekit.verify import verify as compare
            report = compare(
                config,
                tensors=tensors,
                elements=elements,
                numerics=numerics.value,
                seed=seed,
                device=device,
                backend=backend,
            )
        if json_file is not None:
            json_file.expanduser().write_text(json.dumps(report.to_dict()) + "\n", encoding="utf-8")
        if not quiet:
            _tell(report)
        wrong.extend(report.wrong)

    return guarded(work, False) or (DIFFERS if wrong else 0)


def _check_file(path: Path) -> None:
    from fastmerge.errors import ArgumentError

    if path.is_dir() or not path.parent.is_dir():
        raise ArgumentError(f"--json names {path}, which cannot be written; name a file in a directory that exists.")


def _tell(report: Report) -> None:
    """Print the report for a person."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from fastmerge.integrations.mergekit.verify import means

    terminal = sys.stdout.isatty()
    console = Console(file=sys.stdout, highlight=False, width=None if terminal else _WIDTH)
    print(f"{report.method}, numerics {report.numerics}, beside mergekit {report.mergekit}")
    if report.rows:
        table = Table(box=None, pad_edge=False, header_style="bold" if terminal else "")
        for title in ("TENSOR", "ELEMENTS", "DIFFER", "LARGEST", "ULPS", "RELATIVE", "", "WHY"):
            table.add_column(title, justify="left" if title in ("TENSOR", "", "WHY") else "right", overflow="fold")
        for row in report.rows:
            table.add_row(*(Text(cell) for cell in _cells(row)))
        console.print(table)
    for name, count in report.reasons.items():
        print(f"{name}{f' ({count})' if count else ''}: {means(name)}")
    for note in report.notes:
        print(f"note: {note}")
    print(_summary(report))


def _cells(row: Row) -> list[str]:
    found = row.found
    part = "" if row.refused or found.elements == row.of else f" of {row.of}"
    if row.refused:
        return [row.name, "-", "-", "-", "-", "-", "not compared", f"mergekit does not merge it: {row.refused}"]
    why = [f"{name} {count}" if count else name for name, count in found.reasons.items()]
    for kept in row.kept:
        said = (
            f"{kept.model} keeps {kept.here:.4f} here, {kept.mergekit:.4f} in mergekit, of {kept.density:g} asked for"
        )
        why.append(said + (f" ({kept.wrong} wrong)" if kept.wrong else ""))
    return [
        row.name,
        f"{found.elements}{part}",
        str(found.differ),
        f"{found.largest:.3g}",
        f"{found.ulps:.3g}",
        f"{found.relative:.3g}",
        "right" if row.right else "WRONG",
        "; ".join(why),
    ]


def _summary(report: Report) -> str:
    if report.why_not is not None:
        return report.why_not
    elements, differ = (sum(getattr(row.found, name) for row in report.rows) for name in ("elements", "differ"))
    compared = f"{len(report.rows)} of {report.merged} tensors, {elements} elements, of which {differ} differ"
    if report.wrong:
        return f"{compared}; more than is promised in {', '.join(report.wrong)}"
    return f"{compared}; all within what is promised"
