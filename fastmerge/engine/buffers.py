"""Budgeted memory: one reserved range from which blocks are lent, the lowest free place first.

Fresh pages are slow: the kernel zeroes each at its first touch. Lending the lowest free place first keeps using pages
that have been touched already, so that a merge touches what it needs at once and never more than was reserved.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastmerge.engine import fresh

ALIGNMENT = 4096


def aligned(nbytes: int) -> int:
    """`nbytes`, rounded up to whole pages; at least one."""
    return max(1, -(-nbytes // ALIGNMENT)) * ALIGNMENT


class Arena:
    """A range of memory and the list of its free places. Not locked: its user serialises `take` and `give`."""

    def __init__(self, nbytes: int) -> None:
        """nbytes: rounded up to whole pages; reserved now, touched when used."""
        self.nbytes = aligned(nbytes)
        self._map = fresh.take(self.nbytes)
        self._bytes = memoryview(self._map)
        self._free: list[tuple[int, int]] = [(0, self.nbytes)]
        self._touched = 0

    def take(self, nbytes: int) -> Block | None:
        """A block of at least `nbytes`, or None when no free place is that large now."""
        nbytes = aligned(nbytes)
        for index, (start, stop) in enumerate(self._free):
            if stop - start >= nbytes:
                self._free[index : index + 1] = [(start + nbytes, stop)] if stop - start > nbytes else []
                self._touched = max(self._touched, start + nbytes)
                return Block(self, start, nbytes)
        return None

    def touched(self) -> memoryview:
        """The part of the range that has been lent so far."""
        return self._bytes[: self._touched]

    def give(self, block: Block) -> None:
        """Take a block back. Tensors and views of it must not be used any more."""
        places = sorted([*self._free, (block.start, block.start + block.nbytes)])
        self._free = places[:1]
        for start, stop in places[1:]:
            if start == self._free[-1][1]:
                self._free[-1] = (self._free[-1][0], stop)
            else:
                self._free.append((start, stop))


@dataclass(frozen=True)
class Block:
    """Bytes [start, start + nbytes) of an arena."""

    arena: Arena
    start: int
    nbytes: int

    def tensor(self, offset: int, dtype: torch.dtype, numel: int) -> torch.Tensor:
        """A flat tensor of `numel` elements (at least one) that begins `offset` bytes into the block."""
        return torch.frombuffer(self.arena._map, dtype=dtype, count=numel, offset=self.start + offset)

    def memory(self, offset: int, nbytes: int) -> memoryview:
        """`nbytes` writable bytes that begin `offset` bytes into the block."""
        return self.arena._bytes[self.start + offset : self.start + offset + nbytes]
