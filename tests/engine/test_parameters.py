"""Parameters for one tensor: filters, gradients along the layers, and which level of the config has the say."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fastmerge.engine.config import load_config
from fastmerge.engine.parameters import ParameterTable, convert, count_layers, layer_position, layer_stack, resolve
from fastmerge.errors import ConfigError

MLP = "model.layers.2.mlp.up_proj.weight"
ATTENTION = "model.layers.2.self_attn.q_proj.weight"
NORM = "model.norm.weight"


# -- layers


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("model.layers.3.mlp.up_proj.weight", ("model.layers", 3)),
        ("model.layers.12.block_sparse_moe.experts.5.w1.weight", ("model.layers", 12)),
        ("layers.0.attention.wq.weight", ("layers", 0)),
        ("transformer.h.7.attn.c_attn.bias", ("transformer.h", 7)),
        ("h.7.mlp.c_fc.weight", ("h", 7)),
        ("transformer.blocks.3.norm_1.weight", ("transformer.blocks", 3)),
        ("encoder.block.2.layer.1.DenseReluDense.wi.weight", ("encoder.block", 2)),
        ("bert.encoder.layer.11.output.dense.weight", ("bert.encoder.layer", 11)),
        ("model.visual.blocks.4.attn.qkv.weight", ("model.visual.blocks", 4)),
        ("visual.transformer.resblocks.4.ln_1.weight", ("visual.transformer.resblocks", 4)),
        ("backbone.layers.9.mixer.A_log", ("backbone.layers", 9)),
        ("model.layers.3", ("model.layers", 3)),
        ("model.embed_tokens.weight", None),
        ("lm_head.weight", None),
        ("model.layers.weight", None),
        ("model.layers_3.weight", None),
        ("flayers.3.weight", None),
        ("mlp.0.weight", None),
        ("", None),
    ],
)
def test_the_layer_is_found_in_the_name(name: str, found: tuple[str, int] | None) -> None:
    assert layer_stack(name) == found


def names_of(stack: str, count: int) -> list[str]:
    return [f"{stack}.{index}.w" for index in range(count)]


@pytest.mark.parametrize(
    ("names", "config", "layers"),
    [
        (names_of("model.layers", 4), None, {"model.layers": 4}),
        (names_of("model.layers", 4), {"num_hidden_layers": 4}, {"model.layers": 4}),
        (names_of("model.layers", 5), {"num_hidden_layers": 4}, {"model.layers": 4}),
        (names_of("model.layers", 3), {"num_hidden_layers": 4}, {"model.layers": 4}),
        (names_of("h", 3), {"n_layer": 4}, {"h": 4}),
        (names_of("h", 3), {"num_layers": 4}, {"h": 4}),
        (names_of("h", 3), {"num_hidden_layers": True}, {"h": 3}),
        (names_of("h", 3), {"num_hidden_layers": 0}, {"h": 3}),
        (
            [*names_of("m.layers", 7), *names_of("vision.blocks", 2)],
            {"text_config": {"num_hidden_layers": 6}, "num_hidden_layers": 9},
            {"m.layers": 6, "vision.blocks": 2},
        ),
        (
            [*names_of("encoder.block", 2), *names_of("decoder.block", 6)],
            {"num_layers": 2, "num_decoder_layers": 6},
            {"encoder.block": 2, "decoder.block": 6},
        ),
        (["lm_head.weight"], {"num_hidden_layers": 4}, {}),
        ([], None, {}),
    ],
)
def test_layers_are_counted_by_names_and_config(
    names: list[str], config: dict[str, Any] | None, layers: dict[str, int]
) -> None:
    assert count_layers(names, config) == layers


def test_positions_run_from_0_to_1_and_are_0_outside_of_layers() -> None:
    assert [layer_position(f"model.layers.{index}.w", 5) for index in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert layer_position(NORM, 5) == 0.0
    assert layer_position("model.layers.0.w", 1) == 1.0
    assert layer_position("model.layers.5.w", 5) == 1.0, "one layer too many stays at the end"
    both = {"encoder.block": 3, "decoder.block": 2}
    assert layer_position("encoder.block.1.layer.0.w", both) == 0.5
    assert layer_position("decoder.block.1.layer.0.w", both) == 1.0
    assert layer_position("unknown.layers.3.w", both) == 0.0


# -- one setting


@pytest.mark.parametrize("value", [0.5, 3, True, False, "text", 0])
def test_a_scalar_is_itself_everywhere(value: object) -> None:
    assert resolve(value, MLP, 0.3) is value  # type: ignore[arg-type]


@pytest.mark.parametrize(("t", "value"), [(0.0, 0.0), (0.25, 0.5), (0.5, 1.0), (0.75, 0.5), (1.0, 0.0), (0.125, 0.25)])
def test_a_list_of_numbers_is_interpolated(t: float, value: float) -> None:
    assert resolve([0, 1.0, "0"], MLP, t) == value


def test_interpolation_is_the_weighted_sum_in_float64() -> None:
    t, values = 7 / 30, [0.1, 0.7]
    assert resolve(values, MLP, t) == (1 - t) * 0.1 + t * 0.7
    assert resolve([0.1], MLP, 0.9) == 0.1
    assert math.isnan(resolve([1.0, math.inf, 2.0], MLP, 0.0)), "0 * inf: the peer's own products"


@pytest.mark.parametrize(("t", "expected"), [(0.0, 0), (0.49, 0), (0.5, 1), (0.99, 1), (1.0, 2)])
def test_a_list_of_truths_or_texts_is_stepped_through(t: float, expected: int) -> None:
    truths, texts = [True, False, True], ["a", "b", "c"]
    assert resolve(truths, MLP, t) is truths[expected]
    assert resolve(texts, MLP, t) == texts[expected]


def test_the_kind_decides_whether_a_list_steps_or_is_interpolated() -> None:
    assert resolve([0, 1], MLP, 0.5, kind=float) == 0.5
    assert resolve([0, 1], MLP, 0.5, kind=bool) is False
    assert resolve([True, False], MLP, 0.25, kind=float) == 0.75
    assert resolve(["1", "3"], MLP, 0.5, kind=str) == "1"
    assert resolve([0, 4], MLP, 0.5, kind=int) == 2
    with pytest.raises(ValueError, match=r"0\.5 is not a whole number"):
        resolve([0, 1], MLP, 0.5, kind=int)


@pytest.mark.parametrize(
    ("setting", "name", "value"),
    [
        ([{"filter": "mlp", "value": 1}, {"filter": "self_attn", "value": 2}, {"value": 3}], MLP, 1),
        ([{"filter": "mlp", "value": 1}, {"filter": "self_attn", "value": 2}, {"value": 3}], ATTENTION, 2),
        ([{"filter": "mlp", "value": 1}, {"filter": "self_attn", "value": 2}, {"value": 3}], NORM, 3),
        ([{"value": 3}, {"filter": "mlp", "value": 1}], MLP, 3),
        ([{"filter": "*", "value": 3}, {"filter": "mlp", "value": 1}], MLP, 3),
        ([{"filter": "layers.2.mlp", "value": 1}], MLP, 1),
        ([{"filter": "MLP", "value": 1}], MLP, None),
        ([{"filter": "m.*p", "value": 1}], MLP, None),
        ([{"filter": "", "value": 1}], MLP, 1),
        ([{"filter": "mlp", "value": 1}], "", None),
        ([{"filter": "mlp", "value": [0, 1]}], MLP, 0.5),
        ({"filter": "mlp", "value": 1}, MLP, 1),
        ({"filter": "mlp", "value": 1}, NORM, None),
        ({"filter": None, "value": 1}, NORM, 1),
        ([], MLP, None),
    ],
)
def test_the_first_matching_filter_wins(setting: Any, name: str, value: object) -> None:
    assert resolve(setting, name, 0.5) == value


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        ("1e-3", None, 0.001), ("nan and more", None, "nan and more"), ("1_000", None, "1_000"), (True, None, True),
        ("1e-3", float, 0.001), (1, float, 1.0), (True, float, 1.0), (" 2 ", float, 2.0),
        (1, bool, True), (0.0, bool, False), ("Yes", bool, True), ("off", bool, False),
        (3.0, int, 3), ("3", int, 3), (True, int, 1), (2**80, int, 2**80), ("a", str, "a"),
    ],
)  # fmt: skip
def test_scalars_are_turned_into_their_kind(value: Any, kind: type | None, expected: object) -> None:
    result = convert(value, kind)
    assert result == expected and type(result) is type(expected)


@pytest.mark.parametrize(
    ("value", "kind", "words"),
    [
        ("much", float, "'much' is not a number"), ("1_000", float, "not a number"), (10**400, float, "not a number"),
        (2, bool, "2 is not true or false"), ("maybe", bool, "true or false"), (0.5, bool, "true or false"),
        (0.5, int, "not a whole number"), (math.inf, int, "whole number"), ("x", int, "'x' is not a number"),
        (3, str, "3 is not a text"),
    ],
)  # fmt: skip
def test_scalars_of_another_kind_are_refused(value: Any, kind: type, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        convert(value, kind)


# -- the whole config

CONFIG = """\
merge_method: ties
base_model: base
models:
- model: base
  parameters: {weight: 9}
- model: one
  parameters:
    weight: [0, 1]
    density:
    - filter: mlp
      value: 0.25
- model: two
  parameters:
    gamma: 0.1
parameters:
  density:
  - filter: norm
    value: 0.75
  weight: 0.5
  normalize: true
  int8_mask: {filter: mlp, value: true}
"""


def test_a_models_own_parameter_goes_before_the_global_one_and_falls_through_where_no_filter_matches() -> None:
    table = ParameterTable(load_config(CONFIG), 5)
    shared, per_model = table.for_tensor(MLP)
    assert shared == {"weight": 0.5, "normalize": True, "int8_mask": True}
    assert per_model == [
        {"weight": 0.5, "density": 0.25, "normalize": True, "int8_mask": True},
        {"weight": 0.5, "gamma": 0.1, "normalize": True, "int8_mask": True},
    ]
    shared, per_model = table.for_tensor(NORM)
    assert shared == {"weight": 0.5, "density": 0.75, "normalize": True}
    assert per_model == [
        {"weight": 0.0, "density": 0.75, "normalize": True},
        {"weight": 0.5, "density": 0.75, "gamma": 0.1, "normalize": True},
    ]
    assert [table.for_tensor(f"model.layers.{index}.w")[1][0]["weight"] for index in (0, 1, 4)] == [0.0, 0.25, 1.0]


def test_only_what_is_set_appears() -> None:
    table = ParameterTable(load_config(CONFIG), 5)
    assert table.names() == {"weight", "density", "gamma", "normalize", "int8_mask"}
    assert table.shared(["normalize", "int8_mask", "lambda"], MLP) == {"normalize": True, "int8_mask": True}
    assert table.shared(["normalize", "int8_mask", "lambda"], NORM) == {"normalize": True}


def test_a_method_may_ask_for_the_base_as_one_model_more() -> None:
    config = load_config(CONFIG)
    _, per_model = ParameterTable(config, 5, entries=config.entries).for_tensor(NORM)
    assert [values["weight"] for values in per_model] == [9, 0.0, 0.5]


def test_kinds_are_applied_and_a_value_of_another_kind_is_named_with_its_line() -> None:
    config = load_config(CONFIG.replace("weight: 0.5", "weight: '5e-1'"))
    kinds = {"weight": float, "normalize": float}
    assert ParameterTable(config, 5, kinds=kinds).for_tensor(NORM)[0]["weight"] == 0.5
    assert ParameterTable(config, 5, kinds=kinds).for_tensor(NORM)[0]["normalize"] == 1.0
    broken = load_config(CONFIG.replace("gamma: 0.1", "gamma: lots"))
    with pytest.raises(ConfigError, match=r"the config, line 14: gamma cannot be used: 'lots' is not a number"):
        ParameterTable(broken, 5, kinds={"gamma": float}).for_tensor(NORM)
