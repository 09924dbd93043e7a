"""A picture of a history: the scores of trials and the best one, generation by generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def canvas(width: float, height: float) -> Any:
    """A figure of so many inches to draw on; or a sentence that says why there is none.

    The canvas is this figure's alone: no window is opened, and no state of the library is touched.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        return f"no picture: matplotlib cannot be imported ({error}); install fastmerge[plot]."
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw(records: Sequence[Mapping[str, Any]], path: Path) -> str | None:
    """Draw the scores of a history to a PNG file; returns why not, where matplotlib is missing."""
    figure = canvas(7, 4)
    if isinstance(figure, str):
        return figure
    trials = [(r["generation"], r["score"]) for r in records if r["event"] == "evaluation" and r["score"] is not None]
    best: list[tuple[int, float]] = []
    for generation, score in trials:
        highest = score if not best else max(score, best[-1][1])
        if best and best[-1][0] == generation:
            best[-1] = generation, highest
        else:
            best.append((generation, highest))
    axes = figure.add_subplot()
    axes.plot([x for x, _ in trials], [y for _, y in trials], "o", ms=3, alpha=0.4, color="tab:gray", label="trials")
    axes.plot([x for x, _ in best], [y for _, y in best], drawstyle="steps-post", color="tab:blue", label="best")
    axes.set_xlabel("generation")
    axes.set_ylabel("development score")
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=120)
    return None
