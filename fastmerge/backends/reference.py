"""The reference backend: plain PyTorch, works everywhere, is what the others are compared with."""

from __future__ import annotations

from ..reference.consensus import consensus_apply, fused_sum
from ..reference.evolve import trials
from ..reference.expert import expert_apply_, expert_extract, expert_revert_
from ..reference.geometry import gram
from ..reference.highpass import highpass
from ..reference.importance import (
    divergences,
    energy_sums,
    importance,
    model_variance,
    nearswap,
    ram_apply,
    ram_counts,
)
from ..reference.pcb import (
    pcb_apply,
    pcb_extremes,
    pcb_histogram,
    pcb_scores,
    pcb_sums,
    pcb_window_,
    score_keys,
)
from ..reference.select import (
    abs_histogram,
    hashed_mask,
    key_histogram,
    key_window_,
    kth_magnitude,
    magnitude_bounds,
    tie_counts,
    topk_mask,
)
from ..reference.sparsify import count_nonfinite, kept_masks, l1_sums, zero_nonfinite_

__all__ = [
    "abs_histogram",
    "consensus_apply",
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
    "model_variance",
    "nearswap",
    "pcb_apply",
    "pcb_extremes",
    "pcb_histogram",
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
