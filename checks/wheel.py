"""Wheels work where they land: built from the sources alone, installed elsewhere, run from an empty folder.

There are three. "cpu" has the kernels for CPUs, "cuda" those for NVIDIA GPUs, too, and "plain" has none: the import
must work all the same, and `fastmerge env` must say why they are missing. torch and the rest are borrowed from the
environment that runs the check. `--out DIR` keeps the wheels, all but the plain one.

    python -m checks.wheel                      # build and check all that can be built here
    python -m checks.wheel cpu --out dist       # one of them, to be given to others
"""

import argparse
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

VARIANTS = ("cpu", "cuda", "plain")
SWITCHES = {
    "cpu": {"FASTMERGE_CPU": "1", "FASTMERGE_CUDA": "0"},
    "cuda": {"FASTMERGE_CPU": "1", "FASTMERGE_CUDA": "1"},
    "plain": {"FASTMERGE_CPU": "0", "FASTMERGE_CUDA": "0"},
}

WITH_KERNELS = """
import fastmerge, torch
from fastmerge import ops
assert fastmerge.backends.available()["cpu"] is None, fastmerge.backends.available()["cpu"]
x = torch.tensor([3.0, -5.0, 1.0, 4.0])
assert float(ops.kth_magnitude([x], 2, backend="cpu")) == 4.0
print(fastmerge.__file__)
"""
WITH_CUDA = """
from fastmerge import _cuda, backends
reason = backends.available()["cuda"]
if not torch.cuda.is_available():
    assert reason and "no NVIDIA GPU" in reason, f"without a GPU the cuda backend says: {reason}"
assert _cuda.ARCHITECTURES, "nobody knows for which GPUs it was compiled"
"""
WITHOUT_KERNELS = """
import fastmerge, torch
from fastmerge import ops
assert fastmerge.backends.available()["cpu"], "the cpu backend claims to work, but its kernels were not built"
x = torch.tensor([3.0, -5.0, 1.0, 4.0])
assert float(ops.kth_magnitude([x], 2)) == 4.0
print(fastmerge.__file__)
"""


def problems(
    variant: str, *, root: Path = ROOT, out: Path | None = None, architectures: str = "", flags: str = ""
) -> list[str]:
    """Build a wheel, install it into an empty environment and use it there; what is wrong. out: where it is kept.

    architectures, flags: as in `build`.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel = build(folder, variant, root=root, architectures=architectures, flags=flags)
        python = environment(folder / "env", wheel)
        empty = folder / "empty"
        empty.mkdir()
        found = [*_use(python, empty, folder / "env", variant), *_ask(python, empty, variant)]
        if out is not None and not found:
            # Both variants have the same name, which says what they need, and neither needs CUDA to be imported.
            target = out / variant
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(wheel, target)
        return found


def build(folder: Path, variant: str, *, root: Path = ROOT, architectures: str = "", flags: str = "") -> Path:
    """The wheel of a copy of the sources: a build in the repository could pick up what an earlier one left.

    architectures: for which GPUs, as FASTMERGE_CUDA_ARCHITECTURES has it; by default all. flags: further ones for the
    C++ compiler, as FASTMERGE_CXXFLAGS has them.

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
    given = {"FASTMERGE_CUDA_ARCHITECTURES": architectures, "FASTMERGE_CXXFLAGS": flags}
    switches = SWITCHES[variant] | {name: value for name, value in given.items() if value}
    command = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, sources]
    _run([sys.executable, "-m", "pip", *command], cwd=folder, **switches)
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


def _use(python: Path, empty: Path, env: Path, variant: str) -> list[str]:
    code = WITHOUT_KERNELS if variant == "plain" else WITH_KERNELS
    if variant == "cuda":
        code += WITH_CUDA
    try:
        where = Path(_run([python, "-c", code], cwd=empty).strip())
    except RuntimeError as error:
        return [f"the wheel {variant!r} does not work: {error}"]
    if not where.is_relative_to(env):
        return [f"the check looked at {where}, which is not the installed wheel"]
    return []


def _ask(python: Path, empty: Path, variant: str) -> list[str]:
    kernels = variant != "plain"
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


def main(arguments: list[str] | None = None) -> int:
    """Build and check wheels; 1 if anything is wrong with one."""
    parser = argparse.ArgumentParser(prog="python -m checks.wheel", description=__doc__.splitlines()[0])
    parser.add_argument("variants", nargs="*", choices=[*VARIANTS, []], default=[], help="by default all")
    parser.add_argument("--out", type=Path, help="keep the wheels here")
    parser.add_argument("--architectures", default="", help="GPUs to compile for, as in 80,90a")
    chosen = parser.parse_args(arguments)
    failed = 0
    for variant in chosen.variants or VARIANTS:
        try:
            kept = None if variant == "plain" else chosen.out
            found = problems(variant, out=kept, architectures=chosen.architectures)
        except RuntimeError as error:
            found = [f"the wheel {variant!r} cannot be built here: {error}"]
        failed |= bool(found)
        print("\n".join(found) or f"{variant}: works from an empty folder")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
