"""Where tensors come from: an opened checkpoint, or a dict of tensors in memory, behind one small interface."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from fastmerge.engine.safetensors_header import TensorInfo
from fastmerge.errors import ArgumentError, ArgumentTypeError

TORCH_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip
"""The dtypes that can be merged or copied, by their safetensors names."""

SAFETENSORS_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
FLOATS = ("F16", "BF16", "F32", "F64")


class Source(Protocol):
    """One model: its tensors' names, dtypes and shapes at once, their bytes when asked for. Checkpoint is one."""

    @property
    def ref(self) -> str:
        """What messages call the model."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The tensors, in the order to read them in."""

    @property
    def config(self) -> Mapping[str, Any] | None:
        """The model's config, or None where there is none."""

    @property
    def tied(self) -> bool | None:
        """Whether the config ties the output head to the embedding; None where it does not say."""

    def same(self, one: str, other: str) -> bool:
        """Whether two tensors are the same memory."""

    def read_into(self, info: TensorInfo, start_byte: int, buffer: memoryview) -> None:
        """Fill `buffer` with the tensor's bytes from `start_byte` on. Thread-safe."""


class StateDictSource:
    """A dict of tensors in memory, or a module's. Its tensors are lent as views; nothing is copied or changed."""

    def __init__(self, ref: str, model: Any) -> None:
        """ref: what messages call it. model: a mapping from names to tensors, or a torch.nn.Module."""
        self.ref = ref
        self.config: dict[str, Any] | None = None
        if isinstance(model, torch.nn.Module):
            to_dict = getattr(getattr(model, "config", None), "to_dict", None)
            self.config = None if to_dict is None else to_dict()
            model = model.state_dict()
        if not isinstance(model, Mapping):
            raise ArgumentTypeError(
                f"{ref} is a {type(model).__name__}; pass a state dict (name -> tensor) or a torch.nn.Module."
            )
        if not model:
            raise ArgumentError(f"{ref} holds no tensors; pass a state dict (name -> tensor) with some.")
        self._tensors = {str(name): _checked(ref, str(name), tensor) for name, tensor in model.items()}
        self.tensors = {
            name: TensorInfo(name, SAFETENSORS_NAMES[tensor.dtype], tuple(tensor.shape), None, 0, tensor.nbytes)
            for name, tensor in self._tensors.items()
        }

    @property
    def tied(self) -> bool | None:
        """Whether the module's config ties the output head to the embedding."""
        said = None if self.config is None else self.config.get("tie_word_embeddings")
        return None if said is None else bool(said)

    def same(self, one: str, other: str) -> bool:
        """Whether two tensors are the same memory, as a tied head and its embedding are in a module."""
        first, second = self._tensors[one], self._tensors[other]
        return (first.data_ptr(), first.shape, first.stride()) == (second.data_ptr(), second.shape, second.stride())

    def device_of(self, info: TensorInfo) -> torch.device:
        """Where the tensor is."""
        return self._tensors[info.name].device

    @property
    def places(self) -> dict[torch.device, str]:
        """Where its tensors are, each with the name of the first one that is there."""
        found: dict[torch.device, str] = {}
        for name, tensor in self._tensors.items():
            found.setdefault(tensor.device, name)
        return found

    def view(self, info: TensorInfo) -> torch.Tensor:
        """The tensor, flat; a copy only where its elements do not lie in one piece."""
        return self._tensors[info.name].contiguous().reshape(-1)

    def read_into(self, info: TensorInfo, start_byte: int, buffer: memoryview) -> None:
        """Not needed: tensors in memory are lent by `view`."""
        raise AssertionError("tensors in memory are not read")


def _checked(ref: str, name: str, tensor: Any) -> torch.Tensor:
    if not isinstance(tensor, torch.Tensor):
        raise ArgumentTypeError(f"{name!r} of {ref} is a {type(tensor).__name__}, not a tensor; leave it out.")
    if tensor.layout != torch.strided or tensor.device.type not in ("cpu", "cuda"):
        dense = tensor.layout == torch.strided
        kind = tensor.device.type if dense else str(tensor.layout).removeprefix("torch.")
        raise ArgumentError(
            f"{name!r} of {ref} is a {kind} tensor; pass dense tensors on the CPU or on a GPU (.cpu(), .to_dense())."
        )
    if tensor.dtype not in SAFETENSORS_NAMES:
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise ArgumentTypeError(f"{name!r} of {ref} is {dtype}, which cannot be merged; convert it to float32 first.")
    # A conjugate or negated view keeps its sign in a flag that raw bytes do not show.
    return tensor.detach().resolve_conj().resolve_neg()
