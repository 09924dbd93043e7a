"""The files in examples/ work as they stand: the YAML on tiny models of its names, the scripts by themselves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import fastmerge
from tests.docs.pages import ROOT
from tests.engine.small_family import load

CONFIGS = sorted((ROOT / "examples").glob("*.yml"))
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


def test_there_are_examples() -> None:
    assert {path.name for path in CONFIGS} == {"dare_ties.yml", "gradient.yml", "pcb.yml", "ties.yml"}
    assert {path.name for path in SCRIPTS} == {"expert_routing.py", "merge_in_memory.py", "ops_tour.py"}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_config_merges(config: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    report = fastmerge.merge_checkpoints(config, "out")
    assert report.tensors == len(load(workplace / "base"))
    merged, base = load(workplace / "out"), load(workplace / "base")
    assert any(bool((merged[name] != base[name]).any()) for name in base)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_runs_from_any_folder(script: Path, tmp_path: Path, shell_environment: dict[str, str]) -> None:
    result = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=shell_environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
