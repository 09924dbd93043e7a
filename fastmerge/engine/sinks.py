"""Where merged tensors go, as the executor sees it, and the one for merges in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from fastmerge.engine.plan import Plan


class Sink(Protocol):
    """Where merged tensors go."""

    def target(self, name: str, start: int, stop: int) -> torch.Tensor | None:
        """Memory of its own for elements [start, stop) to be merged into, or None if `write` shall bring them."""

    def write(self, name: str, start_byte: int, data: memoryview) -> None:
        """Take bytes of a tensor; those of one tensor come in rising order. Called from one thread."""


class DictSink:
    """Merged tensors in memory of their own, so that none is an alias of an input.

    again: tensors of an earlier merge that nobody needs any more; they are merged over where shape and dtype fit.
    """

    def __init__(
        self,
        plan: Plan,
        place: torch.device = torch.device("cpu"),
        again: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        for job in plan.jobs:
            old = None if again is None else again.get(job.name)
            fits = old is not None and (tuple(old.shape), old.dtype, old.device) == (job.shape, job.out, place)
            self.tensors[job.name] = (
                old if fits and old is not None else torch.empty(job.shape, dtype=job.out, device=place)
            )

    def target(self, name: str, start: int, stop: int) -> torch.Tensor:
        """The place of these elements in the result."""
        return self.tensors[name].view(-1)[start:stop]

    def write(self, name: str, start_byte: int, data: memoryview) -> None:
        """Never called: everything is merged in place."""
        raise AssertionError("tensors in memory are merged in place")
