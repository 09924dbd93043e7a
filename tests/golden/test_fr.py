"""FR-Merging's filter against the outputs of its released code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastmerge import backends, ops
from fastmerge.backends import filters
from fastmerge.backends.highpass import filtered

HERE = Path(__file__).parent
SHARED = HERE.parents[2] / "shared" / "golden"
NUMBER = 10
"""How many cases there are; all but two are too large for the repository."""

each_case = pytest.mark.parametrize("number", range(NUMBER))
each_backend = pytest.mark.parametrize("backend", [name for name, why in backends.available().items() if why is None])


def case(number: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The parameters and the tensors of a case."""
    name = f"fr_{number}.safetensors"
    folder = HERE if (HERE / name).exists() else SHARED
    if not (folder / name).exists():
        pytest.skip(f"{name} is not among those in the repository (two, always run), and there is no {SHARED}")
    index = json.loads((folder / "index.json").read_text())
    return next(entry for entry in index["fr"] if entry["file"] == name), load_file(folder / name)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert ((actual - expected).abs() <= 1e-5 * expected.abs().max()).all()


@each_case
@each_backend
def test_what_is_kept(number: int, backend: str) -> None:
    parameters, golden = case(number)
    actual = ops.highpass(golden["delta"], parameters["filter_ratio"], mode="official", backend=backend)
    assert_close(actual, golden["kept"])


@each_case
def test_by_every_route(number: int) -> None:
    parameters, golden = case(number)
    delta = golden["delta"]
    plans = filters.candidates(*delta.shape, parameters["filter_ratio"], "official")
    assert {plan.route for plan in plans} >= {"rfft"}
    for plan in plans:
        out = torch.empty_like(delta)
        filtered(delta, out, plan)
        assert_close(out, golden["kept"])
