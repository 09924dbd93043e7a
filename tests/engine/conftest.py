from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def auto_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests are about the host, and about devices that they name, whatever there is where they run."""
    monkeypatch.setattr("fastmerge.engine.device._best", lambda backend: torch.device("cpu"))
