"""SCE: select the elements in which the models differ most, weigh models by energy, erase minorities (FuseChat)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from fastmerge import ops
from fastmerge.backends.rule import SparsifyRule
from fastmerge.methods.base import Chunk, Known, MethodInFloat32, Statistic, TensorContext
from fastmerge.methods.parameters import Fraction, Parameters, shared
from fastmerge.methods.statistics import KeyHistogram, RankBounds, Ranks, StreamedBounds

SMALLEST_ENERGY = 1e-6
"""Mean squares that add up to less weigh all models alike."""
SMALLEST_SHARE = 1e-6
"""The least that the merged deltas are divided by."""
_BLOCK = 1 << 17
_GPU_BLOCK = 1 << 22


class SceParameters(Parameters):
    """Weights come from the models themselves."""

    select_topk: Fraction = shared(1.0, "fraction of the elements in which the models differ that is merged")
    int8_mask: bool = shared(False, "accepted and without effect: no mask is stored")


class Sce(MethodInFloat32):
    """out = base + sum_i(w_i d_i) / sum_i(w_i) over what has the sign of sum_i(d_i), where the variance is largest."""

    name = "sce"
    title = "SCE"
    source = "https://arxiv.org/abs/2408.07990 (FuseChat: Knowledge Fusion of Chat Models)"
    needs_base = True
    sweeps = "4 (two to find the exact threshold of the variances, one for the energies), 2 with select_topk 0 or 1"
    Parameters: ClassVar[type[Parameters]] = SceParameters

    def _selects(self, context: TensorContext) -> bool:
        parameters: Any = context.parameters
        return bool(0 < parameters.select_topk < 1)

    def cut_unit(self, context: TensorContext) -> int:
        """Masks hold eight elements in a byte."""
        return 8 if self._selects(context) else 1

    def workspace(self, context: TensorContext, numel: int) -> int:
        """Variances, and masks of all models."""
        return numel * 4 + (len(context.positions) + 1) * -(-numel // 8) if self._selects(context) else 0

    # -- statistics and merge

    def statistics(self, context: TensorContext, whole: bool) -> list[Statistic]:
        """What is selected, where something is; then the energies of that."""
        parameters: Any = context.parameters
        if context.numel == 0:
            return []
        if not self._selects(context):
            return [Energies(context, parameters.select_topk)]
        selected: list[Statistic] = [SelectedOfWhole(context, parameters.select_topk)]
        if not whole:
            selected = [Spread(context, parameters.select_topk), VarianceBounds(context)]
        return [*selected, Energies(context, parameters.select_topk)]

    def merge(self, context: TensorContext, chunk: Chunk, known: Known, out: torch.Tensor) -> None:
        """One pass over the chunk: variances are computed again where masks are not kept."""
        parameters: Any = context.parameters
        assert chunk.base is not None
        mask = selected(context, chunk, known, parameters.select_topk)
        weights: list[float] = known.get(Energies.name, [1.0] * len(chunk.models))
        if any(0 < weight < SMALLEST_SHARE for weight in weights):
            _merge_with_least_share(chunk, weights, mask, out)
            return
        rule = SparsifyRule()
        if mask is not None:
            rule = SparsifyRule(method="mask", masks=mask.expand(len(chunk.models), -1).contiguous())
        # No sum of weights that are no zeros is below the least divisor, so that it never shows.
        ops.consensus_apply(
            chunk.base,
            chunk.models,
            weights,
            rule=rule,
            election="total",
            zero_sign="positive",
            divisor="weights",
            compute=context.compute,
            out=out,
            backend=context.backend,
        )


# -- what is selected: the variances' largest


def variances(context: TensorContext, chunk: Chunk) -> Chunk:
    """The variances of a chunk, in place of its models."""
    assert chunk.base is not None
    found = ops.model_variance(chunk.base, chunk.models, backend=context.backend)
    return replace(chunk, base=None, models=[found])


def selected(context: TensorContext, chunk: Chunk, known: Known, select_topk: float) -> torch.Tensor | None:
    """uint8[bytes], a bit for each element of a chunk; None where all are selected."""
    if select_topk >= 1:
        return None
    if select_topk <= 0:
        return torch.zeros(-(-chunk.numel // 8), dtype=torch.uint8, device=chunk.device)
    whole: torch.Tensor | None = known.get(SelectedOfWhole.name)
    if whole is not None:
        return whole[chunk.offset // 8 :][: -(-chunk.numel // 8)]
    bounds: StreamedBounds = known[VarianceBounds.name]
    spread = variances(context, chunk)
    rule = SparsifyRule(method="band", bounds=bounds.on(chunk.device), ties_before=bounds.ties_before(spread))
    return ops.kept_masks(None, spread.models, rule, backend=context.backend)[0]


@dataclass(frozen=True)
class SelectedOfWhole(Statistic):
    """What is selected of a tensor that is in memory: a bit for each element."""

    context: TensorContext
    select_topk: float
    name = "selected"

    def observe(self, chunk: Chunk, known: Known) -> torch.Tensor:
        """uint8[bytes]; the chunk is the whole tensor."""
        spread = variances(self.context, chunk).models
        last = int(int(torch.count_nonzero(spread[0])) * self.select_topk)
        bounds, ties = ops.magnitude_bounds(None, spread, [0], [last], backend=self.context.backend)
        rule = SparsifyRule(method="band", bounds=bounds, ties_before=ties)
        return ops.kept_masks(None, spread, rule, backend=self.context.backend)[0]

    def add(self, state: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Never needed: there is one chunk."""
        raise AssertionError("a whole tensor is one chunk")

    def finish(self, state: torch.Tensor, known: Known) -> torch.Tensor:
        """As observed."""
        return state


class Spread(Statistic):
    """First sweep: how many variances have which leading 16 bits, and last of all how many are 0: int64[1, 65537]."""

    name = "spread"

    def __init__(self, context: TensorContext, select_topk: float) -> None:
        self.context = context
        self.select_topk = select_topk

    def observe(self, chunk: Chunk, known: Known) -> torch.Tensor:
        """Count one chunk."""
        spread = variances(self.context, chunk)
        counts = KeyHistogram(self.context).observe(spread, known)
        return torch.cat([counts, (spread.models[0] == 0).sum().reshape(1, 1)], dim=1)

    def add(self, state: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Counts add."""
        return state.add_(other)

    def finish(self, state: torch.Tensor, known: Known) -> tuple[torch.Tensor, Ranks]:
        """The histogram, and the ranks that are selected."""
        counts = state.cpu()
        last = int((self.context.numel - int(counts[0, -1])) * self.select_topk)
        return counts[:, :-1], Ranks([0], [last])


class VarianceBounds(Statistic):
    """Second sweep: of the variances whose leading bits are the threshold's, how many have which trailing 15 bits."""

    name = "bounds"

    def __init__(self, context: TensorContext) -> None:
        self.context = context

    def _inner(self, known: Known) -> tuple[RankBounds, Known]:
        counts, ranks = known[Spread.name]
        return RankBounds(self.context, ranks), {KeyHistogram.name: counts}

    def observe(self, chunk: Chunk, known: Known) -> torch.Tensor:
        """Count one chunk; where nothing is selected there is nothing to count."""
        bounds, inner = self._inner(known)
        if not bounds.ranks.cuts(self.context.numel):
            return torch.zeros(1, 1, dtype=torch.int64, device=chunk.device)
        return bounds.observe(variances(self.context, chunk), inner)

    def add(self, state: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Counts add."""
        return state.add_(other)

    def finish(self, state: torch.Tensor, known: Known) -> StreamedBounds:
        """The bounds of what is selected."""
        bounds, inner = self._inner(known)
        return bounds.finish(state, inner)


# -- how much each model counts


@dataclass(frozen=True)
class Energies(Statistic):
    """The weights: mean squares of what is selected, over their sum. Sums are exact, so that cuts do not show."""

    context: TensorContext
    select_topk: float
    name = "weights"

    def observe(self, chunk: Chunk, known: Known) -> torch.Tensor:
        """int64[n, 12] limbs."""
        assert chunk.base is not None
        mask = selected(self.context, chunk, known, self.select_topk)
        return ops.energy_sums(chunk.base, chunk.models, mask=mask, backend=self.context.backend)

    def add(self, state: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Limbs add; their carries wait until the end."""
        return state.add_(other)

    def finish(self, state: torch.Tensor, known: Known) -> list[float]:
        """One weight per model."""
        return weights_of([ops.l1_mass(limbs) / self.context.numel for limbs in state.cpu()])


def weights_of(energies: Sequence[float]) -> list[float]:
    """Each energy over the sum of all, the same for all where that is below 1e-6."""
    total = sum(energies)
    if total < SMALLEST_ENERGY:
        return [1.0 / len(energies)] * len(energies)
    return [energy / total for energy in energies]


def _merge_with_least_share(
    chunk: Chunk, weights: Sequence[float], mask: torch.Tensor | None, out: torch.Tensor
) -> None:
    """The merge where weights are so small that the least divisor shows: seldom, so by plain torch, block by block."""
    assert chunk.base is not None
    size = _BLOCK if chunk.device.type == "cpu" else _GPU_BLOCK
    factors = torch.tensor(list(weights), dtype=torch.float32).tolist()
    places = torch.arange(8, dtype=torch.uint8, device=chunk.device)
    for start in range(0, chunk.numel, size):
        part = chunk.part(start, min(start + size, chunk.numel))
        assert part.base is not None
        base = part.base.to(torch.float32)
        deltas = [model.to(torch.float32) - base for model in part.models]
        if mask is not None:
            bits = mask[start // 8 :][: -(-part.numel // 8), None] >> places & 1
            kept = bits.reshape(-1)[: part.numel].to(torch.bool)
            deltas = [torch.where(kept, delta, 0.0) for delta in deltas]
        votes = deltas[0]
        for delta in deltas[1:]:
            votes = votes + delta
        total, share = torch.zeros_like(base), torch.zeros_like(base)
        for delta, factor in zip(deltas, factors, strict=True):
            agrees = torch.where(votes >= 0, delta > 0, delta < 0)
            total = total + torch.where(agrees, delta * factor, 0.0)
            share = share + torch.where(agrees, factor, 0.0)
        least = torch.full((), SMALLEST_SHARE, dtype=torch.float32, device=chunk.device)
        mixed = base + total / torch.where(share < least, least, share)
        out[start : start + part.numel] = mixed.masked_fill(mixed.isnan(), torch.nan).to(out.dtype)
