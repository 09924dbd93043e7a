"""How numbers are widened, rounded and ordered.

Every kernel computes in float32. `compute` names the dtype C whose precision the intermediate results have: with
C = float32 nothing is rounded before the output; with C = bfloat16 or float16 every step is rounded to nearest even to
C and widened again, which is how a library that computes in C itself behaves.

A value's *key* is the bit pattern of its magnitude. Keys order magnitudes exactly, put NaN above infinity, and make
all NaNs one value.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce

import torch
from torch import Tensor

INF_KEY = 0x7F800000
NAN_KEY = 0x7FC00000
KEY_BITS = 31

# The keys of 16-bit types: (infinity, the canonical NaN).
HALF_KEYS = {torch.bfloat16: (0x7F80, 0x7FC0), torch.float16: (0x7C00, 0x7E00)}


def round_to(x: Tensor, compute: torch.dtype) -> Tensor:
    """Round float32 values to nearest even to `compute` and widen them again."""
    return x if compute == torch.float32 else x.to(compute).to(torch.float32)


def round_scalar(value: float, compute: torch.dtype) -> float:
    """Round a Python float to float32, then to `compute`."""
    return round_to(torch.tensor(value, dtype=torch.float32), compute).item()


def widen(x: Tensor, compute: torch.dtype) -> Tensor:
    """The values of `x` as a flat float32 tensor, having passed through `compute`."""
    return round_to(x.reshape(-1).to(torch.float32), compute)


def difference(base: Tensor | None, x: Tensor, compute: torch.dtype) -> Tensor:
    """The deltas x - base, flat float32; without a base, the values themselves."""
    values = widen(x, compute)
    return values if base is None else round_to(values - widen(base, compute), compute)


def keys(x: Tensor) -> Tensor:
    """The 31-bit keys of float32 values, as int64."""
    bits = x.contiguous().view(torch.int32) & 0x7FFFFFFF
    return torch.where(bits > INF_KEY, NAN_KEY, bits).to(torch.int64)


def half_keys(x: Tensor) -> Tensor:
    """The 15-bit keys of bfloat16 or float16 values, as int64."""
    infinity, nan = HALF_KEYS[x.dtype]
    bits = x.contiguous().view(torch.int16) & 0x7FFF
    return torch.where(bits > infinity, nan, bits).to(torch.int64)


def magnitude_of(key: int) -> Tensor:
    """The float32 magnitude (0-d) whose key this is."""
    return torch.tensor(key, dtype=torch.int32).view(torch.float32)


def canonical_nan(x: Tensor) -> Tensor:
    """`x` with every NaN replaced by the positive quiet NaN without a payload."""
    return x.masked_fill(x.isnan(), float("nan"))


def sign(x: Tensor) -> Tensor:
    """+1, -1 or 0 as float32; zeros of both signs and NaN have sign 0."""
    return (x > 0).to(torch.float32) - (x < 0).to(torch.float32)


def ordered_sum(terms: Iterable[Tensor]) -> Tensor:
    """The float32 sum of the terms from left to right, starting from the first one (not from zero)."""
    return reduce(torch.add, terms)
