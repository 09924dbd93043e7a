"""Every rule of the kernels is held by a test: break the rule, and the test fails.

Each mutation changes one text of one file in a copy of this tree and runs the tests that must notice; where the file is
one of CUDA's it builds the emulated module first. ``python -m checks.mutations`` tries all of them, which takes long;
``--only PATTERN`` those whose name or file contains it. A mutation that survives is a rule without a test.
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from checks import ROOT, emulated
from checks.mutation_list import MUTATIONS, Mutation
from checks.quickest_first import TIMES

COPIED = ("checks", "csrc", "docs", "fastmerge", "tests", "triton_kernels", "pyproject.toml", "setup.py", "README.md")
TIMED_OUT = 124
TIMEOUT = 1800
"""Seconds for the tests of one mutation, if no other number is given."""


@dataclass(frozen=True)
class Outcome:
    """What became of a mutation; tests: what pytest said last.

    fate: "killed" or "survived"; "broken": the tests could not be run with it; "undecided": they took too long.
    """

    mutation: Mutation
    fate: str
    tests: str
    seconds: float


def problems(mutations: Iterable[Mutation] = MUTATIONS, root: Path = ROOT) -> list[str]:
    """Mutations that cannot be made: their text is not there, or more than once; or no test of that name is there."""
    found = []
    names = set()
    for mutation in mutations:
        where = f"{mutation.file}: the mutation {mutation.name!r}"
        if (mutation.file, mutation.name) in names:
            found.append(f"{where} is there twice")
        names.add((mutation.file, mutation.name))
        count = (root / mutation.file).read_text(encoding="utf-8").count(mutation.old)
        if count != 1:
            found.append(f"{where} looks for a text that is there {count} times: {mutation.old!r}")
        if mutation.new == mutation.old:
            found.append(f"{where} changes nothing")
        for test in mutation.tests:
            file, _, name = test.partition("::")
            name = name.partition("[")[0]
            text = (root / file).read_text(encoding="utf-8") if (root / file).is_file() else None
            if text is None or (name and f"def {name}(" not in text):
                found.append(f"{where} names the test {test}, which is not there")
    return found


def copy_of(root: Path, folder: Path) -> Path:
    """A copy of what the tests need, compiled modules included, without what they made before."""
    for name in COPIED:
        if (root / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(root / name, folder / name, symlinks=True, ignore=ignored)
        elif (root / name).exists():
            shutil.copy(root / name, folder / name)
    return folder


def pytest_in(
    folder: Path, tests: Iterable[str], timeout: float = TIMEOUT, times: Path | None = None, workers: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run tests of the copy, with the copy's package and the first failure as the end; 0 means that all passed.

    times: a file of `checks.quickest_first`: written where it is not there, and the tests' order where it is.
    """
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    # A counterexample is enough; the smallest one is looked for by people.
    environment.setdefault("HYPOTHESIS_PROFILE", "first_failure")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "--tb=line", "-p", "no:cacheprovider"]
    if times is not None:
        environment[TIMES] = str(times)
        command += ["-p", "checks.quickest_first"]
    if workers:
        command += ["-n", str(workers), "--dist", "worksteal"]
    try:
        return subprocess.run(
            [*command, *tests],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired as error:
        return subprocess.CompletedProcess(error.cmd, TIMED_OUT, f"still running after {timeout:.0f} s", "")


def fate_of(returncode: int) -> str:
    """What pytest's exit status says: 0 all passed, 1 some failed; a process that died of a signal has noticed, too."""
    return {0: "survived", 1: "killed", TIMED_OUT: "undecided"}.get(
        returncode, "killed" if returncode < 0 else "broken"
    )


def tried(mutation: Mutation, timeout: float = TIMEOUT, times: Path | None = None) -> Outcome:
    """Make a mutation in a copy of the tree and run its tests there, the quickest first where their times are known."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutation-") as name:
        folder = copy_of(ROOT, Path(name))
        path = folder / mutation.file
        path.write_text(path.read_text(encoding="utf-8").replace(mutation.old, mutation.new), encoding="utf-8")
        if mutation.file.startswith("csrc/cuda/"):
            try:
                emulated.build(folder)
            except RuntimeError as error:
                return Outcome(mutation, "broken", str(error), time.monotonic() - started)
        result = pytest_in(folder, mutation.tests, timeout, times)
    lines = [line for line in result.stdout.splitlines() if line.strip()]
    said = lines[-1] if lines and result.returncode >= 0 else f"ended with {result.returncode}"
    return Outcome(mutation, fate_of(result.returncode), said, time.monotonic() - started)


def unmutated(mutations: Iterable[Mutation], times: Path | None = None, workers: int = 0) -> str:
    """What pytest says of all tests of these mutations in a copy without any, or nothing if they pass."""
    tests = sorted({test for mutation in mutations for test in mutation.tests})
    with tempfile.TemporaryDirectory(prefix="mutation-") as name:
        result = pytest_in(copy_of(ROOT, Path(name)), tests, len(tests) * TIMEOUT, times, workers)
    return result.stdout + result.stderr if result.returncode else ""


def main(arguments: list[str] | None = None) -> int:
    """Try mutations and tell each one's fate; 1 if any survives or cannot be made."""
    parser = argparse.ArgumentParser(prog="python -m checks.mutations", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[""], help="only those whose file or name contains one of these")
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds for the tests of one mutation")
    chosen = parser.parse_args(arguments)
    wanted = [each for each in MUTATIONS if any(text in f"{each.file}: {each.name}" for text in chosen.only)]
    for sentence in (unmakeable := problems(wanted)):
        print(sentence, file=sys.stderr)
    if unmakeable:
        return 1
    if not wanted:
        print(f"no mutation has any of {chosen.only} in its file or name", file=sys.stderr)
        return 1
    fates: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="mutations-") as name, ThreadPoolExecutor(chosen.jobs) as pool:
        times = Path(name) / "times.json"
        if failing := unmutated(wanted, times, chosen.jobs):
            print(f"tests fail without any mutation, so that they prove nothing:\n{failing}", file=sys.stderr)
            return 1
        for outcome in pool.map(functools.partial(tried, timeout=chosen.timeout, times=times), wanted):
            fates[outcome.fate] += 1
            where = f"{outcome.mutation.file}: {outcome.mutation.name}"
            print(f"{outcome.fate:9}{where} ({outcome.seconds:.0f} s; {outcome.tests})", flush=True)
    print(f"of {len(wanted)} mutations: {', '.join(f'{count} {fate}' for fate, count in fates.items())}")
    return 0 if fates["killed"] == len(wanted) else 1


if __name__ == "__main__":
    sys.exit(main())
