"""Schedules and adaptation, against values worked out by hand from the formulas."""

from __future__ import annotations

import itertools
import math

import pytest

from fastmerge.errors import ArgumentError, FastmergeError
from fastmerge.evolve.draws import Draws
from fastmerge.evolve.schedules import Adaptation, cosine, random_reference_chance
from fastmerge.evolve.strategies import VARIANTS, Cade, De, Evolver, make

HALF_SQRT2 = math.sqrt(2) / 2


def test_evolvers_chance_of_a_random_reference_rises_to_one() -> None:
    assert [random_reference_chance(g, 4) for g in range(4)] == [0.625, 0.5 + 1 / 6, 0.75, 1.0]


@pytest.mark.parametrize(
    ("step", "F", "CR"),
    # T = 8, F from 0.9 to 0.1, CR from 0.5 to 0.3: least + (start - least) (1 + cos(pi t / 8)) / 2.
    [
        (0, 0.9, 0.5),
        (2, 0.1 + 0.4 * (1 + HALF_SQRT2), 0.3 + 0.1 * (1 + HALF_SQRT2)),
        (4, 0.5, 0.4),
        (6, 0.1 + 0.4 * (1 - HALF_SQRT2), 0.3 + 0.1 * (1 - HALF_SQRT2)),
        (8, 0.1, 0.3),
        (9, 0.1, 0.3),
        (800, 0.1, 0.3),
    ],
)
def test_cades_coefficients(step: int, F: float, CR: float) -> None:
    assert Cade(F=(0.9, 0.1), CR=(0.5, 0.3), period=8).coefficients(step) == pytest.approx((F, CR), abs=2**-24)


def test_cade_restarts() -> None:
    again = Cade(F=(0.9, 0.1), CR=(0.5, 0.3), period=8, restarts=True)
    assert [again.coefficients(step) for step in range(8, 24)] == [again.coefficients(step) for step in range(8)] * 2
    assert cosine(8, 8, 1.0, 0.0, restarts=True) == 1.0 and cosine(8, 8, 1.0, 0.0) == 0.0


def test_cades_jitter_is_added_between_start_and_least() -> None:
    still, moved = Cade(F=(0.9, 0.1), CR=(0.9, 0.8)), Cade(F=(0.9, 0.1), CR=(0.9, 0.8), jitter=True)
    F, _ = still.coefficients(3)
    trials = [moved.trial(0, 4, 3, 9, [0.0] * 4, Draws(seed, 4, 0)) for seed in range(200)]
    added = [trial.factors[0] - F for trial in trials]
    assert min(added) >= 0.1 and max(added) <= 0.9 and max(added) - min(added) > 0.7
    assert {trial.crossover for trial in trials} == {1.0}


def test_sade_keeps_its_start_until_the_window_is_full_and_then_follows_success() -> None:
    sade = Adaptation([0.7, 0.3], [0.1, 0.1], window=2)
    sade.enter(0)
    for crossover, success in ((0.05, True), (0.15, True), (0.12, False)):
        sade.learn(0, crossover, success)
    sade.learn(1, 0.19, False)
    sade.enter(1)
    assert (sade.probabilities, sade.crossover_means) == ([0.7, 0.3], [0.1, 0.1])
    sade.learn(0, 0.02, True)
    sade.enter(1)  # the same generation: nothing new
    assert sade.probabilities == [0.7, 0.3]
    sade.enter(2)
    # S = 3/4 + 0.01 and 0/1 + 0.01; CRm = the median of 0.05, 0.15, 0.02, and 0.1 where nothing succeeded.
    assert sade.probabilities == pytest.approx([0.76 / 0.77, 0.01 / 0.77])
    assert sade.crossover_means == [0.05, 0.1]
    sade.learn(1, 0.18, True)
    sade.enter(3)
    # Generation 0 has left the window: S = 1/1 + 0.01 for both.
    assert sade.probabilities == pytest.approx([0.5, 0.5])
    assert sade.crossover_means == [0.02, 0.18]
    sade.enter(4)
    # Only generation 2 and the empty generation 3 are left: variant 0 was not tried, its S is 0.01, its CRm stays.
    assert sade.probabilities == pytest.approx([0.01 / 1.02, 1.01 / 1.02])
    assert sade.crossover_means == [0.02, 0.18]


def test_de_draws_variants_f_and_cr_as_it_promises() -> None:
    de = De()
    trials = [de.trial(2, 8, 0, 9, [float(i) for i in range(8)], Draws(seed, 1, 2)) for seed in range(4000)]
    shares = {name: sum(trial.variant == name for trial in trials) / 4000 for name in VARIANTS}
    assert shares == pytest.approx(
        {"rand/1": 0.7, "current-to-best/1": 0.1, "rand/2": 0.1, "current-to-rand/1": 0.1}, abs=0.03
    )
    scales = [trial.factors[-1] for trial in trials]
    assert min(scales) >= 0 and max(scales) <= 0.2
    assert sum(scales) / 4000 == pytest.approx(0.1, abs=0.003)
    deviation = math.sqrt(sum((scale - 0.1) ** 2 for scale in scales) / 4000)
    assert deviation == pytest.approx(0.039, abs=0.002)  # 0.04, cut off at 2.5 deviations
    crossovers = [trial.crossover for trial in trials if trial.variant != "current-to-rand/1"]
    assert (
        min(crossovers) >= 0
        and max(crossovers) <= 0.2
        and sum(crossovers) / len(crossovers) == pytest.approx(0.1, abs=0.005)
    )


def test_without_crossover_no_rate_is_learned() -> None:
    de = De(window=1)
    for step in range(3):
        for seed in range(60):
            trial = de.trial(2, 8, step, 9, [float(i) for i in range(8)], Draws(seed, step, 2))
            de.learn(step, trial, True)
    crossed, uncrossed = de._adaptation.crossover_means[:3], de._adaptation.crossover_means[3]
    assert uncrossed == 0.1 and 0.1 not in crossed and max(crossed) <= 0.2


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_mixes_whom_it_says(variant: str) -> None:
    members, seen = VARIANTS[variant], set()
    scores = [0.0, 3.0, 1.0, 2.0, 0.5, 0.25][:members]
    for seed in range(100):
        trial = De(variants=variant, F=0.5, CR=0.25).trial(0, members, 0, 1, scores, Draws(seed, 1, 0))
        mixed = trial.others
        if variant == "rand/1":
            drawn = mixed
            assert trial.factors == (0.5,)
        elif variant == "rand/2":
            drawn = mixed
            assert trial.factors == (0.5, 0.5)
        elif variant == "current-to-best/1":
            assert mixed[:3] == (0, 1, 0) and trial.factors == (0.5, 0.5)  # x + F (best - x) + F (a - b)
            drawn = mixed[3:]
        else:
            assert mixed[0] == mixed[2] == 0 and trial.crossover == 1.0 and not trial.forced
            assert 0 <= trial.factors[0] < 1 and trial.factors[1] == 0.5  # x + K (a - x) + F (b - c)
            drawn = (mixed[1], *mixed[3:])
        assert len(set(drawn)) == len(drawn) and 0 not in drawn
        assert variant == "current-to-rand/1" or (trial.forced and trial.crossover == 0.25)
        seen.update(drawn)
    assert seen == set(range(1, members))


def test_cade_takes_three_different_others() -> None:
    trials = [Cade().trial(1, 4, 0, 1, [0.0] * 4, Draws(seed, 1, 1)) for seed in range(100)]
    assert {trial.others for trial in trials} == set(itertools.permutations((0, 2, 3)))
    assert {(trial.kind, trial.forced, trial.factors, trial.crossover) for trial in trials} == {
        ("de", True, (0.5,), 0.5)
    }


def test_each_decision_has_numbers_of_its_own() -> None:
    places = list(itertools.product((0, 1, 11), (1, 2, 11), (0, 1, 11)))
    assert len({Draws(*place).uniform() for place in places}) == len(places)
    assert Draws(1, 2, 3).distinct(9, range(9)) == Draws(1, 2, 3).distinct(9, range(9))


def test_evolver_takes_the_best_other_member_or_a_random_one() -> None:
    evolver = Evolver()
    scores = [5.0, 1.0, 3.0, -math.inf]
    trials = [evolver.trial(0, 4, 0, 10, scores, Draws(seed, 1, 0)) for seed in range(2000)]
    best = [trial for trial in trials if trial.variant == "best"]
    assert len(best) / 2000 == pytest.approx(1 - 0.55, abs=0.04) and {trial.others for trial in best} == {(2,)}
    assert {trial.others for trial in trials if trial.variant == "random"} == {(1,), (2,), (3,)}
    assert {(t.factors, t.crossover, t.kind, t.forced) for t in trials} == {((0.5,), 0.5, "blend", False)}
    # With a merger, members have no scores.
    assert {evolver.trial(0, 4, 0, 10, None, Draws(seed, 1, 0)).variant for seed in range(50)} == {"random"}


@pytest.mark.parametrize(
    ("strategy", "F", "CR", "options", "sentence"),
    [
        ("evolver", 1.5, None, {}, "F=1.5 of evolver is out of range; give a number from 0 to 1."),
        ("evolver", None, -0.1, {}, "CR=-0.1 of evolver is out of range"),
        ("evolver", (0.1, 0.2), None, {}, "F of evolver is one number"),
        ("evolver", None, math.nan, {}, "CR=nan of evolver is out of range"),
        ("de", 2.5, None, {}, "F=2.5 of de is out of range"),
        ("de", (0.9, 0.5), None, {}, "the wrong way round"),
        ("de", None, None, {"variants": "rand/3"}, "de has no variant 'rand/3'"),
        ("de", None, None, {"probabilities": [0.0] * 4}, "at least one variant a chance"),
        ("cade", (0.1, 0.5), None, {}, "the start and then the least"),
        ("cade", None, (0.5, 1.1), {}, "CR=1.1 of cade is out of range"),
        ("cade", None, None, {"period": 0}, "period must be a whole number"),
        ("cade", None, None, {"window": 4}, "cade has no setting 'window'; it has F, CR, period, restarts, jitter."),
        ("evolve", None, None, {}, "did you mean evolver?"),
        (7, None, None, {}, "strategy must be evolver, de, cade, or an object"),
        (De(), 0.5, None, {}, "belong to the strategy that was given"),
    ],
)
def test_what_a_strategy_refuses(strategy: object, F: object, CR: object, options: dict, sentence: str) -> None:
    with pytest.raises(FastmergeError) as raised:
        make(strategy, F, CR, options)  # type: ignore[arg-type]
    assert sentence in str(raised.value)


def test_too_few_members_name_the_variant() -> None:
    assert [make(name, None, None, {}).least_members()[0] for name in ("evolver", "de", "cade")] == [2, 6, 4]
    assert De(variants="current-to-best/1").least_members()[0] == 3
    with pytest.raises(ArgumentError):
        De(variants=())
