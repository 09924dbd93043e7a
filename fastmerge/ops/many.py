"""Consensus merging of many tensors at once: on a GPU each step is one launch for all of them, whatever their sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends.rule import SparsifyRule
from ..errors import ArgumentError
from . import _checks, consensus, select
from ._library import define, signed64, unsigned64
from .consensus import consensus_merge, total_divisor

_TOGETHER = (None, "magnitude", "magnitude_outliers", "bernoulli")
"""The methods whose rules serve many tensors at once; rows are ranked tensor by tensor."""


# -- schema, kernel, fake --------------------------------------------------------------------------------------------


def _by_model(tensors: Sequence[Tensor], count: int) -> list[list[Tensor]]:
    """The models, each a list of `count` tensors, from a flat list."""
    if count < 1 or len(tensors) % count or not tensors:
        raise ArgumentError(f"tensors has {len(tensors)} entries, which are not {count} for each model.")
    return [list(tensors[first : first + count]) for first in range(0, len(tensors), count)]


def _check_lists(base: Sequence[Tensor], models: Sequence[Sequence[Tensor]]) -> None:
    count = len(models[0])
    if base and len(base) != count:
        raise ArgumentError(f"base has {len(base)} tensors, but each model has {count}; pass as many.")
    for t in range(count):
        _checks.models(base[t] if base else None, [model[t] for model in models])
        _checks.same_device(f"tensors[0][{t}]", models[0][t], models[0][0].device)


def _uniform(base: Sequence[Tensor], models: Sequence[Sequence[Tensor]]) -> bool:
    """Whether one launch can take them: a kernel is compiled for one dtype of bases and one of models."""
    return len({x.dtype for x in base}) <= 1 and len({x.dtype for model in models for x in model}) == 1


def _bounds_many(
    base: list[Tensor], tensors: list[Tensor], count: int, first: list[int], last: list[int], compute: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    models = _by_model(tensors, count)
    _check_lists(base, models)
    n = len(models)
    for name, ranks in (("first", first), ("last", last)):
        if len(ranks) != n * count:
            raise ArgumentError(f"{name} has {len(ranks)} ranks; pass one for each tensor and model, {n * count}.")
    firsts, lasts = ([list(ranks[t * n : (t + 1) * n]) for t in range(count)] for ranks in (first, last))
    module = backends.resolve(backend, models[0][0].device)
    bases = _checks.contiguous(base)
    dense = [_checks.contiguous(model) for model in models]
    if hasattr(module, "magnitude_bounds_many") and _uniform(bases, dense):
        together: tuple[Tensor, Tensor] = module.magnitude_bounds_many(bases or None, dense, firsts, lasts, compute)
        return together
    found = [
        module.magnitude_bounds(
            bases[t] if bases else None, [model[t] for model in dense], firsts[t], lasts[t], compute
        )
        for t in range(count)
    ]
    return torch.stack([bounds for bounds, _ in found]), torch.cat([ties for _, ties in found], dim=2)


def _bounds_many_fake(
    base: list[Tensor], tensors: list[Tensor], count: int, first: list[int], last: list[int], compute: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    models = _by_model(tensors, count)
    _check_lists(base, models)
    n = len(models)
    blocks = sum(select.tie_blocks(x.numel()) for x in models[0])
    x = tensors[0]
    return x.new_empty((count, n, 2, 2), dtype=torch.int64), x.new_empty((n, 2, blocks), dtype=torch.int64)


_bounds_many_op = define(
    "magnitude_bounds_many(Tensor[] base, Tensor[] tensors, int count, SymInt[] first, SymInt[] last, "
    "ScalarType compute, str backend) -> (Tensor, Tensor)",
    _bounds_many,
    _bounds_many_fake,
)


def _apply_many(
    base: list[Tensor], tensors: list[Tensor], count: int, weights: list[float], inputs: str,
    bounds: Tensor | None, ties_before: Tensor | None, density: list[float], seed: int, tensor_ids: list[int],
    positions: list[int], election: str, zero_sign: str, divisor: str, divisor_value: float, lambda_: float,
    compute: torch.dtype, out: list[Tensor], backend: str,
) -> None:  # fmt: skip
    models = _by_model(tensors, count)
    _check_lists(base, models)
    n, device = len(models), models[0][0].device
    _checks.one_per_model("weights", weights, n)
    _checks.choice("inputs", inputs, consensus.INPUTS)
    _checks.choice("election", election, consensus.ELECTIONS)
    _checks.choice("zero_sign", zero_sign, consensus.ZERO_SIGNS)
    _checks.choice("divisor", divisor, consensus.LOW_LEVEL_DIVISORS)
    if len(out) != count or len(tensor_ids) != count:
        raise ArgumentError(f"out and tensor_ids need an entry for each of the {count} tensors.")
    for t, target in enumerate(out):
        _checks.target(f"out[{t}]", target, models[0][t].shape, [model[t] for model in models] + list(base[t : t + 1]))
    rule = _rule(bounds, ties_before, density, seed, positions, models, device)
    options: dict[str, Any] = {
        "inputs": inputs,
        "scales": [1.0] * n,
        "election": election,
        "zero_sign": zero_sign,
        "divisor": divisor,
        "divisor_value": divisor_value,
        "lambda_": lambda_,
        "compute": compute,
    }
    ids = [unsigned64(number) for number in tensor_ids]
    module = backends.resolve(backend, device)
    bases = _checks.contiguous(base)
    dense = [_checks.contiguous(model) for model in models]
    uniform = _uniform(bases, dense) and len({x.dtype for x in out}) == 1
    if hasattr(module, "consensus_apply_many") and uniform:
        module.consensus_apply_many(
            bases or None, dense, list(weights), rule=rule, tensor_ids=ids, out=list(out), **options
        )
        return
    block = 0
    for t, target in enumerate(out):
        blocks = select.tie_blocks(target.numel())
        own = replace(rule, tensor_id=ids[t])
        if rule.bounds is not None and rule.ties_before is not None:
            ties = rule.ties_before[:, :, block : block + blocks].contiguous()
            own = replace(own, bounds=rule.bounds[t].contiguous(), ties_before=ties)
        block += blocks
        module.consensus_apply(
            bases[t] if bases else None, [model[t] for model in dense], list(weights), rule=own, out=target, **options
        )


def _rule(
    bounds: Tensor | None, ties_before: Tensor | None, density: list[float], seed: int, positions: list[int],
    models: Sequence[Sequence[Tensor]], device: torch.device,
) -> SparsifyRule:  # fmt: skip
    """The rule of all tensors: bounds int64[T, n, 2, 2], or densities, or neither."""
    n = len(models)
    if bounds is not None and ties_before is not None:
        blocks = sum(select.tie_blocks(x.numel()) for x in models[0])
        _checks.counts_tensor("bounds", bounds, (len(models[0]), n, 2, 2), device)
        _checks.counts_tensor("ties_before", ties_before, (n, 2, blocks), device)
        return SparsifyRule("band", bounds=bounds.contiguous(), ties_before=ties_before.contiguous())
    if not density:
        return SparsifyRule()
    _checks.one_per_model("density", density, n)
    _checks.one_per_model("positions", positions, n)
    return SparsifyRule("bernoulli", density=list(density), seed=unsigned64(seed), positions=list(positions))


_apply_many_op = define(
    "consensus_apply_many_(Tensor[] base, Tensor[] tensors, int count, float[] weights, str inputs, Tensor? bounds, "
    "Tensor? ties_before, float[] density, int seed, int[] tensor_ids, int[] positions, str election, str zero_sign, "
    "str divisor, float divisor_value, float lambda_, ScalarType compute, Tensor(a!)[] out, str backend) -> ()",
    _apply_many,
    lambda base, tensors, count, *rest: _check_lists(base, _by_model(tensors, count)),
)


# -- public ----------------------------------------------------------------------------------------------------------


def consensus_merge_many(
    base: Sequence[Tensor] | None,
    tensors: Sequence[Sequence[Tensor]],
    weights: float | Sequence[float],
    *,
    inputs: str = "models",
    density: float | Sequence[float] = 1.0,
    method: str | None = "magnitude",
    rescale: str | None = None,
    gamma: float | Sequence[float] = 0.01,
    epsilon: float | Sequence[float] = 0.15,
    seed: int = 0,
    tensor_ids: Sequence[int] | None = None,
    model: int | Sequence[int] | None = None,
    election: str = "weighted",
    zero_sign: str = "positive",
    divisor: str = "weights",
    ties: str = "lowest_index",
    lambda_: float = 1.0,
    numerics: str = "fp32",
    out_dtype: torch.dtype | None = None,
    out: Sequence[Tensor] | None = None,
    backend: str = "auto",
) -> list[Tensor]:
    """`consensus_merge` for a list of tensors, each with thresholds of its own, in a few launches on a GPU.

    base: T tensors of any shapes, or None. tensors: n models, each a list of T tensors of the base's shapes, all on one
        device. Where all bases have one dtype and all models one, a step is one launch for all T; else, and for
        rescaling, DELLA, hashed ties and mergekit's numerics, the tensors are merged one after the other.
    tensor_ids: the number of each tensor, which selects its random words (`tensor_id`); None: 0 for all.
    out: T contiguous tensors to write to; they may not overlap the inputs.
    All else is as in `consensus_merge`, and the same for all tensors.
    Returns a list of T tensors with the bits of as many calls of `consensus_merge`, or `out`.
    Errors: ArgumentError / ArgumentTypeError, in a sentence that names the argument.
    Source: as for `consensus_merge`.
    """
    models = [_checks.tensor_list(f"tensors[{i}]", one) for i, one in enumerate(tensors)]
    if not models:
        raise ArgumentError("tensors is empty; pass at least one model.")
    count = len(models[0])
    bases = [] if base is None else _checks.tensor_list("base", base)
    for name, listed in (*((f"tensors[{i}]", one) for i, one in enumerate(models)), ("base", bases)):
        if len(listed) != count and (listed or name != "base"):
            raise ArgumentError(f"{name} has {len(listed)} tensors, but tensors[0] has {count}; pass as many.")
    ids = [0] * count if tensor_ids is None else [_checks.integer("tensor_ids", number) for number in tensor_ids]
    targets = None if out is None else list(out)
    for name, entries in (("tensor_ids", ids), ("out", targets)):
        if entries is not None and len(entries) != count:
            raise ArgumentError(f"{name} has {len(entries)} entries for {count} tensors; pass one for each.")
    wide = any(x.dtype == torch.float64 for x in (*bases, *(x for one in models for x in one)))
    plain = method in _TOGETHER and rescale is None and numerics == "fp32" and ties != "hashed" and not wide
    if not plain or out_dtype == torch.float64:
        return [
            consensus_merge(
                bases[t] if bases else None, [one[t] for one in models], weights, inputs=inputs, density=density,
                method=method, rescale=rescale, gamma=gamma, epsilon=epsilon, seed=seed, tensor_id=ids[t], model=model,
                election=election, zero_sign=zero_sign, divisor=divisor, ties=ties, lambda_=lambda_, numerics=numerics,
                out_dtype=out_dtype, out=None if targets is None else targets[t], backend=backend,
            )
            for t in range(count)
        ]  # fmt: skip
    n = len(models)
    _check_lists(bases, models)
    _checks.choice("inputs", inputs, consensus.INPUTS)
    _checks.choice("divisor", divisor, consensus.DIVISORS)
    _checks.choice("ties", ties, select.TIES)
    weight_list = [_checks.real("weights", w) for w in _checks.per_model("weights", weights, n)]
    densities = [_checks.fraction("density", d) for d in _checks.per_model("density", density, n)]
    gammas = [_checks.fraction("gamma", g) for g in _checks.per_model("gamma", gamma, n)]
    positions = _checks.positions("model", model, n)
    if targets is None:
        dtypes = [out_dtype or x.dtype for x in (bases or models[0])]
        targets = [torch.empty(x.shape, dtype=d, device=x.device) for x, d in zip(models[0], dtypes)]
    else:
        for t, target in enumerate(targets):
            _checks.out_tensor(target, out_dtype, f"out[{t}]")
    flat = [x for one in models for x in one]
    bounds = ties_before = None
    kept: list[float] = []
    if any(d < 1 for d in densities) and method == "bernoulli":
        kept = densities
    elif any(d < 1 for d in densities) and method is not None:
        bounds, ties_before = _bounds(
            bases if inputs == "models" else [], flat, models, densities, gammas, method, backend
        )
        if ties == "keep":
            bounds = select.keep_ties(bounds.view(-1, 2, 2)).view_as(bounds)
    _apply_many_op(
        bases, flat, count, weight_list, inputs, bounds, ties_before, kept, signed64(_checks.integer("seed", seed)),
        [signed64(number) for number in ids], positions, election, zero_sign, divisor,
        total_divisor(weight_list) if divisor == "weights" else 1.0, _checks.real("lambda_", lambda_), torch.float32,
        targets, backend,
    )  # fmt: skip
    return targets


def _bounds(
    base: list[Tensor], flat: list[Tensor], models: list[list[Tensor]], densities: list[float], gammas: list[float],
    method: str, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The rank bounds of every tensor of every model."""
    outliers = method == "magnitude_outliers"
    ranges = [
        select.rank_range(x.numel(), d, g if outliers else None) for x in models[0] for d, g in zip(densities, gammas)
    ]
    bounds, ties = _bounds_many_op(
        base, flat, len(models[0]), [r[0] for r in ranges], [r[1] for r in ranges], torch.float32, backend
    )
    return bounds, ties
