"""Sines and angles in float64 whose bits are the same everywhere.

The C library's differ in their last bits from one machine to the next, and with torch's so would a merge on another
device. These are made of additions, multiplications, divisions and square roots, each of which IEEE 754 rounds in one
way. They take Python floats, or float64 tensors on any device; their errors are a few units of 2**-53.
"""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Number = TypeVar("Number", float, Tensor)

_PI_HIGH = 3.141592651605606
"""Pi to 29 bits: its products with whole numbers below 2**24 are exact."""
_PI_LOW = 1.984187159361081e-09
_HALF_PI = math.pi / 2
_INVERSE_PI = 1 / math.pi

_SINE = [(-1) ** k / math.factorial(2 * k + 1) for k in range(13)]
"""Taylor's: what is left out at pi / 2 is below 2**-66."""
_ARCTANGENT = [(-1) ** k / (2 * k + 1) for k in range(9)]
"""Taylor's: what is left out at tan(pi / 32) is below 2**-64."""


def root(x: Number) -> Number:
    """The square root, correctly rounded: on a CPU torch's own may be the MKL's, which is not."""
    if not isinstance(x, Tensor):
        return math.sqrt(x)
    return torch.from_numpy(np.sqrt(x.contiguous().numpy())) if x.device.type == "cpu" else x.sqrt()


def clipped(x: Number, low: float, high: float) -> Number:
    """`x` within [low, high]; NaN stays NaN in a tensor."""
    return x.clamp(low, high) if isinstance(x, Tensor) else min(max(x, low), high)


def sine(x: Number) -> Number:
    """The sine of an angle. It is accurate up to a million turns or so, and within [-1, 1] for all others."""
    # Never divided by a number: on a GPU that may become a multiplication by its reciprocal.
    halves = (x * _INVERSE_PI).round() if isinstance(x, Tensor) else float(round(x * _INVERSE_PI))
    rest = clipped((x - halves * _PI_HIGH) - halves * _PI_LOW, -_HALF_PI, _HALF_PI)
    sign = 1.0 - 2.0 * (halves % 2.0)
    return sign * (rest * _series(_SINE, rest * rest))


def angle(cosine: Number) -> Number:
    """The angle in [0, pi] that has this cosine, which is clipped to [-1, 1]."""
    cosine = clipped(cosine, -1.0, 1.0)
    # The tangent of a quarter of the angle is at most 1; halved three times more, it is below 0.1.
    tangent = root((1.0 - cosine) * 0.5) / (1.0 + root((1.0 + cosine) * 0.5))
    for _ in range(3):
        tangent = tangent / (1.0 + root(1.0 + tangent * tangent))
    return 32.0 * (tangent * _series(_ARCTANGENT, tangent * tangent))


def _series(coefficients: list[float], square: Number) -> Number:
    """The even power series in `square`, by Horner's rule."""
    total = square * coefficients[-1]
    for coefficient in coefficients[-2:0:-1]:
        total = (total + coefficient) * square
    return total + coefficients[0]
