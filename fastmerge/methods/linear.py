"""Model soups: the weighted mean of the models themselves (Wortsman et al., arXiv 2203.05482)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from fastmerge import ops
from fastmerge.backends.rule import SparsifyRule
from fastmerge.methods.base import Chunk, Known, Method, Statistic, TensorContext
from fastmerge.methods.parameters import Finite, ParameterError, Parameters, per_model, shared

_BLOCK = 1 << 17
"""Elements summed at once: their float64 temporaries stay in the cache."""
_GPU_BLOCK = 1 << 20
"""The same on a GPU, which must be told each step."""


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
            total = fused_sum(chunk.models, parameters.weight)
            _put([total], [1.0], divisor, context, out)
        else:
            _put(chunk.models, list(parameters.weight), divisor, context, out)


def fused_sum(models: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """The weighted sum as the peer takes it: a chain of fused multiply-adds in float32, each rounded once.

    float64 holds the products exactly. The sum with what came before is rounded to odd there (its last bit set where it
    is inexact), after which rounding it to float32 is the same as rounding the exact sum.
    """
    total = torch.zeros(models[0].shape, dtype=torch.float32, device=models[0].device)
    size = _BLOCK if total.device.type == "cpu" else _GPU_BLOCK
    for start in range(0, total.numel(), size):
        block = total[start : start + size]
        for model, weight in zip(models, weights, strict=True):
            factor = torch.tensor(weight, dtype=torch.float32).item()
            product = model[start : start + size].to(torch.float32).to(torch.float64) * factor
            before = block.to(torch.float64)
            rounded = product + before
            # What the addition lost (Knuth's TwoSum, exact).
            virtual = rounded - product
            lost = (product - (rounded - virtual)) + (before - virtual)
            bits = rounded.view(torch.int64)
            inexact = (lost != 0) & lost.isfinite() & (bits & 1 == 0)
            # One step towards what was lost: away from zero where the signs agree, else towards zero.
            step = torch.where((lost > 0) == (rounded > 0), 1, -1)
            block.copy_(torch.where(inexact, bits + step, bits).view(torch.float64))
    return total


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
