"""What was measured on GPUs, as tables, as a picture, and as what "auto" prefers; from the raw JSON of bench/gpu.py.

    python bench/report.py                             # the tables, of everything under bench/results
    python bench/report.py --write                     # into README.md, docs/benchmarks.md and backends/preferences.py
    python bench/report.py --plot roofline.png RESULTS.json ...

A file is one backend's run on one machine. A row whose check was red has no figure and is told as such. Where CUDA and
Triton were measured on the same kind of GPU, the faster is preferred for each function that the two runs compare; one
that was wrong in any case is not, and whether CUDA is as much faster as it is meant to be is told behind the table.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
PREFERENCES = ROOT / "fastmerge" / "backends" / "preferences.py"
PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
BEGIN, END = "<!-- gpu: begin -->", "<!-- gpu: end -->"
NOTHING = "No GPU has run these kernels yet: `bench/gpu_check.sh` is ready for one, and its figures will stand here."

FUNCTIONS = {
    "abs_histogram": ("abs_histogram",),
    "kth_magnitude": ("kth_magnitude",),
    "topk_mask": ("topk_mask", "tie_counts"),
    "consensus_apply": ("consensus_apply",),
    "consensus_merge": ("magnitude_bounds",),
    "consensus_merge_many": ("magnitude_bounds_many", "consensus_apply_many"),
    "pcb_merge": ("pcb_apply", "pcb_scores", "pcb_score_bounds", "pcb_window_", "pcb_histogram"),
    "highpass": ("highpass",),
    "expert_apply_": ("expert_apply_", "expert_revert_"),
}
"""Functions of a backend whose speed a benchmark tells, where the others are not compared alone."""

BESIDE_TRITON = ("abs_histogram", "topk_mask", "consensus_merge_many")
"""Benchmarks by which CUDA's kernels are worth having beside Triton's: where they are `BESIDE_BAR` times as fast."""
BESIDE_BAR = 1.15

NEEDED = {"environment", "backend", "limits_bytes_per_s", "rows"}
Report = dict[str, Any]


class ReportError(Exception):
    """A file that is not what bench/gpu.py writes; the message says which and why."""


def read(path: Path) -> Report:
    """One run.

    Raises:
        ReportError: the file is not JSON, or lacks what a run has.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReportError(f"{path}: {error}") from error
    if not isinstance(report, dict) or not NEEDED.issubset(report):
        raise ReportError(f"{path}: not a report of bench/gpu.py; make it with --json")
    for row in report["rows"]:
        if not {"benchmark", "case", "problem"} <= set(row):
            raise ReportError(f"{path}: a row lacks its benchmark, its case, or whether it was right")
        if row["problem"] is not None and "seconds" in row:
            raise ReportError(f"{path}: {row['benchmark']}, {row['case']}: was wrong, and has a figure nevertheless")
    return report


def found(folder: Path = RESULTS) -> list[Path]:
    """The reports that were kept; what lies under `local` is of the moment."""
    return sorted(path for path in folder.glob("*/*.json") if path.parent.name != "local" and _is_report(path))


def _is_report(path: Path) -> bool:
    try:
        return NEEDED.issubset(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        return False


def gpu_of(report: Report) -> str:
    """The GPU's name."""
    return str(report["environment"].get("gpu", "no GPU"))


def rows_of(reports: Iterable[Report]) -> dict[tuple[str, str], dict[str, Report]]:
    """(benchmark, case) -> backend -> row; of several runs of a backend the last."""
    result: dict[tuple[str, str], dict[str, Report]] = {}
    for report in reports:
        for row in report["rows"]:
            result.setdefault((row["benchmark"], row["case"]), {})[report["backend"]] = row
    return result


def _cell(row: Report | None) -> str:
    if row is None:
        return ""
    if row["problem"] is not None:
        return "wrong"
    text = f"{row['gb_per_s']:,.0f} GB/s, {row['fraction']:.2f}"
    if row.get("bar") is not None:
        text += f" (bar {row['bar']:g}: {'met' if row['bar_met'] else 'missed'})"
    for name in ("torch_topk", "torch_sort", "eager"):
        if isinstance(peer := row.get(name), dict):
            text += f"; {peer['times']:.0f} x {name.replace('_', '.')}"
    if isinstance(alone := row.get("one_tensor"), dict):
        text += f"; {alone['times']:.2f} x one tensor, {alone['whole_times']:.2f} x with the host's part"
        text += f", {row['plain']['whole_times']:.1f} x not prepared"
    if isinstance(other := row.get("transforms"), dict):
        text += f"; {other['times']:.2f} x rfft2 and irfft2"
    if isinstance(row.get("within"), dict):
        text += f"; {row['seconds'] * 1e3:.2f} ms"
    return text


def table(reports: list[Report]) -> str:
    """Everything that was measured, by GPU: GB/s and the fraction of the limit that was measured in the same run."""
    if not reports:
        return NOTHING
    parts = []
    for gpu in dict.fromkeys(map(gpu_of, reports)):
        those = [report for report in reports if gpu_of(report) == gpu]
        names = list(dict.fromkeys(report["backend"] for report in those))
        limits = those[-1]["limits_bytes_per_s"]
        told = ", ".join(f"{name.replace('_', ' ')} {rate / 1e9:,.0f} GB/s" for name, rate in limits.items())
        parts.append(f"**{gpu}** ({told})\n")
        parts.append(f"| benchmark | case | {' | '.join(names)} |")
        parts.append("|---|---|" + "---|" * len(names))
        for (benchmark, case), by in rows_of(those).items():
            parts.append(f"| {benchmark} | {case} | {' | '.join(_cell(by.get(name)) for name in names)} |")
        if {"cuda", "triton"}.issubset(names):
            parts += ["", beside(those)]
        parts.append("")
    return "\n".join(parts).rstrip()


@dataclass
class Duel:
    """One benchmark by CUDA and by Triton on one kind of GPU, over all cases that both were to run."""

    times: list[float] = field(default_factory=list)
    """How many times as fast CUDA was, where both were right."""
    wrong: set[str] = field(default_factory=set)
    """Who was wrong, or died, where the other was right."""

    @property
    def mean(self) -> float:
        """The geometric mean."""
        return math.prod(self.times) ** (1 / len(self.times))


def duels(reports: list[Report]) -> dict[str, Duel]:
    """Benchmark -> what became of it, in runs on one kind of GPU."""
    result: dict[str, Duel] = {}
    # What a part did not come to, because it died.
    dead = {
        (report["backend"], row.get("part"))
        for report in reports
        for row in report["rows"]
        if row["case"] == "-" and row["problem"] is not None
    }
    for (benchmark, _), by in rows_of(reports).items():
        duel = result.setdefault(benchmark, Duel())
        right = {name: row for name, row in by.items() if row["problem"] is None and name in ("cuda", "triton")}
        if len(right) == 2:
            duel.times.append(right["triton"]["seconds"] / right["cuda"]["seconds"])
        for one, other in (("cuda", "triton"), ("triton", "cuda")):
            if other in right and one not in right and (one in by or (one, right[other].get("part")) in dead):
                duel.wrong.add(one)
    return result


def beside(reports: list[Report]) -> str:
    """Whether CUDA's kernels are as much faster than Triton's as they are meant to be, as a sentence."""
    found = duels(reports)
    told = []
    for benchmark in BESIDE_TRITON:
        duel = found.get(benchmark, Duel())
        if duel.wrong:
            text = f"{' and '.join(sorted(duel.wrong))} wrong"
        elif duel.times:
            met = "met" if duel.mean >= BESIDE_BAR else "missed"
            text = f"{duel.mean:.2f} ({min(duel.times):.2f} to {max(duel.times):.2f}; bar {BESIDE_BAR:g}: {met})"
        else:
            text = "not measured by both"
        told.append(f"`{benchmark}` {text}")
    return f"CUDA's speed in Triton's, geometric mean of cases: {', '.join(told)}."


def faster(reports: list[Report]) -> dict[str, dict[str, str]]:
    """Compute capability -> function -> the backend whose benchmarks of it took less time, geometric mean of cases.

    One that was wrong where the other was right is not taken; where each was, Triton is.
    """
    result: dict[str, dict[str, str]] = {}
    for capability in dict.fromkeys(report["environment"].get("gpu_capability", "") for report in reports):
        those = [report for report in reports if report["environment"].get("gpu_capability", "") == capability]
        found: dict[str, list[Duel]] = {}
        for benchmark, duel in duels(those).items():
            for function in FUNCTIONS.get(benchmark, ()):
                found.setdefault(function, []).append(duel)
        chosen = {}
        for function, each in sorted(found.items()):
            wrong = set().union(*(duel.wrong for duel in each))
            times = [number for duel in each for number in duel.times]
            if wrong or times:
                slower = math.prod(times) < 1.0 and "triton" not in wrong
                chosen[function] = "triton" if "cuda" in wrong or slower else "cuda"
        if capability and chosen:
            result[capability] = chosen
    return result


def put(page: Path, text: str, begin: str = BEGIN, end: str = END) -> None:
    """Write between the marks of a page."""
    old = page.read_text(encoding="utf-8")
    before, mark, rest = old.partition(begin)
    if mark:
        page.write_text(f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def prefer(chosen: dict[str, dict[str, str]], path: Path = PREFERENCES) -> None:
    """Write what "auto" goes by."""
    lines = ["FASTER: dict[str, dict[str, str]] = {"]
    for capability, functions in sorted(chosen.items()):
        lines.append(f'    "{capability}": {{')
        lines += [f'        "{function}": "{name}",' for function, name in functions.items()]
        lines.append("    },")
    lines.append("}")
    text = "\n".join(lines) if chosen else "FASTER: dict[str, dict[str, str]] = {}"
    old = path.read_text(encoding="utf-8")
    start = old.index("FASTER: ")
    stop = old.index('\n"""', start)
    path.write_text(old[:start] + text + old[stop:], encoding="utf-8")


def plot(reports: list[Report], path: Path) -> None:
    """Each row's bytes per second below the limit that it is held against, one panel for each GPU and backend."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(len(reports), 1, figsize=(9, 0.8 + 3.4 * len(reports)), squeeze=False)
    for panel, report in zip(panels[:, 0], reports):
        rows = [row for row in report["rows"] if row["problem"] is None and row.get("bytes")]
        for limit, rate in report["limits_bytes_per_s"].items():
            if any(row["limit"] == limit for row in rows):
                panel.axhline(rate / 1e9, linestyle="--", linewidth=0.8, color="grey")
                panel.text(0, rate / 1e9, limit.replace("_", " "), va="bottom", fontsize=7, color="grey")
        labels = [f"{row['benchmark']}\n{row['case']}" for row in rows]
        panel.bar(range(len(rows)), [row["gb_per_s"] for row in rows], color="tab:blue", width=0.7)
        panel.set_xticks(range(len(rows)), labels, rotation=60, ha="right", fontsize=5)
        panel.set_yscale("log")
        panel.set_ylabel("GB/s")
        panel.set_title(f"{gpu_of(report)}, backend {report['backend']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(given: list[str] | None = None) -> int:
    """Print the tables; write what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="by default all under bench/results")
    parser.add_argument("--write", action="store_true", help="into the pages, and what auto prefers")
    parser.add_argument("--plot", type=Path, help="a picture to write")
    options = parser.parse_args(given)
    try:
        reports = [read(path) for path in options.files or found()]
    except ReportError as error:
        print(error, file=sys.stderr)
        return 1
    print(table(reports))
    if options.write:
        for page in PAGES:
            put(page, table(reports))
        prefer(faster(reports))
    if options.plot:
        if not reports:
            print("there is nothing to draw", file=sys.stderr)
            return 1
        plot(reports, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
