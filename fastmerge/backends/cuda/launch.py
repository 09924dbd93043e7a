"""How kernels in CUDA C++ are called: which module they are in, where they run, and tensors as they take them."""

from __future__ import annotations

import importlib
import os
from typing import Any

import torch
from torch import Tensor

from ..lists import copied

VARIABLE = "FASTMERGE_CUDA_EMULATED"

EMULATED = os.environ.get(VARIABLE) == "1"
"""Whether kernels run in the emulator."""

compiled: Any = importlib.import_module("fastmerge._cuda_emulated" if EMULATED else "fastmerge._cuda")

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The dtypes as kernels name them."""

Ref = tuple[int, int]
"""A tensor's address and dtype."""

NOTHING: Ref = (0, 0)


def ref(x: Tensor) -> Ref:
    """A contiguous tensor as kernels take it."""
    return x.data_ptr(), CODES[x.dtype]


def place(device: torch.device) -> tuple[int, int]:
    """The device's number, and its current stream."""
    if device.type == "cpu":
        return 0, 0
    stream = torch.cuda.current_stream(device)
    return stream.device_index, stream.cuda_stream


def address(x: Tensor | None) -> int:
    """Where a tensor's data begins; 0 where there is none."""
    return 0 if x is None else x.data_ptr()


def inputs(base: Tensor | None, tensors: list[Tensor], compute: torch.dtype) -> tuple[Ref, bool, list[Ref], int, int]:
    """A base that may be missing, and n models of one length, as kernels take them."""
    reference = NOTHING if base is None else ref(base)
    return reference, base is not None, [ref(x) for x in tensors], tensors[0].numel(), CODES[compute]


LAUNCHES = 4
"""By as many of them numbers are written that are few; a copy costs more than that."""


def _captured(device: torch.device) -> bool:
    """Whether what is enqueued now becomes part of a graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def table(values: list[int] | Tensor, device: torch.device) -> Tensor:
    """int64 numbers in the device's memory, without waiting for it.

    Few of them are written by launches, more are copied while the host goes on. A graph cannot capture a copy of memory
    that is taken meanwhile: there all numbers are written by launches, which hold them.
    """
    most = compiled.MOST_NUMBERS
    if len(values) <= LAUNCHES * most or _captured(device):
        numbers = values.tolist() if isinstance(values, Tensor) else values
        out = torch.empty(len(numbers), dtype=torch.int64, device=device)
        for first in range(0, len(numbers), most):
            compiled.write_numbers(place(device), numbers[first : first + most], out.data_ptr() + 8 * first)
        return out
    return copied(torch.as_tensor(values, dtype=torch.int64), device)
