"""PCB-Merging: parameters compete by scores, each row keeps its best, and what is kept is weighed by its score.

Du et al., "Parameter Competition Balancing for Model Merging", NeurIPS 2024, arXiv 2410.02396, and the code released
with it, which has other formulas than the paper: the variants "script", "nlp", "vision" and "vision_es". "paper" is the
paper's. With d_i the delta of row i, n rows, lo_i and hi_i the bounds that |d_i| is clipped to:

    a_i = |d_i| clipped to [lo_i, hi_i]     z_i = (a_i - lo_i) / (hi_i - lo_i)
    u_i = sign(d_i) z_i                     c_i = sign(d_i) a_i
    b_i = exp(n z_i^2 - shift) * inter_i    inter_i = tanh(d_i * sum_j d_j)   script, nlp
                                                      tanh(d_i * sum_j u_j)   vision
                                                      sum_j tanh(u_i u_j)     vision_es
    S_i = (b_i clipped to [t_i, max_i] - t_i) / (max_i - t_i)
    tau = sum_i w_i c_i S_i / max(sum_i S_i, 1e-12)

    paper:  N(x) = (x - min) / (max - min) over the row     A_i = exp(n N(d_i^2) - shift)     B_ij = exp(N(d_i d_j))
            b_i = A_i / mean(A_i) * sum_j B_ij / mean(B_ij)     S_i = b_i where b_i >= t_i, else 0
            tau = sum_i w_i d_i S_i / sum_i S_i, 0 where that sum is 0

The shift keeps exp within float32 however many rows there are; it is a factor of a whole row's scores, and cancels.
Every operation is a float32 operation of its own, sums go from left to right, and nothing is fused. A rule is any
object with the attributes of a PCB rule: variant, clip, extremes, means, thresholds.

A score's key is its bit pattern, changed so that keys order scores as unsigned 32-bit numbers; NaN is the lowest, 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .functions import exp, tanh
from .numbers import canonical_nan, difference, ordered_sum, round_scalar
from .sparsify import LIMBS, exact_l1

LARGEST = torch.finfo(torch.float32).max
LARGEST_PRODUCT = LARGEST / 2
"""Products are held within this, so that the difference of two does not overflow."""

SMALLEST_DIVISOR = 1e-12
KEY_BITS = 32
LOW_BITS = 16


def shift(n: int) -> float:
    """What is subtracted from n z^2 before exp: half of n, and enough more for a great n."""
    return n / 2 if n <= 160 else float(n - 80)


def between(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """`x` clipped to [low, high]; NaN stays NaN, and `low` wins where the bounds are out of order."""
    return torch.where(x < low, low, torch.where(x > high, high, x))


def normalised(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """`x` scaled so that `low` becomes 0 and `high` 1; all 0 where the two are equal."""
    width = high - low
    return torch.where(width == 0, torch.zeros_like(x), (x - low) / width)


def direction(delta: Tensor) -> Tensor:
    """+1, -1 or +0 as float32; NaN stays NaN."""
    return torch.where(delta > 0, 1.0, torch.where(delta < 0, -1.0, torch.where(delta == 0, 0.0, delta)))


def pairs(n: int) -> list[tuple[int, int]]:
    """The pairs (i, j) of rows with i <= j: (0, 0), (0, 1) .. (0, n - 1), (1, 1) .. (n - 1, n - 1)."""
    return [(i, j) for i in range(n) for j in range(i, n)]


def deltas(base: Tensor | None, tensors: list[Tensor]) -> list[Tensor]:
    """Each row's delta, flat float32."""
    return [difference(base, x, torch.float32) for x in tensors]


def clipped(delta: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """c, z and u of one row; bounds float32[2]."""
    low, high = bounds[0:1], bounds[1:2]
    magnitude = between(delta.abs(), low, high)
    z = normalised(magnitude, low, high)
    sign = direction(delta)
    return sign * magnitude, z, sign * z


def released_scores(rows: list[Tensor], rule: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield b and c of each row, by the formulas of the released code."""
    n = len(rows)
    triples = [clipped(delta, bounds) for delta, bounds in zip(rows, rule.clip)]
    directed = torch.stack([u for _, _, u in triples])  # [n, numel]
    if rule.variant == "vision":
        together = ordered_sum(directed)
    elif rule.variant in ("script", "nlp"):
        limit = torch.tensor([LARGEST])
        together = between(ordered_sum(rows), -limit, limit)
    elif rule.variant != "vision_es":
        raise ValueError(f"unknown variant {rule.variant!r}")
    for delta, (c, z, u) in zip(rows, triples):
        strength = exp((z * z) * float(n) - shift(n))
        if rule.variant == "vision_es":
            inter = ordered_sum(tanh(u * directed))
        else:
            inter = tanh(delta * together)
        yield strength * inter + 0.0, c


def products(rows: list[Tensor]) -> Iterator[Tensor]:
    """For each i the products d_i * d_j, j = i .. n - 1, within half of what float32 holds: [n - i, numel]."""
    limit = torch.tensor([LARGEST_PRODUCT])
    for i, delta in enumerate(rows):
        yield between(delta * torch.stack(rows[i:]), -limit, limit)


def exponentials(rows: list[Tensor], extremes: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """A of each row and B of each pair of rows; extremes float32[pairs, 2]."""
    n = len(rows)
    intra: list[Tensor] = []
    inter: list[Tensor] = []
    for product in products(rows):
        edges = extremes[len(inter) : len(inter) + len(product)]
        spread = normalised(product, edges[:, 0:1], edges[:, 1:2])
        intra.append(exp(spread[0] * float(n) - shift(n)))
        inter.extend(exp(spread))
    return intra, inter


def paper_scores(rows: list[Tensor], rule: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield b of each row by the paper's formula, and the delta, which is not clipped there."""
    n = len(rows)
    intra, inter = exponentials(rows, rule.extremes)
    number = {pair: place for place, pair in enumerate(pairs(n))}
    shares = [b / rule.means[n + place] for place, b in enumerate(inter)]
    for i, delta in enumerate(rows):
        rivalry = ordered_sum(shares[number[min(i, j), max(i, j)]] for j in range(n))
        yield (intra[i] / rule.means[i]) * rivalry + 0.0, delta


def scored(base: Tensor | None, tensors: list[Tensor], rule: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """For each row its score b, and the value that is merged: c, or in `paper` the delta."""
    rows = deltas(base, tensors)
    return paper_scores(rows, rule) if rule.variant == "paper" else released_scores(rows, rule)


def pcb_scores(base: Tensor | None, tensors: list[Tensor], rule: Any) -> Tensor:
    """The scores b, float32[n, numel]."""
    return canonical_nan(torch.stack([b for b, _ in scored(base, tensors, rule)]))


def score_keys(scores: Tensor) -> Tensor:
    """The keys of float32 scores, int64 from 0 to 2**32 - 1: they order as the scores do, NaN lowest."""
    bits = scores.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    key = torch.where(bits >> 31 == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return torch.where(scores.isnan(), 0, key)


def pcb_window_(
    base: Tensor | None, tensors: list[Tensor], rule: Any, low: list[int], counts: Tensor, highest: Tensor
) -> None:
    """Add to counts[i]: how many keys of row i lie past its window, then how many there are of each key in it.

    The window of row i is the counts.shape[1] - 1 keys from low[i] on. highest[i] becomes the highest key seen so far.
    """
    width = counts.shape[1] - 1
    for i, (b, _) in enumerate(scored(base, tensors, rule)):
        key = score_keys(b)
        place = key - low[i]
        counts[i, 0] += (place >= width).sum()
        counts[i, 1:] += torch.bincount(place[(place >= 0) & (place < width)], minlength=width)
        if key.numel():
            highest[i] = torch.maximum(highest[i], key.max())


def pcb_histogram(base: Tensor | None, tensors: list[Tensor], rule: Any, prefix: list[int]) -> Tensor:
    """Counts int64[n, 65536] of key >> 16 where prefix[i] is -1, else of key & 65535 of the keys that begin with it."""
    rows = []
    for (b, _), wanted in zip(scored(base, tensors, rule), prefix):
        key = score_keys(b)
        high = key >> LOW_BITS
        part = high if wanted == -1 else key[high == wanted] & (1 << LOW_BITS) - 1
        rows.append(torch.bincount(part, minlength=1 << KEY_BITS - LOW_BITS))
    return torch.stack(rows)


def pcb_extremes(base: Tensor | None, tensors: list[Tensor]) -> Tensor:
    """The least and the greatest d_i * d_j of each pair, float32[pairs, 2]; +inf and -inf where all are NaN."""
    edges = []
    for product in products(deltas(base, tensors)):
        beyond = torch.full((len(product), 1), torch.inf)
        least = torch.cat([torch.where(product.isnan(), torch.inf, product), beyond], dim=1).amin(dim=1)
        greatest = torch.cat([torch.where(product.isnan(), -torch.inf, product), -beyond], dim=1).amax(dim=1)
        edges.append(torch.stack([least, greatest], dim=1))
    return torch.cat(edges) + 0.0  # of zeros that are extremes the positive one


def pcb_sums(base: Tensor | None, tensors: list[Tensor], rule: Any) -> Tensor:
    """Exact sums int64[n + pairs, 12] of each A, then of each B; NaN and Inf are left out."""
    intra, inter = exponentials(deltas(base, tensors), rule.extremes)
    return torch.stack([exact_l1(x) for x in (*intra, *inter)]).reshape(-1, LIMBS)


def shares_of(b: Tensor, thresholds: Tensor, variant: str) -> Tensor:
    """S of one row, from its scores; thresholds float32[2]."""
    start, highest = thresholds[0:1], thresholds[1:2]
    if variant == "paper":
        return torch.where(b >= start, b, 0.0)
    scaled = (between(b, start, highest) - start) / (highest - start)
    return torch.where(highest > start, scaled, torch.zeros_like(b))


def pcb_apply(
    base: Tensor | None, tensors: list[Tensor], rule: Any, weights: list[float], out: Tensor, scale: Tensor | None
) -> None:
    """Merge the rows into `out`, rounded once; `scale` float32[n, numel] receives S."""
    terms, shares = [], []
    for i, (b, value) in enumerate(scored(base, tensors, rule)):
        share = shares_of(b, rule.thresholds[i], rule.variant)
        terms.append((value * share) * round_scalar(weights[i], torch.float32))
        shares.append(share)
        if scale is not None:
            scale[i] = canonical_nan(share)
    total, divisor = ordered_sum(terms), ordered_sum(shares)
    if rule.variant == "paper":
        merged = torch.where(divisor == 0, 0.0, total / divisor)
    else:
        smallest = torch.tensor([SMALLEST_DIVISOR], dtype=torch.float32)
        merged = total / torch.where(divisor < smallest, smallest, divisor)
    if base is not None:
        merged = base.reshape(-1).to(torch.float32) + merged
    out.copy_(canonical_nan(merged.to(out.dtype)).reshape(out.shape))
