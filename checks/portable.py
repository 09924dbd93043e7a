"""The kernels run on machines other than this one: an x86-64 processor of 2008, and arm64.

Builds the kernels' self-check, a program without Python or Torch, and runs it here and under the emulators. The
self-check computes with every instruction set that the (emulated) processor has and fails when results differ.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from checks import ROOT

TARGET = "fastmerge_selfcheck"
OPTIONS = ("-DFASTMERGE_CUDA=OFF", "-DFASTMERGE_WARNINGS_ARE_ERRORS=ON")
# With SSE4.2 and nothing newer: an AVX instruction that escaped into the common code ends the program.
OLD_X86 = ("qemu-x86_64", "-cpu", "Nehalem")
ARM64 = ("qemu-aarch64",)
ARM64_COMPILER = "aarch64-linux-gnu-g++"


class MissingToolError(Exception):
    """A tool that this check needs is not installed; the message names it."""


def tool(name: str) -> str:
    """The path of a program, looked for beside this Python first (cmake and ninja come as Python packages).

    Raises:
        MissingToolError: it is not installed.
    """
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if found is None:
        raise MissingToolError(f"{name} is not installed")
    return found


def build(folder: Path, *, arm64: bool = False, root: Path = ROOT) -> Path:
    """The self-check, linked statically so that an emulator needs no library of the other machine.

    Raises:
        MissingToolError: cmake, ninja or the cross compiler is not installed.
        RuntimeError: it does not compile.
    """
    options = [
        "-DCMAKE_BUILD_TYPE=Release",
        "-DCMAKE_EXE_LINKER_FLAGS=-static",
        f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
    ]
    if arm64:
        options += [
            "-DCMAKE_SYSTEM_NAME=Linux",
            "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
            f"-DCMAKE_CXX_COMPILER={tool(ARM64_COMPILER)}",
        ]
    cmake = tool("cmake")
    for command in (
        [cmake, "-S", str(root), "-B", str(folder), "-G", "Ninja", *OPTIONS, *options],
        [cmake, "--build", str(folder), "--target", TARGET],
    ):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    return next(path for path in folder.rglob(TARGET) if path.is_file())


def run(binary: Path, *emulator: str) -> str:
    """What the self-check prints, under an emulator if one is named.

    Raises:
        MissingToolError: the emulator is not installed.
        RuntimeError: the self-check failed, or died of a signal.
    """
    command = [tool(emulator[0]), *emulator[1:], str(binary)] if emulator else [str(binary)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {result.returncode}\n{result.stdout}{result.stderr}")
    return result.stdout


def main() -> int:
    """Run all that the installed tools allow; what could not be run is told, and is no failure."""
    failed = False
    for title, arm64, emulator in (
        ("this machine", False, ()),
        ("x86-64 of 2008", False, OLD_X86),
        ("arm64", True, ARM64),
    ):
        with tempfile.TemporaryDirectory() as folder:
            try:
                print(f"{title}: {run(build(Path(folder), arm64=arm64), *emulator).strip()}")
            except MissingToolError as reason:
                print(f"{title}: not checked: {reason}")
            except RuntimeError as error:
                print(f"{title}: FAILED: {error}")
                failed = True
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
