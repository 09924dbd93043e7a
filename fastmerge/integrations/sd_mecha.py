"""fastmerge's methods as merge methods of sd-mecha, under identifiers of their own; importing this registers them.

    import sd_mecha
    from fastmerge.integrations import sd_mecha as fast

    recipe = base + fast.ties_sum(*(model - base for model in models), k=0.2)
    sd_mecha.merge(recipe, output="merged.safetensors")

sd-mecha hands over one tensor at a time, so all thresholds are those of single tensors. A recipe that it writes into a
file names these methods; reading it back takes this import.
"""
# No `from __future__ import annotations`: sd-mecha reads the annotations of the functions below as objects.

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmerge import ops
from fastmerge.backends.rule import SparsifyRule
from fastmerge.errors import ArgumentError, PeerError

__all__ = ["fr_sum", "pcb_sum", "ties_sum", "ties_sum_with_dropout"]

try:
    from sd_mecha import Parameter, Return, merge_method
except ImportError as error:
    _missing = error

    def Parameter(*arguments: Any) -> Any:  # noqa: N802
        """Stands in for sd-mecha's where that cannot be imported."""
        return Any

    Return = Parameter

    def merge_method(*, identifier: str) -> Callable[[Any], Any]:
        """Make a function that says what is missing."""

        def replace(function: Any) -> Any:
            def explain(*arguments: Any, **options: Any) -> Any:
                raise PeerError(f"sd-mecha cannot be imported ({_missing}); install it with `pip install sd-mecha`.")

            explain.__doc__ = function.__doc__
            return explain

        return replace


@merge_method(identifier="fastmerge_ties_sum")
def ties_sum(
    *models: Parameter(Tensor, "delta"),  # type: ignore[valid-type]
    k: Parameter(float) = 0.2,  # type: ignore[valid-type]
    vote_sgn: Parameter(bool) = False,  # type: ignore[valid-type]
) -> Return(Tensor, "delta"):  # type: ignore[valid-type]
    """TIES-Merging (arXiv 2306.01708) of deltas, as sd-mecha's `ties_sum`.

    models: deltas of one shape. k: the share of each that is kept: all elements of at least the magnitude of the
    (max(int((1 - k) * numel), 1))-th smallest. vote_sgn: elect the sign of the sum of values, not of their signs;
    where that is 0, nothing is kept. The result is the mean of what agrees.
    """
    return _ties(models, k, vote_sgn, 1.0)


@merge_method(identifier="fastmerge_ties_sum_with_dropout")
def ties_sum_with_dropout(  # type: ignore[no-untyped-def]
    *models: Parameter(Tensor, "delta"),  # type: ignore[valid-type]
    probability: Parameter(float) = 0.9,  # type: ignore[valid-type]
    rescale: Parameter(bool) = True,  # type: ignore[valid-type]
    k: Parameter(float) = 0.2,  # type: ignore[valid-type]
    vote_sgn: Parameter(bool) = False,  # type: ignore[valid-type]
    seed: Parameter(int) = 0,  # type: ignore[valid-type]
    **context,  # key: what the tensor is called; sd-mecha takes no annotation here
) -> Return(Tensor, "delta"):  # type: ignore[valid-type]
    """DARE (arXiv 2311.03099), then TIES, of deltas.

    probability: of an element to be dropped, below 1. rescale: divide the result by 1 - probability.
    k, vote_sgn: as for `ties_sum`, of what is left. seed: a mask depends on it, on the tensor's key, on the delta's
    place and on the element's place in its tensor, and on nothing else: not on threads or devices.
    """
    if not 0 <= probability < 1:
        raise ArgumentError(f"probability={probability} is out of range; pass a number from 0 to below 1.")
    density = 1 - float(probability)
    dropped = [
        ops.consensus_merge(
            None, [x], 1.0, inputs="deltas", method="bernoulli", density=density, seed=seed,
            tensor_id=ops.tensor_id(context["key"]), model=place, election="none", divisor="none",
        )
        for place, x in enumerate(models)
    ]  # fmt: skip
    return _ties(dropped, k, vote_sgn, 1 / density if rescale else 1.0)


@merge_method(identifier="fastmerge_pcb_sum")
def pcb_sum(
    *models: Parameter(Tensor, "delta"),  # type: ignore[valid-type]
    density: Parameter(float) = 0.1,  # type: ignore[valid-type]
    variant: Parameter(str) = "vision_es",  # type: ignore[valid-type]
) -> Return(Tensor, "delta"):  # type: ignore[valid-type]
    """PCB-Merging (arXiv 2410.02396) of deltas: the parameters of each tensor compete among themselves.

    density: the share of each delta that competes successfully. variant: which formula scores them.
    """
    if not models:
        raise ArgumentError("pcb_sum takes at least one delta.")
    if models[0].numel() == 0:
        return models[0].clone()
    merged: Tensor = ops.pcb_merge(list(models), density=density, variant=variant)
    return merged


@merge_method(identifier="fastmerge_fr_sum")
def fr_sum(
    *models: Parameter(Tensor, "delta"),  # type: ignore[valid-type]
    ratio: Parameter(float) = 0.1,  # type: ignore[valid-type]
    mode: Parameter(str) = "ideal",  # type: ignore[valid-type]
) -> Return(Tensor, "delta"):  # type: ignore[valid-type]
    """FR-Merging (arXiv 2411.16815) of deltas: the sum, and of matrices its low frequencies taken out.

    ratio, mode: of the filter. Tensors that are no matrices are added as they are.
    """
    if not models:
        raise ArgumentError("fr_sum takes at least one delta.")
    added = ops.consensus_apply(
        None, list(models), [1.0] * len(models), inputs="deltas", election="none", divisor="none"
    )  # fmt: skip
    return ops.highpass(added, ratio, mode=mode) if added.dim() == 2 and added.numel() else added


def _ties(deltas: Sequence[Tensor], k: float, vote_sgn: bool, scale: float) -> Tensor:
    if not deltas:
        raise ArgumentError("TIES takes at least one delta.")
    if not 0 <= k <= 1:
        raise ArgumentError(f"k={k} is out of range; pass a number from 0 to 1.")
    first, models = deltas[0], len(deltas)
    if first.numel() == 0:
        return first.clone()
    rank = first.numel() - max(int((1 - k) * first.numel()), 1) + 1
    bounds, ties_before = ops.magnitude_bounds(None, deltas, [0] * models, [rank] * models)
    return ops.consensus_apply(
        None,
        deltas,
        [1.0] * models,
        inputs="deltas",
        rule=SparsifyRule("band", bounds=ops.keep_ties(bounds), ties_before=torch.zeros_like(ties_before)),
        election="total" if vote_sgn else "frequency",
        zero_sign="zero",
        divisor="count",
        lambda_=scale,
    )
