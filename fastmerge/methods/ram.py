"""Reinforced Agent Merging: the mean over the models that changed an element, not over all (arXiv 2601.13572)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fastmerge import ops
from fastmerge.methods.base import Chunk, Known, MethodInFloat32, Statistic, TensorContext
from fastmerge.methods.parameters import Finite, NonNegative, Parameters, shared


class RamParameters(Parameters):
    """What counts as changed."""

    epsilon: NonNegative = shared(1e-5, "an element is changed where its delta is larger")


class RamPlusTlParameters(RamParameters):
    """How much what one model alone changed is scaled up, tensor by tensor."""

    r: Finite = shared(0.1, "how fast lone changes grow with the ratio of shared to lone ones")
    alpha: NonNegative = shared(0.2, "the ratio from which on they grow no more")


class Ram(MethodInFloat32):
    """The result is base + the mean of the deltas whose magnitude is above epsilon."""

    name = "ram"
    title = "Reinforced Agent Merging"
    source = "https://arxiv.org/abs/2601.13572 (Reinforced Agent Merging)"
    needs_base = True
    sweeps = "1"
    Parameters: ClassVar[type[Parameters]] = RamParameters

    def statistics(self, context: TensorContext, whole: bool) -> list[Statistic]:
        """None: it merges as it reads."""
        return []

    def merge(self, context: TensorContext, chunk: Chunk, known: Known, out: torch.Tensor) -> None:
        """Each element by itself, lone changes times the factors that are known."""
        parameters: Any = context.parameters
        assert chunk.base is not None
        ops.ram_apply(
            chunk.base,
            chunk.models,
            known.get(Factors.name, 1.0),
            epsilon=parameters.epsilon,
            out=out,
            backend=context.backend,
        )


class RamPlusTl(Ram):
    """As ram, but what model i alone changed times 1 + r min(shared_i / lone_i, alpha), counted in each tensor."""

    name = "ramplus_tl"
    title = "Reinforced Agent Merging Plus (Tensor-Local)"
    sweeps = "2"
    Parameters: ClassVar[type[Parameters]] = RamPlusTlParameters

    def statistics(self, context: TensorContext, whole: bool) -> list[Statistic]:
        """Where each model's changes are shared and where they are its own."""
        return [] if context.numel == 0 else [Factors(context)]


@dataclass(frozen=True)
class Factors(Statistic):
    """What each model's lone changes are multiplied by: two counts for each model."""

    context: TensorContext
    name = "factors"

    def depends_only_on(self) -> Hashable:
        """What counts as a change."""
        parameters: Any = self.context.parameters
        return parameters.epsilon

    def observe(self, chunk: Chunk, known: Known) -> torch.Tensor:
        """int64[n, 2]: shared and lone changes."""
        parameters: Any = self.context.parameters
        assert chunk.base is not None
        return ops.ram_counts(chunk.base, chunk.models, epsilon=parameters.epsilon, backend=self.context.backend)

    def add(self, state: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Counts add."""
        return state.add_(other)

    def finish(self, state: torch.Tensor, known: Known) -> list[float]:
        """One factor per model."""
        parameters: Any = self.context.parameters
        return [factor(counts, parameters.r, parameters.alpha) for counts in state.tolist()]


def factor(counts: Sequence[int], r: float, alpha: float) -> float:
    """1 + r min(shared / lone, alpha); where a model changes nothing alone, the factor has nothing to act on."""
    shared_changes, lone = counts
    return 1.0 + r * min(shared_changes / max(lone, 1), alpha)
