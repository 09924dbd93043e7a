"""Consensus merging in Triton: the functions of `fastmerge/reference/consensus.py`, with the same bits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..._triton import consensus as kernels
from ..gpu import for_whole_tensors, of_one_dtype, rounded
from ..rule import TIE_BLOCK, SparsifyRule
from .launch import CODES, block, copied, flat, float_bits, launch, table, tiles
from .sparsify import BY_VALUE, METHODS, PIECE, TYPES, Given, Words, alignment, decided, padded, usable

__all__ = ["consensus_apply", "consensus_apply_many"]

BLOCK = 1024
"""Elements per tile: eight for each thread, one load of 16 bytes per model where they are 16-bit numbers."""

TILES = 4
"""Tiles per program: what they share is worked out once, and there are still enough programs to keep a GPU busy."""

_ELECTIONS = {"none": 0, "weighted": 1, "total": 2, "frequency": 3}
_DIVISORS = {"none": 0, "weights": 1, "count": 2, "value": 3}
_ZERO_SIGNS = {"positive": 1, "negative": -1, "zero": 0}


@dataclass(frozen=True)
class _Formula:
    """The numbers of a merge, rounded, and the choices that its kernels are compiled for."""

    weights: tuple[float, ...]
    scales: tuple[float, ...]
    divisor_value: float
    lambda_: float
    constants: dict[str, Any]

    @classmethod
    def of(
        cls,
        has_base: bool,
        weights: list[float],
        inputs: str,
        scales: list[float],
        election: str,
        zero_sign: str,
        divisor: str,
        divisor_value: float,
        lambda_: float,
        compute: torch.dtype,
    ) -> _Formula:
        """That of `consensus_apply` with these arguments."""
        value = rounded([divisor_value], compute)[0]
        if election == "none":
            # Everybody takes part: what is divided by is one number.
            value = float(len(weights)) if divisor == "count" else value
            divisor = "none" if divisor == "none" else "value"
            zero_sign = "positive"
        *factors, factor = rounded([*scales, lambda_])
        size = block(BLOCK)
        constants = {
            "ELECTION": _ELECTIONS[election],
            "ZERO_SIGN": _ZERO_SIGNS[zero_sign],
            "DIVISOR": _DIVISORS[divisor],
            "SUBTRACT": has_base and inputs == "models",
            "ADD": has_base,
            "COMPUTE": CODES[compute],
            # Multiplying by 1 would change nothing; most merges multiply by nothing else.
            "SCALED": any(f != 1.0 for f in (*factors, factor)),
            "SPAN": min(TILES * size, TIE_BLOCK),
            "BLOCK": size,
            "PIECE": min(PIECE, size),
        }
        return cls(tuple(rounded(weights, compute)), tuple(factors), value, factor, constants)


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
    models, numel = len(tensors), tensors[0].numel()
    if numel == 0:
        return
    given = Given.of(decided(base if inputs == "models" else None, tensors, rule, compute), models)
    formula = _Formula.of(
        base is not None, weights, inputs, scales, election, zero_sign, divisor, divisor_value, lambda_, compute
    )
    base = None if base is None else usable(base)
    tensors = [usable(x) for x in tensors]
    if models > BY_VALUE and len({x.dtype for x in tensors}) > 1:
        # A table's addresses are those of one type.
        tensors = [x.to(torch.float32) for x in tensors]
    grid = (tiles(numel, formula.constants["SPAN"]),)
    constants = {
        "METHOD": given.method,
        "FOURS": given.words.fours,
        "ALIGN": alignment(base, *tensors, out),
        **formula.constants,
    }
    settings = (given.tensors, given.stride, *given.words.arguments)
    if models <= BY_VALUE:
        launch(
            kernels.merge,
            grid,
            out.device,
            base,
            *padded(tensors, None),
            formula.weights,
            formula.scales,
            flat(out),
            numel,
            *settings,
            *padded(given.draws, 0),
            formula.divisor_value,
            formula.lambda_,
            registers=64 if models == 1 and given.method == METHODS["band"] else None,
            **constants,
        )
        return
    listed = [
        number
        for x, weight, scale, draw in zip(tensors, formula.weights, formula.scales, given.draws)
        for number in (x.data_ptr(), float_bits(weight), float_bits(scale), draw)
    ]
    launch(
        kernels.merge_listed,
        grid,
        out.device,
        base,
        table(listed, out.device),
        models,
        flat(out),
        numel,
        *settings,
        formula.divisor_value,
        formula.lambda_,
        DTYPE=TYPES[tensors[0].dtype],
        **constants,
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
    """`consensus_apply` of many whole tensors, in one launch where there are at most eight models.

    base, out: T tensors. tensors: for each of n models its T tensors; contiguous. rule: "none", "bernoulli", or "band"
    with bounds int64[T, n, 2, 2] and ties_before int64[n, 2, blocks], in which the blocks of a tensor, max(1,
    ceil(N / 65536)), follow those of the one before. tensor_ids: each tensor's, instead of the rule's.
    Errors: ValueError where the bases, the models or the results do not have a single dtype, or the rule is another;
    take the tensors one by one then.
    """
    of_one_dtype(base, tensors, out)
    for_whole_tensors(rule)
    blocks = [max(1, tiles(x.numel(), TIE_BLOCK)) for x in out]
    if len(tensors) > BY_VALUE:
        _one_by_one(
            base,
            tensors,
            weights,
            rule,
            tensor_ids,
            blocks,
            out,
            inputs=inputs,
            scales=scales,
            election=election,
            zero_sign=zero_sign,
            divisor=divisor,
            divisor_value=divisor_value,
            lambda_=lambda_,
            compute=compute,
        )
        return
    formula = _Formula.of(
        base is not None, weights, inputs, scales, election, zero_sign, divisor, divisor_value, lambda_, compute
    )
    given = Given.of(rule, len(tensors))
    bases = None if base is None else [usable(x) for x in base]
    models = [[usable(x) for x in one] for one in tensors]
    everything = [*(bases or []), *(x for one in models for x in one), *out]
    listed: list[int] = []
    programs = [tiles(x.numel(), formula.constants["SPAN"]) for x in out]
    program = first_block = 0
    for t, target in enumerate(out):
        words = Words.of(replace(rule, tensor_id=tensor_ids[t]))
        listed += [program, target.numel(), words.key, words.tensor_low, first_block]
        listed += [
            0 if bases is None else bases[t].data_ptr(),
            target.data_ptr(),
            *(one[t].data_ptr() for one in models),
        ]
        program += programs[t]
        first_block += blocks[t]
    if program == 0:
        return
    device = out[0].device
    # Each tensor's number as often as it has programs; told how many that are, nothing waits for the GPU.
    counts = copied(torch.tensor(programs), device)
    numbers = torch.arange(len(out), dtype=torch.int32, device=device)
    launch(
        kernels.merge_tensors,
        (program,),
        device,
        table(listed, device),
        numbers.repeat_interleave(counts, output_size=program),
        formula.weights,
        formula.scales,
        given.tensors,
        given.stride,
        *padded(given.draws, 0),
        formula.divisor_value,
        formula.lambda_,
        registers=64 if given.method == METHODS["band"] else None,
        METHOD=given.method,
        ALIGN=alignment(*everything),
        DTYPE=TYPES[models[0][0].dtype],
        BASE_DTYPE=TYPES[models[0][0].dtype if bases is None else bases[0].dtype],
        OUT_DTYPE=TYPES[out[0].dtype],
        **formula.constants,
    )


def _one_by_one(
    base: list[Tensor] | None,
    tensors: list[list[Tensor]],
    weights: list[float],
    rule: SparsifyRule,
    tensor_ids: list[int],
    blocks: list[int],
    out: list[Tensor],
    **settings: Any,
) -> None:
    """`consensus_apply_many`, by a launch for each tensor."""
    first = 0
    for t, target in enumerate(out):
        own = replace(rule, tensor_id=tensor_ids[t])
        if rule.bounds is not None and rule.ties_before is not None:
            ties_before = rule.ties_before[:, :, first : first + blocks[t]]
            own = replace(own, bounds=rule.bounds[t], ties_before=ties_before.contiguous())
        first += blocks[t]
        models = [one[t] for one in tensors]
        consensus_apply(None if base is None else base[t], models, weights, rule=own, out=target, **settings)
