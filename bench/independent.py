"""What a merge must give, worked out a second time in another way: numpy, whole tensors, sorting, cumulative sums.

The benchmarks hold every output against this before they report a speed. It shares no code with the package:
thresholds come from ``numpy.partition`` instead of histograms, DELLA's ranks from a search in the sorted row, the
generator is written out on 64-bit integers, and L1 norms are float64 sums. All values are those of numerics="fp32":
float32 deltas, sums from left to right, one rounding at the end.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

MASK32 = np.uint64(0xFFFFFFFF)
BERNOULLI, DELLA = 0, 1
PHILOX_BLOCKS = 1 << 18
"""Blocks of four words drawn at once: they stay in the cache."""


@dataclass(frozen=True)
class Method:
    """One method's rule: which deltas stay, whether signs are elected, and what the sum is divided by."""

    sparsify: str
    elect: bool
    normalize: bool
    rescale: bool


METHODS = {
    "linear": Method("none", False, True, False),
    "task_arithmetic": Method("none", False, False, False),
    "ties": Method("magnitude", True, True, False),
    "dare_linear": Method("bernoulli", False, False, True),
    "dare_ties": Method("bernoulli", True, False, True),
    "breadcrumbs": Method("magnitude_outliers", False, False, False),
    "breadcrumbs_ties": Method("magnitude_outliers", True, False, False),
    "della_linear": Method("della", False, False, True),
    "della": Method("della", True, True, True),
}


def keys(values: np.ndarray) -> np.ndarray:
    """The bit patterns of the magnitudes of float32 ``values``: they order as the magnitudes do."""
    return values.view(np.uint32) & np.uint32(0x7FFFFFFF)


def lowest_index_top(key: np.ndarray, count: int) -> np.ndarray:
    """Mask of the ``count`` largest of ``key`` (1-d); of equal ones the first."""
    total = key.size
    if count <= 0:
        return np.zeros(total, dtype=bool)
    if count >= total:
        return np.ones(total, dtype=bool)
    threshold = np.partition(key, total - count)[total - count]
    above = key > threshold
    tied = key == threshold
    return above | (tied & (np.cumsum(tied) <= count - int(above.sum())))


def magnitude_mask(key: np.ndarray, density: float) -> np.ndarray:
    """TIES: keep max(1, int(density * N))."""
    count = 0 if density <= 0 else key.size if density >= 1 else max(1, int(density * key.size))
    return lowest_index_top(key, min(count, key.size))


def outliers_mask(key: np.ndarray, density: float, gamma: float) -> np.ndarray:
    """Breadcrumbs: drop the largest int(gamma * N), keep the next int(density * N)."""
    total = key.size
    if density >= 1:
        return np.ones(total, dtype=bool)
    wanted, top = int(density * total), int(gamma * total)
    bottom = max(0, total - wanted - top)
    return lowest_index_top(key, total - bottom) & ~lowest_index_top(key, total - bottom - wanted)


def philox(seed: int, tensor_id: int, stream: int, size: int) -> np.ndarray:
    """The first ``size`` words (uint32) of the stream of one tensor: Philox4x32-10."""
    words = np.empty((-(-size // 4), 4), dtype=np.uint32)
    for start in range(0, len(words), PHILOX_BLOCKS):
        index = np.arange(start, min(start + PHILOX_BLOCKS, len(words)), dtype=np.uint64)
        c0, c1 = index & MASK32, index >> np.uint64(32)
        c2 = np.full_like(index, tensor_id & 0xFFFFFFFF)
        c3 = np.full_like(index, stream)
        k0 = np.uint64(seed & 0xFFFFFFFF)
        k1 = np.uint64(((seed >> 32) ^ (tensor_id >> 32)) & 0xFFFFFFFF)
        for _ in range(10):
            a, b = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
            c0, c1, c2, c3 = (b >> np.uint64(32)) ^ c1 ^ k0, b & MASK32, (a >> np.uint64(32)) ^ c3 ^ k1, a & MASK32
            k0 = (k0 + np.uint64(0x9E3779B9)) & MASK32
            k1 = (k1 + np.uint64(0xBB67AE85)) & MASK32
        words[start : start + len(index)] = np.stack([c0, c1, c2, c3], axis=1)
    return words.reshape(-1)[:size]


def tensor_id(name: str) -> int:
    """The number that keys a tensor's masks: the head of the SHA-256 of its name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def bernoulli_mask(size: int, density: float, *, seed: int, identity: int, position: int) -> np.ndarray:
    """DARE: each element stays with probability ``density``."""
    if density >= 1:
        return np.ones(size, dtype=bool)
    words = philox(seed, identity, (BERNOULLI << 28) | position, size)
    return words < np.uint64(int(density * 2.0**32))


def della_mask(
    key: np.ndarray, shape: tuple[int, ...], density: float, epsilon: float, *, seed: int, identity: int, position: int
) -> np.ndarray:
    """DELLA: the larger a magnitude in its row, the likelier it stays; equal ones share their middle rank."""
    if density >= 1:
        return np.ones(key.size, dtype=bool)
    if density <= 0:
        return np.zeros(key.size, dtype=bool)
    length = shape[-1] if len(shape) > 1 else key.size
    rows = torch.from_numpy(key.view(np.int32)).reshape(-1, length)
    words = philox(seed, identity, (DELLA << 28) | position, key.size).reshape(-1, length)
    keep = np.empty(words.shape, dtype=bool)
    step = max(1, (1 << 21) // max(1, length))
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        ordered = part.sort(dim=1).values
        below = torch.searchsorted(ordered, part.contiguous(), right=False)
        upto = torch.searchsorted(ordered, part.contiguous(), right=True) - 1
        twice = (below + upto).numpy().astype(np.float64)
        rank = twice / (2.0 * (length - 1)) if length > 1 else np.full(twice.shape, 0.5)
        probability = (density - epsilon) + (2.0 * epsilon) * rank
        keep[start : start + step] = words[start : start + step] < np.floor(probability * 2.0**32)
    return keep.reshape(-1)


def l1_scale(values: np.ndarray, mask: np.ndarray) -> np.float32:
    """How much the kept values (float32) must grow for the L1 norm to be what it was; 1 when a norm is under 1e-7."""
    magnitude = np.abs(values).astype(np.float64)
    before, after = float(magnitude.sum()), float(magnitude[mask].sum())
    return np.float32(1.0) if before < 1e-7 or after < 1e-7 else np.float32(before / after)


def as_float32(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's values, widened, as one flat array."""
    return tensor.detach().float().reshape(-1).numpy()


def expected_tensor(
    method: str,
    name: str,
    base: torch.Tensor | None,
    models: list[torch.Tensor],
    weights: list[float],
    *,
    density: float = 1.0,
    gamma: float = 0.01,
    epsilon: float = 0.15,
    seed: int = 0,
    lambda_: float = 1.0,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Merge one tensor by the definition of ``method``; the shape and (by default) the dtype of the first model's."""
    rule = METHODS[method]
    shape, identity = tuple(models[0].shape), tensor_id(name)
    flat_base = as_float32(base) if base is not None and method != "linear" else None
    factors = [np.float32(weight) for weight in weights]
    terms = []
    for position, model in enumerate(models):
        delta = as_float32(model) if flat_base is None else as_float32(model) - flat_base
        key = keys(delta)
        mask = None
        if rule.sparsify == "magnitude":
            mask = magnitude_mask(key, density)
        elif rule.sparsify == "magnitude_outliers":
            mask = outliers_mask(key, density, gamma)
        elif rule.sparsify == "bernoulli":
            mask = bernoulli_mask(key.size, density, seed=seed, identity=identity, position=position)
        elif rule.sparsify == "della":
            mask = della_mask(key, shape, density, epsilon, seed=seed, identity=identity, position=position)
        if mask is not None:
            scale = l1_scale(delta, mask) if rule.rescale and density < 1 else np.float32(1.0)
            delta = np.where(mask, delta, np.float32(0.0)) * scale
        terms.append(delta * factors[position])

    if rule.elect:
        majority = np.where(sum(terms[1:], start=terms[0]) >= 0, np.float32(1.0), np.float32(-1.0))
        members = [np.sign(term) == majority for term in terms]
        merged = np.zeros_like(terms[0])
        divisor = np.zeros_like(terms[0])
        for term, member, factor in zip(terms, members, factors, strict=True):
            merged += np.where(member, term, np.float32(0.0))
            divisor += np.where(member, factor, np.float32(0.0))
        divisor[divisor == 0] = 1.0
    else:
        merged = sum(terms[1:], start=terms[0])
        divisor = sum(factors[1:], start=factors[0])
        divisor = np.float32(1.0) if abs(divisor) < 1e-8 else divisor
    if rule.normalize:
        merged = merged / divisor
    if lambda_ != 1:
        merged = merged * np.float32(lambda_)
    if flat_base is not None:
        merged = flat_base + merged
    return torch.from_numpy(np.ascontiguousarray(merged, dtype=np.float32)).reshape(shape).to(dtype or models[0].dtype)
