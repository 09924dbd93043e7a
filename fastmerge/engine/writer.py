"""Writing a merged model: a Hugging Face directory of safetensors shards, complete or absent.

Every byte's place is known from the shapes before anything is computed. So the shards are laid out, allocated and
given their headers first (a full disk shows up in the first second, not in the last), and tensors are then written by
position, whichever is ready.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from blake3 import blake3

from fastmerge.engine.atomic import AtomicDirectory, check_target, disk_error, fsync_path
from fastmerge.engine.card import model_card
from fastmerge.engine.outfile import OutputFile
from fastmerge.errors import ArgumentError, MergeError
from fastmerge.sizes import format_size

ITEM_SIZE: dict[str, int] = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
"""Bytes per element of the safetensors dtypes."""

SINGLE_SHARD = "model.safetensors"
INDEX = "model.safetensors.index.json"
_GENERATED = ("config.json", "README.md", "manifest.json", SINGLE_SHARD, INDEX)
# Readers want 8; whole pages let tensors whose size is a multiple of a page go to the disk directly.
_ALIGNMENT = 4096
_LONGEST_HEADER = 100_000_000  # readers refuse longer ones
# Shapes are not the only thing on the disk: headers, tokenizer, card and manifest take some more.
_OVERHEAD_BYTES = 1 << 20


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of the output: its name, safetensors dtype name (``"BF16"``, ``"F32"``, ``"I64"``, ...) and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return self.numel * ITEM_SIZE[self.dtype]


def layout_shards(tensors: Sequence[OutputTensor], shard_size: int) -> list[list[OutputTensor]]:
    """Divide tensors among shards in the order given; a tensor larger than a shard gets one of its own.

    Within a shard, wider elements come first (the order is otherwise kept): packed without holes, every tensor then
    starts at a multiple of its element size, without which PyTorch cannot view it in place.

    Args:
        tensors: the tensors in file order, with distinct names.
        shard_size: most data bytes of a shard that holds more than one tensor.

    Returns:
        The tensors of each shard, in the order in which they lie in it; an empty list for no tensors.

    Raises:
        ArgumentError: ``shard_size`` is below 1.
    """
    if shard_size < 1:
        raise ArgumentError(f"shard_size must be at least 1 byte, not {shard_size}.")
    shards: list[list[OutputTensor]] = []
    used = 0
    for tensor in tensors:
        if not shards or (used > 0 and used + tensor.nbytes > shard_size):
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += tensor.nbytes
    return [sorted(shard, key=lambda tensor: -ITEM_SIZE[tensor.dtype]) for shard in shards]


def shard_names(count: int) -> list[str]:
    """File names of ``count`` shards, as Hugging Face tools expect them."""
    if count == 1:
        return [SINGLE_SHARD]
    return [f"model-{index:05d}-of-{count:05d}.safetensors" for index in range(1, count + 1)]


def shard_header(tensors: Iterable[OutputTensor]) -> bytes:
    """The head of a safetensors file: length, JSON, and spaces until the data begins at a whole page (4096 bytes)."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        stop = offset + tensor.nbytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    if len(text) > _LONGEST_HEADER:
        raise MergeError(
            f"A shard header of {format_size(len(text))} is longer than readers accept: choose a smaller shard_size."
        )
    return len(text).to_bytes(8, "little") + text


@dataclass
class _Target:
    """Where one tensor goes and how much of it has come."""

    tensor: OutputTensor
    file: OutputFile
    offset: int
    position: int = 0
    digest: Any = field(default_factory=blake3)


class ModelWriter:
    """Writes one model; nothing appears at ``out`` before :meth:`finish` has flushed and renamed everything.

    Args:
        out: the directory to make: absent, or an empty directory.
        tensors: every tensor of the model, with distinct names, in the order in which they shall lie in the files.
        shard_size: most data bytes per file (a single larger tensor gets a file of its own).
        config: contents of ``config.json``, or None to write none (``side_files`` may still hold one).
        side_files: files to copy into the directory (tokenizer, generation config, custom code): under their own names,
            or under their places below ``side_root``. Those with the name of a file that the writer makes itself are
            passed over.
        side_root: the directory that ``side_files`` come from, or None.
        single_file: put all tensors into one ``model.safetensors``, however large.

    Raises:
        ArgumentError: the target cannot be used, or ``tensors`` is empty or has a wrong dtype or a name twice.
        MergeError: the disk has too little space, or fails.
    """

    digests: dict[str, str]
    """BLAKE3 (hex) of each tensor's bytes, as soon as the tensor is complete."""

    def __init__(
        self,
        out: Path,
        tensors: Sequence[OutputTensor],
        *,
        shard_size: int,
        config: Mapping[str, Any] | None,
        side_files: Sequence[Path],
        side_root: Path | None = None,
        single_file: bool = False,
    ) -> None:
        _check_tensors(tensors)
        self.digests = {}
        self._config = config
        self._total = sum(tensor.nbytes for tensor in tensors)
        side_bytes = sum(_size_of(file) for file in side_files)
        check_target(Path(out), self._total + side_bytes + _OVERHEAD_BYTES)
        layout = [layout_shards(tensors, max(self._total, 1))[0]] if single_file else layout_shards(tensors, shard_size)

        self._lock = threading.Condition()
        self._writing = 0
        self._closed = False
        self._shards: list[OutputFile] = []
        self._targets: dict[str, _Target] = {}
        self._directory = AtomicDirectory(Path(out))
        try:
            for name, members in zip(shard_names(len(layout)), layout, strict=True):
                self._start_shard(self._directory.path / name, members)
            for file in side_files:
                if file.name not in (_GENERATED if config is not None else _GENERATED[1:]):
                    self._copy(file, side_root)
        except BaseException:
            self.abort()
            raise

    def __enter__(self) -> ModelWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove everything unless :meth:`finish` has been reached."""
        self.abort()

    def write(self, name: str, start_byte: int, data: memoryview) -> None:
        """Write part of a tensor. Thread-safe; the parts of one tensor must come in rising order without gaps.

        Args:
            name: the tensor.
            start_byte: where in the tensor's data the part begins.
            data: the bytes, in any C-contiguous buffer; free to be reused when the call returns.

        Raises:
            MergeError: the disk is full or fails, or the part is not the one that comes next.
        """
        target = self._targets.get(name)
        if target is None:
            raise MergeError(f"The tensor {name!r} is not part of the output that was planned.")
        data = memoryview(data).cast("B")
        if start_byte != target.position or start_byte + len(data) > target.tensor.nbytes:
            raise MergeError(
                f"The tensor {name!r} has {target.tensor.nbytes} bytes of which byte {target.position} comes next, "
                f"but bytes {start_byte} to {start_byte + len(data)} were written."
            )
        with self._in_flight():
            target.digest.update(data)
            self._guard(functools.partial(target.file.write, target.offset + start_byte, data), target.file.path)
            target.position += len(data)
            if target.position == target.tensor.nbytes:
                self.digests[name] = target.digest.hexdigest()

    @property
    def target(self) -> Path:
        """The directory that is being made."""
        return self._directory.target

    def place(self, name: str) -> Path:
        """Where a further file of the output is to be written before :meth:`finish`; it appears with all the others."""
        return self._directory.path / name

    def finish(self, *, manifest: Mapping[str, Any], card_yaml: str, card_info: Mapping[str, Any]) -> None:
        """Check that every byte has come, write the small files, flush all and rename the directory into place.

        Args:
            manifest: contents of ``manifest.json`` (see :func:`fastmerge.engine.manifest.build_manifest`).
            card_yaml: the merge configuration as YAML, for the model card.
            card_info: what the model card says (see :func:`fastmerge.engine.card.model_card`).

        Raises:
            MergeError: bytes are missing, or the disk is full or fails. Everything written has then been removed.
        """
        try:
            with self._lock:
                if self._closed:
                    raise MergeError("The output has been closed already: a writer finishes once.")
            self._check_complete()
            self._close_shards()
            self._write_small_files(manifest, model_card(card_yaml, card_info))
            for file in sorted(self._directory.path.iterdir()):
                self._guard(functools.partial(fsync_path, file), file, "Flushing")
            self._directory.commit()
            with self._lock:
                self._closed = True
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Remove everything that was written. Idempotent, and nothing after :meth:`finish`; hides no other error."""
        with self._lock:
            self._closed = True
            # A descriptor closed under a write in flight could by then belong to somebody else's file.
            idle = self._lock.wait_for(lambda: self._writing == 0, timeout=30)
        if idle:
            with contextlib.suppress(OSError, MergeError):
                self._close_shards()
        self._directory.abort()

    # -- shards

    def _start_shard(self, path: Path, members: Sequence[OutputTensor]) -> None:
        header = shard_header(members)
        size = len(header) + sum(tensor.nbytes for tensor in members)
        shard = self._guard(functools.partial(OutputFile, path, size, header), path)
        self._shards.append(shard)
        offset = len(header)
        for tensor in members:
            self._targets[tensor.name] = _Target(tensor, shard, offset)
            offset += tensor.nbytes
            if tensor.nbytes == 0:
                self.digests[tensor.name] = blake3().hexdigest()

    def _close_shards(self) -> None:
        for shard in self._shards:
            self._guard(shard.close, shard.path)

    def _check_complete(self) -> None:
        short = [target for target in self._targets.values() if target.position != target.tensor.nbytes]
        if short:
            first = short[0]
            raise MergeError(
                f"The output is incomplete: {len(short)} of {len(self._targets)} tensors were not written to their "
                f"end, the first being {first.tensor.name!r} ({first.position} of {first.tensor.nbytes} bytes)."
            )

    # -- small files

    def _write_small_files(self, manifest: Mapping[str, Any], card: str) -> None:
        if len(self._shards) > 1:
            weight_map = {name: target.file.path.name for name, target in sorted(self._targets.items())}
            self._write_json(INDEX, {"metadata": {"total_size": self._total}, "weight_map": weight_map})
        if self._config is not None:
            self._write_json("config.json", self._config)
        self._write_json("manifest.json", manifest)
        self._write_text("README.md", card)

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        self._write_text(name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def _write_text(self, name: str, text: str) -> None:
        path = self._directory.path / name
        self._guard(functools.partial(path.write_text, text, encoding="utf-8", newline="\n"), path)

    def _copy(self, file: Path, root: Path | None) -> None:
        path = self._directory.path / (file.name if root is None else file.relative_to(root))
        path.parent.mkdir(parents=True, exist_ok=True)
        self._guard(functools.partial(shutil.copyfile, file, path), path, f"Copying {file} to")

    # -- errors and threads

    @staticmethod
    def _guard(action: Callable[[], Any], path: Path, doing: str = "Writing") -> Any:
        try:
            return action()
        except OSError as error:
            raise disk_error(error, path, doing) from error

    @contextlib.contextmanager
    def _in_flight(self) -> Iterator[None]:
        with self._lock:
            if self._closed:
                raise MergeError("The output has been closed already: nothing more can be written.")
            self._writing += 1
        try:
            yield
        finally:
            with self._lock:
                self._writing -= 1
                self._lock.notify_all()


def _check_tensors(tensors: Sequence[OutputTensor]) -> None:
    if not tensors:
        raise ArgumentError("The output has no tensors: there is nothing to write.")
    names = set()
    for tensor in tensors:
        if tensor.dtype not in ITEM_SIZE:
            raise ArgumentError(f"The tensor {tensor.name!r} has the dtype {tensor.dtype!r}, which cannot be written.")
        if tensor.name in names or tensor.name == "__metadata__":
            raise ArgumentError(f"The output has the tensor name {tensor.name!r} twice, or it is reserved.")
        names.add(tensor.name)


def _size_of(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise disk_error(error, file, "Reading") from error
