"""Selection: histograms that add, exact order statistics, top-k masks, and rank bounds for whole or chunked tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends.rule import TIE_BLOCK
from ..errors import ArgumentError
from . import _checks
from ._library import define, signed64, unsigned64

TIES = ("lowest_index", "hashed", "keep")
NO_PREFIX = 65535
"""A prefix that no key has: its second-level histogram is empty."""

TOP_BINS = 65536
LOW_BINS = 32768
_LOW_BITS = 15
_ABOVE_ALL_KEYS = 1 << 31


# -- schema, kernel, fake --------------------------------------------------------------------------------------------


def tie_blocks(numel: Any) -> Any:
    """How many blocks of TIE_BLOCK elements a tensor has; an empty one counts as one."""
    return torch.sym_max(1, (numel + TIE_BLOCK - 1) // TIE_BLOCK)


def check_bounds(bounds: Tensor, ties_before: Tensor, models: int, numel: int, device: torch.device) -> None:
    """Rank bounds int64[models, 2, 2] and the ties before each block int64[models, 2, blocks], where the models are."""
    _checks.counts_tensor("bounds", bounds, (models, 2, 2), device)
    _checks.counts_tensor("ties_before", ties_before, (models, 2, tie_blocks(numel)), device)


def _abs_histogram_checks(shards: Sequence[Tensor], bins: int) -> None:
    _checks.kernel_inputs("x", shards)
    if any(shard.dtype != shards[0].dtype for shard in shards):
        raise ArgumentError("the shards of x have different dtypes, whose histograms do not add; convert them to one.")
    if bins < 1 or bins > LOW_BINS or bins & (bins - 1):
        raise ArgumentError(f"bins={bins} is not a power of two between 1 and 32768; pass one such as 32768.")


def _abs_histogram(shards: list[Tensor], bins: int, backend: str = "auto") -> Tensor:
    _abs_histogram_checks(shards, bins)
    return backends.resolve(backend, shards[0].device).abs_histogram(_checks.contiguous(shards), bins)


def _abs_histogram_fake(shards: list[Tensor], bins: int, backend: str = "auto") -> Tensor:
    _abs_histogram_checks(shards, bins)
    return shards[0].new_empty((bins,), dtype=torch.int64)


_abs_histogram_op = define(
    'abs_histogram(Tensor[] shards, int bins, str backend="auto") -> Tensor', _abs_histogram, _abs_histogram_fake
)


def _kth_magnitude(shards: list[Tensor], k: int, backend: str = "auto") -> Tensor:
    _checks.kernel_inputs("shards", shards)
    total = sum(shard.numel() for shard in shards)
    if not 1 <= k <= total:
        raise ArgumentError(f"k={k} is out of range for {total} elements; pass 1 <= k <= {total}.")
    return backends.resolve(backend, shards[0].device).kth_magnitude(_checks.contiguous(shards), k)


def _kth_magnitude_fake(shards: list[Tensor], k: int, backend: str = "auto") -> Tensor:
    _checks.kernel_inputs("shards", shards)
    return shards[0].new_empty((), dtype=torch.float32)


_kth_magnitude_op = define(
    'kth_magnitude(Tensor[] shards, SymInt k, str backend="auto") -> Tensor', _kth_magnitude, _kth_magnitude_fake
)


def _magnitude_bounds(
    base: Tensor | None, tensors: list[Tensor], first: list[int], last: list[int], compute: torch.dtype,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _checks.models(base, tensors)
    _checks.one_per_model("first", first, len(tensors))
    _checks.one_per_model("last", last, len(tensors))
    _checks.compute_dtype("compute", compute)
    numel = tensors[0].numel()
    for name, ranks in (("first", first), ("last", last)):
        for rank in ranks:
            if not 0 <= rank <= numel:
                raise ArgumentError(f"{name} holds rank {rank} of {numel} elements; pass ranks from 0 to {numel}.")
    module = backends.resolve(backend, tensors[0].device)
    bounds, ties = module.magnitude_bounds(
        _checks.optional_contiguous(base), _checks.contiguous(tensors), list(first), list(last), compute
    )
    return bounds, ties


def _magnitude_bounds_fake(
    base: Tensor | None, tensors: list[Tensor], first: list[int], last: list[int], compute: torch.dtype,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _checks.models(base, tensors)
    x, n = tensors[0], len(tensors)
    return (
        x.new_empty((n, 2, 2), dtype=torch.int64),
        x.new_empty((n, 2, tie_blocks(x.numel())), dtype=torch.int64),
    )


_magnitude_bounds_op = define(
    "magnitude_bounds(Tensor? base, Tensor[] tensors, SymInt[] first, SymInt[] last, ScalarType compute, "
    'str backend="auto") -> (Tensor, Tensor)',
    _magnitude_bounds,
    _magnitude_bounds_fake,
)


def _key_histogram_checks(base: Tensor | None, tensors: Sequence[Tensor], prefix: Sequence[int], compute: Any) -> int:
    """The number of bins that each model gets."""
    _checks.models(base, tensors)
    _checks.one_per_model("prefix", prefix, len(tensors))
    _checks.compute_dtype("compute", compute)
    negative = [p < 0 for p in prefix]
    if any(negative) != all(negative):
        raise ArgumentError(
            f"prefix mixes negative entries, which ask for the first level, with others; use {NO_PREFIX} "
            "for a model that needs no second level."
        )
    return TOP_BINS if negative[0] else LOW_BINS


def _key_histogram(
    base: Tensor | None, tensors: list[Tensor], prefix: list[int], compute: torch.dtype, backend: str = "auto"
) -> Tensor:
    _key_histogram_checks(base, tensors, prefix, compute)
    return backends.resolve(backend, tensors[0].device).key_histogram(
        _checks.optional_contiguous(base), _checks.contiguous(tensors), list(prefix), compute
    )


def _key_histogram_fake(
    base: Tensor | None, tensors: list[Tensor], prefix: list[int], compute: torch.dtype, backend: str = "auto"
) -> Tensor:
    bins = _key_histogram_checks(base, tensors, prefix, compute)
    return tensors[0].new_empty((len(tensors), bins), dtype=torch.int64)


_key_histogram_op = define(
    'key_histogram(Tensor? base, Tensor[] tensors, int[] prefix, ScalarType compute, str backend="auto") -> Tensor',
    _key_histogram,
    _key_histogram_fake,
)


def _key_window_checks(
    base: Tensor | None, tensors: Sequence[Tensor], low: Sequence[int], compute: Any, counts: Tensor
) -> None:
    _checks.models(base, tensors)
    _checks.one_per_model("low", low, len(tensors))
    _checks.compute_dtype("compute", compute)
    if counts.dtype != torch.int64 or counts.dim() != 2 or counts.shape[0] != len(tensors) or counts.shape[1] < 2:
        raise ArgumentError(
            f"counts must be int64[{len(tensors)}, window + 1]; allocate it with torch.zeros(..., dtype=torch.int64)."
        )
    _checks.same_device("counts", counts, tensors[0].device)


def _key_window(
    base: Tensor | None,
    tensors: list[Tensor],
    low: list[int],
    compute: torch.dtype,
    counts: Tensor,
    backend: str = "auto",
) -> None:
    _key_window_checks(base, tensors, low, compute, counts)
    if not counts.is_contiguous():
        raise ArgumentError("counts is not contiguous; pass a tensor made by torch.zeros(shape).")
    if any(not 0 <= start <= _ABOVE_ALL_KEYS for start in low):
        raise ArgumentError("low holds a number that is no key; keys are 0 to 2**31.")
    backends.resolve(backend, tensors[0].device).key_window_(
        _checks.optional_contiguous(base), _checks.contiguous(tensors), list(low), compute, counts
    )


_key_window_op = define(
    "key_window_(Tensor? base, Tensor[] tensors, int[] low, ScalarType compute, Tensor(a!) counts, "
    'str backend="auto") -> ()',
    _key_window,
    lambda base, tensors, low, compute, counts, backend="auto": _key_window_checks(base, tensors, low, compute, counts),
)


def _tie_counts(
    base: Tensor | None, tensors: list[Tensor], bounds: Tensor, compute: torch.dtype, backend: str = "auto"
) -> Tensor:
    _checks.models(base, tensors)
    _checks.counts_tensor("bounds", bounds, (len(tensors), 2, 2), tensors[0].device)
    _checks.compute_dtype("compute", compute)
    return backends.resolve(backend, tensors[0].device).tie_counts(
        _checks.optional_contiguous(base), _checks.contiguous(tensors), bounds.contiguous(), compute
    )


def _tie_counts_fake(
    base: Tensor | None, tensors: list[Tensor], bounds: Tensor, compute: torch.dtype, backend: str = "auto"
) -> Tensor:
    _checks.models(base, tensors)
    _checks.counts_tensor("bounds", bounds, (len(tensors), 2, 2), tensors[0].device)
    return bounds.new_empty((len(tensors), 2, tie_blocks(tensors[0].numel())))


_tie_counts_op = define(
    'tie_counts(Tensor? base, Tensor[] tensors, Tensor bounds, ScalarType compute, str backend="auto") -> Tensor',
    _tie_counts,
    _tie_counts_fake,
)


def _topk_mask(x: Tensor, bounds: Tensor, ties_before: Tensor, backend: str = "auto") -> Tensor:
    _checks.kernel_inputs("x", [x])
    check_bounds(bounds, ties_before, 1, x.numel(), x.device)
    return backends.resolve(backend, x.device).topk_mask(x.contiguous(), bounds.contiguous(), ties_before.contiguous())


def _topk_mask_fake(x: Tensor, bounds: Tensor, ties_before: Tensor, backend: str = "auto") -> Tensor:
    check_bounds(bounds, ties_before, 1, x.numel(), x.device)
    return x.new_empty(x.shape, dtype=torch.bool)


_topk_mask_op = define(
    'topk_mask(Tensor x, Tensor bounds, Tensor ties_before, str backend="auto") -> Tensor', _topk_mask, _topk_mask_fake
)


def _hashed_mask(x: Tensor, bounds: Tensor, seed: int, tensor_id: int, position: int, offset: int) -> Tensor:
    _checks.kernel_inputs("x", [x])
    _checks.counts_tensor("bounds", bounds, (1, 2, 2), x.device)
    # One definition serves all backends: only the few tied elements need random words.
    return backends.resolve("reference", x.device).hashed_mask(
        x, bounds, seed=unsigned64(seed), tensor_id=unsigned64(tensor_id), position=position, offset=offset
    )


def _hashed_mask_fake(x: Tensor, bounds: Tensor, seed: int, tensor_id: int, position: int, offset: int) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.bool)


_hashed_mask_op = define(
    "hashed_mask(Tensor x, Tensor bounds, int seed, int tensor_id, int position, SymInt offset) -> Tensor",
    _hashed_mask,
    _hashed_mask_fake,
)


# -- public ----------------------------------------------------------------------------------------------------------


def abs_histogram(x: Tensor | Sequence[Tensor], *, bins: int = 32768, backend: str = "auto") -> Tensor:
    """Count magnitudes by the leading bits of their bit patterns.

    x: a tensor, or a list of tensors ("shards") of one dtype that together are one vector; any shape; float32,
        bfloat16, float16, or float64 (rounded to float32 first).
    bins: a power of two, at most 32768. With 32768 the histogram of a 16-bit type has one bin per magnitude. Bin b of a
        float32 vector holds the magnitudes whose 31-bit pattern shifted right by 31 - log2(bins) is b. NaN counts in
        the bin of the canonical NaN, above infinity.
    Returns int64[bins]. Histograms of parts add up to the histogram of the whole.
    Errors: ArgumentTypeError for other dtypes; ArgumentError for shards of different dtypes, an empty list, a `bins`
        that is not such a power of two, or tensors on several devices; BackendError for a backend that is missing.
    Source: radix selection on order-preserving keys (docs/numbers.md).
    """
    result: Tensor = _abs_histogram_op(_checks.shards("x", x), _checks.integer("bins", bins), backend)
    return result


def kth_magnitude(shards: Tensor | Sequence[Tensor], k: int, *, backend: str = "auto") -> float:
    """The exact k-th largest magnitude over all shards.

    shards: a tensor or a list of tensors that together are one vector of N elements; dtypes may differ (float32,
        bfloat16, float16; float64 is rounded to float32 first).
    k: 1 <= k <= N; 1 is the largest magnitude. NaN ranks above infinity.
    Returns a float that is exact in float32.
    Errors: ArgumentError when k is out of range or tensors are on several devices; ArgumentTypeError for wrong dtypes.
    Source: an order statistic, without sampling (docs/numbers.md).
    """
    value: float = _kth_magnitude_op(_checks.shards("shards", shards), _checks.integer("k", k), backend).item()
    return value


def topk_mask(
    x: Tensor,
    density: float,
    *,
    ties: str = "lowest_index",
    seed: int = 0,
    tensor_id: int = 0,
    offset: int = 0,
    model: int = 0,
    backend: str = "auto",
) -> Tensor:
    """Mark the elements of largest magnitude.

    x: any shape; float32, bfloat16, float16, or float64 (rounded to float32 first).
    density: the fraction to mark, in [0, 1]: k = max(1, int(density * N)) elements, none when it is 0, all when 1.
    ties: what happens where equal magnitudes straddle the cut. "lowest_index" marks exactly k, the lowest row-major
        index first (so the first rows of a matrix are favoured); "hashed" marks exactly k in a random order given by
        `seed`, `tensor_id`, `offset` (flat index of x's first element in its tensor) and `model`; "keep" marks every
        element whose magnitude is at least the k-th largest.
    Returns a bool tensor shaped like x. NaN ranks above infinity.
    Errors: ArgumentError / ArgumentTypeError, in a sentence that names the argument.
    Source: magnitude pruning as in TIES (Yadav et al., arXiv 2306.01708).
    """
    x = _checks.input_tensor("x", x)
    density = _checks.fraction("density", density)
    _checks.choice("ties", ties, TIES)
    first, last = rank_range(x.numel(), density)
    bounds, ties_before = _magnitude_bounds_op(None, [x], [first], [last], torch.float32, backend)
    if ties == "hashed":
        return hashed_mask(x, bounds, seed=seed, tensor_id=tensor_id, model=model, offset=offset)
    if ties == "keep":
        bounds = keep_ties(bounds)
    mask: Tensor = _topk_mask_op(x, bounds, ties_before, backend)
    return mask


def hashed_mask(x: Tensor, bounds: Tensor, *, seed: int, tensor_id: int, model: int = 0, offset: int = 0) -> Tensor:
    """Mark the elements ranked between two bounds, equal magnitudes ranked by random words instead of by index.

    x: a whole tensor, any shape. bounds: int64[1, 2, 2] as `magnitude_bounds` returns them for x.
    seed, tensor_id, model, offset: select the words, as everywhere; the words have a purpose of their own.
    Returns a bool tensor shaped like x, with as many elements marked as the bounds mark by index.
    Errors: ArgumentError / ArgumentTypeError, in a sentence that names the argument.
    """
    mask: Tensor = _hashed_mask_op(
        _checks.input_tensor("x", x),
        bounds,
        signed64(_checks.integer("seed", seed)),
        signed64(_checks.integer("tensor_id", tensor_id)),
        _checks.integer("model", model, 0, _checks.MAX_POSITION),
        _checks.integer("offset", offset, 0),
    )
    return mask


def rank_range(numel: int, density: float, gamma: float | None = None) -> tuple[int, int]:
    """The ranks [first, last) by falling magnitude that a density keeps of `numel` elements.

    density: the fraction to keep. At 1 and above everything is kept, whatever gamma.
    gamma: None for plain magnitude: the max(1, int(density * numel)) largest, none at density 0. Otherwise the
        int(gamma * numel) largest are dropped as outliers and the next int(density * numel) kept; where these two
        exceed the tensor, fewer outliers are dropped.
    Source: mergekit 0.1.5 `magnitude` and `magnitude_outliers` (docs/methods.md).
    """
    if density >= 1:
        return 0, numel
    if gamma is None:
        return 0, min(numel, max(1, int(density * numel))) if density > 0 else 0
    target = int(density * numel)
    lowest = max(0, numel - target - int(gamma * numel))
    return numel - lowest - target, numel - lowest


def rank_ranges(numels: Tensor, densities: Sequence[float], gammas: Sequence[float | None]) -> Tensor:
    """`rank_range` of many tensors for each of n models, where their lengths are.

    numels: int64[T]. densities, gammas: n. Returns int64[T, n, 2].
    """
    # float64 is what Python's floats are: products and their whole parts are the same.
    wide = numels.double()
    zero = torch.zeros_like(numels)
    found: dict[tuple[float, float | None], tuple[Tensor, Tensor]] = {}
    for density, gamma in zip(densities, gammas, strict=True):
        if (density, gamma) in found:
            continue
        if density >= 1:
            cut = zero, numels
        elif gamma is None:
            most = (wide * density).long().clamp_(min=1)
            cut = zero, torch.minimum(most, numels) if density > 0 else zero
        else:
            target = (wide * density).long()
            last = (target + (wide * gamma).long()).minimum(numels)
            cut = last - target, last
        found[density, gamma] = cut
    return torch.stack([cut for key in zip(densities, gammas) for cut in found[key]], dim=1).view(len(numels), -1, 2)


def keep_ties(bounds: Tensor) -> Tensor:
    """Move rank bounds so that no group of equal magnitudes is cut: a group that is kept in part is kept whole.

    bounds: int64[n, 2, 2]. Returns a new tensor of that shape with c = 0 everywhere; ranges that keep nothing still do.
    """
    result = bounds.clone()
    empty = (bounds[:, 0] == bounds[:, 1]).all(dim=1)
    cut_inside = (bounds[:, 0, 1] > 0) & ~empty
    result[:, 0, 0] += cut_inside.to(torch.int64)
    result[:, :, 1] = 0
    return result


def magnitude_bounds(
    base: Tensor | None,
    tensors: Sequence[Tensor],
    first: Sequence[int],
    last: Sequence[int],
    *,
    compute: torch.dtype = torch.float32,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Find where the ranks first[i] and last[i] cut each whole tensor (of the deltas, when there is a base).

    base, tensors: n models of one shape, N elements. first, last: ranks by falling magnitude, 0 .. N.
    compute: the dtype that the deltas are rounded to.
    Returns bounds int64[n, 2, 2], a pair (T, c) for each rank, and ties_before int64[n, 2, blocks]: how many elements
    equal to T precede each block of 65536 elements (0 where c is 0). An element's rank is at least b when its key (bit
    pattern of its magnitude) is below T, or, where c > 0, equals T with at least c equal ones before it.
    Errors: ArgumentError / ArgumentTypeError, in a sentence that names the argument.
    """
    bounds, ties_before = _magnitude_bounds_op(
        None if base is None else _checks.input_tensor("base", base),
        _checks.input_tensors("tensors", tensors),
        [_checks.integer("first", rank) for rank in first],
        [_checks.integer("last", rank) for rank in last],
        _checks.compute_dtype("compute", compute),
        backend,
    )
    return bounds, ties_before


def key_histogram(
    base: Tensor | None,
    tensors: Sequence[Tensor],
    prefix: Sequence[int],
    *,
    compute: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """One level of the two-level histogram of magnitudes' 31-bit keys, for a chunk of n models' values or deltas.

    prefix: all negative for the first level, else for each model the 16 leading key bits whose keys are refined (see
        `bound_prefix`; 65535 for a model that needs none).
    Returns int64[n, 65536], counts of key >> 15, or int64[n, 32768], counts of key & 32767 among the keys with that
    prefix. Histograms of chunks add.
    Errors: ArgumentError / ArgumentTypeError, in a sentence that names the argument.
    """
    counts: Tensor = _key_histogram_op(
        None if base is None else _checks.input_tensor("base", base),
        _checks.input_tensors("tensors", tensors),
        [_checks.integer("prefix", p, high=NO_PREFIX, low=-(1 << 31)) for p in prefix],
        _checks.compute_dtype("compute", compute),
        backend,
    )
    return counts


def key_window_(
    base: Tensor | None,
    tensors: Sequence[Tensor],
    low: Sequence[int],
    counts: Tensor,
    *,
    compute: torch.dtype = torch.float32,
    backend: str = "auto",
) -> None:
    """Count the keys of a chunk that lie in a narrow window, each key by itself: exact ranks where they are expected.

    low: for each model the first key of its window. counts: int64[n, window + 1], added to: first how many keys lie
        past the window, then how many there are of each key in it. `bound_in_window` turns them into a bound.
    Errors: ArgumentError / ArgumentTypeError, in a sentence that names the argument.
    """
    _key_window_op(
        None if base is None else _checks.input_tensor("base", base),
        _checks.input_tensors("tensors", tensors),
        [_checks.integer("low", start) for start in low],
        _checks.compute_dtype("compute", compute),
        counts,
        backend,
    )


def bound_in_window(counts: Tensor, low: int, rank: int) -> tuple[int, int] | None:
    """The bound (T, c) of a rank, from one model's row of `key_window_`; None where it lies outside the window.

    counts: int64[window + 1], over a whole tensor of more than `rank` elements, rank > 0.
    """
    above = int(counts[0])
    falling = counts[1:].flip(0).cumsum(0)
    if not above < rank <= above + int(falling[-1]):
        return None
    place = int(torch.searchsorted(falling, rank - above))
    equal = int(counts[counts.numel() - 1 - place])
    before = rank - above - int(falling[place]) + equal
    return low + counts.numel() - 2 - place, 0 if before == equal else before


def tie_counts(
    base: Tensor | None,
    tensors: Sequence[Tensor],
    bounds: Tensor,
    *,
    compute: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """How many keys equal each bound's T in each block of 65536 elements of this chunk.

    bounds: int64[n, 2, 2]. Returns int64[n, 2, blocks], 0 where c is 0; `ties_before` turns it into running counts.
    Errors: ArgumentError / ArgumentTypeError, in a sentence that names the argument.
    """
    counts: Tensor = _tie_counts_op(
        None if base is None else _checks.input_tensor("base", base),
        _checks.input_tensors("tensors", tensors),
        bounds,
        _checks.compute_dtype("compute", compute),
        backend,
    )
    return counts


def ties_before(counts: Tensor, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Turn a chunk's tie counts into the ties before each of its blocks.

    counts: int64[n, 2, blocks] of `tie_counts`. start: int64[n, 2], the ties in all earlier chunks (None: no earlier
    chunk).
    Returns (ties_before int64[n, 2, blocks], the start of the next chunk int64[n, 2]).
    """
    running = counts.cumsum(dim=2)
    before = running - counts
    total = running[:, :, -1]
    return (before, total) if start is None else (before + start[:, :, None], total + start)


def _locate(counts: Tensor, rank: int) -> tuple[int, int]:
    """The bin of the element of this rank (bins hold rising keys, ranks fall), and how many elements are above it."""
    from_top = counts.flip(0).cumsum(0)
    position = int(torch.searchsorted(from_top, rank, right=True))
    above = int(from_top[position - 1]) if position else 0
    return counts.numel() - 1 - position, above


def bound_prefix(level0: Tensor, rank: int) -> int:
    """The leading key bits in which the cut at `rank` falls, to be refined by a second-level histogram.

    level0: int64[65536], the first-level histogram of one model's whole tensor. rank: 0 .. N.
    Returns a prefix for `key_histogram`; 65535 where no second level is needed (ranks 0 and N).
    """
    if rank <= 0 or rank >= int(level0.sum()):
        return NO_PREFIX
    return _locate(level0, rank - 1)[0]


def bound(level0: Tensor, level1: Tensor, rank: int) -> tuple[int, int]:
    """The bound (T, c) of a rank, from the two levels of one model's histogram.

    level0: int64[65536]; level1: int64[32768], of the prefix that `bound_prefix(level0, rank)` gave. rank: 0 .. N.
    Returns what `magnitude_bounds` would give for the whole tensor.
    """
    if rank <= 0:
        return _ABOVE_ALL_KEYS, 0
    if rank >= int(level0.sum()):
        return 0, 0
    # The key of the last element before the cut, and how many of those equal to it come before the cut.
    high, above = _locate(level0, rank - 1)
    low, above_in_bin = _locate(level1, rank - 1 - above)
    equal_before = rank - above - above_in_bin
    return high << _LOW_BITS | low, equal_before if equal_before < int(level1[low]) else 0


def prefixes(level0: Tensor, ranks: Sequence[int]) -> list[int]:
    """`bound_prefix` for n models: level0 int64[n, 65536], one rank for each."""
    _checks.one_per_model("ranks", ranks, len(level0))
    return [bound_prefix(row, rank) for row, rank in zip(level0, ranks)]


def bounds_from_histograms(
    level0: Tensor, level1_first: Tensor, level1_last: Tensor, first: Sequence[int], last: Sequence[int]
) -> Tensor:
    """The bounds of n tensors that were only ever seen in chunks.

    level0: int64[n, 65536]. level1_first, level1_last: int64[n, 32768], the second levels for
    `prefixes(level0, first)` and `prefixes(level0, last)`. first, last: ranks by falling magnitude.
    Returns int64[n, 2, 2], equal to what `magnitude_bounds` returns for the whole tensors.
    """
    _checks.one_per_model("first", first, len(level0))
    _checks.one_per_model("last", last, len(level0))
    pairs = [
        [bound(level0[i], level1_first[i], first[i]), bound(level0[i], level1_last[i], last[i])]
        for i in range(len(level0))
    ]
    return torch.tensor(pairs, dtype=torch.int64).reshape(len(level0), 2, 2)
