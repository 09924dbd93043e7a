"""Who says which coefficients to try next: CMA-ES, Optuna, or anything that can be asked and told."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Protocol

from fastmerge.errors import ArgumentError, ArgumentTypeError


class Sampler(Protocol):
    """Points of the unit cube, and what became of them. The same seed and scores must give the same points."""

    @property
    def name(self) -> str:
        """What the history calls it."""

    def ask(self) -> list[list[float]]:
        """A batch of points, each coordinate from 0 to 1."""

    def tell(self, points: list[list[float]], scores: list[float]) -> None:
        """The scores of the batch, higher is better; a failed one has the worst score so far.

        A batch is not told where no point of it, nor of those before it, has a score.
        """


SAMPLERS = ("cma", "optuna")


def make(sampler: str | Sampler, dimensions: int, seed: int) -> Sampler:
    """A sampler from its name, or as it was given. ArgumentError: its package is missing."""
    if not isinstance(sampler, str):
        if not (callable(getattr(sampler, "ask", None)) and callable(getattr(sampler, "tell", None))):
            raise ArgumentTypeError(
                f"sampler must be {' or '.join(SAMPLERS)}, or have ask and tell, not {type(sampler).__name__}."
            )
        return sampler
    if sampler not in SAMPLERS:
        raise ArgumentError(f"There is no sampler {sampler!r}; there are {', '.join(SAMPLERS)}.")
    try:
        module = importlib.import_module(sampler)
    except ImportError as error:
        raise ArgumentError(
            f"the sampler {sampler} needs the package {sampler}, which cannot be imported here ({error}); install "
            "fastmerge[search]."
        ) from None
    return _Cma(module, dimensions, seed) if sampler == "cma" else _Optuna(module, dimensions, seed)


class _Cma:
    """CMA-ES from the middle of the cube."""

    name = "cma"

    def __init__(self, module: Any, dimensions: int, seed: int) -> None:
        self._dimensions = dimensions
        # It does not search along one line alone; a second coordinate that nothing looks at does no harm.
        start = [0.5] * max(dimensions, 2)
        # A seed of 0 would mean the time of day.
        options = {"bounds": [0.0, 1.0], "seed": seed % (2**31 - 2) + 1, "verbose": -9, "maxiter": float("inf")}
        self._search = module.CMAEvolutionStrategy(start, 0.25, options)
        self._asked: list[Any] = []

    def ask(self) -> list[list[float]]:
        self._asked = self._search.ask()
        return [[float(value) for value in point[: self._dimensions]] for point in self._asked]

    def tell(self, points: list[list[float]], scores: Sequence[float]) -> None:
        self._search.tell(self._asked, [-score for score in scores])


class _Optuna:
    """Optuna's TPE sampler, one point at a time."""

    name = "optuna"

    def __init__(self, module: Any, dimensions: int, seed: int) -> None:
        module.logging.set_verbosity(module.logging.WARNING)
        uniform = module.distributions.FloatDistribution(0.0, 1.0)
        self._space = {f"x{number}": uniform for number in range(dimensions)}
        sampler = module.samplers.TPESampler(seed=seed % 2**32)
        self._study = module.create_study(direction="maximize", sampler=sampler)
        self._trial: Any = None

    def ask(self) -> list[list[float]]:
        self._trial = self._study.ask(self._space)
        return [[float(self._trial.params[name]) for name in self._space]]

    def tell(self, points: list[list[float]], scores: Sequence[float]) -> None:
        self._study.tell(self._trial, scores[0])
