"""The reference's merge against the same formula written for one element, on NumPy scalars that round at each step."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastmerge import ops
from fastmerge.backends.rule import SparsifyRule
from tests import strategies
from tests.numeric import assert_bitwise_equal

f32 = np.float32


def rounded(value: np.float32, compute: torch.dtype) -> np.float32:
    return f32(torch.tensor(float(value), dtype=torch.float32).to(compute).item())


def merge_one(
    base: float | None, models: list[float], weights: list[float], *, inputs: str, election: str, zero_sign: str,
    divisor: str, lambda_: float, compute: torch.dtype,
) -> float:  # fmt: skip
    """One element, step by step."""

    def r(value: np.float32) -> np.float32:
        return rounded(value, compute)

    start = None if base is None else r(f32(base))
    deltas = [r(f32(m)) for m in models]
    if inputs == "models" and start is not None:
        deltas = [r(d - start) for d in deltas]
    shares = [r(f32(w)) for w in weights]
    weighted = [r(d * w) for d, w in zip(deltas, shares)]
    voters = weighted if election == "weighted" else deltas
    part = [True] * len(models)
    if election != "none":
        votes = [f32(np.sign(s)) if s == s else f32(0) for s in deltas] if election == "frequency" else voters
        total = votes[0]
        for vote in votes[1:]:
            total = total + vote
        majority = 1 if total > 0 else {"positive": 1, "negative": -1, "zero": 0}[zero_sign] if total == 0 else -1
        part = [bool(q * majority > 0) for q in voters]
    terms = [x if m else f32(0) for x, m in zip(weighted, part)]
    mixed = terms[0] if election == "none" else f32(0) + terms[0]
    for term in terms[1:]:
        mixed = mixed + term
    mixed = r(mixed)
    if divisor != "none":
        amounts = [f32(1)] * len(models) if divisor == "count" else shares
        amount = f32(0)
        for a, m in zip(amounts, part):
            amount = amount + (a if m else f32(0))
        amount = r(amount) if divisor == "weights" else amount
        nothing = abs(amount) < 1e-8 if election == "none" else amount == 0
        mixed = r(mixed / (f32(1) if nothing else amount))
    if lambda_ != 1:
        mixed = r(mixed * f32(lambda_))
    return float(mixed if start is None else r(start + mixed))


@given(st.data())
@np.errstate(all="ignore")
def test_every_flag_element_by_element(data: st.DataObject) -> None:
    count, size = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    base = data.draw(st.one_of(st.none(), strategies.values(size, torch.float32)))
    models = [data.draw(strategies.values(size, torch.float32)) for _ in range(count)]
    weights = [data.draw(st.sampled_from((1.0, 0.5, 0.3, -0.7, 0.0))) for _ in range(count)]
    flags = {
        "inputs": data.draw(st.sampled_from(("models", "deltas"))),
        "election": data.draw(st.sampled_from(("weighted", "none", "total", "frequency"))),
        "zero_sign": data.draw(st.sampled_from(("positive", "negative", "zero"))),
        "divisor": data.draw(st.sampled_from(("weights", "none", "count"))),
        "lambda_": data.draw(st.sampled_from((1.0, 0.7))),
    }
    compute = data.draw(strategies.computes)
    value = ops.total_divisor(weights, compute)
    actual = ops.consensus_apply(
        base, models, weights, **flags, divisor_value=value, compute=compute, backend="reference"
    )
    expected = [
        merge_one(
            None if base is None else base[i].item(), [m[i].item() for m in models], weights, **flags, compute=compute
        )
        for i in range(size)
    ]
    assert_bitwise_equal(actual, torch.tensor([math.nan if math.isnan(v) else v for v in expected]))


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_base", [False, True])
@np.errstate(all="ignore")
def test_every_step_is_rounded(compute: torch.dtype, with_base: bool) -> None:
    """Numbers with all 24 bits through every combination of flags: a rounding left out or added would show."""
    generator = torch.Generator().manual_seed(11)
    base, *models = torch.randn(4, 6, generator=generator)
    weights = [0.3, 1.7, -0.9]
    value = ops.total_divisor(weights, compute)
    grid = itertools.product(("weighted", "none", "total", "frequency"), ("weights", "none", "count"), (1.0, 0.7))
    for election, divisor, lambda_ in grid:
        flags = {"inputs": "models", "election": election, "zero_sign": "positive", "divisor": divisor}
        actual = ops.consensus_apply(
            base if with_base else None, models, weights, **flags, lambda_=lambda_, divisor_value=value,
            compute=compute, backend="reference",
        )  # fmt: skip
        expected = [
            merge_one(
                base[i].item() if with_base else None, [m[i].item() for m in models], weights, **flags,
                lambda_=lambda_, compute=compute,
            )
            for i in range(6)
        ]  # fmt: skip
        assert_bitwise_equal(actual, torch.tensor(expected))


def test_a_negative_zero_does_not_survive_an_election() -> None:
    flags = {"inputs": "deltas", "divisor": "none", "backend": "reference"}
    deltas, weights = [torch.tensor([-1.0]), torch.tensor([-2.0])], [0.0, 0.0]
    elected = ops.consensus_apply(None, deltas, weights, election="total", **flags)
    assert_bitwise_equal(elected, torch.tensor([0.0]))
    summed = ops.consensus_apply(None, deltas, weights, election="none", **flags)
    assert_bitwise_equal(summed, torch.tensor([-0.0]))


def test_a_ties_merge_by_hand() -> None:
    base = torch.tensor([1.0, 1.0, 1.0, 1.0])
    first = base + torch.tensor([4.0, -1.0, 0.5, 0.25])
    second = base + torch.tensor([-1.0, -3.0, 0.25, 2.0])
    merged = ops.consensus_merge(base, [first, second], [1.0, 1.0], density=0.5, backend="reference")
    # Kept: 4 and -1 of the first, -3 and 2 of the second. Elected: +, -, + (nothing), +.
    assert merged.tolist() == [5.0, -1.0, 1.0, 3.0]


@pytest.mark.parametrize(
    ("election", "expected"), [("weighted", 8.0), ("total", -2.5), ("frequency", -2.5), ("none", 5.5)]
)
def test_elections_differ(election: str, expected: float) -> None:
    """Deltas 2, -1, -3 weighted 4, 1, 0.5: sums 8 - 1 - 1.5 > 0 and 2 - 1 - 3 < 0, two negative votes to one."""
    deltas = [torch.tensor([v]) for v in (2.0, -1.0, -3.0)]
    merged = ops.consensus_merge(
        None, deltas, [4.0, 1.0, 0.5], inputs="deltas", election=election, divisor="none", method=None,
        backend="reference",
    )  # fmt: skip
    assert merged.tolist() == [expected]


@pytest.mark.parametrize(("zero_sign", "expected"), [("positive", 3.0), ("negative", -3.0), ("zero", 0.0)])
def test_zero_sign_decides_where_the_votes_cancel(zero_sign: str, expected: float) -> None:
    deltas = [torch.tensor([3.0]), torch.tensor([-3.0])]
    merged = ops.consensus_merge(None, deltas, 1.0, inputs="deltas", zero_sign=zero_sign, backend="reference")
    assert merged.tolist() == [expected]


def rounded_once(value: Fraction) -> float:
    """The nearest float32, of two as near the one whose last bit is 0."""
    guess = f32(float(value))
    candidates = [guess, np.nextafter(guess, f32(np.inf)), np.nextafter(guess, f32(-np.inf))]
    return float(min(candidates, key=lambda c: (abs(Fraction(float(c)) - value), int(c.view(np.uint32)) & 1)))


@given(seed=st.integers(0, 2**32 - 1))
def test_a_fused_sum_is_rounded_once_at_each_step(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    models = [torch.randn(12, generator=generator) * 10.0 ** ((seed >> 4 * i) % 12 - 6) for i in range(4)]
    weights = torch.randn(4, generator=generator, dtype=torch.float64).tolist()
    expected = [0.0] * 12
    for model, weight in zip(models, weights, strict=True):
        terms = [Fraction(x) * Fraction(float(f32(weight))) for x in model.tolist()]
        expected = [rounded_once(Fraction(total) + term) for total, term in zip(expected, terms, strict=True)]
    assert ops.fused_sum(models, weights, backend="reference").tolist() == expected


def test_scale_and_rule_are_per_model() -> None:
    rule = SparsifyRule("bernoulli", density=[1.0, 0.0], positions=[0, 1])
    merged = ops.consensus_apply(
        None, [torch.tensor([3.0]), torch.tensor([5.0])], [1.0, 1.0], inputs="deltas", rule=rule, scales=[2.0, 9.0],
        election="none", divisor="none", backend="reference",
    )  # fmt: skip
    assert merged.tolist() == [6.0]
