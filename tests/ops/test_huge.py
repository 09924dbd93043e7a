"""More than 2**31 elements: indices and counts are 64-bit. Untouched zeros cost no memory."""

import pytest
import torch

from fastmerge import backends, ops

NUMEL = 2**31 + 70001
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        backends.reason("cpu") is not None,
        reason="no cpu backend, and the reference would take minutes; tests/gpu has this on a GPU",
    ),
]


@pytest.fixture(scope="module")
def mostly_zeros():
    x = torch.zeros(NUMEL, dtype=torch.bfloat16)
    x[5] = -3.0
    x[2**31 + 7] = 2.0
    x[NUMEL - 1] = 1.0
    return x


def test_histogram_counts_all(mostly_zeros):
    bins = ops.abs_histogram(mostly_zeros, backend="cpu")
    assert int(bins.sum()) == NUMEL
    assert int(bins[0]) == NUMEL - 3


def test_kth_magnitude_finds_the_last_elements(mostly_zeros):
    assert [ops.kth_magnitude(mostly_zeros, k, backend="cpu") for k in (1, 2, 3, 4)] == [3.0, 2.0, 1.0, 0.0]


def test_bounds_count_ties_past_the_31st_bit(mostly_zeros):
    bounds, ties_before = ops.magnitude_bounds(
        None, [mostly_zeros], [0], [NUMEL - 10], compute=torch.float32, backend="cpu"
    )
    # All but ten of the zeros lie before the cut.
    assert bounds.tolist() == [[[2**31, 0], [0, NUMEL - 13]]]
    assert int(ties_before[0, 1, -1]) == (NUMEL - 1) // ops.TIE_BLOCK * ops.TIE_BLOCK - 2


def test_random_masks_at_a_huge_offset_are_those_of_the_whole(mostly_zeros):
    x = torch.ones(1000)
    place = 2**34 - 500  # the counter's low word wraps inside
    whole = ops.sparsify(x, 0.5, method="bernoulli", offset=place, backend="cpu")
    parts = [
        ops.sparsify(x[i : i + 100], 0.5, method="bernoulli", offset=place + i, backend="cpu")
        for i in range(0, 1000, 100)
    ]
    assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(whole, ops.sparsify(x, 0.5, method="bernoulli", offset=place, backend="reference"))
