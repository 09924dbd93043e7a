"""Everything on the pages that looks as if it could be run, is run: Python, sessions, YAML files and console lines.

The blocks of a page run in order in one directory with tiny models, its Python blocks in one namespace. Output on the
page is compared, `...` standing for anything. YAML that begins with its file's name (`# ties.yml`) is saved under that
name and planned, or as `evolve*.yml` or `sweep*.yml` read as what it is the config of; YAML without is a fragment.
"""

from __future__ import annotations

import doctest
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fastmerge
from fastmerge.evolve import config as evolve_config
from fastmerge.sweep import config as sweep_config
from tests.docs.pages import PAGES, RUN, SHOWN, TOOLS, Block, blocks

COMPARED = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def run_python(block: Block, names: dict[str, Any]) -> None:
    exec(compile("\n" * (block.line - 1) + block.text, str(block.page), "exec"), names)


def run_session(block: Block, names: dict[str, Any]) -> None:
    test = doctest.DocTestParser().get_doctest(block.text, names, block.where, str(block.page), block.line - 1)
    report: list[str] = []
    runner = doctest.DocTestRunner(verbose=False, optionflags=COMPARED)
    runner.run(test, out=report.append, clear_globs=False)
    names.update(test.globs)
    assert not runner.failures, "".join(report)


def save_and_plan(block: Block, workplace: Path) -> None:
    assert block.file_name is not None
    path = workplace / block.file_name
    path.write_text(block.text)
    if path.name.startswith("evolve"):
        assert evolve_config.load(path).models, block.where
        return
    if path.name.startswith("sweep"):
        assert sweep_config.load(path).candidates, block.where
        return
    plan = fastmerge.plan_checkpoints(path)
    assert plan.bytes_written > 0, block.where


def commands(block: Block) -> Iterator[tuple[str, str]]:
    """The commands of a console block (continued over lines that end in a backslash), each with the output it shows."""
    command, output = "", ""
    for line in block.text.splitlines(keepends=True):
        if line.startswith("$ "):
            if command:
                yield command, output
            command, output = line.removeprefix("$ "), ""
        elif command.endswith("\\\n"):
            command += line
        else:
            assert command, f"{block.where}: a console block begins with `$ `"
            output += line
    yield command, output


def run_console(block: Block, workplace: Path, environment: dict[str, str]) -> None:
    for command, expected in commands(block):
        result = subprocess.run(
            ["bash", "-c", command],
            cwd=workplace,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, f"{block.where}: {command}{result.stdout}"
        if expected:
            same = doctest.OutputChecker().check_output(expected, result.stdout, COMPARED)
            assert same, f"{block.where}: {command}the page shows:\n{expected}it prints:\n{result.stdout}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_pages_blocks_run_and_print_what_the_page_shows(
    page: Path, workplace: Path, shell_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if page.stem in TOOLS:
        pytest.importorskip(TOOLS[page.stem], reason="the page is about a tool that is not installed")
    monkeypatch.chdir(workplace)
    for variable in ("FASTMERGE_BACKEND", "FASTMERGE_ISA", "FASTMERGE_THREADS"):
        monkeypatch.delenv(variable, raising=False)
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language == "python":
            run_python(block, names)
        elif block.language == "pycon":
            run_session(block, names)
        elif block.file_name is not None:
            save_and_plan(block, workplace)
        elif block.language == "console":
            run_console(block, workplace, shell_environment)


def test_every_block_says_what_it_is() -> None:
    wrong = [one.where for page in PAGES for one in blocks(page) if one.language not in RUN + SHOWN]
    assert not wrong, f"blocks in a language that is neither run nor only shown: {', '.join(wrong)}"
