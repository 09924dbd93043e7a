"""PCB-Merging: parameters compete, within a model and between models; the losers are dropped, the winners rescaled.

Du et al., NeurIPS 2024, arXiv 2410.02396. The paper's formula and the four that its released code computes are
variants; docs/pcb.md compares them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch

from fastmerge import ops
from fastmerge.backends.rule import PcbRule
from fastmerge.methods.base import Chunk, Known, MethodWithoutPeer, Statistic, TensorContext, whole_model
from fastmerge.methods.parameters import Finite, Fraction, Parameters, per_model, shared
from fastmerge.methods.pcb_statistics import (
    ClipBounds,
    ClipHistogram,
    ClipWindow,
    Extremes,
    Means,
    RuleOfWhole,
    ScoreHistogram,
    ScoreThresholds,
    ScoreWindow,
    rule_from,
)

Variant = Literal["vision_es", "vision", "script", "nlp", "paper"]


class PcbParameters(Parameters):
    """`weight` is the paper's lambda_i."""

    weight: tuple[Finite, ...] = per_model("how much of the model's delta to add", default=1.0)
    density: tuple[Fraction, ...] = per_model("fraction of each delta that competes successfully", default=0.1)
    variant: Variant = shared("vision_es", "which formula scores the parameters")
    scope: Literal["model", "tensor"] = shared("model", "all parameters of a model compete, or those of each tensor")
    lambda_: Finite = shared(1.0, "scales the merged delta before it is put on the base", alias="lambda")


class Pcb(MethodWithoutPeer):
    """out = base + lambda * sum_i(w_i c_i S_i) / sum_i(S_i), with the scores S of all parameters of a model."""

    name = "pcb"
    title = "PCB-Merging"
    source = "https://arxiv.org/abs/2410.02396 (Parameter Competition Balancing for Model Merging)"
    needs_base = True
    sweeps = "3 over the whole model (paper: 4), 1 where its statistics are known from the merge before"
    Parameters: ClassVar[type[Parameters]] = PcbParameters

    def model_statistics(self, contexts: Sequence[TensorContext]) -> list[Statistic]:
        """What scores need to know about all parameters, unless each tensor is for itself."""
        if not any(self._parameters(context).scope == "model" for context in contexts):
            return []
        return self._swept(whole_model(contexts, ("scope", "variant", "density")))

    def statistics(self, context: TensorContext, whole: bool) -> list[Statistic]:
        """The same of one tensor."""
        if self._parameters(context).scope == "model" or context.numel == 0:
            return []
        parameters = self._parameters(context)
        if whole:
            return [RuleOfWhole(context, parameters.variant, parameters.density)]
        return self._swept(context)

    def merge(self, context: TensorContext, chunk: Chunk, known: Known, out: torch.Tensor) -> None:
        """One pass over the chunk: the scores are computed again, never stored."""
        parameters = self._parameters(context)
        ops.pcb_apply(
            chunk.base,
            chunk.models,
            [weight * parameters.lambda_ for weight in parameters.weight],
            self._rule(context, known, chunk),
            out=out,
            backend=context.backend,
        )

    @staticmethod
    def _parameters(context: TensorContext) -> Any:
        return context.parameters

    def _rule(self, context: TensorContext, known: Known, chunk: Chunk) -> PcbRule:
        if RuleOfWhole.name in known:
            rule: PcbRule = known[RuleOfWhole.name]
            return rule
        return rule_from(self._parameters(context).variant, known, chunk)

    def _swept(self, context: TensorContext) -> list[Statistic]:
        variant, density = self._parameters(context).variant, self._parameters(context).density
        window = ScoreWindow(context, variant, density)
        scores: list[Statistic] = [window, ScoreHistogram(context, variant), ScoreThresholds(window)]
        if variant == "paper":
            return [Extremes(context), Means(context), *scores]
        return [
            ClipWindow(context, variant),
            ClipHistogram(context),
            ClipBounds(context, variant),
            *scores,
        ]
