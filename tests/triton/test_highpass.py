"""The frequency filter's kernels in Triton, against plain ones: several tiles of everything, sums in pieces."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastmerge import backends, ops
from fastmerge.backends import filters, highpass_on_gpus
from tests import strategies
from tests.highpass_kernels import PLAIN
from tests.numeric import assert_bitwise_equal, poison_
from tests.ops.test_highpass import modes, ratios, sides

if backends.available()["triton"] is not None:
    pytest.skip(
        f"no triton backend here; tests/ops holds the others to the same: {backends.reason('triton')}",
        allow_module_level=True,
    )

from fastmerge.backends.triton import launch
from fastmerge.backends.triton.highpass import KERNELS

pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="tests/gpu has the tests that run on a GPU")

SMALL = {"COLUMNS": 32, "ROWS": 16, "SUMMED": 16, "RANKS": 32, "SHORTEST": 16, "BLOCK": 64}
"""So that small matrices have several tiles of everything."""

ADAPTER = KERNELS.project.__module__

small = patch.multiple(ADAPTER, **SMALL)


@st.composite
def products(draw: st.DrawFn) -> tuple[Tensor, list[Tensor], Tensor]:
    """Matrices of one or two classes, bases, and coefficients: not those of any filter."""
    classes = draw(st.integers(1, 2))
    matrices, half, width = draw(st.integers(1, 3)), draw(st.integers(1, 70)), draw(st.sampled_from((1, 7, 32, 48, 70)))
    ranks = [draw(st.sampled_from((0, 16, 32, 48))) for _ in range(classes)]
    ranks[draw(st.integers(0, classes - 1))] = draw(st.sampled_from((16, 48, 80)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    x = torch.randn(matrices, classes * half, width, generator=generator).to(draw(strategies.dtypes))
    bases = [torch.randn(half, rank, generator=generator) for rank in ranks]
    return x, bases, torch.randn(matrices, sum(ranks), width, generator=generator)


def near(actual: Tensor, expected: Tensor, size: float) -> None:
    """Within float32 sums of so many products of numbers about 1, and a rounding."""
    rounding = 0.0 if actual.dtype == torch.float32 else torch.finfo(actual.dtype).eps
    error = (actual.double() - expected.double()).abs() - rounding * expected.double().abs()
    assert error.numel() == 0 or float(error.max()) <= 2e-6 * size**0.5


@given(products(), st.integers(1, 64))
@settings(max_examples=40)
def test_products(given_: tuple[Tensor, list[Tensor], Tensor], programs: int) -> None:
    x, bases, coefficients = given_
    with small, patch.multiple(ADAPTER, PROGRAMS=programs, PARTIAL_SUMS=100):
        expected, actual = torch.empty_like(coefficients), poison_(torch.empty_like(coefficients))
        PLAIN.project(x, bases, expected)
        KERNELS.project(x, bases, actual)
        near(actual, expected, 100 * x.shape[1])
        expected, actual = torch.empty_like(x), poison_(torch.empty_like(x))
        PLAIN.subtract(x, bases, coefficients, expected)
        KERNELS.subtract(x, bases, coefficients, actual)
        near(actual, expected, 100 * coefficients.shape[1])


@given(sides, sides, ratios, modes, st.sampled_from((0, 1)), st.integers(1, 3), st.data())
@settings(max_examples=60)
def test_masks(height: int, width: int, ratio: float, mode: str, axis: int, matrices: int, data: st.DataObject) -> None:
    """Of numbers that a mask and a power of two leave without rounding: the very bits."""
    limits = filters.Mask(height, width, ratio, mode).limits(axis)
    first = data.draw(st.integers(0, limits.size // 2))
    count = data.draw(st.integers(1, limits.size // 2 + 1 - first))
    shape = (matrices, count, limits.across)
    numbers = np.arange(1, 2 * np.prod(shape) + 1, dtype=np.float32).view(np.complex64).reshape(shape)
    expected, actual = torch.from_numpy(numbers.copy()), torch.from_numpy(numbers.copy())
    PLAIN.mask_(expected, limits, first, 0.25)
    with small:
        KERNELS.mask_(actual, limits, first, 0.25)
    assert_bitwise_equal(torch.view_as_real(actual), torch.view_as_real(expected))


def test_distances_beyond_32_bits() -> None:
    """Two lines of a long and narrow spectrum: squares of half its length."""
    mask = filters.Mask(200_000, 150_000, 0.7, "official")
    limits = mask.limits(1)
    line = filters.lines(mask, 1).dropped + 3
    expected = torch.ones(1, 1, limits.across, dtype=torch.complex64)
    actual = expected.clone()
    PLAIN.mask_(expected, limits, line, 1.0)
    with patch.multiple(ADAPTER, BLOCK=1 << 17):
        KERNELS.mask_(actual, limits, line, 1.0)
    assert 0 < int(expected.real.sum()) < limits.across
    assert_bitwise_equal(torch.view_as_real(actual), torch.view_as_real(expected))


def test_sums_in_pieces_wait_in_little_room() -> None:
    """No more floats than the plan counts with, however many programs would be of use."""
    x = torch.randn(1, 512, 64, generator=torch.Generator().manual_seed(0))
    bases = [torch.randn(256, 16, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    seen: list[Tensor] = []
    with small, launch.intercepted(lambda kernel, grid, arguments, options: seen.append(arguments[3])):
        KERNELS.project(x, bases, torch.empty(1, 32, 64))
    (partial,) = seen
    assert partial.shape == (2, 1, 32, 64)
    assert partial.numel() <= filters.PARTIAL_SUMS * x.numel()


@pytest.mark.parametrize(("shape", "ratio", "mode"), [((2, 64, 60), 0.3, "ideal"), ((66, 51), 0.6, "official")])
def test_only_its_kernels_and_transforms_see_the_matrix(shape: tuple[int, ...], ratio: float, mode: str) -> None:
    """Once read and once written by each launch: one for all matrices of a shape."""
    for plan in filters.candidates(*shape[-2:], ratio, mode, 4, "cuda"):
        launch.launched.clear()
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        out = poison_(torch.empty_like(x))
        highpass_on_gpus.filtered(KERNELS, x, out, plan)
        wanted = {"project": 1, "subtract": 1} if plan.route == "lowrank" else {"mask": 1}
        assert dict(launch.launched) == wanted
        expected = ops.highpass(x, ratio, mode=mode, backend="reference")
        assert float((out - expected).abs().max()) <= 1e-6 * float(x.abs().max())
