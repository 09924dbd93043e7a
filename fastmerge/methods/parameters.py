"""Declaring, describing and binding the parameters of a merge method.

A method declares its parameters as a pydantic model that holds the values for one tensor: a shared parameter is a plain
field, a parameter per model is a tuple with one element per model. Everything a person is shown (names, defaults,
ranges, help) is read off that model, so it is written once.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from fastmerge.errors import ArgumentError

REQUIRED: Any = object()
"""The default of a parameter that has none."""

Finite = Annotated[float, Field(allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class ParameterError(ArgumentError):
    """A parameter's value cannot be used. parameter: its name; model: whose value it is, None for a shared one."""

    def __init__(self, message: str, parameter: str, model: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter
        self.model = model


class Parameters(BaseModel):
    """The values of one method's parameters for one tensor."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


P = TypeVar("P", bound=Parameters)


@dataclass(frozen=True)
class Parameter:
    """What is known about one parameter without any value: its name, kind, scope, default, range and help."""

    name: str
    python_name: str
    kind: type
    per_model: bool
    default: Any
    minimum: float | None
    maximum: float | None
    help: str
    choices: tuple[str, ...] = ()

    @property
    def required(self) -> bool:
        """Whether it has no default."""
        return self.default is REQUIRED

    @property
    def range(self) -> str:
        """The values it takes, in words."""
        if self.kind is bool:
            return "true or false"
        if self.kind is str and not self.choices:
            return "a regular expression"
        if self.choices:
            return " or ".join(self.choices) if len(self.choices) == 2 else "one of " + ", ".join(self.choices)
        if self.kind is int:
            return f"a whole number, {self.minimum:g} or more"
        if self.minimum is not None and self.maximum is not None:
            return f"from {self.minimum:g} to {self.maximum:g}"
        if self.minimum is not None:
            return f"{self.minimum:g} or more"
        return "any finite number"


def per_model(meaning: str, default: Any = REQUIRED) -> Any:
    """A field with one value per model (a tuple); a lone value stands for all of them."""
    return Field(json_schema_extra={"default_each": default}, description=meaning)


def shared(default: Any, meaning: str, alias: str | None = None) -> Any:
    """A field with one value for all models, REQUIRED for one that must be given; `alias` is its name in YAML where
    Python reserves it.
    """
    if default is REQUIRED:
        return Field(alias=alias, description=meaning)
    return Field(default=default, alias=alias, description=meaning)


def parameters_of(model: type[Parameters]) -> dict[str, Parameter]:
    """The parameters that a method's model declares, by their name in YAML, in the order of declaration."""
    found = {}
    for python_name, field in model.model_fields.items():
        name = field.alias or python_name
        annotation, limits = field.annotation, list(field.metadata)
        is_per_model = get_origin(annotation) is tuple
        if is_per_model:
            annotation = get_args(annotation)[0]
        if get_origin(annotation) in (Union, UnionType):
            # None stands for a default that depends on other parameters.
            annotation = next(one for one in get_args(annotation) if one is not NoneType)
        if get_origin(annotation) is Annotated:
            annotation, *extras = get_args(annotation)
            limits += [limit for extra in extras for limit in getattr(extra, "metadata", [extra])]
        choices = get_args(annotation) if get_origin(annotation) is Literal else ()
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        found[name] = Parameter(
            name=name,
            python_name=python_name,
            kind=str if choices else _kind(annotation),
            per_model=is_per_model,
            default=extra.get("default_each", REQUIRED) if is_per_model else _default(field),
            minimum=next((limit.ge for limit in limits if getattr(limit, "ge", None) is not None), None),
            maximum=next((limit.le for limit in limits if getattr(limit, "le", None) is not None), None),
            help=field.description or "",
            choices=choices,
        )
    return found


def _kind(annotation: Any) -> type:
    """What a parameter's values are: numbers unless its annotation says otherwise."""
    return annotation if annotation in (bool, int, str) else float


def _default(field: FieldInfo) -> Any:
    """A shared field's default; it has none where it was declared without one."""
    return REQUIRED if field.is_required() else field.default


def bind(
    model: type[P],
    shared_values: Mapping[str, Any],
    per_model_values: Sequence[Mapping[str, Any]],
    *,
    method: str,
    tensor: str,
    labels: Sequence[str],
) -> P:
    """Check one tensor's values and fill in the defaults.

    shared_values: by name, for all models. per_model_values: by name, one mapping per model, in the models' order; a
    name that is missing there (or None) gets its default. labels: what to call each model in a message.

    Raises ParameterError naming the parameter, the value, the tensor and the model.
    """
    values: dict[str, Any] = {}
    for name, parameter in parameters_of(model).items():
        if not parameter.per_model:
            given = shared_values.get(name)
            if given is None and parameter.default is None:
                continue
            if given is None and parameter.required:
                raise ParameterError(f"{method} needs {name} (tensor {tensor}): give it once for all models.", name)
            values[name] = _checked(parameter, parameter.default if given is None else given, tensor, None)
            continue
        each = []
        for label, mapping in zip(labels, per_model_values, strict=True):
            given = mapping.get(name)
            if given is None and parameter.required:
                raise ParameterError(
                    f"{method} needs {name} for {label} (tensor {tensor}): give it per model or once for all of them.",
                    name,
                    label,
                )
            each.append(_checked(parameter, parameter.default if given is None else given, tensor, label))
        values[name] = tuple(each)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        message = f"{name} = {first['input']!r} is not usable for {tensor}: {first['msg']}."
        raise ParameterError(message, name) from None


def _checked(parameter: Parameter, value: Any, tensor: str, label: str | None) -> Any:
    """`value` as the parameter's kind, inside its range."""
    where = f"for {tensor}" if label is None else f"for {tensor} of {label}"
    refusal = ParameterError(
        f"{parameter.name} = {value!r} {where} is not usable: {parameter.name} is {parameter.range}.",
        parameter.name,
        label,
    )
    if parameter.choices:
        if value in parameter.choices:
            return value
        near = difflib.get_close_matches(str(value), parameter.choices, n=1)
        raise ParameterError(f"{refusal}{f' Did you mean {near[0]}?' if near else ''}", parameter.name, label)
    if parameter.kind is str:
        if isinstance(value, str):
            return value
        raise refusal
    if parameter.kind is bool:
        if isinstance(value, bool):
            return value
        if value in (0, 1, "true", "false", "True", "False"):
            return value in (1, "true", "True")
        raise refusal
    if isinstance(value, bool):
        raise refusal
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise refusal from None
    low = float("-inf") if parameter.minimum is None else parameter.minimum
    high = float("inf") if parameter.maximum is None else parameter.maximum
    if not low <= number <= high or number in (float("inf"), float("-inf")):
        raise refusal
    if parameter.kind is int:
        if not number.is_integer():
            raise refusal
        return int(number)
    return number


def unknown_parameter(name: str, method: str, known: Iterable[str], elsewhere: Mapping[str, str]) -> str:
    """The sentence for a parameter that `method` does not have: the near one, or whose it is."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if name in elsewhere:
        return f"{method} has no parameter {name} (it belongs to {elsewhere[name]}); it has {', '.join(known)}."
    if near:
        return f"{method} has no parameter {name}; did you mean {near[0]}?"
    return f"{method} has no parameter {name}; it has {', '.join(known)}."
