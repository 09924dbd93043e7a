"""The frequency filter in Triton: the kernels that `fastmerge/backends/highpass_on_gpus.py` asks for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._triton import highpass as kernels
from .. import highpass_on_gpus
from ..filters import PARTIAL_SUMS, Limits
from .launch import PRODUCTS, launch, tiles

__all__ = ["KERNELS", "highpass"]

COLUMNS = 64
"""Of a matrix that a program takes: rows of 256 bytes of float32, 128 of 16-bit numbers."""

ROWS = 64
"""Of each half that a program changes."""

SUMMED = 16
"""Rows of each half that a program adds at once, while the next ones are on their way."""

RANKS = 64
"""Vectors of each class that a program projects on."""

STEP = 16
"""Vectors whose products are added at once."""

PROGRAMS = 512
"""So many keep a GPU busy. It does not ask which GPU it is, so that sums have the same pieces everywhere."""

SHORTEST = 8 * SUMMED
"""Rows of each half that a program should have, at least, to add up."""

BLOCK = 2048
"""Numbers of a line that a program masks."""


def highpass(x: Tensor, ratio: float, mode: str, out: Tensor) -> None:
    """Filter each matrix of x [..., H, W] into `out`; see `fastmerge.ops.highpass`."""
    highpass_on_gpus.highpass(KERNELS, x, ratio, mode, out)


def project(x: Tensor, bases: Sequence[Tensor], coefficients: Tensor) -> None:
    """See `highpass_on_gpus.Kernels`."""
    matrices, ranks, width = coefficients.shape
    rows, classes = bases[0].shape[0], len(bases)
    most = max(basis.shape[1] for basis in bases)
    vectors = min(RANKS, max(STEP, 1 << (most - 1).bit_length()))
    programs = tiles(most, vectors) * tiles(width, COLUMNS) * matrices
    wanted = min(tiles(PROGRAMS, programs), tiles(rows, SHORTEST), int(rows * classes * PARTIAL_SUMS) // ranks)
    span = tiles(tiles(rows, max(1, wanted)), SUMMED) * SUMMED
    splits = tiles(rows, span)
    partial = coefficients if splits == 1 else coefficients.new_empty((splits, *coefficients.shape))
    launch(
        kernels.project,
        (programs * splits,),
        x.device,
        x,
        *_both(bases),
        partial,
        rows,
        width,
        *(basis.shape[1] for basis in _both(bases)),
        span,
        splits,
        matrices,
        num_warps=8 if vectors == RANKS else 4,
        CLASSES=classes,
        ROWS=SUMMED,
        COLUMNS=COLUMNS,
        RANKS=vectors,
        PRECISION=PRODUCTS,
        num_stages=4,
    )
    if splits > 1:
        torch.sum(partial, dim=0, out=coefficients)


def subtract(x: Tensor, bases: Sequence[Tensor], coefficients: Tensor, out: Tensor) -> None:
    """See `highpass_on_gpus.Kernels`."""
    matrices, _, width = coefficients.shape
    rows = bases[0].shape[0]
    launch(
        kernels.subtract,
        (tiles(rows, ROWS) * tiles(width, COLUMNS) * matrices,),
        x.device,
        x,
        *_both(bases),
        coefficients,
        out,
        rows,
        width,
        *(basis.shape[1] for basis in _both(bases)),
        num_warps=8,
        CLASSES=len(bases),
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        RANKS=STEP,
        PRECISION=PRODUCTS,
        num_stages=3,
    )


def _both(bases: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Two bases: an empty one in the place of a class that is not there."""
    return bases[0], bases[1] if len(bases) == 2 else bases[0][:, :0]


def mask_(lines: Tensor, limits: Limits, first: int, scale: float) -> None:
    """See `highpass_on_gpus.Kernels`."""
    matrices, count, across = lines.shape
    parts = torch.view_as_real(lines)
    launch(
        kernels.mask,
        (matrices * count * tiles(2 * across, BLOCK),),
        lines.device,
        parts,
        count,
        first,
        limits.size,
        across,
        limits.least,
        limits.most,
        limits.ring,
        scale,
        WRAPPED=limits.wrapped,
        MIRRORED=limits.mirrored,
        BLOCK=BLOCK,
        EVEN=across % 2 == 0,
    )


KERNELS = highpass_on_gpus.Kernels(project, subtract, mask_)
