"""The frequency filter: every route against the reference, its plan against the mask built whole, precision."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastmerge import ops
from fastmerge.backends import filters, highpass_on_gpus
from fastmerge.backends import highpass as routes
from fastmerge.reference.highpass import highpass_mask
from tests import strategies
from tests.highpass_kernels import PLAIN, weights
from tests.numeric import assert_bitwise_equal, poison_
from tests.ops.running import each_backend, only

sides = st.one_of(st.integers(1, 24), st.sampled_from((32, 50, 51, 64, 75, 96, 160)))
ratios = st.one_of(st.sampled_from((0.0, 1.0, 0.05, 0.1, 0.3, 0.5, 0.6, 0.7, 0.7072, 0.9)), st.floats(0, 1))
modes = st.sampled_from(("ideal", "official"))
batches = st.sampled_from(((), (), (1,), (3,), (2, 2), (0,)))
blocks = st.sampled_from((100, 1000, 1 << 18))
TOLERANCE = 1e-6


def within(actual: Tensor, expected: Tensor, x: Tensor) -> None:
    """Float32 within the stated tolerance, 16 bits within a rounding more."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs()
    if expected.dtype != torch.float32:
        error -= expected.double().abs() * torch.finfo(expected.dtype).eps
        error -= torch.finfo(expected.dtype).smallest_normal * 2.0**-7
    if x.numel():
        most = float(x.double().abs().max())
        assert float(error.max()) <= TOLERANCE * most
        if expected.dtype == torch.float32:
            assert float(error.square().mean().sqrt()) <= TOLERANCE * float(x.double().square().mean().sqrt())


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Of any batch, strides and scale that float32 transforms bear."""
    shape = (*draw(batches), draw(sides), draw(sides))
    dtype = draw(strategies.dtypes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    scale = 10.0 ** draw(st.integers(-3, 3) if dtype == torch.float16 else st.integers(-25, 25))
    values = torch.randn(shape, generator=generator, dtype=torch.float64) + draw(st.sampled_from((0, 0, 5)))
    return draw(strategies.laid_out((values * scale).to(dtype).reshape(-1), shape))


@each_backend
@given(x=matrices(), ratio=ratios, mode=modes)
def test_every_backend_is_within_the_tolerance(backend: str, x: Tensor, ratio: float, mode: str) -> None:
    expected = ops.highpass(x, ratio, mode=mode, backend="reference")
    with only(backend, "highpass"):
        actual = ops.highpass(x, ratio, mode=mode, backend=backend)
    within(actual, expected, x)


@given(x=matrices(), ratio=ratios, mode=modes, size=blocks)
@settings(max_examples=300)
def test_every_route_is_within_the_tolerance(x: Tensor, ratio: float, mode: str, size: int) -> None:
    x = x.contiguous()
    expected = ops.highpass(x, ratio, mode=mode, backend="reference")
    plans = filters.candidates(*x.shape[-2:], ratio, mode) if x.numel() else ()
    with patch.dict(filters.BLOCK, cpu=size), cold_tables():
        for plan in plans:
            out = poison_(torch.empty_like(x))
            routes.filtered(x, out, plan)
            within(out, expected, x)


@given(x=matrices(), ratio=ratios, mode=modes, size=blocks, odd=st.integers(0, 1))
@settings(max_examples=100)
def test_every_route_on_gpus_is_within_the_tolerance(x: Tensor, ratio: float, mode: str, size: int, odd: bool) -> None:
    """With kernels in plain torch: what each floor brings is held to these by its own tests."""
    x = x.contiguous()
    expected = ops.highpass(x, ratio, mode=mode, backend="reference")
    plans = filters.candidates(*x.shape[-2:], ratio, mode, x.element_size(), "cuda") if x.numel() else ()
    with patch.dict(filters.BLOCK, cuda=size):
        for plan in plans:
            memory = bytearray(odd + x.nbytes)  # an address that suits no element
            out = poison_(torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=odd).view(x.shape))
            highpass_on_gpus.filtered(PLAIN, x, out, plan)
            within(out, expected, x)


@contextmanager
def cold_tables() -> Iterator[None]:
    """Tables are kept by shape, and depend on the block's size, which only tests change."""
    routes._line_work.cache_clear()
    yield
    routes._line_work.cache_clear()


@pytest.mark.parametrize(
    ("shape", "ratio", "mode", "wanted"),
    [
        ((256, 256), 0.0, "ideal", {"nothing"}),
        ((256, 256), 0.01, "ideal", {"lowrank", "rfft"}),
        ((255, 255), 0.3, "ideal", {"lowrank", "rfft"}),
        ((255, 255), 0.7, "official", {"rfft"}),
        ((255, 256), 0.7, "official", {"lowrank", "rfft"}),
        ((1, 255), 0.7, "official", {"lowrank", "rfft"}),
        ((255, 256), 0.72, "official", {"lowrank", "rfft"}),
        ((2048, 1), 0.5, "ideal", {"lowrank", "rfft"}),
        ((300, 128), 0.9, "official", {"lowrank", "rfft"}),
    ],
)
def test_which_routes_there_are(shape: tuple[int, int], ratio: float, mode: str, wanted: set[str]) -> None:
    assert {plan.route for plan in filters.candidates(*shape, ratio, mode)} == wanted


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "ratio", "mode"),
    [((4096, 4096), 0.01, "ideal"), ((4096, 4096), 0.7, "official"), ((2048, 4096), 0.9, "official")],
)
def test_large_matrices_are_within_the_tolerance(shape: tuple[int, int], ratio: float, mode: str) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).add_(0.3)
    expected = ops.highpass(x, ratio, mode=mode, backend="reference")
    for plan in filters.candidates(*shape, ratio, mode):
        out = torch.empty_like(x)
        routes.filtered(x, out, plan)
        within(out, expected, x)


# -- the plan ---------------------------------------------------------------------------------------------------------


@given(sides, sides, ratios, modes, st.sampled_from((0, 1)), st.integers(1, 9))
def test_bands_points_and_runs_are_those_of_the_whole_mask(
    height: int, width: int, ratio: float, mode: str, axis: int, step: int
) -> None:
    whole = highpass_mask(height, width, ratio, mode).numpy()
    symmetric = (whole + whole[-np.arange(height) % height][:, -np.arange(width) % width]) / 2
    mask = filters.Mask(height, width, ratio, mode)
    assert (mask.weights(np.arange(height), np.arange(width)) == symmetric).all()
    if mask.even:
        assert (symmetric == symmetric[-np.arange(height) % height]).all()
    along = symmetric if axis == 0 else symmetric.T
    known = filters.lines(mask, axis)
    assert not along[: known.dropped].any()
    points = dict(known.points)
    for line in range(known.partial, len(along) // 2 + 1):
        assert tuple(np.flatnonzero(along[line] != 1)) == points.get(line, ())
    if known.dropped < known.partial:
        assert along[known.dropped].any()
    assert (weights(mask.limits(axis), 0, len(along)).numpy() == along).all()
    for start in range(known.dropped, known.partial, step):
        some = np.arange(start, min(start + step, known.partial))
        zeros, ones = mask.constant(axis, some)
        assert not along[some][:, zeros].any() and (along[some][:, ones] == 1).all()


def test_a_square_that_only_doubles_has_points_and_nothing_else() -> None:
    plan, *others = filters.candidates(4096, 4096, 0.72, "official")
    assert plan.route == "lowrank" and plan.rank == 7  # 409^2 = 409^2 + 0^2 = 391^2 + 120^2
    assert {other.route for other in others} == {"rfft"}
    assert all(other.dropped == 0 and other.columns == 4 for other in others)


def test_wide_matrices_lose_whole_bands_along_their_long_side() -> None:
    wide = filters.lines(filters.Mask(512, 1376, 0.9, "official"), 1)
    tall = filters.lines(filters.Mask(1376, 512, 0.9, "official"), 0)
    assert (wide.dropped, wide.partial) == (tall.dropped, tall.partial) == (228, 305)
    for shape, axis in (((512, 1376), 1), ((1376, 512), 0)):
        fastest = filters.candidates(*shape, 0.9, "official")[0]
        assert (fastest.route, fastest.axis, fastest.dropped) == ("rfft", axis, 228)


def test_the_plan_is_told() -> None:
    plan = ops.highpass_plan((4096, 4096), 0.01)
    assert isinstance(plan, ops.HighpassPlan)
    assert plan.route == "lowrank" and plan.rank == 41 and plan.columns == 0
    several = ops.highpass_plan((3, 4096, 4096), 0.01)
    assert math.isclose(several.seconds, 3 * plan.seconds) and several.workspace == plan.workspace
    assert ops.highpass_plan((64, 64), 0.0).workspace == 0
    wide = {dtype: ops.highpass_plan((512, 4096), 0.9, mode="official", dtype=dtype) for dtype in strategies.DTYPES}
    assert {plan.route for plan in wide.values()} == {"rfft"}
    assert wide[torch.bfloat16].workspace > wide[torch.float32].workspace  # no room in the result
    assert ops.highpass_plan((0, 5), 0.5).route == "nothing"


# -- precision and special values -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "ratio"), [(64, 0.05), (63, 0.05), (64, 0.9)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_the_float32_result_rounded_once(height: int, ratio: float, dtype: torch.dtype) -> None:
    x = torch.randn(height, 80, generator=torch.Generator().manual_seed(2)).to(dtype)
    for plan in filters.candidates(height, 80, ratio, "ideal"):
        exact, rounded = torch.empty(height, 80), torch.empty(height, 80, dtype=dtype)
        routes.filtered(x.float(), exact, plan)
        routes.filtered(x, rounded, plan)
        assert_bitwise_equal(rounded, exact.to(dtype))


def test_neither_autocast_nor_a_lower_precision_of_products_is_let_in() -> None:
    x = torch.randn(200, 100, generator=torch.Generator().manual_seed(3))
    expected = ops.highpass(x, 0.1, backend="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        try:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert_bitwise_equal(ops.highpass(x, 0.1, backend="cpu"), expected)
            assert torch.get_float32_matmul_precision() == "medium"
        finally:
            torch.set_float32_matmul_precision(before)


@each_backend
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_spreads_and_the_identity_leaves_it_alone(backend: str, value: float) -> None:
    x = torch.randn(32, 20)
    x[3, 4] = value
    assert_bitwise_equal(ops.highpass(x, 0.0, backend=backend), x)
    for ratio in (0.1, 0.9):
        assert ops.highpass(x, ratio, backend=backend)[3].isnan().all()


@each_backend
def test_out_is_written_and_returned(backend: str) -> None:
    x = torch.randn(3, 20, 10, generator=torch.Generator().manual_seed(4)).bfloat16()
    out = poison_(torch.empty_like(x))
    assert ops.highpass(x, 0.5, out=out, backend=backend) is out
    assert_bitwise_equal(out, ops.highpass(x, 0.5, backend=backend))
    odd = torch.empty(601)[1:].view(3, 20, 10)  # no complex number can begin there
    assert ops.highpass(x.float(), 0.5, out=odd, backend=backend) is odd
    within(odd, ops.highpass(x.float(), 0.5, backend="reference"), x)
