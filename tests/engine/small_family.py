"""A family of very small models, in memory or on disk: ties, zero deltas and tensors of every rank."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import save_file

from fastmerge import methods

Tensors = dict[str, torch.Tensor]

SHAPES = {
    "model.embed_tokens.weight": (97, 24),
    "model.layers.0.mlp.experts.weight": (5, 14, 22),
    "model.layers.0.self_attn.q_proj.weight": (70, 1001),
    "model.layers.1.norm.weight": (301,),
    "model.layers.1.self_attn.q_proj.weight": (3, 1),
    "model.norm.scale": (),
    "lm_head.weight": (97, 24),
}


def family(
    models: int = 3, dtype: torch.dtype = torch.bfloat16, shapes: Mapping[str, Sequence[int]] = SHAPES, seed: int = 0
) -> tuple[Tensors, list[Tensors]]:
    """A base and its fine-tunes. In bfloat16 many deltas tie and many are zero, as in real checkpoints."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(shape: Sequence[int], spread: float) -> torch.Tensor:
        return spread * torch.randn(tuple(shape), generator=generator)

    base = {name: drawn(shape, 0.02) for name, shape in shapes.items()}
    tuned = [{name: x + drawn(x.shape, 3e-4) for name, x in base.items()} for _ in range(models)]
    return _cast(base, dtype), [_cast(one, dtype) for one in tuned]


def _cast(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    return {name: x.to(dtype) for name, x in tensors.items()}


def save(root: Path, tensors: Tensors, *, shards: int = 1, config: Mapping[str, object] | None = None) -> Path:
    """Write a Hugging Face directory; tensors are dealt to the shards in turn, so that their order differs."""
    root.mkdir(parents=True)
    settings = {"model_type": "llama", "num_hidden_layers": 2, "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
    (root / "config.json").write_text(json.dumps(settings | dict(config or {})))
    dense = {name: x.contiguous() for name, x in tensors.items()}
    if shards == 1:
        save_file(dense, root / "model.safetensors", {"format": "pt"})
        return root
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(dense.items())[number::shards])
        save_file(part, root / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (root / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return root


def save_family(
    root: Path, base: Tensors, tuned: Sequence[Tensors], *, shards: int = 1, **config: object
) -> list[Path]:
    """Write base and fine-tunes: the directories, base first."""
    names = ["base", *(f"model-{index}" for index in range(len(tuned)))]
    return [
        save(root / name, tensors, shards=shards, config=config)
        for name, tensors in zip(names, [base, *tuned], strict=True)
    ]


UNWEIGHTED = tuple(name for name in methods.names() if "weight" not in methods.parameters(name))

OTHER_FORMULAS = (
    *("slerp", "nuslerp", "multislerp", "karcher", "model_stock", "passthrough"),
    *("nearswap", "sce", "ram", "ramplus_tl", "arcee_fusion"),
)
"""Methods that are neither the one formula, nor pcb, nor fr."""

T = TypeVar("T")


def taken(method: str, models: Sequence[T]) -> list[T]:
    """Those of the models that a method merges at once."""
    return list(models[: methods.get(method).most_models])


def weighed(method: str, weights: Sequence[float]) -> dict[str, object]:
    """The weights of the models that it merges, where it has any, as `fastmerge.merge` takes them."""
    return {} if method in UNWEIGHTED else {"weight": taken(method, weights)}


def config_for(method: str, paths: Sequence[Path], weights: Sequence[float], **parameters: object) -> dict[str, object]:
    """A config for `paths` (base first), of as many models as the method takes; one that knows no base gets none."""
    config: dict[str, object] = {
        "merge_method": method,
        "models": [
            {"model": str(path)} | ({"parameters": {"weight": weight}} if method not in UNWEIGHTED else {})
            for path, weight in taken(method, list(zip(paths[1:], weights, strict=True)))
        ],
        "parameters": parameters,
    }
    return config | {"base_model": str(paths[0])} if knows_base(method) else config


def some_parameters(method: str) -> dict[str, object]:
    """What a method needs besides weights, and half of each delta where it has a density."""
    known = methods.parameters(method)
    return {name: 0.5 for name in ("density", "t", "select_topk") if name in known}


def knows_base(method: str) -> bool:
    """Whether a base is a base to this method, and no model more."""
    return methods.get(method).needs_base or methods.get(method).takes_base


def load(directory: Path) -> Tensors:
    """Every tensor of a written directory."""
    from safetensors.torch import load_file

    result: Tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        result |= load_file(file)
    return result
