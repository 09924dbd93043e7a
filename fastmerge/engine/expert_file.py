"""The file of an expert: safetensors, about 1.5 bytes for each byte of the values that it keeps.

Of each tensor with k > 0 there are three entries; docs/experts.md describes them:

    NAME.gaps     U8     how many elements lie between one kept element of a row and the next, one byte each
    NAME.starts   I64    where in `gaps` every 256th row begins, so that parts can be decoded side by side
    NAME.values   model's dtype, [rows, k]

A gap of 255 or more is 255 as often as it goes, then the rest. At the end of `gaps` there may be a few bytes 255, which
belong to no gap and put what follows at a multiple of 8. The metadata say what the expert is of. A file of old bits,
which `expert remove` puts back, has the same form.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from blake3 import blake3

from fastmerge.backends.rule import column_dtype
from fastmerge.engine.atomic import AtomicFile, disk_error
from fastmerge.engine.checkpoint import SafetensorsFile
from fastmerge.engine.safetensors_header import Header, TensorInfo, parse_json, read_header
from fastmerge.engine.sources import SAFETENSORS_NAMES, TORCH_DTYPES
from fastmerge.errors import CheckpointError
from fastmerge.ops.expert import SCOPES, WIDEST, Expert, rows_of

FORMAT = "fastmerge expert"
VERSION = "1"
ROWS_TOGETHER = 256
"""Rows whose gaps begin at a place that `starts` tells."""

LONG = 255
"""A gap of at least this goes on in the next byte."""

_ALIGNMENT = 8
_ENTRIES = 1 << 18
_PAGE = 4096
_VALUES = ("BF16", "F16", "F32")
_OFFSET_ROOM = 20
_AGAIN = "the file is damaged, extract the expert again"

Kind = Literal["expert", "restore"]


@dataclass(frozen=True)
class TensorAbout:
    """One tensor of an expert: its shape, how much of each row is kept, the values' dtype by safetensors' name.

    digest: BLAKE3 (hex) of the base's tensor; in a file of old bits, of the tensor that is to be changed back.
    content: BLAKE3 (hex) of what a file holds of it, gaps, starts and values; "" where nothing, or in no file yet.
    """

    shape: tuple[int, ...]
    k: int
    dtype: str
    digest: str
    content: str = field(default="", compare=False)

    @property
    def rows(self) -> int:
        """How many rows it has."""
        return rows_of(self.shape)[0]

    @property
    def entries(self) -> int:
        """How many elements are kept."""
        return self.rows * self.k


@dataclass(frozen=True)
class About:
    """What an expert is of.

    keep, scope: how it was made. mu: the factor that it is scaled by. model, base: what the two were called.
    kind: "expert", or "restore" for the old bits of a checkpoint. tensors: by name; those with k = 0 hold nothing.
    """

    keep: float
    scope: str
    model: str
    base: str
    tensors: Mapping[str, TensorAbout]
    mu: float = 1.0
    kind: Kind = "expert"

    @property
    def digest(self) -> str:
        """One SHA-256 (hex) of the base's tensors."""
        lines = sorted(f"{name} {list(about.shape)} {about.digest}\n" for name, about in self.tensors.items())
        return sha256("".join(lines).encode()).hexdigest()

    @property
    def empty(self) -> list[str]:
        """The tensors whose rows are too narrow to keep anything."""
        return [name for name, about in self.tensors.items() if about.k == 0]

    @property
    def empty_rows(self) -> int:
        """How many rows keep nothing."""
        return sum(about.rows for about in self.tensors.values() if about.k == 0)

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return sum(about.rows for about in self.tensors.values())

    def metadata(self) -> dict[str, str]:
        """As the file holds it."""
        tensors = {
            name: [list(about.shape), about.k, about.dtype, about.digest, about.content]
            for name, about in self.tensors.items()
        }
        return {
            "format": FORMAT,
            "version": VERSION,
            "kind": self.kind,
            "keep": repr(self.keep),
            "scope": self.scope,
            "mu": repr(self.mu),
            "model": self.model,
            "base": self.base,
            "base_digest": self.digest,
            "empty": json.dumps(self.empty),
            "tensors": json.dumps(tensors, separators=(",", ":")),
        }


@dataclass
class ModelExpert:
    """An expert of a whole model in memory. tensors: what is kept of each, by name; those that keep nothing too."""

    about: About
    tensors: dict[str, Expert] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """The bytes that it takes in memory."""
        return sum(expert.nbytes for expert in self.tensors.values())


# -- gaps


def _rows_at_once(k: int) -> int:
    """How many rows are coded at a time, in whole groups: int64 numbers of all are many times their code."""
    return max(1, _ENTRIES // max(1, k * ROWS_TOGETHER)) * ROWS_TOGETHER


def encode(columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columns [rows, k], rising within each row, as gaps uint8[n] and starts int64[ceil(rows / 256)]."""
    rows, k = columns.shape
    step = _rows_at_once(k)
    coded, starts = [np.empty(0, np.uint8)], [np.empty(0, np.int64)]
    size = 0
    for first in range(0, rows, step):
        part, begins = _encoded(columns[first : first + step])
        coded.append(part)
        starts.append(begins + size)
        size += part.size
    return np.concatenate(coded), np.concatenate(starts)


def _encoded(columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows, k = columns.shape
    wide = columns.astype(np.int64)
    before = np.full((rows, 1), -1, np.int64)
    gaps = (np.diff(wide, axis=1, prepend=before) - 1).reshape(-1)
    lengths = gaps // LONG + 1
    ends = np.cumsum(lengths)
    coded = np.full(int(ends[-1]) if ends.size else 0, LONG, np.uint8)
    coded[ends - 1] = gaps % LONG
    first = np.arange(0, rows, ROWS_TOGETHER) * k
    starts = np.concatenate([[0], ends])[first]
    return coded, starts.astype(np.int64)


def decode(gaps: np.ndarray, starts: np.ndarray, rows: int, k: int, width: int) -> np.ndarray:
    """The inverse of `encode`: columns [rows, k], uint16, or int32 where rows are wider than 65536.

    ValueError, in a few words, where the code is broken.
    """
    dtype = np.uint16 if column_dtype(width) == torch.uint16 else np.int32
    step = _rows_at_once(k)
    if rows <= step:
        return _decoded(gaps, starts, rows, k, width, last=True).astype(dtype)
    places = np.append(starts, gaps.size)
    if places[0] != 0 or (places[1:] < places[:-1]).any():
        raise ValueError("starts that are not where rows begin")
    columns = np.empty((rows, k), dtype)
    for first in range(0, rows, step):
        stop = min(first + step, rows)
        groups = slice(first // ROWS_TOGETHER, -(-stop // ROWS_TOGETHER))
        begin, end = places[groups.start], places[groups.stop]
        own = starts[groups] - begin
        columns[first:stop] = _decoded(gaps[begin:end], own, stop - first, k, width, last=stop == rows)
    return columns


def _decoded(gaps: np.ndarray, starts: np.ndarray, rows: int, k: int, width: int, *, last: bool) -> np.ndarray:
    ends = np.flatnonzero(gaps != LONG)
    if ends.size != rows * k:
        raise ValueError(f"{ends.size} positions in place of {rows * k}")
    tail = gaps.size - (int(ends[-1]) + 1 if ends.size else 0)
    if tail >= _ALIGNMENT:
        raise ValueError(f"{tail} bytes after the last position")
    first = np.arange(0, rows, ROWS_TOGETHER) * k
    places = np.concatenate([[0], ends + 1])[first]
    if not np.array_equal(places, starts) or (tail and not last):
        raise ValueError("starts that are not where rows begin")
    if not ends.size:
        return np.zeros((rows, k), np.int64)
    # How many elements the codes have passed, over all rows, after each one.
    step = np.where(gaps == LONG, np.int64(LONG), gaps.astype(np.int64) + 1)
    passed = np.cumsum(step)[ends].reshape(rows, k)
    before = np.concatenate([[0], passed[:-1, -1]]).reshape(rows, 1)
    columns: np.ndarray = passed - before - 1
    if int(columns[:, -1].max()) >= width:
        raise ValueError("a position beyond its row")
    return columns


# -- writing


class ExpertWriter:
    """Writes one expert, tensor by tensor; nothing appears at `path` before :meth:`finish`.

    Args:
        path: the file to make; it must not exist, unless `inside`.
        about: what the expert is of; its digests and mu are yet to come.
        inside: `path` lies in a directory that itself appears whole or not at all.

    Raises:
        ArgumentError: the file cannot be made there.
        MergeError: the disk is full or fails.
    """

    def __init__(self, path: Path, about: About, *, inside: bool = False) -> None:
        self._about = about
        self._entries: dict[str, dict[str, Any]] = {}
        self._contents: dict[str, str] = {}
        self._room = _header_room(about)
        self._position = 0
        self._atomic = None if inside else AtomicFile(path)
        self._path = path if self._atomic is None else self._atomic.path
        try:
            self._file: BinaryIO = open(self._path, "xb")  # noqa: SIM115 - closed by finish or abort
            self._file.seek(self._room)
        except OSError as error:
            self.abort()
            raise disk_error(error, self._path) from error

    def __enter__(self) -> ExpertWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove everything unless :meth:`finish` has been reached."""
        self.abort()

    def add(self, name: str, expert: Expert) -> None:
        """Write one tensor's columns and values."""
        if not expert.columns.numel():
            return
        gaps, starts = encode(expert.columns.cpu().numpy())
        padding = -(self._position + gaps.size) % _ALIGNMENT
        values = expert.values.cpu().contiguous()
        data = (
            gaps.tobytes() + bytes([LONG]) * padding,
            starts.astype("<i8").tobytes(),
            values.view(torch.uint8).numpy().tobytes(),
        )
        self._put(f"{name}.gaps", "U8", (gaps.size + padding,), data[0])
        self._put(f"{name}.starts", "I64", starts.shape, data[1])
        self._put(f"{name}.values", SAFETENSORS_NAMES[values.dtype], tuple(values.shape), data[2])
        self._contents[name] = _content(*data)

    def finish(self, mu: float, digests: Mapping[str, str]) -> About:
        """Write what the expert is of, flush, and rename the file into place."""
        tensors = {
            name: replace(one, digest=digests[name], content=self._contents.get(name, ""))
            for name, one in self._about.tensors.items()
        }
        about = replace(self._about, tensors=tensors, mu=mu)
        text = _header_text(about, self._entries)
        head = (self._room - 8).to_bytes(8, "little") + text + b" " * (self._room - 8 - len(text))
        try:
            self._file.seek(0)
            self._file.write(head)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            raise disk_error(error, self._path) from error
        if self._atomic is not None:
            self._atomic.commit()
        return about

    def abort(self) -> None:
        """Close and remove the file. Idempotent; after :meth:`finish`, nothing."""
        if getattr(self, "_file", None) is not None:
            self._file.close()
        if self._atomic is not None:
            self._atomic.abort()

    def _put(self, name: str, dtype: str, shape: tuple[int, ...], data: bytes) -> None:
        stop = self._position + len(data)
        self._entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [self._position, stop]}
        try:
            self._file.write(data)
        except OSError as error:
            raise disk_error(error, self._path) from error
        self._position = stop


def _content(*parts: Any) -> str:
    whole = blake3()
    for part in parts:
        whole.update(memoryview(part).cast("B"))
    return whole.hexdigest()


def _header_text(about: About, entries: Mapping[str, Any]) -> bytes:
    content = {"__metadata__": about.metadata(), **entries}
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


def _header_room(about: About) -> int:
    """Bytes within which the header fits, whatever the positions come to: it is written last and stands first."""
    longest = int("9" * _OFFSET_ROOM)
    entry = {"dtype": "BF16", "shape": [longest, longest], "data_offsets": [longest, longest]}
    entries = {f"{name}.{part}": entry for name in about.tensors for part in ("gaps", "starts", "values")}
    tensors = {name: replace(one, digest="0" * 64, content="0" * 64) for name, one in about.tensors.items()}
    full = replace(about, tensors=tensors, mu=-1.2345678901234567e-100)
    return -(-(8 + len(_header_text(full, entries))) // _PAGE) * _PAGE


# -- reading


class ExpertFile:
    """A file of an expert, opened and checked; its tensors are read when asked for. A context manager.

    Attributes:
        path: the file.
        about: what the expert is of.
        size: the file's bytes.

    Raises:
        CheckpointError: it is no such file, or something in it does not add up.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        header = read_header(self.path)
        self.size = header.size
        self.about = _about(self.path, header)
        self._entries = _entries(self.path, header, self.about)
        self._source = SafetensorsFile(self.path, header)

    def __enter__(self) -> ExpertFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; a later read opens it again."""
        self._source.close()

    def read(self, name: str) -> Expert:
        """What is kept of one tensor. CheckpointError: the file is damaged."""
        about = self.about.tensors[name]
        rows, width = rows_of(about.shape)
        values = torch.empty(rows, about.k, dtype=TORCH_DTYPES[about.dtype])
        if not about.entries:
            return Expert(about.shape, torch.empty(rows, about.k, dtype=column_dtype(width)), values)
        where = self._entries[name]
        gaps, starts = self._array(where[0], np.uint8), self._array(where[1], np.int64)
        data = memoryview(values.view(torch.uint8).numpy().data).cast("B")
        self._source.read_into(where[2], 0, data)
        if _content(gaps, starts, data) != about.content:
            raise CheckpointError(f"Tensor {name!r} in {self.path} is not what was written there; {_AGAIN}.")
        try:
            columns = decode(gaps, starts, rows, about.k, width)
        except ValueError as error:
            raise CheckpointError(f"Tensor {name!r} in {self.path} has {error}; {_AGAIN}.") from None
        return Expert(about.shape, torch.from_numpy(columns), values)

    def load(self) -> ModelExpert:
        """All of it."""
        return ModelExpert(self.about, {name: self.read(name) for name in self.about.tensors})

    def _array(self, info: TensorInfo, dtype: Any) -> np.ndarray:
        array = np.empty(info.shape, dtype)
        self._source.read_into(info, 0, memoryview(array.data).cast("B"))
        return array


def _about(path: Path, header: Header) -> About:
    """The metadata, believed only after each claim has been checked."""
    found = header.metadata
    if found.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not an expert; make one with `fastmerge expert extract`.")
    if found.get("version") != VERSION:
        raise CheckpointError(
            f"{path} is an expert of version {found.get('version')!r}, which this version of fastmerge does not know; "
            "extract it again."
        )
    try:
        keep, mu, scope, kind = float(found["keep"]), float(found["mu"]), found["scope"], found["kind"]
        model, base, said = found["model"], found["base"], found["base_digest"]
        tensors = parse_json(found["tensors"].encode(), f"The list of tensors in {path}", _AGAIN)
        items = [
            (name, TensorAbout(tuple(shape), k, dtype, digest, content))
            for name, (shape, k, dtype, digest, content) in tensors.items()
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} does not say what the expert is of; {_AGAIN}.") from None
    if kind not in ("expert", "restore") or scope not in SCOPES or not (0 <= keep <= 1) or not math.isfinite(mu):
        raise CheckpointError(f"{path} says of the expert what cannot be (keep {keep}, mu {mu}, {scope}); {_AGAIN}.")
    for name, about in items:
        _check_tensor(path, name, about)
    result = About(keep, scope, model, base, dict(items), mu, kind)  # type: ignore[arg-type]
    if result.digest != said:
        raise CheckpointError(f"{path} has a list of tensors that was changed after it had been written; {_AGAIN}.")
    return result


def _check_tensor(path: Path, name: str, about: TensorAbout) -> None:
    whole = all(isinstance(side, int) and not isinstance(side, bool) and side >= 0 for side in about.shape)
    if (
        not whole
        or math.prod(max(side, 1) for side in about.shape) >= 1 << 63
        or rows_of(about.shape)[1] > WIDEST
        or not isinstance(about.k, int)
        or isinstance(about.k, bool)
        or not isinstance(about.digest, str)
        or not isinstance(about.content, str)
        or about.dtype not in _VALUES
        or not 0 <= about.k <= rows_of(about.shape)[1]
    ):
        raise CheckpointError(f"Tensor {name!r} in {path} is described by what cannot be; {_AGAIN}.")


def _entries(path: Path, header: Header, about: About) -> dict[str, tuple[TensorInfo, TensorInfo, TensorInfo]]:
    """Where gaps, starts and values of each tensor lie, of the shapes that they must have, and nothing else."""
    stored = {info.name: info for info in header.tensors}
    result = {}
    for name, one in about.tensors.items():
        if not one.entries:
            continue
        parts = [stored.pop(f"{name}.{part}", None) for part in ("gaps", "starts", "values")]
        gaps, starts, values = parts
        if gaps is None or starts is None or values is None:
            raise CheckpointError(f"Tensor {name!r} is not all there in {path}; {_AGAIN}.")
        together = -(-one.rows // ROWS_TOGETHER)
        if (
            (gaps.dtype, len(gaps.shape)) != ("U8", 1)
            or (starts.dtype, starts.shape) != ("I64", (together,))
            or (values.dtype, values.shape) != (one.dtype, (one.rows, one.k))
        ):
            raise CheckpointError(f"Tensor {name!r} in {path} has other sizes than the file says; {_AGAIN}.")
        result[name] = gaps, starts, values
    if stored:
        raise CheckpointError(f"{path} holds {next(iter(stored))!r}, which belongs to no tensor; {_AGAIN}.")
    return result


def same_base(one: About, other: About) -> str | None:
    """The first tensor that both have and whose bases differ; None where all agree."""
    shared: Iterable[str] = (name for name in one.tensors if name in other.tensors)
    return next((name for name in shared if one.tensors[name].digest != other.tensors[name].digest), None)
