"""NearSwap, SCE, RAM and Arcee Fusion as methods: an oracle in float64, their edges, and what they refuse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastmerge
from fastmerge import ops
from fastmerge.errors import FastmergeError
from fastmerge.methods.ram import factor
from fastmerge.methods.sce import weights_of
from tests.engine.small_family import family
from tests.numeric import assert_bitwise_equal

NAME = "model.layers.0.self_attn.q_proj.weight"
SHAPES = [(), (1,), (301,), (40, 120), (5, 14, 22), (0,)]
METHODS = ("nearswap", "sce", "ram", "ramplus_tl", "arcee_fusion")
LONE = ("nearswap", "arcee_fusion")
GIVEN: dict[str, dict[str, Any]] = {"nearswap": {"t": 1e-4}}

each_method = pytest.mark.parametrize("method", METHODS)
each_shape = pytest.mark.parametrize("shape", SHAPES)
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])


def merged(method: str, base: Tensor, tuned: list[Tensor], **parameters: Any) -> Tensor:
    result = fastmerge.merge(
        [{NAME: x} for x in tuned], base={NAME: base}, method=method, **GIVEN.get(method, {}) | parameters
    )
    return result[NAME]


def drawn(shape: tuple[int, ...], models: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    base, tuned = family(models, dtype, {NAME: shape}, seed=seed)
    return base[NAME], [one[NAME] for one in tuned]


def assert_rounded(actual: Tensor, exact: Tensor, slack: float = 1e-6) -> None:
    """The exact values, rounded to the result's dtype, or what rounding within a little float32 slack gives."""
    unit = torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual.double(), exact, rtol=0.51 * unit + slack, atol=5e-9 + 6e-8 * (unit > 1e-4))


def deltas_of(base: Tensor, tuned: list[Tensor]) -> list[Tensor]:
    """As float32 has them, which is part of the methods' definition."""
    return [(x.float() - base.float()).double() for x in tuned]


# -- formulas


@each_dtype
@each_shape
def test_nearswap(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    base, (x,) = drawn(shape, 1, dtype)
    a, b = base.double(), x.double()
    weight = (1e-4 / (a - b).abs().clamp(min=1e-6)).clamp(0, 1)
    assert_rounded(merged("nearswap", base, [x]), weight * b + (1 - weight) * a)


@each_dtype
@each_shape
@pytest.mark.parametrize("method", ["ram", "ramplus_tl"])
def test_ram(method: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    base, tuned = drawn(shape, 3, dtype)
    epsilon, r, alpha = 2e-4, 0.5, 1.4
    parameters = {"epsilon": epsilon} if method == "ram" else {"epsilon": epsilon, "r": r, "alpha": alpha}
    deltas = deltas_of(base, tuned)
    part = [d.abs() > epsilon for d in deltas]
    count = sum(p.long() for p in part)
    alone, shared = [p & (count == 1) for p in part], [p & (count > 1) for p in part]
    factors = [1.0] * 3
    if method == "ramplus_tl":
        factors = [1 + r * min(int(s.sum()) / max(int(u.sum()), 1), alpha) for s, u in zip(shared, alone)]
    terms = [
        torch.where(u, d * f, 0) + torch.where(s, d, 0) / count.clamp(min=1)
        for u, s, d, f in zip(alone, shared, deltas, factors)
    ]
    assert_rounded(merged(method, base, tuned, **parameters), base.double() + sum(terms))


def sce_by_hand(base: Tensor, tuned: list[Tensor], select_topk: float) -> Tensor:
    """Exact selection by the variances that the op finds; ties by the lowest index."""
    deltas = deltas_of(base, tuned)
    if select_topk < 1:
        variance = ops.model_variance(base, tuned, backend="reference")
        k = int(int((variance != 0).sum()) * select_topk)
        kept = torch.zeros(base.numel(), dtype=torch.bool)
        kept[variance.sort(descending=True, stable=True).indices[:k]] = True
        deltas = [torch.where(kept.view(base.shape), d, 0) for d in deltas]
    energies = [float(d.square().mean()) for d in deltas]
    weights = [e / sum(energies) for e in energies] if sum(energies) >= 1e-6 else [1 / len(deltas)] * len(deltas)
    positive = sum(deltas) >= 0
    agree = [torch.where(positive, d > 0, d < 0) for d in deltas]
    total = sum(w * d * a for w, d, a in zip(weights, deltas, agree))
    return base.double() + total / sum(w * a.double() for w, a in zip(weights, agree)).clamp(min=1e-6)


@each_dtype
@pytest.mark.parametrize("shape", SHAPES[:-1])
@pytest.mark.parametrize("select_topk", [1.0, 0.3, 0.0])
def test_sce(select_topk: float, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    base, tuned = drawn(shape, 3, dtype)
    far = [(base.float() + factor * (x.float() - base.float())).to(dtype) for factor, x in zip((40, 25, 3), tuned)]
    for models in (tuned, far):  # of little energy, so all weights are one, and of much
        exact = sce_by_hand(base, models, select_topk)
        assert_rounded(merged("sce", base, models, select_topk=select_topk), exact, slack=2e-6)


@pytest.mark.parametrize("select_topk", [1.0, 0.5])
def test_sce_divides_by_no_less_than_a_millionth(select_topk: float) -> None:
    base, tuned = drawn((40, 120), 3, torch.float32)
    far = [base + factor * (x - base) for factor, x in zip((3000, 0.4, 0.02), tuned)]
    exact = sce_by_hand(base, far, select_topk)
    unclamped = ops.consensus_merge(base, far[1:], [1e-8, 1e-11], election="total")
    assert (base.double() + (unclamped.double() - base.double()) - exact).abs().max() > 1e-4
    assert_rounded(merged("sce", base, far, select_topk=select_topk), exact, slack=2e-6)
    again = merged("sce", base, far, select_topk=select_topk, backend="reference")
    assert_bitwise_equal(merged("sce", base, far, select_topk=select_topk), again)


def fusion_by_hand(base: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The result, and where a value lies so near the threshold that rounding decides."""
    a, b = base.double(), x.double()
    p, q = (torch.softmax(each, dim=-1) + 1e-8 for each in (b, a))
    divergence = (p * (p / q).log()).sum(dim=-1, keepdim=True)
    score = (b - a).abs() * divergence
    ordered = score.flatten().sort().values
    low, median, high = (ordered[int(q * (ordered.numel() - 1))] for q in (0.25, 0.5, 0.75))
    threshold = median + 1.5 * (high - low)
    return torch.where(score >= threshold, b, a), (score - threshold).abs() <= 2e-3 * threshold


@each_dtype
@pytest.mark.parametrize("shape", SHAPES[1:-1])
def test_arcee_fusion(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    base, (x,) = drawn(shape, 1, dtype)
    x = (base.float() + 30 * (x.float() - base.float())).to(dtype)
    exact, open_ = fusion_by_hand(base, x)
    actual = merged("arcee_fusion", base, [x])
    assert open_.double().mean() < 0.02 or base.numel() == 1
    torch.testing.assert_close(actual.double()[~open_], exact[~open_], rtol=2e-7, atol=0)
    taken = (actual != base).double().mean()
    assert base.numel() < 100 or 0.005 < taken < 0.5


# -- edges


@each_method
def test_models_that_are_the_base_leave_it(method: str) -> None:
    base, _ = drawn((33, 20), 1, torch.bfloat16)
    models = [base.clone()] if method in LONE else [base.clone(), base.clone()]
    assert_bitwise_equal(merged(method, base, models), base)


@pytest.mark.parametrize("method", ["sce", "ram", "ramplus_tl"])
@pytest.mark.parametrize("models", [1, 3])
def test_models_that_agree_are_the_result(method: str, models: int) -> None:
    base, (x,) = drawn((33, 20), 1, torch.bfloat16)
    expected = x
    if method != "sce":
        expected = torch.where((x.float() - base.float()).abs() > 1e-5, x, base)
    if method == "ramplus_tl" and models == 1:
        return  # nothing is shared
    assert_bitwise_equal(merged(method, base, [x] * models), expected)


@pytest.mark.parametrize("models", [1, 2, 5])
def test_sce_selects_nothing_where_all_models_agree(models: int) -> None:
    base, (x,) = drawn((33, 20), 1, torch.bfloat16)
    assert_bitwise_equal(merged("sce", base, [x] * models, select_topk=0.9), base)


def test_sce_takes_the_lowest_index_among_equal_variances() -> None:
    base = torch.zeros(10)
    one = torch.tensor([1.0, -1, 1, 1, 0, 0, 1, 1, 1, 1])
    # Eight variances of 1/4, of which half are selected.
    assert merged("sce", base, [one, torch.zeros(10)], select_topk=0.5).tolist() == [1, -1, 1, 1, 0, 0, 0, 0, 0, 0]


def test_arcee_fusion_takes_what_is_at_the_threshold() -> None:
    base = torch.zeros(8)
    x = torch.tensor([0.5, -0.5] * 4)  # all matter alike, so that the threshold is what they matter
    assert merged("arcee_fusion", base, [x]).tolist() == x.tolist()


def test_ram_with_epsilon_0_counts_every_change() -> None:
    base = torch.zeros(3)
    models = [torch.tensor([1e-30, 2.0, 0.0]), torch.tensor([0.0, 4.0, -0.0])]
    assert merged("ram", base, models, epsilon=0.0).tolist() == [torch.tensor(1e-30).item(), 3.0, 0.0]


@pytest.mark.parametrize(
    ("counts", "expected"), [((0, 0), 1.0), ((5, 0), 1.1), ((1, 10), 1.05), ((9, 3), 1.1), ((0, 7), 1.0)]
)
def test_the_factors_of_ramplus(counts: tuple[int, int], expected: float) -> None:
    assert factor(counts, 0.5, 0.2) == pytest.approx(expected)


def test_the_weights_of_sce() -> None:
    assert weights_of([3e-6, 1e-6]) == [0.75, 0.25]
    assert weights_of([5e-7, 4e-7, 0.0]) == [1 / 3] * 3
    assert weights_of([1e-6]) == [1.0]


@pytest.mark.parametrize("backend", ["reference", "auto"])
@each_method
def test_nan_comes_through_where_it_is_allowed(method: str, backend: str) -> None:
    base, tuned = drawn((8, 16), 1 if method in LONE else 2, torch.float32)
    clean = merged(method, base, tuned, backend=backend)
    tuned[0] = tuned[0].clone()
    tuned[0][3, 4] = math.nan
    with pytest.warns(UserWarning, match="NaN"):
        spoilt = merged(method, base, tuned, backend=backend, on_nonfinite="warn")
    if method == "sce":
        # As in every election, NaN never takes part.
        assert not spoilt.isnan().any()
    else:
        assert spoilt[3, 4].isnan() and int(spoilt.isnan().sum()) == 1
    if method in ("nearswap", "ram"):
        same = torch.ones_like(base, dtype=torch.bool)
        same[3, 4] = False
        assert_bitwise_equal(spoilt[same], clean[same])


# -- what is refused


@each_method
def test_mergekits_rounding_is_refused(method: str) -> None:
    base, tuned = drawn((4,), 1, torch.bfloat16)
    with pytest.raises(FastmergeError, match=f"{method} goes with numerics fp32 only: .* leave numerics out"):
        merged(method, base, tuned, numerics="mergekit")


@pytest.mark.parametrize("method", LONE)
def test_exactly_one_other_model_is_taken(method: str) -> None:
    base, tuned = drawn((4,), 2, torch.bfloat16)
    with pytest.raises(FastmergeError, match=f"{method} merges exactly 1 model besides the base, and 2 are given"):
        merged(method, base, tuned)


def test_nearswap_needs_its_distance() -> None:
    base, tuned = drawn((4,), 1, torch.bfloat16)
    with pytest.raises(FastmergeError, match=r"nearswap needs t \(tensor model.*\): give it once for all models"):
        fastmerge.merge([{NAME: tuned[0]}], base={NAME: base}, method="nearswap")


@pytest.mark.parametrize(
    ("method", "given", "said"),
    [
        ("ram", {"epsilon": -1e-5}, "epsilon is 0 or more"),
        ("ramplus_tl", {"alpha": -0.1}, "alpha is 0 or more"),
        ("sce", {"select_topk": 1.5}, "select_topk is from 0 to 1"),
        ("ram", {"alpha": 0.5}, "ram has no parameter alpha \\(it belongs to ramplus_tl\\)"),
        ("nearswap", {"t": math.inf}, "t is any finite number"),
    ],
)
def test_values_out_of_range(method: str, given: dict[str, Any], said: str) -> None:
    base, tuned = drawn((4,), 1, torch.bfloat16)
    with pytest.raises(FastmergeError, match=said):
        merged(method, base, tuned, **given)


@each_method
def test_a_base_is_needed(method: str) -> None:
    with pytest.raises(FastmergeError, match="name the base model"):
        fastmerge.merge([{NAME: torch.ones(2)}], method=method, **GIVEN.get(method, {}))
