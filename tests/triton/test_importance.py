"""The importance family in Triton where it differs from other backends: tiles, tables of models, windows, long rows."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from fastmerge import backends
from fastmerge.backends import reference
from tests.importance_kernels import TYPES, drawn
from tests.numeric import assert_bitwise_equal, poison_

if backends.available()["triton"] is not None:
    pytest.skip(
        f"no triton backend here; tests/ops holds the others to the same: {backends.reason('triton')}",
        allow_module_level=True,
    )

from fastmerge._triton import importance
from fastmerge.backends import triton
from fastmerge.backends.triton import launch

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DEVICE = torch.device("cpu" if launch.INTERPRETED else "cuda")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that a tensor has several."""
    monkeypatch.setenv(launch.BLOCK_VARIABLE, "128")


def there(*tensors: Tensor) -> list[Tensor]:
    return [x.to(DEVICE) for x in tensors]


def merged(module: object, base: Tensor, tensors: list[Tensor], *arguments: object, where: torch.device) -> Tensor:
    """What `ram_apply` of a backend writes."""
    out = poison_(torch.empty(base.numel(), dtype=torch.float32, device=where))
    module.ram_apply(base.to(where), [x.to(where) for x in tensors], *arguments, out)  # type: ignore[attr-defined]
    return out.cpu()


@pytest.mark.parametrize("types", [TYPES, TYPES[:1]], ids=["mixed", "one dtype"])
@pytest.mark.parametrize("count", [8, 9, 11])
def test_models_by_value_and_by_a_table(count: int, types: tuple[torch.dtype, ...]) -> None:
    """Programs of several tiles, and an end within one; factors of -0 stay what they are."""
    base, *tensors = drawn(count, 5 * 128 + 3, types)
    tensors[1:] = [base.to(x.dtype) if i % 3 else x for i, x in enumerate(tensors[1:])]
    factors = [-0.0, 1.5, -2.0] * 4
    cpu = torch.device("cpu")
    expected = merged(reference, base, tensors, factors[:count], 1e-3, where=cpu)
    assert_bitwise_equal(merged(triton, base, tensors, factors[:count], 1e-3, where=DEVICE), expected)
    expected = merged(reference, base, tensors[:1] * count, [-0.0] * count, 1e9, where=cpu)
    assert_bitwise_equal(merged(triton, base, tensors[:1] * count, [-0.0] * count, 1e9, where=DEVICE), expected)
    own, *models = there(base, *tensors)
    for epsilon in (0.0, 1e-3):
        expected = reference.ram_counts(base, tensors, epsilon)
        assert_bitwise_equal(triton.ram_counts(own, models, epsilon).cpu(), expected)
    assert_bitwise_equal(triton.model_variance(own, models).cpu(), reference.model_variance(base, tensors))


@pytest.mark.parametrize("numel", [1, 135, 4 * 128, 9 * 128 + 5])
def test_energies_of_all_sizes(numel: int) -> None:
    """Whole programs and ends; squares in one window, in two, and further apart than both."""
    generator = torch.Generator().manual_seed(numel)
    base = torch.zeros(numel)
    for spread, masked in ((1, False), (12, True), (15, False), (60, True)):
        size = 2.0 ** torch.randint(-spread, spread, (2, numel), generator=generator)
        tensors = list(torch.randn(2, numel, generator=generator) * size)
        tensors[0][numel // 2] = float("inf")
        bits = torch.randint(0, 256, (-(-numel // 8),), dtype=torch.uint8, generator=generator) if masked else None
        found = triton.energy_sums(*there(base), there(*tensors), None if bits is None else bits.to(DEVICE))
        assert_bitwise_equal(found.cpu(), reference.energy_sums(base, tensors, bits))


def test_a_window_begins_at_the_first_tile() -> None:
    """What is far above the first tile's greatest, or far below, is added all the same."""
    base = torch.zeros(8 * 128)
    x = torch.ones(8 * 128)
    # Of each program: the ends of the first window and of the second one, and what lies beyond.
    for place, value in ((200, 8.0), (210, 2.0**-14), (220, 1.5 * 2.0**-32), (230, 1.5 * 2.0**-15), (300, 16.0)):
        x[place] = value
        x[place + 512] = 2.0**-32 if value == 16.0 else value
        assert_bitwise_equal(
            triton.energy_sums(*there(base), there(x), None).cpu(), reference.energy_sums(base, [x], None)
        )


@pytest.mark.parametrize("length", [1, 3, 100, 127, 128, 129, 255, 257, 1000])
def test_rows_of_all_lengths(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that share a program, rows in registers, and longer ones in memory, by several launches."""
    # Of its name the backend has a function, too.
    monkeypatch.setattr(importlib.import_module("fastmerge.backends.triton.importance"), "MEMORY", 2 * 512)
    rows = 3 if length > 100 else 35
    generator = torch.Generator().manual_seed(length)
    base = 3.0 * torch.randn(rows * length, generator=generator) - 300.0
    x = (base + 0.3 * torch.randn(rows * length, generator=generator)).bfloat16()
    # A NaN with a sign and a payload.
    x.view(torch.int16)[0] = -0x3B
    x[length] = -float("inf")
    # Far above all others of its row, and its last one.
    x[2 * length - 1] = -100.0
    expected = reference.divergences(base, [x], length)
    launch.launched.clear()
    found = triton.divergences(*there(base), there(x), length)
    assert_bitwise_equal(found.cpu(), expected)
    assert launch.launched["divergences"] == (length <= 128)
    assert launch.launched["divergences_of_long_rows"] == (2 if length > 512 else length > 128)
    weight = torch.arange(rows) / 7.0
    expected = reference.importance(base, [x], weight, length)
    assert_bitwise_equal(triton.importance(*there(base), there(x), weight.to(DEVICE), length).cpu(), expected)


def test_each_long_row_has_memory_of_its_own() -> None:
    """Rows are taken at the same time; here one comes after the other, which would hide it."""
    base, x = torch.randn(3 * 300), torch.randn(3 * 300)
    memory, out = torch.full((3, 256), float("nan")), torch.empty(3)
    there_is = [each.to(DEVICE) for each in (base, x, out, memory)]
    constants = {"WIDTH": 64, "HALVINGS": 6}
    launch.launch(importance.divergences_of_long_rows, (3,), DEVICE, *there_is, 0, 300, 4, **constants)
    assert_bitwise_equal(there_is[2].cpu(), reference.divergences(base, [x], 300))
    assert not there_is[3].isnan().any()
