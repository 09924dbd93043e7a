"""Sparsification in Triton: the functions of `fastmerge/reference/sparsify.py`, with the same bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ..._triton import exact
from ..._triton import sparsify as kernels
from ...reference import random
from ..rule import L1_LIMBS, TIE_BLOCK, SparsifyRule
from .launch import CODES, INTERPRETED, block, flat, launch, table, tiles

__all__ = ["count_nonfinite", "kept_masks", "l1_sums", "zero_nonfinite_"]

BLOCK = 1024
"""Elements per tile: eight for each thread, one load of 16 bytes where they are 16-bit numbers."""

TILES = 4
"""Tiles per program, which begin to be independent after what they share is known."""

LOOK_BLOCK = 2048
LOOK_TILES = 4
"""Where nothing is computed: more elements for each thread, so that enough loads are under way."""

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

BY_VALUE = 8
"""Models that a kernel takes by value: pointers and numbers among its arguments, no table to be read first."""

METHODS = {"none": 0, "band": 1, "bernoulli": 2, "mask": 4}

if INTERPRETED:
    # There time goes by operations, not by elements.
    kernels.COUNTED = tl.constexpr(16384)
    kernels.SOUGHT = tl.constexpr(4096)


# -- what kernels of this family and of consensus take -----------------------------------------------------------------


def usable(x: Tensor) -> Tensor:
    """A contiguous tensor as a vector that a GPU can load: a copy where its address is no multiple of its elements'."""
    return flat(x if x.data_ptr() % x.element_size() == 0 else x.clone())


def alignment(*tensors: Tensor | None) -> int:
    """Of how many bytes all addresses are multiples: 16, 8, or 1, which says nothing.

    So few, since kernels are compiled for each, and not for each tensor.
    """
    together = math.gcd(16, *(x.data_ptr() for x in tensors if x is not None))
    return together if together >= 8 else 1


def padded(values: Sequence[Any], filler: Any) -> list[Any]:
    """As many values as a kernel takes by value."""
    return [*values, *[filler] * (BY_VALUE - len(values))]


def signed(number: int) -> int:
    """An unsigned 64-bit integer as the signed one with its bits."""
    return (number & 0xFFFFFFFFFFFFFFFF) - ((number & 1 << 63) << 1)


def draw(purpose: int, position: int, limit: int) -> int:
    """A stream and the limit (up to 2**32) below which words keep, as kernels take them: see their `drawn`."""
    return -1 if limit <= 0 else random.stream_id(purpose, position) << 32 | (limit - 1)


def keep_limit(probability: float) -> int:
    """floor(p * 2**32), at most 2**32."""
    return min(max(math.floor(probability * 4294967296.0), 0), 1 << 32)


@dataclass(frozen=True)
class Words:
    """Where a rule's random words come from, as kernels take it."""

    key: int = 0
    tensor_low: int = 0
    offset: int = 0

    @classmethod
    def of(cls, rule: SparsifyRule) -> Words:
        """Those of a rule."""
        high = (rule.seed >> 32 ^ rule.tensor_id >> 32) & 0xFFFFFFFF
        key = signed(high << 32 | rule.seed & 0xFFFFFFFF)
        return cls(key, rule.tensor_id & 0xFFFFFFFF, rule.offset)

    @property
    def arguments(self) -> tuple[int, int, int]:
        """In the kernels' order."""
        return self.key, self.tensor_low, self.offset

    @property
    def fours(self) -> bool:
        """Whether each counter serves four neighbours of a tile."""
        return self.offset % 4 == 0


@dataclass(frozen=True)
class Given:
    """A rule as kernels take it. stride: numbers in a row of `ties_before`, or bytes in one of `masks`."""

    method: int
    tensors: tuple[Tensor, ...]
    stride: int
    words: Words
    draws: list[int]

    @classmethod
    def of(cls, rule: SparsifyRule, models: int) -> Given:
        """A rule other than "della", whose masks must have been made."""
        if rule.method == "band":
            assert rule.bounds is not None and rule.ties_before is not None
            tensors = (rule.bounds.contiguous(), rule.ties_before.contiguous())
            return cls(METHODS["band"], tensors, rule.ties_before.shape[2], Words(), [0] * models)
        if rule.method == "mask":
            assert rule.masks is not None
            return cls(METHODS["mask"], (rule.masks.contiguous(),), rule.masks.shape[1], Words(), [0] * models)
        if rule.method == "bernoulli":
            pairs = zip(rule.positions, rule.density)
            draws = [draw(random.BERNOULLI, position, keep_limit(density)) for position, density in pairs]
            return cls(METHODS["bernoulli"], (), 1, Words.of(rule), draws)
        return cls(METHODS["none"], (), 1, Words(), [0] * models)


def decided(base: Tensor | None, tensors: list[Tensor], rule: SparsifyRule, compute: torch.dtype) -> SparsifyRule:
    """The same rule, but what needs ranks within rows as masks."""
    if rule.method != "della":
        return rule
    return SparsifyRule("mask", masks=kept_masks(base, tensors, rule, compute))


def kept_masks(base: Tensor | None, tensors: list[Tensor], rule: SparsifyRule, compute: torch.dtype) -> Tensor:
    """What a rule keeps of each model's delta, as bits; see `fastmerge.ops.kept_masks`."""
    if rule.method == "della":
        from ...reference.sparsify import kept_masks as r
        return r(base, tensors, rule, compute)
    numel = tensors[0].numel()
    out = torch.empty(len(tensors), tiles(numel, 8), dtype=torch.uint8, device=tensors[0].device)
    _each_model(kernels.keep_bits, base, tensors, rule, compute, out)
    return out


def l1_sums(base: Tensor | None, tensors: list[Tensor], rule: SparsifyRule, compute: torch.dtype) -> Tensor:
    """Exact L1 masses of each model's delta, all and kept; see `fastmerge.ops.l1_sums`."""
    models, device = len(tensors), tensors[0].device
    copies = torch.zeros(models, 2, exact.COPIES.value, exact.ROW.value, dtype=torch.int64, device=device)
    _each_model(exact.add_l1, base, tensors, decided(base, tensors, rule, compute), compute, copies)
    out = torch.empty(models, 2, L1_LIMBS, dtype=torch.int64, device=device)
    launch(exact.carry, (2 * models,), device, copies, out, num_warps=1)
    return out


def _each_model(
    kernel: Any, base: Tensor | None, tensors: list[Tensor], rule: SparsifyRule, compute: torch.dtype, out: Tensor
) -> None:
    """Launch a kernel that takes one model in each program: once for each dtype that there is."""
    numel = tensors[0].numel()
    if numel == 0:
        return
    given = Given.of(rule, len(tensors))
    base = None if base is None else usable(base)
    size = block(BLOCK)
    span = min(TILES * size, TIE_BLOCK)
    for dtype in dict.fromkeys(x.dtype for x in tensors):
        models = [(i, usable(x)) for i, x in enumerate(tensors) if x.dtype == dtype]
        listed = [number for i, x in models for number in (x.data_ptr(), given.draws[i], i)]
        launch(
            kernel,
            (tiles(numel, span) * len(models),),
            out.device,
            base,
            table(listed, out.device),
            len(models),
            out,
            numel,
            given.tensors,
            given.stride,
            *given.words.arguments,
            METHOD=given.method,
            FOURS=given.words.fours,
            SUBTRACT=base is not None,
            COMPUTE=CODES[compute],
            SPAN=span,
            BLOCK=size,
            ALIGN=alignment(base, *(x for _, x in models)),
            DTYPE=TYPES[dtype],
        )


def count_nonfinite(x: Tensor) -> Tensor:
    """How many elements are NaN, and how many infinite; see `fastmerge.ops.count_nonfinite`."""
    out = torch.zeros(2, dtype=torch.int64, device=x.device)
    _look(kernels.count_nonfinite, usable(x), out)
    return out


def zero_nonfinite_(x: Tensor) -> None:
    """Set NaN and infinite elements of x to zero, in place; see `fastmerge.ops.zero_nonfinite_`."""
    within = usable(x)
    _look(kernels.zero_nonfinite, within)
    if within.data_ptr() != x.data_ptr():
        x.copy_(within.view(x.shape))


def _look(kernel: Any, x: Tensor, *out: Tensor) -> None:
    """Launch a kernel that looks for what is not finite."""
    size = block(LOOK_BLOCK)
    span = LOOK_TILES * size
    grid = (tiles(x.numel(), span),)
    launch(kernel, grid, x.device, x, *out, x.numel(), SPAN=span, BLOCK=size, ALIGN=alignment(x))
