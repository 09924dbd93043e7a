"""What sweeps of PCB-Merging find, as numbers: places in a row, keys of scores, windows of keys, thresholds, means."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends.rule import L1_LIMBS
from ..errors import ArgumentError, ArgumentTypeError
from . import _checks
from ._exact import l1_mass

VARIANTS = ("script", "nlp", "vision", "vision_es", "paper")
CLIPPED = {"script": 1e-4, "nlp": 1e-2, "vision": 1e-2, "vision_es": 1e-2}
"""The fraction of each row's magnitudes that is clipped at either end."""

SCORE_KEYS = 1 << 32
SCORE_BINS = 1 << 16
LOW_BITS = 16
WINDOW_BLOCK = 1 << 16
"""Keys of a window, or scores, that are looked at together."""


def pairs(models: Any) -> Any:
    """How many pairs so many rows make, each row with itself among them."""
    return models * (models + 1) // 2


def pcb_ranks(numel: int, density: float, variant: str) -> tuple[int, int, int]:
    """The places of a row's three order statistics, counted from the smallest, 0.

    numel: elements of the row, D > 0. density: the fraction to keep, in [0, 1].
    Returns (low, high, threshold): |delta| is clipped to the magnitudes at low = int(D * q) and high =
    int(D * (1 - q) - 1), scores begin to count at the one at threshold = int(D * (1 - density)); float64 arithmetic,
    truncated, held within [0, D - 1]. q is 1e-4 for "script", 1e-2 for "nlp", "vision" and "vision_es"; "paper" does
    not clip: 0 and D - 1. Place p is the (D - p)-th largest.
    Errors: ArgumentError / ArgumentTypeError, in a sentence that names the argument.
    Source: the released code of PCB-Merging (arXiv 2410.02396).
    """
    numel = _checks.integer("numel", numel, 1)
    density = _checks.fraction("density", density)
    q = CLIPPED.get(_checks.choice("variant", variant, VARIANTS))
    low, high = (0, numel - 1) if q is None else (int(numel * q), int(numel * (1 - q) - 1))
    return tuple(min(max(place, 0), numel - 1) for place in (low, high, int(numel * (1 - density))))  # type: ignore[return-value]


def score_keys(scores: Tensor) -> Tensor:
    """The keys of scores: numbers from 0 to 2**32 - 1 that order as the scores do.

    scores: float32, any shape. Returns int64 of that shape; NaN has the lowest key, 0.
    Errors: ArgumentTypeError for another dtype.
    """
    if not isinstance(scores, Tensor) or scores.dtype != torch.float32:
        raise ArgumentTypeError("scores must be a float32 tensor, as pcb_scores returns it; convert it with .float().")
    keys: Tensor = backends.resolve("reference").score_keys(scores)
    return keys


def score_of_key(key: int) -> float:
    """The score whose key this is, exact in float32; NaN for key 0."""
    key = _checks.integer("key", key, 0, SCORE_KEYS - 1)
    bits = key ^ (0x80000000 if key >> 31 else 0xFFFFFFFF)
    value: float = struct.unpack("<f", struct.pack("<I", bits))[0]
    return value


def _scores_of_keys(keys: Tensor) -> Tensor:
    """The scores whose keys these are, on the same device."""
    bits = torch.where(keys >> 31 == 1, keys ^ 0x80000000, keys ^ 0xFFFFFFFF)
    return (bits - (bits >> 31 << 32)).to(torch.int32).view(torch.float32)


def highest_bin(counts: Tensor, k: int) -> tuple[int, int]:
    """The bin of a histogram that holds the k-th highest, and how many are in the bins above.

    counts: int64[bins], of rising bins. k: 1 is the highest. Errors: ArgumentError where fewer than k were counted.
    """
    from_top = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, k))
    if k < 1 or place == counts.numel():
        raise ArgumentError(f"k={k} is out of range for {int(from_top[-1])} counted scores; pass 1 <= k <= that.")
    return counts.numel() - 1 - place, int(from_top[place] - counts[counts.numel() - 1 - place])


def score_prefix(level0: Tensor, k: int) -> int:
    """The leading 16 key bits of a row's k-th highest score.

    level0: int64[65536], one row of `pcb_histogram` with prefix -1, added over all chunks. k: 1 is the highest score.
    """
    return highest_bin(level0, k)[0]


def score_bound(level0: Tensor, level1: Tensor, k: int) -> int:
    """The key of a row's k-th highest score, from the two levels of its histogram.

    level0: as in `score_prefix`. level1: int64[65536], of the prefix that `score_prefix(level0, k)` gave.
    """
    high, above = highest_bin(level0, k)
    return high << LOW_BITS | highest_bin(level1, k - above)[0]


def score_bound_in_window(counts: Tensor, low: int, k: int) -> int | None:
    """The key of a row's k-th highest score, from its row of `pcb_window_`; None where it lies outside the window.

    counts: int64[window + 1], added over all chunks. low: the window's first key. k: 1 is the highest score.
    """
    missing = k - int(counts[0])
    if missing < 1:
        return None
    # From the top in blocks: a window is large, and whatever is made of it whole is, too.
    for stop in range(counts.numel(), 1, -WINDOW_BLOCK):
        start = max(1, stop - WINDOW_BLOCK)
        block = counts[start:stop]
        inside = int(block.sum())
        if missing <= inside:
            return low + start - 1 + highest_bin(block, missing)[0]
        missing -= inside
    return None


def choose_window(runs: Tensor, place: int, numel: int, most_width: int) -> tuple[int, int]:
    """In which narrow window of keys an order statistic of a long row must lie, judging by a sample.

    runs: int64[runs, run_length], keys of runs of neighbours from all over the row; neighbours are often alike, so that
        the error is estimated from how much the runs differ: of each run, the number of keys not below the estimate.
    place: of the order statistic, from the smallest, 0. numel: elements of the row.
    most_width: the window is cut to so many keys around the estimate.
    Returns (low, width): the keys from six standard errors and 8 elements below the estimate to as many above; just the
    key itself where the sample is the whole row. It is a guess, if a good one: count with `pcb_window_` and see.
    """
    ordered = runs.reshape(-1).sort().values
    size = ordered.numel()
    if size == 0:
        return 0, max(1, most_width)
    at = min(place * size // numel, size - 1)
    middle = int(ordered[at])
    if size >= numel:
        return middle, 1
    if len(runs) > 1:
        in_runs = (runs >= middle).sum(dim=1).to(torch.float64)
        reach = math.ceil(6 * float(in_runs.std()) * math.sqrt(len(runs)) + 8)
    else:
        reach = size
    first = int(ordered[at - reach]) if at >= reach else 0
    last = int(ordered[at + reach]) if at + reach < size else SCORE_KEYS - 1
    if last - first < most_width:
        return first, last - first + 1
    return max(0, middle - most_width // 2), most_width


def pcb_thresholds(keys: Sequence[int] | Tensor, highest: Sequence[int] | Tensor, density: Any, variant: str) -> Tensor:
    """The thresholds of a rule, from the keys that the sweeps found.

    keys: for each row that of the score at the place `threshold` of `pcb_ranks`. highest: for each row that of its
        highest score. density: one number or one for each row; where it is 0 nothing is kept.
    Returns float32[n, 2]: the score at which the row begins to be kept, and its highest; where both are tensors, on
    their device, which nothing waits for.
    Errors: ArgumentError / ArgumentTypeError, in a sentence that names the argument.
    """
    _checks.one_per_model("highest", highest, len(keys))  # type: ignore[arg-type]
    paper = _checks.choice("variant", variant, VARIANTS) == "paper"
    densities = _checks.fractions("density", density, len(keys))
    if isinstance(keys, Tensor) and isinstance(highest, Tensor):
        start, most = _scores_of_keys(keys), _scores_of_keys(highest)
    else:
        start, most = (
            torch.tensor([score_of_key(key) for key in (x.tolist() if isinstance(x, Tensor) else x)])
            for x in (keys, highest)
        )
    nothing = torch.full_like(most, math.inf) if paper else most
    rows = [[start[i] if d > 0 else nothing[i], most[i]] for i, d in enumerate(densities)]
    return torch.stack([torch.stack(row) for row in rows])


def pcb_means(sums: Tensor, numel: int, models: int) -> Tensor:
    """The means of the exponentials of variant "paper", from their exact sums.

    sums: int64[n + n (n + 1) / 2, 12], `pcb_sums` added over all chunks. numel: elements of a row in all chunks
        together. models: n.
    Returns float32[n + n (n + 1) / 2]: each sum over numel, divided in float64 and rounded once more.
    Errors: ArgumentError / ArgumentTypeError, in a sentence that names the argument.
    """
    _checks.counts_tensor("sums", sums, (models + pairs(models), L1_LIMBS))
    numel = _checks.integer("numel", numel, 1)
    return torch.tensor([l1_mass(limbs) / numel for limbs in sums.tolist()], dtype=torch.float32)
