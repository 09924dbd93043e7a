"""Light experts of the family: extracted as a whole process, then put onto a live model and taken off, a hundred times.

    python bench/experts.py --family FOLDER --work FOLDER --json bench/data/experts.json
    python bench/experts.py --scale tiny --keep 0.05 --repeats 1 --pause 0       # a smoke test of the benchmark itself

Extracting alternates with its limit: both models read by `cat`, and a file as large as the expert copied and flushed.
The live model has the family's parameters in memory. Applying is one expert put onto the model as it was, removing
its being taken off, exactness included; then experts are switched at random. Sampled tensors of the file are held
against numpy's sort of the whole rows; the model must end with the digest that it began with. A red row has no speed.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from blake3 import blake3
from end_to_end import START_UP, _Folder, clean, fastmerge_command, sample, warm
from make_family import DTYPES, SCALES, Family, make_family
from measure import environment, run_measured

from fastmerge.experts import ExpertSet, load

BARS = {"extract": 3.0, "apply": 0.150, "remove": 0.150, "size": 1.6}
"""Times (limit + START_UP); seconds; seconds; times keep x the model's bytes, "about 1.5"."""
SWITCHES = 100


def limit_of(folders: list[Path], like: Path, out: Path) -> float:
    """Seconds for reading both models and for copying and flushing a file as large as the expert."""
    files = " ".join(shlex.quote(str(file)) for folder in folders for file in sorted(folder.glob("*.safetensors")))
    target = shlex.quote(str(out))
    start = time.perf_counter()
    script = f"set -e; cat {files} > /dev/null; cp {shlex.quote(str(like))} {target}; sync {target}"
    subprocess.run(["sh", "-c", script], check=True)
    return time.perf_counter() - start


def problems(path: Path, base: _Folder, model: _Folder, keep: float) -> list[str]:
    """What is wrong with an expert, by sorting rows."""
    expert = load(path)
    shapes = base.shapes()
    found = [] if set(expert.tensors) == set(shapes) else ["the tensors are not those of the model"]
    for name in sample(shapes):
        delta = (model.read(name).float() - base.read(name).float()).numpy()
        rows = delta.reshape(-1, delta.shape[-1])[:4096]
        k = int(rows.shape[1] * keep)
        order = np.argsort(-np.abs(rows), axis=1, kind="stable")[:, :k]
        columns = np.sort(order, axis=1)
        kept = expert.tensors[name]
        values = torch.from_numpy(np.take_along_axis(rows, columns, 1)).to(kept.dtype)
        if not np.array_equal(kept.columns[: len(rows)].numpy(), columns) or not torch.equal(
            kept.values[: len(rows)], values
        ):
            found.append(f"{name} keeps other elements")
    return found


class Live(torch.nn.Module):
    """The parameters of a checkpoint under their names."""

    def __init__(self, folder: _Folder) -> None:
        super().__init__()
        for name in folder.shapes():
            *path, last = name.split(".")
            holder: torch.nn.Module = self
            for part in path:
                if part not in holder._modules:
                    holder.add_module(part, torch.nn.Module())
                holder = holder._modules[part]  # type: ignore[assignment]
            holder.register_parameter(last, torch.nn.Parameter(folder.read(name).clone(), requires_grad=False))

    def digest(self) -> str:
        """One digest of all bytes."""
        whole = blake3(max_threads=blake3.AUTO)
        for parameter in self.parameters():
            whole.update(parameter.detach().view(-1).view(torch.uint8).numpy().data)
        return str(whole.hexdigest())


def timed(work: object, repeats: int) -> Iterator[float]:
    """Seconds of each call."""
    for _ in range(repeats):
        start = time.perf_counter()
        work()  # type: ignore[operator]
        yield time.perf_counter() - start


def extracted(family: Family, options: argparse.Namespace, work: Path) -> tuple[dict[str, object], list[Path]]:
    """Extract an expert of each model; the first one again and again, in turns with the limit."""
    files = [work / f"{model.name}.safetensors" for model in family.models]
    command = [*fastmerge_command(), "expert", "extract", str(family.base)]
    after = ["--keep", str(options.keep), "--json", "-o"]
    seconds: dict[str, list[float]] = {"limit": [], "extract": []}
    peaks, reports, wrong = [], [], []
    for model, file in zip(family.models, files, strict=True):
        run = run_measured([*command, str(model), *after, str(file)])
        if run.status:
            raise SystemExit(f"fastmerge failed: {run.stderr.strip()[-500:]}")
        wrong += problems(file, _Folder(family.base), _Folder(model), options.keep)
    for _ in range(options.repeats):
        again = work / "again.safetensors"
        clean(work / "none", options.pause)
        seconds["limit"].append(limit_of([family.base, family.models[0]], files[0], again))
        again.unlink()
        clean(work / "none", options.pause)
        run = run_measured([*command, str(family.models[0]), *after, str(again)])
        seconds["extract"].append(run.seconds)
        peaks.append(run.peak_bytes)
        reports.append(json.loads(run.stdout))
        if again.read_bytes() != files[0].read_bytes():
            wrong.append("the same extraction gave another file")
        again.unlink()
    size = files[0].stat().st_size / (options.keep * reports[-1]["model_bytes"])
    limit, middle = statistics.median(seconds["limit"]), statistics.median(seconds["extract"])
    return {
        "problems": wrong,
        "limit": limit,
        "seconds": middle,
        "seconds_all": seconds,
        "ratio": middle / (limit + START_UP),
        "peak_bytes": max(peaks),
        "file_bytes": files[0].stat().st_size,
        "size": size,
        "start_up_included": True,
    }, files


def worn(family: Family, files: list[Path], options: argparse.Namespace) -> dict[str, object]:
    """Put experts onto a live model and take them off."""
    model = Live(_Folder(family.base))
    before = model.digest()
    start = time.perf_counter()
    experts = ExpertSet(model, {file.stem: file for file in files})
    loading = time.perf_counter() - start
    name = files[0].stem
    apply, remove, both = [], [], []
    together = {file.stem: 1.0 / len(files) for file in files}
    for _ in range(options.switches_timed):
        apply += timed(lambda: experts.switch(name), 1)
        remove += timed(lambda: experts.switch(None), 1)
        both += timed(lambda: experts.switch(together), 1)
        experts.switch(None)
    drawn = random.Random(0)
    start = time.perf_counter()
    for _ in range(SWITCHES):
        chosen = drawn.sample(experts.names, drawn.randint(1, len(files)))
        experts.switch({each: drawn.uniform(0.1, 2.0) for each in chosen})
    switching = (time.perf_counter() - start) / SWITCHES
    changed = model.digest() != before
    experts.switch(None)
    wrong = [] if changed and model.digest() == before else ["the model does not end as it began"]
    return {
        "problems": wrong,
        "load": loading,
        "apply": statistics.median(apply),
        "remove": statistics.median(remove),
        "apply_both": statistics.median(both),
        "switch": switching,
        "apply_all": apply,
        "remove_all": remove,
    }


def main() -> int:
    """0 when everything was right; bars that are missed are said, not failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--family", type=Path, default=None, help="folder of the family; made when absent")
    parser.add_argument("--work", type=Path, default=None, help="folder for experts, on the disk to measure")
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--models", type=int, default=2)
    parser.add_argument("--keep", type=float, default=0.01)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--switches-timed", type=int, default=11)
    parser.add_argument("--pause", type=float, default=8.0)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()

    root = Path(__file__).resolve().parent / "data"
    place = options.family or root / f"family-{options.scale}-{options.dtype}-{options.models}"
    family = make_family(place, scale=options.scale, dtype=options.dtype, models=options.models)
    parent = options.work or root
    parent.mkdir(parents=True, exist_ok=True)
    warm(family)
    with tempfile.TemporaryDirectory(dir=parent, prefix="experts-") as folder:
        extraction, files = extracted(family, options, Path(folder))
        live = worn(family, files, options)
    wrong = [*extraction.pop("problems"), *live.pop("problems")]  # type: ignore[misc]
    row: dict[str, object] = {"keep": options.keep, "parameters": family.parameters, "problems": wrong}
    if not wrong:
        met = {
            "extract": extraction["ratio"] <= BARS["extract"],  # type: ignore[operator]
            "size": extraction["size"] <= BARS["size"],  # type: ignore[operator]
            "apply": live["apply"] <= BARS["apply"],  # type: ignore[operator]
            "remove": live["remove"] <= BARS["remove"],  # type: ignore[operator]
        }
        row |= {"extract": extraction, "live": live, "bars": BARS, "met": met}
    print(json.dumps(row, indent=1))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"environment": environment(), "rows": [row]}, indent=2) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
