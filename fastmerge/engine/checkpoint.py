"""Checkpoints as the merge sees them: names, dtypes, shapes, and bytes at any position, without loading the weights.

`open_checkpoint` takes what a person writes in a config (a directory, one file, or `org/name[@revision]` of the
Hugging Face hub), reads headers only, and refuses with a sentence whatever could not be merged as it stands.
"""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from fastmerge.engine.files import (
    NOT_WEIGHTS,
    PICKLE_INDEX,
    SAFETENSORS_INDEX,
    check_all_shards,
    entries,
    listed,
    matches,
)
from fastmerge.engine.hub import locate_on_hub
from fastmerge.engine.safetensors_header import Header, TensorInfo, open_regular, parse_json, read_header
from fastmerge.errors import ArgumentError, CheckpointError, MergeError

__all__ = ["Checkpoint", "TensorInfo", "open_checkpoint"]

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")

# What a merged directory takes over from the base. The weights, their index, config.json and the README are made anew.
_SIDE_FILES = (
    "tokenizer*", "vocab*", "merges*.txt", "special_tokens_map.json", "added_tokens.json", "normalizer.json",
    "*.tiktoken", "*.model", "*.spm", "bpe.codes", "*.bpe", "*.jinja", "chat_template*.json",
    "generation_config.json", "*processor_config.json",
    "*.py", "LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*",
)  # fmt: skip
_SIDE_FOLDERS = ("additional_chat_templates",)
_NEVER_SIDE = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.index.json", "config.json", "README*")

_MAX_READ = 1 << 30  # Linux moves at most 2 GiB - 4 KiB in one call


class TensorSource(Protocol):
    """One file of weights: something that can fill a buffer with a tensor's bytes, from any thread."""

    def read_into(self, info: TensorInfo, start_byte: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of `info` from `start_byte` on."""

    def close(self) -> None:
        """Let go of the file."""


class SafetensorsFile:
    """Positional, thread-safe reads from one safetensors file with a checked header. The first read opens it."""

    def __init__(self, path: Path, header: Header) -> None:
        self.path = path
        self.header = header
        self._lock = threading.Lock()
        self._descriptor: int | None = None

    def read_into(self, info: TensorInfo, start_byte: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of `info` from `start_byte` on; MergeError if the file does not hold them."""
        descriptor = self._descriptor
        if descriptor is None:
            descriptor = self._open()
        position = info.start + start_byte
        done = 0
        while done < len(buffer):
            try:
                count = _pread(descriptor, buffer[done : done + _MAX_READ], position + done)
            except OSError as error:
                raise MergeError(
                    f"Reading tensor {info.name!r} from {self.path} failed ({error.strerror}); check the disk."
                ) from error
            if count == 0:
                raise MergeError(
                    f"{self.path} got shorter while it was read: tensor {info.name!r} is no longer all there; "
                    "download the file again and leave it alone during the merge."
                )
            done += count

    def _open(self) -> int:
        with self._lock:
            if self._descriptor is None:
                descriptor = _open_many(self.path)
                status = os.fstat(descriptor)
                known = (self.header.size, self.header.mtime_ns, self.header.inode)
                if (status.st_size, status.st_mtime_ns, status.st_ino) != known:
                    os.close(descriptor)
                    raise MergeError(
                        f"{self.path} changed after its header had been read; "
                        "leave the inputs alone during the merge and run it again."
                    )
                self._descriptor = descriptor
            return self._descriptor

    def close(self) -> None:
        """Close the file; a later read opens it again."""
        with self._lock:
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None


def _pread(descriptor: int, buffer: memoryview, position: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [buffer], position)
    part = os.pread(descriptor, len(buffer), position)
    buffer[: len(part)] = part
    return len(part)


def _open_many(path: Path) -> int:
    """Open `path`; many shards of many models may need more descriptors than the soft limit of the process allows."""
    try:
        return os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        if error.errno == errno.EMFILE and _raise_descriptor_limit():
            return _open_many(path)
        raise MergeError(f"{path} cannot be opened any more ({error.strerror}).") from error


def _raise_descriptor_limit() -> bool:
    try:
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft == resource.RLIM_INFINITY or soft == hard:
            return False
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ImportError, OSError, ValueError):
        return False
    return True


class Checkpoint:
    """An opened checkpoint: its tensors' whereabouts and a positional, thread-safe read. A context manager.

    Attributes:
        ref: what the user wrote.
        root: the directory that holds the files.
        files: the files of weights, sorted by name.
        tensors: name -> TensorInfo, file by file and by offset within each: the order to read them in.
        config: config.json as a dict, or None where there is none.
    """

    def __init__(
        self,
        ref: str,
        root: Path,
        sources: Mapping[Path, TensorSource],
        tensors: Mapping[str, tuple[TensorInfo, Path]],
        config: dict[str, Any] | None,
        identities: list[dict[str, Any]],
        revision: str | None = None,
        single_file: bool = False,
    ) -> None:
        self.ref = ref
        self.root = root
        self.files: list[Path] = list(sources)
        self.tensors: dict[str, TensorInfo] = {name: info for name, (info, _) in tensors.items()}
        self.config = config
        self._sources = dict(sources)
        self._home = {name: sources[path] for name, (_, path) in tensors.items()}
        self._identities = identities
        self._revision = revision
        # The neighbours of a lone file are its model's only where a config.json says that a model lives there.
        self._owns_root = not single_file or config is not None

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors together."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def tied(self) -> bool | None:
        """Whether config.json ties the output head to the input embedding; None where it does not say."""
        return _tied(self.config)

    def read_into(self, info: TensorInfo, start_byte: int, buffer: memoryview) -> None:
        """Fill `buffer` with exactly len(buffer) bytes of the tensor `info`, from its byte `start_byte` on.

        The buffer must be writable and contiguous; its length is counted in bytes. Safe to call from several threads.

        Raises:
            ArgumentError: the bytes asked for are not within the tensor, or the tensor is not this checkpoint's.
            MergeError: the file cannot give them (it got shorter, changed or failed); names file and tensor.
        """
        if buffer.readonly or not buffer.c_contiguous:
            raise ArgumentError("buffer must be writable and contiguous; pass the memoryview of a bytearray.")
        if buffer.format != "B" or buffer.ndim != 1:
            buffer = buffer.cast("B") if buffer.nbytes else memoryview(bytearray())
        if start_byte < 0 or start_byte + len(buffer) > info.nbytes:
            raise ArgumentError(
                f"start_byte={start_byte} and {len(buffer)} bytes reach outside tensor {info.name!r} "
                f"of {info.nbytes} bytes; ask for bytes within it."
            )
        source = self._home.get(info.name)
        if source is None or self.tensors[info.name] != info:
            raise ArgumentError(f"info describes no tensor of {self.ref} ({info.name!r}); take it from its `tensors`.")
        if len(buffer):
            source.read_into(info, start_byte, buffer)

    def side_files(self) -> list[Path]:
        """What a merged directory takes over from this one besides weights, config.json and README: sorted paths.

        Tokenizer and preprocessor files, the generation config, chat templates, custom code (copied, never run) and
        licences. All lie under `root`; keep their path relative to it.
        """
        found: list[Path] = []
        if not self._owns_root:
            return found
        for path in entries(self.root):
            name = path.name
            if matches(name, _SIDE_FILES) and not matches(name, _NEVER_SIDE) and path.is_file():
                found.append(path)
        for folder in _SIDE_FOLDERS:
            found.extend(path for path in entries(self.root / folder) if path.is_file())
        return sorted(found)

    def same(self, one: str, other: str) -> bool:
        """Never known of two tensors in files."""
        return False

    def identity(self) -> dict[str, Any]:
        """Describe this input for the manifest: the ref, the hub's commit if any, and the files.

        Of each file its name, size, modification time and the SHA-256 of its header (.bin: of its list of tensors).
        """
        result: dict[str, Any] = {"ref": self.ref, "files": [dict(entry) for entry in self._identities]}
        if self._revision is not None:
            result["revision"] = self._revision
        return result

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        for source in self._sources.values():
            source.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Checkpoint({self.ref!r}, {len(self.tensors)} tensors in {len(self.files)} files)"


def open_checkpoint(ref: str | Path, *, revision: str | None = None) -> Checkpoint:
    """Open a directory, one file of weights, or `org/name[@revision]` of the Hugging Face hub. Reads headers only.

    The hub is asked only for what its local cache lacks. `revision` is for hub models; `@revision` in `ref` wins.

    Raises:
        CheckpointError: nothing there, or something that could not be merged as it stands; one sentence.
    """
    text = str(ref)
    path = Path(os.path.expanduser(text))
    if not text.strip():
        raise CheckpointError("The name of a model is empty; name a directory, a .safetensors file or org/name.")
    if os.path.isdir(path):  # os.path, unlike Path, answers False to names that no file system would take
        return _open_directory(text, path, revision=None)
    if os.path.lexists(path):
        return _open_single(text, path)
    if "+" in text:
        model, adapter = text.split("+", 1)
        raise CheckpointError(
            f"{text} does not exist as a path, and as a name it asks for the adapter {adapter} on {model}, which this "
            "version does not support; merge the adapter into its model first (peft: merge_and_unload)."
        )
    directory, commit = locate_on_hub(text, revision)
    return _open_directory(text, directory, revision=commit)


def _open_directory(ref: str, root: Path, revision: str | None) -> Checkpoint:
    names = sorted(path.name for path in entries(root))
    for suffix, index_name, build in (
        (".safetensors", SAFETENSORS_INDEX, _safetensors_source),
        (".bin", PICKLE_INDEX, _pickle_source),
    ):
        weights = [name for name in names if name.endswith(suffix) and not matches(name, NOT_WEIGHTS)]
        indices = [name for name in names if name.endswith(f"{suffix}.index.json")]
        if index_name in indices:
            indices = [index_name]
        if len(indices) > 1:
            raise CheckpointError(
                f"{ref} has several indices ({', '.join(indices)}) and none is called {index_name}; keep one."
            )
        single = "model.safetensors" if suffix == ".safetensors" else "pytorch_model.bin"
        if indices:
            return _open_indexed(
                ref, root, indices[0], suffix, build, revision, rival=single if single in weights else None
            )
        if single in weights:
            weights = [single]
        if weights:
            check_all_shards(ref, weights)
            return _assemble(ref, root, [root / name for name in weights], build, revision)
    raise CheckpointError(_nothing_found(ref, names))


def _nothing_found(ref: str, names: list[str]) -> str:
    if any(matches(name, ("adapter_config.json", "adapter_model*")) for name in names):
        return (
            f"{ref} holds an adapter (adapter_config.json) and no model; merge the adapter into its model first "
            "(peft: merge_and_unload, then save_pretrained)."
        )
    if any(name.endswith(".gguf") for name in names):
        return f"{ref} holds GGUF files, which are not merged here; use the model's original safetensors files."
    return (
        f"{ref} has no weights: looked for {SAFETENSORS_INDEX}, model.safetensors, *.safetensors, {PICKLE_INDEX}, "
        "pytorch_model.bin and *.bin; download the model again or check the path."
    )


def _open_single(ref: str, path: Path) -> Checkpoint:
    if path.suffix == ".safetensors":
        return _assemble(ref, path.parent, [path], _safetensors_source, None, single_file=True)
    if path.suffix in _PICKLE_SUFFIXES:
        return _assemble(ref, path.parent, [path], _pickle_source, None, single_file=True)
    raise CheckpointError(
        f"{ref} is neither a directory nor a .safetensors or .bin file; name a model's directory or its weights."
    )


_Built = tuple[TensorSource, Iterable[TensorInfo], dict[str, Any]]


def _safetensors_source(path: Path) -> _Built:
    header = read_header(path)
    identity = {"name": path.name, "size": header.size, "mtime_ns": header.mtime_ns, "header_sha256": header.sha256}
    return SafetensorsFile(path, header), header.tensors, identity


def _pickle_source(path: Path) -> _Built:
    from fastmerge.engine.pickle_checkpoint import PickleFile  # imports torch

    source = PickleFile(path)
    return source, source.tensors, source.identity()


def _open_indexed(
    ref: str,
    root: Path,
    index_name: str,
    suffix: str,
    build: Callable[[Path], _Built],
    revision: str | None,
    rival: str | None,
) -> Checkpoint:
    index = root / index_name
    again = "download the model again"
    content = parse_json(_read_whole(index), f"The index {index}", again)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"The index {index} has no weight_map from tensors to shards; {again}.")
    for name, shard in weight_map.items():
        _check_shard_path(index, name, shard, suffix)
    shards = sorted(set(weight_map.values()))
    if rival is not None and rival not in shards:
        raise CheckpointError(
            f"{ref} holds two sets of weights, {rival} and the shards of {index_name}; remove the one that is not "
            "meant, or name the file itself."
        )
    missing = [shard for shard in shards if not os.path.exists(root / shard)]
    if missing:
        raise CheckpointError(
            f"{ref} lacks {listed(missing)}, named by {index_name}; {again}, {len(shards)} shards in all."
        )
    return _assemble(ref, root, [root / shard for shard in shards], build, revision, index=(index, weight_map))


def _check_shard_path(index: Path, tensor: str, shard: Any, suffix: str) -> None:
    """Refuse a shard whose path, read as text, does not stay within the directory.

    Links are not resolved: the hub's cache is made of links out of the snapshot to the blobs, as it should be.
    """
    where = f"The index {index} puts tensor {tensor!r} in {shard!r}"
    if not isinstance(shard, str) or not shard or not shard.isprintable():
        raise CheckpointError(f"{where}, which is not the name of a file; download the model again.")
    parts = re.split(r"[/\\]", shard)
    if "\\" in shard or ":" in shard or ".." in parts or "" in parts or shard.startswith("~"):
        raise CheckpointError(
            f"{where}, a path that leads out of the model's directory; "
            "do not use this model unless you trust it, and give it an index with plain file names."
        )
    if not shard.endswith(suffix):
        raise CheckpointError(f"{where}, which is not a {suffix} file; download the model again.")


def _assemble(
    ref: str,
    root: Path,
    paths: list[Path],
    build: Callable[[Path], _Built],
    revision: str | None,
    index: tuple[Path, dict[str, str]] | None = None,
    single_file: bool = False,
) -> Checkpoint:
    config = _read_config(root)
    _refuse_quantised_config(ref, config)
    sources: dict[Path, TensorSource] = {}
    tensors: dict[str, tuple[TensorInfo, Path]] = {}
    identities = []
    try:
        for path in paths:
            source, infos, identity = build(path)
            sources[path] = source
            identities.append(identity | {"name": path.relative_to(root).as_posix()})
            for info in infos:
                if info.name in tensors:
                    other = tensors[info.name][1].name
                    raise CheckpointError(
                        f"Tensor {info.name!r} is both in {other} and in {path.name} of {ref}; "
                        f"remove the file that does not belong to the model, or add {SAFETENSORS_INDEX}."
                    )
                tensors[info.name] = (info, path)
        if index is not None:
            _check_against_index(root, *index, tensors)
        if not tensors:
            raise CheckpointError(f"{ref} holds no tensor at all; download the model again.")
        _refuse_dtypes(ref, tensors)
        _refuse_quantised_tensors(ref, tensors)
    except BaseException:
        for source in sources.values():
            source.close()
        raise
    return Checkpoint(ref, root, sources, tensors, config, identities, revision, single_file)


def _check_against_index(
    root: Path, index: Path, weight_map: dict[str, str], tensors: Mapping[str, tuple[TensorInfo, Path]]
) -> None:
    again = "the index and the shards are not of one model, download it again"
    for name, shard in weight_map.items():
        if name not in tensors:
            raise CheckpointError(f"The index {index} puts tensor {name!r} in {shard}, which lacks it; {again}.")
        if (actual := tensors[name][1]) != root / shard:
            raise CheckpointError(
                f"The index {index} puts tensor {name!r} in {shard}, but it is in {actual.name}; {again}."
            )
    for name, (_, path) in tensors.items():
        if name not in weight_map:
            raise CheckpointError(f"{path} holds tensor {name!r}, which the index {index.name} lacks; {again}.")


# -- what cannot be averaged as it stands

_UNMERGEABLE = {
    "C64": "complex numbers", "F8_E4M3": "FP8", "F8_E5M2": "FP8", "F8_E4M3FNUZ": "FP8", "F8_E5M2FNUZ": "FP8",
    "F8_E8M0": "FP8 block scales", "F6_E2M3": "FP6", "F6_E3M2": "FP6", "F4": "FP4",
}  # fmt: skip
_CODE_SUFFIXES = (".qweight", ".qzeros", ".weight_packed", ".weight_scale_inv", ".SCB", ".absmax", ".quant_map")
_SCALE_SUFFIXES = ("_scale", "_scales", "_scale_inv", "_zero_point")
_CODE_DTYPES = ("I8", "U8", "I32", "U32")


def _refuse_quantised_config(ref: str, config: dict[str, Any] | None) -> None:
    for part in (config or {}, (config or {}).get("text_config")):
        settings = part.get("quantization_config") if isinstance(part, dict) else None
        if settings:
            method = settings.get("quant_method") if isinstance(settings, dict) else None
            raise CheckpointError(
                f"{ref} is quantised (its config.json has a quantization_config{f': {method}' if method else ''}), and "
                "codes cannot be merged; use the model's bfloat16 or float16 original, or dequantise it first and "
                "take that key out of its config.json."
            )


def _refuse_dtypes(ref: str, tensors: Mapping[str, tuple[TensorInfo, Path]]) -> None:
    for name, (info, path) in tensors.items():
        if info.dtype in _UNMERGEABLE:
            fix = (
                "save its real part first"
                if info.dtype == "C64"
                else "use the model's bfloat16 or float16 original, or dequantise it first"
            )
            raise CheckpointError(
                f"Tensor {name!r} in {path.name} of {ref} is {info.dtype} ({_UNMERGEABLE[info.dtype]}), "
                f"which cannot be merged; {fix}."
            )


def _refuse_quantised_tensors(ref: str, tensors: Mapping[str, tuple[TensorInfo, Path]]) -> None:
    """Integer codes look like any other integers; the tensors beside them give them away."""
    for name, (info, _) in tensors.items():
        sign: str | None = name if name.endswith(_CODE_SUFFIXES) else None
        if sign is None and info.dtype in _CODE_DTYPES:
            stem = name.removesuffix(".weight")
            beside = [name + suffix for suffix in _SCALE_SUFFIXES] + [f"{stem}.scale", f"{stem}.scales"]
            sign = next((other for other in beside if other in tensors and other != name), None)
        if sign is not None:
            raise CheckpointError(
                f"{ref} holds quantised weights ({sign!r} is a sign of it), and codes cannot be merged; "
                "use the model's bfloat16 or float16 original, or dequantise it first."
            )


# -- small files


def _read_config(root: Path) -> dict[str, Any] | None:
    path = root / "config.json"
    if not path.exists() and not path.is_symlink():
        return None
    config = parse_json(_read_whole(path), str(path), "mend it or download it again")
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not a JSON object; download it again.")
    return config


def _tied(config: Mapping[str, Any] | None) -> bool | None:
    for part in (config or {}, (config or {}).get("text_config")):
        if isinstance(part, Mapping) and part.get("tie_word_embeddings") is not None:
            return bool(part["tie_word_embeddings"])
    return None


def _read_whole(path: Path, limit: int = 256 << 20) -> bytes:
    descriptor = open_regular(path)
    with os.fdopen(descriptor, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise CheckpointError(f"{path} is larger than {limit >> 20} MiB, which no such file is; download it again.")
    return data
