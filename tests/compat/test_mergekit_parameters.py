"""Parameters are resolved to the very float64 that the installed mergekit finds, for drawn configs and names."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmerge.engine.config import load_config
from fastmerge.engine.parameters import ParameterTable, count_layers, layer_stack, resolve

pytest.importorskip("mergekit", reason="no mergekit (the extra `peers`); tests/engine has each rule of parameters")

from mergekit.architecture.json_definitions import NAME_TO_ARCH
from mergekit.common import ModelReference
from mergekit.config import (
    ConditionalParameter,
    ConfigReader,
    MergeConfiguration,
    OutputSliceDefinition,
    evaluate_setting,
)
from mergekit.merge_methods.base import ParameterScope, ParameterSpec
from mergekit.parameter_resolver import resolve_parameter
from pydantic import TypeAdapter, ValidationError

NAMES = [f"model.layers.{index}.{part}.weight" for index in range(6) for part in ("mlp.up_proj", "self_attn.q_proj")]
NAMES += ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]

numbers = st.one_of(
    st.floats(-2, 2), st.integers(-3, 3), st.sampled_from(["1e-3", "0.25", "-3"]), st.floats(allow_nan=False)
)
scalars = st.one_of(numbers, st.booleans(), st.sampled_from(["yes", "off", "label"]))
filters = st.sampled_from([None, "*", "mlp", "self_attn", "layers.3", "norm", "absent", ""])


def setting_of(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    value = st.one_of(values, st.lists(values, min_size=1, max_size=5))
    condition = st.fixed_dictionaries({"value": value}, optional={"filter": filters})
    return st.one_of(value, condition, st.lists(condition, min_size=1, max_size=4))


def for_peer(setting: Any) -> Any:
    if isinstance(setting, dict):
        return ConditionalParameter(**setting)
    if isinstance(setting, list) and isinstance(setting[0], dict):
        return [ConditionalParameter(**entry) for entry in setting]
    return setting


def same(ours: Any, theirs: Any) -> bool:
    return type(ours) is type(theirs) and (ours == theirs or (ours != ours and theirs != theirs))


@settings(max_examples=500, deadline=None)
@given(setting=setting_of(scalars), name=st.sampled_from(NAMES), t=st.floats(0, 1), kind=st.sampled_from([float, bool]))
def test_a_setting_resolves_to_the_peers_value_or_both_refuse(setting: Any, name: str, t: float, kind: type) -> None:
    try:
        theirs = evaluate_setting(name, for_peer(setting), t, validate=TypeAdapter(kind).validate_python)
    except ValidationError:
        with pytest.raises(ValueError, match="is not"):
            resolve(setting, name, t, kind=kind)
        return
    assert same(resolve(setting, name, t, kind=kind), theirs)


@settings(max_examples=200, deadline=None)
@given(setting=setting_of(st.one_of(st.floats(-2, 2), st.floats())), name=st.sampled_from(NAMES), t=st.floats(0, 1))
def test_numbers_need_no_kind(setting: Any, name: str, t: float) -> None:
    theirs = evaluate_setting(name, for_peer(setting), t, validate=TypeAdapter(float).validate_python)
    assert same(resolve(setting, name, t), theirs)


weights = setting_of(st.one_of(st.floats(-2, 2), st.sampled_from(["1e-3", "5e-1"])))
parameters = st.fixed_dictionaries({}, optional={"weight": weights, "density": weights, "lambda": weights})


@settings(max_examples=300, deadline=None)
@given(of_base=st.none() | parameters, of_one=st.none() | parameters, of_two=parameters, of_all=st.none() | parameters)
def test_a_whole_config_resolves_to_the_peers_values(of_base: Any, of_one: Any, of_two: Any, of_all: Any) -> None:
    content = {
        "merge_method": "ties",
        "base_model": "org/base",
        "models": [
            {"model": "org/base", "parameters": of_base},
            {"model": "org/one", "parameters": of_one},
            {"model": "org/two", "parameters": of_two},
        ],
        "parameters": of_all,
    }
    config = load_config(content)
    theirs = MergeConfiguration.model_validate(content)
    output = OutputSliceDefinition(
        sources=[
            {"model": entry.model, "parameters": entry.parameters, "layer_range": (0, 6)} for entry in theirs.models
        ]
    )
    names = ("weight", "density", "lambda")
    specs = [ParameterSpec(name, float, ParameterScope.INPUT, default=None) for name in names]
    table = ParameterTable(config, count_layers(NAMES), kinds=dict.fromkeys(names, float), entries=config.entries)
    for tensor in NAMES:
        found = layer_stack(tensor)
        reader = ConfigReader(config=theirs, t=0 if found is None else found[1] / 5, slice_out=output)
        shared, per_model = table.for_tensor(tensor)
        for model, ours in zip([None, *(entry.model for entry in config.entries)], [shared, *per_model], strict=True):
            sources = list(reader.parameter_sources(None if model is None else ModelReference.parse(model)))
            for spec in specs:
                if spec.name in ours:
                    value = resolve_parameter(spec, sources, tensor_name=tensor, t=reader.t)
                    assert same(ours[spec.name], value)
                else:
                    with pytest.raises(ValidationError):  # nothing was set: the peer falls to the default None
                        resolve_parameter(spec, sources, tensor_name=tensor, t=reader.t)


def test_the_layers_of_every_architecture_that_the_peer_knows_are_found_in_the_names() -> None:
    checked = 0
    for architectures in NAME_TO_ARCH.values():
        for architecture in architectures:
            for module in architecture.modules.values():
                definition = getattr(module.architecture, "definition", None)
                if definition is None:
                    continue
                for weight in definition.layer_templates.weights:
                    if ".${layer_index}." not in weight.name:
                        continue  # one model numbers some of its tensors without dots
                    prefix = module.weight_prefix or ""
                    name = prefix + ("." if prefix and prefix[-1] != "." else "") + weight.name
                    if "deepstack" in name:
                        continue  # not a layer of its own: a tap on every eighth one
                    found = layer_stack(name.replace("${layer_index}", "17"))
                    assert found is not None and found[1] == 17, name
                    checked += 1
                for weight in [*definition.pre_weights, *definition.post_weights]:
                    if definition.expected_model_type == "mixformer-sequential":
                        continue  # its embedding and head are numbered as the first and last of its layers
                    assert layer_stack(weight.name) is None, weight.name
    assert checked > 500
