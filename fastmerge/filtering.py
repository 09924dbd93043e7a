"""What FR-Merging's filter would do to a model, from its headers alone: the routes, and how long they would take."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from . import ops
from .engine.checkpoint import open_checkpoint
from .engine.sources import FLOATS
from .errors import ArgumentError
from .methods.fr import INCLUDE, RATIOS
from .sizes import format_size


@dataclass(frozen=True)
class Filtered:
    """One weight and how it would be filtered."""

    name: str
    plan: ops.HighpassPlan

    def to_dict(self) -> dict[str, Any]:
        """For programs."""
        about = dataclasses.asdict(self.plan)
        shape = [about.pop("height"), about.pop("width")]
        return {"name": self.name, "shape": shape, **{key: about[key] for key in about if key not in ("ratio", "mode")}}

    def row(self) -> tuple[str, ...]:
        """For people."""
        plan = self.plan
        rank = str(plan.rank) if plan.route == "lowrank" else "-"
        columns, dropped = (str(plan.columns), str(plan.dropped)) if plan.route == "rfft" else ("-", "-")
        route = f"{plan.route} {('down columns', 'along rows')[plan.axis]}" if plan.route == "rfft" else plan.route
        shape = f"{plan.height} x {plan.width}"
        return self.name, shape, route, rank, dropped, columns, f"{1e3 * plan.seconds:.1f}"


def filtered(checkpoint: str, ratio: float | None, mode: str, include: Sequence[str]) -> list[Filtered]:
    """The weights of a checkpoint that the filter takes: matrices whose name one of the patterns finds.

    Errors: CheckpointError, ArgumentError for a pattern that is none, and where nothing is found.
    """
    finders = [_pattern(each) for each in include or [INCLUDE]]
    if mode not in RATIOS:
        raise ArgumentError(f"--mode must be {' or '.join(RATIOS)}, not {mode!r}.")
    with open_checkpoint(checkpoint) as opened:
        count = len(opened.tensors)
        # What is no floating-point number is not merged, such as an index of relative positions in attention.
        shapes = {name: info.shape for name, info in opened.tensors.items() if info.dtype in FLOATS}
    wanted = {
        name: shape
        for name, shape in shapes.items()
        if len(shape) == 2 and any(finder.search(name) for finder in finders)
    }
    if not wanted:
        matrices = [name for name, shape in shapes.items() if len(shape) == 2]
        example = f", such as {matrices[0]}" if matrices else ""
        raise ArgumentError(
            f"{checkpoint} has no matrix that is filtered: {len(matrices)} of its {count} tensors are "
            f"matrices{example}; name those that are meant with --include."
        )
    chosen = RATIOS[mode] if ratio is None else ratio
    return [Filtered(name, ops.highpass_plan(shape, chosen, mode=mode)) for name, shape in wanted.items()]


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise ArgumentError(f"--include holds {text!r}, which is not a regular expression ({error}).") from None


def table(found: list[Filtered]) -> Iterator[tuple[str, ...]]:
    """The heading, and a row for each weight."""
    yield "WEIGHT", "SHAPE", "ROUTE", "RANK", "DROPPED", "COLUMNS", "MS"
    yield from (each.row() for each in found)


def summary(found: list[Filtered]) -> str:
    """The total, in a sentence."""
    seconds, workspace = sum(each.plan.seconds for each in found), max(each.plan.workspace for each in found)
    one = found[0].plan
    return (
        f"{len(found)} weights, {one.mode} {one.ratio:g}: {seconds:.2f} s predicted of one core for each model, "
        f"{format_size(workspace)} of memory beside a weight and its result."
    )


def as_json(found: list[Filtered]) -> str:
    """All of it as one JSON object."""
    one = found[0].plan
    total = {"seconds": sum(each.plan.seconds for each in found), "workspace": max(x.plan.workspace for x in found)}
    return json.dumps({"ratio": one.ratio, "mode": one.mode, "weights": [x.to_dict() for x in found], **total})
