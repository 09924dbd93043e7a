"""Which experts a request needs: the router is the user's own; here are its protocol, two helpers and a small one.

A router is anything that turns what is known of a request (hidden states, a text) into weights by expert:

    router = lambda text: {"math": 1.0} if "=" in text else {"code": 1.0}
    with experts.active(router(text)):
        model.generate(...)

FREE-Merging (arXiv 2411.16815) routes by a small network on the model's own hidden states; `MLPRouter` is one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from fastmerge.errors import ArgumentError

__all__ = ["MLPRouter", "Router", "hard", "pool", "soft"]


@runtime_checkable
class Router(Protocol):
    """Turns what is known of one request into weights by expert, as `ExpertSet.active` takes them."""

    def __call__(self, request: Any) -> Mapping[str, float]:
        """The weights; experts that are not named get none."""


def hard(scores: Tensor | Sequence[float], names: Sequence[str]) -> dict[str, float]:
    """The expert with the highest score, alone, with a weight of 1; of equal ones the first.

    scores: one for each of `names`. Errors: ArgumentError where they are not as many, or NaN.
    """
    values = _checked(scores, names)
    return {names[max(range(len(values)), key=values.__getitem__)]: 1.0}


def soft(
    scores: Tensor | Sequence[float], names: Sequence[str], *, temperature: float = 1.0, least: float = 0.0
) -> dict[str, float]:
    """Weights by softmax of scores / temperature; those below `least` are left out, and the others add up to 1 again.

    scores: one for each of `names`. The highest one stays, however small its weight is.
    Errors: ArgumentError where they are not as many, NaN or all -inf, or the temperature is not positive.
    """
    if not temperature > 0:
        raise ArgumentError(f"temperature={temperature} is not positive; pass one such as 1.0.")
    values = _checked(scores, names)
    top = max(values)
    if top == -math.inf:
        raise ArgumentError("all scores are -inf, so no expert is left to weigh; leave at least one of them finite.")
    shares = [math.exp((value - top) / temperature) if value > -math.inf else 0.0 for value in values]
    total = sum(shares)
    weights = {name: share / total for name, share in zip(names, shares, strict=True)}
    kept = {name: weight for name, weight in weights.items() if weight >= least} or hard(values, names)
    total = sum(kept.values())
    return {name: weight / total for name, weight in kept.items() if weight > 0}


def pool(hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """Hidden states [batch, length, width] as their mean over the tokens, float32 [batch, width].

    mask: [batch, length], 0 at padding, which does not count; a request without a token is all 0.
    """
    if hidden.dim() != 3:
        raise ArgumentError(f"hidden has shape {list(hidden.shape)}; pass [batch, length, width].")
    values = hidden.detach().to(torch.float32)
    if mask is None:
        return values.mean(dim=1)
    if mask.shape != hidden.shape[:2]:
        raise ArgumentError(f"mask has shape {list(mask.shape)}; hidden asks for {list(hidden.shape[:2])}.")
    share = mask.to(torch.float32)[:, :, None]
    # Padding may hold NaN, which a factor of 0 would not silence.
    return torch.where(share > 0, values * share, 0.0).sum(dim=1) / share.sum(dim=1).clamp(min=1.0)


class MLPRouter(torch.nn.Module):
    """Two layers on pooled hidden states: which expert a request belongs to. Small enough to be trained in seconds.

    names: the experts'. width: of the hidden states. inner: of the layer between.
    """

    def __init__(self, names: Sequence[str], width: int, inner: int = 64) -> None:
        super().__init__()
        if not names or len(set(names)) < len(names):
            raise ArgumentError("names must be the experts' names, each once.")
        self.names = list(names)
        self.width = width
        self.layers = torch.nn.Sequential(
            torch.nn.LayerNorm(width),
            torch.nn.Linear(width, inner),
            torch.nn.GELU(),
            torch.nn.Linear(inner, len(names)),
        )

    def forward(self, pooled: Tensor) -> Tensor:
        """Scores [batch, experts] of pooled hidden states [batch, width]."""
        # As a part of a model it is moved and converted with it.
        parameter = next(self.layers.parameters())
        scores: Tensor = self.layers(pooled.to(parameter.device, parameter.dtype))
        return scores

    @torch.no_grad()
    def route(
        self,
        hidden: Tensor,
        mask: Tensor | None = None,
        *,
        mixed: bool = False,
        temperature: float = 1.0,
        least: float = 0.0,
    ) -> list[dict[str, float]]:
        """Weights for each request of a batch: of one expert, or, where `mixed`, of several (see `hard` and `soft`).

        hidden: [batch, length, width] with its mask, or what `pool` made of it.
        """
        scores = self(self._rows("hidden", pool(hidden, mask) if hidden.dim() == 3 else hidden))
        if mixed:
            return [soft(row, self.names, temperature=temperature, least=least) for row in scores]
        return [hard(row, self.names) for row in scores]

    def fit(
        self, pooled: Tensor, labels: Sequence[str] | Tensor, *, steps: int = 200, rate: float = 1e-2, seed: int = 0
    ) -> float:
        """Train on pooled hidden states whose experts are known; returns the share of them that is then routed right.

        labels: a name, or a name's number, for each row. All rows go into each step: routers see thousands of requests,
        not millions.
        """
        numbers = (
            self._numbers(labels)
            if isinstance(labels, Tensor)
            else torch.tensor([self._number(label) for label in labels], dtype=torch.long)
        )
        rows = self._rows("pooled", pooled).detach().to(torch.float32)
        if len(numbers) != len(rows):
            raise ArgumentError(f"labels has {len(numbers)} entries for {len(rows)} rows; pass one for each.")
        if not len(rows):
            raise ArgumentError("pooled has no rows; a router needs requests whose experts are known to learn from.")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for layer in self.layers:
                if isinstance(layer, (torch.nn.LayerNorm, torch.nn.Linear)):
                    layer.reset_parameters()
        optimizer = torch.optim.Adam(self.parameters(), lr=rate)
        with torch.enable_grad():
            for _ in range(steps):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(self(rows), numbers.to(rows.device)).backward()
                optimizer.step()
        with torch.no_grad():
            return float((self(rows).argmax(dim=1).cpu() == numbers.cpu()).to(torch.float32).mean())

    def _rows(self, argument: str, pooled: Tensor) -> Tensor:
        if pooled.dim() != 2 or pooled.shape[1] != self.width:
            raise ArgumentError(
                f"{argument} has shape {list(pooled.shape)}; this router takes pooled hidden states "
                f"[batch, {self.width}], which pool() makes."
            )
        return pooled

    def _numbers(self, labels: Tensor) -> Tensor:
        if labels.is_floating_point() or labels.dim() != 1:
            raise ArgumentError(
                f"labels is {labels.dtype}{list(labels.shape)}; pass one whole number, or one name, for each row."
            )
        wrong = labels[(labels < 0) | (labels >= len(self.names))]
        if len(wrong):
            raise ArgumentError(f"labels holds {int(wrong[0])}; there are {len(self.names)} experts, from 0 on.")
        return labels.to(torch.long)

    def _number(self, label: str) -> int:
        if label not in self.names:
            raise ArgumentError(f"labels holds {label!r}, which is no expert; there are {', '.join(self.names)}.")
        return self.names.index(label)


def _checked(scores: Tensor | Sequence[float], names: Sequence[str]) -> list[float]:
    if isinstance(scores, Tensor) and scores.dim() != 1:
        raise ArgumentError(f"scores has shape {list(scores.shape)}; pass those of one request, one for each expert.")
    values = [float(value) for value in (scores.tolist() if isinstance(scores, Tensor) else scores)]
    if len(values) != len(names) or not values:
        raise ArgumentError(f"there are {len(values)} scores for {len(names)} experts; pass one for each.")
    if any(value != value for value in values):
        raise ArgumentError("a score is NaN; a router that gives NaN was trained badly, or was given NaN.")
    return values
