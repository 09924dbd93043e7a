"""Recipes: how to make a member again from the models that a run began with, in a few numbers.

A member that took another's place is a node: the nodes it was mixed from, the coefficients, and the numbers that its
random mask is drawn with. Node i is input model i as long as there are such; each accepted trial is the next node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastmerge.ops import blend_trial, de_trial


@dataclass(frozen=True)
class Recipe:
    """How a trial is made.

    kind, factors, crossover: see `strategies.Trial`. x, others: nodes. generation, member: of its mask. forced: the
    tensor and the flat index of an element that changes in any case, or None. variant: what the history calls it.
    """

    kind: str
    x: int
    others: tuple[int, ...]
    factors: tuple[float, ...]
    crossover: float
    generation: int
    member: int
    forced: tuple[str, int] | None
    variant: str

    @property
    def parents(self) -> tuple[int, ...]:
        """All nodes that it is mixed from."""
        return (self.x, *self.others)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the history."""
        return {
            "generation": self.generation,
            "member": self.member,
            "kind": self.kind,
            "variant": self.variant,
            "x": self.x,
            "others": list(self.others),
            "F": list(self.factors),
            "CR": self.crossover,
            "forced": None if self.forced is None else list(self.forced),
        }

    def apply(
        self,
        values: Mapping[int, Tensor],
        *,
        name: str,
        tensor_id: int,
        offset: int,
        seed: int,
        out: Tensor | None,
        backend: str,
    ) -> Tensor:
        """Some elements of one tensor of the trial, from `offset` on, given those of its parents, flat.

        out: where to put them; None takes new memory. The result has the dtype of x: each node is rounded to it.
        """
        forced = self._forced_in(name)
        named: dict[str, Any] = {"tensor_id": tensor_id, "offset": offset, "forced": forced, "out": out}
        result: Tensor = self._mixed([values[node] for node in self.parents], named, seed, backend)
        return result

    def apply_whole(
        self,
        values: Mapping[int, list[Tensor]],
        *,
        names: Sequence[str],
        tensor_ids: Sequence[int],
        seed: int,
        out: list[Tensor],
        backend: str,
    ) -> None:
        """Whole tensors of the trial at once, flat, to `out`: on a GPU one launch does for many."""
        forced = [self._forced_in(name) for name in names]
        named: dict[str, Any] = {"tensor_id": list(tensor_ids), "forced": forced, "out": out}
        self._mixed([values[node] for node in self.parents], named, seed, backend)

    def _forced_in(self, name: str) -> int | None:
        return self.forced[1] if self.forced is not None and self.forced[0] == name else None

    def _mixed(self, values: Sequence[Any], named: dict[str, Any], seed: int, backend: str) -> Any:
        named |= {"seed": seed, "generation": self.generation, "member": self.member, "backend": backend}
        x, *others = values
        if self.kind == "blend":
            return blend_trial(x, others[0], self.factors[0], self.crossover, **named)
        a, b, c, *further = others
        more = [(factor, p, q) for factor, p, q in zip(self.factors[1:], further[::2], further[1::2], strict=True)]
        return de_trial(x, a, b, c, self.factors[0], self.crossover, more=more, **named)


def needed(recipes: Sequence[Recipe], first: int, targets: Sequence[int], leaves: frozenset[int]) -> list[int]:
    """The nodes to compute for `targets`, each after what it is made from; `leaves` are there already.

    recipes: those of the nodes from `first` on.
    """
    wanted: set[int] = set()
    open_nodes = [node for node in targets if node not in leaves]
    while open_nodes:
        node = open_nodes.pop()
        if node in wanted:
            continue
        wanted.add(node)
        open_nodes.extend(parent for parent in recipes[node - first].parents if parent not in leaves)
    # A node's parents are older than it is.
    return sorted(wanted)
