"""The same YAML files through `mergekit-yaml` and `fastmerge merge --numerics mergekit`: the same output directories.

Both command lines run inside this process, because mergekit takes seconds to start.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open

from tests.compat.mergekit_peer import tied_positions

pytest.importorskip("mergekit", reason="no mergekit (the extra `peers`); tests/methods has each method's formula")

LAYERS = 3
MODELS = 3

Density = Callable[[str, int], float]
"""The density for a tensor's name and a model's place, worked out by hand for the case at hand."""


def keep_all(name: str, model: int) -> float:
    """What the methods without a density have."""
    return 1.0


def layer(name: str) -> int:
    """The layer a tensor belongs to; mergekit counts tensors outside the layers to the first."""
    parts = name.split(".")
    return int(parts[2]) if parts[1] == "layers" else 0


@dataclass
class Merge:
    """A YAML file: its method, what it says besides the models, and what tied positions follow from."""

    method: str
    models: list[dict[str, object]]
    parameters: dict[str, object] = field(default_factory=dict)
    dtype: str = "bfloat16"
    family: str = "bfloat16"
    extra: dict[str, str] = field(default_factory=dict)
    density: Density = keep_all
    gamma: float = 0.01
    has_base: bool = True

    def text(self, family) -> str:
        content: dict[str, object] = {"merge_method": self.method, "dtype": self.dtype, **self.extra}
        if self.has_base:
            content["base_model"] = str(family.base)
        content["models"] = [
            {"model": str(folder), "parameters": given} if given else {"model": str(folder)}
            for folder, given in zip(family.models, self.models, strict=False)
        ]
        if self.parameters:
            content["parameters"] = self.parameters
        return yaml.safe_dump(content, sort_keys=False)


MERGES = {
    "linear": Merge("linear", [{"weight": 0.5}, {"weight": [0.1, 0.9]}, {"weight": -0.2}], has_base=False),
    "linear-float32": Merge(
        "linear",
        [{"weight": 0.31}, {"weight": 0.42}, {}],
        {"weight": 0.2, "normalize": False},
        dtype="float32",
        family="float32",
        has_base=False,
    ),
    "task-arithmetic-gradient-and-filters": Merge(
        "task_arithmetic",
        [
            {"weight": [0.2, 0.5, 1.0]},
            {
                "weight": [
                    {"filter": "mlp", "value": [0.7, -0.1]},
                    {"filter": "self_attn", "value": 0.4},
                    {"value": 1.1},
                ]
            },
            {"weight": 0.3},
        ],
        {"lambda": 0.8, "normalize": True},
    ),
    "ties": Merge(
        "ties",
        [{"weight": 1.0, "density": 0.5}, {"weight": 0.3, "density": 0.2}, {"weight": 0.7, "density": 0.9}],
        {"int8_mask": True},
        density=lambda name, model: (0.5, 0.2, 0.9)[model],
    ),
    "ties-filters-and-global-values": Merge(
        "ties",
        [
            {"density": [{"filter": "mlp", "value": 0.3}, {"filter": "norm", "value": 1.0}, {"value": 0.7}]},
            {"weight": [{"filter": "down_proj", "value": -0.4}, {"value": 0.9}]},
            {"weight": 0.5},
        ],
        {"weight": 0.6, "density": 0.4, "normalize": False, "lambda": 1.5},
        density=lambda name, model: 0.4 if model else 0.3 if "mlp" in name else 1.0 if "norm" in name else 0.7,
    ),
    "ties-gradient-of-densities-float32": Merge(
        "ties",
        [{"weight": 1.0, "density": [0.9, 0.5, 0.1]}, {"weight": [0.2, 0.8], "density": 0.5}, {"weight": 0.4}],
        {"density": [0.2, 0.6]},
        dtype="float32",
        family="float32",
        density=lambda name, model: ((0.9, 0.5, 0.1)[layer(name)], 0.5, (0.2, 0.4, 0.6)[layer(name)])[model],
    ),
    "ties-computed-in-float32-written-in-bfloat16": Merge(
        "ties",
        [{"weight": 0.8}, {"weight": 0.9}],
        {"density": 0.5},
        dtype="float32",
        extra={"out_dtype": "bfloat16"},
        density=lambda name, model: 0.5,
    ),
    "breadcrumbs": Merge(
        "breadcrumbs",
        [{"weight": 0.5, "density": 0.6}, {"weight": 0.4, "density": 0.3}, {"weight": -0.3, "density": 0.8}],
        {"gamma": 0.05},
        density=lambda name, model: (0.6, 0.3, 0.8)[model],
        gamma=0.05,
    ),
    "breadcrumbs-ties-rescaled": Merge(
        "breadcrumbs_ties",
        [{"weight": 0.5}, {"weight": 0.4}, {"weight": 0.3}],
        {"density": 0.5, "rescale": True, "normalize": True},
        density=lambda name, model: 0.5,
    ),
}


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """The tiny family in each dtype: hidden 64, three layers, several shards."""
    from make_family import make_family

    root = tmp_path_factory.mktemp("families")
    return {
        dtype: make_family(root / dtype, scale="tiny", dtype=dtype, models=MODELS) for dtype in ("bfloat16", "float32")
    }


@pytest.fixture(scope="module", params=MERGES, ids=str)
def merged(request, families, tmp_path_factory):
    """One YAML file merged by both: (the merge, its family, the peer's directory, ours)."""
    from mergekit.scripts.run_yaml import main as peer

    from fastmerge.cli import run

    merge = MERGES[request.param]
    family = families[merge.family]
    folder = tmp_path_factory.mktemp(request.param)
    config, theirs, ours = folder / "config.yml", folder / "mergekit", folder / "fastmerge"
    config.write_text(merge.text(family))
    peer.main([str(config), str(theirs), "--quiet"], standalone_mode=False)
    assert run(["merge", str(config), str(ours), "--numerics", "mergekit", "--shard-size", "100KB", "--quiet"]) == 0
    return merge, family, theirs, ours


def read(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a directory."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            tensors |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    return tensors


def test_every_tensor_equals_the_peers_outside_tied_positions(merged, tied_share):
    merge, family, their_folder, our_folder = merged
    theirs, ours = read(their_folder), read(our_folder)
    base, models = read(family.base), [read(folder) for folder in family.models[: len(merge.models)]]
    compute = getattr(torch, merge.dtype)
    assert set(ours) == set(theirs) == set(base)
    for name, expected in theirs.items():
        actual = ours[name]
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), name
        tied = tied_positions(
            merge.method,
            base[name].to(compute),
            [model[name].to(compute) for model in models],
            [merge.density(name, number) for number in range(len(models))],
            [merge.gamma] * len(models),
        )
        tied_share(f"command line, {merge.method} {merge.dtype}", tied)
        wrong = (actual != expected) & ~tied
        assert not wrong.any(), f"{name}: {int(wrong.sum())} of {wrong.numel()} values differ"


def test_the_merge_differs_from_the_base_and_from_every_model(merged):
    """Otherwise the comparison above would hold between two tools that copy."""
    _, family, _, our_folder = merged
    ours = read(our_folder)
    for folder in family.folders:
        given = read(folder)
        assert any(not torch.equal(tensor.float(), given[name].float()) for name, tensor in ours.items())


def test_the_config_is_the_peers(merged):
    merge, family, theirs, ours = merged
    given = json.loads((family.base / "config.json").read_text())
    peers, mine = (json.loads((folder / "config.json").read_text()) for folder in (theirs, ours))
    for key in set(given) & set(peers) - {"torch_dtype", "dtype", "transformers_version"}:
        assert mine[key] == peers[key], key
    wanted = merge.extra.get("out_dtype", merge.dtype)
    assert peers.get("dtype", peers.get("torch_dtype")) == wanted
    assert mine.get("dtype", mine.get("torch_dtype")) == wanted


def test_tokenizer_and_generation_files_are_the_peers(merged):
    _, _, theirs, ours = merged
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


def test_the_index_names_each_tensors_file_and_the_total_size(merged):
    _, _, _, ours = merged
    index = json.loads((ours / "model.safetensors.index.json").read_text())
    places = {}
    for file in sorted(ours.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            places |= dict.fromkeys(handle.keys(), file.name)
    assert len(set(places.values())) > 1
    assert index["weight_map"] == places
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in read(ours).values())


def test_the_merge_loads_as_a_model_of_the_same_architecture(merged):
    from transformers import AutoModelForCausalLM

    _, _, _, ours = merged
    model, report = AutoModelForCausalLM.from_pretrained(ours, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.config.num_hidden_layers == LAYERS
