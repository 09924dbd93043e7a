"""What merges in memory and from files are told alike, checked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fastmerge.engine.plan import NUMERICS
from fastmerge.errors import ArgumentError, ArgumentTypeError

ON_NONFINITE = ("error", "warn", "zero")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PLENTY = 1 << 62
"""The budget where nothing is read: the inputs are in memory already."""


def check_common(numerics: str, seed: int, on_nonfinite: str) -> None:
    """ArgumentError, ArgumentTypeError: what every merge refuses."""
    if numerics not in NUMERICS:
        raise ArgumentError(f"numerics must be one of {', '.join(NUMERICS)}, not {numerics!r}.")
    if on_nonfinite not in ON_NONFINITE:
        raise ArgumentError(f"on_nonfinite must be one of {', '.join(ON_NONFINITE)}, not {on_nonfinite!r}.")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ArgumentTypeError(f"seed must be an int, not {seed!r}.")


def dtype_of(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype that results are to have, from its name, too; None: that of the inputs. ArgumentError: no such one."""
    if dtype is None:
        return None
    found = _DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ArgumentError(f"dtype must be one of {', '.join(_DTYPES)}, not {dtype!r}.")
    return found


@contextmanager
def using_threads(kernels: Any, threads: int | None) -> Iterator[None]:
    """Let the kernels use so many threads, and as many as before afterwards."""
    if threads is None:
        yield
        return
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise ArgumentError(f"threads must be a whole number from 1 on, not {threads!r}.")
    count = getattr(kernels, "threads", torch.get_num_threads)
    set_count = getattr(kernels, "set_threads", torch.set_num_threads)
    before = count()
    set_count(threads)
    try:
        yield
    finally:
        set_count(before)
