"""Every op test runs in poisoned memory, and leaves no configuration of a backend to the next one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.ops.running import FAST, restored


@pytest.fixture(scope="module", autouse=True)
def _poisoned(poisoned_memory: None) -> None:
    """Applies to all modules of this folder."""


@pytest.fixture(autouse=True)
def _configuration_restored() -> Iterator[None]:
    """Small tiles, say, would make the tests after it take twenty times as long in Triton's interpreter."""
    with ExitStack() as stack:
        for name in FAST:
            stack.enter_context(restored(name))
        yield
