"""PCB-Merging's kernels for GPUs beside the definition: what the tests of both backends look at alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmerge import ops
from fastmerge.backends.rule import PcbRule
from fastmerge.reference import pcb as reference
from tests.numeric import assert_bitwise_equal

each_variant = pytest.mark.parametrize("variant", ("script", "vision", "vision_es", "paper"))
each_alike = pytest.mark.parametrize("kind", ("equal", "zero", "two", "nan"))
each_whole = pytest.mark.parametrize(
    ("variant", "kind", "n"),
    [
        ("script", "normal", 2),
        ("vision_es", "coarse", 2),
        ("vision", "sparse", 3),
        ("nlp", "nan", 2),
        ("paper", "normal", 2),
        ("paper", "equal", 2),
        ("script", "sparse", 9),
    ],
)


def results_of(
    by: Any, base: Tensor | None, rows: list[Tensor], rule: PcbRule, low: list[int], odd: bool
) -> list[Tensor]:
    """What all kernels of one backend make of these rows; `odd`: the result begins at no multiple of 16 bytes."""
    n, count = len(rows), rows[0].numel()
    counts, highest = torch.zeros(n, 301, dtype=torch.int64), torch.zeros(n, dtype=torch.int64)
    by.pcb_window_(base, rows, rule, low, counts, highest)
    out, scale = torch.empty(count + odd, dtype=torch.float16)[odd:], torch.empty(n, count)
    by.pcb_apply(base, rows, rule, [0.3, -1.0, 2.0, 1.0][: min(n, 4)] + [0.7] * (n - 4), out, scale)
    results = [counts, highest, out, scale, by.pcb_scores(base, rows, rule)]
    results.append(by.pcb_histogram(base, rows, rule, [-1, low[-1] >> 16, *[-1] * n][:n]))
    if rule.variant == "paper":
        results += [by.pcb_extremes(base, rows), by.pcb_sums(base, rows, rule)]
    return results


def check_scores_that_are_alike(pcb: Any, kind: str) -> None:
    """Windows and histograms of scores of which many, or all, are one."""
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


def check_sums_that_are_far_apart(pcb: Any, n: int) -> None:
    """Exponentials more than 26 binades of one another, denormals among them, and what is not finite left out."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(700, generator=generator) for _ in range(n)]
    rows[1][5] = math.inf
    extremes = torch.tensor([[0.0, 0.05], [-0.01, 0.02], [3.0, 2.0]]).repeat(n * (n + 1) // 6, 1)
    rule = PcbRule("paper", extremes=extremes)
    assert_bitwise_equal(pcb.pcb_sums(None, rows, rule), reference.pcb_sums(None, rows, rule))


def _whole_rows(kind: str, n: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n)
    rows = [0.1 * torch.randn(9000, generator=generator) for _ in range(n)]
    if kind == "coarse":
        rows = [(x * 30).round() / 32 for x in rows]
    elif kind == "sparse":
        rows = [torch.where(torch.rand(9000, generator=generator) < 0.9, 0.0, x) for x in rows]
    elif kind == "nan":
        rows[0][:4500] = math.nan
    elif kind == "equal":
        rows[0][:] = 0.5
    return rows


def check_keys_at_ranks(
    pcb: Any, monkeypatch: pytest.MonkeyPatch, variant: str, kind: str, n: int, after: Callable[[], None]
) -> list[int]:
    """Keys at ranks of whole rows are what sorting finds, however rows are cut. after: called after each search.

    Returns how many rows were not among the keys that one sweep had collected, for each search that collects.
    """
    rows = _whole_rows(kind, n)
    rule = ops.pcb_rule(rows, variant=variant, backend="reference")
    scores = ops.score_keys(reference.pcb_scores(None, rows, rule)).sort(dim=1, descending=True).values
    chunks = [(None, [x[start:stop] for x in rows]) for start, stop in ((0, 4000), (4000, 4001), (4001, 9000))]
    missing: list[int] = []
    original = pcb._among_collected

    def watched(*arguments: Any) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = original(*arguments)
        missing.append(int(result[1]))
        return result

    monkeypatch.setattr(pcb, "_among_collected", watched)
    for ranks in ([900 + i for i in range(n)], [1] * n, [9000] * n):
        keys, highest = pcb.pcb_score_bounds(chunks, rule, ranks)
        assert keys.tolist() == [row[rank - 1] for row, rank in zip(scores.tolist(), ranks)]
        assert highest.tolist() == scores[:, 0].tolist()
        after()
    return missing
