"""What evolving a population of large models by recipe takes: peak memory, and where the seconds of a trial go.

    python bench/evolve_memory.py                                       # 8 members of 0.55 billion parameters, in bf16
    python bench/evolve_memory.py --scale tiny --generations 2          # a smoke test of the benchmark itself

The members are the family's base and its fine-tunes (bench/make_family.py makes them, and --delete removes them
afterwards). Every second trial is accepted, so that chains of recipes grow as fast as they would in a search that goes
well. The evaluator makes a checksum of every eighth tensor. Each way of holding the members runs in a process of its
own: models from files, which are kept in the memory that they were read into, and models that are lent, by recipe. Both
must come to the same bits, and their peak may be the inputs, one model and 500 MB.

Seconds of a trial: `regenerate` makes members again from recipes, `trial` mixes them into the live model, `evaluate` is
the evaluator, and `between` is all from one evaluation to the next trial, in which a rejected trial is dropped. A copy
is an input model written to the live one, as generation 0 does.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

BAR = 500_000_000
WAYS = {"files": "models from files", "lent": "models in memory, by recipe"}


class Clock:
    """What became of the seconds: recipes of others than the trial, the trial's own, the evaluator, the rest."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.calls = 0
        self._target: object = None
        self._spent = dict.fromkeys(("regenerate", "trial"), 0.0)
        self._ended: float | None = None
        self._written = 0.0

    def watch(self) -> None:
        """Count the seconds of populations and recipes from here on."""
        from fastmerge.evolve.population import Population
        from fastmerge.evolve.recipes import Recipe

        write, applies = Population.write, {name: getattr(Recipe, name) for name in ("apply", "apply_whole")}

        def written(population: Any, target: Any, live: Any) -> None:
            began = time.perf_counter()
            between = 0.0 if self._ended is None else began - self._ended
            self._target, self._spent = target, dict.fromkeys(("regenerate", "trial"), 0.0)
            write(population, target, live)
            self._written = time.perf_counter() - began
            self.rows.append({**self._spent, "between": between, "write": self._written})

        def timed(name: str) -> Any:
            def apply(recipe: Any, *arguments: Any, **named: Any) -> Any:
                began = time.perf_counter()
                result = applies[name](recipe, *arguments, **named)
                kind = "trial" if recipe is self._target else "regenerate"
                self._spent[kind] += time.perf_counter() - began
                return result

            return apply

        Population.write = written  # type: ignore[method-assign]
        for name in applies:
            setattr(Recipe, name, timed(name))

    def score(self, model: dict[str, Any]) -> float:
        """The evaluator: every second trial is better than all before it."""
        from fastmerge.evolve.members import raw_bytes

        began = time.perf_counter()
        checksum = 0
        for tensor in list(model.values())[::8]:
            checksum = zlib.adler32(raw_bytes(tensor), checksum)
        self.calls += 1
        self._ended = time.perf_counter()
        self.rows[-1] |= {"evaluate": self._ended - began, "checksum": checksum}
        return float(self.calls) * (1 if self.calls % 2 else -1)


def child(options: argparse.Namespace) -> None:
    """One way, in this process; the figures as JSON on standard output."""
    from fastmerge.evolve import evolve
    from fastmerge.evolve.members import load

    clock = Clock()
    clock.watch()
    folders = [Path(each) for each in options.folders]
    models: list[Any] = [load(each, each.name)[1] for each in folders] if options.way == "lent" else list(folders)
    model = sum(file.stat().st_size for file in folders[0].glob("*.safetensors"))
    report = evolve(
        models, clock.score, strategy=options.strategy, generations=options.generations,
        members="recipes",
    )  # fmt: skip
    figures = {
        "digest": report.digest, "model": model, "members": len(models),
        "checksums": [row["checksum"] for row in clock.rows if "checksum" in row], "rows": clock.rows,
        "accepted": sum(each.get("accepted", 0) for each in report.history),
    }  # fmt: skip
    print(json.dumps(figures))


def table(way: str, figures: dict[str, Any], peak: int) -> bool:
    """Print what one way took; whether its memory is within the bar."""
    count, model = figures["members"], figures["model"]
    over = peak - (count + 1) * model
    print(
        f"{WAYS[way]}: peak {peak / 1e9:.2f} GB = {count} inputs of {model / 1e9:.2f} GB + one model "
        f"{'+' if over >= 0 else '-'} {abs(over) / 1e6:.0f} MB"
        f" (bar {BAR / 1e6:.0f} MB{', MISSED' if over > BAR else ''})"
    )
    rows = figures["rows"]
    copy = statistics.median(row["write"] for row in rows[:count])
    print(f"  a copy {copy:.3f} s; {figures['accepted']} trials accepted")
    trials = [row for row in rows[count:] if "evaluate" in row]
    for first in range(0, len(trials), count):
        part = trials[first : first + count]
        mean = {key: statistics.mean(row[key] for row in part) for key in ("write", "evaluate", "between")}
        split = {key: statistics.mean(row[key] for row in part) for key in ("regenerate", "trial")}
        print(
            f"  generation {first // count + 1}: {mean['write']:.3f} s a trial ({mean['write'] / copy:.1f} copies): "
            f"regenerate {split['regenerate']:.3f}, trial {split['trial']:.3f}; "
            f"evaluate {mean['evaluate']:.3f}, between {mean['between'] * 1000:.1f} ms"
        )
    return over <= BAR


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", default="full")
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--generations", type=int, default=3)
    parser.add_argument("--strategy", default="evolver")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--family", type=Path, default=None)
    parser.add_argument("--delete", action="store_true", help="remove the family afterwards")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folders", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        child(options)
        return 0

    import measure

    place = options.family or HERE / "data" / f"family-{options.scale}-bfloat16-{options.members}-members"
    # In a process of its own: what it allocates is no part of what is measured.
    subprocess.run(
        [sys.executable, str(HERE / "make_family.py"), "--scale", options.scale, "--models", str(options.members - 1),
         "--out", str(place)], check=True,
    )  # fmt: skip
    folders = [place / "base", *(place / f"model-{number}" for number in range(1, options.members))]
    found: dict[str, dict[str, Any]] = {}
    passed = True
    try:
        for way in options.ways:
            run = measure.run_measured(
                [sys.executable, str(Path(__file__).resolve()), "--way", way, "--folders", *map(str, folders),
                 "--generations", str(options.generations), "--strategy", options.strategy],
            )  # fmt: skip
            if run.status:
                print(run.stderr, file=sys.stderr)
                return 1
            found[way] = json.loads(run.stdout.splitlines()[-1]) | {"peak": run.peak_bytes, "seconds": run.seconds}
            passed &= table(way, found[way], run.peak_bytes)
    finally:
        if options.delete:
            shutil.rmtree(place)
    if len({(each["digest"], *each["checksums"]) for each in found.values()}) != 1:
        print("RED: the ways do not come to the same bits")
        return 1
    print(f"all ways come to the same bits: {next(iter(found.values()))['digest'][:16]}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
