"""PCB-Merging: competition scores, their exact thresholds, and the merge of what wins; whole or in chunks."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends.rule import L1_LIMBS, PcbRule
from ..errors import ArgumentError, ArgumentTypeError
from . import _checks, select
from ._exact import l1_mass
from ._library import define
from .consensus import _touches

VARIANTS = ("script", "nlp", "vision", "vision_es", "paper")
CLIPPED = {"script": 1e-4, "nlp": 1e-2, "vision": 1e-2, "vision_es": 1e-2}
"""The fraction of each row's magnitudes that is clipped at either end."""

PAPER_ROWS = 160
"""Up to so many rows, exp(-shift) of a constant row is a number that float32 holds."""

SCORE_BINS = 65536
_LOW_BITS = 16
_SCORE_KEYS = 1 << 32

_PIECE = 1 << 22
"""Elements of each row that a kernel is given at once; fewer of each where they have to be copied."""
_RUN = 64
"""Neighbours that are sampled together."""
_FEW = 1 << 16
"""Rows of at most so many elements are sorted; longer ones are sampled."""
_SAMPLE = 1 << 19
_WINDOW_KEYS = 1 << 22
"""Keys in the windows of all rows together."""
_WINDOW_BLOCK = 1 << 16

_RULE = "str variant, Tensor? clip, Tensor? extremes, Tensor? means, Tensor? thresholds"
_RULE_FIELDS = 5


# -- schema, kernel, fake ---------------------------------------------------------------------------------------------


def _flat(rule: PcbRule) -> tuple[Any, ...]:
    """The rule as the arguments that _RULE names."""
    if not isinstance(rule, PcbRule):
        raise ArgumentTypeError(f"rule must be an ops.PcbRule, not {type(rule).__name__}; make one with its variant.")
    return rule.variant, rule.clip, rule.extremes, rule.means, rule.thresholds


def _models(base: Tensor | None, tensors: Sequence[Tensor]) -> int:
    """How many rows there are; they have one shape, and the base has it, too."""
    _checks.kernel_inputs("tensors", tensors)
    if base is not None:
        _checks.kernel_inputs("base", [base])
    _checks.same_shape(base, tensors)
    return len(tensors)


def _pairs(models: Any) -> Any:
    return models * (models + 1) // 2


def _part(name: str, value: Tensor | None, needed: bool, shape: tuple[int, ...]) -> Tensor | None:
    """One part of a rule, where a sweep needs it."""
    if not needed:
        return None
    if value is None:
        raise ArgumentError(f"rule.{name} is missing; this sweep needs it, as float32{list(shape)}.")
    if value.dtype != torch.float32 or value.shape != shape or value.device.type not in _checks.DEVICES:
        raise ArgumentError(f"rule.{name} is {value.dtype}{list(value.shape)}; it must be float32{list(shape)}.")
    return value.contiguous()


def _rule(flat: Sequence[Any], models: int, sweep: str = "scores") -> PcbRule:
    """The rule of a kernel call, with everything checked that the kernels rely on in this sweep."""
    variant, clip, extremes, means, thresholds = flat
    _variant("rule.variant", variant, models)
    paper = variant == "paper"
    if sweep == "sums" and not paper:
        raise ArgumentError(f'rule.variant={variant!r} needs no sums; they belong to "paper".')
    return PcbRule(
        variant=variant,
        clip=_part("clip", clip, not paper, (models, 2)),
        extremes=_part("extremes", extremes, paper, (_pairs(models), 2)),
        means=_part("means", means, paper and sweep != "sums", (models + _pairs(models),)),
        thresholds=_part("thresholds", thresholds, sweep == "apply", (models, 2)),
    )


def _variant(argument: str, value: Any, models: int) -> str:
    """One of the variants, and not more rows than its numbers can bear."""
    variant = _checks.choice(argument, value, VARIANTS)
    if variant == "paper" and models > PAPER_ROWS:
        raise ArgumentError(
            f'{argument}="paper" takes at most {PAPER_ROWS} rows, not {models}; merge fewer, or use another variant.'
        )
    return variant


def _pcb_scores(base: Tensor | None, tensors: list[Tensor], *rest: Any) -> Tensor:
    *flat, backend = rest
    rule = _rule(flat, _models(base, tensors))
    return backends.resolve(backend, tensors[0].device).pcb_scores(
        _checks.optional_contiguous(base), _checks.contiguous(tensors), rule
    )


def _pcb_scores_fake(base: Tensor | None, tensors: list[Tensor], *rest: Any) -> Tensor:
    return tensors[0].new_empty((_models(base, tensors), tensors[0].numel()), dtype=torch.float32)


_pcb_scores_op = define(
    f"pcb_scores(Tensor? base, Tensor[] tensors, {_RULE}, str backend) -> Tensor", _pcb_scores, _pcb_scores_fake
)


def _window_checks(models: int, low: Sequence[int], counts: Tensor, highest: Tensor) -> None:
    _checks.one_per_model("low", low, models)
    if counts.dtype != torch.int64 or counts.dim() != 2 or counts.shape[0] != models or counts.shape[1] < 2:
        raise ArgumentError(
            f"counts must be int64[{models}, window + 1]; allocate it with torch.zeros(..., dtype=torch.int64)."
        )
    _checks.counts_tensor("highest", highest, (models,))


def _pcb_window(base: Tensor | None, tensors: list[Tensor], *rest: Any) -> None:
    *flat, low, counts, highest, backend = rest
    models = _models(base, tensors)
    rule = _rule(flat, models)
    _window_checks(models, low, counts, highest)
    for name, x in (("counts", counts), ("highest", highest)):
        if not x.is_contiguous():
            raise ArgumentError(f"{name} is not contiguous; pass a tensor made by torch.zeros(shape).")
    if any(not 0 <= start <= _SCORE_KEYS for start in low):
        raise ArgumentError("low holds a number that is no key; keys of scores are 0 to 2**32 - 1.")
    backends.resolve(backend, tensors[0].device).pcb_window_(
        _checks.optional_contiguous(base), _checks.contiguous(tensors), rule, list(low), counts, highest
    )


def _pcb_window_fake(base: Tensor | None, tensors: list[Tensor], *rest: Any) -> None:
    low, counts, highest = rest[_RULE_FIELDS : _RULE_FIELDS + 3]
    _window_checks(_models(base, tensors), low, counts, highest)


_pcb_window_op = define(
    f"pcb_window_(Tensor? base, Tensor[] tensors, {_RULE}, int[] low, Tensor(a!) counts, Tensor(b!) highest, "
    "str backend) -> ()",
    _pcb_window,
    _pcb_window_fake,
)


def _pcb_histogram(base: Tensor | None, tensors: list[Tensor], *rest: Any) -> Tensor:
    *flat, prefix, backend = rest
    models = _models(base, tensors)
    _checks.one_per_model("prefix", prefix, models)
    if any(not -1 <= p < SCORE_BINS for p in prefix):
        raise ArgumentError("prefix holds a number that is no prefix; pass -1 for the first level, or 0 to 65535.")
    rule = _rule(flat, models)
    return backends.resolve(backend, tensors[0].device).pcb_histogram(
        _checks.optional_contiguous(base), _checks.contiguous(tensors), rule, list(prefix)
    )


def _pcb_histogram_fake(base: Tensor | None, tensors: list[Tensor], *rest: Any) -> Tensor:
    return tensors[0].new_empty((_models(base, tensors), SCORE_BINS), dtype=torch.int64)


_pcb_histogram_op = define(
    f"pcb_histogram(Tensor? base, Tensor[] tensors, {_RULE}, int[] prefix, str backend) -> Tensor",
    _pcb_histogram,
    _pcb_histogram_fake,
)


def _pcb_extremes(base: Tensor | None, tensors: list[Tensor], backend: str) -> Tensor:
    _variant("variant", "paper", _models(base, tensors))
    return backends.resolve(backend, tensors[0].device).pcb_extremes(
        _checks.optional_contiguous(base), _checks.contiguous(tensors)
    )


def _pcb_extremes_fake(base: Tensor | None, tensors: list[Tensor], backend: str) -> Tensor:
    return tensors[0].new_empty((_pairs(_models(base, tensors)), 2), dtype=torch.float32)


_pcb_extremes_op = define(
    "pcb_extremes(Tensor? base, Tensor[] tensors, str backend) -> Tensor", _pcb_extremes, _pcb_extremes_fake
)


def _pcb_sums(base: Tensor | None, tensors: list[Tensor], *rest: Any) -> Tensor:
    *flat, backend = rest
    rule = _rule(flat, _models(base, tensors), "sums")
    return backends.resolve(backend, tensors[0].device).pcb_sums(
        _checks.optional_contiguous(base), _checks.contiguous(tensors), rule
    )


def _pcb_sums_fake(base: Tensor | None, tensors: list[Tensor], *rest: Any) -> Tensor:
    models = _models(base, tensors)
    return tensors[0].new_empty((models + _pairs(models), L1_LIMBS), dtype=torch.int64)


_pcb_sums_op = define(
    f"pcb_sums(Tensor? base, Tensor[] tensors, {_RULE}, str backend) -> Tensor", _pcb_sums, _pcb_sums_fake
)


def _run_apply(out: Tensor, scale: Tensor | None, base: Tensor | None, tensors: list[Tensor], *rest: Any) -> None:
    *flat, weights, backend = rest
    models = _models(base, tensors)
    rule = _rule(flat, models, "apply")
    _checks.one_per_model("weights", weights, models)
    backends.resolve(backend, out.device).pcb_apply(
        _checks.optional_contiguous(base), _checks.contiguous(tensors), rule, list(weights), out, scale
    )


def _check_out_dtype(dtype: torch.dtype) -> None:
    if dtype not in _checks.KERNEL_DTYPES:
        raise ArgumentTypeError(f"out_dtype={dtype} cannot be written; use float32, bfloat16 or float16.")


def _pcb_apply(base: Tensor | None, tensors: list[Tensor], *rest: Any) -> Tensor:
    *arguments, out_dtype, backend = rest
    _checks.kernel_inputs("tensors", tensors)
    _check_out_dtype(out_dtype)
    out = torch.empty(tensors[0].shape, dtype=out_dtype, device=tensors[0].device)
    _run_apply(out, None, base, tensors, *arguments, backend)
    return out


def _pcb_apply_fake(base: Tensor | None, tensors: list[Tensor], *rest: Any) -> Tensor:
    _models(base, tensors)
    _check_out_dtype(rest[-2])
    return tensors[0].new_empty(tensors[0].shape, dtype=rest[-2])


_pcb_apply_op = define(
    f"pcb_apply(Tensor? base, Tensor[] tensors, {_RULE}, float[] weights, ScalarType out_dtype, str backend) -> Tensor",
    _pcb_apply,
    _pcb_apply_fake,
)


def _pcb_apply_out(base: Tensor | None, tensors: list[Tensor], *rest: Any) -> None:
    *arguments, out, scale, backend = rest
    models = _models(base, tensors)
    inputs = tensors if base is None else [base, *tensors]
    _check_target("out", out, tensors[0].shape, inputs)
    if scale is not None:
        if scale.dtype != torch.float32:
            raise ArgumentTypeError(f"scale has dtype {scale.dtype}; it must be torch.float32.")
        _check_target("scale", scale, (models, tensors[0].numel()), [out, *inputs])
    _run_apply(out, scale, base, tensors, *arguments, backend)


def _check_target(name: str, target: Tensor, shape: Sequence[int], inputs: Sequence[Tensor]) -> None:
    """A tensor that a kernel may write: of this shape, contiguous, and in memory of its own."""
    _checks.kernel_inputs(name, [target])
    if target.shape != tuple(shape):
        raise ArgumentError(
            f"{name} has shape {list(target.shape)}, but the result has {list(shape)}; allocate it like that."
        )
    if not target.is_contiguous():
        raise ArgumentError(f"{name} is not contiguous; pass a tensor made by torch.empty(shape).")
    start, stop = target.data_ptr(), target.data_ptr() + target.nbytes
    for x in inputs:
        if x.untyped_storage().data_ptr() == target.untyped_storage().data_ptr() and _touches(x, start, stop):
            raise ArgumentError(f"{name} overlaps an input in memory; pass a tensor of its own.")


def _pcb_apply_out_fake(base: Tensor | None, tensors: list[Tensor], *rest: Any) -> None:
    _models(base, tensors)


_pcb_apply_out_op = define(
    f"pcb_apply_out(Tensor? base, Tensor[] tensors, {_RULE}, float[] weights, Tensor(a!) out, Tensor(b!)? scale, "
    "str backend) -> ()",
    _pcb_apply_out,
    _pcb_apply_out_fake,
)


# -- what the sweeps find, as numbers ---------------------------------------------------------------------------------


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
    key = _checks.integer("key", key, 0, _SCORE_KEYS - 1)
    bits = key ^ (0x80000000 if key >> 31 else 0xFFFFFFFF)
    value: float = struct.unpack("<f", struct.pack("<I", bits))[0]
    return value


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
    return high << _LOW_BITS | highest_bin(level1, k - above)[0]


def score_bound_in_window(counts: Tensor, low: int, k: int) -> int | None:
    """The key of a row's k-th highest score, from its row of `pcb_window_`; None where it lies outside the window.

    counts: int64[window + 1], added over all chunks. low: the window's first key. k: 1 is the highest score.
    """
    missing = k - int(counts[0])
    if missing < 1:
        return None
    # From the top in blocks: a window is large, and whatever is made of it whole is, too.
    for stop in range(counts.numel(), 1, -_WINDOW_BLOCK):
        start = max(1, stop - _WINDOW_BLOCK)
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
    last = int(ordered[at + reach]) if at + reach < size else _SCORE_KEYS - 1
    if last - first < most_width:
        return first, last - first + 1
    return max(0, middle - most_width // 2), most_width


def pcb_thresholds(keys: Sequence[int], highest: Sequence[int] | Tensor, density: Any, variant: str) -> Tensor:
    """The thresholds of a rule, from the keys that the sweeps found.

    keys: for each row that of the score at the place `threshold` of `pcb_ranks`. highest: for each row that of its
        highest score. density: one number or one for each row; where it is 0 nothing is kept.
    Returns float32[n, 2]: the score at which the row begins to be kept, and its highest.
    Errors: ArgumentError / ArgumentTypeError, in a sentence that names the argument.
    """
    tops = highest.tolist() if isinstance(highest, Tensor) else list(highest)
    _checks.one_per_model("highest", tops, len(keys))
    nothing = math.inf if _checks.choice("variant", variant, VARIANTS) == "paper" else None
    rows = []
    for key, top, d in zip(keys, tops, _densities(density, len(keys))):
        most = score_of_key(top)
        start = score_of_key(key) if d > 0 else most if nothing is None else nothing
        rows.append([start, most])
    return torch.tensor(rows, dtype=torch.float32)


def pcb_means(sums: Tensor, numel: int, models: int) -> Tensor:
    """The means of the exponentials of variant "paper", from their exact sums.

    sums: int64[n + n (n + 1) / 2, 12], `pcb_sums` added over all chunks. numel: elements of a row in all chunks
        together. models: n.
    Returns float32[n + n (n + 1) / 2]: each sum over numel, divided in float64 and rounded once more.
    Errors: ArgumentError / ArgumentTypeError, in a sentence that names the argument.
    """
    _checks.counts_tensor("sums", sums, (models + _pairs(models), L1_LIMBS))
    numel = _checks.integer("numel", numel, 1)
    return torch.tensor([l1_mass(limbs) / numel for limbs in sums.tolist()], dtype=torch.float32)


# -- sweeps -----------------------------------------------------------------------------------------------------------


def _inputs(base: Tensor | None, tensors: Sequence[Tensor]) -> tuple[Tensor | None, list[Tensor]]:
    return None if base is None else _checks.input_tensor("base", base), _checks.input_tensors("tensors", tensors)


def pcb_scores(base: Tensor | None, tensors: Sequence[Tensor], rule: PcbRule, *, backend: str = "auto") -> Tensor:
    """The competition scores of a chunk of n rows.

    base: the base model's chunk, which is subtracted; None where the tensors are deltas already.
    tensors: n chunks of one shape; float32, bfloat16, float16, or float64 (rounded to float32 first).
    rule: its variant, and of what has been found of the whole rows: `clip`; for "paper" `extremes` and `means`.
    Returns float32[n, numel], the scores b: negative ones stand for conflicts, NaN where an input is NaN.
    Errors: ArgumentError / ArgumentTypeError, in a sentence that names the argument.
    Source: PCB-Merging (Du et al., NeurIPS 2024, arXiv 2410.02396) and its released code; docs/ops.md.
    """
    scores: Tensor = _pcb_scores_op(*_inputs(base, tensors), *_flat(rule), backend)
    return scores


def pcb_window_(
    base: Tensor | None,
    tensors: Sequence[Tensor],
    rule: PcbRule,
    low: Sequence[int],
    counts: Tensor,
    highest: Tensor,
    *,
    backend: str = "auto",
) -> None:
    """Count the scores of a chunk that lie in a narrow window of keys, each key by itself.

    base, tensors, rule: as in `pcb_scores`. low: for each row the first key of its window.
    counts: int64[n, window + 1], added to: first how many keys lie past the window, then how many there are of each key
        in it. highest: int64[n], raised to the highest key. Both contiguous; begin with zeros.
    Errors: ArgumentError / ArgumentTypeError, in a sentence that names the argument.
    """
    starts = [_checks.integer("low", start) for start in low]
    _pcb_window_op(*_inputs(base, tensors), *_flat(rule), starts, counts, highest, backend)


def pcb_histogram(
    base: Tensor | None, tensors: Sequence[Tensor], rule: PcbRule, prefix: Sequence[int], *, backend: str = "auto"
) -> Tensor:
    """One level of the two-level histogram of a chunk's scores.

    base, tensors, rule: as in `pcb_scores`. prefix: for each row -1 for the first level, else the 16 leading key bits
        whose keys are refined (`score_prefix`).
    Returns int64[n, 65536], counts of key >> 16, or of key & 65535 among the keys with that prefix. Histograms add.
    Errors: ArgumentError / ArgumentTypeError, in a sentence that names the argument.
    """
    wanted = [_checks.integer("prefix", p) for p in prefix]
    counts: Tensor = _pcb_histogram_op(*_inputs(base, tensors), *_flat(rule), wanted, backend)
    return counts


def pcb_extremes(base: Tensor | None, tensors: Sequence[Tensor], *, backend: str = "auto") -> Tensor:
    """The least and the greatest product of each pair of rows' deltas in a chunk, for variant "paper".

    base, tensors: as in `pcb_scores`.
    Returns float32[n (n + 1) / 2, 2]: pairs (0, 0), (0, 1) .. (0, n - 1), (1, 1) and so on; products are held within
    half of float32's largest number, NaN is left out. Of chunks, take the least and the greatest.
    Errors: ArgumentError / ArgumentTypeError, in a sentence that names the argument.
    """
    extremes: Tensor = _pcb_extremes_op(*_inputs(base, tensors), backend)
    return extremes


def pcb_sums(base: Tensor | None, tensors: Sequence[Tensor], rule: PcbRule, *, backend: str = "auto") -> Tensor:
    """The exact sums of the exponentials of a chunk, for variant "paper".

    base, tensors: as in `pcb_scores`. rule: variant "paper" with `extremes`.
    Returns int64[n + n (n + 1) / 2, 12]: of each row, then of each pair, as 32-bit limbs, little end first, in units of
    2**-149; NaN and infinities are left out. Sums of chunks add limb by limb; `pcb_means` divides them.
    Errors: ArgumentError / ArgumentTypeError, in a sentence that names the argument.
    """
    sums: Tensor = _pcb_sums_op(*_inputs(base, tensors), *_flat(rule), backend)
    return sums


def pcb_apply(
    base: Tensor | None,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    rule: PcbRule,
    *,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    scale: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Merge one chunk of n rows, everything about them being known: one pass, nothing stored.

    base, tensors: as in `pcb_scores`; the merged delta is put on the base. weights: one for each row, finite.
    rule: as in `pcb_scores`, with `thresholds`.
    out: a contiguous float32, bfloat16 or float16 tensor of the chunk's shape to write to; no input may overlap it.
    out_dtype: the result's dtype where there is no `out`; by default the base's, else the first tensor's.
    scale: a contiguous float32[n, numel] that receives S, by which the rows are weighed (for "paper": the scores that
        are kept, 0 for the others).
    Returns a tensor of the chunk's shape, or `out`.
    Errors: ArgumentError / ArgumentTypeError, in a sentence that names the argument.
    Source: PCB-Merging (arXiv 2410.02396) and its released code; docs/ops.md.
    """
    originals = _checks.tensor_list("tensors", tensors)
    if out is not None:
        _checks.out_tensor(out, out_dtype)
    elif out_dtype is None:
        out_dtype = base.dtype if isinstance(base, Tensor) else originals[0].dtype
    else:
        _checks.out_dtype(out_dtype)
    arguments = (*_inputs(base, originals), *_flat(rule), [_checks.real("weights", w) for w in weights])
    wide = out_dtype == torch.float64
    kernel_dtype = torch.float32 if wide else out_dtype
    if out is None and scale is None:
        result: Tensor = _pcb_apply_op(*arguments, kernel_dtype, backend)
    else:
        result = torch.empty(originals[0].shape, dtype=kernel_dtype) if out is None else out
        target = result.detach() if result.requires_grad else result
        _pcb_apply_out_op(*arguments, target, scale, backend)
    return result.to(torch.float64) if wide else result


# -- whole rows -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rows:
    """n task vectors in memory, cut into shards in the same places."""

    form: str
    """"stacked", "rows" or "shards": how the caller passed them."""
    shards: list[list[Tensor]]
    """Flat, by shard, then by row."""
    base: list[Tensor] | None
    """Flat, by shard."""
    shapes: list[torch.Size]
    """Of the shards of a row, as the caller sees them."""

    @property
    def models(self) -> int:
        return len(self.shards[0])

    @property
    def numel(self) -> int:
        return sum(shard[0].numel() for shard in self.shards)

    def pieces(self) -> Iterator[tuple[int, slice, Tensor | None, list[Tensor]]]:
        """All elements in order: (shard, place in it, base, rows), as kernels take them."""
        for number, rows in enumerate(self.shards):
            base = None if self.base is None else self.base[number]
            ready = _ready(rows if base is None else [base, *rows])
            size = _PIECE if ready else max(_PIECE // 32, _PIECE // len(rows))
            for start in range(0, rows[0].numel(), size):
                place = slice(start, min(start + size, rows[0].numel()))
                yield number, place, None if base is None else _narrow(base[place]), [_narrow(x[place]) for x in rows]

    def chunks(self) -> Iterator[tuple[Tensor | None, list[Tensor]]]:
        """All elements in order: (base, rows)."""
        for _, _, base, rows in self.pieces():
            yield base, rows

    def sample(self, size: int) -> tuple[Tensor | None, list[Tensor]]:
        """About `size` elements, in runs of _RUN neighbours, one somewhere in each stretch of equal length."""
        count = max(1, size // _RUN)
        generator = torch.Generator().manual_seed(0)
        stretch = self.numel // count
        jitter = (torch.rand(count, generator=generator, dtype=torch.float64) * (stretch - _RUN + 1)).to(torch.int64)
        starts = torch.arange(count) * self.numel // count + jitter
        index = (starts[:, None] + torch.arange(_RUN)).reshape(-1)
        ends = torch.tensor([shard[0].numel() for shard in self.shards]).cumsum(0)
        parts = torch.tensor_split(index, torch.searchsorted(index, ends)[:-1])
        begins = [0, *ends.tolist()]

        def gathered(shards: list[Tensor]) -> Tensor:
            picked = [_narrow(x[part - begin]) for x, part, begin in zip(shards, parts, begins)]
            return torch.cat([x.to(torch.float32) for x in picked])

        base = None if self.base is None else gathered(self.base)
        return base, [gathered([shard[i] for shard in self.shards]) for i in range(self.models)]


def _ready(tensors: Sequence[Tensor]) -> bool:
    """Whether kernels can read these as they are."""
    return all(x.is_contiguous() and x.dtype != torch.float64 for x in tensors)


def _narrow(x: Tensor) -> Tensor:
    return x.to(torch.float32) if x.dtype == torch.float64 else x


def _rows(task_vectors: Any, base: Any = None) -> _Rows:
    """The task vectors, in any of the three forms, checked."""
    if isinstance(task_vectors, Tensor):
        stacked = _checks.tensor("task_vectors", task_vectors)
        if stacked.dim() < 2:
            raise ArgumentError(
                f"task_vectors has shape {list(stacked.shape)}, but a row for each model is needed; pass [n, D]."
            )
        form, rows = "stacked", [[row] for row in stacked]
    else:
        if isinstance(task_vectors, (str, bytes)) or not isinstance(task_vectors, Sequence):
            raise ArgumentTypeError(
                f"task_vectors must be a tensor [n, D], a list of n tensors or of n lists of tensors, not "
                f"{type(task_vectors).__name__}; pass one of these."
            )
        nested = [isinstance(row, (list, tuple)) for row in task_vectors]
        if any(nested) and not all(nested):
            raise ArgumentTypeError("task_vectors mixes tensors and lists; pass n tensors, or n lists of shards.")
        form = "shards" if any(nested) else "rows"
        rows = [
            _checks.tensor_list(f"task_vectors[{i}]", row) if nested[i] else [_checks.tensor(f"task_vectors[{i}]", row)]
            for i, row in enumerate(task_vectors)
        ]
    if not rows:
        raise ArgumentError("task_vectors is empty; pass at least one row.")
    shapes = [shard.shape for shard in rows[0]]
    for i, row in enumerate(rows):
        _same_cuts(f"task_vectors[{i}]", row, shapes)
    flat_base = None
    if base is not None:
        given = [base] if isinstance(base, Tensor) else base
        checked = _checks.tensor_list("base", given)
        _same_cuts("base", checked, shapes)
        flat_base = [x.reshape(-1) for x in checked]
    shards = [[row[number].reshape(-1) for row in rows] for number in range(len(shapes))]
    return _Rows(form, shards, flat_base, shapes)


def _same_cuts(name: str, row: Sequence[Tensor], shapes: Sequence[torch.Size]) -> None:
    if [x.shape for x in row] != list(shapes):
        raise ArgumentError(
            f"{name} has shapes {[list(x.shape) for x in row]}, but task_vectors[0] has "
            f"{[list(shape) for shape in shapes]}; cut all rows in the same places."
        )


def _densities(density: Any, models: int) -> list[float]:
    return [_checks.fraction("density", d) for d in _checks.per_model("density", density, models)]


def pcb_bounds(task_vectors: Any, *, variant: str = "vision_es", base: Any = None, backend: str = "auto") -> Tensor:
    """The bounds that the deltas of whole rows are scaled by, exactly: the first of the sweeps of `pcb_merge`.

    task_vectors: n rows, as in `pcb_merge`. base: a tensor of a row's shape (or a list of its shards) that is
        subtracted; None where the rows are deltas already.
    variant: as in `pcb_merge`.
    Returns `clip`, float32[n, 2]: the two magnitudes of each row that its |delta| is clipped to, order statistics at
    the places that `pcb_ranks` names. For "paper" `extremes`, float32[n (n + 1) / 2, 2], as in `pcb_extremes`.
    Errors: ArgumentError / ArgumentTypeError, in a sentence that names the argument.
    Source: PCB-Merging (arXiv 2410.02396) and its released code; docs/ops.md.
    """
    rows = _rows(task_vectors, base)
    _variant("variant", variant, rows.models)
    if rows.numel == 0:
        raise ArgumentError("task_vectors has no elements and so no bounds; pass rows of at least one element.")
    return _extremes(rows, backend) if variant == "paper" else _clip(rows, variant, backend)


def _extremes(rows: _Rows, backend: str) -> Tensor:
    found = torch.tensor([math.inf, -math.inf]).repeat(_pairs(rows.models), 1)
    for base, tensors in rows.chunks():
        part = pcb_extremes(base, tensors, backend=backend)
        found[:, 0] = torch.minimum(found[:, 0], part[:, 0])
        found[:, 1] = torch.maximum(found[:, 1], part[:, 1])
    return found


def _clip(rows: _Rows, variant: str, backend: str) -> Tensor:
    places = pcb_ranks(rows.numel, 0.0, variant)[:2]
    ranks = [rows.numel - place for place in places]
    if rows.base is None and all(_ready(shard) for shard in rows.shards):
        found = [
            [select.kth_magnitude([shard[i] for shard in rows.shards], k, backend=backend) for k in ranks]
            for i in range(rows.models)
        ]
        return torch.tensor(found, dtype=torch.float32)
    # What has to be computed or copied first goes through the kernels in pieces.
    level0 = _magnitude_counts(rows, [-1] * rows.models, backend)
    keys = []
    for k in ranks:
        bins = [highest_bin(counts, k) for counts in level0]
        level1 = _magnitude_counts(rows, [high for high, _ in bins], backend)
        keys.append([high << 15 | highest_bin(row, k - above)[0] for (high, above), row in zip(bins, level1)])
    return torch.tensor(keys, dtype=torch.int32).T.contiguous().view(torch.float32)


def _magnitude_counts(rows: _Rows, prefix: list[int], backend: str) -> Tensor:
    parts = (select.key_histogram(base, tensors, prefix, backend=backend) for base, tensors in rows.chunks())
    total = next(parts)
    for part in parts:
        total += part
    return total


def _score_bounds(rows: _Rows, rule: PcbRule, places: list[int], backend: str) -> tuple[list[int], list[int]]:
    """The keys of the scores at these places of each row, and of the highest ones; exact."""
    numel = rows.numel
    if numel <= _FEW:
        scores = torch.cat([pcb_scores(base, x, rule, backend=backend) for base, x in rows.chunks()], dim=1)
        ordered = [score_keys(row).sort().values for row in scores]
        return [int(row[place]) for row, place in zip(ordered, places)], [int(row[-1]) for row in ordered]

    ranks = [numel - place for place in places]
    window = _likely_windows(rows, rule, places, backend)
    if window is not None:
        found, highest = _sweep_windows(rows, rule, *window, ranks, backend)
        keys = [key for key in found if key is not None]
        if len(keys) == rows.models:
            return keys, highest
    counts = torch.zeros(rows.models, SCORE_BINS, dtype=torch.int64)
    for base, tensors in rows.chunks():
        counts += pcb_histogram(base, tensors, rule, [-1] * rows.models, backend=backend)
    low = [score_prefix(row, k) << _LOW_BITS for row, k in zip(counts, ranks)]
    found, highest = _sweep_windows(rows, rule, low, 1 << _LOW_BITS, ranks, backend)
    return [key for key in found if key is not None], highest


def _sweep_windows(
    rows: _Rows, rule: PcbRule, low: list[int], width: int, ranks: list[int], backend: str
) -> tuple[list[int | None], list[int]]:
    """The keys of the k-th highest scores as far as they lie in the windows, and the highest keys."""
    counts = torch.zeros(rows.models, 1 + width, dtype=torch.int64)
    highest = torch.zeros(rows.models, dtype=torch.int64)
    for base, tensors in rows.chunks():
        pcb_window_(base, tensors, rule, low, counts, highest, backend=backend)
    found = [score_bound_in_window(row, start, k) for row, start, k in zip(counts, low, ranks)]
    return found, highest.tolist()


def _likely_windows(rows: _Rows, rule: PcbRule, places: list[int], backend: str) -> tuple[list[int], int] | None:
    """Where a sample says that the scores at these places lie: the windows' first keys, and their common width.

    None where counting so many keys would take too much memory: a third of what is wanted is still worth trying.
    """
    numel = rows.numel
    most = max(_WINDOW_BLOCK, min(_WINDOW_KEYS // rows.models, numel // 24))
    scores = pcb_scores(*rows.sample(min(_SAMPLE, max(_FEW, numel // 128))), rule, backend=backend)
    chosen = []
    for row, place in zip(scores, places):
        runs = torch.cat([score_keys(part) for part in row.split(_WINDOW_BLOCK)]).reshape(-1, _RUN)
        low, width = choose_window(runs, place, numel, 3 * most)
        if width == 3 * most:
            return None
        chosen.append((low + max(0, width - most) // 2, min(width, most)))
    return [low for low, _ in chosen], max(width for _, width in chosen)


def pcb_rule(
    task_vectors: Any,
    *,
    density: float | Sequence[float] = 0.1,
    variant: str = "vision_es",
    base: Any = None,
    backend: str = "auto",
) -> PcbRule:
    """Everything that `pcb_apply` must know of whole rows in memory: all sweeps of `pcb_merge` but the last.

    task_vectors, density, variant: as in `pcb_merge`. base: a tensor of a row's shape (or a list of its shards) that is
        subtracted; None where the rows are deltas already.
    Returns a PcbRule with all parts that the variant needs.
    Errors: ArgumentError / ArgumentTypeError, in a sentence that names the argument.
    Source: PCB-Merging (arXiv 2410.02396) and its released code; docs/ops.md.
    """
    rows = _rows(task_vectors, base)
    _variant("variant", variant, rows.models)
    if rows.numel == 0:
        raise ArgumentError("task_vectors has no elements and so no thresholds; pass rows of at least one element.")
    return _found(rows, variant, _densities(density, rows.models), backend)


def _found(rows: _Rows, variant: str, density: list[float], backend: str) -> PcbRule:
    """Everything that the merge must know of whole rows; each part takes sweeps of its own."""
    if variant == "paper":
        rule = PcbRule("paper", extremes=_extremes(rows, backend))
        sums = torch.zeros(rows.models + _pairs(rows.models), L1_LIMBS, dtype=torch.int64)
        for base, tensors in rows.chunks():
            sums += pcb_sums(base, tensors, rule, backend=backend)
        rule = PcbRule("paper", extremes=rule.extremes, means=pcb_means(sums, rows.numel, rows.models))
    else:
        rule = PcbRule(variant, clip=_clip(rows, variant, backend))  # type: ignore[arg-type]
    places = [pcb_ranks(rows.numel, d, variant)[2] for d in density]
    keys, highest = _score_bounds(rows, rule, places, backend)
    thresholds = pcb_thresholds(keys, highest, density, variant)
    return PcbRule(rule.variant, rule.clip, rule.extremes, rule.means, thresholds)


def _targets(rows: _Rows, out: Any) -> list[Tensor]:
    """Where each shard of the result goes, flat: new tensors, or what the caller passed."""
    if out is None:
        dtypes = [_narrow(shard[0][:0]).dtype for shard in rows.shards]
        return [torch.empty(shape.numel(), dtype=dtype) for shape, dtype in zip(rows.shapes, dtypes)]
    given = list(out) if rows.form == "shards" and isinstance(out, (list, tuple)) else [out]
    if rows.form == "shards" and not isinstance(out, (list, tuple)):
        raise ArgumentTypeError("out must be a list of shards, as task_vectors has; pass one tensor for each shard.")
    if len(given) != len(rows.shapes):
        raise ArgumentError(f"out has {len(given)} shards, but each row has {len(rows.shapes)}; pass as many.")
    inputs = [x for shard in rows.shards for x in shard]
    for number, (x, shape) in enumerate(zip(given, rows.shapes)):
        _checks.out_tensor(x, None)
        _check_target("out", x, shape, [*inputs, *given[:number]])
    return [(x.detach() if x.requires_grad else x).view(-1) for x in given]


def pcb_merge(
    task_vectors: Any,
    *,
    density: float | Sequence[float] = 0.1,
    variant: str = "vision_es",
    weight: float | Sequence[float] = 1.0,
    return_scale: bool = False,
    out: Any = None,
    backend: str = "auto",
) -> Any:
    """Merge n task vectors by PCB-Merging: parameters compete, each row keeps its best, scores weigh what is kept.

    task_vectors: the deltas of n models, whole: a tensor [n, D] (or [n, ...]); a list of n tensors of one shape; or a
        list of n lists of tensors ("shards"), each row cut in the same places. float32, bfloat16, float16, or float64
        (rounded to float32 first); dtypes may differ. Thresholds are exact over the whole row, however it is cut, and
        the cuts do not show in the result.
    density: the fraction of each row that may be kept, in [0, 1]; one number or one per model. 0 keeps nothing.
    variant: whose formula: "script", "nlp", "vision" and "vision_es" are in the released code, "paper" is the paper's
        (at most 160 rows). They give different results.
    weight: a factor for each row's part in the numerator (lambda); one number or one per model, finite.
    return_scale: also return S, by which the rows are weighed (for "paper": the scores that are kept).
    out: a contiguous float32, bfloat16 or float16 tensor of a row's shape (a list of such for shards) to write to; no
        input may overlap it.
    Returns the merged task vector, to be added to the base: a tensor of a row's shape, or a list of shards, in the
    dtypes of the first row; or `out`. With `return_scale` a pair of that and S: float32[n, D] (or [n, ...]), or n lists
    of shards. Besides these, about a tenth of the inputs' memory at most is used when the rows are long; rows of more
    than one dimension that are not contiguous are copied.
    NaN: a NaN in any row makes the element NaN, but 0 in "paper", where none of its scores is kept; a NaN score counts
        as the lowest.
    Errors: ArgumentError / ArgumentTypeError, in a sentence that names the argument.
    Source: Du et al., "Parameter Competition Balancing for Model Merging" (NeurIPS 2024, arXiv 2410.02396) and the code
        released with it; the formulas are in docs/ops.md.
    """
    rows = _rows(task_vectors)
    _variant("variant", variant, rows.models)
    densities = _densities(density, rows.models)
    weights = [_checks.real("weight", w) for w in _checks.per_model("weight", weight, rows.models)]
    targets = _targets(rows, out)
    scales = [torch.empty(rows.models, x.numel()) for x in targets] if return_scale else []
    if rows.numel:
        rule = _found(rows, variant, densities, backend)
        for number, place, base, tensors in rows.pieces():
            part = torch.empty(rows.models, tensors[0].numel()) if return_scale else None
            pcb_apply(base, tensors, weights, rule, out=targets[number][place], scale=part, backend=backend)
            if part is not None:
                scales[number][:, place] = part
    if out is None:
        wanted = [x.dtype for x in _first_row(task_vectors)]
        shaped = [x.view(shape).to(dtype) for x, shape, dtype in zip(targets, rows.shapes, wanted)]
        result = shaped if rows.form == "shards" else shaped[0]
    else:
        result = out
    if not return_scale:
        return result
    if rows.form != "shards":
        return result, scales[0].view(rows.models, *rows.shapes[0])
    return result, [[x[i].view(shape) for x, shape in zip(scales, rows.shapes)] for i in range(rows.models)]


def _first_row(task_vectors: Any) -> list[Tensor]:
    first = task_vectors[0]
    return [first] if isinstance(first, Tensor) else list(first)
