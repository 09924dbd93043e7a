"""`fastmerge verify`: its exit codes, its table and its JSON; without mergekit, a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastmerge import cli
from tests.cli.support import Run

NAMES = {"model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"}


@pytest.fixture
def here(family: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The family's directory, and this process in it."""
    monkeypatch.chdir(family)
    return family


def test_a_right_merge_is_a_table_and_code_0_and_writes_its_json_alone(here: Path, run: Run) -> None:
    pytest.importorskip("mergekit", reason="no mergekit (the extra `peers`)")
    before = {*here.rglob("*")}
    result = run("verify", "merge.yml", "--tensors", 3, "--json", "report.json")
    assert result.returncode == 0, result.stderr
    assert {*here.rglob("*")} - before == {here / "report.json"}
    lines = result.stdout.splitlines()
    assert lines[0] == "ties, numerics fp32, beside mergekit 0.1.5"
    assert lines[1].split() == ["TENSOR", "ELEMENTS", "DIFFER", "LARGEST", "ULPS", "RELATIVE", "WHY"]
    assert lines[2].startswith("model.embed_tokens.weight ") and " right " in lines[2]
    assert lines[-1].endswith("; all within what is promised")
    report = json.loads((here / "report.json").read_text())
    assert report["method"] == "ties" and report["numerics"] == "fp32" and report["wrong"] == []
    assert {row["name"] for row in report["tensors"]} <= NAMES | {"model.layers.1.mlp.up_proj.weight"}
    assert len(report["tensors"]) == 3 and report["tensors_merged"] == 4
    assert report["differ"] == sum(row["differ"] for row in report["tensors"]) > 0
    for reason in report["reasons"].values():
        assert reason["elements"] > 0 and reason["means"]


def test_a_wrong_merge_is_code_1_with_the_tensors_name(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mergekit", reason="no mergekit (the extra `peers`)")
    from fastmerge.methods.ties import Ties

    monkeypatch.setattr(Ties, "election", False)
    assert cli.run(["verify", "merge.yml", "--numerics", "mergekit"]) == 1
    said = capsys.readouterr().out
    assert " WRONG " in said and "unexplained" in said
    last = said.splitlines()[-1]
    assert "more than is promised in " in last and "model.norm.weight" in last
    assert cli.run(["verify", "merge.yml", "--numerics", "mergekit", "--quiet"]) == 1
    assert capsys.readouterr().out == ""


def test_a_method_that_mergekit_lacks_is_a_sentence_and_code_0(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mergekit", reason="no mergekit (the extra `peers`)")
    text = (here / "merge.yml").read_text().replace("ties", "pcb")
    (here / "pcb.yml").write_text(text)
    assert cli.run(["verify", "pcb.yml"]) == 0
    assert "mergekit 0.1.5 has no method pcb, so there is nothing to compare it with." in capsys.readouterr().out


def test_random_methods_tell_what_each_model_keeps(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mergekit", reason="no mergekit (the extra `peers`)")
    (here / "dare.yml").write_text((here / "merge.yml").read_text().replace("ties", "dare_ties"))
    assert cli.run(["verify", "dare.yml"]) == 0
    said = capsys.readouterr().out
    assert "./one keeps 0." in said and "in mergekit, of 0.5 asked for" in said and "\ndraws: " in said


def test_without_mergekit_it_says_what_to_install(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib.metadata

    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert cli.run(["verify", "merge.yml"]) == 2
    assert "pip install mergekit==0.1.5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify"], "Missing argument 'CONFIG.yml'"),
        (["verify", "no.yml"], "no.yml does not exist"),
        (["verify", "merge.yml", "--tensors", "0"], "--tensors"),
        (["verify", "merge.yml", "--numerics", "fp64", "--json", "r.json"], "fp64"),
        (["verify", "merge.yml", "--json", "no/r.json"], "--json names no/r.json, which cannot be written"),
        (["verify", "merge.yml", "--json", "base"], "--json names base, which cannot be written"),
        (["verify", "wrong.yml"], "wrong.yml, line 5: ties has no parameter densty; did you mean density?"),
    ],
)
def test_mistakes_are_one_line_and_code_2(
    here: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "wrong.yml").write_text((here / "merge.yml").read_text().replace("density", "densty"))
    assert cli.run(arguments) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1 and message in told.err


def test_inputs_with_nan_fail_as_in_a_merge(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mergekit", reason="no mergekit (the extra `peers`)")
    from safetensors.torch import load_file, save_file

    tensors = load_file(here / "one" / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, here / "one" / "model.safetensors", metadata={"format": "pt"})
    assert cli.run(["verify", "merge.yml"]) == 1
    assert "'model.norm.weight'" in capsys.readouterr().err
