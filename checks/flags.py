"""No compiler flag that changes the bits, or that ties a binary to the machine it was built on, is named anywhere.

The kernels promise the same bits on every machine: fast-math and its parts reorder sums and fuse, and code for the
build machine's own processor dies on an older one.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from checks import ROOT

# Written so that this file does not name them itself.
FORBIDDEN = (
    r"-m(arch|tune|cpu)=" + "native",
    r"-Ofa" + "st",
    r"-ffa" + "st-math",
    r"-f(un)safe-math" + r"-optimizations",
    r"-fassociative" + "-math",
    r"-freciprocal" + "-math",
    r"-ffinite" + "-math-only",
    r"-ffp-contract=" + "(fast|on)",
    r"use_fa" + "st_math",
    r"fmad=" + "true",
    r"allow_fp_fusion\s*=\s*" + "True",
)
PATTERN = re.compile("|".join(FORBIDDEN))
COMMENTS = {
    **dict.fromkeys((".py", ".toml", ".cfg", ".cmake", ".sh", ".yml", ".yaml"), "#"),
    **dict.fromkeys((".c", ".cc", ".cpp", ".h", ".hpp", ".cu", ".cuh"), "//"),
    **dict.fromkeys(("CMakeLists.txt", "Makefile", "run"), "#"),
}
SKIPPED = frozenset({".git", ".venv", "build", "dist", "models", "merged"})


def problems(root: Path = ROOT) -> list[str]:
    """Every line of a source or build file that names a forbidden flag outside a comment."""
    found = []
    for path, comment in _files(root):
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            match = PATTERN.search(line.split(comment)[0])
            if match:
                found.append(f"{path.relative_to(root)}:{number}: {match.group()} changes results between machines")
    return found


def _files(root: Path) -> Iterator[tuple[Path, str]]:
    """The source and build files, each with what starts a comment in it."""
    for path in sorted(root.rglob("*")):
        comment = COMMENTS.get(path.name, COMMENTS.get(path.suffix))
        if comment and path.is_file() and not SKIPPED.intersection(path.relative_to(root).parts):
            yield path, comment


if __name__ == "__main__":
    sys.exit("\n".join(problems()) or None)
