"""What mergekit's example configs ask for, of small models: by `fastmerge merge` or `fastmerge-yaml` as by mergekit.

Each case has the keys and the form of an example of mergekit's repository, with models and layers to our measure. Those
in the form of `models:` are planned and merged by fastmerge alone; what it refuses, `fastmerge-yaml` merges. All
commands run inside this process.
"""

from __future__ import annotations

import json
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fastmerge import integrations
from fastmerge.cli import run
from tests.compat.mergekit_calls import RELEASE, merge_by_registry
from tests.compat.mergekit_peer import Case, tied_positions
from tests.compat.test_mergekit_cli import read

pytest.importorskip("mergekit", reason="no mergekit (the extra `peers`)")

Tensors = dict[str, torch.Tensor]
VARYING = -1.0
"""The density 1, 0.7 and 0.1 of the three layers, and 1 of what is in none."""


@dataclass
class Example:
    """A config, with BASE, ONE, TWO and THREE for folders, and the numbers in which it is compared.

    density: of the models, from which tied positions follow. units: what values may differ by, in units of the output's
    dtype of the largest number.
    """

    text: str
    numerics: str = "mergekit"
    density: tuple[float, ...] = ()
    units: float = 0.0


MODELS_FORM = {
    "arcee_fusion.yml": Example(
        """
        merge_method: arcee_fusion
        base_model: ONE
        models: [{model: ONE}, {model: TWO}]
        dtype: bfloat16
        """,
        "fp32",
    ),
    "bio-merge.yml": Example(
        """
        merge_method: ties
        base_model: BASE
        models:
          - {model: ONE, parameters: {weight: 0.5, density: 0.5}}
          - {model: TWO, parameters: {weight: 0.5, density: 0.5}}
        parameters: {int8_mask: true, normalize: false}
        dtype: float16
        """,
        density=(0.5, 0.5),
    ),
    "gradient-slerp.yml, with `models`": Example(
        """
        merge_method: slerp
        base_model: ONE
        models: [{model: ONE}, {model: TWO}]
        parameters:
          t:
            - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
            - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
            - value: 0.5
        dtype: float16
        """,
        "fp32",
        units=2.0,
    ),
    "linear.yml": Example(
        """
        merge_method: linear
        models:
          - {model: ONE, parameters: {weight: 1.0}}
          - {model: TWO, parameters: {weight: 0.3}}
          - {model: THREE, parameters: {weight: 0.5}}
        dtype: float16
        """,
    ),
    "ties.yml": Example(
        """
        merge_method: ties
        base_model: BASE
        models:
          - {model: ONE, parameters: {weight: 1.0, density: [1, 0.7, 0.1]}}
          - {model: TWO, parameters: {weight: [0, 0.3, 0.7, 1], density: 0.5}}
          - model: THREE
            parameters:
              weight: [{filter: mlp, value: 0.5}, {value: 0}]
              density: 0.33
        parameters: {int8_mask: true, normalize: true}
        dtype: float16
        """,
        density=(VARYING, 0.5, 0.33),
    ),
}

REFUSED = {
    "gradient-slerp.yml": Example(
        """
        merge_method: slerp
        base_model: ONE
        slices:
          - sources:
              - {model: ONE, layer_range: [0, 3]}
              - {model: TWO, layer_range: [0, 3]}
        parameters:
          t:
            - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
            - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
            - value: 0.5
        dtype: float16
        """,
        "fp32",
        units=2.0,
    ),
    "orcamini-platy-44layer.yml": Example(
        """
        merge_method: passthrough
        slices:
          - sources: [{model: ONE, layer_range: [0, 2]}]
          - sources: [{model: TWO, layer_range: [1, 3]}]
        dtype: float16
        """,
    ),
    "a tokenizer of all models": Example(
        """
        merge_method: ties
        base_model: BASE
        models:
          - {model: ONE, parameters: {weight: 0.5, density: 0.5}}
          - {model: TWO, parameters: {weight: 0.5, density: 0.5}}
        tokenizer: {source: union}
        dtype: float16
        """,
        density=(0.5, 0.5),
    ),
}


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A Llama of three layers and three fine-tunes."""
    from make_family import make_family

    return make_family(tmp_path_factory.mktemp("family"), scale="tiny", dtype="bfloat16", models=3)


@pytest.fixture(autouse=True)
def _off_afterwards():
    yield
    integrations.mergekit.disable()


def written(example: Example, family, folder: Path) -> Path:
    """The config in a file, with the family's folders in it."""
    text = textwrap.dedent(example.text)
    for name, model in zip(("BASE", "ONE", "TWO", "THREE"), family.folders, strict=True):
        text = text.replace(name, str(model))
    file = folder / "config.yml"
    file.write_text(text)
    return file


def by_mergekit(file: Path, out: Path) -> Tensors:
    from mergekit.scripts.run_yaml import main

    assert not integrations.mergekit.enabled()
    main([str(file), str(out), "--quiet"], standalone_mode=False)
    return read(out)


def layer(name: str) -> int:
    """The layer a tensor belongs to, 0 for those that belong to none."""
    return int(name.split(".")[2]) if name.startswith("model.layers.") else 0


def open_places(example: Example, family, name: str) -> torch.Tensor | None:
    """Where mergekit's choice among equal magnitudes is arbitrary. None: nowhere."""
    if not example.density:
        return None
    folders = family.folders[: len(example.density) + 1]
    base, *models = (read(folder)[name].half() for folder in folders)
    density = [(1.0, 0.7, 0.1)[layer(name)] if each == VARYING else each for each in example.density]
    return tied_positions("ties", base, models, density)


def assert_equal(example: Example, family, ours: Tensors, theirs: Tensors) -> None:
    assert ours.keys() == theirs.keys()
    dtype = torch.bfloat16 if "dtype: bfloat16" in example.text else torch.float16
    differing = 0
    for name, expected in theirs.items():
        actual = ours[name]
        assert actual.dtype == dtype and actual.shape == expected.shape, name
        assert expected.dtype == dtype
        allowed = example.units * torch.finfo(dtype).eps * float(expected.abs().max())
        wrong = (actual.double() - expected.double()).abs() > allowed
        tied = open_places(example, family, name)
        assert not (wrong if tied is None else wrong & ~tied).any(), name
        differing += int((actual.float() != read(family.base)[name].float()).sum()) if name in read(family.base) else 0
    assert differing  # not merely the base


def fused_in_float64(family, theirs: Tensors) -> Tensors:
    """What mergekit's arcee_fusion makes of the first two models in float64.

    It selects by divergences of rows, which in bfloat16 and float32 drown in rounding where the rows are alike. (And it
    writes float32 whatever the config's dtype.)
    """
    one, two = (read(folder) for folder in family.models[:2])
    assert all(tensor.dtype == torch.float32 for tensor in theirs.values())
    wide = {
        name: merge_by_registry(Case("arcee_fusion", one[name].double(), [two[name].double()], []), name)
        for name in theirs
    }
    return {name: tensor.bfloat16() for name, tensor in wide.items()}


@pytest.mark.parametrize("name", MODELS_FORM)
def test_fastmerge_plans_and_merges_the_models_form_as_mergekit(name, family, tmp_path, capfd):
    if (name, RELEASE) == ("linear.yml", "0.1.4"):
        pytest.skip("mergekit 0.1.4 rounds linear otherwise than the next release, which fastmerge follows")
    example = MODELS_FORM[name]
    file = written(example, family, tmp_path)
    arguments = ["merge", str(file), str(tmp_path / "ours"), "--numerics", example.numerics]
    assert run([*arguments, "--dry-run"]) == 0
    planned = capfd.readouterr().out
    assert planned and not (tmp_path / "ours").exists()
    assert run([*arguments, "--quiet"]) == 0
    theirs = by_mergekit(file, tmp_path / "theirs")
    if name == "arcee_fusion.yml":
        theirs = fused_in_float64(family, theirs)
    assert_equal(example, family, read(tmp_path / "ours"), theirs)


@pytest.mark.parametrize("name", REFUSED)
def test_what_fastmerge_refuses_fastmerge_yaml_merges(name, family, tmp_path, capfd):
    from fastmerge.integrations.mergekit.command import main

    example = REFUSED[name]
    file = written(example, family, tmp_path)
    key = "tokenizer" if "tokenizer" in name else "slices"
    assert run(["merge", str(file), str(tmp_path / "refused")]) == 2
    (said,) = capfd.readouterr().err.splitlines()
    line = 1 + file.read_text().splitlines().index(next(x for x in file.read_text().splitlines() if x.startswith(key)))
    assert f"config.yml, line {line}: `{key}` is not supported" in said and "`fastmerge-yaml`" in said
    assert not (tmp_path / "refused").exists()
    expected = by_mergekit(file, tmp_path / "theirs")
    with pytest.raises(SystemExit) as end:
        main([str(file), str(tmp_path / "ours")])
    assert not end.value.code
    ours = read(tmp_path / "ours")
    assert_equal(example, family, ours, expected)
    merged = capfd.readouterr().err
    if "passthrough" not in example.text:
        assert f"{len(expected)} tensor(s) merged by fastmerge" in merged
    layers = json.loads((tmp_path / "ours" / "config.json").read_text())["num_hidden_layers"]
    assert layers == 1 + max(map(layer, ours)) == (4 if "passthrough" in example.text else 3)
