"""How a row is measured: checked, timed, checked again, and told as a fraction of what a memory copy reaches here."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

Check = Callable[[Any], str | None]
"""Says what is wrong with a result, or None."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastmerge benchmarks")
    group.addoption("--size-log2", type=int, default=20, help="log2 of the elements of each tensor (28 for a report)")
    group.addoption("--row-length", type=int, default=1024, help="elements of a row, for the methods that rank rows")
    group.addoption("--bench-rounds", type=int, default=5, help="how often each row is timed")
    group.addoption("--all-reference", action="store_true", help="time the reference backend on every kind of input")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the slow reference rows out but for those on normal values, unless all are asked for."""
    if config.getoption("--all-reference"):
        return
    kept, left = [], []
    for item in items:
        given = getattr(item, "callspec", None)
        drawn = given.params if given is not None else {}
        slow = drawn.get("backend") == "reference" and drawn.get("kind", "normal") != "normal"
        (left if slow else kept).append(item)
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = kept


@pytest.fixture(scope="session")
def size(request: pytest.FixtureRequest) -> int:
    """Elements of each tensor."""
    return 1 << request.config.getoption("--size-log2")


@pytest.fixture(scope="session")
def row_length(request: pytest.FixtureRequest, size: int) -> int:
    """Elements of a row; it divides the size."""
    length = request.config.getoption("--row-length")
    if size % length:
        raise pytest.UsageError(f"--row-length {length} does not divide 2**{request.config.getoption('--size-log2')}")
    return length


@pytest.fixture(scope="session")
def copy_bandwidth() -> float:
    """Bytes read and written per second by a copy of memory on all of torch's threads: the limit of a kernel."""
    from fastmerge import measuring

    return measuring.copy_bandwidth("cpu")


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    """The backend of this row, skipped with its reason where it does not work."""
    from fastmerge import backends

    reason = backends.available().get(request.param)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture
def measured(
    benchmark, copy_bandwidth: float, request: pytest.FixtureRequest
) -> Callable[[Callable[[], Any], Check, int, int], None]:
    """`measured(run, check, elements, bytes_moved)` times `run` only when its result is right, before and after."""

    def measure(run: Callable[[], Any], check: Check, elements: int, bytes_moved: int) -> None:
        problem = check(run())
        if problem:
            pytest.fail(f"wrong result, not timed: {problem}")
        rounds = 1 if "reference" in request.node.name else request.config.getoption("--bench-rounds")
        result = benchmark.pedantic(run, rounds=rounds, iterations=1)
        problem = check(result)
        if problem:
            benchmark.has_error = True  # keeps the row out of the table and out of the JSON file
            pytest.fail(f"wrong result while timed: {problem}")
        if benchmark.stats is not None:
            seconds = benchmark.stats.stats.min
            benchmark.extra_info.update(
                gelem_per_s=round(elements / seconds / 1e9, 4),
                gb_per_s=round(bytes_moved / seconds / 1e9, 3),
                copy_gb_per_s=round(copy_bandwidth / 1e9, 3),
                fraction_of_copy=round(bytes_moved / seconds / copy_bandwidth, 4),
                elements=elements,
            )

    return measure


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    """The machine's description goes into the file beside pytest-benchmark's own."""
    from measure import environment

    output_json["environment"] = environment()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """One line per row, for the plugin's table does not show rates: Gelem/s, GB/s, the fraction of a copy."""
    session = getattr(config, "_benchmarksession", None)
    rows = [bench for bench in getattr(session, "benchmarks", []) if not bench.has_error and bench.extra_info]
    if not rows:
        return
    terminalreporter.section("rates")
    width = max(len(bench.name) for bench in rows)
    for bench in rows:
        info = bench.extra_info
        terminalreporter.write_line(
            f"{bench.name:<{width}}  {info['gelem_per_s']:>9.4f} Gelem/s  {info['gb_per_s']:>8.2f} GB/s  "
            f"{info['fraction_of_copy']:>7.1%} of a copy"
        )
