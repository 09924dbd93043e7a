"""The frequency filter by torch, for tensors on a CPU (MKL's FFT and GEMM, or what torch was built with) and on a GPU.

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
    with _full_precision(x.device):
        for matrix, target in zip(x.reshape(shape), out.view(shape)):
            run(matrix, target, plan)


@contextlib.contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Float32 products are float32 products."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _blocks(size: int, length: int, device: torch.device) -> list[tuple[int, int]]:
    """[start, stop) of blocks of `size` lines of so many elements."""
    step = filters.block(length, device.type)
    return [(start, min(size, start + step)) for start in range(0, size, step)]


def _widened(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float32 else x.to(torch.float32)


# -- lowrank ----------------------------------------------------------------------------------------------------------


def _lowrank(x: Tensor, out: Tensor, plan: HighpassPlan) -> None:
    height, width = x.shape
    classes = _bases(plan.height, plan.width, plan.ratio, plan.mode, str(x.device))
    half = height // 2 if len(classes) == 2 else height
    blocks = _blocks(half, len(classes) * width, x.device)
    upper, lower = x[:half], x[half:]  # lower is empty where there is one class
    coefficients = [x.new_zeros((basis.shape[1], width), dtype=torch.float32) for basis, _ in classes]
    for start, stop in blocks:
        folded = [_widened(upper[start:stop])]
        if len(classes) == 2:
            above, below = folded[0], _widened(lower[start:stop])
            folded = [above + below, above - below]
        for (basis, _), sums, rows in zip(classes, coefficients, folded):
            sums.addmm_(basis[start:stop].T, rows)
    for (_, weights), rows in zip(classes, coefficients):
        # In blocks, for 128 rows of a wide matrix can be more than a cache holds.
        for start, stop in _blocks(len(rows), width, x.device):
            spectrum = torch.fft.rfft(rows[start:stop], norm="ortho").mul_(weights[start:stop])
            rows[start:stop] = torch.fft.irfft(spectrum, n=width, norm="ortho")
    for start, stop in blocks:
        parts = [basis[start:stop] @ rows for (basis, _), rows in zip(classes, coefficients)]
        if len(classes) == 2:
            even, odd = parts
            out[half + start : half + stop] = _widened(lower[start:stop]) - (even - odd)
            parts = [even + odd]
        out[start:stop] = _widened(upper[start:stop]) - parts[0]


@functools.lru_cache(maxsize=8)
def _bases(height: int, width: int, ratio: float, mode: str, device: str) -> list[tuple[Tensor, Tensor]]:
    """(basis, weights) of each class of frequencies fy: float32[H or H / 2, rank] and float32[rank, W // 2 + 1].

    The columns of a basis are cosines and sines over the rows, or over the upper half of them where the frequencies
    have a parity: the lower half has the same values, or their negatives.
    """
    mask = Mask(height, width, ratio, mode)
    changed = np.array(filters.lines(mask, 0).touched)
    removed = 1 - mask.weights(changed, np.arange(width // 2 + 1))
    parities = [changed % 2 == 0, changed % 2 == 1] if height % 2 == 0 else [changed >= 0]
    places = np.arange(height // 2 if height % 2 == 0 else height)
    found = []
    for chosen in parities:
        frequencies = changed[chosen]
        # cos and sin of 2 pi f j / H; the product is reduced modulo H while it is an integer.
        angles = places[:, None] * frequencies[None] % height * (2 * np.pi / height)
        paired = (frequencies != 0) & (2 * frequencies != height)
        lengths = np.sqrt(np.where(paired, 2, 1) / height)
        basis = np.concatenate([np.cos(angles) * lengths, (np.sin(angles) * lengths)[:, paired]], axis=1)
        weights = np.concatenate([removed[chosen], removed[chosen][paired]])
        found.append(tuple(torch.from_numpy(each.astype(np.float32)).to(device) for each in (basis, weights)))
    return found  # type: ignore[return-value]


# -- rfft -------------------------------------------------------------------------------------------------------------


def _rfft(x: Tensor, out: Tensor, plan: HighpassPlan) -> None:
    axis = plan.axis
    size, across = x.shape[axis], x.shape[1 - axis]
    work = _line_work(plan.height, plan.width, plan.ratio, plan.mode, axis, str(x.device))
    first, last, points = plan.dropped, work.last, work.points
    waiting = _waiting(out, across, size // 2 + 1 - last, plan)
    partial = torch.empty(last - first + len(points), across, dtype=COMPLEX, device=x.device)
    count = last - first
    blocks = _blocks(across, size, x.device)
    for start, stop in blocks:
        rows = x[start:stop] if axis == 1 else x[:, start:stop].T
        spectrum = torch.fft.rfft(_widened(rows).contiguous(), norm="ortho")
        partial[:count, start:stop] = spectrum[:, first:last].T
        if points:
            partial[count:, start:stop] = spectrum[:, points].T
        waiting[start:stop] = spectrum[:, last:]
    work.apply(partial)
    # From the last block to the first: where what waits lies in `out` itself, a block that is written overwrites only
    # what has been taken already.
    for start, stop in reversed(blocks):
        spectrum = torch.zeros(stop - start, size // 2 + 1, dtype=COMPLEX, device=x.device)
        spectrum[:, first:last] = partial[:count, start:stop].T
        spectrum[:, last:] = waiting[start:stop]
        if points:
            spectrum[:, points] = partial[count:, start:stop].T
        rows = torch.fft.irfft(spectrum, n=size, norm="ortho")
        if axis == 1:
            out[start:stop] = rows
        else:
            out[:, start:stop] = rows.T


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

    last: the lines from there on are left alone. points: of those the ones that the ring touches. phases, shares: how
    a line's coefficients at the ring's places come from it, complex64[across, places], and what of each is added.
    """

    last: int
    chunks: list[_Chunk]
    points: list[int]
    phases: Tensor
    shares: Tensor

    def apply(self, partial: Tensor) -> None:
        """Mask lines [partial, then points; across], in place."""
        for chunk in self.chunks:
            lines = torch.fft.fft(partial[chunk.start : chunk.stop], norm="ortho")
            for start, stop in chunk.dropped:
                lines[:, start:stop] = 0
            for start, stop, weights in chunk.weighed:
                lines[:, start:stop] *= weights
            partial[chunk.start : chunk.stop] = torch.fft.ifft(lines, norm="ortho")
        if self.points:
            lines = partial[-len(self.points) :]
            lines += ((lines @ self.phases) * self.shares) @ self.phases.conj().T


@functools.lru_cache(maxsize=8)
def _line_work(height: int, width: int, ratio: float, mode: str, axis: int, device: str) -> _LineWork:
    """The work along the other axis for one mask, with its numbers on a device."""
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
    points = [line for line, _ in known.points]
    places = np.array(sorted({place for _, each in known.points for place in each}), dtype=np.int64)
    angles = np.arange(across)[:, None] * places[None] % across * (-2 * np.pi / across)
    phases = np.exp(1j * angles) / np.sqrt(across)
    shares = mask.along(axis, np.array(points, dtype=np.int64), places) - 1
    return _LineWork(
        known.partial,
        chunks,
        points,
        torch.from_numpy(phases.astype(np.complex64)).to(device),
        torch.from_numpy(shares.astype(np.float32)).to(device),
    )


def _runs(marked: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """[start, stop) of each run of marked places."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], marked.astype(np.int8), [0]])))
    return [(int(start), int(stop)) for start, stop in zip(edges[::2], edges[1::2])]
