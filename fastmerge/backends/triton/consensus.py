"""Consensus merging in Triton: the functions of `fastmerge/reference/consensus.py`, with the same bits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..._triton import consensus as kernels
from ..gpu import rounded
from ..lists import Lists, before, copied, for_whole_tensors, multiple_of, signed, words
from ..rule import TIE_BLOCK, SparsifyRule
from .launch import CODES, block, flat, float_bits, launch, table, tiles
from .sparsify import BY_VALUE, METHODS, PIECE, TYPES, Given, alignment, decided, padded, usable

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
    """`consensus_apply` of many whole tensors into the lists' results, in one launch where there are up to 8 models.

    rule: "none", "bernoulli", or "band" with bounds int64[T, n, 2, 2] and ties_before int64[n, 2, blocks], in which
    the blocks of a tensor, max(1, ceil(N / 65536)), follow those of the one before. Each tensor's number is that of the
    lists instead of the rule's.
    Errors: ValueError where the bases, the models or the results do not have a single dtype, or the rule is another;
    take the tensors one by one then.
    """
    lists.need_uniform()
    for_whole_tensors(rule)
    if len(lists.models) > BY_VALUE:
        _one_by_one(
            lists,
            weights,
            rule,
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
    lists = _usable(lists)
    base, models, out = lists.base, lists.models, lists.out
    assert out is not None
    formula = _Formula.of(
        base is not None, weights, inputs, scales, election, zero_sign, divisor, divisor_value, lambda_, compute
    )
    given = Given.of(rule, len(models))
    span = formula.constants["SPAN"]
    merged = lists.once(("consensus_apply_many[triton]", span), lambda: _Table.of(lists, span))
    if merged.programs == 0:
        return
    launch(
        kernels.merge_tensors,
        (merged.programs,),
        lists.device,
        merged.listed(rule.seed if rule.method == "bernoulli" else 0),
        merged.tensor_of,
        formula.weights,
        formula.scales,
        given.tensors,
        given.stride,
        *padded(given.draws, 0),
        formula.divisor_value,
        formula.lambda_,
        registers=64 if given.method == METHODS["band"] else None,
        METHOD=given.method,
        ALIGN=merged.align,
        DTYPE=TYPES[models[0][0].dtype],
        BASE_DTYPE=TYPES[models[0][0].dtype if base is None else base[0].dtype],
        OUT_DTYPE=TYPES[out[0].dtype],
        **formula.constants,
    )


@dataclass(frozen=True)
class _Table:
    """Many tensors as a merge finds them: a row for each, and which of them each program works for."""

    rows: Tensor
    tensor_of: Tensor
    programs: int
    align: int

    @classmethod
    def of(cls, lists: Lists, span: int) -> _Table:
        """That of these lists, of which a program takes `span` elements."""
        counts = (lists.lengths + (span - 1)) // span
        programs = int(counts.sum())
        # A word's key is the seed, its high half mixed with that of the tensor's number.
        ids = words(lists.tensor_ids)
        low = ids & 0xFFFFFFFF
        addressed = lists.base_addresses, lists.out_addresses, lists.model_addresses
        columns = [before(counts), lists.lengths, ids - low, low, before(lists.blocks), *addressed[:2]]
        rows = torch.cat((torch.stack(columns, dim=1), lists.model_addresses), dim=1)
        there = table(rows.flatten(), lists.device)
        # Each tensor's number as often as it has programs; told how many that are, nothing waits for the GPU.
        tensor_of = torch.arange(lists.tensors, dtype=torch.int32, device=lists.device)
        tensor_of = tensor_of.repeat_interleave(copied(counts, lists.device), output_size=programs)
        together = multiple_of(*addressed)
        # So few, since kernels are compiled for each.
        align = together if together >= 8 else 1
        return cls(there[: rows.numel()].view(rows.shape), tensor_of, programs, align)

    def listed(self, seed: int) -> Tensor:
        """The rows, with the keys of this seed."""
        if seed == 0:
            return self.rows
        # The next merge may have another seed while this one is still under way.
        rows = self.rows.clone()
        rows[:, 2] ^= signed(seed)
        return rows


def _usable(lists: Lists) -> Lists:
    """Lists that a GPU can load: with copies of inputs whose addresses are no multiples of their elements'."""
    based = lists.base is None or multiple_of(lists.base_addresses) >= lists.base[0].element_size()
    if based and multiple_of(lists.model_addresses) >= lists.models[0][0].element_size():
        return lists
    base = None if lists.base is None else [usable(x) for x in lists.base]
    return Lists(base, [[usable(x) for x in one] for one in lists.models], lists.out, lists.tensor_ids)


def _one_by_one(lists: Lists, weights: list[float], rule: SparsifyRule, **settings: Any) -> None:
    """`consensus_apply_many`, by a launch for each tensor."""
    assert lists.out is not None
    first = 0
    for t, (target, blocks) in enumerate(zip(lists.out, lists.blocks.tolist())):
        own = replace(rule, tensor_id=lists.tensor_ids[t])
        if rule.bounds is not None and rule.ties_before is not None:
            ties_before = rule.ties_before[:, :, first : first + blocks]
            own = replace(own, bounds=rule.bounds[t], ties_before=ties_before.contiguous())
        first += blocks
        base = None if lists.base is None else lists.base[t]
        consensus_apply(base, [one[t] for one in lists.models], weights, rule=own, out=target, **settings)
