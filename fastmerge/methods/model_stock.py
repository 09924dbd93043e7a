"""Model Stock: between the base and the mean of the models, as near to the mean as the models agree (Jang et al.)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fastmerge.methods.angles import clipped, root
from fastmerge.methods.base import TensorContext
from fastmerge.methods.geometry import GeometricMethod, Rows
from fastmerge.methods.parameters import Parameters, shared

_SMALLEST_PRODUCT = 1e-6
_SINGULAR = 1e-6


class ModelStockParameters(Parameters):
    """No weights: the angles say everything."""

    filter_wise: bool = shared(False, "a ratio for each row (along the last dimension), not one for the tensor")


class ModelStock(GeometricMethod):
    """base + t mean_i(delta_i), t = n c / (1 + (n - 1) c), c the mean cosine between two deltas."""

    name = "model_stock"
    title = "Model Stock"
    source = "https://arxiv.org/abs/2403.19522 (Model Stock)"
    needs_base = True
    least_models = 2
    sweeps = "2: inner products, then the merge; filter_wise 1, whole rows at a time"
    Parameters: ClassVar[type[Parameters]] = ModelStockParameters

    def rows(self, context: TensorContext) -> Rows:
        """A tensor of one dimension is one row."""
        parameters: Any = context.parameters
        return "last" if parameters.filter_wise and len(context.shape) > 1 else "whole"

    def coefficients(self, context: TensorContext, gram: Tensor) -> Tensor:
        """Norms whose product is below 1e-6 count as that, and where t has no bound, the base stays: as in the peer."""
        count = gram.shape[0]
        norms = [root(gram[i, i]) for i in range(count)]
        total = torch.zeros_like(norms[0])
        for i in range(count):
            for j in range(i + 1, count):
                total = total + clipped(gram[i, j] / (norms[i] * norms[j]).clamp(min=_SMALLEST_PRODUCT), -1.0, 1.0)
        cosine = total / torch.full_like(total, count * (count - 1) // 2)
        divisor = 1.0 + (count - 1) * cosine
        singular = divisor.abs() < _SINGULAR
        share = torch.where(singular, 0.0, cosine / torch.where(singular, 1.0, divisor))
        return share.expand(count, -1)
