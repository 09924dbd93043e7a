"""Inner products in CUDA C++: the function of `fastmerge/reference/geometry.py`, with the same bits."""

from __future__ import annotations

import torch
from torch import Tensor

from ..gpu import loadable, pairs
from ..rule import GRAM_BLOCK
from .launch import compiled, inputs, place
from .sparsify import few

__all__ = ["gram"]

if getattr(compiled, "GRAM_BLOCK", None) != GRAM_BLOCK:
    raise ImportError("fastmerge._cuda was built from other sources than this package; build it again")


def gram(base: Tensor | None, tensors: list[Tensor], row_length: int) -> Tensor:
    """Inner products of all pairs of models, block by block; see `fastmerge.ops.gram`."""
    few(len(tensors))
    shape = (pairs(len(tensors)), tensors[0].numel() // row_length, -(-row_length // GRAM_BLOCK))
    out = torch.empty(shape, dtype=torch.float64, device=tensors[0].device)
    if out.numel():
        base = None if base is None else loadable(base)
        models = [loadable(x) for x in tensors]
        compiled.gram(place(out.device), *inputs(base, models, torch.float32), row_length, out.data_ptr())
    return out
