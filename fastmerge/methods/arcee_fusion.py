"""Arcee Fusion: of a model's changes only those that matter most are put on the base (arcee.ai)."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch

from fastmerge import ops
from fastmerge.backends.rule import SparsifyRule
from fastmerge.methods.base import Chunk, Known, MethodInFloat32, Placed, Statistic, TensorContext
from fastmerge.methods.parameters import Parameters

QUARTILES = (0.25, 0.5, 0.75)
_HIGH, _LOW = 1 << 16, 1 << 15
_ABOVE_ALL_KEYS = 1 << 31


class ArceeFusionParameters(Parameters):
    """There is nothing to choose."""


class ArceeFusion(MethodInFloat32):
    """The model's values where |x - base| KL(row) is at least median + 1.5 (q3 - q1) of the tensor, else the base's."""

    name = "arcee_fusion"
    title = "Arcee Fusion"
    source = "https://arcee.ai"
    needs_base = True
    most_models = 1
    sweeps = "3 (two to find the exact quartiles); rows are held whole"
    Parameters: ClassVar[type[Parameters]] = ArceeFusionParameters

    @staticmethod
    def row_length(context: TensorContext) -> int:
        """Elements along the last dimension; a vector is one row."""
        return max(context.shape[-1], 1) if context.shape else 1

    def cut_unit(self, context: TensorContext) -> int:
        """Whole rows."""
        return self.row_length(context)

    def workspace(self, context: TensorContext, numel: int) -> int:
        """What matters how much, and where that is enough; the divergences of rows."""
        return numel * 4 + -(-numel // 8) + numel // self.row_length(context) * 4

    def statistics(self, context: TensorContext, whole: bool) -> list[Statistic]:
        """The divergence of each row, then the threshold."""
        if context.numel == 0:
            return []
        if whole:
            return [Divergences(context), ThresholdOfWhole(context)]
        return [Ranking(context), Threshold(context)]

    def merge(self, context: TensorContext, chunk: Chunk, known: Known, out: torch.Tensor) -> None:
        """One pass over the chunk: importances are computed again from the rows' divergences, never stored."""
        threshold: Placed = known[Threshold.name]
        values = importances(context, chunk, known[Divergences.name].on(chunk.device)).models
        blocks = max(1, -(-chunk.numel // ops.TIE_BLOCK))
        rule = SparsifyRule(
            method="band",
            bounds=threshold.on(chunk.device),
            ties_before=torch.zeros(1, 2, blocks, dtype=torch.int64, device=chunk.device),
        )
        masks = ops.kept_masks(None, values, rule, backend=context.backend)
        ops.consensus_apply(
            chunk.base,
            chunk.models,
            [1.0],
            rule=SparsifyRule(method="mask", masks=masks),
            election="none",
            divisor="none",
            compute=context.compute,
            out=out,
            backend=context.backend,
        )


def importances(context: TensorContext, chunk: Chunk, divergences: torch.Tensor) -> Chunk:
    """The importances of whole rows, in place of the model. divergences: of all rows of the tensor."""
    assert chunk.base is not None
    length = ArceeFusion.row_length(context)
    rows = divergences[chunk.offset // length :][: chunk.numel // length].contiguous()
    values = ops.importance(chunk.base, chunk.models[0], rows, length, backend=context.backend)
    return replace(chunk, base=None, models=[values])


def ranks(numel: int) -> list[int]:
    """The quartiles' ranks by falling value, from 1 on. Rising ones are int(q (numel - 1)), from 0 on."""
    return [numel - int(quartile * (numel - 1)) for quartile in QUARTILES]


def bounds_of(quartiles: torch.Tensor) -> torch.Tensor:
    """int64[1, 2, 2]: what is at least median + 1.5 (q3 - q1), as a band of ranks. quartiles: float32[3]."""
    low, median, high = quartiles.unbind()
    threshold = median + (high - low) * 1.5
    threshold = threshold.masked_fill(threshold.isnan(), torch.nan).reshape(1)
    key = (threshold.view(torch.int32) & 0x7FFFFFFF).to(torch.int64)
    everything = torch.full_like(key, _ABOVE_ALL_KEYS)
    none = torch.zeros_like(key)
    return torch.stack([everything, none, key, none], dim=1).reshape(1, 2, 2)


class _ByRow(Statistic):
    """What is found in chunks of whole rows."""

    def __init__(self, context: TensorContext) -> None:
        self.context = context

    def divergences(self, chunk: Chunk) -> torch.Tensor:
        """float32, one for each row of the chunk."""
        assert chunk.base is not None
        length = ArceeFusion.row_length(self.context)
        return ops.divergences(chunk.base, chunk.models[0], length, backend=self.context.backend)


class Divergences(_ByRow):
    """The divergence of each row of a tensor that is in memory."""

    name = "divergences"

    def observe(self, chunk: Chunk, known: Known) -> torch.Tensor:
        """The chunk is the whole tensor."""
        return self.divergences(chunk)

    def add(self, state: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Never needed: there is one chunk."""
        raise AssertionError("a whole tensor is one chunk")

    def finish(self, state: torch.Tensor, known: Known) -> Placed:
        """As observed."""
        return Placed(state)


class ThresholdOfWhole(_ByRow):
    """The threshold of a tensor that is in memory, by three order statistics."""

    name = "threshold"

    def observe(self, chunk: Chunk, known: Known) -> torch.Tensor:
        """float32[3]; the chunk is the whole tensor."""
        values = importances(self.context, chunk, known[Divergences.name].on(chunk.device)).models
        places = ranks(self.context.numel)
        if self.context.numel in places:
            # Of so few the least is a quartile, which is beyond the last bound that there is.
            falling = values[0].sort(descending=True).values
            return falling[[place - 1 for place in places]]
        bounds, _ = ops.magnitude_bounds(
            None, values * len(places), [0] * len(places), places, backend=self.context.backend
        )
        return bounds[:, 1, 0].to(torch.int32).view(torch.float32)

    def add(self, state: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Never needed: there is one chunk."""
        raise AssertionError("a whole tensor is one chunk")

    def finish(self, state: torch.Tensor, known: Known) -> Placed:
        """The band that it bounds."""
        return Placed(bounds_of(state))


class Counts:
    """How many importances have which leading 16 bits, and the divergences of the rows that were seen."""

    def __init__(self, counts: torch.Tensor, rows: torch.Tensor) -> None:
        """counts: int64[65536]. rows: float32, of all rows of the tensor, 0 where none was seen yet."""
        self.counts = counts
        self.rows = rows


class Ranking(_ByRow):
    """First sweep: the rows' divergences, and how many importances have which leading 16 bits."""

    name = "divergences"

    def observe(self, chunk: Chunk, known: Known) -> Counts:
        """Look at one chunk of whole rows."""
        length = ArceeFusion.row_length(self.context)
        rows = torch.zeros(self.context.numel // length, dtype=torch.float32, device=chunk.device)
        state = Counts(torch.zeros(_HIGH, dtype=torch.int64, device=chunk.device), rows)
        return self.extend(state, chunk, known)

    def extend(self, state: Counts, chunk: Chunk, known: Known) -> Counts:
        """Look at one more."""
        length = ArceeFusion.row_length(self.context)
        first = chunk.offset // length
        state.rows[first : first + chunk.numel // length] = self.divergences(chunk)
        values = importances(self.context, chunk, state.rows).models
        state.counts += ops.key_histogram(None, values, [-1], backend=self.context.backend)[0]
        return state

    def add(self, state: Counts, other: Counts) -> Counts:
        """Counts add; a row that the other has not seen is 0 there."""
        return Counts(state.counts + other.counts, state.rows + other.rows)

    def finish(self, state: Counts, known: Known) -> Found:
        """The rows, and where the quartiles lie."""
        places = [place_of(state.counts.cpu(), rank) for rank in ranks(self.context.numel)]
        return Found(state.rows.cpu(), places)


class Found(Placed):
    """The divergences of all rows, and each quartile's leading bits with its rank among those that have them."""

    def __init__(self, rows: torch.Tensor, places: list[tuple[int, int]]) -> None:
        super().__init__(rows)
        self.places = places


class Threshold(_ByRow):
    """Second sweep: of the importances whose leading bits are a quartile's, how many have which trailing 15 bits."""

    name = "threshold"

    def observe(self, chunk: Chunk, known: Known) -> torch.Tensor:
        """Count one chunk: int64[3, 32768]."""
        found: Found = known[Divergences.name]
        values = importances(self.context, chunk, found.on(chunk.device)).models
        prefixes = [prefix for prefix, _ in found.places]
        return ops.key_histogram(None, values * len(prefixes), prefixes, backend=self.context.backend)

    def add(self, state: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Counts add."""
        return state.add_(other)

    def finish(self, state: torch.Tensor, known: Known) -> Placed:
        """The band that the threshold bounds."""
        found: Found = known[Divergences.name]
        keys = [
            prefix * _LOW + place_of(counts, rank)[0]
            for counts, (prefix, rank) in zip(state.cpu(), found.places, strict=True)
        ]
        return Placed(bounds_of(torch.tensor(keys, dtype=torch.int32).view(torch.float32)))


def place_of(counts: torch.Tensor, rank: int) -> tuple[int, int]:
    """The bin of the element of this rank by falling value, from 1 on, and its rank within the bin."""
    above = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(above, rank))
    passed = int(above[place - 1]) if place else 0
    return counts.numel() - 1 - place, rank - passed
