"""Routers: scores to weights, pooling, and a small network that learns which expert a request needs."""

from __future__ import annotations

import math

import pytest
import torch

from fastmerge.errors import ArgumentError
from fastmerge.routers import MLPRouter, Router, hard, pool, soft

NAMES = ("math", "code", "chat")


def test_hard_takes_the_highest_and_of_equal_ones_the_first() -> None:
    assert hard([0.1, 2.0, 2.0], NAMES) == {"code": 1.0}
    assert hard(torch.tensor([-1.0, -3.0, -2.0]), NAMES) == {"math": 1.0}


def test_soft_is_softmax_over_what_is_not_too_little() -> None:
    scores = torch.tensor([1.0, 2.0, 0.5])
    expected = (scores / 0.5).softmax(0)
    found = soft(scores, NAMES, temperature=0.5)
    assert list(found) == list(NAMES) and list(found.values()) == pytest.approx(expected.tolist())
    kept = soft(scores, NAMES, temperature=0.5, least=0.1)
    assert list(kept) == ["math", "code"] and sum(kept.values()) == pytest.approx(1.0)
    assert soft(scores, NAMES, least=0.9) == {"code": 1.0}
    assert soft([1000.0, 0.0, -math.inf], NAMES) == {"math": 1.0}


def test_scores_that_are_no_scores() -> None:
    for wrong, message in (([1.0], "1 scores for 3"), ([1.0, math.nan, 0.0], "NaN")):
        for route in (hard, soft):
            with pytest.raises(ArgumentError, match=message):
                route(wrong, NAMES)
    with pytest.raises(ArgumentError, match="all scores are -inf"):
        soft([-math.inf] * 3, NAMES)
    with pytest.raises(ArgumentError, match=r"scores has shape \[1, 3\]"):
        hard(torch.zeros(1, 3), NAMES)
    with pytest.raises(ArgumentError, match="temperature"):
        soft([1.0, 2.0, 3.0], NAMES, temperature=0.0)


def test_padding_does_not_count() -> None:
    hidden = torch.tensor([[[1.0, 3.0], [3.0, 5.0], [math.nan, math.nan]], [[2.0, 2.0]] * 3]).bfloat16()
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    assert pool(hidden, mask).tolist() == [[2.0, 4.0], [0.0, 0.0]]
    assert pool(hidden[1:]).tolist() == [[2.0, 2.0]]
    with pytest.raises(ArgumentError, match="batch, length, width"):
        pool(hidden[0])
    with pytest.raises(ArgumentError, match="mask has shape"):
        pool(hidden, mask[:1])


def test_a_small_network_learns_to_route() -> None:
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(3, 16, generator=generator)
    labels = torch.arange(90) % 3
    pooled = centers[labels] + 0.3 * torch.randn(90, 16, generator=generator)
    router = MLPRouter(NAMES, 16, inner=8)
    assert router.fit(pooled, [NAMES[label] for label in labels.tolist()], steps=60) > 0.95
    first = router(pooled)
    assert router.fit(pooled, labels, steps=60) > 0.95 and torch.equal(router(pooled), first)
    assert router.route(pooled[:3]) == [{"math": 1.0}, {"code": 1.0}, {"chat": 1.0}]
    mixed = router.route(pooled[:3, None, :].repeat(1, 4, 1), torch.ones(3, 4), mixed=True, least=0.01)
    assert all(max(weights, key=weights.__getitem__) == name for weights, name in zip(mixed, NAMES, strict=True))
    assert all(sum(weights.values()) == pytest.approx(1.0) for weights in mixed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_router_may_be_a_part_of_a_model_of_another_dtype(dtype: torch.dtype) -> None:
    router = MLPRouter(NAMES, 4).to(dtype)
    assert router(torch.ones(2, 4)).dtype == dtype
    pooled = torch.eye(4)[:3].repeat(4, 1)
    assert router.fit(pooled, torch.arange(12) % 3) == 1.0
    assert router.route(pooled[:1]) == [{"math": 1.0}]


def test_what_a_router_cannot_learn_from() -> None:
    router = MLPRouter(NAMES, 4)
    with pytest.raises(ArgumentError, match="'maths', which is no expert"):
        router.fit(torch.zeros(1, 4), ["maths"])
    with pytest.raises(ArgumentError, match="2 entries for 1 rows"):
        router.fit(torch.zeros(1, 4), ["math", "math"])
    with pytest.raises(ArgumentError, match="each once"):
        MLPRouter(["a", "a"], 4)
    for pooled, labels, message in (
        (torch.zeros(0, 4), [], "pooled has no rows"),
        (torch.zeros(2, 3), ["math", "code"], r"pooled has shape \[2, 3\]; this router takes .* \[batch, 4\]"),
        (torch.zeros(2, 5, 4), ["math", "code"], r"pooled has shape \[2, 5, 4\]"),
        (torch.zeros(2, 4), torch.tensor([0, 3]), "labels holds 3; there are 3 experts"),
        (torch.zeros(2, 4), torch.tensor([-1, 0]), "labels holds -1"),
        (torch.zeros(2, 4), torch.tensor([0.5, 1.0]), "labels is torch.float32"),
    ):
        with pytest.raises(ArgumentError, match=message):
            router.fit(pooled, labels)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"hidden has shape \[4\]"):
        router.route(torch.zeros(4))


def test_any_function_of_a_request_is_a_router() -> None:
    def router(request: str) -> dict[str, float]:
        return {"math": 1.0} if "=" in request else {"code": 0.5, "chat": 0.5}

    assert isinstance(router, Router) and router("1+1=") == {"math": 1.0}
