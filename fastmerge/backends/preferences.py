"""Which backend is faster for what, on which GPU, as measured: "auto" on a GPU goes by it, function by function.

Written by `python bench/report.py --write` from the figures under bench/results. What is not here goes to the first
backend that works.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

FASTER: dict[str, dict[str, str]] = {}
"""Compute capability ("9.0") -> function of a backend -> the backend that is faster for it."""


class Preferring:
    """A backend whose functions come from several: each from the one that is faster for it, if that works here."""

    def __init__(self, first: ModuleType, others: dict[str, ModuleType], faster: dict[str, str]) -> None:
        self.__name__ = first.__name__
        self._first = first
        self._others = {function: others[name] for function, name in faster.items() if name in others}

    def __getattr__(self, function: str) -> Any:
        return getattr(self._others.get(function, self._first), function)
