from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.cli.support import Run, command, process_environment

RUNS = 5


def seconds_of(arguments: list[str]) -> float:
    """Processor time of one run: what it takes on a machine that does nothing else, whatever else this one does."""
    process = subprocess.Popen(command(*arguments), env=process_environment(), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize("arguments", [["--help"], ["merge", "--help"], ["--version"]])
def test_help_answers_at_once(arguments: list[str]) -> None:
    """0.1 to 0.3 s, by the machine and what else it does; importing torch alone takes longer than this bound."""
    assert min(seconds_of(arguments) for _ in range(RUNS)) < 0.8


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["merge", "--help"],
        ["merge"],
        ["merge", "no.yml", "out"],
        ["expert", "--help"],
        ["expert", "extract", "a", "b", "-o", "c", "--keep", "2"],
        ["expert", "apply", "a", "b", "-o", "c", "--shard-size", "x"],
        ["verify", "--help"],
        ["verify", "no.yml"],
        ["evolve", "no.yml", "out"],
        ["sweep", "no.yml", "out"],
    ],
)
def test_neither_help_nor_a_wrong_command_line_imports_torch(arguments: list[str]) -> None:
    code = (
        f"import sys; from fastmerge.cli import run; run({arguments!r}); print('torch' in sys.modules, file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], env=process_environment(), capture_output=True, text=True)
    assert result.stderr.splitlines()[-1] == "False"


def test_help_lists_the_commands_there_are_and_no_others(run: Run) -> None:
    result = run("--help")
    assert result.returncode == 0
    for present in ("merge", "methods", "env", "bench", "expert", "evolve", "sweep"):
        assert f" {present} " in result.stdout
    for absent in ("inspect", "pcb", "resume "):
        assert absent not in result.stdout + run("merge", "--help").stdout


def test_merge_help_lists_every_option(run: Run) -> None:
    text = run("merge", "--help").stdout
    for option in (
        "--device", "--memory-budget", "--shard-size", "--numerics", "--seed", "--backend", "--threads",
        "--dry-run", "--on-nonfinite", "--quiet", "--json", "--gpu-memory",
    ):  # fmt: skip
        assert f"{option} " in text
    assert "4GiB" in text and "5GB" in text and "fp32|mergekit" in text and "error|warn|zero" in text


def test_without_a_command_the_help_is_shown_and_the_code_is_2(run: Run) -> None:
    result = run()
    assert result.returncode == 2
    assert "Usage: fastmerge" in result.stdout and result.stderr == ""


def test_the_version_is_one_line(run: Run) -> None:
    result = run("--version")
    assert result.returncode == 0
    assert result.stdout.startswith("fastmerge ") and result.stdout.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["marge"], "No such command 'marge'"),
        (["merge"], "Missing argument 'CONFIG.yml'"),
        (["merge", "a.yml"], "Missing argument 'OUT'"),
        (["merge", "a.yml", "out", "--densty", "1"], "--densty"),
        (["merge", "a.yml", "out", "--device", "gpu"], "--device must be auto, cpu, cuda or cuda:N"),
        (["merge", "a.yml", "out", "--device", "cuda", "--gpu-memory", "8G"], "'8G' is ambiguous"),
        (["merge", "a.yml", "out", "--numerics", "fp64"], "fp64"),
        (["merge", "a.yml", "out", "--on-nonfinite", "ignore"], "ignore"),
        (["merge", "a.yml", "out", "--threads", "0"], "--threads"),
        (["merge", "a.yml", "out", "--seed", "x"], "--seed"),
        (["merge", "a.yml", "out", "--memory-budget", "4G"], "'4G' is ambiguous"),
        (["merge", "a.yml", "out", "--shard-size", "0"], "--shard-size must be between"),
        (["methods", "tis"], "did you mean ties?"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_code_2(run: Run, arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("fastmerge: ") and result.stderr.count("\n") == 1
    assert message in result.stderr
