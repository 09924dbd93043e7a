"""Trials of evolutionary search: a member whose elements are crossed over, here and there, with what others have.

The rule is any object with the attributes of a trial's rule: kind, places, factors, limit, seed, stream, offset.

    mask(e) = word(e) < floor(CR 2**32), or e is the one element that always crosses over
    blend   mask ? (1 - F) x + F ref : x                                        (Evolver: Du et al., arXiv 2406.12208)
    de      mask ? a + F (b - c) + F2 (p - q) ... : x       (differential evolution: Storn and Price, 1997, binomial)

e is the element's flat index in its whole tensor. Each step is rounded to float32 by itself, from left to right. Where
the mask is off a result of x's dtype has x's own bits, whatever they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import random
from .numbers import canonical_nan, widen

BITS = {2: torch.int16, 4: torch.int32}


def crossed(numel: int, rule: Any, tensor_id: int, forced: int, device: torch.device | None = None) -> Tensor:
    """Which elements of a chunk cross over, bool[numel]. forced: the index of one that always does; -1: none."""
    words = random.words(rule.offset, numel, seed=rule.seed, tensor_id=tensor_id, stream=rule.stream, device=device)
    places = torch.arange(rule.offset, rule.offset + numel, device=device)
    return (words < rule.limit) | (places == forced)


def mixed(tensors: list[Tensor], rule: Any) -> Tensor:
    """What crossing over puts in x's place, flat float32; tensors: the distinct ones, of which the first is x."""
    values = [widen(x, torch.float32) for x in tensors]
    factors = [torch.tensor(factor, dtype=torch.float32, device=values[0].device) for factor in rule.factors]
    if rule.kind == "blend":
        return (factors[0] * values[0]) + (factors[1] * values[rule.places[0]])
    first, *pairs = (values[place] for place in rule.places)
    for factor, plus, minus in zip(factors, pairs[::2], pairs[1::2]):
        first = first + (factor * (plus - minus))
    return first


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(BITS[x.element_size()])


def trial(tensors: list[Tensor], rule: Any, tensor_id: int, forced: int, out: Tensor) -> None:
    """The trial of one chunk, to `out`, which may be one of the tensors."""
    mask = crossed(out.numel(), rule, tensor_id, forced, out.device)
    new = canonical_nan(mixed(tensors, rule).to(out.dtype))
    x = tensors[0].reshape(-1)
    old = x if x.dtype == out.dtype else canonical_nan(widen(x, torch.float32).to(out.dtype))
    chosen = torch.where(mask, _bits(new), _bits(old))
    out.copy_(chosen.view(out.dtype).reshape(out.shape))


def trials(models: list[list[Tensor]], rule: Any, tensor_ids: list[int], forced: list[int], out: list[Tensor]) -> None:
    """The trials of T tensors: `models` are the lists of T tensors that the rule's places count, x the first."""
    for t, target in enumerate(out):
        trial([model[t] for model in models], rule, tensor_ids[t], forced[t], target)
