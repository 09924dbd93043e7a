"""Inputs that are hard for somebody: for radix selection, for branch prediction, for float units, for cut-offs in ties.

A kernel that is fast on normal values alone is not fast: real deltas are discretised, frozen layers are all equal, and
denormals stall units that handle them in microcode.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Draw = Callable[[int, torch.Generator], torch.Tensor]


def _normal(size: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(size, generator=generator, device=generator.device)


def _equal(size: int, generator: torch.Generator) -> torch.Tensor:
    return torch.full((size,), 0.015625, device=generator.device)


def _two_values(size: int, generator: torch.Generator) -> torch.Tensor:
    return (
        torch.randint(0, 2, (size,), generator=generator, device=generator.device).mul_(2).sub_(1).float() * 0.5 + 0.25
    )


def _heavy_tail(size: int, generator: torch.Generator) -> torch.Tensor:
    values = torch.randn(size, generator=generator, device=generator.device)
    return values.mul_(values.square()).mul_(values.square())  # z^9: magnitudes over thirty binades


def _denormals(size: int, generator: torch.Generator) -> torch.Tensor:
    bits = torch.randint(0, 1 << 23, (size,), generator=generator, device=generator.device, dtype=torch.int32)
    return bits.view(torch.float32)


def _bf16_deltas(size: int, generator: torch.Generator) -> torch.Tensor:
    base = torch.randn(size, generator=generator, device=generator.device).mul_(0.02).bfloat16().float()
    update = torch.randn(size, generator=generator, device=generator.device).mul_(3e-4)
    return update.add_(base).bfloat16().float().sub_(base)


KINDS: dict[str, Draw] = {
    "normal": _normal,
    "equal": _equal,
    "two_values": _two_values,
    "heavy_tail": _heavy_tail,
    "denormals": _denormals,
    "bf16_deltas": _bf16_deltas,
}

DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


def values(kind: str, dtype: torch.dtype, size: int, seed: int = 0, device: str = "cpu") -> torch.Tensor:
    """A vector of ``size`` values of this kind in this dtype; the same for the same seed and device."""
    generator = torch.Generator(device).manual_seed(seed)
    step = 1 << 24
    out = torch.empty(size, dtype=dtype, device=device)
    for start in range(0, size, step):
        part = out[start : start + step]
        part.copy_(KINDS[kind](part.numel(), generator))
    return out


def family(
    kind: str, dtype: torch.dtype, size: int, models: int = 3, device: str = "cpu"
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A base and models whose deltas are of this kind.

    Where a delta has to be exactly of the kind (equal, two values, denormals) the base is zero.
    """
    near = kind in ("normal", "heavy_tail", "bf16_deltas")
    if near:
        base = values("normal", dtype, size, seed=100, device=device).mul_(0.02)
    else:
        base = torch.zeros(size, dtype=dtype, device=device)
    tuned = []
    for model in range(models):
        delta = values(kind, dtype, size, seed=model + 1, device=device)
        if kind in ("equal", "two_values") and model % 2:
            delta.neg_()  # signs that clash
        spread = 1e-3 if kind in ("normal", "heavy_tail") else 1.0
        tuned.append(delta.mul_(spread).add_(base))
    return base, tuned
