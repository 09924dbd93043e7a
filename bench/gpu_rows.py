"""How a row of bench/gpu.py is made: inputs' sizes, the limits that figures are held against, checks, and times."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastmerge import backends, measuring

BF16 = torch.bfloat16
WEIGHTS = (1.0, 0.7, 0.4)
DENSITY = 0.5
CONSENSUS = {"ties": measuring.TIES, "task_arithmetic": measuring.TASK_ARITHMETIC}
PCB_DENSITY = 0.1
GIB = 1 << 30

Row = dict[str, Any]


@dataclass
class Bench:
    """One run: the device, the sizes, and the limits that figures are held against."""

    device: str
    backend: str
    elements: int | None
    repeat: int
    models: tuple[int, ...]
    folder: Path
    limits: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.watch = measuring.Stopwatch(self.device, self.bytes(1 << 28))

    def size(self, log2: int) -> int:
        """Elements: the promise's, or what is asked for on the command line."""
        return 1 << log2 if self.elements is None else self.elements

    def bytes(self, full: int) -> int:
        """Bytes of a limit's buffer: small where everything is."""
        return full if self.elements is None else min(full, 64 * self.elements)

    def timed(self, run: Callable[[], object]) -> list[float]:
        """Seconds of so many calls, after one to warm up."""
        self.watch.once(run)
        return [self.watch.once(run) for _ in range(self.repeat)]

    def apart(self, run: Callable[[], object]) -> tuple[float, float]:
        """Seconds until a call returns, and until the device has done its work: nothing of the host's part hides.

        The medians of as many calls as are timed, after one to warm up; the device is idle before each.
        """
        both: list[tuple[float, float]] = []
        for _ in range(1 + self.repeat):
            self.settle()
            start = time.perf_counter()
            run()
            returned = time.perf_counter() - start
            self.settle()
            both.append((returned, time.perf_counter() - start))
        host, whole = zip(*both[1:])
        return statistics.median(host), statistics.median(whole)

    def settle(self) -> None:
        """Wait for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def row(
        self,
        benchmark: str,
        case: str,
        run: Callable[[], Any],
        *,
        elements: int,
        passes: int,
        moves: int,
        limit: str,
        bar: float | None,
        check: Callable[[Any], str | None],
        out: torch.Tensor | None = None,
    ) -> Row:
        """Check a result, time it, check again, tell it as a fraction of a limit; `out` is poisoned before checks."""

        def problem_of() -> str | None:
            if out is not None:
                out.fill_(float("nan"))
            return check(run())

        row: Row = {"benchmark": benchmark, "case": case, "elements": elements, "passes": passes, "bytes": moves}
        before = launches(self.backend)
        problem = problem_of()
        now = launches(self.backend)
        row["launches"] = {name: now[name] - before.get(name, 0) for name in now if now[name] > before.get(name, 0)}
        if problem is None:
            seconds = self.timed(run)
            problem = problem_of()
        row["problem"] = problem
        if problem is None:
            middle = statistics.median(seconds)
            fraction = moves / middle / self.limits[limit]
            row |= {"seconds": middle, "seconds_all": seconds, "gb_per_s": moves / middle / 1e9}
            row |= {"limit": limit, "fraction": fraction, "bar": bar}
            row["bar_met"] = None if bar is None else fraction >= bar
        return row


def launches(backend: str) -> dict[str, int]:
    """How often each of Triton's kernels was launched so far, and those in CUDA together."""
    if backend == "cuda":
        from fastmerge.backends.cuda.launch import compiled

        return {"kernels in CUDA": compiled.launches()}
    if backend != "triton":
        return {}
    from fastmerge.backends.triton.launch import launched

    return dict(launched)


def on_host(run: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """A result by the compiled kernels, or by the definition where there are none."""
    return run("reference" if backends.reason("cpu") else "cpu")


def same(expected: torch.Tensor) -> Callable[[torch.Tensor], str | None]:
    """A check: bit for bit this."""
    return lambda result: measuring.difference(result, expected)


def release() -> None:
    """Give the device's memory back before a benchmark takes its own."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def limits(bench: Bench) -> None:
    """Measure what no kernel and no merge can beat here: bytes per second."""
    bench.limits["copy"] = measuring.copy_bandwidth(bench.device, bench.bytes(4 * GIB))
    source = torch.randint(-100, 100, (bench.bytes(2 * GIB) // 4,), dtype=torch.int32, device=bench.device).float()
    reductions = {"sum": source.sum, "max": source.max, "norm": source.norm}
    rates = {name: source.nbytes / statistics.median(bench.timed(run)) for name, run in reductions.items()}
    # A read cannot be slower than the reading half of the best that was seen of a copy.
    bench.limits["read"] = max(*rates.values(), bench.limits["copy"])
    del source
    release()
    host = torch.randint(-100, 100, (bench.bytes(GIB) // 4,), dtype=torch.int32)
    if bench.device == "cuda":
        host = host.pin_memory()
    there = torch.empty_like(host, device=bench.device)
    for name, run in (
        ("host_to_device", lambda: there.copy_(host, non_blocking=True)),
        ("device_to_host", lambda: host.copy_(there, non_blocking=True)),
    ):
        bench.limits[name] = host.nbytes / statistics.median(bench.timed(run))
