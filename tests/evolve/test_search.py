"""`search`: what it asks of a method, how its samplers are told, and that it goes on where it ended."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmerge import merge
from fastmerge.errors import ArgumentError, EvaluationError, FastmergeError
from fastmerge.evolve import search
from tests.numeric import assert_bitwise_equal

GENERATOR = torch.Generator().manual_seed(0)
BASE, ONE, TWO = ({"w": torch.randn(6, 5, generator=GENERATOR)} for _ in range(3))
GOAL = merge([ONE, TWO], base=BASE, method="task_arithmetic", weight=[0.8, 0.3], lambda_=0.9)


def score(model: dict[str, Tensor]) -> float:
    return -float((model["w"] - GOAL["w"]).double().square().sum())


def never(model: dict[str, Tensor]) -> float:
    raise ValueError("no")


class Climb:
    """Points near the best one so far, three at a time."""

    name = "climb"

    def __init__(self, dimensions: int) -> None:
        self.random = random.Random(0)
        self.best = -math.inf, [0.5] * dimensions
        self.told: list[float] = []

    def ask(self) -> list[list[float]]:
        return [[x + self.random.uniform(-0.3, 0.3) for x in self.best[1]] for _ in range(3)]

    def tell(self, points: list[list[float]], scores: list[float]) -> None:
        self.told += scores
        self.best = max([self.best, *zip(scores, points, strict=True)])


class Lowest:
    """The lower end of the range, again and again."""

    name = "lowest"

    def ask(self) -> list[list[float]]:
        return [[0.0]]

    def tell(self, points: list[list[float]], scores: list[float]) -> None: ...


SPACE: dict[str, Any] = {"weight": [(0.0, 1.0), (0.0, 1.0)], "lambda": (0.5, 1.0)}


def found(sampler: Any = None, evaluations: int = 100, evaluate: Any = score, **options: Any) -> Any:
    return search(
        [ONE, TWO], evaluate, base=BASE, method="task_arithmetic", space=SPACE, sampler=sampler or Climb(3),
        evaluations=evaluations, normalize=False, **options,
    )  # fmt: skip


def test_a_search_finds_coefficients_and_says_which() -> None:
    report = found(final_score=lambda model: 7.0)
    assert report.score is not None and report.score > 0.05 * score(
        merge([ONE, TWO], base=BASE, method="linear", weight=1)
    )
    assert set(report.parameters) == {"weight", "lambda_", "normalize"} and len(report.parameters["weight"]) == 2
    assert 0.5 <= report.parameters["lambda_"] <= 1.0
    again = merge([ONE, TWO], base=BASE, method="task_arithmetic", **report.parameters)
    assert_bitwise_equal(again["w"], report.state["w"])
    assert score(again) == report.score and report.final == 7.0 and report.evaluations == 100
    assert report.scores == sorted(report.scores) and len(report.scores) == 34


@pytest.mark.parametrize("name", ["cma", "optuna"])
def test_the_samplers_of_other_packages(name: str, tmp_path: Path) -> None:
    report = found(name, evaluations=24)
    assert report.score > -1.0
    assert found(name, evaluations=24).parameters == report.parameters != found(name, evaluations=24, seed=1).parameters
    alone = search(
        [ONE], score, base=BASE, method="task_arithmetic", space={"weight": (0, 1)}, sampler=name, evaluations=9
    )
    assert 0 <= alone.parameters["weight"] <= 1


def test_a_search_goes_on_where_it_ended(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    left = 10

    def killing(model: dict[str, Tensor]) -> float:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        return score(model)

    whole = found(state=tmp_path / "whole", evaluations=20)
    with pytest.raises(Killed):
        found(state=tmp_path / "killed", evaluations=20, evaluate=killing)
    report = found(state=tmp_path / "killed", evaluations=20)
    assert report.resumed == 10 and report.digest == whole.digest
    name = "history.jsonl"
    assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with pytest.raises(ArgumentError, match="evaluations was 20 there and is 21 now"):
        found(state=tmp_path / "whole", evaluations=21)


def test_a_failed_point_is_as_bad_as_the_worst() -> None:
    calls = 0

    def failing(model: dict[str, Tensor]) -> float:
        nonlocal calls
        calls += 1
        return math.nan if calls in (2, 5, 6) else score(model)

    sampler = Climb(3)
    report = found(sampler, evaluations=9, evaluate=failing)
    assert report.failures == 3 and len(sampler.told) == 9
    assert sampler.told[1] == min(sampler.told[0], sampler.told[2])
    assert sampler.told[4] == sampler.told[5] == min(sampler.told[:4])

    with pytest.raises(EvaluationError, match="no evaluation has succeeded"):
        found(evaluations=2, evaluate=never)


def test_before_there_is_a_score_a_sampler_is_told_nothing() -> None:
    """No number would do for those that failed: 0 is better than all the scores here."""
    calls = 0

    def failing(model: dict[str, Tensor]) -> float:
        nonlocal calls
        calls += 1
        return math.nan if calls in (1, 4) else -1.0 - calls

    class One(Climb):
        def ask(self) -> list[list[float]]:
            return super().ask()[:1]

    sampler = One(3)
    found(sampler, evaluations=5, evaluate=failing)
    assert sampler.told == [-3.0, -4.0, -4.0, -6.0]


def test_a_module_takes_each_merge() -> None:
    live = torch.nn.Module()
    live.w = torch.nn.Parameter(torch.zeros(6, 5))
    report = found(evaluations=6, model=live, evaluate=lambda module: score({"w": module.w.detach()}))
    assert_bitwise_equal(live.w.detach(), report.state["w"])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"space": {}}, "space is empty"),
        ({"space": {"densty": (0, 1)}}, "densty"),
        ({"space": {"weight": (1, 0)}}, "the range of weight must be"),
        ({"space": {"weight": (0, 1)}, "weight": 0.5}, "has a fixed value, too"),
        ({"space": {"weight": [(0, 1)] * 3}}, "one for each of the 2 models"),
        ({"space": {"lambda": [(0, 1)] * 2}}, "two numbers"),
        ({"space": {"density": (0, 1)}, "method": "tise"}, "tise"),
        ({"space": {"weight": (0, 1)}, "sampler": "grid"}, "there are cma, optuna"),
        ({"space": {"weight": (0, 1)}, "sampler": 3}, "have ask and tell, not int"),
        ({"space": {"weight": (0, 1)}, "sampler": Climb(1), "evaluations": 0}, "evaluations must be a whole number"),
        (
            {"space": {"weight": (0, 1)}, "sampler": Climb(1), "final_score": score, "score": score},
            "are the same function",
        ),
        # The second half of the range is refused before the first half is tried.
        ({"space": {"density": (0.5, 3)}, "sampler": Lowest(), "weight": 1.0}, "density"),
        ({"space": {"weight": (0, 1)}, "sampler": Climb(1), "densty": 1.0}, "densty"),
        ({"space": {"weight": (0, 1)}, "sampler": Climb(1), "model": torch.nn.Linear(2, 2)}, "no tensor 'w'"),
    ],
)
def test_what_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(FastmergeError, match=sentence):
        search([ONE, TWO], **{"score": never, "base": BASE, **options})


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "cma", None)
    with pytest.raises(ArgumentError, match=r"needs the package cma, .* install fastmerge\[search\]"):
        found("cma")
