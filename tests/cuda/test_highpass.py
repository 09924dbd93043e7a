"""The filter's products and mask in CUDA C++, on integers, of which sums are exact: tiles, slices, splits, classes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastmerge import backends
from fastmerge.backends.filters import Limits, Mask
from tests import highpass_kernels as plain
from tests.cuda.running import both_orders
from tests.numeric import assert_bitwise_equal, bits
from tests.strategies import DTYPES

if backends.reason("cuda") is not None:
    pytest.skip(
        f"no cuda backend here; tests/ops holds the others to the same: {backends.reason('cuda')}",
        allow_module_level=True,
    )

from fastmerge.backends.cuda import launch
from fastmerge.backends.cuda.highpass import _filtered, mask_, project, subtract

pytestmark = [
    pytest.mark.skipif(not launch.EMULATED, reason="tests/gpu has the tests that run on a GPU"),
    pytest.mark.usefixtures("poisoned_memory"),
]

HERE = (0, 0)
sides = st.one_of(st.integers(1, 20), st.sampled_from((31, 32, 36, 64, 65, 66, 68, 128, 132, 150)))
ranks = st.one_of(st.integers(0, 10), st.sampled_from((16, 31, 32, 33, 48, 70)))


def begun(x: Tensor, shift: int) -> Tensor:
    """The same numbers, `shift` elements after a multiple of 16 bytes."""
    memory = torch.empty(x.numel() + shift, dtype=x.dtype)
    return memory[shift:].view(x.shape).copy_(x)


def integers(generator: torch.Generator, *shape: int, most: int = 4) -> Tensor:
    return torch.randint(-most, most + 1, shape, generator=generator).float()


class Case:
    """Matrices and bases of small integers."""

    def __init__(self, count: int, height: int, width: int, rank: Sequence[int], dtype: torch.dtype, shift: int = 0):
        generator = torch.Generator().manual_seed(height * 1000 + width)
        self.x = begun(integers(generator, count, height, width).to(dtype), shift)
        self.bases = [integers(generator, height // len(rank), each, most=2) for each in rank]
        self.coefficients = begun(integers(generator, count, sum(rank), width, most=2), shift)

    def check(self) -> None:
        found, wanted = torch.empty_like(self.coefficients), torch.empty_like(self.coefficients)
        project(self.x, self.bases, found)
        plain.project(self.x, self.bases, wanted)
        assert torch.equal(found, wanted)
        out, expected = begun(torch.empty_like(self.x), self.x.storage_offset()), torch.empty_like(self.x)
        subtract(self.x, self.bases, self.coefficients, out)
        plain.subtract(self.x, self.bases, self.coefficients, expected)
        assert torch.equal(out, expected)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    height = draw(sides)
    two = height % 2 == 0 and draw(st.booleans())
    rank = (draw(ranks), draw(ranks)) if two else (draw(ranks),)
    shift = draw(st.sampled_from((0, 0, 1, 4)))
    return Case(draw(st.integers(1, 2)), height, draw(sides), rank, draw(st.sampled_from(DTYPES)), shift)


@given(case=cases(), order=st.sampled_from(("forward", "reverse")))
@settings(max_examples=60)
def test_products(case: Case, order: str) -> None:
    with patch.dict(os.environ, FASTMERGE_EMULATED_ORDER=order):
        case.check()


@both_orders
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [0, 1])
def test_rows_of_many_steps_and_several_sums(
    order: str, dtype: torch.dtype, shift: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With as much shared memory as every GPU has."""
    monkeypatch.setenv("FASTMERGE_EMULATED_ORDER", order)
    monkeypatch.setenv("FASTMERGE_EMULATED_SHARED", str(48 << 10))
    case = Case(1, 1034, 68, (24, 20), dtype, shift)
    assert launch.compiled.highpass_splits(HERE, _filtered(case.x, case.bases), 3) == 3
    case.check()
    Case(2, 530, 36, (70, 3), dtype, shift).check()
    # Blocks that take several tiles of rows, with coefficients that stay and some that do not.
    for rank in ((5, 3), (40, 3)):
        Case(2, 1300, 5 - shift, rank, dtype, shift).check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 600, 68), (1, 75, 37)])
def test_16_bits_are_the_float32_result_rounded_once(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(shape[1])
    x = torch.randn(shape, generator=generator).to(dtype)
    classes = 2 if shape[1] % 2 == 0 else 1
    bases = [torch.randn(shape[1] // classes, 16, generator=generator) / 10 for _ in range(classes)]
    coefficients = torch.empty(2, 1, classes * 16, shape[2])
    for own, target in zip((x, x.float()), coefficients):
        project(own, bases, target)
    assert_bitwise_equal(coefficients[0], coefficients[1])
    rounded, exact = torch.empty_like(x), torch.empty(shape)
    for own, out in ((x, rounded), (x.float(), exact)):
        subtract(own, bases, coefficients[0], out)
    assert_bitwise_equal(rounded, exact.to(dtype))


@pytest.mark.parametrize("splits", [1, 2, 3, 7])
def test_every_sum_has_its_rows(splits: int) -> None:
    case = Case(2, 26, 36, (9, 5), torch.float32)
    parts = torch.empty(splits, *case.coefficients.shape)
    launch.compiled.highpass_project(HERE, _filtered(case.x, case.bases), splits, parts.data_ptr())
    each = -(-13 // splits)
    for number, part in enumerate(parts):
        there = case.x.clone().view(2, 2, 13, 36)
        there[:, :, : number * each] = 0
        there[:, :, (number + 1) * each :] = 0
        wanted = torch.empty_like(part)
        plain.project(there.view(2, 26, 36), case.bases, wanted)
        assert torch.equal(part, wanted)


def test_how_many_sums_there_are() -> None:
    """Enough for all processors, of which the emulator has three, but of rows enough each, and with room for them."""

    def splits(height: int, width: int, rank: int, most: int) -> int:
        x = torch.empty(1, height, width, device="meta")
        described = ((0, 0), *x.shape, [(0, rank), (0, rank)])
        found: int = launch.compiled.highpass_splits(HERE, described, most)
        return found

    assert splits(4096, 64, 16, 100) == 6
    assert splits(4096, 64 * 3, 16, 100) == 2
    assert splits(4096, 64 * 3, 40, 100) == 1
    assert splits(4096, 64, 16, 4) == 4
    assert splits(1280, 64, 16, 100) == 5
    assert splits(254, 64, 16, 100) == 1
    assert splits(2, 64, 16, 100) == 1


def test_rows_that_are_too_long_are_refused() -> None:
    with pytest.raises(ValueError, match="rows are longer"):
        launch.compiled.highpass_splits(HERE, ((0, 0), 1, 2, 1 << 31, [(0, 16), (0, 16)]), 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [36, 37])
def test_a_nan_has_one_pattern(dtype: torch.dtype, width: int) -> None:
    x = torch.ones(1, 4, width, dtype=dtype)
    x.view(torch.int32 if dtype == torch.float32 else torch.int16)[0, 1, ::3] = -1
    out = torch.empty_like(x)
    subtract(x, [torch.zeros(2, 4)] * 2, torch.zeros(1, 8, width), out)
    wanted = torch.where(x == x, x, torch.full((), float("nan"), dtype=dtype))
    assert torch.equal(bits(out), bits(wanted))


@st.composite
def masks(draw: st.DrawFn) -> tuple[Limits, int, int]:
    """A mask, and which lines are masked."""
    shape, axis = (draw(sides), draw(sides)), draw(st.sampled_from((0, 1)))
    ratio = draw(st.one_of(st.sampled_from((0.0, 0.05, 0.3, 0.5, 0.6, 0.7072, 0.9, 1.0)), st.floats(0, 1)))
    limits = Mask(*shape, ratio, draw(st.sampled_from(("ideal", "official")))).limits(axis)
    first = draw(st.integers(0, limits.size // 2))
    return limits, first, draw(st.integers(1, limits.size // 2 + 1 - first))


@given(some=masks(), matrices=st.integers(1, 3), shift=st.integers(0, 1))
def test_masks(some: tuple[Limits, int, int], matrices: int, shift: int) -> None:
    limits, first, count = some
    generator = torch.Generator().manual_seed(first)
    lines = integers(generator, matrices, count, limits.across, 2)
    lines = begun(torch.view_as_complex(lines), shift)
    expected = lines.clone()
    mask_(lines, limits, first, 0.25)
    plain.mask_(expected, limits, first, 0.25)
    assert torch.equal(lines, expected)


def test_a_line_of_several_blocks() -> None:
    for lines in (torch.ones(1, 2, 5001, dtype=torch.complex64), torch.ones(1, 2, 5000, dtype=torch.complex64)):
        limits = Mask(12, lines.shape[2], 0.9, "official").limits(0)
        expected = lines.clone()
        mask_(lines, limits, 3, 2.0)
        plain.mask_(expected, limits, 3, 2.0)
        assert torch.equal(lines, expected)
