"""One model as it is, or scaled: what layers are stacked with."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from fastmerge.methods.base import Chunk, Known, Method, Statistic, TensorContext
from fastmerge.methods.geometry import combine
from fastmerge.methods.parameters import Finite, Parameters, per_model


class PassthroughParameters(Parameters):
    """A factor."""

    scale: tuple[Finite, ...] = per_model("what the tensor is multiplied by", default=1.0)


class Passthrough(Method):
    """scale * model."""

    name = "passthrough"
    title = "Passthrough"
    source = "https://arxiv.org/abs/2312.15166 (SOLAR 10.7B, whose layers are stacked)"
    needs_base = False
    most_models = 1
    sweeps = "1"
    Parameters: ClassVar[type[Parameters]] = PassthroughParameters

    def compute_dtype(self, dtype: torch.dtype, numerics: str) -> torch.dtype:
        """The product is rounded once, as in the peer, whatever it is computed in."""
        return torch.float32

    def statistics(self, context: TensorContext, whole: bool) -> list[Statistic]:
        """None: it merges as it reads."""
        return []

    def merge(self, context: TensorContext, chunk: Chunk, known: Known, out: torch.Tensor) -> None:
        """A product with the scale, which is rounded to float32."""
        parameters: Any = context.parameters
        combine(None, chunk.models, list(parameters.scale), out, context.backend)
