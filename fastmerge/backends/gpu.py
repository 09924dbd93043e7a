"""What the adapters of both backends for GPUs do on the host in the same way."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..reference import consensus
from .rule import TrialRule

_BoundsOf = Callable[[list[Tensor], list[int], list[int]], tuple[Tensor, Tensor]]
_INF_ORDERED, _MINUS_INF_ORDERED = 0x7F800000, -0x7F800001


def rounded(values: list[float], compute: torch.dtype = torch.float32) -> list[float]:
    """Numbers rounded to float32, then to `compute`."""
    numbers: list[float] = torch.tensor(values, dtype=torch.float32).to(compute).tolist()
    return numbers


def keep_limit(probability: float) -> int:
    """Random words below floor(p * 2**32), at most 2**32, keep."""
    return min(max(math.floor(probability * 4294967296.0), 0), 1 << 32)


def loadable(x: Tensor) -> Tensor:
    """A tensor that a GPU can load: a copy where its address is no multiple of its elements' size."""
    return x if x.data_ptr() % x.element_size() == 0 else x.clone()


def same_dtypes(models: list[list[Tensor]], out: list[Tensor]) -> list[list[int]]:
    """The places of tensors that one launch can take, for their dtypes are the same in every role; empty ones in none.

    models: lists of T tensors. out: T tensors.
    """
    groups: dict[tuple[torch.dtype, ...], list[int]] = {}
    for t, target in enumerate(out):
        if target.numel():
            groups.setdefault((target.dtype, *(model[t].dtype for model in models)), []).append(t)
    return list(groups.values())


def relative(rule: TrialRule, forced: list[int]) -> list[int]:
    """Elements that always cross over, counted from the chunk's first; -1: none of the chunk's."""
    return [max(place - rule.offset, -1) for place in forced]


def bounds_by_group(
    bounds_of: _BoundsOf, groups: list[list[int]], tensors: list[Tensor], first: list[int], last: list[int]
) -> tuple[Tensor, Tensor]:
    """`magnitude_bounds` of models that are not launched together: what is found of each group, in the models' order.

    groups: the models' places.
    """
    parts = [
        bounds_of([tensors[i] for i in group], [first[i] for i in group], [last[i] for i in group]) for group in groups
    ]
    if len(parts) == 1:
        return parts[0]
    where = {model: (part, i) for part, group in enumerate(groups) for i, model in enumerate(group)}
    order = [where[model] for model in range(len(tensors))]
    return (
        torch.stack([parts[part][0][i] for part, i in order]),
        torch.stack([parts[part][1][i] for part, i in order]),
    )


_SUMMED_AT_ONCE = 1 << 20
"""Elements whose float64 temporaries are held at once; a GPU must be told each step."""


def fused_sum(tensors: list[Tensor], weights: list[float]) -> Tensor:
    """A chain of fused multiply-adds, by the definition's own steps in blocks; see `fastmerge.ops.fused_sum`."""
    out = torch.empty(tensors[0].numel(), dtype=torch.float32, device=tensors[0].device)
    for start in range(0, out.numel(), _SUMMED_AT_ONCE):
        part = slice(start, start + _SUMMED_AT_ONCE)
        out[part] = consensus.fused_sum([x.view(-1)[part] for x in tensors], weights)
    return out


# -- PCB-Merging -----------------------------------------------------------------------------------------------------


def pairs(models: int) -> int:
    """Pairs of models, each with itself included."""
    return models * (models + 1) // 2


def no_products(models: int, device: torch.device) -> Tensor:
    """The least and the greatest product of each pair before any was seen, int32[pairs, 2] that order as floats do."""
    ordered = torch.empty(pairs(models), 2, dtype=torch.int32, device=device)
    ordered[:, 0].fill_(_INF_ORDERED)
    ordered[:, 1].fill_(_MINUS_INF_ORDERED)
    return ordered


def products(ordered: Tensor) -> Tensor:
    """As floats what orders as they do."""
    return torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).view(torch.float32)


def sorted_bounds(keys: Tensor, ranks: list[int]) -> tuple[Tensor, Tensor]:
    """The keys at these ranks, one for each row, and the highest ones."""
    ordered = keys.sort(dim=1, descending=True).values
    return torch.stack([row[rank - 1] for row, rank in zip(ordered, ranks)]), ordered[:, 0]
