"""How much each place of a tensor matters, and the merges that follow from it, in float32, nothing fused.

With d_i = x_i - base, the sums over the models from left to right:

    nearswap      w = clamp(t / max(|x - base|, 1e-6), 0, 1)              out = w x + (1 - w) base
    ram           i takes part where not |d_i| <= epsilon                 c = how many do, s = the sum of their d_i
                  out = base + (s f_i where i alone takes part, else s / max(c, 1))
                  counts: of each model, where it takes part with others, and where alone
    variance      e_i = d_i - d_1, m = sum e_i / n                        v = sum (e_i - m)^2 / n
    energy        the sum of d_i^2 over what a mask keeps, each square rounded, the sum exact
    divergence    of a row of base and x: p = softmax(x) + 1e-8, q = softmax(base) + 1e-8, sum (p log(p / q) - p + q)
    importance    |x - base| times the divergence of its row

nearswap: huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001. ram: Reinforced Agent Merging, arXiv 2601.13572.
variance and energy: SCE of FuseChat, arXiv 2408.07990. divergence and importance: Arcee Fusion, arcee.ai. As in
mergekit 0.1.5, but for two things, which change nothing in real numbers. Variances are taken about d_1: where all
models agree they are 0 exactly. Divergences have the terms q - p, whose sum is 0: without them the terms nearly cancel,
and where models are near each other what is left is the rounding of the shares.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .functions import exp, log, log_polynomial
from .numbers import canonical_nan, difference, ordered_sum, round_scalar, widen
from .sparsify import LIMBS, exact_l1

SMALLEST_DISTANCE = 1e-6
SMALLEST_SHARE = 1e-8
NEAR = 0.25


def _float32(value: float, like: Tensor) -> Tensor:
    """A number as float32: a tensor, so that it is rounded once and never taken for a reciprocal."""
    return torch.tensor(round_scalar(value, torch.float32), dtype=torch.float32, device=like.device)


def _put(mixed: Tensor, out: Tensor) -> None:
    out.copy_(canonical_nan(mixed.to(out.dtype)).reshape(out.shape))


def nearswap(base: Tensor, tensors: list[Tensor], t: float, out: Tensor) -> None:
    """Move each element towards the model's, the farther the nearer they are, and write it to `out`, rounded once."""
    a, b = (widen(each, torch.float32) for each in (base, *tensors))
    distance = (a - b).abs()
    nearest = _float32(SMALLEST_DISTANCE, a)
    weight = _float32(t, a) / torch.where(distance < nearest, nearest, distance)
    weight = torch.where(weight < 0.0, 0.0, torch.where(weight > 1.0, 1.0, weight))
    _put(weight * b + (1.0 - weight) * a, out)


def _deltas(base: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    return [difference(base, x, torch.float32) for x in tensors]


def taking_part(deltas: list[Tensor], epsilon: float) -> list[Tensor]:
    """Which elements of each delta are further from 0 than epsilon; NaN is, too."""
    least = _float32(epsilon, deltas[0])
    return [~(d.abs() <= least) for d in deltas]


def ram_counts(base: Tensor, tensors: list[Tensor], epsilon: float) -> Tensor:
    """int64[n, 2]: where each model takes part together with others, and where alone."""
    part = taking_part(_deltas(base, tensors), epsilon)
    count = ordered_sum(p.to(torch.int64) for p in part)
    return torch.stack([torch.stack([(p & (count > 1)).sum(), (p & (count == 1)).sum()]) for p in part])


def ram_apply(base: Tensor, tensors: list[Tensor], factors: list[float], epsilon: float, out: Tensor) -> None:
    """Put the mean of what takes part on the base, alone that times the model's factor; `out` is rounded once."""
    deltas = _deltas(base, tensors)
    part = taking_part(deltas, epsilon)
    count = ordered_sum(p.to(torch.float32) for p in part)
    total = ordered_sum(torch.where(p, d, 0.0) for p, d in zip(part, deltas))
    # Where a model is alone, this sum is its factor.
    factor = ordered_sum(torch.where(p, _float32(f, total), 0.0) for p, f in zip(part, factors))
    mixed = torch.where(count == 1.0, total * factor, total / torch.where(count < 1.0, 1.0, count))
    _put(widen(base, torch.float32) + mixed, out)


def model_variance(base: Tensor, tensors: list[Tensor]) -> Tensor:
    """The variance over the models of each element, float32, flat."""
    deltas = _deltas(base, tensors)
    models = _float32(len(tensors), deltas[0])
    shifted = [d - deltas[0] for d in deltas]
    mean = ordered_sum(shifted) / models
    apart = [e - mean for e in shifted]
    return canonical_nan(ordered_sum(a * a for a in apart) / models)


def unpacked(mask: Tensor, numel: int) -> Tensor:
    """The bits of uint8[bytes], low bit first, as bool[numel]."""
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (mask[:, None] >> places & 1).reshape(-1)[:numel].to(torch.bool)


def energy_sums(base: Tensor, tensors: list[Tensor], mask: Tensor | None) -> Tensor:
    """int64[n, 12]: the exact sum of each delta's squares, of those that the mask keeps; what is not finite is not."""
    sums = torch.zeros(len(tensors), LIMBS, dtype=torch.int64, device=base.device)
    for model, d in enumerate(_deltas(base, tensors)):
        kept = d if mask is None else d[unpacked(mask, d.numel())]
        sums[model] = exact_l1(kept * kept)
    return sums


def row_sums(x: Tensor) -> Tensor:
    """The sum of each row of [rows, width], float32[rows], halving a row until one element is left.

    Each time the elements from the largest power of two below the width on are added to the first ones.
    """
    width = x.shape[1]
    while width > 1:
        half = 1 << ((width - 1).bit_length() - 1)
        folded = x[:, :half].clone()
        folded[:, : width - half] += x[:, half:width]
        x, width = folded, half
    return x[:, 0]


def shares(x: Tensor) -> Tensor:
    """Each row's softmax plus 1e-8, so that none is 0: float32[rows, width]."""
    powers = exp(x - x.amax(dim=1, keepdim=True))
    return powers / row_sums(powers)[:, None] + _float32(SMALLEST_SHARE, x)


def divergence_terms(p: Tensor, q: Tensor) -> Tensor:
    """The terms p log(p / q) - p + q, none below 0; where p is near q by the logarithm's series: nothing cancels."""
    apart = p - q
    z = apart / q
    near = (apart * z) * (0.5 + z * ((p / q) * log_polynomial(z) - 0.5))
    return torch.where(z.abs() <= NEAR, near, p * log(p / q) - apart)


def divergences(base: Tensor, tensors: list[Tensor], row_length: int) -> Tensor:
    """The divergence of each row of the one model from that of the base, float32[rows]."""
    p, q = (shares(widen(each, torch.float32).reshape(-1, row_length)) for each in (*tensors, base))
    return canonical_nan(row_sums(divergence_terms(p, q)))


def importance(base: Tensor, tensors: list[Tensor], divergence: Tensor, row_length: int) -> Tensor:
    """The one model's |x - base| times the divergence of its row, float32, flat."""
    rows = difference(base, tensors[0], torch.float32).abs().reshape(-1, row_length)
    return canonical_nan(rows * divergence[:, None]).reshape(-1)
