"""The importance family on every backend: the reference's bits on drawn inputs, chunks, what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastmerge import ops
from fastmerge.errors import ArgumentError, ArgumentTypeError, FastmergeError
from fastmerge.ops.sparsify import mask_bytes
from tests import strategies
from tests.numeric import assert_bitwise_equal, poison_
from tests.ops.running import configurations, each_backend, only

epsilons = st.sampled_from((0.0, 1e-5, 1e-3, 0.25, 1.0))
distances = st.sampled_from((0.0, -1.0, 1e-6, 1e-3, 0.25, 1e30))
factors = st.sampled_from((1.0, 1.02, -0.5, 0.0, 3e38))


@st.composite
def based(draw: st.DrawFn, backend: str, most: int = 4) -> strategies.Models:
    """Models with a base; of several tie blocks where a kernel takes these one by one, on CPUs."""
    found = draw(strategies.models(most=most, blocks=backend == "cpu"))
    if found.base is None:
        found.base = draw(strategies.tensors(shape=tuple(found.tensors[0].shape)))
    return found


def divisors(numel: int) -> list[int]:
    """Lengths of rows of which there are not so many that an interpreter takes long."""
    return [n for n in range(max(numel // 300, 1), min(numel, 3000) + 1) if numel % n == 0] or [max(numel, 1)]


@each_backend
@given(data=st.data())
def test_nearswap(backend: str, data: st.DataObject) -> None:
    data.draw(configurations(backend))
    models = data.draw(based(backend, most=1))
    t = data.draw(distances)
    out_dtype = data.draw(strategies.dtypes)
    expected = ops.nearswap(models.base, models.tensors[0], t, out_dtype=out_dtype, backend="reference")
    out = poison_(torch.empty_like(expected))
    with only(backend, "nearswap"):
        actual = ops.nearswap(models.base, models.tensors[0], t, out_dtype=out_dtype, backend=backend)
        ops.nearswap(models.base, models.tensors[0], t, out=out, backend=backend)
    assert_bitwise_equal(actual, expected)
    assert_bitwise_equal(out, expected)


@each_backend
@given(data=st.data())
def test_ram(backend: str, data: st.DataObject) -> None:
    data.draw(configurations(backend))
    models = data.draw(based(backend))
    epsilon = data.draw(epsilons)
    each = [data.draw(factors) for _ in models.tensors]
    arguments = {"epsilon": epsilon, "out_dtype": data.draw(strategies.dtypes)}
    expected = ops.ram_apply(models.base, models.tensors, each, **arguments, backend="reference")
    out = poison_(torch.empty_like(expected))
    with only(backend, "ram_apply"):
        actual = ops.ram_apply(models.base, models.tensors, each, **arguments, backend=backend)
        ops.ram_apply(models.base, models.tensors, each, epsilon=epsilon, out=out, backend=backend)
    assert_bitwise_equal(actual, expected)
    assert_bitwise_equal(out, expected)
    counts = ops.ram_counts(models.base, models.tensors, epsilon=epsilon, backend="reference")
    with only(backend, "ram_counts"):
        assert_bitwise_equal(ops.ram_counts(models.base, models.tensors, epsilon=epsilon, backend=backend), counts)


@each_backend
def test_a_sum_of_factors_may_be_minus_zero(backend: str) -> None:
    """Where the one model changes a base of -0 and its factor is -0: what sums begin with may not show."""
    base = torch.full((7,), -0.0)
    with only(backend, "ram_apply"):
        assert_bitwise_equal(ops.ram_apply(base, [torch.ones(7)], -0.0, backend=backend), base)


@each_backend
@given(data=st.data())
def test_variances_and_energies(backend: str, data: st.DataObject) -> None:
    data.draw(configurations(backend))
    models = data.draw(based(backend))
    expected = ops.model_variance(models.base, models.tensors, backend="reference")
    with only(backend, "model_variance"):
        assert_bitwise_equal(ops.model_variance(models.base, models.tensors, backend=backend), expected)
    mask = None
    if data.draw(st.booleans()):
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
        mask = torch.randint(0, 256, (mask_bytes(models.numel),), dtype=torch.uint8, generator=generator)
    sums = ops.energy_sums(models.base, models.tensors, mask=mask, backend="reference")
    with only(backend, "energy_sums"):
        assert_bitwise_equal(ops.energy_sums(models.base, models.tensors, mask=mask, backend=backend), sums)


@each_backend
@given(data=st.data())
def test_divergences_and_importances(backend: str, data: st.DataObject) -> None:
    data.draw(configurations(backend))
    models = data.draw(based(backend, most=1))
    base, x = models.base, models.tensors[0]
    length = data.draw(st.sampled_from(divisors(models.numel)))
    rows = ops.divergences(base, x, length, backend="reference")
    with only(backend, "divergences"):
        assert_bitwise_equal(ops.divergences(base, x, length, backend=backend), rows)
    rows = data.draw(st.sampled_from((rows, torch.arange(rows.numel()) / 7)))
    expected = ops.importance(base, x, rows, length, backend="reference")
    with only(backend, "importance"):
        assert_bitwise_equal(ops.importance(base, x, rows, length, backend=backend), expected)


@each_backend
@settings(max_examples=20)
@given(
    seed=st.integers(0, 99),
    width=st.sampled_from((1, 2, 3, 63, 64, 65, 511, 512, 513, 1000, 4096, 70_001)),
    spread=st.sampled_from((3e-4, 0.1, 3.0, 40.0)),
)
def test_divergences_of_rows_as_models_have_them(backend: str, seed: int, width: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(3, width, generator=generator)
    x = base + spread * torch.randn(3, width, generator=generator)
    expected = ops.divergences(base, x.bfloat16(), width, backend="reference")
    assert width == 1 or (expected > 0).all()
    with only(backend, "divergences"):
        assert_bitwise_equal(ops.divergences(base, x.bfloat16(), width, backend=backend), expected)


@each_backend
def test_chunks_add_up_and_join(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    # Several tie blocks, where a kernel knows them.
    count, cut = (1000, 296) if backend == "cpu" else (30, 11)
    base = torch.randn(count, 256, generator=generator)
    tensors = [base + 1e-3 * torch.randn(count, 256, generator=generator) for _ in range(3)]
    mask = torch.randint(0, 256, (32 * count,), dtype=torch.uint8, generator=generator)
    parts = [slice(0, cut), slice(cut, count)]

    def found(rows: slice) -> list[Tensor]:
        own, xs = base[rows], [x[rows] for x in tensors]
        bits = mask[rows.start * 32 : rows.stop * 32]
        near = ops.divergences(own, xs[0], 256, backend=backend)
        return [
            ops.model_variance(own, xs, backend=backend),
            near,
            ops.importance(own, xs[0], near, 256, backend=backend),
            ops.ram_counts(own, xs, epsilon=1e-3, backend=backend),
            ops.energy_sums(own, xs, mask=bits, backend=backend),
        ]

    whole, pieces = found(slice(0, count)), [found(part) for part in parts]
    for name, one, *others in zip(range(5), whole, *pieces):
        if name < 3:
            assert_bitwise_equal(torch.cat(others), one)
        elif name == 3:
            assert_bitwise_equal(sum(others), one)
        else:
            for model in range(3):
                assert ops.l1_mass(sum(others)[model]) == ops.l1_mass(one[model])


x = torch.arange(6.0).reshape(2, 3)
REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: ops.nearswap(x, x, math.nan), r"t=nan is not finite"),
    (lambda: ops.nearswap(x, x[:1], 1.0), r"tensors\[0\] has shape \[1, 3\], but base has shape \[2, 3\]"),
    (lambda: ops.nearswap(x, x, 1.0, out=x), r"out overlaps an input"),
    (lambda: ops.nearswap(x, x, 1.0, out=torch.empty(6)), r"out has shape \[6\]"),
    (lambda: ops.nearswap(x, x, 1.0, out_dtype=torch.int8), r"out_dtype=torch.int8 is not supported"),
    (lambda: ops.ram_apply(x, [x, x], [1.0], epsilon=0.1), r"factors has 1 entries for 2 models"),
    (lambda: ops.ram_apply(x, [x], math.inf), r"factors=inf is not finite"),
    (lambda: ops.ram_apply(x, [], 1.0), r"tensors is empty"),
    (lambda: ops.ram_apply(x, [x], 1.0, epsilon=-1.0), r"epsilon=-1.0 is negative"),
    (lambda: ops.ram_counts(x, [x], epsilon=-1.0), r"epsilon=-1.0 is negative"),
    (lambda: ops.model_variance(None, [x]), r"base must be a torch.Tensor, not NoneType"),
    (lambda: ops.model_variance(x, [x.long()]), r"tensors\[0\] has dtype int64"),
    (lambda: ops.energy_sums(x, [x], mask=torch.zeros(2, dtype=torch.uint8)), r"mask must be uint8\[1\]"),
    (lambda: ops.energy_sums(x, [x], mask=torch.zeros(1)), r"mask must be uint8\[1\]"),
    (lambda: ops.divergences(x, x, 4), r"row_length=4 does not divide the 6 elements"),
    (lambda: ops.divergences(x, x, 0), r"row_length=0 is out of range"),
    (lambda: ops.divergences(x, x, 1.5), r"row_length must be an integer"),
    (lambda: ops.importance(x, x, torch.zeros(3), 3), r"divergence must be float32\[2\], one for each row"),
    (lambda: ops.importance(x, x, torch.zeros(2).bfloat16(), 3), r"divergence must be float32\[2\]"),
    (lambda: torch.ops.fastmerge.divergences(x, [x, x], 3, "auto"), r"tensors has 2 entries; this takes exactly one"),
]


@pytest.mark.parametrize(("call", "said"), REFUSED)
def test_what_does_not_fit_is_refused(call: Callable[[], Any], said: str) -> None:
    with pytest.raises((ArgumentError, ArgumentTypeError), match=said) as caught:
        call()
    assert isinstance(caught.value, FastmergeError) and str(caught.value)[-1] in ".)"


def test_float64_is_computed_in_float32_and_returned_as_float64() -> None:
    merged = ops.nearswap(x.double(), (x + 0.25).double(), 0.125)
    assert merged.dtype == torch.float64
    assert_bitwise_equal(merged, ops.nearswap(x, x + 0.25, 0.125).double())
    assert ops.ram_apply(x.bfloat16(), [x], 1.0).dtype == torch.bfloat16
