"""Every method against its formula, written out with whole tensors in plain torch: equal bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastmerge
from fastmerge import ops
from fastmerge.reference import random
from tests.engine.small_family import OTHER_FORMULAS, family
from tests.numeric import assert_bitwise_equal

WEIGHTS = [0.7, -0.2, 0.45]
NAME = "model.layers.0.self_attn.q_proj.weight"
CONSENSUS = {"ties", "dare_ties", "breadcrumbs_ties", "della"}
NORMALIZED = {"linear", "ties", "della"}
RESCALED = {"dare_linear", "dare_ties", "della", "della_linear"}

FORMULA = [name for name in fastmerge.methods.names() if name not in ("pcb", "fr", *OTHER_FORMULAS)]
"""Those of the one formula. The others have theirs in tests/ops/test_pcb.py, test_fr.py, test_geometry.py and
test_importance.py."""

Mask = Callable[[Tensor, int], Tensor]


def by_rank(first: int, last: int) -> Mask:
    """Ranks [first, last) by falling magnitude; equals by rising index."""

    def mask(delta: Tensor, model: int) -> Tensor:
        order = delta.abs().flatten().sort(descending=True, stable=True).indices
        result = torch.zeros(delta.numel(), dtype=torch.bool)
        result[order[first:last]] = True
        return result.view(delta.shape)

    return mask


def words(delta: Tensor, model: int, purpose: int) -> Tensor:
    """The random words of a whole tensor."""
    stream = random.stream_id(purpose, model)
    return random.words(0, delta.numel(), seed=11, tensor_id=ops.tensor_id(NAME), stream=stream).view(delta.shape)


def dropped_evenly(density: float) -> Mask:
    return lambda delta, model: words(delta, model, random.BERNOULLI) < math.floor(density * 2**32)


def dropped_by_rank(density: float, epsilon: float) -> Mask:
    def mask(delta: Tensor, model: int) -> Tensor:
        rows = delta.abs() if delta.dim() > 1 else delta.abs().reshape(1, -1)
        length = rows.shape[-1]
        smaller = (rows[..., None, :] < rows[..., :, None]).sum(-1)
        not_larger = (rows[..., None, :] <= rows[..., :, None]).sum(-1) - 1
        rank = torch.full(rows.shape, 0.5, dtype=torch.float64)
        if length > 1:
            rank = (smaller + not_larger).to(torch.float64) / (2 * (length - 1))
        probability = (density - epsilon) + 2 * epsilon * rank
        threshold = torch.floor(probability * 2**32).to(torch.int64).view(delta.shape)
        return words(delta, model, random.DELLA) < threshold

    return mask


def expected(method: str, base: Tensor, tuned: list[Tensor], mask: Mask | None, lambda_: float = 1.0) -> Tensor:
    """The formula, float32 from left to right."""
    if method == "linear":
        total = sum_in_order([w * x.float() for w, x in zip(weights32(), tuned, strict=True)])
        return (total / sum_in_order(weights32())).to(base.dtype)
    terms = []
    for model, x in enumerate(tuned):
        delta = x.float() - base.float()
        kept = delta if mask is None else torch.where(mask(delta, model), delta, torch.tensor(0.0))
        if mask is not None and method in RESCALED:
            after = math.fsum(kept.abs().flatten().tolist())
            if after >= 1e-7:
                kept = kept * torch.tensor(math.fsum(delta.abs().flatten().tolist()) / after, dtype=torch.float32)
        terms.append(kept * weights32()[model])
    divisor = sum_in_order(weights32())
    if method in CONSENSUS:
        majority = torch.where(sum_in_order(terms) >= 0, 1.0, -1.0)
        part = [(term.sign() == majority) for term in terms]
        terms = [torch.where(p, term, torch.tensor(0.0)) for p, term in zip(part, terms, strict=True)]
        divisor = sum_in_order([torch.where(p, w, torch.tensor(0.0)) for p, w in zip(part, weights32(), strict=True)])
        divisor = torch.where(divisor == 0, torch.tensor(1.0), divisor)
    mixed = sum_in_order(terms)
    if method in NORMALIZED:
        mixed = mixed / divisor
    return (base.float() + mixed * torch.tensor(lambda_)).to(base.dtype)


def weights32() -> list[Tensor]:
    return [torch.tensor(w, dtype=torch.float32) for w in WEIGHTS]


def sum_in_order(terms: list[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def masks(method: str, numel: int, density: float) -> Mask | None:
    if method in ("linear", "task_arithmetic"):
        return None
    if method == "ties":
        return by_rank(0, max(1, int(density * numel)))
    if method.startswith("breadcrumbs"):
        top = min(int(0.05 * numel), numel - int(density * numel))
        return by_rank(top, top + int(density * numel))
    if method.startswith("dare"):
        return dropped_evenly(density)
    return dropped_by_rank(density, 0.2)


def parameters(method: str, density: float) -> dict[str, Any]:
    given: dict[str, Any] = {} if method == "linear" else {"density": density}
    if method.startswith("breadcrumbs"):
        given["gamma"] = 0.05
    if method.startswith("della"):
        given["epsilon"] = 0.2
    return given


SHAPES = [(), (1,), (301,), (40, 120), (5, 14, 22)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("method", FORMULA)
def test_the_method_is_its_formula(method: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    base, tuned = family(3, dtype, {NAME: shape})
    result = fastmerge.merge(tuned, base=base if method != "linear" else None, method=method, weight=WEIGHTS, seed=11,
                             **parameters(method, 0.4))  # fmt: skip
    mask = masks(method, base[NAME].numel(), 0.4)
    assert_bitwise_equal(result[NAME], expected(method, base[NAME], [one[NAME] for one in tuned], mask))


@pytest.mark.parametrize("method", [name for name in FORMULA if name != "linear"])
def test_density_1_keeps_the_deltas_untouched_and_lambda_scales_them(method: str) -> None:
    base, tuned = family(3, torch.float32, {NAME: (33, 20)})
    result = fastmerge.merge(tuned, base=base, method=method, weight=WEIGHTS, density=1.0, lambda_=0.3)
    assert_bitwise_equal(result[NAME], expected(method, base[NAME], [one[NAME] for one in tuned], None, 0.3))


@pytest.mark.parametrize(
    "method", sorted(set(fastmerge.methods.names()) - {"linear", "task_arithmetic", "fr", *OTHER_FORMULAS})
)
def test_density_0_leaves_the_base(method: str) -> None:
    base, tuned = family(2, torch.bfloat16, {NAME: (33, 20)})
    result = fastmerge.merge(tuned, base=base, method=method, weight=1.0, density=0.0)
    assert_bitwise_equal(result[NAME], base[NAME])


def test_densities_may_differ_between_models_and_reach_0_and_1() -> None:
    base, tuned = family(3, torch.float32, {NAME: (33, 20)})
    result = fastmerge.merge(tuned, base=base, method="ties", weight=WEIGHTS, density=[0.0, 1.0, 0.25])
    numel = base[NAME].numel()
    last = [0, numel, numel // 4]
    mask: Mask = lambda delta, model: by_rank(0, last[model])(delta, model)  # noqa: E731
    assert_bitwise_equal(result[NAME], expected("ties", base[NAME], [one[NAME] for one in tuned], mask))


def test_normalize_can_be_turned_off_and_on() -> None:
    base, tuned = family(3, torch.float32, {NAME: (33, 20)})
    deltas = [one[NAME] - base[NAME] for one in tuned]
    mixed = sum_in_order([w * d for w, d in zip(weights32(), deltas, strict=True)])
    on = fastmerge.merge(tuned, base=base, method="task_arithmetic", weight=WEIGHTS, normalize=True)
    assert_bitwise_equal(on[NAME], base[NAME] + mixed / sum_in_order(weights32()))
    off = fastmerge.merge(tuned, method="linear", weight=WEIGHTS, normalize=False)
    assert_bitwise_equal(off[NAME], sum_in_order([w * one[NAME] for w, one in zip(weights32(), tuned, strict=True)]))


def test_weights_that_cancel_count_as_1_where_there_is_no_election() -> None:
    base, tuned = family(2, torch.float32, {NAME: (33, 20)})
    result = fastmerge.merge(tuned, base=base, method="task_arithmetic", weight=[0.5, -0.5], normalize=True)
    d = [one[NAME] - base[NAME] for one in tuned]
    assert_bitwise_equal(result[NAME], base[NAME] + (0.5 * d[0] + -0.5 * d[1]))


def test_rescale_gives_ties_the_l1_norm_back() -> None:
    base, tuned = family(1, torch.float32, {NAME: (33, 20)})
    result = fastmerge.merge(tuned, base=base, method="ties", weight=1.0, density=0.3, rescale=True)
    delta = tuned[0][NAME] - base[NAME]
    merged = (result[NAME].double() - base[NAME].double()).abs().sum()
    assert abs(float(merged / delta.double().abs().sum()) - 1) < 1e-3


@pytest.mark.parametrize("method", ["della", "della_linear"])
def test_mergekit_numerics_rank_dimension_1_of_tensors_with_three(method: str) -> None:
    base, tuned = family(3, torch.float32, {NAME: (5, 14, 22)})
    turned = [{NAME: one[NAME].movedim(1, -1).contiguous()} for one in (base, *tuned)]
    common: dict[str, Any] = {"method": method, "weight": WEIGHTS, "density": 0.5, "epsilon": 0.2, "seed": 11}
    peer = fastmerge.merge(tuned, base=base, numerics="mergekit", **common)
    same = fastmerge.merge(turned[1:], base=turned[0], **common)
    if method == "della":
        assert_bitwise_equal(peer[NAME], same[NAME].movedim(-1, 1).contiguous())
    assert not torch.equal(peer[NAME], fastmerge.merge(tuned, base=base, **common)[NAME])


def test_linear_in_mergekit_numerics_is_a_chain_of_fused_multiply_adds() -> None:
    from fractions import Fraction

    _, tuned = family(3, torch.float32, {NAME: (30, 40)})
    result = fastmerge.merge(tuned, method="linear", weight=WEIGHTS, normalize=False, numerics="mergekit")
    for index in range(0, 1200, 7):
        total = 0.0
        for weight, one in zip(weights32(), tuned, strict=True):
            exact = Fraction(weight.item()) * Fraction(one[NAME].flatten()[index].item()) + Fraction(total)
            total = _nearest_float32(exact)
        assert result[NAME].flatten()[index].item() == total


def _nearest_float32(exact: Any) -> float:
    """The float32 nearest to a fraction, found among the neighbours of its float64."""
    near = torch.tensor(float(exact), dtype=torch.float64).to(torch.float32)
    around = [near, torch.nextafter(near, torch.tensor(-torch.inf)), torch.nextafter(near, torch.tensor(torch.inf))]
    return min((x.item() for x in around), key=lambda x: abs(type(exact)(x) - exact))
