"""The triton backend: kernels that Triton compiles at their first use, for GPUs; nothing is compiled at install.

The functions are those of `fastmerge.backends.reference`, with the same bits, on CUDA (or ROCm) tensors. Nothing waits
for the GPU, and the current stream is the one that is used. FASTMERGE_TRITON_BLOCK sets the elements per tile (tests).
"""

from __future__ import annotations

import os
import shutil

import torch

from .launch import INTERPRETED

DEVICES = ("cuda", "cpu") if INTERPRETED else ("cuda",)
"""Where tensors may be: the interpreter takes those on the CPU, too."""


def _check_usable() -> None:
    """ImportError with the reason where kernels could not run."""
    if INTERPRETED:
        return
    if not torch.cuda.is_available():
        raise ImportError(
            "no GPU that this torch can use; TRITON_INTERPRET=1 runs the kernels in Triton's interpreter, slowly"
        )
    compilers = [os.environ.get("CC"), "gcc", "clang", "cc"]
    if not any(name and shutil.which(name) for name in compilers):
        raise ImportError("no C compiler, with which Triton builds its launcher; install gcc, or set CC")


_check_usable()
