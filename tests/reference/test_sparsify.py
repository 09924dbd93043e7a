"""The reference's random masks, DELLA ranks and exact sums against brute force and Python's fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmerge import ops
from fastmerge.backends.rule import SparsifyRule
from fastmerge.reference import sparsify
from fastmerge.reference.numbers import keys
from tests import strategies


def brute_force_rank(row: list[int], i: int) -> float:
    """The middle of the ranks that equal keys share, scaled to [0, 1]."""
    if len(row) == 1:
        return 0.5
    lower = sum(other < row[i] for other in row)
    equal = sum(other == row[i] for other in row)
    return (lower + (lower + equal - 1)) / (2.0 * (len(row) - 1))


@given(st.data())
def test_della_ranks_by_brute_force(data: st.DataObject) -> None:
    rows, length = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 30))
    key = keys(data.draw(strategies.values(rows * length, torch.float32)))
    expected = [brute_force_rank(row, i) for row in key.view(rows, length).tolist() for i in range(length)]
    assert sparsify.normalised_ranks(key, length).tolist() == expected


def test_larger_magnitudes_are_kept_with_larger_probability() -> None:
    key = keys(torch.tensor([0.0, -3.0, 1.0, 1.0, 2.0]))
    probability = sparsify.della_probability(key, 0.5, 0.1, 5)
    assert probability.tolist() == pytest.approx([0.4, 0.6, 0.475, 0.475, 0.55], abs=1e-12)


@given(st.data())
def test_l1_sums_are_exact(data: st.DataObject) -> None:
    x = data.draw(strategies.tensors(shape=(data.draw(st.integers(0, 300)),)))
    finite = [Fraction(abs(v)) for v in x.float().tolist() if math.isfinite(v)]
    limbs = sparsify.exact_l1(x.float().reshape(-1))
    assert bool(((limbs >= 0) & (limbs < 2**32)).all())
    total = sum(limb << 32 * i for i, limb in enumerate(limbs.tolist()))
    assert Fraction(total, 2**149) == sum(finite, Fraction(0))
    assert ops.l1_mass(limbs) == float(sum(finite, Fraction(0)))


@given(st.data())
def test_l1_sums_of_chunks_add_up(data: st.DataObject) -> None:
    models = data.draw(strategies.models(most=2))
    rule = SparsifyRule("bernoulli", density=[0.5, 0.7], positions=[0, 1], seed=3, tensor_id=4)
    rule = SparsifyRule(**{**rule.__dict__, "density": rule.density[: len(models.tensors)],
                           "positions": rule.positions[: len(models.tensors)]})  # fmt: skip
    whole = sparsify.l1_sums(models.base, models.tensors, rule, torch.float32)
    cut = data.draw(st.integers(0, models.numel))
    total = torch.zeros_like(whole)
    for a, b in ((0, cut), (cut, models.numel)):
        part = SparsifyRule(**{**rule.__dict__, "offset": a})
        base = None if models.base is None else models.base.reshape(-1)[a:b]
        total += sparsify.l1_sums(base, [x.reshape(-1)[a:b] for x in models.tensors], part, torch.float32)
    for left, right in zip(total.view(-1, 12), whole.view(-1, 12)):
        assert ops.l1_mass(left) == ops.l1_mass(right)


@given(st.data())
def test_random_masks_do_not_depend_on_the_chunks(data: st.DataObject) -> None:
    rows, length = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 40))
    delta = data.draw(strategies.values(rows * length, torch.float32))
    method = data.draw(st.sampled_from(("bernoulli", "della")))
    cut = length * data.draw(st.integers(0, rows)) if method == "della" else data.draw(st.integers(0, delta.numel()))
    start = length * data.draw(st.integers(0, 2**32))

    def mask(a: int, b: int) -> torch.Tensor:
        rule = SparsifyRule(method, density=[0.5], epsilon=[0.2], row_length=length, seed=data_seed, tensor_id=9,
                            positions=[3], offset=start + a)  # fmt: skip
        return sparsify.kept(delta[a:b], rule, 0)

    data_seed = data.draw(strategies.words64)
    assert torch.equal(torch.cat([mask(0, cut), mask(cut, delta.numel())]), mask(0, delta.numel()))


@settings(max_examples=20)
@given(seed=strategies.words64, method=st.sampled_from(("bernoulli", "della")))
def test_the_kept_rate_is_the_density(seed: int, method: str) -> None:
    count, density = 100_000, 0.3
    delta = torch.randn(count, generator=torch.Generator().manual_seed(1))
    rule = SparsifyRule(method, density=[density], epsilon=[0.1], row_length=1000, seed=seed, positions=[0])
    kept = int(sparsify.kept(delta, rule, 0).sum())
    assert abs(kept - density * count) < 5 * math.sqrt(count * density * (1 - density))


@pytest.mark.parametrize("method", ["bernoulli", "della"])
def test_two_positions_draw_independent_masks(method: str) -> None:
    count = 100_000
    delta = torch.randn(count, generator=torch.Generator().manual_seed(2))
    rule = SparsifyRule(method, density=[0.5, 0.5], epsilon=[0.0, 0.0], row_length=1000, positions=[0, 1])
    both = int((sparsify.kept(delta, rule, 0) & sparsify.kept(delta, rule, 1)).sum())
    assert abs(both - count / 4) < 4 * math.sqrt(count * 3 / 16)


def test_bernoulli_and_della_draw_different_words() -> None:
    delta = torch.ones(1000)
    masks = [
        sparsify.kept(
            delta, SparsifyRule(m, density=[0.5], epsilon=[0.0], row_length=1000, positions=[0]), 0
        )
        for m in ("bernoulli", "della")
    ]  # fmt: skip
    assert 300 < int((masks[0] ^ masks[1]).sum()) < 700


@given(st.data())
def test_rescaling_restores_the_l1_norm(data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    x = torch.randn(data.draw(st.integers(20, 300)), generator=generator)
    sparse = ops.sparsify(
        x, 0.5, method="bernoulli", rescale="l1", seed=data.draw(strategies.words64), backend="reference"
    )
    assert sparse.double().abs().sum().item() == pytest.approx(x.double().abs().sum().item(), rel=1e-5)


def test_next_to_nothing_is_not_rescaled() -> None:
    limbs = torch.stack([sparsify.exact_l1(torch.tensor([9e-8])), sparsify.exact_l1(torch.tensor([3e-8]))])
    assert ops.l1_scale(limbs) == 1.0
    limbs = torch.stack([sparsify.exact_l1(torch.tensor([3.0])), sparsify.exact_l1(torch.tensor([0.0]))])
    assert ops.l1_scale(limbs) == 1.0


def test_scales_are_rounded_to_the_compute_dtype_and_survive_what_it_cannot_hold() -> None:
    limbs = torch.stack([sparsify.exact_l1(torch.tensor([1000.7])), sparsify.exact_l1(torch.tensor([300.3]))])
    assert ops.l1_scale(limbs) == torch.tensor(1000.7).double().div(torch.tensor(300.3).double()).float().item()
    half = torch.tensor([1000.7, 300.3]).to(torch.bfloat16)
    assert ops.l1_scale(limbs, torch.bfloat16) == (half[0] / half[1]).item()
    big = torch.stack([sparsify.exact_l1(torch.tensor([2e6])), sparsify.exact_l1(torch.tensor([1e6]))])
    assert ops.l1_scale(big, torch.float16) == 2.0
