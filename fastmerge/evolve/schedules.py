"""How coefficients change from generation to generation: Evolver's chance, CADE's cosine, SaDE's adaptation."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field


def random_reference_chance(step: int, steps: int) -> float:
    """How probably Evolver mixes in a random member, and not the best one: 0.5 / (G - g) + 0.5.

    step: g, from 0 to steps - 1. steps: G, the number of generations. Source: Evolver, arXiv 2406.12208.
    """
    return 0.5 / (steps - step) + 0.5


def cosine(step: int, period: int, start: float, least: float, *, restarts: bool = False) -> float:
    """CADE's annealed coefficient: least + (start - least) (1 + cos(pi t / T)) / 2.

    step: t, from 0. period: T; after it the coefficient stays at `least`, or with `restarts` begins anew.
    """
    at = step % period if restarts else min(step, period)
    return least + (start - least) * (1.0 + math.cos(math.pi * at / period)) / 2.0


@dataclass
class _Tally:
    """What became of one generation's trials, by variant."""

    successes: list[int]
    failures: list[int]
    crossovers: list[list[float]]


@dataclass
class Adaptation:
    """SaDE: how probable each variant is, and around which crossover rate it draws, learned from what succeeded.

    After `window` generations, at the start of each generation,

        S_k  = ns_k / (ns_k + nf_k) + 0.01        p_k = S_k / sum S
        CRm_k = median of the crossover rates with which variant k succeeded, where it did

    ns and nf count successes and failures over the last `window` generations; a variant without trials has S = 0.01.
    Until then p and CRm are what they were at the start. Source: Qin, Huang, Suganthan, 2009, equations 3 and 14.
    """

    probabilities: list[float]
    crossover_means: list[float]
    window: int
    _tallies: deque[_Tally] = field(default_factory=deque)
    _generation: int | None = None

    def enter(self, generation: int) -> None:
        """Begin a generation: adapt to those before it. Nothing where it has begun already."""
        if generation == self._generation:
            return
        self._generation = generation
        if len(self._tallies) >= self.window:
            self._adapt()
        count = len(self.probabilities)
        self._tallies.append(_Tally([0] * count, [0] * count, [[] for _ in range(count)]))
        while len(self._tallies) > self.window:
            self._tallies.popleft()

    def learn(self, variant: int, crossover: float | None, success: bool) -> None:
        """What became of a trial of the generation at hand. crossover: None where nothing is crossed over."""
        tally = self._tallies[-1]
        if success:
            tally.successes[variant] += 1
            if crossover is not None:
                tally.crossovers[variant].append(crossover)
        else:
            tally.failures[variant] += 1

    def _adapt(self) -> None:
        shares = [
            success_share(
                sum(tally.successes[k] for tally in self._tallies), sum(tally.failures[k] for tally in self._tallies)
            )
            for k in range(len(self.probabilities))
        ]
        self.probabilities = normalised(shares)
        for k in range(len(shares)):
            succeeded = [rate for tally in self._tallies for rate in tally.crossovers[k]]
            if succeeded:
                self.crossover_means[k] = statistics.median(succeeded)


def success_share(successes: int, failures: int) -> float:
    """S of a variant: the share of its trials that succeeded, and 0.01 so that none dies out."""
    return (successes / (successes + failures) if successes + failures else 0.0) + 0.01


def normalised(shares: Sequence[float]) -> list[float]:
    """The shares, scaled to add up to 1."""
    total = sum(shares)
    return [share / total for share in shares]
