"""Speaking to a person: the progress line while a merge runs, and the closing report."""

from __future__ import annotations

import dataclasses
import mmap
import sys
import threading
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TextIO

from fastmerge.sizes import format_size

PHASES = ("start_up", "reading", "computing", "writing", "waiting", "total")
"""Keys of :attr:`MergeReport.seconds`. Phases overlap, so they may add up to more than the total."""

_REDRAW_SECONDS = 0.1
_LISTED_TENSORS = 5


class Progress:
    """A line that tells how far a merge is: share, GB/s, time left, and the tensor at hand.

    On a terminal the line is redrawn in place. Elsewhere (a pipe, a log file) one plain line is written at the start.

    Args:
        stream: where to write; standard error when None.
        quiet: write nothing at all.
    """

    def __init__(self, stream: TextIO | None = None, *, quiet: bool = False) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._quiet = quiet
        self._lock = threading.Lock()
        self._done = 0
        self._total = 0
        self._drawn = 0.0
        self._bar: Any = None
        self._task: Any = None

    def begin(self, total_bytes: int, passes: int) -> None:
        """Start the line.

        Args:
            total_bytes: bytes that will be read, over all passes.
            passes: how often the inputs are read.
        """
        self._done, self._total = 0, total_bytes
        if self._quiet:
            return
        if not self._stream.isatty():
            times = "once" if passes == 1 else f"in up to {passes} passes"
            print(f"fastmerge: reading {format_size(total_bytes)} {times}", file=self._stream, flush=True)
            return
        # Imported here: a merge whose output is not looked at need not pay for it.
        from rich.console import Console
        from rich.markup import escape
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._escape = escape
        self._bar = Bar(
            TextColumn("{task.percentage:3.0f}%"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[current]}"),
            console=Console(file=self._stream),
            transient=True,
            refresh_per_second=1 / _REDRAW_SECONDS,
        )
        self._task = self._bar.add_task("merge", total=total_bytes, rate="", current="")
        self._began = time.monotonic()
        self._bar.start()

    def advance(self, nbytes: int, current: str) -> None:
        """Move on by ``nbytes`` of the total; ``current`` says what is being worked on. Thread-safe and cheap."""
        with self._lock:
            self._done += nbytes
            now = time.monotonic()
            if self._bar is None or (now - self._drawn < _REDRAW_SECONDS and self._done < self._total):
                return
            self._drawn = now
            rate = self._done / max(now - self._began, 1e-9) / 1e9
            self._bar.update(
                self._task, completed=self._done, rate=f"{rate:.2f} GB/s", current=self._escape(_shorten(current, 40))
            )

    def close(self) -> None:
        """Remove the line. Idempotent."""
        with self._lock:
            bar, self._bar = self._bar, None
        if bar is not None:
            bar.stop()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the line, however the merge ended."""
        self.close()


@dataclass
class MergeReport:
    """What a merge did.

    Attributes:
        out: the output directory.
        method: the merge method.
        tensors: tensors written.
        parameters: elements written.
        bytes_read: bytes read from the inputs, over all passes.
        bytes_written: bytes of tensor data written.
        passes: most sweeps planned over any tensor.
        model_passes: how many of them were over the whole model, for its statistics.
        seconds: wall seconds by phase (see :data:`PHASES`).
        nonfinite: model -> tensor -> (NaN count, Inf count), for tensors that have any.
        digest: digest of the merged tensors, as in the manifest.
        backend: the backend that computed.
        device: where it did.
        notes: what a person should know of the plan.
        copy_fraction: bytes moved per second as a share of this machine's copy bandwidth, or None if not measured.
    """

    out: str
    method: str
    tensors: int
    parameters: int
    bytes_read: int
    bytes_written: int
    passes: int
    seconds: dict[str, float]
    nonfinite: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)
    digest: str = ""
    backend: str = ""
    copy_fraction: float | None = None
    notes: list[str] = field(default_factory=list)
    model_passes: int = 0
    device: str = "cpu"

    def to_dict(self) -> dict[str, Any]:
        """The report as a dict that ``json.dumps`` accepts."""
        return dataclasses.asdict(self)

    def table(self) -> str:
        """The report as a table in plain text, without a newline at the end."""
        total = self.seconds.get("total", 0.0)
        rows = [
            ("method", self.method),
            ("passes", self._passes()),
            ("backend", self.backend if self.device == "cpu" else f"{self.backend} on {self.device}"),
            ("tensors", f"{self.tensors} ({self.parameters / 1e9:.3f}B parameters)"),
            ("read", format_size(self.bytes_read)),
            ("written", format_size(self.bytes_written)),
            *((phase.replace("_", "-"), f"{self.seconds[phase]:.2f} s") for phase in PHASES if phase in self.seconds),
        ]
        if total > 0:
            speed = f"{(self.bytes_read + self.bytes_written) / total / 1e9:.2f} GB/s"
            if self.copy_fraction is not None:
                speed += f", {self.copy_fraction:.0%} of this machine's copy bandwidth"
            rows.append(("speed", speed))
        rows += self._nonfinite_rows()
        rows += [("note", note) for note in self.notes]
        rows += [("digest", self.digest), ("output", self.out)]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)

    def _passes(self) -> str:
        whole = self.model_passes + 1
        text = str(whole) if whole == 1 else f"{whole}, all but one for statistics of the whole model"
        return text if self.passes == whole else f"{text}, and up to {self.passes} over large tensors"

    def _nonfinite_rows(self) -> list[tuple[str, str]]:
        found = [
            (model, tensor, nan, inf)
            for model, tensors in self.nonfinite.items()
            for tensor, (nan, inf) in tensors.items()
            if nan or inf
        ]
        if not found:
            return [("NaN and Inf", "none in the inputs")]
        rows = [("NaN and Inf", f"in {_count(len(found), 'input tensor', 'input tensors')}")]
        rows += [
            ("", f"{model}: {tensor}: {nan} NaN, {inf} Inf") for model, tensor, nan, inf in found[:_LISTED_TENSORS]
        ]
        if len(found) > _LISTED_TENSORS:
            rows.append(("", f"and {len(found) - _LISTED_TENSORS} more, all listed by --json"))
        return rows


def copy_bandwidth(memory: memoryview | None = None, nbytes: int = 96 << 20, repeats: int = 2) -> float:
    """Measure how fast one thread copies memory: bytes moved per second, reads and writes both counted.

    Args:
        memory: bytes that may be overwritten and have been touched before; where there are fewer than ``nbytes`` of
            them, fresh memory is used, whose first touch takes longer than the measurement.
        nbytes: bytes to use, half of them the source; they should exceed the caches.
        repeats: the fastest of so many copies counts.
    """
    if memory is None or len(memory) < nbytes:
        with mmap.mmap(-1, nbytes) as fresh:
            # Untouched pages are one shared page of zeros, which would be copied from the cache.
            fresh[:: mmap.PAGESIZE] = b"\1" * len(range(0, nbytes, mmap.PAGESIZE))
            with memoryview(fresh) as view:
                return copy_bandwidth(view, nbytes, repeats)
    source, target = memory[: nbytes // 2], memory[nbytes // 2 : nbytes // 2 * 2]
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        target[:] = source
        best = min(best, time.perf_counter() - start)
    source.release()
    target.release()
    return nbytes // 2 * 2 / best


def copy_fraction(bytes_moved: int, seconds: float, bandwidth: float) -> float | None:
    """The share of the copy bandwidth that a merge reached.

    Args:
        bytes_moved: bytes read and bytes written, added.
        seconds: what that took.
        bandwidth: bytes moved per second by a copy (see :func:`copy_bandwidth`).

    Returns:
        The share, 1.0 being a plain copy, or None when no time has passed.
    """
    return bytes_moved / seconds / bandwidth if seconds > 0 else None


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else "…" + text[-(length - 1) :]
