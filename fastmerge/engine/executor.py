"""The executor: reads, merges and writes at the same time, following a plan.

Three threads. The reader fills blocks of budgeted memory with the inputs and counts NaN and Inf in each piece while it
is in the cache; the calling thread gathers statistics and merges; the writer hands merged pieces to the sink. They
share one lock, which guards the two arenas and the two queues. Whatever goes wrong in any of them stops all three.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

from fastmerge import ops
from fastmerge.backends.rule import SparsifyRule
from fastmerge.engine.buffers import Arena, Block, aligned
from fastmerge.engine.matching import Input
from fastmerge.engine.plan import AHEAD_BYTES, PIECE_SLACK, READ_BYTES, Job, Load, Plan
from fastmerge.engine.report import copy_bandwidth
from fastmerge.engine.sources import TORCH_DTYPES, StateDictSource
from fastmerge.errors import MergeError
from fastmerge.methods.base import Chunk, Statistic

OnNonfinite = Literal["error", "warn", "zero"]
Counts = dict[str, dict[str, tuple[int, int]]]

_MOST_LOADS = 16
_FULL_LOADS = 2


class Sink(Protocol):
    """Where merged tensors go."""

    def target(self, name: str, start: int, stop: int) -> torch.Tensor | None:
        """Memory of its own for elements [start, stop) to be merged into, or None if `write` shall bring them."""

    def write(self, name: str, start_byte: int, data: memoryview) -> None:
        """Take bytes of a tensor; those of one tensor come in rising order. Called from one thread."""


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
    """A load whose inputs are in memory."""

    load: Load
    block: Block | None
    tensors: list[torch.Tensor]


@dataclass
class _Merged:
    """A merged piece on its way to the sink."""

    name: str
    start_byte: int
    block: Block
    nbytes: int


@dataclass
class _Progressing:
    """What is known about the tensor at hand, or about the whole model (job None)."""

    job: Job | None
    statistics: list[Statistic]
    known: dict[str, Any] = field(default_factory=dict)
    state: Any = None
    finished: int = 0
    sample: Chunk | None = None

    @property
    def wanted(self) -> Statistic | None:
        """The statistic that this sweep gathers; None when it merges."""
        while self.finished < len(self.statistics):
            statistic = self.statistics[self.finished]
            if statistic.name not in self.known and statistic.needed(self.known):
                return statistic
            self.finished += 1
        return None

    def observe(self, statistic: Statistic, chunk: Chunk, first: bool) -> None:
        """Let it see one chunk; before the first one, the sample."""
        if first:
            if statistic.samples and self.sample is not None:
                statistic.prepare(self.sample, self.known)
            self.state = statistic.observe(chunk, self.known)
        else:
            self.state = statistic.extend(self.state, chunk, self.known)

    def finish(self, statistic: Statistic, state: Any) -> None:
        """Its state is complete."""
        result = statistic.finish(state, self.known)
        if result is not None:
            self.known[statistic.name] = result
        self.state = None
        self.finished += 1


def execute(
    plan: Plan,
    sink: Sink,
    *,
    on_nonfinite: OnNonfinite = "error",
    backend: str = "auto",
    progress: ProgressLike | None = None,
) -> Outcome:
    """Carry a plan out.

    on_nonfinite: "error" stops at the first tensor that holds NaN or Inf, "warn" counts them, "zero" merges zeros in
    their place. Raises MergeError naming model and tensor; whatever another thread or the caller's Ctrl-C raised goes
    on to the caller once all threads have ended.
    """
    return _Execution(plan, sink, on_nonfinite, backend, progress).run()


class _Execution:
    """One run: the shared state and the three threads' bodies."""

    def __init__(
        self, plan: Plan, sink: Sink, on_nonfinite: OnNonfinite, backend: str, progress: ProgressLike | None
    ) -> None:
        self.plan = plan
        self.sink = sink
        self.on_nonfinite = on_nonfinite
        self.backend = backend
        self.progress = progress
        self.changed = threading.Condition()
        self.failure: BaseException | None = None
        self.in_arena = Arena(plan.in_bytes) if plan.in_bytes else None
        self.out_arena = Arena(plan.out_bytes) if plan.out_bytes else None
        self.filled: deque[_Filled | None] = deque()
        self.merged: deque[_Merged | None] = deque()
        self.loads_in_flight = 0
        self.bytes_in_flight = 0
        self.nonfinite: Counts = {}
        self.seconds = {"reading": 0.0, "computing": 0.0, "writing": 0.0, "waiting": 0.0}
        self.at_hand: _Progressing | None = None
        self.model = _Progressing(None, plan.model_statistics, dict(plan.known))
        self.sample_parts: list[list[torch.Tensor]] = []
        self.passes_done = 0
        self.pass_begins = True
        self.checked: set[str] = set()
        self.scratch = bytearray(0)
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
            for thread in threads:
                thread.start()
            self._merge_all()
            self._join(threads)
            if self.failure is not None:
                raise self.failure
        except BaseException as error:
            self._fail(error)
            self._join(threads)
            if isinstance(error, _StoppedError) and self.failure is not None:
                raise self.failure from None
            raise
        finally:
            if self.progress is not None:
                self.progress.close()
        outcome = Outcome(self.seconds, self.nonfinite, self.bytes_read, statistics=self.model.known)
        if self.in_arena is not None:
            outcome.copy_bandwidth = copy_bandwidth(self.in_arena.touched())
        return outcome

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
            while thread.is_alive():
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
        for load in self.plan.loads(self._another_sweep, self._another_pass):
            block = self._room_for(load)
            began = time.perf_counter()
            filled = _Filled(load, block, self._fill(load, block))
            self.seconds["reading"] += time.perf_counter() - began
            if load.stop == load.job.numel and not load.sample:
                self.checked.add(load.job.name)
            self._put(self.filled, filled)
        self._put(self.filled, None)

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

        def admit() -> tuple[Block | None] | None:
            few = self.loads_in_flight < _FULL_LOADS
            small = self.loads_in_flight < _MOST_LOADS and self.bytes_in_flight + nbytes <= AHEAD_BYTES
            if not few and not small:
                return None
            block = self.in_arena.take(nbytes) if self.in_arena is not None else None
            if self.in_arena is not None and block is None:
                return None
            self.loads_in_flight += 1
            self.bytes_in_flight += nbytes
            return (block,)

        admitted: tuple[Block | None] = self._wait(admit)
        return admitted[0]

    def _fill(self, load: Load, block: Block | None) -> list[torch.Tensor]:
        tensors = []
        offset = 0
        for one, dtype in zip(load.job.inputs, load.job.held, strict=True):
            if isinstance(one.source, StateDictSource):
                tensors.append(self._lend(load, one, one.source, dtype))
                continue
            assert block is not None
            tensor = block.tensor(offset, dtype, load.numel)
            self._read(load, one, dtype, tensor, block.memory(offset, load.numel * dtype.itemsize))
            tensors.append(tensor)
            offset += aligned(load.numel * dtype.itemsize)
        return tensors

    def _lend(self, load: Load, one: Input, source: StateDictSource, dtype: torch.dtype) -> torch.Tensor:
        """A view of a tensor that is in memory; a copy where its dtype or its NaNs must change."""
        whole = source.view(one.info)
        runs = [whole[first : first + count] for first, count in load.spans]
        lent = torch.cat(runs) if load.sample else runs[0]
        tensor = lent.to(dtype)
        found = self._count(load, one, tensor)
        if found and self.on_nonfinite == "zero":
            tensor = tensor.clone() if tensor.data_ptr() == lent.data_ptr() else tensor
            _zero_nonfinite(tensor, self.backend)
        if found and self.on_nonfinite == "error" and not load.sample:
            rest = source.view(one.info)[load.stop :].to(dtype)
            self._refuse_nonfinite(load, one, _nonfinite(rest, self.backend))
        return tensor

    def _read(self, load: Load, one: Input, dtype: torch.dtype, tensor: torch.Tensor, memory: memoryview) -> None:
        stored = TORCH_DTYPES[one.info.dtype]
        step = max(READ_BYTES // stored.itemsize, 1)
        start = 0
        for first, count in _pieces(load.spans, step):
            if self.failure is not None:
                raise _StoppedError
            piece = tensor[start : start + count]
            first_byte = first * stored.itemsize
            if stored == dtype:
                bytes_here = memory[start * dtype.itemsize : (start + count) * dtype.itemsize]
                one.source.read_into(one.info, first_byte, bytes_here)
            else:
                if len(self.scratch) < count * stored.itemsize:
                    self.scratch = bytearray(step * stored.itemsize)
                one.source.read_into(one.info, first_byte, memoryview(self.scratch)[: count * stored.itemsize])
                piece.copy_(torch.frombuffer(self.scratch, dtype=stored, count=count))
            self.bytes_read += count * stored.itemsize
            if self._count(load, one, piece) and self.on_nonfinite == "zero":
                _zero_nonfinite(piece, self.backend)
            start += count
        if self.on_nonfinite == "error" and load.job.name in self.nonfinite.get(one.source.ref, {}):
            self._refuse_nonfinite(load, one, self._count_rest(load, one, dtype))

    # -- NaN and Inf

    def _count(self, load: Load, one: Input, piece: torch.Tensor) -> bool:
        """Whether the piece holds NaN or Inf; counted when it is read for the first time."""
        if not piece.is_floating_point():
            return False
        before = self.nonfinite.get(one.source.ref, {})
        if load.job.name in self.checked and load.job.name not in before:
            return False
        nan, inf = _nonfinite(piece, self.backend)
        if not nan and not inf:
            return False
        if load.job.name not in self.checked and not load.sample:
            counts = self.nonfinite.setdefault(one.source.ref, {})
            so_far = counts.get(load.job.name, (0, 0))
            counts[load.job.name] = (so_far[0] + nan, so_far[1] + inf)
        return True

    def _count_rest(self, load: Load, one: Input, dtype: torch.dtype) -> tuple[int, int]:
        """Read what comes after this load, so that the message is about the whole tensor."""
        total = (0, 0)
        stored = TORCH_DTYPES[one.info.dtype]
        step = max(READ_BYTES // stored.itemsize, 1)
        buffer = bytearray(step * stored.itemsize)
        for start in range(load.stop, one.info.numel, step):
            count = min(step, one.info.numel - start)
            one.source.read_into(one.info, start * stored.itemsize, memoryview(buffer)[: count * stored.itemsize])
            nan, inf = _nonfinite(torch.frombuffer(buffer, dtype=stored, count=count).to(dtype), self.backend)
            total = (total[0] + nan, total[1] + inf)
        return total

    def _refuse_nonfinite(self, load: Load, one: Input, rest: tuple[int, int]) -> None:
        nan, inf = self.nonfinite[one.source.ref][load.job.name]
        raise MergeError(
            f"Tensor {one.info.name!r} of {one.source.ref} holds {nan + rest[0]} NaN and {inf + rest[1]} Inf; mend the "
            "model, or merge with on_nonfinite warn (count them) or zero (put zeros in their place)."
        )

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
            self._merge_load(filled)
            waited_inside = self.seconds["waiting"] - waiting_before
            self.seconds["computing"] += time.perf_counter() - waited - waited_inside
            load = filled.load
            with self.changed:
                if filled.block is not None:
                    filled.block.arena.give(filled.block)
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
            self.at_hand = _Progressing(job, needed, dict(self.model.known))
        at_hand = self.at_hand
        if filled.load.sample:
            at_hand.sample = chunk.clone()
            return
        wanted = at_hand.wanted
        while job.whole and wanted is not None:
            at_hand.finish(wanted, wanted.observe(chunk, at_hand.known))
            wanted = at_hand.wanted
        if wanted is not None:
            self._observe(at_hand, wanted, filled.load, chunk)
            return
        for start in range(0, chunk.numel, job.piece):
            part = chunk.part(start, min(start + job.piece, chunk.numel))
            self._merge_piece(at_hand, part)

    def _observe(self, at_hand: _Progressing, statistic: Statistic, load: Load, chunk: Chunk) -> None:
        """Let the sweep's statistic see one chunk of a tensor that is cut."""
        at_hand.observe(statistic, chunk, first=load.start == 0)
        if load.stop == load.job.numel:
            at_hand.finish(statistic, at_hand.state)
            with self.changed:
                self.decided[load.job.name] = (load.sweep + 1, at_hand.wanted is None)
                self.changed.notify_all()

    def _observe_model(self, load: Load, chunk: Chunk) -> None:
        """Let the pass's statistic see one chunk of the model, or put a part of the sample by."""
        if load.sample:
            tensors = chunk.models if chunk.base is None else [chunk.base, *chunk.models]
            self.sample_parts.append([tensor.float() for tensor in tensors])
            return
        if self.sample_parts:
            inputs = [torch.cat(parts) for parts in zip(*self.sample_parts, strict=True)]
            base = None if chunk.base is None else inputs.pop(0)
            self.model.sample = Chunk(0, base, inputs)
            self.sample_parts = []
        statistic = self.model.wanted
        assert statistic is not None
        self.model.observe(statistic, chunk, first=self.pass_begins)
        self.pass_begins = load.last
        if load.last:
            self.model.finish(statistic, self.model.state)
            with self.changed:
                self.passes_done += 1
                if self.model.wanted is None:
                    self.model.sample = None
                self.changed.notify_all()

    def _merge_piece(self, at_hand: _Progressing, part: Chunk) -> None:
        job = at_hand.job
        assert job is not None and job.context is not None
        target, block = self._target(job, part.offset, part.numel)
        if job.merged == job.out:
            self.plan.method.merge(job.context, part, at_hand.known, target)
        else:
            if block is None:
                result = torch.empty(part.numel, dtype=job.merged)
            else:
                behind = -(-part.numel * job.out.itemsize // PIECE_SLACK) * PIECE_SLACK
                result = block.tensor(behind, job.merged, part.numel)
            self.plan.method.merge(job.context, part, at_hand.known, result)
            _convert(result, target, self.backend)
        self._deliver(job, part.offset, part.numel, block)

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
            target, block = self._target(job, load.start + start, part.numel())
            if job.merged == job.out:
                target.copy_(part)
            else:
                _convert(part, target, self.backend)
            self._deliver(job, load.start + start, part.numel(), block)

    def _target(self, job: Job, offset: int, numel: int) -> tuple[torch.Tensor, Block | None]:
        """Where to merge to: the sink's own memory, or a block that the writer gives back."""
        target = self.sink.target(job.name, offset, offset + numel)
        if target is not None:
            return target, None
        nbytes = numel * job.out.itemsize
        if job.merged != job.out:
            nbytes += PIECE_SLACK + numel * job.merged.itemsize
        arena = self.out_arena
        assert arena is not None
        began = time.perf_counter()
        block: Block = self._wait(lambda: arena.take(nbytes))
        self.seconds["waiting"] += time.perf_counter() - began
        return block.tensor(0, job.out, numel), block

    def _deliver(self, job: Job, offset: int, numel: int, block: Block | None) -> None:
        self.elements_merged += numel
        if block is not None:
            self._put(self.merged, _Merged(job.name, offset * job.out.itemsize, block, numel * job.out.itemsize))

    # -- writing

    def _write_all(self) -> None:
        while True:
            piece = self._get(self.merged)
            if piece is None:
                return
            began = time.perf_counter()
            self.sink.write(piece.name, piece.start_byte, piece.block.memory(0, piece.nbytes))
            self.seconds["writing"] += time.perf_counter() - began
            with self.changed:
                piece.block.arena.give(piece.block)
                self.changed.notify_all()


def _pieces(spans: list[tuple[int, int]], step: int) -> Iterator[tuple[int, int]]:
    """The runs, cut where they are longer than `step`."""
    for first, count in spans:
        for start in range(0, count, step):
            yield first + start, min(step, count - start)


class DictSink:
    """Merged tensors in memory. They are allocated when first asked for, so that none is an alias of an input."""

    def __init__(self, plan: Plan) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        for job in plan.jobs:
            self.tensors[job.name] = torch.empty(job.shape, dtype=job.out)

    def target(self, name: str, start: int, stop: int) -> torch.Tensor:
        """The place of these elements in the result."""
        return self.tensors[name].view(-1)[start:stop]

    def write(self, name: str, start_byte: int, data: memoryview) -> None:
        """Never called: everything is merged in place."""
        raise AssertionError("tensors in memory are merged in place")


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def _nonfinite(x: torch.Tensor, backend: str) -> tuple[int, int]:
    if x.dtype == torch.float64:
        return int(x.isnan().sum()), int(x.isinf().sum())
    nan, inf = ops.count_nonfinite(x, backend=backend).tolist()
    return nan, inf


def _zero_nonfinite(x: torch.Tensor, backend: str) -> None:
    if x.dtype == torch.float64:
        x.masked_fill_(~x.isfinite(), 0.0)
    else:
        ops.zero_nonfinite_(x, backend=backend)


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
