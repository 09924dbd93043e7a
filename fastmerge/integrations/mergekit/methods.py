"""Which of mergekit's methods are replaced, which of ours are added to them, and what a release does of its own."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field

from fastmerge import methods
from fastmerge.methods.base import Method, MethodInFloat32, MethodWithoutPeer
from fastmerge.methods.geometry import GeometricMethod
from fastmerge.methods.parameters import Parameter

REPLACED = (
    "linear",
    "task_arithmetic",
    "ties",
    "dare_linear",
    "dare_ties",
    "breadcrumbs",
    "breadcrumbs_ties",
    "della",
    "della_linear",
    "slerp",
    "sce",
)
"""Methods of mergekit's that are computed here. To take in one more, which has the same name and parameters: a line."""

_UNDERFLOWING = ("sce",)
"""Methods whose small intermediate results vanish in float16 as mergekit computes them."""

ADDED = ("pcb", "fr")
"""Methods of ours that mergekit has not, under their own names."""


def numerics_of(method: Method, asked: str) -> str:
    """The numbers by which a method is merged: "fp32" for those that have no others here, else what was asked for."""
    always = (MethodWithoutPeer, MethodInFloat32, GeometricMethod)
    return "fp32" if isinstance(method, always) else asked


def underflows(method: Method, dtype: torch.dtype, asked: str) -> bool:
    """Whether mergekit's own numbers, which were asked for, are made of what has vanished in the models' dtype."""
    return asked == "mergekit" and dtype == torch.float16 and method.name in _UNDERFLOWING


def offered(name: str) -> dict[str, Parameter]:
    """The parameters of an added method by their names in YAML."""
    return methods.parameters(name)


def default_of(parameter: Parameter) -> Any:
    """What it is inside mergekit, where a method sees one tensor at a time."""
    return "tensor" if parameter.name == "scope" else parameter.default


def type_of(parameter: Parameter) -> Any:
    """The type by which mergekit checks a value while it plans."""
    if parameter.name == "scope":
        return Annotated[str, AfterValidator(_tensor_scope)]
    if parameter.choices:
        return Literal[parameter.choices]
    if parameter.kind is not float:
        return parameter.kind
    number = Annotated[float, Field(ge=parameter.minimum, le=parameter.maximum, allow_inf_nan=False)]
    return number | None if parameter.default is None else number


def _tensor_scope(value: str) -> str:
    if value == "tensor":
        return value
    raise ValueError(
        "inside mergekit a method sees one tensor at a time, so scope is tensor; for thresholds over the whole model "
        "run the same YAML with `fastmerge merge`"
    )
