"""Reading: the inputs of one load, from files or from memory, to where they are merged, NaN and Inf dealt with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from fastmerge.engine.buffers import Block, Event, aligned
from fastmerge.engine.device import UP, Device
from fastmerge.engine.jobs import READ_BYTES, Job, Load
from fastmerge.engine.matching import Input
from fastmerge.engine.nonfinite import Nonfinite
from fastmerge.engine.plan import Plan
from fastmerge.engine.sources import TORCH_DTYPES, StateDictSource
from fastmerge.engine.staging import Landing, Staging


class Reader:
    """Fills loads, one after the other, in one thread."""

    def __init__(
        self, plan: Plan, nonfinite: Nonfinite, device: Device, staging: Staging | None, go_on: Callable[[], None]
    ) -> None:
        """go_on: called between reads; raises where there is no use in reading more."""
        self.bytes_read = 0
        self._plan = plan
        self._nonfinite = nonfinite
        self._device = device
        self._staging = staging
        self._go_on = go_on
        self._scratch = bytearray(0)
        self._job: Job | None = None
        self._views: dict[int, torch.Tensor] = {}

    def fill(self, load: Load, block: Block | None) -> tuple[list[torch.Tensor], Event | None]:
        """The inputs as tensors, and what a device must have come to before they are there."""
        staging = self._staging if self._plan.staged(load) else None
        if staging is not None and block is not None:
            staging.begin(block)
        if load.job is not self._job:
            self._job = load.job
            self._views.clear()
        tensors = []
        offset = 0
        for number, (one, dtype) in enumerate(zip(load.job.inputs, load.job.held, strict=True)):
            if _is_lent(one, staging):
                tensors.append(self._lend(load, number, one, dtype))
                continue
            assert block is not None
            make = Landing if staging is None else staging.landing
            landing = make(block, offset, dtype, load.numel)
            self._read(load, number, one, dtype, landing)
            tensors.append(landing.tensor)
            offset += aligned(load.numel * dtype.itemsize)
        self._nonfinite.done_with(load)
        return tensors, self._device.record(UP) if staging is not None or _any_elsewhere(tensors) else None

    def _view(self, number: int, one: Input) -> torch.Tensor:
        """An input that is in memory, flat. Strided ones are copied for that, once for all loads of a sweep."""
        assert isinstance(one.source, StateDictSource)
        if number not in self._views:
            self._views[number] = one.source.view(one.info)
        return self._views[number]

    def _lend(self, load: Load, number: int, one: Input, dtype: torch.dtype) -> torch.Tensor:
        """A view of a tensor that is in memory; a copy where its dtype or its NaNs must change."""
        whole = self._view(number, one)
        runs = [whole[first : first + count] for first, count in load.spans]
        lent = torch.cat(runs).cpu() if load.sample else runs[0]
        tensor = lent.to(dtype)
        if self._nonfinite.found_in(load, one, tensor) and self._nonfinite.zeroes:
            tensor = tensor.clone() if tensor.data_ptr() == lent.data_ptr() else tensor
            self._nonfinite.zero(tensor)
        if not load.sample:
            self._nonfinite.refuse_if_found(load, one, dtype)
        self._device.keep(tensor)
        return tensor

    def _read(self, load: Load, number: int, one: Input, dtype: torch.dtype, landing: Landing) -> None:
        stored = TORCH_DTYPES[one.info.dtype]
        step = landing.step(max(READ_BYTES // stored.itemsize, 1))
        start = 0
        for first, count in _pieces(load.spans, step):
            self._go_on()
            piece, memory = landing.piece(start, count)
            if isinstance(one.source, StateDictSource):
                piece.copy_(self._view(number, one)[first : first + count])
            elif stored == dtype:
                one.source.read_into(one.info, first * stored.itemsize, memory)
            else:
                nbytes = count * stored.itemsize
                if len(self._scratch) < nbytes:
                    self._scratch = bytearray(step * stored.itemsize)
                one.source.read_into(one.info, first * stored.itemsize, memoryview(self._scratch)[:nbytes])
                piece.copy_(torch.frombuffer(self._scratch, dtype=stored, count=count))
            self.bytes_read += count * stored.itemsize
            if self._nonfinite.found_in(load, one, piece) and self._nonfinite.zeroes:
                self._nonfinite.zero(piece)
            landing.put()
            start += count
        self._nonfinite.refuse_if_found(load, one, dtype)


def _is_lent(one: Input, staging: Staging | None) -> bool:
    """Whether the input is merged where it is: in memory here, or on the device already."""
    if not isinstance(one.source, StateDictSource):
        return False
    return staging is None or one.source.device_of(one.info).type != "cpu"


def _any_elsewhere(tensors: Sequence[torch.Tensor]) -> bool:
    return any(tensor.device.type != "cpu" for tensor in tensors)


def _pieces(spans: list[tuple[int, int]], step: int) -> Iterator[tuple[int, int]]:
    """The runs, cut where they are longer than `step`."""
    for first, count in spans:
        for start in range(0, count, step):
            yield first + start, min(step, count - start)
