"""Light experts: of each row of a delta the few largest elements, put onto a model and taken off again.

"FREE-Merging: Fourier Transform for Model Merging with Lightweight Experts", arXiv 2411.16815. A row is
a run of elements along the last dimension; of its `width` elements an expert keeps k:

    keep the k largest |tau|; of equal ones those with the lowest column; NaN is larger than all
    theta* = theta + s_1 v_1 + s_2 v_2 ...     v_i what expert i holds at that place, s_i its scale

The sum is taken in float32 from left to right, over the experts that hold the place, and rounded once. Where the base's
values are given, an expert replaces what the model changed: where v_i is not 0, the sum starts from the base's value
(which is theta where the model has changed nothing).

Kept are columns [rows, k], rising within each row, and values [rows, k].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .numbers import canonical_nan, difference, keys, round_scalar

NARROW = 1 << 16
"""Columns of rows up to this width are kept in 16 bits."""

ALIGNMENT = 8
"""The old bits of each part begin at a multiple of this."""

_PIECE = 1 << 22
_BITS = {2: torch.int16, 4: torch.int32}


def column_dtype(width: int) -> torch.dtype:
    """What a row's columns are kept in."""
    return torch.uint16 if width <= NARROW else torch.int32


def expert_extract(base: Tensor | None, x: Tensor, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The columns and the values, in `dtype`, of the k largest magnitudes of each row of x - base."""
    width = x.shape[-1] if x.dim() else 1
    rows = x.numel() // width if width else 0
    columns = torch.empty(rows, k, dtype=column_dtype(width), device=x.device)
    values = torch.empty(rows, k, dtype=dtype, device=x.device)
    step = max(1, _PIECE // max(width, 1))
    for first in range(0, rows if k else 0, step):
        part = slice(first, first + step)
        rows_of_base = None if base is None else base.reshape(rows, width)[part]
        delta = difference(rows_of_base, x.reshape(rows, width)[part], torch.float32).view(-1, width)
        # One number orders by falling key, then by rising column: no two are equal, so that the choice is unique.
        order = (keys(delta) << 32) - torch.arange(width, device=x.device)
        chosen = order.topk(k, dim=1, sorted=False).indices.sort(dim=1).values  # [rows, k]
        columns[part] = chosen.to(columns.dtype)
        values[part] = canonical_nan(delta.gather(1, chosen).to(dtype))
    return columns, values


def saved_layout(tensors: Sequence[Tensor], parts: Sequence[Any]) -> list[tuple[int, int]]:
    """Where the old bits of each part lie among all of them: first byte and end; the last end is the length."""
    places = []
    first = 0
    for part in parts:
        end = first + part.columns.numel() * tensors[part.of].element_size()
        places.append((first, end))
        first = -(-end // ALIGNMENT) * ALIGNMENT
    return places


def _at(x: Tensor, columns: Tensor) -> Tensor:
    """Flat indices of a part's places in its tensor."""
    rows = torch.arange(columns.shape[0], device=x.device)[:, None]
    width = x.shape[-1] if x.dim() else 1
    return (rows * width + columns.to(torch.int64)).reshape(-1)


def _bits(x: Tensor) -> Tensor:
    """The bit patterns of the elements of a contiguous tensor, flat; the memory is the same."""
    return x.view(-1).view(_BITS[x.element_size()])


def applied(x: Tensor, parts: Sequence[Any]) -> Tensor:
    """The values of `x` with these parts on it, flat, of its dtype; at places without a part, its own bits."""
    total = x.reshape(-1).to(torch.float32).clone()
    places = [_at(x, part.columns) for part in parts]
    for at, part in zip(places, parts):
        if part.base is not None:
            start = part.base.reshape(-1).to(torch.float32)
            total[at] = torch.where(part.values.reshape(-1) != 0, start, total[at])
    touched = torch.zeros_like(total, dtype=torch.bool)
    for at, part in zip(places, parts):
        scale = round_scalar(part.scale, torch.float32)
        total[at] = total[at] + part.values.reshape(-1).to(torch.float32) * scale
        touched[at] = True
    return torch.where(touched, canonical_nan(total.to(x.dtype)), x.reshape(-1))


def _by_tensor(parts: Sequence[Any], places: Sequence[tuple[int, int]]) -> dict[int, list[tuple[Any, int, int]]]:
    """Each tensor's parts, with first byte and end of their old bits. A model of experts has ten thousand tensors."""
    found: dict[int, list[tuple[Any, int, int]]] = {}
    for part, (first, end) in zip(parts, places):
        found.setdefault(part.of, []).append((part, first, end))
    return found


def expert_apply_(tensors: list[Tensor], parts: list[Any]) -> Tensor:
    """Put the parts onto their tensors; the old bits, uint8, each part's where `saved_layout` says."""
    places = saved_layout(tensors, parts)
    saved = torch.zeros(places[-1][1] if places else 0, dtype=torch.uint8, device=tensors[0].device)
    for (first, end), part in zip(places, parts):
        x = tensors[part.of]
        saved[first:end] = _bits(x)[_at(x, part.columns)].view(torch.uint8)
    for number, own in _by_tensor(parts, places).items():
        x = tensors[number]
        _bits(x).copy_(_bits(applied(x, [part for part, _, _ in own])))
    return saved


def expert_revert_(tensors: list[Tensor], parts: list[Any], saved: Tensor) -> Tensor:
    """Take the parts off again: how many places of each tensor do not hold what was put there, int64[tensors].

    Nothing is written unless all counts are 0.
    """
    places = saved_layout(tensors, parts)
    changed = torch.zeros(len(tensors), dtype=torch.int64, device=saved.device)
    for number, own in _by_tensor(parts, places).items():
        x = tensors[number]
        old = x.clone()
        for part, first, end in own:
            _bits(old)[_at(x, part.columns)] = saved[first:end].view(_BITS[x.element_size()])
        changed[number] = (_bits(applied(old, [part for part, _, _ in own])) != _bits(x)).sum()
    if not bool(changed.any()):
        # Only the old bits are at hand, no second copy of all tensors: they may fill a GPU.
        for (first, end), part in zip(places, parts):
            x = tensors[part.of]
            _bits(x)[_at(x, part.columns)] = saved[first:end].view(_BITS[x.element_size()])
    return changed
