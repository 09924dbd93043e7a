"""The command line. Torch, and all that needs it, is imported only by the commands that compute."""

from __future__ import annotations

import contextlib
import enum
import gc
import json
import os
import platform
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from fastmerge import cli_evolve, cli_expert, cli_sweep, cli_verify
from fastmerge.errors import ArgumentError, FastmergeError, MergeError

if TYPE_CHECKING:
    from fastmerge.engine.config import MergeConfig

DONE, FAILED, WRONG = 0, 1, 2
"""Exit codes: done; the merge failed; the command line, the config or a checkpoint's header is wrong."""

DEBUG_VARIABLE = "FASTMERGE_DEBUG"
_CPU_FEATURES = (
    "sse4_2",
    "avx",
    "avx2",
    "f16c",
    "fma",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_bf16",
    "asimd",
    "sve",
)

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
        with _signals_as_exceptions():
            code = app(arguments, prog_name="fastmerge", standalone_mode=False)
        return code if isinstance(code, int) else DONE
    except _Ended as ended:
        return ended.code
    except KeyboardInterrupt as interrupt:
        return _interrupted(interrupt, as_json)
    except BrokenPipeError:
        # Whoever read the output has seen enough (`fastmerge methods | head`); there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        if _is_usage_error(error):
            message = error.format_message()  # type: ignore[attr-defined]
            # Without a command typer prints the help and has nothing to add.
            return _complain(f"{message} See `fastmerge --help`.", WRONG, as_json) if message else WRONG
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

    return _guarded(work, as_json)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="One method, with its parameters.")] = None,
) -> int:
    """List the merge methods, or one with each parameter and its default."""

    def work() -> None:
        with _without_garbage_collection():
            from fastmerge import methods as registry

        if name is not None:
            print(_method_page(registry.describe(name)))
            return
        rows = [registry.describe(each) for each in registry.names()]
        _print_table([("NAME", "METHOD", "SOURCE"), *((row["name"], row["title"], row["source"]) for row in rows)])

    return _guarded(work, False)


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
        with _without_garbage_collection():
            from fastmerge import filtering

        found = filtering.filtered(checkpoint, ratio, mode, include or ())
        if as_json:
            print(filtering.as_json(found))
        else:
            _print_table(list(filtering.table(found)))
            print(filtering.summary(found))

    return _guarded(work, as_json)


@app.command()
def env() -> int:
    """Print versions, instruction set, threads, GPUs, and which backends work where, or why they do not."""
    return _guarded(lambda: _print_table(_environment()), False)


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
        with _without_garbage_collection():
            from fastmerge import measuring

        wrong.extend(measuring.tell(op=op, device=device, backend=backend, size=size, as_json=as_json))

    return _guarded(work, as_json) or (FAILED if wrong else DONE)


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
    with _without_garbage_collection():
        from fastmerge.merging import plan_checkpoints

    plan = plan_checkpoints(config, out, **options)
    return json.dumps(plan.describe()) if as_json else "\n".join(plan.lines())


def _merge(config: Path, out: Path, options: dict[str, Any], quiet: bool, as_json: bool) -> str:
    _quieten_other_threads()
    with _without_garbage_collection():
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


def _quieten_other_threads() -> None:
    """A merge needs no BLAS, and the threads of others that wait for work in a loop take the kernels' cores."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@contextlib.contextmanager
def _import_quietly() -> Iterator[None]:
    """Importing torch for a command that computes with the kernels alone."""
    _quieten_other_threads()
    with _without_garbage_collection():
        yield


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Importing torch makes a million objects and no garbage: looking for some among them takes 60 ms."""
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def _seconds_since_process_start() -> float:
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    except (OSError, ValueError, IndexError, AttributeError):
        return time.process_time()


# -- methods and env


def _method_page(method: dict[str, Any]) -> str:
    heading = [
        ("title", method["title"]),
        ("source", method["source"]),
        (
            "base model",
            "required" if method["needs_base"] else "taken if given" if method["takes_base"] else "not needed",
        ),
        ("passes", method["passes"]),
    ]
    columns = ("PARAMETER", "SET", "DEFAULT", "RANGE", "MEANING")
    parameters = [
        (
            each["name"],
            "per model" if each["per_model"] else "once",
            "required" if each["required"] else _shown(each["default"]),
            _shown(each["range"]),
            each["help"],
        )
        for each in method["parameters"]
    ]
    return "\n".join([method["name"], *_table(heading), "", *_table([columns, *parameters])])


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "-" if value is None else str(value)


def _environment() -> list[tuple[str, str]]:
    from fastmerge.engine.manifest import package_version

    with _without_garbage_collection():
        import torch

        from fastmerge import backends

    rows = [
        ("fastmerge", package_version("fastmerge")),
        ("python", f"{platform.python_version()} ({sys.executable})"),
        ("torch", package_version("torch")),
        ("system", platform.platform()),
        ("processor", _processor()),
    ]
    available = backends.available()
    if available["cpu"] is None:
        from fastmerge.backends import cpu

        rows.append(("instructions", f"{cpu.isa()} (available: {', '.join(cpu.isas())})"))
        rows.append(("threads", str(cpu.threads())))
    else:
        rows.append(("instructions", "those that torch chooses: the compiled kernels do not work here"))
        rows.append(("threads", str(torch.get_num_threads())))
    rows += _gpus()
    for name, reason in available.items():
        works = f"works on {_devices_of(name)}" if reason is None else f"missing: {reason}"
        rows.append((f"backend {name}", " ".join(works.split())))
    rows += [(f"{kind} tensors", _backend_for(device)) for kind, device in _KINDS.items()]
    variables = sorted(key for key in os.environ if key.startswith("FASTMERGE_"))
    rows += [(key, os.environ[key]) for key in variables] or [("FASTMERGE_*", "no such variable is set")]
    return rows


_KINDS = {"CPU": "cpu", "CUDA": "cuda"}
"""The kinds of tensors that ops take, as people call them, and their devices."""


def _gpus() -> list[tuple[str, str]]:
    """Each GPU, with its memory; or why there is none."""
    import torch

    from fastmerge.engine.device import no_gpu
    from fastmerge.sizes import format_size

    missing = no_gpu()
    if missing is not None:
        return [("gpu", f"none: {missing}")]
    rows = []
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        rows.append((f"gpu cuda:{index}", f"{about.name}, {format_size(about.total_memory, binary=True)}"))
    return rows


def _devices_of(name: str) -> str:
    """The kinds of tensors that a backend takes."""
    from fastmerge import backends
    from fastmerge.errors import BackendError

    kinds = []
    for kind, device in _KINDS.items():
        with contextlib.suppress(BackendError):
            backends.resolve(name, device)
            kinds.append(kind)
    return f"{' and '.join(kinds)} tensors"


def _backend_for(device: str) -> str:
    """Where ops on tensors of a device run if nothing else is asked for, and why there."""
    from fastmerge import backends
    from fastmerge.engine.device import no_gpu
    from fastmerge.errors import BackendError

    missing = no_gpu() if device == "cuda" else None
    if missing is not None:
        return f"none here: {missing}"
    try:
        name = backends.name_of(backends.resolve(None, device))
    except BackendError as error:
        return f"ops refuse them: {error}"
    forced = os.environ.get(backends.ENVIRONMENT_VARIABLE)
    if forced not in (None, "", "auto"):
        return f"ops run on {name}, since {backends.ENVIRONMENT_VARIABLE} names it"
    why = "" if name != "reference" else ", in plain torch, since no faster backend works"
    return f"ops run on {name}{why or ', the fastest that works'}"


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    flags = set((facts.get("flags") or facts.get("Features") or "").split())
    present = [feature for feature in _CPU_FEATURES if feature in flags]
    return f"{facts.get('model name', platform.machine())}, {os.cpu_count()} cores, {' '.join(present) or 'no SIMD'}"


def _print_table(rows: list[tuple[Any, ...]] | list[tuple[str, str]]) -> None:
    print("\n".join(_table(rows)))


def _table(rows: list[Any]) -> list[str]:
    """Rows of cells as lines; the last column is as wide as it likes."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]) - 1)]
    return [
        "  ".join([f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)] + row[-1:]) for row in cells
    ]


# -- how commands end


class _Ended(Exception):  # noqa: N818 - it carries an exit code out of typer and is no error
    """The command has ended and has said why."""

    def __init__(self, code: int) -> None:
        self.code = code


class _Signalled(KeyboardInterrupt):
    """A signal asked the process to end: Ctrl-C, or SIGTERM, which goes the same way."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    def raise_signal(number: int, frame: FrameType | None) -> None:
        raise _Signalled(number)

    previous = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        # A signal that the caller has ignored (`nohup`, a job in the background) stays ignored.
        if signal.getsignal(number) != signal.SIG_IGN:
            previous[number] = signal.signal(number, raise_signal)
    yield
    for number, handler in previous.items():
        signal.signal(number, handler)


def _guarded(work: Callable[[], None], as_json: bool) -> int:
    """Run a command's work and turn what goes wrong into one line and an exit code."""
    try:
        work()
    except KeyboardInterrupt as interrupt:
        # Caught here because typer would turn it into a bare exit code.
        raise _Ended(_interrupted(interrupt, as_json)) from None
    except BrokenPipeError:
        raise
    except FastmergeError as error:
        return _complain(str(error), FAILED if isinstance(error, MergeError) else WRONG, as_json)
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        return _complain(f"{error.strerror or error}{where and ':'}{where}", FAILED, as_json)
    except MemoryError:
        return _complain("Memory ran out: choose a smaller --memory-budget.", FAILED, as_json)
    except Exception as error:
        traceback.print_exc()
        return _complain(f"Internal error ({type(error).__name__}): {error}", FAILED, as_json, shown=True)
    return DONE


cli_expert.add_to(app, _guarded, _import_quietly)
cli_verify.add_to(app, _guarded, _import_quietly)
cli_evolve.add_to(app, _guarded, _import_quietly)
cli_sweep.add_to(app, _guarded, _import_quietly)


def _complain(message: str, code: int, as_json: bool, *, shown: bool = False) -> int:
    _remove_unfinished()
    if not shown and sys.exc_info()[0] is not None and os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0"):
        traceback.print_exc()
    line = " ".join(message.split())
    if as_json:
        print(json.dumps({"error": line, "exit_code": code}))
    print(f"fastmerge: {line}", file=sys.stderr)
    return code


def _interrupted(interrupt: KeyboardInterrupt, as_json: bool) -> int:
    while True:
        # A second Ctrl-C may come at any moment until both signals are ignored.
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            break
        except KeyboardInterrupt:
            continue
    number = _signal_number(interrupt)
    reason = "Interrupted" if number == signal.SIGINT else "Terminated"
    left = getattr(interrupt, "left", "nothing was left behind")
    return _complain(f"{reason}; {left}.", 128 + number, as_json)


def _signal_number(interrupt: BaseException) -> int:
    # The merge may raise a KeyboardInterrupt of its own on the way; the one that started it all is in its context.
    link: BaseException | None = interrupt
    while link is not None:
        if isinstance(link, _Signalled):
            return link.number
        link = link.__context__
    return int(signal.SIGINT)


def _remove_unfinished() -> None:
    # The merge removes its own output when it fails. An interrupt can come between any two instructions, though, and so
    # in the middle of that, too.
    atomic = sys.modules.get("fastmerge.engine.atomic")
    if atomic is not None:
        atomic.abort_all()


def _is_usage_error(error: Exception) -> bool:
    # typer carries its own copy of click or imports click, by version: known by what it can do.
    return hasattr(error, "format_message") and hasattr(error, "exit_code")
