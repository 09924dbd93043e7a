"""Each mutation can be made, and each one's tests are there; what becomes of a mutation is told right."""

from __future__ import annotations

import json
import subprocess

import pytest

from checks import mutations
from checks.mutation_list import MUTATIONS, Mutation

CORRECT = Mutation("rule.py", "the sum", "a + b", "a - b", ("test_rule.py::test_sum",))


def tree(folder, rule: str = "def add(a, b):\n    return a + b\n"):
    (folder / "rule.py").write_text(rule)
    (folder / "test_rule.py").write_text("from rule import add\n\n\ndef test_sum():\n    assert add(1, 2) == 3\n")
    return folder


def test_every_mutation_can_be_made():
    assert mutations.problems() == []
    assert len(MUTATIONS) > 50


def test_a_mutation_that_cannot_be_made_is_named(tmp_path):
    assert mutations.problems([CORRECT], tree(tmp_path)) == []
    (problem,) = mutations.problems([CORRECT], tree(tmp_path, "return b + a\n"))
    assert "looks for a text that is there 0 times: 'a + b'" in problem
    (problem,) = mutations.problems([CORRECT], tree(tmp_path, "a + b\na + b\n"))
    assert "2 times" in problem
    (problem,) = mutations.problems([CORRECT, CORRECT], tree(tmp_path))
    assert "twice" in problem


@pytest.mark.parametrize("test", ["test_none.py", "test_rule.py::test_product"])
def test_a_test_that_is_not_there_is_named(tmp_path, test):
    (problem,) = mutations.problems([Mutation("rule.py", "the sum", "a + b", "a - b", (test,))], tree(tmp_path))
    assert problem.endswith(f"names the test {test}, which is not there")


@pytest.mark.parametrize(
    ("rule", "fate"),
    [
        ("def add(a, b):\n    return a + b\n", "survived"),
        ("def add(a, b):\n    return a - b\n", "killed"),
        ("import os\n\n\ndef add(a, b):\n    os.abort()\n", "killed"),
        ("def add(a, b:\n", "broken"),
    ],
)
def test_fates(tmp_path, rule, fate):
    result = mutations.pytest_in(tree(tmp_path, rule), CORRECT.tests)
    assert isinstance(result, subprocess.CompletedProcess)
    assert mutations.fate_of(result.returncode) == fate


def test_what_takes_too_long_proves_nothing(tmp_path):
    rule = "import time\n\n\ndef add(a, b):\n    time.sleep(60)\n"
    result = mutations.pytest_in(tree(tmp_path, rule), CORRECT.tests, timeout=3)
    assert mutations.fate_of(result.returncode) == "undecided"


def test_the_quickest_test_comes_first(tmp_path):
    tests = "import time\n\n\ndef test_slow():\n    time.sleep(0.2)\n\n\ndef test_quick():\n    pass\n"
    folder = tree(tmp_path)
    (folder / "test_rule.py").write_text(tests)
    times = tmp_path / "times.json"
    (folder / "checks").symlink_to(mutations.ROOT / "checks")
    assert mutations.pytest_in(folder, ["test_rule.py"], times=times).returncode == 0
    seen = json.loads(times.read_text())
    assert seen["test_rule.py::test_slow"] > seen["test_rule.py::test_quick"]
    (folder / "test_rule.py").write_text(tests.replace("pass", "assert False"))
    result = mutations.pytest_in(folder, ["test_rule.py"], times=times)
    assert "1 failed in" in result.stdout, "the slow one ran before it"
