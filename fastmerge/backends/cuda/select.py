"""Selection in CUDA C++: the functions of `fastmerge/reference/select.py`, with the same bits, for many tensors.

Thresholds stay on the GPU, from the first histogram to the mask: the host waits for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...reference.select import hashed_mask
from ..gpu import bounds_by_group
from ..limits import TooManyModelsError
from ..lists import Lists, addresses, before
from ..rule import TIE_BLOCK
from . import launch
from .launch import CODES, NOTHING, Ref, address, compiled, place, ref

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
    ) -> _Work:
        """tensors: [T][n]. numbers: [T][2 n], each model's ranks, or a number, and 0."""
        blocks = [_tie_blocks(row[0].numel()) for row in tensors]
        there = None
        if len(tensors) > 1:
            n, each = len(tensors[0]), torch.tensor(blocks)
            bases_at = torch.zeros_like(each) if bases is None else addresses(bases)
            models_at = torch.stack([addresses(row) for row in tensors])
            lengths = torch.tensor([row[0].numel() for row in tensors])
            rows = _rows(models_at, bases_at, lengths, each, before(each), torch.arange(len(tensors)))
            rows[:, n : 3 * n] = torch.tensor(numbers)
            there = launch.table(torch.cat((_tensor_of(each), rows.flatten())), tensors[0][0].device)
        # The address of one without elements would say that there is none.
        base = NOTHING if bases is None else ref(max(bases, key=Tensor.numel))
        return cls.described_by(
            base, tensors[0], numbers[0], there, len(tensors), sum(blocks), kind, compute, together=together
        )

    @classmethod
    def described_by(
        cls,
        base: Ref,
        models: Sequence[Tensor],
        numbers: Sequence[int],
        there: Tensor | None,
        tensors: int,
        blocks: int,
        kind: int,
        compute: torch.dtype,
        *,
        together: bool = False,
        blocks_results: int | None = None,
    ) -> _Work:
        """So many tensors with a table, of whose base only the dtype counts; or the only one, `models`, without.

        blocks_results: where results have more.
        """
        if len(models) > compiled.MOST_MODELS:
            raise TooManyModelsError(
                f"the cuda backend takes up to {compiled.MOST_MODELS} models at once, not {len(models)}; "
                'use backend="triton".'
            )
        described = compiled.Work(
            base,
            base != NOTHING,
            [ref(x) for x in models],
            models[0].numel(),
            CODES[compute],
            numbers,
            address(there),
            tensors,
            blocks,
            blocks if blocks_results is None else blocks_results,
            kind,
            together,
        )
        rows = 1 if together else tensors * len(models)
        return cls(described, there, models[0].device, kind, rows, len(models), blocks)

    def choose(
        self, digit: tuple[int, int], state: Tensor, counts: Tensor, bounds: Tensor | None, magnitude: Tensor | None
    ) -> None:
        """Choose the digit of each rank; bounds, or the one magnitude, where it is the last."""
        compiled.choose_digit(
            self.place, self.described, *digit, address(state), address(counts), address(bounds), address(magnitude)
        )


def _rows(
    models: Tensor, bases: Tensor, lengths: Tensor, blocks: Tensor, first_results: Tensor, index: Tensor
) -> Tensor:
    """The table of tensors, a row for each, in which ranks are yet to be written after the models' addresses.

    models: int64[T, n], addresses. bases: int64[T]. first_results, index: each tensor's first tie block and its place
    in results that have more tensors.
    """
    ranks = torch.zeros(len(models), 2 * models.shape[1], dtype=torch.int64)
    others = torch.stack([bases, lengths, before(blocks), first_results, index], dim=1)
    return torch.cat((models, ranks, others), dim=1)


def _tensor_of(blocks: Tensor) -> Tensor:
    """Each tensor's number as often as it has tie blocks."""
    return torch.arange(len(blocks)).repeat_interleave(blocks)


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


def _ties_to_add_to(shape: tuple[int, ...], kind: int, device: torch.device) -> Tensor:
    """Memory for the ties of each block; those of narrow keys are counted in place, added to what is there."""
    new = torch.empty if kind == WIDE else torch.zeros
    return new(shape, dtype=torch.int64, device=device)


def _bounds(
    base: Tensor | None, models: list[Tensor], first: list[int], last: list[int], compute: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`magnitude_bounds` of models whose keys are of one kind."""
    device, numel = models[0].device, models[0].numel()
    bases = None if base is None else [base]
    ranks = [rank for pair in zip(first, last) for rank in pair]
    work = _Work.of(bases, [models], [ranks], _kind(base, models, compute), compute)
    bounds = torch.empty(len(models), 2, 2, dtype=torch.int64, device=device)
    ties_before = _ties_to_add_to((len(models), 2, work.blocks), work.kind, device)
    if numel <= SMALL:
        compiled.bounds_of_small(work.place, work.described, address(bounds), address(ties_before))
    else:
        _large_bounds(work, 2 if any(0 < rank < numel for rank in first) else 1, bounds, ties_before)
    return bounds, ties_before


def magnitude_bounds(
    base: Tensor | None, tensors: list[Tensor], first: list[int], last: list[int], compute: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The cuts at two ranks of each model's delta; see `fastmerge.ops.magnitude_bounds`."""
    kinds = [_kind(base, [x], compute) for x in tensors]
    groups = [[i for i, kind in enumerate(kinds) if kind == wanted] for wanted in dict.fromkeys(kinds)]

    def bounds_of(models: list[Tensor], first: list[int], last: list[int]) -> tuple[Tensor, Tensor]:
        return _bounds(base, models, first, last, compute)

    return bounds_by_group(bounds_of, groups, tensors, first, last)


def magnitude_bounds_many(
    lists: Lists, ranks: Tensor, inside: Sequence[bool], compute: torch.dtype, *, subtract: bool
) -> tuple[Tensor, Tensor]:
    """`magnitude_bounds` of many tensors by as many launches as for two.

    ranks: int64[T, n, 2], each model's first and last, on the host, or where the lists are if these are kept. inside:
    for each of the 2 n whether any may be more than 0 and less than its tensor's length. subtract: deltas from the
    bases are ranked.
    Returns bounds int64[T, n, 2, 2] and ties_before int64[n, 2, blocks], in which the blocks of a tensor, max(1,
    ceil(N / 65536)), follow those of the one before.
    Errors: ValueError where the models, or the bases, do not have a single dtype; take the tensors one by one then.
    """
    lists.need_uniform()
    n, device = len(lists.models), lists.device
    bases = lists.base if subtract else None
    models = [model[0] for model in lists.models]
    kind = _kind(bases[0] if bases else None, models, compute)
    base = (1, CODES[bases[0].dtype]) if bases else NOTHING
    blocks = int(lists.blocks.sum())
    bounds = torch.empty(lists.tensors, n, 2, 2, dtype=torch.int64, device=device)
    ties_before = _ties_to_add_to((n, 2, blocks), kind, device)
    for part in lists.once(("magnitude_bounds_many[cuda]", subtract), lambda: list(_parts(lists, subtract))):
        own = ranks if part.which is None else ranks[part.which]
        # The next merge may have other ranks while this one is still under way.
        table = part.table.clone() if lists.kept else part.table
        table[part.blocks :].view(part.tensors, -1)[:, n : 3 * n] = own.flatten(1)
        if not lists.kept:
            table = launch.table(table, device)
        work = _Work.described_by(
            base, models, [0] * (2 * n), table, part.tensors, part.blocks, kind, compute, blocks_results=blocks
        )
        if part.small:
            compiled.bounds_of_small(work.place, work.described, address(bounds), address(ties_before))
        else:
            _large_bounds(work, 2 if any(inside[::2]) else 1, bounds, ties_before)
    return bounds, ties_before


@dataclass(frozen=True)
class _Part:
    """Tensors of lists that go the same way. which: their places, None for all; table: theirs, without ranks."""

    table: Tensor
    which: Tensor | None
    tensors: int
    blocks: int
    small: bool


def _parts(lists: Lists, subtract: bool) -> Iterator[_Part]:
    """The large tensors of lists, and the small ones; where the lists are kept, so are their tables on the device."""
    blocks = lists.blocks
    first_results = before(blocks)
    few_elements = lists.lengths <= SMALL
    bases = lists.base_addresses if subtract else torch.zeros_like(lists.lengths)
    for small in (False, True):
        which = (few_elements == small).nonzero().flatten()
        if len(which) == 0:
            continue
        own = blocks[which]
        rows = _rows(lists.model_addresses[which], bases[which], lists.lengths[which], own, first_results[which], which)
        table = torch.cat((_tensor_of(own), rows.flatten()))
        every = len(which) == lists.tensors
        if lists.kept:
            table, which = launch.table(table, lists.device), launch.table(which, lists.device)
        yield _Part(table, None if every else which, len(own), int(own.sum()), small)


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
