"""NearSwap: the base takes over what another model has nearly the same (alchemonaut's QuartetAnemoi)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from fastmerge import ops
from fastmerge.methods.base import Chunk, Known, MethodInFloat32, Statistic, TensorContext
from fastmerge.methods.parameters import REQUIRED, Finite, Parameters, shared


class NearSwapParameters(Parameters):
    """One distance for all elements."""

    t: Finite = shared(REQUIRED, "the distance up to which an element is the other model's")


class NearSwap(MethodInFloat32):
    """The result is w x + (1 - w) base, w = clamp(t / max(|x - base|, 1e-6), 0, 1)."""

    name = "nearswap"
    title = "NearSwap"
    source = "https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001"
    needs_base = True
    most_models = 1
    sweeps = "1"
    Parameters: ClassVar[type[Parameters]] = NearSwapParameters

    def statistics(self, context: TensorContext, whole: bool) -> list[Statistic]:
        """None: it merges as it reads."""
        return []

    def merge(self, context: TensorContext, chunk: Chunk, known: Known, out: torch.Tensor) -> None:
        """Each element by itself."""
        parameters: Any = context.parameters
        assert chunk.base is not None
        ops.nearswap(chunk.base, chunk.models[0], parameters.t, out=out, backend=context.backend)
