"""No code of one instruction set can stand in for that of another: the objects share no weak symbol.

Where two objects define the same weak symbol (an inline function, a template of the standard library), the linker
keeps one copy for the whole program. Were that the copy of an AVX-512 unit, the program would die of an illegal
instruction on an older machine, in code that has nothing to do with AVX-512.

As a script: looks at the objects that `make build` has left, or builds the kernels as the package does, in a folder of
its own, where there are none or sources have changed since.
"""

import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from checks import ROOT

KEPT = ROOT / "build" / "objects"
"""Where `make build` leaves objects."""
OTHERS = ("cuda", "emulated")
"""How the names of folders begin whose objects belong to other modules."""

WEAK = frozenset("WVuC")  # weak, weak object, unique, common: nm(1)
# Parts of the program that run on every machine of the architecture; only among these may code be shared.
EVERYWHERE = frozenset({"driver", "bindings", "baseline", "neon"})


def problems(objects: Mapping[str, Iterable[Path]]) -> list[str]:
    """Weak symbols of an instruction set's objects that another part of the program defines too.

    ``objects`` maps a part of the program (an instruction set, "driver", "bindings") to its object files.
    """
    owners: dict[str, set[str]] = defaultdict(set)
    for part, paths in objects.items():
        for path in paths:
            for symbol in weak_symbols(path):
                owners[symbol].add(part)
    return [
        f"{symbol}: defined by {', '.join(sorted(parts))}; the linker would keep one for all of them"
        for symbol, parts in sorted(owners.items())
        if len(parts) > 1 and not parts <= EVERYWHERE
    ]


def weak_symbols(path: Path) -> set[str]:
    """The weak and common symbols that the object file at ``path`` defines, demangled."""
    listing = subprocess.run(
        ["nm", "--defined-only", "--demangle", str(path)], check=True, capture_output=True, text=True
    ).stdout
    found = set()
    for line in listing.splitlines():
        fields = line.split(maxsplit=2)  # address, type, name
        if len(fields) == 3 and fields[1] in WEAK:
            found.add(fields[2])
    return found


def build(folder: Path, root: Path = ROOT) -> dict[str, list[Path]]:
    """Compile the kernels with setup.py into ``folder``; the object files of each part of the program.

    Raises:
        RuntimeError: the build failed, or made no object.
    """
    result = subprocess.run(
        [
            sys.executable,
            "setup.py",
            "-q",
            "build_ext",
            "--build-temp",
            str(folder),
            "--build-lib",
            str(folder / "lib"),
        ],
        cwd=root,
        env={**os.environ, "FASTMERGE_CPU": "1", "FASTMERGE_CUDA": "0", "FASTMERGE_CUDA_EMULATED": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    parts = parts_in(folder)
    if result.returncode or not parts:
        raise RuntimeError(f"the kernels could not be built:\n{result.stdout}{result.stderr}")
    return parts


def parts_in(folder: Path) -> dict[str, list[Path]]:
    """The object files of each part of the program that lie in a folder."""
    parts: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(folder.rglob("*.o")):
        name = path.relative_to(folder).parts[0]
        if not name.startswith(OTHERS):
            parts[name].append(path)
    return dict(parts)


def kept(folder: Path = KEPT, root: Path = ROOT) -> dict[str, list[Path]]:
    """The objects that an earlier build left there, or none where a source is newer than any of them."""
    parts = parts_in(folder)
    sources = [root / "setup.py", *(path for path in (root / "csrc").rglob("*") if path.is_file())]
    newest = max(path.stat().st_mtime for path in sources)
    oldest = min((path.stat().st_mtime for paths in parts.values() for path in paths), default=0.0)
    return parts if newest < oldest else {}


def main() -> int:
    """Build, look, print."""
    with tempfile.TemporaryDirectory() as folder:
        objects = kept() or build(Path(folder))
        found = problems(objects)
    print("\n".join(found) or f"no shared weak symbol in the objects of {', '.join(objects)}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
