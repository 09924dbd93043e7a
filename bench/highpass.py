"""How fast `ops.highpass` filters delta matrices, by every route, and whether the model of their cost chooses well.

    python bench/highpass.py                        # the three bars, against the released code's way, in one run
    python bench/highpass.py --grid                 # every route over shapes that models have: chosen / best
    python bench/highpass.py --grid --cpu-time --threads 1      # seconds of this thread: for a machine that is busy
    python bench/highpass.py --shapes 4096x11008 --official 0.9 --rounds 7 --json bench/data/highpass.json

The peer does what the released code does, in words of this file: the complex transform of the whole matrix, two masks
(up to the ring, and from it up to the radius), their products with the spectrum added, the inverse, its real part. For
"ideal" it is torch's rfft2, a mask, irfft2. Sides alternate and medians are compared. Everything is checked first: the
routes against the peer's way in float64, in bands of the matrix where it is large.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from measure import environment
from torch import Tensor

BARS = [
    ((4096, 4096), 0.7, "official", 20.0),
    ((4096, 11008), 0.9, "official", 6.0),
    ((4096, 14336), 0.9, "official", 6.0),
    ((11008, 4096), 0.9, "official", None),
    ((4096, 4096), 0.02, "ideal", 3.0),
]
"""Shape, ratio, mode, and how many times faster than the peer it has to be. 0.02 removes a disc of 41 bins."""

SHAPES = [
    (3584, 512), (3584, 3584), (3584, 18944), (18944, 3584), (4096, 1024), (4096, 4096), (4096, 11008), (11008, 4096),
    (4096, 14336), (14336, 4096), (5120, 5120), (5120, 13824), (13824, 5120), (8192, 8192), (8192, 28672),
    (28672, 8192),
]  # fmt: skip
"""Of attention and MLP weights of models from 7 to 70 billion parameters."""
IDEAL, OFFICIAL = (0.02, 0.05, 0.1, 0.2), (0.6, 0.7, 0.8, 0.9)
TOLERANCE = 1e-6
SLACK = 1.25
"""The chosen route may take so many times as long as the best."""


def official(x: Tensor, ratio: float) -> Tensor:
    """The released code's way, in the precision of `x`."""
    height, width = x.shape
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    distance = ((rows - height // 2) ** 2 + (columns - width // 2) ** 2).double().sqrt()
    ring, radius = min(height, width) // 10, min(height, width) * ratio
    near = ((distance <= ring) & (distance <= radius)).to(x.dtype)
    far = ((distance >= ring) & (distance <= radius)).to(x.dtype)
    spectrum = torch.fft.fft2(x)
    return torch.fft.ifft2(spectrum * near + spectrum * far).real


def ideal(x: Tensor, ratio: float) -> Tensor:
    """The ideal high-pass by a real transform of both axes, in the precision of `x`."""
    height, width = x.shape
    rows = torch.arange(height).minimum(height - torch.arange(height)) ** 2
    columns = torch.arange(width // 2 + 1) ** 2
    kept = (rows[:, None] + columns).double() >= (ratio * min(height, width) / 2) ** 2
    return torch.fft.irfft2(torch.fft.rfft2(x) * kept, s=(height, width))


PEERS = {"official": official, "ideal": ideal}


def wrong(actual: Tensor, expected: Tensor, x: Tensor) -> str | None:
    """Why a result is not the filtered matrix, or None."""
    error = float((actual - expected).abs().max()) / float(x.abs().max())
    norms = float((actual - expected).norm()) / float(x.norm())
    return None if max(error, norms) <= TOLERANCE else f"off by {error:.2g} of the largest, {norms:.2g} of the norm"


def alternate(sides: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """The median seconds of each side, in turns after one turn to warm up."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, run in sides.items():
            start = clock()
            run()
            if turn:
                taken[name].append(clock() - start)
    return {name: statistics.median(each) for name, each in taken.items()}


def name_of(plan: object) -> str:
    """A route as the report calls it."""
    route, axis = plan.route, plan.axis  # type: ignore[attr-defined]
    return route if route != "rfft" else f"rfft {'along rows' if axis == 1 else 'down columns'}"


def measure(
    shape: tuple[int, int], ratio: float, mode: str, rounds: int, clock: Callable[[], float], peer: bool
) -> dict[str, object]:
    """One row of the report: every route, and the peer if it is asked for."""
    from fastmerge.backends import filters
    from fastmerge.backends.highpass import filtered

    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul_(1e-3)
    # The peer's mask is in float64 here and there; its transforms are where float32 rounds, so here they are wider.
    expected = PEERS[mode](x.double(), ratio).float()
    out = torch.zeros_like(x)
    plans = filters.candidates(*shape, ratio, mode)
    # A route that the model holds for hopeless is not waited for.
    sides: dict[str, Callable[[], object]] = {}
    predicted, problems = {}, []
    for plan in plans:
        if plan.seconds > 4 * plans[0].seconds:
            continue
        filtered(x, out, plan)
        if problem := wrong(out, expected, x):
            problems.append(f"{name_of(plan)}: {problem}")
        sides[name_of(plan)] = lambda plan=plan: filtered(x, out, plan)  # type: ignore[misc]
        predicted[name_of(plan)] = plan.seconds
    del expected
    if peer:
        sides["peer"] = lambda: PEERS[mode](x, ratio)
    row: dict[str, object] = {"shape": shape, "ratio": ratio, "mode": mode, "problems": problems}
    if problems:
        return row
    seconds = alternate(sides, rounds, clock)
    routes = {name: taken for name, taken in seconds.items() if name != "peer"}
    chosen = name_of(plans[0])
    row |= {"chosen": chosen, "seconds": routes, "predicted": predicted}
    row["chosen_over_best"] = routes[chosen] / min(routes.values())
    if peer:
        row |= {"peer_seconds": seconds["peer"], "times": seconds["peer"] / routes[chosen]}
    return row


def render(row: dict[str, object], bar: float | None = None) -> str:
    """A row for people."""
    height, width = row["shape"]  # type: ignore[misc]
    label = f"{height:>5} x {width:<5} {row['mode']:<8} {row['ratio']:<4}"
    if row["problems"]:
        return f"{label} RED: {'; '.join(row['problems'])}"  # type: ignore[arg-type]
    routes: dict[str, float] = row["seconds"]  # type: ignore[assignment]
    told = ", ".join(f"{name} {1e3 * taken:.0f} ms" for name, taken in routes.items())
    line = f"{label} {row['chosen']:<17} chosen / best {row['chosen_over_best']:.2f}  ({told}"
    if "times" not in row:
        return f"{line})"
    met = "" if bar is None else f", bar {bar:.0f}: {'met' if row['times'] >= bar else 'MISSED'}"  # type: ignore[operator]
    return f"{line}, peer {1e3 * row['peer_seconds']:.0f} ms)  {row['times']:.1f} times the peer{met}"  # type: ignore[operator]


def sides_of(text: str) -> tuple[int, int]:
    """A shape as an option gives it: 4096x11008."""
    height, _, width = text.partition("x")
    return int(height), int(width)


def main(arguments: list[str] | None = None) -> int:
    """Run it; 0 when every result was right."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--grid", action="store_true", help="all shapes, ratios and modes, without the peer")
    parser.add_argument("--shapes", nargs="+", type=sides_of, default=None, metavar="HxW")
    parser.add_argument("--ideal", nargs="*", type=float, default=None, metavar="RATIO")
    parser.add_argument("--official", nargs="*", type=float, default=None, metavar="RATIO")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--cpu-time", action="store_true", help="this thread's processor time; needs --threads 1")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args(arguments)
    if options.cpu_time and options.threads != 1:
        parser.error("--cpu-time counts one thread; add --threads 1")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    clock = time.thread_time if options.cpu_time else time.perf_counter

    cases: list[tuple[tuple[int, int], float, str, float | None]] = BARS
    if options.grid or options.shapes:
        ratios = {
            "ideal": IDEAL if options.ideal is None else options.ideal,
            "official": OFFICIAL if options.official is None else options.official,
        }
        wanted = [(ratio, mode) for mode, each in ratios.items() for ratio in each]
        cases = [
            (shape, ratio, mode, None) for shape, (ratio, mode) in itertools.product(options.shapes or SHAPES, wanted)
        ]
    report = []
    for shape, ratio, mode, bar in cases:
        report.append(measure(shape, ratio, mode, options.rounds, clock, peer=not options.grid))
        print(render(report[-1], bar), flush=True)
    chosen = [row["chosen_over_best"] for row in report if "chosen_over_best" in row]
    if chosen:
        within = sum(each <= SLACK for each in chosen)  # type: ignore[operator]
        print(f"{within} of {len(chosen)} choices within {SLACK} of the best; the worst {max(chosen):.2f}")  # type: ignore[type-var]
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        settings = {"threads": torch.get_num_threads(), "cpu_time": options.cpu_time, "rounds": options.rounds}
        options.json.write_text(json.dumps({"environment": environment(), **settings, "rows": report}, indent=2) + "\n")
    return 1 if any(row["problems"] for row in report) else 0


if __name__ == "__main__":
    sys.exit(main())
