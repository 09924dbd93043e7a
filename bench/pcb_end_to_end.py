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


class Expected:
    """The merge by the released code's formula, over the whole model at once."""

    def __init__(self, family: Family, variant: str) -> None:
        base = _Folder(family.base)
        models = [_Folder(folder) for folder in family.models]
        shapes = base.shapes()
        self.names = list(shapes)
        self.sizes = [int(np.prod(shapes[name])) for name in self.names]
        self.base = {name: base.read(name) for name in self.names}
        rows = [
            np.concatenate(
                [(model.read(name).float() - self.base[name].float()).numpy().ravel() for name in self.names]
            )
            for model in models
        ]
        numel, count = rows[0].size, len(rows)
        clip = [self._bounds(row, variant) for row in rows]
        self.c = []
        units = []
        for row, (low, high) in zip(rows, clip, strict=True):
            magnitude = np.clip(np.abs(row), low, high)
            scaled = (magnitude - low) / (high - low) if high > low else np.zeros_like(row)
            units.append(np.sign(row) * scaled)
            self.c.append(np.sign(row) * magnitude)
        self.s = []
        for i, row in enumerate(rows):
            if variant == "vision_es":
                inter = np.zeros_like(row)
                for unit in units:
                    inter += np.tanh(units[i] * unit)
            else:
                total = sum((units if variant == "vision" else rows)[1:], (units if variant == "vision" else rows)[0])
                inter = np.tanh(row * total)
            score = np.exp(count * units[i] ** 2 - count / 2) * inter
            place = min(max(int(numel * (1 - DENSITY)), 0), numel - 1)
            start, most = np.partition(score, place)[place], score.max()
            self.s.append((np.clip(score, start, most) - start) / (most - start))

    @staticmethod
    def _bounds(row: np.ndarray, variant: str) -> tuple[np.float32, np.float32]:
        q, numel = CLIPPED[variant], row.size
        places = [min(max(place, 0), numel - 1) for place in (int(numel * q), int(numel * (1 - q) - 1))]
        ordered = np.partition(np.abs(row), places)
        return ordered[places[0]], ordered[places[1]]

    def problems(self, out: Path, weights: tuple[float, ...], dtype: torch.dtype) -> list[str]:
        """What is wrong with the merge in `out`; empty when nothing is."""
        folder = _Folder(out)
        begin = different = total = 0
        for name, size in zip(self.names, self.sizes, strict=True):
            part = slice(begin, begin + size)
            begin += size
            weight = [weights[i % len(weights)] for i in range(len(self.c))]
            above = sum(np.float32(w) * (c[part] * s[part]) for w, c, s in zip(weight, self.c, self.s, strict=True))
            below = np.maximum(sum(s[part] for s in self.s), np.float32(1e-12))
            merged = self.base[name].float().reshape(-1) + torch.from_numpy(np.asarray(above / below, dtype=np.float32))
            actual = folder.read(name).reshape(-1)
            if actual.dtype != dtype or actual.numel() != size:
                return [f"{name} is {actual.dtype} of {actual.numel()} elements"]
            # Up to one step of the output's dtype is rounding.
            step = torch.finfo(dtype).eps * merged.abs() + 1e-8
            different += int(((actual.float() - merged).abs() > step).sum())
            total += size
        if different > max(DIFFERENT * total, 1):
            return [f"{different} of {total} values are wrong"]
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
    parser.add_argument("--unchecked", action="store_true", help="leave out the check, which takes minutes and 16 GB")
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

    def ran(which: str, budget: str | None = None) -> Run:
        run = merge(files[which], out, kept, budget)
        if run.status:
            raise SystemExit(f"fastmerge failed: {run.stderr.strip()[-500:]}")
        reports[which] = json.loads(run.stdout)
        digests[which].add(str(reports[which]["digest"]))
        return run

    for _ in range(options.repeats):
        clean(out, options.pause)
        seconds["limit"].append(run_limit(family.folders, family.base, out))
        kept.unlink(missing_ok=True)
        for which in WEIGHTS:
            clean(out, options.pause)
            seconds[which].append(ran(which).seconds)
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
