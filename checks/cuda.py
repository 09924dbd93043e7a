"""Every kernel in CUDA C++ compiles for every GPU that is promised, without a warning, to code that keeps the rules.

Needs nvcc 12.8 or newer, which knows all of these, and no GPU. What is looked at is what the build left beside the
objects: warnings, and the account of each kernel on each target that ptxas gave (registers, shared memory, stack,
spills). Where there is none, or the sources are newer, it is made first. The PTX of one target is read for operations
that give other bits than the reference's: approximate or fused ones (but where FUSED says so), denormals flushed to
zero, floats that are added atomically.

``--write`` puts the table into docs/kernels.md.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from checks import ROOT

PAGE = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- cuda: begin -->", "<!-- cuda: end -->"
SOURCES = ROOT / "csrc" / "cuda"
FAMILIES = (
    "driver", "select", "sparsify", "consensus", "pcb", "expert", "geometry", "importance", "evolve", "highpass"
)  # fmt: skip
ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")
READ = "90a"
"""The target whose PTX is read."""

INEXACT = (
    (re.compile(r"div\.(full|approx)"), "a division that is not rounded correctly"),
    (re.compile(r"(sqrt|rcp|rsqrt)\.approx|(ex2|lg2|tanh|sin|cos)\."), "an approximation"),
    (re.compile(r"(fma|mad)\.\S*(f16|f32|f64)"), "a fused multiply-add"),
    (re.compile(r"\S*\.ftz\b"), "denormals flushed to zero"),
    (re.compile(r"(atom|red)\.\S*(f16|f32|f64)"), "an atomic operation on floats, whose order is left to chance"),
)
FUSED = {"highpass": "fma.rn.f32"}
"""The families that may fuse, and by which operation alone. highpass promises a tolerance and not equal bits (see
docs/numbers.md), and half of what its products cost is saved; nvcc fuses nothing there either but where it is told."""
_OPERATION = re.compile(r"^\s*(?:@!?%p\d+\s+)?([a-z][\w.:]*)", re.MULTILINE)
_KERNEL = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\w+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_WARNING = re.compile(r"\bwarning\b", re.IGNORECASE)
_USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


@dataclass(frozen=True)
class Usage:
    """What a kernel takes on one target. shared: bytes that it always has; more may come with the launch."""

    kernel: str
    architecture: str
    registers: int
    shared: int
    stack: int
    spilled: int


@functools.cache
def _build() -> ModuleType:
    """setup.py, which knows the compiler and its flags."""
    spec = importlib.util.spec_from_file_location("fastmerge_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def nvcc() -> str | None:
    """CUDA's compiler as the build finds it."""
    found: str | None = _build().nvcc()
    return found


def usages(log: str, family: str) -> list[Usage]:
    """What ptxas says of all kernels and targets, in a log."""
    found = []
    kernel = architecture = ""
    stack = spilled = 0
    for line in log.splitlines():
        if named := _KERNEL.search(line):
            kernel, architecture = f"{family}.{_name(named[1])}", named[2]
        elif said := _STACK.search(line):
            stack, spilled = int(said[1]), int(said[2]) + int(said[3])
        elif used := _USED.search(line):
            found.append(Usage(kernel, architecture, int(used[1]), int(used[2] or 0), stack, spilled))
    return found


def _name(mangled: str) -> str:
    """A kernel's name and template arguments, as in `merge_kernel<4, true>`."""
    shown = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=False).stdout.strip()
    # A number's type stands before it in parentheses.
    shown = re.sub(r"\([\w: ]+\)(?=\d)", "", shown.replace("(anonymous namespace)::", ""))
    found = re.search(r"(\w+)(<[^()]*>)?\((?!anonymous)", shown)
    return f"{found[1]}{found[2] or ''}" if found else mangled


def problems(found: list[Usage], wanted: tuple[str, ...] = ARCHITECTURES) -> list[str]:
    """Kernels that keep anything in local memory, and targets that a kernel was not compiled for."""
    sentences = []
    for each in found:
        if each.stack or each.spilled:
            sentences.append(
                f"{each.kernel} on sm_{each.architecture}: {each.stack} bytes of stack, {each.spilled} bytes spilled"
            )
    by_kernel: dict[str, set[str]] = {}
    for each in found:
        by_kernel.setdefault(each.kernel, set()).add(each.architecture)
    for kernel, targets in by_kernel.items():
        if missing := [each for each in wanted if each not in targets]:
            sentences.append(f"{kernel}: not compiled for {', '.join(f'sm_{each}' for each in missing)}")
    return sentences


def warnings(log: str) -> list[str]:
    """What nvcc, ptxas or the host's compiler warns of, in a build's log."""
    return [line.strip() for line in log.splitlines() if _WARNING.search(line)]


def inexact(text: str, family: str = "") -> list[str]:
    """What in a family's PTX may have other bits than the reference's, but what FUSED lets it have."""
    counted: Counter[tuple[str, str]] = Counter()
    for found in _OPERATION.finditer(text):
        for pattern, why in INEXACT:
            if pattern.match(found[1]) and found[1] != FUSED.get(family):
                counted[found[1], why] += 1
    return [f"PTX: {count} x {name}: {why}" for (name, why), count in sorted(counted.items())]


def logs() -> dict[str, str]:
    """Each family's log: the build's, if it is of these sources and all targets, else made now.

    Raises:
        RuntimeError: there is no nvcc, or it refuses a source.
    """
    newest = max(path.stat().st_mtime for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cu"))
    made: dict[str, str] = {}
    for family in FAMILIES:
        path = ROOT / "build" / "cuda" / f"{family}.log"
        if path.exists() and path.stat().st_mtime > newest:
            text = path.read_text()
            if text.startswith(f"{list(ARCHITECTURES)}\n"):
                made[family] = text
    if missing := [family for family in FAMILIES if family not in made]:
        with tempfile.TemporaryDirectory() as name:
            for family in missing:
                flags = [f"-gencode=arch=compute_{each},code=sm_{each}" for each in ARCHITECTURES]
                made[family] = _compile(family, [*flags, "-c", "-o", f"{name}/{family}.o"])
    return made


def ptx(family: str) -> str:
    """A family's PTX for one target."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "code.ptx"
        _compile(family, [f"-arch=compute_{READ}", "-ptx", "-o", str(path)])
        return path.read_text()


def _compile(family: str, more: list[str]) -> str:
    compiler = nvcc()
    if compiler is None:
        raise RuntimeError("there is no nvcc")
    include = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}"]
    command = [compiler, *_build().NVCC_FLAGS, "--Werror=all-warnings", *include, str(SOURCES / f"{family}.cu"), *more]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"nvcc refuses {family}.cu:\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr


def table(found: list[Usage]) -> str:
    """Registers of each kernel by target, as a Markdown table."""
    lines = [
        f"| kernel | {' | '.join(f'sm_{each}' for each in ARCHITECTURES)} |",
        f"|---|{'---|' * len(ARCHITECTURES)}",
    ]
    for kernel in dict.fromkeys(each.kernel for each in found):
        those = {each.architecture: each for each in found if each.kernel == kernel}
        registers = (str(those[each].registers) if each in those else "" for each in ARCHITECTURES)
        lines.append(f"| `{kernel}` | {' | '.join(registers)} |")
    return "\n".join(lines)


def write(found: list[Usage]) -> None:
    """Put the table between the marks of docs/kernels.md."""
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(found)}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Print the table and what is wrong; 1 if anything is."""
    parser = argparse.ArgumentParser(prog="python -m checks.cuda", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"refresh the table in {PAGE.relative_to(ROOT)}")
    chosen = parser.parse_args(arguments)
    try:
        made = logs()
        found = [usage for family, log in made.items() for usage in usages(log, family)]
        warned = (f"{family}: {each}" for family, log in made.items() for each in warnings(log))
        other = (f"{family}: {each}" for family in FAMILIES for each in inexact(ptx(family), family))
        sentences = [*warned, *problems(found), *other]
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    print(table(found))
    for sentence in sentences:
        print(sentence, file=sys.stderr)
    if chosen.write:
        write(found)
    return 1 if sentences else 0


if __name__ == "__main__":
    sys.exit(main())
