"""What is known about the tensor at hand, or about the whole model, and what is still to be gathered."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastmerge.engine.jobs import Job
from fastmerge.engine.shared import Shared
from fastmerge.methods.base import Chunk, Statistic


@dataclass
class Gathering:
    """Statistics in order, each after those before it. job: the tensor; None for the whole model."""

    job: Job | None
    statistics: list[Statistic]
    known: dict[str, Any] = field(default_factory=dict)
    state: Any = None
    finished: int = 0
    sample: Chunk | None = None

    @property
    def wanted(self) -> Statistic | None:
        """The statistic that this sweep gathers; None when it merges."""
        while self.finished < len(self.statistics):
            statistic = self.statistics[self.finished]
            if statistic.name not in self.known and statistic.needed(self.known):
                return statistic
            self.finished += 1
        return None

    def observe(self, statistic: Statistic, chunk: Chunk, first: bool) -> None:
        """Let it see one chunk; before the first one, the sample."""
        if first:
            if statistic.samples and self.sample is not None:
                statistic.prepare(self.sample, self.known)
            self.state = statistic.observe(chunk, self.known)
        else:
            self.state = statistic.extend(self.state, chunk, self.known)

    def observe_whole(self, chunk: Chunk, shared: Shared | None = None) -> None:
        """Gather everything from the one chunk that is the whole tensor. shared: what other merges know of it."""
        while (statistic := self.wanted) is not None:
            if shared is None or self.job is None:
                self.state = statistic.observe(chunk, self.known)
            else:
                self.state = shared.state(self.job, statistic, chunk, self.known)
            self.finish(statistic)

    def finish(self, statistic: Statistic) -> None:
        """Its state is complete."""
        result = statistic.finish(self.state, self.known)
        if result is not None:
            self.known[statistic.name] = result
        self.state = None
        self.finished += 1
