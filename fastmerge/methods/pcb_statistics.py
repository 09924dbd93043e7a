"""The statistics that PCB-Merging needs, of one tensor or of a whole model: clip bounds, then thresholds of the scores.

Each takes one sweep: a sample says in which narrow window of keys an order statistic must lie, and the sweep counts
that window. Where the sample misled, two sweeps of histograms follow. What is found is exact either way.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastmerge import ops
from fastmerge.backends.rule import PcbRule
from fastmerge.methods.base import Chunk, Known, Placed, Statistic, TensorContext

_WINDOW_KEYS = 1 << 22
"""Keys in all windows of a statistic together: 32 MiB of counts."""
_RUN = 64
"""Neighbours that a sample's error is judged by."""


def rule_from(variant: str, known: Known, chunk: Chunk) -> PcbRule:
    """What the statistics have found so far, as the kernels take it that look at this chunk."""

    def part(name: str) -> torch.Tensor | None:
        found: Placed | None = known.get(name)
        return None if found is None else found.on(chunk.device)

    return PcbRule(
        variant=variant,  # type: ignore[arg-type]
        clip=part(_Clipped.name),
        extremes=part(Extremes.name),
        means=part(Means.name),
        thresholds=part(_Thresholds.name),
    )


def _in_runs(keys: torch.Tensor) -> torch.Tensor:
    """int64[runs, run]: as many whole runs as there are, or one short one."""
    run = min(_RUN, keys.numel())
    return keys[: keys.numel() // max(run, 1) * run].reshape(-1, max(run, 1))


def _windows(
    samples: Sequence[torch.Tensor], places: Sequence[int], numel: int, most_keys: int
) -> tuple[list[int], int]:
    """The windows' first keys and their common width. samples: keys, one tensor for each place."""
    most = max(1, min(_WINDOW_KEYS // len(places), most_keys))
    chosen = [
        ops.choose_window(_in_runs(keys), place, numel, most) for keys, place in zip(samples, places, strict=True)
    ]
    return [low for low, _ in chosen], max(width for _, width in chosen)


class _Tensors(Statistic):
    """A result that is a tensor of float32 values."""

    def dump(self, result: Placed) -> Any:
        """The bits."""
        values = result.values
        return {"shape": list(values.shape), "bits": values.contiguous().view(torch.int32).reshape(-1).tolist()}

    def load(self, stored: Any) -> Placed:
        """The inverse of `dump`."""
        return Placed(torch.tensor(stored["bits"], dtype=torch.int32).view(torch.float32).reshape(stored["shape"]))


# -- what deltas are clipped to


class _Clipped(_Tensors):
    name = "pcb_clip"

    def __init__(self, context: TensorContext, variant: str) -> None:
        self.context = context
        self.variant = variant
        self.models = len(context.positions)
        # Two cuts of each model: the low bound, then the high one.
        self.places = list(ops.pcb_ranks(context.numel, 0.0, variant)[:2]) * self.models

    def depends_on(self) -> dict[str, Any]:
        """The fraction that is clipped off, by way of the places."""
        return {"places": self.places[:2]}

    def twice(self, models: Sequence[Any]) -> list[Any]:
        """Each of them for each of its cuts."""
        return [model for model in models for _ in range(2)]

    def bounds(self, keys: Sequence[int]) -> Placed:
        """float32[n, 2] from the keys of all cuts."""
        return Placed(torch.tensor(keys, dtype=torch.int32).view(torch.float32).reshape(-1, 2))


class ClipWindow(_Clipped):
    """One sweep over magnitudes: state int64[2 n, window + 1], as `key_window_` counts."""

    samples = True

    def __init__(self, context: TensorContext, variant: str) -> None:
        super().__init__(context, variant)
        self.low: list[int] = []
        self.width = 1

    def prepare(self, sample: Chunk, known: Known) -> None:
        """Place the windows."""
        base = None if sample.base is None else sample.base.float()
        keys = []
        for model in sample.models:
            delta = model.float() if base is None else model.float() - base
            keys.append(delta.abs().view(torch.int32).to(torch.int64))
        self.low, self.width = _windows(self.twice(keys), self.places, self.context.numel, self.context.numel)

    def observe(self, chunk: Chunk, known: Known) -> torch.Tensor:
        """Count one chunk."""
        counts = torch.zeros(len(self.places), self.width + 1, dtype=torch.int64, device=chunk.device)
        return self.extend(counts, chunk, known)

    def extend(self, state: torch.Tensor, chunk: Chunk, known: Known) -> torch.Tensor:
        """Count one more in place: windows are large beside a chunk."""
        ops.key_window_(chunk.base, self.twice(chunk.models), self.low, state, backend=self.context.backend)
        return state

    def add(self, state: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Counts add."""
        return state.add_(other)

    def finish(self, state: torch.Tensor, known: Known) -> Placed | None:
        """The bounds, if every one of them lies in its window."""
        found = [
            ops.bound_in_window(row, low, self.context.numel - place)
            for row, low, place in zip(state.cpu(), self.low, self.places, strict=True)
        ]
        return None if None in found else self.bounds([bound[0] for bound in found if bound is not None])


class ClipHistogram(Statistic):
    """First sweep without a window: int64[n, 65536], how many magnitudes have which leading 16 key bits."""

    name = "pcb_clip_histogram"
    fallback = True

    def __init__(self, context: TensorContext) -> None:
        self.context = context

    def needed(self, known: Known) -> bool:
        """Not if the bounds were found already."""
        return _Clipped.name not in known

    def observe(self, chunk: Chunk, known: Known) -> torch.Tensor:
        """Count one chunk."""
        everywhere = [-1] * len(chunk.models)
        return ops.key_histogram(chunk.base, chunk.models, everywhere, backend=self.context.backend)

    def add(self, state: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Counts add."""
        return state.add_(other)

    def finish(self, state: torch.Tensor, known: Known) -> torch.Tensor:
        """The counts."""
        return state.cpu()


class ClipBounds(_Clipped):
    """Second sweep: int64[2 n, 32768], the trailing 15 bits of those that have a bound's leading ones."""

    fallback = True

    def needed(self, known: Known) -> bool:
        """Not if the bounds were found already."""
        return self.name not in known

    def _bins(self, known: Known) -> list[tuple[int, int]]:
        counts = self.twice(list(known[ClipHistogram.name]))
        ranks = [self.context.numel - place for place in self.places]
        return [ops.highest_bin(row, rank) for row, rank in zip(counts, ranks, strict=True)]

    def observe(self, chunk: Chunk, known: Known) -> torch.Tensor:
        """Count one chunk."""
        prefixes = [prefix for prefix, _ in self._bins(known)]
        return ops.key_histogram(chunk.base, self.twice(chunk.models), prefixes, backend=self.context.backend)

    def add(self, state: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Counts add."""
        return state.add_(other)

    def finish(self, state: torch.Tensor, known: Known) -> Placed:
        """The bounds."""
        keys = []
        for row, (prefix, above), place in zip(state.cpu(), self._bins(known), self.places, strict=True):
            keys.append(prefix << 15 | ops.highest_bin(row, self.context.numel - place - above)[0])
        return self.bounds(keys)


# -- the paper's normalisation


class Extremes(_Tensors):
    """float32[n (n + 1) / 2, 2]: the least and the greatest product of each pair of deltas."""

    name = "pcb_extremes"

    def __init__(self, context: TensorContext) -> None:
        self.context = context

    def observe(self, chunk: Chunk, known: Known) -> torch.Tensor:
        """Of one chunk."""
        return ops.pcb_extremes(chunk.base, chunk.models, backend=self.context.backend)

    def add(self, state: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """The lesser and the greater."""
        return torch.stack([torch.minimum(state[:, 0], other[:, 0]), torch.maximum(state[:, 1], other[:, 1])], dim=1)

    def finish(self, state: torch.Tensor, known: Known) -> Placed:
        """As they are."""
        return Placed(state.cpu())


class Means(_Tensors):
    """The means of the paper's exponentials, from their exact sums: int64[n + n (n + 1) / 2, 12]."""

    name = "pcb_means"

    def __init__(self, context: TensorContext) -> None:
        self.context = context

    def observe(self, chunk: Chunk, known: Known) -> torch.Tensor:
        """Of one chunk."""
        rule = rule_from("paper", known, chunk)
        return ops.pcb_sums(chunk.base, chunk.models, rule, backend=self.context.backend)

    def add(self, state: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Limbs add; their carries wait until the end."""
        return state.add_(other)

    def finish(self, state: torch.Tensor, known: Known) -> Placed:
        """Sums over the number of elements."""
        return Placed(ops.pcb_means(state.cpu(), self.context.numel, len(self.context.positions)))


# -- thresholds of the scores


class _Thresholds(_Tensors):
    name = "pcb_thresholds"

    def __init__(self, context: TensorContext, variant: str, density: Sequence[float]) -> None:
        self.context = context
        self.variant = variant
        self.density = list(density)
        self.ranks = [context.numel - ops.pcb_ranks(context.numel, each, variant)[2] for each in density]

    def depends_on(self) -> dict[str, Any]:
        """The formula, and what part is kept."""
        return {"variant": self.variant, "density": self.density}


@dataclass
class _Counted:
    """counts int64[n, window + 1] as `pcb_window_` writes them; highest int64[n]: the highest keys."""

    counts: torch.Tensor
    highest: torch.Tensor


class ScoreWindow(_Thresholds):
    """One sweep over scores."""

    samples = True

    def __init__(self, context: TensorContext, variant: str, density: Sequence[float]) -> None:
        super().__init__(context, variant, density)
        self.low: list[int] = []
        self.width = 1
        self.highest: list[int] = []

    def prepare(self, sample: Chunk, known: Known) -> None:
        """Place the windows, by the scores of the sample."""
        rule = rule_from(self.variant, known, sample)
        scores = ops.pcb_scores(sample.base, sample.models, rule, backend=self.context.host_backend)
        numel = self.context.numel
        keys = [ops.score_keys(row) for row in scores]
        self.low, self.width = _windows(keys, [numel - rank for rank in self.ranks], numel, numel)

    def observe(self, chunk: Chunk, known: Known) -> _Counted:
        """Count one chunk."""
        counts = torch.zeros(len(self.ranks), self.width + 1, dtype=torch.int64, device=chunk.device)
        highest = torch.zeros(len(self.ranks), dtype=torch.int64, device=chunk.device)
        return self.extend(_Counted(counts, highest), chunk, known)

    def extend(self, state: _Counted, chunk: Chunk, known: Known) -> _Counted:
        """Count one more in place."""
        rule = rule_from(self.variant, known, chunk)
        ops.pcb_window_(
            chunk.base, chunk.models, rule, self.low, state.counts, state.highest, backend=self.context.backend
        )
        return state

    def add(self, state: _Counted, other: _Counted) -> _Counted:
        """Counts add, the higher key remains."""
        return _Counted(state.counts.add_(other.counts), torch.maximum(state.highest, other.highest))

    def finish(self, state: _Counted, known: Known) -> Placed | None:
        """The thresholds, if every one of them lies in its window."""
        self.highest = state.highest.tolist()
        found = [
            ops.score_bound_in_window(row, low, rank)
            for row, low, rank in zip(state.counts.cpu(), self.low, self.ranks, strict=True)
        ]
        if None in found:
            return None
        keys = [key for key in found if key is not None]
        return Placed(ops.pcb_thresholds(keys, self.highest, self.density, self.variant))


class ScoreHistogram(Statistic):
    """First sweep without a window: int64[n, 65536], how many scores have which leading 16 key bits."""

    name = "pcb_score_histogram"
    fallback = True

    def __init__(self, context: TensorContext, variant: str) -> None:
        self.context = context
        self.variant = variant

    def needed(self, known: Known) -> bool:
        """Not if the thresholds were found already."""
        return _Thresholds.name not in known

    def observe(self, chunk: Chunk, known: Known) -> torch.Tensor:
        """Count one chunk."""
        rule = rule_from(self.variant, known, chunk)
        return ops.pcb_histogram(chunk.base, chunk.models, rule, [-1] * len(chunk.models), backend=self.context.backend)

    def add(self, state: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Counts add."""
        return state.add_(other)

    def finish(self, state: torch.Tensor, known: Known) -> torch.Tensor:
        """The counts."""
        return state.cpu()


class ScoreThresholds(_Thresholds):
    """Second sweep: int64[n, 65536], the trailing 16 bits of the scores that have a threshold's leading ones."""

    fallback = True

    def __init__(self, window: ScoreWindow) -> None:
        super().__init__(window.context, window.variant, window.density)
        self.window = window

    def needed(self, known: Known) -> bool:
        """Not if the thresholds were found already."""
        return self.name not in known

    def observe(self, chunk: Chunk, known: Known) -> torch.Tensor:
        """Count one chunk."""
        prefixes = [
            ops.score_prefix(row, rank) for row, rank in zip(known[ScoreHistogram.name], self.ranks, strict=True)
        ]
        rule = rule_from(self.variant, known, chunk)
        return ops.pcb_histogram(chunk.base, chunk.models, rule, prefixes, backend=self.context.backend)

    def add(self, state: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Counts add."""
        return state.add_(other)

    def finish(self, state: torch.Tensor, known: Known) -> Placed:
        """The thresholds; the highest keys are known from the sweep with the window."""
        keys = [
            ops.score_bound(high, low, rank)
            for high, low, rank in zip(known[ScoreHistogram.name], state.cpu(), self.ranks, strict=True)
        ]
        return Placed(ops.pcb_thresholds(keys, self.window.highest, self.density, self.variant))


# -- a tensor in memory


class RuleOfWhole(Statistic):
    """Everything at once, of a tensor that is in memory."""

    name = "pcb_rule"

    def __init__(self, context: TensorContext, variant: str, density: Sequence[float]) -> None:
        self.context = context
        self.variant = variant
        self.density = list(density)

    def depends_only_on(self) -> Hashable:
        """The variant, and how much is kept."""
        return self.variant, tuple(self.density)

    def observe(self, chunk: Chunk, known: Known) -> PcbRule:
        """The chunk is the whole tensor."""
        rule = ops.pcb_rule(
            chunk.models, base=chunk.base, variant=self.variant, density=self.density, backend=self.context.backend
        )
        there = [
            None if x is None else x.to(chunk.device) for x in (rule.clip, rule.extremes, rule.means, rule.thresholds)
        ]
        return PcbRule(rule.variant, *there)

    def add(self, state: PcbRule, other: PcbRule) -> PcbRule:
        """Never needed: there is one chunk."""
        raise AssertionError("a whole tensor is one chunk")

    def finish(self, state: PcbRule, known: Known) -> PcbRule:
        """As observed."""
        return state
