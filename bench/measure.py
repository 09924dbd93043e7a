"""Time one command and its peak memory, and describe the machine: shared by the benchmark scripts.

Run as a script this file is the launcher: `python measure.py REPORT COMMAND...` runs the command and writes its wall
time, exit status and peak resident memory to REPORT as JSON. The launcher is a process of its own because Linux
starts a child's peak at the resident size of the process that made it: a benchmark that has torch and reference
tensors loaded would report its own memory as the command's. So nothing heavy may be imported here.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Run:
    """What one command took: seconds of wall time, peak resident bytes, exit status, and what it said."""

    seconds: float
    peak_bytes: int
    status: int
    stdout: str
    stderr: str


def run_measured(command: list[str], *, environment: dict[str, str] | None = None) -> Run:
    """Run ``command`` to its end under the launcher. Mapped file pages count in the peak, as the kernel counts them."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        with open(Path(folder) / "out", "w+b") as out, open(Path(folder) / "err", "w+b") as err:
            subprocess.run(
                [sys.executable, "-I", "-S", str(HERE / "measure.py"), str(report), *command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=environment,
                check=True,
            )
            out.seek(0)
            err.seek(0)
            figures = json.loads(report.read_text())
            return Run(
                figures["seconds"],
                figures["peak_bytes"],
                figures["status"],
                out.read().decode(errors="replace"),
                err.read().decode(errors="replace"),
            )


def cpu_model() -> str:
    """The processor's name as the kernel gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of this tree, with ``+`` when files differ from it; None outside a repository."""

    def git(*arguments: str) -> str:
        answer = subprocess.run(["git", "-C", str(HERE), *arguments], capture_output=True, text=True, check=True)
        return answer.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def environment() -> dict[str, object]:
    """What a figure depends on besides the code."""
    from importlib.metadata import PackageNotFoundError, version

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": cpu_model(),
        "cores": cores,
        "memory_bytes": pages,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": installed("torch"),
        "fastmerge": installed("fastmerge"),
        "mergekit": installed("mergekit"),
        "commit": commit(),
    }


def _launch(report: str, command: list[str]) -> None:
    start = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts kilobytes
    figures = {
        "seconds": seconds,
        "peak_bytes": usage.ru_maxrss * unit,
        "status": os.waitstatus_to_exitcode(status),
    }
    with open(report, "w", encoding="utf-8") as file:
        json.dump(figures, file)


if __name__ == "__main__":
    _launch(sys.argv[1], sys.argv[2:])
