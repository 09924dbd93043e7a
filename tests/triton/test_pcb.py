"""PCB-Merging in Triton where it differs from other backends: tables of rows, several programs, ranks on the way."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from fastmerge import ops
from fastmerge.backends.rule import PcbRule
from fastmerge.backends.triton import launch, pcb
from fastmerge.reference import pcb as reference
from tests.numeric import assert_bitwise_equal
from tests.strategies import DTYPES

pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="tests/gpu has the tests that run on a GPU")

VARIANTS = ("script", "vision", "vision_es", "paper")
each_variant = pytest.mark.parametrize("variant", VARIANTS)


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


def found(by: Any, base: Tensor | None, rows: list[Tensor], rule: PcbRule, low: list[int]) -> list[Tensor]:
    """What all kernels of one backend make of these rows."""
    n, count = len(rows), rows[0].numel()
    counts, highest = torch.zeros(n, 301, dtype=torch.int64), torch.zeros(n, dtype=torch.int64)
    by.pcb_window_(base, rows, rule, low, counts, highest)
    out, scale = torch.empty(count, dtype=torch.float16), torch.empty(n, count)
    by.pcb_apply(base, rows, rule, [0.3, -1.0, 2.0] * (n // 3), out, scale)
    results = [counts, highest, out, scale, by.pcb_scores(base, rows, rule)]
    results.append(by.pcb_histogram(base, rows, rule, [-1, low[1] >> 16, -1] * (n // 3)))
    if rule.variant == "paper":
        results += [by.pcb_extremes(base, rows), by.pcb_sums(base, rows, rule)]
    return results


@each_variant
@pytest.mark.parametrize("form", ["3", "9", "9 mixed", "9 odd", "9 without base", "3 odd"])
def test_rows_by_value_and_in_tables(variant: str, form: str) -> None:
    base: Tensor | None
    base, rows = models(int(form[0]), 1100, "mixed" in form, "odd" in form)
    base = None if "without" in form else base
    rule = ops.pcb_rule(rows, base=base, variant=variant, density=0.3, backend="reference")
    assert rule.thresholds is not None
    low = [int(key) - 150 for key in ops.score_keys(rule.thresholds[:, 0].contiguous())]
    launch.launched.clear()
    actual = found(pcb, base, rows, rule, low)
    assert launch.launched["pcb_scores"] == launch.launched["pcb_apply"] == launch.launched["pcb_window"] == 1
    for got, expected in zip(actual, found(reference, base, rows, rule, low), strict=True):
        assert_bitwise_equal(got, expected)


@pytest.mark.parametrize("kind", ["equal", "zero", "two", "nan"])
def test_scores_that_are_alike_are_all_counted(kind: str) -> None:
    """What fills a tile is added up before it is counted."""
    x = torch.linspace(0.5, 1.0, 1100)
    rows = {
        "equal": [torch.ones(1100), torch.ones(1100)],
        "zero": [torch.where(x < 0.95, 0.0, x), torch.where(x < 0.9, 0.0, -x)],
        "two": [(x > 0.7).float(), (x > 0.8).float() - 2],
        "nan": [torch.where(x < 0.7, math.nan, x), x],
    }[kind]
    rule = PcbRule("vision_es", clip=torch.tensor([[0.25, 1.0]] * 2))
    keys = ops.score_keys(ops.pcb_scores(None, rows, rule, backend="reference"))
    for low in [[int(row.mode().values) - 3 for row in keys], [int(row.max()) for row in keys], [1 << 31, 0]]:
        counted = []
        for by in (pcb, reference):
            counts, highest = torch.zeros(2, 8, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
            by.pcb_window_(None, rows, rule, [max(0, key) for key in low], counts, highest)
            histogram = by.pcb_histogram(None, rows, rule, [-1, max(0, low[1]) >> 16])
            counted.append((counts, highest, histogram))
        for got, expected in zip(*counted, strict=True):
            assert_bitwise_equal(got, expected)


def test_sums_of_exponentials_that_are_far_apart() -> None:
    """More than 26 binades of one another, denormals among them, and what is not finite left out."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(700, generator=generator) for _ in range(2)]
    rows[1][5] = math.inf
    extremes = torch.tensor([[0.0, 0.05], [-0.01, 0.02], [3.0, 2.0]])
    rule = PcbRule("paper", extremes=extremes)
    assert_bitwise_equal(pcb.pcb_sums(None, rows, rule), reference.pcb_sums(None, rows, rule))


# -- ranks of whole rows ----------------------------------------------------------------------------------------------


def whole_rows(kind: str, n: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n)
    rows = [0.1 * torch.randn(9000, generator=generator) for _ in range(n)]
    if kind == "coarse":
        rows = [(x * 30).round() / 32 for x in rows]
    elif kind == "sparse":
        rows = [torch.where(torch.rand(9000, generator=generator) < 0.9, 0.0, x) for x in rows]
    elif kind == "nan":
        rows[0][:4500] = math.nan
    return rows


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
@pytest.mark.parametrize(
    ("variant", "kind", "n"),
    [
        ("script", "normal", 2),
        ("vision_es", "coarse", 2),
        ("vision", "sparse", 3),
        ("nlp", "nan", 2),
        ("paper", "normal", 2),
        ("script", "sparse", 9),
    ],
)
def test_keys_at_ranks_of_whole_rows(
    variant: str, kind: str, n: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one sweep where a sample helps, in four more where it does not: what sorting finds, however rows are cut."""
    rows = whole_rows(kind, n)
    rule = ops.pcb_rule(rows, variant=variant, backend="reference")
    scores = ops.score_keys(reference.pcb_scores(None, rows, rule)).sort(dim=1, descending=True).values
    chunks = [(None, [x[start:stop] for x in rows]) for start, stop in ((0, 4000), (4000, 4001), (4001, 9000))]
    for name, value in WAYS[way].items():
        monkeypatch.setattr(pcb, name, value)
    missing: list[int] = []
    original = pcb._among_collected

    def watched(*arguments: Any) -> tuple[Tensor, Tensor]:
        result = original(*arguments)
        missing.append(int(result[1]))
        return result

    monkeypatch.setattr(pcb, "_among_collected", watched)
    for ranks in ([900 + i for i in range(n)], [1] * n, [9000] * n):
        launch.launched.clear()
        keys, highest = pcb.pcb_score_bounds(chunks, rule, ranks)
        assert keys.tolist() == [row[rank - 1] for row, rank in zip(scores.tolist(), ranks)]
        assert highest.tolist() == scores[:, 0].tolist()
        assert launch.launched["pcb_digits"] == (0 if way == "sorted" else 12)
    if way == "sample":
        assert missing == [0, 0, 0]
    elif way == "sample in vain" and kind == "normal":
        assert missing[0] == n


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
