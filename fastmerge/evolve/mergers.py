"""Mergers: with one, what is scored is not a member but what all members merge to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from fastmerge.errors import ArgumentError, ArgumentTypeError
from fastmerge.merging import merge

Merger = Callable[[Sequence[Mapping[str, Tensor]]], Mapping[str, Tensor]]


def make(
    given: str | Mapping[str, Any] | Merger, base: Mapping[str, Tensor] | None, seed: int, backend: str
) -> tuple[Merger, Any]:
    """A merger, and what the history says of it.

    given: the name of a merge method; a mapping of `method` and its parameters, as `fastmerge.merge` takes them; or a
    function of the members' state dicts.
    """
    if isinstance(given, str):
        given = {"method": given, **({"weight": 1.0} if given == "linear" else {})}
    if isinstance(given, Mapping):
        if not isinstance(given.get("method"), str):
            raise ArgumentError("merger needs the name of a merge method, as in {'method': 'ties', 'density': 0.5}.")
        named = {str(key): value for key, value in given.items()}
        if "lambda" in named:
            named["lambda_"] = named.pop("lambda")

        def merged(models: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
            return merge(models, base=base, seed=seed, backend=backend, **named)

        return merged, dict(given)
    if not callable(given):
        raise ArgumentTypeError(f"merger must be a method's name, a mapping or a function, not {type(given).__name__}.")
    return given, getattr(given, "__qualname__", type(given).__name__)
