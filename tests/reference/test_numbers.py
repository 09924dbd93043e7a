"""Rounding, keys and NaNs of the reference against integer arithmetic and exact fractions."""

from __future__ import annotations

import math
import struct
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastmerge.reference import numbers
from tests.numeric import assert_bitwise_equal, bits

float32s = st.floats(width=32, allow_nan=False)


def nearest_even_bfloat16(pattern: int) -> int:
    """Round a float32 bit pattern to its upper half."""
    upper, lower = pattern >> 16, pattern & 0xFFFF
    return upper + (lower > 0x8000 or (lower == 0x8000 and upper & 1 == 1))


def test_bfloat16_rounds_to_nearest_even_at_every_upper_half() -> None:
    uppers = torch.arange(65536)
    for lower in (0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        patterns = uppers << 16 | lower
        finite = (patterns & 0x7FFFFFFF) < numbers.INF_KEY
        patterns = patterns[finite]
        x = torch.where(patterns >= 2**31, patterns - 2**32, patterns).to(torch.int32).view(torch.float32)
        expected = [nearest_even_bfloat16(p) << 16 for p in patterns.tolist()]
        actual = numbers.round_to(x, torch.bfloat16).view(torch.int32).to(torch.int64) & 0xFFFFFFFF
        assert actual.tolist() == expected


@given(
    st.lists(
        st.one_of(float32s, st.floats(-70000, 70000, width=32), st.floats(-(2.0**-13), 2.0**-13, width=32)), min_size=1
    )
)
def test_float16_rounds_as_the_standard_library_does_and_overflows_to_infinity(values: list[float]) -> None:
    def half(value: float) -> float:
        try:
            return struct.unpack("e", struct.pack("e", value))[0]
        except OverflowError:
            return math.copysign(math.inf, value)

    actual = numbers.round_to(torch.tensor(values), torch.float16)
    assert_bitwise_equal(actual, torch.tensor([half(v) for v in values]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_widening_is_exact(dtype: torch.dtype) -> None:
    patterns = torch.arange(-32768, 32768).to(torch.int16).view(dtype)
    wide = numbers.widen(patterns, torch.float32)
    finite = wide.isfinite()
    assert torch.equal(wide[finite].double(), patterns[finite].double())
    assert_bitwise_equal(wide[finite].to(dtype), patterns[finite])


@given(float32s, float32s)
def test_sums_products_and_quotients_round_once_and_keep_denormals(a: float, b: float) -> None:
    x, y = torch.tensor([a]), torch.tensor([b])
    results = {"sum": (x + y).item(), "product": (x * y).item()}
    if math.isfinite(a) and math.isfinite(b):
        exact = {"sum": Fraction(a) + Fraction(b), "product": Fraction(a) * Fraction(b)}
        for name, result in results.items():
            if math.isfinite(result):
                assert is_nearest(result, exact[name]), (name, a, b)
        if b != 0 and math.isfinite(quotient := (x / y).item()):
            assert is_nearest(quotient, Fraction(a) / Fraction(b))


def is_nearest(result: float, exact: Fraction) -> bool:
    """No other float32 is nearer."""
    here = torch.tensor(result)
    neighbours = [torch.nextafter(here, torch.tensor(limit)).item() for limit in (math.inf, -math.inf)]
    distance = abs(Fraction(result) - exact)
    return all(distance <= abs(Fraction(n) - exact) for n in neighbours if math.isfinite(n))


def test_denormals_are_not_flushed() -> None:
    tiny = torch.full((1000,), 1e-45)
    assert (tiny * 1.0 == tiny).all()
    assert (tiny + tiny == 2 * 1.401298464324817e-45).all()
    assert (torch.full((1000,), 1.1754943508222875e-38) / 2 == 5.877471754111438e-39).all()
    assert (numbers.round_to(torch.full((1000,), 6e-8), torch.float16) == 2.0**-24).all()
    assert (numbers.round_to(torch.full((1000,), 9.2e-41), torch.bfloat16) > 0).all()


@given(st.lists(st.floats(width=32), min_size=2, max_size=20))
def test_keys_order_magnitudes_with_nan_on_top(values: list[float]) -> None:
    keys = numbers.keys(torch.tensor(values)).tolist()
    for a, key_a in zip(values, keys):
        if math.isnan(a):
            assert key_a == numbers.NAN_KEY > numbers.INF_KEY
        else:
            assert numbers.magnitude_of(key_a).item() == abs(a)
        for b, key_b in zip(values, keys):
            if not math.isnan(a) and not math.isnan(b):
                assert (key_a < key_b) == (abs(a) < abs(b))


@pytest.mark.parametrize(
    ("dtype", "pattern"), [(torch.float32, 0x7FC00000), (torch.bfloat16, 0x7FC0), (torch.float16, 0x7E00)]
)
def test_canonical_nan(dtype: torch.dtype, pattern: int) -> None:
    nans = torch.tensor([-1, 0x7F800001, -0x3FFFFF, 0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    assert bits(numbers.canonical_nan(nans.to(dtype))).tolist() == [pattern] * 4
    assert numbers.keys(nans).tolist() == [numbers.NAN_KEY] * 4


@given(st.floats(width=32))
def test_sign(value: float) -> None:
    expected = 0.0 if math.isnan(value) or value == 0 else math.copysign(1.0, value)
    assert numbers.sign(torch.tensor([value])).item() == expected
