"""A pytest plugin: writes down how long each test takes, and where that is known runs the quickest tests first.

The first failure ends the tests of a mutation, and nearly every test of a rule notices that it is broken; so the order
decides how long a mutation takes. The file of times is named by the environment variable ``TEST_TIMES``.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from pathlib import Path

import pytest

TIMES = "TEST_TIMES"


class QuickestFirst:
    """Sort by the times in the file, if it is there; if not, write it at the end. Tests without a time come last."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        self.seen: dict[str, float] = defaultdict(float)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Sort after everybody else has."""
        if self.known:
            items.sort(key=lambda item: self.known.get(item.nodeid, float("inf")))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add the time of a test's set-up, call or end."""
        self.seen[report.nodeid] += report.duration

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write the times; a worker of xdist leaves that to the process that started it."""
        if not self.known and not hasattr(session.config, "workerinput"):
            self.path.write_text(json.dumps(self.seen), encoding="utf-8")


def pytest_configure(config: pytest.Config) -> None:
    """Take part with the file that the environment names."""
    config.pluginmanager.register(QuickestFirst(Path(os.environ[TIMES])))
