"""PCB-Merging in CUDA C++ where it differs from other backends: few rows and many, tiles, ranks on the way."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmerge import backends, ops
from fastmerge.backends.rule import PcbRule
from fastmerge.errors import BackendError
from fastmerge.reference import pcb as reference
from tests.cuda.running import unaligned
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

if backends.reason("cuda") is not None:
    pytest.skip(
        f"no cuda backend here; tests/ops holds the others to the same: {backends.reason('cuda')}",
        allow_module_level=True,
    )

from fastmerge.backends.cuda import launch, pcb

pytestmark = [
    pytest.mark.skipif(not launch.EMULATED, reason="tests/gpu has the tests that run on a GPU"),
    pytest.mark.usefixtures("poisoned_memory"),
]


def models(n: int, count: int, mixed: bool = False, odd: bool = False) -> tuple[Tensor, list[Tensor]]:
    """A base and models near it; `odd`: they begin at bytes that are no multiple of anything."""
    generator = torch.Generator().manual_seed(n)
    base = torch.randn(count, generator=generator)
    rows = [base + 0.1 * torch.randn(count, generator=generator) for _ in range(n)]
    rows = [x.to(DTYPES[i % 3] if mixed else torch.bfloat16) for i, x in enumerate(rows)]
    base = base.bfloat16()
    return (unaligned(base, 5), [unaligned(x, 1 + i) for i, x in enumerate(rows)]) if odd else (base, rows)


@each_variant
@pytest.mark.parametrize("n", range(1, 13))
def test_few_rows_and_more(variant: str, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of every count to a dozen: mixed dtypes, any first byte, no base, both orders, much and little memory."""
    monkeypatch.setenv("FASTMERGE_EMULATED_ORDER", "reverse" if n % 2 else "forward")
    monkeypatch.setenv("FASTMERGE_EMULATED_SHARED", str(101376 if n % 3 == 1 else 232448))
    base: Tensor | None
    base, rows = models(n, 1100 + n, mixed=n % 3 == 0, odd=n % 2 == 1)
    base = None if n % 4 == 2 else base
    rule = ops.pcb_rule(rows, base=base, variant=variant, density=0.3, backend="reference")
    assert rule.thresholds is not None
    low = [max(0, int(key) - 150) for key in ops.score_keys(rule.thresholds[:, 0].contiguous())]
    actual, wanted = (results_of(by, base, rows, rule, low, odd=True) for by in (pcb, reference))
    for got, expected in zip(actual, wanted, strict=True):
        assert_bitwise_equal(got, expected)


@each_variant
def test_as_many_rows_as_one_launch_takes(variant: str) -> None:
    rows = models(launch.compiled.MOST_MODELS, 45)[1]
    edges = torch.tensor([[0.0, 1.0]]).repeat(launch.compiled.MOST_MODELS, 1)
    pairs = launch.compiled.MOST_MODELS * (launch.compiled.MOST_MODELS + 1) // 2
    rule = PcbRule(variant, clip=edges, thresholds=edges)
    if variant == "paper":
        extremes = pcb.pcb_extremes(None, rows)
        assert_bitwise_equal(extremes, reference.pcb_extremes(None, rows))
        rule = PcbRule("paper", extremes=extremes, means=torch.ones(pairs + len(rows)), thresholds=edges)
        assert_bitwise_equal(pcb.pcb_sums(None, rows, rule), reference.pcb_sums(None, rows, rule))
    assert_bitwise_equal(pcb.pcb_scores(None, rows, rule), reference.pcb_scores(None, rows, rule))
    with pytest.raises(BackendError, match='at most 128 rows in PCB-Merging, not 129; use backend="triton"'):
        pcb.pcb_scores(None, [*rows, rows[0]], rule)


@each_alike
def test_scores_that_are_alike_are_all_counted(kind: str) -> None:
    """What a warp has in common is added at once."""
    check_scores_that_are_alike(pcb, kind)


@pytest.mark.parametrize("n", [2, 20])
def test_sums_of_exponentials_that_are_far_apart(n: int) -> None:
    check_sums_that_are_far_apart(pcb, n)


def test_extremes_without_a_number_and_of_zeros() -> None:
    rows = [torch.full((9,), math.nan), torch.tensor([0.0, -1.0, 0.0] * 3), torch.tensor([-1.0, 0.0, -0.0] * 3)]
    extremes = pcb.pcb_extremes(None, rows)
    assert extremes[0].tolist() == [math.inf, -math.inf]
    assert_bitwise_equal(extremes, reference.pcb_extremes(None, rows))
    rows = [torch.tensor([math.inf, 3.4e38]), torch.tensor([-3.4e38, 3.4e38])]
    assert_bitwise_equal(pcb.pcb_extremes(None, rows), reference.pcb_extremes(None, rows))


# -- ranks of whole rows ----------------------------------------------------------------------------------------------


WAYS = {
    "sorted": {"_SORTED": 9000},
    "halves": {"_SORTED": 0},
    "sample": {"_SORTED": 0, "_SAMPLED_FROM": 1, "_SAMPLED": 0.3, "_COLLECTED": 4},
    "sample in vain": {"_SORTED": 0, "_SAMPLED_FROM": 1, "_SAMPLED": 0.3, "_COLLECTED": 9000, "_LEAST_COLLECTED": 1},
}


@pytest.mark.parametrize("way", WAYS)
@each_whole
def test_keys_at_ranks_of_whole_rows(
    variant: str, kind: str, n: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one sweep where a sample helps, in two more where it does not."""
    for name, value in WAYS[way].items():
        monkeypatch.setattr(pcb, name, value)
    missing = check_keys_at_ranks(pcb, monkeypatch, variant, kind, n, after=lambda: None)
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


def test_a_row_too_short_to_be_sampled_has_no_window() -> None:
    rows = [torch.linspace(-1, 1, 50), torch.linspace(1, -1, 50)]
    rule = ops.pcb_rule(rows, backend="reference")
    window = pcb._likely_window([(None, rows)], rule, [5, 6], [50], 3)
    assert window.tolist() == [[-(1 << 31), (1 << 31) - 1]] * 2


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize("most", [3, 1 << 40])
def test_the_window_that_a_sample_gives(order: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six standard errors of runs to either side, among keys of all sizes, few, or one."""
    monkeypatch.setenv("FASTMERGE_EMULATED_ORDER", order)
    size = 64 * 150
    generator = torch.Generator().manual_seed(3)
    anything = torch.randint(-(1 << 31), 1 << 31, (size,), generator=generator)
    rows = [anything, anything >> 20, anything >> 31, torch.full((size,), -7), anything.sort().values]
    sample = torch.stack(rows).to(torch.int32)
    for places in ([size // 10] * 5, [0] * 5, [size - 1] * 5, [1, 4000, 5000, 6000, 9000]):
        window = torch.empty(5, 2, dtype=torch.int32)
        there = torch.tensor(places)
        memory = torch.zeros(5, launch.compiled.WINDOW_NUMBERS, dtype=torch.int32)
        given = sample.data_ptr(), size, there.data_ptr(), most, memory.data_ptr(), window.data_ptr()
        launch.compiled.pcb_likely_window(launch.place(sample.device), 5, *given)
        for row, place, found in zip(sample, places, window.tolist()):
            ordered = row.sort().values.tolist()
            above = (row.view(-1, 64) >= ordered[place]).sum(dim=1)
            spread = int(150 * (above * above).sum() - above.sum() ** 2)
            reach = min(int(6 * math.sqrt(spread / 149)) + 8, most)
            low = ordered[place - reach] if place >= reach else -(1 << 31)
            high = ordered[place + reach] if place + reach < size else (1 << 31) - 1
            assert found == [low, high]
