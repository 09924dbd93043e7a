"""Selection in CUDA C++: the functions of `fastmerge/reference/select.py`, with the same bits, for many tensors.

Thresholds stay on the GPU, from the first histogram to the mask: the host waits for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import BackendError
from ...reference.select import hashed_mask
from ..rule import TIE_BLOCK
from . import launch
from .launch import CODES, NOTHING, address, compiled, place, ref

__all__ = [
    "abs_histogram",
    "hashed_mask",
    "key_histogram",
    "key_window_",
    "kth_magnitude",
    "magnitude_bounds",
    "magnitude_bounds_many",
    "tie_counts",
    "topk_mask",
]

SMALL = TIE_BLOCK
"""Elements up to which one block of threads takes all of a tensor, again and again, out of the cache. No more than a
tie block has: no ties come before it then."""

WIDE = CODES[torch.float32]
"""The kind of keys that have 31 bits; the other kinds are the codes of 16-bit dtypes, whose keys have 15."""

DIGITS = ((20, 11), (10, 10), (0, 10))
"""(lowest bit, bits) of each digit of a wide key, the leading one first."""

NARROW = (0, 15)
"""A narrow key: a single digit."""

ROW = 1 << 11
"""Counts of two ranks' digits."""


def _kind(base: Tensor | None, tensors: Sequence[Tensor], compute: torch.dtype) -> int:
    """How the keys of these models' deltas are represented: by no more bits than can differ."""
    if compute != torch.float32:
        return CODES[compute]
    dtypes = {x.dtype for x in tensors}
    return WIDE if base is not None or len(dtypes) > 1 else CODES[dtypes.pop()]


def _tie_blocks(numel: int) -> int:
    return max(1, -(-numel // TIE_BLOCK))


@dataclass(frozen=True)
class _Work:
    """Tensors as kernels go through them, and the table that describes them there where there are several."""

    described: Any
    table: Tensor | None
    device: torch.device
    kind: int
    rows: int
    models: int
    blocks: int

    @property
    def place(self) -> tuple[int, int]:
        """Where its kernels run."""
        return place(self.device)

    @classmethod
    def of(
        cls,
        bases: Sequence[Tensor] | None,
        tensors: Sequence[Sequence[Tensor]],
        numbers: Sequence[Sequence[int]],
        kind: int,
        compute: torch.dtype,
        *,
        together: bool = False,
        results: Sequence[tuple[int, int]] | None = None,
        blocks_results: int | None = None,
    ) -> _Work:
        """tensors: [T][n]. numbers: [T][2 n], each model's ranks, or a number, and 0. results: where these tensors are
        in results that have more: [T] of the tensor's place and its first tie block there.
        """
        models = tensors[0]
        lengths = [row[0].numel() for row in tensors]
        blocks = [_tie_blocks(numel) for numel in lengths]
        if len(models) > compiled.MOST_MODELS:
            raise BackendError(
                f"the cuda backend takes up to {compiled.MOST_MODELS} models at once, not {len(models)}; "
                'use backend="triton".'
            )
        device = models[0].device
        table = None
        if len(tensors) > 1 or results is not None:
            words: list[int] = []
            before = 0
            for t, row in enumerate(tensors):
                base = 0 if bases is None else bases[t].data_ptr()
                index, first = (t, before) if results is None else results[t]
                words += [x.data_ptr() for x in row]
                words += [*numbers[t], base, lengths[t], before, first, index]
                before += blocks[t]
            tensor_of = torch.arange(len(tensors)).repeat_interleave(torch.tensor(blocks))
            table = launch.table(torch.cat((tensor_of, torch.tensor(words))), device)
        described = compiled.Work(
            # The address of one without elements would say that there is none.
            NOTHING if bases is None else ref(max(bases, key=Tensor.numel)),
            bases is not None,
            [ref(x) for x in models],
            lengths[0],
            CODES[compute],
            numbers[0],
            address(table),
            len(tensors),
            sum(blocks),
            sum(blocks) if blocks_results is None else blocks_results,
            kind,
            together,
        )
        return cls(
            described, table, device, kind, 1 if together else len(tensors) * len(models), len(models), sum(blocks)
        )

    def choose(
        self, digit: tuple[int, int], state: Tensor, counts: Tensor, bounds: Tensor | None, magnitude: Tensor | None
    ) -> None:
        """Choose the digit of each rank; bounds, or the one magnitude, where it is the last."""
        compiled.choose_digit(
            self.place, self.described, *digit, address(state), address(counts), address(bounds), address(magnitude)
        )


def _state(work: _Work) -> tuple[Tensor, Tensor]:
    """Each rank's prefix and what remains of the rank, to be written; and counts."""
    row = 1 << NARROW[1] if work.kind != WIDE else ROW
    state = torch.empty(work.rows, 2, 2, dtype=torch.int64, device=work.device)
    return state, torch.zeros(work.rows, row, dtype=torch.int64, device=work.device)


# -- order statistics ------------------------------------------------------------------------------------------------


def _large_bounds(work: _Work, ranks: int, bounds: Tensor, ties_before: Tensor) -> None:
    """The bounds of large tensors, by passes over all of them. ranks: how many of the two need be found anywhere."""
    state, counts = _state(work)
    found = None
    if work.kind != WIDE:
        compiled.count_keys(work.place, work.described, *NARROW, True, address(counts))
        work.choose(NARROW, state, counts, bounds, None)
        compiled.count_ties(work.place, work.described, address(bounds), address(ties_before))
    else:
        shape = (work.models, ranks, work.blocks, 1 << DIGITS[-1][1])
        found = torch.zeros(shape, dtype=torch.int32, device=work.device)
        for digit in DIGITS:
            kept = found if digit is DIGITS[-1] else None
            compiled.count_digit(
                work.place, work.described, *digit, address(state), address(counts), address(kept), ranks
            )
            work.choose(digit, state, counts, bounds, None)
    compiled.sum_ties(work.place, work.described, address(bounds), address(found), ranks, address(ties_before))


def _bounds(
    bases: Sequence[Tensor] | None,
    tensors: Sequence[Sequence[Tensor]],
    first: Sequence[Sequence[int]],
    last: Sequence[Sequence[int]],
    compute: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`magnitude_bounds_many` of tensors whose keys are of one kind."""
    models, device = tensors[0], tensors[0][0].device
    kind = _kind(None if bases is None else bases[0], models, compute)
    lengths = [row[0].numel() for row in tensors]
    ranks = [[rank for pair in zip(*both) for rank in pair] for both in zip(first, last)]
    begins = [0]
    for numel in lengths:
        begins.append(begins[-1] + _tie_blocks(numel))
    bounds = torch.empty(len(tensors), len(models), 2, 2, dtype=torch.int64, device=device)
    # Of narrow keys ties are counted in place: they are added to what is there.
    new = torch.empty if kind == WIDE else torch.zeros
    ties_before = new((len(models), 2, begins[-1]), dtype=torch.int64, device=device)
    small = [t for t, numel in enumerate(lengths) if numel <= SMALL]
    large = [t for t, numel in enumerate(lengths) if numel > SMALL]
    for part in (large, small):
        if not part:
            continue
        work = _Work.of(
            None if bases is None else [bases[t] for t in part],
            [tensors[t] for t in part],
            [ranks[t] for t in part],
            kind,
            compute,
            results=None if len(tensors) == 1 else [(t, begins[t]) for t in part],
            blocks_results=begins[-1],
        )
        if part is small:
            compiled.bounds_of_small(work.place, work.described, address(bounds), address(ties_before))
        else:
            both = any(0 < rank < lengths[t] for t in part for rank in first[t])
            _large_bounds(work, 2 if both else 1, bounds, ties_before)
    return bounds, ties_before


def magnitude_bounds(
    base: Tensor | None, tensors: list[Tensor], first: list[int], last: list[int], compute: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The cuts at two ranks of each model's delta; see `fastmerge.ops.magnitude_bounds`."""
    bases = None if base is None else [base]
    kinds = [_kind(base, [x], compute) for x in tensors]
    groups = [[i for i, kind in enumerate(kinds) if kind == wanted] for wanted in dict.fromkeys(kinds)]
    parts = [
        _bounds(bases, [[tensors[i] for i in group]], [[first[i] for i in group]], [[last[i] for i in group]], compute)
        for group in groups
    ]
    if len(parts) == 1:
        bounds, ties_before = parts[0]
        return bounds[0], ties_before
    where = {model: (part, i) for part, group in enumerate(groups) for i, model in enumerate(group)}
    order = [where[model] for model in range(len(tensors))]
    return (
        torch.stack([parts[part][0][0, i] for part, i in order]),
        torch.stack([parts[part][1][i] for part, i in order]),
    )


def magnitude_bounds_many(
    base: list[Tensor] | None,
    tensors: list[list[Tensor]],
    first: list[list[int]],
    last: list[list[int]],
    compute: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`magnitude_bounds` of many tensors by as many launches as for two.

    base: T tensors. tensors: for each of n models its T tensors; contiguous. first, last: [T][n] ranks.
    Returns bounds int64[T, n, 2, 2] and ties_before int64[n, 2, blocks], in which the blocks of a tensor, max(1,
    ceil(N / 65536)), follow those of the one before.
    Errors: ValueError where the models, or the bases, do not have a single dtype; take the tensors one by one then.
    """
    for name, group in (("base", base or []), ("tensors", [x for model in tensors for x in model])):
        if len({x.dtype for x in group}) > 1:
            raise ValueError(f"{name} has several dtypes; take its tensors one by one")
    return _bounds(base, list(zip(*tensors)), first, last, compute)


def _shards(shards: Sequence[Tensor], kind: int, k: int) -> _Work:
    """Shards of one dtype as one vector, of which the k-th largest magnitude is looked for."""
    return _Work.of(None, [[x] for x in shards], [[k, 0]] * len(shards), kind, torch.float32, together=True)


def kth_magnitude(shards: list[Tensor], k: int) -> Tensor:
    """The k-th largest magnitude; see `fastmerge.ops.kth_magnitude`."""
    filled = [shard for shard in shards if shard.numel()]
    kind = _kind(None, filled, torch.float32)
    parts = [
        _shards([x for x in filled if x.dtype == dtype], kind, k) for dtype in dict.fromkeys(x.dtype for x in filled)
    ]
    state, counts = _state(parts[0])
    out = torch.empty((), dtype=torch.float32, device=filled[0].device)
    for digit in (NARROW,) if kind != WIDE else DIGITS:
        for work in parts:
            if kind != WIDE:
                compiled.count_keys(work.place, work.described, *digit, True, address(counts))
            else:
                compiled.count_digit(work.place, work.described, *digit, address(state), address(counts), 0, 2)
        parts[0].choose(digit, state, counts, None, out)
    return out


# -- histograms ------------------------------------------------------------------------------------------------------


def abs_histogram(shards: list[Tensor], bins: int) -> Tensor:
    """Counts of magnitude keys; see `fastmerge.ops.abs_histogram`."""
    counts = torch.zeros(bins, dtype=torch.int64, device=shards[0].device)
    filled = [shard for shard in shards if shard.numel()]
    if filled:
        work = _shards(filled, CODES[filled[0].dtype], 0)
        used = bins.bit_length() - 1
        shift = (31 if work.kind == WIDE else 15) - used
        compiled.count_keys(work.place, work.described, shift, used, True, address(counts))
    return counts


def _chunk(base: Tensor | None, tensors: list[Tensor], values: list[int], compute: torch.dtype) -> _Work:
    """A chunk of n models, with a number for each, and wide keys."""
    numbers = [number for value in values for number in (value, 0)]
    return _Work.of(None if base is None else [base], [tensors], [numbers], WIDE, compute)


def key_histogram(base: Tensor | None, tensors: list[Tensor], prefix: list[int], compute: torch.dtype) -> Tensor:
    """Counts of the high or the low part of delta keys; see `fastmerge.ops.key_histogram`."""
    top = prefix[0] < 0
    shift, width = (15, 16) if top else (0, 15)
    counts = torch.zeros(len(tensors), 1 << width, dtype=torch.int64, device=tensors[0].device)
    # What begins with no bits at all begins with 0.
    work = _chunk(base, tensors, [0] * len(tensors) if top else prefix, compute)
    compiled.count_keys(work.place, work.described, shift, width, False, address(counts))
    return counts


def key_window_(
    base: Tensor | None, tensors: list[Tensor], low: list[int], compute: torch.dtype, counts: Tensor
) -> None:
    """Count keys past and inside a window of keys; see `fastmerge.ops.key_window_`."""
    work = _chunk(base, tensors, low, compute)
    compiled.count_window(work.place, work.described, counts.shape[1] - 1, address(counts))


# -- ties and masks --------------------------------------------------------------------------------------------------


def tie_counts(base: Tensor | None, tensors: list[Tensor], bounds: Tensor, compute: torch.dtype) -> Tensor:
    """How many elements of each tie block equal a bound that splits equals; see `fastmerge.ops.tie_counts`."""
    bases = None if base is None else [base]
    work = _Work.of(bases, [tensors], [[]], _kind(base, tensors, compute), compute)
    out = torch.zeros(len(tensors), 2, work.blocks, dtype=torch.int64, device=work.device)
    compiled.count_ties(work.place, work.described, address(bounds), address(out))
    return out


def topk_mask(x: Tensor, bounds: Tensor, ties_before: Tensor) -> Tensor:
    """Which elements lie between the two bounds; see `fastmerge.ops.topk_mask`."""
    out = torch.empty(x.shape, dtype=torch.bool, device=x.device)
    compiled.mask_band(place(x.device), ref(x), x.numel(), address(bounds), address(ties_before), address(out))
    return out
