"""Problems with a known optimum as "models": a few tensors that together are one point."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Problem = Callable[[np.ndarray], float]


def sphere(x: np.ndarray) -> float:
    return float((x * x).sum())


def rosenbrock(x: np.ndarray) -> float:
    return float((100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum())


def rastrigin(x: np.ndarray) -> float:
    return float((x * x - 10.0 * np.cos(2 * np.pi * x) + 10.0).sum())


PROBLEMS: dict[str, tuple[Problem, float]] = {
    "sphere": (sphere, 5.0),
    "rosenbrock": (rosenbrock, 2.0),
    "rastrigin": (rastrigin, 5.12),
}
"""Each with how far from 0 its first points reach."""


def as_model(point: np.ndarray) -> dict[str, Tensor]:
    """A point as a model of two tensors, one of them a matrix, and a counter."""
    x = torch.from_numpy(point.astype(np.float32))
    cut = len(point) // 4 * 2
    return {"body.weight": x[:cut].view(2, -1).clone(), "head.bias": x[cut:].clone(), "steps": torch.tensor(7)}


def as_point(model: dict[str, Tensor]) -> np.ndarray:
    """The point that a model is."""
    whole = torch.cat([model["body.weight"].view(-1), model["head.bias"]])
    found: np.ndarray = whole.double().numpy()
    return found


def points(name: str, count: int, size: int, seed: int = 0) -> np.ndarray:
    """A first population, [count, size]."""
    reach = PROBLEMS[name][1]
    drawn: np.ndarray = np.random.default_rng(seed).uniform(-reach, reach, (count, size))
    return drawn.astype(np.float32).astype(np.float64)


def score_of(name: str) -> Callable[[dict[str, Tensor]], float]:
    """The problem as a score: higher is better."""
    problem = PROBLEMS[name][0]
    return lambda model: -problem(as_point(model))
