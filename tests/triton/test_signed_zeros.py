"""The sign of a sum of zeros is the reference's, however many models there are and however they reach the kernel."""

from __future__ import annotations

import pytest
import torch

from fastmerge import backends, ops
from tests.numeric import assert_bitwise_equal

if backends.available()["triton"] is not None:
    pytest.skip(
        f"no triton backend here; tests/ops holds the others to the same: {backends.reason('triton')}",
        allow_module_level=True,
    )

ZEROS = torch.tensor([0.0, -0.0])


@pytest.mark.parametrize("count", [1, 2, 8, 9, 17])
@pytest.mark.parametrize("election", ["none", "weighted", "total", "frequency"])
@pytest.mark.parametrize("divisor", ["none", "count"])
def test_sums_of_zeros(count: int, election: str, divisor: str) -> None:
    generator = torch.Generator().manual_seed(count)
    # All -0, all +0, each single one, and any mixture.
    rows = [torch.cat([ZEROS, ZEROS[torch.randint(0, 2, (300,), generator=generator)]]) for _ in range(count)]
    for i, row in enumerate(rows):
        row[2:] = torch.where(torch.arange(300) % (count + 1) == i, -row[2:], row[2:])
    arguments = {
        "inputs": "deltas",
        "rule": ops.SparsifyRule(),
        "scales": [1.0] * count,
        "election": election,
        "zero_sign": "negative",
        "divisor": divisor,
        "divisor_value": 1.0,
        "lambda_": 1.0,
        "compute": torch.float32,
        "out_dtype": torch.float32,
    }
    for weight in (1.0, -1.0, 0.0, -0.0):
        expected = ops.consensus_apply(None, rows, [weight] * count, **arguments, backend="reference")
        actual = ops.consensus_apply(None, rows, [weight] * count, **arguments, backend="triton")
        assert_bitwise_equal(actual, expected)


@pytest.mark.parametrize("count", [2, 9, 16])
def test_sums_of_negative_zeros_in_whole_tiles(count: int) -> None:
    """Where models are taken in groups, those beyond the last one add nothing."""
    rows = [torch.full((9000,), -0.0) for _ in range(count)]
    arguments = {"inputs": "deltas", "election": "none", "divisor": "none", "out_dtype": torch.float32}
    actual = ops.consensus_apply(None, rows, [1.0] * count, **arguments, backend="triton")
    assert_bitwise_equal(actual, torch.full((9000,), -0.0))
