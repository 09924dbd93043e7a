"""The benchmark of evolution runs, and says so where the bar is missed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import evolve_optimise
import pytest


def test_the_benchmark_runs_through_and_fails_where_it_must(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "figures.json"
    options = ["--sizes", "8", "--members", "5", "--generations", "3", "--seeds", "1", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["evolve_optimise.py", *options])
    monkeypatch.setattr(evolve_optimise, "BAR", 1e9)
    assert evolve_optimise.main() == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["function"] for row in rows] == list(evolve_optimise.FUNCTIONS)
    assert all(row["met"] and row["evaluations"] == 20 and row["fastmerge"] <= row["start"] for row in rows)
    monkeypatch.setattr(evolve_optimise, "BAR", 0.0)
    assert evolve_optimise.main() == 1
