"""The triton backend: kernels that Triton compiles at their first use, for GPUs; nothing is compiled at install.

The functions are those of `fastmerge.backends.reference`, with the same bits, on CUDA (or ROCm) tensors. Nothing waits
for the GPU, and the current stream is the one that is used. FASTMERGE_TRITON_BLOCK sets the elements per tile (tests).
"""

from __future__ import annotations

import os

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
    if not os.environ.get("CC") and not any(_is_program(name) for name in ("gcc", "clang", "cc")):
        raise ImportError("no C compiler, with which Triton builds its launcher; install gcc, or set CC")


def _is_program(name: str) -> bool:
    return any(os.access(os.path.join(folder, name), os.X_OK) for folder in os.get_exec_path())


_check_usable()
