"""Every op test runs in poisoned memory."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module", autouse=True)
def _poisoned(poisoned_memory: None) -> None:
    """Applies to all modules of this folder."""
