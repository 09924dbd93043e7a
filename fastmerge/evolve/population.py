"""A population: the input models and, for each member, the recipe by which it came about.

By recipe, a member costs a few numbers, and its values are computed anew whenever they are needed, piece by piece.
Materialised, each member's values are kept as well, which saves that. Both ways give the same bits.

A chain of recipes grows with each trial that is accepted, and so does the time that a trial takes. So where the input
models' memory is the run's own, members are always kept, in that memory, which costs none; models that are lent stay as
they are, and what is kept of them is a copy.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastmerge.evolve.members import Members
from fastmerge.evolve.recipes import Recipe, needed

PIECE = 1 << 20
"""Elements of one tensor that go through a chain of recipes at a time."""


class Population:
    """Members, and what they consist of. Input models in memory that is not the run's own are never changed.

    slots: the node that each member is at. whole: whether the values that are held are members'; not where a run was
    interrupted while they were overwritten.
    """

    def __init__(self, members: Members, *, seed: int, kept: bool, backend: str) -> None:
        """kept: materialised, also where the input models are lent: a member gets memory when it first changes."""
        self._members = members
        self._seed = seed
        self._backend = backend
        self._first = len(members.tensors)
        self.slots = list(range(self._first))
        self.recipes: list[Recipe] = []
        self.kept = kept or members.owned
        self._held = [dict(tensors) for tensors in members.tensors]
        self._at = list(self.slots)
        self._own = [members.owned] * self._first
        self.whole = True

    def accept(self, recipe: Recipe) -> None:
        """Put a trial in its member's place."""
        self.recipes.append(recipe)
        self.slots[recipe.member] = self._first + len(self.recipes) - 1

    def write(self, target: Recipe | int, live: Mapping[str, Tensor]) -> None:
        """Write a trial, or the member of this number, into the live tensors."""
        if self.kept:
            self._advance()
        member = target if isinstance(target, int) else target.member
        recipes = self.recipes if isinstance(target, int) else [*self.recipes, target]
        node = self.slots[member] if isinstance(target, int) else self._first + len(self.recipes)
        order = needed(recipes, self._first, [node], frozenset(self._at))
        leaves = dict(zip(self._at, self._held, strict=True))
        evolved = frozenset(self._members.evolved)
        done: frozenset[str] = frozenset()
        if len(order) == 1:
            done = self._whole(recipes[order[0] - self._first], leaves, {n: x for n, x in live.items() if n in evolved})
        for name, out in live.items():
            if name in done:
                continue
            if name in evolved and order:
                values = {leaf: tensors[name].view(-1) for leaf, tensors in leaves.items()}
                self._compute(name, recipes, order, values, out)
            else:
                # Integers and what was excluded stay the member's own.
                source = leaves[node] if not order and node in leaves else self._held[member]
                out.copy_(source[name])

    def values(self, member: int) -> dict[str, Tensor]:
        """The values of one member, lent: only where members are kept."""
        assert self.kept
        self._advance()
        return self._held[member]

    # -- computing

    def _whole(
        self, recipe: Recipe, leaves: Mapping[int, Mapping[str, Tensor]], live: Mapping[str, Tensor]
    ) -> frozenset[str]:
        """A trial of members that are there, all of its tensors at once; those that it can be written to directly."""
        x = leaves[recipe.x]
        names = [name for name, out in live.items() if _direct(out, x[name])]
        if names:
            recipe.apply_whole(
                {node: [leaves[node][name].view(-1) for name in names] for node in set(recipe.parents)},
                names=names,
                tensor_ids=[self._members.ids[name] for name in names],
                seed=self._seed,
                out=[live[name].view(-1) for name in names],
                backend=self._backend,
            )
        return frozenset(names)

    def _compute(
        self, name: str, recipes: Sequence[Recipe], order: Sequence[int], values: Mapping[int, Tensor], out: Tensor
    ) -> None:
        """One tensor of the last node of `order`, into `out`."""
        numel = out.numel()
        like = next(iter(values.values()))
        direct = _direct(out, like)
        flat = out.view(-1) if direct else torch.empty_like(like)
        step = numel if len(order) == 1 else PIECE
        for start in range(0, numel, step):
            stop = min(start + step, numel)
            self._chain(name, recipes, order, values, start, stop, {order[-1]: flat[start:stop]})
        if not direct:
            out.copy_(flat.view(out.shape))

    def _chain(
        self,
        name: str,
        recipes: Sequence[Recipe],
        order: Sequence[int],
        leaves: Mapping[int, Tensor],
        start: int,
        stop: int,
        outs: Mapping[int, Tensor],
    ) -> dict[int, Tensor]:
        """A piece of the nodes in `order`: of those in `outs` put there, of the others kept while they are needed."""
        last: dict[int, int] = {}
        for node in order:
            for parent in recipes[node - self._first].parents:
                last[parent] = node
        made: dict[int, Tensor] = {}
        for node in order:
            recipe = recipes[node - self._first]
            inputs = {p: made[p] if p in made else leaves[p][start:stop] for p in recipe.parents}
            made[node] = recipe.apply(
                inputs,
                name=name,
                tensor_id=self._members.ids[name],
                offset=start,
                seed=self._seed,
                out=outs.get(node),
                backend=self._backend,
            )
            for parent in recipe.parents:
                if last[parent] == node and parent in made and parent not in outs:
                    del made[parent]
        return made

    def _advance(self) -> None:
        """Bring the values that are held of members to the nodes that they are at."""
        stale = [member for member, node in enumerate(self.slots) if self._at[member] != node]
        if not stale:
            return
        leaves = dict(zip(self._at, self._held, strict=True))
        targets = [self.slots[member] for member in stale]
        order = needed(self.recipes, self._first, targets, frozenset(leaves))
        for member in stale:
            if not self._own[member]:
                self._held[member] = self._held[member] | {
                    name: torch.empty_like(self._held[member][name]) for name in self._members.evolved
                }
                self._own[member] = True
        self.whole = False
        self._fill(order, stale, leaves)
        for member in stale:
            self._at[member] = self.slots[member]
        self.whole = True

    def _fill(self, order: Sequence[int], stale: Sequence[int], leaves: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Compute the nodes of stale members into the memory that holds the old ones, some of which are leaves."""
        targets = [self.slots[member] for member in stale]
        if len(order) == 1:
            # The usual case, one accepted trial: mixed in its place, since an element needs no other place of x.
            self._whole(self.recipes[order[0] - self._first], leaves, self._evolved(stale[0]))
            return
        for name in self._members.evolved:
            values = {node: tensors[name].view(-1) for node, tensors in leaves.items()}
            new = [self._held[member][name].view(-1) for member in stale]
            for start in range(0, new[0].numel(), PIECE):
                stop = min(start + PIECE, new[0].numel())
                room = {node: torch.empty_like(new[0][start:stop]) for node in targets}
                made = self._chain(name, self.recipes, order, values, start, stop, room)
                # Only now: what is overwritten is an input of the chain.
                for node, tensor in zip(targets, new, strict=True):
                    tensor[start:stop] = made[node]

    def _evolved(self, member: int) -> dict[str, Tensor]:
        return {name: self._held[member][name] for name in self._members.evolved}


def _direct(out: Tensor, like: Tensor) -> bool:
    """Whether values of a member's tensor can be computed into this one."""
    return out.is_contiguous() and out.dtype == like.dtype and out.device == like.device


def fits_in_memory(members: Members, available: Callable[[torch.device], int | None]) -> bool:
    """Whether members should be kept: they need no more memory than there is, or half of what is free where they are.

    available: the bytes that are free in a device's memory, None where that is not known.
    """
    if members.owned:
        return True
    free = available(members.tensors[0][members.evolved[0]].device)
    return free is not None and len(members.tensors) * members.nbytes <= free // 2


def free_memory(device: torch.device) -> int | None:
    """Bytes of the device's memory that are free, or None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        # What files are cached in is as good as free.
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, IndexError, OSError, ValueError):
        return None
