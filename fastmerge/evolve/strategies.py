"""What a strategy proposes: whom to mix with whom, how much, and in how many places. None of them sees a tensor."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, Protocol

from fastmerge.errors import ArgumentError, ArgumentTypeError
from fastmerge.evolve.draws import Draws, rounded
from fastmerge.evolve.schedules import Adaptation, cosine, normalised, random_reference_chance

Coefficient = float | tuple[float, float] | None
"""F or CR as it may be given: one number, a range (what it means is the strategy's), or None for the default."""


@dataclass(frozen=True)
class Trial:
    """A proposal. Members are given by their numbers.

    kind: "blend": (1 - F) x + F others[0]. "de": others[0] + F (others[1] - others[2]), and for each further pair
    + F (p - q). x: the member that the trial may replace. factors: F, and one for each further pair. crossover: CR, the
    share of elements that change. forced: whether one element, drawn at random, changes in any case. variant: what the
    history calls it.
    """

    kind: str
    x: int
    others: tuple[int, ...]
    factors: tuple[float, ...]
    crossover: float
    forced: bool
    variant: str


class Strategy(Protocol):
    """A way to search. `name` and the fields of a dataclass: what the history says of it."""

    name: ClassVar[str]
    equal_replaces: ClassVar[bool]
    """Whether a trial that is as good as the member takes its place, too."""

    def least_members(self) -> tuple[int, str]:
        """How many members it needs, and for what."""

    def trial(
        self, member: int, members: int, step: int, steps: int, scores: Sequence[float] | None, draws: Draws
    ) -> Trial:
        """What to try in place of a member of so many. step: the generation, from 0, of `steps`.

        scores: of all members, -inf where one has none; None where only what they merge to is scored.
        """

    def learn(self, step: int, trial: Trial, success: bool) -> None:
        """What became of the trial."""


def _others(member: int, count: int) -> list[int]:
    return [other for other in range(count) if other != member]


def _best(scores: Sequence[float], among: Sequence[int]) -> int:
    """The best of these members, the first of several."""
    return max(among, key=lambda member: (scores[member], -member))


# -- Evolver


@dataclass
class Evolver:
    """Evolver: a member is mixed with another one, in some of its elements (arXiv 2406.12208).

        trial = where(rand < CR, (1 - F) x + F ref, x)

    ref is a random other member with the chance 0.5 / (G - g) + 0.5, else the best other one. With a merger members
    have no scores of their own; ref is always a random one then, as in the authors' code.

    F, CR: numbers from 0 to 1.
    """

    F: Coefficient = None
    CR: Coefficient = None
    name: ClassVar[str] = "evolver"
    equal_replaces: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.F = _number("F", self.F, 0.5, 1.0, "evolver")
        self.CR = _number("CR", self.CR, 0.5, 1.0, "evolver")

    def least_members(self) -> tuple[int, str]:
        """Two: one, and one to mix it with."""
        return 2, "evolver mixes a member with another one"

    def trial(
        self, member: int, members: int, step: int, steps: int, scores: Sequence[float] | None, draws: Draws
    ) -> Trial:
        """Mix with a random other member, or with the best one."""
        others = _others(member, members)
        chance = random_reference_chance(step, steps)
        if scores is None or draws.uniform() < chance:
            reference, variant = others[draws.below(len(others))], "random"
        else:
            reference, variant = _best(scores, others), "best"
        assert isinstance(self.F, float) and isinstance(self.CR, float)
        return Trial("blend", member, (reference,), (self.F,), self.CR, False, variant)

    def learn(self, step: int, trial: Trial, success: bool) -> None:
        """Nothing is learned."""


# -- differential evolution


VARIANTS = {"rand/1": 4, "current-to-best/1": 3, "rand/2": 6, "current-to-rand/1": 4}
"""The variants of differential evolution, and how many members each needs."""

_START = {"rand/1": 0.7, "current-to-best/1": 0.1, "rand/2": 0.1, "current-to-rand/1": 0.1}
_F_MEAN, _F_DEVIATION, _CR_MEAN, _CR_DEVIATION, _HIGHEST = 0.1, 0.04, 0.1, 0.1, 0.2


@dataclass
class De:
    """Differential evolution on weights, with SaDE's adaptation (evolution from the ending epochs of training).

        rand/1              a + F (b - c)
        current-to-best/1   x + F (best - x) + F (a - b)
        rand/2              a + F (b - c) + F (d - e)
        current-to-rand/1   x + K (a - x) + F (b - c), without crossover, K from U(0, 1)

    a to e are random members, all different and none of them x. One element, drawn at random, changes in any case.

    F: None draws each from N(0.1, 0.04**2) within [0, 0.2]; a number from 0 to 2; a range to draw from evenly.
    CR: None draws each from N(CRm, 0.1**2) within [0, 0.2], where CRm is learned, from 0.1; a number from 0 to 1; a
    range to draw from evenly.
    variants: one or several; with several, how probable each is, is learned. probabilities: theirs at the start; None
    gives 0.7, 0.1, 0.1, 0.1 in the order above, scaled to those that are there. window: the generations learned from.
    """

    F: Coefficient = None
    CR: Coefficient = None
    variants: Sequence[str] | str = tuple(VARIANTS)
    probabilities: Sequence[float] | None = None
    window: int = 5
    name: ClassVar[str] = "de"
    equal_replaces: ClassVar[bool] = True
    _adaptation: Adaptation = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.F = _number_or_range("F", self.F, 2.0, "de")
        self.CR = _number_or_range("CR", self.CR, 1.0, "de")
        self.variants = (self.variants,) if isinstance(self.variants, str) else tuple(self.variants)
        for variant in self.variants:
            if variant not in VARIANTS:
                raise ArgumentError(f"de has no variant {variant!r}; there are {', '.join(VARIANTS)}.")
        if not self.variants or len(set(self.variants)) != len(self.variants):
            raise ArgumentError("variants must name at least one variant of de, and each once.")
        shares = [_START[variant] for variant in self.variants] if self.probabilities is None else self.probabilities
        if len(shares) != len(self.variants):
            raise ArgumentError(f"probabilities has {len(shares)} values for {len(self.variants)} variants.")
        for share in shares:
            _check_number("probabilities", share, 1.0, "de")
        if sum(shares) <= 0:
            raise ArgumentError("probabilities are all 0; give at least one variant a chance.")
        self.window = _whole("window", self.window)
        self.probabilities = tuple(normalised(shares))
        self._adaptation = Adaptation(list(self.probabilities), [_CR_MEAN] * len(self.variants), self.window)

    def least_members(self) -> tuple[int, str]:
        """As many as its most demanding variant."""
        variant = max(self.variants, key=lambda each: VARIANTS[each])
        hint = " (name fewer variants, such as variants='rand/1')" if VARIANTS[variant] > 4 else ""
        return VARIANTS[variant], f"the variant {variant} of de takes so many different ones{hint}"

    def trial(
        self, member: int, members: int, step: int, steps: int, scores: Sequence[float] | None, draws: Draws
    ) -> Trial:
        """Draw a variant, F and CR, and the members."""
        assert scores is not None
        self._adaptation.enter(step)
        number = draws.pick(self._adaptation.probabilities) if len(self.variants) > 1 else 0
        variant = self.variants[number]
        scale = _drawn(self.F, draws, _F_MEAN, _F_DEVIATION)
        crossover = _drawn(self.CR, draws, self._adaptation.crossover_means[number], _CR_DEVIATION)
        taken = {"rand/1": 3, "current-to-best/1": 2, "rand/2": 5, "current-to-rand/1": 3}[variant]
        drawn = draws.distinct(taken, _others(member, members))
        if variant == "rand/1":
            return Trial("de", member, tuple(drawn), (scale,), crossover, True, variant)
        if variant == "rand/2":
            return Trial("de", member, tuple(drawn), (scale, scale), crossover, True, variant)
        if variant == "current-to-best/1":
            best = _best(scores, range(members))
            return Trial("de", member, (member, best, member, *drawn), (scale, scale), crossover, True, variant)
        pull = rounded(draws.uniform())
        return Trial("de", member, (member, drawn[0], member, *drawn[1:]), (pull, scale), 1.0, False, variant)

    def learn(self, step: int, trial: Trial, success: bool) -> None:
        """Count the variant's successes, and note the crossover rates that led to them."""
        # One without crossover has no rate that anything could be learned of.
        rate = trial.crossover if trial.forced else None
        self._adaptation.learn(list(self.variants).index(trial.variant), rate, success)


# -- CADE


@dataclass
class Cade:
    """CADE: rand/1 with F and CR that follow half a cosine from a start to a least value.

        trial = where(rand < CR_t, c + F_t (a - b), x)      F_t = least + (start - least) (1 + cos(pi t / T)) / 2

    a, b, c are random members, all different and none of them x. One element, drawn at random, changes in any case.

    F, CR: (start, least), or a number for a constant one. period: T, in generations; afterwards they stay at their
    least, or with `restarts` begin anew. jitter: to each F and CR a number drawn evenly between start and least is
    added, as the authors' code does; CR is cut off at 1.
    """

    F: Coefficient = None
    CR: Coefficient = None
    period: int = 40
    restarts: bool = False
    jitter: bool = False
    name: ClassVar[str] = "cade"
    equal_replaces: ClassVar[bool] = True

    def __post_init__(self) -> None:
        # Half of what may be: with jitter the two are added.
        highest = 1.0 if self.jitter else 2.0
        self.F = _number_or_range("F", (0.5, 0.1) if self.F is None else self.F, highest, "cade", falling=True)
        self.CR = _number_or_range("CR", (0.5, 0.1) if self.CR is None else self.CR, 1.0, "cade", falling=True)
        self.period = _whole("period", self.period)

    def least_members(self) -> tuple[int, str]:
        """Four: one, and three others."""
        return 4, "cade takes a member and three different others"

    def coefficients(self, step: int) -> tuple[float, float]:
        """F and CR of a generation, from 0, without jitter."""
        found = []
        for value in (self.F, self.CR):
            start, least = value if isinstance(value, tuple) else (value, value)
            assert start is not None and least is not None
            found.append(rounded(cosine(step, self.period, start, least, restarts=self.restarts)))
        return found[0], found[1]

    def trial(
        self, member: int, members: int, step: int, steps: int, scores: Sequence[float] | None, draws: Draws
    ) -> Trial:
        """Draw three others; F and CR are the generation's."""
        scale, crossover = self.coefficients(step)
        if self.jitter:
            scale = rounded(scale + _between(self.F, draws))
            crossover = rounded(min(1.0, crossover + _between(self.CR, draws)))
        a, b, c = draws.distinct(3, _others(member, members))
        return Trial("de", member, (c, a, b), (scale,), crossover, True, "cade")

    def learn(self, step: int, trial: Trial, success: bool) -> None:
        """Nothing is learned."""


STRATEGIES: dict[str, type[Evolver] | type[De] | type[Cade]] = {each.name: each for each in (Evolver, De, Cade)}


def make(strategy: str | Strategy, F: Coefficient, CR: Coefficient, options: dict[str, Any]) -> Strategy:  # noqa: N803
    """A strategy from its name and settings, or as it was given. ArgumentError: no such one, or no such setting."""
    if not isinstance(strategy, str):
        if not all(callable(getattr(strategy, each, None)) for each in ("trial", "learn", "least_members")):
            raise ArgumentTypeError(
                f"strategy must be {', '.join(STRATEGIES)}, or an object such as fastmerge.evolve.De(), not a "
                f"{type(strategy).__name__}."
            )
        if F is not None or CR is not None or options:
            raise ArgumentError(
                "F, CR and other settings belong to the strategy that was given; pass them to it where it is made."
            )
        # What it has learned in another run must not show in this one.
        return strategy if not isinstance(strategy, De) else De(**settings(strategy))
    if strategy not in STRATEGIES:
        near = difflib.get_close_matches(strategy, STRATEGIES, n=1)
        raise ArgumentError(
            f"There is no strategy {strategy!r}; {f'did you mean {near[0]}?' if near else ''} "
            f"There are {', '.join(STRATEGIES)}."
        )
    chosen = STRATEGIES[strategy]
    known = [about.name for about in fields(chosen) if about.init]
    for name in options:
        if name not in known:
            raise ArgumentError(f"{strategy} has no setting {name!r}; it has {', '.join(known)}.")
    return chosen(F=F, CR=CR, **options)


def settings(strategy: Any) -> dict[str, Any]:
    """What was set, by name: the fields of a dataclass, and what `settings` of any other object holds."""
    if not is_dataclass(strategy):
        return dict(getattr(strategy, "settings", {}))
    return {about.name: getattr(strategy, about.name) for about in fields(strategy) if about.init}


def _between(value: Coefficient, draws: Draws) -> float:
    start, least = value if isinstance(value, tuple) else (value, value)
    assert start is not None and least is not None
    return draws.uniform(min(start, least), max(start, least))


def _drawn(value: Coefficient, draws: Draws, mean: float, deviation: float) -> float:
    """A coefficient of one trial of `de`."""
    if value is None:
        return rounded(draws.normal_within(mean, deviation, 0.0, _HIGHEST))
    return rounded(draws.uniform(*value)) if isinstance(value, tuple) else value


def _number(name: str, value: Coefficient, default: float, highest: float, strategy: str) -> float:
    if value is None:
        return default
    if isinstance(value, tuple | list):
        raise ArgumentTypeError(f"{name} of {strategy} is one number, not a range; give one from 0 to {highest:g}.")
    return _check_number(name, value, highest, strategy)


def _number_or_range(
    name: str, value: Any, highest: float, strategy: str, *, falling: bool = False
) -> float | tuple[float, float] | None:
    if value is None or not isinstance(value, tuple | list):
        return None if value is None else _check_number(name, value, highest, strategy)
    if len(value) != 2:
        raise ArgumentError(f"{name} of {strategy} is a number or two of them, not {len(value)}.")
    first, second = (_check_number(name, one, highest, strategy) for one in value)
    if (first < second) if falling else (first > second):
        order = "the start and then the least" if falling else "the lower and then the higher end"
        raise ArgumentError(f"{name}={list(value)} of {strategy} is the wrong way round; give {order}.")
    return first, second


def _check_number(name: str, value: Any, highest: float, strategy: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ArgumentTypeError(f"{name} of {strategy} must be a number, not {value!r}.")
    if not (math.isfinite(value) and 0.0 <= value <= highest):
        raise ArgumentError(f"{name}={value} of {strategy} is out of range; give a number from 0 to {highest:g}.")
    return float(value)


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ArgumentError(f"{name} must be a whole number from 1 on, not {value!r}.")
    return value
