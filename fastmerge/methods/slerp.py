"""Spherical linear interpolation: from the base to a model along the great circle (Shoemake, SIGGRAPH 1985)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from fastmerge.methods.angles import angle, clipped, root, sine
from fastmerge.methods.base import TensorContext
from fastmerge.methods.geometry import GeometricMethod, column, numbers
from fastmerge.methods.parameters import REQUIRED, Finite, Parameters, shared

_SMALL_NORM = 1e-8
_COLINEAR = 0.9995


class SlerpParameters(Parameters):
    """Where on the way."""

    t: Finite = shared(REQUIRED, "where on the way from the base (0) to the model (1)")


class Slerp(GeometricMethod):
    """sin((1 - t) a) / sin(a) base + sin(t a) / sin(a) model, with the angle a between them; else a straight line."""

    name = "slerp"
    title = "SLERP"
    source = "https://dl.acm.org/doi/10.1145/325334.325242 (Shoemake, Animating rotation with quaternion curves)"
    needs_base = True
    most_models = 1
    sweeps = "2: inner products, then the merge"
    Parameters: ClassVar[type[Parameters]] = SlerpParameters

    def operands(self, base: Tensor | None, models: list[Tensor]) -> tuple[Tensor | None, list[Tensor]]:
        """The base is one of the two ends."""
        assert base is not None
        return None, [base, *models]

    def coefficients(self, context: TensorContext, gram: Tensor) -> Tensor:
        """As in the peer: a straight line where the vectors are nearly parallel; what is nearly zero is not scaled."""
        parameters: Any = context.parameters
        return column(great_circle(numbers(gram), parameters.t))


def great_circle(gram: list[list[float]], t: float) -> tuple[float, float]:
    """The coefficients of the two vectors with these inner products."""
    one, other = (norm if norm > _SMALL_NORM else 1.0 for norm in (root(gram[0][0]), root(gram[1][1])))
    cosine = clipped(gram[0][1] / one / other, -1.0, 1.0)
    if abs(cosine) > _COLINEAR:
        return 1.0 - t, t
    between = angle(cosine)
    whole = sine(between)
    return sine((1.0 - t) * between) / whole, sine(t * between) / whole
