"""The benchmark of fastmerge inside mergekit: what it compares, what it counts and what it says."""

from __future__ import annotations

import inside_mergekit
import pytest
import torch
from safetensors.torch import save_file


def model(folder, **tensors):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_values_that_differ_are_counted_and_so_is_a_tensor_that_is_missing(tmp_path):
    one = model(tmp_path / "one", a=torch.tensor([1.0, 2.0, 3.0]), b=torch.ones(4), c=torch.ones(2))
    two = model(tmp_path / "two", a=torch.tensor([1.0, 2.5, 3.0]), c=torch.ones(2, dtype=torch.float16))
    assert inside_mergekit.compare(one, two) == (1 + 4 + 2, 9)
    assert inside_mergekit.compare(one, one) == (0, 9)


def test_a_row_says_its_median_its_ratio_and_whether_the_bar_is_met():
    row = inside_mergekit.Row("ties", peer=[70.0, 50.0, 60.0], ours=[9.0, 10.0, 30.0], differing=0.01)
    row.split = {"start_up": 5.0, "kernels": 2.0, "reading": 0.1, "writing": 2.0, "other": 0.9, "total": 10.0}
    figures = row.figures()
    assert figures["times_the_peer"] == 6.0 and figures["bar_met"] is True
    shown = inside_mergekit.render([figures])
    assert "6.0 times (>= 5) ok" in shown and "start-up 5.00" in shown and "1.00% of the values differ" in shown
    row.peer = [40.0]
    assert inside_mergekit.Row.figures(row)["bar_met"] is False
    assert "MISSED" in inside_mergekit.render([row.figures()])


def test_a_wrong_output_has_no_speed():
    row = inside_mergekit.Row("ties", peer=[70.0], ours=[9.0], problems=["3 of 9 values are wrong"])
    figures = row.figures()
    assert "seconds" not in figures and "times_the_peer" not in figures
    assert inside_mergekit.render([figures]) == "ties: RED: 3 of 9 values are wrong"


@pytest.mark.slow
def test_a_tiny_family_is_measured(tmp_path, capsys):
    pytest.importorskip("mergekit", reason="no mergekit (the extra `peers`)")
    arguments = ["--scale", "tiny", "--repeats", "1", "--pause", "0", "--methods", "ties"]
    places = ["--family", str(tmp_path / "family"), "--work", str(tmp_path / "work")]
    assert inside_mergekit.main([*arguments, *places, "--json", str(tmp_path / "figures.json")]) == 0
    assert "ties: fastmerge-yaml" in capsys.readouterr().out
    assert (tmp_path / "figures.json").exists()
