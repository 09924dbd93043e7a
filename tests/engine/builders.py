"""Small checkpoints for tests, written byte by byte so that each can also be broken on purpose."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Entry = tuple[str, Sequence[int], bytes]
"""A tensor: its dtype by safetensors' name, its shape, its bytes."""


def header_of(tensors: Mapping[str, Entry], metadata: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The header that safetensors would write for `tensors`, laid out in their order."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    position = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + len(data)]}
        position += len(data)
    return header


def write_raw(path: Path, header: Mapping[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> Path:
    """Write a safetensors file from a header (as JSON text if it is bytes), data, and a claimed header length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def write_safetensors(path: Path, tensors: Mapping[str, Entry]) -> Path:
    """Write a good safetensors file."""
    return write_raw(path, header_of(tensors, {"format": "pt"}), b"".join(data for _, _, data in tensors.values()))


def bf16(*shape: int, fill: int = 0) -> Entry:
    """A bfloat16 tensor whose bytes count up from `fill`."""
    count = 2
    for side in shape:
        count *= side
    return "BF16", shape, bytes((fill + index) % 251 for index in range(count))


def write_model(
    root: Path, tensors: Mapping[str, Entry], *, shards: int = 1, config: Mapping[str, Any] | None = None
) -> Path:
    """Write a Hugging Face style directory: one file, or `shards` files (tensors dealt in turn) with their index."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.json").write_text(json.dumps(dict(config or {"model_type": "llama"})))
    if shards == 1:
        write_safetensors(root / "model.safetensors", tensors)
        return root
    weight_map = {}
    for number in range(shards):
        file_name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[number::shards])
        write_safetensors(root / file_name, part)
        weight_map.update(dict.fromkeys(part, file_name))
    write_index(root, weight_map)
    return root


def write_index(root: Path, weight_map: Any, name: str = "model.safetensors.index.json") -> Path:
    """Write an index, whatever `weight_map` says."""
    path = root / name
    path.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return path
