"""Sparsification in Triton where it differs from other backends: ranks within rows, exact sums, NaN and Inf."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastmerge import backends
from fastmerge.backends import reference
from fastmerge.backends.rule import TIE_BLOCK, SparsifyRule
from tests.numeric import assert_bitwise_equal

if backends.available()["triton"] is not None:
    pytest.skip(
        f"no triton backend here; tests/ops holds the others to the same: {backends.reason('triton')}",
        allow_module_level=True,
    )

from fastmerge.backends import triton
from fastmerge.backends.triton import launch
from fastmerge.backends.triton import sparsify as adapter

DEVICE = torch.device("cpu" if launch.INTERPRETED else "cuda")
F32 = torch.float32


def normal(count: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    """Normal numbers, rounded."""
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)).to(dtype)


def della(rows: int, length: int, **changes: object) -> SparsifyRule:
    """DELLA for two models of so many rows."""
    settings = {
        "density": [0.5, 0.3],
        "epsilon": [0.2, 0.1],
        "row_length": length,
        "seed": 12 << 33,
        "tensor_id": 5 << 62,
        "positions": [1, 4095],
        "offset": length * rows * 3,
        **changes,
    }
    return SparsifyRule("della", **settings)  # type: ignore[arg-type]


def check_masks(base: Tensor | None, tensors: list[Tensor], rule: SparsifyRule, compute: torch.dtype = F32) -> None:
    """The masks are the reference's."""
    expected = reference.kept_masks(base, tensors, rule, compute)
    there = None if base is None else base.to(DEVICE)
    actual = triton.kept_masks(there, [x.to(DEVICE) for x in tensors], rule, compute)
    assert_bitwise_equal(actual.cpu(), expected)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 64, 100, 1000])
def test_ranks_within_rows(length: int) -> None:
    rows = -(-1300 // length)
    base, tensors = normal(rows * length, seed=9), [normal(rows * length, seed=i) for i in range(2)]
    launch.launched.clear()
    check_masks(base, tensors, della(rows, length))
    assert launch.launched["keep_by_rank"] == (1 if length > 1 else 0)


# Rows of several chunks of 128 elements, of a chunk and one more, of more chunks than are searched.
@pytest.mark.parametrize("length", [128, 129, 500, 512, 513])
def test_rows_of_several_chunks(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launch.BLOCK_VARIABLE, "128")
    monkeypatch.setattr(adapter, "MOST_CHUNKS", 4)
    tensors = [normal(2 * length, torch.float32, seed=1), (normal(2 * length, seed=2) * 2).round()]
    check_masks(None, tensors, della(2, length, epsilon=[0.4999, 0.0]))


def test_rows_in_several_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "SORTED", 1)
    tensors = [normal(21 * 37, seed=i) for i in range(2)]
    check_masks(normal(21 * 37, seed=5), tensors, della(21, 37))


@pytest.mark.parametrize("value", [0.0, 1.0, float("nan"), float("-inf")])
def test_rows_of_equals_share_the_middle_rank(value: float) -> None:
    tensors = [torch.full((600,), value), torch.full((600,), value).half()]
    check_masks(None, tensors, della(3, 200))


def test_della_that_keeps_all_or_nothing() -> None:
    tensors = [normal(300, seed=i) for i in range(2)]
    check_masks(None, tensors, della(3, 100, density=[1.0, 0.0]))
    check_masks(None, tensors, della(3, 100, density=[0.5, 1.5], epsilon=[0.1, 0.0]))


def test_an_epsilon_below_zero_turns_the_ranks() -> None:
    tensors = [normal(300, seed=i) for i in range(2)]
    check_masks(None, tensors, della(3, 100, epsilon=[-0.3, -0.1]))


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16])
def test_ranks_of_rounded_deltas(compute: torch.dtype) -> None:
    tensors = [normal(512, seed=i) for i in range(2)]
    check_masks(normal(512, seed=3), tensors, della(4, 128), compute)


def test_masks_of_a_cut_in_a_block_behind_the_first() -> None:
    count = TIE_BLOCK + 700
    x = normal(count).sign()
    bounds, ties = reference.magnitude_bounds(None, [x], [TIE_BLOCK + 333], [count], F32)
    check_masks(None, [x], SparsifyRule("band", bounds=bounds.to(DEVICE).cpu(), ties_before=ties))


def check_sums(base: Tensor | None, tensors: list[Tensor], rule: SparsifyRule) -> None:
    """The sums are the reference's."""
    expected = reference.l1_sums(base, tensors, rule, F32)
    there = None if base is None else base.to(DEVICE)
    launch.launched.clear()
    actual = triton.l1_sums(there, [x.to(DEVICE) for x in tensors], rule, F32)
    assert launch.launched["add_l1"] == (len({x.dtype for x in tensors}) if tensors[0].numel() else 0)
    assert_bitwise_equal(actual.cpu(), expected)


# 8192 elements are a program's: what fits its window, what lies at the window's ends, and what does not fit.
@pytest.mark.parametrize(
    "exponents", [(0, 1), (-28, 6), (-29, 6), (-28, 7), (0, 40), (-149, 127), (-149, -120), (120, 127)]
)
def test_sums_of_numbers_that_are_far_apart(exponents: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launch.BLOCK_VARIABLE, "2048")
    least, most = exponents
    generator = torch.Generator().manual_seed(0)
    x = 1 + torch.rand(3 * 8192 + 5, generator=generator, dtype=torch.float64)
    x *= 2.0 ** torch.randint(least, most, x.shape, generator=generator)
    first = torch.arange(x.numel()) % 8192 < 2048
    # The greatest of each program's first tile chooses its unit.
    x = torch.where(first, 1.5 * 2.0 ** max(least, min(most, 0)), x).to(torch.float32)
    check_sums(None, [x, -x.clamp(max=2e38)], SparsifyRule())


@pytest.mark.parametrize("method", ["bernoulli", "band", "mask"])
def test_sums_of_what_is_kept_by_more_programs_than_there_are_copies(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(launch.BLOCK_VARIABLE, "32")
    count = 70 * 32 * adapter.TILES + 5
    tensors = [normal(count, F32, seed=i) for i in range(3)]
    rule = SparsifyRule("bernoulli", density=[0.5, 0.1, 0.9], seed=3, tensor_id=4, positions=[0, 1, 2])
    if method == "band":
        bounds, ties = reference.magnitude_bounds(None, tensors, [0, 5, 9], [count // 2] * 3, F32)
        rule = SparsifyRule("band", bounds=bounds, ties_before=ties)
    elif method == "mask":
        rule = SparsifyRule("mask", masks=reference.kept_masks(None, tensors, rule, F32))
    check_sums(None, tensors, rule)


def test_sums_of_the_largest_numbers_and_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launch.BLOCK_VARIABLE, "2048")
    large = torch.full((2 * 8192,), torch.finfo(torch.float32).max)
    large[5] = float("inf")
    large[6] = float("nan")
    check_sums(None, [large, torch.zeros_like(large), torch.full_like(large, 1e-45)], SparsifyRule())
    check_sums(None, [torch.empty(0)], SparsifyRule())


def test_sums_of_several_dtypes_and_more_models_than_a_launch_writes() -> None:
    dtypes = (torch.bfloat16, torch.float32, torch.float16)
    tensors = [normal(1500, dtypes[i % 3], seed=i) for i in range(20)]
    base = normal(1500, seed=77)
    rule = SparsifyRule(
        "bernoulli", density=[0.05 * i for i in range(20)], seed=1, tensor_id=2, positions=list(range(20)), offset=3
    )
    check_sums(base, tensors, rule)
    check_masks(base, tensors, rule)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("count", [0, 1, 511, 9000])
def test_what_is_not_finite(dtype: torch.dtype, count: int) -> None:
    x = normal(count + 1, dtype)[1:]
    for place, value in ((0, float("nan")), (300, float("inf")), (510, float("-inf")), (8999, float("nan"))):
        x[place : place + 1] = value
    expected = torch.where(x.isfinite(), x, torch.zeros_like(x))
    wrong = [int(x.isnan().sum()), int(x.isinf().sum())]
    there = x.to(DEVICE)
    launch.launched.clear()
    counts = triton.count_nonfinite(there)
    triton.zero_nonfinite_(there)
    assert launch.launched["count_nonfinite"] == launch.launched["zero_nonfinite"] == (1 if count else 0)
    assert counts.tolist() == wrong
    assert_bitwise_equal(there.cpu(), expected)


def test_payloads_and_large_finite_numbers_are_told_apart() -> None:
    bits = torch.tensor([0x7F80, 0x7F81, 0xFFFF - 65536, 0x7F7F, 0xFF7F - 65536, 0x7FC0, 0xFF80 - 65536, 1])
    x = bits.to(torch.int16).view(torch.bfloat16)
    assert triton.count_nonfinite(x.to(DEVICE)).tolist() == [3, 2]
