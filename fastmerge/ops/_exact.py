"""What is computed outside the kernels, exactly, in Python's integers: tensor ids and the scales of L1 rescaling."""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache

import torch
from torch import Tensor

from ..errors import ArgumentError, ArgumentTypeError
from . import _checks

SMALLEST_MASS = 1e-7


@lru_cache(maxsize=65536)
def tensor_id(name: str) -> int:
    """The 64-bit number that selects a tensor's random words.

    name: the tensor's name in its checkpoint.
    Returns the first 64 bits, little-endian, of the SHA-256 of the name in UTF-8, as an unsigned int.
    Errors: ArgumentTypeError when `name` is not a string.
    """
    if not isinstance(name, str):
        raise ArgumentTypeError(f"name must be a string, not {type(name).__name__}; pass the tensor's name.")
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def l1_mass(limbs: Tensor | list[int]) -> float:
    """The sum that exact limbs stand for, as the nearest float64.

    limbs: int64[12], base 2**32, little end first, in units of 2**-149; limbs may exceed 32 bits after being added.
    """
    values = limbs.tolist() if isinstance(limbs, Tensor) else limbs
    return sum(limb << 32 * place for place, limb in enumerate(values)) / (1 << 149)


def _rounded(value: float, compute: torch.dtype) -> float:
    return torch.tensor(value, dtype=torch.float32).to(compute).item()


def l1_scale(limbs: Tensor, compute: torch.dtype = torch.float32) -> float:
    """The factor that gives a sparsified delta its L1 norm back: the mass before over the mass after.

    limbs: int64[2, 12], one model's row of `l1_sums` (added over chunks): [0] of all elements, [1] of the kept ones.
    compute: the dtype to which both masses and their ratio are rounded, as a library that sums in that dtype does;
        where a mass is too large for it (beyond 65504 in float16), the ratio is taken in float32 instead.
    Returns a float that is exact in float32; 1.0 when either mass is below 1e-7 (nothing to rescale).
    Source: DARE with mergekit's rescaling (L1 norms before / after, not 1 / density).
    Errors: ArgumentError when `limbs` does not have the shape [2, 12].
    """
    _checks.compute_dtype("compute", compute)
    if not isinstance(limbs, Tensor) or limbs.shape != (2, 12):
        raise ArgumentError("limbs must be one model's int64[2, 12] row of l1_sums; index the model first.")
    before, after = l1_mass(limbs[0]), l1_mass(limbs[1])
    if before < SMALLEST_MASS or after < SMALLEST_MASS:
        return 1.0
    if compute != torch.float32:
        rounded_before, rounded_after = _rounded(before, compute), _rounded(after, compute)
        if math.isfinite(rounded_before) and rounded_after > 0:
            return _rounded(rounded_before / rounded_after, compute)
    return _rounded(before / after, torch.float32)
