"""The statistics file: what a merge found out about its models, kept for the next merge of the same models.

Statistics of a whole model cost passes over it, and do not depend on the weights with which it is merged. The file says
which models they are of; where one of those has changed, nothing in it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastmerge.engine.atomic import replacing
from fastmerge.engine.checkpoint import Checkpoint
from fastmerge.engine.plan import Plan
from fastmerge.errors import ArgumentError
from fastmerge.methods.base import Statistic

FORMAT = 1
"""Version of the file's layout and of what its numbers mean."""

_MALFORMED = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What reading a file of another shape raises, here or where a statistic makes a tensor of what stands in it."""


class StatisticsFile:
    """One such file, which may not exist yet."""

    def __init__(self, path: Path, models: Sequence[Checkpoint], plan: Plan, on_nonfinite: str) -> None:
        """models: base first, as opened. plan: whose statistics are wanted."""
        self.path = path
        self.inputs = [_fingerprint(model) for model in models]
        names = "\n".join(sorted(f"{job.name} {job.shape}" for job in plan.counted))
        # With zeros in place of NaN and Inf, a model is another model.
        self.about = {
            "tensors": hashlib.sha256(names.encode()).hexdigest(),
            "zeroed": on_nonfinite == "zero",
            "base": plan.method.needs_base,
        }
        self.entries: list[dict[str, Any]] = []

    def read(self, statistics: Sequence[Statistic]) -> tuple[dict[str, Any], str | None]:
        """What the file knows of these statistics, by name, and a sentence for a person where it says otherwise.

        Raises ArgumentError where there is something else in the file, or it cannot be read.
        """
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return {}, None
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is no text"
            raise ArgumentError(f"{self.path} cannot be read ({reason}); name another file for statistics.") from None
        try:
            return self._known(json.loads(text), statistics)
        except _MALFORMED:
            raise ArgumentError(
                f"{self.path} is not a file of statistics; name another one, or remove it if it is not needed."
            ) from None

    def _known(self, content: Any, statistics: Sequence[Statistic]) -> tuple[dict[str, Any], str | None]:
        """As `read`, of the file's content; where that is something else, one of _MALFORMED is raised."""
        stored, about, entries = content["inputs"], content["about"], list(content["statistics"])
        if content["fastmerge_statistics"] != FORMAT:
            return {}, f"{self.path} is of another version of fastmerge, so its statistics are found again."
        if about != self.about or stored != self.inputs:
            return {}, f"{self.path} is about {self._difference(stored)}, so its statistics are found again."
        known: dict[str, Any] = {}
        for statistic in statistics:
            for entry in entries:
                if _is_of(entry, statistic) and statistic.name not in known:
                    known[statistic.name] = statistic.load(entry["value"])
        self.entries = entries
        return known, None

    def _difference(self, stored: Any) -> str:
        if not isinstance(stored, list) or len(stored) != len(self.inputs):
            return "other models"
        changed = [number for number, (old, new) in enumerate(zip(stored, self.inputs, strict=True)) if old != new]
        files = [
            new_file["name"]
            for number in changed
            for old_file, new_file in zip(stored[number].get("files", []), self.inputs[number]["files"], strict=False)
            if old_file != new_file
        ]
        if not changed:
            return "other tensors of these models"
        which = ", ".join(f"number {number}" if number or not self.about["base"] else "the base" for number in changed)
        return f"models that have changed since ({which}{f': {files[0]}' if files else ''})"

    def write(self, statistics: Sequence[Statistic], known: Mapping[str, Any]) -> None:
        """Keep what is known now, beside what the file holds about the same models. All of it or nothing is written."""
        entries = list(self.entries)
        for statistic in statistics:
            if statistic.name not in known or any(_is_of(entry, statistic) for entry in entries):
                continue
            value = statistic.dump(known[statistic.name])
            if value is not None:
                entries.append({"name": statistic.name, "of": statistic.depends_on(), "value": value})
        if entries == self.entries:
            return
        content = {
            "fastmerge_statistics": FORMAT,
            "about": self.about,
            "inputs": self.inputs,
            "statistics": entries,
        }
        with replacing(self.path) as beside:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            beside.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _is_of(entry: Mapping[str, Any], statistic: Statistic) -> bool:
    return entry.get("name") == statistic.name and entry.get("of") == json.loads(json.dumps(statistic.depends_on()))


def _fingerprint(model: Checkpoint) -> dict[str, Any]:
    """What changes when a model does: its files' names, sizes, times and headers, and a commit of the hub."""
    identity = model.identity()
    del identity["ref"]
    # The one time that whoever changes a file cannot set back.
    identity["changed_ns"] = [os.stat(file).st_ctime_ns for file in model.files]
    return json.loads(json.dumps(identity))
