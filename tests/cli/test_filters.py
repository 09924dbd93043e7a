from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastmerge import cli, filtering, ops
from tests.cli.support import Run, save_model

SHAPES = {
    "model.embed_tokens.weight": (640, 64),
    "model.layers.0.self_attn.q_proj.weight": (64, 64),
    "model.layers.0.self_attn.q_proj.bias": (64,),
    "model.layers.0.mlp.up_proj.weight": (172, 64),
    "model.layers.0.mlp.down_proj.weight": (64, 172),
    "model.layers.0.input_layernorm.weight": (64,),
    "encoder.SelfAttention.relative_attention_bias.weight": (32, 8),
    "visual.conv1.weight": (8, 3, 4, 4),
    "lm_head.weight": (640, 64),
}
FILTERED = [name for name in SHAPES if "proj.weight" in name]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_model(tmp_path / "model", {name: torch.zeros(shape) for name, shape in SHAPES.items()})
    return tmp_path / "model"


def told(model: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    assert cli.run(["filters", str(model), "--json", *arguments]) == 0
    report: dict[str, object] = json.loads(capsys.readouterr().out)
    return report


def test_attention_and_mlp_weights_are_listed_with_their_routes(run: Run, model: Path) -> None:
    result = run("filters", model, "--ratio", "0.9", "--mode", "official")
    assert result.returncode == 0 and result.stderr == ""
    heading, *rows, total = result.stdout.splitlines()
    assert heading.split() == ["WEIGHT", "SHAPE", "ROUTE", "RANK", "DROPPED", "COLUMNS", "MS"]
    assert sorted(row.split()[0] for row in rows) == sorted(FILTERED)
    for row in rows:
        name = row.split()[0]
        plan = ops.highpass_plan(SHAPES[name], 0.9, mode="official")
        assert f"{plan.height} x {plan.width}" in row and f" {plan.route} " in row
        assert row.split()[-1] == f"{1e3 * plan.seconds:.1f}"
    assert total.startswith("3 weights, official 0.9: ")


@pytest.mark.parametrize("mode", ["ideal", "official"])
def test_json_and_the_modes_ratios(model: Path, mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = told(model, capsys, "--mode", mode)
    assert (report["mode"], report["ratio"]) == (mode, filtering.RATIOS[mode])
    weights = report["weights"]
    assert isinstance(weights, list)
    assert {each["name"] for each in weights} == set(FILTERED)
    for each in weights:
        plan = ops.highpass_plan(each["shape"], filtering.RATIOS[mode], mode=mode)
        assert {key: each[key] for key in ("route", "rank", "columns", "seconds", "workspace")} == {
            key: getattr(plan, key) for key in ("route", "rank", "columns", "seconds", "workspace")
        }
    assert report["seconds"] == sum(each["seconds"] for each in weights)


def test_patterns_choose_and_only_matrices_are_taken(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = told(model, capsys, "--include", "embed", "--include", "norm|conv|down")
    names = [each["name"] for each in report["weights"]]  # type: ignore[attr-defined]
    assert sorted(names) == ["model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight"]


def test_what_is_not_merged_is_not_filtered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {
        "layers.0.attn.relative_position_index": torch.zeros(49, 49, dtype=torch.int64),
        "layers.0.attn.qkv.weight": torch.zeros(96, 32),
    }
    save_model(tmp_path / "swin", tensors)
    report = told(tmp_path / "swin", capsys)
    assert [each["name"] for each in report["weights"]] == ["layers.0.attn.qkv.weight"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--include", "("], "--include holds '(', which is not a regular expression"),
        (["--include", "norm"], "has no matrix that is filtered: 6 of its 9 tensors are matrices, such as"),
        (["--mode", "idle"], "--mode must be ideal or official, not 'idle'"),
        (["--ratio", "1.5"], "ratio=1.5 is outside [0, 1]"),
        (["--ratio", "nan"], "ratio=nan is not finite"),
    ],
)
def test_what_is_wrong_is_told(
    model: Path, arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["filters", str(model), *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_a_checkpoint_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert cli.run(["filters", str(tmp_path / "empty")]) == 2
    assert "has no weights" in capsys.readouterr().err
