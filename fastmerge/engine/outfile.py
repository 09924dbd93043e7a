"""One output file whose length is known beforehand: allocated first, then written by position, past the page cache.

Written through the page cache, a gigabyte costs a copy, a quarter of a million fresh pages and, where memory is scarce,
the inputs' place in the cache; that is several times what the disk takes. So whole pages go to the disk directly
(O_DIRECT), and only the odd bytes at the ends of a part go through the cache. A page is written in one of the two ways,
never in both. Where direct writing is not supported, everything goes through the cache, and the kernel is told to start
writing back as data comes, so that the closing flush is short.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

PAGE = max(4096, mmap.PAGESIZE)
"""Direct writes begin and end at multiples of this, in the file and in memory."""

_STAGING_BYTES = 4 << 20
_WRITEBACK_BYTES = 32 << 20
_SYNC_FILE_RANGE_WRITE = 2
_NOT_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP)


class OutputFile:
    """A new file of fixed length. Errors are OSErrors.

    Args:
        path: the file, which must not exist.
        size: its length in bytes, allocated at once where the file system can.
        head: its first bytes.
        direct: write past the page cache where that is possible.
    """

    def __init__(self, path: Path, size: int, head: bytes, *, direct: bool = True) -> None:
        self.path = path
        self.size = size
        self._lock = threading.Lock()
        self._remaining = size - len(head)
        self._cached: int | None = None
        self._direct: int | None = None
        self._want_direct = direct and hasattr(os, "O_DIRECT")
        self._dirty = (0, 0, 0)  # first byte, end, bytes between them that await writing back
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            _allocate(descriptor, size)
            _pwrite_all(descriptor, memoryview(head), 0)
        finally:
            os.close(descriptor)

    def write(self, offset: int, data: memoryview) -> None:
        """Write bytes, each once in the file's life. Thread-safe; the descriptors are closed after the last one."""
        cached, direct = self._descriptors()
        first = -(-offset // PAGE) * PAGE
        last = (offset + len(data)) // PAGE * PAGE
        done = 0
        if direct is not None and first < last:
            self._write_cached(cached, offset, data[: first - offset])
            done = first - offset
            done += self._write_direct(direct, first, data[done : last - offset])
        self._write_cached(cached, offset + done, data[done:])
        with self._lock:
            self._remaining -= len(data)
            if self._remaining == 0:
                self._close()

    def close(self) -> None:
        """Close the descriptors. Idempotent. No write may be under way."""
        with self._lock:
            self._close()

    def _descriptors(self) -> tuple[int, int | None]:
        # Opened when first needed and closed when complete: many shards must not need many descriptors.
        with self._lock:
            if self._cached is None:
                self._cached = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)
            if self._direct is None and self._want_direct:
                try:
                    self._direct = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC | os.O_DIRECT)
                except OSError as error:
                    if error.errno not in _NOT_DIRECT:
                        raise
                    self._want_direct = False
            return self._cached, self._direct if self._want_direct else None

    def _close(self) -> None:
        cached, direct, self._cached, self._direct = self._cached, self._direct, None, None
        for descriptor in (direct, cached):
            if descriptor is not None:
                os.close(descriptor)

    def _write_direct(self, descriptor: int, offset: int, data: memoryview) -> int:
        """Write whole pages; return how many bytes were taken, fewer than all only where the rest must be cached."""
        done = 0
        while done < len(data):
            part = data[done : done + _STAGING_BYTES]
            aligned = part if _address(part) % PAGE == 0 else _stage(part)
            try:
                written = os.pwrite(descriptor, aligned, offset + done)
            except OSError as error:
                if error.errno not in _NOT_DIRECT:
                    raise
                self._want_direct = False
                return done
            done += written
            if written % PAGE:
                return done
        return done

    def _write_cached(self, descriptor: int, offset: int, data: memoryview) -> None:
        if not data:
            return
        _pwrite_all(descriptor, data, offset)
        with self._lock:
            start, stop, waiting = self._dirty
            start, stop = (
                (min(start, offset), max(stop, offset + len(data))) if waiting else (offset, offset + len(data))
            )
            self._dirty = (start, stop, waiting + len(data))
            if waiting + len(data) < _WRITEBACK_BYTES:
                return
            self._dirty = (0, 0, 0)
        _start_writeback(descriptor, start, stop - start)


_local = threading.local()


def _stage(data: memoryview) -> memoryview:
    """The same bytes at the beginning of a page: in a buffer of this thread, until its next call."""
    import numpy as np  # torch imports it anyway; nothing that needs no torch gets here

    buffer = getattr(_local, "staging", None)
    if buffer is None:
        buffer = _local.staging = mmap.mmap(-1, _STAGING_BYTES)
    target = memoryview(buffer)[: len(data)]
    # numpy releases the interpreter's lock while it copies.
    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(data, np.uint8))
    return target


def _address(data: memoryview) -> int:
    import numpy as np

    return int(np.frombuffer(data, np.uint8).ctypes.data)


def _pwrite_all(descriptor: int, data: memoryview, offset: int) -> None:
    # One call writes at most 2 GiB on Linux, and less when a signal arrives or the disk is almost full.
    done = 0
    while done < len(data):
        written = os.pwrite(descriptor, data[done:], offset + done)
        if written == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        done += written


@functools.cache
def _libc_function(name: str, *argtypes: Any) -> Callable[..., int] | None:
    try:
        function = getattr(ctypes.CDLL(None, use_errno=True), name)
    except (OSError, AttributeError, TypeError):
        return None
    function.argtypes = argtypes
    function.restype = ctypes.c_int
    return function


def _allocate(descriptor: int, size: int) -> None:
    """Reserve the disk space of a file, or give it its length where the file system cannot."""
    # Not os.posix_fallocate: where the file system cannot allocate, the C library then writes into every block, which
    # costs as much as writing the model. `fallocate` says EOPNOTSUPP instead.
    fallocate = _libc_function("fallocate64", ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    while fallocate is not None and fallocate(descriptor, 0, 0, size) != 0:
        number = ctypes.get_errno()
        if number in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EPERM):
            break
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
    os.ftruncate(descriptor, size)


def _start_writeback(descriptor: int, offset: int, length: int) -> None:
    """Ask the kernel to begin writing a range to the disk; a hint, so its failure is of no consequence."""
    # Left alone, the kernel hoards gigabytes of dirty pages and the closing fsync pays for all of them at once.
    signature = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    sync_file_range = _libc_function("sync_file_range", *signature)
    if sync_file_range is not None:
        sync_file_range(descriptor, offset, length, _SYNC_FILE_RANGE_WRITE)
