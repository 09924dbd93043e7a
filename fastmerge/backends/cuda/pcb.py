"""PCB-Merging in CUDA C++: the functions of `fastmerge/reference/pcb.py`, with the same bits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ...reference.pcb import score_keys
from ..gpu import no_products, pairs, products, sorted_bounds
from ..limits import TooManyModelsError
from ..rule import L1_LIMBS, PcbRule
from .launch import Ref, address, compiled, inputs, place, ref, table

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

_VARIANTS = {"script": 0, "nlp": 0, "vision": 1, "vision_es": 2, "paper": 3}
_HALVES = 1 << 16

_RUN = 64
"""Neighbours that are sampled together."""
_SORTED = 1 << 16
"""The scores of rows of at most so many elements are kept and sorted."""
_SAMPLED_FROM = 1 << 20
"""Rows of fewer elements are not sampled: two sweeps over them take no longer than what a sample needs."""
_SAMPLED, _MOST_RUNS = 1 / 32, 1 << 13
"""A sample is at most this fraction of a row, and at most so many runs."""
_COLLECTED, _LEAST_COLLECTED = 64, 1 << 16
"""At most one in so many keys of a row is written down, or so many keys, but no more than one in sixteen. A sample of
2**19 elements leaves one in 200 to be."""
_LEAST, _MOST = -(1 << 31), (1 << 31) - 1
_Chunks = Iterable[tuple[Tensor | None, list[Tensor]]]


def _rows(base: Tensor | None, tensors: Sequence[Tensor]) -> tuple[Ref, bool, list[Ref], int]:
    """A chunk of n rows as kernels take it."""
    if len(tensors) > compiled.MOST_MODELS:
        raise TooManyModelsError(
            f"the cuda backend takes at most {compiled.MOST_MODELS} rows in PCB-Merging, not {len(tensors)}; "
            'use backend="triton".'
        )
    return inputs(base, list(tensors), torch.float32)[:4]


def _known(rule: PcbRule) -> tuple[int, int, int, int]:
    """What scores are made with, as kernels take it."""
    return _VARIANTS[rule.variant], address(rule.clip), address(rule.extremes), address(rule.means)


def pcb_scores(base: Tensor | None, tensors: list[Tensor], rule: PcbRule) -> Tensor:
    """Competition scores; see `fastmerge.ops.pcb_scores`."""
    rows, device = _rows(base, tensors), tensors[0].device
    out = torch.empty(len(tensors), tensors[0].numel(), dtype=torch.float32, device=device)
    compiled.pcb_scores(place(device), *rows, _known(rule), out.data_ptr())
    return out


def pcb_window_(
    base: Tensor | None, tensors: list[Tensor], rule: PcbRule, low: list[int], counts: Tensor, highest: Tensor
) -> None:
    """Count scores past and inside a window of keys; see `fastmerge.ops.pcb_window_`."""
    rows, device = _rows(base, tensors), tensors[0].device
    first = table(low, device)
    window = first.data_ptr(), counts.shape[1] - 1, counts.data_ptr(), highest.data_ptr()
    compiled.pcb_window(place(device), *rows, _known(rule), *window)


def pcb_histogram(base: Tensor | None, tensors: list[Tensor], rule: PcbRule, prefix: list[int]) -> Tensor:
    """Counts of the high or the low half of score keys; see `fastmerge.ops.pcb_histogram`."""
    rows, device = _rows(base, tensors), tensors[0].device
    out = torch.zeros(len(tensors), _HALVES, dtype=torch.int64, device=device)
    wanted = table(prefix, device)
    compiled.pcb_histogram(place(device), *rows, _known(rule), wanted.data_ptr(), out.data_ptr(), 0, 0)
    return out


def pcb_extremes(base: Tensor | None, tensors: list[Tensor]) -> Tensor:
    """The least and the greatest product of each pair of deltas; see `fastmerge.ops.pcb_extremes`."""
    rows, device = _rows(base, tensors), tensors[0].device
    ordered = no_products(len(tensors), device)
    compiled.pcb_extremes(place(device), *rows, ordered.data_ptr())
    return products(ordered)


def pcb_sums(base: Tensor | None, tensors: list[Tensor], rule: PcbRule) -> Tensor:
    """Exact sums of the exponentials that scores are divided by; see `fastmerge.ops.pcb_sums`."""
    rows, device = _rows(base, tensors), tensors[0].device
    out = torch.zeros(len(tensors) + pairs(len(tensors)), L1_LIMBS, dtype=torch.int64, device=device)
    compiled.pcb_sums(place(device), *rows, _known(rule), out.data_ptr())
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
    weighed = torch.tensor(weights, dtype=torch.float32).tolist()
    given = _known(rule), address(rule.thresholds), weighed, ref(out), address(scale)
    compiled.pcb_apply(place(out.device), *_rows(base, tensors), *given)


# -- whole rows -------------------------------------------------------------------------------------------------------


def pcb_score_bounds(chunks: _Chunks, rule: PcbRule, ranks: list[int]) -> tuple[Tensor, Tensor]:
    """The keys of whole rows' scores at these ranks, and their highest keys, int64[n] each; nothing waits for the GPU.

    chunks: a row's elements in pieces, (base, tensors); gone through several times. ranks: one for each row, from 1,
    the highest score, to the number of elements.
    """
    sizes = [tensors[0].numel() for _, tensors in chunks]
    numel = sum(sizes)
    device = next(tensors[0].device for _, tensors in chunks)
    if numel <= _SORTED:
        return _sorted(chunks, rule, ranks)
    rank = table(ranks, device)
    highest = torch.zeros_like(rank)
    if numel < _SAMPLED_FROM:
        return _descent(chunks, rule, rank, highest, None), highest
    window = _likely_window(chunks, rule, ranks, sizes, capacity := _capacity(numel))
    found, missing = _among_collected(chunks, rule, rank, window, capacity, highest)
    # These sweeps are launched in any case, and end at once where no row is missing.
    return torch.where(found < 0, _descent(chunks, rule, rank, highest, missing), found), highest


def _capacity(numel: int) -> int:
    """How many keys of a row there is room for."""
    return max(1, numel // _COLLECTED, min(numel // 16, _LEAST_COLLECTED))


def _sorted(chunks: _Chunks, rule: PcbRule, ranks: list[int]) -> tuple[Tensor, Tensor]:
    """The keys at these ranks and the highest ones of rows that are short enough to keep their scores."""
    scores = torch.cat([pcb_scores(base, tensors, rule) for base, tensors in chunks], dim=1)
    return sorted_bounds(score_keys(scores), ranks)


def _descent(chunks: _Chunks, rule: PcbRule, rank: Tensor, highest: Tensor, missing: Tensor | None) -> Tensor:
    """The keys at these ranks, one half after the other, in two sweeps over everything."""
    prefix, left = torch.full_like(rank, -1), rank.clone()
    for _ in range(2):
        counts = rank.new_zeros(len(rank), _HALVES)
        for base, tensors in chunks:
            given = prefix.data_ptr(), counts.data_ptr(), highest.data_ptr(), address(missing)
            compiled.pcb_histogram(place(rank.device), *_rows(base, tensors), _known(rule), *given)
        compiled.pcb_pick(place(rank.device), len(rank), counts.data_ptr(), prefix.data_ptr(), left.data_ptr())
    return prefix


def _likely_window(chunks: _Chunks, rule: PcbRule, ranks: list[int], sizes: list[int], capacity: int) -> Tensor:
    """Between which two keys, int32[n, 2] that order as keys do, each rank must lie by a sample.

    As `choose_window` has it: six standard errors to either side, judged by how much runs of neighbours differ, but no
    more than there is room for. A guess, which the counts will prove or not.
    """
    numel, models = sum(sizes), len(ranks)
    share = min(_MOST_RUNS / numel, _SAMPLED / _RUN)
    runs = [min(size // _RUN, math.ceil(size * share)) for size in sizes]
    size = sum(runs) * _RUN
    device = next(tensors[0].device for _, tensors in chunks)
    keys = torch.empty(models, size, dtype=torch.int32, device=device)
    first = 0
    for (base, tensors), count in zip(chunks, runs):
        if count:
            target = keys.data_ptr(), size, count, first
            compiled.pcb_sample(place(device), *_rows(base, tensors), _known(rule), *target)
        first += count
    if size == 0:
        return torch.tensor([_LEAST, _MOST], dtype=torch.int32).to(device).repeat(models, 1)
    places = table([min((numel - rank) * size // numel, size - 1) for rank in ranks], device)
    most = int(0.8 * size * capacity / numel / 2)
    window = torch.empty(models, 2, dtype=torch.int32, device=device)
    memory = torch.zeros(models, compiled.WINDOW_NUMBERS, dtype=torch.int32, device=device)
    given = keys.data_ptr(), size, places.data_ptr(), most, memory.data_ptr(), window.data_ptr()
    compiled.pcb_likely_window(place(device), models, *given)
    return window


def _among_collected(
    chunks: _Chunks, rule: PcbRule, rank: Tensor, window: Tensor, capacity: int, highest: Tensor
) -> tuple[Tensor, Tensor]:
    """The keys at these ranks, in one sweep, -1 where the window does not hold one, and how often that is.

    capacity: how many keys of a row there is room for.
    """
    models, device = len(rank), rank.device
    where = place(device)
    collected = torch.zeros(models, 4, dtype=torch.int64, device=device)
    keys = torch.empty(models, capacity, dtype=torch.int32, device=device)
    for base, tensors in chunks:
        given = window.data_ptr(), collected.data_ptr(), highest.data_ptr(), keys.data_ptr(), capacity
        compiled.pcb_collect(where, *_rows(base, tensors), _known(rule), *given)
    prefix, left = torch.full_like(rank, -1), rank - collected[:, 0] - collected[:, 1]
    for _ in range(2):
        counts = rank.new_zeros(models, _HALVES)
        among = keys.data_ptr(), capacity, collected.data_ptr(), prefix.data_ptr(), counts.data_ptr()
        compiled.pcb_collected_halves(where, models, *among)
        compiled.pcb_pick(where, models, counts.data_ptr(), prefix.data_ptr(), left.data_ptr())
    found, missing = torch.empty_like(rank), torch.zeros(1, dtype=torch.int32, device=device)
    known = rank.data_ptr(), window.data_ptr(), collected.data_ptr(), capacity, prefix.data_ptr()
    compiled.pcb_settle(where, models, *known, found.data_ptr(), missing.data_ptr())
    return found, missing
