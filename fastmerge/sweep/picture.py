"""A picture of a sweep: the score against what varies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastmerge.evolve.picture import canvas
from fastmerge.sweep.config import Candidate, shown, varied

Point = tuple[Any, float]


def draw(candidates: Sequence[Candidate], scores: Sequence[float | None], path: Path) -> str | None:
    """Draw to a PNG file; returns why not, where matplotlib is missing or there is nothing to draw.

    One parameter: its line. Two: a line for each value of the one with fewer values. More: a panel for each, with all
    candidates and the best of each value.
    """
    known = [(one, score) for one, score in zip(candidates, scores, strict=True) if score is not None]
    names = varied(candidates)
    if not known or not names:
        return "no picture: there are no two scores to compare."
    across = len(names) if len(names) > 2 else 1
    figure = canvas(max(7.0, 3.2 * across), 4)
    if isinstance(figure, str):
        return figure
    panels = figure.subplots(1, across, sharey=True, squeeze=False)[0]
    if across == 1:
        x = max(names, key=lambda name: len(_values(known, name)))
        others = [name for name in names if name != x]
        lines: dict[str, list[Point]] = {}
        for one, score in known:
            lines.setdefault(" ".join(shown(one.get(name)) for name in others), []).append((one.get(x), score))
        for label, points in lines.items():
            _line(panels[0], points, _values(known, x), marker="o", label=label)
        if others:
            panels[0].legend(title=others[0], frameon=False)
        panels[0].set_xlabel(x)
    else:
        for axes, name in zip(panels, names, strict=True):
            values = _values(known, name)
            places = _places(values)
            axes.plot([places[shown(one.get(name))] for one, _ in known], [score for _, score in known], "o",
                      ms=3, alpha=0.4, color="tab:gray")  # fmt: skip
            best = [(v, max(s for one, s in known if one.get(name) == v)) for v in values]
            _line(axes, best, values, marker="o", color="tab:blue")
            axes.set_xlabel(name)
    panels[0].set_ylabel("score")
    figure.savefig(path, dpi=120)
    return None


def _values(known: Sequence[tuple[Candidate, float]], name: str) -> list[Any]:
    """The values of a parameter, each once: numbers by size, others in the order in which they come."""
    found: list[Any] = []
    for one, _ in known:
        if one.get(name) not in found:
            found.append(one.get(name))
    return sorted(found) if all(_is_number(value) for value in found) else found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _places(values: Sequence[Any]) -> dict[str, float]:
    """Where along the axis a value is: a number where it belongs, others side by side."""
    numbers = all(_is_number(value) for value in values)
    return {shown(value): float(value) if numbers else float(place) for place, value in enumerate(values)}


def _line(axes: Any, points: Sequence[Point], values: Sequence[Any], **style: Any) -> None:
    places = _places(values)
    along = sorted((places[shown(value)], score) for value, score in points)
    axes.plot([x for x, _ in along], [y for _, y in along], **style)
    if not all(_is_number(value) for value in values):
        axes.set_xticks(list(places.values()), list(places))
