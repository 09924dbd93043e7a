"""A GPU made of the host's memory, as careless as a real one: it does what it is told whenever it likes.

Each lane is a queue. What is in it is done in its order, and after what the lane was told to wait for; but for that, an
adversary chooses when. Besides, every use of memory is checked, whatever the adversary chose: two uses of the same
bytes, of which one writes, must be ordered by lanes, waits and what the thread at hand has synchronised with. So a
missing wait is noticed even where everything happens to come in time.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from fastmerge.engine.buffers import Range
from fastmerge.engine.device import COMPUTE, DOWN, UP, CudaDevice, Lane

Clock = dict[Lane, int]
"""Of each lane, up to which of its operations one comes after."""

POISON = 0xFD


class HazardError(AssertionError):
    """Memory is used by two who do not know of one another."""


@dataclass
class Use:
    """One use of bytes [start, stop); lane None is the host."""

    start: int
    stop: int
    writes: bool
    lane: Lane | None
    number: int


class FakeMemory:
    """Bytes, and who uses them."""

    def __init__(self, device: FakeDevice, nbytes: int, *, pinned: bool) -> None:
        self.device = device
        self.pinned = pinned
        self.whole = torch.full((nbytes,), POISON, dtype=torch.uint8)
        self.uses: list[Use] = []

    def tensor(self, start: int, dtype: torch.dtype, numel: int) -> torch.Tensor:
        nbytes = numel * dtype.itemsize
        if self.pinned:
            self.device.host_uses(self, start, start + nbytes)
        assert start % 256 == 0, "a tensor on its way to a GPU begins at a multiple of 256 bytes"
        return self.whole[start : start + nbytes].view(dtype)

    def view(self, start: int, stop: int) -> memoryview:
        if not self.pinned:
            raise HazardError("the host cannot see a device's memory")
        self.device.host_uses(self, start, stop)
        return memoryview(self.whole[start:stop].numpy())

    def use(self, now: Use, after: Clock) -> None:
        """Check this use against those before."""
        assert 0 <= now.start <= now.stop <= self.whole.numel(), "bytes that are not there"
        if now.start == now.stop:
            return
        for before in self.uses:
            overlaps = before.start < now.stop and now.start < before.stop
            if not overlaps or not (before.writes or now.writes) or before.lane is None:
                continue
            if before.number > after.get(before.lane, 0):
                which, what = "pinned" if self.pinned else "device", "written" if now.writes else "read"
                still = "writing" if before.writes else "reading"
                raise HazardError(
                    f"{which} bytes [{now.start}, {now.stop}) are {what} by {now.lane or 'the host'} "
                    f"while {before.lane} may still be {still} [{before.start}, {before.stop})"
                )
        if not now.writes and not self._is_written(now.start, now.stop):
            raise HazardError(f"bytes [{now.start}, {now.stop}) are read by {now.lane}, and nobody has written them")
        self.uses = [before for before in self.uses if not self._is_settled(before, now)]
        self.uses.append(now)

    @staticmethod
    def _is_settled(before: Use, now: Use) -> bool:
        """Whether whoever comes after `now` comes after `before`, too."""
        inside = now.start <= before.start and before.stop <= now.stop
        return inside and (now.writes or (not before.writes and before.lane == now.lane))

    def _is_written(self, start: int, stop: int) -> bool:
        for use in sorted((use for use in self.uses if use.writes), key=lambda use: use.start):
            if use.start <= start < use.stop:
                start = use.stop
        return start >= stop


@dataclass
class Operation:
    """Something that a lane is told to do. after: what it comes after in all lanes."""

    after: Clock
    work: Callable[[], Any]


class FakeEvent:
    def __init__(self, device: FakeDevice, clock: Clock) -> None:
        self.device = device
        self.clock = clock

    def synchronize(self) -> None:
        self.device.synchronize(self)


class FakeDevice:
    """See above.

    seed, haste: the adversary; with haste 0 nothing is done before somebody must have it, with 1 everything at once.
    limit: bytes of its memory. ignored: (what, number): this wait ("up", "compute", "down" or "sync") is not done.
    """

    name = "fake"
    place = torch.device("cpu")
    stages = True

    def __init__(
        self, seed: int = 0, haste: float = 0.5, limit: int = 1 << 40, ignored: tuple[str, int] | None = None
    ) -> None:
        self.random = random.Random(seed)
        self.haste = haste
        self.limit = limit
        self.ignored = ignored
        self.lock = threading.RLock()
        self.queues: dict[Lane, deque[Operation]] = {UP: deque(), COMPUTE: deque(), DOWN: deque()}
        self.clocks: dict[Lane, Clock] = {UP: {}, COMPUTE: {}, DOWN: {}}
        self.told: Clock = dict.fromkeys(self.queues, 0)
        self.done: Clock = dict.fromkeys(self.queues, 0)
        self.threads: dict[int, Clock] = {}
        self.memories: list[FakeMemory] = []
        self.waits = dict.fromkeys((UP, COMPUTE, DOWN, "sync reader", "sync writer"), 0)
        self.taken = self.pinned_bytes = self.copies = self.runs = 0
        self.closed = False

    # -- what the executor calls

    def free_bytes(self) -> int:
        return self.limit - self.taken

    def memory(self, nbytes: int) -> FakeMemory:
        if self.taken + nbytes > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate too much.")
        self.taken += nbytes
        memory = self._new(nbytes, pinned=False)
        # Somebody may have used it in the compute lane until now. That writes nothing, and may still go on.
        with self.lock:
            self._tell(COMPUTE, lambda: None, [], [Range(memory, 0, nbytes)])
        return memory

    def pinned(self, nbytes: int) -> FakeMemory:
        self.pinned_bytes += nbytes
        return self._new(nbytes, pinned=True)

    def copy(self, lane: Lane, target: Range, source: Range) -> None:
        assert target.nbytes == source.nbytes

        def work() -> None:
            to, of = (one.memory.whole[one.start : one.start + one.nbytes] for one in (target, source))
            to.copy_(of)

        with self.lock:
            self.copies += 1
            self._tell(lane, work, [source], [target])
            self._be_hasty()

    def record(self, lane: Lane) -> FakeEvent:
        with self.lock:
            return FakeEvent(self, dict(self.clocks[lane]))

    def wait(self, lane: Lane, event: FakeEvent) -> None:
        with self.lock:
            if not self._is_ignored(lane):
                _join(self.clocks[lane], event.clock)
            self._be_hasty()

    def run(self, work: Callable[[], Any], reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]) -> None:
        with self.lock:
            self.runs += 1
            self._tell(COMPUTE, work, self._ranges(reads), self._ranges(writes))
            self._be_hasty()

    def fetch(self, work: Callable[[], Any]) -> Any:
        found = []
        with self.lock:
            self._tell(COMPUTE, lambda: found.append(work()), [], [])
            self._do_up_to(self.clocks[COMPUTE])
            _join(self._thread(), self.clocks[COMPUTE])
        return found[0]

    def working(self, lane: Lane) -> AbstractContextManager[Any]:
        return nullcontext()

    def keep(self, tensor: torch.Tensor) -> None:
        pass

    def close(self, *, failed: bool) -> None:
        with self.lock:
            if not failed:
                for lane in self.queues:
                    self._do_up_to({lane: self.told[lane]})
            self.closed = True

    explain = CudaDevice.explain

    # -- what memory and events call

    def host_uses(self, memory: FakeMemory, start: int, stop: int) -> None:
        with self.lock:
            memory.use(Use(start, stop, True, None, 0), self._thread())
            self._be_hasty()

    def synchronize(self, event: FakeEvent) -> None:
        with self.lock:
            if self._is_ignored(f"sync {threading.current_thread().name.removeprefix('fastmerge-')}"):
                return
            self._do_up_to(event.clock)
            _join(self._thread(), event.clock)

    # -- the adversary

    def _new(self, nbytes: int, *, pinned: bool) -> FakeMemory:
        memory = FakeMemory(self, nbytes, pinned=pinned)
        self.memories.append(memory)
        return memory

    def _thread(self) -> Clock:
        return self.threads.setdefault(threading.get_ident(), {})

    def _is_ignored(self, what: str) -> bool:
        number = self.waits[what]
        self.waits[what] += 1
        return self.ignored == (what, number)

    def _ranges(self, tensors: Sequence[torch.Tensor]) -> list[Range]:
        found = []
        for tensor in tensors:
            for memory in self.memories:
                start = tensor.data_ptr() - memory.whole.data_ptr()
                if 0 <= start < memory.whole.numel():
                    found.append(Range(memory, start, tensor.numel() * tensor.element_size()))
        return found

    def _tell(self, lane: Lane, work: Callable[[], Any], reads: list[Range], writes: list[Range]) -> None:
        after = self.clocks[lane]
        _join(after, self._thread())
        before = dict(after)
        self.told[lane] += 1
        for ranges, writing in ((reads, False), (writes, True)):
            for one in ranges:
                use = Use(one.start, one.start + one.nbytes, writing, lane, self.told[lane])
                one.memory.use(use, before | {lane: self.told[lane]})
        after[lane] = self.told[lane]
        self.queues[lane].append(Operation(before, work))

    def _ready(self) -> list[Lane]:
        """The lanes whose first operation may be done now."""
        return [
            lane
            for lane, queue in self.queues.items()
            if queue and all(self.done[other] >= number for other, number in queue[0].after.items())
        ]

    def _do(self, lane: Lane) -> None:
        self.queues[lane].popleft().work()
        self.done[lane] += 1

    def _be_hasty(self) -> None:
        while self.random.random() < self.haste and (ready := self._ready()):
            self._do(self.random.choice(ready))

    def _do_up_to(self, clock: Clock) -> None:
        while any(self.done[lane] < number for lane, number in clock.items()):
            ready = self._ready()
            assert ready, "nothing can go on"
            self._do(self.random.choice(ready))


def _join(clock: Clock, other: Clock) -> None:
    for lane, number in other.items():
        clock[lane] = max(clock.get(lane, 0), number)
