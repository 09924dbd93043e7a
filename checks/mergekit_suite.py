"""Run mergekit's own tests with fastmerge inside, and compare test by test with how they end without.

    pip download --no-deps --no-binary :all: mergekit==0.1.5     # its sources; nothing is fetched by this script
    python -m checks.mergekit_suite mergekit-0.1.5 [arguments for pytest]

The sources must be those of the mergekit that is installed. Some of its tests need `tests/common.py`, which is in its
repository and not in its source distribution: put it there, or they fail to be collected, with fastmerge and without.

The same file is the plugin by which pytest enables fastmerge (`-p checks.mergekit_suite`). It also seeds torch before
each fixture and each test: mergekit's tests draw models at random, which must be the same ones both ways.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tempfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from checks import ROOT

EXCEPTIONS: dict[str, str] = {}
"""Tests that pass in mergekit alone and may fail with fastmerge inside, and why: none."""

TALLY = "MERGEKIT_SUITE_TALLY"
WITHOUT = "MERGEKIT_SUITE_WITHOUT"
"""Set to anything, the plugin seeds and leaves mergekit alone."""


# -- the plugin


def pytest_configure(config: pytest.Config) -> None:
    """Let mergekit compute by fastmerge while its tests run."""
    if os.environ.get(WITHOUT):
        return
    from fastmerge.integrations import mergekit

    mergekit.enable(seed=None)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Say what was merged by whom."""
    if os.environ.get(WITHOUT):
        return
    from fastmerge.integrations import mergekit

    mergekit.disable()
    place = os.environ.get(TALLY)
    if place:
        Path(place).write_text("\n".join(mergekit.tally().lines()), encoding="utf-8")


def _seed(name: str) -> None:
    import torch

    torch.manual_seed(zlib.crc32(name.encode()))


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: Any) -> None:
    """The same random numbers for each fixture, others than for the next."""
    _seed(fixturedef.argname)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """The same random numbers for each test, wherever it runs."""
    _seed(item.name)


# -- the comparison


@dataclass
class Comparison:
    """How the same tests end without fastmerge and with it: names of tests."""

    passed: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    fail_anyway: list[str] = field(default_factory=list)
    excepted: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """For people."""
        counted = (
            f"{len(self.passed)} passed with fastmerge inside, {len(self.skipped)} skipped, of them {len(self.added)} "
            "for methods that fastmerge adds"
        )
        return [
            counted,
            *(f"fails in mergekit itself: {name}" for name in self.fail_anyway),
            *(f"excepted: {name}: {EXCEPTIONS[name]}" for name in self.excepted),
            *(f"PROBLEM: {problem}" for problem in self.problems),
        ]


def compare(without: dict[str, str], inside: dict[str, str]) -> Comparison:
    """Outcomes ("passed", "skipped" or "failed") of tests by their names, without fastmerge and with it inside."""
    found = Comparison()
    for name, outcome in sorted(inside.items()):
        before = without.get(name)
        if before is None:
            found.added.append(name)
        if outcome == "failed":
            if before == "failed":
                found.fail_anyway.append(name)
            elif name in EXCEPTIONS:
                found.excepted.append(name)
            else:
                found.problems.append(f"{name} fails with fastmerge inside and not without")
            continue
        (found.skipped if outcome == "skipped" else found.passed).append(name)
        if outcome == "skipped" and before == "passed":
            found.problems.append(f"{name} is skipped with fastmerge inside and passes without")
    found.problems += [f"{name} does not run with fastmerge inside" for name in sorted(set(without) - set(inside))]
    if not found.passed:
        found.problems.append("no test passed at all")
    return found


def outcomes(report: Path) -> dict[str, str]:
    """What became of each test, from pytest's report in JUnit's form."""
    found = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        name = f"{case.get('classname')}::{case.get('name')}"
        # An error while a fixture is taken down comes as a second case of the same name.
        found[name] = "failed" if found.get(name) == "failed" else outcome
    return found


def run(tests: Path, work: Path, inside: bool, arguments: list[str]) -> dict[str, str]:
    """Run the tests in a process of their own, in which `tests` is the package that they know one another by."""
    name = "inside" if inside else "without"
    report = work / f"{name}.xml"
    (work / "tests").exists() or (work / "tests").symlink_to(tests)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(work), str(ROOT), os.environ.get("PYTHONPATH")])),
        "HF_HUB_OFFLINE": "1",
        TALLY: str(work / "tally"),
        WITHOUT: "" if inside else "1",
    }
    command = [sys.executable, "-m", "pytest", "tests", "-q", "--rootdir", str(work), "-c", os.devnull]
    command += ["-p", "checks.mergekit_suite"]
    command += ["-p", "no:cacheprovider", f"--junitxml={report}", "-o", "junit_family=xunit1", *arguments]
    with open(work / f"{name}.log", "w", encoding="utf-8") as log:
        subprocess.run(command, cwd=work, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
    if not report.exists():
        raise SystemExit(f"pytest wrote no report:\n{(work / f'{name}.log').read_text()[-3000:]}")
    return outcomes(report)


def main(arguments: list[str]) -> int:
    """Compare; 0 when nothing fails with fastmerge inside that does not fail without."""
    if not arguments or not (Path(arguments[0]) / "tests").is_dir():
        raise SystemExit(__doc__)
    source, rest = Path(arguments[0]).resolve(), arguments[1:]
    written = f'version = "{importlib.metadata.version("mergekit")}"'
    if written not in (source / "pyproject.toml").read_text(encoding="utf-8"):
        raise SystemExit(f"{source} is not of the mergekit that is installed ({written}): unpack that one's sources.")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        without = run(source / "tests", work, False, rest)
        comparison = compare(without, run(source / "tests", work, True, rest))
        print(*comparison.lines(), (work / "tally").read_text(encoding="utf-8"), sep="\n")
        if comparison.problems:
            print((work / "inside.log").read_text(encoding="utf-8")[-20000:])
    return 1 if comparison.problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
