"""The config of `fastmerge sweep`: a merge config with a part that says what varies. Nothing here loads torch."""

from __future__ import annotations

import copy
import difflib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fastmerge.engine.config import Location, MergeConfig, read_config, read_yaml
from fastmerge.evolve.config import Reader

KEY = "sweep"
KEYS = ("grid", "candidates", "score", "final", "model", "seed", "write_best")
METHOD = "method"
MOST = 10_000
"""A grid of more candidates than this is a slip."""

Candidate = dict[str, Any]


@dataclass(frozen=True)
class SweepConfig:
    """A checked config.

    merge: the config without its `sweep:`, as plain values. candidates: of each what it sets; places: and where in the
    file that stands. merges: each candidate as a merge config, and contents: the same as plain values, ready to be
    written. score, final, model: as of `fastmerge evolve`. seed: of random methods. write_best: whether the best model
    is written. name: how messages call the config. lines: the line of everything in it. folder: where it lies.
    """

    merge: dict[str, Any]
    candidates: list[Candidate]
    places: list[dict[str, Location]]
    merges: list[MergeConfig]
    contents: list[dict[str, Any]]
    score: str | dict[str, Any]
    final: str | dict[str, Any] | None = None
    model: str | None = None
    seed: int = 0
    write_best: bool = False
    name: str = "sweep.yml"
    folder: Path = Path()
    lines: Mapping[Location, int] = field(default_factory=dict, repr=False)


def load(path: Path | str) -> SweepConfig:
    """Read a config. ConfigError: one sentence that says where and what."""
    content, _, lines = read_yaml(path)
    reader = _SweepReader(str(path), lines, (KEY,))
    return reader.sweep(content, Path(path).expanduser().resolve().parent)


def shown(value: Any) -> str:
    """A value as tables and pictures show it."""
    if isinstance(value, list):
        return ", ".join(map(shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def described(candidate: Candidate) -> str:
    """A candidate in one line."""
    return "; ".join(f"{name} {shown(value)}" for name, value in candidate.items()) or "as the config is"


class _SweepReader(Reader):
    """Plain values to a SweepConfig, refusing what is not understood."""

    def sweep(self, content: Any, folder: Path) -> SweepConfig:
        if not isinstance(content, Mapping) or KEY not in content:
            raise self.error((), "a sweep is a merge config with a part `sweep:`, which holds `grid:` and `score:`.")
        merge = {key: value for key, value in content.items() if key != KEY}
        part = content[KEY]
        if not isinstance(part, Mapping):
            raise self.error((), "`sweep` is a mapping of keys to values, such as `grid:` and `score:`.")
        for key in part:
            if key not in KEYS:
                near = difflib.get_close_matches(str(key), KEYS, n=1)
                hint = f"did you mean `{near[0]}`?" if near else f"known are {', '.join(KEYS)}."
                raise self.error((key,), f"the key `{key}` is not understood in a sweep; {hint}")
        score, final = self.score(part, "score"), self.score(part, "final")
        if score is None:
            raise self.error((), "the key `score` is missing; add `score: module:function`, higher is better.")
        self.check_apart(score, final)
        model, seed, write_best = part.get("model"), part.get("seed", 0), part.get("write_best", False)
        if model not in (None, "transformers"):
            self.function(model, ("model",))
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise self.error(("seed",), "`seed` must be a whole number.")
        if not isinstance(write_best, bool):
            raise self.error(("write_best",), "`write_best` must be true or false.")
        found = self.candidates(part)
        made = [self.applied(merge, candidate, places) for candidate, places in found]
        return SweepConfig(
            merge=merge,
            candidates=[candidate for candidate, _ in found],
            places=[{name: (KEY, *place) for name, place in places.items()} for _, places in found],
            merges=[config for config, _ in made],
            contents=[plain for _, plain in made],
            score=score,
            final=final,
            model=model,
            seed=seed,
            write_best=write_best,
            name=self.name,
            folder=folder,
            lines=self.lines,
        )

    def candidates(self, part: Mapping[str, Any]) -> list[tuple[Candidate, dict[str, Location]]]:
        """What each candidate sets, and where in the file each of its values stands."""
        if ("grid" in part) == ("candidates" in part):
            raise self.error((), "`sweep` holds either `grid:`, lists of values, or `candidates:`, a list; give one.")
        found = self.grid(part["grid"]) if "grid" in part else self.listed(part["candidates"])
        seen: dict[str, int] = {}
        for number, (candidate, places) in enumerate(found, 1):
            first = seen.setdefault(json.dumps(candidate, sort_keys=True), number)
            if first != number:
                here = next(iter(places.values()), ("candidates",))
                raise self.error(here, f"candidates {first} and {number} are the same; keep one.")
        return found

    def grid(self, content: Any) -> list[tuple[Candidate, dict[str, Location]]]:
        if not isinstance(content, Mapping) or not content:
            raise self.error(("grid",), "`grid` names what varies, as in `grid: {density: [0.3, 0.5]}`.")
        axes: list[list[tuple[str, Any, Location]]] = []
        for key, values in content.items():
            name = self.parameter(key, ("grid", key))
            if not isinstance(values, list) or not values:
                raise self.error(("grid", key), f"`{key}` lists the values to try, as in `{key}: [0.3, 0.5]`.")
            axes.append([(name, self.value(x, ("grid", key, i), name), ("grid", key, i)) for i, x in enumerate(values)])
        if math.prod(map(len, axes)) > MOST:
            raise self.error(("grid",), f"the grid has {math.prod(map(len, axes)):,} candidates; list fewer values.")
        return [
            ({name: value for name, value, _ in point}, {name: place for name, _, place in point})
            for point in itertools.product(*axes)
        ]

    def listed(self, content: Any) -> list[tuple[Candidate, dict[str, Location]]]:
        if not isinstance(content, list) or not content:
            raise self.error(("candidates",), "`candidates` lists mappings, as in `- {density: 0.3, weight: 1.0}`.")
        found: list[tuple[Candidate, dict[str, Location]]] = []
        for index, item in enumerate(content):
            here: Location = ("candidates", index)
            if not isinstance(item, Mapping):
                raise self.error(here, "a candidate is a mapping of parameters to values, as in `- {density: 0.3}`.")
            names = {self.parameter(key, (*here, key)): key for key in item}
            found.append(
                (
                    {name: self.value(item[key], (*here, key), name) for name, key in names.items()},
                    {name: (*here, key) for name, key in names.items()},
                )
            )
        return found

    def parameter(self, key: Any, path: Location) -> str:
        if not isinstance(key, str):
            raise self.error(path, "the name of a parameter is a text.")
        return {"merge_method": METHOD, "lambda_": "lambda"}.get(key, key)

    def value(self, value: Any, path: Location, name: str) -> Any:
        single = isinstance(value, bool | int | float | str)
        each = isinstance(value, list) and value and all(isinstance(x, bool | int | float) for x in value)
        if not single and not each:
            raise self.error(path, f"a value of `{name}` is a number or a text, or a list with one number per model.")
        if name == METHOD and not isinstance(value, str):
            raise self.error(path, f"`{name}` is the name of a merge method.")
        return value

    def applied(
        self, merge: Mapping[str, Any], candidate: Candidate, places: Mapping[str, Location]
    ) -> tuple[MergeConfig, dict[str, Any]]:
        """The merge config of a candidate: its values in place of those that stand there."""
        plain: dict[str, Any] = copy.deepcopy(dict(merge))
        lines = dict(self.lines)
        if METHOD in candidate:
            plain["merge_method"] = candidate[METHOD]
            self._stands(lines, ("merge_method",), places[METHOD])
        config = read_config(plain, "", self.name, lines)
        for name, value in candidate.items():
            if name == METHOD:
                continue
            for entry in plain["models"]:
                if isinstance(entry.get("parameters"), dict):
                    entry["parameters"].pop(name, None)
            if not isinstance(value, list):
                plain["parameters"] = {**(plain.get("parameters") or {}), name: value}
                self._stands(lines, ("parameters", name), places[name])
                continue
            entries = config.models if len(value) == len(config.models) else config.entries
            if len(value) != len(entries):
                raise self.error(
                    places[name],
                    f"`{name}` has {len(value)} values for {len(config.models)} models; give one number or one per "
                    "model.",
                )
            for entry, one in zip(entries, value, strict=True):
                index = entry.path[1]
                here = plain["models"][index]
                here["parameters"] = {**(here.get("parameters") or {}), name: one}
                self._stands(lines, (*entry.path, "parameters", name), places[name])
        text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
        return read_config(plain, text, self.name, lines), plain

    def _stands(self, lines: dict[Location, int], here: Location, there: Location) -> None:
        """What is told of a value is told of the line of the sweep that it comes from."""
        path = (*self.within, *there)
        found = next((self.lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self.lines), None)
        if found is not None:
            lines[here] = found


def varied(candidates: Sequence[Candidate]) -> list[str]:
    """The parameters in which candidates differ, in the order in which they are first named."""
    names = list(dict.fromkeys(name for candidate in candidates for name in candidate))
    return [name for name in names if len({json.dumps(one.get(name)) for one in candidates}) > 1]
