"""exp, tanh and log for float32, the same bits on every machine and backend.

Only additions, multiplications, one division and integer operations on bits, each rounded on its own. exp and tanh
write x as k ln 2 + r with |r| <= ln 2 / 2, log as 2**k (1 + f). k ln 2 is taken in two parts, of which the first times
k is exact. The header `fastmerge/functions.h` says the same in C++.
"""

from __future__ import annotations

import torch
from torch import Tensor

# All of these are float32 values, so that an operation with a Python number rounds nothing.
LOG2_E = float.fromhex("0x1.715476p+0")
LN2_HIGH = float.fromhex("0x1.62e4p-1")
LN2_LOW = float.fromhex("0x1.7f7d1cp-20")
ROUNDER = 12582912.0  # 1.5 * 2**23: adding it rounds to an integer, which is in the low bits then
ROUNDER_BITS = 0x4B400000
POLYNOMIAL = [
    float.fromhex(number)
    for number in ("0x1.6a23a8p-10", "0x1.123a36p-7", "0x1.5558f4p-5", "0x1.555490p-3", "0x1.fffffcp-2")
]
EXPONENT_BIAS = 127
MANTISSA_BITS = 23
SMALLEST_NORMAL = 2.0**-126
TWO_23 = 2.0**23
ROOT_HALF_BITS = 0x3F3504F3  # of the float32 just below the root of 1/2
INFINITY, NAN = float("inf"), float("nan")
LOG_POLYNOMIAL = [
    float.fromhex(number)
    for number in (
        "-0x1.38b56ap-4",
        "0x1.055b66p-3",
        "-0x1.0d8544p-3",
        "0x1.22da1ep-3",
        "-0x1.547244p-3",
        "0x1.99a008p-3",
        "-0x1.000226p-2",
        "0x1.555554p-2",
    )
]


def exp(x: Tensor) -> Tensor:
    """e**x, at most 1 ulp off, measured over every float32: inf above 88.72, denormal below -87.34, 0 below -103.97."""
    low = torch.where(x < -104.0, -104.0, x)
    r, k = reduced(torch.where(low > 89.0, 89.0, low))
    value = reduced_expm1(r) + 1.0
    # In two factors: 2**128 and 2**-150 are no float32, and a denormal result must be rounded once.
    half = k >> 1
    return (value * power_of_two(half)) * power_of_two(k - half)


def tanh(x: Tensor) -> Tensor:
    """The hyperbolic tangent, at most 2.7 ulp off, measured over every float32: odd, never beyond 1, x where x is tiny.

    From e**2x - 1 rather than e**2x, which would leave nothing of a small x.
    """
    magnitude = x.abs()
    bounded = torch.where(magnitude > 10.0, 10.0, magnitude)
    r, k = reduced(bounded + bounded)
    scale = power_of_two(k)
    expm1 = reduced_expm1(r) * scale + (scale - 1.0)
    return torch.copysign(expm1 / (expm1 + 2.0), x)


def reduced(x: Tensor) -> tuple[Tensor, Tensor]:
    """The r, and the k (int32), of x = k ln 2 + r."""
    shifted = x * LOG2_E + ROUNDER
    k = shifted - ROUNDER
    r = (x - k * LN2_HIGH) - k * LN2_LOW
    return r, shifted.view(torch.int32) - ROUNDER_BITS


def reduced_expm1(r: Tensor) -> Tensor:
    """e**r - 1 for |r| <= ln 2 / 2, as exact for small r as for large.

    The polynomial is the one that makes the greatest relative error of e**r least: 3e-9.
    """
    q = torch.full_like(r, POLYNOMIAL[0])
    for coefficient in POLYNOMIAL[1:]:
        q = q * r + coefficient
    return r + (r * r) * q


def power_of_two(k: Tensor) -> Tensor:
    """2**k as float32, for -127 < k < 128."""
    return ((k + EXPONENT_BIAS) << MANTISSA_BITS).view(torch.float32)


def log(x: Tensor) -> Tensor:
    """The natural logarithm, at most 0.9 ulp off, measured over every float32: -inf at 0, NaN below.

    x = 2**k (1 + f) with sqrt(1/2) <= 1 + f < sqrt(2); log(1 + f) = f - f**2 / 2 + f**3 P(f), so that nothing is lost
    where x is near 1.
    """
    denormal = x < SMALLEST_NORMAL
    bits = torch.where(denormal, x * TWO_23, x).view(torch.int32)
    # Arithmetic on the bits: the exponent that leaves a mantissa from sqrt(1/2) on.
    exponent = (bits - ROOT_HALF_BITS) >> MANTISSA_BITS
    f = (bits - (exponent << MANTISSA_BITS)).view(torch.float32) - 1.0
    k = torch.where(denormal, exponent - MANTISSA_BITS, exponent).to(torch.float32)
    square = f * f
    rest = ((f * square) * log_polynomial(f) + k * LN2_LOW) - 0.5 * square
    value = (f + rest) + k * LN2_HIGH
    value = torch.where(x == 0.0, -INFINITY, torch.where(x == INFINITY, INFINITY, value))
    # A NaN comes out of the bits as a number.
    return torch.where((x < 0.0) | x.isnan(), NAN, value)


def log_polynomial(f: Tensor) -> Tensor:
    """The P of log(1 + f) = f - f**2 / 2 + f**3 P(f), for sqrt(1/2) <= 1 + f < sqrt(2).

    The polynomial is the one that makes the greatest relative error of the logarithm least: 6e-9.
    """
    p = torch.full_like(f, LOG_POLYNOMIAL[0])
    for coefficient in LOG_POLYNOMIAL[1:]:
        p = p * f + coefficient
    return p
