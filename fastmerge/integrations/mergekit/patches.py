"""Putting something of ours in the place of something of mergekit's, and putting the very object back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from fastmerge.errors import FastmergeError

_ABSENT: Any = object()
WITHOUT_EFFECT = frozenset({"int8_mask"})
"""Parameters of mergekit's that change no value: a method of ours need not know them."""


class MergekitError(FastmergeError, RuntimeError):
    """mergekit is missing, or it is not one that fastmerge knows, or it asked for what cannot be done inside it."""


@dataclass
class Patch:
    """One entry of a dict, or one name of a module. original: what was there; ours takes its place."""

    where: dict[str, Any] | ModuleType
    name: str
    ours: Any
    original: Any = field(default=_ABSENT, init=False)

    def _there(self) -> Any:
        if isinstance(self.where, dict):
            return self.where.get(self.name, _ABSENT)
        return getattr(self.where, self.name, _ABSENT)

    def put(self) -> None:
        """Take the place of what is there, and remember it."""
        self.original = self._there()
        if isinstance(self.where, dict):
            self.where[self.name] = self.ours
        else:
            setattr(self.where, self.name, self.ours)

    def take_back(self) -> None:
        """Put back what was there. What somebody else has put over ours since then stays."""
        if self._there() is not self.ours:
            return
        if isinstance(self.where, dict):
            if self.original is _ABSENT:
                del self.where[self.name]
            else:
                self.where[self.name] = self.original
        elif self.original is _ABSENT:
            delattr(self.where, self.name)
        else:
            setattr(self.where, self.name, self.original)


def refusal(method: str, tensor: str | None, reason: object) -> MergekitError:
    """What is said where a method that mergekit has not cannot merge a tensor."""
    why = str(reason).rstrip(".")
    return MergekitError(
        f"{method} cannot merge {tensor or 'this tensor'} inside mergekit: {why}. mergekit has no {method} of its own "
        "to do it instead; `fastmerge merge` may take the same YAML."
    )


def check_parameters(version: str, method: str, theirs: Iterable[str], ours: Iterable[str]) -> None:
    """MergekitError where mergekit's method has a parameter that ours lacks: then it is not the release it says."""
    strange = sorted(set(theirs) - set(ours) - WITHOUT_EFFECT)
    if strange:
        raise MergekitError(
            f"This mergekit says that it is {version}, but its {method} has a parameter that {version} has not: "
            f"{', '.join(strange)}; install the release with `pip install mergekit=={version}`."
        )
