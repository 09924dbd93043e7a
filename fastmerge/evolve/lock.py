"""One run to a directory: whoever comes second is told so, and what a killed run held is free at once."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from pathlib import Path

from fastmerge.engine.atomic import disk_error
from fastmerge.errors import ArgumentError

_TAKEN = (errno.EWOULDBLOCK, errno.EACCES)


def hold(descriptor: int, what: Path) -> None:
    """Lock an open file or directory until it is closed: by its run, or by the kernel when the run is gone.

    Raises ArgumentError where another run holds it. A file system that knows no locks is used without one.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            raise ArgumentError(
                f"Another run is at work in {what}: wait until it has ended, or choose another directory."
            ) from None


class Occupied:
    """Within it, a directory, which is made if it is not there, belongs to this run."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._descriptor: int | None = None
        self._made = False

    def __enter__(self) -> Occupied:
        """Raises ArgumentError where another run is in there, MergeError where it cannot be made."""
        try:
            self._made = not self._directory.exists()
            self._directory.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._directory, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise disk_error(error, self._directory, "Opening") from error
        try:
            hold(self._descriptor, self._directory)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *ending: object) -> None:
        """Leave the directory to others; one that was made here and holds nothing is removed."""
        if self._descriptor is not None:
            if self._made:
                with contextlib.suppress(OSError):
                    self._directory.rmdir()
            os.close(self._descriptor)
            self._descriptor = None
