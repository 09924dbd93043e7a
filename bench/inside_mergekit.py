"""What fastmerge inside mergekit saves: `mergekit-yaml` beside `fastmerge-yaml` on the same YAML and the same inputs.

Both are whole processes, start-up included, and run in turns, each after the previous output was removed, `sync` and a
pause; the inputs are in the page cache. Medians are reported. Where the time of a merge goes is seen in one more run,
in which mergekit's reading and writing are timed from within: what is left besides them and fastmerge's kernels is
mergekit's start-up, planning and bookkeeping. A tensor that mergekit "reads" is mapped, so its pages are read when
the kernels first touch them.

The output of `fastmerge-yaml` must be that of `fastmerge merge --numerics mergekit`, bit for bit; a row whose check is
red reports no speed. How many values differ from mergekit's own is told: elements tied at a threshold, and for random
methods everything that was dropped by other random numbers.

    python bench/inside_mergekit.py --json bench/data/inside_mergekit.json
    python bench/inside_mergekit.py --methods ties --repeats 1 --pause 0 --scale tiny    # a smoke test
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from end_to_end import CASES, _Folder, clean, config, warm
from make_family import DTYPES, SCALES, Family, make_family
from measure import environment, run_measured
from peers import mergekit_cli

ROOT = Path(__file__).resolve().parents[1]
BARS = {"ties": 5.0, "della": 5.0}
"""How many times as fast as mergekit-yaml the project promises to be."""


@dataclass
class Row:
    """What was measured for one method."""

    method: str
    peer: list[float] = field(default_factory=list)
    ours: list[float] = field(default_factory=list)
    split: dict[str, float] = field(default_factory=dict)
    differing: float | None = None
    problems: list[str] = field(default_factory=list)

    def figures(self) -> dict[str, object]:
        """The row as numbers; no speed when the output was wrong."""
        result: dict[str, object] = {"method": self.method, "check": "red" if self.problems else "green"}
        if self.problems:
            return result | {"problems": self.problems}
        ours = statistics.median(self.ours)
        result |= {"seconds": ours, "seconds_all": self.ours, "split": self.split, "differing": self.differing}
        if self.peer:
            peer, bar = statistics.median(self.peer), BARS.get(self.method)
            times = peer / ours
            result |= {"peer_seconds": peer, "peer_seconds_all": self.peer, "times_the_peer": times}
            result |= {"bar": bar, "bar_met": None if bar is None else times >= bar}
        return result


def our_command(file: Path, out: Path) -> list[str]:
    """What `fastmerge-yaml` runs."""
    return [sys.executable, "-m", "fastmerge.integrations.mergekit.command", str(file), str(out)]


def our_environment() -> dict[str, str]:
    """The peer's, with this tree's fastmerge."""
    return mergekit_cli.environment() | {"PYTHONPATH": str(ROOT)}


def compare(one: Path, other: Path) -> tuple[int, int]:
    """How many values of two outputs differ, and of how many; a tensor that one of them lacks differs throughout."""
    first, second = _Folder(one), _Folder(other)
    shapes, others = first.shapes(), second.shapes()
    different = total = 0
    for name in {*shapes, *others}:
        if shapes.get(name) != others.get(name):
            size = max((first if name in shapes else second).read(name).numel(), 1)
            different, total = different + size, total + size
            continue
        left, right = first.read(name), second.read(name)
        different += int((left != right).sum()) if left.dtype == right.dtype else left.numel()
        total += left.numel()
    return different, total


class Bench:
    """Runs one method after the other on one family."""

    def __init__(self, family: Family, options: argparse.Namespace, work: Path) -> None:
        self.family, self.options, self.work = family, options, work
        self.theirs, self.ours, self.plain = work / "mergekit", work / "inside", work / "fastmerge"

    def _timed(self, command: list[str], out: Path) -> float:
        clean(out, self.options.pause)
        run = run_measured(command, environment=our_environment())
        if run.status != 0:
            raise SystemExit(f"{command[0]} failed: {run.stderr.strip()[-2000:]}")
        return run.seconds

    def method(self, name: str) -> Row:
        """Measure one method."""
        row = Row(name)
        file = self.work / f"{name}.yml"
        file.write_text(json.dumps(config(self.family, name, self.options.dtype), indent=2))  # JSON is YAML
        peer = mergekit_cli.command(file, self.theirs)
        if peer is None:
            raise SystemExit("mergekit-yaml is not installed here: install mergekit 0.1.5")
        for _ in range(self.options.repeats):
            if not self.options.no_peer:
                row.peer.append(self._timed(peer, self.theirs))
            row.ours.append(self._timed(our_command(file, self.ours), self.ours))
        plain = ["merge", str(file), str(self.plain), "--numerics", "mergekit", "--quiet"]
        subprocess.run([sys.executable, "-m", "fastmerge", *plain], env=our_environment(), check=True)
        different, total = compare(self.ours, self.plain)
        if different or not total:
            row.problems.append(f"{different} of {total} values are not those of fastmerge merge --numerics mergekit")
        if row.peer:
            different, total = compare(self.ours, self.theirs)
            row.differing = different / total
        clean(self.ours, self.options.pause)
        command = [sys.executable, __file__, "--split", str(file), str(self.ours)]
        told = subprocess.run(command, env=our_environment(), check=True, capture_output=True, text=True)
        row.split = json.loads(told.stdout.splitlines()[-1])
        for out in (self.theirs, self.ours, self.plain):
            clean(out, 0)
        return row


def split(file: str, out: str) -> dict[str, float]:
    """Merge with fastmerge inside mergekit, and time mergekit's reading and writing from within."""
    began = time.perf_counter()
    from fastmerge.integrations import mergekit

    mergekit.enable()
    from mergekit.io.tasks import LoadTensor
    from mergekit.io.tensor_writer import TensorWriter
    from mergekit.scripts.run_yaml import main as peer

    seconds = {"reading": 0.0, "writing": 0.0}

    def timed(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*given, **named)
            finally:
                seconds[kind] += time.perf_counter() - start

        return call

    for kind, owner, name in (
        ("reading", LoadTensor, "execute"),
        ("writing", TensorWriter, "save_tensor"),
        ("writing", TensorWriter, "finalize"),
    ):
        setattr(owner, name, timed(kind, getattr(owner, name)))
    started = time.perf_counter()
    mergekit.reset_tally()
    peer.main([file, out, "--quiet"], standalone_mode=False)
    ended = time.perf_counter()
    kernels = mergekit.tally().seconds
    return {
        "start_up": started - began,
        "kernels": kernels,
        **seconds,
        "other": ended - started - kernels - sum(seconds.values()),
        "total": ended - began,
    }


def render(rows: list[dict[str, Any]]) -> str:
    """The rows for people."""
    lines = []
    for row in rows:
        if row["check"] != "green":
            lines.append(f"{row['method']}: RED: {'; '.join(row['problems'])}")
            continue
        line = f"{row['method']}: fastmerge-yaml {row['seconds']:.1f} s"
        if "peer_seconds" in row:
            bar = row["bar"]
            verdict = "" if bar is None else f" (>= {bar:g}) {'ok' if row['bar_met'] else 'MISSED'}"
            line += f", mergekit-yaml {row['peer_seconds']:.1f} s: {row['times_the_peer']:.1f} times{verdict}"
            line += f"; {row['differing']:.2%} of the values differ"
        parts = ", ".join(f"{name.replace('_', '-')} {value:.2f}" for name, value in row["split"].items())
        lines += [line, f"    of another run, seconds: {parts}"]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; 0 when every output was right (bars that are missed are said, not failed)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--split", nargs=2, metavar=("CONFIG", "OUT"), help="merge once and print where the time went")
    parser.add_argument("--family", type=Path, default=None, help="folder of the family; made when absent")
    parser.add_argument("--work", type=Path, default=None, help="folder for outputs, on the disk to measure")
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--methods", nargs="+", choices=CASES, default=["ties", "della"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--pause", type=float, default=8.0, help="seconds before each run")
    parser.add_argument("--no-peer", action="store_true", help="leave mergekit-yaml out")
    parser.add_argument("--json", type=Path, default=None, help="file for the figures")
    options = parser.parse_args(arguments)
    if options.split:
        print(json.dumps(split(*options.split)))
        return 0
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    root = Path(__file__).resolve().parent / "data"
    folder = options.family or root / f"family-{options.scale}-{options.dtype}"
    family = make_family(folder, scale=options.scale, dtype=options.dtype)
    parent = options.work or root
    parent.mkdir(parents=True, exist_ok=True)
    warm(family)
    with tempfile.TemporaryDirectory(dir=parent) as work:
        bench = Bench(family, options, Path(work))
        rows = [bench.method(name).figures() for name in options.methods]
    print(render(rows))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=2) + "\n")
    return 0 if all(row["check"] == "green" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
