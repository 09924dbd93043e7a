"""Builds fastmerge and its compiled kernels, for CPUs and for NVIDIA GPUs.

All of them are optional. Without a C++ compiler, or with FASTMERGE_CPU=0, the package installs without those for CPUs;
without nvcc, or with FASTMERGE_CUDA=0, without those for GPUs. FASTMERGE_CPU=1 and FASTMERGE_CUDA=1 make it an error if
they cannot be built. Whether a GPU is there does not matter: nvcc is enough.

Each family of kernels for CPUs is compiled once per instruction set and the fastest one is chosen at run time, so a
wheel runs on any machine of its architecture. Those for GPUs are compiled for the architectures in ARCHITECTURES, or in
FASTMERGE_CUDA_ARCHITECTURES ("90a", "80,90a"). FASTMERGE_CXXFLAGS has the last word to the C++ compiler ("-O0 -g").
FASTMERGE_CUDA_EMULATED=1 also builds them for an emulator on the CPU,
which the tests use.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
FAMILIES = ("select", "sparsify", "pcb", "consensus", "expert", "geometry", "importance", "evolve")
CUDA_FAMILIES = (*FAMILIES, "highpass")
DRIVERS = ("dispatch", "pool", *FAMILIES)

CUDA_SOURCES = ("driver", *CUDA_FAMILIES)
CUDA_BINDINGS = ["csrc/bindings/cuda.cpp", *(f"csrc/bindings/cuda/{name}.cpp" for name in CUDA_FAMILIES)]
# Of them those that nvcc knows: 100 and 120 from 12.8 on. The last one as PTX, too, which newer GPUs compile for
# themselves.
ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")
USUAL_NVCC = "/usr/local/cuda/bin/nvcc"
# Warnings are errors for checks/cuda.py alone: another compiler may warn of more.
NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "--fmad=false",
    "--prec-div=true",
    "--prec-sqrt=true",
    "--ftz=false",
    "-Xptxas=-v,-warn-spills,-warn-lmem-usage",
    # The host's compiler sees the kernels' parts, too, and does not know that loops can be unrolled.
    "-Xcompiler=-fPIC,-ffp-contract=off,-fvisibility=hidden,-Wall,-Wextra,-Wno-unknown-pragmas",
]

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


def nvcc() -> str | None:
    """CUDA's compiler: NVCC, that of CUDA_HOME, the one on the path, or where it is mostly; None: there is none."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [os.environ.get("NVCC"), *(os.path.join(home, "bin", "nvcc") for home in homes), "nvcc", USUAL_NVCC]
    return next((found for each in candidates if each and (found := shutil.which(each))), None)


def architectures(compiler: str) -> list[str]:
    """For which GPUs CUDA code is compiled: those that are asked for, or all of ours that the compiler knows."""
    forced = os.environ.get("FASTMERGE_CUDA_ARCHITECTURES")
    if forced:
        return [each.strip() for each in forced.split(",")]
    shown = subprocess.run([compiler, "--list-gpu-arch"], capture_output=True, text=True)
    known = re.findall(r"compute_(\d+)", shown.stdout)
    wanted = [each for each in ARCHITECTURES if each.rstrip("a") in known]
    if not wanted:
        raise RuntimeError(f"{compiler} --list-gpu-arch names none of {', '.join(ARCHITECTURES)}")
    if missing := [each for each in ARCHITECTURES if each not in wanted]:
        print(f"fastmerge: {compiler} does not know {', '.join(missing)}: no code for these GPUs", file=sys.stderr)
    return wanted


def code_flags(wanted: list[str]) -> list[str]:
    """Flags for these architectures, and for newer ones than the last that has PTX for all."""
    flags = [f"-gencode=arch=compute_{each},code=sm_{each}" for each in wanted]
    portable = [each for each in wanted if each.isdigit()]
    return [*flags, *(f"-gencode=arch=compute_{each},code=compute_{each}" for each in portable[-1:])]


def cuda_runtime(compiler: str) -> str:
    """CUDA's runtime, to be linked into the module, which then needs nothing but the driver."""
    # nvcc may be a script somewhere else than the toolkit; it knows where it links from.
    shown = subprocess.run([compiler, "--dryrun", "none.cu"], capture_output=True, text=True)
    for folder in re.findall(r'"-L([^"]+)"', shown.stdout + shown.stderr):
        library = Path(folder) / "libcudart_static.a"
        if library.exists():
            return str(library)
    raise RuntimeError(f"{compiler} has no libcudart_static.a")


class BuildKernels(build_ext):
    """Compiles and links each module of kernels, in its own way; a module that is optional may fail."""

    def run(self) -> None:
        from pybind11.setup_helpers import ParallelCompile

        # Where objects are left, for checks of them; pip builds in a folder that goes away.
        self.build_temp = os.environ.get("FASTMERGE_OBJECTS") or self.build_temp
        # Several sources at a time, by as many compilers as there are processors.
        with ParallelCompile(default=0):
            super().run()

    def build_extension(self, ext: Extension) -> None:
        build, variable, needed = {
            "fastmerge._cpu": (
                self._build_cpu,
                "FASTMERGE_CPU",
                "A C++17 compiler is needed (for example: apt-get install g++).",
            ),
            "fastmerge._cuda": (
                self._build_cuda,
                "FASTMERGE_CUDA",
                "nvcc 12.1 or newer and a C++17 compiler are needed.",
            ),
            "fastmerge._cuda_emulated": (self._build_emulated, "FASTMERGE_CUDA_EMULATED", "It is for the tests."),
        }[ext.name]
        wanted = os.environ.get(variable, "")
        if wanted == "0":
            print(f"fastmerge: {variable}=0, building without {ext.name}", file=sys.stderr)
            return
        try:
            build(ext)
        except Exception as error:
            if wanted == "1":
                # Another kind of error than those that setuptools forgives.
                raise RuntimeError(f"{variable}=1, and {ext.name} could not be built") from error
            print(
                f"fastmerge: {ext.name} could not be built ({error}); installing without it. {needed}",
                file=sys.stderr,
            )

    def _compile(
        self, ext: Extension, folder: str, sources: list[str], defines: list[tuple[str, str]], flags: list[str]
    ) -> list[str]:
        """Objects of C++ sources, in a folder of their own."""
        import pybind11

        include = [str(ROOT / "csrc" / "include"), str(ROOT / "csrc"), pybind11.get_include()]
        made: list[str] = self.compiler.compile(
            sources,
            output_dir=str(Path(self.build_temp) / folder),
            macros=defines,
            include_dirs=[*include, *self.compiler.include_dirs],
            extra_postargs=[*COMMON_FLAGS, *flags, *shlex.split(os.environ.get("FASTMERGE_CXXFLAGS", ""))],
            depends=ext.depends,
        )
        return made

    def _link(self, ext: Extension, objects: list[str], libraries: list[str]) -> None:
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            target_lang="c++",
            extra_postargs=["-lstdc++", "-pthread", *libraries] if sys.platform == "linux" else ["-lc++", *libraries],
        )

    def _build_cpu(self, ext: Extension) -> None:
        """The drivers once and the kernels once per instruction set."""
        objects = self._compile(ext, "driver", [f"csrc/cpu/{name}.cpp" for name in DRIVERS], [], [])
        for isa, flags in isa_flags(platform.machine()).items():
            sources = [f"csrc/cpu/kernels/{name}.cpp" for name in FAMILIES]
            objects += self._compile(ext, isa, sources, isa_defines(isa), flags)
        objects += self._compile(ext, "bindings", ["csrc/bindings/cpu.cpp"], [], [])
        self._link(ext, objects, [])

    def _build_cuda(self, ext: Extension) -> None:
        """The kernels by nvcc, for all architectures at once, where they have changed since the last time.

        What ptxas says of them is kept beside the objects: in the sources' own folder, for pip builds in another.
        """
        compiler = nvcc()
        if compiler is None:
            raise RuntimeError("there is no nvcc")
        wanted = architectures(compiler)
        folder = ROOT / "build" / "cuda"
        folder.mkdir(parents=True, exist_ok=True)
        include = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}"]
        flags = [*NVCC_FLAGS, *code_flags(wanted), *include]

        def compiled(name: str) -> str:
            source, target, log = ROOT / "csrc" / "cuda" / f"{name}.cu", folder / f"{name}.o", folder / f"{name}.log"
            newest = max(os.path.getmtime(path) for path in (source, __file__, *ext.depends))
            if not (target.exists() and log.exists() and log.read_text().startswith(f"{wanted}\n")):
                newest = float("inf")
            if newest > (os.path.getmtime(target) if target.exists() else 0):
                command = [compiler, *flags, "-c", str(source), "-o", str(target)]
                result = subprocess.run(command, capture_output=True, text=True)
                if result.returncode:
                    target.unlink(missing_ok=True)
                    raise RuntimeError(f"nvcc refused {source.name}:\n{result.stdout}{result.stderr}")
                log.write_text(f"{wanted}\n{result.stdout}{result.stderr}")
            return str(target)

        with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1) as pool:
            objects = list(pool.map(compiled, CUDA_SOURCES))
        named = [("FASTMERGE_CUDA_ARCHITECTURES", f'"{",".join(wanted)}"')]
        objects += self._compile(ext, "cuda-bindings", CUDA_BINDINGS, named, ["-O1"])
        self._link(ext, objects, [cuda_runtime(compiler), "-ldl", "-lrt"])

    def _build_emulated(self, ext: Extension) -> None:
        """The CUDA kernels as C++, with the emulator in the place of CUDA."""
        folder = Path(self.build_temp) / "emulated-sources"
        folder.mkdir(parents=True, exist_ok=True)
        sources = ["csrc/cuda/emulated.cpp"]
        for name in CUDA_SOURCES:
            # setuptools knows no .cu: a file of another name includes it.
            path = folder / f"{name}.cpp"
            text = f'#include "cuda/{name}.cu"\n'
            if not path.exists() or path.read_text() != text:
                path.write_text(text)
            sources.append(str(path))
        named = [("FASTMERGE_CUDA_MODULE", "_cuda_emulated")]
        # -O2 warns of less that is not there.
        objects = self._compile(ext, "emulated", sources, named, ["-O2"])
        self._link(ext, [*objects, *self._compile(ext, "emulated-bindings", CUDA_BINDINGS, named, ["-O1"])], [])


def modules() -> list[Extension]:
    """What is built here: for GPUs where there is nvcc, or if they are asked for; the emulator if it is."""
    depends = [str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cu")]
    sources = {"fastmerge._cpu": ["csrc/bindings/cpu.cpp"]}
    if nvcc() is not None or os.environ.get("FASTMERGE_CUDA") == "1":
        sources["fastmerge._cuda"] = CUDA_BINDINGS
    if os.environ.get("FASTMERGE_CUDA_EMULATED") == "1":
        sources["fastmerge._cuda_emulated"] = CUDA_BINDINGS
    return [Extension(name, sources=files, depends=depends, optional=True) for name, files in sources.items()]


if __name__ == "__main__":
    setup(
        packages=find_packages(include=["fastmerge", "fastmerge.*"]),
        ext_modules=modules(),
        cmdclass={"build_ext": BuildKernels},
    )
