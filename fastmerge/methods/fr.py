"""FR-Merging: the low frequencies are taken out of each delta matrix before the deltas are added.

FREE-Merging (Fourier Transform for Model Merging with Lightweight Experts), arXiv 2411.16815, and its released code;
docs/fr.md compares the two filters.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Literal

import torch

from fastmerge import ops
from fastmerge.backends.rule import SparsifyRule
from fastmerge.methods.base import Chunk, Known, MethodWithoutPeer, Statistic, TensorContext
from fastmerge.methods.parameters import Finite, Fraction, ParameterError, Parameters, per_model, shared

RATIOS = {"ideal": 0.1, "official": 0.7}
"""The ratio of each mode where none is given."""

INCLUDE = r"(?i)(attn|attention|mlp|feed_forward|ffn|expert|DenseReluDense|intermediate|output\.dense)(?!.*bias)"
"""What is filtered where nothing is named: weights of attention and MLPs, of which FR-Merging is about."""

_EVERYTHING = SparsifyRule(method="none")


class FrParameters(Parameters):
    """`weight` and `lambda` are what the paper's lambda_i and the code's coefficient are together."""

    weight: tuple[Finite, ...] = per_model("how much of the model's filtered delta to add", default=1.0)
    ratio: Fraction | None = shared(None, "how much the filter takes, or with mode official leaves: 0.1, or 0.7")
    mode: Literal["ideal", "official"] = shared("ideal", "the paper's filter, or that of its code")
    combine: Literal["sum", "consensus"] = shared("sum", "add all up, or what agrees with the elected sign")
    align: bool = shared(False, "give the deltas of a tensor one mean magnitude, the largest of them")
    include: str = shared(INCLUDE, "which matrices are filtered: a regular expression that their names hold")
    exclude_: str = shared("", "which of them are not, all the same", alias="exclude")
    lambda_: Finite = shared(1.0, "scales the merged delta before it is put on the base", alias="lambda")


class Fr(MethodWithoutPeer):
    """The result is base + lambda * sum_i(w_i F(delta_i)), F the filter, or the sum of those with the elected sign."""

    name = "fr"
    title = "FR-Merging"
    source = "https://arxiv.org/abs/2411.16815 (FREE-Merging)"
    needs_base = True
    sweeps = "1, matrices that are filtered in one piece; align: 2 over other tensors"
    Parameters: ClassVar[type[Parameters]] = FrParameters

    def check(self, context: TensorContext, labels: Sequence[str]) -> None:
        """Patterns must be regular expressions, too."""
        super().check(context, labels)
        parameters = self._parameters(context)
        for name, pattern in (("include", parameters.include), ("exclude", parameters.exclude_)):
            try:
                _finder(pattern)
            except re.error as error:
                raise ParameterError(f"{name} = {pattern!r} is not a regular expression: {error}.", name) from None

    # -- which tensors, and by what

    @staticmethod
    def _parameters(context: TensorContext) -> Any:
        return context.parameters

    def _filter(self, context: TensorContext) -> ops.HighpassPlan | None:
        """How this tensor is filtered; None where it is not."""
        parameters = self._parameters(context)
        if len(context.shape) != 2 or context.numel == 0 or not filters(context.name, parameters):
            return None
        ratio, device = ratio_of(parameters), "cpu" if context.device == "cpu" else "cuda"
        plan = ops.highpass_plan(context.shape, ratio, mode=parameters.mode, device=device)
        return None if plan.route == "nothing" else plan

    def _apart(self, context: TensorContext) -> bool:
        """Whether each delta must be filtered by itself: a sum of them can be filtered as one, F being linear."""
        return bool(self._parameters(context).align or self._parameters(context).combine == "consensus")

    def cut_unit(self, context: TensorContext) -> int:
        """A filtered matrix is never cut."""
        return 1 if self._filter(context) is None else max(prod(context.shape), 1)

    def workspace(self, context: TensorContext, numel: int) -> int:
        """Filtered deltas in float32, the delta that is being filtered, and what the filter takes."""
        plan = self._filter(context)
        if plan is None:
            return 0
        deltas = len(context.positions) if self._apart(context) else 1
        return (deltas + 1) * numel * 4 + plan.workspace

    # -- statistics and merge

    def statistics(self, context: TensorContext, whole: bool) -> list[Statistic]:
        """Mean magnitudes of what is aligned without being filtered."""
        if not self._parameters(context).align or context.numel == 0 or self._filter(context) is not None:
            return []
        return [Masses(context)]

    def merge(self, context: TensorContext, chunk: Chunk, known: Known, out: torch.Tensor) -> None:
        """A filtered matrix comes as one chunk; others are merged as they come."""
        plan = self._filter(context)
        if plan is None:
            self._put(context, chunk.base, chunk.models, known.get(Masses.name), out)
            return
        assert chunk.base is not None
        delta = torch.empty(context.shape, dtype=torch.float32, device=chunk.device)
        weights = self._parameters(context).weight
        if not self._apart(context):
            _difference(chunk.base, chunk.models, weights, delta.view(-1), context.backend)
            filtered = [self._filtered(context, plan, delta)]
            self._put(context, chunk.base, filtered, None, out, weights=[1.0], inputs="deltas")
            return
        filtered = []
        for model in chunk.models:
            _difference(chunk.base, [model], [1.0], delta.view(-1), context.backend)
            filtered.append(self._filtered(context, plan, delta))
        scales = None
        if self._parameters(context).align:
            scales = aligned(ops.l1_sums(None, filtered, _EVERYTHING, backend=context.backend).cpu())
        self._put(context, chunk.base, filtered, scales, out, inputs="deltas")

    @staticmethod
    def _filtered(context: TensorContext, plan: ops.HighpassPlan, delta: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(delta)
        return ops.highpass(delta, plan.ratio, mode=plan.mode, out=out, backend=context.backend).view(-1)

    def _put(
        self,
        context: TensorContext,
        base: torch.Tensor | None,
        tensors: Sequence[torch.Tensor],
        scales: Sequence[float] | None,
        out: torch.Tensor,
        weights: Sequence[float] | None = None,
        inputs: str = "models",
    ) -> None:
        """Add up and put on the base in one pass, and round once."""
        parameters = self._parameters(context)
        ops.consensus_apply(
            base,
            tensors,
            list(parameters.weight if weights is None else weights),
            inputs=inputs,
            rule=_EVERYTHING,
            scales=scales,
            election="weighted" if parameters.combine == "consensus" else "none",
            divisor="none",
            lambda_=parameters.lambda_,
            compute=context.compute,
            out=out,
            backend=context.backend,
        )


@functools.cache
def _finder(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


def filters(name: str, parameters: Any) -> bool:
    """Whether a matrix of this name is one of those that are filtered."""
    if not _finder(parameters.include).search(name):
        return False
    return not parameters.exclude_ or not _finder(parameters.exclude_).search(name)


def ratio_of(parameters: Any) -> float:
    """The ratio, or the mode's own."""
    return RATIOS[parameters.mode] if parameters.ratio is None else float(parameters.ratio)


def _difference(
    base: torch.Tensor, models: Sequence[torch.Tensor], weights: Sequence[float], out: torch.Tensor, backend: str
) -> None:
    """sum_i(w_i model_i - w_i base) in float32, in one pass. They alternate, so that partial sums stay small."""
    ops.consensus_apply(
        None,
        [x for model in models for x in (model, base)],
        [weight for each in weights for weight in (each, -each)],
        rule=_EVERYTHING,
        election="none",
        divisor="none",
        out=out,
        backend=backend,
    )


def aligned(sums: torch.Tensor) -> list[float]:
    """What each delta is multiplied by to have the largest mean magnitude of all; 1 for one that is all zeros.

    1, too, for one that is so near to zero that no float32 number is its factor: infinity would make NaN of it.

    sums: int64[n, 2, 12] of `ops.l1_sums`, on the host, of deltas of one size.
    """
    masses = [ops.l1_mass(limbs[0]) for limbs in sums]
    largest = max(masses)
    most = torch.finfo(torch.float32).max
    return [largest / mass if mass * most > largest else 1.0 for mass in masses]


@dataclass(frozen=True)
class Masses(Statistic):
    """The factors of `aligned` of a tensor that is not filtered."""

    context: TensorContext
    name = "alignment"

    def depends_only_on(self) -> Hashable:
        """Nothing."""
        return ()

    def observe(self, chunk: Chunk, known: Known) -> torch.Tensor:
        """int64[n, 2, 12] limbs."""
        return ops.l1_sums(chunk.base, chunk.models, _EVERYTHING, backend=self.context.backend)

    def add(self, state: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Limbs add; their carries wait until the end."""
        return state.add_(other)

    def finish(self, state: torch.Tensor, known: Known) -> list[float]:
        """One factor per model."""
        return aligned(state.cpu())
