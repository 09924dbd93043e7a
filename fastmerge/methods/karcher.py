"""The Karcher mean: the direction to which the sum of squared angles from all models is least, found step by step.

Each step goes from the mean along the sphere by the mean of the logarithms of all directions there. (Karcher, 1977; as
mergekit's karcher.) A direction that is opposite to the mean has no logarithm and is left out of the step.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor

from fastmerge.methods.angles import angle, clipped, root, sine
from fastmerge.methods.base import TensorContext
from fastmerge.methods.geometry import GeometricMethod, column, numbers
from fastmerge.methods.multislerp import quadratic
from fastmerge.methods.parameters import Parameters, shared

_HALF_PI = math.pi / 2


class KarcherParameters(Parameters):
    """When to stop."""

    max_iter: Annotated[int, Field(ge=0)] = shared(10, "most steps towards the mean")
    tol: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = shared(
        1e-5, "norms, angles and steps below it count as none"
    )


class Karcher(GeometricMethod):
    """The mean of the norms times the Karcher mean of the directions."""

    name = "karcher"
    title = "Karcher Mean"
    source = "https://arxiv.org/abs/2603.04972 (as in mergekit)"
    needs_base = False
    sweeps = "2: inner products, then the merge"
    Parameters: ClassVar[type[Parameters]] = KarcherParameters

    def coefficients(self, context: TensorContext, gram: Tensor) -> Tensor:
        """A single model is taken as it is."""
        parameters: Any = context.parameters
        inner = numbers(gram)
        if len(inner) == 1:
            return column([1.0])
        norms = [root(inner[i][i]) for i in range(len(inner))]
        there = [i for i, norm in enumerate(norms) if norm > parameters.tol]
        result = [0.0] * len(inner)
        if there:
            cosines = [[inner[i][j] / norms[i] / norms[j] for j in there] for i in there]
            direction = mean_direction(cosines, int(parameters.max_iter), parameters.tol)
            size = sum(norm / len(norms) for norm in norms)
            for i, part in zip(there, direction, strict=True):
                result[i] = size * part / norms[i]
        return column(result)


def mean_direction(cosines: list[list[float]], steps: int, tolerance: float) -> list[float]:
    """The Karcher mean of unit vectors, as a combination of them, from the cosines between them."""
    count = len(cosines)
    mean = [1.0 / count] * count
    length = _length(cosines, mean)
    # Directions that cancel have no mean to begin with: begin with the first of them.
    mean = [part / length for part in mean] if length >= max(tolerance, 1e-12) else [1.0] + [0.0] * (count - 1)
    for _ in range(steps):
        step = [0.0] * count
        for j, row in enumerate(cosines):
            cosine = clipped(sum(part * each for part, each in zip(mean, row, strict=True)), -1.0, 1.0)
            between = angle(cosine)
            if between < tolerance or between == 0.0 or math.pi - between <= max(tolerance, 1e-6):
                continue
            pull = between / sine(between) / count
            step = [part - pull * cosine * each for part, each in zip(step, mean, strict=True)]
            step[j] += pull
        length = _length(cosines, step)
        if length < tolerance or length == 0.0:
            break
        along, aside = sine(length + _HALF_PI), sine(length) / length
        mean = [along * one + aside * other for one, other in zip(mean, step, strict=True)]
        length = _length(cosines, mean)
        if length > max(tolerance, 0.0):
            mean = [part / length for part in mean]
    return mean


def _length(cosines: list[list[float]], vector: list[float]) -> float:
    return root(max(quadratic(cosines, vector), 0.0))
