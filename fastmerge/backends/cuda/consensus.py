"""Consensus merging in CUDA C++: the functions of `fastmerge/reference/consensus.py`, with the same bits."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..gpu import rounded
from ..lists import Lists, before, for_whole_tensors, words
from ..rule import SparsifyRule
from .launch import CODES, NOTHING, compiled, place, ref, table
from .launch import inputs as inputs_ref
from .sparsify import decided, few, given

__all__ = ["consensus_apply", "consensus_apply_many"]

_ELECTIONS = {"none": 0, "weighted": 1, "total": 2, "frequency": 3}
_DIVISORS = {"none": 0, "weights": 1, "count": 2, "value": 3}
_ZERO_SIGNS = {"positive": 1.0, "negative": -1.0, "zero": 0.0}

_Formula = tuple[list[float], list[float], int, int, float, float, float, bool]


def _formula(
    weights: list[float],
    scales: list[float],
    election: str,
    zero_sign: str,
    divisor: str,
    divisor_value: float,
    lambda_: float,
    compute: torch.dtype,
) -> _Formula:
    """The numbers of a merge, rounded, as kernels take them."""
    value = rounded([divisor_value], compute)[0]
    if election == "none" and divisor != "none":
        # Everybody takes part: what is divided by is one number.
        value = float(len(weights)) if divisor == "count" else value
        divisor = "value"
    if divisor == "none":
        value = 1.0
    weights = rounded(weights, compute)
    *factors, factor = rounded([*scales, lambda_])
    divided_by = weights if divisor == "weights" else [value] if divisor == "value" else []
    zeros_stay = all(0 < number < math.inf for number in divided_by) and math.isfinite(math.fsum(divided_by))
    codes = _ELECTIONS[election], _DIVISORS[divisor], _ZERO_SIGNS[zero_sign]
    return weights, factors, *codes, value, factor, zeros_stay


def consensus_apply(
    base: Tensor | None,
    tensors: list[Tensor],
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
    out: Tensor,
) -> None:
    """The merge of one chunk into `out`; see `fastmerge.ops.consensus_apply`."""
    few(len(tensors))
    if out.numel() == 0:
        return
    subtract = base is not None and inputs == "models"
    own = decided(base if subtract else None, tensors, rule, compute)
    kept, _alive = given(own, len(tensors))
    formula = _formula(weights, scales, election, zero_sign, divisor, divisor_value, lambda_, compute)
    reference, has_base, models, numel, code = inputs_ref(base, tensors, compute)
    compiled.consensus_apply(
        place(out.device), reference, subtract, has_base, models, numel, code, kept, formula, ref(out)
    )


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
    """`consensus_apply` of many whole tensors into the lists' results, in one launch.

    rule: "none", "bernoulli", or "band" with bounds int64[T, n, 2, 2] and ties_before int64[n, 2, blocks], in which
    the blocks of a tensor, max(1, ceil(N / 65536)), follow those of the one before. Each tensor's number is that of the
    lists instead of the rule's.
    Errors: ValueError where the bases, the models or the results do not have a single dtype, or the rule is another;
    take the tensors one by one then.
    """
    lists.need_uniform()
    for_whole_tensors(rule)
    assert lists.out is not None
    base, models, device = lists.base, lists.models, lists.device
    few(len(models))
    merged = lists.once("consensus_apply_many[cuda]", lambda: _Table.of(lists))
    if merged.parts == 0:
        return
    kept, _alive = given(replace(rule, tensor_id=0), len(models))
    compiled.consensus_apply_many(
        place(device),
        NOTHING if base is None else (1, CODES[base[0].dtype]),
        base is not None and inputs == "models",
        base is not None,
        [(0, CODES[one[0].dtype]) for one in models],
        CODES[compute],
        kept,
        _formula(weights, scales, election, zero_sign, divisor, divisor_value, lambda_, compute),
        CODES[lists.out[0].dtype],
        merged.rows.data_ptr(),
        merged.tensor_of.data_ptr(),
        merged.parts,
        merged.part,
    )


@dataclass(frozen=True)
class _Table:
    """Many tensors as a merge finds them: a row for each, and which of them each part belongs to."""

    rows: Tensor
    tensor_of: Tensor
    parts: int
    part: int

    @classmethod
    def of(cls, lists: Lists) -> _Table:
        """That of these lists; one copy."""
        part = part_of(int(lists.lengths.sum()))
        counts = (lists.lengths + (part - 1)) // part
        parts = int(counts.sum())
        addresses, ids = [lists.base_addresses, lists.out_addresses], words(lists.tensor_ids)
        columns = [lists.lengths, *addresses, ids, before(counts), before(lists.blocks)]
        rows = torch.cat((torch.stack(columns, dim=1), lists.model_addresses), dim=1).flatten()
        there = table(torch.cat((rows, counts)), lists.device)
        # Each tensor's number as often as it has parts; told how many that are, nothing waits for the GPU.
        tensor_of = torch.arange(lists.tensors, dtype=torch.int32, device=lists.device)
        tensor_of = tensor_of.repeat_interleave(there[len(rows) :], output_size=parts)
        return cls(there[: len(rows)], tensor_of, parts, part)


def part_of(numel: int) -> int:
    """How many elements a block takes, where there are so many in all; a divisor of a tie block."""
    return int(compiled.part_of(numel))
