"""Builds the CUDA kernels for the emulator, quickly: only what changed since any build before, into the tree's package.

setup.py builds the same for whole environments; this is for mutations, each of which changes one file.
"""

from __future__ import annotations

import hashlib
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from checks import ROOT

CACHE = ROOT / "build" / "emulated"
FLAGS = [
    *("-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno"),
    *("-fvisibility=hidden", "-DFASTMERGE_CUDA_MODULE=_cuda_emulated"),
]


def build(root: Path, cache: Path = CACHE) -> Path:
    """The module `fastmerge._cuda_emulated` of the sources in `root`, beside the package there.

    Raises:
        RuntimeError: a source does not compile.
    """
    import pybind11

    csrc = root / "csrc"
    headers = sorted(path for path in csrc.rglob("*.h"))
    common = hashlib.sha256(b"".join(path.read_bytes() for path in headers) + " ".join(FLAGS).encode())
    include = [
        f"-I{csrc}",
        f"-I{csrc / 'include'}",
        f"-I{pybind11.get_include()}",
        f"-I{sysconfig.get_path('include')}",
    ]
    sources = [*csrc.glob("cuda/*.cu"), csrc / "cuda" / "emulated.cpp"]
    sources += [csrc / "bindings" / "cuda.cpp", *csrc.glob("bindings/cuda/*.cpp")]
    cache.mkdir(parents=True, exist_ok=True)

    def compiled(source: Path) -> Path:
        key = common.copy()
        key.update(str(source.relative_to(csrc)).encode() + source.read_bytes())
        target = cache / f"{key.hexdigest()[:32]}.o"
        if not target.exists():
            made = target.with_suffix(f".{hash(root) & 0xFFFFFF:x}")
            _run(["g++", *FLAGS, *include, "-c", "-x", "c++", str(source), "-o", str(made)])
            made.rename(target)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sorted(sources)))
    module = root / "fastmerge" / f"_cuda_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    module.unlink(missing_ok=True)
    _run(["g++", "-shared", *map(str, objects), "-o", str(module), "-pthread"])
    return module


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
