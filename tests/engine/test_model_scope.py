"""Statistics over a whole model: the formula, the passes, what a second merge of the models spares, and refusals."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastmerge
from fastmerge import ops
from fastmerge.engine.plan import make_plan
from fastmerge.engine.sources import StateDictSource
from fastmerge.errors import ArgumentError, ConfigError
from fastmerge.merging import _statistics_path, merge_checkpoints, plan_checkpoints
from fastmerge.methods import pcb_statistics
from fastmerge.methods.parameters import ParameterError
from tests.engine.small_family import Tensors, config_for, family, load, save_family
from tests.numeric import assert_bitwise_equal

WEIGHTS = [0.7, -0.2, 0.45]


def joined(tensors: Tensors) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors.values() if tensor.is_floating_point()])


@pytest.mark.parametrize("density", [0.3, 0.0, 1.0, [0.1, 0.5, 0.9]])
@pytest.mark.parametrize("method", ["ties", "breadcrumbs"])
def test_one_threshold_for_all_tensors_is_that_of_one_long_vector(method: str, density: Any) -> None:
    base, tuned = family()
    merged = fastmerge.merge(tuned, base=base, method=method, density=density, weight=WEIGHTS, scope="model")
    more: dict[str, Any] = {}
    if method == "breadcrumbs":
        more = {"method": "magnitude_outliers", "gamma": 0.01, "election": "none", "divisor": "none"}
    vectors = [joined(one) for one in tuned]
    expected = ops.consensus_merge(joined(base), vectors, WEIGHTS, density=density, ties="keep", **more)
    assert_bitwise_equal(joined(merged), expected)


def test_excluded_tensors_and_the_second_copy_of_a_tied_one_do_not_count() -> None:
    generator = torch.Generator().manual_seed(0)
    names = {"model.embed_tokens.weight": (40, 8), "model.layers.0.w": (30, 8), "model.norm.weight": (8,)}
    base = {name: torch.randn(shape, generator=generator) for name, shape in names.items()}
    tuned = [
        {name: value + torch.randn(value.shape, generator=generator) for name, value in base.items()} for _ in range(2)
    ]
    arguments: dict[str, Any] = {"method": "ties", "density": 0.3, "weight": 0.5, "scope": "model"}
    plain = fastmerge.merge(tuned, base=base, **arguments)

    def with_head(model: Tensors) -> Tensors:
        return model | {"lm_head.weight": model["model.embed_tokens.weight"]}

    tied = fastmerge.merge([with_head(one) for one in tuned], base=with_head(base), **arguments)
    for name, value in plain.items():
        assert_bitwise_equal(tied[name], value)
    assert_bitwise_equal(tied["lm_head.weight"], plain["model.embed_tokens.weight"])

    fewer = [{name: one[name] for name in list(names)[1:]} for one in (base, *tuned)]
    without = fastmerge.merge(fewer[1:], base=fewer[0], **arguments)
    excluding = fastmerge.merge(tuned, base=base, exclude="embed_tokens", **arguments)
    for name, value in without.items():
        assert_bitwise_equal(excluding[name], value)
    assert_bitwise_equal(excluding["model.embed_tokens.weight"], base["model.embed_tokens.weight"])


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    base, tuned = family()
    return save_family(tmp_path / "family", base, tuned, shards=3)


# -- pcb

VARIANTS = ["vision_es", "vision", "script", "nlp", "paper"]
DENSITIES = [0.1, 0.0, 1.0, [0.05, 0.5, 0.9]]


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_pcb_over_a_model_is_pcb_of_one_long_vector(variant: str, density: Any) -> None:
    base, tuned = family()
    merged = fastmerge.merge(tuned, base=base, method="pcb", variant=variant, density=density, weight=WEIGHTS)
    deltas = [joined(one).float() - joined(base).float() for one in tuned]
    delta = ops.pcb_merge(deltas, variant=variant, density=density, weight=WEIGHTS)
    assert_bitwise_equal(joined(merged), (joined(base).float() + delta).to(torch.bfloat16))


@pytest.mark.parametrize("variant", VARIANTS)
def test_pcb_of_each_tensor_by_itself(variant: str) -> None:
    base, tuned = family()
    merged = fastmerge.merge(tuned, base=base, method="pcb", variant=variant, density=0.2, scope="tensor", lambda_=0.5)
    for name, value in base.items():
        if value.is_floating_point():
            deltas = [one[name].float() - value.float() for one in tuned]
            delta = ops.pcb_merge(deltas, variant=variant, density=0.2, weight=0.5)
            assert_bitwise_equal(merged[name], (value.float() + delta).to(value.dtype))


@pytest.mark.parametrize("where", ["clip", "scores", "both"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_window_that_misses_costs_passes_and_no_bits(
    variant: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned = family(shapes={"a": (900, 101), "b": (40_001,)})
    arguments: dict[str, Any] = {"method": "pcb", "variant": variant, "density": 0.3, "weight": WEIGHTS}
    expected = fastmerge.merge(tuned, base=base, **arguments)
    taken = []
    for name, statistic, fallback in (
        ("clip", pcb_statistics.ClipWindow, pcb_statistics.ClipBounds),
        ("scores", pcb_statistics.ScoreWindow, pcb_statistics.ScoreThresholds),
    ):
        if where in (name, "both"):
            prepare, observe = statistic.prepare, fallback.observe

            def misplaced(self: Any, *given: Any, prepare: Any = prepare) -> None:
                prepare(self, *given)
                self.low, self.width = [0] * len(self.low), 1

            def noted(self: Any, *given: Any, observe: Any = observe) -> Any:
                taken.append(type(self).__name__)
                return observe(self, *given)

            monkeypatch.setattr(statistic, "prepare", misplaced)
            monkeypatch.setattr(fallback, "observe", noted)
    merged = fastmerge.merge(tuned, base=base, **arguments)
    for name in base:
        assert_bitwise_equal(merged[name], expected[name])
    wanted = {"clip": {"ClipBounds"}, "scores": {"ScoreThresholds"}, "both": {"ClipBounds", "ScoreThresholds"}}[where]
    assert set(taken) == (wanted - {"ClipBounds"} if variant == "paper" else wanted)


@pytest.mark.parametrize(("variant", "passes"), [("vision_es", 3), ("script", 3), ("paper", 4)])
def test_pcb_passes_and_what_a_second_merge_spares(
    variant: str, passes: int, paths: list[Path], tmp_path: Path
) -> None:
    def config(weights: list[float], **parameters: Any) -> dict[str, object]:
        return config_for("pcb", paths, weights, **({"variant": variant, "density": 0.2} | parameters))

    kept = tmp_path / "kept.json"
    first = merge_checkpoints(config(WEIGHTS), tmp_path / "1", statistics=kept)
    again = merge_checkpoints(config([1.0, 2.0, 3.0]), tmp_path / "2", statistics=kept)
    assert (first.passes, again.passes) == (passes, 1)
    assert again.digest == merge_checkpoints(config([1.0, 2.0, 3.0]), tmp_path / "3").digest
    # What deltas are clipped to, and the paper's means, do not depend on the density; the threshold does.
    denser = merge_checkpoints(config(WEIGHTS, density=0.4), tmp_path / "4", statistics=kept)
    assert denser.passes == 2
    assert denser.digest == merge_checkpoints(config(WEIGHTS, density=0.4), tmp_path / "5").digest


def test_models_whose_deltas_are_all_zero_merge_to_the_base() -> None:
    base, _ = family()
    for variant in VARIANTS:
        merged = fastmerge.merge([base, base], base=base, method="pcb", variant=variant)
        for name, value in base.items():
            assert torch.equal(merged[name], value)


def test_pcb_has_no_numbers_of_mergekit(paths: list[Path]) -> None:
    with pytest.raises(ConfigError, match="pcb goes with numerics fp32 only"):
        plan_checkpoints(config_for("pcb", paths, WEIGHTS), numerics="mergekit")


# -- the file of statistics


def ties(paths: list[Path], weights: list[float] | None = None, **parameters: Any) -> dict[str, object]:
    return config_for("ties", paths, weights or WEIGHTS, **({"density": 0.4, "scope": "model"} | parameters))


def test_a_second_merge_with_other_weights_reads_the_models_once(paths: list[Path], tmp_path: Path) -> None:
    first = merge_checkpoints(ties(paths), tmp_path / "out")
    assert first.passes == 2 and (tmp_path / "out.statistics.json").is_file()
    kept = tmp_path / "out.statistics.json"
    again = merge_checkpoints(ties(paths, [0.1, 0.2, 0.3]), tmp_path / "again", statistics=kept)
    assert again.passes == 1 and again.bytes_read < first.bytes_read / 1.9
    assert not (tmp_path / "again.statistics.json").exists()
    fresh = merge_checkpoints(ties(paths, [0.1, 0.2, 0.3]), tmp_path / "fresh")
    assert fresh.passes == 2 and fresh.digest == again.digest != first.digest
    assert kept.name in " ".join(again.notes)


def test_another_density_is_found_and_kept_beside_the_first(paths: list[Path], tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    merge_checkpoints(ties(paths), tmp_path / "1", statistics=kept)
    other = merge_checkpoints(ties(paths, density=0.2), tmp_path / "2", statistics=kept)
    assert other.passes == 2
    assert other.digest == merge_checkpoints(ties(paths, density=0.2), tmp_path / "3").digest
    for density in (0.2, 0.4):
        assert plan_checkpoints(ties(paths, density=density), statistics=kept).passes == 1


@pytest.mark.parametrize("change", ["values", "values and times", "another model", "another order"])
def test_a_changed_input_is_noticed(change: str, paths: list[Path], tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    merge_checkpoints(ties(paths), tmp_path / "1", statistics=kept)
    if change == "another order":
        paths = [paths[0], paths[2], paths[1], paths[3]]
    elif change == "another model":
        paths = paths[:3]
    else:
        file = next(paths[2].glob("*.safetensors"))
        times = os.stat(file)
        content = bytearray(file.read_bytes())
        content[-40:] = bytes(40)
        file.write_bytes(content)
        if change == "values and times":
            os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    weights = WEIGHTS[: len(paths) - 1]
    second = merge_checkpoints(ties(paths, weights), tmp_path / "2", statistics=kept)
    assert second.passes == 2
    assert any(str(kept) in note and "found again" in note for note in second.notes)
    assert second.digest == merge_checkpoints(ties(paths, weights), tmp_path / "3").digest
    assert plan_checkpoints(ties(paths, weights), statistics=kept).passes == 1


def test_what_is_no_file_of_statistics_is_refused_and_left_alone(paths: list[Path], tmp_path: Path) -> None:
    kept = tmp_path / "notes.json"
    kept.write_text('{"mine": 1}')
    with pytest.raises(ArgumentError, match=r"notes\.json is not a file of statistics"):
        merge_checkpoints(ties(paths), tmp_path / "out", statistics=kept)
    assert kept.read_text() == '{"mine": 1}' and not (tmp_path / "out").exists()
    kept.write_text(json.dumps({"fastmerge_statistics": 0, "inputs": [], "about": {}, "statistics": []}))
    assert "version" in " ".join(merge_checkpoints(ties(paths), tmp_path / "out", statistics=kept).notes)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("statistics", ["bounds"]),
        ("statistics", [None]),
        ("statistics", 5),
        ("inputs", [1, 2, 3, 4]),
        ("inputs", [{"files": [{}]}, {"files": 1}, {}, {}]),
    ],
)
def test_a_file_of_statistics_of_another_shape_is_refused(
    field: str, value: Any, paths: list[Path], tmp_path: Path
) -> None:
    kept = tmp_path / "kept.json"
    merge_checkpoints(ties(paths), tmp_path / "1", statistics=kept)
    content = json.loads(kept.read_text()) | {field: value}
    kept.write_text(json.dumps(content))
    with pytest.raises(ArgumentError, match=r"kept\.json is not a file of statistics"):
        merge_checkpoints(ties(paths), tmp_path / "2", statistics=kept)
    assert json.loads(kept.read_text()) == content and not (tmp_path / "2").exists()


@pytest.mark.parametrize("value", [None, "many", {}, [["a"]], [[1], [1, 2]], [[10**30]], {"shape": [3], "bits": [1]}])
@pytest.mark.parametrize("method", ["ties", "pcb"])
def test_a_statistic_that_cannot_be_loaded_is_refused(
    method: str, value: Any, paths: list[Path], tmp_path: Path
) -> None:
    config = config_for(method, paths, WEIGHTS, density=0.2, scope="model")
    kept = tmp_path / "kept.json"
    merge_checkpoints(config, tmp_path / "1", statistics=kept)
    content = json.loads(kept.read_text())
    name, of = (content["statistics"][0][key] for key in ("name", "of"))
    for entry in ({"name": name, "of": of, "value": value}, {"name": name, "of": of}):
        kept.write_text(json.dumps(content | {"statistics": [entry]}))
        with pytest.raises(ArgumentError, match=r"kept\.json is not a file of statistics"):
            plan_checkpoints(config, statistics=kept)


def test_statistics_stand_beside_the_output_whatever_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work.d"
    work.mkdir()
    monkeypatch.chdir(work)
    beside = tmp_path / "work.d.statistics.json"
    assert _statistics_path(None, ".") == _statistics_path(None, "sub.d/..") == beside
    assert _statistics_path(None, "..") == tmp_path.with_name(tmp_path.name + ".statistics.json")
    for name in ("out", "out.", ".out", "v1.5", "a.tar.gz"):
        assert _statistics_path(None, name) == _statistics_path(None, f"{name}/") == work / f"{name}.statistics.json"
    assert _statistics_path(None, "/") is None and _statistics_path(None, None) is None
    assert _statistics_path("kept.json", ".") == Path("kept.json")


def test_statistics_that_cannot_be_kept_do_not_undo_the_merge(paths: list[Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    report = merge_checkpoints(ties(paths), tmp_path / "out", statistics=tmp_path / "gone")
    (tmp_path / "gone").unlink()
    (tmp_path / "gone").mkdir()
    with pytest.raises(ArgumentError, match="cannot be read"):
        merge_checkpoints(ties(paths), tmp_path / "out2", statistics=tmp_path / "gone")
    assert load(tmp_path / "out").keys() and report.passes == 2


def test_a_merge_that_needs_no_statistics_leaves_no_file(paths: list[Path], tmp_path: Path) -> None:
    merge_checkpoints(ties(paths, scope="tensor"), tmp_path / "out")
    merge_checkpoints(ties(paths, density=1.0), tmp_path / "all")
    assert not list(tmp_path.glob("*.statistics.json"))


# -- NaN, refusals, plans


@pytest.mark.parametrize("cached", [False, True])
def test_nan_is_counted_once_and_zeroed_in_every_pass(cached: bool, tmp_path: Path) -> None:
    base, tuned = family()
    name = "model.layers.0.self_attn.q_proj.weight"
    tuned[1][name].view(-1)[5] = float("nan")
    zeroed = [one | {name: torch.nan_to_num(one[name])} for one in tuned]
    paths = save_family(tmp_path / "nan", base, tuned)
    clean = save_family(tmp_path / "clean", base, zeroed)
    kept = tmp_path / "kept.json"
    if cached:
        merge_checkpoints(ties(paths, [1.0, 1.0, 1.0]), tmp_path / "0", on_nonfinite="zero", statistics=kept)
    report = merge_checkpoints(ties(paths), tmp_path / "1", on_nonfinite="zero", statistics=kept)
    assert report.passes == (1 if cached else 2)
    assert report.nonfinite == {str(paths[2]): {name: (1, 0)}}
    assert report.digest == merge_checkpoints(ties(clean), tmp_path / "2").digest


def test_parameters_that_change_along_the_layers_do_not_go_with_the_whole_model(paths: list[Path]) -> None:
    with pytest.raises(ConfigError, match="density is .* but .* with scope = model it must be one value"):
        plan_checkpoints(ties(paths, density=[0.2, 0.8]))


def test_mergekits_numbers_do_not_go_with_the_whole_model(paths: list[Path]) -> None:
    with pytest.raises(ConfigError, match="numerics fp32 only"):
        plan_checkpoints(ties(paths), numerics="mergekit")


def test_a_scope_that_is_misspelt() -> None:
    base, tuned = family()
    with pytest.raises(ParameterError, match="Did you mean model"):
        fastmerge.merge(tuned, base=base, method="ties", weight=1.0, density=0.5, scope="modle")


def test_the_plan_counts_passes_and_bytes(paths: list[Path]) -> None:
    plan = plan_checkpoints(ties(paths))
    one_pass = sum(job.stored_bytes for job in plan.counted)
    assert plan.model_passes == 1 and plan.passes == 2
    assert plan.bytes_read == one_pass + sum(job.bytes_read for job in plan.jobs)
    assert "2, all but the last for statistics of the whole model" in "\n".join(plan.lines())
    loads = [load for load in plan.loads() if load.model and not load.sample]
    assert sum(load.numel for load in loads) == sum(job.numel for job in plan.counted)
    assert [load.last for load in loads] == [False] * (len(loads) - 1) + [True]


def test_a_sample_has_a_share_of_every_tensor() -> None:
    base, tuned = family()
    plan = make_plan(
        fastmerge.methods.get("ties"),
        StateDictSource("base", base),
        [StateDictSource(str(index), one) for index, one in enumerate(tuned)],
        lambda name: ({"scope": "model"}, [{"weight": 1.0, "density": 0.5}] * len(tuned)),
        budget=1 << 62,
    )
    samples = [load for load in plan.loads() if load.sample]
    assert {load.job.name for load in samples} == {job.name for job in plan.counted}
    for sample in samples:
        assert sum(count for _, count in sample.spans) == sample.numel
        assert all(first >= 0 and first + count <= sample.job.numel for first, count in sample.spans)


def test_tensors_of_one_shape_are_sampled_in_different_places() -> None:
    base, tuned = family(shapes={"a": (3000, 4000), "b": (3000, 4000)})
    plan = make_plan(
        fastmerge.methods.get("pcb"),
        StateDictSource("base", base),
        [StateDictSource(str(index), one) for index, one in enumerate(tuned)],
        lambda name: ({}, [{}] * len(tuned)),
        budget=1 << 62,
    )
    one, other = ({first for first, _ in load.spans} for load in plan.loads() if load.sample)
    assert len(one) > 1000 and len(one & other) < 10
