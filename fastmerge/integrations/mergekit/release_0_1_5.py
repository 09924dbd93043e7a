"""mergekit 0.1.5: its registry holds method objects, which merge groups of tensors or batches of them."""

from __future__ import annotations

from typing import Any

import torch
from mergekit import sparsify
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import (
    MISSING,
    BasePolicy,
    BatchedMergeMethod,
    GroupMergeMethod,
    InputContract,
    MergeMethodSpec,
    ParameterScope,
    ParameterSpec,
    TensorBatch,
    TensorGroup,
)

from fastmerge import methods
from fastmerge.integrations.mergekit.group import SWITCH, LeftToPeer, Settings, count_left, merge_group
from fastmerge.integrations.mergekit.methods import ADDED, REPLACED, default_of, offered, type_of
from fastmerge.integrations.mergekit.patches import MergekitError, Patch, check_parameters, refusal
from fastmerge.integrations.mergekit.sparsification import sparsification_patches
from fastmerge.methods.base import Method

VERSION = "0.1.5"


def patches() -> list[Patch]:
    """What takes the place of what. MergekitError where this is not the release that it says it is."""
    table: dict[str, Any] = registry._METHODS
    made = []
    for name in REPLACED:
        inner = table.get(name)
        kinds = {GroupMergeMethod: _GroupInside, BatchedMergeMethod: _BatchInside}
        wrapper = next((ours for theirs, ours in kinds.items() if isinstance(inner, theirs)), None)
        if inner is None or wrapper is None:
            raise MergekitError(
                f"This mergekit says that it is {VERSION}, but its registry has no {name} as that release has it; "
                f"install the release with `pip install mergekit=={VERSION}`."
            )
        check_parameters(VERSION, name, (each.name for each in inner.spec.parameters), methods.parameters(name))
        made.append(Patch(table, name, wrapper(inner, methods.get(name))))
    made += [Patch(table, name, _Added(methods.get(name))) for name in ADDED]
    return made + sparsification_patches(sparsify, VERSION, _no_quirk)


def _no_quirk(name: str, numel: int, density: float, gamma: float) -> None:
    """Nothing: it is the release that fastmerge's numbers follow."""


def _merge_group(method: Method, group: TensorGroup, parameters: dict[str, Any], settings: Settings) -> torch.Tensor:
    """One group, whose tensors mergekit has brought to one dtype."""
    entries = group.non_base if method.needs_base else group.entries
    if method.needs_base and group.base is None:
        raise LeftToPeer("there is no base")
    values = {name: value for name, value in parameters.items() if not hasattr(value, "values_for")}
    each: list[dict[str, Any]] = [
        {name: value[entry.id] for name, value in parameters.items() if hasattr(value, "values_for")}
        for entry in entries
    ]
    base = group.base.tensor if method.needs_base else None
    return merge_group(method, group.metadata.name, base, [entry.tensor for entry in entries], values, each, settings)


class _GroupInside(GroupMergeMethod):
    """A method of mergekit's that merges group by group, computed by ours. inner: the method that it replaces."""

    def __init__(self, inner: Any, method: Method) -> None:
        self.inner = inner
        self.method = method
        self.spec = inner.spec

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> torch.Tensor:
        settings = SWITCH.settings
        if settings is not None:
            try:
                return _merge_group(self.method, group, parameters, settings)
            except LeftToPeer as reason:
                count_left(self.method.name, str(reason))
        merged: torch.Tensor = self.inner.merge_group(group, **parameters)
        return merged

    def __getattr__(self, name: str) -> Any:
        """What else is asked of it, the replaced method answers."""
        if name in ("inner", "method", "spec"):
            raise AttributeError(name)
        return getattr(self.inner, name)


class _BatchInside(BatchedMergeMethod):
    """A method of mergekit's that merges batches of groups, computed by ours, output by output."""

    def __init__(self, inner: Any, method: Method) -> None:
        super().__init__(inner.spec, self._merge_batch)
        self.inner = inner
        self.method = method

    def _merge_batch(self, batch: TensorBatch, **parameters: Any) -> torch.Tensor:
        settings = SWITCH.settings
        if settings is not None:
            try:
                outputs = [
                    self._merge_one(batch, index, parameters, settings) for index in range(batch.tensors[0].shape[0])
                ]
                return outputs[0].unsqueeze(0) if len(outputs) == 1 else torch.stack(outputs)
            except LeftToPeer as reason:
                count_left(self.method.name, str(reason))
        merged: torch.Tensor = self.inner.implementation(batch, **parameters)
        return merged

    def _merge_one(
        self, batch: TensorBatch, index: int, parameters: dict[str, Any], settings: Settings
    ) -> torch.Tensor:
        tensors = [tensor[index] for tensor in batch.tensors]
        base = None
        if self.method.needs_base:
            if batch.base_index is None:
                raise LeftToPeer("there is no base")
            base = tensors.pop(batch.base_index)
        values: dict[str, Any] = {}
        each: list[dict[str, Any]] = [{} for _ in tensors]
        for spec in self.spec.parameters:
            if spec.name not in parameters:  # its own default is ours; without one, mergekit says so
                continue
            value = parameters[spec.name]
            if isinstance(value, torch.Tensor) and value.requires_grad:
                raise LeftToPeer("gradients are wanted")
            if spec.scope == ParameterScope.SHARED:
                values[spec.name] = value[index].item() if spec.batch_tensor else value
                continue
            if tuple(value.shape) != (batch.tensors[0].shape[0], len(tensors)):
                raise LeftToPeer(f"{spec.name} has another shape than the batch")
            for given, one in zip(each, value[index].tolist(), strict=True):
                given[spec.name] = one
        # A batch has no names; the methods that draw need one, and are not merged in batches.
        return merge_group(self.method, None, base, tensors, values, each, settings)


class _Added(GroupMergeMethod):
    """A method of ours that mergekit has not: there is nobody to leave anything to."""

    def __init__(self, method: Method) -> None:
        self.method = method
        self.spec = MergeMethodSpec(
            name=method.name,
            parameters=tuple(
                ParameterSpec(
                    parameter.name,
                    type_of(parameter),
                    ParameterScope.NON_BASE if parameter.per_model else ParameterScope.SHARED,
                    default=MISSING if parameter.required else default_of(parameter),
                    description=parameter.help,
                )
                for parameter in offered(method.name).values()
            ),
            contract=InputContract(base=BasePolicy.REQUIRED),
            pretty_name=method.title,
            reference_url=method.source.split()[0],
        )

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> torch.Tensor:
        base: torch.Tensor = group.base.tensor
        if not group.non_base or base.numel() == 0:
            return base
        try:
            return _merge_group(self.method, group, parameters, SWITCH.settings or Settings())
        except LeftToPeer as reason:
            raise refusal(self.method.name, group.metadata.name, reason) from None
