"""What is told of a search while it runs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GenerationReport:
    """How a generation went. Generation 0 scores the input models.

    best: the best development score so far. mean: the mean of the members' scores, of those that have one. accepted,
    failed: trials that took a member's place, and evaluations that failed, in this generation. evaluations: all so far.
    resumed: whether all of it was in the history already. A score is None where no evaluation has succeeded.
    """

    generation: int
    generations: int
    best: float | None
    mean: float | None
    accepted: int
    failed: int
    evaluations: int
    resumed: bool

    def line(self) -> str:
        """One line for a person."""
        best = "no score yet" if self.best is None else f"best {self.best:.6g}"
        mean = "" if self.mean is None else f", mean {self.mean:.6g}"
        what = f", {self.accepted} accepted" if self.generation else ""
        failed = f", {self.failed} failed" if self.failed else ""
        again = " (from the history)" if self.resumed else ""
        return f"generation {self.generation} of {self.generations}: {best}{mean}{what}{failed}{again}"
