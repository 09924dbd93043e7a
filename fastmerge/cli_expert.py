"""`fastmerge expert`: light experts extracted, put into a copy of a model, taken out again, and described."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from fastmerge.cli_run import guarded, import_quietly

app = typer.Typer(
    name="expert",
    help="Light experts (FREE-Merging): extract, apply, remove, info.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Output = Annotated[Path, typer.Option("-o", "--out", metavar="OUT", help="Directory to make; it may exist if empty.")]
ShardSize = Annotated[str, typer.Option(metavar="SIZE", help="Most bytes per output file.")]
Backend = Annotated[str, typer.Option(metavar="NAME", help="Kernels to use; see `fastmerge env`.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command()
def extract(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The model that MODEL was fine-tuned from.")],
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The fine-tuned model.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE", help="File to make, such as math.safetensors.")],
    keep: Annotated[float, typer.Option(metavar="FRACTION", help="What is kept of each row of the delta.")] = 0.01,
    include: Annotated[
        list[str] | None, typer.Option(metavar="REGEX", help="Only tensors whose name this finds; may be repeated.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="REGEX", help="No tensor whose name this finds; may be repeated.")
    ] = None,
    backend: Backend = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> int:
    """Keep of each row of MODEL - BASE the few largest elements, and write them to a small file."""

    def early() -> None:
        from fastmerge.engine.atomic import AtomicFile
        from fastmerge.errors import ArgumentError

        if not 0 < keep < 1:
            raise ArgumentError(f"--keep must lie between 0 and 1, such as 0.01, not {keep}.")
        AtomicFile(out.expanduser()).abort()

    def work(progress: Any) -> dict[str, Any]:
        from fastmerge import experts

        options = {"keep": keep, "include": include or (), "exclude": exclude or (), "backend": backend}
        return experts.extract_to_file(base, model, out, progress=progress, **options)  # type: ignore[arg-type]

    return _run(early, work, _extracted, quiet, as_json)


@app.command()
def apply(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The model to put it into, mostly a merge.")],
    expert: Annotated[Path, typer.Argument(metavar="EXPERT", help="The expert's file.")],
    out: Output,
    scale: Annotated[float, typer.Option(metavar="NUMBER", help="How much of the expert.")] = 1.0,
    rescale: Annotated[bool, typer.Option(help="Multiply by the factor mu that the file holds.")] = True,
    shard_size: ShardSize = "5GB",
    backend: Backend = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> int:
    """Write MODEL with an expert on it to OUT; `expert.restore` in OUT holds what `remove` needs."""

    def work(progress: Any) -> dict[str, Any]:
        from fastmerge import experts

        return experts.apply_to_checkpoint(
            model, expert, out, scale=scale, rescale=rescale, shard_size=shard_size, backend=backend, progress=progress
        )

    return _run(lambda: _check_output(out, shard_size), work, _copied, quiet, as_json)


@app.command()
def remove(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="What `fastmerge expert apply` wrote.")],
    out: Output,
    restore: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The old bits that `apply` left (default: MODEL/expert.restore)."),
    ] = None,
    shard_size: ShardSize = "5GB",
    backend: Backend = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> int:
    """Write the model from before `apply` to OUT, bit for bit."""

    def work(progress: Any) -> dict[str, Any]:
        from fastmerge import experts

        return experts.remove_from_checkpoint(
            model, out, restore=restore, shard_size=shard_size, backend=backend, progress=progress
        )

    return _run(lambda: _check_output(out, shard_size), work, _copied, quiet, as_json)


@app.command()
def info(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An expert's file, or an expert.restore.")],
    as_json: Json = False,
) -> int:
    """Say of a file how much it keeps, of what, and how many rows are empty."""

    def work(progress: Any) -> dict[str, Any]:
        from fastmerge import experts

        return experts.describe(file)

    return _run(lambda: None, work, _described, False, as_json, silent=True)


def _check_output(out: Path, shard_size: str) -> None:
    """Refuse what can be refused before torch is imported."""
    from fastmerge.engine.atomic import check_target
    from fastmerge.sizes import parse_size

    parse_size(shard_size, name="--shard-size")
    check_target(out.expanduser())


def _run(
    early: Callable[[], None],
    work: Callable[[Any], dict[str, Any]],
    tell: Callable[[dict[str, Any]], list[str]],
    quiet: bool,
    as_json: bool,
    *,
    silent: bool = False,
) -> int:
    """Check, import torch, work, and print; silent: no progress is shown."""

    def all_of_it() -> None:
        early()
        # A library that prints to standard output must not spoil the JSON.
        with contextlib.redirect_stdout(sys.stderr):
            with import_quietly():
                from fastmerge import experts  # noqa: F401 - imported here, without the collector

            from fastmerge.engine.report import Progress

            with Progress(quiet=quiet or as_json or silent) as progress:
                report = work(progress)
        if as_json:
            print(json.dumps(report))
        elif not quiet:
            print("\n".join(tell(report)))

    return guarded(all_of_it, as_json)


def _extracted(report: dict[str, Any]) -> list[str]:
    return [*_described(report), *(f"note: {note}" for note in report["notes"]), f"{report['seconds']:.1f} s"]


def _described(report: dict[str, Any]) -> list[str]:
    from fastmerge.sizes import format_size

    whole = "an expert" if report["kind"] == "expert" else "the old bits of a checkpoint that wears an expert"
    empty = f"{report['empty_rows']} of {report['rows']} rows, too narrow to keep anything"
    if report["empty"]:
        shown = ", ".join(report["empty"][:3])
        more = len(report["empty"]) - 3
        empty += f" ({shown}{f' and {more} more tensors' if more > 0 else ''})"
    rows = [
        ("file", f"{report['path']}, {format_size(report['file_bytes'])}: {whole}"),
        ("model", report["model"]),
        ("base", f"{report['base']}, digest {report['base_digest'][:16]}"),
        ("keeps", f"{report['keep']:g} of each row: {report['kept']} elements of {report['tensors']} tensors"),
        ("scaled by", f"{report['mu']:.6g}"),
        ("empty", empty if report["empty_rows"] else "no row"),
    ]
    return [f"{name:<10} {text}" for name, text in rows]


def _copied(report: dict[str, Any]) -> list[str]:
    from fastmerge.sizes import format_size

    return [
        f"{report['out']}: {report['tensors']} tensors, {format_size(report['bytes_written'])}, "
        f"{report['changed_tensors']} of them changed, in {report['seconds']:.1f} s",
        f"digest {report['digest']}",
    ]
