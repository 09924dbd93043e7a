"""The frequency filter in CUDA C++: the products and the mask of `fastmerge/backends/highpass_on_gpus.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import highpass_on_gpus
from ..filters import PARTIAL_SUMS, Limits
from .launch import compiled, place, ref

__all__ = ["highpass", "mask_", "project", "subtract"]


def _filtered(x: Tensor, bases: Sequence[Tensor]) -> tuple[Any, ...]:
    """Matrices and bases as `Filtered` in csrc/cuda/kernels.h."""
    return ref(x), *x.shape, [(basis.data_ptr(), basis.shape[1]) for basis in bases]


def project(x: Tensor, bases: Sequence[Tensor], coefficients: Tensor) -> None:
    """What the bases have of x, into `coefficients`; see `highpass_on_gpus.Kernels`."""
    if coefficients.numel() == 0:
        return
    where, given = place(x.device), _filtered(x, bases)
    splits = compiled.highpass_splits(where, given, max(1, int(x.numel() * PARTIAL_SUMS) // coefficients.numel()))
    if splits == 1:
        compiled.highpass_project(where, given, 1, coefficients.data_ptr())
        return
    sums = torch.empty(splits, *coefficients.shape, dtype=torch.float32, device=x.device)
    compiled.highpass_project(where, given, splits, sums.data_ptr())
    torch.sum(sums, dim=0, out=coefficients)


def subtract(x: Tensor, bases: Sequence[Tensor], coefficients: Tensor, out: Tensor) -> None:
    """The matrices x without what the bases make of the coefficients, into `out`; see `highpass_on_gpus.Kernels`."""
    compiled.highpass_subtract(place(x.device), _filtered(x, bases), coefficients.data_ptr(), out.data_ptr())


def mask_(lines: Tensor, limits: Limits, first: int, scale: float) -> None:
    """Weigh lines of a spectrum in place; see `highpass_on_gpus.Kernels`."""
    numbers = limits.size, limits.across, limits.least, limits.most, limits.ring, limits.wrapped, limits.mirrored
    compiled.highpass_mask(place(lines.device), lines.data_ptr(), numbers, lines.shape[0], first, lines.shape[1], scale)


RANKS = 8
"""Vectors that a thread has sums of at once: those that fill a class up to a multiple of it are zeros."""

KERNELS = highpass_on_gpus.Kernels(project, subtract, mask_, RANKS)


def highpass(x: Tensor, ratio: float, mode: str, out: Tensor) -> None:
    """Filter each matrix of x [..., H, W] into `out`; see `fastmerge.ops.highpass`."""
    highpass_on_gpus.highpass(KERNELS, x, ratio, mode, out)
