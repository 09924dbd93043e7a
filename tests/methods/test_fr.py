"""FR-Merging: the formula, which tensors are filtered, cuts and files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastmerge
from fastmerge import backends, ops
from fastmerge.errors import ArgumentError
from fastmerge.merging import merge_checkpoints
from fastmerge.methods.base import TensorContext
from fastmerge.methods.fr import RATIOS, Fr
from tests.engine.small_family import Tensors, config_for, load, save_family
from tests.numeric import assert_bitwise_equal

WEIGHTS = [0.7, -0.2, 0.45]
SHAPES = {
    "model.embed_tokens.weight": (60, 33),
    "model.layers.0.self_attn.q_proj.weight": (48, 33),
    "model.layers.0.mlp.up_proj.weight": (51, 96),
    "model.layers.0.mlp.experts": (3, 8, 9),
    "model.norm.weight": (33,),
}
WORKING = [name for name, reason in backends.available().items() if reason is None]
QUICK = [name for name in WORKING if name in ("cpu", "reference")]
"""The others are emulated or interpreted where there is no GPU."""


def models(dtype: torch.dtype = torch.float32) -> tuple[Tensors, list[Tensors]]:
    generator = torch.Generator().manual_seed(2)
    base = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    tuned = [
        {name: (x + 0.02 * (i + 1) * torch.randn(x.shape, generator=generator)).to(dtype) for name, x in base.items()}
        for i in range(3)
    ]
    return base, tuned


def filtered(name: str) -> bool:
    return len(SHAPES[name]) == 2 and ("attn" in name or "mlp" in name)


def expected(base: Tensor, tuned: list[Tensor], name: str, how: dict[str, Any]) -> Tensor:
    """The formula, in float64 but for the filter's result."""
    deltas = [x.double() - base.double() for x in tuned]
    if filtered(name):
        ratio = RATIOS[how["mode"]] if how["ratio"] is None else how["ratio"]
        deltas = [ops.highpass(d, ratio, mode=how["mode"], backend="reference").double() for d in deltas]
    if how["align"]:
        means = [d.abs().mean() for d in deltas]
        deltas = [d * (max(means) / mean) if mean else d for d, mean in zip(deltas, means)]
    weighed = [weight * d for weight, d in zip(WEIGHTS, deltas)]
    if how["combine"] == "consensus":
        elected = torch.where(sum(weighed) >= 0, 1.0, -1.0)
        weighed = [torch.where(x.sign() == elected, x, 0.0) for x in weighed]
    return base.double() + how["lambda_"] * sum(weighed)


@pytest.mark.parametrize("backend", QUICK)
@settings(max_examples=40)
@given(
    mode=st.sampled_from(["ideal", "official"]),
    ratio=st.none() | st.floats(0, 1),
    combine=st.sampled_from(["sum", "consensus"]),
    align=st.booleans(),
    lambda_=st.sampled_from([1.0, 0.7]),
)
def test_the_formula(backend: str, **how: Any) -> None:
    check_the_formula(backend, how)


@pytest.mark.parametrize("backend", [name for name in WORKING if name not in QUICK])
@pytest.mark.parametrize("combine", ["sum", "consensus"])
def test_the_formula_on_kernels_for_gpus(backend: str, combine: str) -> None:
    how = {"mode": "official", "ratio": 0.6, "combine": combine, "align": combine == "consensus", "lambda_": 0.9}
    check_the_formula(backend, how)


def check_the_formula(backend: str, how: dict[str, Any]) -> None:
    base, tuned = models()
    merged = fastmerge.merge(tuned, base=base, method="fr", weight=WEIGHTS, backend=backend, **how)
    for name, x in base.items():
        wanted = expected(x, [one[name] for one in tuned], name, how)
        near = (merged[name].double() - wanted).abs() < 2e-6
        # Where the weighted sum is next to nothing, either sign may be elected.
        assert near.all() if how["combine"] == "sum" else (~near).sum() <= 2, name


def test_a_sum_is_filtered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what must be filtered apart is filtered as often as there are models."""
    base, tuned = models()
    seen: list[tuple[int, ...]] = []
    highpass = ops.highpass
    monkeypatch.setattr(ops, "highpass", lambda x, *a, **named: seen.append(x.shape) or highpass(x, *a, **named))
    for arguments, times in (({}, 1), ({"align": True}, 3), ({"combine": "consensus"}, 3), ({"ratio": 0.0}, 0)):
        seen.clear()
        fastmerge.merge(tuned, base=base, method="fr", **arguments)
        assert seen == [
            SHAPES[name] for name in sorted(SHAPES, key=list(base).index) if filtered(name) for _ in range(times)
        ]


def test_a_frozen_tensor_is_left_alone_by_align() -> None:
    base, tuned = models()
    for one in tuned:
        one["model.norm.weight"] = base["model.norm.weight"].clone()
    tuned[1] = {name: x.clone() for name, x in base.items()}
    merged = fastmerge.merge(tuned, base=base, method="fr", align=True)
    assert_bitwise_equal(merged["model.norm.weight"], base["model.norm.weight"])
    assert all(bool(x.isfinite().all()) for x in merged.values())


@pytest.mark.parametrize(
    ("patterns", "taken"),
    [
        ({"include": "embed"}, ["model.embed_tokens.weight"]),
        ({"exclude_": "mlp"}, ["model.layers.0.self_attn.q_proj.weight"]),
        ({"include": "norm|experts"}, []),
    ],
)
def test_which_matrices_are_filtered(patterns: dict[str, str], taken: list[str]) -> None:
    base, tuned = models()
    merged = fastmerge.merge(tuned, base=base, method="fr", ratio=0.5, **patterns)
    plain = fastmerge.merge(tuned, base=base, method="task_arithmetic", weight=1.0)
    differ = [name for name in base if (merged[name] - plain[name]).abs().max() > 1e-3]
    assert differ == taken


@pytest.mark.parametrize("how", [{}, {"align": True}, {"combine": "consensus", "mode": "official", "ratio": 0.6}])
def test_files_of_any_number_within_any_budget(how: dict[str, Any], tmp_path: Path) -> None:
    base, tuned = models(torch.bfloat16)
    digests = set()
    for number, (shards, arguments) in enumerate(
        [(1, {}), (3, {"memory_budget": "200kB"}), (2, {"shard_size": "10kB", "memory_budget": "1MiB"})]
    ):
        paths = save_family(tmp_path / f"in{number}", base, tuned, shards=shards)
        report = merge_checkpoints(config_for("fr", paths, WEIGHTS, **how), tmp_path / str(number), **arguments)
        digests.add(report.digest)
    assert len(digests) == 1
    in_memory = fastmerge.merge(tuned, base=base, method="fr", weight=WEIGHTS, **how)
    for name, x in load(tmp_path / "0").items():
        assert_bitwise_equal(in_memory[name], x)


@pytest.mark.parametrize("mode", ["ideal", "official"])
def test_a_gpu_needs_the_room_of_its_own_routes(mode: str) -> None:
    method = Fr()
    parameters = method.Parameters(weight=(1.0, 1.0), mode=mode)
    for device in ("cpu", "cuda"):
        context = TensorContext("mlp", (512, 1376), parameters, positions=(0, 1), device=device)
        plan = ops.highpass_plan((512, 1376), RATIOS[mode], mode=mode, device=device)
        assert method.workspace(context, 512 * 1376) == 2 * 4 * 512 * 1376 + plan.workspace


def test_the_dry_run_says_what_the_largest_matrix_takes(tmp_path: Path) -> None:
    base, tuned = models(torch.bfloat16)
    paths = save_family(tmp_path / "in", base, tuned)
    plan = fastmerge.plan_checkpoints(config_for("fr", paths, WEIGHTS), tmp_path / "out")
    assert plan.workspace >= 2 * 4 * 51 * 96
    assert "for the largest tensor" in "\n".join(plan.lines())
    assert json.loads(json.dumps(plan.describe()))["workspace"] == plan.workspace


def test_a_matrix_that_does_not_fit_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    base, tuned = models(torch.bfloat16)
    paths = save_family(tmp_path / "in", base, tuned)
    with pytest.raises(ArgumentError, match=r"too small for model\.layers\.0\.mlp\.up_proj\.weight"):
        merge_checkpoints(config_for("fr", paths, WEIGHTS), tmp_path / "out", memory_budget="50kB")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"ratio": 1.5}, "ratio = 1.5"),
        ({"ratio": "much"}, "ratio = 'much'"),
        ({"mode": "idael"}, "Did you mean ideal?"),
        ({"include": "(mlp"}, "include = '(mlp' is not a regular expression"),
        ({"exclude_": 3}, "exclude is a regular expression"),
        ({"density": 0.5}, "fr has no parameter density"),
        ({"numerics": "mergekit"}, "mergekit has no such method"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], sentence: str) -> None:
    base, tuned = models()
    with pytest.raises(ArgumentError) as caught:
        fastmerge.merge(tuned, base=base, method="fr", **arguments)
    assert sentence in str(caught.value)
