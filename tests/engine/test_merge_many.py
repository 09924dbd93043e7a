"""Many merges of the same models: each has the bits of a merge of its own, and what they share is found once."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastmerge
from fastmerge import methods, ops
from fastmerge.engine.executor import DictSink, execute
from fastmerge.engine.plan import Plan, make_plan
from fastmerge.engine.shared import Shared
from fastmerge.engine.sources import StateDictSource
from fastmerge.errors import ArgumentError, ArgumentTypeError, MergeError
from fastmerge.merging_in_memory import fixed_parameters
from tests.engine.small_family import Tensors, family, knows_base, taken
from tests.engine.test_same_bits import follows_peer
from tests.numeric import assert_bitwise_equal

SHAPES = {
    "model.layers.0.mlp.up_proj.weight": (37, 104),
    "model.layers.0.mlp.experts.weight": (3, 5, 16),
    "model.norm.weight": (31,),
    "model.scale": (),
    "model.none": (0, 3),
}
BASE, TUNED = family(shapes=SHAPES)

POOLS: dict[str, list[Any]] = {
    "weight": [1.0, 0.3, -0.7, 0.0],
    "density": [0.0, 0.2, 0.55, 1.0],
    "gamma": [0.0, 0.1],
    "epsilon": [0.05, 0.2],
    "lambda": [1.0, 0.6],
    "t": [0.0, 0.3, 1.0],
    "select_topk": [0.0, 0.4, 1.0],
    "scale": [1.0, 0.5],
    "r": [0.1, 0.5],
    "alpha": [0.2, 1.5],
}
OF_FORMULAS = {
    "fr": {"ratio": [0.1, 0.5], "align": [False, True], "exclude": ["", "up_proj"]},
    # Its statistics of a whole model take a while, and test_same_bits has them.
    "pcb": {"density": [0.1, 0.4], "scope": ["tensor"]},
    "linear": {"weight": [1.0, 0.3, 0.7]},
    "multislerp": {"weight": [1.0, 0.3, 0.7]},
    "nearswap": {"t": [1e-4, 1e-3]},
    "ram": {"epsilon": [0.0, 1e-4]},
    "ramplus_tl": {"epsilon": [0.0, 1e-4]},
}


def candidates_of(name: str, numerics: str) -> st.SearchStrategy[list[dict[str, Any]]]:
    """Some candidates of a method, whose values come again often enough that there is much to share."""
    drawn: dict[str, st.SearchStrategy[Any]] = {}
    required: dict[str, st.SearchStrategy[Any]] = {}
    for parameter in methods.parameters(name).values():
        pool = (POOLS | OF_FORMULAS.get(name, {})).get(parameter.name)
        if parameter.kind is bool:
            pool = [True, False]
        elif parameter.choices and pool is None:
            pool = [choice for choice in parameter.choices if numerics == "fp32" or choice != "model"]
        if pool is None:
            continue
        one = st.sampled_from(pool)
        if parameter.per_model:
            one |= st.lists(one, min_size=len(taken(name, TUNED)), max_size=len(taken(name, TUNED)))
        (required if parameter.required or parameter.name in ("t", "scope") else drawn)[parameter.python_name] = one
    return st.lists(st.fixed_dictionaries(required, optional=drawn), min_size=2, max_size=3)


def assert_same(found: Tensors, expected: Tensors) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert_bitwise_equal(found[name], tensor)


@pytest.mark.parametrize("numerics", ["fp32", "mergekit"])
@pytest.mark.parametrize("name", methods.names())
def test_each_has_the_bits_of_a_merge_of_its_own(name: str, numerics: str) -> None:
    if numerics == "mergekit" and not follows_peer(name):
        return  # refused
    base, tuned = BASE if knows_base(name) else None, taken(name, TUNED)
    common: dict[str, Any] = {"base": base, "method": name, "numerics": numerics, "seed": 7}

    @settings(max_examples=2 if name == "pcb" else 6 if numerics == "fp32" else 3, deadline=None)
    @given(candidates_of(name, numerics), st.booleans())
    def check(candidates: list[dict[str, Any]], reuse: bool) -> None:
        try:
            expected = [fastmerge.merge(tuned, **common, **candidate) for candidate in candidates]
        except ArgumentError as error:
            # Weights that add up to 0, an epsilon too large for the density.
            with pytest.raises(ArgumentError, match=rf"candidates\[\d\]: {re.escape(str(error))}"):
                fastmerge.merge_many(tuned, candidates, reuse=reuse, **common)
            return
        results = fastmerge.merge_many(tuned, candidates, reuse=reuse, **common)
        for candidate, alone, (told, merged) in zip(candidates, expected, results, strict=True):
            assert told == candidate
            assert_same(merged, alone)

    check()


def test_methods_side_by_side() -> None:
    """The base is one model more to linear, and nearswap takes a model alone, so their inputs are not those of ties."""
    candidates = [
        {"density": 0.4, "method": "ties"},
        {"density": 0.2, "method": "ties"},
        {"density": 0.7, "method": "ties"},
        {"method": "linear"},
        {"method": "linear", "weight": [1.0, 2.0]},
        {"density": 0.4, "rescale": True, "method": "ties", "lambda": 0.5},
        {"density": 0.4, "method": "breadcrumbs", "lambda_": 0.5},
        {"density": 0.4, "rescale": True, "method": "dare_ties"},
    ]
    common: dict[str, Any] = {"base": BASE, "seed": 3, "exclude": "norm"}
    for candidate, merged in fastmerge.merge_many(TUNED[:1], candidates, weight=0.7, **common):
        assert_same(merged, fastmerge.merge(TUNED[:1], **common, **{"weight": 0.7} | candidate))
    ties = [one for one in candidates if one["method"] == "ties"]
    for candidate, merged in fastmerge.merge_many(TUNED[:1], ties, weight=0.7, lambda_=0.2, **common):
        expected = {"weight": 0.7, "lambda_": candidate.get("lambda", 0.2), **candidate}
        expected.pop("lambda", None)
        assert_same(merged, fastmerge.merge(TUNED[:1], **common, **expected))


@pytest.mark.parametrize(
    ("method", "common", "name", "values"),
    [
        ("ties", {"density": 0.4, "rescale": True}, "scope", ("tensor", "model")),
        ("breadcrumbs", {"density": 0.4, "rescale": True}, "gamma", (0.02, 0.3)),
        ("dare_ties", {}, "density", (0.3, 0.6)),
        ("della", {"density": 0.5}, "epsilon", (0.05, 0.4)),
        ("ramplus_tl", {"r": 0.5, "alpha": 1.5}, "epsilon", (0.0, 3e-4)),
        ("pcb", {"scope": "tensor"}, "density", (0.1, 0.4)),
        ("pcb", {"scope": "tensor", "density": 0.2}, "variant", ("nlp", "paper")),
    ],
)
def test_what_a_state_follows_from(method: str, common: dict[str, Any], name: str, values: tuple[Any, ...]) -> None:
    """One value apart, and the results differ: whoever shared more than may be would be seen."""
    if "weight" in methods.parameters(method):
        common = {"weight": 1.0, **common}
    candidates = [{name: value} for value in values]
    results = fastmerge.merge_many(TUNED, candidates, base=BASE, method=method, **common)
    alone = [fastmerge.merge(TUNED, base=BASE, method=method, **common, **one) for one in candidates]
    for expected, (_, merged) in zip(alone, results, strict=True):
        assert_same(merged, expected)
    assert any(not torch.equal(alone[0][key], alone[1][key]) for key in alone[0])


def test_other_inputs_share_nothing() -> None:
    """Of models in another order, or of one alone, what is known of a tensor is something else."""
    sources = [StateDictSource(f"models[{index}]", one) for index, one in enumerate(TUNED)]
    based, ties = StateDictSource("base", BASE), methods.get("ties")
    chosen = [[0, 1], [1, 0], [2, 1], [0, 1]]

    def planned(numbers: list[int]) -> Plan:
        found = [sources[number] for number in numbers]
        parameters = fixed_parameters(ties, {"weight": 1.0, "density": 0.4}, len(found))
        return make_plan(ties, based, found, parameters, budget=1 << 62)

    plans = [planned(numbers) for numbers in chosen]
    shared = Shared(plans)
    for numbers, plan in zip(chosen, plans, strict=True):
        sink = DictSink(plan)
        execute(plan, sink, shared=shared)
        assert_same(sink.tensors, fastmerge.merge([TUNED[n] for n in numbers], base=BASE, weight=1.0, density=0.4))


def test_what_is_shared_is_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, list[Any]] = {}

    def count(name: str) -> None:
        real = getattr(ops, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls.setdefault(name, []).append(args)
            return real(*args, **kwargs)

        monkeypatch.setattr(ops, name, counted)

    for name in ("magnitude_bounds", "l1_sums", "count_nonfinite", "gram", "key_window_", "ram_counts", "pcb_rule"):
        count(name)

    def made(candidates: list[dict[str, Any]], **common: Any) -> dict[str, int]:
        calls.clear()
        for _ in fastmerge.merge_many(TUNED, candidates, base=BASE, weight=1.0, **common):
            pass
        return {name: len(found) for name, found in calls.items()}

    tensors = 3  # with a threshold; the other two have one element and none
    inputs = 4 * 4
    grid = [{"density": d, "lambda": x} for d in (0.2, 0.5, [0.2, 0.3, 0.5], 1.0) for x in (0.5, 1.0)]
    assert made(grid) == {"magnitude_bounds": tensors, "count_nonfinite": inputs}
    ranks = [(call[1], call[3]) for call in calls["magnitude_bounds"]]
    assert all(len(models) == len(last) == 3 + 3 + 1 for models, last in ranks), "no rank comes twice"
    assert made(grid[2:4], rescale=True)["l1_sums"] == 4
    assert made(grid[:6], rescale=True)["l1_sums"] == 3 * 4
    assert made([{"density": 0.3, "weight": w} for w in (1.0, 2.0)], scope="model")["key_window_"] == 4
    assert made([{"weight": w} for w in (1.0, 2.0)], method="multislerp")["gram"] == 4
    assert made([{"method": "pcb", "lambda": x, "scope": "tensor"} for x in (1.0, 2.0)])["pcb_rule"] == 4


def test_nan_is_dealt_with_as_in_each_merge() -> None:
    tuned = [{name: x.clone() for name, x in one.items()} for one in TUNED]
    tuned[1]["model.norm.weight"][3] = torch.nan
    common: dict[str, Any] = {"base": BASE, "weight": 1.0}
    candidates = [{"density": 0.3}, {"density": 0.6}]
    with pytest.raises(MergeError, match=r"'model.norm.weight' of models\[1\] holds 1 NaN"):
        next(fastmerge.merge_many(tuned, candidates, **common))
    for candidate, merged in fastmerge.merge_many(tuned, candidates, on_nonfinite="zero", **common):
        assert_same(merged, fastmerge.merge(tuned, on_nonfinite="zero", **common, **candidate))
    results = fastmerge.merge_many(tuned, candidates, on_nonfinite="warn", **common)
    for _ in candidates:
        with pytest.warns(UserWarning, match="1 NaN"):
            next(results)


def test_memory_is_used_again_only_where_that_is_asked_for() -> None:
    candidates = [{"density": 0.3}, {"density": 0.6}, {"density": 0.3, "method": "dare_linear"}]

    def places(reuse: bool) -> list[int]:
        found = [merged for _, merged in fastmerge.merge_many(TUNED, candidates, base=BASE, weight=1.0, reuse=reuse)]
        return [one["model.norm.weight"].data_ptr() for one in found]

    assert len(set(places(True))) == 1 and len(set(places(False))) == 3


@pytest.mark.parametrize(
    ("candidates", "more", "sentence"),
    [
        ([], {}, "candidates is empty"),
        ([{"density": 0.3}, {"densty": 0.3}], {}, r"candidates\[1\]: ties has no parameter densty; did you mean den"),
        ([{"density": 1.3}], {}, r"candidates\[0\]: density = 1.3 for .* is not usable"),
        ([{"weight": [1.0]}], {}, r"candidates\[0\]: weight has 1 values for 3 models"),
        ([{"method": "tie"}], {}, r"candidates\[0\]: .*did you mean ties"),
        ([{}, {"method": "slerp", "t": 0.5}], {"weight": 1.0}, r"candidates\[1\]: slerp merges exactly 1 model"),
        ([{"method": "linear", "density": 0.5}], {}, r"candidates\[0\]: linear has no parameter density"),
        ([{"density": [0.5, 0.5, 2]}], {"weight": 1.0}, r"candidates\[0\]: density = 2 .* of models\[2\]"),
    ],
)
def test_what_is_wrong_is_told_at_once(candidates: list[Any], more: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ArgumentError, match=sentence):
        fastmerge.merge_many(TUNED, candidates, base=BASE, **{"weight": 1.0, **more})


def test_shapes_and_kinds_are_told_at_once() -> None:
    other = {**TUNED[0], "model.norm.weight": torch.zeros(30)}
    with pytest.raises(ArgumentError, match="'model.norm.weight' is 31 in base but 30"):
        fastmerge.merge_many([other], [{}], base=BASE, weight=1.0)
    with pytest.raises(ArgumentTypeError, match=r"candidates\[0\] must be a dict"):
        fastmerge.merge_many(TUNED, [0.3], base=BASE, weight=1.0)  # type: ignore[list-item]
    with pytest.raises(ArgumentTypeError, match="candidates must be a list"):
        fastmerge.merge_many(TUNED, {"density": 0.3}, base=BASE, weight=1.0)  # type: ignore[arg-type]
