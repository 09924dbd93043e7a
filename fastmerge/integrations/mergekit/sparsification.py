"""`mergekit.sparsify`'s four functions on one delta, by fastmerge's kernels; both releases call them by these names."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from fastmerge import ops
from fastmerge.integrations.mergekit.group import (
    SWITCH,
    LeftToPeer,
    Settings,
    check_tensors,
    count_left,
    count_merged,
    draw_seed,
    has_nonfinite,
)
from fastmerge.integrations.mergekit.patches import MergekitError, Patch

_FUNCTIONS = {
    "magnitude": ("tensor", "density", "rescale_norm"),
    "magnitude_outliers": ("tensor", "density", "rescale_norm", "gamma"),
    "bernoulli": ("tensor", "density", "rescale_norm"),
    "della_magprune": ("tensor", "density", "epsilon", "rescale_norm"),
}
"""mergekit's names for them, which are those of the op's methods, and their arguments."""

Quirk = Callable[[str, int, float, float], None]
"""Raises LeftToPeer where a release does something of its own: (method, elements, density, gamma)."""


def sparsification_patches(module: ModuleType, version: str, quirk: Quirk) -> list[Patch]:
    """A patch for each function of `mergekit.sparsify`, given as `module`.

    Raises MergekitError where one of them takes other arguments than in the release that mergekit says it is.
    """
    for name, arguments in _FUNCTIONS.items():
        function = getattr(module, name, None)
        if function is None or tuple(inspect.signature(function).parameters) != arguments:
            raise MergekitError(
                f"This mergekit says that it is {version}, but its sparsify.{name} is another; install the release "
                f"with `pip install mergekit=={version}`."
            )
    return [Patch(module, name, _inside(getattr(module, name), name, quirk)) for name in _FUNCTIONS]


def _inside(original: Callable[..., torch.Tensor], name: str, quirk: Quirk) -> Callable[..., torch.Tensor]:
    signature = inspect.signature(original)

    def function(*given: Any, **named: Any) -> torch.Tensor:
        settings = SWITCH.settings
        if settings is None:
            return original(*given, **named)
        bound = signature.bind(*given, **named)
        bound.apply_defaults()
        try:
            return _sparsify(name, settings, quirk, **bound.arguments)
        except LeftToPeer as reason:
            count_left(f"sparsify.{name}", str(reason))
            return original(*given, **named)

    function.__name__ = name
    function.__doc__ = f"mergekit's {name}, computed by fastmerge where it gives the same."
    return function


def _sparsify(
    name: str,
    settings: Settings,
    quirk: Quirk,
    *,
    tensor: torch.Tensor,
    density: float,
    rescale_norm: str | None = None,
    gamma: float = 0.01,
    epsilon: float = 0.15,
) -> torch.Tensor:
    if not 0 < density < 1:
        raise LeftToPeer("nothing is cut off, or everything")
    if rescale_norm not in (None, "l1"):
        raise LeftToPeer("rescaling by another norm than l1")
    if name == "magnitude_outliers" and not 0 <= gamma <= 1:
        raise LeftToPeer(f"gamma = {gamma:g} is not a fraction")
    if name == "della_magprune" and not (epsilon >= 0 and density - epsilon > 0 and density + epsilon < 1):
        raise LeftToPeer(f"epsilon = {epsilon:g} does not go with density = {density:g}")
    check_tensors([tensor], settings)
    quirk(name, tensor.numel(), density, gamma)
    began = time.perf_counter()
    if has_nonfinite([tensor], settings.backend):
        raise LeftToPeer("NaN or Inf in an input")
    drawn = name in ("bernoulli", "della_magprune")
    sparse = ops.sparsify(
        tensor.detach(),
        density,
        method=name,
        rescale=None if rescale_norm is None else "l1",
        gamma=gamma,
        epsilon=epsilon,
        seed=draw_seed() if drawn else 0,
        numerics=settings.numerics,
        backend=settings.backend,
    )
    count_merged(f"sparsify.{name}", time.perf_counter() - began)
    return sparse
