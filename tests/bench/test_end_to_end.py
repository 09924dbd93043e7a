"""The end-to-end benchmark run small, and its check tested: a wrong output must turn a row red and hide its speed."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch
from safetensors.torch import save_file

SHARD = "model.safetensors"


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    from make_family import make_family

    return make_family(tmp_path_factory.mktemp("family"), scale="tiny")


@pytest.fixture(scope="module", params=["ties", "dare_ties", "task_arithmetic", "linear", "della"])
def expectation(request, family):
    from end_to_end import Expectation

    return Expectation(family, request.param, "bfloat16")


def save(tensors, folder):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / SHARD)
    return folder


def test_an_output_with_the_right_values_is_green(expectation, tmp_path):
    assert expectation.problems(save(expectation.tensors, tmp_path)) == []


@pytest.mark.parametrize("place", [0, -1])
def test_one_wrong_bit_in_any_tensor_is_found(expectation, tmp_path, place):
    for name in list(expectation.tensors)[:: max(1, len(expectation.tensors) // 4)]:
        broken = {key: tensor.clone() for key, tensor in expectation.tensors.items()}
        broken[name].view(torch.int16).flatten()[place] ^= 1
        (problem,) = expectation.problems(save(broken, tmp_path))
        assert name in problem
        assert "1 of" in problem


def test_nan_in_place_of_a_number_is_found(expectation, tmp_path):
    broken = {key: tensor.clone() for key, tensor in expectation.tensors.items()}
    broken["model.norm.weight"][3] = math.nan
    assert len(expectation.problems(save(broken, tmp_path))) == 1


def test_a_missing_tensor_a_new_one_and_another_shape_or_dtype_are_found(expectation, tmp_path):
    right = expectation.tensors
    name = "model.norm.weight"
    without = {key: tensor for key, tensor in right.items() if key != name}
    for broken in (
        without,
        {**right, "model.extra.weight": torch.zeros(2, dtype=torch.bfloat16)},
        {**right, name: right[name].reshape(8, 8).clone()},
        {**right, name: right[name].float()},
    ):
        problems = expectation.problems(save(broken, tmp_path))
        assert len(problems) == 1
        assert name in problems[0] or "model.extra.weight" in problems[0]


def test_an_output_that_cannot_be_opened_is_a_problem_and_no_crash(expectation, tmp_path):
    assert expectation.problems(tmp_path) != []
    (save(expectation.tensors, tmp_path) / SHARD).write_bytes(b"\x08")
    assert expectation.problems(tmp_path) != []


def test_an_index_that_lies_is_found(expectation, tmp_path):
    save(expectation.tensors, tmp_path)
    listed = dict.fromkeys(expectation.tensors, "model-00001-of-00002.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    assert "index" in expectation.problems(tmp_path)[0]


def test_the_base_in_place_of_the_merge_is_found(expectation, family):
    assert expectation.problems(family.base) != []


def test_what_mergekits_function_gives_is_held_within_a_rounding(family, tmp_path):
    pytest.importorskip("mergekit", reason="no mergekit (the extra `peers`)")
    from end_to_end import Expectation

    expectation = Expectation(family, "nearswap", "bfloat16")
    right = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in expectation.shapes.items()}
    for name, x in expectation.tensors.items():
        right[name].copy_(x)
    assert len(expectation.tensors) > 5 and expectation.problems(save(right, tmp_path)) == []
    name = max(expectation.tensors, key=lambda each: right[each].numel())
    right[name].view(torch.int16)[:] += 2
    (problem,) = expectation.problems(save(right, tmp_path))
    assert name in problem
    assert expectation.problems(family.base) != []


@pytest.mark.parametrize("method", ["ties", "dare_ties", "task_arithmetic", "linear", "della", "nuslerp"])
def test_the_benchmark_runs_through_on_a_tiny_family_and_its_rows_are_green(method, tmp_path, capsys):
    from end_to_end import main

    report = tmp_path / "report.json"
    family, work = str(tmp_path / "family"), str(tmp_path / "work")
    arguments = ["--scale", "tiny", "--family", family, "--work", work, "--methods", method]
    arguments += ["--repeats", "1", "--pause", "0", "--budgets", "1GiB", "--json", str(report)]
    assert main(arguments) == 0
    content = json.loads(report.read_text())
    (row,) = content["rows"]
    assert row["check"] == "green"
    assert row["seconds"] > 0
    assert row["limit"] > 0
    assert row["ratio_to_limit"] == pytest.approx(row["seconds"] / (row["limit"] + 1.5))
    assert row["peak_bytes"]["1GiB"] > 10_000_000
    assert content["environment"]["cores"] >= 1
    assert "total" in row["stages"]["seconds"]
    assert method in capsys.readouterr().out


def test_a_corrupted_output_makes_the_row_red_and_hides_its_speed(tmp_path, monkeypatch, capsys):
    import end_to_end

    merge = end_to_end.Bench.merge

    def merge_and_corrupt(self, file, *, budget=None):
        run = merge(self, file, budget=budget)
        shard = next(iter(sorted(self.out.glob("*.safetensors"))))
        content = bytearray(shard.read_bytes())
        content[-1] ^= 0x40
        shard.write_bytes(content)
        return run

    monkeypatch.setattr(end_to_end.Bench, "merge", merge_and_corrupt)
    report = tmp_path / "report.json"
    arguments = ["--scale", "tiny", "--family", str(tmp_path / "family"), "--work", str(tmp_path / "work")]
    arguments += ["--methods", "linear", "--repeats", "1", "--pause", "0", "--budgets", "--json", str(report)]
    assert end_to_end.main(arguments) == 1
    (row,) = json.loads(report.read_text())["rows"]
    assert row["check"] == "red"
    assert "seconds" not in row
    assert "ratio_to_limit" not in row
    assert "RED" in capsys.readouterr().out


def test_a_merge_that_fails_makes_the_row_red(tmp_path, monkeypatch):
    import end_to_end

    monkeypatch.setattr(end_to_end, "fastmerge_command", lambda: [sys.executable, "-c", "raise SystemExit('no')"])
    arguments = ["--scale", "tiny", "--family", str(tmp_path / "family"), "--work", str(tmp_path / "work")]
    assert end_to_end.main([*arguments, "--methods", "linear", "--repeats", "1", "--pause", "0"]) == 1


def test_the_peak_of_a_command_is_its_own_and_not_that_of_the_process_that_measures():
    from measure import run_measured

    ballast = torch.ones(1 << 26)  # 256 MiB in this process
    small = run_measured([sys.executable, "-c", "pass"])
    large = run_measured([sys.executable, "-c", "held = bytearray(300_000_000); held[::4096] = held[::4096]"])
    assert ballast.sum() == 1 << 26
    assert small.peak_bytes < 100_000_000
    assert 300_000_000 < large.peak_bytes < 400_000_000
    assert run_measured([sys.executable, "-c", "raise SystemExit(3)"]).status == 3
