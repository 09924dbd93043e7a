"""Which value a parameter has for one tensor: filters, per-layer gradients, and who overrides whom.

The precedence is mergekit's: the model's own `parameters`, then the global ones, then the method's default (which is
the method's matter and not decided here). At each level the first entry whose filter matches the tensor's name wins;
where none matches, the next level is asked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from fastmerge.engine.config import MergeConfig, ModelEntry, Setting
from fastmerge.errors import ConfigError

__all__ = ["Layers", "ParameterTable", "convert", "count_layers", "layer_position", "layer_stack", "resolve"]

Layers: TypeAlias = int | Mapping[str, int]
"""How many layers there are: one number for all stacks of layers, or one per stack (see `count_layers`)."""

# The first number of a name that stands behind one of these words counts the layers. No architecture is named.
_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?|\w+_(?:layers?|blocks?)|resblocks)\.(\d+)(?:\.|$)")
_COUNT_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def layer_stack(name: str) -> tuple[str, int] | None:
    """The stack of layers that a tensor is in, and its layer there: "model.layers.3.mlp.w" -> ("model.layers", 3)."""
    match = _LAYER.search(name)
    return (name[: match.start(1) - 1], int(match[1])) if match else None


def count_layers(names: Iterable[str], config: Mapping[str, Any] | None = None) -> dict[str, int]:
    """Count the layers of each stack in a model, from the names of its tensors and its config.json.

    The names decide, with one exception: where no stack has exactly the number of layers that config.json gives (a
    prediction head stored as one layer more, say), the longest stack has that number.
    """
    stacks: dict[str, int] = {}
    for name in names:
        if found := layer_stack(name):
            stacks[found[0]] = max(stacks.get(found[0], 0), found[1] + 1)
    declared = _declared_layers(config)
    if stacks and declared is not None and declared not in stacks.values():
        longest = max(stacks, key=lambda stack: stacks[stack])
        stacks[longest] = declared
    return stacks


def _declared_layers(config: Mapping[str, Any] | None) -> int | None:
    for part in ((config or {}).get("text_config"), config):
        if isinstance(part, Mapping):
            for key in _COUNT_KEYS:
                count = part.get(key)
                if isinstance(count, int) and not isinstance(count, bool) and count > 0:
                    return count
    return None


def layer_position(name: str, layers: Layers) -> float:
    """Where a tensor stands between the first layer (0) and the last (1); 0 outside of layers, 1 in a single layer."""
    found = layer_stack(name)
    if found is None:
        return 0.0
    stack, index = found
    count = layers if isinstance(layers, int) else layers.get(stack, 0)
    if count < 1:
        return 0.0
    return 1.0 if count == 1 else min(index / (count - 1), 1.0)


def convert(value: Any, kind: type | None) -> Any:
    """Turn one scalar of a config into `kind` (float, int, bool or str), as YAML's readers expect it.

    Without a kind only numbers in quotes ("1e-3", which YAML takes for text) are turned, into floats.

    Raises:
        ValueError: the value cannot be that.
    """
    if kind is None:
        return _number(value) if isinstance(value, str) and _is_number(value) else value
    if kind is float and isinstance(value, bool | int | float | str):
        return _number(value)
    if kind is bool:
        word = value.lower() if isinstance(value, str) else value
        if word in _TRUE or word in _FALSE:
            return word in _TRUE
    elif kind is int and isinstance(value, bool | int | float | str):
        if isinstance(value, int):
            return int(value)
        if (number := _number(value)).is_integer():
            return int(number)
    elif kind is str and isinstance(value, str):
        return value
    raise ValueError(f"{value!r} is not {_KIND_WORDS.get(kind, kind.__name__)}")


_TRUE = frozenset((1, "1", "true", "t", "yes", "y", "on"))  # 1 stands for True and 1.0 too: they are equal
_FALSE = frozenset((0, "0", "false", "f", "no", "n", "off"))
_KIND_WORDS = {float: "a number", int: "a whole number", bool: "true or false", str: "a text"}


def _number(value: bool | int | float | str) -> float:
    if isinstance(value, str) and "_" in value:  # Python would read 1_000
        raise ValueError(f"{value!r} is not a number")
    try:
        return float(value)
    except (ValueError, OverflowError):
        raise ValueError(f"{value!r} is not a number") from None


def _is_number(text: str) -> bool:
    try:
        _number(text)
    except ValueError:
        return False
    return True


def resolve(setting: Setting, tensor_name: str, t: float = 0.0, *, kind: type | None = None) -> Any:
    """The value of one setting for one tensor, or None where none of its filters matches.

    Args:
        setting: a scalar; a list of scalars along the layers; a mapping {value, filter}; or a list of such mappings,
            of which the first wins whose filter is absent, "*" or a part of the name.
        tensor_name: the tensor's name, for the filters.
        t: the layer's position in [0, 1]. Numbers are interpolated linearly in float64 between the two nearest
            entries of a list; of true/false and texts the entry int(t * (length - 1)) is taken.
        kind: the parameter's type. It decides whether a list interpolates: [0, 1] does for a float, not for a bool.

    Raises:
        ValueError: a value that is not of that kind.
    """
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, Sequence) or isinstance(setting, str):
        return convert(setting, kind)
    if not setting:
        return None
    if not any(isinstance(entry, Mapping) for entry in setting):
        return _along_layers([convert(entry, kind) for entry in setting], t, kind)
    for entry in setting:
        pattern = entry.get("filter")
        if pattern is None or pattern == "*" or (tensor_name and pattern in tensor_name):
            return resolve(entry["value"], tensor_name, t, kind=kind)
    return None


def _along_layers(values: list[Any], t: float, kind: type | None) -> Any:
    position = t * (len(values) - 1)
    left = int(position)
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return values[left]
    right = min(len(values) - 1, left + 1)
    fraction = position - left
    # Both products, also where the fraction is 0: the peer's own float64 operations, in the peer's order.
    return convert((1 - fraction) * values[left] + fraction * values[right], kind)


class ParameterTable:
    """The parameters that a config sets, resolved tensor by tensor. Only what is set appears; defaults are not added.

    Args:
        config: the merge's config.
        layers: the number of layers, for gradients: one number, or what `count_layers` returns.
        kinds: the parameters' types where they are known ({"weight": float, "normalize": bool}).
        entries: the models that per-model values are wanted for; without it `config.models`, which leaves out the
            base. A method that treats the base as one model more passes its own list.
    """

    def __init__(
        self,
        config: MergeConfig,
        layers: Layers,
        *,
        kinds: Mapping[str, type] | None = None,
        entries: Sequence[ModelEntry] | None = None,
    ) -> None:
        self.config = config
        self.layers = layers
        self.kinds: Mapping[str, type] = kinds or {}
        self.entries: tuple[ModelEntry, ...] = tuple(config.models if entries is None else entries)

    def names(self) -> set[str]:
        """Every parameter that the config sets anywhere."""
        return set(self.config.parameters).union(*(entry.parameters for entry in self.entries))

    def for_tensor(self, name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Resolve every parameter for the tensor `name`: (shared, one dict per model in the order of `entries`).

        `shared` knows the global parameters only. A model's dict knows its own and, behind them, the global ones.
        A parameter that nothing sets for this tensor is absent.
        """
        t = layer_position(name, self.layers)
        shared = self._resolve_all([(self.config.parameters, ("parameters",))], name, t)
        per_model = [
            self._resolve_all(
                [(entry.parameters, (*entry.path, "parameters")), (self.config.parameters, ("parameters",))], name, t
            )
            for entry in self.entries
        ]
        return shared, per_model

    def shared(self, names: Iterable[str], tensor: str) -> dict[str, Any]:
        """Of the shared parameters of a tensor, those called `names` that are set."""
        everything = self.for_tensor(tensor)[0]
        return {name: everything[name] for name in names if name in everything}

    def _resolve_all(
        self, levels: Sequence[tuple[Mapping[str, Setting], tuple[str | int, ...]]], tensor: str, t: float
    ) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for settings, path in levels:
            for parameter, setting in settings.items():
                if parameter in result:
                    continue
                try:
                    value = resolve(setting, tensor, t, kind=self.kinds.get(parameter))
                except ValueError as error:
                    where = self.config.where((*path, parameter))
                    raise ConfigError(f"{where}: {parameter} cannot be used: {error}; correct the value.") from None
                if value is not None:
                    result[parameter] = value
        return result
