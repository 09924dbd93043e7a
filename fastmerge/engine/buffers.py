"""Budgeted memory: one reserved range from which blocks are lent.

Fresh pages are slow: the kernel zeroes each at its first touch. Lending the lowest free place first keeps using pages
that have been touched already, so that a merge touches what it needs at once and never more than was reserved. A device
works through what it is given while the host is ahead: there, the place that was given back longest ago comes first,
and with it what must be done before it is used again.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from fastmerge.engine import fresh

ALIGNMENT = 4096
"""Blocks, and the inputs in them, begin at multiples of so many bytes: pages here, and what GPUs load at once there."""


def aligned(nbytes: int) -> int:
    """`nbytes`, rounded up to whole pages; at least one."""
    return max(1, -(-nbytes // ALIGNMENT)) * ALIGNMENT


class Memory(Protocol):
    """A range of bytes: the host's, pinned, or a device's."""

    def tensor(self, start: int, dtype: torch.dtype, numel: int) -> torch.Tensor:
        """A flat tensor of `numel` elements (at least one) that begins at byte `start`."""

    def view(self, start: int, stop: int) -> memoryview:
        """Bytes [start, stop), writable; of the host's and of pinned memory only."""


class Range(NamedTuple):
    """Bytes [start, start + nbytes) of a memory."""

    memory: Memory
    start: int
    nbytes: int


class Event(Protocol):
    """A point in what a device has been told to do."""

    def synchronize(self) -> None:
        """Let this thread sleep until the device has got there."""


class MappedMemory:
    """The host's memory, touched nowhere yet."""

    def __init__(self, nbytes: int) -> None:
        self._map: mmap.mmap = fresh.take(nbytes)
        self._bytes = memoryview(self._map)

    def tensor(self, start: int, dtype: torch.dtype, numel: int) -> torch.Tensor:
        """See Memory."""
        return torch.frombuffer(self._map, dtype=dtype, count=numel, offset=start)

    def view(self, start: int, stop: int) -> memoryview:
        """See Memory."""
        return self._bytes[start:stop]


class TensorMemory:
    """Memory that torch allocated: pinned, or a device's."""

    def __init__(self, whole: torch.Tensor) -> None:
        """whole: uint8, flat."""
        self.whole = whole

    def tensor(self, start: int, dtype: torch.dtype, numel: int) -> torch.Tensor:
        """See Memory."""
        return self.whole[start : start + numel * dtype.itemsize].view(dtype)

    def view(self, start: int, stop: int) -> memoryview:
        """See Memory."""
        view: memoryview = self.whole[start:stop].numpy().data
        return view


class Arena:
    """A range of memory and the list of its free places. Not locked: its user serialises `take` and `give`."""

    def __init__(self, nbytes: int, memory: Memory | None = None) -> None:
        """nbytes: rounded up to whole pages. memory: so many bytes of it; None for the host's, touched when used."""
        self.nbytes = aligned(nbytes)
        self.memory: Memory = MappedMemory(self.nbytes) if memory is None else memory
        self._free: list[tuple[int, int]] = [(0, self.nbytes)]
        self._touched = 0

    def take(self, nbytes: int) -> Block | None:
        """A block of at least `nbytes`, or None when no free place is that large now."""
        nbytes = aligned(nbytes)
        for index, (start, stop) in enumerate(self._free):
            if stop - start >= nbytes:
                self._lend(index, start, start + nbytes)
                return Block(self, start, nbytes)
        return None

    def _lend(self, index: int, start: int, stop: int) -> None:
        """Take bytes [start, stop) out of a free place."""
        first, last = self._free[index]
        self._free[index : index + 1] = [(a, b) for a, b in ((first, start), (stop, last)) if a < b]
        self._touched = max(self._touched, stop)

    def touched(self) -> memoryview:
        """The part of the range that has been lent so far."""
        return self.memory.view(0, self._touched)

    def give(self, block: Block) -> None:
        """Take a block back. Tensors and views of it must not be used any more."""
        places = sorted([*self._free, (block.start, block.start + block.nbytes)])
        self._free = places[:1]
        for start, stop in places[1:]:
            if start == self._free[-1][1]:
                self._free[-1] = (self._free[-1][0], stop)
            else:
                self._free.append((start, stop))


class Ring(Arena):
    """An arena of a device's memory, whose blocks come back before the device is done with them.

    Each is given back with an event, and lent again with the event that its next user must wait for on the device.
    Events must be given in the order in which the device comes to them, and whoever takes blocks must wait in one lane:
    having waited for an event there, it has waited for those before.
    """

    def __init__(self, nbytes: int, memory: Memory) -> None:
        super().__init__(nbytes, memory)
        self._next = 0
        self._busy: list[tuple[int, int, Event]] = []

    def take(self, nbytes: int) -> Block | None:
        """As of an arena, but going round: the first place after the one that was taken last."""
        nbytes = aligned(nbytes)
        for least in (self._next, 0):
            for index, (first, last) in enumerate(self._free):
                start = max(first, least)
                if last - start >= nbytes:
                    self._lend(index, start, start + nbytes)
                    self._next = start + nbytes
                    return Block(self, start, nbytes, self._claim(start, start + nbytes))
        return None

    def _claim(self, start: int, stop: int) -> Event | None:
        """The latest event in this range, if it must still be waited for."""
        for number in range(len(self._busy) - 1, -1, -1):
            first, last, event = self._busy[number]
            if first < stop and start < last:
                del self._busy[: number + 1]
                return event
        return None

    def give_after(self, block: Block, done: Event) -> None:
        """Take a block back that the device is done with once it has come to `done`."""
        self._busy.append((block.start, block.start + block.nbytes, done))
        self.give(block)


@dataclass(frozen=True)
class Block:
    """Bytes [start, start + nbytes) of an arena. after: what a device must have come to before they are written."""

    arena: Arena
    start: int
    nbytes: int
    after: Event | None = None

    def tensor(self, offset: int, dtype: torch.dtype, numel: int) -> torch.Tensor:
        """A flat tensor of `numel` elements (at least one) that begins `offset` bytes into the block."""
        return self.arena.memory.tensor(self.start + offset, dtype, numel)

    def memory(self, offset: int, nbytes: int) -> memoryview:
        """`nbytes` writable bytes that begin `offset` bytes into the block."""
        return self.arena.memory.view(self.start + offset, self.start + offset + nbytes)

    def range(self, offset: int, nbytes: int) -> Range:
        """`nbytes` bytes that begin `offset` bytes into the block, for a copy."""
        return Range(self.arena.memory, self.start + offset, nbytes)
