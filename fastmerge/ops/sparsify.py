"""Sparsification: which elements of a delta are kept, the exact L1 mass before and after, and non-finite values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends.rule import L1_LIMBS, SparsifyRule
from ..errors import ArgumentError, ArgumentTypeError
from . import _checks, select
from ._exact import l1_scale
from ._library import define, signed64, unsigned64

METHODS = ("magnitude", "magnitude_outliers", "bernoulli", "della_magprune")
RESCALES = (None, "l1")
NUMERICS = ("fp32", "mergekit")
RULES = ("none", "band", "bernoulli", "della", "mask")

RULE_SCHEMA = (
    "str method, Tensor? bounds, Tensor? ties_before, float[] density, float[] epsilon, SymInt row_length, "
    "int seed, int tensor_id, int[] positions, SymInt offset, Tensor? masks"
)


# -- schema, kernel, fake --------------------------------------------------------------------------------------------


def flatten_rule(rule: SparsifyRule) -> tuple[Any, ...]:
    """The rule as the arguments that RULE_SCHEMA names."""
    return (
        rule.method,
        rule.bounds,
        rule.ties_before,
        list(rule.density),
        list(rule.epsilon),
        rule.row_length,
        signed64(rule.seed),
        signed64(rule.tensor_id),
        list(rule.positions),
        rule.offset,
        rule.masks,
    )


def checked_rule(flat: Sequence[Any], models: int, numel: int, device: torch.device) -> SparsifyRule:
    """The rule of a kernel call, with everything checked that the kernels rely on."""
    method, bounds, ties_before, density, epsilon, row_length, seed, tensor_id, positions, offset, masks = flat
    _checks.choice("rule.method", method, RULES)
    if method == "band":
        if bounds is None or ties_before is None:
            raise ArgumentError('rule.bounds or rule.ties_before is missing; method "band" needs both.')
        select.check_bounds(bounds, ties_before, models, numel, device)
        bounds, ties_before = bounds.contiguous(), ties_before.contiguous()
    elif method == "mask":
        masks = _checked_masks(masks, models, numel, device)
    elif method != "none":
        _checks.one_per_model("rule.density", density, models)
        _checks.one_per_model("rule.positions", positions, models)
        for value in density:
            _checks.real("rule.density", value)
        for position in positions:
            _checks.integer("rule.positions", position, 0, _checks.MAX_POSITION)
        _checks.integer("rule.offset", offset, 0)
    if method == "della":
        _checks.one_per_model("rule.epsilon", epsilon, models)
        for d, e in zip(density, epsilon):
            check_della(d, _checks.real("rule.epsilon", e))
        check_rows(row_length, offset, numel)
    return SparsifyRule(
        method=method,
        bounds=bounds,
        ties_before=ties_before,
        density=list(density),
        epsilon=list(epsilon),
        row_length=row_length,
        seed=unsigned64(seed),
        tensor_id=unsigned64(tensor_id),
        positions=list(positions),
        offset=offset,
        masks=masks,
    )


def _checked_masks(masks: Any, models: int, numel: int, device: torch.device) -> Tensor:
    shape = (models, mask_bytes(numel))
    if not isinstance(masks, Tensor) or masks.dtype != torch.uint8 or masks.shape != shape:
        raise ArgumentError(f"rule.masks must be uint8{list(shape)}, a bit for each element; take it from kept_masks.")
    _checks.same_device("rule.masks", masks, device)
    return masks.contiguous()


def mask_bytes(numel: Any) -> Any:
    """Bytes that hold a bit for each of so many elements."""
    return (numel + 7) // 8


def check_rows(row_length: int, offset: int, numel: int) -> None:
    """Elements are ranked within rows, so a chunk must be made of whole rows."""
    _checks.integer("rule.row_length", row_length, 1)
    if numel % row_length or offset % row_length:
        raise ArgumentError(
            f"rule.row_length={row_length} does not divide the chunk's offset {offset} and size {numel}; "
            "cut chunks between rows."
        )


def _define_per_model(name: str, dtype: torch.dtype, shape: Callable[[Any], tuple[Any, ...]]) -> Callable[..., Any]:
    """Register an op that sweeps a chunk under a rule.

    name: the op's and that of the backends' kernel. dtype, shape: of what it returns for one model of so many elements.
    """

    def kernel(base: Tensor | None, tensors: list[Tensor], compute: torch.dtype, *rest: Any) -> Any:
        *flat, backend = rest
        _checks.models(base, tensors)
        _checks.compute_dtype("compute", compute)
        rule = checked_rule(flat, len(tensors), tensors[0].numel(), tensors[0].device)
        return getattr(backends.resolve(backend, tensors[0].device), name)(
            _checks.optional_contiguous(base), _checks.contiguous(tensors), rule, compute
        )

    def fake(base: Tensor | None, tensors: list[Tensor], compute: torch.dtype, *rest: Any) -> Tensor:
        _checks.models(base, tensors)
        return tensors[0].new_empty((len(tensors), *shape(tensors[0].numel())), dtype=dtype)

    return define(
        f"{name}(Tensor? base, Tensor[] tensors, ScalarType compute, {RULE_SCHEMA}, str backend) -> Tensor",
        kernel,
        fake,
    )


_l1_sums_op = _define_per_model("l1_sums", torch.int64, lambda numel: (2, L1_LIMBS))
_kept_masks_op = _define_per_model("kept_masks", torch.uint8, lambda numel: (mask_bytes(numel),))


def _count_nonfinite(x: Tensor, backend: str = "auto") -> Tensor:
    _checks.kernel_inputs("x", [x])
    return backends.resolve(backend, x.device).count_nonfinite(x.contiguous())


def _count_nonfinite_fake(x: Tensor, backend: str = "auto") -> Tensor:
    return x.new_empty((2,), dtype=torch.int64)


_count_nonfinite_op = define(
    'count_nonfinite(Tensor x, str backend="auto") -> Tensor', _count_nonfinite, _count_nonfinite_fake
)


def _zero_nonfinite_(x: Tensor, backend: str = "auto") -> None:
    _checks.kernel_inputs("x", [x])
    module = backends.resolve(backend, x.device)
    if x.is_contiguous():
        module.zero_nonfinite_(x)
    else:
        dense = x.contiguous()
        module.zero_nonfinite_(dense)
        x.copy_(dense)


def _zero_nonfinite_fake(x: Tensor, backend: str = "auto") -> None:
    return None


_zero_nonfinite_op = define(
    'zero_nonfinite_(Tensor(a!) x, str backend="auto") -> ()', _zero_nonfinite_, _zero_nonfinite_fake
)


# -- public ----------------------------------------------------------------------------------------------------------


def l1_sums(
    base: Tensor | None,
    tensors: Sequence[Tensor],
    rule: SparsifyRule,
    *,
    compute: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """Sum the magnitudes of n models' values (of their deltas, with a base) exactly, before and after sparsifying.

    base, tensors: one shape; a whole tensor or a chunk. rule: what is kept.
    compute: the dtype that the deltas are rounded to.
    Returns int64[n, 2, 12]: [:, 0] of all elements, [:, 1] of the kept ones, as 32-bit limbs, little end first, in
    units of 2**-149; NaN and infinities are left out. Sums of chunks add limb by limb; `l1_scale` makes a factor.
    Errors: ArgumentError / ArgumentTypeError, in a sentence that names the argument.
    """
    sums: Tensor = _l1_sums_op(
        None if base is None else _checks.input_tensor("base", base),
        _checks.input_tensors("tensors", tensors),
        _checks.compute_dtype("compute", compute),
        *flatten_rule(rule),
        backend,
    )
    return sums


def kept_masks(
    base: Tensor | None,
    tensors: Sequence[Tensor],
    rule: SparsifyRule,
    *,
    compute: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """Decide what a rule keeps of n models' values (of their deltas, with a base), once for several uses.

    base, tensors, rule, compute: as in `l1_sums`.
    Returns uint8[n, ceil(numel / 8)], a bit for each element, low bit first: `masks` of the rule "mask".
    Errors: ArgumentError / ArgumentTypeError, in a sentence that names the argument.
    """
    masks: Tensor = _kept_masks_op(
        None if base is None else _checks.input_tensor("base", base),
        _checks.input_tensors("tensors", tensors),
        _checks.compute_dtype("compute", compute),
        *flatten_rule(rule),
        backend,
    )
    return masks


def count_nonfinite(x: Tensor, *, backend: str = "auto") -> Tensor:
    """Count the NaNs and the infinities of a tensor.

    x: any shape; float32, bfloat16, float16, or float64 (rounded to float32 first: what is too large for float32
        counts as infinite).
    Returns int64[2]: NaNs, infinities. Errors: ArgumentError / ArgumentTypeError naming the argument.
    """
    counts: Tensor = _count_nonfinite_op(_checks.input_tensor("x", x), backend)
    return counts


def zero_nonfinite_(x: Tensor, *, backend: str = "auto") -> Tensor:
    """Replace every NaN and infinity of a tensor by +0, in place.

    x: any shape and strides; float32, bfloat16 or float16. Returns x.
    Errors: ArgumentError / ArgumentTypeError naming the argument.
    """
    checked = _checks.tensor("x", x)
    if checked.dtype == torch.float64:
        raise ArgumentTypeError("x has dtype float64, which is not changed in place; convert it with .float() first.")
    _zero_nonfinite_op(checked, backend)
    return x


def compute_for(numerics: str, tensors: Sequence[Tensor]) -> torch.dtype:
    """The dtype that intermediate results are rounded to: float32, or with "mergekit" the inputs' promoted dtype."""
    if _checks.choice("numerics", numerics, NUMERICS) == "fp32":
        return torch.float32
    compute = tensors[0].dtype
    for x in tensors[1:]:
        compute = torch.promote_types(compute, x.dtype)
    return compute


def row_axis(numerics: str, method: str | None, shape: Sequence[int]) -> int:
    """The dimension along which DELLA ranks: the last; the peer's, dimension 1, when following the peer."""
    follows_peer = numerics == "mergekit" and method == "della_magprune" and len(shape) > 2
    return 1 if follows_peer else -1


def check_della(density: float, epsilon: float) -> None:
    """The probabilities density - epsilon .. density + epsilon must lie inside (0, 1)."""
    if 0 < density < 1 and (density - epsilon <= 0 or density + epsilon >= 1):
        raise ArgumentError(
            f"epsilon={epsilon} is too large for density={density}; choose them so that density - epsilon > 0 "
            "and density + epsilon < 1."
        )


def build_rule(
    base: Tensor | None,
    tensors: Sequence[Tensor],
    *,
    method: str | None,
    density: Sequence[float],
    gamma: Sequence[float],
    epsilon: Sequence[float],
    seed: int,
    tensor_id: int,
    offset: int,
    positions: Sequence[int],
    keep_ties: bool,
    compute: torch.dtype,
    backend: str,
) -> SparsifyRule:
    """The rule for one whole tensor of n models: finds the rank bounds where the method needs them."""
    if method is None or all(d >= 1 for d in density):
        return SparsifyRule()
    if method in ("magnitude", "magnitude_outliers"):
        numel = tensors[0].numel()
        outliers = method == "magnitude_outliers"
        ranges = [select.rank_range(numel, d, g if outliers else None) for d, g in zip(density, gamma)]
        first, last = [r[0] for r in ranges], [r[1] for r in ranges]
        bounds, ties = select.magnitude_bounds(base, tensors, first, last, compute=compute, backend=backend)
        return SparsifyRule("band", bounds=select.keep_ties(bounds) if keep_ties else bounds, ties_before=ties)
    for d, e in zip(density, epsilon):
        if method == "della_magprune":
            check_della(d, e)
    shape = tensors[0].shape
    return SparsifyRule(
        "bernoulli" if method == "bernoulli" else "della",
        density=list(density),
        epsilon=list(epsilon),
        row_length=max(1, shape[-1] if shape else 1),
        seed=unsigned64(seed),
        tensor_id=unsigned64(tensor_id),
        positions=list(positions),
        offset=offset,
    )


def rescaling_factors(
    base: Tensor | None,
    tensors: Sequence[Tensor],
    rule: SparsifyRule,
    *,
    compute: torch.dtype,
    backend: str,
) -> list[float]:
    """One factor per model that gives its sparsified delta the L1 norm back."""
    if rule.method == "none":
        return [1.0] * len(tensors)
    # The peer takes these ratios in float32 where its random masks meet float16.
    in_float32 = compute == torch.float16 and rule.method in ("bernoulli", "della")
    sums = l1_sums(base, tensors, rule, compute=compute, backend=backend)
    return [l1_scale(limbs, torch.float32 if in_float32 else compute) for limbs in sums]


def sparsify(
    x: Tensor,
    density: float,
    *,
    method: str = "magnitude",
    rescale: str | None = None,
    gamma: float = 0.01,
    epsilon: float = 0.15,
    seed: int = 0,
    tensor_id: int = 0,
    offset: int = 0,
    model: int = 0,
    ties: str = "lowest_index",
    numerics: str = "fp32",
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Set all but a fraction of a delta to zero.

    x: a delta; any shape; float32, bfloat16, float16, or float64 (rounded to float32 first).
    density: the fraction to keep, in [0, 1]; 1 returns x unchanged (but for the bits of NaNs), 0 returns zeros.
    method: "magnitude" keeps the max(1, int(density * N)) largest magnitudes; "magnitude_outliers" drops the
        int(gamma * N) largest and keeps the int(density * N) next; "bernoulli" keeps each element with probability
        `density`; "della_magprune" with probability (density - epsilon) + 2 epsilon r, r in [0, 1] the rank of its
        magnitude within its row (the last dimension; a vector is one row).
    rescale: None, or "l1" to multiply what is kept by the ratio of the L1 norms before and after.
    seed, tensor_id, model, offset: what the random words depend on: any integers mod 2**64, the model's position (0 to
        4095), and the flat index of x's first element in its tensor. Thresholds are those of x itself.
    ties: as in `topk_mask`, for the two magnitude methods; "hashed" needs temporaries of x's size.
    numerics: "fp32" rounds once, at the end; "mergekit" rounds every step to x's dtype and, for della on three or more
        dimensions, ranks along dimension 1 as mergekit does (in a copy whose order the random words follow).
    out: a contiguous float32, bfloat16 or float16 tensor of x's shape to write to; it may not overlap x.
    Returns a tensor of x's shape and dtype, or `out`.
    Errors: ArgumentError / ArgumentTypeError, in a sentence that names the argument.
    Source: TIES (arXiv 2306.01708), Model Breadcrumbs (2312.06795), DARE (2311.03099), DELLA (2406.11617), with the
        conventions of mergekit 0.1.5 (docs/methods.md).
    """
    from . import consensus

    dtype = x.dtype if isinstance(x, Tensor) else None
    x = _checks.input_tensor("x", x)
    _checks.choice("method", method, METHODS)
    return consensus.consensus_merge(
        None,
        [x],
        [1.0],
        inputs="deltas",
        density=_checks.fraction("density", density),
        method=method,
        rescale=rescale,
        gamma=gamma,
        epsilon=epsilon,
        seed=seed,
        tensor_id=tensor_id,
        offset=offset,
        model=model,
        election="none",
        divisor="none",
        ties=ties,
        numerics=numerics,
        out_dtype=dtype if out is None else None,
        out=out,
        backend=backend,
    )
