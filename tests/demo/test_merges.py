"""The demo's YAML files: each names the family it is run on and the method it is named after."""

import pytest

from demo.__main__ import HERE, MERGES
from demo.text import DOMAINS
from fastmerge.engine.config import load_config


def test_every_yaml_file_of_the_demo_is_merged():
    assert {path.stem for path in HERE.glob("*.yml")} == set(MERGES)


@pytest.mark.parametrize("name", MERGES)
def test_a_demo_merges_every_fine_tune_by_the_method_of_its_name(name):
    config = load_config(HERE / f"{name}.yml")
    variant = config.parameters.get("variant")
    assert name in (config.merge_method, f"{config.merge_method}_{variant}")
    assert [entry.model for entry in config.models] == [f"demo/models/{domain}" for domain in DOMAINS]
    assert config.base_model == (None if name == "linear" else "demo/models/base")
