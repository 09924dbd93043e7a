"""The way of inputs to a device and of merged pieces back, in rings of pinned memory and of the device's.

    files --read--> slots --up--> inputs (device) --compute--> outputs (device) --down--> pinned --write--> files

A piece is read into a pinned slot and copied up from there; the slot is used again once its copy is done. A load has a
block of the device's memory, where the pieces of all its inputs come together; merged pieces have blocks there, too.
These are lent again as soon as everything that uses them has been told to the device, with an event to wait for: the
host never waits for a kernel.
"""

from __future__ import annotations

import time

import torch

from fastmerge.engine.buffers import Arena, Block, Event, Ring
from fastmerge.engine.device import COMPUTE, DOWN, UP, Device
from fastmerge.engine.jobs import GpuShare


class Landing:
    """Where one input of a load is put, piece by piece: at once where it is merged, in memory of the host."""

    def __init__(self, block: Block, offset: int, dtype: torch.dtype, numel: int) -> None:
        self.tensor = block.tensor(offset, dtype, numel)
        self._memory = block.memory(offset, numel * dtype.itemsize)
        self._itemsize = dtype.itemsize

    def step(self, wanted: int) -> int:
        """How many elements may be put at once, if so many are wanted."""
        return wanted

    def piece(self, start: int, count: int) -> tuple[torch.Tensor, memoryview]:
        """Where to put elements [start, start + count), as a tensor and as bytes."""
        bytes_here = self._memory[start * self._itemsize : (start + count) * self._itemsize]
        return self.tensor[start : start + count], bytes_here

    def put(self) -> None:
        """The piece is complete."""


class StagedLanding(Landing):
    """As Landing, by way of pinned slots to a device."""

    def __init__(self, slots: Slots, block: Block, offset: int, dtype: torch.dtype, numel: int) -> None:
        self.tensor = block.tensor(offset, dtype, numel)
        self._slots = slots
        self._block = block
        self._offset = offset
        self._dtype = dtype
        self._itemsize = dtype.itemsize
        self._place = (0, 0)

    def step(self, wanted: int) -> int:
        """No more than a slot holds."""
        return max(1, min(wanted, self._slots.nbytes // self._itemsize))

    def piece(self, start: int, count: int) -> tuple[torch.Tensor, memoryview]:
        """A slot that is free; waits for one."""
        self._place = (start, count)
        return self._slots.next(self._dtype, count)

    def put(self) -> None:
        """Send the slot up."""
        start, count = self._place
        self._slots.send(self._block, self._offset + start * self._itemsize, count * self._itemsize)


class Slots:
    """Pinned slots of one size that are used in turn. Used by one thread."""

    def __init__(self, device: Device, total: int, nbytes: int) -> None:
        """total: bytes of all slots. nbytes: of each."""
        self.nbytes = nbytes
        self.waited = 0.0
        self._device = device
        arena = Arena(total, device.pinned(total))
        self._slots: list[Block] = []
        while (slot := arena.take(nbytes)) is not None:
            self._slots.append(slot)
        self._sent: list[Event | None] = [None] * len(self._slots)
        self._turn = 0

    def next(self, dtype: torch.dtype, count: int) -> tuple[torch.Tensor, memoryview]:
        """The next slot, as a tensor and as bytes, once what it held before has been copied."""
        sent = self._sent[self._turn]
        if sent is not None:
            began = time.perf_counter()
            sent.synchronize()
            self.waited += time.perf_counter() - began
        slot = self._slots[self._turn]
        return slot.tensor(0, dtype, count), slot.memory(0, count * dtype.itemsize)

    def send(self, block: Block, offset: int, nbytes: int) -> None:
        """Copy what the slot holds to its place on the device."""
        self._device.copy(UP, block.range(offset, nbytes), self._slots[self._turn].range(0, nbytes))
        self._sent[self._turn] = self._device.record(UP)
        self._turn = (self._turn + 1) % len(self._slots)


class Staging:
    """The rings of one merge, and the order in which lanes use them."""

    def __init__(self, share: GpuShare, device: Device) -> None:
        self.device = device
        self.inputs = Ring(share.in_bytes, device.memory(share.in_bytes))
        self.outputs = Ring(share.out_bytes, device.memory(share.out_bytes)) if share.out_bytes else None
        self.slots = Slots(device, share.staging_bytes, share.slot_bytes)
        # The memory is the compute lane's, which may have something to do with it from before.
        device.wait(UP, device.record(COMPUTE))

    # -- in the reader's thread

    def begin(self, block: Block) -> None:
        """A load is about to be put into this block."""
        if block.after is not None:
            self.device.wait(UP, block.after)

    def landing(self, block: Block, offset: int, dtype: torch.dtype, numel: int) -> Landing:
        """Where an input of the load is put."""
        return StagedLanding(self.slots, block, offset, dtype, numel)

    # -- in the thread that merges

    def merged_into(self, nbytes: int) -> Block:
        """A block of the device's memory to merge into."""
        assert self.outputs is not None
        block = self.outputs.take(nbytes)
        assert block is not None, "one merged piece is on the device at a time, as far as the host is concerned"
        if block.after is not None:
            self.device.wait(COMPUTE, block.after)
        return block

    def bring_down(self, block: Block, target: Block, nbytes: int) -> Event:
        """Copy what was merged into pinned memory, and lend the block again after that; says when it is there."""
        assert self.outputs is not None
        self.device.wait(DOWN, self.device.record(COMPUTE))
        self.device.copy(DOWN, target.range(0, nbytes), block.range(0, nbytes))
        done = self.device.record(DOWN)
        self.outputs.give_after(block, done)
        return done

    def used(self, block: Block) -> None:
        """All that reads the load in this block has been told to the device. The caller holds the executor's lock."""
        self.inputs.give_after(block, self.device.record(COMPUTE))
