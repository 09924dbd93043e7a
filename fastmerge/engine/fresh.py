"""Fresh memory, and making it ready before it is needed.

The operating system zeroes each page at its first touch, which takes as long as reading the page from a cached file.
While one core imports torch, another can do that for the memory that the merge will read into.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading

READY_BYTES = 160 << 20
"""As much as a merge of large tensors reads into before it reuses memory."""

_STEP = 4 << 20


class _Ready:
    """A range that a thread is touching from its beginning, until it is taken."""

    def __init__(self, nbytes: int) -> None:
        self.memory = reserve(nbytes)
        self.stopped = False
        self.thread = threading.Thread(target=self._touch, name="fastmerge-memory", daemon=True)
        self.thread.start()

    def _touch(self) -> None:
        # ctypes lets other threads run meanwhile, and a page touched by the process itself, not by a system call on its
        # behalf, does not keep them from mapping libraries.
        here = ctypes.c_char.from_buffer(self.memory)
        for start in range(0, len(self.memory), _STEP):
            if self.stopped:
                break
            ctypes.memset(ctypes.addressof(here) + start, 0, min(_STEP, len(self.memory) - start))
        del here

    def take(self) -> mmap.mmap:
        self.stopped = True
        self.thread.join()
        return self.memory


_ready: _Ready | None = None


def reserve(nbytes: int) -> mmap.mmap:
    """A private range of zeros, touched nowhere yet, in large pages where the system has them."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    memory = mmap.mmap(-1, nbytes, flags=flags)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # A kernel that is built without large pages refuses; small ones do.
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def prepare(nbytes: int) -> None:
    """Begin to make up to READY_BYTES ready in the background; nothing where only one core may be used.

    nbytes: as much as the merge can need. Where the system gives no memory or no thread, a merge goes on without.
    """
    global _ready
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    nbytes = min(nbytes, READY_BYTES)
    if _ready is None and nbytes > _STEP and cores > 1:
        # RuntimeError is how Python says that no thread can be started.
        with contextlib.suppress(OSError, MemoryError, RuntimeError):
            _ready = _Ready(nbytes)


def release() -> None:
    """Give back what was made ready: the merge reads elsewhere."""
    global _ready
    if _ready is not None:
        ready, _ready = _ready, None
        ready.take().close()


def take(nbytes: int) -> mmap.mmap:
    """At least `nbytes` of zeros: what was made ready, if that is enough, or a fresh range."""
    global _ready
    if _ready is None:
        return reserve(nbytes)
    ready, _ready = _ready.take(), None
    if len(ready) >= nbytes:
        return ready
    ready.close()
    return reserve(nbytes)
