"""The kernel families as torch ops with checked Python wrappers: what everything above the backends calls."""

from __future__ import annotations

from ..backends.filters import HighpassPlan
from ..backends.rule import GRAM_BLOCK, L1_LIMBS, TIE_BLOCK, ExpertPart, PcbRule, SparsifyRule
from ._exact import l1_mass, l1_scale, tensor_id
from ._score_keys import (
    choose_window,
    highest_bin,
    pcb_means,
    pcb_ranks,
    pcb_thresholds,
    score_bound,
    score_bound_in_window,
    score_keys,
    score_of_key,
    score_prefix,
)
from .consensus import consensus_apply, consensus_merge, total_divisor, weight_sum
from .expert import Expert, expert_apply_, expert_k, expert_rescale, expert_revert_, extract_expert
from .geometry import gram
from .highpass import highpass, highpass_plan
from .many import PreparedMerge, consensus_merge_many, prepare_merge_many
from .pcb import pcb_apply, pcb_extremes, pcb_histogram, pcb_scores, pcb_sums, pcb_window_
from .pcb_rows import pcb_bounds, pcb_merge, pcb_rule
from .select import (
    abs_histogram,
    bound,
    bound_in_window,
    bound_prefix,
    bounds_from_histograms,
    hashed_mask,
    keep_ties,
    key_histogram,
    key_window_,
    kth_magnitude,
    magnitude_bounds,
    prefixes,
    rank_range,
    tie_counts,
    ties_before,
    topk_mask,
)
from .sparsify import count_nonfinite, kept_masks, l1_sums, sparsify, zero_nonfinite_

__all__ = [
    "GRAM_BLOCK",
    "L1_LIMBS",
    "TIE_BLOCK",
    "Expert",
    "ExpertPart",
    "HighpassPlan",
    "PcbRule",
    "PreparedMerge",
    "SparsifyRule",
    "abs_histogram",
    "bound",
    "bound_in_window",
    "bound_prefix",
    "bounds_from_histograms",
    "choose_window",
    "consensus_apply",
    "consensus_merge",
    "consensus_merge_many",
    "count_nonfinite",
    "expert_apply_",
    "expert_k",
    "expert_rescale",
    "expert_revert_",
    "extract_expert",
    "gram",
    "hashed_mask",
    "highest_bin",
    "highpass",
    "highpass_plan",
    "keep_ties",
    "key_histogram",
    "key_window_",
    "kth_magnitude",
    "l1_mass",
    "l1_scale",
    "kept_masks",
    "l1_sums",
    "magnitude_bounds",
    "pcb_apply",
    "pcb_bounds",
    "pcb_extremes",
    "pcb_histogram",
    "pcb_means",
    "pcb_merge",
    "pcb_ranks",
    "pcb_rule",
    "pcb_scores",
    "pcb_sums",
    "pcb_thresholds",
    "pcb_window_",
    "prefixes",
    "prepare_merge_many",
    "rank_range",
    "score_bound",
    "score_bound_in_window",
    "score_keys",
    "score_of_key",
    "score_prefix",
    "sparsify",
    "tensor_id",
    "tie_counts",
    "ties_before",
    "topk_mask",
    "total_divisor",
    "weight_sum",
    "zero_nonfinite_",
]
