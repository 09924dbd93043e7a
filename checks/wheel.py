"""The wheel works where it lands: built from the sources alone, installed elsewhere, run from an empty folder.

Twice: with the compiled kernels, and built without them (FASTMERGE_CPU=0), where the import must work all the same and
`fastmerge env` must say why they are missing. torch and the rest are borrowed from the environment that runs the check.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

from checks import ROOT

SOURCES = ("setup.py", "pyproject.toml", "LICENSE", "README.md", "csrc", "fastmerge")

WITH_KERNELS = """
import fastmerge, torch
from fastmerge import ops
assert fastmerge.backends.available()["cpu"] is None, fastmerge.backends.available()["cpu"]
x = torch.tensor([3.0, -5.0, 1.0, 4.0])
assert float(ops.kth_magnitude([x], 2, backend="cpu")) == 4.0
print(fastmerge.__file__)
"""
WITHOUT_KERNELS = """
import fastmerge, torch
from fastmerge import ops
assert fastmerge.backends.available()["cpu"], "the cpu backend claims to work, but its kernels were not built"
x = torch.tensor([3.0, -5.0, 1.0, 4.0])
assert float(ops.kth_magnitude([x], 2)) == 4.0
print(fastmerge.__file__)
"""


def problems(*, kernels: bool, root: Path = ROOT) -> list[str]:
    """Build a wheel with or without kernels, install it into an empty environment and use it there."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel = build(folder, kernels=kernels, root=root)
        python = environment(folder / "env", wheel)
        empty = folder / "empty"
        empty.mkdir()
        return [*_use(python, empty, folder / "env", kernels), *_ask(python, empty, kernels)]


def build(folder: Path, *, kernels: bool, root: Path = ROOT) -> Path:
    """The wheel of a copy of the sources: a build in the repository could pick up what an earlier one left.

    Raises:
        RuntimeError: the build failed.
    """
    sources = folder / "sources"
    sources.mkdir()
    for name in SOURCES:
        path = root / name
        if path.is_dir():
            shutil.copytree(path, sources / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        elif path.exists():
            shutil.copy(path, sources)
    _run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, sources],
        cwd=folder,
        FASTMERGE_CPU="1" if kernels else "0",
        FASTMERGE_CUDA="0",
    )
    (wheel,) = folder.glob("fastmerge-*.whl")
    return wheel


def environment(folder: Path, wheel: Path) -> Path:
    """An environment that holds the wheel, and sees the packages (not the editable installs) of this one; its Python.

    Raises:
        RuntimeError: the wheel could not be installed.
    """
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = Path(_run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], cwd=folder).strip())
    # A path file adds a folder without reading the path files in it, so an editable fastmerge there stays out of sight.
    (site / "borrowed.pth").write_text("".join(f"{sysconfig.get_path(name)}\n" for name in ("purelib", "platlib")))
    _run(
        [
            sys.executable,
            "-m",
            "pip",
            "--python",
            python,
            "install",
            "--no-deps",
            "--no-index",
            "--ignore-installed",
            wheel,
        ],
        cwd=folder,
    )
    return python


def _use(python: Path, empty: Path, env: Path, kernels: bool) -> list[str]:
    code = WITH_KERNELS if kernels else WITHOUT_KERNELS
    try:
        where = Path(_run([python, "-c", code], cwd=empty).strip())
    except RuntimeError as error:
        return [f"the wheel {'with' if kernels else 'without'} kernels does not work: {error}"]
    if not where.is_relative_to(env):
        return [f"the check looked at {where}, which is not the installed wheel"]
    return []


def _ask(python: Path, empty: Path, kernels: bool) -> list[str]:
    try:
        lines = _run([python.with_name("fastmerge"), "env"], cwd=empty).splitlines()
    except RuntimeError as error:
        return [f"`fastmerge env` failed: {error}"]
    line = next((line for line in lines if "cpu" in line and ("works" in line or "missing" in line)), "")
    if kernels and "works" not in line:
        return [f"`fastmerge env` does not say that the cpu backend works, but: {line!r}"]
    if not kernels and len(line.partition("missing:")[2].split()) < 3:
        return [f"`fastmerge env` gives no reason for the missing cpu backend, but: {line!r}"]
    return []


def _run(command: list[str | Path], *, cwd: Path, **variables: str) -> str:
    """Standard output of a command that starts from a clean slate: no FASTMERGE_ variable, no PYTHONPATH."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("FASTMERGE_", "PYTHON"))}
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**clean, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{result.stdout}{result.stderr}")
    return result.stdout


def main() -> int:
    """Check both kinds of wheel."""
    found = [*problems(kernels=True), *problems(kernels=False)]
    print("\n".join(found) or "the wheel works from an empty folder, with and without its kernels")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
