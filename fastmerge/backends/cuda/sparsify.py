"""Sparsification in CUDA C++: the functions of `fastmerge/reference/sparsify.py`, with the same bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...reference import random
from ..gpu import keep_limit
from ..limits import TooManyModelsError
from ..rule import L1_LIMBS, SparsifyRule
from .launch import CODES, NOTHING, address, compiled, inputs, place, ref

__all__ = ["count_nonfinite", "kept_masks", "l1_sums", "zero_nonfinite_"]

METHODS = {"none": 0, "band": 1, "bernoulli": 2, "mask": 4}

SORTED = 1 << 24
"""Keys that are sorted at a time, of rows too long for a block: 64 MB, and as much again for the sorted ones."""

OPEN = 1 << 10
"""Bins of a row's keys that a block refines at a time."""


def few(models: int) -> None:
    """TooManyModelsError where a launch cannot take so many models."""
    if models > compiled.MOST_MODELS:
        raise TooManyModelsError(
            f"the cuda backend merges at most {compiled.MOST_MODELS} models at once, not {models}; "
            'use backend="triton", which takes any number'
        )


def given(rule: SparsifyRule, models: int) -> tuple[tuple[Any, ...], tuple[Tensor, ...]]:
    """A rule other than "della" as kernels take it, and the tensors that must live until they are launched."""
    if rule.method == "band":
        assert rule.bounds is not None and rule.ties_before is not None
        return _given("band", rule, rule.bounds.contiguous(), rule.ties_before.contiguous())
    if rule.method == "mask":
        assert rule.masks is not None
        return _given("mask", rule, masks=rule.masks.contiguous())
    if rule.method == "bernoulli":
        limits = [keep_limit(density) for density in rule.density]
        streams = [random.stream_id(random.BERNOULLI, position) for position in rule.positions]
        return _given("bernoulli", rule, limits=limits, streams=streams)
    return _given("none", rule)


def _given(
    method: str,
    rule: SparsifyRule,
    bounds: Tensor | None = None,
    ties_before: Tensor | None = None,
    masks: Tensor | None = None,
    limits: list[int] | None = None,
    streams: list[int] | None = None,
) -> tuple[tuple[Any, ...], tuple[Tensor, ...]]:
    """A rule in the order of `RuleRef`."""
    blocks = 0 if ties_before is None else ties_before.shape[2]
    words = (limits or [], streams or [], rule.seed, rule.tensor_id, rule.offset)
    stride = 0 if masks is None else masks.shape[1]
    alive = tuple(x for x in (bounds, ties_before, masks) if x is not None)
    return (METHODS[method], address(bounds), address(ties_before), blocks, *words, address(masks), stride), alive


def decided(base: Tensor | None, tensors: list[Tensor], rule: SparsifyRule, compute: torch.dtype) -> SparsifyRule:
    """The same rule, but what needs ranks within rows as masks."""
    if rule.method != "della":
        return rule
    return SparsifyRule("mask", masks=kept_masks(base, tensors, rule, compute))


def kept_masks(base: Tensor | None, tensors: list[Tensor], rule: SparsifyRule, compute: torch.dtype) -> Tensor:
    """What a rule keeps of each model's delta, as bits; see `fastmerge.ops.kept_masks`."""
    few(len(tensors))
    numel, device = tensors[0].numel(), tensors[0].device
    out = torch.empty(len(tensors), -(-numel // 8), dtype=torch.uint8, device=device)
    if numel == 0:
        return out
    if rule.method != "della":
        kept, _alive = given(rule, len(tensors))
        compiled.kept_masks(place(device), *inputs(base, tensors, compute), kept, out.data_ptr())
        return out
    for x, density, epsilon, position, mask in zip(tensors, rule.density, rule.epsilon, rule.positions, out):
        stream = random.stream_id(random.DELLA, position)
        if 0 < density < 1 and rule.row_length > 1:
            _keep_by_rank(base, x, density, epsilon, stream, rule, compute, mask)
            continue
        # All, nothing, or a row of one element, whose rank is the middle one.
        limit = (1 << 32) * (density >= 1)
        if 0 < density < 1:
            limit = keep_limit((density - epsilon) + (2 * epsilon) * 0.5)
        kept, _alive = _given("bernoulli", rule, limits=[limit], streams=[stream])
        compiled.kept_masks(place(device), *inputs(None, [x], compute), kept, mask.data_ptr())
    return out


def _keep_by_rank(
    base: Tensor | None,
    x: Tensor,
    density: float,
    epsilon: float,
    stream: int,
    rule: SparsifyRule,
    compute: torch.dtype,
    mask: Tensor,
) -> None:
    """DELLA's mask of one model."""
    length, where = rule.row_length, place(x.device)
    count = x.numel() // length

    def group(begin: int, rows: int) -> tuple[Any, ...]:
        reference = NOTHING if base is None else _from(base, begin)
        numbers = (density, epsilon, rule.seed, rule.tensor_id, rule.offset + begin, stream)
        return reference, base is not None, _from(x, begin), CODES[compute], rows, length, *numbers

    if compiled.ranks_rows(where, length):
        compiled.rank_rows(where, group(0, count), OPEN, mask.data_ptr())
        return
    # In groups of eight rows, so that a group ends where a byte of the mask ends.
    some = max(1, SORTED // (8 * length)) * 8
    for first in range(0, count, some):
        rows = min(some, count - first)
        begin = first * length
        some_rows = group(begin, rows)
        keys = torch.empty(rows, length, dtype=torch.int32, device=x.device)
        compiled.row_keys(where, some_rows, keys.data_ptr())
        keys = keys.sort(dim=1).values
        compiled.row_masks(where, some_rows, keys.data_ptr(), mask.data_ptr() + begin // 8)


def _from(x: Tensor, begin: int) -> tuple[int, int]:
    """A contiguous tensor from one of its elements on, as kernels take it."""
    data, code = ref(x)
    return data + begin * x.element_size(), code


def l1_sums(base: Tensor | None, tensors: list[Tensor], rule: SparsifyRule, compute: torch.dtype) -> Tensor:
    """Exact L1 masses of each model's delta, all and kept; see `fastmerge.ops.l1_sums`."""
    few(len(tensors))
    out = torch.zeros(len(tensors), 2, L1_LIMBS, dtype=torch.int64, device=tensors[0].device)
    if tensors[0].numel() == 0:
        return out
    kept, _alive = given(decided(base, tensors, rule, compute), len(tensors))
    compiled.l1_sums(place(out.device), *inputs(base, tensors, compute), kept, out.data_ptr())
    return out


def count_nonfinite(x: Tensor) -> Tensor:
    """How many elements are NaN, and how many infinite; see `fastmerge.ops.count_nonfinite`."""
    out = torch.zeros(2, dtype=torch.int64, device=x.device)
    compiled.count_nonfinite(place(x.device), ref(x), x.numel(), out.data_ptr())
    return out


def zero_nonfinite_(x: Tensor) -> None:
    """Set NaN and infinite elements of x to zero, in place; see `fastmerge.ops.zero_nonfinite_`."""
    compiled.zero_nonfinite(place(x.device), ref(x), x.numel())
