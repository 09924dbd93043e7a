from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastmerge import cli
from fastmerge.engine.report import PHASES
from tests.cli.conftest import CONFIG
from tests.cli.support import Run, command, process_environment, save_model


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# -- success


def test_a_merge_writes_a_hugging_face_directory_and_prints_the_closing_table(run: Run, family: Path) -> None:
    result = run("merge", "merge.yml", "out", "--shard-size", "3kB")
    assert result.returncode == 0, result.stderr
    for phase in PHASES:
        assert f"{phase.replace('_', '-')} " in result.stdout
    assert "GB/s" in result.stdout and "output" in result.stdout
    out = family / "out"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 3
    merged = {}
    for file in sorted(set(index["weight_map"].values())):
        merged |= load_file(out / file)
    base = load_file(family / "base" / "model.safetensors")
    assert {name: (value.shape, value.dtype) for name, value in merged.items()} == {
        name: (value.shape, value.dtype) for name, value in base.items()
    }
    assert any(not torch.equal(merged[name], base[name]) for name in base)
    manifest = json.loads((out / "manifest.json").read_text())
    for name, value in merged.items():
        raw = value.contiguous().view(torch.uint8).numpy().tobytes()
        assert manifest["tensors"][name]["blake3"] == blake3(raw).hexdigest()
    assert manifest["digest"] in result.stdout
    assert (out / "tokenizer.json").read_text() == '{"of": "base"}'
    assert "merge_method: ties" in (out / "README.md").read_text()
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 2


def test_json_is_one_object_and_nothing_else(run: Run, family: Path) -> None:
    result = run("merge", "merge.yml", "out", "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["method"], report["tensors"], report["passes"]) == ("ties", 4, 1)
    assert report["bytes_written"] == 2 * (64 * 16 + 2 * 48 * 16 + 16)
    assert set(PHASES) <= set(report["seconds"])
    # Start-up counts from the start of the process, and importing torch alone takes this long.
    assert report["seconds"]["total"] >= report["seconds"]["start_up"] > 0.1
    assert report["digest"] == json.loads((family / "out" / "manifest.json").read_text())["digest"]


def test_quiet_prints_nothing(run: Run, family: Path) -> None:
    result = run("merge", "merge.yml", "out", "--quiet")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert "model.safetensors" in names_in(family / "out")


def test_a_dry_run_prints_the_plan_and_makes_nothing(run: Run, family: Path) -> None:
    before = names_in(family)
    text = run("merge", "merge.yml", "out", "--dry-run")
    assert text.returncode == 0, text.stderr
    assert "passes" in text.stdout and "ties" in text.stdout
    plan = json.loads(run("merge", "merge.yml", "out", "--dry-run", "--json").stdout)
    assert plan["bytes_read"] == 3 * plan["bytes_written"]
    assert names_in(family) == before


@pytest.mark.parametrize(
    "options", [["--seed", "1"], ["--threads", "1"], ["--backend", "reference"], ["--shard-size", "1kB"]]
)
def test_options_reach_the_merge(run: Run, family: Path, options: list[str]) -> None:
    (family / "merge.yml").write_text(CONFIG.replace("ties", "dare_ties"))
    plain = json.loads(run("merge", "merge.yml", "plain", "--json").stdout)
    changed = json.loads(run("merge", "merge.yml", "changed", "--json", *options).stdout)
    assert (plain["digest"] != changed["digest"]) == (options[0] == "--seed")
    if options[0] == "--backend":
        assert changed["backend"] == "reference"
    if options[0] == "--shard-size":
        assert "model.safetensors.index.json" in names_in(family / "changed")


# -- refusals, with nothing read or written


def spoil(family: Path, what: str) -> list[str]:
    """Spoil the inputs in one way; return the arguments of the merge."""
    config, shard = family / "merge.yml", family / "two" / "model.safetensors"
    state = load_file(shard)
    if what == "missing config":
        config.unlink()
    elif what == "broken yaml":
        config.write_text("merge_method: [ties\n")
    elif what == "object in yaml":
        config.write_text("merge_method: !!python/object/apply:os.system ['touch pwned']\n")
    elif what == "misspelt key":
        config.write_text(CONFIG.replace("merge_method", "merge_metod"))
    elif what == "unknown method":
        config.write_text(CONFIG.replace("ties", "tise"))
    elif what == "bad density":
        config.write_text(CONFIG.replace("density: 0.5}", "density: 1.5}"))
    elif what == "no base":
        config.write_text(CONFIG.replace("base_model: ./base\n", ""))
    elif what == "missing model":
        config.write_text(CONFIG.replace("./two", "./three"))
    elif what == "truncated shard":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif what == "corrupt header":
        shard.write_bytes(b"\xff" * 64)
    elif what == "missing tensor":
        state.pop("model.norm.weight")
        save_model(family / "two", state)
    elif what == "other vocabulary":
        state["model.embed_tokens.weight"] = torch.zeros(65, 16, dtype=torch.bfloat16)
        save_model(family / "two", state)
    elif what == "target not empty":
        (family / "out").mkdir()
        (family / "out" / "precious").write_text("1")
    elif what == "unknown backend":
        return ["merge", "merge.yml", "out", "--backend", "cpuu"]
    elif what == "no such gpu":
        return ["merge", "merge.yml", "out", "--device", "cuda:99"]
    return ["merge", "merge.yml", "out"]


REFUSALS = {
    "missing config": "merge.yml",
    "broken yaml": "merge.yml",
    "object in yaml": "merge.yml",
    "misspelt key": "merge_method",
    "unknown method": "ties",
    "bad density": "density",
    "no base": "base",
    "missing model": "three",
    "truncated shard": "two/model.safetensors",
    "corrupt header": "two/model.safetensors",
    "missing tensor": "model.norm.weight",
    "other vocabulary": "model.embed_tokens.weight",
    "target not empty": "not empty",
    "unknown backend": "cpuu",
    "no such gpu": "'cuda:99' cannot be used: ",
}


@pytest.mark.parametrize("what", REFUSALS)
def test_bad_input_is_one_sentence_and_code_2_and_nothing_is_made(run: Run, family: Path, what: str) -> None:
    arguments = spoil(family, what)
    before = names_in(family)
    result = run(*arguments)
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    line = result.stderr.splitlines()[-1]
    assert line.startswith("fastmerge: ") and REFUSALS[what] in line
    assert "Traceback" not in result.stderr
    assert names_in(family) == before
    if what == "target not empty":
        assert names_in(family / "out") == ["precious"]


def test_errors_are_json_too_when_asked_for(run: Run, family: Path) -> None:
    for arguments in (["merge", "merge.yml", "out", "--json", "--threads", "0"], ["merge", "no.yml", "out", "--json"]):
        result = run(*arguments)
        error = json.loads(result.stdout)
        assert error["exit_code"] == result.returncode == 2
        assert f"fastmerge: {error['error']}\n" == result.stderr


def test_the_traceback_is_shown_when_asked_for(run: Run, family: Path) -> None:
    result = run("merge", "no.yml", "out", environment={"FASTMERGE_DEBUG": "1"})
    assert result.returncode == 2
    assert "Traceback" in result.stderr and "ConfigError" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("fastmerge: ")


# -- failures while running, with nothing left


def poison(family: Path) -> None:
    state = load_file(family / "two" / "model.safetensors")
    state["model.norm.weight"][3] = float("nan")
    save_file(state, family / "two" / "model.safetensors", metadata={"format": "pt"})


def test_a_nan_stops_the_merge_with_code_1_and_leaves_nothing(run: Run, family: Path) -> None:
    poison(family)
    before = names_in(family)
    result = run("merge", "merge.yml", "out")
    assert result.returncode == 1
    line = result.stderr.splitlines()[-1]
    assert line.startswith("fastmerge: ") and "model.norm.weight" in line and "NaN" in line
    assert names_in(family) == before


def test_a_nan_is_only_reported_or_replaced_when_asked_for(run: Run, family: Path) -> None:
    poison(family)
    for choice in ("warn", "zero"):
        result = run("merge", "merge.yml", choice, "--on-nonfinite", choice, "--json")
        assert result.returncode == 0, result.stderr
        (tensors,) = json.loads(result.stdout)["nonfinite"].values()
        assert tensors == {"model.norm.weight": [1, 0]}
        with safe_open(family / choice / "model.safetensors", framework="pt") as merged:
            value = merged.get_tensor("model.norm.weight")
        assert choice == "warn" or bool(torch.isfinite(value).all())


# Wraps the command line; in place of the real os.pwrite for tensor data, which begin at a later byte than the header.
WRAPPED = """
import errno, os, sys, time
real, mode = os.pwrite, sys.argv.pop(1)
def pwrite(descriptor, data, offset):
    if offset > 0 and mode == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if offset > 0 and mode == "slow":
        time.sleep(2)
    return real(descriptor, data, offset)
os.pwrite = pwrite
from fastmerge.cli import main
main()
"""


def wrapped(mode: str) -> list[str]:
    return [sys.executable, "-c", WRAPPED, mode, "merge", "merge.yml", "sub/out"]


@pytest.mark.parametrize("refused", ["stat", "glob", "is_dir"])
def test_files_that_vanish_while_memory_is_made_ready_are_the_merges_to_tell(
    refused: str, family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object, **__: object) -> None:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(Path, refused, gone)
    cli._prepare_memory([str(family / "base"), "~nobody-of-this-name/model"], "4GiB")


def test_a_full_disk_is_one_sentence_and_code_1_and_leaves_nothing(family: Path) -> None:
    before = names_in(family)
    result = subprocess.run(
        wrapped("full"), cwd=family, env=process_environment(), capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("fastmerge: ") and "the disk is full" in result.stderr
    assert "Traceback" not in result.stderr
    assert names_in(family) == before


@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, "Interrupted"), (signal.SIGTERM, "Terminated")])
def test_a_signal_ends_the_merge_with_one_line_and_leaves_nothing(
    family: Path, number: signal.Signals, word: str
) -> None:
    before = names_in(family)
    process = subprocess.Popen(
        wrapped("slow"),
        cwd=family,
        env=process_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Not ignored, as it is by all that a shell runs in the background.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    # The merge is under way when its temporary directory holds the shard that it cannot get done.
    while not list(family.glob("sub/.out.partial-*/model.safetensors")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.2)
    process.send_signal(number)
    sent = time.monotonic()
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert stderr.splitlines()[-1] == f"fastmerge: {word}; nothing was left behind."
    assert "Traceback" not in stderr and stdout == ""
    assert names_in(family) == before
    assert time.monotonic() - sent < 10


def test_an_ignored_interrupt_stays_ignored(family: Path) -> None:
    # What `nohup` and shells do to jobs in the background.
    code = "import signal, subprocess, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); subprocess.run(sys.argv[1:])"
    inner = """
import os
from fastmerge.cli_run import signals_as_exceptions
with signals_as_exceptions():
    os.kill(os.getpid(), 2)
    print("alive")
"""
    result = subprocess.run(
        [sys.executable, "-c", code, sys.executable, "-c", inner],
        env=process_environment(),
        capture_output=True,
        text=True,
    )
    assert result.stdout == "alive\n"


def test_python_m_fastmerge_is_the_command_line(family: Path) -> None:
    result = subprocess.run(command("--version"), env=process_environment(), capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.startswith("fastmerge ")
