"""Who may know whom: every import and every #include stays within its layer or goes down.

Python: backends <- ops <- methods <- engine <- merging <- evolve <- sweep <- everything else. ``reference`` knows only
torch and is known only to backends, as are the compiled modules and the kernels in Triton, which know only Triton.
Nothing below the engine knows a file. Only ``integrations``, above them all, knows the tools that it plugs into.
C++: include <- cpu, cuda <- bindings; the Torch and Python headers appear in bindings only, CUDA's in
cuda/device.h only, which the tests replace by an emulator.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from checks import ROOT

PACKAGE = "fastmerge"
# Lowest first. A module of the package that is not named here (cli, merging, integrations, ...) is above them all.
LAYERS = (
    "reference",
    "backends",
    "ops",
    "methods",
    "engine",
    "merging_arguments",
    "merging_in_memory",
    "merging",
    "evolve",
    "sweep",
)
# Known to every layer but reference; they know only one another.
COMMON = ("errors", "sizes", "_dtypes")
TOP = len(LAYERS)
# Tools that fastmerge plugs into: nothing else may know them, or it could not do without them.
PEERS = frozenset({"mergekit"})
# Modules about files: the engine's business.
FILE_MODULES = frozenset({"safetensors", "huggingface_hub", "yaml", "mmap", "shutil", "tempfile", "transformers"})

INCLUDE = re.compile(r"^\s*#\s*include\s*([<\"])([^>\"]+)[>\"]", re.MULTILINE)
CUDA_HEADER = re.compile(r"^(cuda_|cuda\.h|cub/|thrust/|cooperative_groups|driver_types|device_)")
CUDA_ALONE = "cuda/device.h"
FOREIGN_HEADER = re.compile(r"^(torch|ATen|c10|pybind11|numpy)/|^(Python|pybind11)\b")


def problems(root: Path = ROOT) -> list[str]:
    """Every import and include that points the wrong way."""
    return [
        *python_problems(root / PACKAGE),
        *triton_problems(root / "triton_kernels"),
        *cpp_problems(root / "csrc"),
    ]


def python_problems(package: Path) -> list[str]:
    """The wrong imports of the modules in ``package``."""
    found = []
    for path in sorted(package.rglob("*.py")):
        if path.is_relative_to(package / "_triton"):  # a link, which is looked at under its own name
            continue
        module = path.relative_to(package).with_suffix("").parts
        layer = _layer(module)
        for line, target in _imports(ast.parse(path.read_text()), module):
            reason = _objection(layer, target)
            if reason:
                found.append(f"{path.relative_to(package.parent)}:{line}: imports {target}: {reason}")
    return found


def triton_problems(kernels: Path) -> list[str]:
    """The imports of the kernels in Triton that are neither Triton nor one another."""
    found = []
    for path in sorted(kernels.rglob("*.py")):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level != 1:
                names = [node.module or "what is above them"]
            for name in names:
                if name.split(".")[0] != "triton":
                    where = f"{path.relative_to(kernels.parent)}:{node.lineno}"
                    found.append(f"{where}: imports {name}: kernels know only Triton")
    return found


def cpp_problems(csrc: Path) -> list[str]:
    """The wrong includes of the sources in ``csrc``."""
    found = []
    known = {"include": ("include",), "cpu": ("include", "cpu"), "cuda": ("include", "cuda")}
    for path in sorted(csrc.rglob("*")):
        if path.suffix not in {".h", ".hpp", ".cuh", ".cpp", ".cc", ".cu"}:
            continue
        floor = path.relative_to(csrc).parts[0]
        for match in INCLUDE.finditer(path.read_text()):
            quote, header = match.groups()
            where = f"{path.relative_to(csrc.parent)}:{path.read_text()[: match.start(2)].count(chr(10)) + 1}"
            if CUDA_HEADER.search(header) and path.relative_to(csrc).as_posix() != CUDA_ALONE:
                found.append(
                    f"{where}: includes {header}: only csrc/{CUDA_ALONE} may know CUDA, which the tests emulate"
                )
            elif FOREIGN_HEADER.search(header) and floor != "bindings":
                found.append(f"{where}: includes {header}: only csrc/bindings may know Python or Torch")
            elif quote == '"' and floor in known:
                target = _header_floor(path, header, csrc)
                if target is not None and target not in known[floor]:
                    found.append(f"{where}: includes {header}: csrc/{floor} may not know csrc/{target}")
    return found


def _layer(module: tuple[str, ...]) -> str:
    return module[0] if module else ""


def _rank(layer: str) -> int:
    return LAYERS.index(layer) if layer in LAYERS else TOP


def _objection(layer: str, target: str) -> str | None:
    """Why a module of ``layer`` may not import ``target`` (a dotted name), or None when it may."""
    top, *rest = target.split(".")
    if top != PACKAGE:
        if top in PEERS:
            return None if layer == "integrations" else f"only integrations may know {top}"
        if layer in COMMON or layer not in LAYERS or top in sys.stdlib_module_names - FILE_MODULES:
            return None
        if layer == "reference" and top != "torch":
            return "reference knows only torch"
        if _rank(layer) < LAYERS.index("engine") and top in FILE_MODULES:
            return "nothing below the engine knows a file"
        return None
    goal = rest[0] if rest else ""
    if goal == layer and goal:
        return None
    if layer == "reference":
        return "reference knows only torch"
    if layer in COMMON:
        return None if goal in COMMON else f"{layer} is known to every layer and may know none"
    if goal in COMMON:
        return None
    if goal == "reference" or goal in {"_cpu", "_cuda", "_cuda_emulated", "_triton"}:
        return None if layer == "backends" or layer not in LAYERS else f"only backends may know {goal}"
    if _rank(goal) > _rank(layer):
        return f"{layer} may not know what is above it"
    return None


def _imports(tree: ast.Module, module: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of every import, those inside functions too. ``from a import b`` counts as a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            start = node.module or ""
            if node.level:
                folder = (PACKAGE, *module)[: -node.level]
                start = ".".join((*folder, start)).rstrip(".")
            for alias in node.names:
                yield node.lineno, f"{start}.{alias.name}"


def _header_floor(path: Path, header: str, csrc: Path) -> str | None:
    """The folder of csrc that a quoted include lands in: beside the file, under csrc, or under csrc/include."""
    for start in (path.parent, csrc, csrc / "include"):
        candidate = (start / header).resolve()
        if candidate.is_file() and candidate.is_relative_to(csrc.resolve()):
            return candidate.relative_to(csrc.resolve()).parts[0]
    return None


if __name__ == "__main__":
    sys.exit("\n".join(problems()) or None)
