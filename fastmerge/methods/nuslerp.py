"""NuSLERP: two models, or what they changed in a base, interpolated along the great circle by their weights.

As in mergekit, whose method it is. See `slerp` for the great circle itself.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fastmerge.methods.angles import angle, clipped, root, sine
from fastmerge.methods.base import TensorContext
from fastmerge.methods.geometry import GeometricMethod, Rows
from fastmerge.methods.parameters import Finite, Parameters, per_model, shared

_SMALLEST_NORM = 1e-7
_NO_WEIGHT = 1e-6


class NuslerpParameters(Parameters):
    """`weight` says how near the result is to each model; only their ratio counts."""

    weight: tuple[Finite, ...] = per_model("how near the result is to the model, in proportion to the other")
    nuslerp_flatten: bool = shared(True, "take a whole tensor for one vector; else each row is one")
    nuslerp_row_wise: bool = shared(False, "without flatten: vectors along the first dimension, not along the last")


class Nuslerp(GeometricMethod):
    """base + sin((1 - t) a) / sin(a) delta_1 + sin(t a) / sin(a) delta_2 with t = w_2 / (w_1 + w_2)."""

    name = "nuslerp"
    title = "NuSLERP"
    source = "https://dl.acm.org/doi/10.1145/325334.325242 (SLERP), by weights as in mergekit"
    needs_base = False
    takes_base = True
    least_models = 2
    most_models = 2
    sweeps = "2: inner products, then the merge; without flatten 1, whole rows at a time"
    Parameters: ClassVar[type[Parameters]] = NuslerpParameters

    def rows(self, context: TensorContext) -> Rows:
        """A tensor of one dimension is one row."""
        parameters: Any = context.parameters
        if parameters.nuslerp_flatten or len(context.shape) < 2:
            return "whole"
        return "first" if parameters.nuslerp_row_wise else "last"

    def coefficients(self, context: TensorContext, gram: Tensor) -> Tensor:
        """As in the peer: a straight line where the cosine is 1 or -1 in float32."""
        parameters: Any = context.parameters
        total = sum(parameters.weight)
        t = 0.5 if abs(total) < _NO_WEIGHT else parameters.weight[1] / total
        norms = [root(gram[i, i]).clamp(min=_SMALLEST_NORM) for i in range(2)]
        cosine = clipped(gram[0, 1] / norms[0] / norms[1], -1.0, 1.0)
        straight = cosine.to(torch.float32).abs() == 1.0
        between = angle(torch.where(straight, 0.0, cosine))
        whole = sine(between)
        one, other = sine((1.0 - t) * between) / whole, sine(t * between) / whole
        return torch.stack([torch.where(straight, 1.0 - t, one), torch.where(straight, t, other)])
