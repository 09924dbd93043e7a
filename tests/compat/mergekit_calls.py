"""Calling a method as mergekit's own planner does, through its registry, in each release of mergekit."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import torch

from tests.compat.mergekit_peer import Case

try:
    RELEASE = importlib.metadata.version("mergekit")
except importlib.metadata.PackageNotFoundError:
    RELEASE = ""


def registry() -> dict[str, Any]:
    """The table in which mergekit finds its methods."""
    if RELEASE == "0.1.4":
        from mergekit.merge_methods import REGISTERED_MERGE_METHODS

        return REGISTERED_MERGE_METHODS
    from mergekit.merge_methods.registry import _METHODS

    return _METHODS


def merge_by_registry(case: Case, name: str | None = "w", base_place: int = 0, **more: Any) -> torch.Tensor:
    """The merge of one tensor by whatever the registry holds now.

    base_place: before which model the base is given. more: further parameters, by their names.
    """
    parameters = {**case.parameters("lambda"), **more}
    base = None if case.method in ("linear",) else case.base
    if RELEASE == "0.1.4":
        return _by_task(case, name, base, base_place, parameters)
    from mergekit.merge_methods.base import TensorGroup
    from mergekit.merge_methods.registry import get

    tensors = list(case.models)
    if base is not None:
        tensors.insert(base_place, base)
    group = TensorGroup.from_tensors(tensors, base_index=None if base is None else base_place, name=name)
    (merged,) = get(case.method)([group], parameters=parameters)
    return merged


def _by_task(
    case: Case, name: str | None, base: torch.Tensor | None, base_place: int, parameters: dict[str, Any]
) -> torch.Tensor:
    from mergekit.architecture import WeightInfo
    from mergekit.common import ImmutableMap, ModelReference
    from mergekit.io.tasks import GatherTensors
    from mergekit.merge_methods import get

    method = get(case.method)
    models = [ModelReference.parse(f"model{number}") for number in range(len(case.models))]
    given = list(zip(models, case.models, strict=True))
    reference = None
    if base is not None:
        reference = ModelReference.parse("base")
        given.insert(base_place, (reference, base))
    tensors = dict(given)
    each = {
        model: ImmutableMap(
            {
                definition.name: parameters[definition.name][number]
                if definition.name in parameters
                else definition.default_value
                for definition in method.tensor_parameters()
            }
        )
        for number, model in enumerate(models)
    }
    shared = {
        definition.name: parameters.get(definition.name, definition.default_value) for definition in method.parameters()
    }
    info = {model: WeightInfo(name=name or "") for model in tensors}
    task = method.make_task(
        output_weight=WeightInfo(name=name or ""),
        tensors=GatherTensors(weight_info=ImmutableMap(info)),
        parameters=ImmutableMap(shared),
        tensor_parameters=ImmutableMap(each),
        base_model=reference,
    )
    return task.execute(tensors=tensors)
