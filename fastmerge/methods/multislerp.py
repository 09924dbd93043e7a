"""Multi-SLERP: the weighted mean of several models' directions, as long as they are in the mean.

As in mergekit, whose method it is (goddard.blog/posts/multislerp-wow-what-a-cool-idea). It projects the directions onto
the tangent space at their normalised weighted mean, adds them up there and goes back to the sphere. That sum is zero:
what is added up is the part of the weighted mean that is orthogonal to itself. (The peer's is rounding.) So what is
left of it all is the normalised mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor

from fastmerge.errors import MergeError
from fastmerge.methods.angles import root
from fastmerge.methods.base import TensorContext
from fastmerge.methods.geometry import GeometricMethod, column, numbers
from fastmerge.methods.parameters import Finite, ParameterError, Parameters, per_model, shared

_NOTHING = 2.0**-24
"""What float32 cannot tell from nothing, of the sum of the weights: what is left of directions that cancel."""


class MultislerpParameters(Parameters):
    """A weight per model."""

    weight: tuple[Finite, ...] = per_model("how much the model's direction counts")
    normalize_weights: bool = shared(True, "divide the weights by their sum")
    eps: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = shared(
        1e-8, "added to each norm; a mean of directions that is shorter has no direction"
    )


class Multislerp(GeometricMethod):
    """base + sum_i(w_i |d_i|) m / |m| with the mean of directions m = sum_i(w_i d_i / |d_i|)."""

    name = "multislerp"
    title = "Multi-SLERP"
    source = "https://goddard.blog/posts/multislerp-wow-what-a-cool-idea (as in mergekit)"
    needs_base = False
    takes_base = True
    sweeps = "2: inner products, then the merge"
    Parameters: ClassVar[type[Parameters]] = MultislerpParameters

    def check(self, context: TensorContext, labels: Sequence[str]) -> None:
        """Weights that cancel cannot be normalised."""
        super().check(context, labels)
        parameters: Any = context.parameters
        if parameters.normalize_weights and len(labels) > 1 and sum(parameters.weight) == 0:
            raise ParameterError(
                f"The weights for {context.name} add up to 0, by which multislerp would divide: "
                "give others, or normalize_weights: false.",
                "weight",
            )

    def coefficients(self, context: TensorContext, gram: Tensor) -> Tensor:
        """A single model is taken as it is; of two that cancel, the weighted sum; where nothing changed, the base."""
        parameters: Any = context.parameters
        inner = numbers(gram)
        count = len(inner)
        if count == 1:
            return column([1.0])
        weights = list(parameters.weight)
        if parameters.normalize_weights:
            total = sum(weights)
            weights = [weight / total for weight in weights]
        norms = [root(inner[i][i]) for i in range(count)]
        if not any(norms):
            return column([0.0] * count)
        # The coefficients of the mean of directions.
        mean = [
            weight / (norm + parameters.eps) if norm + parameters.eps > 0 else 0.0
            for weight, norm in zip(weights, norms, strict=True)
        ]
        length = root(max(quadratic(inner, mean), 0.0))
        if length <= max(parameters.eps, _NOTHING * sum(map(abs, weights))):
            if count == 2:
                return column(weights)
            raise MergeError(
                f"The directions of {context.name} cancel out in their weighted mean, which has no direction then; "
                "multislerp needs other weights there, or leave a model out."
            )
        size = sum(weight * norm for weight, norm in zip(weights, norms, strict=True)) / length
        return column([size * each for each in mean])


def quadratic(gram: list[list[float]], vector: Sequence[float]) -> float:
    """The squared length of the combination with these coefficients."""
    return sum(a * sum(g * b for g, b in zip(row, vector, strict=True)) for a, row in zip(vector, gram, strict=True))
