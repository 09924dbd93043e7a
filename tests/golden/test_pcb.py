"""PCB-Merging against the outputs of its released code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastmerge import backends, ops
from tests.numeric import assert_bitwise_equal

HERE = Path(__file__).parent
SHARED = HERE.parents[2] / "shared" / "golden"
NUMBER = 6
"""How many cases there are; all but the first are too large for the repository."""

each_case = pytest.mark.parametrize("number", range(NUMBER))
each_variant = pytest.mark.parametrize("variant", ["script", "vision", "vision_es"])
each_backend = pytest.mark.parametrize("backend", [name for name, why in backends.available().items() if why is None])


def case(number: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The parameters and the tensors of a case."""
    name = f"pcb_{number}.safetensors"
    folder = HERE if (HERE / name).exists() else SHARED
    if not (folder / name).exists():
        pytest.skip(f"{name} is too large for the repository, and there is no {SHARED}; the first case is always there")
    index = json.loads((folder / "index.json").read_text())
    return next(entry for entry in index["pcb"] if entry["file"] == name), load_file(folder / name)


def uneven(row: Tensor) -> list[Tensor]:
    """A row cut in places that suit nobody."""
    count = row.numel()
    return list(row.split([1, count // 3, 0, 7, count - count // 3 - 8]))


@each_case
@each_variant
@each_backend
def test_merged_and_scale(number: int, variant: str, backend: str) -> None:
    parameters, golden = case(number)
    rows = golden["task_vectors"]
    weight = parameters["lambda_script" if variant == "script" else "lambda_vision"]
    arguments = {
        "density": parameters["ratio"],
        "variant": variant,
        "weight": weight,
        "return_scale": True,
        "backend": backend,
    }
    merged, scale = ops.pcb_merge(rows, **arguments)
    expected = golden[f"{variant}.scale"]
    assert ((scale - expected).abs() <= 1e-5 * expected.abs().max()).all()
    expected = golden[f"{variant}.merged"]
    far = (merged - expected).abs() > 1e-5 * expected.abs().max()
    assert int(far.sum()) <= max(1, rows.shape[1] // 10000)

    in_shards, scale_in_shards = ops.pcb_merge([uneven(row) for row in rows], **arguments)
    assert [x.numel() for x in in_shards] == [x.numel() for x in uneven(rows[0])]
    assert_bitwise_equal(torch.cat(in_shards), merged)
    assert_bitwise_equal(torch.stack([torch.cat(row) for row in scale_in_shards]), scale)


@each_case
@pytest.mark.parametrize("variant", ["script", "vision_es"])
@each_backend
def test_clamped(number: int, variant: str, backend: str) -> None:
    _, golden = case(number)
    rows = golden["task_vectors"]
    for form in (rows, [uneven(row) for row in rows]):
        low, high = ops.pcb_bounds(form, variant=variant, backend=backend).T[:, :, None]
        assert_bitwise_equal(rows.sign() * rows.abs().clamp(low, high), golden[f"{variant}.clamped"])


def test_nlp_is_script_with_wider_clipping() -> None:
    """The case has no `nlp`; its clipping is that of the other variants with q = 0.01."""
    _, golden = case(0)
    rows = golden["task_vectors"]
    assert_bitwise_equal(ops.pcb_bounds(rows, variant="nlp"), ops.pcb_bounds(rows, variant="vision_es"))
