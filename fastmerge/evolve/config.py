"""The config of `fastmerge evolve`: which models, which search, and whose scores. Nothing here loads torch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastmerge.engine.config import Location, place, read_yaml
from fastmerge.errors import ConfigError

STRATEGIES = ("evolver", "de", "cade")
SEARCHES = ("cma", "optuna")
COMMON_KEYS = ("models", "base_model", "strategy", "seed", "parameters", "score", "final", "model")
EVOLVE_KEYS = ("generations", "merger", "exclude", "members")
SEARCH_KEYS = ("merge_method", "space", "evaluations")
TASK_KEYS = ("tasks", "limit", "metric")

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


@dataclass(frozen=True)
class EvolveConfig:
    """A checked config.

    models, base_model: checkpoints. strategy: of STRATEGIES or SEARCHES. parameters: the strategy's settings, or the
    fixed parameters of the merge method. score, final: `module:function`, or a mapping with lm-eval's `tasks`; final
    may be None. model: `module:function` that makes a live module, "transformers", or None for a dict of tensors.
    source: the text. folder: where the config lies, in which modules are looked for, too.
    """

    models: list[str]
    score: str | dict[str, Any]
    final: str | dict[str, Any] | None = None
    base_model: str | None = None
    strategy: str = "evolver"
    seed: int = 0
    generations: int = 15
    evaluations: int = 50
    merge_method: str = "ties"
    parameters: dict[str, Any] = field(default_factory=dict)
    space: dict[str, Any] = field(default_factory=dict)
    merger: str | dict[str, Any] | None = None
    exclude: list[str] = field(default_factory=list)
    members: str = "auto"
    model: str | None = None
    source: str = ""
    folder: Path = Path()


def load(path: Path | str) -> EvolveConfig:
    """Read a config. ConfigError: one sentence that says where and what."""
    content, text, lines = read_yaml(path)
    return Reader(str(path), lines).config(content, text, Path(path).expanduser().resolve().parent)


class Reader:
    """What a config says of scores, live models and searches. within: the part of the file that it is, if not all."""

    def __init__(self, name: str, lines: Mapping[Location, int], within: Location = ()) -> None:
        self.name = name
        self.lines = lines
        self.within = within

    def error(self, path: Location, sentence: str) -> ConfigError:
        """The error that says where in the file it is."""
        return ConfigError(f"{place(self.name, self.lines, (*self.within, *path))}: {sentence}")

    def config(self, content: Any, text: str, folder: Path) -> EvolveConfig:
        """All of a search's config."""
        if not isinstance(content, Mapping):
            raise self.error((), "a config is a mapping of keys to values, such as `models:` and `score:`.")
        strategy = content.get("strategy", "evolver")
        if strategy not in (*STRATEGIES, *SEARCHES):
            raise self.error(("strategy",), f"`strategy` is one of {', '.join((*STRATEGIES, *SEARCHES))}.")
        searches = strategy in SEARCHES
        self.check_keys(content, (*COMMON_KEYS, *(SEARCH_KEYS if searches else EVOLVE_KEYS)), strategy)
        if searches and not isinstance(content.get("space"), Mapping):
            raise self.error(("space",), "`space` names what is searched, as in `space: {density: [0.1, 1.0]}`.")
        score, final = self.score(content, "score"), self.score(content, "final")
        if score is None:
            raise self.error((), "the key `score` is missing; add `score: module:function`, higher is better.")
        self.check_apart(score, final)
        found: dict[str, Any] = {
            "models": self.models(content.get("models")),
            "score": score,
            "final": final,
            "strategy": strategy,
            "source": text,
            "folder": folder,
        }
        for key, kind, words in (
            ("base_model", str, "a path or a hub name"),
            ("seed", int, "a whole number"),
            ("generations", int, "a whole number"),
            ("evaluations", int, "a whole number"),
            ("merge_method", str, "the name of a merge method"),
            ("parameters", dict, "a mapping of names to values"),
            ("space", dict, "a mapping of names to ranges"),
            ("merger", (str, dict), "a merge method's name, or a mapping with `method`"),
            ("exclude", list, "a list of regular expressions"),
            ("members", str, "auto, recipes or tensors"),
            ("model", str, "`transformers`, or `module:function`"),
        ):
            if content.get(key) is None:
                continue
            if not isinstance(content[key], kind) or isinstance(content[key], bool):
                raise self.error((key,), f"`{key}` must be {words}.")
            found[key] = content[key]
        if found.get("model") not in (None, "transformers"):
            self.function(found["model"], ("model",))
        for name, value in found.get("parameters", {}).items():
            if isinstance(value, list) and name in ("F", "CR"):
                found["parameters"] = {**found["parameters"], name: tuple(value)}
        return EvolveConfig(**found)

    def check_keys(self, content: Mapping[str, Any], known: tuple[str, ...], strategy: str) -> None:
        """Refuse keys that are none of these."""
        for key in content:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean `{near[0]}`?" if near else f"known with {strategy} are {', '.join(known)}."
                raise self.error((key,), f"the key `{key}` is not understood; {hint}")

    def models(self, content: Any) -> list[str]:
        """The names of models."""
        if not isinstance(content, list) or not content:
            raise self.error(("models",), "`models` lists the first members: paths or hub names, one in each line.")
        found = []
        for index, item in enumerate(content):
            name = item.get("model") if isinstance(item, Mapping) and set(item) == {"model"} else item
            if not isinstance(name, str) or not name.strip():
                raise self.error(("models", index), "a model is a path or a hub name; write `- NAME`.")
            found.append(name.strip())
        return found

    def score(self, content: Mapping[str, Any], key: str) -> str | dict[str, Any] | None:
        """A score under this key: a function's name, or lm-eval's tasks."""
        value = content.get(key)
        if value is None:
            return None
        if isinstance(value, Mapping):
            for name in value:
                if name not in TASK_KEYS:
                    raise self.error((key, name), f"`{name}` is not understood here; known are {', '.join(TASK_KEYS)}.")
            tasks = value.get("tasks")
            if not isinstance(tasks, list) or not tasks or not all(isinstance(task, str) for task in tasks):
                raise self.error((key,), "`tasks` lists the names of lm-eval tasks.")
            return dict(value)
        return self.function(value, (key,))

    def function(self, value: Any, path: Location) -> str:
        """A function's name."""
        if not isinstance(value, str) or not _FUNCTION.fullmatch(value):
            raise self.error(path, f"`{path[0]}` names a function as `package.module:function`, not {value!r}.")
        return value

    def check_apart(self, score: str | dict[str, Any], final: str | dict[str, Any] | None) -> None:
        """Refuse a final score of what the other one has looked at."""
        shared = score == final
        if isinstance(score, dict) and isinstance(final, dict):
            shared = bool(set(score["tasks"]) & set(final["tasks"]))
        if shared:
            raise self.error(
                ("final",),
                "`final` looks at what `score` has looked at, so it would say nothing new of the chosen model; give it "
                "other examples, or leave it out.",
            )
