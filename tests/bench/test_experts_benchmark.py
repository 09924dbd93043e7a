"""The benchmark of experts runs, and its check sees what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import experts
from end_to_end import _Folder
from make_family import make_family

from fastmerge.experts import extract_to_file


def test_the_check_takes_the_expert_and_no_other(tmp_path: Path) -> None:
    family = make_family(tmp_path / "family", scale="tiny", models=2)
    base, one, two = (_Folder(folder) for folder in family.folders)
    extract_to_file(family.base, family.models[0], tmp_path / "one", keep=0.05)
    assert experts.problems(tmp_path / "one", base, one, 0.05) == []
    assert "keeps other elements" in experts.problems(tmp_path / "one", base, two, 0.05)[0]


def test_the_benchmark_runs_through_on_a_tiny_family(tmp_path: Path) -> None:
    options = ["--scale", "tiny", "--keep", "0.05", "--repeats", "1", "--pause", "0", "--switches-timed", "1"]
    places = ["--family", tmp_path / "family", "--work", tmp_path, "--json", tmp_path / "figures.json"]
    subprocess.run([sys.executable, experts.__file__, *options, *places], check=True, capture_output=True)
    (row,) = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert row["problems"] == [] and set(row["met"]) == {"extract", "size", "apply", "remove"}
