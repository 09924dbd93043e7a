"""The merge methods: one file each, and the table that finds them by name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from fastmerge.errors import ArgumentError
from fastmerge.methods.arcee_fusion import ArceeFusion
from fastmerge.methods.base import Method
from fastmerge.methods.breadcrumbs import Breadcrumbs, BreadcrumbsTies
from fastmerge.methods.dare import DareLinear, DareTies
from fastmerge.methods.della import Della, DellaLinear
from fastmerge.methods.fr import Fr
from fastmerge.methods.karcher import Karcher
from fastmerge.methods.linear import Linear
from fastmerge.methods.model_stock import ModelStock
from fastmerge.methods.multislerp import Multislerp
from fastmerge.methods.nearswap import NearSwap
from fastmerge.methods.nuslerp import Nuslerp
from fastmerge.methods.parameters import (
    Parameter,
    ParameterError,
    Parameters,
    parameters_of,
    unknown_parameter,
)
from fastmerge.methods.parameters import bind as _bind
from fastmerge.methods.passthrough import Passthrough
from fastmerge.methods.pcb import Pcb
from fastmerge.methods.ram import Ram, RamPlusTl
from fastmerge.methods.sce import Sce
from fastmerge.methods.slerp import Slerp
from fastmerge.methods.task_arithmetic import TaskArithmetic
from fastmerge.methods.ties import Ties

__all__ = ["Method", "ParameterError", "bind", "describe", "explain_unknown_parameter", "get", "names", "parameters"]

_METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        Linear,
        TaskArithmetic,
        Ties,
        DareLinear,
        DareTies,
        Breadcrumbs,
        BreadcrumbsTies,
        Della,
        DellaLinear,
        Slerp,
        Nuslerp,
        Multislerp,
        Karcher,
        ModelStock,
        Passthrough,
        Pcb,
        Fr,
        NearSwap,
        Sce,
        Ram,
        RamPlusTl,
        ArceeFusion,
    )
}


def names() -> list[str]:
    """The names of all methods, as `merge_method` and `method=` take them."""
    return list(_METHODS)


def get(name: str) -> Method:
    """The method called `name`. ArgumentError, with the near one, when there is none."""
    if name not in _METHODS:
        near = difflib.get_close_matches(str(name), _METHODS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(_METHODS)}."
        raise ArgumentError(f"There is no merge method {name!r}; {hint}")
    return _METHODS[name]()


def parameters(name: str) -> dict[str, Parameter]:
    """The parameters of the method called `name`, by their name in YAML."""
    return parameters_of(get(name).Parameters)


def bind(
    method: Method,
    shared: Mapping[str, Any],
    per_model: Sequence[Mapping[str, Any]],
    *,
    tensor: str,
    labels: Sequence[str],
) -> Parameters:
    """One tensor's parameters, checked and completed with the defaults.

    shared, per_model: values by name, for all models and for each in order; labels: what to call each model.
    Raises ParameterError naming parameter, value, tensor and model.
    """
    return _bind(method.Parameters, shared, per_model, method=method.name, tensor=tensor, labels=labels)


def describe(name: str) -> dict[str, Any]:
    """What a person wants to know about a method: plain strings, numbers and lists, ready for JSON.

    Keys: name, title, source, needs_base, takes_base (whether it takes one that it does not need), passes (in words:
    sweeps over a tensor too large to be held; smaller ones are read once), parameters (a list of name, python_name,
    per_model, required, default, range, help).
    """
    method = get(name)
    return {
        "name": method.name,
        "title": method.title,
        "source": method.source,
        "needs_base": method.needs_base,
        "takes_base": method.takes_base,
        "passes": method.sweeps,
        "parameters": [
            {
                "name": parameter.name,
                "python_name": parameter.python_name,
                "per_model": parameter.per_model,
                "required": parameter.required,
                "default": None if parameter.required else parameter.default,
                "range": parameter.range,
                "help": parameter.help,
            }
            for parameter in parameters(name).values()
        ],
    }


def explain_unknown_parameter(name: str, method: str) -> str:
    """The sentence for a parameter that the method lacks: the near one, or the methods that it belongs to."""
    owners: dict[str, str] = {}
    for other in names():
        for parameter in parameters(other):
            held = owners.get(parameter)
            owners[parameter] = other if held is None else f"{held}, {other}"
    return unknown_parameter(name, method, parameters(method), owners)
