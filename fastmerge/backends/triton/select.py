"""Selection in Triton: the functions of `fastmerge/reference/select.py`, with the same bits, for any number of tensors.

Thresholds stay on the GPU, from the first histogram to the mask: the host waits for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ..._triton import select as kernels
from ...reference.select import hashed_mask
from ..gpu import bounds_by_group
from ..lists import Lists, addresses, before, copied, multiple_of
from ..rule import TIE_BLOCK
from .launch import CODES, aligned, block, launch, table, tiles

__all__ = [
    "abs_histogram",
    "hashed_mask",
    "key_histogram",
    "key_window_",
    "kth_magnitude",
    "magnitude_bounds",
    "magnitude_bounds_many",
    "tie_counts",
    "topk_mask",
]

WARPS = 8

BLOCK = 4096
"""Elements per tile: 16 for each thread, two loads of 16 bytes where they are 16-bit numbers. More would unroll the
voting within a warp to a loop that the instruction cache does not hold."""

SHORT_BLOCK = 2048
"""Where elements need many registers, on some GPU: for atomic additions their addresses, with half as many warps; and
on AMD's a mask for each while the last digit is counted and kept."""

WALKED = 1024
"""Elements per tile in the one block whose ties are told apart."""

SETTLED = 256
"""Blocks whose ties are added up at once."""

COPIES = 32
"""Copies of a histogram of up to 2**15 bins, over which its programs spread: 4 MB of int32, a fraction of a GPU's
cache. A histogram of 2**16 bins for each of several models has a quarter of that."""

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

_WIDE, _BFLOAT16, _FLOAT16 = (kind.value for kind in (kernels.WIDE_KEYS, kernels.BFLOAT16_KEYS, kernels.FLOAT16_KEYS))

# (lowest bit, bits) of each digit, the leading one first.
_DIGITS = {
    _WIDE: ((23, 8), (15, 8), (7, 8), (0, 7)),
    _BFLOAT16: ((23, 8), (16, 7)),
    _FLOAT16: ((7, 8), (0, 7)),
}
_NARROW = {torch.bfloat16: _BFLOAT16, torch.float16: _FLOAT16}


def _kind(base: Tensor | None, dtype: torch.dtype, compute: torch.dtype) -> int:
    """How the keys of a model's deltas are represented: by no more bits than can differ."""
    if compute != torch.float32:
        return _NARROW[compute]
    return _WIDE if base is not None else _NARROW.get(dtype, _WIDE)


def _tie_blocks(numel: int) -> int:
    return max(1, tiles(numel, TIE_BLOCK))


def _tile(x: Tensor, default: int = BLOCK) -> int:
    """Elements per tile. Where a test sets it, not below a 64th of a tie block if there is a whole one to be read: that
    many tiles are enough of them for an interpreter.
    """
    return min(max(block(default), TIE_BLOCK // 64 if x.numel() >= TIE_BLOCK else 1), TIE_BLOCK)


# -- order statistics ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Descent:
    """What the launches that find ranks in tensors of one dtype share; the table is described in the kernels' file.

    bases, x: the first base, if there is one, and the first model's first tensor. aligned: every address is a multiple
    of 16. tensor_of: where there are several tensors.
    """

    numbers: Tensor
    tensor_of: Tensor | None
    base: Tensor | None
    x: Tensor
    aligned: bool
    tensors: int
    models: int
    slots: int
    blocks: int
    kind: int
    compute: torch.dtype
    together: bool = False

    @classmethod
    def of(
        cls,
        bases: Sequence[Tensor] | None,
        tensors: Sequence[Sequence[Tensor]],
        ranks: Sequence[Sequence[int]],
        kind: int,
        compute: torch.dtype,
        together: bool = False,
    ) -> _Descent:
        """tensors: [T][n]. ranks: [T][2 n], for each model the first and the last; `together`: only the very first."""
        x, n = tensors[0][0], len(tensors[0])
        lengths = torch.tensor([models[0].numel() for models in tensors])
        models_at = torch.stack([addresses(models) for models in tensors])
        bases_at = torch.zeros_like(lengths) if bases is None else addresses(bases)
        given = torch.tensor(ranks).view(len(tensors), 2 * n)
        inside = ((given > 0) & (given < lengths[:, None])).any(dim=0).tolist()
        active = [True, *[False] * (2 * n - 1)] if together else inside
        rows = _rows(models_at, bases_at, lengths)
        rows[:, n : 3 * n] = given
        numbers = table(torch.cat((_slots(active), rows.flatten())), x.device)
        return cls(
            numbers,
            _tensor_of(lengths, x.device),
            None if bases is None else bases[0],
            x,
            multiple_of(models_at, bases_at) == 16,
            len(tensors),
            n,
            sum(active),
            int(_blocks(lengths).sum()),
            kind,
            compute,
            together,
        )

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def numel(self) -> int:
        """The number of elements, where there is a single tensor."""
        return self.x.numel()

    @property
    def last_digit(self) -> tuple[int, int]:
        """Its place, and its bits."""
        digits = _DIGITS[self.kind]
        return len(digits) - 1, digits[-1][1]

    def sweep(self, place: int, state: Tensor, counts: Tensor, found: Tensor | None = None) -> None:
        """Count the digit at this place of all keys that begin as their rows' state says; `found` is for the last."""
        shift, width = _DIGITS[self.kind][place]
        launch(
            kernels.count_digit,
            (self.blocks * self.slots,),
            self.device,
            self.numbers,
            self.numbers if self.tensor_of is None else self.tensor_of,
            self.numbers if self.base is None else self.base,
            state,
            counts,
            counts if found is None else found,
            self.models,
            self.slots,
            self.numel,
            self.blocks,
            num_warps=WARPS,
            X=_TYPES[self.x.dtype],
            HAS_BASE=self.base is not None,
            COMPUTE=CODES[self.compute],
            KIND=self.kind,
            SHIFT=shift,
            WIDTH=width,
            FIRST=place == 0,
            KEPT=found is not None,
            CHUNKED=self.tensor_of is not None,
            TOGETHER=self.together,
            ALIGNED=self.aligned,
            BLOCK=_tile(self.x, BLOCK if found is None else SHORT_BLOCK),
        )

    def descend(self, place: int, state: Tensor, counts: Tensor) -> None:
        """Choose the digit at this place for each row."""
        rows = 1 if self.together else self.tensors
        launch(
            kernels.descend,
            (rows * self.slots,),
            self.device,
            self.numbers,
            state,
            counts,
            self.models,
            self.slots,
            WIDTH=_DIGITS[self.kind][place][1],
            FIRST=place == 0,
        )


def _blocks(lengths: Tensor) -> Tensor:
    """How many tie blocks tensors of these lengths have."""
    return ((lengths + (TIE_BLOCK - 1)) // TIE_BLOCK).clamp(min=1)


def _slots(active: Sequence[bool]) -> Tensor:
    """The ranks that are looked for, then the others."""
    slots = range(len(active))
    return torch.tensor([s for s in slots if active[s]] + [s for s in slots if not active[s]])


def _rows(models: Tensor, bases: Tensor, lengths: Tensor) -> Tensor:
    """The table of tensors, a row for each, in which ranks are yet to be written after the models' addresses.

    models: int64[T, n]. bases, lengths: int64[T].
    """
    columns = [models, torch.zeros(len(models), 2 * models.shape[1], dtype=torch.int64)]
    if len(models) > 1:
        columns.append(torch.stack([bases, lengths, before(_blocks(lengths))], dim=1))
    return torch.cat(columns, dim=1)


def _tensor_of(lengths: Tensor, device: torch.device) -> Tensor | None:
    """Each tensor's number as often as it has tie blocks; nothing for a single one."""
    if len(lengths) == 1:
        return None
    return copied(torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(_blocks(lengths)), device)


def _bounds(descent: _Descent) -> tuple[Tensor, Tensor]:
    """Bounds int64[T, n, 2, 2], and the ties before blocks, of tensors whose dtypes have been checked."""
    x, count, models = descent.x, descent.tensors, descent.models
    # Each row's prefix and remaining rank; not read before it is written, nor where there is nothing to find.
    state = torch.empty(count * 2 * models, 2, dtype=torch.int64, device=x.device)
    counts = torch.zeros(count * 2 * models, 256, dtype=torch.int64, device=x.device)
    last_place, width = descent.last_digit
    found = torch.empty(descent.slots, descent.blocks, 1 << width, dtype=torch.int32, device=x.device)
    for place in range(last_place):
        descent.sweep(place, state, counts)
        descent.descend(place, state, counts)
    descent.sweep(last_place, state, counts, found)
    bounds = torch.empty(count, models, 2, 2, dtype=torch.int64, device=x.device)
    ties_before = torch.empty(models, 2, descent.blocks, dtype=torch.int64, device=x.device)
    launch(
        kernels.settle,
        (count * 2 * models,),
        x.device,
        descent.numbers,
        state,
        counts,
        found,
        bounds,
        ties_before,
        models,
        descent.numel,
        descent.blocks,
        KIND=descent.kind,
        WIDTH=width,
        CHUNKED=descent.tensor_of is not None,
        BLOCK=min(SETTLED, block(SETTLED)),
    )
    return bounds, ties_before


def magnitude_bounds(
    base: Tensor | None, tensors: list[Tensor], first: list[int], last: list[int], compute: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The cuts at two ranks of each model's delta; see `fastmerge.ops.magnitude_bounds`."""
    bases = None if base is None else [base]
    groups = list(_groups(tensors))

    def bounds_of(models: list[Tensor], first: list[int], last: list[int]) -> tuple[Tensor, Tensor]:
        ranks = [rank for pair in zip(first, last) for rank in pair]
        kind = _kind(base, models[0].dtype, compute)
        bounds, ties_before = _bounds(_Descent.of(bases, [models], [ranks], kind, compute))
        return bounds[0], ties_before

    return bounds_by_group(bounds_of, groups, tensors, first, last)


def magnitude_bounds_many(
    lists: Lists, ranks: Tensor, inside: Sequence[bool], compute: torch.dtype, *, subtract: bool
) -> tuple[Tensor, Tensor]:
    """`magnitude_bounds` of many tensors by as many launches as for one.

    ranks: int64[T, n, 2], each model's first and last, on the host, or where the lists are if these are kept. inside:
    for each of the 2 n whether any may be more than 0 and less than its tensor's length. subtract: deltas from the
    bases are ranked.
    Returns bounds int64[T, n, 2, 2] and ties_before int64[n, 2, blocks], in which the blocks of a tensor, max(1,
    ceil(N / 65536)), follow those of the one before.
    Errors: ValueError where the models, or the bases, do not have a single dtype; take the tensors one by one then.
    """
    lists.need_uniform()
    x, n, device = lists.models[0][0], len(lists.models), lists.device
    base = lists.base[0] if lists.base is not None and subtract else None
    ready = lists.once(("magnitude_bounds_many[triton]", subtract), lambda: _Ready.of(lists, subtract))
    slots, rows = _slots(inside), ready.rows
    if lists.kept:
        # The next merge may have other ranks while this one is still under way.
        numbers = torch.cat((table(slots, device)[: 2 * n], rows.flatten()))
    else:
        numbers = torch.cat((slots, rows.flatten()))
    numbers[2 * n :].view(rows.shape)[:, n : 3 * n] = ranks.flatten(1)
    if not lists.kept:
        numbers = table(numbers, device)
    kind = _kind(base, x.dtype, compute)
    return _bounds(
        _Descent(
            numbers, ready.tensor_of, base, x, ready.aligned, lists.tensors, n, sum(inside), ready.blocks, kind, compute
        )
    )


@dataclass(frozen=True)
class _Ready:
    """Many tensors before their ranks are known: the table's rows, where the lists are if these are kept."""

    rows: Tensor
    tensor_of: Tensor | None
    aligned: bool
    blocks: int

    @classmethod
    def of(cls, lists: Lists, subtract: bool) -> _Ready:
        """That of these lists."""
        bases = lists.base_addresses if subtract else torch.zeros_like(lists.lengths)
        rows = _rows(lists.model_addresses, bases, lists.lengths)
        if lists.kept:
            rows = table(rows.flatten(), lists.device)[: rows.numel()].view(rows.shape)
        together = multiple_of(lists.model_addresses, bases)
        return cls(rows, _tensor_of(lists.lengths, lists.device), together == 16, int(lists.blocks.sum()))


def kth_magnitude(shards: list[Tensor], k: int) -> Tensor:
    """The k-th largest magnitude; see `fastmerge.ops.kth_magnitude`."""
    filled = [shard for shard in shards if shard.numel()]
    device = filled[0].device
    kinds = {_kind(None, shard.dtype, torch.float32) for shard in filled}
    kind = kinds.pop() if len(kinds) == 1 else _WIDE
    descents = [
        _Descent.of(None, [[filled[i]] for i in group], [[k, 0]] * len(group), kind, torch.float32, together=True)
        for group in _groups(filled)
    ]
    state = torch.empty(1, 2, dtype=torch.int64, device=device)
    counts = torch.zeros(1, 256, dtype=torch.int64, device=device)
    last_place, width = descents[0].last_digit
    for place in range(last_place + 1):
        for descent in descents:
            descent.sweep(place, state, counts)
        if place < last_place:
            descents[0].descend(place, state, counts)
    out = torch.empty((), dtype=torch.float32, device=device)
    launch(kernels.write_magnitude, (1,), device, state, counts, out, KIND=kind, WIDTH=width)
    return out


# -- histograms ------------------------------------------------------------------------------------------------------


def _groups(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """The places of the tensors of each dtype: a launch reads one."""
    for dtype in dict.fromkeys(x.dtype for x in tensors):
        yield [i for i, x in enumerate(tensors) if x.dtype == dtype]


def _each_dtype(
    kernel: Any,
    base: Tensor | None,
    tensors: list[Tensor],
    values: list[int],
    compute: torch.dtype,
    *arguments: Tensor | int,
    before: Sequence[Tensor],
    **constants: Any,
) -> None:
    """Launch a kernel that takes n models, with a number for each, for those of each dtype together."""
    x = tensors[0]
    for group in _groups(tensors):
        models = [tensors[i] for i in group]
        numbers = [number for i in group for number in (tensors[i].data_ptr(), values[i], i)]
        launch(
            kernel,
            (tiles(x.numel(), TIE_BLOCK) * len(group),),
            x.device,
            table(numbers, x.device),
            models[0] if base is None else base,
            *before,
            len(group),
            x.numel(),
            *arguments,
            num_warps=WARPS // 2,
            X=_TYPES[models[0].dtype],
            HAS_BASE=base is not None,
            COMPUTE=CODES[compute],
            ALIGNED=aligned([base, *models]),
            BLOCK=_tile(x, SHORT_BLOCK),
            **constants,
        )


def _copies(blocks: int, width: int, numel: int, rows: int, device: torch.device) -> Tensor:
    """Zeroed histograms [rows, copies, 2**width] for so many blocks, of int32 where no count can overflow."""
    copies = max(1, min(blocks, COPIES if width < 16 else COPIES // 4))
    dtype = torch.int32 if numel < 1 << 31 else torch.int64
    return torch.zeros(rows, copies, 1 << width, dtype=dtype, device=device)


def abs_histogram(shards: list[Tensor], bins: int) -> Tensor:
    """Counts of magnitude keys; see `fastmerge.ops.abs_histogram`."""
    x = shards[0]
    kind = _NARROW.get(x.dtype, _WIDE)
    filled = [shard for shard in shards if shard.numel()]
    used = bins.bit_length() - 1
    # Up to a digit of bits is what `tl.histogram` counts.
    if not filled or used <= 8:
        counts = torch.zeros(1, 256, dtype=torch.int64, device=x.device)
        if filled:
            one_vector = [[shard] for shard in filled]
            descent = _Descent.of(None, one_vector, [[1, 0]] * len(filled), kind, torch.float32, together=True)
            descent.sweep(0, counts, counts)
        return counts.view(bins, -1).sum(dim=1) if used <= 8 else counts.new_zeros(bins)
    blocks = max(tiles(shard.numel(), TIE_BLOCK) for shard in filled)
    copies = _copies(blocks, used, sum(shard.numel() for shard in filled), 1, x.device)
    for shard in filled:
        _each_dtype(
            kernels.count_keys, None, [shard], [0], torch.float32, copies.shape[1],
            before=[copies], KIND=kind, SHIFT=(15 if kind == _FLOAT16 else 31) - used, WIDTH=used,
        )  # fmt: skip
    return copies[0].sum(dim=0)


def key_histogram(base: Tensor | None, tensors: list[Tensor], prefix: list[int], compute: torch.dtype) -> Tensor:
    """Counts of the high or the low part of delta keys; see `fastmerge.ops.key_histogram`."""
    top = prefix[0] < 0
    width = 16 if top else 15
    numel = tensors[0].numel()
    copies = _copies(tiles(numel, TIE_BLOCK), width, numel, len(tensors), tensors[0].device)
    # What begins with no bits at all begins with 0.
    _each_dtype(
        kernels.count_keys, base, tensors, [0] * len(tensors) if top else prefix, compute, copies.shape[1],
        before=[copies], KIND=_WIDE, SHIFT=15 if top else 0, WIDTH=width,
    )  # fmt: skip
    return copies.sum(dim=1)


def key_window_(
    base: Tensor | None, tensors: list[Tensor], low: list[int], compute: torch.dtype, counts: Tensor
) -> None:
    """Count keys past and inside a window of keys; see `fastmerge.ops.key_window_`."""
    _each_dtype(kernels.count_window, base, tensors, low, compute, counts.shape[1] - 1, before=[counts])


# -- ties and masks --------------------------------------------------------------------------------------------------


def tie_counts(base: Tensor | None, tensors: list[Tensor], bounds: Tensor, compute: torch.dtype) -> Tensor:
    """How many elements of each tie block equal a bound that splits equals; see `fastmerge.ops.tie_counts`."""
    blocks = _tie_blocks(tensors[0].numel())
    new = torch.empty if tensors[0].numel() else torch.zeros
    out = new(len(tensors), 2, blocks, dtype=torch.int64, device=tensors[0].device)
    nothing = [0] * len(tensors)
    _each_dtype(kernels.count_ties, base, tensors, nothing, compute, blocks, before=[bounds, out])
    return out


def topk_mask(x: Tensor, bounds: Tensor, ties_before: Tensor) -> Tensor:
    """Which elements lie between the two bounds; see `fastmerge.ops.topk_mask`."""
    out = torch.empty(x.shape, dtype=torch.bool, device=x.device)
    blocks = tiles(x.numel(), TIE_BLOCK)
    launch(
        kernels.mask_band, (blocks,), x.device, x, bounds, ties_before, out.view(torch.uint8), x.numel(), blocks,
        num_warps=WARPS, BLOCK=_tile(x), WALKED=_tile(x, WALKED),
    )  # fmt: skip
    return out
