"""Which of mergekit's methods are replaced, which of ours are added to them, and what a release does of its own."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from fastmerge import methods
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
)
"""Methods of mergekit's that are computed here. To take in one more, which has the same name and parameters: a line."""

ADDED = ("pcb", "fr")
"""Methods of ours that mergekit has not, under their own names."""


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
