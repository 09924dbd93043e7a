"""Which elements of a delta are kept, and the exact L1 mass before and after.

The rule is any object with the attributes of a sparsification rule: method, bounds, ties_before, density, epsilon,
row_length, seed, tensor_id, positions, offset, masks.

    none       every element
    band       rank by falling magnitude in [first, last)                      (magnitude, magnitude_outliers)
    bernoulli  word < floor(density * 2**32)                                   (DARE: Yu et al., arXiv 2311.03099)
    della      word < floor(p * 2**32), p = (density - epsilon) + 2 epsilon r  (MAGPRUNE: Deep et al., arXiv 2406.11617)
               r in [0, 1]: the magnitude's rank within its row; equal magnitudes share the middle of their ranks
    mask       what was decided before: a bit for each element, low bit first
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import random
from .numbers import INF_KEY, difference, keys, round_scalar, round_to
from .select import band

LIMBS = 12


def normalised_ranks(key: Tensor, row_length: int) -> Tensor:
    """Ranks by rising key within each row, scaled to [0, 1], float64, flat; a row of one element has rank 0.5."""
    if row_length == 1:
        return torch.full(key.shape, 0.5, dtype=torch.float64)
    rows = key.reshape(-1, row_length)  # [rows, row_length]
    ordered = rows.sort(dim=1).values
    first = torch.searchsorted(ordered, rows, right=False)
    last = torch.searchsorted(ordered, rows, right=True) - 1
    return ((first + last).to(torch.float64) / (2.0 * (row_length - 1))).reshape(-1)


def della_probability(key: Tensor, density: float, epsilon: float, row_length: int) -> Tensor:
    """The probability with which each element is kept, float64, flat."""
    return (density - epsilon) + (2 * epsilon) * normalised_ranks(key, row_length)


def kept(delta: Tensor, rule: Any, model: int) -> Tensor:
    """Which elements of model number `model`'s flat delta are kept, bool."""
    everything = torch.ones(delta.shape, dtype=torch.bool)
    if rule.method == "none":
        return everything
    if rule.method == "band":
        return band(keys(delta), rule.bounds[model], rule.ties_before[model])
    if rule.method == "mask":
        places = torch.arange(8, dtype=torch.uint8)
        return (rule.masks[model][:, None] >> places & 1).reshape(-1)[: delta.numel()].to(torch.bool)
    if rule.method not in ("bernoulli", "della"):
        raise ValueError(f"unknown sparsification rule {rule.method!r}")
    density = rule.density[model]
    if density >= 1:
        return everything
    if density <= 0 or delta.numel() == 0:
        return ~everything
    if rule.method == "bernoulli":
        purpose = random.BERNOULLI
        probability = torch.tensor([density], dtype=torch.float64)
    else:
        purpose = random.DELLA
        probability = della_probability(keys(delta), density, rule.epsilon[model], rule.row_length)
    stream = random.stream_id(purpose, rule.positions[model])
    words = random.words(rule.offset, delta.numel(), seed=rule.seed, tensor_id=rule.tensor_id, stream=stream)
    return words < random.threshold(probability)


def sparsified(base: Tensor | None, x: Tensor, rule: Any, model: int, scale: float, compute: torch.dtype) -> Tensor:
    """One model's delta with the dropped elements at +0 and the others times `scale`, flat float32."""
    delta = difference(base, x, compute)
    delta = torch.where(kept(delta, rule, model), delta, 0.0)
    return delta if scale == 1 else round_to(delta * round_scalar(scale, torch.float32), compute)


def exact_l1(x: Tensor) -> Tensor:
    """The sum of the finite magnitudes of float32 values, exactly: int64[12], limbs of 32 bits in units of 2**-149."""
    key = keys(x)
    key = key[key < INF_KEY]
    exponent = key >> 23
    implicit_bit = (exponent > 0).to(torch.int64) << 23
    mantissa = (key & 0x7FFFFF) | implicit_bit
    by_exponent = torch.zeros(255, dtype=torch.int64, device=x.device).scatter_add_(0, exponent, mantissa)
    total = sum(mass << max(e - 1, 0) for e, mass in enumerate(by_exponent.tolist()))
    return torch.tensor([total >> 32 * limb & 0xFFFFFFFF for limb in range(LIMBS)], dtype=torch.int64, device=x.device)


def l1_sums(base: Tensor | None, tensors: list[Tensor], rule: Any, compute: torch.dtype) -> Tensor:
    """Exact L1 sums int64[n, 2, 12]: [:, 0] of all elements, [:, 1] of the kept ones; NaN and Inf are left out."""
    sums = torch.zeros(len(tensors), 2, LIMBS, dtype=torch.int64)
    for model, x in enumerate(tensors):
        delta = difference(base, x, compute)
        sums[model, 0] = exact_l1(delta)
        sums[model, 1] = exact_l1(delta[kept(delta, rule, model)])
    return sums


def kept_masks(base: Tensor | None, tensors: list[Tensor], rule: Any, compute: torch.dtype) -> Tensor:
    """What the rule keeps of each model's delta, as uint8[n, ceil(numel / 8)], a bit for each element."""
    numel = tensors[0].numel()
    bits = torch.zeros(len(tensors), -(-numel // 8) * 8, dtype=torch.uint8)
    for model, x in enumerate(tensors):
        bits[model, :numel] = kept(difference(base, x, compute), rule, model)
    return (bits.reshape(len(tensors), -1, 8) << torch.arange(8, dtype=torch.uint8)).sum(dim=2, dtype=torch.uint8)


def count_nonfinite(x: Tensor) -> Tensor:
    """int64[2]: how many NaNs, how many infinities."""
    return torch.stack([x.isnan().sum(), x.isinf().sum()])


def zero_nonfinite_(x: Tensor) -> None:
    """Replace every NaN and infinity by +0, in place."""
    x.masked_fill_(~x.isfinite(), 0.0)
