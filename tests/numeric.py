"""Comparisons by name: every test says whether it claims equal bits or equal values."""

from __future__ import annotations

import torch
from torch import Tensor

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(x: Tensor) -> Tensor:
    """The bit patterns of a tensor's elements, flat, as integers of the same width."""
    flat = x.detach().contiguous().reshape(-1)
    return flat.view(_BITS[flat.element_size()]) if flat.dtype != torch.bool else flat.to(torch.uint8)


def assert_bitwise_equal(actual: Tensor, expected: Tensor) -> None:
    """Same dtype, same shape, same bits (so 0.0 differs from -0.0, and NaNs must be the same NaN)."""
    assert actual.dtype == expected.dtype, f"dtype {actual.dtype} instead of {expected.dtype}"
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    differs = bits(actual) != bits(expected)
    if bool(differs.any()):
        at = int(differs.nonzero()[0, 0])
        got, want = actual.contiguous().reshape(-1)[at].item(), expected.contiguous().reshape(-1)[at].item()
        count = int(differs.sum())
        raise AssertionError(
            f"{count} of {differs.numel()} elements differ, first at {at}: {got!r} instead of {want!r}"
        )


def poison_(x: Tensor) -> Tensor:
    """Fill a tensor with NaNs whose bits no kernel writes, so that an unwritten element fails the test."""
    if x.element_size() == 4:
        bits_of = 0x7FABCDEF
    else:
        bits_of = 0x7FAB if x.dtype == torch.bfloat16 else 0x7DAB
    x.view(_BITS[x.element_size()]).fill_(bits_of)
    return x
