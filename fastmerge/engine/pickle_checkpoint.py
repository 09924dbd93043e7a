"""PyTorch .bin checkpoints, through `torch.load(weights_only=True, mmap=True)` and nothing weaker.

A pickle can run any code while it is loaded; `weights_only` admits tensors and plain containers. A file that needs
more is refused. The tensors stay mapped from the file until their bytes are copied out.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch

from fastmerge.engine.safetensors_header import TensorInfo, open_regular
from fastmerge.errors import CheckpointError, MergeError

_SAFETENSORS_NAMES: dict[torch.dtype, str] = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32",
    torch.int64: "I64", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64",
    torch.complex64: "C64", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ", torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}  # fmt: skip
_CONVERT = "load it where you trust it and save it as safetensors (save_pretrained does)"


class PickleFile:
    """One .bin file. Offers the same reads as a safetensors file; `tensors` are in the order of the file's dict."""

    def __init__(self, path: Path) -> None:
        self.path = path
        os.close(open_regular(path))
        self._status = os.stat(path)
        self._mapped = _load(path)
        self.tensors = [self._info(name, tensor) for name, tensor in self._mapped.items()]

    def _info(self, name: str, tensor: torch.Tensor) -> TensorInfo:
        here = f"Tensor {name!r} in {self.path}"
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise CheckpointError(f"{here} is not a plain dense tensor; {_CONVERT}.")
        dtype = _SAFETENSORS_NAMES.get(tensor.dtype)
        if dtype is None:
            raise CheckpointError(f"{here} has the dtype {tensor.dtype}, which cannot be merged; {_CONVERT}.")
        return TensorInfo(name, dtype, tuple(tensor.shape), None, 0, tensor.numel() * tensor.element_size())

    def read_into(self, info: TensorInfo, start_byte: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of `info` from `start_byte` on; MergeError if the file has changed."""
        status = os.stat(self.path)
        # A page of a mapped file that is no longer there ends the process: look before reading.
        if (status.st_size, status.st_mtime_ns) != (self._status.st_size, self._status.st_mtime_ns):
            raise MergeError(
                f"{self.path} changed while tensor {info.name!r} was read; "
                "leave the inputs alone during the merge and run it again."
            )
        flat = self._mapped[info.name].detach().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
        torch.frombuffer(buffer, dtype=torch.uint8).copy_(flat[start_byte : start_byte + len(buffer)])

    def identity(self) -> dict[str, Any]:
        """Name, size, modification time, and a digest of the list of names, dtypes and shapes."""
        listing = "\n".join(f"{info.name}\0{info.dtype}\0{info.shape}" for info in self.tensors)
        return {
            "name": self.path.name,
            "size": self._status.st_size,
            "mtime_ns": self._status.st_mtime_ns,
            "header_sha256": hashlib.sha256(listing.encode("utf-8", "surrogatepass")).hexdigest(),
        }

    def close(self) -> None:
        """Nothing to close: the mapping ends with this object."""


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # unpicklers fail in every way there is on a hostile file
        text = str(error)
        if "mmap can only be used" in text or "_use_new_zipfile_serialization" in text:
            reason = "for it is in PyTorch's old file format, which cannot be mapped"
        elif "weights_only" in text or "Weights only" in text or "Unsupported" in text:
            reason = "for it holds more than tensors, and a pickle like that can run any code"
        else:
            lines = text.strip().splitlines()
            reason = f"for it cannot be read as a PyTorch file: {lines[0] if lines else type(error).__name__}"
        raise CheckpointError(
            f"{path} is refused, {reason}; use the model's safetensors files, or {_CONVERT}."
        ) from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no table of tensors; {_CONVERT}.")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"{path} holds {name!r}, which is not a named tensor; {_CONVERT}.")
    return dict(content)
