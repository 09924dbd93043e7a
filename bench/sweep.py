"""Candidates of one sweep beside the same merges one by one: seconds, and memory.

Three processes, each of which reads the models from their files first: one merges once, one merges every candidate by
`fastmerge.merge_many`, one merges every candidate by `fastmerge.merge`. All take the same cheap score of each result, a
checksum of some of its tensors; a sweep whose scores differ from those of the merges one by one has no time. Once more
each candidate may be read anew, which is what merging them by a command one after the other costs (--anew).

    python bench/sweep.py bench/data/family-full-bfloat16-2
    python bench/sweep.py FAMILY --densities 0.3 0.6 --lambdas 0.5 1.0 --json sweep.json
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BAR = 5.0
"""A sweep of twelve candidates may take so many times as long as one merge."""
SCORED = 3
"""Of the result's tensors so many are looked at."""


def checksum(merged: dict[str, Any]) -> int:
    """A cheap score: of the first tensors, whatever they are."""
    import torch

    found = 0
    for name in list(merged)[:SCORED]:
        found = zlib.crc32(merged[name].contiguous().view(-1).view(torch.uint8).numpy().data, found)
    return found


def work(kind: str, family: Path, candidates: list[dict[str, float]]) -> dict[str, Any]:
    """What one of the processes does: seconds from before the first read on, scores, most memory held."""
    import fastmerge
    from fastmerge.evolve.members import load

    paths = sorted(path for path in family.iterdir() if path.is_dir() and path.name != "base")

    def read() -> tuple[list[dict[str, Any]], dict[str, Any]]:
        return [load(path, "a model")[1] for path in paths], load(family / "base", "base")[1]

    def merges() -> Iterator[dict[str, Any]]:
        if kind == "sweep":
            models, base = read()
            common: dict[str, Any] = {"base": base, "method": "ties", "weight": 1.0, "reuse": True}
            for _, merged in fastmerge.merge_many(models, candidates, **common):
                yield merged
            return
        models, base = read()
        for number, candidate in enumerate(candidates[:1] if kind == "one" else candidates):
            if kind == "anew" and number:
                del models, base
                models, base = read()
            yield fastmerge.merge(models, base=base, method="ties", weight=1.0, **candidate)

    began = time.perf_counter()
    scores = []
    for merged in merges():
        scores.append(checksum(merged))
        del merged
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "scores": scores, "peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", type=Path, help="a directory with base, model-1, model-2, ... (make_family.py)")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.2, 0.4, 0.6, 0.8])
    parser.add_argument("--lambdas", type=float, nargs="+", default=[0.5, 1.0, 1.5])
    parser.add_argument("--anew", action="store_true", help="also read the models anew for each candidate")
    parser.add_argument("--rounds", type=int, default=1, help="of all sides in turns; the least of each counts")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--work", choices=["one", "sweep", "singly", "anew"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    candidates = [{"density": density, "lambda_": factor} for density in given.densities for factor in given.lambdas]
    if given.work:
        print(json.dumps(work(given.work, given.family, candidates)))
        return 0

    kinds = ["one", "sweep", "singly", *(["anew"] if given.anew else [])]
    found: dict[str, dict[str, Any]] = {}
    for _ in range(given.rounds):
        for kind in kinds:
            command = [sys.executable, *sys.argv, "--work", kind]
            run = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            if kind not in found or run["seconds"] < found[kind]["seconds"]:
                found[kind] = run
    if any(found[kind]["scores"] != found["sweep"]["scores"] for kind in kinds if kind != "one"):
        print("The sweep's results are not those of the merges one by one.", file=sys.stderr)
        return 1
    one = found["one"]["seconds"]
    names = {
        "one": "one merge",
        "sweep": f"sweep of {len(candidates)}",
        "singly": f"{len(candidates)} one by one, read once",
        "anew": f"{len(candidates)} one by one, each read anew",
    }
    print(f"{'':<32}{'seconds':>9}{'x one':>8}{'peak GB':>9}")
    for kind in kinds:
        seconds, peak = found[kind]["seconds"], found[kind]["peak"] / 1e9
        print(f"{names[kind]:<32}{seconds:>9.2f}{seconds / one:>8.2f}{peak:>9.2f}")
    ratio = found["sweep"]["seconds"] / one
    met = ratio <= BAR
    print(f"the sweep takes {ratio:.2f} x one merge (at most {BAR:g}): {'yes' if met else 'NO'}")
    if given.json:
        given.json.write_text(json.dumps({"candidates": candidates, "ratio": ratio, **found}, indent=1))
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
