"""The cuda backend: kernels in CUDA C++, compiled when the package was built, for NVIDIA GPUs.

The functions are those of `fastmerge.backends.reference`, with the same bits, on CUDA tensors. Nothing waits for the
GPU, and the current stream is the one that is used. FASTMERGE_CUDA_EMULATED=1 runs the same kernels in an emulator, on
tensors of the CPU (tests).
"""

from __future__ import annotations

import torch

from ..gpu import fused_sum
from ..rule import TIE_BLOCK
from .consensus import consensus_apply, consensus_apply_many
from .evolve import trials
from .expert import expert_apply_, expert_extract, expert_revert_
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
from .launch import EMULATED, compiled
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

DEVICES = ("cuda", "cpu") if EMULATED else ("cuda",)
"""Where tensors may be: the emulator takes those on the CPU, too."""


def check_usable() -> None:
    """ImportError with the reason where kernels could not run: asked before the backend is taken."""
    if compiled.TIE_BLOCK != TIE_BLOCK:
        raise ImportError(f"{compiled.__name__} was built from other sources than this package; build it again")
    if EMULATED:
        return
    if torch.version.hip or not torch.cuda.is_available():
        raise ImportError("no NVIDIA GPU that this torch can use")
    if reason := compiled.check_usable():
        raise ImportError(f"{reason}; this build has code for {compiled.ARCHITECTURES or 'none'}")
