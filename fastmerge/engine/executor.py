"""The executor: reads, merges and writes at the same time, following a plan.

Three threads. The reader fills blocks of budgeted memory with the inputs and counts NaN and Inf in each piece while it
is in the cache; the calling thread gathers statistics and merges; the writer hands merged pieces to the sink. They
share one lock, which guards the arenas and the two queues. Whatever goes wrong in any of them stops all three.

On a GPU the reader sends what it reads up, the calling thread tells the GPU what to compute and to send down, and the
writer waits for that; `staging.py` has the order in which memory is used, which is the GPU's and not the threads'.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch

from fastmerge import ops
from fastmerge.backends.rule import SparsifyRule
from fastmerge.engine.buffers import Arena, Block, Event, aligned
from fastmerge.engine.cutting import AHEAD_BYTES, PIECE_SLACK
from fastmerge.engine.device import COMPUTE, UP, Device, HostDevice, host_backend
from fastmerge.engine.gathering import Gathering
from fastmerge.engine.jobs import Job, Load
from fastmerge.engine.nonfinite import Counts, Nonfinite, OnNonfinite
from fastmerge.engine.plan import Plan
from fastmerge.engine.reader import Reader
from fastmerge.engine.report import copy_bandwidth
from fastmerge.engine.shared import Shared
from fastmerge.engine.sinks import DictSink, Sink
from fastmerge.engine.sources import TORCH_DTYPES
from fastmerge.engine.staging import Staging
from fastmerge.errors import MergeError
from fastmerge.methods.base import Chunk, Statistic

__all__ = ["DictSink", "Outcome", "ProgressLike", "Sink", "execute"]

_MOST_LOADS = 16
_FULL_LOADS = 2


class ProgressLike(Protocol):
    """What the executor tells about its progress."""

    def begin(self, total_bytes: int, passes: int) -> None:
        """So many bytes will be read, over all sweeps; no tensor is swept more often than `passes` times."""

    def advance(self, nbytes: int, current: str) -> None:
        """So many bytes of the tensor `current` have been dealt with."""

    def close(self) -> None:
        """It is over, well or not."""


@dataclass
class Outcome:
    """What happened.

    seconds: busy time by stage. nonfinite: NaN and Inf counts by model and tensor, where there are any. statistics:
    what became known about the whole model.
    """

    seconds: dict[str, float]
    nonfinite: Counts
    bytes_read: int
    copy_bandwidth: float | None = None
    statistics: dict[str, Any] = field(default_factory=dict)


class _StoppedError(Exception):
    """Raised in a thread because another one has failed."""


@dataclass
class _Filled:
    """A load whose inputs are in memory. ready: what a device must have come to before they are there."""

    load: Load
    block: Block | None
    tensors: list[torch.Tensor]
    ready: Event | None = None


@dataclass
class _Merged:
    """A merged piece on its way to the sink. ready: what a device must have come to before it is there."""

    name: str
    start_byte: int
    block: Block
    nbytes: int
    ready: Event | None = None


@dataclass
class _Target:
    """Where a piece is merged to.

    result: `out`, or of another dtype that is yet to be converted. block: what the writer gives back, or on a device,
    from where the piece is yet to be brought down.
    """

    out: torch.Tensor
    result: torch.Tensor
    block: Block | None


def execute(
    plan: Plan,
    sink: Sink,
    *,
    on_nonfinite: OnNonfinite = "error",
    backend: str = "auto",
    progress: ProgressLike | None = None,
    device: Device | None = None,
    shared: Shared | None = None,
) -> Outcome:
    """Carry a plan out.

    on_nonfinite: "error" stops at the first tensor that holds NaN or Inf, "warn" counts them, "zero" merges zeros in
    their place. device: where to compute, None for the host. shared: what several merges of the same models have in
    common. Raises MergeError naming model and tensor, or a device that failed; whatever another thread or the caller's
    Ctrl-C raised goes on to the caller once all threads have ended.
    """
    if shared is None:
        return _Execution(plan, sink, on_nonfinite, backend, progress, device).run()
    plan = shared.with_known(plan)
    outcome = _Execution(plan, sink, on_nonfinite, backend, progress, device, shared).run()
    shared.learn(plan, outcome.statistics)
    return outcome


class _Execution:
    """One run: the shared state and the three threads' bodies."""

    def __init__(
        self,
        plan: Plan,
        sink: Sink,
        on_nonfinite: OnNonfinite,
        backend: str,
        progress: ProgressLike | None,
        device: Device | None = None,
        shared: Shared | None = None,
    ) -> None:
        self.shared = shared
        self.plan = plan
        self.sink = sink
        self.backend = backend
        self.progress = progress
        self.device: Device = HostDevice() if device is None else device
        self.host_backend = host_backend(backend) if self.device.stages else backend
        self.changed = threading.Condition()
        self.failure: BaseException | None = None
        self.in_arena: Arena | None = None
        self.out_arena: Arena | None = None
        self.staging: Staging | None = None
        self.filled: deque[_Filled | None] = deque()
        self.merged: deque[_Merged | None] = deque()
        self.loads_in_flight = 0
        self.bytes_in_flight = 0
        self.nonfinite = Nonfinite(on_nonfinite, backend, self.host_backend, None if shared is None else shared.clean)
        self.seconds = {"reading": 0.0, "computing": 0.0, "writing": 0.0, "waiting": 0.0}
        self.at_hand: Gathering | None = None
        self.model = Gathering(None, plan.model_statistics, dict(plan.known))
        self.sample_parts: list[list[torch.Tensor]] = []
        self.passes_done = 0
        self.pass_begins = True
        self.bytes_read = 0
        self.elements_merged = 0
        # Of each job that may take a fallback: the last sweep whose purpose is known, and whether it merges.
        self.decided: dict[str, tuple[int, bool]] = {}

    def run(self) -> Outcome:
        """Start the two threads, merge in this one, and end them, come what may."""
        threads = [
            threading.Thread(target=self._guarded, args=(body,), name=f"fastmerge-{name}", daemon=True)
            for name, body in (("reader", self._read_all), ("writer", self._write_all))
        ]
        if self.progress is not None:
            self.progress.begin(self.plan.bytes_read, self.plan.passes)
        try:
            with self.device.working(COMPUTE):
                self._allocate()
                for thread in threads:
                    thread.start()
                self._merge_all()
            self._join(threads)
            if self.failure is not None:
                raise self.failure
            self.device.close(failed=False)
        except BaseException as error:
            self._fail(error)
            self._join(threads)
            self.device.close(failed=True)
            cause = self.failure if isinstance(error, _StoppedError) and self.failure is not None else error
            told = self.device.explain(cause)
            if told is not None:
                raise told from cause
            if cause is not error:
                raise cause from None
            raise
        finally:
            if self.progress is not None:
                self.progress.close()
        outcome = Outcome(self.seconds, self.nonfinite.counts, self.bytes_read, statistics=self.model.known)
        if not self.plan.resident:
            touched = self.in_arena.touched() if self.in_arena is not None else None
            outcome.copy_bandwidth = copy_bandwidth(touched)
        return outcome

    def _allocate(self) -> None:
        plan = self.plan
        if plan.in_bytes:
            self.in_arena = Arena(plan.in_bytes)
        if plan.out_bytes:
            pinned = None if plan.gpu is None else self.device.pinned(aligned(plan.out_bytes))
            self.out_arena = Arena(plan.out_bytes, pinned)
        if plan.gpu is not None:
            self.staging = Staging(plan.gpu, self.device)

    # -- the lock, and what waits on it

    def _guarded(self, body: Callable[[], None]) -> None:
        try:
            body()
        except _StoppedError:
            pass
        except BaseException as error:  # raised again in the calling thread
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self.changed:
            if self.failure is None:
                self.failure = error
            self.changed.notify_all()

    @staticmethod
    def _join(threads: list[threading.Thread]) -> None:
        for thread in threads:
            while thread.ident is not None and thread.is_alive():
                # A second Ctrl-C must not leave a thread behind that writes into a directory being removed.
                with suppress(KeyboardInterrupt):
                    thread.join()

    def _wait(self, ready: Callable[[], Any]) -> Any:
        """The first true value of `ready`, called with the lock held; _StoppedError when another thread has failed."""
        with self.changed:
            while True:
                if self.failure is not None:
                    raise _StoppedError
                result = ready()
                if result:
                    return result
                self.changed.wait()

    def _put(self, queue: deque[Any], item: Any) -> None:
        with self.changed:
            queue.append(item)
            self.changed.notify_all()

    def _get(self, queue: deque[Any]) -> Any:
        self._wait(lambda: len(queue) > 0)
        with self.changed:
            return queue.popleft()

    # -- reading

    def _read_all(self) -> None:
        reader = Reader(self.plan, self.nonfinite, self.device, self.staging, self._go_on)
        with self.device.working(UP):
            for load in self.plan.loads(self._another_sweep, self._another_pass):
                block = self._room_for(load)
                began = time.perf_counter()
                tensors, ready = reader.fill(load, block)
                self.seconds["reading"] += time.perf_counter() - began
                self._put(self.filled, _Filled(load, block, tensors, ready))
        if self.staging is not None:
            self.seconds["reading"] -= self.staging.slots.waited
        self.bytes_read = reader.bytes_read
        self._put(self.filled, None)

    def _go_on(self) -> None:
        if self.failure is not None:
            raise _StoppedError

    def _another_sweep(self, job: Job, sweep: int) -> bool:
        """Whether this sweep is needed, once it is known what the one before it is for."""

        def known() -> tuple[bool] | None:
            last, merges = self.decided.get(job.name, (0, False))
            if merges:
                return (sweep <= last,)
            return (True,) if last >= sweep - 1 else None

        answer: tuple[bool] = self._wait(known)
        return answer[0]

    def _another_pass(self, done: int) -> bool:
        """Whether the whole model must be passed over again, once the statistic of the pass before is finished."""
        answer: tuple[bool] = self._wait(
            lambda: (self.model.wanted is not None,) if self.passes_done == done else None,
        )
        return answer[0]

    def _room_for(self, load: Load) -> Block | None:
        """Wait until this load may be read: few enough are in flight, and there is a free place of its size."""
        nbytes = load.nbytes
        arena = self.in_arena
        if self.staging is not None and self.plan.staged(load):
            arena = self.staging.inputs

        def admit() -> tuple[Block | None] | None:
            few = self.loads_in_flight < _FULL_LOADS
            small = self.loads_in_flight < _MOST_LOADS and self.bytes_in_flight + nbytes <= AHEAD_BYTES
            if not few and not small:
                return None
            block = arena.take(nbytes) if arena is not None else None
            if arena is not None and block is None:
                return None
            self.loads_in_flight += 1
            self.bytes_in_flight += nbytes
            return (block,)

        admitted: tuple[Block | None] = self._wait(admit)
        return admitted[0]

    # -- merging

    def _merge_all(self) -> None:
        while True:
            began = time.perf_counter()
            filled = self._get(self.filled)
            waited = time.perf_counter()
            self.seconds["waiting"] += waited - began
            if filled is None:
                break
            waiting_before = self.seconds["waiting"]
            if filled.ready is not None:
                self.device.wait(COMPUTE, filled.ready)
            self._merge_load(filled)
            waited_inside = self.seconds["waiting"] - waiting_before
            self.seconds["computing"] += time.perf_counter() - waited - waited_inside
            load = filled.load
            with self.changed:
                if filled.block is not None:
                    self._give_back(load, filled.block)
                self.loads_in_flight -= 1
                self.bytes_in_flight -= load.nbytes
                self.changed.notify_all()
            if self.progress is not None and not load.sample:
                stored = sum(TORCH_DTYPES[one.info.dtype].itemsize for one in load.job.inputs)
                self.progress.advance(load.numel * stored, load.job.name)
        missing = sum(job.numel for job in self.plan.jobs) - self.elements_merged
        if missing:
            raise MergeError(f"{missing} elements were not merged; this is a mistake in fastmerge, please report it.")
        self._put(self.merged, None)

    def _give_back(self, load: Load, block: Block) -> None:
        if self.staging is not None and self.plan.staged(load):
            self.staging.used(block)
        else:
            block.arena.give(block)

    def _merge_load(self, filled: _Filled) -> None:
        job = filled.load.job
        if job.context is None:
            self._copy(filled)
            return
        has_base = job.match.base is not None
        chunk = Chunk(
            offset=filled.load.start,
            base=filled.tensors[0] if has_base else None,
            models=filled.tensors[1:] if has_base else filled.tensors,
        )
        if filled.load.model:
            self._observe_model(filled.load, chunk)
            return
        if self.at_hand is None or self.at_hand.job is not job:
            needed = self.plan.method.statistics(job.context, whole=job.whole)
            self.at_hand = Gathering(job, needed, dict(self.model.known))
        at_hand = self.at_hand
        if filled.load.sample:
            at_hand.sample = chunk.clone()
            return
        if job.whole:
            self.device.run(partial(at_hand.observe_whole, chunk, self.shared), chunk.tensors, ())
        elif (wanted := at_hand.wanted) is not None:
            self._observe(at_hand, wanted, filled.load, chunk)
            return
        for start in range(0, chunk.numel, job.piece):
            part = chunk.part(start, min(start + job.piece, chunk.numel))
            self._merge_piece(at_hand, part)

    def _observe(self, at_hand: Gathering, statistic: Statistic, load: Load, chunk: Chunk) -> None:
        """Let the sweep's statistic see one chunk of a tensor that is cut."""
        self.device.run(partial(at_hand.observe, statistic, chunk, load.start == 0), chunk.tensors, ())
        if load.stop == load.job.numel:
            self.device.fetch(partial(at_hand.finish, statistic))
            with self.changed:
                self.decided[load.job.name] = (load.sweep + 1, at_hand.wanted is None)
                self.changed.notify_all()

    def _observe_model(self, load: Load, chunk: Chunk) -> None:
        """Let the pass's statistic see one chunk of the model, or put a part of the sample by."""
        if load.sample:
            self.sample_parts.append([tensor.float() for tensor in chunk.tensors])
            return
        if self.sample_parts:
            inputs = [torch.cat(parts) for parts in zip(*self.sample_parts, strict=True)]
            base = None if chunk.base is None else inputs.pop(0)
            self.model.sample = Chunk(0, base, inputs)
            self.sample_parts = []
        statistic = self.model.wanted
        assert statistic is not None
        self.device.run(partial(self.model.observe, statistic, chunk, self.pass_begins), chunk.tensors, ())
        self.pass_begins = load.last
        if load.last:
            self.device.fetch(partial(self.model.finish, statistic))
            with self.changed:
                self.passes_done += 1
                if self.model.wanted is None:
                    self.model.sample = None
                self.changed.notify_all()

    def _merge_piece(self, at_hand: Gathering, part: Chunk) -> None:
        job = at_hand.job
        assert job is not None
        target = self._target(job, part.offset, part.numel)
        work = partial(self._merge_chunk, at_hand, part, target)
        self.device.run(work, part.tensors, (target.out, target.result))
        self._deliver(job, part.offset, part.numel, target)

    def _merge_chunk(self, at_hand: Gathering, part: Chunk, target: _Target) -> None:
        """What is computed of a piece; on a device, whenever it comes to that."""
        job = at_hand.job
        assert job is not None and job.context is not None
        self.plan.method.merge(job.context, part, at_hand.known, target.result)
        if target.result is not target.out:
            _convert(target.result, target.out, self.backend)

    def _copy(self, filled: _Filled) -> None:
        """Tensors that are not merged: the first input, which must equal the others if there are any."""
        load, job = filled.load, filled.load.job
        first = filled.tensors[0]
        for one, other in zip(job.inputs[1:], filled.tensors[1:], strict=True):
            if job.match.action == "same" and not _same_bytes(first, other):
                raise MergeError(
                    f"Tensor {job.name!r} ({one.info.dtype}) is not the same in {job.inputs[0].source.ref} and in "
                    f"{one.source.ref}; only floating-point weights can be merged, so make it the same in all models."
                )
        for start in range(0, load.numel, job.piece):
            part = first[start : start + job.piece]
            target = self._host_target(job, load.start + start, part.numel())
            if job.merged == job.out:
                target.out.copy_(part)
            else:
                there = target.out if part.device == target.out.device else torch.empty_like(part, dtype=job.out)
                _convert(part, there, self.host_backend if part.device.type == "cpu" else self.backend)
                if there is not target.out:
                    target.out.copy_(there)
            self._deliver_here(job, load.start + start, part.numel(), target.block)

    # -- where merged pieces go

    def _target(self, job: Job, offset: int, numel: int) -> _Target:
        """Where to merge to: the sink's own memory, or a block that the writer gives back or that is brought down."""
        out = self.sink.target(job.name, offset, offset + numel)
        differs = job.merged != job.out
        if out is not None:
            result = torch.empty(numel, dtype=job.merged, device=out.device) if differs else out
            return _Target(out, result, None)
        behind = -(-numel * job.out.itemsize // PIECE_SLACK) * PIECE_SLACK
        nbytes = behind + numel * job.merged.itemsize if differs else numel * job.out.itemsize
        block = self._out_block(nbytes) if self.staging is None else self.staging.merged_into(nbytes)
        out = block.tensor(0, job.out, numel)
        return _Target(out, block.tensor(behind, job.merged, numel) if differs else out, block)

    def _host_target(self, job: Job, offset: int, numel: int) -> _Target:
        """The same of what is only copied: it does not go by way of a device."""
        out = self.sink.target(job.name, offset, offset + numel)
        block = None
        if out is None:
            block = self._out_block(numel * job.out.itemsize)
            out = block.tensor(0, job.out, numel)
        return _Target(out, out, block)

    def _out_block(self, nbytes: int) -> Block:
        """Wait for room for what the writer shall write."""
        arena = self.out_arena
        assert arena is not None
        began = time.perf_counter()
        block: Block = self._wait(lambda: arena.take(nbytes))
        self.seconds["waiting"] += time.perf_counter() - began
        return block

    def _deliver(self, job: Job, offset: int, numel: int, target: _Target) -> None:
        """Hand a merged piece to the writer, by way of pinned memory if it is on a device."""
        if self.staging is None or target.block is None:
            self._deliver_here(job, offset, numel, target.block)
            return
        nbytes = numel * job.out.itemsize
        block = self._out_block(nbytes)
        ready = self.staging.bring_down(target.block, block, nbytes)
        self._deliver_here(job, offset, numel, block, ready)

    def _deliver_here(self, job: Job, offset: int, numel: int, block: Block | None, ready: Event | None = None) -> None:
        self.elements_merged += numel
        if block is not None:
            merged = _Merged(job.name, offset * job.out.itemsize, block, numel * job.out.itemsize, ready)
            self._put(self.merged, merged)

    # -- writing

    def _write_all(self) -> None:
        while True:
            piece = self._get(self.merged)
            if piece is None:
                return
            if piece.ready is not None:
                piece.ready.synchronize()
            began = time.perf_counter()
            self.sink.write(piece.name, piece.start_byte, piece.block.memory(0, piece.nbytes))
            self.seconds["writing"] += time.perf_counter() - began
            with self.changed:
                piece.block.arena.give(piece.block)
                self.changed.notify_all()


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.view(torch.uint8), other.to(one.device).view(torch.uint8))


def _convert(source: torch.Tensor, target: torch.Tensor, backend: str) -> None:
    """Round to another dtype as every output is rounded: to nearest even, NaNs to the one without a payload."""
    if torch.float64 in (source.dtype, target.dtype):
        target.copy_(source)
        return
    ops.consensus_apply(
        None,
        [source],
        [1.0],
        inputs="models",
        rule=SparsifyRule(method="none"),
        scales=[1.0],
        election="none",
        zero_sign="positive",
        divisor="none",
        divisor_value=1.0,
        lambda_=1.0,
        compute=torch.float32,
        out=target,
        backend=backend,
    )
