"""When the demo passes, and what it says when it does not."""

import math

import pytest

from demo import verdict
from demo.text import DOMAINS


def flat(bits: float) -> dict[str, float]:
    return dict.fromkeys(DOMAINS, bits)


@pytest.fixture
def models() -> dict[str, dict[str, float]]:
    """A base of 3 bits and fine-tunes that gain 10 % at home and lose 10 % abroad."""
    tunes = {domain: flat(3.3) | {domain: 2.7} for domain in DOMAINS}
    return {verdict.BASE: flat(3.0), **tunes}


@pytest.fixture
def merges() -> dict[str, dict[str, float]]:
    return {"linear": flat(3.1), "ties": flat(2.9)}


def test_passes_when_the_tunes_gain_and_one_merge_beats_the_base(models, merges):
    assert verdict.failures(models, merges) == []


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize(("score", "passes"), [(2.75, True), (2.77, False), (3.5, False)])
def test_every_fine_tune_must_gain_eight_percent_at_home(models, merges, domain, score, passes):
    models[domain][domain] = score
    failures = verdict.failures(models, merges)
    assert (failures == []) == passes
    assert passes or (len(failures) == 1 and domain in failures[0] and "8%" in failures[0])


def test_a_gain_abroad_does_not_count_as_one_at_home(models, merges):
    models["python"] = flat(1.0) | {"python": 3.0}
    assert len(verdict.failures(models, merges)) == 1


@pytest.mark.parametrize("score", [3.0, 3.01])
def test_the_best_merge_must_beat_the_base_on_the_mean(models, score):
    (failure,) = verdict.failures(models, {"ties": flat(score)})
    assert "ties" in failure and "best merge" in failure


@pytest.mark.parametrize("group", ["models", "merges"])
@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_a_score_that_is_no_number_is_a_failure(models, merges, group, score):
    {"models": models["python"], "merges": merges["linear"]}[group]["c"] = score
    assert any("finite" in sentence for sentence in verdict.failures(models, merges))


def test_one_domain_cannot_stand_for_the_mean(models):
    lopsided = flat(3.3) | {"python": 2.5}
    assert len(verdict.failures(models, {"ties": lopsided})) == 1


def test_no_merge_at_all_is_a_failure(models):
    assert verdict.failures(models, {}) == ["nothing was merged"]


def test_the_table_has_a_row_for_each_model_with_every_domain_and_the_mean(models, merges):
    header, *rows = verdict.table(models, merges)
    assert header[1:] == (*DOMAINS, "mean")
    assert [row[0] for row in rows] == ["base", *DOMAINS, "linear", "ties"]
    assert all(len(row) == len(header) for row in rows)
    assert rows[0][1:] == ("3.000  +0.0%",) * 4
    assert rows[1][1:] == ("2.700 -10.0%", "3.300 +10.0%", "3.300 +10.0%", "3.100  +3.3%")
