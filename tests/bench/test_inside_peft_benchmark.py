"""The benchmark inside PEFT runs, and its checks are green."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytest.importorskip("peft", reason="no PEFT (the extra `peers`)")


@pytest.mark.slow
def test_every_route_is_right(tmp_path):
    routes = ["ties", "dare_ties", "svd", "ties_svd"]
    report = tmp_path / "report.json"
    command = [sys.executable, str(ROOT / "bench" / "inside_peft.py"), "--shape", "tiny", "--layers", "1"]
    run = subprocess.run(
        [*command, "--repeats", "1", "--routes", *routes, "--json", str(report)],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    figures = json.loads(report.read_text())
    assert [row["route"] for row in figures["rows"]] == routes
    assert all(row["right"] and row["ratio"] > 0 for row in figures["rows"])
    assert figures["bookkeeping_seconds"] > 0
