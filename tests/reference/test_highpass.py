"""FR-Merging's filter against its formula: the transform as matrices, the mask made of Python numbers."""

from __future__ import annotations

import cmath
import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmerge import ops
from fastmerge.reference.highpass import highpass_mask

sides = st.one_of(st.integers(1, 13), st.sampled_from((16, 20, 21, 30, 41)))
ratios = st.one_of(st.sampled_from((0.0, 1.0, 0.05, 0.09, 0.1, 0.5, 0.6, 0.7, 0.7071, 0.7072, 0.9)), st.floats(0, 1))
modes = st.sampled_from(("ideal", "official"))


@functools.cache
def transform(size: int) -> np.ndarray:
    return np.array([[cmath.exp(-2j * math.pi * (k * j % size) / size) for j in range(size)] for k in range(size)])


def factor(y: int, x: int, height: int, width: int, ratio: float, mode: str) -> float:
    """What one coefficient is multiplied by."""
    side = min(height, width)
    if mode == "ideal":
        cutoff = ratio * side / 2
        return 0.0 if min(y, height - y) ** 2 + min(x, width - x) ** 2 < cutoff * cutoff else 1.0
    distance = math.sqrt((y - height // 2) ** 2 + (x - width // 2) ** 2)
    up_to_the_ring, from_the_ring = distance <= side // 10, distance >= side // 10
    return float(up_to_the_ring) + float(from_the_ring) if distance <= ratio * side else 0.0


def expected(x: np.ndarray, ratio: float, mode: str) -> np.ndarray:
    height, width = x.shape
    down, along = transform(height), transform(width)
    mask = np.array([[factor(i, j, height, width, ratio, mode) for j in range(width)] for i in range(height)])
    spectrum = mask * (down @ x @ along.T)
    return (down.conj() @ spectrum @ along.conj().T).real / (height * width)


@given(sides, sides, ratios, modes, st.integers(0, 2**32 - 1))
@settings(max_examples=300)
def test_the_definition(height: int, width: int, ratio: float, mode: str, seed: int) -> None:
    x = torch.randn(height, width, generator=torch.Generator().manual_seed(seed))
    actual = ops.highpass(x, ratio, mode=mode, backend="reference").double().numpy()
    wanted = expected(x.double().numpy(), ratio, mode)
    rounding = 2.0**-24 * np.abs(wanted).max() + 1e-14 * float(x.abs().max())
    assert np.abs(actual - wanted).max() <= rounding


def test_ratio_zero_is_the_identity_and_any_other_drops_the_mean() -> None:
    x = torch.randn(6, 9, generator=torch.Generator().manual_seed(0)) + 3
    assert torch.equal(ops.highpass(x, 0.0, backend="reference"), x)
    assert abs(float(ops.highpass(x, 1e-9, backend="reference").double().mean())) < 1e-7


def test_ratio_one_drops_a_disc_of_half_the_side() -> None:
    kept = highpass_mask(8, 12, 1.0, "ideal")
    assert kept[3].tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0]  # 3^2 + 2^2 < 4^2 <= 3^2 + 3^2
    assert kept[4].all() and not kept[0, :4].any() and kept[0, 4]


def test_official_on_a_square_removes_nothing_above_the_diagonal_and_still_doubles() -> None:
    mask = highpass_mask(64, 64, 0.7072, "official")
    assert (mask == 2).nonzero().tolist() == [[26, 32], [32, 26], [32, 38], [38, 32]]
    assert (mask >= 1).all()
    assert (highpass_mask(64, 64, 0.7, "official") == 0).sum() == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_the_float32_result_rounded(dtype: torch.dtype) -> None:
    x = torch.randn(5, 6, 9, generator=torch.Generator().manual_seed(1)).to(dtype)
    whole = ops.highpass(x.float(), 0.5, backend="reference")
    assert torch.equal(ops.highpass(x, 0.5, backend="reference"), whole.to(dtype))
    assert torch.equal(ops.highpass(x[3], 0.5, backend="reference"), whole[3].to(dtype))
