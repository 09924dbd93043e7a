"""The script that runs mergekit's own tests with fastmerge inside, on a suite that needs no download."""

from __future__ import annotations

import importlib.metadata
import zlib
from pathlib import Path

import pytest
import torch

from checks import mergekit_suite

pytest.importorskip("mergekit", reason="no mergekit (the extra `peers`)")


def drawn(name: str) -> float:
    """What torch draws first for a fixture or a test of this name."""
    return torch.rand(1, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))).item()


SUITE = f"""
FIXTURE, TEST = {drawn("drawn")}, {drawn("test_draws_the_same_both_ways")}
import pytest
import torch
from mergekit import sparsify

from tests.common import INSIDE


@pytest.fixture
def drawn():
    return torch.rand(1).item()


def test_draws_the_same_both_ways(drawn):
    assert (drawn, torch.rand(1).item()) == (FIXTURE, TEST)


def test_passes_both_ways():
    x = torch.tensor([3.0, -5.0, 1.0, 4.0])
    assert sparsify.magnitude(x, 0.5).tolist() == [0.0, -5.0, 0.0, 4.0]


def test_fails_both_ways():
    assert sparsify.magnitude(torch.ones(4), 0.5).sum() == 3


def test_fails_inside_alone():
    assert sparsify.magnitude.__module__ == "mergekit.sparsify"


@pytest.mark.skip(reason="always")
def test_is_skipped():
    raise AssertionError


@pytest.mark.parametrize("name", ["one", *INSIDE])
def test_is_run_more_often_inside(name):
    pass
"""

COMMON = """
from fastmerge.integrations import mergekit

INSIDE = ["two"] if mergekit.enabled() else []
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A source distribution as pip unpacks it."""
    folder = tmp_path / "mergekit"
    (folder / "tests").mkdir(parents=True)
    (folder / "pyproject.toml").write_text(f'version = "{importlib.metadata.version("mergekit")}"\n')
    (folder / "tests" / "test_made_up.py").write_text(SUITE)
    (folder / "tests" / "common.py").write_text(COMMON)
    (folder / "tests" / "__init__.py").write_text("")
    return folder


def test_a_test_that_fails_inside_alone_is_a_problem(source, capsys):
    assert mergekit_suite.main([str(source)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("4 passed with fastmerge inside, 1 skipped, of them 1 for methods")
    assert lines[1] == "fails in mergekit itself: tests.test_made_up::test_fails_both_ways"
    assert lines[2].startswith("PROBLEM: tests.test_made_up::test_fails_inside_alone fails with fastmerge inside")
    assert any(line.endswith("2 by sparsify.magnitude") for line in lines)


def test_exceptions_are_listed_with_their_reasons(monkeypatch):
    monkeypatch.setitem(mergekit_suite.EXCEPTIONS, "a", "it is made up")
    found = mergekit_suite.compare({"a": "passed", "b": "passed"}, {"a": "failed", "b": "passed"})
    assert not found.problems and "excepted: a: it is made up" in found.lines()


def test_a_run_in_which_nothing_passes_is_a_problem():
    found = mergekit_suite.compare({"a": "failed"}, {"a": "failed"})
    assert found.fail_anyway == ["a"] and found.problems == ["no test passed at all"]


def test_a_test_that_vanishes_or_is_skipped_inside_is_a_problem():
    without = {"a": "passed", "b": "passed", "c": "skipped", "d": "failed"}
    found = mergekit_suite.compare(without, {"b": "skipped", "c": "skipped", "d": "passed", "e": "failed"})
    assert found.problems == [
        "b is skipped with fastmerge inside and passes without",
        "e fails with fastmerge inside and not without",
        "a does not run with fastmerge inside",
    ]
    assert found.passed == ["d"] and found.added == ["e"]


def test_sources_of_another_release_are_refused(source):
    (source / "pyproject.toml").write_text('version = "0.0.1"\n')
    with pytest.raises(SystemExit, match="unpack that one's sources"):
        mergekit_suite.main([str(source)])
    with pytest.raises(SystemExit, match="with fastmerge inside"):
        mergekit_suite.main([])
