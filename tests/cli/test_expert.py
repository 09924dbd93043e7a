"""`fastmerge expert`: what it writes, what it says, how it ends, and that nothing is left half-written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastmerge import experts, ops
from tests.cli.support import Run, save_model
from tests.numeric import assert_bitwise_equal


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def expert(family: Path) -> Path:
    out = family / "one.safetensors"
    experts.extract_to_file(family / "base", family / "one", out, keep=0.13)
    return out


def test_what_is_extracted_is_what_the_ops_extract(run: Run, family: Path) -> None:
    result = run("expert", "extract", "base", "one", "-o", "one.safetensors", "--keep", "0.13")
    assert result.returncode == 0, result.stderr
    base, one = tensors(family / "base"), tensors(family / "one")
    loaded = experts.load(family / "one.safetensors")
    assert set(loaded.tensors) == set(base)
    for name, x in one.items():
        expected = ops.extract_expert(x, 0.13, base=base[name])
        assert_bitwise_equal(loaded.tensors[name].dense(), expected.dense())
    in_memory = experts.extract_expert(base, one, keep=0.13)
    assert in_memory.about.tensors == loaded.about.tensors and in_memory.about.mu == loaded.about.mu


def test_put_on_and_taken_out_again(run: Run, family: Path, expert: Path) -> None:
    result = run("expert", "apply", "two", "one.safetensors", "-o", "worn", "--scale", "0.5", "--shard-size", "3kB")
    assert result.returncode == 0, result.stderr
    assert {"tokenizer.json", "config.json", "README.md", "manifest.json", "expert.restore"} <= left(family / "worn")
    whole = experts.load(expert)
    two, worn = tensors(family / "two"), tensors(family / "worn")
    for name, x in two.items():
        expected = x.clone()
        whole.tensors[name].apply_(expected, 0.5 * whole.about.mu)
        assert_bitwise_equal(worn[name], expected)
    assert "fastmerge expert apply two one.safetensors" in (family / "worn" / "README.md").read_text()

    result = run("expert", "remove", "worn", "-o", "back", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["changed_tensors"] == sum(one.k > 0 for one in whole.tensors.values())
    for name, x in tensors(family / "back").items():
        assert_bitwise_equal(x, two[name])
    assert "expert.restore" not in left(family / "back")


def test_two_experts_are_taken_out_in_the_other_order(run: Run, family: Path, expert: Path) -> None:
    assert run("expert", "apply", "two", "one.safetensors", "-o", "w1").returncode == 0
    assert run("expert", "apply", "w1", "one.safetensors", "-o", "w2", "--no-rescale", "--scale", "-1").returncode == 0
    assert run("expert", "remove", "w2", "-o", "b1").returncode == 0
    assert run("expert", "remove", "b1", "-o", "b0", "--restore", "w1/expert.restore").returncode == 0
    for name, x in tensors(family / "b0").items():
        assert_bitwise_equal(x, tensors(family / "two")[name])


def test_info(run: Run, family: Path) -> None:
    assert run("expert", "extract", "base", "one", "-o", "e", "--keep", "0.07", "--exclude", "embed").returncode == 0
    result = run("expert", "info", "e")
    assert result.returncode == 0 and result.stderr == ""
    assert "0.07 of each row: 97 elements of 3 tensors" in result.stdout
    facts = json.loads(run("expert", "info", "e", "--json").stdout)
    assert (facts["keep"], facts["tensors"], facts["kept"], facts["empty_rows"]) == (0.07, 3, 97, 0)


def test_rows_too_narrow_are_told(run: Run, family: Path) -> None:
    result = run("expert", "extract", "base", "one", "-o", "e", "--keep", "0.01")
    assert result.returncode == 0
    assert "161 of 161 rows, too narrow" in result.stdout
    assert json.loads(run("expert", "info", "e", "--json").stdout)["empty_rows"] == 161


def test_include_and_exclude(run: Run, family: Path) -> None:
    arguments = ("--include", "layers", "--include", "norm", "--exclude", r"layers\.1", "--keep", "0.2", "--json")
    report = json.loads(run("expert", "extract", "base", "one", "-o", "e", *arguments).stdout)
    assert report["tensors"] == 2 and report["notes"] == []
    assert set(experts.load(family / "e").tensors) == {"model.layers.0.mlp.up_proj.weight", "model.norm.weight"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("extract", "base", "one", "-o", "e", "--keep", "0"), "--keep must lie between 0 and 1"),
        (("extract", "base", "one", "-o", "base"), "exists"),
        (("extract", "base", "one", "-o", "no/e"), "not a directory"),
        (("extract", "base", "none", "-o", "e"), "none"),
        (("extract", "base", "one", "-o", "e", "--include", "("), "not a regular expression"),
        (("extract", "base", "one", "-o", "e", "--include", "nothing"), "no tensor of numbers is left"),
        (("apply", "two", "base/model.safetensors", "-o", "w"), "is not an expert"),
        (("apply", "two", "one.safetensors", "-o", "base"), "not empty"),
        (("apply", "two", "one.safetensors", "-o", "w", "--scale", "nan"), "not finite"),
        (("apply", "two", "one.safetensors", "-o", "w", "--scale", "1e39"), "not finite in float32"),
        (("apply", "small", "one.safetensors", "-o", "w"), "belongs to|of another model"),
        (("remove", "two", "-o", "w"), "expert.restore does not exist"),
        (("remove", "two", "-o", "w", "--restore", "one.safetensors"), "is an expert, not the old bits"),
        (("info", "base/config.json"), "base/config.json"),
        (("info",), "Missing argument"),
    ],
)
def test_what_is_wrong_is_said_in_a_line_and_nothing_is_written(
    run: Run, family: Path, expert: Path, arguments: tuple[str, ...], message: str
) -> None:
    save_model(family / "small", {name: x[:8] for name, x in tensors(family / "two").items()})
    before = left(family)
    result = run("expert", *arguments)
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if not line.startswith("fastmerge: reading")]
    assert len(lines) == 1 and any(part in lines[0] for part in message.split("|")), result.stderr
    assert left(family) == before


def test_a_model_changed_since_is_refused(run: Run, family: Path, expert: Path) -> None:
    assert run("expert", "apply", "two", "one.safetensors", "-o", "worn").returncode == 0
    changed = tensors(family / "worn")
    changed["model.norm.weight"][0] += 1
    save_file(changed, family / "worn" / "model.safetensors", {"format": "pt"})
    before = left(family)
    result = run("expert", "remove", "worn", "-o", "back", "--json")
    assert result.returncode == 1
    assert "'model.norm.weight' of worn is not what" in json.loads(result.stdout)["error"]
    assert left(family) == before


def test_nan_in_a_delta_is_refused(run: Run, family: Path) -> None:
    broken = tensors(family / "one")
    broken["model.norm.weight"][3] = torch.inf
    save_model(family / "broken", broken)
    before = left(family)
    result = run("expert", "extract", "base", "broken", "-o", "e", "--keep", "0.2")
    assert result.returncode == 1 and "NaN or Inf in what broken changed in 'model.norm.weight'" in result.stderr
    assert left(family) == before


def test_every_option_is_on_the_page() -> None:
    import typer

    from fastmerge.cli_expert import app

    group = typer.main.get_command(app)
    page = (Path(__file__).parents[2] / "docs" / "experts.md").read_text()
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        assert f"fastmerge expert {name} " in page
        for parameter in command.params:
            assert all(f"`{option}" in page for option in parameter.opts if option.startswith("--"))
