"""mergekit 0.1.4: its registry holds objects that make a task for each output tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mergekit import sparsify
from mergekit.architecture import WeightInfo
from mergekit.common import ImmutableMap, ModelReference
from mergekit.graph import Task
from mergekit.merge_methods import REGISTERED_MERGE_METHODS
from mergekit.merge_methods.base import ConfigParameterDef, MergeMethod, MergeTensorInput

from fastmerge import methods, ops
from fastmerge.backends.rule import SparsifyRule
from fastmerge.integrations.mergekit.group import (
    SWITCH,
    LeftToPeer,
    Settings,
    count_left,
    merge_group,
)
from fastmerge.integrations.mergekit.methods import ADDED, REPLACED, default_of, offered
from fastmerge.integrations.mergekit.patches import MergekitError, Patch, check_parameters, refusal
from fastmerge.integrations.mergekit.sparsification import sparsification_patches
from fastmerge.methods.base import Chunk, Known, Method, TensorContext
from fastmerge.methods.linear import Linear

VERSION = "0.1.4"
_PROMOTING = ("slerp", "sce")
"""Methods that widen tensors of different dtypes in this release, where the others round them to the base's."""


def patches() -> list[Patch]:
    """What takes the place of what. MergekitError where this is not the release that it says it is."""
    table: dict[str, Any] = REGISTERED_MERGE_METHODS
    made = []
    for name in REPLACED:
        inner = table.get(name)
        if not isinstance(inner, MergeMethod):
            raise MergekitError(
                f"This mergekit says that it is {VERSION}, but its registry has no {name} as that release has it; "
                f"install the release with `pip install mergekit=={VERSION}`."
            )
        theirs = [each.name for each in (*inner.parameters(), *inner.tensor_parameters())]
        check_parameters(VERSION, name, theirs, methods.parameters(name))
        made.append(Patch(table, name, _Inside(inner, _method(name))))
    made += [Patch(table, name, _Inside(None, methods.get(name))) for name in ADDED]
    return made + sparsification_patches(sparsify, VERSION, quirk)


def quirk(name: str, numel: int, density: float, gamma: float) -> None:
    """Two things that this release does to small tensors, and the next does not.

    magnitude refuses to keep nothing; magnitude_outliers keeps nothing where there is no outlier to drop.
    """
    if density >= 1:
        return
    kept = int(density * numel)
    if name == "magnitude" and kept == 0:
        raise LeftToPeer("mergekit 0.1.4 refuses a density that keeps nothing")
    if name == "magnitude_outliers" and min(int(gamma * numel), numel - kept) <= 0:
        raise LeftToPeer("mergekit 0.1.4 zeroes a delta that has no outliers")


def _method(name: str) -> Method:
    return _RoundedLinear() if name == "linear" else methods.get(name)


class _RoundedLinear(Linear):
    """Linear as this release rounds: each product, the sum and the quotient to the inputs' dtype.

    (The next computes in float32, with fused multiply-adds.)
    """

    def compute_dtype(self, dtype: torch.dtype, numerics: str) -> torch.dtype:
        return dtype if numerics == "mergekit" else torch.float32

    def merge(self, context: TensorContext, chunk: Chunk, known: Known, out: torch.Tensor) -> None:
        parameters: Any = context.parameters
        ops.consensus_apply(
            None,
            chunk.models,
            list(parameters.weight),
            rule=SparsifyRule(method="none"),
            election="none",
            divisor="value" if parameters.normalize else "none",
            divisor_value=ops.weight_sum(parameters.weight, context.compute, context.numerics),
            compute=context.compute,
            out=out,
            backend=context.backend,
        )


class _Inside(MergeMethod):
    """A method of mergekit's whose tasks are computed by ours, or one of ours that mergekit has not (inner: None)."""

    def __init__(self, inner: Any, method: Method) -> None:
        self.inner = inner
        self.method = method

    def name(self) -> str:
        return self.method.name

    def pretty_name(self) -> str | None:
        found: str | None = self.method.title if self.inner is None else self.inner.pretty_name()
        return found

    def reference_url(self) -> str | None:
        found: str | None = self.method.source.split()[0] if self.inner is None else self.inner.reference_url()
        return found

    def _declared(self, per_model: bool) -> list[Any]:
        # What is chosen by a word cannot be given: this release's YAML takes numbers only.
        return [
            ConfigParameterDef(
                name=each.name, required=each.required, default_value=None if each.required else default_of(each)
            )
            for each in offered(self.method.name).values()
            if each.per_model == per_model
        ]

    def parameters(self) -> list[Any]:
        return self._declared(False) if self.inner is None else list(self.inner.parameters())

    def tensor_parameters(self) -> list[Any]:
        return self._declared(True) if self.inner is None else list(self.inner.tensor_parameters())

    def make_task(
        self,
        *,
        output_weight: WeightInfo,
        tensors: MergeTensorInput,
        parameters: ImmutableMap,
        tensor_parameters: ImmutableMap,
        base_model: ModelReference | None,
        **others: Any,
    ) -> Task:
        inner = None
        if self.inner is not None:
            inner = self.inner.make_task(
                output_weight=output_weight,
                tensors=tensors,
                parameters=parameters,
                tensor_parameters=tensor_parameters,
                base_model=base_model,
                **others,
            )
        return MergeInsideTask(
            method_name=self.method.name,
            gather_tensors=tensors,
            inner=inner,
            weight_info=output_weight,
            parameters=parameters,
            tensor_parameters=tensor_parameters,
            base_model=base_model,
        )

    def __getattr__(self, name: str) -> Any:
        """What else is asked of it, the replaced method answers."""
        if name in ("inner", "method") or self.inner is None:
            raise AttributeError(name)
        return getattr(self.inner, name)


class MergeInsideTask(Task[torch.Tensor]):
    """The merge of one output tensor. inner: the task that mergekit would have run; None for a method of ours."""

    method_name: str
    gather_tensors: MergeTensorInput
    inner: Task | None
    weight_info: WeightInfo
    parameters: ImmutableMap
    tensor_parameters: ImmutableMap
    base_model: ModelReference | None = None

    def uses_accelerator(self) -> bool:
        """As all tasks that merge."""
        return True

    def arguments(self) -> dict[str, Task]:
        """What mergekit gathers."""
        return {"tensors": self.gather_tensors}

    def group_label(self) -> str | None:
        """As mergekit orders its tasks."""
        label: str | None = self.gather_tensors.group_label()
        return label

    def execute(self, tensors: dict[ModelReference, torch.Tensor], **_others: Any) -> torch.Tensor:
        """Merge by ours, or by mergekit's own task."""
        settings = SWITCH.settings
        if self.inner is None:
            return self._execute_added(tensors, settings or Settings())
        if settings is not None:
            try:
                return self._merge(tensors, settings)
            except LeftToPeer as reason:
                count_left(self.method_name, str(reason))
        merged: torch.Tensor = self.inner.execute(tensors=tensors)
        return merged

    def _execute_added(self, tensors: dict[ModelReference, torch.Tensor], settings: Settings) -> torch.Tensor:
        base = None if self.base_model is None else tensors.get(self.base_model)
        try:
            if base is not None and (len(tensors) == 1 or base.numel() == 0):
                return base
            return self._merge(tensors, settings)
        except LeftToPeer as reason:
            raise refusal(self.method_name, self.weight_info.name, reason) from None

    def _merge(self, tensors: dict[ModelReference, torch.Tensor], settings: Settings) -> torch.Tensor:
        method = _method(self.method_name)
        base = None
        if method.needs_base:
            base = None if self.base_model is None else tensors.get(self.base_model)
            if base is None:
                raise LeftToPeer("there is no base")
        if self.method_name in _PROMOTING and len({tensor.dtype for tensor in tensors.values()}) > 1:
            raise LeftToPeer("dtypes differ")
        if self.method_name == "sce" and base is not None and base.dim() == 0:
            raise LeftToPeer("mergekit 0.1.4 weighs models of one number alike")
        models = [model for model in tensors if base is None or model != self.base_model]
        each = [dict(self.tensor_parameters[model].items()) for model in models]
        dtype = _meeting([tensors[model] for model in models]) if base is None else base.dtype
        brought = [tensors[model].to(dtype) for model in models]
        for model, given in zip(models, each, strict=True):
            self._check_quirks(method, tensors[model].numel(), given)
        values = dict(self.parameters.items())
        return merge_group(method, self.weight_info.name, base, brought, values, each, settings)

    @staticmethod
    def _check_quirks(method: Method, numel: int, given: dict[str, Any]) -> None:
        rules = {"magnitude": "magnitude", "outliers": "magnitude_outliers"}
        rule = rules.get(getattr(method, "sparsify", "none"))
        if rule is not None and numel:
            quirk(rule, numel, float(given["density"]), float(given.get("gamma") or 0.0))


def _meeting(tensors: Sequence[torch.Tensor]) -> torch.dtype:
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
