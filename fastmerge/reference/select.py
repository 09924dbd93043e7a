"""Histograms of magnitudes, exact order statistics, and masks of the elements whose rank lies in a range.

Elements are ranked by falling key, equal keys by rising flat index; rank 0 is the largest magnitude. A rank b is
described by a bound (T, c) that lets each element decide by itself whether its rank is at least b:

    c == 0:   key < T
    c > 0:    key < T, or key == T and at least c earlier elements of the tensor have the same key

T is the key of the last element before the cut, the one of rank b - 1, and c > 0 only where the cut really falls inside
a group of equal keys. At the ends, T = 2**31 for b = 0 (every element has rank >= 0) and T = 0 for b = N (none has).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import random
from .numbers import HALF_KEYS, KEY_BITS, difference, half_keys, keys, magnitude_of

TIE_BLOCK = 65536
LOW_BITS = 15
ABOVE_ALL_KEYS = 1 << KEY_BITS


def abs_histogram(shards: list[Tensor], bins: int) -> Tensor:
    """Counts of the leading bits of each key, int64[bins]; 16-bit types use their own 15-bit keys."""
    counts = torch.zeros(bins, dtype=torch.int64, device=shards[0].device)
    used_bits = bins.bit_length() - 1
    for shard in shards:
        flat = shard.reshape(-1)
        if flat.dtype in HALF_KEYS:
            bucket = half_keys(flat) >> (15 - used_bits)
        else:
            bucket = keys(flat) >> (KEY_BITS - used_bits)
        counts += torch.bincount(bucket, minlength=bins)
    return counts


def kth_magnitude(shards: list[Tensor], k: int) -> Tensor:
    """The k-th largest magnitude (1 <= k <= N) over all shards together, float32, 0-d."""
    together = torch.cat([keys(shard.reshape(-1).to(torch.float32)) for shard in shards])
    return magnitude_of(int(together.sort(descending=True).values[k - 1])).to(together.device)


def bound(key: Tensor, rank: int) -> tuple[int, int]:
    """The bound (T, c) of `rank` among these keys."""
    if rank <= 0:
        return ABOVE_ALL_KEYS, 0
    if rank >= key.numel():
        return 0, 0
    last_before = int(key.sort(descending=True).values[rank - 1])
    equal_before = rank - int((key > last_before).sum())
    cuts_a_group = equal_before < int((key == last_before).sum())
    return last_before, equal_before if cuts_a_group else 0


def block_counts(key: Tensor, bounds: Tensor) -> Tensor:
    """For each of a model's two bounds, how many keys equal T in each block of TIE_BLOCK elements; 0 where c == 0."""
    counts = torch.zeros(2, block_number(key.numel()), dtype=torch.int64, device=key.device)
    for which, (threshold, ties) in enumerate(bounds.tolist()):
        if ties > 0:
            for number, block in enumerate(key.split(TIE_BLOCK)):
                counts[which, number] = (block == threshold).sum()
    return counts


def block_number(numel: int) -> int:
    """How many blocks of TIE_BLOCK elements a chunk has; an empty one counts as one block."""
    return max(1, -(-numel // TIE_BLOCK))


def magnitude_bounds(
    base: Tensor | None, tensors: list[Tensor], first: list[int], last: list[int], compute: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The bounds int64[n, 2, 2] of the ranks first[i] and last[i] in whole tensors, and the ties before each block."""
    bounds = torch.zeros(len(tensors), 2, 2, dtype=torch.int64, device=tensors[0].device)
    for model, x in enumerate(tensors):
        key = keys(difference(base, x, compute))
        bounds[model] = torch.tensor([bound(key, first[model]), bound(key, last[model])])
    counts = tie_counts(base, tensors, bounds, compute)
    return bounds, counts.cumsum(dim=2) - counts


def key_histogram(base: Tensor | None, tensors: list[Tensor], prefix: list[int], compute: torch.dtype) -> Tensor:
    """One of the two levels of a key's histogram.

    All prefixes negative: int64[n, 65536], counts of key >> 15. Otherwise int64[n, 32768], counts of key & 32767 among
    the keys with key >> 15 == prefix[i].
    """
    top_level = all(p < 0 for p in prefix)
    rows = []
    for x, wanted in zip(tensors, prefix):
        key = keys(difference(base, x, compute))
        high = key >> LOW_BITS
        if top_level:
            rows.append(torch.bincount(high, minlength=1 << KEY_BITS - LOW_BITS))
        else:
            low = key[high == wanted] & (1 << LOW_BITS) - 1
            rows.append(torch.bincount(low, minlength=1 << LOW_BITS))
    return torch.stack(rows)


def key_window_(
    base: Tensor | None, tensors: list[Tensor], low: list[int], compute: torch.dtype, counts: Tensor
) -> None:
    """Add to counts[i]: how many keys of model i lie past its window, then how many there are of each key in it.

    The window of model i is the counts.shape[1] - 1 keys from low[i] on.
    """
    width = counts.shape[1] - 1
    for i, x in enumerate(tensors):
        place = keys(difference(base, x, compute)) - low[i]
        counts[i, 0] += (place >= width).sum()
        counts[i, 1:] += torch.bincount(place[(place >= 0) & (place < width)], minlength=width)


def tie_counts(base: Tensor | None, tensors: list[Tensor], bounds: Tensor, compute: torch.dtype) -> Tensor:
    """int64[n, 2, blocks]: per block of this chunk, how many keys equal each bound's T; 0 where c == 0."""
    rows = [block_counts(keys(difference(base, x, compute)), bounds[model]) for model, x in enumerate(tensors)]
    return torch.stack(rows)


def rank_at_least(key: Tensor, threshold: int, ties: int, ties_before: list[int]) -> Tensor:
    """Which elements' rank is at least that of the bound (threshold, ties)."""
    below = key < threshold
    if ties == 0:
        return below
    pieces = []
    for block, before in zip(key.split(TIE_BLOCK), ties_before):
        tied = block == threshold
        ordinal = before + tied.cumsum(0) - tied.to(torch.int64)
        pieces.append(tied & (ordinal >= ties))
    return below | torch.cat(pieces)


def band(key: Tensor, bounds: Tensor, ties_before: Tensor) -> Tensor:
    """Which elements of a chunk have a rank in [first, last); bounds int64[2, 2], ties_before int64[2, blocks]."""
    (first, first_ties), (last, last_ties) = bounds.tolist()
    first_before, last_before = ties_before.tolist()
    return rank_at_least(key, first, first_ties, first_before) & ~rank_at_least(key, last, last_ties, last_before)


def topk_mask(x: Tensor, bounds: Tensor, ties_before: Tensor) -> Tensor:
    """Which elements of `x` have a rank between the two bounds; bool, shaped like `x`."""
    return band(keys(x.reshape(-1).to(torch.float32)), bounds[0], ties_before[0]).reshape(x.shape)


def hashed_mask(x: Tensor, bounds: Tensor, *, seed: int, tensor_id: int, position: int, offset: int) -> Tensor:
    """As topk_mask of a whole tensor, but equal keys are ranked by a 64-bit random word, then by flat index.

    The high half of the word is the element's word in generation 0 of the purpose "hashed ties", the low half that of
    generation 1. As many elements are kept as without hashing; only which members of a tied group they are changes.
    """
    key = keys(x.reshape(-1).to(torch.float32))
    masks = []
    for threshold, ties in bounds[0].tolist():
        mask = key < threshold
        if ties > 0:
            tied = (key == threshold).nonzero()[:, 0]
            halves = [
                random.words_at(
                    tied + offset,
                    seed=seed,
                    tensor_id=tensor_id,
                    stream=random.stream_id(random.HASHED_TIES, position, generation),
                )
                for generation in (0, 1)
            ]
            # Two stable sorts, the minor key first, order by (high, low, index) without a 64-bit unsigned type.
            order = halves[1].argsort(stable=True)
            order = order[halves[0][order].argsort(stable=True)]
            mask[tied[order[ties:]]] = True
        masks.append(mask)
    return (masks[0] & ~masks[1]).reshape(x.shape)
