"""Which backend is faster for what, on which GPU, as measured: "auto" on a GPU goes by it, function by function.

Written by `python bench/report.py --write` from the figures under bench/results. What is not here goes to the first
backend that works.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from .limits import TooManyModelsError

FASTER: dict[str, dict[str, str]] = {}
"""Compute capability ("9.0") -> function of a backend -> the backend that is faster for it."""


class Preferring:
    """A backend whose functions come from several: each from the one that is faster for it, if that works here.

    A call of more models than that one takes goes to the next one: next_after tells which, by name, or None.
    """

    def __init__(
        self,
        first: ModuleType,
        others: dict[str, ModuleType],
        faster: dict[str, str],
        next_after: Callable[[str], ModuleType | None],
    ) -> None:
        self.__name__ = first.__name__
        self._first = first
        self._others = {function: others[name] for function, name in faster.items() if name in others}
        self._next_after = next_after

    def __getattr__(self, function: str) -> Any:
        module = self._others.get(function, self._first)
        found = getattr(module, function)
        if not callable(found):
            return found

        def call(*arguments: Any, **options: Any) -> Any:
            try:
                return found(*arguments, **options)
            except TooManyModelsError:
                other = self._next_after(module.__name__.rpartition(".")[2])
                if not hasattr(other, function):
                    raise
            return getattr(other, function)(*arguments, **options)

        return call
