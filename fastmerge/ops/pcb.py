"""PCB-Merging of a chunk: competition scores, what is counted and summed of them, and the merge of what wins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends.rule import L1_LIMBS, PcbRule
from ..errors import ArgumentError, ArgumentTypeError
from . import _checks
from ._library import define
from ._score_keys import SCORE_BINS, SCORE_KEYS, VARIANTS, pairs

PAPER_ROWS = 160
"""Up to so many rows, exp(-shift) of a constant row is a number that float32 holds."""

_RULE = "str variant, Tensor? clip, Tensor? extremes, Tensor? means, Tensor? thresholds"
_RULE_FIELDS = 5


# -- schema, kernel, fake ---------------------------------------------------------------------------------------------


def _flat(rule: PcbRule) -> tuple[Any, ...]:
    """The rule as the arguments that _RULE names."""
    if not isinstance(rule, PcbRule):
        raise ArgumentTypeError(f"rule must be an ops.PcbRule, not {type(rule).__name__}; make one with its variant.")
    return rule.variant, rule.clip, rule.extremes, rule.means, rule.thresholds


def _part(name: str, value: Tensor | None, needed: bool, shape: tuple[int, ...], device: torch.device) -> Tensor | None:
    """One part of a rule, where a sweep needs it."""
    if not needed:
        return None
    if value is None:
        raise ArgumentError(f"rule.{name} is missing; this sweep needs it, as float32{list(shape)}.")
    if value.dtype != torch.float32 or value.shape != shape:
        raise ArgumentError(f"rule.{name} is {value.dtype}{list(value.shape)}; it must be float32{list(shape)}.")
    _checks.same_device(f"rule.{name}", value, device)
    return value.contiguous()


def _rule(flat: Sequence[Any], tensors: Sequence[Tensor], sweep: str = "scores") -> PcbRule:
    """The rule of a kernel call, with everything checked that the kernels rely on in this sweep."""
    variant, clip, extremes, means, thresholds = flat
    models, device = len(tensors), tensors[0].device
    checked_variant("rule.variant", variant, models)
    paper = variant == "paper"
    if sweep == "sums" and not paper:
        raise ArgumentError(f'rule.variant={variant!r} needs no sums; they belong to "paper".')
    return PcbRule(
        variant=variant,
        clip=_part("clip", clip, not paper, (models, 2), device),
        extremes=_part("extremes", extremes, paper, (pairs(models), 2), device),
        means=_part("means", means, paper and sweep != "sums", (models + pairs(models),), device),
        thresholds=_part("thresholds", thresholds, sweep == "apply", (models, 2), device),
    )


def checked_variant(argument: str, value: Any, models: int) -> str:
    """One of the variants, and not more rows than its numbers can bear."""
    variant = _checks.choice(argument, value, VARIANTS)
    if variant == "paper" and models > PAPER_ROWS:
        raise ArgumentError(
            f'{argument}="paper" takes at most {PAPER_ROWS} rows, not {models}; merge fewer, or use another variant.'
        )
    return variant


def _pcb_scores(base: Tensor | None, tensors: list[Tensor], *rest: Any) -> Tensor:
    *flat, backend = rest
    _checks.models(base, tensors)
    rule = _rule(flat, tensors)
    return backends.resolve(backend, tensors[0].device).pcb_scores(
        _checks.optional_contiguous(base), _checks.contiguous(tensors), rule
    )


def _pcb_scores_fake(base: Tensor | None, tensors: list[Tensor], *rest: Any) -> Tensor:
    return tensors[0].new_empty((_checks.models(base, tensors), tensors[0].numel()), dtype=torch.float32)


_pcb_scores_op = define(
    f"pcb_scores(Tensor? base, Tensor[] tensors, {_RULE}, str backend) -> Tensor", _pcb_scores, _pcb_scores_fake
)


def _window_checks(tensors: Sequence[Tensor], low: Sequence[int], counts: Tensor, highest: Tensor) -> None:
    models, device = len(tensors), tensors[0].device
    _checks.one_per_model("low", low, models)
    if counts.dtype != torch.int64 or counts.dim() != 2 or counts.shape[0] != models or counts.shape[1] < 2:
        raise ArgumentError(
            f"counts must be int64[{models}, window + 1]; allocate it with torch.zeros(..., dtype=torch.int64)."
        )
    _checks.same_device("counts", counts, device)
    _checks.counts_tensor("highest", highest, (models,), device)


def _pcb_window(base: Tensor | None, tensors: list[Tensor], *rest: Any) -> None:
    *flat, low, counts, highest, backend = rest
    _checks.models(base, tensors)
    rule = _rule(flat, tensors)
    _window_checks(tensors, low, counts, highest)
    for name, x in (("counts", counts), ("highest", highest)):
        if not x.is_contiguous():
            raise ArgumentError(f"{name} is not contiguous; pass a tensor made by torch.zeros(shape).")
    if any(not 0 <= start <= SCORE_KEYS for start in low):
        raise ArgumentError("low holds a number that is no key; keys of scores are 0 to 2**32 - 1.")
    backends.resolve(backend, tensors[0].device).pcb_window_(
        _checks.optional_contiguous(base), _checks.contiguous(tensors), rule, list(low), counts, highest
    )


def _pcb_window_fake(base: Tensor | None, tensors: list[Tensor], *rest: Any) -> None:
    low, counts, highest = rest[_RULE_FIELDS : _RULE_FIELDS + 3]
    _checks.models(base, tensors)
    _window_checks(tensors, low, counts, highest)


_pcb_window_op = define(
    f"pcb_window_(Tensor? base, Tensor[] tensors, {_RULE}, int[] low, Tensor(a!) counts, Tensor(b!) highest, "
    "str backend) -> ()",
    _pcb_window,
    _pcb_window_fake,
)


def _pcb_histogram(base: Tensor | None, tensors: list[Tensor], *rest: Any) -> Tensor:
    *flat, prefix, backend = rest
    models = _checks.models(base, tensors)
    _checks.one_per_model("prefix", prefix, models)
    if any(not -1 <= p < SCORE_BINS for p in prefix):
        raise ArgumentError("prefix holds a number that is no prefix; pass -1 for the first level, or 0 to 65535.")
    rule = _rule(flat, tensors)
    return backends.resolve(backend, tensors[0].device).pcb_histogram(
        _checks.optional_contiguous(base), _checks.contiguous(tensors), rule, list(prefix)
    )


def _pcb_histogram_fake(base: Tensor | None, tensors: list[Tensor], *rest: Any) -> Tensor:
    return tensors[0].new_empty((_checks.models(base, tensors), SCORE_BINS), dtype=torch.int64)


_pcb_histogram_op = define(
    f"pcb_histogram(Tensor? base, Tensor[] tensors, {_RULE}, int[] prefix, str backend) -> Tensor",
    _pcb_histogram,
    _pcb_histogram_fake,
)


def _pcb_extremes(base: Tensor | None, tensors: list[Tensor], backend: str) -> Tensor:
    checked_variant("variant", "paper", _checks.models(base, tensors))
    return backends.resolve(backend, tensors[0].device).pcb_extremes(
        _checks.optional_contiguous(base), _checks.contiguous(tensors)
    )


def _pcb_extremes_fake(base: Tensor | None, tensors: list[Tensor], backend: str) -> Tensor:
    return tensors[0].new_empty((pairs(_checks.models(base, tensors)), 2), dtype=torch.float32)


_pcb_extremes_op = define(
    "pcb_extremes(Tensor? base, Tensor[] tensors, str backend) -> Tensor", _pcb_extremes, _pcb_extremes_fake
)


def _pcb_sums(base: Tensor | None, tensors: list[Tensor], *rest: Any) -> Tensor:
    *flat, backend = rest
    _checks.models(base, tensors)
    rule = _rule(flat, tensors, "sums")
    return backends.resolve(backend, tensors[0].device).pcb_sums(
        _checks.optional_contiguous(base), _checks.contiguous(tensors), rule
    )


def _pcb_sums_fake(base: Tensor | None, tensors: list[Tensor], *rest: Any) -> Tensor:
    models = _checks.models(base, tensors)
    return tensors[0].new_empty((models + pairs(models), L1_LIMBS), dtype=torch.int64)


_pcb_sums_op = define(
    f"pcb_sums(Tensor? base, Tensor[] tensors, {_RULE}, str backend) -> Tensor", _pcb_sums, _pcb_sums_fake
)


def _run_apply(out: Tensor, scale: Tensor | None, base: Tensor | None, tensors: list[Tensor], *rest: Any) -> None:
    *flat, weights, backend = rest
    models = _checks.models(base, tensors)
    rule = _rule(flat, tensors, "apply")
    _checks.one_per_model("weights", weights, models)
    backends.resolve(backend, out.device).pcb_apply(
        _checks.optional_contiguous(base), _checks.contiguous(tensors), rule, list(weights), out, scale
    )


def _pcb_apply(base: Tensor | None, tensors: list[Tensor], *rest: Any) -> Tensor:
    *arguments, out_dtype, backend = rest
    _checks.kernel_inputs("tensors", tensors)
    _checks.kernel_out_dtype(out_dtype)
    out = torch.empty(tensors[0].shape, dtype=out_dtype, device=tensors[0].device)
    _run_apply(out, None, base, tensors, *arguments, backend)
    return out


def _pcb_apply_fake(base: Tensor | None, tensors: list[Tensor], *rest: Any) -> Tensor:
    _checks.models(base, tensors)
    _checks.kernel_out_dtype(rest[-2])
    return tensors[0].new_empty(tensors[0].shape, dtype=rest[-2])


_pcb_apply_op = define(
    f"pcb_apply(Tensor? base, Tensor[] tensors, {_RULE}, float[] weights, ScalarType out_dtype, str backend) -> Tensor",
    _pcb_apply,
    _pcb_apply_fake,
)


def _pcb_apply_out(base: Tensor | None, tensors: list[Tensor], *rest: Any) -> None:
    *arguments, out, scale, backend = rest
    models = _checks.models(base, tensors)
    inputs = tensors if base is None else [base, *tensors]
    _checks.target("out", out, tensors[0].shape, inputs)
    if scale is not None:
        if scale.dtype != torch.float32:
            raise ArgumentTypeError(f"scale has dtype {scale.dtype}; it must be torch.float32.")
        _checks.target("scale", scale, (models, tensors[0].numel()), [out, *inputs])
    _run_apply(out, scale, base, tensors, *arguments, backend)


def _pcb_apply_out_fake(base: Tensor | None, tensors: list[Tensor], *rest: Any) -> None:
    _checks.models(base, tensors)


_pcb_apply_out_op = define(
    f"pcb_apply_out(Tensor? base, Tensor[] tensors, {_RULE}, float[] weights, Tensor(a!) out, Tensor(b!)? scale, "
    "str backend) -> ()",
    _pcb_apply_out,
    _pcb_apply_out_fake,
)


# -- public -----------------------------------------------------------------------------------------------------------


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
        device = originals[0].device
        result = torch.empty(originals[0].shape, dtype=kernel_dtype, device=device) if out is None else out
        target = result.detach() if result.requires_grad else result
        _pcb_apply_out_op(*arguments, target, scale, backend)
    return result.to(torch.float64) if wide else result
