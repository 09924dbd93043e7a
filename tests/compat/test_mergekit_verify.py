"""`fastmerge verify`: right merges pass beside mergekit's own functions, and one element that is off is found."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastmerge import methods
from fastmerge.engine.jobs import Job
from fastmerge.errors import ArgumentError
from fastmerge.integrations.mergekit import agreement
from fastmerge.methods.base import Method
from tests.engine.small_family import family, save_family

pytest.importorskip("mergekit", reason="no mergekit (the extra `peers`): there is nothing to verify against")

from tests.compat.mergekit_calls import RELEASE

if RELEASE != "0.1.5":
    pytest.skip(
        "these are 0.1.5's numbers; of 0.1.4 `fastmerge verify` says what it does otherwise", allow_module_level=True
    )

from fastmerge.integrations import mergekit as inside
from fastmerge.integrations.mergekit import peer as peers
from fastmerge.integrations.mergekit import verify as verifying
from fastmerge.integrations.mergekit.verify import sample, verify

SHAPES = {
    "model.embed_tokens.weight": (67, 24),
    "model.layers.0.mlp.up_proj.weight": (40, 51),
    "model.layers.1.mlp.up_proj.weight": (40, 51),
    "model.norm.weight": (301,),
}
WEIGHTS = (1.0, 0.7, 0.4, 0.2, 0.9)
COMMON = [name for name in methods.names() if name not in ("pcb", "fr")]
WITH_PEERS_NUMERICS = ("linear", "passthrough", *agreement.CONSENSUS)


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """A base and five fine-tunes in each dtype: directories."""
    root = tmp_path_factory.mktemp("families")
    made = {}
    for name in ("bfloat16", "float16", "float32"):
        base, tuned = family(5, getattr(torch, name), SHAPES)
        made[name] = save_family(root / name, base, tuned)
    return made


def config(method: str, paths: list[Path], models: int = 3, **parameters: Any) -> dict[str, Any]:
    """A merge with a gradient and a filter, where the method has parameters that can have them."""
    chosen, known = methods.get(method), methods.parameters(method)
    given: dict[str, Any] = {"density": [0.3, 0.7], "select_topk": 0.4, "epsilon": 1e-4, "t": 0.3} | parameters
    if method in ("della", "della_linear"):
        given["epsilon"] = 0.1
    if method == "nearswap":
        given["t"] = 1e-4
    listed = []
    for path, weight in list(zip(paths[1:], WEIGHTS, strict=True))[: chosen.most_models or models]:
        filters = [{"filter": "mlp", "value": weight / 2}, {"value": weight}]
        listed.append({"model": str(path)} | ({"parameters": {"weight": filters}} if "weight" in known else {}))
    result = {
        "merge_method": method,
        "models": listed,
        "parameters": {name: value for name, value in given.items() if name in known},
    }
    return result | ({"base_model": str(paths[0])} if chosen.needs_base or chosen.takes_base else {})


def test_methods_that_mergekit_lacks_are_these() -> None:
    from mergekit.merge_methods import registry

    assert sorted(COMMON) == sorted(set(registry._METHODS) - {"pcb", "fr"})


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("method", COMMON)
def test_right_merges_are_found_right_and_every_difference_has_a_reason(method, dtype, families) -> None:
    for numerics in ("fp32", "mergekit") if method in WITH_PEERS_NUMERICS else ("fp32",):
        report = verify(config(method, families[dtype]), numerics=numerics)
        assert report.why_not is None and report.wrong == []
        assert [row.name for row in report.rows] == sorted(SHAPES) and not any(row.refused for row in report.rows)
        for row in report.rows:
            assert row.found.elements == row.of
            assert sum(row.found.reasons.values()) == row.found.differ and set(row.found.reasons) <= {
                *agreement.REASONS
            }
            assert (row.found.differ > 0) == (row.found.largest > 0) == (row.found.ulps > 0) == (row.found.relative > 0)
        if dtype == "bfloat16" and numerics == "fp32" and method not in ("linear", "passthrough", "slerp", "nuslerp"):
            assert report.reasons["rounding"] > 0
        assert ("draws" in report.reasons) == (method in agreement.RANDOM)


@pytest.mark.parametrize("numerics", ["fp32", "mergekit"])
@pytest.mark.parametrize("method", ["ties", "breadcrumbs_ties", "task_arithmetic", "linear"])
def test_float16_rescaled_and_five_models_are_right_too(method, numerics, families) -> None:
    for dtype in ("float16", "float32"):
        report = verify(config(method, families[dtype], models=5, rescale=True, normalize=True), numerics=numerics)
        assert report.why_not is None and report.wrong == []


def off_by(steps: int, name: str, monkeypatch: pytest.MonkeyPatch, method: str) -> list[float]:
    """Let the method get one element of one tensor wrong, by steps of the last place. What it was is noted."""
    chosen = type(methods.get(method))
    right, was = chosen.merge, []

    def wrong(self: Method, context: Any, chunk: Any, known: Any, out: torch.Tensor) -> None:
        right(self, context, chunk, known, out)
        if context.name == name:
            # Not a tied one: nothing is claimed about those.
            place = int((chunk.models[0].float() - (0 if chunk.base is None else chunk.base.float())).abs().argmax())
            was.append(float(out[place]))
            bits = out.view(torch.int16 if out.dtype.itemsize == 2 else torch.int32)
            bits[place] += steps

    monkeypatch.setattr(chosen, "merge", wrong)
    return was


@pytest.mark.parametrize("method", COMMON)
def test_one_element_that_is_off_by_two_units_is_found(method, families, monkeypatch) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    was = off_by(2, name, monkeypatch, method)
    report = verify(config(method, families["bfloat16"], select_topk=1.0, epsilon=0.0 if method[0] == "r" else 0.1))
    assert was and report.wrong == [name]
    (row,) = (row for row in report.rows if row.name == name)
    assert row.found.wrong == row.found.reasons[agreement.UNEXPLAINED] == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("method", WITH_PEERS_NUMERICS)
def test_with_mergekits_numerics_one_unit_is_found(method, dtype, families, monkeypatch) -> None:
    name = "model.norm.weight"
    off_by(1, name, monkeypatch, method)
    report = verify(config(method, families[dtype], rescale=False), numerics="mergekit")
    assert report.wrong == [name]


def test_parameters_that_are_read_otherwise_are_found(families, monkeypatch) -> None:
    from fastmerge.merging import ParameterTable

    right = ParameterTable.for_tensor

    def wrong(self: ParameterTable, name: str) -> Any:
        shared, each = right(self, name)
        return shared, [{**given, "weight": 0.5} if "norm" in name else given for given in each]

    monkeypatch.setattr(ParameterTable, "for_tensor", wrong)
    assert verify(config("task_arithmetic", families["bfloat16"])).wrong == ["model.norm.weight"]


def shift(rule: Any, **changed: Any) -> Any:
    from dataclasses import replace

    return replace(rule, **changed)


@pytest.mark.parametrize("method", agreement.RANDOM)
def test_a_random_method_that_keeps_too_much_or_scales_wrongly_is_found(method, families, monkeypatch) -> None:
    from fastmerge.methods.consensus import ConsensusMethod

    right = ConsensusMethod._rule

    def more(self: Any, context: Any, chunk: Any, known: Any) -> Any:
        rule = right(self, context, chunk, known)
        drops = rule.method in ("bernoulli", "della")
        return shift(rule, density=[one + 0.1 for one in rule.density]) if drops else rule

    given = config(method, families["float32"], density=0.5)
    with monkeypatch.context() as patched:
        patched.setattr(ConsensusMethod, "_rule", more)
        report = verify(given)
        assert "model.layers.0.mlp.up_proj.weight" in report.wrong
        assert not any(row.found.wrong for row in report.rows)
    with monkeypatch.context() as patched:
        from fastmerge.methods.statistics import Rescale

        finish = Rescale.finish
        patched.setattr(Rescale, "finish", lambda *given: [1.001 * scale for scale in finish(*given)])
        assert verify(given).wrong == sorted(SHAPES)


def test_what_is_kept_at_random_is_told_for_each_model(families) -> None:
    report = verify(config("dare_ties", families["bfloat16"], density=[0.5, 1.0]))
    by_name = {row.name: row for row in report.rows}
    last = by_name["model.layers.1.mlp.up_proj.weight"]
    first = by_name["model.layers.0.mlp.up_proj.weight"]
    assert last.kept == []  # nothing is dropped there
    assert [kept.model for kept in first.kept] == [str(path) for path in families["bfloat16"][1:4]]
    for kept in first.kept:
        assert kept.density == 0.5 and kept.wrong == 0
        assert 0.4 < kept.here < 0.6 and 0.4 < kept.mergekit < 0.6 and kept.here != kept.mergekit
    given = config("dare_ties", families["bfloat16"], density=0.5)
    given["models"][1]["parameters"]["density"] = 1.0
    for row in verify(given).rows:
        assert [kept.model for kept in row.kept] == [str(families["bfloat16"][place]) for place in (1, 3)]


def test_the_base_is_one_model_more_where_mergekit_takes_it_for_one(families) -> None:
    given = config("linear", families["bfloat16"]) | {"base_model": str(families["bfloat16"][0])}
    given["parameters"]["weight"] = 0.3
    assert verify(given).wrong == []
    listed = given | {"models": [{"model": given["base_model"], "parameters": {"weight": 0.1}}, *given["models"]]}
    assert verify(listed, numerics="mergekit").wrong == []


# -- the sample


def test_large_tensors_are_compared_in_part_and_the_seed_says_which(families) -> None:
    given = config("ties", families["bfloat16"])
    rows = [verify(given, elements=200, seed=seed).rows for seed in (0, 0, 1)]
    assert [row.found.elements for row in rows[0]] == [192, 153, 153, 200]
    assert [row.of for row in rows[0]] == [67 * 24, 40 * 51, 40 * 51, 301]
    assert all(row.right for row in rows[0]) and rows[0] == rows[1] != rows[2]
    assert [row.found.elements for row in verify(given, elements=1).rows] == [24, 51, 51, 1]


def drawn_jobs() -> list[Job]:
    """A model of 30 layers, as far as the sample looks at it."""
    shapes = {"embed_tokens.weight": 9000, "norm.weight": 7, "lm_head.weight": 9000}
    for layer in range(30):
        shapes |= {f"layers.{layer}.q.weight": 100 + layer, f"layers.{layer}.norm.weight": 10}
    made = []
    for name, numel in shapes.items():
        parameters = (0.5,) if "layers.2" in name else (0.7,)
        context = SimpleNamespace(parameters=parameters)
        made.append(SimpleNamespace(name=name, numel=numel, context=context, held=(torch.bfloat16,)))
    return made  # type: ignore[return-value]


def test_the_sample_has_each_kind_the_largest_and_the_smallest_and_is_reproducible() -> None:
    jobs = drawn_jobs()
    random.Random(3).shuffle(jobs)
    for seed in range(5):
        chosen = sample(jobs, 8, seed)
        names = [job.name for job in chosen]
        assert len(set(names)) == 8 and names == [job.name for job in jobs if job.name in names]
        assert {"embed_tokens.weight", "norm.weight", "lm_head.weight"} <= {*names}
        assert any(".q." in name for name in names) and any(".norm." in name for name in names)
        assert {job.context.parameters for job in chosen if job.context} == {(0.5,), (0.7,)}
        assert chosen == sample(jobs, 8, seed)
    assert sample(jobs, 8, 0) != sample(jobs, 8, 1)
    assert sample(jobs, 63, 0) == jobs and len(sample(jobs, 1, 0)) == 1


# -- where nothing can be compared


def test_methods_that_mergekit_lacks_are_said_not_failed(families) -> None:
    for given in (
        config("pcb", families["bfloat16"], density=0.1),
        config("ties", families["bfloat16"], scope="model"),
    ):
        given["parameters"]["density"] = 0.1
        report = verify(given)
        assert report.rows == [] and report.wrong == [] and "mergekit" in str(report.why_not)


def test_a_tensor_that_mergekit_refuses_is_not_compared(families, monkeypatch) -> None:
    right = peers._Release015.merge

    def refuse(self: Any, method: str, group: Any, values: Any, dtype: Any) -> torch.Tensor:
        if "norm" in group.name:
            raise ValueError("no\nnorms")
        return right(self, method, group, values, dtype)

    monkeypatch.setattr(peers._Release015, "merge", refuse)
    report = verify(config("ties", families["bfloat16"]))
    assert report.rows[-1].refused == "ValueError: no norms" and report.rows[-1].found.elements == 0
    assert report.wrong == [] and report.why_not is None
    shaped = lambda self, method, group, values, dtype: torch.zeros(3)  # noqa: E731
    monkeypatch.setattr(peers._Release015, "merge", shaped)
    assert (
        verify(config("ties", families["bfloat16"])).rows[0].refused
        == "ValueError: its ties gives a tensor of shape [3]"
    )
    monkeypatch.setattr(peers._Release015, "merge", refuse)
    monkeypatch.setattr(verifying, "sample", lambda jobs, count, seed: jobs[-1:])
    assert "mergekit merges none of these tensors: ValueError" in str(
        verify(config("ties", families["bfloat16"])).why_not
    )


@pytest.fixture
def enabled() -> Iterator[None]:
    inside.enable()
    yield
    inside.disable()


def test_while_fastmerge_computes_inside_mergekit_there_is_nothing_to_compare(families, enabled) -> None:
    with pytest.raises(inside.MergekitError, match="nothing to compare it with; call"):
        verify(config("ties", families["bfloat16"]))


def test_an_unknown_mergekit_and_wrong_arguments_are_refused(families, monkeypatch) -> None:
    given = config("ties", families["bfloat16"])
    for wrong in ({"tensors": 0}, {"elements": 0}, {"tensors": True}):
        with pytest.raises(ArgumentError, match="must be a whole number from 1 on"):
            verify(given, **wrong)
    monkeypatch.setattr(peers, "installed", lambda: "9.9")
    with pytest.raises(inside.MergekitError, match="mergekit 9.9 is not known .*pip install mergekit==0.1.5"):
        verify(given)


# -- the rules


def case(**changed: Any) -> agreement.Case:
    base = torch.zeros(6)
    model = torch.tensor([4.0, 2.0, 2.0, 1.0, 0.5, 0.0])
    known: dict[str, Any] = {
        "method": "ties",
        "numerics": "mergekit",
        "tensors": [base, model],
        "has_base": True,
        "values": {"weight": [1.0], "density": [1 / 3], "normalize": True, "rescale": False, "lambda": 1.0},
        "compute": torch.float32,
    }
    return agreement.Case(**(known | changed))


def test_only_elements_that_equal_the_threshold_are_open() -> None:
    ours, theirs = torch.tensor([4.0, 2, 0, 0, 0, 0]), torch.tensor([4.0, 0, 2, 0, 0, 0])
    found = agreement.compare(case(), ours, theirs, theirs)
    assert (found.differ, found.wrong, found.reasons) == (2, 0, {"ties": 2})
    assert (found.largest, found.relative) == (2.0, pytest.approx((8 / 20) ** 0.5))
    ours[3] = 1.0
    found = agreement.compare(case(), ours, theirs, theirs)
    assert (found.differ, found.wrong, found.reasons) == (3, 1, {"ties": 2, agreement.UNEXPLAINED: 1})
    whole = case(values=case().values | {"density": [0.5]})
    assert not agreement.tied(whole).any()


def test_what_another_release_does_otherwise_is_not_judged() -> None:
    ours, theirs = torch.ones(6), torch.zeros(6)
    assert agreement.compare(case(otherwise=True), ours, theirs, theirs).reasons == {"release": 6}
    old = peers._Release014.__new__(peers._Release014)
    group = peers.Group("w", ("a", "b"), (torch.zeros(50), torch.ones(50)), True)
    outliers = {"density": [0.5], "gamma": [0.02]}
    assert not old.does_otherwise("breadcrumbs", group, outliers, "fp32")
    assert old.does_otherwise("breadcrumbs_ties", group, outliers | {"gamma": [0.01]}, "fp32")
    assert not old.does_otherwise("breadcrumbs", group, {"density": [1.0], "gamma": [0.01]}, "fp32")
    assert old.does_otherwise("linear", group, {}, "mergekit") and not old.does_otherwise("linear", group, {}, "fp32")
    assert not old.does_otherwise("ties", group, outliers, "mergekit")


def test_units_of_the_last_place() -> None:
    x = torch.tensor([1.0, 1.99, 2.0, -0.75, 0.0, 1e-42, 3e38], dtype=torch.float64)
    units = agreement.unit_of(x, torch.bfloat16)
    assert units.tolist()[:4] == [2.0**-7, 2.0**-7, 2.0**-6, 2.0**-8]
    assert units.tolist()[4] == units.tolist()[5] == torch.finfo(torch.bfloat16).smallest_normal * 2.0**-7
    assert agreement.unit_of(torch.tensor([1.0]).double(), torch.float32).item() == 2.0**-23


def test_a_merge_in_float32_that_was_rounded_step_by_step_is_wrong_even_where_mergekit_writes_the_same() -> None:
    exact = torch.tensor([1.0 + 2.0**-7 + 2.0**-8, 0, 0, 0, 0, 0])
    theirs = torch.tensor([1.0, 0, 0, 0, 0, 0]).bfloat16()
    given = case(numerics="fp32", compute=torch.bfloat16)
    found = agreement.compare(given, theirs, theirs, exact)
    assert (found.differ, found.wrong) == (0, 1)
    found = agreement.compare(given, exact.bfloat16(), theirs, exact)
    assert (found.wrong, found.reasons) == (0, {"rounding": 1})


def test_float16_that_overflows_in_mergekit_is_no_fault() -> None:
    theirs = torch.tensor([float("nan"), 2, 2, 1, 1, 0], dtype=torch.float16)
    ours = theirs.clone().fill_(1).copy_(torch.tensor([3.0, 2, 2, 1, 1, 0]))
    given = case(compute=torch.float16, values=case().values | {"density": [1.0]})
    assert agreement.compare(given, ours, theirs, theirs).reasons == {"overflow": 1}
    wide = case(compute=torch.bfloat16, values=given.values)
    assert agreement.compare(wide, ours, theirs, theirs).wrong == 1
