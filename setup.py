"""Builds fastmerge and its compiled CPU kernels.

The kernels are optional: without a C++ compiler, or with FASTMERGE_CPU=0, the package installs without them and runs on
the reference backend. FASTMERGE_CPU=1 makes a failing build an error. Each family of kernels is compiled once per
instruction set and the fastest one is chosen at run time, so a wheel runs on any machine of its architecture.
"""

import os
import platform
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
FAMILIES = ("select", "sparsify", "pcb", "consensus")
DRIVERS = ("dispatch", "pool", "select", "sparsify", "pcb", "consensus")

# Value-preserving optimisation only: no contraction into fused multiply-adds, no fast-math.
COMMON_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-ffp-contract=off",
    "-fno-trapping-math",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
]
AVX2_FLAGS = ["-mavx2", "-mbmi", "-mbmi2", "-mpopcnt", "-mlzcnt"]
AVX512_FLAGS = [
    *AVX2_FLAGS,
    "-mavx512f",
    "-mavx512bw",
    "-mavx512dq",
    "-mavx512vl",
    "-mprefer-vector-width=512",
    "-Wno-maybe-uninitialized",  # GCC 12 warns about its own headers for AVX-512
    "-Wno-uninitialized",
]


def isa_flags(machine: str) -> dict[str, list[str]]:
    """Instruction set -> compiler flags, for one architecture."""
    if machine in ("x86_64", "AMD64"):
        return {"baseline": [], "avx2": AVX2_FLAGS, "avx512": AVX512_FLAGS}
    if machine in ("aarch64", "arm64"):
        return {"neon": []}
    return {"baseline": []}


def isa_defines(isa: str) -> list[tuple[str, str]]:
    """What makes a unit's namespace, entry point and name those of its instruction set."""
    return [
        ("FASTMERGE_TARGET", isa),
        ("FASTMERGE_TABLE", f"fastmerge_kernels_{isa}"),
        ("FASTMERGE_TARGET_NAME", f'"{isa}"'),
    ]


class BuildKernels(build_ext):
    """Compiles the drivers once and the kernels once per instruction set, and links them together."""

    def build_extension(self, ext: Extension) -> None:
        wanted = os.environ.get("FASTMERGE_CPU", "")
        if wanted == "0":
            print("fastmerge: FASTMERGE_CPU=0, building without compiled CPU kernels", file=sys.stderr)
            return
        try:
            self._build_kernels(ext)
        except Exception as error:
            if wanted == "1":
                raise
            print(
                f"fastmerge: the CPU kernels could not be built ({error}); installing without them. "
                "A C++17 compiler is needed (for example: apt-get install g++).",
                file=sys.stderr,
            )

    def _build_kernels(self, ext: Extension) -> None:
        import pybind11

        include = [str(ROOT / "csrc" / "include"), str(ROOT / "csrc"), pybind11.get_include()]
        python_include = self.compiler.include_dirs
        objects: list[str] = []
        folder = Path(self.build_temp)

        def compile_into(name: str, sources: list[str], defines: list[tuple[str, str]], flags: list[str]) -> None:
            made = self.compiler.compile(
                sources,
                output_dir=str(folder / name),
                macros=defines,
                include_dirs=[*include, *python_include],
                extra_postargs=[*COMMON_FLAGS, *flags],
                depends=ext.depends,
            )
            objects.extend(made)

        compile_into("driver", [f"csrc/cpu/{name}.cpp" for name in DRIVERS], [], [])
        for isa, flags in isa_flags(platform.machine()).items():
            compile_into(isa, [f"csrc/cpu/kernels/{name}.cpp" for name in FAMILIES], isa_defines(isa), flags)
        compile_into("bindings", ["csrc/bindings/cpu.cpp"], [], [])
        target = self.get_ext_fullpath(ext.name)
        self.compiler.link_shared_object(
            objects,
            target,
            target_lang="c++",
            extra_postargs=["-lstdc++", "-pthread"] if sys.platform == "linux" else ["-lc++"],
        )


headers = [str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h")]
kernels = Extension("fastmerge._cpu", sources=["csrc/bindings/cpu.cpp"], depends=headers, optional=False)

setup(
    packages=find_packages(include=["fastmerge", "fastmerge.*"]),
    ext_modules=[kernels],
    cmdclass={"build_ext": BuildKernels},
)
