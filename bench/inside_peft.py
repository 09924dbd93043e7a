"""PEFT's add_weighted_adapter with and without fastmerge inside, on LoRA adapters of a model of 1B parameters.

Both sides run in this process, in turn, on the same adapters; medians are compared. The SVD routes of PEFT take minutes
for one decoder layer, so they run on models of `--svd-layers` layers of the same shape, with `--svd-projections` of
them, once, and ours on the same.
Every row carries its check: factors element by element; for `svd` the product of factors, for SVDs of dense matrices
the singular values; for random routes the share that is kept, and with an SVD how much of the matrix is.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from measure import environment
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from fastmerge.backends import cpu
from fastmerge.integrations import peft as inside

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = ["one", "two", "three"]
WEIGHTS = [0.7, 0.5, 0.9]
FACTORS = ("ties", "magnitude_prune", "dare_ties", "dare_linear")
BY_SVD = ("svd", "ties_svd", "magnitude_prune_svd", "dare_ties_svd", "dare_linear_svd")
SHAPES = {
    # hidden, intermediate, key and value heads of 64, vocabulary
    "1b": (2048, 8192, 8, 128256),
    "tiny": (384, 768, 2, 1000),
}


def make_model(shape: str, layers: int, rank: int, projections: list[str] = PROJECTIONS) -> Any:
    """A model with three adapters. Its own weights are never touched, and take no memory."""
    hidden, intermediate, heads, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=heads,
        head_dim=64,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=projections)
    model = get_peft_model(model, lora, adapter_name=ADAPTERS[0])
    for name in ADAPTERS[1:]:
        model.add_adapter(name, lora)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            # As after training: what an adapter does falls off along its rank.
            size = parameter.shape
            fall = 0.8 ** torch.arange(rank)
            values = torch.randn(size, generator=generator) / size[1] ** 0.5
            parameter.data.copy_(values * (fall[:, None] if "lora_A" in name else 1.0))
    return model


def merge(model: Any, kind: str, options: dict[str, Any]) -> float:
    """Seconds of one merge into the adapter "merged"."""
    if "merged" in model.peft_config:
        model.delete_adapter("merged")
    gc.collect()
    started = time.perf_counter()
    model.add_weighted_adapter(ADAPTERS, WEIGHTS, "merged", combination_type=kind, **options)
    return time.perf_counter() - started


def merged(model: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B of each layer's merged adapter."""
    return {
        name: (module.lora_A["merged"].weight.data.clone(), module.lora_B["merged"].weight.data.clone())
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and "merged" in module.lora_A
    }


def difference_of_factors(theirs: Any, ours: Any) -> float:
    """The largest difference of an element, relative to the largest element of its tensor."""
    worst = 0.0
    for name, pair in theirs.items():
        for x, y in zip(pair, ours[name], strict=True):
            assert x.dtype == y.dtype and x.shape == y.shape, name
            worst = max(worst, float((x - y).abs().max() / x.abs().max()))
    return worst


def difference_of_products(theirs: Any, ours: Any) -> float:
    """The largest spectral norm of a difference of B A, relative to the largest singular value."""
    worst = 0.0
    for name, (a, b) in theirs.items():
        other_a, other_b = ours[name]
        assert a.dtype == other_a.dtype and a.shape == other_a.shape, name
        # |B A - B' A'|, by the QR of both pairs side by side: nothing of the size of the layer is decomposed.
        r_b = torch.linalg.qr(torch.cat([b, -other_b], dim=1).double(), mode="r").R
        r_a = torch.linalg.qr(torch.cat([a, other_a], dim=0).T.double(), mode="r").R
        norm = torch.linalg.matrix_norm(r_b @ r_a.T, ord=2)
        worst = max(worst, float(norm / torch.linalg.matrix_norm(b.double().T @ b.double(), ord=2) ** 0.5))
    return worst


def difference_of_values(theirs: Any, ours: Any) -> float:
    """The largest difference of a singular value, relative to the largest of its layer: B has them as norms of columns.

    Where those around the cut are close, which vectors are kept is left open; how much of the matrix is, is not.
    """
    worst = 0.0
    for name, (a, b) in theirs.items():
        other_a, other_b = ours[name]
        assert a.dtype == other_a.dtype and a.shape == other_a.shape, name
        values, others = (torch.linalg.vector_norm(x.double(), dim=0) for x in (b, other_b))
        worst = max(worst, float((values - others).abs().max() / values.max()))
    return worst


def difference_of_laws(model: Any, ours: Any, density: float) -> float:
    """How far the share of kept elements of a random merge is from what is expected, in standard deviations."""
    kept = sum(int((x != 0).sum()) for pair in ours.values() for x in pair)
    total = sum(x.numel() for pair in ours.values() for x in pair)
    expected = 1 - (1 - density) ** len(ADAPTERS)
    return abs(kept - expected * total) / (total * expected * (1 - expected)) ** 0.5


def row(model: Any, kind: str, density: float, repeats: int) -> dict[str, Any]:
    options = {} if kind == "svd" else {"density": density}
    seconds: dict[str, list[float]] = {"peft": [], "fastmerge": []}
    found: dict[str, Any] = {}
    inside.enable()
    merge(model, kind, options)  # what is loaded and compiled on first use is not what is measured
    inside.disable()
    for _ in range(repeats):
        inside.disable()
        seconds["peft"].append(merge(model, kind, options))
        found["peft"] = merged(model)
        inside.enable()
        seconds["fastmerge"].append(merge(model, kind, options))
        found["fastmerge"] = merged(model)
        inside.disable()
    if kind in ("dare_ties", "dare_linear"):
        check, limit = difference_of_laws(model, found["fastmerge"], density), 5.0
    elif kind.startswith("dare"):
        # Other masks, so other matrices: what is compared is how much of them the same rank holds.
        norms = [sum(float(b.double().square().sum()) for _, b in found[side].values()) for side in found]
        check, limit = abs(norms[1] / norms[0] - 1), 0.05
    elif kind in FACTORS:
        check, limit = difference_of_factors(found["peft"], found["fastmerge"]), 1e-6
    elif kind == "svd":
        check, limit = difference_of_products(found["peft"], found["fastmerge"]), 2e-4
    else:
        check, limit = difference_of_values(found["peft"], found["fastmerge"]), 1e-5
    medians = {side: statistics.median(times) for side, times in seconds.items()}
    return {
        "route": kind,
        "matrices": len(found["peft"]),
        "seconds": seconds,
        "medians": medians,
        "ratio": medians["peft"] / medians["fastmerge"],
        "check": check,
        "limit": limit,
        "right": check <= limit,
    }


def bookkeeping(model: Any, repeats: int, enabled: bool) -> float:
    """Median seconds of what is done around the merge, by PEFT alone or within fastmerge: layers merge to nothing."""
    from peft.tuners.lora.model import LoraModel

    name = "_generalized_task_arithmetic_weighted_adapter"
    if enabled:
        inside.enable()
    method = LoraModel.__dict__[name]

    def nothing(self: Any, kind: str, adapters: list[str], weights: list[float], target: Any, *rest: Any) -> Any:
        return [getattr(target, side)[adapters[0]].weight.data for side in ("lora_A", "lora_B")]

    setattr(LoraModel, name, nothing)
    try:
        return statistics.median(merge(model, "ties", {"density": 0.5}) for _ in range(repeats))
    finally:
        setattr(LoraModel, name, method)
        inside.disable()


def show(one: dict[str, Any]) -> None:
    speed = f"{one['ratio']:8.1f}" if one["right"] else "   WRONG"
    print(
        f"{one['route']:20} {one['matrices']:8} {one['medians']['peft']:10.3f} {one['medians']['fastmerge']:10.3f} "
        f"{speed}   {one['check']:.1e} (limit {one['limit']:.0e})",
        flush=True,
    )


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--svd-layers", type=int, default=1)
    parser.add_argument("--svd-projections", nargs="+", choices=PROJECTIONS, default=PROJECTIONS)
    parser.add_argument("--threads", type=int, help="of torch and of fastmerge; by default each decides by itself")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--routes", nargs="+", choices=(*FACTORS, *BY_SVD), default=[*FACTORS, "svd", "ties_svd"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(given)
    warnings.simplefilter("ignore")
    rows = []
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
        cpu.set_threads(arguments.threads)
    print("route                matrices     peft s  fastmerge s   ratio   difference")
    factors = [kind for kind in arguments.routes if kind in FACTORS]
    around = None
    if factors:
        model = make_model(arguments.shape, arguments.layers, arguments.rank)
        for kind in factors:
            rows.append(row(model, kind, arguments.density, arguments.repeats))
            show(rows[-1])
        around = {side: bookkeeping(model, arguments.repeats, side == "fastmerge") for side in ("peft", "fastmerge")}
        print(f"{'(around the merge)':20} {'':8} {around['peft']:10.3f} {around['fastmerge']:10.3f}", flush=True)
        del model
    by_svd = [kind for kind in arguments.routes if kind in BY_SVD]
    if by_svd:
        model = make_model(arguments.shape, arguments.svd_layers, arguments.rank, arguments.svd_projections)
        for kind in by_svd:
            rows.append(row(model, kind, arguments.density, 1))
            show(rows[-1])
    if arguments.json:
        figures = {"environment": environment(), "rows": rows, "seconds_around_the_merge": around}
        arguments.json.write_text(json.dumps(figures, indent=1))
    return 0 if all(one["right"] for one in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
