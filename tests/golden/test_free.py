"""Light experts against the outputs of FREE-Merging's released code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastmerge import backends, ops
from fastmerge.experts import extract_expert

HERE = Path(__file__).parent
SHARED = HERE.parents[2] / "shared" / "golden"
NUMBER = 3
"""How many cases there are; the repository has the smallest."""

each_case = pytest.mark.parametrize("number", range(NUMBER))
each_backend = pytest.mark.parametrize("backend", [name for name, why in backends.available().items() if why is None])


def case(number: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The parameters and the tensors of a case."""
    name = f"free_{number}.safetensors"
    folder = HERE if (HERE / name).exists() else SHARED
    if not (folder / name).exists():
        pytest.skip(f"{name} is not among those in the repository (one, always run), and there is no {SHARED}")
    index = json.loads((folder / "index.json").read_text())
    return next(entry for entry in index["free"] if entry["file"] == name), load_file(folder / name)


def of_task(golden: dict[str, Tensor], what: str, task: int) -> dict[str, Tensor]:
    return {name.partition(".")[2]: x for name, x in golden.items() if name.startswith(f"{what}{task}.")}


@each_case
@each_backend
def test_experts(number: int, backend: str) -> None:
    parameters, golden = case(number)
    for task in range(parameters["tasks"]):
        expected = of_task(golden, "expert", task)
        for name, delta in of_task(golden, "task", task).items():
            expert = ops.extract_expert(delta, parameters["keep_ratio"], backend=backend)
            assert torch.equal(expert.dense(), expected[name])


@each_case
def test_rescale(number: int) -> None:
    """Of whole models, over all of their tensors; the base is 0, so that models are their deltas."""
    parameters, golden = case(number)
    for task in range(parameters["tasks"]):
        deltas = of_task(golden, "task", task)
        base = {name: torch.zeros_like(delta) for name, delta in deltas.items()}
        expert = extract_expert(base, deltas, keep=parameters["keep_ratio"])
        assert expert.about.mu == pytest.approx(float(golden["rescale"][task]), rel=1e-6)
