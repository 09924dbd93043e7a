"""The header of a safetensors file, read by itself and believed only after every claim in it has been checked.

A safetensors file is eight bytes (the header's length, little-endian), a JSON header and the tensors' bytes. The
header comes from whoever made the file, so nothing in it may lead a later read outside the tensor that it names:
the tensors must cover the data exactly, without a hole and without an overlap, in the number of bytes that dtype
and shape ask for, and the file must be as long as they say.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from fastmerge.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
"""The limit of the format's own library; a longer header is a lie or an attack."""

DTYPE_BITS: dict[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
"""Bits per element of every dtype that the format knows."""

_MAX_INT64 = 2**63 - 1
_MAX_SIDES = 64  # torch's own limit; it also keeps the product of a hostile shape cheap
_AGAIN = "the file is damaged, download it again"


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: its name, dtype (a safetensors name such as "BF16"), shape, and bytes [start, stop) of file.

    `file` is None, and `start` is 0, for a tensor that is not stored as plain bytes of a file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path | None
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """The number of elements; 1 for a scalar."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The number of bytes that the tensor takes in its file."""
        return self.stop - self.start


@dataclass(frozen=True)
class Header:
    """A checked header: its tensors by offset, the free-form metadata, and what identifies the file."""

    tensors: tuple[TensorInfo, ...]
    metadata: dict[str, str]
    size: int
    mtime_ns: int
    inode: int
    sha256: str


class _DuplicateKeyError(ValueError):
    """A JSON object says the same key twice."""


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKeyError(key)
            seen.add(key)
    return result


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def parse_json(data: bytes, what: str, fix: str) -> Any:
    """Parse strict JSON (UTF-8, no key twice, no NaN); `what` and `fix` go into the sentence of the CheckpointError."""
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique_pairs, parse_constant=_refuse_constant)
    except _DuplicateKeyError as error:
        raise CheckpointError(f"{what} names {str(error)!r} twice; {fix}.") from None
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise CheckpointError(f"{what} is not valid JSON ({reason}); {fix}.") from None


def open_regular(path: Path) -> int:
    """Open a file for reading and return its descriptor; a missing one, a pipe or a folder is a CheckpointError."""
    try:
        # Without O_NONBLOCK a named pipe would wait for a writer for ever; on a regular file it changes nothing.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        if path.is_symlink():
            raise CheckpointError(f"{path} is a link to a file that is not there; download the model again.") from None
        raise CheckpointError(f"{path} does not exist; check the path or download the file again.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened ({error.strerror}); check its permissions.") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path} is not a regular file; name a .safetensors file or a model's directory.")
    return descriptor


def read_header(path: Path) -> Header:
    """Read and check the header of `path`.

    Raises:
        CheckpointError: something does not add up; names the file and, where there is one, the tensor.
    """
    descriptor = open_regular(path)
    try:
        status = os.fstat(descriptor)
        size = status.st_size
        prefix = os.pread(descriptor, 8, 0)
        if len(prefix) < 8:
            raise CheckpointError(f"{path} is {len(prefix)} bytes long, too short for a safetensors file; {_AGAIN}.")
        length = int.from_bytes(prefix, "little")
        if prefix.startswith(b"version "):  # the text that git leaves in the place of a large file
            raise CheckpointError(f"{path} is a Git LFS pointer, not the weights; fetch them with `git lfs pull`.")
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{path} says that its header takes {length:,} bytes, more than the {MAX_HEADER_BYTES:,} that the "
                f"format allows; it is not a safetensors file, or {_AGAIN}."
            )
        if length > size - 8:
            raise CheckpointError(
                f"{path} is cut short: its header takes {length:,} bytes and the file has {size - 8:,} after the "
                f"length; {_AGAIN}."
            )
        raw = _read_exactly(descriptor, length, 8, path)
    finally:
        os.close(descriptor)
    tensors, metadata = parse_header(raw, path, size)
    return Header(tensors, metadata, size, status.st_mtime_ns, status.st_ino, hashlib.sha256(raw).hexdigest())


def _read_exactly(descriptor: int, count: int, offset: int, path: Path) -> bytes:
    parts = []
    while count:
        part = os.pread(descriptor, min(count, 1 << 30), offset)
        if not part:
            raise CheckpointError(f"{path} ended in the middle of its header; {_AGAIN}.")
        parts.append(part)
        count -= len(part)
        offset += len(part)
    return b"".join(parts)


def parse_header(raw: bytes, path: Path, size: int) -> tuple[tuple[TensorInfo, ...], dict[str, str]]:
    """Check the JSON text `raw` of the file `path` of `size` bytes; return its tensors by offset, and its metadata."""
    if not raw.startswith(b"{"):
        raise CheckpointError(f"The header of {path} does not start with '{{'; {_AGAIN}.")
    header = parse_json(raw, f"The header of {path}", _AGAIN)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"The header of {path} has metadata that is not a table of texts; {_AGAIN}.")
    data_start = 8 + len(raw)
    tensors = sorted(
        (_tensor(name, entry, path, data_start) for name, entry in header.items()),
        key=lambda info: (info.start, info.stop, info.name),
    )
    _check_layout(tensors, path, data_start, size)
    return tuple(tensors), metadata


def _tensor(name: str, entry: Any, path: Path, data_start: int) -> TensorInfo:
    """One entry of the header, checked as far as it can be without its neighbours."""
    here = f"Tensor {name!r} in {path}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{here} is not described by dtype, shape and data_offsets; {_AGAIN}.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(
            f"{here} has the dtype {dtype!r}, which this version does not know; "
            "save the model as bfloat16, float16 or float32."
        )
    if not isinstance(shape, list) or not all(_is_count(side) for side in shape):
        raise CheckpointError(f"{here} has the shape {_short(shape)}: each side must be a whole number >= 0; {_AGAIN}.")
    if len(shape) > _MAX_SIDES:
        raise CheckpointError(f"{here} has {len(shape):,} sides, more than the {_MAX_SIDES} of a tensor; {_AGAIN}.")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(offset) for offset in offsets):
        raise CheckpointError(
            f"{here} has the offsets {_short(offsets)}: there must be two whole numbers >= 0; {_AGAIN}."
        )
    start, stop = offsets
    if stop < start:
        raise CheckpointError(f"{here} ends at byte {stop:,}, before it starts at {start:,}; {_AGAIN}.")
    bits = prod(shape) * DTYPE_BITS[dtype]
    if bits > 8 * _MAX_INT64:
        raise CheckpointError(f"{here} has the shape {_short(shape)}, larger than any file can be; {_AGAIN}.")
    if bits != 8 * (stop - start):
        raise CheckpointError(
            f"{here} takes {stop - start:,} bytes, but {dtype} of shape {_short(shape)} needs {bits / 8:,.12g}; "
            f"{_AGAIN}."
        )
    return TensorInfo(name, dtype, tuple(shape), path, data_start + start, data_start + stop)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_INT64


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _check_layout(tensors: list[TensorInfo], path: Path, data_start: int, size: int) -> None:
    """The tensors, in the order of their offsets, must cover the rest of the file once and only once."""
    position, previous = data_start, None
    for info in tensors:
        if info.start < position:
            raise CheckpointError(f"Tensors {previous!r} and {info.name!r} in {path} overlap; {_AGAIN}.")
        if info.start > position:
            raise CheckpointError(
                f"{path} has {info.start - position:,} bytes before tensor {info.name!r} that belong to no tensor; "
                f"{_AGAIN}."
            )
        if info.stop > size:
            raise CheckpointError(
                f"{path} is cut short: tensor {info.name!r} ends at byte {info.stop:,} and the file at {size:,}; "
                "download it again."
            )
        position, previous = info.stop, info.name
    if position != size:
        raise CheckpointError(f"{path} has {size - position:,} bytes after its last tensor; {_AGAIN}.")
