"""The frequency filter on a GPU: torch's transforms, and three kernels that each floor has of its own.

The routes are those of `fastmerge/backends/highpass.py`, and `filters.plan` chooses between them by the costs of a GPU.
A low-rank filter reads each matrix twice and writes it once; the products are the floor's, because a library's would
read and write sums and differences of the halves of the rows besides. What transforms need is added by passes over the
spectrum alone: they are made without scaling, and the one scale goes where something is multiplied anyway.

Matrices of one shape go together, as many as are worked on at a time. Where they lie in memory is torch's to say: a
transform leaves its own axis contiguous, so that the lines it is handed transposed come out as lines.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import filters
from .filters import HighpassPlan, Limits, Mask
from .gpu import loadable
from .highpass import full_precision

DEVICE = "cuda"
"""Whose costs and sizes count, wherever the kernels run."""


class Kernels(NamedTuple):
    """What a floor brings. All tensors are on one device, contiguous, and lie at multiples of their elements' size.

    x, out: [n, H, W] of one dtype, float32, bfloat16 or float16, apart from each other. bases: float32[H, r_c] of the
    one class, or float32[H / 2, r_c] of each of the two classes, even and odd; every r_c is a multiple of
    `ranks`, and can be 0. The first class has to do with the sums of both halves of the rows, the second with
    their differences. coefficients: float32[n, r, W], the classes' rows one after the other.

    project(x, bases, coefficients): of class c becomes bases_c^T (x_upper +- x_lower), summed in a fixed order; takes
        room for `filters.PARTIAL_SUMS` of x's elements in float32 at most.
    subtract(x, bases, coefficients, out): out = x - P in float32, rounded once, of P_c = bases_c coefficients_c
        the rows P_0 + P_1 above and P_0 - P_1 below.
    mask_(lines, limits, first, scale): complex64[n, lines, across], the lines `first` and those after it: each is
        multiplied by scale times the symmetrised mask, in place.
    """

    project: Callable[[Tensor, Sequence[Tensor], Tensor], None]
    subtract: Callable[[Tensor, Sequence[Tensor], Tensor, Tensor], None]
    mask_: Callable[[Tensor, Limits, int, float], None]
    ranks: int = filters.RANKS


def highpass(kernels: Kernels, x: Tensor, ratio: float, mode: str, out: Tensor) -> None:
    """Filter each matrix of x [..., H, W] into `out`; see `fastmerge.ops.highpass`."""
    height, width = x.shape[-2:]
    if x.numel():
        filtered(kernels, x, out, filters.plan(height, width, ratio, mode, x.element_size(), DEVICE))


def filtered(kernels: Kernels, x: Tensor, out: Tensor, plan: HighpassPlan) -> None:
    """Filter by this plan; both are contiguous and not empty."""
    if plan.route == "nothing":
        out.copy_(x)
        return
    x, target = loadable(x), loadable(out)
    run = _lowrank if plan.route == "lowrank" else _rfft
    shape = (-1, plan.height, plan.width)
    together = filters.together(plan.height, plan.width)
    with full_precision(x.device):
        for matrices, results in zip(x.view(shape).split(together), target.view(shape).split(together)):
            run(kernels, matrices, results, plan)
    if target is not out:
        out.copy_(target)


# -- lowrank ----------------------------------------------------------------------------------------------------------


def _lowrank(kernels: Kernels, x: Tensor, out: Tensor, plan: HighpassPlan) -> None:
    bases, weights = _waves(plan.height, plan.width, plan.ratio, plan.mode, str(x.device), kernels.ranks)
    coefficients = torch.empty(len(x), len(weights), plan.width, dtype=torch.float32, device=x.device)
    kernels.project(x, bases, coefficients)
    spectrum = torch.fft.rfft(coefficients, norm="backward").mul_(weights)
    kernels.subtract(x, bases, torch.fft.irfft(spectrum, n=plan.width, norm="forward"), out)


@functools.lru_cache(maxsize=8)
def _waves(height: int, width: int, ratio: float, mode: str, device: str, ranks: int) -> tuple[list[Tensor], Tensor]:
    """The bases of each class as kernels take them, and the weights of all, with the scale of both transforms."""
    classes = filters.waves(Mask(height, width, ratio, mode))
    fillers = [-len(basis) % ranks for basis, _ in classes]
    bases = [np.pad(basis, ((0, more), (0, 0))) for (basis, _), more in zip(classes, fillers)]
    weights = np.concatenate([np.pad(each, ((0, more), (0, 0))) for (_, each), more in zip(classes, fillers)])
    scaled = (weights / np.float32(width)).astype(np.float32)
    return [torch.from_numpy(basis.T.copy()).to(device) for basis in bases], torch.from_numpy(scaled).to(device)


# -- rfft -------------------------------------------------------------------------------------------------------------


def _rfft(kernels: Kernels, x: Tensor, out: Tensor, plan: HighpassPlan) -> None:
    rows, target = (x, out) if plan.axis == 1 else (x.transpose(1, 2), out.transpose(1, 2))
    across, size = rows.shape[1:]
    work = _line_work(plan.height, plan.width, plan.ratio, plan.mode, plan.axis, str(x.device))
    spectrum = torch.fft.rfft(rows.to(torch.float32), norm="backward")
    if work.dropped:
        spectrum[:, :, : work.dropped] = 0
    if work.dropped < work.partial:
        some = spectrum[:, :, work.dropped : work.partial]
        lines = torch.fft.fft(some.transpose(1, 2), norm="backward").contiguous()
        kernels.mask_(lines, work.limits, work.dropped, 1 / across)
        some.copy_(torch.fft.ifft(lines, norm="forward").transpose(1, 2))
        del lines
    if len(work.points):
        # As many lines as a circle has points on one axis: a handful.
        ringed = spectrum.index_select(2, work.points)
        ringed += work.phases.conj() @ ((work.phases.T @ ringed) * work.shares)
        spectrum.index_copy_(2, work.points, ringed)
    torch.mul(torch.fft.irfft(spectrum, n=size, norm="forward"), 1 / size, out=target)


class _LineWork(NamedTuple):
    """What happens along the other axis: lines [0, dropped) are 0, [dropped, partial) masked.

    points, phases, shares: `filters.ring_tables`.
    """

    dropped: int
    partial: int
    limits: Limits
    points: Tensor
    phases: Tensor
    shares: Tensor


@functools.lru_cache(maxsize=8)
def _line_work(height: int, width: int, ratio: float, mode: str, axis: int, device: str) -> _LineWork:
    """The work along the other axis for one mask, with its numbers on a device."""
    mask = Mask(height, width, ratio, mode)
    known = filters.lines(mask, axis)
    points, phases, shares = filters.ring_tables(mask, axis)
    tables = torch.tensor(points, dtype=torch.int64), torch.from_numpy(phases), torch.from_numpy(shares)
    return _LineWork(known.dropped, known.partial, mask.limits(axis), *(each.to(device) for each in tables))
