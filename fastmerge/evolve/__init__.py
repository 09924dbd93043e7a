"""Evolving models: a search among weights (Evolver, differential evolution, CADE), or among a method's coefficients.

    report = fastmerge.evolve.evolve([a, b, c], score, strategy="evolver", generations=15)
    report = fastmerge.evolve.search([a, b], score, base=base, method="ties", space={"density": (0.1, 1.0)})

`score(model) -> float` is yours, and higher is better. Names are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastmerge.evolve.coefficients import SearchReport, search
    from fastmerge.evolve.evaluator import DevelopmentScore, FinalScore
    from fastmerge.evolve.evolution import EvolveReport, evolve
    from fastmerge.evolve.progress import GenerationReport
    from fastmerge.evolve.strategies import Cade, De, Evolver

__all__ = [
    "Cade",
    "De",
    "DevelopmentScore",
    "EvolveReport",
    "Evolver",
    "FinalScore",
    "GenerationReport",
    "SearchReport",
    "evolve",
    "search",
]

_HOMES = {
    "Cade": "strategies",
    "De": "strategies",
    "DevelopmentScore": "evaluator",
    "EvolveReport": "evolution",
    "Evolver": "strategies",
    "FinalScore": "evaluator",
    "GenerationReport": "progress",
    "SearchReport": "coefficients",
    "evolve": "evolution",
    "search": "coefficients",
}


def __getattr__(name: str) -> Any:
    """Import a name's module when it is first asked for: reading a config needs no torch."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
