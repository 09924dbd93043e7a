"""Every kernel in Triton compiles for every GPU that is promised, to code that has the reference's bits and is fast.

Needs no GPU. What is compiled is what the backend launches: its functions are called (checks/kernel_calls.py), its
launches intercepted, and each different one compiled ahead of time by Triton and read (checks/compiled.py):

- nothing is kept in local memory, and shared memory suffices;
- where a kernel streams aligned tensors it loads and stores 16 bytes at once;
- division is rounded correctly, nothing is fused or approximated, denormals are kept, and no float is added atomically.

Typical forms are compiled for all targets, the others for sm_90 alone. ``--write`` puts the table into docs/kernels.md,
and into checks/kernels_kept.txt what kept the rules: a digest of each form's sources, arguments and target, with those
of the rules and of Triton. ``--changed`` compiles what is not there, and of the rest another sixteenth every day.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import inspect
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType

import triton

from checks import ROOT
from checks.compiled import TARGETS, WIDEST, Code, Launch, compiled
from checks.kernel_calls import NUMEL, Call, calls
from fastmerge.backends import reference
from fastmerge.backends import triton as backend
from fastmerge.backends.triton import launch as launching

PAGE = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
KEPT = ROOT / "checks" / "kernels_kept.txt"
ROUND = 16
"""Days in which ``--changed`` compiles everything."""
ONE_TARGET = "sm_90"
PROCESSES = 2
SHOWN = 3
"""Forms of each kernel on the page."""

PARTS = ("numbers", "functions", "random")
"""Files whose functions are parts of kernels and are never launched."""

SPILLED = {
    # One number, once per program and outside all loops. Without it half as many threads have room, 16 warps for 32.
    ("select.count_digit", "sm_100"): 8,
    # Four numbers per tile of 12 models or more, 16 bytes of each of which are loaded. Other limits spill elsewhere.
    ("consensus.merge_listed", "sm_100"): 16,
}
"""Bytes per thread that the assembler puts aside in memory nevertheless, by kernel and target."""

PRODUCTS = ("highpass.project", "highpass.subtract")
"""Kernels that may multiply matrices by instructions for that, and no others: the frequency filter alone has not the
reference's bits but a tolerance (docs/numbers.md), far from which these products stay."""

WRITTEN = ("out", "scale")
"""Arguments of kernels that are only written."""


@dataclass
class Form:
    """One form of a kernel: a launch, the call that first made it, and what any call that makes it asks for."""

    launch: Launch
    call: Call
    everywhere: bool = False
    wide: bool = False

    @property
    def title(self) -> str:
        """The kernel, and the call that it comes from."""
        return f"{self.launch.name} ({self.call.function}: {self.call.variant})"

    def targets(self) -> list[str]:
        """For which GPUs it is compiled here."""
        return list(TARGETS) if self.everywhere else [ONE_TARGET]

    def digest(self, target: str) -> str:
        """Of all that decides what is compiled for a target, and how it is judged."""
        decisive = (self.launch.key(), self.launch.kernel.cache_key, self.wide, target, triton.__version__, _rules())
        return hashlib.sha256("\n".join(map(str, decisive)).encode()).hexdigest()[:16]


@functools.cache
def _rules() -> str:
    """A digest of the code that compiles and judges."""
    sources = (ROOT / "checks" / name for name in ("compiled.py", "kernels.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


def due(form: Form, target: str, kept: Container[str], day: int) -> bool:
    """Whether a form is compiled by ``--changed``: something is new, or it is its turn on this day of the year."""
    digest = form.digest(target)
    return digest not in kept or int(digest, 16) % ROUND == day % ROUND


@dataclass
class Result:
    """A form as it was compiled for one target; `problems`: what is wrong with it, in sentences."""

    form: Form
    target: str
    code: Code | None
    problems: list[str]


def forms(wanted: Iterable[Call]) -> list[Form]:
    """Each different launch that these calls make.

    Raises:
        RuntimeError: kernels are interpreted in this process, so that there is nothing to compile.
    """
    if launching.INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted, and none can be compiled; unset it")
    found: dict[str, Form] = {}
    for call in wanted:
        function = getattr(backend, call.function, None)
        for launch in [] if function is None else _launches(function, call):
            form = found.setdefault(launch.key(), Form(launch, call))
            form.everywhere |= call.everywhere
            form.wide |= call.wide
    return list(found.values())


def _launches(function: Callable[..., object], call: Call) -> list[Launch]:
    made: list[Launch] = []
    with launching.intercepted(lambda kernel, _, arguments, options: made.append(Launch(kernel, arguments, options))):
        function(*call.arguments, **call.keywords)
    return made


def lacking(backend: ModuleType, wanted: Iterable[str] = reference.__all__) -> list[str]:
    """A sentence for each function that the backend does not have, so that none of its kernels was looked at."""
    return [f"fastmerge.backends.triton lacks {name}" for name in wanted if not hasattr(backend, name)]


def kernels_of(adapter: ModuleType = backend) -> set[str]:
    """The kernels that the modules of the adapter launch, as in `consensus.merge`."""
    found = set()
    # Not those among its attributes: a function can have the name of its module.
    for module in [module for name, module in sys.modules.items() if f"{name}.".startswith(f"{adapter.__name__}.")]:
        for alias, name in re.findall(r"\b(\w+)\.(\w+)\b", inspect.getsource(module)):
            owner = getattr(module, alias, None)
            is_kernels = isinstance(owner, ModuleType) and owner.__name__.startswith("fastmerge._triton.")
            is_kernels = is_kernels and owner.__name__.rpartition(".")[2] not in PARTS
            if is_kernels and hasattr(getattr(owner, name, None), "fn"):
                found.add(f"{owner.__name__.rpartition('.')[2]}.{name}")
    return found


def unseen(found: Iterable[Form]) -> list[str]:
    """A sentence for each kernel that no call makes be launched."""
    seen = {form.launch.name for form in found}
    return [f"{name}: no call of checks/kernel_calls.py launches it" for name in sorted(kernels_of() - seen)]


def examined(form: Form, target: str) -> Result:
    """Compile a form for a target and judge the code."""
    try:
        code = compiled(form.launch, TARGETS[target])
    except Exception as error:
        return Result(form, target, None, [f"{form.title} on {target}: does not compile: {_innermost(error)}"])
    name = form.launch.name
    found = code.problems(TARGETS[target].shared, SPILLED.get((name, target), 0), name in PRODUCTS)
    if form.wide:
        found += _too_narrow(form.launch, code, TARGETS[target].gpu.warp_size)
    return Result(form, target, code, [f"{form.title} on {target}: {sentence}" for sentence in found])


def _innermost(error: BaseException) -> str:
    """The line of the kernel that Triton stumbled over, or what else it says."""
    while error.__cause__ is not None and str(error.__cause__):
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if "^" in lines:
        at = lines.index("^")
        return ": ".join([*lines[at + 1 :], lines[at - 1]])
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"


def _too_narrow(launch: Launch, code: Code, warp: int) -> list[str]:
    """Whether tensors that are passed over are loaded and stored in fewer bytes at once than they could be."""
    threads = launch.constants["num_warps"] * warp
    block = launch.constants.get("BLOCK")
    if block is None:
        return []
    found = []
    for sizes, widths, what in zip(launch.streamed(WRITTEN, NUMEL), (code.loads, code.stores), ("load", "store")):
        # What a thread has of each tile, in pieces of 16 bytes; a smaller tile has smaller pieces.
        widest = min([WIDEST, *(block * size // threads for size in sizes)])
        bytes_per_thread = sum(block * size // threads for size in sizes)
        wide = sum(width * count for width, count in widths.items() if width >= widest)
        if wide < bytes_per_thread:
            seen = ", ".join(f"{count} of {width}" for width, count in sorted(widths.items(), reverse=True)) or "none"
            found.append(
                f"of {bytes_per_thread} bytes that a thread {what}s per tile {wide} move in accesses of at least "
                f"{widest} bytes (unmasked {what}s by bytes: {seen})"
            )
    return found


_jobs: list[tuple[Form, str]] = []


def _examine(number: int) -> tuple[int, Code | None, list[str]]:
    result = examined(*_jobs[number])
    return number, result.code, result.problems


def results(
    found: list[Form], targets: Iterable[str] = TARGETS, wanted: Callable[[Form, str], bool] = lambda form, target: True
) -> Iterator[Result]:
    """Compile forms, each for its targets among these if wanted there, in two processes; in order of the forms."""
    global _jobs
    allowed = set(targets)
    _jobs = [
        (form, target) for form in found for target in form.targets() if target in allowed and wanted(form, target)
    ]
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        # Forked children have the launches, which could not be sent to them.
        with multiprocessing.get_context("fork").Pool(PROCESSES) as pool:
            for number, code, sentences in pool.imap(_examine, range(len(_jobs)), chunksize=4):
                yield Result(*_jobs[number], code, sentences)


def table(done: Iterable[Result]) -> str:
    """What was compiled, as a Markdown table."""
    lines = [
        "| kernel | form | target | registers | shared memory | spilled | widest load | widest store |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in done:
        code = result.code
        if code is None:
            continue
        call = result.form.call
        cells = (
            f"`{result.form.launch.name}`",
            f"{call.function}: {call.variant}",
            result.target,
            code.registers,
            code.shared,
            code.spilled,
            max(code.loads, default="-"),
            max(code.stores, default="-"),
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def page_table(done: Iterable[Result]) -> str:
    """What docs/kernels.md shows: a few forms of each kernel, with the registers that they take on each target."""
    by_form: dict[int, list[Result]] = {}
    for result in done:
        if result.code is not None:
            by_form.setdefault(id(result.form), []).append(result)
    ordered = sorted(by_form.values(), key=lambda each: (each[0].form.launch.name, -len(each)))
    lines = [
        f"| kernel | form | {' | '.join(TARGETS)} | shared | load | store |",
        f"|---|---|{'---|' * len(TARGETS)}---|---|---|",
    ]
    shown: Counter[str] = Counter()
    for each in ordered:
        name, call = each[0].form.launch.name, each[0].form.call
        shown[name] += 1
        if shown[name] > SHOWN:
            continue
        codes = {result.target: result.code for result in each if result.code is not None}
        registers = (str(codes[target].registers) if target in codes else "" for target in TARGETS)
        cells = (
            f"`{name}`",
            f"{call.function}: {call.variant}",
            *registers,
            max(code.shared for code in codes.values()),
            _widest(code.loads for code in codes.values()),
            _widest(code.stores for code in codes.values()),
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _widest(accesses: Iterable[Counter[int]]) -> str:
    widths = {max(each) for each in accesses if each}
    return " to ".join(map(str, sorted({min(widths), max(widths)}))) if widths else ""


def write(done: list[Result], count: int) -> None:
    """Put the table, and how it was made, between the marks of docs/kernels.md, and the digests into their file."""
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    made = f"Triton {triton.__version__}: {count} forms, {len(done)} compilations."
    PAGE.write_text(f"{before}{BEGIN}\n\n{made}\n\n{page_table(done)}\n\n{END}{after}", encoding="utf-8")
    digests = sorted(result.form.digest(result.target) for result in done)
    KEPT.write_text("".join(f"{digest}\n" for digest in digests), encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Print the table and what is wrong; 1 if anything is."""
    parser = argparse.ArgumentParser(prog="python -m checks.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"refresh the table in {PAGE.relative_to(ROOT)}")
    parser.add_argument("--only", default="", help="only calls whose function and variant contain this")
    parser.add_argument("--targets", default=",".join(TARGETS), help="only these, separated by commas")
    parser.add_argument("--changed", action="store_true", help="only what is new since --write, and a sample")
    chosen = parser.parse_args(arguments)
    if chosen.write and (chosen.only or chosen.changed or chosen.targets != ",".join(TARGETS)):
        parser.error("--write goes with all forms and targets")
    found = forms(call for call in calls() if chosen.only in f"{call.function}: {call.variant}")
    kept = set(KEPT.read_text(encoding="utf-8").split()) if chosen.changed and KEPT.exists() else set()
    today = time.gmtime().tm_yday
    done = list(results(found, chosen.targets.split(","), lambda form, target: due(form, target, kept, today)))
    print(table(done))
    sentences = [
        *lacking(backend),
        *([] if chosen.only else unseen(found)),
        *(sentence for result in done for sentence in result.problems),
    ]
    for sentence in sentences:
        print(sentence, file=sys.stderr)
    if chosen.write and not sentences:
        write(done, len(found))
    print(f"{len(found)} forms, {len(done)} compilations by Triton {triton.__version__}", file=sys.stderr)
    return 1 if sentences else 0


if __name__ == "__main__":
    sys.exit(main())
