"""The compiled kernels keep their rules on every target, and the check finds kernels that break one."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys

import pytest

from checks import ROOT

pytest.importorskip("triton", reason="no Triton to compile kernels with; `make check` does it where there is one")

TARGETS = ("sm_80", "sm_120", "gfx942")
NVIDIA = TARGETS[:2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python of its own: in this one, kernels are interpreted where there is no GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_kernels_keep_their_rules_on_every_target():
    """What has not changed since all were compiled is compiled on another day (`ROUND`), whose turn it is."""
    result = run("checks.kernels", "--changed")
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_a_form_is_compiled_again_when_anything_changes_and_once_in_a_round():
    """In a Python of its own, which asks of a few forms whether they are due."""
    result = run("tests.checks.due_kernels")
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["known"] == 1, "on each day of a round one share is due, and each form once"
    assert told["unknown"] and told["another source"] and told["another triton"] and told["another target"]


@functools.cache
def found() -> dict[str, dict[str, list[str]]]:
    """What is found in each bad kernel, by target."""
    result = run("tests.checks.bad_kernels")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fine", "fine_functions", "fine_double", "fine_integers", "fine_conversions"])
def test_kernels_that_keep_the_rules_are_left_alone(name):
    assert found()[name] == {target: [] for target in TARGETS}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sentence", "targets"),
    [
        # An AMD GPU has no approximate division that Triton would take: there `/` is rounded correctly, too.
        ("approximate_division", "use tl.div_rn", NVIDIA),
        ("approximate_root", "an approximation", TARGETS),
        ("library_exp", "an approximation", TARGETS),
        ("fused", "fused multiply-add", TARGETS),
        ("fused_double", "fused multiply-add", TARGETS),
        ("fusion_allowed", "fused multiply-add", TARGETS),
        ("cast", "conversion of bfloat16", NVIDIA),
        ("float_atomic", "atomic", TARGETS),
        ("multiplied", "multiplies matrices", TARGETS),
        ("unaligned", "that a thread loads per tile", TARGETS),
        ("unaligned", "that a thread stores per tile", TARGETS),
        ("masked", "that a thread loads per tile", TARGETS),
        ("crowded", "registers spill", TARGETS),
        ("gathered", "bytes of shared memory", TARGETS),
    ],
)
def test_kernels_that_break_a_rule_are_found(name, sentence, targets):
    for target in targets:
        assert any(sentence in problem for problem in found()[name][target]), found()[name]


def test_the_page_names_every_kernel():
    from checks import kernels

    table = kernels.PAGE.read_text(encoding="utf-8").partition(kernels.BEGIN)[2].partition(kernels.END)[0]
    named = set(re.findall(r"^\| `(\w+\.\w+)` \|", table, re.MULTILINE))
    assert named == kernels.kernels_of()


def test_a_function_that_the_backend_lacks_is_named():
    from checks import kernels

    assert kernels.lacking(kernels.backend) == []
    assert kernels.lacking(kernels.backend, ["abs_histogram", "levitate"]) == [
        "fastmerge.backends.triton lacks levitate"
    ]
