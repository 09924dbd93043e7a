"""Sparsification in CUDA C++: the functions of `fastmerge/reference/sparsify.py`, with the same bits."""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import compiled, place, ref


def count_nonfinite(x: Tensor) -> Tensor:
    """How many elements are NaN, and how many infinite; see `fastmerge.ops.count_nonfinite`."""
    out = torch.zeros(2, dtype=torch.int64, device=x.device)
    compiled.count_nonfinite(place(x.device), ref(x), x.numel(), out.data_ptr())
    return out


def zero_nonfinite_(x: Tensor) -> None:
    """Set NaN and infinite elements of x to zero, in place; see `fastmerge.ops.zero_nonfinite_`."""
    compiled.zero_nonfinite(place(x.device), ref(x), x.numel())
