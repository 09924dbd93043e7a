"""The statistics that consensus methods need: rank bounds of each model's deltas, and their L1 mass.

While a tensor is in memory, its rank bounds are found in one go. When it is cut into chunks, a sample tells in which
narrow window of keys each bound must lie, and one sweep counts every key in it. Where the sample misled, two sweeps of
histograms find the bounds: the first tells which 2**15 neighbouring keys hold one, the second which of those it is.
Histograms are counts and add, so that the cuts do not show in the result.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastmerge import ops
from fastmerge.backends.rule import TIE_BLOCK, SparsifyRule
from fastmerge.methods.base import Chunk, Known, Placed, Statistic, TensorContext

_KEYS = 1 << 31
_WINDOW_KEYS = 1 << 22
"""Keys in all windows of a tensor together: 32 MiB of counts."""
_WINDOW_MASS = 0.015
"""How far from its rank in the sample a bound may lie, as a fraction of the tensor."""


class Bounds(ABC):
    """The bounds of the kept ranks, and for any chunk how many tied elements come before each of its blocks."""

    values: torch.Tensor
    """int64[n, 2, 2]: threshold and tie count of the first kept rank and of the first one after."""

    @abstractmethod
    def on(self, device: torch.device) -> torch.Tensor:
        """The values on the device of a chunk."""

    @abstractmethod
    def ties_before(self, chunk: Chunk) -> torch.Tensor:
        """int64[n, 2, blocks of the chunk]."""


@dataclass(frozen=True)
class WholeBounds(Bounds):
    """Bounds of a tensor whose every tie block has been counted already; they are where the tensor is."""

    values: torch.Tensor
    ties: torch.Tensor

    def on(self, device: torch.device) -> torch.Tensor:
        """As they are."""
        return self.values

    def ties_before(self, chunk: Chunk) -> torch.Tensor:
        """The tensor's own blocks, as far as the chunk reaches; it must begin at a block's beginning."""
        first = chunk.offset // TIE_BLOCK
        count = max(1, -(-chunk.numel // TIE_BLOCK))
        return self.ties[:, :, first : first + count].contiguous()


@dataclass
class StreamedBounds(Bounds):
    """Bounds of a tensor that comes in chunks: ties are counted as chunks pass, in rising order, and remembered."""

    values: torch.Tensor
    context: TensorContext
    _placed: Placed = field(init=False)
    _cut_ties: bool = field(init=False)
    _total: torch.Tensor | None = field(init=False, default=None)
    _before: dict[int, torch.Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._placed = Placed(self.values)
        self._cut_ties = bool(self.values[:, :, 1].any())

    def on(self, device: torch.device) -> torch.Tensor:
        """Copied once."""
        return self._placed.on(device)

    def ties_before(self, chunk: Chunk) -> torch.Tensor:
        """Counted when the chunk is first seen; a later sweep with the same cuts finds it in the ledger."""
        if not self._cut_ties:
            blocks = max(1, -(-chunk.numel // TIE_BLOCK))
            return torch.zeros(len(self.values), 2, blocks, dtype=torch.int64, device=chunk.device)
        if chunk.offset not in self._before:
            bounds = self.on(chunk.device)
            counts = ops.tie_counts(
                chunk.base, chunk.models, bounds, compute=self.context.compute, backend=self.context.backend
            )
            running = counts.cumsum(dim=2)
            before, total = running - counts, running[:, :, -1:]
            self._before[chunk.offset] = before if self._total is None else self._total + before
            self._total = total if self._total is None else self._total + total
        return self._before[chunk.offset]


@dataclass(frozen=True)
class Ranks:
    """The ranks [first[i], last[i]) to keep of each model, by falling magnitude."""

    first: list[int]
    last: list[int]

    def cuts(self, numel: int) -> list[tuple[int, int, int]]:
        """(model, which of its two bounds, rank) wherever something is really cut off."""
        both = enumerate(zip(self.first, self.last, strict=True))
        return [(i, which, rank) for i, pair in both for which, rank in enumerate(pair) if 0 < rank < numel]


@dataclass(frozen=True)
class RankBoundsOfWhole(Statistic):
    """Rank bounds of a tensor that is in memory."""

    context: TensorContext
    ranks: Ranks
    name = "bounds"

    def observe(self, chunk: Chunk, known: Known) -> WholeBounds:
        """The chunk is the whole tensor."""
        bounds, ties = ops.magnitude_bounds(
            chunk.base,
            chunk.models,
            self.ranks.first,
            self.ranks.last,
            compute=self.context.compute,
            backend=self.context.backend,
        )
        return WholeBounds(bounds, ties)

    def depends_only_on(self) -> Hashable:
        """The ranks."""
        return tuple(self.ranks.first), tuple(self.ranks.last)

    def observe_with(self, others: Sequence[RankBoundsOfWhole], chunk: Chunk, known: Known) -> list[WholeBounds]:
        """All ranks of all models in one sweep, each pair of them once."""
        wanted = [list(enumerate(zip(one.ranks.first, one.ranks.last, strict=True))) for one in (self, *others)]
        rows = {pair: row for row, pair in enumerate(dict.fromkeys(pair for pairs in wanted for pair in pairs))}
        bounds, ties = ops.magnitude_bounds(
            chunk.base,
            [chunk.models[model] for model, _ in rows],
            [first for _, (first, _) in rows],
            [last for _, (_, last) in rows],
            compute=self.context.compute,
            backend=self.context.backend,
        )
        places = [[rows[pair] for pair in pairs] for pairs in wanted]
        return [WholeBounds(bounds[mine].contiguous(), ties[mine].contiguous()) for mine in places]

    def add(self, state: WholeBounds, other: WholeBounds) -> WholeBounds:
        """Never needed: there is one chunk."""
        raise AssertionError("a whole tensor is one chunk")

    def finish(self, state: WholeBounds, known: Known) -> WholeBounds:
        """As observed."""
        return state


@dataclass
class KeyWindow(Statistic):
    """One sweep: how many deltas lie past a window of keys, and how many have each key in it. Counts add."""

    context: TensorContext
    ranks: Ranks
    keep_ties: bool = False
    low: list[int] = field(init=False, default_factory=list)
    width: int = field(init=False, default=0)
    name = "bounds"
    samples = True

    def prepare(self, sample: Chunk, known: Known) -> None:
        """Put each window around the keys that have the bound's rank, give or take, in the sample."""
        cuts = self.ranks.cuts(self.context.numel)
        models = [sample.models[model] for model, _, _ in cuts]
        places = [rank / self.context.numel * sample.numel for _, _, rank in cuts]
        spread = _WINDOW_MASS * sample.numel + 8

        def keys_at(ranks: list[float]) -> list[int]:
            nearest = [min(max(round(rank), 1), sample.numel) for rank in ranks]
            bounds, _ = ops.magnitude_bounds(
                sample.base,
                models,
                [0] * len(cuts),
                [min(rank, sample.numel - 1) for rank in nearest],
                compute=self.context.compute,
                backend=self.context.host_backend,
            )
            keys: list[int] = bounds[:, 1, 0].tolist()
            return keys

        if sample.numel < 2:
            lowest = highest = middle = [0] * len(cuts)
        else:
            middle = keys_at(places)
            highest = [
                key if place > spread else _KEYS - 1
                for key, place in zip(keys_at([p - spread for p in places]), places, strict=True)
            ]
            lowest = [
                key if place + spread < sample.numel else 0
                for key, place in zip(keys_at([p + spread for p in places]), places, strict=True)
            ]
        most = max(1, _WINDOW_KEYS // len(cuts))
        self.width = min(most, 1 + max(high - low for low, high in zip(lowest, highest, strict=True)))
        self.low = [
            max(0, low if high - low < self.width else key - self.width // 2)
            for low, high, key in zip(lowest, highest, middle, strict=True)
        ]

    def observe(self, chunk: Chunk, known: Known) -> torch.Tensor:
        """Count one chunk: int64[cuts, window + 1]."""
        counts = torch.zeros(len(self.low), self.width + 1, dtype=torch.int64, device=chunk.device)
        return self.extend(counts, chunk, known)

    def extend(self, state: torch.Tensor, chunk: Chunk, known: Known) -> torch.Tensor:
        """Count one more chunk in place: a window is large beside a chunk."""
        models = [chunk.models[model] for model, _, _ in self.ranks.cuts(self.context.numel)]
        ops.key_window_(chunk.base, models, self.low, state, compute=self.context.compute, backend=self.context.backend)
        return state

    def add(self, state: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Counts add."""
        return state.add_(other)

    def finish(self, state: torch.Tensor, known: Known) -> StreamedBounds | None:
        """The bounds, if every one of them lies in its window."""
        values = trivial_bounds(self.ranks)
        counts = state.cpu()
        for row, (model, which, rank) in enumerate(self.ranks.cuts(self.context.numel)):
            bound = ops.bound_in_window(counts[row], self.low[row], rank)
            if bound is None:
                return None
            values[model, which] = torch.tensor(bound, dtype=torch.int64)
        return StreamedBounds(ops.keep_ties(values) if self.keep_ties else values, self.context)

    def depends_on(self) -> dict[str, Any]:
        """The ranks, and that equals are kept."""
        return {"first": self.ranks.first, "last": self.ranks.last, "keep_ties": self.keep_ties}

    def dump(self, result: StreamedBounds) -> Any:
        """The bounds."""
        return result.values.tolist()

    def load(self, stored: Any) -> StreamedBounds:
        """The inverse of `dump`."""
        return StreamedBounds(torch.tensor(stored, dtype=torch.int64), self.context)


@dataclass(frozen=True)
class KeyHistogram(Statistic):
    """First sweep: how many deltas of each model have which leading 16 bits, int64[n, 65536]."""

    context: TensorContext
    name = "key_histogram"
    fallback = True

    def needed(self, known: Known) -> bool:
        """Not if the bounds were found already."""
        return RankBounds.name not in known

    def observe(self, chunk: Chunk, known: Known) -> torch.Tensor:
        """Count one chunk."""
        everywhere = [-1] * len(chunk.models)
        return ops.key_histogram(
            chunk.base, chunk.models, everywhere, compute=self.context.compute, backend=self.context.backend
        )

    def add(self, state: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Counts add."""
        return state.add_(other)

    def finish(self, state: torch.Tensor, known: Known) -> torch.Tensor:
        """The counts."""
        return state.cpu()


@dataclass(frozen=True)
class RankBounds(Statistic):
    """Second sweep: of the deltas whose leading bits are a bound's, how many have which trailing 15 bits."""

    context: TensorContext
    ranks: Ranks
    keep_ties: bool = False
    name = "bounds"
    fallback = True

    def needed(self, known: Known) -> bool:
        """Not if the bounds were found already."""
        return self.name not in known

    def observe(self, chunk: Chunk, known: Known) -> torch.Tensor:
        """Count one chunk: int64[cuts, 32768], a row for each bound that cuts something off."""
        cuts = self.ranks.cuts(self.context.numel)
        level0 = known[KeyHistogram.name]
        return ops.key_histogram(
            chunk.base,
            [chunk.models[model] for model, _, _ in cuts],
            [ops.bound_prefix(level0[model], rank) for model, _, rank in cuts],
            compute=self.context.compute,
            backend=self.context.backend,
        )

    def add(self, state: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Counts add."""
        return state.add_(other)

    def finish(self, state: torch.Tensor, known: Known) -> StreamedBounds:
        """The bounds: thresholds, and ties where a cut falls inside a group of equal keys."""
        values = trivial_bounds(self.ranks)
        level0, level1 = known[KeyHistogram.name], state.cpu()
        for row, (model, which, rank) in enumerate(self.ranks.cuts(self.context.numel)):
            values[model, which] = torch.tensor(ops.bound(level0[model], level1[row], rank), dtype=torch.int64)
        return StreamedBounds(ops.keep_ties(values) if self.keep_ties else values, self.context)


def trivial_bounds(ranks: Ranks) -> torch.Tensor:
    """int64[n, 2, 2], right for each rank at which nothing is cut off: the first and the one after the last."""
    pairs = zip(ranks.first, ranks.last, strict=True)
    return torch.tensor([[[0 if rank > 0 else 1 << 31, 0] for rank in pair] for pair in pairs], dtype=torch.int64)


@dataclass(frozen=True)
class KeptMasks(Statistic):
    """What is kept of a tensor that is in memory, a bit for each element: for rules that are slow to decide twice."""

    context: TensorContext
    rule: Callable[[Chunk, Known], SparsifyRule]
    arranged: Callable[[Chunk], Chunk]
    name = "masks"

    def observe(self, chunk: Chunk, known: Known) -> torch.Tensor:
        """uint8[n, bytes]; the chunk is the whole tensor."""
        rule = self.rule(chunk, known)
        chunk = self.arranged(chunk)
        return ops.kept_masks(
            chunk.base, chunk.models, rule, compute=self.context.compute, backend=self.context.backend
        )

    def add(self, state: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Never needed: there is one chunk."""
        raise AssertionError("a whole tensor is one chunk")

    def finish(self, state: torch.Tensor, known: Known) -> torch.Tensor:
        """As observed."""
        return state


@dataclass(frozen=True)
class Rescale(Statistic):
    """The factor that gives each sparsified delta its L1 norm back: exact sums before and after, divided once."""

    context: TensorContext
    rule: Callable[[Chunk, Known], SparsifyRule]
    arranged: Callable[[Chunk], Chunk]
    precision: torch.dtype
    kept_by: Hashable = None
    """What the rule follows from besides the elements, if others may share what is found."""
    name = "scales"

    def depends_only_on(self) -> Hashable | None:
        """What is kept."""
        return self.kept_by

    def observe(self, chunk: Chunk, known: Known) -> torch.Tensor:
        """int64[n, 2, 12] limbs of the two sums of each model."""
        rule = self.rule(chunk, known)
        chunk = self.arranged(chunk)
        return ops.l1_sums(chunk.base, chunk.models, rule, compute=self.context.compute, backend=self.context.backend)

    def add(self, state: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Limbs add; their carries wait until the end."""
        return state.add_(other)

    def finish(self, state: torch.Tensor, known: Known) -> list[float]:
        """One factor per model."""
        return [ops.l1_scale(limbs, self.precision) for limbs in state.cpu()]


def kept_ranks(numel: int, densities: Sequence[float]) -> Ranks:
    """TIES (Yadav et al., arXiv 2306.01708): the int(density * numel) largest, at least one unless the density is 0."""
    last = [0 if d <= 0 else numel if d >= 1 else max(1, int(d * numel)) for d in densities]
    return Ranks([0] * len(last), [min(rank, numel) for rank in last])


def kept_ranks_without_outliers(numel: int, densities: Sequence[float], gammas: Sequence[float]) -> Ranks:
    """Model Breadcrumbs: drop the int(gamma * numel) largest, keep the next int(density * numel).

    Where both do not fit, fewer outliers are dropped, so that the density holds. Source: Davari and Belilovsky, arXiv
    2312.06795.
    """
    first, last = [], []
    for density, gamma in zip(densities, gammas, strict=True):
        if density >= 1:
            first.append(0)
            last.append(numel)
            continue
        target, top = int(density * numel), int(gamma * numel)
        below = max(0, numel - target - top)
        first.append(numel - below - target)
        last.append(numel - below)
    return Ranks(first, last)
