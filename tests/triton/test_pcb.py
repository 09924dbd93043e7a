"""PCB-Merging in Triton where it differs from other backends: tables of rows, several programs, ranks on the way."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from fastmerge import backends, ops
from fastmerge.reference import pcb as reference
from tests.numeric import assert_bitwise_equal
from tests.pcb_kernels import (
    check_keys_at_ranks,
    check_scores_that_are_alike,
    check_sums_that_are_far_apart,
    each_alike,
    each_variant,
    each_whole,
    results_of,
)
from tests.strategies import DTYPES

if backends.available()["triton"] is not None:
    pytest.skip(
        f"no triton backend here; tests/ops holds the others to the same: {backends.reason('triton')}",
        allow_module_level=True,
    )

from fastmerge.backends.triton import launch, pcb

pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="tests/gpu has the tests that run on a GPU")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles and programs so small that a row of some hundred elements has several."""
    monkeypatch.setenv(launch.BLOCK_VARIABLE, "256")
    with patch.object(pcb, "_TILES", 2):
        yield


def models(n: int, count: int, mixed: bool = False, odd: bool = False) -> tuple[Tensor, list[Tensor]]:
    """A base and models near it; `odd`: none begins at a multiple of 16 bytes."""
    generator = torch.Generator().manual_seed(n)
    base = torch.randn(count + odd, generator=generator)[odd:]
    rows = [base + 0.1 * torch.randn(count, generator=generator) for _ in range(n)]
    dtypes = [DTYPES[i % 3] if mixed else torch.bfloat16 for i in range(n)]
    wider = [torch.cat([x[:1], x]) if odd else x for x in rows]
    return base.bfloat16(), [x.to(dtype)[odd:] for x, dtype in zip(wider, dtypes)]


@each_variant
@pytest.mark.parametrize("form", ["3", "9", "9 mixed", "9 odd", "9 without base", "3 odd"])
def test_rows_by_value_and_in_tables(variant: str, form: str) -> None:
    base: Tensor | None
    base, rows = models(int(form[0]), 600, "mixed" in form, "odd" in form)
    base = None if "without" in form else base
    rule = ops.pcb_rule(rows, base=base, variant=variant, density=0.3, backend="reference")
    assert rule.thresholds is not None
    low = [int(key) - 150 for key in ops.score_keys(rule.thresholds[:, 0].contiguous())]
    launch.launched.clear()
    actual = results_of(pcb, base, rows, rule, low, odd="odd" in form)
    assert launch.launched["pcb_scores"] == launch.launched["pcb_apply"] == launch.launched["pcb_window"] == 1
    for got, expected in zip(actual, results_of(reference, base, rows, rule, low, odd="odd" in form), strict=True):
        assert_bitwise_equal(got, expected)


@each_alike
def test_scores_that_are_alike_are_all_counted(kind: str) -> None:
    """What fills a tile is added up before it is counted."""
    check_scores_that_are_alike(pcb, kind)


def test_sums_of_exponentials_that_are_far_apart() -> None:
    check_sums_that_are_far_apart(pcb, 2)


# -- ranks of whole rows ----------------------------------------------------------------------------------------------


@pytest.fixture
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launch.BLOCK_VARIABLE, "2048")


WAYS = {
    "sorted": {"_SORTED": 9000},
    "digits": {"_SORTED": 0},
    "sample": {"_SORTED": 0, "_SAMPLED_FROM": 1, "_SAMPLED": 0.3, "_COLLECTED": 4},
    "sample in vain": {"_SORTED": 0, "_SAMPLED_FROM": 1, "_SAMPLED": 0.3, "_COLLECTED": 9000},
}


@pytest.mark.usefixtures("_wide")
@pytest.mark.parametrize("way", WAYS)
@each_whole
def test_keys_at_ranks_of_whole_rows(
    variant: str, kind: str, n: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one sweep where a sample helps, in four more where it does not."""
    for name, value in WAYS[way].items():
        monkeypatch.setattr(pcb, name, value)

    def counted() -> None:
        assert launch.launched["pcb_digits"] == (0 if way == "sorted" else 12)
        launch.launched.clear()

    launch.launched.clear()
    missing = check_keys_at_ranks(pcb, monkeypatch, variant, kind, n, after=counted)
    if way == "sample":
        assert missing == [0, 0, 0]
    elif way == "sample in vain" and kind == "normal":
        assert missing[0] == n


def test_windows_that_end_next_to_a_key_with_just_enough_room_for_those_between() -> None:
    rows = [torch.linspace(-1, 2, 500), torch.linspace(3, -1, 500)]
    rule = ops.pcb_rule(rows, backend="reference")
    scores = reference.pcb_scores(None, rows, rule).sort(dim=1, descending=True).values
    assert (scores[:, 9:21].diff() < 0).all()
    bits = scores.view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    window = torch.stack([ordered[:, 19] - 1, ordered[:, 10] + 1], dim=1)
    for rank in (11, 12, 19, 20):
        ranks, highest = torch.full((2,), rank), torch.zeros(2, dtype=torch.int64)
        found, missing = pcb._among_collected([(None, rows)], rule, ranks, window, 10, highest)
        assert not missing
        assert_bitwise_equal(found, ops.score_keys(scores)[:, rank - 1])
    ends = torch.stack([ordered[:, 19], ordered[:, 10]], dim=1)
    for rank in (10, 11, 20, 21):
        ranks, highest = torch.full((2,), rank), torch.zeros(2, dtype=torch.int64)
        found, missing = pcb._among_collected([(None, rows)], rule, ranks, ends, 8, highest)
        inside = 11 <= rank <= 20
        assert missing == (0 if inside else 2)
        assert_bitwise_equal(found, ops.score_keys(scores)[:, rank - 1] if inside else torch.full((2,), -1))


def test_nobody_waits_for_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """No number of the GPU is asked for on the host."""
    monkeypatch.setattr(pcb, "_SORTED", 0)
    monkeypatch.setattr(pcb, "_SAMPLED_FROM", 1)
    monkeypatch.setattr(pcb, "_SAMPLED", 0.3)
    rows = [torch.linspace(-1, 2, 2000), torch.linspace(3, -1, 2000)]
    rule = ops.pcb_rule(rows, backend="reference")

    def waits(self: Tensor) -> Any:
        raise AssertionError("the host waits for the GPU")

    with monkeypatch.context() as patched:
        for name in ("item", "tolist", "__int__", "__float__", "__bool__", "__index__"):
            patched.setattr(Tensor, name, waits)
        keys, highest = pcb.pcb_score_bounds([(None, rows)], rule, [200, 300])
        thresholds = ops.pcb_thresholds(keys, highest, [0.1, 0.15], "vision_es")
    scores = reference.pcb_scores(None, rows, rule).sort(dim=1, descending=True).values
    assert_bitwise_equal(thresholds, torch.stack([scores[[0, 1], [199, 299]], scores[:, 0]], dim=1))


def test_thresholds_are_the_same_from_tensors_and_numbers() -> None:
    scores = torch.tensor([0.5, -2.0, math.nan, -0.0, math.inf, 1e-45])
    keys = ops.score_keys(scores)
    top = ops.score_keys(torch.full((6,), 7.0))
    densities = [0.1, 0.0, 0.5, 1.0, 0.2, 0.0]
    for variant in ("nlp", "paper"):
        expected = ops.pcb_thresholds(keys.tolist(), top.tolist(), densities, variant)
        assert_bitwise_equal(ops.pcb_thresholds(keys, top, densities, variant), expected)


def test_whole_rows_that_have_to_be_copied() -> None:
    """Rows of float64, and such as are not contiguous, go through in pieces."""
    rows = 0.1 * torch.randn(2, 3000, generator=torch.Generator().manual_seed(1))
    merged, scale = ops.pcb_merge(rows, return_scale=True, backend="reference")
    with patch.object(ops.pcb_rows, "_PIECE", 1400):
        for form in (rows, rows.T.contiguous().T, rows.double()):
            again, shares = ops.pcb_merge(form, return_scale=True, backend="triton")
            assert_bitwise_equal(again.float(), merged)
            assert_bitwise_equal(shares, scale)
