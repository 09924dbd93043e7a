"""Inner products by their definition, one number after the other, and what is promised about them."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastmerge.backends.rule import GRAM_BLOCK
from fastmerge.reference import geometry
from tests import strategies
from tests.numeric import assert_bitwise_equal


def one_by_one(x: list[float], y: list[float]) -> float:
    """The sum of a block's products in Python's numbers: 64 lanes, each in rising order, then halves."""
    lanes = [0.0] * 64
    for place, (one, other) in enumerate(zip(x, y, strict=True)):
        lanes[place % 64] += one * other
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = [lanes[i] + lanes[half + i] for i in range(half)]
    return lanes[0]


@given(data=st.data())
def test_each_block_is_added_up_in_its_order(data: st.DataObject) -> None:
    models = data.draw(strategies.models(most=3, blocks=False))
    numel = models.numel
    row_length = data.draw(st.sampled_from([n for n in range(1, numel + 1) if numel % n == 0] or [1]))
    found = geometry.gram(models.base, models.tensors, row_length)
    count = len(models.tensors)
    assert found.shape == (count * (count + 1) // 2, numel // row_length, -(-row_length // GRAM_BLOCK))
    rows = []
    for x in models.tensors:
        value = x.float() if models.base is None else x.float() - models.base.float()
        rows.append(value.reshape(-1, row_length).tolist())
    expected = [
        [one_by_one(rows[i][row], rows[j][row]) for row in range(numel // row_length)]
        for i in range(count)
        for j in range(i, count)
    ]
    wanted = torch.tensor(expected, dtype=torch.float64).reshape(found.shape[:2])[..., None]
    assert_bitwise_equal(found, wanted.masked_fill(wanted.isnan(), math.nan))


def draw(numel: int, seed: int) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("numel", [1, 63, 65, 4095, 4096, 4097, 10_000])
def test_blocks_are_counted_from_the_beginning_of_each_row(numel: int) -> None:
    x, y = draw(3 * numel, 0), draw(3 * numel, 1)
    found = geometry.gram(None, [x, y], numel)
    for row in range(3):
        for block in range(found.shape[2]):
            here = slice(row * numel + block * 4096, min(row * numel + (block + 1) * 4096, (row + 1) * numel))
            expected = one_by_one(x[here].tolist(), y[here].tolist())
            assert found[1, row, block].item() == expected


def test_chunks_that_begin_at_blocks_have_the_sums_of_the_whole() -> None:
    x, y, base = (draw(20_001, seed) for seed in range(3))
    whole = geometry.gram(base, [x, y], 20_001)
    cuts = [0, 4096, 12_288, 20_001]
    parts = [geometry.gram(base[a:b], [x[a:b], y[a:b]], b - a) for a, b in pairwise(cuts)]
    assert_bitwise_equal(torch.cat(parts, dim=2), whole)


def test_products_are_exact_whatever_their_size() -> None:
    """Of the least denormals, and of the largest numbers: neither vanishes nor becomes infinite."""
    tiny, huge = torch.tensor([2.0**-149]), torch.tensor([3.4028234663852886e38])
    assert geometry.gram(None, [tiny], 1).item() == 2.0**-298
    assert Fraction(geometry.gram(None, [huge], 1).item()) == Fraction(huge.item()) ** 2
    assert geometry.gram(None, [tiny, huge], 1)[1].item() == 2.0**-149 * huge.item()


def test_what_is_not_finite() -> None:
    x = torch.tensor([math.inf, 1.0, math.nan, 3.4e38])
    y = torch.tensor([0.0, -math.inf, 1.0, 1.0])
    found = geometry.gram(None, [x, y], 1)
    assert found[0, :, 0].tolist()[:2] == [math.inf, 1.0]
    assert_bitwise_equal(found[1, :3, 0], torch.tensor([math.nan, -math.inf, math.nan], dtype=torch.float64))
    # A delta that float32 cannot hold is infinite.
    assert geometry.gram(-x[3:], [x[3:]], 1).item() == math.inf


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_nothing_has_no_sums(shape: tuple[int, ...]) -> None:
    assert geometry.gram(None, [torch.empty(shape)] * 2, 1).shape == (3, 0, 1)
