"""Differential evolution on weights beside scipy's: the same first points, F, CR and number of evaluations.

    python bench/evolve_optimise.py                            # sphere, Rosenbrock, Rastrigin of 100 to 1000 parameters
    python bench/evolve_optimise.py --sizes 20 --generations 5 --seeds 2     # a smoke test of the benchmark itself

The "models" are points, cut into two tensors. Both minimise by rand/1/bin, each with random numbers of its own; so the
means over several seeds are compared, and what we reach may be at most 1.2 times what scipy reaches. Seconds are those
of everything but the function itself for us, and of everything for scipy, whose functions see a whole population.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import differential_evolution

from fastmerge.evolve import De, evolve

BAR = 1.2

FUNCTIONS = {
    "sphere": (lambda x: float((x * x).sum()), 5.0),
    "rosenbrock": (lambda x: float((100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()), 2.0),
    "rastrigin": (lambda x: float((x * x - 10.0 * np.cos(2 * np.pi * x) + 10.0).sum()), 5.12),
}


def first_points(reach: float, members: int, size: int, seed: int) -> np.ndarray:
    drawn: np.ndarray = np.random.default_rng(seed).uniform(-reach, reach, (members, size))
    return drawn.astype(np.float32).astype(np.float64)


def ours(function: object, first: np.ndarray, F: float, CR: float, generations: int, seed: int) -> tuple[float, float]:  # noqa: N803
    """What we reach, and the seconds that it takes without the function."""
    cut = first.shape[1] // 2
    models = [{"a": torch.from_numpy(p[:cut]).float(), "b": torch.from_numpy(p[cut:]).float()} for p in first]
    inside = 0.0

    def score(model: dict[str, torch.Tensor]) -> float:
        nonlocal inside
        began = time.perf_counter()
        value = -function(torch.cat([model["a"], model["b"]]).double().numpy())  # type: ignore[operator]
        inside += time.perf_counter() - began
        return float(value)

    began = time.perf_counter()
    report = evolve(
        models, score, strategy=De(variants="rand/1", F=F, CR=CR), generations=generations, seed=seed, members="tensors"
    )
    assert report.score is not None and report.evaluations == len(first) * (generations + 1)
    return -report.score, time.perf_counter() - began - inside


def theirs(function: object, first: np.ndarray, F: float, CR: float, generations: int, seed: int) -> float:  # noqa: N803
    found = differential_evolution(
        function, [(-1e9, 1e9)] * first.shape[1], strategy="rand1bin", init=first, mutation=F, recombination=CR,
        maxiter=generations, tol=0, polish=False, rng=seed,
    )  # fmt: skip
    assert found.nfev == len(first) * (generations + 1)
    return float(found.fun)


def row(name: str, size: int, options: argparse.Namespace) -> dict[str, object]:
    function, reach = FUNCTIONS[name]
    reached, peers, starts, seconds = [], [], [], 0.0
    for seed in range(options.seeds):
        first = first_points(reach, options.members, size, seed)
        value, took = ours(function, first, options.F, options.CR, options.generations, seed)
        reached.append(value)
        peers.append(theirs(function, first, options.F, options.CR, options.generations, seed))
        starts.append(min(function(point) for point in first))
        seconds += took
    evaluations = options.members * (options.generations + 1)
    ratio = float(np.mean(reached) / np.mean(peers))
    return {
        "function": name, "parameters": size, "evaluations": evaluations, "seeds": options.seeds,
        "start": float(np.mean(starts)), "fastmerge": float(np.mean(reached)), "scipy": float(np.mean(peers)),
        "ratio": ratio, "met": ratio <= BAR, "ms_a_trial": 1000 * seconds / options.seeds / evaluations,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--members", type=int, default=20)
    parser.add_argument("--generations", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--F", type=float, default=0.4)
    parser.add_argument("--CR", type=float, default=0.1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for name in FUNCTIONS:
        for size in options.sizes:
            rows.append(row(name, size, options))
            one = rows[-1]
            print(
                f"{name:<10} {size:>5} parameters, {one['evaluations']} evaluations: {one['start']:.4g} -> "
                f"{one['fastmerge']:.4g}, scipy {one['scipy']:.4g}: {one['ratio']:.2f} of it, "
                f"{one['ms_a_trial']:.2f} ms a trial {'' if one['met'] else '(MISSED)'}",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps({"bar": BAR, "rows": rows}, indent=2) + "\n")
    return 0 if all(one["met"] for one in rows) else 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
