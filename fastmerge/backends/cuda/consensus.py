"""Consensus merging in CUDA C++: the functions of `fastmerge/reference/consensus.py`, with the same bits."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ..gpu import for_whole_tensors, of_one_dtype, rounded
from ..rule import TIE_BLOCK, SparsifyRule
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
    base: list[Tensor] | None,
    tensors: list[list[Tensor]],
    weights: list[float],
    *,
    inputs: str,
    rule: SparsifyRule,
    tensor_ids: list[int],
    scales: list[float],
    election: str,
    zero_sign: str,
    divisor: str,
    divisor_value: float,
    lambda_: float,
    compute: torch.dtype,
    out: list[Tensor],
) -> None:
    """`consensus_apply` of many whole tensors, in one launch.

    base, out: T tensors. tensors: for each of n models its T tensors; contiguous. rule: "none", "bernoulli", or "band"
    with bounds int64[T, n, 2, 2] and ties_before int64[n, 2, blocks], in which the blocks of a tensor, max(1,
    ceil(N / 65536)), follow those of the one before. tensor_ids: each tensor's, instead of the rule's.
    Errors: ValueError where the bases, the models or the results do not have a single dtype, or the rule is another;
    take the tensors one by one then.
    """
    of_one_dtype(base, tensors, out)
    for_whole_tensors(rule)
    few(len(tensors))
    lengths = [x.numel() for x in out]
    part = part_of(sum(lengths))
    parts = [-(-length // part) for length in lengths]
    if sum(parts) == 0:
        return
    device = out[0].device
    columns = [
        lengths,
        [0] * len(out) if base is None else [x.data_ptr() for x in base],
        [x.data_ptr() for x in out],
        [_signed(number) for number in tensor_ids],
        _before(parts),
        _before([max(1, -(-length // TIE_BLOCK)) for length in lengths]),
        *([x.data_ptr() for x in one] for one in tensors),
    ]
    # One copy: the table, and how many parts each tensor has.
    numbers = table([number for row in zip(*columns, strict=True) for number in row] + parts, device)
    rows, counts = numbers[: len(columns) * len(out)], numbers[len(columns) * len(out) :]
    # Each tensor's number as often as it has parts; told how many that are, nothing waits for the GPU.
    tensor_of = torch.arange(len(out), dtype=torch.int32, device=device)
    tensor_of = tensor_of.repeat_interleave(counts, output_size=sum(parts))
    kept, _alive = given(replace(rule, tensor_id=0), len(tensors))
    compiled.consensus_apply_many(
        place(device),
        NOTHING if base is None else (1, CODES[base[0].dtype]),
        base is not None and inputs == "models",
        base is not None,
        [(0, CODES[one[0].dtype]) for one in tensors],
        CODES[compute],
        kept,
        _formula(weights, scales, election, zero_sign, divisor, divisor_value, lambda_, compute),
        CODES[out[0].dtype],
        rows.data_ptr(),
        tensor_of.data_ptr(),
        sum(parts),
        part,
    )


def part_of(numel: int) -> int:
    """How many elements a block takes, where there are so many in all; a divisor of a tie block."""
    return int(compiled.part_of(numel))


def _signed(number: int) -> int:
    """An unsigned 64-bit integer as the signed one with its bits."""
    return (number & 0xFFFFFFFFFFFFFFFF) - ((number & 1 << 63) << 1)


def _before(counts: list[int]) -> list[int]:
    """For each how many the ones before have together."""
    total = 0
    sums = []
    for count in counts:
        sums.append(total)
        total += count
    return sums
