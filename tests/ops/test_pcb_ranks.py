"""Scores at ranks of whole rows, against sorting; what they are found by, against brute force."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastmerge import ops
from fastmerge.errors import ArgumentError
from tests.numeric import assert_bitwise_equal
from tests.ops.running import FAST

VARIANTS = ("script", "nlp", "vision", "vision_es", "paper")
each_working_backend = pytest.mark.parametrize("backend", ["reference", *FAST])


# -- thresholds of long rows ------------------------------------------------------------------------------------------


def long_rows(kind: str, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    rows = 0.01 * torch.randn(2, count, generator=generator)
    if kind == "two halves":
        rows[:, count // 2 :] *= 100
    elif kind == "coarse":
        rows = (rows * 300).round() / 256
    elif kind == "dead":
        rows[0] = 0
    return rows


@each_working_backend
@pytest.mark.parametrize("kind", ["normal", "two halves", "coarse", "dead"])
@pytest.mark.parametrize("width", ["as usual", "wide", "narrow"])
def test_thresholds_of_long_rows_are_exact(kind: str, width: str, backend: str) -> None:
    """Whether the window holds the threshold, does not, or is not even tried."""
    rows = long_rows(kind, 70_000)
    missed = patch.object(ops.pcb_rows, "choose_window", lambda runs, place, numel, most: (5, 9))
    changed = {
        "as usual": patch.object(ops.pcb_rows, "_FEW", 2048),
        "wide": patch.object(ops.pcb_rows, "WINDOW_BLOCK", 1 << 22),
        "narrow": missed,
    }[width]
    with changed, patch.object(ops.pcb_rows, "_PIECE", 30_000):
        rule = ops.pcb_rule(rows, density=[0.1, 0.01], backend=backend)
    scores = ops.pcb_scores(None, list(rows), rule, backend=backend).sort(dim=1).values
    for i, density in enumerate((0.1, 0.01)):
        assert rule.thresholds[i, 0] == scores[i, int(70_000 * (1 - density))]
        assert rule.thresholds[i, 1] == scores[i, -1]


def test_one_sweep_is_enough_where_the_window_holds_the_threshold() -> None:
    rows = long_rows("normal", 100_000)
    sweeps: list[str] = []

    def watched(name: str) -> Callable[..., Any]:
        original = getattr(ops.pcb_rows, name)
        return lambda *args, **kwargs: sweeps.append(name) or original(*args, **kwargs)

    with (
        patch.object(ops.pcb_rows, "WINDOW_BLOCK", 1 << 22),
        patch.object(ops.pcb_rows, "pcb_window_", watched("pcb_window_")),
        patch.object(ops.pcb_rows, "pcb_histogram", watched("pcb_histogram")),
    ):
        ops.pcb_rule(rows, backend="reference")
    assert sweeps == ["pcb_window_"]


def test_a_sample_is_made_of_runs_from_everywhere() -> None:
    count = 1_000_003
    row = torch.arange(count, dtype=torch.float64).to(torch.float32)  # exact below 2**24
    cuts = [5, 64, 499_931, 0, 500_003]
    rows = ops.pcb_rows._rows([list(row.split(cuts)), list(row.neg().split(cuts))])
    base, (first, second) = rows.sample(1 << 16)
    assert base is None
    assert_bitwise_equal(second, first.neg())
    runs = first.reshape(-1, 64)
    assert len(runs) == 1024
    assert (runs.diff(dim=1) == 1).all()
    assert (runs[:, 0].diff() >= 64).all()
    stretch = count / 1024
    expected = torch.arange(1024) * stretch
    assert ((runs[:, 0] >= expected - 1) & (runs[:, -1] < expected + stretch)).all()


# -- helpers against brute force --------------------------------------------------------------------------------------


@given(
    numel=st.one_of(st.integers(1, 50), st.integers(1, 2**36)),
    density=st.one_of(st.floats(0, 1), st.sampled_from((0.1, 0.05, 1e-12))),
    variant=st.sampled_from(VARIANTS),
)
def test_places_are_truncated_in_float64_and_stay_inside(numel: int, density: float, variant: str) -> None:
    low, high, threshold = ops.pcb_ranks(numel, density, variant)
    assert 0 <= low <= high < numel
    assert threshold == min(int(float(numel) * (1.0 - density)), numel - 1)
    if variant == "paper":
        assert (low, high) == (0, numel - 1)
    else:
        q = 1e-4 if variant == "script" else 1e-2
        assert low == int(float(numel) * q)
        assert high == max(0, int(float(numel) * (1.0 - q) - 1.0))


def test_places_of_known_rows() -> None:
    assert ops.pcb_ranks(1000, 0.1, "vision_es") == (10, 989, 900)
    assert ops.pcb_ranks(8_000_000_007, 0.05, "script") == (800_000, 7_999_200_005, 7_600_000_006)
    assert ops.pcb_ranks(10, 0.0, "nlp") == (0, 8, 9)
    assert ops.pcb_ranks(1, 1.0, "vision") == (0, 0, 0)


@given(st.data())
def test_the_kth_score_from_histograms_and_from_windows(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 300))
    spread = data.draw(st.sampled_from((1, 40, 70_000, 1 << 32)))
    floor = data.draw(st.integers(0, (1 << 32) - spread))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32 - 1)))
    keys = floor + torch.randint(0, spread, (count,), generator=generator)
    ordered = keys.sort(descending=True).values.tolist()
    k = data.draw(st.integers(1, count))
    level0 = torch.bincount(keys >> 16, minlength=65536)
    prefix = ops.score_prefix(level0, k)
    assert prefix == ordered[k - 1] >> 16
    level1 = torch.bincount(keys[keys >> 16 == prefix] & 65535, minlength=65536)
    assert ops.score_bound(level0, level1, k) == ordered[k - 1]

    width = data.draw(st.sampled_from((1, 50, 65_536, 70_001, 140_000)))
    low = max(0, ordered[k - 1] - data.draw(st.integers(-2, width + 1)))
    place = keys - low
    inside = place[(place >= 0) & (place < width)]
    counts = torch.cat([(place >= width).sum()[None], torch.bincount(inside, minlength=width)])
    expected = ordered[k - 1] if low <= ordered[k - 1] < low + width else None
    assert ops.score_bound_in_window(counts, low, k) == expected


def test_a_rank_that_was_not_counted_is_refused() -> None:
    with pytest.raises(ArgumentError, match="k=3 is out of range for 2 counted scores"):
        ops.score_prefix(torch.bincount(torch.tensor([1, 1]), minlength=65536), 3)


@pytest.mark.parametrize("alike", [1, 4, 16])
def test_windows_hold_the_threshold_however_alike_neighbours_are(alike: int) -> None:
    """Runs of 64, in which `alike` neighbours are nearly the same: as if there were that much less of a sample."""
    generator = torch.Generator().manual_seed(alike)
    missed = 0
    inside = []
    for _ in range(40):
        centres = torch.randn(200_000 // alike, generator=generator).repeat_interleave(alike)
        row = centres + 1e-3 * torch.randn(len(centres), generator=generator)
        keys = ops.score_keys(row)
        place = int(len(row) * 0.9)
        runs = keys[: len(row) // 64 * 64].reshape(-1, 64)
        chosen = torch.randperm(len(runs), generator=generator)[:200]
        low, width = ops.choose_window(runs[chosen], place, len(row), 1 << 32)
        found = int(keys.sort().values[place])
        missed += not low <= found < low + width
        inside.append(float(((keys >= low) & (keys < low + width)).float().mean()))
    assert missed == 0
    # Of 12800 elements in a sample as many tell something as there are groups of like ones.
    expected = 12 * math.sqrt(0.9 * 0.1 / (12800 / alike))
    assert 0.8 * expected < sum(inside) / len(inside) < 1.25 * expected


def test_windows_of_special_samples() -> None:
    keys = torch.arange(1000, 2000)
    assert ops.choose_window(keys[:, None], 900, 1000, 10) == (1900, 1)
    assert ops.choose_window(keys.reshape(-1, 10), 990, 1000, 10) == (1990, 1)
    same = torch.full((100, 64), 7)
    assert ops.choose_window(same, 500_000, 1_000_000, 100) == (7, 1)
    # At the ends the window reaches as far as keys do, and is cut to the middle.
    assert ops.choose_window(keys.reshape(-1, 10), 0, 10**6, 1 << 32)[0] == 0
    low, width = ops.choose_window(keys.reshape(-1, 10), 10**6 - 1, 10**6, 1 << 32)
    assert low + width == 1 << 32
    assert ops.choose_window(keys.reshape(-1, 10), 500_000, 10**6, 11) == (1495, 11)
    assert ops.choose_window(keys[:0].reshape(0, 1), 5, 10, 11) == (0, 11)
    low, width = ops.choose_window(keys[None], 500_000, 10**6, 1 << 40)
    assert (low, width) == (0, 1 << 32)


def test_thresholds_from_keys() -> None:
    keys = ops.score_keys(torch.tensor([0.5, -2.0, math.nan])).tolist()
    found = ops.pcb_thresholds(keys, ops.score_keys(torch.tensor([3.0, 4.0, 5.0])), [0.1, 0.0, 0.5], "nlp")
    assert found[:2].tolist() == [[0.5, 3.0], [4.0, 4.0]]
    assert math.isnan(found[2, 0])
    assert ops.pcb_thresholds(keys[:2], keys[:2], 0.0, "paper").tolist() == [[math.inf, 0.5], [math.inf, -2.0]]


def test_means_are_exact_sums_over_the_number_of_elements() -> None:
    third = ops.l1_sums(None, [torch.tensor([0.1, 0.2, 0.4])], ops.SparsifyRule())[0, :1]
    means = ops.pcb_means(torch.cat([third, 2 * third]), 3, 1)
    exact = sum(float(x) for x in torch.tensor([0.1, 0.2, 0.4])) / 3
    assert_bitwise_equal(means, torch.tensor([exact, 2 * exact], dtype=torch.float32))
