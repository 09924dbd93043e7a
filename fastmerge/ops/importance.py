"""How much each place matters: variances, energies, divergences and counts, and the merges NearSwap and RAM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends.rule import L1_LIMBS
from ..errors import ArgumentError
from . import _checks
from ._library import define
from .sparsify import mask_bytes

# -- schema, kernel, fake --------------------------------------------------------------------------------------------


def _define_found(
    name: str, arguments: str, dtype: torch.dtype, shape: Callable[..., tuple[Any, ...]], check: Callable[..., None]
) -> Callable[..., Any]:
    """Register an op that finds something about a base and n models.

    arguments: its other ones, as the schema has them. shape(tensors, *those): of what it returns. check(tensors,
    *those): raises where they do not fit.
    """

    def kernel(base: Tensor, tensors: list[Tensor], *rest: Any) -> Any:
        *given, backend = rest
        _checks.models(base, tensors)
        check(tensors, *given)
        function = getattr(backends.resolve(backend, base.device), name)
        dense = [x.contiguous() if isinstance(x, Tensor) else x for x in given]
        return function(base.contiguous(), _checks.contiguous(tensors), *dense)

    def fake(base: Tensor, tensors: list[Tensor], *rest: Any) -> Tensor:
        *given, _ = rest
        _checks.models(base, tensors)
        return base.new_empty(shape(tensors, *given), dtype=dtype)

    return define(f"{name}(Tensor base, Tensor[] tensors, {arguments}str backend) -> Tensor", kernel, fake)


def _define_merge(name: str, arguments: str, check: Callable[..., None]) -> tuple[Callable[..., Any], ...]:
    """Register a merge of a base and n models twice: with a new tensor, and into one that is given."""

    def run(out: Tensor, base: Tensor, tensors: list[Tensor], *rest: Any) -> None:
        *given, backend = rest
        check(tensors, *given)
        function = getattr(backends.resolve(backend, out.device), name)
        function(base.contiguous(), _checks.contiguous(tensors), *given, out)

    def fresh(base: Tensor, tensors: list[Tensor], *rest: Any) -> Tensor:
        *given, out_dtype, backend = rest
        _checks.models(base, tensors)
        _checks.kernel_out_dtype(out_dtype)
        out = torch.empty(base.shape, dtype=out_dtype, device=base.device)
        run(out, base, tensors, *given, backend)
        return out

    def fresh_fake(base: Tensor, tensors: list[Tensor], *rest: Any) -> Tensor:
        _checks.models(base, tensors)
        _checks.kernel_out_dtype(rest[-2])
        return base.new_empty(base.shape, dtype=rest[-2])

    def into(base: Tensor, tensors: list[Tensor], *rest: Any) -> None:
        *given, out, backend = rest
        _checks.models(base, tensors)
        _checks.target("out", out, base.shape, (base, *tensors))
        run(out, base, tensors, *given, backend)

    def into_fake(base: Tensor, tensors: list[Tensor], *rest: Any) -> None:
        _checks.models(base, tensors)

    start = f"(Tensor base, Tensor[] tensors, {arguments}"
    return (
        define(f"{name}{start}ScalarType out_dtype, str backend) -> Tensor", fresh, fresh_fake),
        define(f"{name}_out{start}Tensor(a!) out, str backend) -> ()", into, into_fake),
    )


def _check_one(tensors: Sequence[Tensor], *_: Any) -> None:
    if len(tensors) != 1:
        raise ArgumentError(f"tensors has {len(tensors)} entries; this takes exactly one model besides the base.")


def _check_nearswap(tensors: Sequence[Tensor], t: float) -> None:
    _check_one(tensors)
    _checks.real("t", t)


def _check_epsilon(tensors: Sequence[Tensor], epsilon: float) -> None:
    if _checks.real("epsilon", epsilon) < 0:
        raise ArgumentError(f"epsilon={epsilon} is negative; pass the magnitude up to which a delta counts as none.")


def _check_ram(tensors: Sequence[Tensor], factors: Sequence[float], epsilon: float) -> None:
    _checks.one_per_model("factors", factors, len(tensors))
    for factor in factors:
        _checks.real("factors", factor)
    _check_epsilon(tensors, epsilon)


def _check_mask(tensors: Sequence[Tensor], mask: Tensor | None) -> None:
    if mask is None:
        return
    size = mask_bytes(tensors[0].numel())
    if mask.dtype != torch.uint8 or mask.shape != (size,):
        raise ArgumentError(f"mask must be uint8[{size}], a bit for each element; take a row of what kept_masks gives.")
    _checks.same_device("mask", mask, tensors[0].device)


def _check_rows(tensors: Sequence[Tensor], row_length: int) -> None:
    _check_one(tensors)
    _checks.integer("row_length", row_length, 1)
    if tensors[0].numel() % row_length:
        raise ArgumentError(
            f"row_length={row_length} does not divide the {tensors[0].numel()} elements; pass whole rows."
        )


def _check_divergence(tensors: Sequence[Tensor], divergence: Tensor, row_length: int) -> None:
    _check_rows(tensors, row_length)
    rows = tensors[0].numel() // row_length
    if divergence.dtype != torch.float32 or divergence.shape != (rows,):
        raise ArgumentError(f"divergence must be float32[{rows}], one for each row; take it from divergences.")
    _checks.same_device("divergence", divergence, tensors[0].device)


def _flat(tensors: Sequence[Tensor], *_: Any) -> tuple[Any, ...]:
    return (tensors[0].numel(),)


_nearswap_op, _nearswap_out_op = _define_merge("nearswap", "float t, ", _check_nearswap)
_ram_apply_op, _ram_apply_out_op = _define_merge("ram_apply", "float[] factors, float epsilon, ", _check_ram)
_ram_counts_op = _define_found(
    "ram_counts", "float epsilon, ", torch.int64, lambda tensors, epsilon: (len(tensors), 2), _check_epsilon
)
_model_variance_op = _define_found("model_variance", "", torch.float32, _flat, lambda tensors: None)
_energy_sums_op = _define_found(
    "energy_sums", "Tensor? mask, ", torch.int64, lambda tensors, mask: (len(tensors), L1_LIMBS), _check_mask
)
_divergences_op = _define_found(
    "divergences",
    "SymInt row_length, ",
    torch.float32,
    lambda tensors, row_length: (tensors[0].numel() // row_length,),
    _check_rows,
)
_importance_op = _define_found(
    "importance", "Tensor divergence, SymInt row_length, ", torch.float32, _flat, _check_divergence
)


# -- public ----------------------------------------------------------------------------------------------------------


def _merged(
    ops: tuple[Callable[..., Any], Callable[..., Any]],
    base: Any,
    tensors: Sequence[Tensor],
    arguments: tuple[Any, ...],
    out: Tensor | None,
    out_dtype: torch.dtype | None,
    backend: str,
) -> Tensor:
    fresh, into = ops
    original = _checks.tensor("base", base)
    given = _checks.input_tensor("base", base), _checks.input_tensors("tensors", tensors), *arguments
    if out is not None:
        _checks.out_tensor(out, out_dtype)
        into(*given, out.detach() if out.requires_grad else out, backend)
        return out
    wanted = _checks.out_dtype(original.dtype if out_dtype is None else out_dtype)
    wide = wanted == torch.float64
    result: Tensor = fresh(*given, torch.float32 if wide else wanted, backend)
    return result.to(torch.float64) if wide else result


def nearswap(
    base: Tensor,
    x: Tensor,
    t: float,
    *,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Move each element of the base towards the model's, the farther the nearer the two are.

        w = clamp(t / max(|x - base|, 1e-6), 0, 1)        out = w x + (1 - w) base

    base, x: one shape and device, any dtypes of float32, bfloat16, float16 or float64 (rounded to float32 first); a
    whole tensor or a chunk. t: the distance up to which the model's value is taken; finite.
    out, out_dtype: as in `consensus_merge`.
    Returns the merged tensor, rounded once, or `out`.
    Errors: ArgumentError / ArgumentTypeError, in a sentence that names the argument.
    Source: NearSwap (huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001), as in mergekit 0.1.5.
    """
    merges = _nearswap_op, _nearswap_out_op
    return _merged(merges, base, [x], (_checks.real("t", t),), out, out_dtype, backend)


def ram_apply(
    base: Tensor,
    tensors: Sequence[Tensor],
    factors: float | Sequence[float],
    *,
    epsilon: float = 1e-5,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Put the mean of the deltas that are no zeros on the base; what one model alone changed is scaled.

    base, tensors: one shape and device, dtypes as in `nearswap`; a whole tensor or a chunk. factors: what each model's
    delta is multiplied by where it alone takes part: one number, or one per model; finite. epsilon: a delta takes part
    where its magnitude is above; 0 or more. out, out_dtype: as in `consensus_merge`.
    Returns the merged tensor, rounded once, or `out`.
    Errors: ArgumentError / ArgumentTypeError, in a sentence that names the argument.
    Source: Reinforced Agent Merging, arXiv 2601.13572, as in mergekit 0.1.5.
    """
    listed = _checks.tensor_list("tensors", tensors)
    each = [_checks.real("factors", factor) for factor in _checks.per_model("factors", factors, len(listed))]
    merges = _ram_apply_op, _ram_apply_out_op
    return _merged(merges, base, listed, (each, _checks.real("epsilon", epsilon)), out, out_dtype, backend)


def ram_counts(base: Tensor, tensors: Sequence[Tensor], *, epsilon: float = 1e-5, backend: str = "auto") -> Tensor:
    """Count where each model's delta takes part, together with others and alone.

    base, tensors, epsilon: as in `ram_apply`. Returns int64[n, 2]: shared, unique; counts of chunks add.
    Errors: ArgumentError / ArgumentTypeError, in a sentence that names the argument.
    """
    found: Tensor = _ram_counts_op(*_given(base, tensors), _checks.real("epsilon", epsilon), backend)
    return found


def model_variance(base: Tensor, tensors: Sequence[Tensor], *, backend: str = "auto") -> Tensor:
    """The variance of n models' deltas at each place, about their mean, divided by n.

    base, tensors: one shape and device, dtypes as in `nearswap`; a whole tensor or a chunk.
    Returns float32[numel], flat; 0 exactly where all models agree.
    Errors: ArgumentError / ArgumentTypeError, in a sentence that names the argument.
    Source: SCE of FuseChat, arXiv 2408.07990.
    """
    found: Tensor = _model_variance_op(*_given(base, tensors), backend)
    return found


def energy_sums(
    base: Tensor, tensors: Sequence[Tensor], *, mask: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Sum the squares of each model's delta exactly, over what a mask keeps.

    base, tensors: as in `model_variance`. mask: uint8[ceil(numel / 8)], a bit for each element, low bit first; None
    keeps all. Returns int64[n, 12], limbs as those of `l1_sums`: of the squares, each rounded to float32; those that
    are not finite are left out. Sums of chunks add; `l1_mass` makes a number of one.
    Errors: ArgumentError / ArgumentTypeError, in a sentence that names the argument.
    """
    found: Tensor = _energy_sums_op(*_given(base, tensors), mask, backend)
    return found


def divergences(base: Tensor, x: Tensor, row_length: int, *, backend: str = "auto") -> Tensor:
    """How far the softmax of each row of a model is from that of the base: Kullback and Leibler's divergence.

        p = softmax(x) + 1e-8, q = softmax(base) + 1e-8                sum (p log(p / q) - p + q)

    base, x: whole rows, dtypes as in `nearswap`. row_length: elements of a row.
    Returns float32[rows]. exp and log are fastmerge's own, sums halve the row until one element is left. The sum of
    q - p is 0; with it no term is below 0, and where rows are near each other nothing cancels.
    Errors: ArgumentError / ArgumentTypeError, in a sentence that names the argument.
    Source: Arcee Fusion (arcee.ai), as in mergekit 0.1.5.
    """
    found: Tensor = _divergences_op(*_given(base, [x]), _checks.integer("row_length", row_length, 1), backend)
    return found


def importance(base: Tensor, x: Tensor, divergence: Tensor, row_length: int, *, backend: str = "auto") -> Tensor:
    """How much each element of a model matters: |x - base| times the divergence of its row.

    base, x, row_length: as in `divergences`. divergence: what that found, float32[rows].
    Returns float32[numel], flat.
    Errors: ArgumentError / ArgumentTypeError, in a sentence that names the argument.
    Source: Arcee Fusion (arcee.ai), as in mergekit 0.1.5.
    """
    length = _checks.integer("row_length", row_length, 1)
    found: Tensor = _importance_op(*_given(base, [x]), _checks.tensor("divergence", divergence), length, backend)
    return found


def _given(base: Any, tensors: Any) -> tuple[Tensor, list[Tensor]]:
    return _checks.input_tensor("base", base), _checks.input_tensors("tensors", tensors)
