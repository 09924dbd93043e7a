"""Prints at the end how many compared positions were tied, for nothing is claimed about those."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

# The families that the benchmarks merge serve here too.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

TIED = pytest.StashKey[dict[str, list[int]]]()


@pytest.fixture(autouse=True)
def gradients_are_recorded():
    """Whatever ran in this process before."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@pytest.fixture
def tied_share(request: pytest.FixtureRequest):
    """`count(label, tied)` adds a mask of tied positions to the shares that are printed."""
    counts = request.config.stash.setdefault(TIED, {})

    def count(label: str, tied) -> None:
        entry = counts.setdefault(label, [0, 0])
        entry[0] += int(tied.sum())
        entry[1] += tied.numel()

    return count


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    counts = config.stash.get(TIED, {})
    if counts:
        terminalreporter.section("positions left open by the peer's ties")
        for label, (tied, total) in sorted(counts.items()):
            terminalreporter.write_line(f"{label}: {tied} of {total} ({tied / max(total, 1):.2%})")
