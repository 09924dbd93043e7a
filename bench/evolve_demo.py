"""Evolver on the demo's three fine-tunes, over several seeds: what the search gains, and what is left on test text.

    make demo                                  # trains the models, once
    python bench/evolve_demo.py                # five seeds of eight generations
    python bench/evolve_demo.py --merger linear                                  # what all members merge to is scored
    python bench/evolve_demo.py --seeds 1 --generations 1 --test-bytes 4000      # a smoke test of the benchmark itself

The search sees development text alone, twice as much of it as in the demo, which is to be quick. In the end its model
is scored once on the test text of the demo's table, beside the members and their plain mean. The best score so far may
not fall from generation to generation, and the final model must score what its record says: a red check ends the run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=ROOT / "demo" / "models")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--merger", default=None, help="score what the members merge to by this method")
    parser.add_argument("--test-bytes", type=int, default=40_000, help="of each domain, as in the demo's table")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not (options.models / "family.json").is_file():
        print("The demo's models are not there; run `make demo` first.", file=sys.stderr)
        return 1

    import torch
    import transformers

    import fastmerge
    from demo import family, searches, text
    from demo.score import bits_per_byte
    from demo.verdict import mean

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    # A search to each core, as in the demo.
    torch.set_num_threads(1)
    splits = text.load()

    def score(logits: searches.Logits) -> dict[str, float]:
        return {
            domain: bits_per_byte(logits, text.sample(splits[domain].test, options.test_bytes))
            for domain in text.DOMAINS
        }

    def one(seed: int) -> dict[str, object]:
        began = time.perf_counter()
        final, report = searches.evolver(
            options.models, splits, score, generations=options.generations, seed=seed, merger=options.merger,
            size=2 * searches.DEVELOPMENT, piece=2 * searches.PIECE,
        )  # fmt: skip
        best = [-value for value in report.scores if value is not None]
        if best != sorted(best, reverse=True) or len(best) != options.generations + 1:
            raise AssertionError(f"the best score of seed {seed} fell: {best}")
        if report.final != -mean(final) or report.score != -best[-1]:
            raise AssertionError(f"seed {seed} says {report.score} and {report.final}, found {best[-1]} and {final}")
        return {
            "seed": seed, "development": best, "test": mean(final), "domains": final,
            "evaluations": report.evaluations, "digest": report.digest, "seconds": time.perf_counter() - began,
        }  # fmt: skip

    members = {domain: family.load(options.models / domain).eval() for domain in text.DOMAINS}
    single = {name: mean(score(lambda codes, m=m: m(input_ids=codes).logits)) for name, m in members.items()}
    averaged = family.load(options.models / "base").eval()
    averaged.load_state_dict(fastmerge.merge(list(members.values()), method="linear", weight=1.0))
    linear = mean(score(lambda codes: averaged(input_ids=codes).logits))
    best_single = min(single, key=lambda name: single[name])
    print("test, bits per byte, mean of the domains: " + ", ".join(f"{n} {v:.4f}" for n, v in single.items()))
    print(f"best single member {best_single} {single[best_single]:.4f}, their plain mean {linear:.4f}", flush=True)
    rows = []
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for row in pool.map(one, range(options.seeds)):
            rows.append(row)
            steps = " ".join(f"{value:.3f}" for value in row["development"])  # type: ignore[attr-defined]
            test = f"test {row['test']:.4f} ({row['seconds']:.0f} s)"
            print(f"seed {row['seed']}: development {steps}; {test}", flush=True)
    gains = [single[best_single] - float(row["test"]) for row in rows]  # type: ignore[arg-type]
    spread = statistics.stdev(gains) if len(gains) > 1 else 0.0
    print(
        f"gain on test over the best single member: mean {statistics.mean(gains):.4f} bits, standard deviation "
        f"{spread:.4f}, least {min(gains):.4f}; over their plain mean: "
        f"{statistics.mean(gains) - (single[best_single] - linear):+.4f}"
    )
    if options.json:
        options.json.write_text(json.dumps({"single": single, "linear": linear, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
