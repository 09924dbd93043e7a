"""One formula behind eight methods: sparsify each delta, weigh, perhaps elect a sign, add, divide, scale, add the base.

    out = base + lambda * sum_i(m_i w_i s_i) / divisor          s_i = the sparsified delta of model i

with m_i from the sign election (TIES) or 1, and the divisor the sum of the weights that took part, or 1.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from math import prod
from typing import Any, ClassVar, Literal

import torch

from fastmerge import ops
from fastmerge.backends.rule import SparsifyRule
from fastmerge.methods.base import Chunk, Known, Method, Statistic, TensorContext, whole_model
from fastmerge.methods.parameters import Finite, Fraction, ParameterError, Parameters, per_model, shared
from fastmerge.methods.statistics import (
    KeptMasks,
    KeyHistogram,
    KeyWindow,
    RankBounds,
    RankBoundsOfWhole,
    Ranks,
    Rescale,
    StreamedBounds,
    kept_ranks,
    kept_ranks_without_outliers,
    trivial_bounds,
)

Scope = Literal["tensor", "model"]
Sparsify = Literal["none", "magnitude", "outliers", "bernoulli", "della"]


class ConsensusParameters(Parameters):
    """What all of them take; `density` is the fraction that sparsification keeps."""

    weight: tuple[Finite, ...] = per_model("how much of the model's delta to add")
    density: tuple[Fraction, ...] = per_model("fraction of each delta that is kept", default=1.0)
    lambda_: Finite = shared(1.0, "scales the merged delta before it is put on the base", alias="lambda")
    normalize: bool = shared(False, "divide by the sum of the weights that took part")
    rescale: bool = shared(False, "give each sparsified delta its L1 norm back")
    int8_mask: bool = shared(False, "accepted and without effect: no mask is stored")


class ScopedParameters(ConsensusParameters):
    """Thresholds on magnitudes may be those of each tensor or one for all tensors of a model."""

    scope: Scope = shared("tensor", "thresholds of each tensor, or of the whole model, where equals are all kept")


class ConsensusMethod(Method):
    """A method is a choice of sparsification and whether there is a sign election."""

    needs_base = True
    sparsify: ClassVar[Sparsify] = "none"
    election: ClassVar[bool] = False
    Parameters: ClassVar[type[Parameters]] = ConsensusParameters

    def compute_dtype(self, dtype: torch.dtype, numerics: str) -> torch.dtype:
        """float32, or with numerics="mergekit" the dtype in which the inputs meet."""
        return dtype if numerics == "mergekit" else torch.float32

    # -- what is kept

    def _parameters(self, context: TensorContext) -> Any:
        return context.parameters

    def _cuts(self, context: TensorContext) -> bool:
        """Whether anything is sparsified at all."""
        return self.sparsify != "none" and any(density < 1 for density in self._parameters(context).density)

    def _ranks(self, context: TensorContext) -> Ranks:
        parameters = self._parameters(context)
        if self.sparsify == "outliers":
            return kept_ranks_without_outliers(context.numel, parameters.density, parameters.gamma)
        return kept_ranks(context.numel, parameters.density)

    def _row_axis(self, context: TensorContext) -> int:
        """DELLA ranks along the last dimension; the peer's numbers rank along dimension 1."""
        axis = 1 if context.numerics == "mergekit" and len(context.shape) >= 3 else len(context.shape) - 1
        return max(axis, 0)

    def _row_length(self, context: TensorContext) -> int:
        if len(context.shape) < 2:
            return max(context.numel, 1)
        return max(context.shape[self._row_axis(context)], 1)

    def _rule(self, context: TensorContext, chunk: Chunk, known: Known) -> SparsifyRule:
        """Which elements of this chunk are kept."""
        parameters = self._parameters(context)
        if not self._cuts(context):
            return SparsifyRule(method="none")
        if self.sparsify in ("magnitude", "outliers"):
            bounds = known.get("bounds") or StreamedBounds(trivial_bounds(self._ranks(context)), context)
            return SparsifyRule(method="band", bounds=bounds.on(chunk.device), ties_before=bounds.ties_before(chunk))
        if "masks" in known:
            first = chunk.offset // 8
            return SparsifyRule(method="mask", masks=known["masks"][:, first : first + -(-chunk.numel // 8)])
        della = self.sparsify == "della"
        return SparsifyRule(
            method="della" if della else "bernoulli",
            density=list(parameters.density),
            epsilon=list(parameters.epsilon) if della else [],
            row_length=self._row_length(context) if della else 1,
            seed=context.seed,
            tensor_id=context.tensor_id,
            positions=list(context.positions),
            offset=chunk.offset,
        )

    # -- chunks

    def workspace(self, context: TensorContext, numel: int) -> int:
        """DELLA's masks where they are kept, and its rows where they must be brought into one piece first."""
        if self.sparsify != "della" or not self._cuts(context):
            return 0
        models = len(context.positions)
        masks = models * -(-numel // 8) if self._parameters(context).rescale else 0
        arranged = self._row_axis(context) < len(context.shape) - 1
        return masks + (numel * 4 * (models + 2) if arranged else 0)

    def cut_unit(self, context: TensorContext) -> int:
        """Whole rows for DELLA, whole slices of dimension 0 where its rows do not lie in one piece."""
        if self.sparsify != "della" or not self._cuts(context):
            return 1
        if len(context.shape) < 2:
            return max(context.numel, 1)
        if self._row_axis(context) != len(context.shape) - 1:
            return max(prod(context.shape[1:]), 1)
        return self._row_length(context)

    def _arranged(self, context: TensorContext, flat: torch.Tensor) -> torch.Tensor:
        """`flat` with the ranked dimension last, so that each row lies in one piece."""
        axis = self._row_axis(context)
        if self.sparsify != "della" or axis >= len(context.shape) - 1 or not self._cuts(context):
            return flat
        return flat.reshape(-1, *context.shape[1:]).movedim(axis, -1).reshape(-1)

    def _arranged_chunk(self, context: TensorContext, chunk: Chunk) -> Chunk:
        return replace(
            chunk,
            base=None if chunk.base is None else self._arranged(context, chunk.base),
            models=[self._arranged(context, model) for model in chunk.models],
        )

    # -- statistics and merge

    def check(self, context: TensorContext, labels: Sequence[str]) -> None:
        """The peer knows no thresholds over a whole model."""
        if self._model_scope(context) and context.numerics == "mergekit":
            raise ParameterError(
                f"scope = model for {context.name} goes with numerics fp32 only: mergekit has no such threshold; "
                "leave out either.",
                "scope",
            )

    def _kept_by(self, context: TensorContext) -> Hashable:
        """What decides which elements of a tensor are kept, besides the elements."""
        parameters = self._parameters(context)
        more = [getattr(parameters, name, None) for name in ("gamma", "epsilon", "scope")]
        return self.sparsify, parameters.density, *more, context.seed, context.numerics

    def _model_scope(self, context: TensorContext) -> bool:
        return getattr(context.parameters, "scope", "tensor") == "model"

    def model_statistics(self, contexts: Sequence[TensorContext]) -> list[Statistic]:
        """Rank bounds over all tensors, where the scope is the model; its elements are all in one order then."""
        if not any(self._model_scope(context) for context in contexts):
            return []
        whole = whole_model(contexts, ("scope", "density", "gamma"))
        ranks = self._ranks(whole)
        if not ranks.cuts(whole.numel):
            return []
        return [KeyWindow(whole, ranks, True), KeyHistogram(whole), RankBounds(whole, ranks, True)]

    def statistics(self, context: TensorContext, whole: bool) -> list[Statistic]:
        """Rank bounds for the magnitude rules, and L1 sums when rescaling; nothing where nothing is cut off."""
        if not self._cuts(context) or context.numel == 0:
            return []
        needed: list[Statistic] = []
        if self.sparsify in ("magnitude", "outliers") and not self._model_scope(context):
            ranks = self._ranks(context)
            if ranks.cuts(context.numel):
                streamed = [KeyWindow(context, ranks), KeyHistogram(context), RankBounds(context, ranks)]
                needed += [RankBoundsOfWhole(context, ranks)] if whole else streamed
        if self._parameters(context).rescale:
            # The peer takes these ratios in float32 where its random masks meet float16.
            random_half = context.compute == torch.float16 and self.sparsify in ("bernoulli", "della")
            precision = torch.float32 if random_half else context.compute

            def rule(chunk: Chunk, known: Known) -> SparsifyRule:
                return self._rule(context, chunk, known)

            def arranged(chunk: Chunk) -> Chunk:
                return self._arranged_chunk(context, chunk)

            if whole and self.sparsify == "della" and self._row_length(context) % 8 == 0:
                needed.append(KeptMasks(context, rule, arranged))
            needed.append(Rescale(context, rule, arranged, precision, self._kept_by(context)))
        return needed

    def merge(self, context: TensorContext, chunk: Chunk, known: Known, out: torch.Tensor) -> None:
        """One pass over the chunk: the masks are recomputed from the bounds, never stored."""
        parameters = self._parameters(context)
        rule = self._rule(context, chunk, known)
        arranged = self._arranged_chunk(context, chunk)
        in_place = all(a is b for a, b in zip(arranged.models, chunk.models, strict=True))
        target = out if in_place else torch.empty_like(out)
        ops.consensus_apply(
            arranged.base,
            arranged.models,
            list(parameters.weight),
            inputs="models",
            rule=rule,
            scales=known.get("scales", [1.0] * len(chunk.models)),
            election="weighted" if self.election else "none",
            zero_sign="positive",
            divisor="weights" if parameters.normalize else "none",
            divisor_value=ops.total_divisor(parameters.weight, context.compute, context.numerics),
            lambda_=parameters.lambda_,
            compute=context.compute,
            out=target,
            backend=context.backend,
        )
        if not in_place:
            axis = self._row_axis(context)
            moved = [*context.shape[1:axis], *context.shape[axis + 1 :], context.shape[axis]]
            out.view(-1, *context.shape[1:]).copy_(target.view(-1, *moved).movedim(-1, axis))
