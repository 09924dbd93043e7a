"""A directory or file that appears whole or not at all: written beside its target, flushed, renamed into place."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from fastmerge.errors import ArgumentError, MergeError
from fastmerge.sizes import format_size

_log = logging.getLogger("fastmerge")
_live: set[AtomicDirectory | AtomicFile] = set()
_live_lock = threading.Lock()

_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than this process or file system may write",
    errno.EIO: "the disk reports an input/output error",
    errno.EROFS: "the file system is read-only",
}


def disk_error(error: OSError, path: Path, doing: str = "Writing") -> MergeError:
    """The sentence for an OSError on the output: what was done to which file, why it failed, and what helps."""
    reason = _FULL.get(error.errno or 0, error.strerror or str(error))
    hint = ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = _free_bytes(path.parent)
        left = f" ({format_size(free)} left there)" if free is not None else ""
        hint = f"{left}; free some space or choose an output on another disk"
    return MergeError(f"{doing} {path} failed: {reason}{hint}.")


def check_target(out: Path, needed: int = 0) -> Path:
    """Check that a directory can be made at ``out`` and that its disk holds ``needed`` bytes; write nothing.

    Args:
        out: the directory to make. It may be absent (missing parents are made later) or an empty directory.
        needed: bytes that will be written.

    Returns:
        The target with symbolic links resolved: the temporary directory must stand beside the real one.

    Raises:
        ArgumentError: the target exists and is not an empty directory, or cannot be written.
        MergeError: there is too little free space on the disk.
    """
    target = Path(os.path.realpath(out))
    try:
        if target.is_dir():
            if next(target.iterdir(), None) is not None:
                raise ArgumentError(
                    f"The output {out} exists and is not empty: choose another directory or empty this one."
                )
            if target.is_mount():
                raise ArgumentError(f"The output {out} is a mount point: choose a directory inside it.")
        elif os.path.lexists(target):
            raise ArgumentError(f"The output {out} exists and is not a directory: choose another name.")
        ancestor = target.parent
        while not os.path.lexists(ancestor):
            ancestor = ancestor.parent
        if not ancestor.is_dir():
            raise ArgumentError(f"The output {out} cannot be made: {ancestor} is not a directory.")
        if not os.access(ancestor, os.W_OK | os.X_OK):
            raise ArgumentError(f"The output {out} cannot be made: {ancestor} is not writable.")
    except OSError as error:
        raise ArgumentError(f"The output {out} cannot be made: {error.strerror or error}.") from error
    free = _free_bytes(ancestor)
    if free is not None and needed > free:
        raise MergeError(
            f"The output {out} needs {format_size(needed)} ({needed} bytes) but its disk has {format_size(free)} "
            f"({free} bytes) free: free some space or choose an output on another disk."
        )
    return target


class AtomicDirectory:
    """A temporary directory beside ``target`` that either becomes ``target`` or disappears.

    Args:
        target: where the directory shall appear: absent, or an empty directory (see :func:`check_target`).

    Raises:
        ArgumentError: the target cannot be used.
        MergeError: the temporary directory cannot be made.
    """

    def __init__(self, target: Path) -> None:
        self.target = check_target(target)
        # The name is chosen before anything is made, so that an interrupt at any point finds it in abort().
        self.path = self.target.parent / f".{self.target.name}.partial-{secrets.token_hex(6)}"
        self._parents_made: list[Path] = []
        self._done = False
        with _live_lock:
            _live.add(self)
        try:
            self._make_parents()
            self.path.mkdir()
            if self.target.is_dir():
                self.path.chmod(self.target.stat().st_mode & 0o7777)
        except BaseException as error:
            self.abort()
            if isinstance(error, OSError):
                raise disk_error(error, self.path, "Making") from error
            raise

    def commit(self) -> None:
        """Flush the directory and rename it to the target. The files in it must have been flushed by their writers."""
        try:
            fsync_path(self.path)
            os.rename(self.path, self.target)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise MergeError(
                    f"The output {self.target} was filled by somebody else during the merge: choose another one."
                ) from error
            raise disk_error(error, self.target, "Renaming the finished output to") from error
        # From here on the output is in place and whole: whatever follows may not remove it or call it failed.
        self._forget()
        for directory in (self.target.parent, *(made.parent for made in self._parents_made)):
            with contextlib.suppress(OSError):
                fsync_path(directory)

    def abort(self) -> None:
        """Remove the temporary directory and the parents made for it. Idempotent; after :meth:`commit`, nothing."""
        if self._done:
            return
        try:
            if os.path.lexists(self.path):
                shutil.rmtree(self.path)
        except OSError as error:
            # Said, not raised: this runs while another error is on its way to the user, and that one matters more.
            _log.warning("The unfinished output %s could not be removed: %s.", self.path, error.strerror or error)
        for parent in reversed(self._parents_made):
            with contextlib.suppress(OSError):
                parent.rmdir()
        self._forget()

    def _make_parents(self) -> None:
        missing = []
        parent = self.target.parent
        while not parent.is_dir():
            missing.append(parent)
            parent = parent.parent
        for directory in reversed(missing):
            self._parents_made.append(directory)
            directory.mkdir(exist_ok=True)

    def _forget(self) -> None:
        self._done = True
        with _live_lock:
            _live.discard(self)


class AtomicFile:
    """A temporary file beside ``target`` that either becomes ``target`` or disappears. Whoever writes it makes it.

    Args:
        target: where the file shall appear; nothing may be there.

    Raises:
        ArgumentError: the target exists, or its directory does not or cannot be written.
    """

    def __init__(self, target: Path) -> None:
        folder = Path(os.path.realpath(target.parent))
        self.target = folder / target.name
        self.path = folder / f".{target.name}.partial-{secrets.token_hex(6)}"
        if os.path.lexists(self.target):
            raise ArgumentError(f"The output {target} exists: choose another name or remove it.")
        if not folder.is_dir():
            raise ArgumentError(f"The output {target} cannot be made: {target.parent} is not a directory.")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ArgumentError(f"The output {target} cannot be made: {target.parent} is not writable.")
        self._done = False
        with _live_lock:
            _live.add(self)

    def commit(self) -> None:
        """Give the file, which its writer has flushed, its name. MergeError: somebody else has made one meanwhile."""
        try:
            # A link, unlike a rename, does not replace what has come into being meanwhile.
            os.link(self.path, self.target)
        except FileExistsError:
            raise MergeError(f"The output {self.target} was made by somebody else meanwhile: choose another.") from None
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                raise disk_error(error, self.target, "Renaming the finished output to") from error
            os.rename(self.path, self.target)  # a file system without links
        self.abort()
        with contextlib.suppress(OSError):
            fsync_path(self.target.parent)

    def abort(self) -> None:
        """Remove the temporary file. Idempotent."""
        if self._done:
            return
        with contextlib.suppress(OSError):
            self.path.unlink()
        self._done = True
        with _live_lock:
            _live.discard(self)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write, which takes the place of ``path`` in the end, or disappears. If none is written, ``path`` stays.

    It is beside ``path`` and has the same suffix. Raises MergeError: it cannot be written.
    """
    beside = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        yield beside
        if beside.exists():
            os.replace(beside, path)
    except OSError as error:
        raise disk_error(error, path) from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


def abort_all() -> None:
    """Remove every unfinished output of this process: the last resort of a command line that was interrupted."""
    with _live_lock:
        unfinished = list(_live)
    for directory in unfinished:
        directory.abort()


def fsync_path(path: Path) -> None:
    """Flush one file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot flush a directory, and say so with EINVAL.
        if not (error.errno == errno.EINVAL and path.is_dir()):
            raise
    finally:
        os.close(descriptor)


def _free_bytes(directory: Path) -> int | None:
    try:
        status = os.statvfs(directory)
    except OSError:
        return None
    return status.f_bavail * status.f_frsize
