"""The benchmark of sweeps runs, compares the results, and says so where the bar is missed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import sweep

from tests.engine.small_family import family, save_family


def test_the_benchmark_runs_through_and_fails_where_it_must(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_family(tmp_path, *family(2, shapes={"a.weight": (9, 30), "b.weight": (7,)}))
    runs: list[str] = []

    def here(command: list[str], **_: object) -> object:
        runs.append(command[-1])
        found = sweep.work(command[-1], tmp_path, [{"density": d, "lambda_": 1.0} for d in (0.2, 0.6)])
        if command[-1] == wrong:
            found["scores"][1] += 1
        return type("Result", (), {"stdout": json.dumps(found)})

    wrong = ""
    out = tmp_path / "figures.json"
    options = [str(tmp_path), "--densities", "0.2", "0.6", "--lambdas", "1", "--anew", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["sweep.py", *options])
    monkeypatch.setattr(sweep.subprocess, "run", here)
    monkeypatch.setattr(sweep, "BAR", 1e9)
    assert sweep.main() == 0
    assert runs == ["one", "sweep", "singly", "anew"]
    figures = json.loads(out.read_text())
    assert len(set(figures["sweep"]["scores"])) == 2 and figures["anew"]["scores"] == figures["sweep"]["scores"]
    monkeypatch.setattr(sweep, "BAR", 0.0)
    assert sweep.main() == 1
    monkeypatch.setattr(sweep, "BAR", 1e9)
    wrong = "singly"
    assert sweep.main() == 1
