"""How fast `ops.pcb_merge` merges n task vectors that are in memory, and how much memory it takes on top of them.

    python bench/pcb.py                                   # 3 rows of 5e7 float32 values, `script` and `vision_es`
    python bench/pcb.py --isa avx2 --threads 1 --rounds 3 --json bench/data/pcb.json

The output is warm: its pages have been written before. Memory is the peak of the resident pages during a merge less
what was there before, as the kernel counts them (Linux), as a fraction of the inputs. Every result is checked without
sorting: as many scores of each row lie below and above its threshold as the density says, and a part of the elements is
computed again by the formula in float64. A wrong one gets no speed.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from adversarial import KINDS
from measure import environment

VARIANTS = ("script", "nlp", "vision", "vision_es", "paper")
PIECE = 1 << 22


def memory(field: str) -> int:
    """Bytes that the kernel counts for this process: VmRSS now in memory, VmHWM the most since the peak was reset."""
    line = next(one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith(field))
    return int(line.split()[1]) * 1024


def extra_memory(run: Callable[[], object]) -> int:
    """Bytes by which the process grows while `run` runs; what earlier calls have left is given back first."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    run()
    return memory("VmHWM") - before


def wrong_thresholds(rows: torch.Tensor, rule: object, density: float, backend: str) -> str | None:
    """Why the thresholds are not the order statistics of the scores, or None."""
    from fastmerge import ops

    n, count = rows.shape
    below, at_most, highest = [torch.zeros(n) for _ in range(3)]
    below, at_most = below.long(), at_most.long()
    highest -= torch.inf
    thresholds = rule.thresholds  # type: ignore[attr-defined]
    for start in range(0, count, PIECE):
        scores = ops.pcb_scores(None, list(rows[:, start : start + PIECE]), rule, backend=backend)  # type: ignore[arg-type]
        below += (scores < thresholds[:, :1]).sum(dim=1)
        at_most += (scores <= thresholds[:, :1]).sum(dim=1)
        highest = torch.maximum(highest, scores.amax(dim=1))
    place = min(int(count * (1 - density)), count - 1)
    if not ((below <= place) & (at_most > place)).all():
        return f"{below.tolist()} scores below and {at_most.tolist()} not above the threshold at place {place}"
    return None if torch.equal(highest, thresholds[:, 1]) else "the highest scores are others"


def expected(rows: np.ndarray, rule: object, variant: str) -> np.ndarray:
    """The merged values of some columns, in float64, by the formulas with weight 1."""
    n = len(rows)
    low, high = rule.clip.double().numpy().T[:, :, None]  # type: ignore[attr-defined]
    start, most = rule.thresholds.double().numpy().T[:, :, None]  # type: ignore[attr-defined]
    a = np.clip(np.abs(rows), low, high)
    z = (a - low) / (high - low)
    c, u = np.sign(rows) * a, np.sign(rows) * z
    if variant in ("script", "nlp"):
        inter = np.tanh(rows * rows.sum(axis=0))
    elif variant == "vision":
        inter = np.tanh(rows * u.sum(axis=0))
    else:
        inter = np.tanh(u[:, None] * u[None]).sum(axis=1)
    share = (np.clip(np.exp(n * z * z - n / 2) * inter, start, most) - start) / (most - start)
    return (c * share).sum(axis=0) / np.maximum(share.sum(axis=0), 1e-12)


def wrong(rows: torch.Tensor, merged: torch.Tensor, variant: str, density: float, backend: str) -> str | None:
    """Why `merged` is not the merge of `rows`, or None."""
    from fastmerge import ops

    rule = ops.pcb_rule(rows, density=density, variant=variant, backend=backend)
    problem = wrong_thresholds(rows, rule, density, backend)
    if problem is not None:
        return problem
    count = min(1 << 18, rows.shape[1])
    some = torch.linspace(0, rows.shape[1] - 1, count, dtype=torch.float64).long()
    part = rows[:, some]
    if variant == "paper":
        values = ops.pcb_apply(None, list(part), [1.0] * len(rows), rule, backend="reference").double().numpy()
    else:
        values = expected(part.double().numpy(), rule, variant)
    far = np.abs(merged[some].double().numpy() - values) > 1e-5 * np.abs(values).max()
    # Where a single row keeps an element, its weight jumps at the threshold.
    return f"{int(far.sum())} of {count} values are wrong" if far.sum() > max(1, count // 10000) else None


def measure(variant: str, rows: torch.Tensor, density: float, rounds: int, backend: str) -> dict[str, object]:
    """One row of the report."""
    from fastmerge import ops

    out = torch.zeros(rows.shape[1])
    arguments = {"density": density, "variant": variant, "backend": backend}
    ops.pcb_merge(rows[:, : 1 << 18].contiguous(), **arguments)  # loads the kernels
    extra = extra_memory(lambda: ops.pcb_merge(rows, out=out, **arguments))
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        ops.pcb_merge(rows, out=out, **arguments)
        seconds.append(time.perf_counter() - start)
    problem = wrong(rows, out, variant, density, backend)
    row: dict[str, object] = {"variant": variant, "rows": len(rows), "elements": rows.shape[1], "problem": problem}
    if problem is None:
        row |= {
            "best_s": min(seconds),
            "median_s": statistics.median(seconds),
            "extra_memory": extra / rows.nbytes,
            "gelem_per_s": rows.numel() / min(seconds) / 1e9,
        }
    return row


def render(row: dict[str, object]) -> str:
    """A row for people."""
    label = f"{row['variant']:<9} {row['rows']} x {row['elements']}:"
    if row["problem"] is not None:
        return f"{label} RED: {row['problem']}"
    return (
        f"{label} best {row['best_s']:.3f} s, median {row['median_s']:.3f} s, {row['gelem_per_s']:.3f} Gelem/s, "
        f"extra memory {row['extra_memory']:.3f} of the inputs"
    )


def main(arguments: list[str] | None = None) -> int:
    """Run it; 0 when every result was right."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--numel", type=float, default=5e7, help="elements of each row")
    parser.add_argument("--rows", type=int, default=3)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["script", "vision_es"])
    parser.add_argument("--kind", choices=KINDS, default="normal", help="how the values are distributed")
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--isa", default=None, help="instruction set of the cpu backend; by default the fastest")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args(arguments)

    from fastmerge import backends

    module = backends.resolve(options.backend)
    if options.isa is not None:
        module.set_isa(options.isa)
    if options.threads is not None:
        module.set_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    rows = torch.empty(options.rows, int(options.numel))
    for row in rows:
        for part in row.split(1 << 24):
            part.copy_(KINDS[options.kind](part.numel(), generator)).mul_(1e-2)
    report = []
    for variant in options.variants:
        report.append(measure(variant, rows, options.density, options.rounds, options.backend))
        print(render(report[-1]), flush=True)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        settings = {"isa": options.isa, "threads": options.threads, "kind": options.kind, "density": options.density}
        options.json.write_text(json.dumps({"environment": environment(), **settings, "rows": report}, indent=2) + "\n")
    return 0 if all(row["problem"] is None for row in report) else 1


if __name__ == "__main__":
    sys.exit(main())
