from __future__ import annotations

import platform
import subprocess

import pytest
import torch

from fastmerge import backends, cli, methods
from tests.cli.support import Run, command, process_environment


def test_methods_lists_every_method_with_its_source(run: Run) -> None:
    result = run("methods")
    assert result.returncode == 0 and result.stderr == ""
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == methods.names()
    assert all(methods.describe(line.split()[0])["source"] in line for line in lines[1:])


@pytest.mark.parametrize("name", methods.names())
def test_one_method_is_shown_with_each_parameter_its_default_and_range(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["methods", name]) == 0
    text = capsys.readouterr().out
    described = methods.describe(name)
    assert described["source"] in text and described["passes"] in text
    rows = {line.split()[0]: line for line in text.splitlines() if line}
    for parameter in described["parameters"]:
        row = rows[parameter["name"]]
        assert parameter["help"] in row and parameter["range"] in row
        assert ("per model" in row) == parameter["per_model"]
        assert ("required" in row) == parameter["required"]


def test_env_names_versions_threads_and_every_backend(run: Run) -> None:
    result = run("env")
    assert result.returncode == 0 and result.stderr == ""
    lines = result.stdout.splitlines()
    shown = [line.split()[0] for line in lines]
    for key in ("fastmerge", "python", "torch", "system", "processor", "instructions", "threads"):
        assert shown.count(key) == 1
    assert "gpu" in shown
    tensors = {line.split()[0]: line for line in lines if line.split()[1] == "tensors"}
    assert f"ops run on {backends.name_of(backends.resolve())}, the fastest that works" in tensors["CPU"]
    assert ("none here: " in tensors["CUDA"]) == (not torch.cuda.is_available())
    assert platform.python_version() in result.stdout
    for name, reason in backends.available().items():
        line = next(line for line in lines if line.startswith(f"backend {name} "))
        # Here CUDA's kernels may be emulated; the process has no variable that would ask for that.
        works = reason is None and (name != "cuda" or torch.cuda.is_available())
        assert "works on " in line if works else "missing: " in line
    assert "no such variable is set" in result.stdout


def test_env_shows_the_variables_in_force(run: Run) -> None:
    result = run("env", environment={"FASTMERGE_THREADS": "1", "FASTMERGE_BACKEND": "reference"})
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["FASTMERGE_THREADS", "1"] in lines and ["FASTMERGE_BACKEND", "reference"] in lines
    assert "ops run on reference, since FASTMERGE_BACKEND names it" in result.stdout


def test_env_survives_a_forced_instruction_set_that_does_not_exist(run: Run) -> None:
    result = run("env", environment={"FASTMERGE_ISA": "mmx"})
    assert result.returncode == 0
    assert "mmx" in result.stdout and "Traceback" not in result.stderr


def test_output_that_nobody_reads_to_the_end_is_no_error_message() -> None:
    process = subprocess.Popen(
        command("methods"), env=process_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(60) == 1
