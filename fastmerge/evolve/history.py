"""The history of a search: one line of JSON for each thing that happened, in the order in which it did.

It is the checkpoint, too. What a search decides follows from its seed and from the scores; so a run is resumed by
deciding all over again with the scores that the file has, which needs no tensor, and going on where it ends.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from fastmerge.engine.atomic import disk_error
from fastmerge.errors import ArgumentError
from fastmerge.evolve.lock import hold

FILE = "history.jsonl"
FORMAT = 1


class History:
    """A history in memory and, with a directory, in its file, `history.jsonl`.

    about: what the run is, plain values; a file must begin with the same. file: its name, if that is another one. A
    last line that was cut off, and failures at the end, are dropped: what made them fail may be mended by now. The file
    is locked: it is one run's at a time.
    """

    def __init__(self, directory: Path | str | None, about: Mapping[str, Any], file: str = FILE) -> None:
        self.records: list[dict[str, Any]] = []
        self._told = 0
        self._file: IO[bytes] | None = None
        head = {"event": "run", "format": FORMAT, **_plain(about)}
        if directory is None:
            self.path = None
            self.records.append(head)
            self._told = 1
            return
        self.path = Path(directory).expanduser() / file
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._open(head)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise disk_error(error, self.path, "Writing") from error
            raise

    def _open(self, head: dict[str, Any]) -> None:
        assert self.path is not None
        self._file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b")
        hold(self._file.fileno(), self.path.parent)
        found, length = _read(self._file, self.path)
        if found:
            _check_same(self.path, found[0], head)
            while found and found[-1].get("error"):
                length -= len(_line(found.pop()))
        self._file.truncate(length)
        self._file.seek(length)
        self.records = found
        if not found:
            self._write(head)
        self._told = 1

    def told(self, event: str, what: Mapping[str, Any]) -> dict[str, Any] | None:
        """The next record of the file, which must be of this event and hold `what`; None at its end."""
        if self._told >= len(self.records):
            return None
        record = self.records[self._told]
        expected = {"event": event, **_plain(what)}
        if any(record.get(key, _MISSING) != value for key, value in expected.items()):
            key = next(key for key, value in expected.items() if record.get(key, _MISSING) != value)
            raise ArgumentError(
                f"{self.path}, line {self._told + 1}, is not what this run does there ({key} is {record.get(key)!r} "
                f"and would be {expected[key]!r}): the file was changed, or made by another version. Choose another "
                "directory."
            )
        self._told += 1
        return record

    def add(self, event: str, what: Mapping[str, Any]) -> None:
        """Append a record; it is in the file when this returns."""
        self._write({"event": event, **_plain(what)})
        self._told = len(self.records)

    def flush(self) -> None:
        """Wait until all is on the disk: after every generation."""
        if self._file is not None and self.path is not None:
            try:
                os.fsync(self._file.fileno())
            except OSError as error:
                raise disk_error(error, self.path, "Flushing") from error

    def _write(self, record: dict[str, Any]) -> None:
        if self._file is not None and self.path is not None:
            try:
                self._file.write(_line(record))
                self._file.flush()
            except OSError as error:
                raise disk_error(error, self.path, "Writing") from error
        self.records.append(record)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> History:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file, however the run ended."""
        self.close()


_MISSING = object()


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as JSON gives them back: tuples become lists."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(values), allow_nan=False))
    return plain


def _line(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, allow_nan=False) + "\n").encode()


def _read(file: IO[bytes], path: Path) -> tuple[list[dict[str, Any]], int]:
    """The complete lines of the file, and their length in bytes."""
    content = file.read()
    records = []
    length = content.rfind(b"\n") + 1
    for number, line in enumerate(content[:length].splitlines(), 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or _line(record) != line + b"\n":
            raise ArgumentError(f"{path}, line {number}, is not a line of a history; choose another directory.")
        records.append(record)
    return records, length


def _check_same(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for key in {**expected, **found}:
        then, now = found.get(key), expected.get(key)
        if then != now:
            raise ArgumentError(
                f"{path} is the history of another run: {key} was {then!r} there and is {now!r} now. Choose another "
                "directory, or give the same settings and models."
            )
