"""PCB-Merging on GPUs; see `fastmerge.ops.pcb`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..._triton import pcb as kernels
from ...reference.pcb import score_keys
from ..gpu import no_products, pairs, products, sorted_bounds
from ..rule import L1_LIMBS, PcbRule
from .launch import CODES, INTERPRETED, block, float_bits, launch, table, tiles

__all__ = [
    "pcb_apply",
    "pcb_extremes",
    "pcb_histogram",
    "pcb_score_bounds",
    "pcb_scores",
    "pcb_sums",
    "pcb_window_",
    "score_keys",
]

BY_VALUE = 8
"""Up to so many rows a kernel takes them as arguments and holds all of them in registers."""

_VARIANTS = {"script": 0, "nlp": 0, "vision": 1, "vision_es": 2, "paper": 3}
_MIXED = 3
_WARPS = 2 if torch.version.hip else 4
_BLOCK = 4096 if INTERPRETED else 128
"""Elements of a tile: one for each thread. In the interpreter a program of many takes as long as one of few."""
_TILES = 16
"""Tiles of a program: enough that starting one, and what it adds up in the end, does not count."""

_RUN = 64
"""Neighbours that are sampled together."""
_SORTED = 1 << 16
"""The scores of rows of at most so many elements are kept and sorted."""
_SAMPLED_FROM = 1 << 22
"""Rows of fewer elements are not sampled: four sweeps over them take no longer than what a sample needs."""
_SAMPLED, _MOST_RUNS = 1 / 32, 1 << 13
"""A sample is at most this fraction of a row, and at most so many runs."""
_COLLECTED = 64
"""At most one in so many keys of a row is written down: 3 % of the memory of 16-bit rows. A sample of 2**19 elements
leaves one in 200 to be."""
_COLLECTED_BLOCK = 2048
_LEAST, _MOST = -(1 << 31), (1 << 31) - 1
_DIGITS = (24, 16, 8, 0)
_Chunks = Iterable[tuple[Tensor | None, list[Tensor]]]


def _shift(models: int) -> float:
    """What is subtracted from n z^2 before exp."""
    return models / 2 if models <= 160 else float(models - 80)


class _Rows:
    """A chunk of n rows as kernels take it."""

    def __init__(self, base: Tensor | None, tensors: Sequence[Tensor], by_value: int = BY_VALUE) -> None:
        self.models = len(tensors)
        self.numel = tensors[0].numel()
        self.device = tensors[0].device
        self.by_value = self.models <= by_value
        if self.by_value:
            # Of arguments Triton itself knows the types.
            self.dtype = 0
            self.inputs: tuple[Any, ...] = base, tuple(tensors), None
        else:
            mixed = len({x.dtype for x in tensors}) > 1
            self.dtype = _MIXED if mixed else CODES[tensors[0].dtype]
            codes = [CODES[x.dtype] for x in tensors] if mixed else []
            addresses = [x.data_ptr() for x in tensors]
            self.inputs = base, (), table([*addresses, *codes], self.device) if self.numel else None

    def sweep(
        self, kernel: Any, *arguments: Any, wider: int = 1, longer: int = 1, elements: int | None = None, **more: Any
    ) -> None:
        """Launch a kernel over all elements, or so many.

        wider, longer: tiles are so many times as wide as usual, and a program has so many times as many.
        """
        size, each = block(_BLOCK * (1 if INTERPRETED else wider)), _TILES * longer
        grid = (tiles(self.numel if elements is None else elements, size * each),)
        constants = {"DTYPE": self.dtype, "BLOCK": size, "TILES": each, **more}
        launch(kernel, grid, self.device, *self.inputs, *arguments, num_warps=_WARPS, **constants)

    def scored(self, kernel: Any, rule: PcbRule, *arguments: Any, elements: int | None = None) -> None:
        """Launch a kernel that makes scores over all elements, or so many."""
        edges = rule.extremes if rule.variant == "paper" else rule.clip
        known = edges, rule.means, self.models, _shift(self.models), self.numel
        self.sweep(kernel, *known, *arguments, elements=elements, VARIANT=_VARIANTS[rule.variant])


def pcb_scores(base: Tensor | None, tensors: list[Tensor], rule: PcbRule) -> Tensor:
    """Competition scores; see `fastmerge.ops.pcb_scores`."""
    rows = _Rows(base, tensors)
    out = torch.empty(rows.models, rows.numel, dtype=torch.float32, device=rows.device)
    rows.scored(kernels.pcb_scores, rule, out)
    return out


def pcb_window_(
    base: Tensor | None, tensors: list[Tensor], rule: PcbRule, low: list[int], counts: Tensor, highest: Tensor
) -> None:
    """Count scores past and inside a window of keys; see `fastmerge.ops.pcb_window_`."""
    rows = _Rows(base, tensors)
    if rows.numel:
        rows.scored(kernels.pcb_window, rule, table(low, rows.device), counts, highest, counts.shape[1] - 1)


def pcb_histogram(base: Tensor | None, tensors: list[Tensor], rule: PcbRule, prefix: list[int]) -> Tensor:
    """Counts of the high or the low half of score keys; see `fastmerge.ops.pcb_histogram`."""
    rows = _Rows(base, tensors)
    out = torch.zeros(rows.models, 65536, dtype=torch.int64, device=rows.device)
    if rows.numel:
        rows.scored(kernels.pcb_histogram, rule, table(prefix, rows.device), out)
    return out


def pcb_extremes(base: Tensor | None, tensors: list[Tensor]) -> Tensor:
    """The least and the greatest product of each pair of deltas; see `fastmerge.ops.pcb_extremes`."""
    rows = _Rows(base, tensors)
    ordered = no_products(rows.models, rows.device)
    rows.sweep(kernels.pcb_extremes, rows.models, rows.numel, ordered, longer=4)
    return products(ordered)


def pcb_sums(base: Tensor | None, tensors: list[Tensor], rule: PcbRule) -> Tensor:
    """Exact sums of the exponentials that scores are divided by; see `fastmerge.ops.pcb_sums`."""
    rows = _Rows(base, tensors, by_value=0)
    sums = rows.models + pairs(rows.models)
    out = torch.zeros(sums, L1_LIMBS, dtype=torch.int64, device=rows.device)
    rows.sweep(
        kernels.pcb_sums, rule.extremes, None, rows.models, _shift(rows.models), rows.numel, out, wider=2, registers=64
    )
    launch(kernels.pcb_carry, (sums,), rows.device, out, num_warps=1)
    return out


def pcb_apply(
    base: Tensor | None,
    tensors: list[Tensor],
    rule: PcbRule,
    weights: list[float],
    out: Tensor,
    scale: Tensor | None,
) -> None:
    """The merge of one chunk into `out`, and the shares into `scale`; see `fastmerge.ops.pcb_apply`."""
    rows = _Rows(base, tensors)
    if not rows.numel:
        return
    weighed: Any = tuple(torch.tensor(weights, dtype=torch.float32).tolist())
    if not rows.by_value:
        weighed = table([float_bits(weight) for weight in weights], rows.device)
    rows.scored(kernels.pcb_apply, rule, rule.thresholds, weighed, out, scale)


# -- whole rows -------------------------------------------------------------------------------------------------------


def pcb_score_bounds(
    chunks: Iterable[tuple[Tensor | None, list[Tensor]]], rule: PcbRule, ranks: list[int]
) -> tuple[Tensor, Tensor]:
    """The keys of whole rows' scores at these ranks, and their highest keys, int64[n] each; nothing waits for the GPU.

    chunks: a row's elements in pieces, (base, tensors); gone through several times. ranks: one for each row, from 1,
    the highest score, to the number of elements.
    """
    sizes = [tensors[0].numel() for _, tensors in chunks]
    device = next(tensors[0].device for _, tensors in chunks)
    if sum(sizes) <= _SORTED:
        return _sorted(chunks, rule, ranks)
    rank = table(ranks, device)[: len(ranks)]
    highest = torch.zeros_like(rank)
    if sum(sizes) < _SAMPLED_FROM:
        missing = torch.ones(1, dtype=torch.int32, device=device)
        return _descent(chunks, rule, rank, highest, missing), highest
    window = _likely_window(chunks, rule, ranks, sizes)
    found, missing = _among_collected(chunks, rule, rank, window, sum(sizes) // _COLLECTED, highest)
    # These sweeps are launched in any case, and end at once where no row is missing.
    return torch.where(found < 0, _descent(chunks, rule, rank, highest, missing), found), highest


def _sorted(chunks: _Chunks, rule: PcbRule, ranks: list[int]) -> tuple[Tensor, Tensor]:
    """The keys at these ranks and the highest ones of rows that are short enough to keep their scores."""
    scores = torch.cat([pcb_scores(base, tensors, rule) for base, tensors in chunks], dim=1)
    return sorted_bounds(score_keys(scores), ranks)


def _descent(chunks: _Chunks, rule: PcbRule, rank: Tensor, highest: Tensor, missing: Tensor) -> Tensor:
    """The keys at these ranks, digit by digit, in four sweeps over everything."""
    prefix, rank = torch.zeros_like(rank), rank.clone()
    for bits in _DIGITS:
        counts = rank.new_zeros(len(rank), 256)
        for base, tensors in chunks:
            _Rows(base, tensors).scored(kernels.pcb_digits, rule, prefix, counts, highest, bits, missing)
        launch(kernels.pcb_pick, (len(rank),), rank.device, counts, prefix, rank)
    return prefix


def _likely_window(chunks: _Chunks, rule: PcbRule, ranks: list[int], sizes: list[int]) -> Tensor:
    """Between which two shifted keys, int32[n, 2], each rank must lie by a sample.

    As `choose_window` has it: six standard errors to either side, judged by how much runs of neighbours differ, but no
    more than there is room for. A guess, which the counts will prove or not.
    """
    numel = sum(sizes)
    share = min(_MOST_RUNS / numel, _SAMPLED / _RUN)
    runs = [min(size // _RUN, math.ceil(size * share)) for size in sizes]
    size = sum(runs) * _RUN
    first = 0
    keys: Tensor | None = None
    for (base, tensors), count in zip(chunks, runs):
        if keys is None:
            keys = torch.empty(len(ranks), size, dtype=torch.int32, device=tensors[0].device)
        if count:
            rows = _Rows(base, tensors)
            rows.scored(kernels.pcb_sample, rule, keys, count, first, size, elements=count * _RUN)
        first += count
    assert keys is not None
    most = int(0.8 * size / _COLLECTED / 2)
    windows = []
    for row, rank in zip(keys, ranks):
        place = min((numel - rank) * size // numel, size - 1)
        ordered = row.sort().values
        above = (row.view(-1, _RUN) >= ordered[place]).sum(dim=1).to(torch.float32)
        reach = (6 * above.std() * math.sqrt(len(above)) + 8).clamp(max=most).to(torch.int64)
        ends = torch.stack([place - reach, place + reach])
        beyond = torch.where(ends < 0, _LEAST, _MOST).to(torch.int32)
        windows.append(torch.where((ends < 0) | (ends >= size), beyond, ordered[ends.clamp(0, size - 1)]))
    return torch.stack(windows)


def _among_collected(
    chunks: _Chunks, rule: PcbRule, rank: Tensor, window: Tensor, capacity: int, highest: Tensor
) -> tuple[Tensor, Tensor]:
    """The keys at these ranks, in one sweep, -1 where the window does not hold one, and how often that is.

    capacity: how many keys of a row there is room for.
    """
    models, device = len(rank), rank.device
    collected = torch.zeros(models, 4, dtype=torch.int64, device=device)
    keys = torch.empty(models, capacity, dtype=torch.int32, device=device)
    for base, tensors in chunks:
        _Rows(base, tensors).scored(kernels.pcb_collect, rule, window, collected, highest, keys, capacity)
    prefix, left = torch.zeros_like(rank), rank - collected[:, 0] - collected[:, 1]
    size = block(_COLLECTED_BLOCK)
    for bits in _DIGITS:
        counts = rank.new_zeros(models, 256)
        among = keys, collected, capacity, prefix, counts, bits
        launch(kernels.pcb_collected_digits, (tiles(capacity, size), models), device, *among, BLOCK=size)
        launch(kernels.pcb_pick, (models,), device, counts, prefix, left)
    found, missing = torch.empty_like(rank), torch.zeros(1, dtype=torch.int32, device=device)
    arguments = rank, window, collected, capacity, prefix, found, missing
    launch(kernels.pcb_settle, (models,), device, *arguments, num_warps=1)
    return found, missing
