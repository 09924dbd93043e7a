"""The benchmark of the frequency filter runs, and its check sees what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import highpass
import pytest
import torch

from fastmerge import ops
from fastmerge.backends import highpass as routes


@pytest.mark.parametrize("mode", ["ideal", "official"])
def test_the_peer_is_the_filter(mode: str) -> None:
    x = torch.randn(60, 31, generator=torch.Generator().manual_seed(0))
    expected = highpass.PEERS[mode](x.double(), 0.55).float()
    assert highpass.wrong(ops.highpass(x, 0.55, mode=mode), expected, x) is None
    assert highpass.wrong(ops.highpass(x, 0.5, mode=mode), expected, x) is not None


def test_it_runs_and_tells_every_route(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    shapes = ["--shapes", "40x100", "64x64", "--ideal", "0.1", "--official", "0.9", "--rounds", "1"]
    timing = ["--threads", "1", "--cpu-time", "--json", str(tmp_path / "figures.json")]
    try:
        assert highpass.main(shapes + timing) == 0
    finally:
        torch.set_num_threads(threads)
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert len(rows) == 4
    assert all(row["problems"] == [] and row["times"] > 0 and row["chosen"] in row["seconds"] for row in rows)
    assert "times the peer" in capsys.readouterr().out


def test_a_wrong_result_has_no_speed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(routes, "filtered", lambda x, out, plan: out.copy_(x))
    assert highpass.main(["--grid", "--shapes", "32x32", "--ideal", "0.5", "--official", "--rounds", "1"]) == 1
    assert "RED" in capsys.readouterr().out
