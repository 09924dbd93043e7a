"""``python -m demo.plot_pcb``: how PCB-Merging's score depends on density and lambda, on the demo's models.

Needs the models that ``make demo`` trains, and matplotlib. Writes a picture and prints the numbers in it.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

HERE = Path(__file__).resolve().parent
DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
LAMBDAS = (0.3, 0.5, 0.7, 1.0, 1.3)
VARIANTS = ("vision_es", "vision", "script", "paper")


def main() -> int:
    """Merge and score at every point of the grid; 1 where the demo's models are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "pictures" / "pcb.svg")
    parser.add_argument("--bytes", type=int, default=20_000, help="held-out bytes to score of each domain")
    arguments = parser.parse_args()
    models = HERE / "models"
    if not (models / "family.json").is_file():
        print("The demo's models are not there; run `make demo` first.", file=sys.stderr)
        return 1

    import torch
    import transformers

    from demo import family, text, verdict

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    splits = {name: split.held_out[: arguments.bytes] for name, split in text.load().items()}
    base = family.load(models / verdict.BASE).eval()
    tuned = [family.load(models / domain).state_dict() for domain in text.DOMAINS]
    scores = {
        variant: [[score(base, tuned, splits, variant, density, scale) for density in DENSITIES] for scale in LAMBDAS]
        for variant in VARIANTS
    }
    for variant, rows in scores.items():
        print(f"{variant}: bits per byte, mean of the domains; density {', '.join(map(str, DENSITIES))}")
        for scale, row in zip(LAMBDAS, rows, strict=True):
            print(f"  lambda {scale:<4} " + "  ".join(f"{value:.3f}" for value in row))
    start = mean_score(base, splits)
    print(f"base: {start:.3f}")
    draw(scores, start, arguments.out)
    print(f"picture: {arguments.out}")
    return 0


def score(base, tuned, splits, variant, density, scale) -> float:  # type: ignore[no-untyped-def]
    """The mean score of one merge; the base model's weights are put back afterwards."""
    import fastmerge

    before = {name: value.clone() for name, value in base.state_dict().items()}
    merged = fastmerge.merge(
        tuned, base=before, method="pcb", variant=variant, density=density, lambda_=scale, weight=1.0
    )
    base.load_state_dict(merged)
    result = mean_score(base, splits)
    base.load_state_dict(before)
    return result


def mean_score(model, splits) -> float:  # type: ignore[no-untyped-def]
    """Bits per byte, the mean of the domains."""
    from demo.score import bits_per_byte

    each = [bits_per_byte(lambda codes: model(input_ids=codes).logits, held_out) for held_out in splits.values()]
    return sum(each) / len(each)


def draw(scores: dict[str, list[list[float]]], start: float, out: Path) -> None:
    """One panel for each variant, one line for each lambda."""
    import matplotlib

    matplotlib.use("svg")
    # The same picture has the same bytes.
    matplotlib.rcParams["svg.hashsalt"] = "fastmerge"
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(scores), sharey=True, figsize=(3.2 * len(scores), 3.2), layout="constrained"
    )
    shades = pyplot.get_cmap("viridis")
    for panel, (variant, rows) in zip(panels, scores.items(), strict=True):
        for number, (scale, row) in enumerate(zip(LAMBDAS, rows, strict=True)):
            panel.plot(DENSITIES, row, marker="o", markersize=3, color=shades(number / len(LAMBDAS)), label=f"{scale}")
        panel.axhline(start, color="grey", linewidth=1, linestyle="--")
        panel.set_xscale("log")
        panel.set_title(variant)
        panel.set_xlabel("density")
    panels[0].set_ylabel("bits per byte (lower is better)")
    panels[-1].legend(title="lambda", fontsize="small")
    highest = start + 0.15
    panels[0].set_ylim(min(min(row) for rows in scores.values() for row in rows) - 0.02, highest)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    sys.exit(main())
