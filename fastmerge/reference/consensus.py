"""The merge of n deltas: sparsify, weigh, elect a sign, add, divide, scale, put on the base.

    s_i   = the sparsified delta of model i            x_i = w_i s_i
    e     = sum x_i ("weighted"), sum s_i ("total") or sum sign(s_i) ("frequency")
    m_i   = q_i has the sign of e, q = x for "weighted", else s; zeros and NaNs never take part; all do without election
    mixed = sum_{m_i} x_i / divisor * lambda           out = base + mixed

TIES: Yadav et al., arXiv 2306.01708. The flags cover the forms of it that are in use. All sums are float32, from left
to right; nothing is fused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .numbers import canonical_nan, ordered_sum, round_scalar, round_to, sign, widen
from .sparsify import sparsified


def majority_sign(votes: Tensor, zero_sign: str) -> Tensor:
    """+1 where the votes are positive, -1 where negative or NaN, and what `zero_sign` says where they cancel."""
    at_zero = {"positive": 1.0, "negative": -1.0, "zero": 0.0}[zero_sign]
    decided = torch.where(votes > 0, 1.0, -1.0)
    return torch.where(votes == 0, at_zero, decided)


def elect(deltas: list[Tensor], weighted: list[Tensor], election: str, zero_sign: str) -> list[Tensor]:
    """Which elements of each model take part, bool."""
    if election == "weighted":
        votes, voters = ordered_sum(weighted), weighted
    elif election == "total":
        votes, voters = ordered_sum(deltas), deltas
    elif election == "frequency":
        votes, voters = ordered_sum(sign(s) for s in deltas), deltas
    else:
        raise ValueError(f"unknown election {election!r}")
    majority = majority_sign(votes, zero_sign)
    return [(sign(q) == majority) & (sign(q) != 0) for q in voters]


def divisors(
    taking_part: list[Tensor] | None,
    weights: list[float],
    divisor: str,
    divisor_value: float,
    compute: torch.dtype,
) -> Tensor:
    """What the sum is divided by: float32, one per element or one for all."""
    if divisor == "value" or (divisor == "weights" and taking_part is None):
        return torch.tensor([round_scalar(divisor_value, compute)], dtype=torch.float32)
    if taking_part is None:
        return torch.tensor([len(weights)], dtype=torch.float32)
    if divisor == "weights":
        each = [torch.where(m, torch.tensor(w), torch.tensor(0.0)) for m, w in zip(taking_part, weights)]
    else:
        each = [m.to(torch.float32) for m in taking_part]
    total = round_to(ordered_sum(each), compute if divisor == "weights" else torch.float32)
    return torch.where(total == 0, 1.0, total)


def fused_sum(tensors: list[Tensor], weights: list[float]) -> Tensor:
    """sum_i(w_i x_i), flat float32: a chain of fused multiply-adds, each rounded once.

    float64 holds the products exactly. The sum with what came before is rounded to odd there (its last bit set where it
    is inexact), after which rounding it to float32 is the same as rounding the exact sum.
    """
    total = torch.zeros(tensors[0].numel(), dtype=torch.float32, device=tensors[0].device)
    for x, weight in zip(tensors, weights):
        product = widen(x, torch.float32).to(torch.float64) * round_scalar(weight, torch.float32)
        before = total.to(torch.float64)
        rounded = product + before
        # What the addition lost (Knuth's TwoSum, exact).
        virtual = rounded - product
        lost = (product - (rounded - virtual)) + (before - virtual)
        bits = rounded.view(torch.int64)
        inexact = (lost != 0) & lost.isfinite() & (bits & 1 == 0)
        # One step towards what was lost: away from zero where the signs agree, else towards zero.
        step = torch.where((lost > 0) == (rounded > 0), 1, -1)
        total = torch.where(inexact, bits + step, bits).view(torch.float64).to(torch.float32)
    return canonical_nan(total)


def consensus_apply(
    base: Tensor | None,
    tensors: list[Tensor],
    weights: list[float],
    *,
    inputs: str,
    rule: Any,
    scales: list[float],
    election: str,
    zero_sign: str,
    divisor: str,
    divisor_value: float,
    lambda_: float,
    compute: torch.dtype,
    out: Tensor,
) -> None:
    """Merge the models (inputs="models") or deltas (inputs="deltas") and write the result to `out`, rounded once."""
    subtract = base if inputs == "models" else None
    weights = [round_scalar(w, compute) for w in weights]
    deltas = [sparsified(subtract, x, rule, i, scales[i], compute) for i, x in enumerate(tensors)]
    weighted = [round_to(s * w, compute) for s, w in zip(deltas, weights)]

    taking_part = None
    terms = weighted
    if election != "none":
        taking_part = elect(deltas, weighted, election, zero_sign)
        # This sum starts from +0, not from its first term: a -0 does not survive an election.
        terms = [torch.zeros_like(weighted[0]), *(torch.where(m, x, 0.0) for m, x in zip(taking_part, weighted))]
    mixed = round_to(ordered_sum(terms), compute)

    if divisor != "none":
        # A tensor, never a Python number: dividing by a number may become a multiplication by its reciprocal.
        mixed = round_to(mixed / divisors(taking_part, weights, divisor, divisor_value, compute), compute)
    if lambda_ != 1:
        mixed = round_to(mixed * round_scalar(lambda_, torch.float32), compute)
    if base is not None:
        mixed = round_to(widen(base, compute) + mixed, compute)
    out.copy_(canonical_nan(mixed.to(out.dtype)).reshape(out.shape))
