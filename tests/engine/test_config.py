"""The merge config: mergekit's form is read unchanged; every mistake is one sentence with its place and a fix."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fastmerge.engine.config import MergeConfig, ModelEntry, load_config
from fastmerge.errors import ConfigError

TIES = """\
# a comment
models:
  - model: org/base
  - model: org/one
    parameters:
      density: [0.1, 0.5, 1e-1]
      weight:
        - filter: mlp
          value: 1e-3
        - value: 0.5
  - model: ./two
    parameters: {density: 0.3, weight: {filter: "self_attn", value: [0, 1.0]}}
merge_method: ties
base_model: org/base
parameters:
  normalize: true
  int8_mask: on
dtype: float16
out_dtype: torch.bfloat16
tokenizer_source: base
"""


def refuse(source: object, *words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(source)  # type: ignore[arg-type]
    message = str(caught.value)
    for word in words:
        assert word in message, message
    assert "\n" not in message and message.endswith((".", "?"))
    return message


def minimal(**more: object) -> dict[str, object]:
    return {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}], **more}


# -- what is read


def test_a_config_of_mergekits_form_is_read_whole() -> None:
    config = load_config(TIES)
    assert config.merge_method == "ties"
    assert config.base_model == "org/base"
    assert config.entries == (
        ModelEntry("org/base", {}, ("models", 0)),
        ModelEntry(
            "org/one",
            {
                "density": [0.1, 0.5, "1e-1"],  # YAML takes 1e-1 for text; the parameter's type makes a number of it
                "weight": [{"filter": "mlp", "value": "1e-3"}, {"filter": None, "value": 0.5}],
            },
            ("models", 1),
        ),
        ModelEntry(
            "./two", {"density": 0.3, "weight": {"filter": "self_attn", "value": [0, 1.0]}}, ("models", 2)
        ),
    )  # fmt: skip
    assert config.models == config.entries[1:], "the base is no delta of itself"
    assert config.refs() == ["org/base", "org/one", "./two"]
    assert config.parameters == {"normalize": True, "int8_mask": True}
    assert (config.dtype, config.out_dtype, config.tokenizer_source) == ("float16", "bfloat16", "base")
    assert config.source == TIES


def test_a_path_a_path_as_text_yaml_text_and_a_dict_are_read_alike(tmp_path: Path) -> None:
    path = tmp_path / "merge.yml"
    path.write_bytes(b"\xef\xbb\xbf" + TIES.encode())
    from_path, from_name, from_text = load_config(path), load_config(str(path)), load_config(TIES)
    as_dict = {
        "models": [
            {"model": "org/base"},
            {
                "model": "org/one",
                "parameters": {
                    "density": (0.1, 0.5, "1e-1"), "weight": [{"filter": "mlp", "value": "1e-3"}, {"value": 0.5}]
                },
            },
            {
                "model": Path("two"),
                "parameters": {"density": 0.3, "weight": {"filter": "self_attn", "value": [0, 1.0]}},
            },
        ],
        "merge_method": "ties", "base_model": "org/base", "parameters": {"normalize": True, "int8_mask": True},
        "dtype": "float16", "out_dtype": "bfloat16", "tokenizer_source": "base",
    }  # fmt: skip
    from_dict = load_config(as_dict)

    def content(config: MergeConfig) -> tuple[object, ...]:
        entries = [(entry.model.removeprefix("./"), entry.parameters) for entry in config.entries]
        return (config.merge_method, entries, config.base_model, config.parameters, config.dtype, config.out_dtype)

    assert content(from_path) == content(from_name) == content(from_text) == content(from_dict)
    assert from_path.source == TIES
    assert content(load_config(from_dict.source)) == content(from_dict), "the source made for a dict is that config"


def test_where_names_the_line_of_a_parameter_or_of_what_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "merge.yml"
    path.write_text(TIES)
    config = load_config(path)
    assert config.where(("models", 1, "parameters", "weight")) == f"{path}, line 7"
    assert config.where((*config.models[1].path, "parameters", "density")) == f"{path}, line 12"
    assert config.where(("models", 1, "parameters", "weight", 1, "value")) == f"{path}, line 10"
    assert config.where(("models", 1, "parameters", "unheard_of")) == f"{path}, line 5"
    assert config.where(("merge_method",)) == f"{path}, line 13"
    assert config.where(("parameters", "int8_mask")) == f"{path}, line 17"
    assert load_config(TIES).where(("dtype",)) == "the config, line 18"
    assert load_config(minimal()).where(("models", 1, "model")) == "the config, models[1].model"
    assert load_config(minimal()).where() == "the config"


def test_one_line_of_yaml_is_told_from_a_path() -> None:
    assert load_config("{merge_method: linear, models: [{model: a}]}").models == (ModelEntry("a", {}, ("models", 0)),)


def test_nulls_ask_for_nothing() -> None:
    text = (
        "merge_method: linear\nmodels:\n- model: a\n  parameters:\nslices:\nmodules: null\nbase_model: ~\nparameters:\n"
    )
    config = load_config(text + "dtype:\nout_dtype: auto\ntokenizer_source:\ntokenizer:\nchat_template:\n")
    assert (config.base_model, config.parameters, config.dtype, config.out_dtype) == (None, {}, None, None)


def test_the_long_form_of_a_model_is_read() -> None:
    models = [{"model": {"model": {"path": "org/a", "revision": "v1"}}}, {"model": {"model": "b"}}]
    config = load_config(minimal(models=models, base_model={"path": "org/base"}))
    assert config.refs() == ["org/base", "org/a@v1", "b"]


def test_the_base_is_known_by_another_spelling_of_its_path() -> None:
    config = load_config(minimal(models=[{"model": "./x/a/"}, {"model": "b"}], base_model="x/a"))
    assert [entry.model for entry in config.models] == ["b"]
    assert [entry.model for entry in config.entries] == ["./x/a/", "b"]


def test_aliases_and_merge_keys_are_unfolded() -> None:
    text = """\
merge_method: linear
models:
- model: a
  parameters: &p {weight: 1.0, density: 0.5}
- model: b
  parameters: *p
- model: c
  parameters: {<<: *p, weight: 2.0}
- model: d
  parameters: {<<: [{weight: 3.0}, *p], gamma: 0.1}
"""
    assert [entry.parameters for entry in load_config(text).models] == [
        {"weight": 1.0, "density": 0.5}, {"weight": 1.0, "density": 0.5}, {"weight": 2.0, "density": 0.5},
        {"weight": 3.0, "density": 0.5, "gamma": 0.1},
    ]  # fmt: skip


def test_texts_that_yaml_would_turn_into_dates_stay_texts() -> None:
    assert load_config("merge_method: linear\nmodels: [{model: 2024-01-01}]").models[0].model == "2024-01-01"


def test_reading_a_config_does_not_load_torch() -> None:
    code = "import sys; from fastmerge.engine.config import load_config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# -- what is refused


@pytest.mark.parametrize(
    ("key", "near"),
    [("merge_metod", "merge_method"), ("base-model", "base_model"), ("Models", "models"), ("parameter", "parameters")],
)
def test_a_misspelt_key_is_named_with_its_line_and_the_near_one(tmp_path: Path, key: str, near: str) -> None:
    path = tmp_path / "c.yml"
    path.write_text(f"merge_method: linear\nmodels: [{{model: a}}]\n\n{key}: x\n")
    refuse(path, f"{path}, line 4:", f"the key `{key}`", f"did you mean `{near}`?")


def test_a_misspelt_key_deeper_down_is_named_with_its_line() -> None:
    refuse("merge_method: linear\nmodels:\n- model: a\n- modle: b\n", "line 4", "`modle`", "did you mean `model`?")
    refuse(minimal(parameters={"t": [{"fliter": "x", "value": 1}]}), "parameters.t[0].fliter", "did you mean `filter`?")
    refuse(minimal(parameters={"t": {"filter": "x"}}), "`t` lacks the key `value`")


def test_a_setting_beside_its_parameters_is_told_where_it_belongs() -> None:
    message = refuse(minimal(density=0.5), "`density`", "known here are merge_method", "stand under `parameters`")
    assert "did you mean" not in message
    refuse(minimal(models=[{"model": "a", "density": 0.5}]), "`density`", "stand under `parameters`")


@pytest.mark.parametrize("key", ["slices", "modules", "tokenizer", "chat_template"])
def test_what_mergekit_has_and_this_version_lacks_is_not_called_a_mistake(key: str) -> None:
    message = refuse(f"merge_method: linear\n{key}: [x]\n", f"`{key}` is not supported in this version", "line 2")
    assert "not understood" not in message


@pytest.mark.parametrize("source", ["union", "org/model", {"model": "x"}, 3])
def test_another_tokenizer_source_is_not_supported(source: object) -> None:
    refuse(minimal(tokenizer_source=source), "tokenizer_source", "not supported in this version", "write base")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("merge_method: ties\nmodels: [a\nx: y\n", ("line 3", "column", "not valid YAML")),
        ("merge_method: ties\n\tmodels: a\n", ("line 2, column 1", "not valid YAML")),
        ("a: b: c\n", ("line 1", "not valid YAML")),
        ("a: 1\n---\nb: 2\n", ("line 2", "not valid YAML")),
        ("a: *nowhere\n", ("line 1", "not valid YAML", "nowhere")),
        ("a: \0\n", ("not valid YAML",)),
        ("[" * 3000 + "\n", ("nested too deeply",)),
        ("merge_method: ties\nmerge_method: linear\n", ("line 2", "`merge_method` stands twice", "first in line 1")),
        ("models:\n- model: a\n  parameters: {w: 1, w: 2}\n", ("line 3", "`w` stands twice")),
        ("? [a, b]\n: c\n", ("line 1", "a key must be a plain word")),
        ("merge_method: !!int ties\n", ("line 1", "'ties' is not a YAML int")),
        ("<<: 3\nmerge_method: x\n", ("line 1", "`<<` takes a mapping")),
        ("a: &a [*a]\n", ("line 1", "an alias holds itself")),
        ("a: &a {<<: *a}\n", ("nested too deeply",)),
        ("- a\n- b\n", ("a mapping of keys to values, not a list",)),
        ("ties\nand\n", ("not the text",)),
        ("\n", ("is empty",)),
        ("# nothing\n", ("is empty",)),
        ("", ("is empty",)),
    ],
)
def test_broken_yaml_is_refused_with_its_place(text: str, words: tuple[str, ...]) -> None:
    refuse(text, *words)


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system [echo]", "!!python/name:os.system", "!!python/object:x.Y {}", "!own 3",
        "!!set {a}", "!!binary aGk=",
    ],
)  # fmt: skip
def test_yaml_that_asks_for_objects_is_refused_with_the_tag(tag: str) -> None:
    name = tag.split(" ")[0].rstrip("'")
    refuse(f"merge_method: ties\nmodels: {tag}\n", "line 2", name, "an object to be built")


@pytest.mark.parametrize(
    ("seed", "level"),
    [("[x, x]", "[*a{0}, *a{0}]"), ("{x: 1, y: 2}", "{{p: *a{0}, q: *a{0}}}"), ("{x: 1}", "{{<<: [*a{0}, *a{0}]}}")],
)
def test_aliases_that_unfold_without_end_are_refused_in_no_time(seed: str, level: str) -> None:
    lines = [f"a0: &a0 {seed}"] + [f"a{n}: &a{n} {level.format(n - 1)}" for n in range(1, 60)]
    refuse("\n".join(lines) + "\n", "unfolds into more than 100,000 values")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"merge_method": None}, ("`merge_method` is missing",)),
        ({"merge_method": 3}, ("`merge_method` must be a text, not the number 3",)),
        ({"merge_method": " "}, ("`merge_method` must be a text, not an empty text",)),
        ({"models": None}, ("`models` is missing",)),
        ({"models": "a"}, ("`models` must be a list, not the text 'a'",)),
        ({"models": {"model": "a"}}, ("`models` must be a list, not a mapping",)),
        ({"models": []}, ("`models` is empty",)),
        ({"models": ["a"]}, ("models[0]", "must be a mapping, not the text 'a'")),
        ({"models": [{"parameters": {}}]}, ("models[0]", "lacks the key `model`")),
        ({"models": [{"model": 3}]}, ("models[0].model", "not the number 3")),
        ({"models": [{"model": ""}]}, ("models[0].model", "not an empty text")),
        ({"models": [{"model": ["a"]}]}, ("models[0].model", "not a list")),
        ({"models": [{"model": {"model": "a", "lora": "b"}}]}, ("`lora` is not supported", "merge_and_unload")),
        ({"models": [{"model": {"model": "a", "override_architecture": "b"}}]}, ("not supported",)),
        ({"models": [{"model": {"path": "a", "revison": "b"}}]}, ("did you mean `revision`?",)),
        ({"models": [{"model": {"revision": "b"}}]}, ("lacks the key `path`",)),
        ({"base_model": 7}, ("base_model", "not the number 7")),
        ({"base_model": False}, ("base_model", "not false")),
        ({"parameters": [1]}, ("`parameters` must be a mapping, not a list",)),
        ({"parameters": {3: 1}}, ("must be a text, not the number 3",)),
        ({"parameters": {"t": None}}, ("parameters.t", "`t` has nothing for its value")),
        ({"parameters": {"t": []}}, ("parameters.t", "empty list")),
        ({"parameters": {"t": [1, None]}}, ("parameters.t[1]", "holds nothing")),
        ({"parameters": {"t": [1, [2]]}}, ("parameters.t[1]", "holds a list")),
        ({"parameters": {"t": [1, {"value": 2}]}}, ("mixes values with filters",)),
        ({"parameters": {"t": {"value": {"value": 2}}}}, ("filters within a filter",)),
        ({"parameters": {"t": [{"value": [{"value": 2}]}]}}, ("filters within a filter",)),
        ({"parameters": {"t": {"value": 1, "filter": 3}}}, ("parameters.t.filter", "not the number 3")),
        ({"parameters": {"t": object()}}, ("has a value of type object",)),
        ({"dtype": "bfloat"}, ("`dtype` cannot be 'bfloat'", "did you mean bfloat16?")),
        ({"dtype": "int8"}, ("`dtype` cannot be 'int8'",)),
        ({"dtype": "float64"}, ("`dtype` cannot be 'float64'",)),
        ({"dtype": 16}, ("`dtype` must be a text",)),
        ({"out_dtype": "fp8"}, ("`out_dtype` cannot be 'fp8'", "float32, bfloat16 and float16")),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(change: dict[str, object], words: tuple[str, ...]) -> None:
    refuse(minimal(**change), *words)


@pytest.mark.parametrize("spelling", ["org/a", "org/a/", "org/x/../a"])
def test_a_model_listed_twice_is_refused_with_both_places(spelling: str) -> None:
    text = f"merge_method: linear\nmodels:\n- model: org/a\n- model: b\n- model: {spelling}\n"
    refuse(text, "line 5", f"{spelling} is listed twice", "line 3")


def test_a_config_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    refuse(tmp_path / "none.yml", "none.yml does not exist", "check the path")
    refuse("none.yml", "none.yml does not exist")
    refuse(tmp_path, "is a directory")
    (tmp_path / "binary.yml").write_bytes(b"\xff\xfe\x00")
    refuse(tmp_path / "binary.yml", "not UTF-8")
    refuse("a\0b", "is not the name of a file")
    refuse(3, "not a value of type int")
