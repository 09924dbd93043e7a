"""The three kernels that each floor for GPUs brings to the frequency filter, in plain torch: what they are held to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastmerge.backends.filters import Limits
from fastmerge.backends.highpass_on_gpus import Kernels


def project(x: Tensor, bases: Sequence[Tensor], coefficients: Tensor) -> None:
    """In float64."""
    wide = x.double()
    parts = [wide]
    if len(bases) == 2:
        upper, lower = wide.chunk(2, dim=1)
        parts = [upper + lower, upper - lower]
    coefficients.copy_(torch.cat([basis.double().T @ part for basis, part in zip(bases, parts)], dim=1))


def subtract(x: Tensor, bases: Sequence[Tensor], coefficients: Tensor, out: Tensor) -> None:
    """In float64, rounded to float32 and from there to the result."""
    of_classes = coefficients.double().split([basis.shape[1] for basis in bases], dim=1)
    products = [basis.double() @ each for basis, each in zip(bases, of_classes)]
    whole = products[0]
    if len(bases) == 2:
        whole = torch.cat([products[0] + products[1], products[0] - products[1]], dim=1)
    out.copy_((x.double() - whole).float())


def weights(limits: Limits, first: int, count: int) -> Tensor:
    """The symmetrised mask of some lines, float64[count, across]."""

    def squares(index: np.ndarray, size: int) -> np.ndarray:
        return (np.minimum(index, size - index) if limits.wrapped else index - size // 2) ** 2

    def kept(lines: np.ndarray, places: np.ndarray) -> np.ndarray:
        squared = squares(lines, limits.size)[:, None] + squares(places, limits.across)
        inside = (squared >= limits.least) & (squared <= limits.most)
        return inside * (1.0 + (squared == limits.ring))

    lines, places = first + np.arange(count), np.arange(limits.across)
    return torch.from_numpy((kept(lines, places) + kept(-lines % limits.size, -places % limits.across)) / 2)


def mask_(lines: Tensor, limits: Limits, first: int, scale: float) -> None:
    """By a table."""
    lines *= (weights(limits, first, lines.shape[1]) * scale).float()


PLAIN = Kernels(project, subtract, mask_)
