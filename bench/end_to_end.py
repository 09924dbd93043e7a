"""Whole merges against the limit of the machine and against the peer.

"The limit" is what no merge can beat: read every input (`cat` of them to /dev/null, out of the page cache), then
write an output of the base's size to the output's disk and flush it (`cp`, `sync` of it; a merge flushes too).
fastmerge runs as a whole process, start-up included, and alternates with the limit: disks and hosts drift by a factor
of three in minutes, so only figures taken in turns can be compared. Each side runs after the previous output was
removed, `sync` and a pause. Medians are reported. The peer, `mergekit-yaml`, runs once for each method (--peer).

Every run is held against an independent computation of sampled tensors: independent.py, bit by bit, or mergekit's own
function in float64 for methods of other formulas. Whatever the memory budget, the digest must be the same. A row whose
check is red reports no speed.

    python bench/end_to_end.py --peer --json bench/data/end_to_end.json
    python bench/end_to_end.py --methods ties --repeats 3 --pause 2
    python bench/end_to_end.py --methods slerp sce ram --repeats 3    # by default the first five alone
    python bench/end_to_end.py --scale tiny --repeats 1 --pause 0       # a smoke test of the benchmark itself
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from make_family import DTYPES, SCALES, Family, make_family
from measure import Run, environment, run_measured
from peers import mergekit_cli

if TYPE_CHECKING:
    import torch

START_UP = 1.5
"""Seconds granted for starting Python and importing torch, added to the limit."""

RESIDENT_ALLOWANCE = 400_000_000
"""Bytes of resident memory granted above the memory budget."""

UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}

LARGE = 8_000_000
"""Elements from which on a tensor is large: only one of these is checked, for each takes seconds."""


@dataclass(frozen=True)
class Case:
    """A method as it is benchmarked, and what the project promises for it."""

    density: float | None
    weights: tuple[float, ...]
    limit_bar: float | None
    peer_bar: float | None
    parameters: Mapping[str, object] = field(default_factory=dict)
    count: int | None = None
    """How many of the family's models are merged; None: all."""
    base: bool = True
    rounded: float | None = None
    """None: outputs are compared with independent.py bit by bit. Otherwise with mergekit's function in float64: by how
    many units in the last place (of the largest input there, in the output's dtype) a value may differ."""

    def weight(self, model: int) -> float:
        """The weight of the model at this place."""
        return self.weights[model % len(self.weights)]


CASES = {
    "ties": Case(0.5, (1.0, 0.7, 0.4), 1.5, 30.0),
    "dare_ties": Case(0.5, (0.5, 0.3, 0.2), 1.6, None),
    "task_arithmetic": Case(None, (0.5, 0.3, 0.2), 1.6, None),
    "linear": Case(None, (0.5, 0.25, 0.25), 1.6, None, base=False),
    "della": Case(0.5, (1.0, 0.7, 0.4), None, 20.0),
}

OTHERS = {
    "passthrough": Case(None, (), 1.6, None, {"scale": 0.5}, count=1, base=False, rounded=0.6),
    "nearswap": Case(None, (), 1.6, None, {"t": 1e-4}, count=1, rounded=0.6),
    "ram": Case(None, (), 1.6, None, {"epsilon": 1e-5}, rounded=0.6),
    "ramplus_tl": Case(None, (), 2.0, None, {"epsilon": 1e-5, "r": 0.2, "alpha": 0.2}, rounded=0.6),
    "slerp": Case(None, (), 2.0, None, {"t": 0.3}, count=1, rounded=0.6),
    "nuslerp": Case(None, (1.0, 0.5), 2.0, None, count=2, base=False, rounded=0.6),
    "multislerp": Case(None, (1.0, 0.7, 0.4), 2.0, None, rounded=0.6),
    "karcher": Case(None, (), 2.0, None, base=False, rounded=0.6),
    "model_stock": Case(None, (), 2.0, None, rounded=0.6),
    "sce": Case(None, (), 2.0, None, {"select_topk": 0.5}, rounded=0.6),
    "arcee_fusion": Case(None, (), 2.0, None, count=1, rounded=0.6),
}
"""Methods whose formula is another one."""

CASES |= OTHERS

OPEN = 2e-3
"""The share of a tensor's values that may be anything where a method selects: rounding decides some of them."""


@dataclass
class Row:
    """What was measured for one method."""

    method: str
    seconds: list[float] = field(default_factory=list)
    limit: list[float] = field(default_factory=list)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    peer_seconds: float | None = None
    peer_peak_bytes: int | None = None
    stages: dict[str, object] | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def green(self) -> bool:
        """Whether every output was right."""
        return not self.problems

    def figures(self) -> dict[str, object]:
        """The row as numbers: medians, ratios and whether the bars are met; no speed when an output was wrong."""
        case = CASES[self.method]
        result: dict[str, object] = {"method": self.method, "check": "green" if self.green else "red"}
        if not self.green:
            return result | {"problems": self.problems}
        seconds, limit = statistics.median(self.seconds), statistics.median(self.limit)
        ratio = seconds / (limit + START_UP)
        result |= {
            "seconds": seconds,
            "seconds_all": self.seconds,
            "limit": limit,
            "limit_all": self.limit,
            "ratio_to_limit": ratio,
            "limit_bar": case.limit_bar,
            "limit_bar_met": None if case.limit_bar is None else ratio <= case.limit_bar,
            "peak_bytes": self.peak_bytes,
            "peak_bar_met": {
                budget: peak <= parse_size(budget) + RESIDENT_ALLOWANCE for budget, peak in self.peak_bytes.items()
            },
            "stages": self.stages,
        }
        if self.peer_seconds is not None:
            speedup = self.peer_seconds / seconds
            result |= {
                "peer_seconds": self.peer_seconds,
                "peer_peak_bytes": self.peer_peak_bytes,
                "times_the_peer": speedup,
                "peer_bar": case.peer_bar,
                "peer_bar_met": None if case.peer_bar is None else speedup >= case.peer_bar,
            }
        return result


def parse_size(text: str) -> int:
    """Bytes of a size such as 256MiB."""
    for unit, size in UNITS.items():
        if text.endswith(unit):
            return int(float(text[: -len(unit)]) * size)
    return int(text)


def inputs(family: Family, method: str) -> list[Path]:
    """The folders that a merge by this method reads."""
    case = CASES[method]
    return [*([family.base] if case.base else []), *family.models[: case.count]]


def config(family: Family, method: str, dtype: str) -> dict[str, object]:
    """The merge as both tools read it."""
    case = CASES[method]
    models = []
    for number, folder in enumerate(family.models[: case.count]):
        parameters: dict[str, float] = {"weight": case.weight(number)} if case.weights else {}
        if case.density is not None:
            parameters["density"] = case.density
        models.append({"model": str(folder), "parameters": parameters})
    content: dict[str, object] = {"merge_method": method, "models": models, "dtype": dtype}
    if case.parameters:
        content["parameters"] = dict(case.parameters)
    if case.base:
        content["base_model"] = str(family.base)
    return content


class Expectation:
    """Sampled tensors of one method's output, computed independently once and compared with every output."""

    def __init__(self, family: Family, method: str, dtype: str, *, names: list[str] | None = None) -> None:
        import independent

        case = CASES[method]
        base = _Folder(family.base)
        models = [_Folder(folder) for folder in family.models]
        self.shapes = base.shapes()
        self.dtype = DTYPES[dtype][0]
        self.reach: dict[str, torch.Tensor] = {}
        self.unit = case.rounded
        if self.unit is not None:
            self._ask_peer(case, method, base, models[: case.count], names or sample(self.shapes))
            return
        self.tensors = {
            name: independent.expected_tensor(
                method,
                name,
                base.read(name),
                [model.read(name) for model in models],
                [case.weight(number) for number in range(len(models))],
                density=1.0 if case.density is None else case.density,
                dtype=self.dtype,
            )
            for name in (names or sample(self.shapes))
        }

    def _ask_peer(self, case: Case, method: str, base: _Folder, models: list[_Folder], names: list[str]) -> None:
        """Ask mergekit's function in float64; tensors that would take it gigabytes are left to the tests of cuts."""
        from peers import mergekit_functions

        parameters = dict(case.parameters)
        if case.weights:
            parameters["weight"] = [case.weight(number) for number in range(len(models))]
        self.tensors = {}
        for name in names:
            if math.prod(self.shapes[name]) >= LARGE:
                continue
            given = [one.read(name).double() for one in models]
            below = base.read(name).double() if case.base else None
            if below is not None and all(bool((one == below).all()) for one in given):
                continue  # nothing was changed, which mergekit refuses for some methods
            self.tensors[name] = mergekit_functions.merged(method, below, given, parameters)
            everything = given if below is None else [below, *given]
            self.reach[name] = largest(everything)

    def _wrong(self, name: str, actual: torch.Tensor) -> int:
        """How many values are wrong."""
        expected = self.tensors[name]
        if self.unit is None:
            return int((actual != expected).sum())
        import torch

        allowed = self.unit * torch.finfo(actual.dtype).eps * self.reach[name] + 1e-30
        wrong = int((~((actual.double() - expected).abs() <= allowed)).sum())
        return wrong if wrong > 8 + OPEN * actual.numel() else 0

    def problems(self, out: Path) -> list[str]:
        """What is wrong with the merge in ``out``; empty when nothing is."""
        try:
            folder = _Folder(out)
            shapes = folder.shapes()
        except Exception as error:  # whatever a broken output raises is the finding
            return [f"cannot be opened: {error}"]
        found = [f"{name} is missing" for name in self.shapes if name not in shapes]
        found += [f"{name} was not in the inputs" for name in shapes if name not in self.shapes]
        found += [
            f"{name} has shape {shapes[name]}, not {shape}"
            for name, shape in self.shapes.items()
            if name in shapes and shapes[name] != shape
        ]
        for name in self.tensors:
            if found and shapes.get(name) != self.shapes[name]:
                continue
            actual = folder.read(name)
            if actual.dtype != self.dtype:
                found.append(f"{name} has dtype {actual.dtype}, not {self.dtype}")
            elif wrong := self._wrong(name, actual):
                found.append(f"{name}: {wrong} of {actual.numel()} values are wrong")
        return found


def largest(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The largest magnitude at each place."""
    found = tensors[0].abs()
    for x in tensors[1:]:
        found = found.maximum(x.abs())
    return found


class _Folder:
    """The tensors of a folder of safetensors files, read one at a time."""

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"no safetensors file in {path}")
        index = path / "model.safetensors.index.json"
        self._handles = {file.name: safe_open(file, framework="pt") for file in files}
        self._places = {name: file for file, handle in self._handles.items() for name in handle.keys()}  # noqa: SIM118
        if index.exists():
            listed = json.loads(index.read_text())["weight_map"]
            if listed != self._places:
                raise ValueError("the index does not say where the tensors are")
        elif len(files) > 1:
            raise FileNotFoundError("there are several shards and no index")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name."""
        return {name: tuple(self._handles[file].get_slice(name).get_shape()) for name, file in self._places.items()}

    def read(self, name: str) -> torch.Tensor:
        """One tensor."""
        return self._handles[self._places[name]].get_tensor(name)


def sample(shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """Which tensors are checked: all of a small model; of a large one some of each kind, and one large tensor."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    if sum(sizes.values()) < LARGE:
        return list(shapes)
    small = [name for name, size in sizes.items() if size < LARGE]
    large = [name for name, size in sizes.items() if size >= LARGE]
    kinds: dict[str, list[str]] = {}
    for name in small:
        kinds.setdefault(".".join(part for part in name.split(".") if not part.isdigit()), []).append(name)
    chosen = []
    for number, names in enumerate(kinds.values()):
        chosen.append(names[number * 5 % len(names)])  # another layer for each kind
    return chosen + large[-1:]


def clean(path: Path, pause: float) -> None:
    """Remove an output, flush what is dirty and wait, so that neither side pays for the other."""
    shutil.rmtree(path, ignore_errors=True)
    os.sync()
    time.sleep(pause)


def warm(family: Family) -> None:
    """Read every input once, into the page cache."""
    for file in family.weight_files():
        with open(file, "rb", buffering=0) as handle:
            while handle.read(1 << 24):
                pass


def run_limit(folders: list[Path], base: Path, out: Path) -> float:
    """Seconds for reading the inputs and for copying and flushing a model of the base's size."""
    files = " ".join(shlex.quote(str(file)) for folder in folders for file in sorted(folder.glob("*.safetensors")))
    target = shlex.quote(str(out))
    copy = f"cp -r {shlex.quote(str(base))} {target}; find {target} -type f -exec sync {{}} +"
    script = f"set -e; cat {files} > /dev/null; {copy}"
    start = time.perf_counter()
    subprocess.run(["sh", "-c", script], check=True)
    return time.perf_counter() - start


def fastmerge_command() -> list[str]:
    """The installed console script beside this Python, or the module."""
    script = Path(sys.executable).parent / "fastmerge"
    return [str(script)] if script.exists() else [sys.executable, "-m", "fastmerge"]


def report_of(run: Run) -> dict[str, object] | None:
    """What fastmerge said about its own run, or None when that is no JSON object."""
    try:
        report = json.loads(run.stdout)
    except json.JSONDecodeError:
        return None
    return report if isinstance(report, dict) else None


class Bench:
    """Runs one method after the other on one family."""

    def __init__(self, family: Family, options: argparse.Namespace, work: Path) -> None:
        self.family, self.options, self.work = family, options, work
        self.out = work / "output"

    def merge(self, file: Path, *, budget: str | None = None) -> Run:
        """One merge by fastmerge."""
        command = [*fastmerge_command(), "merge", str(file), str(self.out), "--json"]
        if budget is not None:
            command += ["--memory-budget", budget]
        if self.options.threads is not None:
            command += ["--threads", str(self.options.threads)]
        return run_measured(command)

    def _checked(self, run: Run, row: Row, expectation: Expectation, what: str) -> bool:
        if run.status != 0:
            row.problems.append(f"{what}: exit status {run.status}: {run.stderr.strip()[-500:]}")
        else:
            row.problems += [f"{what}: {problem}" for problem in expectation.problems(self.out)]
        return row.green

    def method(self, name: str) -> Row:
        """Measure one method; stops at the first wrong output."""
        row = Row(name)
        file = self.work / f"{name}.yml"
        file.write_text(json.dumps(config(self.family, name, self.options.dtype), indent=2))  # JSON is YAML
        expectation = Expectation(self.family, name, self.options.dtype)
        runs = []
        for _ in range(self.options.repeats):
            clean(self.out, self.options.pause)
            row.limit.append(run_limit(inputs(self.family, name), self.family.base, self.out))
            clean(self.out, self.options.pause)
            run = self.merge(file)
            if not self._checked(run, row, expectation, "default budget"):
                return row
            row.seconds.append(run.seconds)
            runs.append(run)
        digests = {(report_of(run) or {}).get("digest") for run in runs}
        middle = sorted(runs, key=lambda run: run.seconds)[len(runs) // 2]
        row.stages = report_of(middle)
        for budget in self.options.budgets:
            clean(self.out, 0)
            run = self.merge(file, budget=budget)
            if not self._checked(run, row, expectation, f"budget {budget}"):
                return row
            row.peak_bytes[budget] = run.peak_bytes
            digests.add((report_of(run) or {}).get("digest"))
        if len(digests) > 1:
            row.problems.append(f"outputs within other budgets have other digests: {digests}")
            return row
        if self.options.peer:
            self._peer(file, row)
        clean(self.out, 0)
        return row

    def _peer(self, file: Path, row: Row) -> None:
        command = mergekit_cli.command(file, self.out)
        if command is None:
            raise SystemExit("mergekit-yaml is not installed here: leave --peer out or install mergekit 0.1.5")
        clean(self.out, self.options.pause)
        run = run_measured(command, environment=mergekit_cli.environment())
        if run.status != 0:
            raise SystemExit(f"mergekit-yaml failed: {run.stderr.strip()[-500:]}")
        row.peer_seconds, row.peer_peak_bytes = run.seconds, run.peak_bytes


def _verdict(met: object) -> str:
    return "" if met is None else " ok" if met else " MISSED"


def render(rows: list[dict[str, object]]) -> str:
    """The rows as a table for people."""
    head = ["method", "seconds", "limit", f"/(limit+{START_UP})", "peer s", "x peer", "peak MB by budget", "check"]
    lines = [head]
    for row in rows:
        if row["check"] != "green":
            lines.append([str(row["method"]), *["-"] * 6, "RED: " + "; ".join(row["problems"][:3])])  # type: ignore[index]
            continue
        bar = row["limit_bar"]
        ratio = f"{row['ratio_to_limit']:.2f}" + ("" if bar is None else f" (<= {bar}){_verdict(row['limit_bar_met'])}")
        times = "-"
        if "times_the_peer" in row:
            bar = row["peer_bar"]
            times = f"{row['times_the_peer']:.1f}"
            if bar is not None:
                times += f" (>= {bar:g}){_verdict(row['peer_bar_met'])}"
        peaks = ", ".join(
            f"{budget} {peak / 1e6:.0f}{_verdict(row['peak_bar_met'][budget])}"  # type: ignore[index]
            for budget, peak in row["peak_bytes"].items()  # type: ignore[attr-defined]
        )
        peer = f"{row['peer_seconds']:.1f}" if "peer_seconds" in row else "-"
        seconds, limit = f"{row['seconds']:.2f}", f"{row['limit']:.2f}"
        lines.append([str(row["method"]), seconds, limit, ratio, peer, times, peaks or "-", "green"])
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(line.rstrip() for line in padded)


def render_stages(rows: list[dict[str, object]]) -> str:
    """Where the time of each method's median run went, as fastmerge itself reports it (stages overlap)."""
    lines = []
    for row in rows:
        stages = (row.get("stages") or {}).get("seconds")  # type: ignore[attr-defined]
        if stages:
            parts = ", ".join(f"{name.replace('_', '-')} {value:.2f}" for name, value in stages.items())
            lines.append(f"{row['method']}: {parts}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; 0 when every output was right (bars that are missed are said, not failed)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--family", type=Path, default=None, help="folder of the family; made when absent")
    parser.add_argument("--work", type=Path, default=None, help="folder for outputs, on the disk to measure")
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--methods", nargs="+", choices=CASES, default=[name for name in CASES if name not in OTHERS])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--pause", type=float, default=8.0, help="seconds before each run")
    parser.add_argument("--budgets", nargs="*", default=["256MiB", "1GiB", "4GiB"], help="memory budgets for the peaks")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--peer", action="store_true", help="run mergekit-yaml once for each method")
    parser.add_argument("--json", type=Path, default=None, help="file for the figures")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")

    root = Path(__file__).resolve().parent / "data"
    family_folder = options.family or root / f"family-{options.scale}-{options.dtype}"
    family = make_family(family_folder, scale=options.scale, dtype=options.dtype)
    parent = options.work or root
    parent.mkdir(parents=True, exist_ok=True)
    warm(family)
    with tempfile.TemporaryDirectory(dir=parent, prefix="end-to-end-") as work:
        bench = Bench(family, options, Path(work))
        rows = []
        for name in options.methods:
            rows.append(bench.method(name).figures())
            print(render(rows[-1:]), flush=True)
    print("\n" + render(rows))
    stages = render_stages(rows)
    if stages:
        print("\nstages of the median run:\n" + stages)
    if options.json is not None:
        report = {
            "environment": environment(),
            "family": {"scale": options.scale, "dtype": options.dtype, "parameters": family.parameters},
            "settings": {"repeats": options.repeats, "pause": options.pause, "threads": options.threads},
            "rows": rows,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if all(row["check"] == "green" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
