"""Scores: the development score that guides a search, and the final one that is taken once, of what was chosen.

They are two types, so that neither is taken for the other: what is measured on the test split must not choose.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

from fastmerge.errors import ArgumentError, ArgumentTypeError, EvaluationError

_log = logging.getLogger("fastmerge")

FAILURES_IN_A_ROW = 3
"""So many failed evaluations one after the other end a search: by then it is the evaluator that is wrong."""

Score = Callable[[Any], float]


class DevelopmentScore:
    """What a search maximises. function: a model (a module, or a dict of tensors) -> a finite number."""

    function: Score

    def __init__(self, function: Score | DevelopmentScore) -> None:
        if isinstance(function, FinalScore):
            raise ArgumentTypeError("score is a FinalScore: the final score guides no search; pass another function.")
        self.function = _callable("score", function.function if isinstance(function, DevelopmentScore) else function)
        self._in_a_row = 0

    def measure(self, model: Any) -> tuple[float | None, str]:
        """The score; or None, and why it failed. NaN, infinite numbers and exceptions are failures."""
        try:
            return _number(self.function(model)), ""
        except Exception as error:
            return None, " ".join(f"{type(error).__name__}: {error}".split())

    def count(self, reason: str, what: str) -> None:
        """Note how an evaluation went. EvaluationError at the third failure in a row.

        reason: why it failed, or nothing if it did not. what: which evaluation it was.
        """
        if not reason:
            self._in_a_row = 0
            return
        self._in_a_row += 1
        _log.warning("The evaluation of %s failed: %s", what, reason)
        if self._in_a_row >= FAILURES_IN_A_ROW:
            raise EvaluationError(
                f"{FAILURES_IN_A_ROW} evaluations in a row failed, the last one of {what}: {reason.rstrip('.')}. Mend "
                "the evaluator; a run with a state goes on from there."
            )


class FinalScore:
    """What is reported of the chosen model. function: as of DevelopmentScore. It is called once, after the search."""

    function: Score

    def __init__(self, function: Score) -> None:
        if isinstance(function, DevelopmentScore):
            raise ArgumentTypeError("final_score is a DevelopmentScore, which has seen every trial; pass another one.")
        self.function = _callable("final_score", function)
        self._called = False

    def check_unused(self) -> None:
        """ArgumentError: it has been taken already."""
        if self._called:
            raise ArgumentError("a FinalScore is taken once; make a new one for another search.")

    def measure_once(self, model: Any) -> tuple[float | None, str]:
        """The score; or None, and why it failed. ArgumentError the second time."""
        self.check_unused()
        self._called = True
        try:
            return _number(self.function(model)), ""
        except Exception as error:
            return None, " ".join(f"{type(error).__name__}: {error}".split())


def both(
    score: Score | DevelopmentScore, final: Score | FinalScore | None
) -> tuple[DevelopmentScore, FinalScore | None]:
    """The two scores of a search, told apart. ArgumentError where they are one."""
    development = DevelopmentScore(score)
    if final is None:
        return development, None
    last = final if isinstance(final, FinalScore) else FinalScore(final)
    last.check_unused()
    if last.function == development.function:
        raise ArgumentError(
            "score and final_score are the same function: what has chosen a model says nothing new of it. Pass one "
            "that looks at other examples, or none."
        )
    return development, last


def _callable(name: str, function: Any) -> Score:
    if not callable(function):
        raise ArgumentTypeError(f"{name} must be a function of a model, not {type(function).__name__}.")
    found: Score = function
    return found


def _number(value: Any) -> float:
    score = float(value)
    if not math.isfinite(score):
        raise ValueError(f"the score is {score}, not a finite number")
    return score
