"""The merge config: mergekit's `models:` form of YAML, read strictly and remembered with its line numbers.

Nothing here loads torch or reads a model, so that a mistake in a config is told at once. What the parameters mean and
which values they may have is the method's matter; here they are only known to be scalars, lists along the layers, or
filters. Whoever refuses one later says where it stands by `MergeConfig.where`.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from fastmerge.errors import ConfigError

__all__ = ["MergeConfig", "ModelEntry", "Setting", "load_config"]

Scalar: TypeAlias = bool | int | float | str
Setting: TypeAlias = Scalar | list[Any] | dict[str, Any]
"""A parameter as written: a scalar, a list of scalars, a mapping {filter, value}, or a list of such mappings."""
Location: TypeAlias = tuple[str | int, ...]
"""Where something stands in the config: ("models", 0, "parameters", "weight")."""

TOP_KEYS = (
    "merge_method",
    "models",
    "base_model",
    "parameters",
    "exclude",
    "dtype",
    "out_dtype",
    "tokenizer_source",
)
MODEL_KEYS = ("model", "parameters")
CONDITION_KEYS = ("filter", "value")
DTYPES = ("float32", "bfloat16", "float16")
_INSIDE = "or run this YAML with `fastmerge-yaml`, where mergekit sees to it"
NOT_YET: dict[str, str] = {
    "slices": f"list whole models under `models`, {_INSIDE}",
    "modules": f"list whole models under `models`, {_INSIDE}",
    "tokenizer": f"remove it (the base's tokenizer is kept) and merge models that share one vocabulary, {_INSIDE}",
    "chat_template": f"remove it (the base's is kept) and edit the merged model's tokenizer afterwards, {_INSIDE}",
}
"""mergekit's keys that are known and not supported, with what to do instead."""

_MAX_NODES = 100_000  # aliases let a few lines of YAML unfold into billions of values


@dataclass(frozen=True)
class ModelEntry:
    """One model of the config, its own parameters, and where it stands."""

    model: str
    parameters: dict[str, Setting] = field(default_factory=dict)
    path: Location = ()


@dataclass(frozen=True)
class MergeConfig:
    """A checked config.

    Attributes:
        merge_method: the method's name, as written.
        models: the models that are merged into the base, in order; the base itself is not among them.
        entries: every model as listed, the base included where it is listed (mergekit's linear treats it as a model).
        base_model: the base, or None.
        parameters: the global parameters.
        exclude: regular expressions; tensors whose name one of them finds are copied from the base.
        dtype, out_dtype: "float32", "bfloat16", "float16", or None where the config leaves it open.
        tokenizer_source: None or "base".
        source: the text that was read, or YAML made from the dict that was given; for the model card.
        name: how messages call the config ("config.yml").
        lines: the line (from 1) of everything that was read from text.
    """

    merge_method: str
    models: tuple[ModelEntry, ...]
    entries: tuple[ModelEntry, ...]
    base_model: str | None = None
    parameters: dict[str, Setting] = field(default_factory=dict)
    exclude: tuple[str, ...] = ()
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: str | None = None
    source: str = ""
    name: str = "the config"
    lines: Mapping[Location, int] = field(default_factory=dict, repr=False, compare=False)

    def where(self, path: Location = ()) -> str:
        """Say where `path` stands: "config.yml, line 7"; for a dict "the config, models[0].parameters.weight"."""
        return _where(self.name, self.lines, path)

    def refs(self) -> list[str]:
        """Every model to open, once: the base first, then the models in order."""
        return ([self.base_model] if self.base_model is not None else []) + [entry.model for entry in self.models]


def load_config(source: Path | str | Mapping[str, Any]) -> MergeConfig:
    """Read a merge config from a file (a Path, or a str that is one), from YAML text, or from a dict.

    Raises:
        ConfigError: one sentence that says where and what; nothing else has been read by then.
    """
    if isinstance(source, Mapping):
        text = yaml.safe_dump(_plain(dict(source)), sort_keys=False, allow_unicode=True)
        return _Reader("the config", {}).config(dict(source), text)
    if isinstance(source, str) and _looks_like_yaml(source):
        text, name = source, "the config"
    elif isinstance(source, str | os.PathLike):
        path = Path(source).expanduser()
        text, name = _read_text(path), str(source)
    else:
        raise ConfigError(
            f"A config is a path, YAML text or a dict, not a value of type {type(source).__name__}; pass one of those."
        )
    lines: dict[Location, int] = {}
    content = _Composer(name, lines).load(text)
    return _Reader(name, lines).config(content, text)


def read_yaml(path: Path | str) -> tuple[Any, str, dict[Location, int]]:
    """The plain values of a YAML file that is no merge config, its text, and the line (from 1) of each value.

    Raises:
        ConfigError: it cannot be read, or is not YAML of plain values.
    """
    text = _read_text(Path(path).expanduser())
    lines: dict[Location, int] = {}
    return _Composer(str(path), lines).load(text), text, lines


def read_config(content: Any, text: str, name: str, lines: Mapping[Location, int]) -> MergeConfig:
    """A merge config from plain values that were read already, such as a part of a file.

    text: for the model card. name, lines: where it stands, as of `read_yaml`.

    Raises:
        ConfigError: one sentence that says where and what.
    """
    return _Reader(name, lines).config(content, text)


def place(name: str, lines: Mapping[Location, int], path: Location) -> str:
    """Say where `path` stands in a file that was read: "evolve.yml, line 7"."""
    return _where(name, lines, path)


def _looks_like_yaml(text: str) -> bool:
    if "\n" in text or not text.strip():
        return True
    return ": " in text and not os.path.exists(text)


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; check the path of the config.") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a directory; name the YAML file in it.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text; name a YAML file.") from None
    except ValueError:  # a NUL in the name
        raise ConfigError(f"{str(path)!r} is not the name of a file; check the path of the config.") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); check its permissions.") from None


def _plain(value: Any) -> Any:
    """What safe_dump can write: tuples become lists, paths texts; anything else strange its own text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _where(name: str, lines: Mapping[Location, int], path: Location) -> str:
    for length in range(len(path), -1, -1):
        if path[:length] in lines:
            return f"{name}, line {lines[path[:length]]}"
    dotted = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).lstrip(".")
    return f"{name}, {dotted}" if dotted else name


class _Composer:
    """YAML text to plain values, noting lines. Only the plain tags of YAML are known: no objects are ever built."""

    _SCALARS = frozenset(f"tag:yaml.org,2002:{tag}" for tag in ("null", "bool", "int", "float"))
    _TEXTS = frozenset(f"tag:yaml.org,2002:{tag}" for tag in ("str", "timestamp", "value", "merge"))

    def __init__(self, name: str, lines: dict[Location, int]) -> None:
        self.name = name
        self.lines = lines
        self.count = 0
        self.open: set[int] = set()

    def load(self, text: str) -> Any:
        try:
            self.loader = yaml.SafeLoader(text)
            try:
                node = self.loader.get_single_node()
                if node is None:
                    raise ConfigError(f"{self.name} is empty; give at least merge_method and models.")
                return self.value(node, ())
            finally:
                self.loader.dispose()
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
            reason = ", ".join(part for part in (error.context, error.problem) if part)
            raise ConfigError(f"{self.name}{place} is not valid YAML ({reason}); correct it there.") from None
        except yaml.YAMLError as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"{self.name} is not valid YAML ({reason}); correct it.") from None
        except RecursionError:
            raise ConfigError(f"{self.name} is nested too deeply; write it flatter.") from None

    def value(self, node: yaml.Node, path: Location) -> Any:
        self.count += 1
        if self.count > _MAX_NODES:
            raise self.too_many()
        line = node.start_mark.line + 1
        self.lines.setdefault(path, line)
        if id(node) in self.open:
            raise ConfigError(f"{self.name}, line {line}: an alias holds itself; write the value out.")
        self.open.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
                return self.mapping(node, path)
            if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
                return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
            if isinstance(node, yaml.ScalarNode) and node.tag in self._TEXTS:
                return node.value
            if isinstance(node, yaml.ScalarNode) and node.tag in self._SCALARS:
                return self.scalar(node, line)
        finally:
            self.open.discard(id(node))
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        raise ConfigError(
            f"{self.name}, line {line}: the tag {tag} asks for an object to be built, which a config may not; "
            "write plain texts, numbers, lists and mappings."
        )

    def scalar(self, node: yaml.ScalarNode, line: int) -> Any:
        try:
            return self.loader.construct_object(node)
        except (ValueError, KeyError, IndexError):  # `!!int abc`
            kind = node.tag.removeprefix("tag:yaml.org,2002:")
            raise ConfigError(f"{self.name}, line {line}: {node.value!r} is not a YAML {kind}; correct it.") from None

    def mapping(self, node: yaml.MappingNode, path: Location) -> dict[str, Any]:
        seen: dict[str, int] = {}
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"{self.name}, line {line}: a key must be a plain word; correct it.")
            if key_node.value in seen and key_node.tag != "tag:yaml.org,2002:merge":
                raise ConfigError(
                    f"{self.name}, line {line}: the key `{key_node.value}` stands twice, "
                    f"first in line {seen[key_node.value]}; keep one."
                )
            seen.setdefault(key_node.value, line)
        result: dict[str, Any] = {}
        for key_node, value_node in self.pairs(node):
            key = key_node.value
            self.lines[(*path, key)] = key_node.start_mark.line + 1
            result[key] = self.value(value_node, (*path, key))
        return result

    def pairs(self, node: yaml.MappingNode) -> list[tuple[yaml.Node, yaml.Node]]:
        """The pairs of a mapping with YAML's `<<: *alias` unfolded; later pairs win, so its own come last."""
        merged: list[tuple[yaml.Node, yaml.Node]] = []
        own: list[tuple[yaml.Node, yaml.Node]] = []
        for key_node, value_node in node.value:
            if key_node.tag != "tag:yaml.org,2002:merge":
                own.append((key_node, value_node))
                continue
            # Of several mappings to merge the first has the last word.
            for source in reversed(value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]):
                if not isinstance(source, yaml.MappingNode):
                    line = key_node.start_mark.line + 1
                    raise ConfigError(f"{self.name}, line {line}: `<<` takes a mapping or a list of them; correct it.")
                merged.extend(self.pairs(source))
        self.count += len(merged)
        if self.count > _MAX_NODES:
            raise self.too_many()
        return merged + own

    def too_many(self) -> ConfigError:
        return ConfigError(f"{self.name} unfolds into more than {_MAX_NODES:,} values; write it out without aliases.")


class _Reader:
    """Plain values to a MergeConfig, refusing what is not understood."""

    def __init__(self, name: str, lines: Mapping[Location, int]) -> None:
        self.name = name
        self.lines = lines

    def error(self, path: Location, sentence: str) -> ConfigError:
        return ConfigError(f"{_where(self.name, self.lines, path)}: {sentence}")

    def config(self, content: Any, text: str) -> MergeConfig:
        if not isinstance(content, Mapping):
            raise self.error((), f"a config is a mapping of keys to values, not {_kind(content)}; see mergekit's form.")
        self.check_keys(content, (), TOP_KEYS)
        method = self.text(content, "merge_method", ())
        if method is None:
            raise self.error((), "the key `merge_method` is missing; add one, such as `merge_method: ties`.")
        base = self.model(content["base_model"], ("base_model",)) if content.get("base_model") is not None else None
        entries = self.entries(content.get("models"))
        same_as_base = None if base is None else _normal(base)
        return MergeConfig(
            merge_method=method,
            models=tuple(entry for entry in entries if _normal(entry.model) != same_as_base),
            entries=tuple(entries),
            base_model=base,
            parameters=self.parameters(content.get("parameters"), ("parameters",)),
            exclude=self.exclude(content.get("exclude")),
            dtype=self.dtype(content, "dtype"),
            out_dtype=self.dtype(content, "out_dtype"),
            tokenizer_source=self.tokenizer_source(content.get("tokenizer_source")),
            source=text,
            name=self.name,
            lines=self.lines,
        )

    def check_keys(self, content: Mapping[Any, Any], path: Location, known: Iterable[str]) -> None:
        known = list(known)
        for key in content:
            if key in known:
                continue
            here = (*path, key) if isinstance(key, str) else path
            if path == () and key in NOT_YET:
                if not content[key]:  # `slices: null` asks for nothing
                    continue
                raise self.error(here, f"`{key}` is not supported in this version; {NOT_YET[key]}.")
            raise self.error(here, f"the key `{key}` is not understood; {self.hint(key, path, known)}")

    def hint(self, key: Any, path: Location, known: list[str]) -> str:
        near = difflib.get_close_matches(str(key).lower(), known, n=1, cutoff=0.6)
        if near:
            return f"did you mean `{near[0]}`?"
        if "parameters" in known:
            return f"known here are {_words(known)}, and the settings of a method stand under `parameters`."
        return f"known here are {_words(known)}."

    def text(self, content: Mapping[str, Any], key: str, path: Location) -> str | None:
        value = content.get(key)
        if value is None:
            return None
        if not isinstance(value, str) or not value.strip():
            raise self.error((*path, key), f"`{key}` must be a text, not {_kind(value)}; correct it.")
        return value.strip()

    def entries(self, content: Any) -> list[ModelEntry]:
        path: Location = ("models",)
        if content is None:
            raise self.error((), "the key `models` is missing; list the models to merge under it.")
        if not isinstance(content, list | tuple):
            raise self.error(path, f"`models` must be a list, not {_kind(content)}; start each model with `- model:`.")
        if not content:
            raise self.error(path, "`models` is empty; list the models to merge under it.")
        entries: list[ModelEntry] = []
        places: dict[str, Location] = {}
        for index, item in enumerate(content):
            here: Location = (*path, index)
            if not isinstance(item, Mapping):
                raise self.error(here, f"each of `models` must be a mapping, not {_kind(item)}; write `- model: NAME`.")
            self.check_keys(item, here, MODEL_KEYS)
            if item.get("model") is None:
                raise self.error(here, "this entry of `models` lacks the key `model`; add a path or a hub name.")
            model = self.model(item["model"], (*here, "model"))
            if _normal(model) in places:
                first = _where(self.name, self.lines, places[_normal(model)])
                raise self.error(here, f"{model} is listed twice, first at {first}; list it once with one weight.")
            places[_normal(model)] = here
            entries.append(ModelEntry(model, self.parameters(item.get("parameters"), (*here, "parameters")), here))
        return entries

    def model(self, value: Any, path: Location) -> str:
        """A model's name: a text, or mergekit's long form {model: {path, revision}}."""
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if isinstance(value, Mapping):
            for key in ("lora", "override_architecture"):
                if value.get(key) is not None:
                    raise self.error((*path, key), f"`{key}` is not supported in this version; {_LONG_FORM[key]}.")
            self.check_keys(value, path, ("model", *_LONG_FORM) if "model" in value else ("path", "revision"))
            if "model" in value:
                return self.model(value["model"], (*path, "model"))
            name, revision = self.text(value, "path", path), self.text(value, "revision", path)
            if name is None:
                raise self.error(path, "this model lacks the key `path`; add a path or a hub name.")
            return name if revision is None else f"{name}@{revision}"
        if not isinstance(value, str) or not value.strip():
            raise self.error(path, f"a model is a path or a hub name, not {_kind(value)}; put the name in quotes.")
        return value.strip()

    def parameters(self, content: Any, path: Location) -> dict[str, Setting]:
        if content is None:
            return {}
        if not isinstance(content, Mapping):
            raise self.error(
                path, f"`parameters` must be a mapping, not {_kind(content)}; write `name: value` under it."
            )
        result: dict[str, Setting] = {}
        for key, value in content.items():
            if not isinstance(key, str):
                raise self.error(path, f"the name of a parameter must be a text, not {_kind(key)}; correct it.")
            result[key] = self.setting(value, (*path, key), key)
        return result

    def setting(self, value: Any, path: Location, name: str) -> Setting:
        if isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, Mapping):
            return self.condition(value, path, name)
        if isinstance(value, list | tuple):
            if not value:
                raise self.error(path, f"`{name}` is an empty list; give it a value for each end of the model, or one.")
            conditions = sum(isinstance(item, Mapping) for item in value)
            if conditions == len(value):
                return [self.condition(item, (*path, index), name) for index, item in enumerate(value)]
            if conditions:
                raise self.error(path, f"`{name}` mixes values with filters; write every entry as {{filter, value}}.")
            for index, item in enumerate(value):
                if not isinstance(item, bool | int | float | str):
                    raise self.error((*path, index), f"`{name}` holds {_kind(item)} in its list; write plain values.")
            return list(value)
        raise self.error(path, f"`{name}` has {_kind(value)} for its value; give it a number, a list or filters.")

    def condition(self, content: Mapping[Any, Any], path: Location, name: str) -> dict[str, Any]:
        self.check_keys(content, path, CONDITION_KEYS)
        if content.get("value") is None:
            raise self.error(path, f"this entry of `{name}` lacks the key `value`; add it.")
        pattern = content.get("filter")
        if pattern is not None and not isinstance(pattern, str):
            raise self.error(
                (*path, "filter"), f"a filter is a part of a tensor's name, not {_kind(pattern)}; put it in quotes."
            )
        value = self.setting(content["value"], (*path, "value"), name)
        if isinstance(value, dict) or (isinstance(value, list) and isinstance(value[0], dict)):
            raise self.error((*path, "value"), f"`{name}` has filters within a filter; write them one after the other.")
        return {"filter": pattern, "value": value}

    def exclude(self, content: Any) -> tuple[str, ...]:
        patterns = [content] if isinstance(content, str) else content or []
        if not isinstance(patterns, list | tuple):
            raise self.error(
                ("exclude",), f"`exclude` is a list of regular expressions, not {_kind(content)}; write one per line."
            )
        for index, pattern in enumerate(patterns):
            here: Location = ("exclude",) if isinstance(content, str) else ("exclude", index)
            if not isinstance(pattern, str) or not pattern:
                raise self.error(here, f"a pattern to exclude is a text, not {_kind(pattern)}; put it in quotes.")
            try:
                re.compile(pattern)
            except re.error as error:
                raise self.error(
                    here, f"{pattern!r} is not a regular expression ({error}); put a backslash before its signs."
                ) from None
        return tuple(patterns)

    def dtype(self, content: Mapping[str, Any], key: str) -> str | None:
        value = self.text(content, key, ())
        if value is None or value == "auto":
            return None
        name = value.removeprefix("torch.")
        if name not in DTYPES:
            near = difflib.get_close_matches(name.lower(), DTYPES, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]}?" if near else f"known are {_words(DTYPES)}."
            raise self.error((key,), f"`{key}` cannot be {value!r}; {hint}")
        return name

    def tokenizer_source(self, value: Any) -> str | None:
        if value is None or value == "base":
            return value
        shown = value if isinstance(value, str) else _kind(value)
        raise self.error(
            ("tokenizer_source",),
            f"`tokenizer_source: {shown}` is not supported in this version; "
            f"write base, or leave it out, and merge models that share one vocabulary, {_INSIDE}.",
        )


_LONG_FORM = {
    "lora": f"merge the adapter into its model first (peft: merge_and_unload), {_INSIDE}",
    "override_architecture": "remove it: tensors are matched by their names",
}


def _normal(model: str) -> str:
    """Two spellings of one directory are one model; the name of a hub model stays as it is."""
    return os.path.normpath(os.path.expanduser(model))


def _words(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:-1]) + " and " + names[-1]


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the text {value!r}" if value.strip() else "an empty text"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    return f"a value of type {type(value).__name__}"
