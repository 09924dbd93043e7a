"""fastmerge: merging language models at memory speed.

    import fastmerge
    merged = fastmerge.merge([a, b], base=base, method="ties", weight=0.5, density=0.5)
    fastmerge.merge_checkpoints("config.yml", "out/")

Importing the package is quick: torch is imported when one of its names is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastmerge.errors import FastmergeError

if TYPE_CHECKING:
    from fastmerge import backends, errors, evolve, experts, integrations, methods, ops, routers
    from fastmerge.merging import merge, merge_checkpoints, merge_many, plan_checkpoints

__version__ = "0.1.0"

__all__ = [
    "FastmergeError",
    "__version__",
    "backends",
    "errors",
    "evolve",
    "experts",
    "integrations",
    "merge",
    "merge_checkpoints",
    "merge_many",
    "methods",
    "ops",
    "plan_checkpoints",
    "routers",
]

_MODULES = ("backends", "errors", "evolve", "experts", "integrations", "methods", "ops", "routers")
_FUNCTIONS = ("merge", "merge_checkpoints", "merge_many", "plan_checkpoints")


def __getattr__(name: str) -> Any:
    """Import a part of the package when it is first asked for."""
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(f"{__name__}.merging"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
