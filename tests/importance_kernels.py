"""What the tests of the importance family on GPUs draw alike."""

from __future__ import annotations

import torch
from torch import Tensor

TYPES = (torch.bfloat16, torch.float32, torch.float16)
SPECIAL = [float("nan"), float("inf"), -float("inf"), 2.0**-149, 1e-30, 3.4e38, 0.0, -0.0]


def drawn(count: int, numel: int, types: tuple[torch.dtype, ...] = TYPES, seed: int = 0) -> list[Tensor]:
    """A base and so many models near it, of these dtypes by turns; some of them agree with it, some are special."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(numel, generator=generator)
    made = [base]
    for _ in range(count):
        step = 0.1 * torch.randn(numel, generator=generator)
        model = base + step * (torch.rand(numel, generator=generator) < 0.4)
        model[torch.randint(0, numel, (8,), generator=generator)] = torch.tensor(SPECIAL)
        made.append(model)
    return [x.to(types[i % len(types)]) for i, x in enumerate(made)]
