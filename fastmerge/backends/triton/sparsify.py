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
from ..gpu import keep_limit
from ..lists import signed
from ..rule import L1_LIMBS, TIE_BLOCK, SparsifyRule
from .launch import CODES, INTERPRETED, block, flat, launch, table, tiles

__all__ = ["count_nonfinite", "kept_masks", "l1_sums", "zero_nonfinite_"]

BLOCK = 1024
"""Elements per tile: eight for each thread, one load of 16 bytes where they are 16-bit numbers."""

TILES = 4
"""Tiles per program, which begin to be independent after what they share is known."""

PIECE = 512
"""Elements that a program takes at once where a cut between ties, or the end, lies in its tiles: few registers."""

CHUNK = 4096
"""Keys that one program sorts: more take more steps each, fewer have to be searched more often."""

MOST_CHUNKS = 16
"""Chunks of a row that each element is looked up in; longer rows are sorted as a whole, by PyTorch."""

SORTED = 1 << 24
"""Keys that are kept sorted at a time: 64 MB."""

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


def draw(purpose: int, position: int, limit: int) -> int:
    """A stream and the limit (up to 2**32) below which words keep, as kernels take them: see their `drawn`."""
    return -1 if limit <= 0 else random.stream_id(purpose, position) << 32 | (limit - 1)


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
    numel = tensors[0].numel()
    out = torch.empty(len(tensors), tiles(numel, 8), dtype=torch.uint8, device=tensors[0].device)
    if rule.method != "della":
        # Only bands look at the values.
        base = base if rule.method == "band" else None
        registers = 80 if rule.method == "band" else None
        _each_model(kernels.keep_bits, base, tensors, Given.of(rule, len(tensors)), compute, out, registers=registers)
        return out
    ranked = []
    draws = {}
    for i, (density, epsilon, position) in enumerate(zip(rule.density, rule.epsilon, rule.positions)):
        if 0 < density < 1 and rule.row_length > 1:
            ranked.append(i)
        else:
            # All, nothing, or a row of one element, whose rank is the middle one.
            limit = (1 << 32) * (density >= 1)
            if 0 < density < 1:
                limit = keep_limit((density - epsilon) + (2 * epsilon) * 0.5)
            draws[i] = draw(random.DELLA, position, limit)
    if draws:
        given = Given(METHODS["bernoulli"], (), 1, Words.of(rule), [draws.get(i, 0) for i in range(len(tensors))])
        _each_model(kernels.keep_bits, None, tensors, given, compute, out, list(draws))
    if ranked and numel:
        base = None if base is None else usable(base)
        for dtype in dict.fromkeys(tensors[i].dtype for i in ranked):
            some = [i for i in ranked if tensors[i].dtype == dtype]
            _keep_by_rank(base, tensors, some, rule, compute, out)
    return out


def _keep_by_rank(
    base: Tensor | None,
    tensors: list[Tensor],
    ranked: list[int],
    rule: SparsifyRule,
    compute: torch.dtype,
    out: Tensor,
) -> None:
    """DELLA's masks of some models of one dtype, some rows at a time."""
    numel, length, device = tensors[0].numel(), rule.row_length, out.device
    chunk = min(block(CHUNK), 1 << (length - 1).bit_length())
    chunks = tiles(length, chunk)
    sort = chunks <= MOST_CHUNKS
    models = [usable(tensors[i]) for i in ranked]
    listed: list[int] = []
    for i, x in zip(ranked, models):
        density, epsilon = rule.density[i], rule.epsilon[i]
        stream = random.stream_id(random.DELLA, rule.positions[i])
        listed += [x.data_ptr(), _double_bits(density - epsilon), _double_bits(2 * epsilon), stream, i]
    numbers = table(listed, device)
    words = Words.of(rule)
    # In groups of eight rows, so that a group ends where a byte of the mask ends.
    some = max(1, SORTED // (8 * len(models) * chunks * chunk)) * 8
    shared = {"SUBTRACT": base is not None, "COMPUTE": CODES[compute], "DTYPE": TYPES[models[0].dtype]}
    for first in range(0, numel // length, some):
        rows = min(some, numel // length - first)
        together = max(1, CHUNK // 4 // chunk)
        keys = torch.empty(len(models), rows, chunks * chunk if sort else length, dtype=torch.int32, device=device)
        launch(
            kernels.sort_rows,
            (tiles(rows, together) * chunks * len(models),),
            device,
            base,
            numbers,
            len(models),
            keys,
            first * length,
            rows,
            length,
            chunks,
            ROWS=together,
            CHUNK=chunk,
            SORT=sort,
            num_warps=8,
            **shared,
        )
        if not sort:
            keys = keys.sort(dim=2).values
        size = block(BLOCK)
        parts = (chunks, chunk) if sort else (1, length)
        launch(
            kernels.keep_by_rank,
            (tiles(rows * length, size) * len(models),),
            device,
            base,
            numbers,
            len(models),
            keys,
            out,
            first * length,
            rows,
            length,
            *parts,
            1 << (parts[1] - 1).bit_length(),
            numel,
            *words.arguments,
            FOURS=(words.offset + first * length) % 4 == 0,
            BLOCK=size,
            **shared,
        )


def _double_bits(value: float) -> int:
    """The bits of a float64, for a table."""
    return int(torch.tensor(value, dtype=torch.float64).view(torch.int64))


def l1_sums(base: Tensor | None, tensors: list[Tensor], rule: SparsifyRule, compute: torch.dtype) -> Tensor:
    """Exact L1 masses of each model's delta, all and kept; see `fastmerge.ops.l1_sums`."""
    models, device = len(tensors), tensors[0].device
    copies = torch.zeros(models, 2, exact.COPIES.value, exact.ROW.value, dtype=torch.int64, device=device)
    given = Given.of(decided(base, tensors, rule, compute), models)
    registers = None if given.words.fours else 128
    _each_model(exact.add_l1, base, tensors, given, compute, copies, registers=registers)
    out = torch.empty(models, 2, L1_LIMBS, dtype=torch.int64, device=device)
    launch(exact.carry, (2 * models,), device, copies, out, num_warps=1)
    return out


def _each_model(
    kernel: Any,
    base: Tensor | None,
    tensors: list[Tensor],
    given: Given,
    compute: torch.dtype,
    out: Tensor,
    wanted: Sequence[int] | None = None,
    registers: int | None = None,
) -> None:
    """Launch a kernel that takes one model in each program: once for each dtype of the models that are wanted."""
    numel = tensors[0].numel()
    if numel == 0:
        return
    chosen = range(len(tensors)) if wanted is None else wanted
    base = None if base is None else usable(base)
    size = block(BLOCK)
    span = min(TILES * size, TIE_BLOCK)
    for dtype in dict.fromkeys(tensors[i].dtype for i in chosen):
        models = [(i, usable(tensors[i])) for i in chosen if tensors[i].dtype == dtype]
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
            registers=registers,
            METHOD=given.method,
            FOURS=given.words.fours,
            SUBTRACT=base is not None,
            COMPUTE=CODES[compute],
            SPAN=span,
            BLOCK=size,
            PIECE=size,
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
    constants = {"SPAN": span, "BLOCK": size, "PIECE": min(PIECE, size), "ALIGN": alignment(x)}
    launch(kernel, grid, x.device, x, *out, x.numel(), **constants)
