"""The plan: which tensors go together, their dtypes, the pieces that pass through memory, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmerge import methods
from fastmerge.engine.plan import Plan, make_plan
from fastmerge.engine.sources import StateDictSource
from fastmerge.errors import ArgumentError, CheckpointError, ConfigError
from fastmerge.merging import plan_checkpoints
from tests.engine.small_family import Tensors, config_for, family, knows_base, save, save_family, some_parameters, taken

MATRIX = {"w": (300, 400)}


def plan_of(tmp_path: Path, method: str, base: Tensors, tuned: Sequence[Tensors], **arguments: Any) -> Plan:
    parameters = arguments.pop("parameters", {})
    config = arguments.pop("config", {})
    paths = save_family(tmp_path / "family", base, tuned, **arguments.pop("model_config", {}))
    weights = [0.5] * len(tuned)
    return plan_checkpoints(config_for(method, paths, weights, **parameters) | config, **arguments)


# -- pieces, sweeps, memory


@pytest.mark.parametrize(
    ("method", "parameters", "sweeps"),
    [
        ("linear", {}, 1),
        ("task_arithmetic", {"density": 0.5}, 1),
        ("ties", {}, 1),
        ("ties", {"density": 0.5}, 2),
        ("ties", {"density": 0.5, "rescale": True}, 3),
        ("ties", {"density": 0.0}, 1),
        ("breadcrumbs", {"density": 0.5}, 2),
        ("dare_ties", {"density": 0.5}, 2),
        ("dare_linear", {"density": 0.5, "rescale": False}, 1),
        ("della", {"density": 0.5}, 2),
        ("nearswap", {"t": 1e-4}, 1),
        ("sce", {"select_topk": 0.5}, 4),
        ("sce", {}, 2),
        ("ram", {}, 1),
        ("ramplus_tl", {}, 2),
        ("arcee_fusion", {}, 3),
    ],
)
def test_a_tensor_that_is_cut_costs_a_sweep_for_each_statistic(
    tmp_path: Path, method: str, parameters: dict[str, Any], sweeps: int
) -> None:
    base, tuned = family(2, shapes={"w": (300, 4000)})
    plan = plan_of(tmp_path, method, base, tuned, parameters=parameters, memory_budget="2MiB")
    assert len(plan.jobs[0].cuts) > 3 and plan.passes == sweeps
    inputs = int(knows_base(method)) + len(taken(method, tuned))
    assert plan.bytes_read == sweeps * inputs * 300 * 4000 * 2
    assert plan.describe()["swept_tensors"] == (["w"] if sweeps > 1 else [])
    roomy = plan_checkpoints(config_for(method, [tmp_path / "family" / name for name in ("base", "model-0", "model-1")],
                                        [0.5, 0.5], **parameters), memory_budget="1GiB")  # fmt: skip
    assert roomy.passes == 1 and roomy.bytes_read == inputs * 300 * 4000 * 2


def test_large_tensors_are_held_whole_only_if_the_memory_serves_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastmerge.engine.cutting.HELD_BYTES", 1 << 20)
    monkeypatch.setattr("fastmerge.engine.cutting.CHUNK_ELEMENTS", 1 << 16)
    for count, sweeps in ((2, 2), (6, 1)):
        base, tuned = family(2, shapes={f"w{i}": (300, 4000) for i in range(count)})
        plan = plan_of(tmp_path / str(count), "ties", base, tuned, parameters={"density": 0.5}, memory_budget="1GiB")
        assert plan.passes == sweeps


def test_a_sample_comes_from_all_over_the_tensor_and_stays_inside(tmp_path: Path) -> None:
    base, tuned = family(2, shapes={"w": (1000, 4001)})
    plan = plan_of(tmp_path, "ties", base, tuned, parameters={"density": 0.5}, memory_budget="2MiB")
    sample = next(plan.loads())
    assert sample.sample and sum(count for _, count in sample.spans) == sample.numel >= 60_000
    starts = [first for first, _ in sample.spans]
    assert starts == sorted(starts) and starts[-1] + 1024 <= 1000 * 4001
    assert starts[0] < 70_000 and starts[-1] > 3_900_000
    assert len({first % 4001 // 100 for first in starts}) > 20


@pytest.mark.parametrize("budget", ["300kB", "2MiB", "64MiB", "1GiB"])
@pytest.mark.parametrize("method", methods.names())
def test_the_buffers_stay_within_the_budget_and_two_loads_fit(tmp_path: Path, method: str, budget: str) -> None:
    from fastmerge.sizes import parse_size

    base, tuned = family(3, shapes={"a": (700, 500), "b": (9,), "c": (50, 10), "d": (1000, 1500)})
    plan = plan_of(tmp_path, method, base, tuned, parameters=some_parameters(method), memory_budget=budget)
    assert plan.in_bytes + plan.out_bytes <= parse_size(budget)
    loads = [load.nbytes for load in plan.loads()]
    assert all(one + following <= plan.in_bytes for one, following in pairwise(loads))
    for job in plan.jobs:
        assert job.cuts[0] == 0 and job.cuts[-1] == job.numel and list(job.cuts) == sorted(set(job.cuts))
        if method.startswith(("della", "arcee")):
            assert all(cut % job.shape[-1] == 0 for cut in job.cuts) and (job.piece % job.shape[-1] == 0)


def test_a_budget_that_holds_no_row_is_refused_with_one_that_does(tmp_path: Path) -> None:
    base, tuned = family(2, shapes={"w": (2, 100_000)})
    with pytest.raises(ArgumentError, match=r"memory_budget of 256 KiB is too small for w.* give at least") as caught:
        plan_of(tmp_path, "della", base, tuned, parameters={"density": 0.5}, memory_budget="256KiB")
    enough = str(caught.value).rsplit("at least ", 1)[1].rstrip(".")
    paths = [tmp_path / "family" / name for name in ("base", "model-0", "model-1")]
    config = config_for("della", paths, [1, 1], density=0.5)
    assert plan_checkpoints(config, memory_budget=enough)


@pytest.mark.parametrize("budget", ["much", "4G", "-1", 0, 1.5, True, "1 ZiB"])
def test_sizes_that_are_none_are_refused(tmp_path: Path, budget: Any) -> None:
    base, tuned = family(2, shapes=MATRIX)
    with pytest.raises((ArgumentError, TypeError), match="memory_budget"):
        plan_of(tmp_path, "ties", base, tuned, memory_budget=budget)


def test_the_description_is_json_and_names_what_is_needed(tmp_path: Path) -> None:
    import json

    base, tuned = family(2, shapes=MATRIX)
    plan = plan_of(tmp_path, "ties", base, tuned, parameters={"density": 0.5}, shard_size="100kB")
    said = json.loads(json.dumps(plan.describe()))
    assert said["bytes_written"] == 240_000 and said["disk_needed"] == 240_000 and said["shards"] == 1
    text = "\n".join(plan.lines())
    assert "ties" in text and "240 kB" in text and "720 kB" in text and "4.00 GiB" in text


# -- dtypes


@pytest.mark.parametrize(
    ("method", "numerics", "config", "expected"),
    [
        ("ties", "fp32", {}, torch.bfloat16),
        ("ties", "mergekit", {}, torch.float32),
        ("linear", "fp32", {}, torch.float32),
        ("ties", "fp32", {"dtype": "float16"}, torch.float16),
        ("ties", "fp32", {"dtype": "float16", "out_dtype": "bfloat16"}, torch.bfloat16),
        ("linear", "mergekit", {"dtype": "bfloat16", "out_dtype": "float32"}, torch.float32),
    ],
)
def test_the_output_dtype(
    tmp_path: Path, method: str, numerics: str, config: dict[str, str], expected: torch.dtype
) -> None:
    base, tuned = family(2, shapes=MATRIX)
    tuned = [{"w": tuned[0]["w"].half()}, {"w": tuned[1]["w"].float()}]
    plan = plan_of(tmp_path, method, base, tuned, numerics=numerics, config=config)
    assert plan.jobs[0].out == expected


def test_float64_is_held_as_float32_and_keeps_its_output_dtype(tmp_path: Path) -> None:
    base, tuned = family(2, torch.float64, MATRIX)
    job = plan_of(tmp_path, "ties", base, tuned).jobs[0]
    assert set(job.held) == {torch.float32} and job.out == torch.float64


# -- what goes together


def refused(tmp_path: Path, base: Tensors, tuned: Sequence[Tensors], method: str = "ties", **arguments: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        plan_of(tmp_path, method, base, tuned, **arguments)
    return str(caught.value)


def test_a_missing_tensor_names_tensor_and_model(tmp_path: Path) -> None:
    base, tuned = family(2)
    del tuned[1]["model.layers.1.norm.weight"]
    message = refused(tmp_path, base, tuned)
    assert "'model.layers.1.norm.weight' is missing in" in message and "model-1" in message


def test_a_tensor_that_the_base_lacks_names_tensor_and_model(tmp_path: Path) -> None:
    base, tuned = family(2)
    del base["model.layers.1.norm.weight"]
    assert "'model.layers.1.norm.weight' is in" in refused(tmp_path, base, tuned)


def test_vocabularies_of_different_sizes_say_both_and_what_to_do(tmp_path: Path) -> None:
    base, tuned = family(2)
    tuned[0]["model.embed_tokens.weight"] = torch.zeros(99, 24, dtype=torch.bfloat16)
    message = refused(tmp_path, base, tuned)
    assert "97 and 99 entries" in message and "resize_token_embeddings(97)" in message and "model-0" in message


def test_other_shapes_that_differ(tmp_path: Path) -> None:
    base, tuned = family(2)
    tuned[1]["model.layers.1.norm.weight"] = torch.zeros(300, dtype=torch.bfloat16)
    message = refused(tmp_path, base, tuned)
    assert "301 in" in message and "300 in" in message and "model.layers.1.norm.weight" in message


def test_floating_point_and_integers_do_not_mix(tmp_path: Path) -> None:
    base, tuned = family(2)
    tuned[1]["model.layers.1.norm.weight"] = torch.zeros(301, dtype=torch.int64)
    message = refused(tmp_path, base, tuned)
    assert "BF16" in message and "I64" in message and "model-1" in message


def test_integers_of_different_kinds_are_refused(tmp_path: Path) -> None:
    base, tuned = family(2)
    for one in (base, *tuned):
        one["steps"] = torch.arange(3)
    tuned[1]["steps"] = torch.arange(3, dtype=torch.int32)
    assert "I64 3 in" in refused(tmp_path, base, tuned)


def test_a_base_is_needed(tmp_path: Path) -> None:
    paths = save_family(tmp_path, *family(2))
    config = config_for("ties", paths, [1, 1])
    del config["base_model"]
    with pytest.raises(ConfigError, match="base_model"):
        plan_checkpoints(config)
    with pytest.raises(CheckpointError, match="no base"):
        source = StateDictSource("a", {"w": torch.zeros(1)})
        make_plan(methods.get("ties"), None, [source], lambda name: ({}, []), budget=1)


def test_a_base_that_is_listed_is_no_delta(tmp_path: Path) -> None:
    paths = save_family(tmp_path, *family(2))
    config = config_for("ties", paths, [1, 1])
    config["models"] = [{"model": str(paths[0])}, *config["models"]]  # type: ignore[misc]
    assert len(plan_checkpoints(config).jobs[0].match.models) == 2
    config["models"] = [{"model": str(paths[0])}]
    with pytest.raises(ConfigError, match="nothing to merge"):
        plan_checkpoints(config)


def test_linear_takes_a_base_as_one_model_more(tmp_path: Path) -> None:
    paths = save_family(tmp_path, *family(2))
    config = config_for("linear", paths, [1, 1], weight=0.25) | {"base_model": str(paths[0])}
    context = plan_checkpoints(config).jobs[0].context
    assert context is not None and context.parameters.weight == (1.0, 1.0, 0.25)  # type: ignore[attr-defined]
    del config["parameters"]
    with pytest.raises(ConfigError, match=r"needs weight for .*base"):
        plan_checkpoints(config)


def test_parameters_out_of_range_name_their_line(tmp_path: Path) -> None:
    paths = save_family(tmp_path, *family(2))
    text = f"""merge_method: ties
base_model: {paths[0]}
models:
- model: {paths[1]}
  parameters:
    weight: 0.5
    density: 1.5
- model: {paths[2]}
parameters:
  weight: 1
"""
    with pytest.raises(ConfigError, match=r"line 7: density = 1.5 for .* of .*model-0"):
        plan_checkpoints(text)
    with pytest.raises(ConfigError, match=r"line 10: ties has no parameter wieght; did you mean weight?"):
        plan_checkpoints(text.replace("  weight: 1\n", "  wieght: 1\n"))
    with pytest.raises(ConfigError, match=r"line 1: There is no merge method 'tie'"):
        plan_checkpoints(text.replace("merge_method: ties", "merge_method: tie"))
    with pytest.raises(ConfigError, match=r"needs weight for .*model-1"):
        plan_checkpoints(text.replace("density: 1.5", "density: 0.5").replace("parameters:\n  weight: 1\n", ""))


def test_the_target_is_checked_without_being_made(tmp_path: Path) -> None:
    paths = save_family(tmp_path, *family(2))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    config = config_for("ties", paths, [1, 1])
    with pytest.raises(ArgumentError, match="full"):
        plan_checkpoints(config, tmp_path / "full")
    plan_checkpoints(config, tmp_path / "new")
    assert not (tmp_path / "new").exists()


# -- tied heads


def without_head(tensors: Tensors) -> Tensors:
    return {name: x for name, x in tensors.items() if name != "lm_head.weight"}


def names_of(plan: Plan, job_name: str) -> list[str]:
    return [one.info.name for job in plan.jobs if job.name == job_name for one in job.inputs]


def test_when_all_heads_are_tied_there_is_none(tmp_path: Path) -> None:
    base, tuned = family(2)
    plan = plan_of(tmp_path, "ties", without_head(base), [without_head(one) for one in tuned],
                   model_config={"tie_word_embeddings": True})  # fmt: skip
    assert names_of(plan, "lm_head.weight") == [] and not plan.untied


def test_a_head_that_some_tied_models_store_is_merged_with_the_others_embedding(tmp_path: Path) -> None:
    base, tuned = family(2)
    tuned[0] = without_head(tuned[0])
    plan = plan_of(tmp_path, "ties", base, tuned, model_config={"tie_word_embeddings": True})
    assert names_of(plan, "lm_head.weight") == ["lm_head.weight", "model.embed_tokens.weight", "lm_head.weight"]
    assert not plan.untied


def test_a_head_that_only_a_tied_model_stores_is_left_to_the_embedding(tmp_path: Path) -> None:
    base, tuned = family(2)
    plan = plan_of(tmp_path, "ties", without_head(base), tuned, model_config={"tie_word_embeddings": True})
    assert names_of(plan, "lm_head.weight") == [] and not plan.untied


def test_an_untied_model_gives_the_output_a_head_of_its_own(tmp_path: Path) -> None:
    base, tuned = family(2)
    paths = [
        save(tmp_path / "base", without_head(base), config={"tie_word_embeddings": True}),
        save(tmp_path / "model-0", tuned[0], config={"tie_word_embeddings": False}),
        save(tmp_path / "model-1", without_head(tuned[1]), config={"tie_word_embeddings": True}),
    ]
    plan = plan_checkpoints(config_for("ties", paths, [1, 1]))
    embedding = "model.embed_tokens.weight"
    assert names_of(plan, "lm_head.weight") == [embedding, "lm_head.weight", embedding]
    assert plan.untied and "lm_head.weight" in plan.notes[0]


def test_a_head_that_is_missing_and_not_tied_is_refused(tmp_path: Path) -> None:
    base, tuned = family(2)
    message = refused(tmp_path, base, [without_head(tuned[0]), tuned[1]])
    assert "'lm_head.weight' is missing in" in message and "not tied" in message and "model-0" in message


def test_derived_buffers_may_be_missing(tmp_path: Path) -> None:
    base, tuned = family(2)
    base["model.rotary_emb.inv_freq"] = torch.ones(4)
    tuned[1]["model.layers.0.rotary_emb.inv_freq"] = torch.ones(4)
    plan = plan_of(tmp_path, "ties", base, tuned)
    assert names_of(plan, "model.rotary_emb.inv_freq") == ["model.rotary_emb.inv_freq"]
    assert names_of(plan, "model.layers.0.rotary_emb.inv_freq") == [] and "left out" in plan.notes[0]
