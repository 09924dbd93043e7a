"""Where the CUDA kernels run: in the emulator, or on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastmerge import backends
from tests.ops.running import FAST

needs_cuda = pytest.mark.skipif(
    "cuda" not in FAST,
    reason=f"no cuda backend here; tests/ops holds the others to the same: {backends.reason('cuda')}",
)

both_orders = pytest.mark.parametrize("order", ["forward", "reverse"])
"""In which the emulator runs blocks and threads: what a race would change."""


def there(x: Tensor | None) -> Tensor | None:
    """A tensor where the kernels take it."""
    from fastmerge.backends import cuda

    return x if x is None or "cpu" in cuda.DEVICES else x.cuda()


def unaligned(x: Tensor, shift: int) -> Tensor:
    """The same numbers from byte `shift` on of some memory."""
    memory = bytearray(shift) + bytearray(x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=shift).view(x.shape)
