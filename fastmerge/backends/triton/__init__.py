"""The triton backend: kernels that Triton compiles at their first use, for GPUs; nothing is compiled at install.

The functions are those of `fastmerge.backends.reference`, with the same bits, on CUDA (or ROCm) tensors. Nothing waits
for the GPU, and the current stream is the one that is used. FASTMERGE_TRITON_BLOCK sets the elements per tile (tests).
"""

from __future__ import annotations

import os

import torch
import triton

from ...reference.expert import expert_extract
from ..gpu import fused_sum
from .consensus import consensus_apply, consensus_apply_many
from .evolve import trials
from .expert import expert_apply_, expert_revert_
from .geometry import gram
from .highpass import highpass
from .importance import (
    divergences,
    energy_sums,
    importance,
    model_variance,
    nearswap,
    ram_apply,
    ram_counts,
)
from .launch import INTERPRETED
from .pcb import (
    pcb_apply,
    pcb_extremes,
    pcb_histogram,
    pcb_score_bounds,
    pcb_scores,
    pcb_sums,
    pcb_window_,
    score_keys,
)
from .select import (
    abs_histogram,
    hashed_mask,
    key_histogram,
    key_window_,
    kth_magnitude,
    magnitude_bounds,
    magnitude_bounds_many,
    tie_counts,
    topk_mask,
)
from .sparsify import count_nonfinite, kept_masks, l1_sums, zero_nonfinite_

__all__ = [
    "DEVICES",
    "check_usable",
    "abs_histogram",
    "consensus_apply",
    "consensus_apply_many",
    "count_nonfinite",
    "divergences",
    "energy_sums",
    "expert_apply_",
    "expert_extract",
    "expert_revert_",
    "fused_sum",
    "gram",
    "hashed_mask",
    "highpass",
    "importance",
    "kept_masks",
    "key_histogram",
    "key_window_",
    "kth_magnitude",
    "l1_sums",
    "magnitude_bounds",
    "magnitude_bounds_many",
    "model_variance",
    "nearswap",
    "pcb_apply",
    "pcb_extremes",
    "pcb_histogram",
    "pcb_score_bounds",
    "pcb_scores",
    "pcb_sums",
    "pcb_window_",
    "ram_apply",
    "ram_counts",
    "score_keys",
    "tie_counts",
    "topk_mask",
    "trials",
    "zero_nonfinite_",
]

DEVICES = ("cuda", "cpu") if INTERPRETED else ("cuda",)
"""Where tensors may be: the interpreter takes those on the CPU, too."""

OLDEST = (3, 4)
"""The first Triton whose histograms can leave elements out."""


def check_usable() -> None:
    """ImportError with the reason where kernels could not run: asked before the backend is taken."""
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST:
        raise ImportError(
            f"Triton {triton.__version__} is too old for these kernels; install {OLDEST[0]}.{OLDEST[1]} or newer"
        )
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
