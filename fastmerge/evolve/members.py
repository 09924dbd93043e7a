"""The models that a run begins with: checked to fit together, and held in memory as they are."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from fastmerge.engine.checkpoint import Checkpoint, open_checkpoint
from fastmerge.engine.loading import read_all
from fastmerge.engine.manifest import merge_digest
from fastmerge.engine.matching import copies_of_embeddings
from fastmerge.engine.safetensors_header import TensorInfo
from fastmerge.engine.sources import TORCH_DTYPES, Source, StateDictSource
from fastmerge.engine.writer import OutputTensor
from fastmerge.errors import ArgumentError, ArgumentTypeError, CheckpointError
from fastmerge.ops import tensor_id

Model = str | Path | Mapping[str, Tensor] | torch.nn.Module

EVOLVED = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes whose tensors evolve. Integers and bools never do."""


@dataclass(frozen=True)
class Members:
    """The input models' tensors.

    tensors: for each model name -> tensor, contiguous. infos: name -> dtype and shape, the same in all. evolved: the
    names that change. aliases: names that are another one's memory (a tied head: its embedding). owned: whether the
    memory is this run's own, read from files, which it may overwrite. ids: name -> the id that masks are drawn with.
    """

    refs: list[str]
    tensors: list[dict[str, Tensor]]
    infos: dict[str, TensorInfo]
    evolved: list[str]
    aliases: dict[str, str]
    owned: bool
    ids: dict[str, int]

    @property
    def nbytes(self) -> int:
        """The bytes of one model."""
        return sum(info.nbytes for info in self.infos.values())

    @property
    def evolved_elements(self) -> int:
        """The number of elements that evolve."""
        return sum(self.tensors[0][name].numel() for name in self.evolved)

    def element(self, index: int) -> tuple[str, int]:
        """The tensor and flat index of one of the elements that evolve, in the order of names: files have any."""
        for name in sorted(self.evolved):
            numel = self.tensors[0][name].numel()
            if index < numel:
                return name, index
            index -= numel
        raise IndexError(index)


def load(model: Model, what: str) -> tuple[str, dict[str, Tensor]]:
    """A model's name for messages and its tensors: lent where it is in memory, read where it is in files."""
    with ExitStack() as stack:
        source = _source(model, what, stack)
        return source.ref, _tensors(source)


def gather(models: Sequence[Model], exclude: str | Sequence[str] = ()) -> Members:
    """Open, check and read the models that are the first members.

    Raises ArgumentError / CheckpointError where they do not fit together, before any tensor is read.
    """
    if isinstance(models, str | Path | Mapping | torch.nn.Module) or not isinstance(models, Sequence):
        raise ArgumentTypeError("models must be a list of state dicts, modules or checkpoints, one for each member.")
    if not models:
        raise ArgumentError("models is empty; list the models that are the first members.")
    patterns = _patterns(exclude)
    with ExitStack() as stack:
        sources = [_source(model, f"models[{index}]", stack) for index, model in enumerate(models)]
        first = sources[0]
        aliases = _aliases(first)
        for other in sources[1:]:
            _check_alike(first, other)
        infos = dict(first.tensors)
        evolved = [
            name
            for name, info in infos.items()
            if TORCH_DTYPES[info.dtype] in EVOLVED
            and name not in aliases
            and info.nbytes
            and not any(pattern.search(name) for pattern in patterns)
        ]
        _check_evolved(first, evolved, patterns)
        tensors = [_tensors(source) for source in sources]
        owned = all(not isinstance(source, StateDictSource) for source in sources)
        for source, held in zip(sources, tensors, strict=True):
            for name, home in aliases.items():
                if not _same_bits(held[name], held[home]):
                    raise ArgumentError(
                        f"{name!r} and {home!r} are one parameter in {first.ref}, but two different ones in "
                        f"{source.ref}; pass models that all tie them, or none."
                    )
    return Members(
        [source.ref for source in sources], tensors, infos, evolved, aliases, owned, {n: tensor_id(n) for n in evolved}
    )


def digest_of(infos: Mapping[str, TensorInfo], tensors: Mapping[str, Tensor]) -> tuple[str, dict[str, str]]:
    """One digest of a model, as in a manifest, and that of each tensor; of values in the dtype that infos say."""
    each = {name: blake3(raw_bytes(in_dtype(tensors[name], info))).hexdigest() for name, info in infos.items()}
    outputs = [OutputTensor(name, info.dtype, info.shape) for name, info in infos.items()]
    return merge_digest(outputs, each), each


def in_dtype(tensor: Tensor, info: TensorInfo) -> Tensor:
    """A tensor in the members' dtype. A module may hold them in a wider one: nothing is lost on the way back."""
    return tensor.detach().to(TORCH_DTYPES[info.dtype])


def raw_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes."""
    view: memoryview = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
    return view


def _source(model: Model, what: str, stack: ExitStack) -> Checkpoint | StateDictSource:
    if isinstance(model, str | Path):
        return stack.enter_context(open_checkpoint(model))
    return StateDictSource(what, model)


def _tensors(source: Checkpoint | StateDictSource) -> dict[str, Tensor]:
    if isinstance(source, StateDictSource):
        return {name: source.view(info).view(info.shape) for name, info in source.tensors.items()}
    return read_all(source)


def _aliases(source: Source) -> dict[str, str]:
    """Names whose tensor is another one's, each with that one."""
    found = copies_of_embeddings(source)
    if not isinstance(source, StateDictSource):
        return found
    homes: dict[tuple[Any, ...], str] = {}
    # By name, lest the masks follow the order of a dict; a head follows its embedding, as it does in files.
    for name in sorted(set(source.tensors) - set(found)):
        info = source.tensors[name]
        view = source.view(info)
        key = view.device, view.data_ptr(), info.shape, info.dtype
        if info.nbytes and key in homes and source.same(name, homes[key]):
            found[name] = homes[key]
        homes.setdefault(key, name)
    return {name: found.get(home, home) for name, home in found.items()}


def _check_alike(first: Source, other: Source) -> None:
    for one, two in ((first, other), (other, first)):
        missing = [name for name in one.tensors if name not in two.tensors]
        if missing:
            raise CheckpointError(
                f"Tensor {missing[0]!r} of {one.ref} is missing in {two.ref}; members are models of one architecture."
            )
    for name, info in first.tensors.items():
        if other.tensors[name].shape != info.shape:
            raise CheckpointError(
                f"Tensor {name!r} has the shape {list(info.shape)} in {first.ref} and "
                f"{list(other.tensors[name].shape)} in {other.ref}; members are models of one architecture."
            )
        if other.tensors[name].dtype != info.dtype:
            raise CheckpointError(
                f"Tensor {name!r} is {info.dtype} in {first.ref} and {other.tensors[name].dtype} in {other.ref}; "
                "convert the models to one dtype first."
            )


def _check_evolved(first: Source, evolved: Sequence[str], patterns: Sequence[re.Pattern[str]]) -> None:
    for name, info in first.tensors.items():
        if info.dtype == "F64" and not any(pattern.search(name) for pattern in patterns):
            raise CheckpointError(
                f"Tensor {name!r} of {first.ref} is float64, which does not evolve; convert it to float32 first."
            )
    if not evolved:
        raise ArgumentError(f"{first.ref} has no tensor of floating-point numbers that may evolve; exclude fewer.")


def _patterns(exclude: str | Sequence[str]) -> list[re.Pattern[str]]:
    found = []
    for pattern in [exclude] if isinstance(exclude, str) else exclude:
        try:
            found.append(re.compile(pattern))
        except (re.error, TypeError) as error:
            raise ArgumentError(f"exclude holds {pattern!r}, which is not a regular expression ({error}).") from None
    return found


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() or raw_bytes(one) == raw_bytes(other)
