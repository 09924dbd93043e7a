"""Model soups: the weighted mean of the models themselves (Wortsman et al., arXiv 2203.05482)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from fastmerge import ops
from fastmerge.backends.rule import SparsifyRule
from fastmerge.methods.base import Chunk, Known, Method, Statistic, TensorContext
from fastmerge.methods.parameters import Finite, ParameterError, Parameters, per_model, shared


class LinearParameters(Parameters):
    """A weight per model."""

    weight: tuple[Finite, ...] = per_model("how much of the model to take")
    normalize: bool = shared(True, "divide by the sum of the weights")


class Linear(Method):
    """The result is sum_i(w_i model_i) / sum_i(w_i)."""

    name = "linear"
    title = "Linear"
    source = "https://arxiv.org/abs/2203.05482 (Model Soups)"
    needs_base = False
    sweeps = "1"
    Parameters: ClassVar[type[Parameters]] = LinearParameters

    def check(self, context: TensorContext, labels: Sequence[str]) -> None:
        """Weights that cancel have no mean."""
        parameters: Any = context.parameters
        if parameters.normalize and ops.weight_sum(parameters.weight, torch.float32, context.numerics) == 0:
            raise ParameterError(
                f"The weights for {context.name} add up to 0, by which linear would divide: "
                "give others, or normalize: false.",
                "weight",
            )

    def compute_dtype(self, dtype: torch.dtype, numerics: str) -> torch.dtype:
        """Always float32, as in the peer."""
        return torch.float32

    def workspace(self, context: TensorContext, numel: int) -> int:
        """The peer's sum is made in steps."""
        return numel * 4 if context.numerics == "mergekit" else 0

    def statistics(self, context: TensorContext, whole: bool) -> list[Statistic]:
        """None: it merges as it reads."""
        return []

    def merge(self, context: TensorContext, chunk: Chunk, known: Known, out: torch.Tensor) -> None:
        """The sum goes over the models in their order."""
        parameters: Any = context.parameters
        divisor = ops.weight_sum(parameters.weight, torch.float32, context.numerics) if parameters.normalize else None
        if context.numerics == "mergekit":
            total = ops.fused_sum(chunk.models, parameters.weight, backend=context.backend)
            _put([total], [1.0], divisor, context, out)
        else:
            _put(chunk.models, list(parameters.weight), divisor, context, out)


def _put(
    models: Sequence[torch.Tensor],
    weights: list[float],
    divisor: float | None,
    context: TensorContext,
    out: torch.Tensor,
) -> None:
    """Add up and divide in one pass, and round once."""
    ops.consensus_apply(
        None,
        models,
        weights,
        inputs="models",
        rule=SparsifyRule(method="none"),
        scales=[1.0] * len(models),
        election="none",
        zero_sign="positive",
        divisor="none" if divisor is None else "value",
        divisor_value=1.0 if divisor is None else divisor,
        lambda_=1.0,
        compute=context.compute,
        out=out,
        backend=context.backend,
    )
