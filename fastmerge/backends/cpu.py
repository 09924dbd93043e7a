"""The cpu backend: an adapter between tensors and the compiled kernels, which take addresses.

The functions are those of `fastmerge.backends.reference`, with the same bits. FASTMERGE_ISA chooses the instruction set
(baseline, avx2, avx512, neon), FASTMERGE_THREADS the number of threads.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from .. import _cpu
from ..errors import BackendError
from .highpass import highpass as highpass  # by torch, whose transforms and products are as good as any of ours
from .lists import Lists, for_whole_tensors
from .rule import (
    GRAM_BLOCK,
    L1_LIMBS,
    MOST_DIFFERENCES,
    TIE_BLOCK,
    ExpertPart,
    PcbRule,
    SparsifyRule,
    TrialRule,
    column_dtype,
    saved_layout,
)
from .threads import default_threads

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_METHODS = {"none": 0, "band": 1, "bernoulli": 2, "della": 3, "mask": 4}
_ELECTIONS = {"none": 0, "weighted": 1, "total": 2, "frequency": 3}
_DIVISORS = {"none": 0, "weights": 1, "count": 2, "value": 3}
_ZERO_SIGNS = {"positive": 1.0, "negative": -1.0, "zero": 0.0}
_PCB_VARIANTS = {"script": 0, "nlp": 0, "vision": 1, "vision_es": 2, "paper": 3}
_TRIALS = {"blend": 0, "de": 1}
_FUNCTIONS = {"exp": 0, "tanh": 1, "log": 2}

_Ref = tuple[int, int]
_NOTHING: _Ref = (0, 0)

_BUILT = _cpu.TIE_BLOCK, getattr(_cpu, "GRAM_BLOCK", None), getattr(_cpu, "MOST_DIFFERENCES", None)
if _BUILT != (TIE_BLOCK, GRAM_BLOCK, MOST_DIFFERENCES):
    raise ImportError("fastmerge._cpu was built from other sources than this package; build it again (`pip install .`)")


def isa() -> str:
    """The instruction set in use."""
    return str(_cpu.isa())


def isas() -> list[str]:
    """The instruction sets that this build carries and this processor runs, fastest first."""
    return list(_cpu.isas())


def set_isa(name: str) -> None:
    """Use another instruction set. BackendError: not in this build, or not in this processor."""
    if not _cpu.set_isa(name):
        raise BackendError(f"instruction set {name!r} does not work here; choose from {', '.join(isas())}")


def threads() -> int:
    """The number of threads that an operation uses."""
    return int(_cpu.threads())


def set_threads(count: int | None) -> None:
    """Use `count` threads (None: what the process may use). Call it while no operation runs."""
    _cpu.set_threads(default_threads() if count is None else count)


def _start() -> None:
    set_threads(None)
    forced = os.environ.get("FASTMERGE_ISA")
    if forced:
        set_isa(forced)


_start()


def _ref(x: torch.Tensor) -> _Ref:
    return x.data_ptr(), _DTYPES[x.dtype]


def _inputs(
    base: torch.Tensor | None, tensors: list[torch.Tensor], compute: torch.dtype
) -> tuple[_Ref, bool, list[_Ref], int, int]:
    reference = _NOTHING if base is None else _ref(base)
    return reference, base is not None, [_ref(t) for t in tensors], tensors[0].numel(), _DTYPES[compute]


def _rule(rule: SparsifyRule) -> _cpu.Rule:
    return _cpu.Rule(
        _METHODS[rule.method],
        0 if rule.bounds is None else rule.bounds.data_ptr(),
        0 if rule.ties_before is None else rule.ties_before.data_ptr(),
        rule.density,
        rule.epsilon,
        rule.row_length,
        rule.seed,
        rule.tensor_id,
        rule.positions,
        rule.offset,
        0 if rule.masks is None else rule.masks.data_ptr(),
    )


def _shards(shards: list[torch.Tensor]) -> list[tuple[_Ref, int]]:
    return [(_ref(shard), shard.numel()) for shard in shards]


def _tie_blocks(numel: int) -> int:
    return max(1, -(-numel // TIE_BLOCK))


def abs_histogram(shards: list[torch.Tensor], bins: int) -> torch.Tensor:
    """Counts of magnitude keys; see `fastmerge.ops.abs_histogram`."""
    out = torch.empty(bins, dtype=torch.int64)
    _cpu.abs_histogram(_shards(shards), bins, out.data_ptr())
    return out


def kth_magnitude(shards: list[torch.Tensor], k: int) -> torch.Tensor:
    """The k-th largest magnitude; see `fastmerge.ops.kth_magnitude`."""
    return torch.tensor(_cpu.kth_key(_shards(shards), k), dtype=torch.int32).view(torch.float32)


def magnitude_bounds(
    base: torch.Tensor | None, tensors: list[torch.Tensor], first: list[int], last: list[int], compute: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The cuts at two ranks of each model's delta; see `fastmerge.ops.magnitude_bounds`."""
    bounds = torch.empty(len(tensors), 2, 2, dtype=torch.int64)
    ties_before = torch.empty(len(tensors), 2, _tie_blocks(tensors[0].numel()), dtype=torch.int64)
    _cpu.magnitude_bounds(*_inputs(base, tensors, compute), first, last, bounds.data_ptr(), ties_before.data_ptr())
    return bounds, ties_before


def _many(lists: Lists, subtract: bool, compute: torch.dtype) -> _cpu.Many:
    lists.need_uniform()
    base, models = lists.base, lists.models
    return _cpu.Many(
        lists.tensors,
        len(models),
        lists.lengths.data_ptr(),
        0 if base is None else lists.base_addresses.data_ptr(),
        lists.model_addresses.data_ptr(),
        0 if base is None else _DTYPES[base[0].dtype],
        _DTYPES[models[0][0].dtype],
        _DTYPES[compute],
        subtract and base is not None,
    )


def magnitude_bounds_many(
    lists: Lists, ranks: torch.Tensor, inside: Sequence[bool], compute: torch.dtype, *, subtract: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """`magnitude_bounds` of many tensors, small ones side by side.

    ranks: int64[T, n, 2], each model's first and last. inside: of no use here. subtract: deltas from the bases are
    ranked. Returns bounds int64[T, n, 2, 2] and ties_before int64[n, 2, blocks], in which the blocks of a tensor follow
    those of the one before.
    Errors: ValueError where the models, or the bases, do not have a single dtype; take the tensors one by one then.
    """
    many, ranks = _many(lists, subtract, compute), ranks.contiguous()
    bounds = torch.empty(lists.tensors, len(lists.models), 2, 2, dtype=torch.int64)
    ties_before = torch.empty(len(lists.models), 2, int(lists.blocks.sum()), dtype=torch.int64)
    _cpu.magnitude_bounds_many(many, ranks.data_ptr(), bounds.data_ptr(), ties_before.data_ptr())
    return bounds, ties_before


def key_histogram(
    base: torch.Tensor | None, tensors: list[torch.Tensor], prefix: list[int], compute: torch.dtype
) -> torch.Tensor:
    """Counts of the high or the low part of delta keys; see `fastmerge.ops.key_histogram`."""
    out = torch.empty(len(tensors), 65536 if prefix[0] < 0 else 32768, dtype=torch.int64)
    _cpu.key_histogram(*_inputs(base, tensors, compute), prefix, out.data_ptr())
    return out


def key_window_(
    base: torch.Tensor | None, tensors: list[torch.Tensor], low: list[int], compute: torch.dtype, counts: torch.Tensor
) -> None:
    """Count keys past and inside a window of keys; see `fastmerge.ops.key_window_`."""
    _cpu.key_window(*_inputs(base, tensors, compute), low, counts.shape[1] - 1, counts.data_ptr())


def tie_counts(
    base: torch.Tensor | None, tensors: list[torch.Tensor], bounds: torch.Tensor, compute: torch.dtype
) -> torch.Tensor:
    """How many elements of each tie block equal a bound that splits equals; see `fastmerge.ops.tie_counts`."""
    out = torch.zeros(len(tensors), 2, _tie_blocks(tensors[0].numel()), dtype=torch.int64)
    _cpu.tie_counts(*_inputs(base, tensors, compute), bounds.data_ptr(), out.data_ptr())
    return out


def topk_mask(x: torch.Tensor, bounds: torch.Tensor, ties_before: torch.Tensor) -> torch.Tensor:
    """Which elements lie between the two bounds; see `fastmerge.ops.topk_mask`."""
    out = torch.empty(x.shape, dtype=torch.bool)
    rule = SparsifyRule(method="band", bounds=bounds, ties_before=ties_before)
    _cpu.topk_mask(_ref(x), x.numel(), _rule(rule), out.data_ptr())
    return out


def l1_sums(
    base: torch.Tensor | None, tensors: list[torch.Tensor], rule: SparsifyRule, compute: torch.dtype
) -> torch.Tensor:
    """Exact L1 masses of each model's delta, all and kept; see `fastmerge.ops.l1_sums`."""
    out = torch.empty(len(tensors), 2, L1_LIMBS, dtype=torch.int64)
    _cpu.l1_sums(*_inputs(base, tensors, compute), _rule(rule), out.data_ptr())
    return out


def kept_masks(
    base: torch.Tensor | None, tensors: list[torch.Tensor], rule: SparsifyRule, compute: torch.dtype
) -> torch.Tensor:
    """What a rule keeps of each model's delta, as bits; see `fastmerge.ops.kept_masks`."""
    out = torch.zeros(len(tensors), -(-tensors[0].numel() // 8), dtype=torch.uint8)
    _cpu.kept_masks(*_inputs(base, tensors, compute), _rule(rule), out.data_ptr())
    return out


def gram(base: torch.Tensor | None, tensors: list[torch.Tensor], row_length: int) -> torch.Tensor:
    """Inner products of all pairs of models, block by block; see `fastmerge.ops.gram`."""
    pairs, rows = len(tensors) * (len(tensors) + 1) // 2, tensors[0].numel() // row_length
    out = torch.empty(pairs, rows, -(-row_length // GRAM_BLOCK), dtype=torch.float64)
    _cpu.gram(*_inputs(base, tensors, torch.float32), row_length, out.data_ptr())
    return out


def consensus_apply(
    base: torch.Tensor | None,
    tensors: list[torch.Tensor],
    weights: list[float],
    *,
    inputs: str,
    rule: SparsifyRule,
    scales: list[float],
    election: str,
    zero_sign: str,
    divisor: str,
    divisor_value: float,
    lambda_: float,
    compute: torch.dtype,
    out: torch.Tensor,
) -> None:
    """The merge of one chunk into `out`; see `fastmerge.ops.consensus_apply`."""
    reference, has_base, models, numel, code = _inputs(base, tensors, compute)
    formula = _formula(weights, scales, election, zero_sign, divisor, divisor_value, lambda_, compute)
    subtract = has_base and inputs == "models"
    _cpu.consensus_apply(reference, subtract, has_base, models, numel, code, _rule(rule), *formula, _ref(out))


def fused_sum(tensors: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
    """A chain of fused multiply-adds; see `fastmerge.ops.fused_sum`."""
    out = torch.empty(tensors[0].numel(), dtype=torch.float32)
    _cpu.fused_sum([_ref(x) for x in tensors], out.numel(), weights, out.data_ptr())
    return out


def consensus_apply_many(
    lists: Lists,
    weights: list[float],
    *,
    inputs: str,
    rule: SparsifyRule,
    scales: list[float],
    election: str,
    zero_sign: str,
    divisor: str,
    divisor_value: float,
    lambda_: float,
    compute: torch.dtype,
) -> None:
    """`consensus_apply` of many whole tensors into the lists' results, small ones side by side.

    rule: "none", "bernoulli", or "band" with bounds and ties_before as `magnitude_bounds_many` returns them. Each
    tensor's number is that of the lists instead of the rule's.
    Errors: ValueError where the bases, the models or the results do not have a single dtype, or the rule is another;
    take the tensors one by one then.
    """
    for_whole_tensors(rule)
    assert lists.out is not None
    many = _many(lists, inputs == "models", compute)
    formula = _formula(weights, scales, election, zero_sign, divisor, divisor_value, lambda_, compute)
    _cpu.consensus_apply_many(
        many, _rule(rule), lists.tensor_ids, *formula, lists.out_addresses.data_ptr(), _DTYPES[lists.out[0].dtype]
    )


def _formula(
    weights: list[float],
    scales: list[float],
    election: str,
    zero_sign: str,
    divisor: str,
    divisor_value: float,
    lambda_: float,
    compute: torch.dtype,
) -> tuple[list[float], list[float], int, float, int, float, float]:
    """The numbers of a merge as kernels take them."""
    if compute is not torch.float32:
        weights = torch.tensor(weights, dtype=torch.float32).to(compute).tolist()
        divisor_value = float(torch.tensor(divisor_value, dtype=torch.float32).to(compute))
    plain = divisor == "count" and election == "none"
    value = float(len(weights)) if plain else divisor_value
    codes = _ELECTIONS[election], _ZERO_SIGNS[zero_sign], _DIVISORS["value" if plain else divisor]
    return weights, scales, *codes, value, lambda_


def _pcb_inputs(base: torch.Tensor | None, tensors: list[torch.Tensor]) -> tuple[_Ref, bool, list[_Ref], int]:
    return _inputs(base, tensors, torch.float32)[:4]


def _pcb_rule(rule: PcbRule) -> _cpu.PcbRule:
    parts = (rule.clip, rule.extremes, rule.means, rule.thresholds)
    return _cpu.PcbRule(_PCB_VARIANTS[rule.variant], *(0 if part is None else part.data_ptr() for part in parts))


def _pairs(models: int) -> int:
    return models * (models + 1) // 2


def pcb_scores(base: torch.Tensor | None, tensors: list[torch.Tensor], rule: PcbRule) -> torch.Tensor:
    """Competition scores; see `fastmerge.ops.pcb_scores`."""
    out = torch.empty(len(tensors), tensors[0].numel(), dtype=torch.float32)
    _cpu.pcb_scores(*_pcb_inputs(base, tensors), _pcb_rule(rule), out.data_ptr())
    return out


def pcb_window_(
    base: torch.Tensor | None,
    tensors: list[torch.Tensor],
    rule: PcbRule,
    low: list[int],
    counts: torch.Tensor,
    highest: torch.Tensor,
) -> None:
    """Count scores past and inside a window of keys; see `fastmerge.ops.pcb_window_`."""
    window = low, counts.shape[1] - 1, counts.data_ptr(), highest.data_ptr()
    _cpu.pcb_window(*_pcb_inputs(base, tensors), _pcb_rule(rule), *window)


def pcb_histogram(
    base: torch.Tensor | None, tensors: list[torch.Tensor], rule: PcbRule, prefix: list[int]
) -> torch.Tensor:
    """Counts of the high or the low half of score keys; see `fastmerge.ops.pcb_histogram`."""
    out = torch.zeros(len(tensors), 65536, dtype=torch.int64)
    _cpu.pcb_histogram(*_pcb_inputs(base, tensors), _pcb_rule(rule), prefix, out.data_ptr())
    return out


def pcb_extremes(base: torch.Tensor | None, tensors: list[torch.Tensor]) -> torch.Tensor:
    """The least and the greatest product of each pair of deltas; see `fastmerge.ops.pcb_extremes`."""
    out = torch.empty(_pairs(len(tensors)), 2, dtype=torch.float32)
    _cpu.pcb_extremes(*_pcb_inputs(base, tensors), out.data_ptr())
    return out


def pcb_sums(base: torch.Tensor | None, tensors: list[torch.Tensor], rule: PcbRule) -> torch.Tensor:
    """Exact sums of the exponentials that scores are divided by; see `fastmerge.ops.pcb_sums`."""
    out = torch.empty(len(tensors) + _pairs(len(tensors)), L1_LIMBS, dtype=torch.int64)
    _cpu.pcb_sums(*_pcb_inputs(base, tensors), _pcb_rule(rule), out.data_ptr())
    return out


def pcb_apply(
    base: torch.Tensor | None,
    tensors: list[torch.Tensor],
    rule: PcbRule,
    weights: list[float],
    out: torch.Tensor,
    scale: torch.Tensor | None,
) -> None:
    """The merge of one chunk into `out`, and the shares into `scale`; see `fastmerge.ops.pcb_apply`."""
    target = 0 if scale is None else scale.data_ptr()
    _cpu.pcb_apply(*_pcb_inputs(base, tensors), _pcb_rule(rule), weights, _ref(out), target)


def _deltas(base: torch.Tensor, tensors: list[torch.Tensor]) -> tuple[_Ref, bool, list[_Ref], int]:
    return _inputs(base, tensors, torch.float32)[:4]


def nearswap(base: torch.Tensor, tensors: list[torch.Tensor], t: float, out: torch.Tensor) -> None:
    """One model's merge into `out`; see `fastmerge.ops.nearswap`."""
    _cpu.nearswap(*_deltas(base, tensors), t, _ref(out))


def ram_counts(base: torch.Tensor, tensors: list[torch.Tensor], epsilon: float) -> torch.Tensor:
    """Where each model takes part; see `fastmerge.ops.ram_counts`."""
    out = torch.empty(len(tensors), 2, dtype=torch.int64)
    _cpu.ram_counts(*_deltas(base, tensors), epsilon, out.data_ptr())
    return out


def ram_apply(
    base: torch.Tensor, tensors: list[torch.Tensor], factors: list[float], epsilon: float, out: torch.Tensor
) -> None:
    """The merge of one chunk into `out`; see `fastmerge.ops.ram_apply`."""
    _cpu.ram_apply(*_deltas(base, tensors), factors, epsilon, _ref(out))


def model_variance(base: torch.Tensor, tensors: list[torch.Tensor]) -> torch.Tensor:
    """The variance over the models; see `fastmerge.ops.model_variance`."""
    out = torch.empty(base.numel(), dtype=torch.float32)
    _cpu.model_variance(*_deltas(base, tensors), out.data_ptr())
    return out


def energy_sums(base: torch.Tensor, tensors: list[torch.Tensor], mask: torch.Tensor | None) -> torch.Tensor:
    """Exact sums of squares; see `fastmerge.ops.energy_sums`."""
    out = torch.empty(len(tensors), L1_LIMBS, dtype=torch.int64)
    _cpu.energy_sums(*_deltas(base, tensors), 0 if mask is None else mask.data_ptr(), out.data_ptr())
    return out


def divergences(base: torch.Tensor, tensors: list[torch.Tensor], row_length: int) -> torch.Tensor:
    """The divergence of each row; see `fastmerge.ops.divergences`."""
    out = torch.empty(base.numel() // row_length, dtype=torch.float32)
    _cpu.divergences(*_deltas(base, tensors), row_length, out.data_ptr())
    return out


def importance(
    base: torch.Tensor, tensors: list[torch.Tensor], divergence: torch.Tensor, row_length: int
) -> torch.Tensor:
    """How much each element matters; see `fastmerge.ops.importance`."""
    out = torch.empty(base.numel(), dtype=torch.float32)
    _cpu.importance(*_deltas(base, tensors), divergence.data_ptr(), row_length, out.data_ptr())
    return out


def trials(
    models: list[list[torch.Tensor]],
    rule: TrialRule,
    tensor_ids: list[int],
    forced: list[int],
    out: list[torch.Tensor],
) -> None:
    """Trials of many tensors, small ones side by side; see `fastmerge.ops.blend_trial`."""
    tensors = [
        ([_ref(model[t]) for model in models], target.numel(), tensor_ids[t], forced[t], _ref(target))
        for t, target in enumerate(out)
    ]
    numbers = rule.limit, rule.seed, rule.stream, rule.offset
    _cpu.trials(_TRIALS[rule.kind], rule.places, rule.factors, *numbers, tensors)


def functions(x: torch.Tensor, which: str) -> torch.Tensor:
    """`which` ("exp", "tanh" or "log") of contiguous float32 values, as the scores have it."""
    out = torch.empty_like(x)
    _cpu.function(_FUNCTIONS[which], x.data_ptr(), x.numel(), out.data_ptr())
    return out


def count_nonfinite(x: torch.Tensor) -> torch.Tensor:
    """How many elements are NaN, and how many infinite: int64[2]."""
    out = torch.empty(2, dtype=torch.int64)
    _cpu.count_nonfinite(_ref(x), x.numel(), out.data_ptr())
    return out


def zero_nonfinite_(x: torch.Tensor) -> None:
    """Set NaN and infinite elements of x to zero, in place."""
    _cpu.zero_nonfinite(_ref(x), x.numel())


def expert_extract(
    base: torch.Tensor | None, x: torch.Tensor, k: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest elements of each row of a delta; see `fastmerge.ops.extract_expert`."""
    width = x.shape[-1] if x.dim() else 1
    rows = x.numel() // width if width else 0
    columns = torch.empty(rows, k, dtype=column_dtype(width))
    values = torch.empty(rows, k, dtype=dtype)
    reference = _NOTHING if base is None else _ref(base)
    places = columns.data_ptr(), columns.element_size()
    _cpu.expert_extract(reference, base is not None, _ref(x), rows, width, k, *places, _ref(values))
    return columns, values


def _worn(
    tensors: list[torch.Tensor], parts: list[ExpertPart], saved: torch.Tensor
) -> tuple[list[tuple[_Ref, int, int]], list[tuple[int, int, int, _Ref, int, float, _Ref, int]]]:
    """Tensors and the parts that they wear, as the kernels know them."""
    widths = [x.shape[-1] if x.dim() else 1 for x in tensors]
    targets = [(_ref(x), x.numel() // width if width else 0, width) for x, width in zip(tensors, widths)]
    start = saved.data_ptr()
    return targets, [
        (
            part.of,
            part.columns.data_ptr(),
            part.columns.element_size(),
            _ref(part.values),
            part.columns.shape[1],
            part.scale,
            _NOTHING if part.base is None else _ref(part.base),
            start + first,
        )
        for part, (first, _) in zip(parts, saved_layout(tensors, parts))
    ]


def expert_apply_(tensors: list[torch.Tensor], parts: list[ExpertPart]) -> torch.Tensor:
    """Put experts onto tensors; see `fastmerge.ops.expert_apply_`."""
    places = saved_layout(tensors, parts)
    saved = torch.zeros(places[-1][1] if places else 0, dtype=torch.uint8)
    _cpu.expert_apply(*_worn(tensors, parts, saved))
    return saved


def expert_revert_(tensors: list[torch.Tensor], parts: list[ExpertPart], saved: torch.Tensor) -> torch.Tensor:
    """Take experts off tensors; see `fastmerge.ops.expert_revert_`."""
    changed = torch.empty(len(tensors), dtype=torch.int64)
    _cpu.expert_revert(*_worn(tensors, parts, saved), changed.data_ptr())
    return changed
