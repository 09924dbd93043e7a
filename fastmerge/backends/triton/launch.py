"""How kernels are launched: on the tensors' device and its current stream, without fused multiply-adds, and counted.

Nothing here waits for the GPU. With TRITON_INTERPRET=1 the same kernels run in Triton's interpreter, on tensors of any
device, slowly: that is how they are tested where there is no GPU.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from ..._triton import numbers, tables
from ..lists import copied
from . import interpreting

INTERPRETED = not isinstance(numbers.widen, JITFunction)
"""Whether kernels are interpreted instead of compiled: TRITON_INTERPRET=1 was set when Triton was imported."""

REGISTERS = "maxnreg"
"""The option of launches on NVIDIA GPUs that limits registers; Triton has none for others."""

PRODUCTS = "ieee" if torch.version.hip else "tf32x3"
"""How the one family that multiplies matrices does it: AMD's instructions take float32, NVIDIA's a half of its bits."""

BLOCK_VARIABLE = "FASTMERGE_TRITON_BLOCK"

LONG_TABLE = 64
"""Numbers that are still written by launches, of 16 each; a copy costs more than a few of them."""

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The dtypes as kernels name them (COMPUTE)."""

launched: Counter[str] = Counter()
"""How often each kernel was launched, by name."""

_Interceptor = Callable[[Any, Sequence[int], tuple[Any, ...], dict[str, Any]], None]
_interceptor: _Interceptor | None = None
# The interpreter changes Triton's language while a kernel runs, for all threads.
_interpreting = threading.Lock()


if INTERPRETED:
    interpreting.mend()


def launch(
    kernel: Any,
    grid: Sequence[int],
    device: torch.device,
    *arguments: Any,
    num_warps: int = 4,
    registers: int | None = None,
    **constants: Any,
) -> None:
    """Enqueue a kernel.

    grid: programs in up to three dimensions; none of them is launched where one is 0. arguments: in the kernel's order,
    tensors, numbers, or tuples of them. constants: its constexpr arguments by name. registers: as many may a thread
    have on an NVIDIA GPU, where the assembler, left alone, would rather put some aside in memory to have more threads.
    """
    if 0 in grid:
        return
    launched[kernel.__name__] += 1
    options: dict[str, Any] = {"num_warps": num_warps, "enable_fp_fusion": False}
    if registers is not None and not torch.version.hip:
        options[REGISTERS] = registers
    if _interceptor is not None:
        _interceptor(kernel, grid, arguments, {**constants, **options})
    elif INTERPRETED:
        with _interpreting, numpy.errstate(all="ignore"):
            kernel[tuple(grid)](*arguments, **constants, **options)
    else:
        with torch.cuda.device(device):
            kernel[tuple(grid)](*arguments, **constants, **options)


@contextmanager
def intercepted(interceptor: _Interceptor) -> Iterator[None]:
    """Hand every launch to `interceptor` instead of running it: to compile what would run, for machines elsewhere."""
    global _interceptor
    before = _interceptor
    _interceptor = interceptor
    try:
        yield
    finally:
        _interceptor = before


def table(values: Sequence[int] | Tensor, device: torch.device) -> Tensor:
    """int64 numbers in the device's memory, without waiting for it.

    For what a launch needs to know of a few tensors: addresses, lengths, float bits. A launch writes 16 numbers, and
    graphs can capture it. More than LONG_TABLE numbers are copied.
    """
    if len(values) > LONG_TABLE:
        return copied(torch.as_tensor(values, dtype=torch.int64), device)
    values = values.tolist() if isinstance(values, Tensor) else values
    rows = max(1, tiles(len(values), tables.ROW))
    out = torch.empty(rows * tables.ROW, dtype=torch.int64, device=device)
    padded = [*values, *[0] * (rows * tables.ROW - len(values))]
    for first in range(0, len(padded), tables.ROW):
        launch(tables.write_row, (1,), device, out[first:], *padded[first : first + tables.ROW], num_warps=1)
    return out


def float_bits(value: float) -> int:
    """The bits of a number rounded to float32, for a table."""
    return int(torch.tensor(value, dtype=torch.float32).view(torch.int32))


def aligned(tensors: Sequence[Tensor | None]) -> bool:
    """Whether all of them begin at a multiple of 16 bytes, so that kernels may load as many at once."""
    return all(x is None or x.data_ptr() % 16 == 0 for x in tensors)


def tiles(numel: int, block: int) -> int:
    """How many tiles of `block` elements cover so many."""
    return -(-numel // block)


def flat(x: Tensor) -> Tensor:
    """A contiguous tensor as a vector; a view."""
    return x.view(-1)


def block(default: int) -> int:
    """Elements per tile: `default`, or what FASTMERGE_TRITON_BLOCK says (a power of two), which must not show."""
    forced = os.environ.get(BLOCK_VARIABLE)
    return int(forced) if forced else default
