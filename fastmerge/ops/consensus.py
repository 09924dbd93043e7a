"""Consensus merging: weighted sums of sparsified deltas, with or without an elected sign."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends.rule import SparsifyRule
from . import _checks, select, sparsify
from ._exact import l1_scale
from ._library import define

INPUTS = ("models", "deltas")
ELECTIONS = ("weighted", "total", "frequency", "none")
ZERO_SIGNS = ("positive", "negative", "zero")
DIVISORS = ("weights", "count", "none")
LOW_LEVEL_DIVISORS = (*DIVISORS, "value")
SMALLEST_DIVISOR = 1e-8

_ARGUMENTS = (
    f"Tensor? base, Tensor[] tensors, float[] weights, str inputs, {sparsify.RULE_SCHEMA}, float[] scales, "
    "str election, str zero_sign, str divisor, float divisor_value, float lambda_, ScalarType compute"
)
_RULE_FIELDS = 11


# -- schema, kernel, fake --------------------------------------------------------------------------------------------


def _run(
    out: Tensor, base: Tensor | None, tensors: list[Tensor], weights: list[float], inputs: str, *rest: Any
) -> None:
    """Check everything that the kernels rely on, and call the backend's."""
    flat = rest[:_RULE_FIELDS]
    scales, election, zero_sign, divisor, divisor_value, lambda_, compute, backend = rest[_RULE_FIELDS:]
    _checks.models(base, tensors)
    models = len(tensors)
    _checks.one_per_model("weights", weights, models)
    _checks.one_per_model("scales", scales, models)
    _checks.choice("inputs", inputs, INPUTS)
    _checks.choice("election", election, ELECTIONS)
    _checks.choice("zero_sign", zero_sign, ZERO_SIGNS)
    _checks.choice("divisor", divisor, LOW_LEVEL_DIVISORS)
    _checks.compute_dtype("compute", compute)
    backends.resolve(backend, out.device).consensus_apply(
        _checks.optional_contiguous(base),
        _checks.contiguous(tensors),
        list(weights),
        inputs=inputs,
        rule=sparsify.checked_rule(flat, models, tensors[0].numel(), tensors[0].device),
        scales=list(scales),
        election=election,
        zero_sign=zero_sign,
        divisor=divisor,
        divisor_value=divisor_value,
        lambda_=lambda_,
        compute=compute,
        out=out,
    )


def _consensus_apply(base: Tensor | None, tensors: list[Tensor], *rest: Any) -> Tensor:
    *arguments, out_dtype, backend = rest
    _checks.kernel_inputs("tensors", tensors)
    _checks.kernel_out_dtype(out_dtype)
    out = torch.empty(tensors[0].shape, dtype=out_dtype, device=tensors[0].device)
    _run(out, base, tensors, *arguments, backend)
    return out


def _consensus_apply_fake(base: Tensor | None, tensors: list[Tensor], *rest: Any) -> Tensor:
    _checks.models(base, tensors)
    out_dtype = rest[-2]
    _checks.kernel_out_dtype(out_dtype)
    return tensors[0].new_empty(tensors[0].shape, dtype=out_dtype)


_consensus_apply_op = define(
    f"consensus_apply({_ARGUMENTS}, ScalarType out_dtype, str backend) -> Tensor",
    _consensus_apply,
    _consensus_apply_fake,
)


def _consensus_apply_out(base: Tensor | None, tensors: list[Tensor], *rest: Any) -> None:
    *arguments, out, backend = rest
    _checks.models(base, tensors)
    _checks.target("out", out, tensors[0].shape, tensors if base is None else (base, *tensors))
    _run(out, base, tensors, *arguments, backend)


def _consensus_apply_out_fake(base: Tensor | None, tensors: list[Tensor], *rest: Any) -> None:
    _checks.models(base, tensors)


_consensus_apply_out_op = define(
    f"consensus_apply_out({_ARGUMENTS}, Tensor(a!) out, str backend) -> ()",
    _consensus_apply_out,
    _consensus_apply_out_fake,
)


def _fused_sum(tensors: list[Tensor], weights: list[float], backend: str) -> Tensor:
    _checks.models(None, tensors)
    _checks.one_per_model("weights", weights, len(tensors))
    found: Tensor = backends.resolve(backend, tensors[0].device).fused_sum(_checks.contiguous(tensors), list(weights))
    return found


def _fused_sum_fake(tensors: list[Tensor], weights: list[float], backend: str) -> Tensor:
    _checks.models(None, tensors)
    return tensors[0].new_empty(tensors[0].numel(), dtype=torch.float32)


_fused_sum_op = define(
    "fused_sum(Tensor[] tensors, float[] weights, str backend) -> Tensor", _fused_sum, _fused_sum_fake
)


# -- public ----------------------------------------------------------------------------------------------------------


def consensus_apply(
    base: Tensor | None,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    inputs: str = "models",
    rule: SparsifyRule | None = None,
    scales: Sequence[float] | None = None,
    election: str = "weighted",
    zero_sign: str = "positive",
    divisor: str = "weights",
    divisor_value: float = 1.0,
    lambda_: float = 1.0,
    compute: torch.dtype = torch.float32,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Merge one chunk of n models, everything about it being known: one pass, nothing stored.

    base, tensors, weights, inputs, election, zero_sign, lambda_, out, out_dtype: as in `consensus_merge`.
    rule: what is kept of each delta (None: everything). scales: a factor for each sparsified delta (None: 1).
    divisor: "weights" divides by the sum of the weights that took part, or by `divisor_value` when election is "none";
        "count" by how many took part; "value" by `divisor_value`; "none" does not divide. A sum of 0 counts as 1.
    compute: the dtype that every intermediate result is rounded to; inputs are first rounded to it, too.
    Returns a tensor of the inputs' shape, or `out`.
    Errors: ArgumentError / ArgumentTypeError, in a sentence that names the argument.
    Source: the papers named at `consensus_merge`; the formula is in docs/methods.md.
    """
    originals = _checks.tensor_list("tensors", tensors)
    inputs_list = _checks.input_tensors("tensors", originals)
    if out is not None:
        _checks.out_tensor(out, out_dtype)
        out_dtype = out.dtype
    elif out_dtype is None:
        out_dtype = _default_out_dtype(base, originals)
    else:
        _checks.out_dtype(out_dtype)
    if base is not None:
        base = _checks.input_tensor("base", base)
    arguments = (
        base,
        inputs_list,
        [_checks.real("weights", w) for w in weights],
        inputs,
        *sparsify.flatten_rule(SparsifyRule() if rule is None else rule),
        [1.0] * len(inputs_list) if scales is None else list(scales),
        election,
        zero_sign,
        divisor,
        divisor_value,
        _checks.real("lambda_", lambda_),
        compute,
    )
    if out is not None:
        _consensus_apply_out_op(*arguments, out.detach() if out.requires_grad else out, backend)
        return out
    wide = out_dtype == torch.float64
    result: Tensor = _consensus_apply_op(*arguments, torch.float32 if wide else out_dtype, backend)
    return result.to(torch.float64) if wide else result


def fused_sum(tensors: Sequence[Tensor], weights: Sequence[float], *, backend: str = "auto") -> Tensor:
    """sum_i(w_i x_i) by fused multiply-adds, each rounded to float32 once: as mergekit's linear adds models up.

    tensors: n tensors of one shape, float32, bfloat16 or float16, or float64 (rounded to float32 first). weights: n
        numbers, rounded to float32. The sum starts from 0 and goes from left to right.
    Returns float32[N], one for each element in the tensors' order.
    Errors: ArgumentError / ArgumentTypeError, in a sentence that names the argument.
    """
    given = _checks.input_tensors("tensors", _checks.tensor_list("tensors", tensors))
    found: Tensor = _fused_sum_op(given, [_checks.real("weights", w) for w in weights], backend)
    return found


def _default_out_dtype(base: Any, tensors: Sequence[Tensor]) -> torch.dtype:
    return base.dtype if isinstance(base, Tensor) else tensors[0].dtype


def _float32(value: float) -> float:
    return ctypes.c_float(value).value


def weight_sum(weights: Sequence[float], compute: torch.dtype = torch.float32, numerics: str = "fp32") -> float:
    """The sum of all weights, each rounded to `compute`, added in float32 from left to right and rounded to `compute`.

    With numerics="mergekit" they are added as torch adds a column up, which for five to seven takes another order.
    """
    column = torch.tensor(list(weights), dtype=torch.float32).to(compute).reshape(-1, 1)
    if numerics == "mergekit":
        return float(column.sum(dim=0))
    total = 0.0
    for weight in column[:, 0].tolist():
        total = _float32(total + weight)
    return float(torch.tensor(total, dtype=torch.float32).to(compute))


def total_divisor(weights: Sequence[float], compute: torch.dtype = torch.float32, numerics: str = "fp32") -> float:
    """The divisor of a merge without election: `weight_sum`, but 1 where it is below 1e-8 in magnitude."""
    total = weight_sum(weights, compute, numerics)
    return 1.0 if abs(total) < SMALLEST_DIVISOR else total


def consensus_merge(
    base: Tensor | None,
    tensors: Sequence[Tensor],
    weights: float | Sequence[float],
    *,
    inputs: str = "models",
    density: float | Sequence[float] = 1.0,
    method: str | None = "magnitude",
    rescale: str | None = None,
    gamma: float | Sequence[float] = 0.01,
    epsilon: float | Sequence[float] = 0.15,
    seed: int = 0,
    tensor_id: int = 0,
    offset: int = 0,
    model: int | Sequence[int] | None = None,
    election: str = "weighted",
    zero_sign: str = "positive",
    divisor: str = "weights",
    ties: str = "lowest_index",
    lambda_: float = 1.0,
    numerics: str = "fp32",
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Merge n models into a base: sparsify the deltas, weigh them, elect a sign, add what agrees, divide, scale.

    base: the base model's tensor, any shape; None merges the tensors (or deltas) as they are and adds nothing.
    tensors: n tensors of the base's shape; dtypes may differ: float32, bfloat16, float16, or float64 (rounded to
        float32 first). No copy of all n is made and no delta is stored.
    weights: one number per model, or one for all; finite.
    inputs: "models" subtracts the base from the tensors, "deltas" takes them as they are; the base is added either way.
    density, method, rescale, gamma, epsilon, seed, tensor_id, offset, ties: as in `sparsify`; the first, gamma and
        epsilon may be one number or one per model; method None keeps everything.
    model: the models' positions, which select their random words; None: 0, 1, 2, ... (one number for a single model)
    election: "weighted" elects the sign of sum(w_i d_i), "total" of sum(d_i), "frequency" of sum(sign(d_i)); an element
        takes part when it has that sign, zeros never do. "none": all take part.
    zero_sign: the sign elected where that sum is 0: "positive", "negative", or "zero" (nobody takes part).
    divisor: "weights" divides by the sum of the weights that took part, "count" by their number (0 counts as 1; without
        election a sum of weights below 1e-8 in magnitude counts as 1), "none" does not divide.
    ties="hashed" stores the sparsified deltas in float32, the one case that needs memory for n tensors.
    lambda_: the merged delta is multiplied by it before the base is added.
    numerics: "fp32" computes in float32 and rounds once; "mergekit" rounds every step to the inputs' promoted dtype.
    out_dtype: the result's dtype, by default the base's (the first tensor's when there is no base).
    out: a contiguous float32, bfloat16 or float16 tensor of the result's shape to write to; it may not overlap an
        input.
    Returns the merged tensor, or `out`.
    Errors: ArgumentError / ArgumentTypeError, in a sentence that names the argument.
    Source: task arithmetic (arXiv 2212.04089), TIES (2306.01708), DARE (2311.03099), DELLA (2406.11617), Model
        Breadcrumbs (2312.06795), as in mergekit 0.1.5; flags for the other forms in use (docs/methods.md).
    """
    originals = _checks.tensor_list("tensors", tensors)
    if out is not None:
        _checks.out_tensor(out, out_dtype)
        out_dtype = out.dtype
    elif out_dtype is None:
        out_dtype = _default_out_dtype(base, originals)
    tensors = _checks.input_tensors("tensors", originals)
    if base is not None:
        base = _checks.input_tensor("base", base)
    _checks.same_shape(base, tensors)
    n = len(tensors)
    _checks.choice("inputs", inputs, INPUTS)
    _checks.choice("divisor", divisor, DIVISORS)
    if method is not None:
        _checks.choice("method", method, sparsify.METHODS)
    _checks.choice("rescale", rescale, sparsify.RESCALES)
    _checks.choice("ties", ties, select.TIES)
    weight_list = [_checks.real("weights", w) for w in _checks.per_model("weights", weights, n)]
    density_list = [_checks.fraction("density", d) for d in _checks.per_model("density", density, n)]
    gamma_list = [_checks.fraction("gamma", g) for g in _checks.per_model("gamma", gamma, n)]
    epsilon_list = [_checks.fraction("epsilon", e) for e in _checks.per_model("epsilon", epsilon, n)]
    positions = _checks.positions("model", model, n)
    seed, tensor_id = _checks.integer("seed", seed), _checks.integer("tensor_id", tensor_id)
    offset = _checks.integer("offset", offset, 0)
    compute = sparsify.compute_for(numerics, tensors if base is None else [base, *tensors])

    axis = sparsify.row_axis(numerics, method, tensors[0].shape)
    moved = axis != -1
    if moved:
        tensors = [x.movedim(axis, -1).contiguous() for x in tensors]
        base = None if base is None else base.movedim(axis, -1).contiguous()

    subtracted = base if inputs == "models" else None
    hashed = ties == "hashed" and method in ("magnitude", "magnitude_outliers")
    rule = sparsify.build_rule(
        subtracted,
        tensors,
        method=method,
        density=density_list,
        gamma=gamma_list,
        epsilon=epsilon_list,
        seed=seed,
        tensor_id=tensor_id,
        offset=offset,
        positions=positions,
        keep_ties=ties == "keep",
        compute=compute,
        backend=backend,
    )
    scales = [1.0] * n
    if hashed and rule.bounds is not None:
        words = {"seed": seed, "tensor_id": tensor_id, "offset": offset}
        tensors = [
            _hashed_delta(subtracted, x, rule.bounds[i : i + 1], positions[i], rescale, compute, backend, words)
            for i, x in enumerate(tensors)
        ]
        rule, inputs = SparsifyRule(), "deltas"
    elif rescale is not None:
        scales = sparsify.rescaling_factors(subtracted, tensors, rule, compute=compute, backend=backend)
    result = consensus_apply(
        base,
        tensors,
        weight_list,
        inputs=inputs,
        rule=rule,
        scales=scales,
        election=election,
        zero_sign=zero_sign,
        divisor=divisor,
        divisor_value=total_divisor(weight_list, compute, numerics) if divisor == "weights" else 1.0,
        lambda_=lambda_,
        compute=compute,
        out=None if moved else out,
        out_dtype=out_dtype,
        backend=backend,
    )
    if not moved:
        return result
    result = result.movedim(-1, axis)
    return result.contiguous() if out is None else out.copy_(result)


def _hashed_delta(
    base: Tensor | None,
    x: Tensor,
    bounds: Tensor,
    position: int,
    rescale: str | None,
    compute: torch.dtype,
    backend: str,
    words: dict[str, int],
) -> Tensor:
    """One sparsified delta whose tied elements were chosen by random words: float32, stored."""
    plain = {"election": "none", "divisor": "none", "compute": compute, "out_dtype": torch.float32, "backend": backend}
    if base is None:
        delta = consensus_apply(None, [x], [1.0], inputs="deltas", **plain)  # type: ignore[arg-type]
    else:
        delta = consensus_apply(None, [x, base], [1.0, -1.0], inputs="deltas", **plain)  # type: ignore[arg-type]
    mask = select.hashed_mask(delta, bounds, model=position, **words)
    kept = torch.where(mask, delta, 0.0)
    if rescale is None:
        return kept
    everything = SparsifyRule()
    sums = sparsify.l1_sums(None, [delta, kept], everything, compute=compute, backend=backend)
    scale = l1_scale(sums[:, 0], compute)
    return consensus_apply(None, [kept], [1.0], inputs="deltas", scales=[scale], **plain)  # type: ignore[arg-type]
