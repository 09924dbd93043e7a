"""The frequency filter by torch, for tensors on a CPU: MKL's FFT and GEMM, or what torch was built with.

One filter, three routes; `filters.plan` says which takes the least time, from the shape and the settings alone, so
that the same call gives the same bits on one machine.

nothing:  the mask is 1 everywhere: a copy.
lowrank:  few frequencies fy change, whatever happens along x. With U the real cosines and sines of those, orthonormal,
          X - U irfft((1 - Ms) * rfft(U^T X)): two thin products and the transforms of a few rows. Rows j and j + H / 2
          are added for even fy and subtracted for odd ones, which halves the products.
rfft:     the first transform runs along one axis, in blocks that stay in the cache. Of its half spectrum dropped lines
          are never looked at again; only those changed in part are transformed along the other axis, masked and
          transformed back; the others wait. Then the first transform is undone. Lines that the ring only touches
          get their few coefficients by a product.

16-bit numbers are widened block by block, and the result is rounded once. Everything else is float32: neither TF32
nor a bfloat16 product is let in, whatever the process has asked of torch.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import filters
from .filters import HighpassPlan, Mask

COMPLEX = torch.complex64


def highpass(x: Tensor, ratio: float, mode: str, out: Tensor) -> None:
    """Filter each matrix of x [..., H, W] into `out`; see `fastmerge.ops.highpass`."""
    height, width = x.shape[-2:]
    if x.numel():
        filtered(x, out, filters.plan(height, width, ratio, mode, x.element_size(), x.device.type))


def filtered(x: Tensor, out: Tensor, plan: HighpassPlan) -> None:
    """Filter by this plan; both are contiguous and not empty."""
    if plan.route == "nothing":
        out.copy_(x)
        return
    shape = (-1, *x.shape[-2:])
    run = _lowrank if plan.route == "lowrank" else _rfft
    with full_precision(x.device):
        for matrix, target in zip(x.reshape(shape), out.view(shape)):
            run(matrix, target, plan)


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Float32 products are float32 products."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _blocks(size: int, length: int, device: torch.device, least: int = 1) -> list[tuple[int, int]]:
    """[start, stop) of blocks of `size` lines of so many elements: at least so many lines, and a multiple of that."""
    step = max(1, filters.block(length, device.type) // least) * least
    return [(start, min(size, start + step)) for start in range(0, size, step)]


def _widened(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float32 else x.to(torch.float32)


# -- lowrank ----------------------------------------------------------------------------------------------------------


def _lowrank(x: Tensor, out: Tensor, plan: HighpassPlan) -> None:
    height, width = x.shape
    classes = _bases(plan.height, plan.width, plan.ratio, plan.mode, str(x.device))
    rows = height // len(classes)
    blocks = _blocks(rows, width, x.device)
    coefficients = [x.new_zeros((basis.shape[1], width), dtype=torch.float32) for basis, _ in classes]
    room = [torch.empty(blocks[0][1], width, dtype=torch.float32, device=x.device) for _ in classes]
    for start, stop in blocks:
        parts = [_widened(x[start + shift : stop + shift]) for shift in range(0, height - rows + 1, rows)]
        if len(classes) == 2:
            sums, differences = (each[: stop - start] for each in room)
            parts = [torch.add(*parts, out=sums), torch.sub(*parts, out=differences)]
        for (basis, _), target, part in zip(classes, coefficients, parts):
            target.addmm_(basis[start:stop].T, part)
    for (_, weights), target in zip(classes, coefficients):
        for start, stop in _blocks(len(target), width, x.device):
            spectrum = torch.fft.rfft(target[start:stop], norm="ortho").mul_(weights[start:stop])
            target[start:stop] = torch.fft.irfft(spectrum, n=width, norm="ortho")
    for start, stop in blocks:
        products = [
            torch.mm(basis[start:stop], each, out=target[: stop - start])
            for (basis, _), each, target in zip(classes, coefficients, room)
        ]
        upper = _difference(x[start:stop], products[0], out[start:stop])
        if len(classes) == 2:
            lower = _difference(x[rows + start : rows + stop], products[0], out[rows + start : rows + stop])
            upper -= products[1]
            lower += products[1]
            _stored(lower, out[rows + start : rows + stop])
        _stored(upper, out[start:stop])


def _difference(x: Tensor, y: Tensor, room: Tensor) -> Tensor:
    """The float32 difference, in `room` if that is float32."""
    return torch.sub(x, y, out=room) if room.dtype == torch.float32 else torch.sub(x, y)


def _stored(values: Tensor, target: Tensor) -> None:
    """Round values into the result, where they do not lie there already."""
    if values.dtype != target.dtype:
        target.copy_(values)


@functools.lru_cache(maxsize=8)
def _bases(height: int, width: int, ratio: float, mode: str, device: str) -> list[tuple[Tensor, Tensor]]:
    """`filters.waves` of one mask: float32[H or H / 2, rank] and float32[rank, W // 2 + 1] of each class."""
    mask = Mask(height, width, ratio, mode)
    found = [(torch.from_numpy(basis).to(device), torch.from_numpy(weights)) for basis, weights in filters.waves(mask)]
    return [(basis.T, weights.to(device)) for basis, weights in found]


# -- rfft -------------------------------------------------------------------------------------------------------------


def _rfft(x: Tensor, out: Tensor, plan: HighpassPlan) -> None:
    axis = plan.axis
    size, across = x.shape[axis], x.shape[1 - axis]
    work = _line_work(plan.height, plan.width, plan.ratio, plan.mode, axis, str(x.device))
    first, last, points = plan.dropped, work.last, work.points
    waiting = _waiting(out, across, size // 2 + 1 - last, plan)
    count = last - first
    partial = torch.empty(across, count + len(points), dtype=COMPLEX, device=x.device)
    # Columns are taken by whole cache lines, and several of each row.
    blocks = _blocks(across, size, x.device, least=64 if axis == 0 else 1)
    for start, stop in blocks:
        rows = _widened(x[start:stop]) if axis == 1 else _transposed(_widened(x[:, start:stop]))
        spectrum = torch.fft.rfft(rows, norm="ortho")
        partial[start:stop, :count] = spectrum[:, first:last]
        if points:
            partial[start:stop, count:] = spectrum[:, points]
        waiting[start:stop] = spectrum[:, last:]
    work.apply(partial)
    # From the last block to the first: where what waits lies in `out` itself, a block that is written overwrites only
    # what has been taken already.
    for start, stop in reversed(blocks):
        spectrum = torch.empty(stop - start, size // 2 + 1, dtype=COMPLEX, device=x.device)
        spectrum[:, :first] = 0
        spectrum[:, first:last] = partial[start:stop, :count]
        spectrum[:, last:] = waiting[start:stop]
        if points:
            spectrum[:, points] = partial[start:stop, count:]
        rows = torch.fft.irfft(spectrum, n=size, norm="ortho")
        if axis == 1:
            out[start:stop] = rows
        else:
            out[:, start:stop] = rows.T


def _transposed(x: Tensor) -> Tensor:
    """The transpose, contiguous. Columns of a large matrix are gathered first: powers of two between defeat caches."""
    return x.contiguous().T.contiguous()


def _waiting(out: Tensor, across: int, count: int, plan: HighpassPlan) -> Tensor:
    """Room for the coefficients that nothing changes, complex64[across, count]: in `out` where it is large enough."""
    needed = 2 * across * count
    if plan.axis == 1 and out.dtype == torch.float32 and needed <= out.numel() and out.data_ptr() % 8 == 0:
        return torch.view_as_complex(out.view(-1)[:needed].view(-1, 2)).view(across, count)
    return torch.empty(across, count, dtype=COMPLEX, device=out.device)


class _Chunk(NamedTuple):
    """Some of the partial lines, and at which places they are 0, or are weighed."""

    start: int
    stop: int
    dropped: list[tuple[int, int]]
    weighed: list[tuple[int, int, Tensor]]


class _LineWork(NamedTuple):
    """What happens along the other axis.

    last: the lines from there on are left alone. points: of those the ones that the ring touches; these, phases and
    shares are `filters.ring_tables`.
    """

    last: int
    chunks: list[_Chunk]
    points: list[int]
    phases: Tensor
    shares: Tensor

    def apply(self, partial: Tensor) -> None:
        """Mask lines [across; partial, then points], in place."""
        for chunk in self.chunks:
            lines = torch.fft.fft(_transposed(partial[:, chunk.start : chunk.stop]), norm="ortho")
            for start, stop in chunk.dropped:
                lines[:, start:stop] = 0
            for start, stop, weights in chunk.weighed:
                lines[:, start:stop] *= weights
            partial[:, chunk.start : chunk.stop] = torch.fft.ifft(lines, norm="ortho").T
        if self.points:
            lines = partial[:, -len(self.points) :]
            lines += self.phases.conj() @ ((self.phases.T @ lines) * self.shares)


@functools.lru_cache(maxsize=8)
def _line_work(height: int, width: int, ratio: float, mode: str, axis: int, device: str) -> _LineWork:
    """The work along the other axis for one mask."""
    mask = Mask(height, width, ratio, mode)
    known = filters.lines(mask, axis)
    across = mask.sizes[1 - axis]
    step = filters.block(2 * across, torch.device(device).type)
    chunks = []
    for start in range(known.dropped, known.partial, step):
        numbers = np.arange(start, min(known.partial, start + step))
        zeros, ones = mask.constant(axis, numbers)
        weighed = []
        for first, last in _runs(~zeros & ~ones):
            weights = mask.along(axis, numbers, np.arange(first, last))
            weighed.append((first, last, torch.from_numpy(weights.astype(np.float32)).to(device)))
        chunks.append(_Chunk(start - known.dropped, int(numbers[-1]) + 1 - known.dropped, _runs(zeros), weighed))
    points, phases, shares = filters.ring_tables(mask, axis)
    tables = (torch.from_numpy(each).to(device) for each in (phases, shares))
    return _LineWork(known.partial, chunks, points, *tables)


def _runs(marked: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """[start, stop) of each run of marked places."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], marked.astype(np.int8), [0]])))
    return [(int(start), int(stop)) for start, stop in zip(edges[::2], edges[1::2])]
