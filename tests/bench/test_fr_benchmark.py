"""The benchmark of FR-Merging runs, and its check sees what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import fr_end_to_end
import torch
from make_family import make_family
from safetensors.torch import load_file, save_file

from fastmerge import merge_checkpoints


def test_the_check_takes_the_merge_and_no_other(tmp_path: Path) -> None:
    family = make_family(tmp_path / "family", scale="tiny", dtype="bfloat16")
    merge_checkpoints(fr_end_to_end.config(family, "bfloat16"), tmp_path / "out")
    expected = fr_end_to_end.Expected(family)
    assert expected.problems(tmp_path / "out", torch.bfloat16) == []
    assert expected.problems(tmp_path / "out", torch.float32) != []
    assert expected.problems(family.base, torch.bfloat16) != []
    file = next((tmp_path / "out").glob("*.safetensors"))
    tensors = load_file(file)
    for tensor in tensors.values():
        tensor.view(-1)[::100] += 1
    save_file(tensors, file)
    assert "values are wrong" in expected.problems(tmp_path / "out", torch.bfloat16)[0]


def test_a_merge_that_filters_nothing_or_too_much_is_wrong(tmp_path: Path) -> None:
    family = make_family(tmp_path / "family", scale="tiny", dtype="float32")
    expected = fr_end_to_end.Expected(family)
    for number, ratio in enumerate((0.0, 0.3)):
        config = {**fr_end_to_end.config(family, "float32"), "parameters": {"ratio": ratio}}
        merge_checkpoints(config, tmp_path / str(number))
        assert expected.problems(tmp_path / str(number), torch.float32) != []


def test_the_benchmark_runs_through_on_a_tiny_family(tmp_path: Path) -> None:
    options = ["--scale", "tiny", "--repeats", "1", "--pause", "0", "--budgets", "64MiB"]
    places = ["--family", tmp_path / "family", "--work", tmp_path, "--json", tmp_path / "figures.json"]
    command = [sys.executable, fr_end_to_end.__file__, *options, *places]
    subprocess.run(command, check=True, capture_output=True)
    (row,) = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert row["problems"] == [] and row["seconds"] > 0 and row["workspace"] > 0
