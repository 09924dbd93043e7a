"""FR-Merging of the family as a whole process, in turns with the limit of the machine.

    python bench/fr_end_to_end.py --json bench/data/fr_end_to_end.json
    python bench/fr_end_to_end.py --scale tiny --repeats 1 --pause 0       # a smoke test of the benchmark itself

As in end_to_end.py each run alternates with the limit. Sampled tensors are held against the definition: numpy's
Fourier transform in float64 of the deltas' weighted sum, times the mask. Up to one step of the output's dtype is
rounding. The peak of memory may be the budget, what `--dry-run` states for the largest tensor, and what Python and
torch take.
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
from end_to_end import (
    RESIDENT_ALLOWANCE,
    START_UP,
    _Folder,
    clean,
    fastmerge_command,
    parse_size,
    run_limit,
    sample,
    warm,
)
from make_family import DTYPES, SCALES, Family, make_family
from measure import Run, environment, run_measured

BAR = 6.0
"""Times (limit + START_UP)."""
RATIO = 0.1
WEIGHTS = (0.7, 0.5, 0.4)
FILTERED = ("self_attn", "mlp")


class Expected:
    """Sampled tensors of the merge, from the definition."""

    def __init__(self, family: Family) -> None:
        base = _Folder(family.base)
        models = [_Folder(folder) for folder in family.models]
        self.shapes = base.shapes()
        self.tensors: dict[str, np.ndarray] = {}
        for name in sample(self.shapes):
            start = base.read(name).double().numpy()
            total = np.zeros_like(start)
            for number, model in enumerate(models):
                total += WEIGHTS[number % len(WEIGHTS)] * (model.read(name).double().numpy() - start)
            if total.ndim == 2 and any(part in name for part in FILTERED):
                total = np.fft.ifft2(np.fft.fft2(total) * self._mask(*total.shape)).real
            self.tensors[name] = start + total

    @staticmethod
    def _mask(height: int, width: int) -> np.ndarray:
        y, x = np.arange(height), np.arange(width)
        squares = np.minimum(y, height - y)[:, None] ** 2 + np.minimum(x, width - x)[None] ** 2
        return squares >= (RATIO * min(height, width) / 2) ** 2

    def problems(self, out: Path, dtype: torch.dtype) -> list[str]:
        """What is wrong with the merge in `out`; empty when nothing is."""
        folder = _Folder(out)
        if folder.shapes() != self.shapes:
            return ["tensors or shapes are not those of the base"]
        found = []
        for name, expected in self.tensors.items():
            actual = folder.read(name)
            # A step where the value lies, and what float32 leaves of the tensor's largest delta.
            step = torch.finfo(dtype).eps * np.abs(expected) + 1e-6 * np.abs(expected).max()
            wrong = int((np.abs(actual.double().numpy() - expected) > step).sum())
            if actual.dtype != dtype or wrong:
                found.append(f"{name}, {actual.dtype}: {wrong} of {expected.size} values are wrong")
        return found


def config(family: Family, dtype: str) -> dict[str, object]:
    """The merge as fastmerge reads it."""
    models = [
        {"model": str(folder), "parameters": {"weight": WEIGHTS[number % len(WEIGHTS)]}}
        for number, folder in enumerate(family.models)
    ]
    return {
        "merge_method": "fr",
        "base_model": str(family.base),
        "models": models,
        "parameters": {"ratio": RATIO},
        "dtype": dtype,
    }


def merge(file: Path, out: Path, *options: str) -> Run:
    """One merge as a process of its own, which must end well."""
    run = run_measured([*fastmerge_command(), "merge", str(file), str(out), "--json", *options])
    if run.status:
        raise SystemExit(f"fastmerge failed: {run.stderr.strip()[-500:]}")
    return run


def measure(family: Family, options: argparse.Namespace, work: Path) -> dict[str, object]:
    """The merge in turns with the limit; its outputs are checked, and have one digest whatever the budget is."""
    file, out = work / "fr.yml", work / "output"
    file.write_text(json.dumps(config(family, options.dtype)))  # JSON is YAML
    workspace = json.loads(merge(file, out, "--dry-run").stdout)["workspace"]
    limits, seconds, digests, report = [], [], set(), {}
    for _ in range(options.repeats):
        clean(out, options.pause)
        limits.append(run_limit(family.folders, family.base, out))
        clean(out, options.pause)
        run = merge(file, out)
        seconds.append(run.seconds)
        report = json.loads(run.stdout)
        digests.add(report["digest"])
    problems = Expected(family).problems(out, DTYPES[options.dtype][0])
    peaks = {}
    for budget in options.budgets:
        clean(out, 0)
        run = merge(file, out, "--memory-budget", budget)
        peaks[budget] = run.peak_bytes
        digests.add(json.loads(run.stdout)["digest"])
    clean(out, 0)
    if len(digests) != 1:
        problems.append(f"the same merge gave {len(digests)} digests")
    if problems:
        return {"problems": problems}
    middle, limit = statistics.median(seconds), statistics.median(limits)
    ratio = middle / (limit + START_UP)
    return {
        "problems": [],
        "models": len(family.models),
        "seconds": middle,
        "seconds_all": seconds,
        "limit": limit,
        "limit_all": limits,
        "ratio": ratio,
        "bar": BAR,
        "met": ratio <= BAR,
        "workspace": workspace,
        "peak_bytes": peaks,
        "peak_bar_met": {
            budget: peak <= parse_size(budget) + workspace + RESIDENT_ALLOWANCE for budget, peak in peaks.items()
        },
        "stages": report["seconds"],
    }


def main() -> int:
    """0 when every output was right; bars that are missed are said, not failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--family", type=Path, default=None, help="folder of the family; made when absent")
    parser.add_argument("--work", type=Path, default=None, help="folder for outputs, on the disk to measure")
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--pause", type=float, default=8.0, help="seconds before each run")
    parser.add_argument("--budgets", nargs="*", default=["256MiB", "1GiB", "4GiB"], help="memory budgets for the peaks")
    parser.add_argument("--json", type=Path, default=None, help="file for the figures")
    options = parser.parse_args()

    root = Path(__file__).resolve().parent / "data"
    place = options.family or root / f"family-{options.scale}-{options.dtype}"
    family = make_family(place, scale=options.scale, dtype=options.dtype)
    parent = options.work or root
    parent.mkdir(parents=True, exist_ok=True)
    warm(family)
    with tempfile.TemporaryDirectory(dir=parent, prefix="fr-") as work:
        row = measure(family, options, Path(work))
    print(json.dumps(row, indent=1))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"environment": environment(), "rows": [row]}, indent=2) + "\n")
    return 1 if row["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
