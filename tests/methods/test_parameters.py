"""Names, defaults, ranges and help of the methods' parameters, and what is said about wrong ones."""

from __future__ import annotations

import json
from typing import Any

import pytest

import fastmerge
from fastmerge import methods
from fastmerge.errors import ArgumentError
from fastmerge.methods.fr import INCLUDE
from tests.engine.small_family import OTHER_FORMULAS, family

BASE, TUNED = family(2)

# As in mergekit 0.1.5.
DEFAULTS = {
    "linear": {"normalize": True},
    "task_arithmetic": {"normalize": False, "rescale": False},
    "ties": {"normalize": True, "rescale": False, "scope": "tensor"},
    "dare_linear": {"normalize": False, "rescale": True},
    "dare_ties": {"normalize": False, "rescale": True},
    "breadcrumbs": {"normalize": False, "rescale": False, "gamma": 0.01, "scope": "tensor"},
    "breadcrumbs_ties": {"normalize": False, "rescale": False, "gamma": 0.01, "scope": "tensor"},
    "della": {"normalize": True, "rescale": True, "epsilon": 0.15},
    "della_linear": {"normalize": False, "rescale": True, "epsilon": 0.15},
    "pcb": {"variant": "vision_es", "scope": "model", "density": 0.1, "lambda": 1.0},
    "fr": {
        "ratio": None,
        "mode": "ideal",
        "combine": "sum",
        "align": False,
        "include": INCLUDE,
        "exclude": "",
        "lambda": 1.0,
    },
    "slerp": {"t": None},
    "nuslerp": {"nuslerp_flatten": True, "nuslerp_row_wise": False},
    "multislerp": {"normalize_weights": True, "eps": 1e-8},
    "karcher": {"max_iter": 10, "tol": 1e-5},
    "model_stock": {"filter_wise": False},
    "passthrough": {"scale": 1.0},
    "nearswap": {"t": None},
    "sce": {"select_topk": 1.0, "int8_mask": False},
    "ram": {"epsilon": 1e-5},
    "ramplus_tl": {"r": 0.1, "alpha": 0.2, "epsilon": 1e-5},
    "arcee_fusion": {},
}
WEIGHTLESS = tuple(name for name in OTHER_FORMULAS if name not in ("nuslerp", "multislerp"))


def test_the_methods() -> None:
    assert set(methods.names()) == set(DEFAULTS)


@pytest.mark.parametrize("name", methods.names())
def test_a_description_says_everything_and_is_json(name: str) -> None:
    said = json.loads(json.dumps(methods.describe(name)))
    assert said["name"] == name and said["title"] and said["source"].startswith("https://") and said["passes"]
    by_name = {parameter["name"]: parameter for parameter in said["parameters"]}
    assert ("weight" in by_name) == (name not in WEIGHTLESS)
    if name not in WEIGHTLESS:
        assert by_name["weight"]["required"] == (name not in ("pcb", "fr")) and by_name["weight"]["per_model"]
    assert all(parameter["help"] and parameter["range"] for parameter in said["parameters"])
    expected: dict[str, Any] = dict(DEFAULTS[name])
    if name not in ("linear", "pcb", "fr", *OTHER_FORMULAS):
        expected |= {"density": 1.0, "lambda": 1.0, "int8_mask": False}
    if name not in ("linear", *OTHER_FORMULAS):
        assert by_name["lambda"]["python_name"] == "lambda_"
    if name not in ("linear", "fr", *OTHER_FORMULAS):
        assert by_name["density"]["range"] == "from 0 to 1"
    assert {key: by_name[key]["default"] for key in by_name if key != "weight"} == expected
    assert said["needs_base"] == (name not in ("linear", "nuslerp", "multislerp", "karcher", "passthrough"))
    assert said["takes_base"] == (name in ("nuslerp", "multislerp"))


def refused(**arguments: Any) -> str:
    with pytest.raises(ArgumentError) as caught:
        fastmerge.merge(TUNED, **({"base": BASE, "weight": 0.5} | arguments))
    return str(caught.value)


@pytest.mark.parametrize("density", [-0.1, 1.5, float("nan"), float("inf"), "much", True])
def test_a_density_outside_its_range_names_parameter_value_tensor_and_model(density: Any) -> None:
    message = refused(method="ties", density=[0.5, density])
    assert "density" in message and repr(density) in message and "models[1]" in message and "from 0 to 1" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "x"])
def test_weights_and_lambda_are_finite_numbers(value: Any) -> None:
    assert "weight" in refused(weight=value)
    assert "lambda" in refused(lambda_=value)


def test_a_missing_weight_names_the_model() -> None:
    with pytest.raises(ArgumentError, match=r"ties needs weight for models\[0\]"):
        fastmerge.merge(TUNED, base=BASE, method="ties")


def test_a_misspelt_parameter_gets_the_near_one() -> None:
    assert "did you mean density?" in refused(method="ties", densty=0.5)
    assert "did you mean lambda?" in refused(method="ties", lamda=0.5)


def test_a_parameter_of_another_method_is_said_to_be_that() -> None:
    assert "belongs to breadcrumbs, breadcrumbs_ties" in refused(method="ties", gamma=0.1)
    assert "belongs to slerp, nearswap" in refused(method="ties", t=0.1)
    assert "it has weight" in refused(method="ties", zzz=0.1)


def test_an_unknown_method_gets_the_near_one() -> None:
    assert "did you mean dare_ties?" in refused(method="dare_tie")


def test_lists_must_have_a_value_for_each_model() -> None:
    assert "3 values for 2 models" in refused(method="ties", weight=[1, 2, 3])


@pytest.mark.parametrize(("density", "epsilon"), [(0.1, 0.1), (0.9, 0.1), (0.1, 0.15), (0.5, 0.6)])
def test_della_refuses_probabilities_that_reach_0_or_1(density: float, epsilon: float) -> None:
    message = refused(method="della", density=density, epsilon=epsilon)
    assert "epsilon" in message and f"{density:g}" in message and "models[0]" in message and "embed_tokens" in message


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_della_takes_any_epsilon_where_nothing_is_drawn(density: float) -> None:
    assert fastmerge.merge(TUNED, base=BASE, method="della", weight=0.5, density=density, epsilon=0.5)


def test_linear_refuses_weights_without_a_mean() -> None:
    assert "add up to 0" in refused(method="linear", base=None, weight=[0.5, -0.5])
    assert fastmerge.merge(TUNED, method="linear", weight=[0.5, -0.5], normalize=False)


def test_int8_mask_is_accepted_and_changes_nothing() -> None:
    plain = fastmerge.merge(TUNED, base=BASE, weight=0.5, density=0.5)
    masked = fastmerge.merge(TUNED, base=BASE, weight=0.5, density=0.5, int8_mask=True)
    assert all(plain[name].equal(masked[name]) for name in plain)
