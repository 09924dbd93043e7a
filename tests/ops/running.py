"""Which backends are held to the reference here, and proof of which one ran."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from fastmerge import backends
from fastmerge.backends.lists import Lists

BLOCK_VARIABLE = "FASTMERGE_TRITON_BLOCK"

FAST = [name for name, missing in backends.available().items() if missing is None and name != "reference"]

each_backend = pytest.mark.parametrize("backend", FAST)


@contextmanager
def only(backend: str, function: str) -> Iterator[None]:
    """Fails unless `function` of this backend runs, and fails if that of any other does."""
    ran = []

    def watched(name: str, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            ran.append(name)
            return original(*args, **kwargs)

        return call

    with (
        patch.object(module := backends.resolve(backend), function, watched(backend, getattr(module, function))),
        patch.object(
            oracle := backends.resolve("reference"), function, watched("reference", getattr(oracle, function))
        ),
    ):
        yield
    assert set(ran) == {backend}, f"{function} ran on {sorted(set(ran))}, not on {backend} alone"


def bounds_of_many(
    module: Any,
    base: list[Tensor] | None,
    tensors: list[list[Tensor]],
    first: list[list[int]],
    last: list[list[int]],
    compute: torch.dtype = torch.float32,
    kept: bool = False,
) -> tuple[Tensor, Tensor]:
    """`magnitude_bounds_many` of a backend's module, for ranks [T][n]; twice where tables are kept."""
    lists = Lists(base, tensors, kept=kept)
    ranks = torch.tensor([list(zip(*both)) for both in zip(first, last)])
    inside = ((ranks > 0) & (ranks < lists.lengths[:, None, None])).any(dim=0).flatten().tolist()
    ranks = ranks.to(lists.device) if kept else ranks
    for _ in range(kept):
        module.magnitude_bounds_many(lists, ranks // 2, inside, compute, subtract=base is not None)
    bounds, ties_before = module.magnitude_bounds_many(lists, ranks, inside, compute, subtract=base is not None)
    return bounds, ties_before


@st.composite
def configurations(draw: st.DrawFn, backend: str) -> None:
    """Put a backend into one of the states that may not show in its results: instruction sets, threads, tile sizes."""
    module = backends.resolve(backend)
    if backend == "triton":
        os.environ[BLOCK_VARIABLE] = str(draw(st.sampled_from((128, 512, 2048))))
    if hasattr(module, "set_isa"):
        module.set_isa(draw(st.sampled_from(module.isas())))
    if hasattr(module, "set_threads"):
        module.set_threads(draw(st.sampled_from((1, 2, 3))))


@contextmanager
def restored(backend: str) -> Iterator[None]:
    """Give a backend its configuration back."""
    module = backends.resolve(backend)
    isa = module.isa() if hasattr(module, "isa") else None
    yield
    os.environ.pop(BLOCK_VARIABLE, None)
    if isa is not None:
        module.set_isa(isa)
        module.set_threads(None)
