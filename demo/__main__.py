"""``python -m demo``: make the family, merge it from the YAML files beside this one, score everything, judge."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Read when torch and transformers are imported. Nothing here comes from a hub. Threads that wait for one another sleep:
# by default they spin, which on a machine that is busy with something else makes all of this four times slower.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

HERE = Path(__file__).resolve().parent
MERGES = ("linear", "task_arithmetic", "ties", "dare_ties", "pcb", "pcb_paper", "fr")
SCORED = 40_000
"""Bytes of each domain's test text that are scored, at most, from all over it."""
PCB = {"density": 0.2, "variant": "vision_es"}
"""As in pcb.yml, for the row whose lambda is searched."""


def main() -> int:
    """Run the demo; 0 when it showed what it should, 1 with the reasons on stderr otherwise."""
    import torch
    import transformers
    from rich.console import Console
    from rich.table import Table

    from demo import family, free, searches, text, verdict
    from demo.score import bits_per_byte

    started = time.perf_counter()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()

    splits = text.load()
    family.build(HERE / "models", splits)

    merged = HERE / "merged"
    shutil.rmtree(merged, ignore_errors=True)
    for name in MERGES:
        merge(HERE / f"{name}.yml", merged / name)

    def score(logits: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        return {domain: bits_per_byte(logits, text.sample(splits[domain].test, SCORED)) for domain in text.DOMAINS}

    def score_model(folder: Path) -> dict[str, float]:
        model = family.load(folder).eval()
        return score(lambda codes: model(input_ids=codes).logits)

    def score_free() -> dict[str, float]:
        return score(free.expected_bytes(HERE / "models", merged / "fr", splits))

    # A model to each core: its matrices are too small for two cores to share one well.
    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    with ThreadPoolExecutor(cores) as pool:
        # The longest comes first.
        evolved = pool.submit(searches.evolver, HERE / "models", splits, score)
        evolved_merged = pool.submit(searches.evolver, HERE / "models", splits, score, merger="linear")
        searched = pool.submit(searches.pcb, HERE / "models", splits, score, **PCB)
        routed = pool.submit(score_free)
        scored = {name: pool.submit(score_model, HERE / "models" / name) for name in (verdict.BASE, *text.DOMAINS)}
        also = {name: pool.submit(score_model, merged / name) for name in MERGES}
        models = {name: future.result() for name, future in scored.items()}
        merges = {name: future.result() for name, future in also.items()}
        found = {
            "pcb, lambda searched": searched.result(),
            "evolver, searched": evolved.result(),
            "evolver + linear, searched": evolved_merged.result(),
        }
        compared = {
            **merges,
            **{name: scores for name, (scores, _) in found.items()},
            "free (fr + experts)": routed.result(),
        }

    header, *rows = verdict.table(models, compared)
    grid = Table(
        *header[:1],
        title="Bits per byte of test text, and the change from the base (lower is better)",
        caption="searched: chosen by scores on development text, which is none of this",
    )
    for column in header[1:]:
        grid.add_column(column, justify="right")
    for number, row in enumerate(rows, 1):
        grid.add_row(*row, end_section=number == len(models))
    # Wide enough for every column where the output is no terminal.
    Console(width=None if sys.stdout.isatty() else 100).print(grid)
    for name, (_, report) in found.items():
        print(f"{name}: {searches.told(report)}")

    failures = verdict.failures(models, compared)
    for sentence in failures:
        print(f"demo failed: {sentence}", file=sys.stderr)
    if not failures:
        best = min(merges, key=lambda name: verdict.mean(merges[name]))
        print(f"best merge: {best}, in {merged / best}; all done in {time.perf_counter() - started:.0f} s")
    return 1 if failures else 0


def merge(config: Path, out: Path) -> None:
    """``fastmerge merge CONFIG OUT``, as a person would run it: from the repository's root, in a process of its own."""
    command = [Path(sys.executable).with_name("fastmerge"), "merge", config, out, "--quiet"]
    started = time.perf_counter()
    result = subprocess.run(command, cwd=HERE.parent, check=False)
    if result.returncode:
        raise SystemExit(f"demo failed: `fastmerge merge {config.name}` ended with exit code {result.returncode}")
    print(f"merged: fastmerge merge demo/{config.name} -> {out} ({time.perf_counter() - started:.1f} s)")


if __name__ == "__main__":
    sys.exit(main())
