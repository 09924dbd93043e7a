"""How fast the ops are here: each beside a copy of memory, which is what this machine can move.

A row is an op on one backend. It is checked first, on a small size against the reference, bit for bit; a row whose
check is red has no figure. Bytes are counted once per pass: a sweep for statistics reads its inputs, the last pass
reads its inputs and writes its output. Memory is cold: between two runs more is written than any cache holds.
"""

from __future__ import annotations

import difflib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from . import backends, ops
from .errors import ArgumentError, BackendError, FastmergeError

DEVICES = ("cpu", "cuda")
SIZES = {"cpu": 1 << 24, "cuda": 1 << 28}
"""Elements of each tensor: several times the caches, and few enough for half a minute."""
SLOW = {"reference": 128}
"""These are measured on so many times fewer elements; their figures tell little more than that they are slow."""
ROW_LENGTH = 1024
CHECKED = 69 * ROW_LENGTH
"""Elements on which a row is checked: more than a block of ties, and more than PCB-Merging sorts."""
COPIED = {"cpu": 1 << 28, "cuda": 1 << 30}
"""Bytes of a copy."""
FLUSHED = {"cpu": 1 << 28, "cuda": 1 << 28}
"""Bytes that are written between two runs."""
HEAD_START = 5_000_000
"""Cycles that a GPU waits before what is timed: two to four milliseconds."""
WARMING = 0.3
"""Seconds of work that a GPU is given first."""
MODELS = 3
RUNS = 5
LONGEST = 0.5
"""Seconds after which a row is not run again, if it has run three times."""


# -- time ------------------------------------------------------------------------------------------------------------


class Stopwatch:
    """Times calls on a device: by events on a GPU, by the clock on a CPU; the caches are cold before each.

    On a GPU the call's launches are enqueued while it still waits, so that the host's part does not show as long as it
    is shorter than that: what is timed is the GPU's work. A call that itself waits for the GPU is timed with its waits.
    """

    def __init__(self, device: torch.device | str, flushed: int | None = None) -> None:
        self.device = torch.device(device)
        count = FLUSHED[self.device.type] if flushed is None else flushed
        self._flushed = torch.zeros(max(1, count // 4), dtype=torch.int32, device=self.device)
        if self.device.type == "cuda":
            # A GPU that was idle needs a while to raise its clocks.
            start = time.perf_counter()
            while time.perf_counter() - start < WARMING:
                self._flushed.fill_(1)
                torch.cuda.synchronize(self.device)

    def once(self, run: Callable[[], object]) -> float:
        """Seconds of one call."""
        if self.device.type != "cuda":
            self._flushed.fill_(1)
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        torch.cuda.synchronize(self.device)
        self._flushed.fill_(1)
        torch.cuda._sleep(HEAD_START)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def several(self, run: Callable[[], object], runs: int = RUNS, longest: float = LONGEST) -> list[float]:
        """Seconds of several calls after one to warm up; three when they take long, one when they take very long."""
        warm = self.once(run)
        seconds: list[float] = []
        while len(seconds) < runs:
            seconds.append(self.once(run))
            spent = warm + sum(seconds)
            if spent > longest and (len(seconds) >= 3 or spent > 4 * longest):
                break
        return seconds


def copy_bandwidth(device: torch.device | str = "cpu", size: int | None = None, runs: int = 7) -> float:
    """Bytes read and written per second by a large copy within a device's memory: the median of several, cold.

    size: bytes that are copied. On a CPU all of torch's threads copy.
    """
    device = torch.device(device)
    count = max(1, (COPIED[device.type] if size is None else size) // 4)
    source = torch.randint(-(1 << 31), (1 << 31) - 1, (count,), dtype=torch.int32, device=device)
    target = torch.zeros_like(source)
    watch = Stopwatch(device, min(4 * count, FLUSHED[device.type]))
    seconds = watch.several(lambda: target.copy_(source), runs, longest=10.0)
    if not bool((target[-64:] == source[-64:]).all()):
        raise FastmergeError("The copy that bandwidth is measured by did not arrive.")
    return 2 * source.nbytes / statistics.median(seconds)


# -- what is measured ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """What the ops work on: a base, models near it, and their deltas; all bfloat16[rows, ROW_LENGTH] or flat."""

    base: Tensor
    models: list[Tensor]
    deltas: list[Tensor]
    out: Tensor


def inputs(elements: int, device: torch.device | str, models: int = MODELS, seed: int = 0) -> Inputs:
    """Normal values and normal deltas; the same for the same seed and device."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (elements // ROW_LENGTH, ROW_LENGTH) if elements % ROW_LENGTH == 0 else (elements,)

    def drawn(spread: float) -> Tensor:
        values = torch.empty(elements, dtype=torch.bfloat16, device=device)
        for part in values.split(1 << 26):
            part.copy_(torch.randn(part.numel(), generator=generator, device=device).mul_(spread))
        return values.view(shape)

    base = drawn(0.02)
    deltas = [drawn(1e-3) for _ in range(models)]
    return Inputs(base, [base + delta for delta in deltas], deltas, torch.zeros_like(base))


def moved(given: Inputs, device: torch.device | str) -> Inputs:
    """The same inputs elsewhere, with an output of their own."""
    return Inputs(
        given.base.to(device),
        [x.to(device) for x in given.models],
        [x.to(device) for x in given.deltas],
        torch.zeros_like(given.out, device=device),
    )


Run = Callable[[Inputs, str], Any]


@dataclass(frozen=True)
class Case:
    """An op as it is measured.

    reads: how many of the inputs a pass reads. writes: bytes per element of the output. sweeps: passes for statistics
    before the last one, by backend. Backends that are not named are counted as the compiled ones are.
    """

    op: str
    detail: str
    run: Run
    reads: int
    writes: int = 0
    sweeps: Mapping[str, int] = field(default_factory=dict, hash=False)

    def passes(self, backend: str) -> int:
        """How often the inputs are read."""
        return 1 + self.sweeps.get(backend, self.sweeps.get("cpu", 0))

    def moves(self, elements: int, backend: str) -> int:
        """Bytes that are read and written."""
        return elements * (self.passes(backend) * self.reads * 2 + self.writes)


# A GPU finds order statistics digit by digit: bfloat16 has 15 bits that count, a delta of two such numbers, in float32,
# has 31. Triton's kernels count digits of 8 bits at most, those in CUDA 15 bits at once, or digits of 11, 10 and 10.
# The compiled kernels for CPUs bracket the rank by a sample, and read once.
KTH = {"cpu": 1, "cuda": 1, "triton": 2}
"""Passes that find an order statistic of bfloat16 magnitudes."""
BOUNDS = {"cpu": 1, "cuda": 2, "triton": 2}
"""Passes that find it and count the ties before each block."""
OF_DELTAS = {"cpu": 1, "cuda": 3, "triton": 4}
"""Passes that find both of deltas."""
PCB = {"cpu": 3, "cuda": 3, "triton": 5}
"""Passes of PCB-Merging before the last one: for each of two bounds of the magnitudes, and for those of the scores."""


def _sparsify(method: str) -> Run:
    def run(given: Inputs, backend: str) -> Tensor:
        return ops.sparsify(given.deltas[0], 0.5, method=method, seed=1, out=given.out, backend=backend)

    return run


def _consensus(**arguments: Any) -> Run:
    def run(given: Inputs, backend: str) -> Tensor:
        weights = [1.0, 0.7, 0.4] * len(given.models)
        return ops.consensus_merge(
            given.base, given.models, weights[: len(given.models)], out=given.out, backend=backend, **arguments
        )

    return run


def _pcb(given: Inputs, backend: str) -> Tensor:
    rows = [delta.view(-1) for delta in given.deltas]
    result: Tensor = ops.pcb_merge(rows, variant="vision_es", out=given.out.view(-1), backend=backend)
    return result


def _kth(given: Inputs, backend: str) -> Tensor:
    x = given.deltas[0]
    # The op, which returns a tensor: a Python number would have to wait for the GPU within the timing.
    value: Tensor = torch.ops.fastmerge.kth_magnitude([x], x.numel() // 2, backend)
    return value


TIES = {"density": 0.5}
TASK_ARITHMETIC = {"method": None, "election": "none", "divisor": "none"}

CASES = (
    Case("abs_histogram", "", lambda given, backend: ops.abs_histogram(given.deltas[0], backend=backend), 1),
    Case("kth_magnitude", "", _kth, 1, sweeps={name: passes - 1 for name, passes in KTH.items()}),
    Case("topk_mask", "", lambda given, backend: ops.topk_mask(given.deltas[0], 0.5, backend=backend), 1, 1, BOUNDS),
    Case("sparsify", "magnitude", _sparsify("magnitude"), 1, 2, BOUNDS),
    Case("sparsify", "bernoulli", _sparsify("bernoulli"), 1, 2),
    Case("sparsify", "della", _sparsify("della_magprune"), 1, 2),
    Case("consensus_merge", "ties", _consensus(**TIES), 1 + MODELS, 2, OF_DELTAS),
    Case("consensus_merge", "task_arithmetic", _consensus(**TASK_ARITHMETIC), 1 + MODELS, 2),
    Case("pcb_merge", "vision_es", _pcb, MODELS, 2, PCB),
    Case("count_nonfinite", "", lambda given, backend: ops.count_nonfinite(given.base, backend=backend), 1),
)

OPS = tuple(dict.fromkeys(case.op for case in CASES))


# -- rows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """What was measured of one op on one backend; no figures where `problem` says what is wrong."""

    op: str
    detail: str
    backend: str
    device: str
    elements: int
    models: int
    passes: int
    bytes: int
    problem: str | None = None
    seconds: float | None = None
    seconds_all: list[float] | None = None
    gb_per_s: float | None = None
    fraction_of_copy: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The row for JSON."""
        return asdict(self)


def difference(actual: Tensor, expected: Tensor) -> str | None:
    """How two results differ, or None where they have the same bits; both may be on any device."""
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        return f"{actual.dtype}{list(actual.shape)} instead of {expected.dtype}{list(expected.shape)}"
    mine, theirs = _bits(actual), _bits(expected.to(actual.device))
    different = sum(int((a != b).sum()) for a, b in zip(mine.split(1 << 26), theirs.split(1 << 26)))
    return f"{different} of {expected.numel()} elements are not the reference's" if different else None


def _bits(x: Tensor) -> Tensor:
    flat = x.detach().contiguous().view(-1)
    return flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])


class Check:
    """Holds backends to what the reference gives on a small size, which is computed on the CPU, once for each op."""

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._expected: dict[tuple[Case, int], Tensor] = {}

    def problem(self, case: Case, backend: str, elements: int) -> str | None:
        """What is wrong with an op on so many elements, or None."""
        if backend == "reference" and self.device.type == "cpu":
            return None  # it is the definition
        try:
            given = inputs(elements, "cpu")
            if (case, elements) not in self._expected:
                self._expected[case, elements] = case.run(given, "reference").clone()
            return difference(case.run(moved(given, self.device), backend), self._expected[case, elements])
        except FastmergeError as error:
            return str(error)
        except Exception as error:  # one kernel that does not compile must not cost the other rows
            return f"{type(error).__name__}: {error}".partition("\n")[0]


def backends_of(device: torch.device | str, backend: str = "auto") -> list[str]:
    """The backends that work on a device, fastest first, or the one that is named.

    Triton's interpreter and the emulator of CUDA are left out unless they are named: they show what kernels compute,
    not how fast.
    BackendError: the one that is named does not work there.
    """
    kind = torch.device(device).type
    if backend != "auto":
        return [backends.name_of(backends.resolve(backend, kind))]
    found = []
    for name in backends.names():
        try:
            module = backends.resolve(name, kind)
        except BackendError:
            continue
        if not interpreted(name):
            found.append(backends.name_of(module))
    return found


def interpreted(backend: str) -> bool:
    """Whether the kernels of a backend run in Triton's interpreter, or in the emulator of CUDA."""
    if backend == "cuda":
        from .backends.cuda.launch import EMULATED

        return EMULATED
    if backend == "triton":
        from .backends.triton.launch import INTERPRETED

        return INTERPRETED
    return False


def elements_of(device: torch.device | str, backend: str, size: int | None = None) -> int:
    """On how many elements a backend is measured."""
    if size is not None:
        return size
    return ROW_LENGTH if interpreted(backend) else SIZES[torch.device(device).type] // SLOW.get(backend, 1)


def _row(case: Case, backend: str, given: Inputs, watch: Stopwatch, copied: float, problem: str | None) -> Row:
    elements = given.base.numel()
    passes, moves = case.passes(backend), case.moves(elements, backend)
    models = 1 if case.reads == 1 else len(given.models)
    row = Row(case.op, case.detail, backend, watch.device.type, elements, models, passes, moves, problem)
    if problem is not None:
        return row
    seconds = watch.several(lambda: case.run(given, backend))
    rate = moves / statistics.median(seconds)
    return replace(
        row,
        seconds=statistics.median(seconds),
        seconds_all=seconds,
        gb_per_s=rate / 1e9,
        fraction_of_copy=rate / copied,
    )


def rows(
    copied: float, *, op: str | None = None, device: str = "cpu", backend: str = "auto", size: int | None = None
) -> Iterator[Row]:
    """Check and measure every op, or one, on every backend of a device, or one.

    copied: what `copy_bandwidth` says of the device. size: elements of each tensor; by default `elements_of`.
    Errors: ArgumentError, BackendError: such an op, device or backend is not here.
    """
    check_arguments(op, device, size)
    check = Check(device)
    watch = Stopwatch(device, _enough(size, FLUSHED[device]))
    given: Inputs | None = None
    for name in backends_of(device, backend):
        elements = elements_of(device, name, size)
        if given is None or given.base.numel() != elements:
            given = None  # give the memory back before more is taken
            given = inputs(elements, device)
        for case in CASES:
            if op is None or case.op == op:
                problem = check.problem(case, name, min(CHECKED, elements))
                yield _row(case, name, given, watch, copied, problem)


def _enough(size: int | None, most: int) -> int:
    """Bytes that are copied or flushed: no more than are asked for where only a few elements are measured."""
    return most if size is None else min(64 * size, most)


def check_arguments(op: str | None, device: str, size: int | None) -> None:
    """ArgumentError where there is no such op or device, or where the size is no size."""
    for name, value, known in (("op", op, OPS), ("device", device, DEVICES)):
        if value is not None and value not in known:
            near = difflib.get_close_matches(value, known, n=1)
            guess = f"; did you mean {near[0]!r}?" if near else ""
            raise ArgumentError(f"{name}={value!r} is not known; use one of {', '.join(known)}{guess}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ArgumentError("device='cuda' is not here: this torch sees no GPU; use --device cpu.")
    if size is not None and size < 1:
        raise ArgumentError(f"size={size} is no number of elements; pass at least 1.")


# -- for people, and for programs --------------------------------------------------------------------------------------

_LAYOUT = "{:<15}  {:<15}  {:<9}  {:>10}  {:>6}  {:>9}  {:>8}  {}"
HEADINGS = ("OP", "METHOD", "BACKEND", "ELEMENTS", "PASSES", "SECONDS", "GB/s", "OF A COPY")


def line(row: Row) -> str:
    """A row for people, under HEADINGS."""
    head = (row.op, row.detail or "-", row.backend, row.elements, row.passes)
    if row.seconds is None or row.gb_per_s is None or row.fraction_of_copy is None:
        return _LAYOUT.format(*head, "-", "-", f"RED: {row.problem}")
    return _LAYOUT.format(*head, f"{row.seconds:.5f}", f"{row.gb_per_s:.2f}", f"{row.fraction_of_copy:.1%}")


def machine(device: torch.device | str) -> dict[str, Any]:
    """What a figure depends on besides the code."""
    facts: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    if backends.reason("cpu") is None:
        module = backends.resolve("cpu")
        facts |= {"instructions": module.isa(), "kernel_threads": module.threads()}
    if torch.device(device).type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": gpu.name,
            "gpu_memory_bytes": gpu.total_memory,
            "gpu_multiprocessors": gpu.multi_processor_count,
            "gpu_l2_bytes": gpu.L2_cache_size,
            "gpu_capability": f"{gpu.major}.{gpu.minor}",
            "cuda": torch.version.cuda,
        }
    return facts


def tell(*, op: str | None, device: str, backend: str, size: int | None, as_json: bool) -> list[str]:
    """Measure and print: a line for each row as it comes, or all as one JSON object. Returns what is wrong.

    Arguments and errors: as in `rows`.
    """
    check_arguments(op, device, size)
    backends_of(device, backend)
    copied = copy_bandwidth(device, _enough(size, COPIED[device]))
    if not as_json:
        print(f"A copy of {device} memory: {copied / 1e9:.1f} GB/s, read and written.\n\n{_LAYOUT.format(*HEADINGS)}")
    found = []
    for row in rows(copied, op=op, device=device, backend=backend, size=size):
        found.append(row)
        if not as_json:
            print(line(row), flush=True)
    if as_json:
        report = {"machine": machine(device), "copy_gb_per_s": copied / 1e9, "rows": [row.to_dict() for row in found]}
        print(json.dumps(report))
    return [f"{row.op} on {row.backend}: {row.problem}" for row in found if row.problem is not None]
