"""Inner products in Triton where they differ from other backends: programs of several blocks, models in groups."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastmerge import backends
from fastmerge.backends import reference
from tests.numeric import assert_bitwise_equal

if backends.available()["triton"] is not None:
    pytest.skip(
        f"no triton backend here; tests/ops holds the others to the same: {backends.reason('triton')}",
        allow_module_level=True,
    )

from fastmerge.backends import triton
from fastmerge.backends.triton import launch

DEVICE = torch.device("cpu" if launch.INTERPRETED else "cuda")
TYPES = (torch.bfloat16, torch.float32, torch.float16)


def drawn(count: int, numel: int, seed: int = 0) -> list[Tensor]:
    """So many tensors, of all dtypes by turns and of very different sizes, so that the order of additions shows."""
    generator = torch.Generator().manual_seed(seed)
    spread = 10.0 ** torch.randint(-4, 4, (numel,), generator=generator)
    return [(torch.randn(numel, generator=generator) * spread).to(TYPES[i % 3]) for i in range(count)]


def check(base: Tensor | None, tensors: list[Tensor], row_length: int) -> None:
    expected = reference.gram(base, tensors, row_length)
    there = None if base is None else base.to(DEVICE)
    assert_bitwise_equal(triton.gram(there, [x.to(DEVICE) for x in tensors], row_length).cpu(), expected)


@pytest.mark.parametrize("block", ["128", "2048"])
@pytest.mark.parametrize("numel", [4096, 4097, 8 * 4096 - 1, 32 * 4096, 33 * 4096 + 5])
def test_one_row_of_many_blocks(numel: int, block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole programs, those in which the row ends, and blocks past its end."""
    monkeypatch.setenv(launch.BLOCK_VARIABLE, block)
    base, *tensors = drawn(3, numel)
    launch.launched.clear()
    check(base, tensors, numel)
    assert launch.launched["gram"] == 1


@pytest.mark.parametrize(("rows", "length"), [(3, 5000), (70, 64), (33, 65), (5, 8192), (200, 1)])
def test_many_rows(rows: int, length: int) -> None:
    for base in (None, drawn(1, rows * length, 1)[0]):
        check(base, drawn(2, rows * length), length)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 11])
def test_models_in_groups(count: int) -> None:
    launch.launched.clear()
    check(None, drawn(count, 300), 300)
    groups = -(-count // 4)
    assert launch.launched["gram"] == groups * (groups + 1) // 2


def test_what_is_not_finite_and_the_least_and_largest_numbers() -> None:
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 2.0**-149, 3.4e38, 0.0, -0.0]).repeat(20)
    for length in (1, 7, 140):
        check(None, [x, x.flip(0)], length)
        check(x.flip(0), [x, torch.ones(140)], length)
