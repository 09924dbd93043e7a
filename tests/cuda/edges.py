"""Tensors that end where memory ends: a read or write past one of them does not go unnoticed in the emulator."""

from __future__ import annotations

import ctypes
import mmap

import pytest
import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
PROT_NONE = 0
_libc = ctypes.CDLL(None, use_errno=True)


class Edge:
    """Places tensors at the end of readable pages, or some bytes before it; these bytes are forbidden."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self._forbidden: list[str] = []
        self._pages: list[mmap.mmap] = []

    def place(self, x: Tensor, gap: int = 0) -> Tensor:
        """The same numbers, up to `gap` bytes before the end of the last page that can be read."""
        size = x.numel() * x.element_size()
        readable = -(-(size + gap) // PAGE) * PAGE
        pages = mmap.mmap(-1, readable + PAGE)
        begin = readable - gap - size
        placed = torch.frombuffer(pages, dtype=x.dtype, count=x.numel(), offset=begin).view(x.shape).copy_(x)
        start = placed.data_ptr() - begin
        if _libc.mprotect(ctypes.c_void_p(start + readable), ctypes.c_size_t(PAGE), PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
        self._pages.append(pages)
        self._forbidden.append(f"{placed.data_ptr() + size}-{start + readable + PAGE}")
        self._monkeypatch.setenv("FASTMERGE_EMULATED_FORBIDDEN", ",".join(self._forbidden))
        return placed
