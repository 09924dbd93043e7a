"""The random choices of a search: who is mixed with whom, and how much.

Each decision has a generator of its own, made from the seed, the generation and the member. So a decision depends on
nothing that was drawn before, and a run that is resumed decides as it would have. (Which elements are mixed is the
ops' matter: they draw with Philox.)
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence

_GRID = float(1 << 24)
_ORDER = -1
"""The member's number of decisions that concern a whole generation."""


def rounded(value: float) -> float:
    """A coefficient as a multiple of 2**-24: last bits that a machine's logarithm or cosine has apart do not show."""
    return round(value * _GRID) / _GRID


class Draws:
    """The random numbers of one decision. member: -1 for what concerns a whole generation."""

    def __init__(self, seed: int, generation: int, member: int = _ORDER) -> None:
        text = f"fastmerge.evolve {seed} {generation} {member}"
        # Of the generator only random() is used, the one whose numbers Python promises to keep.
        self._generator = random.Random(int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little"))

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """A number from [low, high)."""
        return low + (high - low) * self._generator.random()

    def below(self, count: int) -> int:
        """A whole number from 0 to count - 1."""
        return min(int(self._generator.random() * count), count - 1)

    def distinct(self, count: int, among: Sequence[int]) -> list[int]:
        """So many different ones of `among`, in random order."""
        left = list(among)
        return [left.pop(self.below(len(left))) for _ in range(count)]

    def normal(self, mean: float, deviation: float) -> float:
        """A number from N(mean, deviation**2), by Box and Muller's formula."""
        radius = math.sqrt(-2.0 * math.log(1.0 - self._generator.random()))
        return mean + deviation * radius * math.cos(2.0 * math.pi * self._generator.random())

    def normal_within(self, mean: float, deviation: float, low: float, high: float) -> float:
        """A number from the normal distribution that lies in [low, high]: drawn again until it does."""
        for _ in range(100):
            value = self.normal(mean, deviation)
            if low <= value <= high:
                return value
        return min(max(mean, low), high)

    def pick(self, probabilities: Sequence[float]) -> int:
        """An index, each as probable as its entry; the entries add up to 1."""
        at = self._generator.random()
        for index, probability in enumerate(probabilities):
            at -= probability
            if at < 0:
                return index
        return max(index for index, probability in enumerate(probabilities) if probability > 0)
