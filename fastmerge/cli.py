"""The command line. Torch, and all that needs it, is imported only by the commands that compute."""

from __future__ import annotations

import contextlib
import enum
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from fastmerge import cli_evolve, cli_expert, cli_sweep, cli_verify
from fastmerge.cli_about import environment, method_page, print_table
from fastmerge.cli_run import (
    DONE,
    FAILED,
    WRONG,
    Ended,
    complain,
    guarded,
    interrupted,
    quieten_other_threads,
    signals_as_exceptions,
    without_garbage_collection,
)
from fastmerge.errors import ArgumentError

if TYPE_CHECKING:
    from fastmerge.engine.config import MergeConfig

_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")

app = typer.Typer(
    name="fastmerge",
    help="Merge language models at the speed of reading them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Numerics(str, enum.Enum):
    """How intermediate results are rounded."""

    fp32 = "fp32"
    mergekit = "mergekit"


class OnNonfinite(str, enum.Enum):
    """What is done about NaN and infinite values in the inputs."""

    error = "error"
    warn = "warn"
    zero = "zero"


def main() -> NoReturn:
    """Run the command line and exit with its code."""
    code = run(sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            code = code or FAILED
    if "torch" in sys.modules or code > WRONG:
        # Everything is flushed and closed. Unloading torch in good order would take a quarter of a second, which is a
        # tenth of a merge; and after an interrupt a thread may still wait for work that never comes.
        os._exit(code)
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run one command; every way in which it can end has a line for a person and an exit code.

    Args:
        arguments: the command line without the program's name.

    Returns:
        0 done, 1 the merge failed, 2 the command line, config or a checkpoint's header is wrong, 130 Ctrl-C,
        143 SIGTERM.
    """
    # The --json of `verify` names a file, and what goes wrong is told as elsewhere without it.
    as_json = "--json" in arguments and arguments[0] != "verify"
    try:
        with signals_as_exceptions():
            code = app(arguments, prog_name="fastmerge", standalone_mode=False)
        return code if isinstance(code, int) else DONE
    except Ended as ended:
        return ended.code
    except KeyboardInterrupt as interrupt:
        return interrupted(interrupt, as_json)
    except BrokenPipeError:
        # Whoever read the output has seen enough (`fastmerge methods | head`); there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        if _is_usage_error(error):
            message = error.format_message()  # type: ignore[attr-defined]
            # Without a command typer prints the help and has nothing to add.
            return complain(f"{message} See `fastmerge --help`.", WRONG, as_json) if message else WRONG
        raise


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        from fastmerge.engine.manifest import package_version

        print(f"fastmerge {package_version('fastmerge')}")
        raise typer.Exit(DONE)


@app.command()
def merge(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yml", help="The merge, as mergekit writes it.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to make; it may exist if it is empty.")],
    device: Annotated[
        str,
        typer.Option(metavar="auto|cpu|cuda|cuda:N", help="Where to compute; auto: a GPU if one works, else the CPU."),
    ] = "auto",
    memory_budget: Annotated[str, typer.Option(metavar="SIZE", help="Memory for the model's data.")] = "4GiB",
    gpu_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory to take of the GPU (default: 80 % of what is free).")
    ] = None,
    shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Most bytes per output file.")] = "5GB",
    numerics: Annotated[
        Numerics, typer.Option(help="fp32: round once, at the end. mergekit: round where mergekit does.")
    ] = Numerics.fp32,
    seed: Annotated[int, typer.Option(help="Seed of the random methods.")] = 0,
    backend: Annotated[str, typer.Option(metavar="NAME", help="Kernels to use; see `fastmerge env`.")] = "auto",
    threads: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Threads to compute with (default: all that it may use)."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop; only headers are read.")] = False,
    statistics: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Where statistics of the whole model are kept for the next merge (default: OUT.statistics.json).",
        ),
    ] = None,
    on_nonfinite: Annotated[
        OnNonfinite, typer.Option(help="NaN or Inf in an input: stop, only report, or put zeros in their place.")
    ] = OnNonfinite.error,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object: the plan or the report.")] = False,
) -> int:
    """Merge checkpoints as CONFIG.yml says and write a Hugging Face model to OUT."""
    options = {
        "device": device,
        "memory_budget": memory_budget,
        "gpu_memory": gpu_memory,
        "shard_size": shard_size,
        "numerics": numerics.value,
        "seed": seed,
        "on_nonfinite": on_nonfinite.value,
        "backend": backend,
        "statistics": statistics,
    }

    def work() -> None:
        parsed = _check_early(config, out, device, memory_budget, gpu_memory, shard_size)
        # A library that prints to standard output must not spoil the JSON.
        with contextlib.redirect_stdout(sys.stderr):
            if dry_run:
                text = _plan(config, out, options, as_json)
            else:
                if not device.startswith("cuda"):
                    _prepare_memory(parsed.refs(), memory_budget)
                text = _merge(config, out, options | {"threads": threads}, quiet, as_json)
        if text:
            print(text)

    return guarded(work, as_json)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="One method, with its parameters.")] = None,
) -> int:
    """List the merge methods, or one with each parameter and its default."""

    def work() -> None:
        with without_garbage_collection():
            from fastmerge import methods as registry

        if name is not None:
            print(method_page(registry.describe(name)))
            return
        rows = [registry.describe(each) for each in registry.names()]
        print_table([("NAME", "METHOD", "SOURCE"), *((row["name"], row["title"], row["source"]) for row in rows)])

    return guarded(work, False)


@app.command()
def filters(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="A model's directory, file, or org/name.")],
    ratio: Annotated[
        float | None, typer.Option(metavar="R", help="From 0 to 1 (default: 0.1 for ideal, 0.7 for official).")
    ] = None,
    mode: Annotated[str, typer.Option(metavar="ideal|official", help="The paper's filter, or its code's.")] = "ideal",
    include: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Weights that this finds (default: attention and MLPs); may be repeated."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """List the weights that FR-Merging's filter takes, by which route, and for how long; only headers are read."""

    def work() -> None:
        with without_garbage_collection():
            from fastmerge import filtering

        found = filtering.filtered(checkpoint, ratio, mode, include or ())
        if as_json:
            print(filtering.as_json(found))
        else:
            print_table(list(filtering.table(found)))
            print(filtering.summary(found))

    return guarded(work, as_json)


@app.command()
def env() -> int:
    """Print versions, instruction set, threads, GPUs, and which backends work where, or why they do not."""
    return guarded(lambda: print_table(environment()), False)


@app.command()
def bench(
    op: Annotated[str | None, typer.Option(metavar="NAME", help="Only this op, such as consensus_merge.")] = None,
    device: Annotated[str, typer.Option(metavar="cpu|cuda", help="Where to compute.")] = "cpu",
    backend: Annotated[str, typer.Option(metavar="NAME", help="Kernels to measure (default: all that work).")] = "auto",
    size: Annotated[int | None, typer.Option(metavar="N", help="Elements of each tensor.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Check the ops and measure them beside a copy of this machine's memory."""
    wrong: list[str] = []

    def work() -> None:
        with without_garbage_collection():
            from fastmerge import measuring

        wrong.extend(measuring.tell(op=op, device=device, backend=backend, size=size, as_json=as_json))

    return guarded(work, as_json) or (FAILED if wrong else DONE)


# -- merge


def _check_early(
    config: Path, out: Path, device: str, memory_budget: str, gpu_memory: str | None, shard_size: str
) -> MergeConfig:
    """Refuse what can be refused before torch is imported, so that a mistake is told at once."""
    from fastmerge.engine.atomic import check_target
    from fastmerge.engine.config import load_config
    from fastmerge.sizes import parse_size

    if not _DEVICE.fullmatch(device):
        raise ArgumentError(f"--device must be auto, cpu, cuda or cuda:N (a GPU's number), not {device!r}.")
    parse_size(memory_budget, name="--memory-budget")
    if gpu_memory is not None:
        parse_size(gpu_memory, name="--gpu-memory")
    parse_size(shard_size, name="--shard-size")
    parsed = load_config(config)
    check_target(out)
    return parsed


def _prepare_memory(models: list[str], memory_budget: str) -> None:
    """Let another core make memory ready while this one imports torch: no more than the models can fill."""
    from fastmerge.engine import fresh
    from fastmerge.sizes import parse_size

    folders = [Path(os.path.expanduser(model)) for model in models]
    # What is wrong with a model's files is told, in a sentence, by the merge that opens them.
    with contextlib.suppress(OSError):
        files = [file for folder in folders if folder.is_dir() for file in folder.glob("*.safetensors")]
        stored = sum(file.stat().st_size for file in files if file.is_file())
        fresh.prepare(min(stored, parse_size(memory_budget, name="--memory-budget") // 2))


def _plan(config: Path, out: Path, options: dict[str, Any], as_json: bool) -> str:
    with without_garbage_collection():
        from fastmerge.merging import plan_checkpoints

    plan = plan_checkpoints(config, out, **options)
    return json.dumps(plan.describe()) if as_json else "\n".join(plan.lines())


def _merge(config: Path, out: Path, options: dict[str, Any], quiet: bool, as_json: bool) -> str:
    quieten_other_threads()
    with without_garbage_collection():
        from fastmerge.engine.report import Progress
        from fastmerge.merging import merge_checkpoints

    before = _seconds_since_process_start()
    with Progress(quiet=quiet or as_json) as progress:
        report = merge_checkpoints(config, out, progress=progress, **options)
    # What the process did before the merge, above all importing torch, is start-up too.
    for phase in ("start_up", "total"):
        report.seconds[phase] = report.seconds.get(phase, 0.0) + before
    if as_json:
        return json.dumps(report.to_dict())
    return "" if quiet else report.table()


def _seconds_since_process_start() -> float:
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    except (OSError, ValueError, IndexError, AttributeError):
        return time.process_time()


app.add_typer(cli_expert.app)
for command in (cli_verify.verify, cli_evolve.evolve, cli_sweep.sweep):
    app.command()(command)


def _is_usage_error(error: Exception) -> bool:
    # typer carries its own copy of click or imports click, by version: known by what it can do.
    return hasattr(error, "format_message") and hasattr(error, "exit_code")
