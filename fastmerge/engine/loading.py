"""Whole models from files into memory, for whoever merges them more than once."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from fastmerge.engine import fresh
from fastmerge.engine.buffers import aligned
from fastmerge.engine.checkpoint import Checkpoint
from fastmerge.engine.safetensors_header import TensorInfo
from fastmerge.engine.sources import TORCH_DTYPES, StateDictSource

_PART = 16 << 20
"""Bytes of one read. Several are under way, since much of each is the system making memory ready."""
_READERS = 4


def read_all(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, in the order of its files, in memory of large pages that belongs to them alone.

    Raises MergeError: a file cannot give what its header promises.
    """
    found: dict[str, torch.Tensor] = {}
    memory = fresh.reserve(max(sum(aligned(info.nbytes) for info in checkpoint.tensors.values()), 1))
    view = memoryview(memory)
    places: list[tuple[TensorInfo, int]] = []
    offset = 0
    for name, info in checkpoint.tensors.items():
        dtype = TORCH_DTYPES[info.dtype]
        if info.nbytes:
            flat = torch.frombuffer(memory, dtype=dtype, count=info.nbytes // dtype.itemsize, offset=offset)
        else:
            flat = torch.empty(0, dtype=dtype)
        found[name] = flat.view(info.shape)
        places.append((info, offset))
        offset += aligned(info.nbytes)

    def parts() -> Iterator[tuple[TensorInfo, int, memoryview]]:
        for info, where in places:
            for start in range(0, info.nbytes, _PART):
                yield info, start, view[where + start : where + min(start + _PART, info.nbytes)]

    with ThreadPoolExecutor(_READERS, thread_name_prefix="fastmerge-loading") as readers:
        reads = [readers.submit(checkpoint.read_into, *part) for part in parts()]
        try:
            for read in reads:
                read.result()
        except BaseException:
            for read in reads:
                read.cancel()
            raise
    return found


class LoadedSource(StateDictSource):
    """A checkpoint that was read into memory: merged from there, it has the bits that it has when read from files."""

    def __init__(self, checkpoint: Checkpoint, place: torch.device = torch.device("cpu")) -> None:
        """place: where its tensors are to be."""
        super().__init__(checkpoint.ref, {name: x.to(place) for name, x in read_all(checkpoint).items()})
        self.config = None if checkpoint.config is None else dict(checkpoint.config)
        self._tied = checkpoint.tied

    @property
    def tied(self) -> bool | None:
        """As the checkpoint says."""
        return self._tied

    def same(self, one: str, other: str) -> bool:
        """Never known of two tensors in files."""
        return False
