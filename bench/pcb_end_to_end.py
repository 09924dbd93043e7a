"""PCB-Merging of the family as a whole process: the first merge, and the next one, which knows the statistics already.

    python bench/pcb_end_to_end.py --family FOLDER --work FOLDER --json bench/data/pcb_end_to_end.json
    python bench/pcb_end_to_end.py --scale tiny --repeats 1 --pause 0       # a smoke test of the benchmark itself

As in end_to_end.py each run alternates with the limit of the machine. Every output is held against an independent
computation: numpy, the whole model as one vector, sorted. Its exp and tanh are others than ours, so a few values that
the last bit of a score decides may differ; a share above 1e-4 is red, and a red row has no speed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from end_to_end import RESIDENT_ALLOWANCE, START_UP, _Folder, clean, fastmerge_command, parse_size, run_limit, warm
from make_family import DTYPES, SCALES, Family, make_family
from measure import Run, environment, run_measured

BARS = {"first": 4.0, "again": 1.6}
"""Times (limit + START_UP)."""
PASSES = {"vision_es": 3, "vision": 3, "script": 3, "nlp": 3, "paper": 4}
WEIGHTS = {"first": (1.0, 0.7, 0.4), "again": (0.5, 0.9, 1.1)}
DENSITY = 0.1
CLIPPED = {"vision_es": 0.01, "vision": 0.01, "nlp": 0.01, "script": 0.0001}
DIFFERENT = 1e-4
"""The share of values that may differ."""
STRETCH = 1 << 24


class Expected:
    """The merge by the released code's formula, over the whole model at once."""

    def __init__(self, family: Family, variant: str) -> None:
        base = _Folder(family.base)
        models = [_Folder(folder) for folder in family.models]
        self.variant = variant
        self.base, self.models = base, models
        self.names = list(base.shapes())
        rows = [np.concatenate([self._delta(model, name) for name in self.names]) for model in models]
        numel = rows[0].size
        self.clip = [self._bounds(row, variant) for row in rows]
        self.edges = []
        place = min(max(int(numel * (1 - DENSITY)), 0), numel - 1)
        for i in range(len(rows)):
            score = np.empty_like(rows[i])
            for begin in range(0, numel, STRETCH):
                part = slice(begin, begin + STRETCH)
                score[part] = self._scores([row[part] for row in rows])[1][i]
            score.partition(place)
            self.edges.append((score[place], score[place:].max()))

    def _delta(self, model: _Folder, name: str) -> np.ndarray:
        return (model.read(name).float() - self.base.read(name).float()).numpy().ravel()

    @staticmethod
    def _bounds(row: np.ndarray, variant: str) -> tuple[np.float32, np.float32]:
        q, numel = CLIPPED[variant], row.size
        places = [min(max(place, 0), numel - 1) for place in (int(numel * q), int(numel * (1 - q) - 1))]
        ordered = np.abs(row)
        ordered.partition(places)
        return ordered[places[0]], ordered[places[1]]

    def _scores(self, deltas: list[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """What is merged of each row, and its scores."""
        count = len(deltas)
        clipped, units, scores = [], [], []
        for delta, (low, high) in zip(deltas, self.clip, strict=True):
            magnitude = np.clip(np.abs(delta), low, high)
            scaled = (magnitude - low) / (high - low) if high > low else np.zeros_like(delta)
            units.append(np.sign(delta) * scaled)
            clipped.append(np.sign(delta) * magnitude)
        for delta, unit in zip(deltas, units, strict=True):
            if self.variant == "vision_es":
                inter = sum((np.tanh(unit * other) for other in units[1:]), np.tanh(unit * units[0]))
            else:
                together = units if self.variant == "vision" else deltas
                inter = np.tanh(delta * sum(together[1:], together[0]))
            scores.append(np.exp(count * unit**2 - np.float32(count / 2)) * inter)
        return clipped, scores

    def problems(self, out: Path, weights: tuple[float, ...], dtype: torch.dtype) -> list[str]:
        """What is wrong with the merge in `out`; empty when nothing is."""
        folder = _Folder(out)
        different = total = 0
        for name in self.names:
            clipped, scores = self._scores([self._delta(model, name) for model in self.models])
            above = below = np.float32(0)
            for i, (c, b) in enumerate(zip(clipped, scores, strict=True)):
                start, most = self.edges[i]
                s = (np.clip(b, start, most) - start) / (most - start)
                above = above + c * s * np.float32(weights[i % len(weights)])
                below = below + s
            merged = self.base.read(name).float().reshape(-1) + torch.from_numpy(above / np.maximum(below, 1e-12))
            actual = folder.read(name).reshape(-1)
            if actual.dtype != dtype or actual.numel() != merged.numel():
                return [f"{name} is {actual.dtype} of {actual.numel()} elements"]
            # Up to one step of the output's dtype is rounding.
            step = torch.finfo(dtype).eps * merged.abs() + 1e-8
            different += int(((actual.float() - merged).abs() > step).sum())
            total += merged.numel()
        if different > max(DIFFERENT * total, 1):
            return [f"{different} of {total} values are wrong"]
        print(f"{different} of {total} values differ by more than rounding")
        return []


def config(family: Family, variant: str, weights: tuple[float, ...], dtype: str) -> dict[str, object]:
    """The merge as fastmerge reads it."""
    return {
        "merge_method": "pcb",
        "base_model": str(family.base),
        "models": [
            {"model": str(folder), "parameters": {"weight": weights[number % len(weights)]}}
            for number, folder in enumerate(family.models)
        ],
        "parameters": {"density": DENSITY, "variant": variant},
        "dtype": dtype,
    }


def merge(file: Path, out: Path, kept: Path, budget: str | None) -> Run:
    """One merge as a process of its own."""
    command = [*fastmerge_command(), "merge", str(file), str(out), "--json", "--statistics", str(kept)]
    return run_measured(command + ([] if budget is None else ["--memory-budget", budget]))


def main() -> int:
    """0 when every output was right; bars that are missed are said, not failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--family", type=Path, default=None, help="folder of the family; made when absent")
    parser.add_argument("--work", type=Path, default=None, help="folder for outputs, on the disk to measure")
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--variants", nargs="+", choices=PASSES, default=["vision_es"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--pause", type=float, default=8.0)
    parser.add_argument("--budgets", nargs="*", default=["256MiB", "1GiB", "4GiB"])
    parser.add_argument("--unchecked", action="store_true", help="leave out the check, which takes minutes and 12 GB")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()

    root = Path(__file__).resolve().parent / "data"
    family = make_family(
        options.family or root / f"family-{options.scale}-{options.dtype}", scale=options.scale, dtype=options.dtype
    )
    parent = options.work or root
    parent.mkdir(parents=True, exist_ok=True)
    warm(family)
    rows = []
    with tempfile.TemporaryDirectory(dir=parent, prefix="pcb-") as folder:
        work = Path(folder)
        for variant in options.variants:
            rows.append(measure(family, variant, options, work))
            print(json.dumps({key: value for key, value in rows[-1].items() if key != "reports"}, indent=1), flush=True)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=2) + "\n")
    return 0 if all(not row["problems"] for row in rows) else 1


def measure(family: Family, variant: str, options: argparse.Namespace, work: Path) -> dict[str, object]:
    """Both merges of one variant, in alternation with the limit; the last outputs are checked."""
    out, kept = work / "output", work / "statistics.json"
    files = {}
    for which, weights in WEIGHTS.items():
        files[which] = work / f"{which}.yml"
        files[which].write_text(json.dumps(config(family, variant, weights, options.dtype)))
    seconds: dict[str, list[float]] = {"limit": [], "first": [], "again": []}
    reports: dict[str, dict[str, object]] = {}
    peaks: dict[str, float] = {}
    digests: dict[str, set[str]] = {which: set() for which in WEIGHTS}
    problems: list[str] = []

    def ran(which: str, budget: str | None = None, timed: bool = False) -> Run:
        run = merge(files[which], out, kept, budget)
        if run.status:
            raise SystemExit(f"fastmerge failed: {run.stderr.strip()[-500:]}")
        report = json.loads(run.stdout)
        if timed:
            reports[which] = report
        digests[which].add(str(report["digest"]))
        return run

    for _ in range(options.repeats):
        clean(out, options.pause)
        seconds["limit"].append(run_limit(family.folders, family.base, out))
        kept.unlink(missing_ok=True)
        for which in WEIGHTS:
            clean(out, options.pause)
            seconds[which].append(ran(which, timed=True).seconds)
    for budget in options.budgets:
        kept.unlink(missing_ok=True)
        clean(out, 0)
        peaks[budget] = ran("first", budget).peak_bytes / 1e6
    expected = None if options.unchecked or variant == "paper" else Expected(family, variant)
    for which, weights in WEIGHTS.items():
        clean(out, 0)
        ran(which)
        if expected is not None:
            problems += expected.problems(out, weights, DTYPES[options.dtype][0])
        if len(digests[which]) != 1:
            problems.append(f"{which}: the same merge gave {len(digests[which])} digests")
    clean(out, 0)
    row: dict[str, object] = {"variant": variant, "problems": problems, "reports": reports}
    if problems:
        return row
    limit = statistics.median(seconds["limit"])
    row |= {"limit": limit, "checked": expected is not None, "peak_megabytes": peaks}
    row["peak_bar_met"] = all(peak * 1e6 <= parse_size(budget) + RESIDENT_ALLOWANCE for budget, peak in peaks.items())
    for which, bar in BARS.items():
        middle = statistics.median(seconds[which])
        ratio = middle / (limit + START_UP)
        row[which] = {
            "seconds": middle,
            "seconds_all": seconds[which],
            "ratio": ratio,
            "bar": bar,
            "met": ratio <= bar,
            "passes": reports[which]["passes"],
            "stages": reports[which]["seconds"],
        }
    first = reports["first"]
    row["passes_met"] = first["passes"] <= PASSES[variant]  # type: ignore[operator]
    row["gigabytes_read"] = first["bytes_read"] / 1e9  # type: ignore[operator]
    return row


if __name__ == "__main__":
    sys.exit(main())
