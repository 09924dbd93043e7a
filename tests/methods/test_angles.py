"""Sines and angles: as accurate as float64 is, and the same bits from numbers and from tensors."""

from __future__ import annotations

import math
import random

import pytest
import torch

from fastmerge.methods.angles import angle, clipped, root, sine

DRAW = random.Random(7)
ANGLES = [0.0, -0.0, math.pi, -math.pi, math.pi / 2, 3.0, 1e-300, 1e-8, *(DRAW.uniform(-40, 40) for _ in range(5000))]
COSINES = [0.0, 1.0, -1.0, 1 - 1e-15, 1e-15 - 1, 1 - 1e-9, 2.0, -3.0, *(DRAW.uniform(-1, 1) for _ in range(20_000))]
EPSILON = 2.0**-52


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e5])
def test_sines(scale: float) -> None:
    for x in ANGLES:
        assert abs(sine(x * scale) - math.sin(x * scale)) <= 2 * EPSILON, x * scale


def test_sines_of_anything_lie_within_1() -> None:
    for exponent in range(0, 305, 4):
        assert -1 <= sine(7.0 * 10.0**exponent / 8) <= 1


def test_angles() -> None:
    for x in COSINES:
        exact = math.acos(min(max(x, -1.0), 1.0))
        assert abs(angle(x) - exact) <= 8 * EPSILON * exact, x
    assert angle(1.0) == 0.0 and angle(-1.0) == math.pi


def test_tensors_and_numbers_have_the_same_bits() -> None:
    """Square roots, too: torch's own differ from one build to the next."""
    for function, given in ((sine, ANGLES), (angle, COSINES), (root, [abs(x) for x in ANGLES])):
        found = function(torch.tensor(given, dtype=torch.float64))
        assert found.tolist() == [function(x) for x in given], function.__name__
    strided = torch.tensor([COSINES, COSINES], dtype=torch.float64).t()[:, 0]
    assert angle(strided).tolist() == [angle(x) for x in COSINES]


def test_nan_stays_nan_in_tensors() -> None:
    nan = torch.tensor([math.nan, 0.5], dtype=torch.float64)
    for found in (sine(nan), angle(nan), clipped(nan, -1.0, 1.0)):
        assert found.isnan().tolist() == [True, False]
