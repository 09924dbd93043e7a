"""The importance family's definitions against their formulas, written out plainly in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastmerge.reference import importance
from tests.numeric import assert_bitwise_equal

SHAPE = (9, 37)


def drawn(seed: int, models: int, dtype: torch.dtype = torch.float32, spread: float = 1e-3) -> list[Tensor]:
    """A base and models near it, some deltas of which are 0."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(SHAPE, generator=generator)
    deltas = [torch.randn(SHAPE, generator=generator) * spread for _ in range(models)]
    kept = [torch.rand(SHAPE, generator=generator) < 0.6 for _ in range(models)]
    return [x.to(dtype) for x in (base, *(torch.where(k, base + d, base) for k, d in zip(kept, deltas)))]


def deltas_of(base: Tensor, tensors: list[Tensor]) -> list[list[float]]:
    """The deltas as they are in float32, which is part of the definition."""
    return [(x.float() - base.float()).flatten().tolist() for x in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("t", [1e-3, 0.0, -1.0, 10.0])
def test_nearswap(t: float, dtype: torch.dtype) -> None:
    base, x = drawn(0, 1, dtype)
    out = torch.empty(SHAPE, dtype=torch.float32)
    importance.nearswap(base, [x], t, out)
    for a, b, merged in zip(base.flatten().tolist(), x.flatten().tolist(), out.flatten().tolist()):
        weight = min(max(t / max(abs(a - b), 1e-6), 0.0), 1.0)
        assert math.isclose(merged, weight * b + (1 - weight) * a, rel_tol=3e-7, abs_tol=1e-12)


def test_nearswap_takes_the_model_where_both_are_near_and_keeps_what_is_not_finite() -> None:
    base = torch.tensor([1.0, 1.0, 1.0, math.nan, 1.0, 2.0, 0.0])
    x = torch.tensor([1.0 + 2**-20, 3.0, 1.0, 1.0, math.nan, math.inf, 1e-40])
    out = torch.empty(7)
    importance.nearswap(base, [x], 0.5, out)
    assert out[:3].tolist() == [1.0 + 2**-20, 1.5, 1.0]
    assert out[3:5].isnan().all() and out[5].isnan() and out[6] == 1e-40


@pytest.mark.parametrize("epsilon", [0.0, 1e-5, 1e-3, 5.0])
@pytest.mark.parametrize("models", [1, 2, 3, 5])
def test_ram(models: int, epsilon: float) -> None:
    base, *tensors = drawn(models, models)
    factors = [1.0 + 0.25 * i for i in range(models)]
    out = torch.empty(SHAPE)
    importance.ram_apply(base, tensors, factors, epsilon, out)
    counts = importance.ram_counts(base, tensors, epsilon)
    shared, alone = [0] * models, [0] * models
    deltas = deltas_of(base, tensors)
    least = torch.tensor(epsilon, dtype=torch.float32).item()
    for place, start in enumerate(base.flatten().tolist()):
        part = [i for i in range(models) if abs(deltas[i][place]) > least]
        mixed = sum(deltas[i][place] for i in part) / max(len(part), 1)
        if len(part) == 1:
            mixed *= factors[part[0]]
        for i in part:
            shared[i] += len(part) > 1
            alone[i] += len(part) == 1
        assert math.isclose(out.flatten()[place].item(), start + mixed, rel_tol=3e-7, abs_tol=1e-9)
    assert counts.tolist() == [list(pair) for pair in zip(shared, alone)]
    assert epsilon == 5.0 or sum(shared) + sum(alone) > 0


def test_ram_leaves_out_what_is_as_large_as_epsilon() -> None:
    base, out = torch.zeros(3), torch.empty(3)
    x = torch.tensor([0.5, -0.5, 0.75])
    importance.ram_apply(base, [x], [1.0], 0.5, out)
    assert out.tolist() == [0.0, 0.0, 0.75]
    assert importance.ram_counts(base, [x], 0.5).tolist() == [[0, 1]]


def test_ram_lets_nan_through() -> None:
    base = torch.tensor([0.0, 0.0, math.nan])
    out = torch.empty(3)
    importance.ram_apply(
        base, [torch.tensor([math.nan, 1.0, 0.0]), torch.tensor([1.0, 0.5, 0.0])], [1.0, 1.0], 0.1, out
    )
    assert out[0].isnan() and out[1] == 0.75 and out[2].isnan()
    assert importance.ram_counts(base, [torch.tensor([math.nan, 0.0, 0.0])], 0.1).tolist() == [[0, 2]]


@pytest.mark.parametrize("models", [1, 2, 3, 7])
def test_variance(models: int) -> None:
    base, *tensors = drawn(10 + models, models)
    found = importance.model_variance(base, tensors)
    for place, values in enumerate(zip(*deltas_of(base, tensors))):
        mean = math.fsum(values) / models
        exact = math.fsum((v - mean) ** 2 for v in values) / models
        assert math.isclose(found[place].item(), exact, rel_tol=1e-5, abs_tol=1e-18)


@pytest.mark.parametrize("models", [1, 2, 3, 5, 6, 7, 11])
def test_models_that_agree_have_no_variance(models: int) -> None:
    base, x = drawn(2, 1, spread=0.7)
    assert not importance.model_variance(base, [x] * models).any()
    assert importance.model_variance(base, [x * math.nan] * models).isnan().all()


@pytest.mark.parametrize("masked", [False, True])
def test_energies(masked: bool) -> None:
    base, *tensors = drawn(3, 3)
    numel = base.numel()
    mask = torch.randint(0, 256, (-(-numel // 8),), dtype=torch.uint8) if masked else None
    found = importance.energy_sums(base, tensors, mask)
    for limbs, delta in zip(found.tolist(), deltas_of(base, tensors)):
        squares = (torch.tensor(delta) * torch.tensor(delta)).double().tolist()
        if mask is not None:
            squares = [s for place, s in enumerate(squares) if int(mask[place // 8]) >> place % 8 & 1]
        assert sum(limb << 32 * i for i, limb in enumerate(limbs)) / (1 << 149) == math.fsum(squares)


def test_energies_leave_out_what_is_not_finite() -> None:
    x = torch.tensor([math.nan, math.inf, 1e30, 2.0, 1e-30])
    (limbs,) = importance.energy_sums(torch.zeros(5), [x], None).tolist()
    assert sum(limb << 32 * i for i, limb in enumerate(limbs)) == 4 << 149


@given(width=st.integers(1, 300), seed=st.integers(0, 99))
def test_row_sums_halve_the_row(width: int, seed: int) -> None:
    x = torch.randn(4, width, generator=torch.Generator().manual_seed(seed))

    def halved(values: list[float]) -> float:
        if len(values) == 1:
            return values[0]
        half = 1
        while 2 * half < len(values):
            half *= 2
        upper = values[half:] + [0.0] * (2 * half - len(values))
        return halved([torch.tensor(a + b, dtype=torch.float32).item() for a, b in zip(values[:half], upper)])

    before = x.clone()
    assert importance.row_sums(x).tolist() == [halved(row) for row in x.tolist()]
    assert_bitwise_equal(x, before)


@pytest.mark.parametrize("spread", [0.5, 0.02, 1e-3])
@pytest.mark.parametrize("width", [1, 2, 37, 256])
def test_divergences(width: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(width)
    base = torch.randn(6, width, generator=generator)
    x = base + spread * torch.randn(6, width, generator=generator)
    found = importance.divergences(base, [x], width)
    p, q = (torch.softmax(each.double(), dim=-1) + 1e-8 for each in (x, base))
    exact = (p * (p / q).log()).sum(dim=-1)
    # The shares are rounded, each by 1e-7 or so, of which the divergence is about half the square.
    torch.testing.assert_close(found.double(), exact, rtol=1e-5 + 2e-6 / spread, atol=1e-13)
    assert (found >= 0).all()
    values = importance.importance(base, [x], found, width).view(6, width)
    assert_bitwise_equal(values, (x - base).abs() * found[:, None])


def test_divergences_of_values_whose_exponentials_float32_does_not_hold() -> None:
    base = torch.tensor([[300.0, 299.0, 0.0], [-200.0, 0.0, 1.0]])
    x = torch.tensor([[300.0, 298.0, 5.0], [0.0, -200.0, 1.0]])
    p, q = (torch.softmax(each.double(), dim=-1) + 1e-8 for each in (x, base))
    exact = (p * (p / q).log()).sum(dim=-1)
    torch.testing.assert_close(importance.divergences(base, [x], 3).double(), exact, rtol=1e-5, atol=0)


def test_a_row_that_stays_has_no_divergence_and_nan_stays_within_its_row() -> None:
    base = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    x = base.clone()
    x[1, 2] = math.nan
    x[2] += 0.5 * torch.arange(5)
    found = importance.divergences(base, [x], 5)
    assert found[0] == 0 and found[1].isnan() and found[2] > 0
    assert importance.divergences(torch.empty(0), [torch.empty(0)], 5).shape == (0,)
