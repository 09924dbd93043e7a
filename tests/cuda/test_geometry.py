"""Inner products in CUDA C++ where their kernels part ways: ends of rows, models in groups, odd addresses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastmerge import ops
from tests.cuda.running import both_orders, needs_cuda, there, unaligned
from tests.numeric import assert_bitwise_equal

pytestmark = needs_cuda

TYPES = (torch.bfloat16, torch.float32, torch.float16)


def drawn(count: int, numel: int, seed: int = 0) -> list[Tensor]:
    """So many tensors, of all dtypes by turns and of very different sizes, so that the order of additions shows."""
    generator = torch.Generator().manual_seed(seed)
    spread = 10.0 ** torch.randint(-4, 4, (numel,), generator=generator)
    return [(torch.randn(numel, generator=generator) * spread).to(TYPES[i % 3]) for i in range(count)]


def check(base: Tensor | None, tensors: list[Tensor], row_length: int | None = None) -> None:
    expected = ops.gram(base, tensors, row_length=row_length, backend="reference")
    found = ops.gram(there(base), [there(x) for x in tensors], row_length=row_length, backend="cuda")
    assert_bitwise_equal(found.cpu(), expected)


@both_orders
@pytest.mark.parametrize("numel", [1, 31, 33, 255, 257, 4096, 4097, 70_001])
def test_one_row(numel: int, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTMERGE_EMULATED_ORDER", order)
    base, *tensors = drawn(3, numel)
    check(base, tensors)
    check(None, tensors)


@both_orders
@pytest.mark.parametrize(("rows", "length"), [(3, 5000), (70, 64), (33, 65), (5, 8192), (200, 1)])
def test_many_rows(rows: int, length: int, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTMERGE_EMULATED_ORDER", order)
    base, *tensors = drawn(3, rows * length)
    check(base, tensors, length)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7, 8, 11])
def test_models_in_groups(count: int) -> None:
    check(None, drawn(count, 5000))
    check(drawn(1, 5000, 1)[0], drawn(count, 5000))


@pytest.mark.parametrize("shift", [1, 2, 6])
def test_odd_addresses(shift: int) -> None:
    check(unaligned(drawn(1, 5000, 1)[0], shift), [unaligned(x, shift) for x in drawn(3, 5000)])


def test_what_is_not_finite_and_the_least_and_largest_numbers() -> None:
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 2.0**-149, 3.4e38, 0.0, -0.0]).repeat(20)
    for length in (1, 7, 140):
        check(None, [x, x.flip(0)], length)
        check(x.flip(0), [x, torch.ones(140)], length)
