"""mergekit's own methods on the inputs of one tensor, with the parameters that mergekit itself reads out of the YAML.

Nothing of fastmerge's computes here. Each known release is called as its own planner calls it, without its files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import yaml

from fastmerge.engine.config import MergeConfig
from fastmerge.integrations.mergekit import RELEASES, installed
from fastmerge.integrations.mergekit.group import SWITCH
from fastmerge.integrations.mergekit.patches import MergekitError

Values = Mapping[str, Any]
"""A method's parameters by name: one value, or a list with one for each input that the parameter is for."""


@dataclass(frozen=True)
class Group:
    """What meets in one output tensor.

    name: the tensor's. refs: the models as the config writes them, the base first if there is one. tensors: theirs, of
    one shape. has_base: whether the first is the base. position: the tensor's place along the layers, from 0 to 1.
    """

    name: str
    refs: tuple[str, ...]
    tensors: tuple[torch.Tensor, ...]
    has_base: bool
    position: float = 0.0


class Peer(Protocol):
    """One release of mergekit with one config."""

    version: str

    def has(self, method: str) -> bool:
        """Whether it has a method of this name."""

    def values(self, method: str, group: Group) -> Values:
        """The method's parameters for a tensor, as mergekit reads them out of the config."""

    def merge(self, method: str, group: Group, values: Values, dtype: torch.dtype | None) -> torch.Tensor:
        """The group merged by mergekit's own function, in `dtype`; None for the one in which the inputs meet."""

    def does_otherwise(self, method: str, group: Group, values: Values, numerics: str) -> bool:
        """Whether this release merges the group in another way than 0.1.5, whose numbers fastmerge follows."""


def open_peer(config: MergeConfig) -> Peer:
    """The release that is installed, and what it reads out of a config.

    Raises MergekitError where mergekit is missing, unknown, computing by fastmerge, or cannot read the config.
    """
    version = installed()
    if version not in RELEASES:
        raise MergekitError(
            f"mergekit {version} is not known to this version of fastmerge, which cannot call its methods for a "
            f"comparison; it knows {' and '.join(RELEASES)}: install one of them, such as `pip install "
            f"mergekit=={list(RELEASES)[-1]}`."
        )
    if SWITCH.settings is not None:
        raise MergekitError(
            "fastmerge computes inside mergekit in this process, so that there is nothing to compare it with; call "
            "fastmerge.integrations.mergekit.disable() first."
        )
    kinds: dict[str, Callable[[MergeConfig], Peer]] = {"0.1.4": _Release014, "0.1.5": _Release015}
    try:
        return kinds[version](config)
    except ImportError as error:
        raise MergekitError(f"mergekit {version} cannot be imported ({error}); install it anew.") from None
    except (ValueError, RuntimeError) as error:  # pydantic's errors are ValueErrors
        reason = " ".join(str(error).split())
        raise MergekitError(f"mergekit {version} cannot read {config.name}: {reason}") from None


class _Release015:
    """mergekit 0.1.5."""

    version = "0.1.5"

    def __init__(self, config: MergeConfig) -> None:
        self._shared, self._each = _settings(config)

    def has(self, method: str) -> bool:
        from mergekit.merge_methods import registry

        return method in registry._METHODS

    def values(self, method: str, group: Group) -> Values:
        from mergekit.merge_methods import registry
        from mergekit.merge_methods.base import ParameterScope
        from mergekit.parameter_resolver import resolve_parameters

        spec = registry.get(method).spec

        def sources(index: int | None) -> list[Any]:
            return ([] if index is None else [self._each.get(group.refs[index])]) + [self._shared]

        shared, each = resolve_parameters(
            spec,
            tensor_name=group.name,
            inputs=dict.fromkeys(range(len(group.refs)), group.name),
            sources=sources,
            base_model=0 if group.has_base else None,
            t=group.position,
        )
        values = dict(shared)
        for parameter in spec.input_parameters:
            first = int(group.has_base and parameter.scope == ParameterScope.NON_BASE)
            values[parameter.name] = [each[index][parameter.name] for index in range(first, len(group.refs))]
        return values

    def merge(self, method: str, group: Group, values: Values, dtype: torch.dtype | None) -> torch.Tensor:
        from mergekit.merge_methods import registry
        from mergekit.merge_methods.base import TensorGroup

        # Copies, lest a method that computes in place changes what is compared afterwards.
        tensors = [tensor.clone() for tensor in group.tensors]
        made = TensorGroup.from_tensors(tensors, base_index=0 if group.has_base else None, name=group.name)
        (merged,) = registry.get(method)([made], parameters=values, dtype=dtype)
        return torch.as_tensor(merged)

    def does_otherwise(self, method: str, group: Group, values: Values, numerics: str) -> bool:
        return False


class _Release014:
    """mergekit 0.1.4, whose methods make a task for each tensor."""

    version = "0.1.4"

    def __init__(self, config: MergeConfig) -> None:
        self._shared, self._each = _settings(config)

    def has(self, method: str) -> bool:
        from mergekit.merge_methods import REGISTERED_MERGE_METHODS

        return method in REGISTERED_MERGE_METHODS

    def values(self, method: str, group: Group) -> Values:
        from mergekit.config import evaluate_setting
        from mergekit.merge_methods import get

        def found(definition: Any, *levels: Any) -> Any:
            for level in levels:
                if level and definition.name in level:
                    value = evaluate_setting(group.name, level[definition.name], group.position)
                    if value is not None:
                        return value
            if definition.required:
                raise RuntimeError(f"mergekit finds no {definition.name} for {group.name}")
            return definition.default_value

        chosen = get(method)
        values = {each.name: found(each, self._shared) for each in chosen.parameters()}
        models = group.refs[1:] if group.has_base else group.refs
        for definition in chosen.tensor_parameters():
            values[definition.name] = [found(definition, self._each.get(ref), self._shared) for ref in models]
        return values

    def merge(self, method: str, group: Group, values: Values, dtype: torch.dtype | None) -> torch.Tensor:
        from mergekit.architecture import WeightInfo
        from mergekit.common import ImmutableMap, ModelReference
        from mergekit.io.tasks import GatherTensors
        from mergekit.merge_methods import get

        chosen = get(method)
        models = [ModelReference.parse(f"input{index}") for index in range(len(group.refs))]
        brought = [tensor.clone() if dtype is None else tensor.to(dtype, copy=True) for tensor in group.tensors]
        per_input = {definition.name for definition in chosen.tensor_parameters()}
        first = int(group.has_base)
        each = {
            model: ImmutableMap({name: values[name][index] for name in per_input})
            for index, model in enumerate(models[first:])
        }
        info = WeightInfo(name=group.name)
        task = chosen.make_task(
            output_weight=info,
            tensors=GatherTensors(weight_info=ImmutableMap(dict.fromkeys(models, info))),
            parameters=ImmutableMap({name: value for name, value in values.items() if name not in per_input}),
            tensor_parameters=ImmutableMap(each),
            base_model=models[0] if group.has_base else None,
        )
        return torch.as_tensor(task.execute(tensors=dict(zip(models, brought, strict=True))))

    def does_otherwise(self, method: str, group: Group, values: Values, numerics: str) -> bool:
        if method == "linear":
            return numerics == "mergekit"  # It rounds to the inputs' dtype, and without fused multiply-adds.
        if method not in ("breadcrumbs", "breadcrumbs_ties"):
            return False
        numel = group.tensors[0].numel()
        # A delta that has no outliers to drop becomes zeros there.
        return any(
            density < 1 and min(int(gamma * numel), numel - int(density * numel)) <= 0
            for density, gamma in zip(values["density"], values["gamma"], strict=True)
        )


def _settings(config: MergeConfig) -> tuple[Any, dict[str, Any]]:
    """What mergekit's own reading of the config holds as parameters: those of all models, and of each by its name."""
    from mergekit.config import MergeConfiguration

    parsed = MergeConfiguration.model_validate(yaml.safe_load(config.source))
    listed: Sequence[Any] = parsed.models or ()
    return parsed.parameters, {
        entry.model: model.parameters for entry, model in zip(config.entries, listed, strict=True)
    }
