"""The benchmarks of PCB-Merging run, their checks see what is wrong, and a generated model merges right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pcb_end_to_end
import pcb_scale
import pytest
import torch
from make_family import make_family
from safetensors.torch import load_file, save_file

from fastmerge import merge_checkpoints


@pytest.mark.parametrize("variant", ["vision_es", "script"])
def test_the_check_takes_the_merge_and_no_other(variant: str, tmp_path: Path) -> None:
    family = make_family(tmp_path / "family", scale="tiny", dtype="bfloat16")
    weights = pcb_end_to_end.WEIGHTS["again"]
    merge_checkpoints(pcb_end_to_end.config(family, variant, weights, "bfloat16"), tmp_path / "out")
    expected = pcb_end_to_end.Expected(family, variant)
    assert expected.problems(tmp_path / "out", weights, torch.bfloat16) == []
    assert expected.problems(tmp_path / "out", pcb_end_to_end.WEIGHTS["first"], torch.bfloat16) != []
    assert expected.problems(family.base, weights, torch.bfloat16) != []
    file = next((tmp_path / "out").glob("*.safetensors"))
    tensors = load_file(file)
    for tensor in tensors.values():
        tensor.view(-1)[::100] += 1
    save_file(tensors, file)
    assert "values are wrong" in expected.problems(tmp_path / "out", weights, torch.bfloat16)[0]


def test_the_benchmark_runs_through_on_a_tiny_family(tmp_path: Path) -> None:
    script = Path(pcb_end_to_end.__file__)
    options = ["--scale", "tiny", "--repeats", "1", "--pause", "0", "--budgets", "64MiB", "--variants", "paper"]
    places = ["--family", tmp_path / "family", "--work", tmp_path, "--json", tmp_path / "figures.json"]
    subprocess.run([sys.executable, script, *options, *places], check=True, capture_output=True)
    (row,) = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert row["problems"] == [] and row["first"]["passes"] == 4 and row["again"]["passes"] == 1


def test_a_generated_model_merges_right_and_a_wrong_value_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pcb_scale, "PERIOD", 1 << 14)
    monkeypatch.setattr(pcb_scale, "TENSOR", 1 << 18)
    row = pcb_scale.run(2, 1 << 24)
    assert row["parameters"] == 1 << 19 and 3 <= row["passes"] < 6
    right = pcb_scale.expected_of
    monkeypatch.setattr(pcb_scale, "expected_of", lambda *given: right(*given) + 1)
    with pytest.raises(SystemExit, match="wrong values"):
        pcb_scale.run(2, 1 << 24)
