"""The family that the benchmarks merge: its bytes, its shape, and that both tools take it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open


def read(folder):
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            tensors |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    return tensors


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    from make_family import make_family

    return make_family(tmp_path_factory.mktemp("family"), scale="tiny")


def test_the_full_family_has_the_size_that_the_figures_are_stated_for():
    import math

    from make_family import SCALES, plan_shards, tensor_shapes

    shapes = tensor_shapes(SCALES["full"])
    parameters = sum(math.prod(shape) for shape in shapes.values())
    assert 0.545e9 < parameters < 0.555e9
    shards = plan_shards(shapes, 2, SCALES["full"].shard_bytes)
    assert [name for shard in shards for name in shard] == list(shapes)
    assert all(sum(math.prod(shapes[name]) * 2 for name in shard) <= 500_000_000 for shard in shards)
    assert len(shards) == 3


def test_every_model_is_sharded_indexed_and_finite(family):
    names = None
    for folder in family.folders:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        tensors = read(folder)
        assert len(set(index["weight_map"].values())) > 1
        assert set(index["weight_map"]) == set(tensors)
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
        assert sum(tensor.numel() for tensor in tensors.values()) == family.parameters
        assert all(tensor.dtype == torch.bfloat16 and bool(tensor.isfinite().all()) for tensor in tensors.values())
        assert names in (None, list(tensors))
        names = list(tensors)


def test_deltas_are_small_heavy_tailed_and_tie_as_those_of_bf16_checkpoints_do(family):
    base = read(family.base)
    for folder in family.models:
        tuned = read(folder)
        name = "lm_head.weight"
        delta = (tuned[name].float() - base[name].float()).flatten()
        magnitude = delta.abs()
        assert 0.05 < float((delta == 0).float().mean()) < 0.4
        assert float(delta.std()) < 0.1 * float(base[name].float().std())
        assert float(delta.pow(4).mean() / delta.pow(2).mean() ** 2) > 6  # a normal distribution has 3
        assert magnitude.unique().numel() < delta.numel() / 10  # float32 deltas would hardly ever be equal


def test_the_bytes_depend_on_the_seed_and_not_on_the_threads(tmp_path):
    from make_family import make_family

    one = make_family(tmp_path / "one", scale="tiny", models=1, threads=1)
    many = make_family(tmp_path / "many", scale="tiny", models=1, threads=4)
    other = make_family(tmp_path / "other", scale="tiny", models=1, seed=1)
    for first, second, third in zip(one.weight_files(), many.weight_files(), other.weight_files(), strict=True):
        assert first.read_bytes() == second.read_bytes()
        assert first.read_bytes() != third.read_bytes()


def test_a_family_that_is_there_is_kept_and_one_of_another_kind_replaced(tmp_path):
    from make_family import make_family

    family = make_family(tmp_path, scale="tiny", models=1)
    times = [file.stat().st_mtime_ns for file in family.weight_files()]
    assert times == [file.stat().st_mtime_ns for file in make_family(tmp_path, scale="tiny", models=1).weight_files()]
    make_family(tmp_path, scale="tiny", models=1, dtype="float32")
    assert all(tensor.dtype == torch.float32 for tensor in read(family.base).values())


def test_transformers_loads_model_and_tokenizer(family):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, report = AutoModelForCausalLM.from_pretrained(family.models[0], output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert sum(parameter.numel() for parameter in model.parameters()) == family.parameters
    assert AutoTokenizer.from_pretrained(family.base)("w1 w2")["input_ids"] == [4, 5]


def config(family, path):
    models = [{"model": str(folder), "parameters": {"weight": 0.5, "density": 0.5}} for folder in family.models]
    content = {"merge_method": "ties", "base_model": str(family.base), "models": models, "dtype": "bfloat16"}
    path.write_text(json.dumps(content))
    return path


def test_fastmerge_accepts_the_family(family, tmp_path):
    from fastmerge.cli import run

    assert run(["merge", str(config(family, tmp_path / "config.yml")), str(tmp_path / "out"), "--quiet"]) == 0
    assert set(read(tmp_path / "out")) == set(read(family.base))


def test_the_peer_accepts_the_family(family, tmp_path):
    peer = pytest.importorskip("mergekit.scripts.run_yaml", reason="no mergekit (the extra `peers`) to accept it")
    arguments = [str(config(family, tmp_path / "config.yml")), str(tmp_path / "out"), "--quiet"]
    peer.main(arguments, standalone_mode=False)
    assert set(read(tmp_path / "out")) == set(read(family.base))
