"""The kernel families as torch ops with checked Python wrappers: what everything above the backends calls."""

from __future__ import annotations

from ..backends.rule import L1_LIMBS, TIE_BLOCK, SparsifyRule
from ._exact import l1_mass, l1_scale, tensor_id
from .consensus import consensus_apply, consensus_merge, total_divisor, weight_sum
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
    "L1_LIMBS",
    "TIE_BLOCK",
    "SparsifyRule",
    "abs_histogram",
    "bound",
    "bound_in_window",
    "bound_prefix",
    "bounds_from_histograms",
    "consensus_apply",
    "consensus_merge",
    "count_nonfinite",
    "hashed_mask",
    "keep_ties",
    "key_histogram",
    "key_window_",
    "kth_magnitude",
    "l1_mass",
    "l1_scale",
    "kept_masks",
    "l1_sums",
    "magnitude_bounds",
    "prefixes",
    "rank_range",
    "sparsify",
    "tensor_id",
    "tie_counts",
    "ties_before",
    "topk_mask",
    "total_divisor",
    "weight_sum",
    "zero_nonfinite_",
]
