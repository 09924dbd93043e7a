"""What the tests against mergekit share: calling it, drawing inputs, and knowing which positions it leaves open.

mergekit picks among equal magnitudes at the threshold by an unstable sort, so which of them it keeps is nobody's to
reproduce. Such positions are "tied": the peer's own delta there has a magnitude equal to its k-th, and the cut falls
between two of that magnitude.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "f32": torch.float32}

DETERMINISTIC = ("linear", "task_arithmetic", "ties", "breadcrumbs", "breadcrumbs_ties")
RANDOM = ("dare_linear", "dare_ties", "della_linear", "della")

LANES = 32
"""torch adds more than four models from left to right except in the last `numel % 32` elements of a tensor, where it
uses four partial sums: an artefact of its vector loop that shows in float32. With more than four models the tests
draw tensors of a multiple of 32 elements."""

SHAPES = ((), (1,), (2,), (7,), (63,), (129,), (1000,), (5, 1), (1, 9), (33, 65), (64, 96), (3, 5, 7), (2, 3, 4, 5))
EVEN_SHAPES = ((32,), (4, 8), (96,), (64, 96), (2, 3, 32))


@dataclass
class Case:
    """One merge of one tensor."""

    method: str
    base: torch.Tensor
    models: list[torch.Tensor]
    weight: list[float]
    density: list[float] = field(default_factory=list)
    gamma: list[float] = field(default_factory=list)
    epsilon: list[float] = field(default_factory=list)
    lambda_: float | None = None
    normalize: bool | None = None
    rescale: bool | None = None

    def parameters(self, lambda_name: str) -> dict[str, object]:
        """The parameters that the method takes, where given."""
        given: dict[str, object] = {
            "weight": self.weight or None,
            "density": self.density or None,
            "gamma": self.gamma or None,
            "epsilon": self.epsilon or None,
            lambda_name: self.lambda_,
            "normalize": self.normalize,
            "rescale": self.rescale,
        }
        return {name: value for name, value in given.items() if value is not None}


def peer_merge(case: Case) -> torch.Tensor:
    """The merge by mergekit's own method object."""
    registry = pytest.importorskip("mergekit.merge_methods.registry")
    groups = pytest.importorskip("mergekit.merge_methods.base")
    if case.method == "linear":
        group = groups.TensorGroup.from_tensors(case.models)
    else:
        group = groups.TensorGroup.from_tensors([case.base, *case.models], base_index=0)
    (merged,) = registry.get(case.method)([group], parameters=case.parameters("lambda"))
    return merged


def our_merge(case: Case, *, name: str = "weight", seed: int = 0, backend: str = "auto") -> torch.Tensor:
    """The same merge by fastmerge's Python interface."""
    import fastmerge

    merged = fastmerge.merge(
        [{name: model} for model in case.models],
        base=None if case.method == "linear" else {name: case.base},
        method=case.method,
        numerics="mergekit",
        seed=seed,
        backend=backend,
        **case.parameters("lambda_"),
    )
    return merged[name]


def kept_ranks(method: str, density: float, gamma: float, numel: int) -> tuple[int, int]:
    """First and last rank, by falling magnitude, of what a magnitude rule keeps."""
    if method == "ties":
        return 0, 0 if density <= 0 else max(1, int(density * numel))
    target, top = int(density * numel), int(gamma * numel)
    bottom = max(0, numel - target - top)
    return numel - bottom - target, numel - bottom


def tied_positions(
    method: str,
    base: torch.Tensor,
    models: Sequence[torch.Tensor],
    density: Sequence[float],
    gamma: Sequence[float] = (),
) -> torch.Tensor:
    """Where the peer's choice is arbitrary: bool, like the base. The inputs must have the dtype of the computation."""
    tied = torch.zeros(base.shape, dtype=torch.bool)
    if method not in ("ties", "breadcrumbs", "breadcrumbs_ties"):
        return tied
    for number, model in enumerate(models):
        if density[number] >= 1 or base.numel() == 0:
            continue
        magnitude = (model - base).abs().float()
        falling = magnitude.flatten().sort(descending=True).values
        for cut in kept_ranks(method, density[number], gamma[number] if gamma else 0.01, base.numel()):
            if 0 < cut < base.numel() and falling[cut - 1] == falling[cut]:
                tied |= magnitude == falling[cut]
    return tied


def draw_models(seed: int, shape: tuple[int, ...], count: int, dtype: torch.dtype, kind: str) -> list[torch.Tensor]:
    """A base and `count` models near it. kind: "normal", "heavy" (tails) or "discrete" (few magnitudes, many ties)."""
    generator = torch.Generator().manual_seed(seed)
    base = (torch.randn(shape, generator=generator) * 0.02).to(dtype)
    tensors = [base]
    for _ in range(count):
        update = torch.randn(shape, generator=generator)
        if kind == "heavy":
            update = update**3
        elif kind == "discrete":
            update = (update * 2).round()
        tensors.append((base.float() + update * 2e-3).to(dtype))
    return tensors


def draw_case(method: str, dtype: torch.dtype, seed: int) -> Case:
    """A merge drawn from a seed: 2 to 6 models, odd shapes, negative and zero weights, densities with the edges."""
    draw = random.Random(seed)
    count = draw.randint(2, 6)
    shape = draw.choice(SHAPES if count <= 4 else EVEN_SHAPES)
    kinds = ("normal", "heavy") if dtype == torch.float32 else ("normal", "heavy", "discrete")
    base, *models = draw_models(seed, shape, count, dtype, draw.choice(kinds))
    weight = [draw.choice((draw.uniform(-1.0, 2.0), 1.0, 0.3, 0.0)) for _ in models]
    case = Case(method, base, models, weight, normalize=draw.choice((None, True, False)))
    if abs(sum(weight)) < 1e-2:  # nearly no divisor: what is left of it is rounding
        weight[0] += 1.0
    if method != "linear":
        case.lambda_ = draw.choice((None, 1.0, 0.3, -0.7, 1.9))
    if method in ("ties", "breadcrumbs", "breadcrumbs_ties"):
        case.density = [draw.choice((draw.random(), 0.5, 0.1, 1.0, 0.0)) for _ in models]
    if method in ("breadcrumbs", "breadcrumbs_ties"):
        case.gamma = [draw.choice((0.01, 0.1, 0.0)) for _ in models]
    return case
