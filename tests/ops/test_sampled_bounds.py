"""Thresholds that compiled code brackets by a sample first: exact where the sample says little, or the wrong thing."""

from __future__ import annotations

import pytest
import torch

from fastmerge import backends, ops
from tests.numeric import assert_bitwise_equal
from tests.ops.running import only

pytestmark = pytest.mark.skipif(backends.reason("cpu") is not None, reason="no cpu backend")


def rows_that_fall(numel: int, generator: torch.Generator) -> torch.Tensor:
    """As in the factors of an adapter: each row, or column, smaller than the one before."""
    x = torch.randn(numel, generator=generator)
    return x * 0.7 ** (torch.arange(numel) * 16 // max(numel, 1))


def hidden_from_the_sample(numel: int, generator: torch.Generator) -> torch.Tensor:
    """Runs of 48 elements, of which one in 29 is large: what a run of neighbours shows is not what there is."""
    large = torch.rand(-(-numel // 48), generator=generator) < 1 / 29
    return torch.randn(numel, generator=generator) * torch.where(large, 1e6, 1.0).repeat_interleave(48)[:numel]


KINDS = {
    "normal": lambda numel, generator: torch.randn(numel, generator=generator),
    "rows that fall": rows_that_fall,
    "hidden from the sample": hidden_from_the_sample,
    "few values": lambda numel, generator: torch.randint(-3, 4, (numel,), generator=generator) / 4,
    "zeros but for some": lambda numel, generator: (torch.rand(numel, generator=generator) < 0.01) * 1.5,
    "rising": lambda numel, generator: torch.arange(numel) * 1e-3,
    "not finite": lambda numel, generator: torch.randn(numel, generator=generator).log(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_bounds_of_vectors_around_the_sizes_of_samples(kind):
    # Samples begin past 8192 elements, grow from 32 * 1024 on and are largest from 32 * 32768 on.
    for numel in (8192, 8193, 32 * 1024 + 33, 65537, 131072, *([32 * 32768 + 5] if kind == "few values" else [])):
        generator = torch.Generator().manual_seed(numel)
        x = KINDS[kind](numel, generator).float()
        for first, last in ((0, numel // 5), (1, 2), (numel // 2, numel - 1), (numel // 100, numel // 29)):
            expected = ops.magnitude_bounds(None, [x], [first], [last], backend="reference")
            with only("cpu", "magnitude_bounds"):
                actual = ops.magnitude_bounds(None, [x], [first], [last], backend="cpu")
            assert_bitwise_equal(actual[0], expected[0])
            assert_bitwise_equal(actual[1], expected[1])
