"""The importance family in Triton: the functions of `fastmerge/reference/importance.py`, with the same bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..._triton import exact
from ..._triton import importance as kernels
from ..gpu import rounded
from ..rule import L1_LIMBS, TIE_BLOCK
from .launch import block, flat, float_bits, launch, table, tiles
from .sparsify import BY_VALUE, TYPES, alignment, usable

__all__ = ["divergences", "energy_sums", "importance", "model_variance", "nearswap", "ram_apply", "ram_counts"]

BLOCK = 1024
"""Elements per tile: eight for each thread, one load of 16 bytes where they are 16-bit numbers."""

TILES = 4
"""Tiles per program where it adds to common memory at its end."""


WIDEST = 8192
"""Elements of a row that a program holds in registers, 16 for each thread; of longer rows a quarter of it at a time."""

MEMORY = 1 << 24
"""Numbers of memory that longer rows take together: 64 MB."""


class _Models:
    """A base and n models as kernels take them: up to eight by value, more by a table, where all have one dtype."""

    def __init__(self, base: Tensor, tensors: Sequence[Tensor], factors: Sequence[float] = ()) -> None:
        self.numel, self.device = base.numel(), base.device
        self.base = usable(base)
        models = [usable(x) for x in tensors]
        self.factors = tuple(rounded(list(factors)))
        if len(models) <= BY_VALUE:
            self.arguments: tuple[Any, ...] = tuple(models), None, len(models)
            self.constants: dict[str, Any] = {"ALIGN": 1, "DTYPE": None}
            return
        if len({x.dtype for x in models}) > 1:
            models = [x.to(torch.float32) for x in models]
        factors = self.factors or [0.0] * len(models)
        listed = [number for x, factor in zip(models, factors) for number in (x.data_ptr(), float_bits(factor))]
        # The table does not keep what it has the addresses of.
        self._alive = models
        self.factors = ()
        self.arguments = (), table(listed, self.device), len(models)
        self.constants = {"ALIGN": alignment(*models), "DTYPE": TYPES[models[0].dtype]}


def nearswap(base: Tensor, tensors: list[Tensor], t: float, out: Tensor) -> None:
    """One model's merge; see `fastmerge.ops.nearswap`."""
    size = block(BLOCK)
    arguments = usable(base), usable(tensors[0]), flat(out), rounded([t])[0], out.numel()
    launch(kernels.nearswap, (tiles(out.numel(), size),), out.device, *arguments, BLOCK=size)


def ram_apply(base: Tensor, tensors: list[Tensor], factors: list[float], epsilon: float, out: Tensor) -> None:
    """The merge of one chunk into `out`; see `fastmerge.ops.ram_apply`."""
    if out.numel() == 0:
        return
    given = _Models(base, tensors, factors)
    xs, *listed = given.arguments
    size = block(BLOCK)
    arguments = given.base, xs, given.factors, *listed, flat(out), rounded([epsilon])[0], given.numel
    launch(kernels.ram_apply, (tiles(given.numel, size),), out.device, *arguments, BLOCK=size, **given.constants)


def ram_counts(base: Tensor, tensors: list[Tensor], epsilon: float) -> Tensor:
    """Where each model takes part; see `fastmerge.ops.ram_counts`."""
    counts = torch.zeros(len(tensors), 2, dtype=torch.int64, device=base.device)
    if base.numel() == 0:
        return counts
    given = _Models(base, tensors)
    size = block(BLOCK)
    span = TILES * size
    arguments = given.base, *given.arguments, counts, rounded([epsilon])[0], given.numel
    constants = {"SPAN": span, "BLOCK": size, **given.constants}
    launch(kernels.ram_counts, (tiles(given.numel, span),), counts.device, *arguments, **constants)
    return counts


def model_variance(base: Tensor, tensors: list[Tensor]) -> Tensor:
    """The variance over the models; see `fastmerge.ops.model_variance`."""
    out = torch.empty(base.numel(), dtype=torch.float32, device=base.device)
    if out.numel() == 0:
        return out
    given = _Models(base, tensors)
    size = block(BLOCK)
    arguments = given.base, *given.arguments, out, given.numel
    launch(kernels.model_variance, (tiles(given.numel, size),), out.device, *arguments, BLOCK=size, **given.constants)
    return out


def energy_sums(base: Tensor, tensors: list[Tensor], mask: Tensor | None) -> Tensor:
    """Exact sums of squares; see `fastmerge.ops.energy_sums`."""
    count, numel, device = len(tensors), base.numel(), base.device
    sums = torch.zeros(count, exact.COPIES.value, exact.ROW.value, dtype=torch.int64, device=device)
    if numel:
        base = usable(base)
        size = block(BLOCK)
        span = min(TILES * size, TIE_BLOCK)
        for dtype in dict.fromkeys(x.dtype for x in tensors):
            models = [(i, usable(x)) for i, x in enumerate(tensors) if x.dtype == dtype]
            launch(
                kernels.add_energies,
                (tiles(numel, span) * len(models),),
                device,
                base,
                table([number for i, x in models for number in (x.data_ptr(), 0, i)], device),
                len(models),
                sums,
                mask,
                numel,
                registers=128,
                SPAN=span,
                BLOCK=size,
                ALIGN=alignment(base, *(x for _, x in models)),
                DTYPE=TYPES[dtype],
            )
    out = torch.empty(count, L1_LIMBS, dtype=torch.int64, device=device)
    launch(exact.carry, (count,), device, sums, out, num_warps=1)
    return out


def divergences(base: Tensor, tensors: list[Tensor], row_length: int) -> Tensor:
    """The divergence of each row; see `fastmerge.ops.divergences`."""
    rows, device = base.numel() // row_length, base.device
    out = torch.empty(rows, dtype=torch.float32, device=device)
    base, x = usable(base), usable(tensors[0])
    widest = block(WIDEST)
    width = 1 << (row_length - 1).bit_length()
    if width <= widest:
        size = max(width, widest // 4)
        together = size // width
        arguments = base, x, out, rows, row_length
        constants = {"ROWS": together, "WIDTH": width, "HALVINGS": width.bit_length() - 1}
        launch(kernels.divergences, (tiles(rows, together),), device, *arguments, num_warps=_warps(size), **constants)
        return out
    half, tile = width // 2, widest // 4
    together = max(1, MEMORY // half)
    memory = torch.empty(min(together, rows) * half, dtype=torch.float32, device=device)
    for first in range(0, rows, together):
        launch(
            kernels.divergences_of_long_rows,
            (min(together, rows - first),),
            device,
            base,
            x,
            out,
            memory,
            first,
            row_length,
            half // tile,
            num_warps=_warps(widest),
            WIDTH=tile,
            HALVINGS=tile.bit_length() - 1,
        )
    return out


def _warps(elements: int) -> int:
    """So many that each thread has 16 of these elements."""
    return min(16, max(4, elements // 512))


def importance(base: Tensor, tensors: list[Tensor], divergence: Tensor, row_length: int) -> Tensor:
    """How much each element matters; see `fastmerge.ops.importance`."""
    out = torch.empty(base.numel(), dtype=torch.float32, device=base.device)
    size = block(BLOCK)
    arguments = usable(base), usable(tensors[0]), usable(divergence), out, out.numel(), row_length
    constants = {"BLOCK": size, "LONG": row_length >= size}
    launch(kernels.importance, (tiles(out.numel(), size),), out.device, *arguments, **constants)
    return out
