"""`fastmerge-yaml` beside `mergekit-yaml`: the same YAML, the same directories, and who merged what."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from fastmerge import integrations
from tests.compat.mergekit_calls import RELEASE
from tests.compat.mergekit_peer import tied_positions
from tests.compat.test_mergekit_cli import read

pytest.importorskip("mergekit", reason="no mergekit (the extra `peers`)")

ROOT = Path(__file__).resolve().parents[2]
inside = integrations.mergekit

MERGES = {
    "ties": {"weight": [0.2, 0.9], "density": 0.5},
    "breadcrumbs_ties": {"weight": 0.6, "density": 0.4, "gamma": 0.05},
    "task_arithmetic": {"weight": [{"filter": "mlp", "value": 0.3}, {"value": 0.8}], "lambda": 0.7},
    "linear": {"weight": 0.5},
    "della": {"weight": 0.7, "density": 0.5, "epsilon": 0.1},
    "dare_linear": {"weight": 0.7, "density": 0.3},
}


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """The tiny family: a Llama of three layers and two fine-tunes."""
    from make_family import make_family

    return make_family(tmp_path_factory.mktemp("family"), scale="tiny", dtype="bfloat16", models=2)


@pytest.fixture(autouse=True)
def _off_afterwards():
    yield
    inside.disable()


def config(family, folder: Path, method: str, **parameters: object) -> Path:
    content = {
        "merge_method": method,
        "models": [{"model": str(model)} for model in family.models],
        "parameters": {**MERGES.get(method, {}), **parameters},
        "dtype": "bfloat16",
    }
    if method != "linear":
        content["base_model"] = str(family.base)
    path = folder / "merge.yml"
    path.write_text(yaml.safe_dump(content))
    return path


def run_ours(*arguments: object) -> int:
    """The command in this process, for mergekit takes seconds to import. Its exit code."""
    from fastmerge.integrations.mergekit.command import main

    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return int(end.value.code or 0)


def run_theirs(*arguments: object) -> None:
    from mergekit.scripts.run_yaml import main

    assert not inside.enabled()
    main([str(argument) for argument in arguments], standalone_mode=False)


@pytest.mark.parametrize("method", MERGES)
def test_the_directory_is_mergekits(method, family, tmp_path, capfd):
    file = config(family, tmp_path, method)
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    run_theirs(file, theirs, "--quiet", "--out-shard-size", "50K")
    capfd.readouterr()
    assert run_ours(file, ours, "--out-shard-size", "50K") == 0
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("fastmerge-yaml:")]
    expected, actual = read(theirs), read(ours)
    (line,) = said
    assert line.endswith(f": {len(expected)} by {method}")
    assert inside.tally().merged == {method: len(expected)}
    names = {path.name for path in theirs.iterdir()}
    assert {path.name for path in ours.iterdir()} == names
    assert len([name for name in names if name.endswith(".safetensors")]) > 1
    for name in names:
        if not name.endswith(".safetensors") and name != "README.md":
            assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    assert expected.keys() == actual.keys()
    if method in ("della", "dare_linear"):
        return  # other elements are dropped: see below
    base, models = read(family.base), [read(folder) for folder in family.models]
    parameters = MERGES[method]
    for name, tensor in expected.items():
        density = [float(parameters.get("density", 1.0))] * 2
        tied = tied_positions(method, base[name], [model[name] for model in models], density, [0.05, 0.05])
        assert not ((actual[name] != tensor) & ~tied).any(), name
        assert actual[name].dtype == tensor.dtype


@pytest.mark.parametrize("method", ["della", "dare_linear", "ties"])
@pytest.mark.parametrize("seed", [None, 7])
def test_the_tensors_are_those_of_fastmerge_merge(method, seed, family, tmp_path):
    from fastmerge.cli import run

    file = config(family, tmp_path, method)
    ours, alone = tmp_path / "ours", tmp_path / "alone"
    assert run_ours(file, ours, "--quiet", *([] if seed is None else ["--random-seed", seed])) == 0
    assert run(["merge", str(file), str(alone), "--numerics", "mergekit", "--quiet", "--seed", str(seed or 0)]) == 0
    merged, expected = read(ours), read(alone)
    assert merged.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged.items())


def test_another_seed_drops_other_elements(family, tmp_path):
    file = config(family, tmp_path, "della")
    for seed in (1, 2):
        assert run_ours(file, tmp_path / str(seed), "--quiet", "--random-seed", seed) == 0
    one, two = read(tmp_path / "1"), read(tmp_path / "2")
    assert all(not torch.equal(tensor, two[name]) for name, tensor in one.items() if tensor.dim() == 2)


@pytest.mark.parametrize("method", ["pcb", "fr"])
def test_added_methods_merge_whole_models_tensor_by_tensor(method, family, tmp_path):
    from fastmerge.cli import run

    file = config(family, tmp_path, method, weight=0.8)
    assert run_ours(file, tmp_path / "ours", "--quiet") == 0
    content = yaml.safe_load(file.read_text())
    if method == "pcb":
        content["parameters"]["scope"] = "tensor"
    alone = tmp_path / "alone.yml"
    alone.write_text(yaml.safe_dump(content))
    assert run(["merge", str(alone), str(tmp_path / "alone"), "--quiet"]) == 0
    merged, expected = read(tmp_path / "ours"), read(tmp_path / "alone")
    assert merged.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged.items())


@pytest.mark.skipif(RELEASE == "0.1.4", reason="its YAML takes no words as parameters")
def test_scope_model_is_refused_before_anything_is_read_or_written(family, tmp_path, capfd):
    file = config(family, tmp_path, "pcb", scope="model")
    from fastmerge.integrations.mergekit.command import main

    with pytest.raises(ValueError, match="run the same YAML with `fastmerge merge`"):
        main([str(file), str(tmp_path / "out")])
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


def test_what_is_left_to_mergekit_is_said(family, tmp_path, capfd):
    # (0.0 times infinity is NaN: mergekit writes it.)
    file = config(family, tmp_path, "task_arithmetic", weight=float("inf"))
    assert run_ours(file, tmp_path / "ours") == 0
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("fastmerge-yaml:")]
    count = len(read(tmp_path / "ours"))
    assert said[0] == "fastmerge-yaml: no tensor was merged by fastmerge"
    (left,) = said[1:]
    assert left.startswith(f"fastmerge-yaml: {count} tensor(s) of task_arithmetic left to mergekit's own function: ")
    assert "weight = inf" in left


def test_help_and_mistakes_are_mergekits(tmp_path, capfd):
    assert run_ours("--help") == 0
    shown = capfd.readouterr().out
    assert "fastmerge-yaml" in shown and "--lora-merge-cache" in shown
    assert run_ours("only-one-argument") == 2
    assert "OUT_PATH" in capfd.readouterr().err
    assert run_ours("a", "b", "--no-such-flag") == 2


def test_an_unknown_mergekit_is_refused_in_a_sentence(monkeypatch, capfd):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "9.9")
    assert run_ours("a", "b") == 2
    assert capfd.readouterr().err.startswith("fastmerge-yaml: mergekit 9.9 is not known")


def test_threads_are_as_many_as_mergekit_is_told(family, tmp_path, monkeypatch):
    from fastmerge.backends import cpu

    asked: list[int] = []
    monkeypatch.setattr(cpu, "set_threads", asked.append)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(torch, "set_num_interop_threads", lambda count: None)
    assert run_ours(config(family, tmp_path, "linear"), tmp_path / "out", "--quiet", "--num-threads", 1) == 0
    assert asked == [1]


def test_the_installed_command_merges_in_a_process_of_its_own(family, tmp_path):
    (module,) = re.findall(r'^fastmerge-yaml = "([\w.]+):main"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    file = config(family, tmp_path, "ties")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", module, str(file), str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"{len(read(tmp_path / 'out'))} by ties" in done.stderr
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"
