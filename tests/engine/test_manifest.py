from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fastmerge.engine.card import model_card
from fastmerge.engine.manifest import build_manifest, merge_digest, package_version
from fastmerge.engine.writer import OutputTensor

TENSORS = [OutputTensor("b.weight", "BF16", (2, 3)), OutputTensor("a.bias", "F32", ()), OutputTensor("c", "I64", (0,))]
DIGESTS = {tensor.name: hashlib.sha256(tensor.name.encode()).hexdigest() for tensor in TENSORS}


def build(**changes: object) -> dict:
    arguments: dict = {
        "method": "ties",
        "config": {"merge_method": "ties", "models": ["one", "two"]},
        "inputs": [{"ref": "base", "files": {"model.safetensors": {"size": 3, "mtime_ns": 5}}}],
        "tensors": TENSORS,
        "digests": DIGESTS,
        "numerics": "fp32",
        "seed": 7,
        "backend": "cpu",
    }
    return build_manifest(**(arguments | changes))


def test_the_digest_is_that_of_the_documented_lines() -> None:
    lines = [f"{t.name} {t.dtype} {str(list(t.shape)).replace(' ', '')} {DIGESTS[t.name]}\n" for t in TENSORS]
    assert merge_digest(TENSORS, DIGESTS) == hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def test_the_digest_depends_on_tensors_alone_and_not_on_their_order() -> None:
    same = build(inputs=[], seed=8, backend="reference", config="x", tensors=TENSORS[::-1])
    assert same["digest"] == build()["digest"]
    others = [
        [TENSORS[0], TENSORS[1]],
        [OutputTensor("b.weight", "BF16", (3, 2)), *TENSORS[1:]],
        [OutputTensor("b.weight", "F16", (2, 3)), *TENSORS[1:]],
    ]
    digests = {merge_digest(tensors, DIGESTS) for tensors in others}
    digests.add(merge_digest(TENSORS, DIGESTS | {"c": "0" * 64}))
    assert len(digests | {merge_digest(TENSORS, DIGESTS)}) == 5


def test_a_manifest_survives_json_and_names_everything_that_went_in() -> None:
    manifest = build(nonfinite={"one": {"a.bias": (1, 0)}})
    read = json.loads(json.dumps(manifest))
    assert read["tensors"]["b.weight"] == {"dtype": "BF16", "shape": [2, 3], "blake3": DIGESTS["b.weight"]}
    assert list(read["tensors"]) == ["a.bias", "b.weight", "c"]
    assert read["versions"].keys() == {"fastmerge", "torch", "python"}
    assert read["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert (read["method"], read["numerics"], read["seed"], read["backend"]) == ("ties", "fp32", 7, "cpu")
    assert read["config"]["models"] == ["one", "two"]
    assert read["inputs"][0]["files"]["model.safetensors"]["size"] == 3
    assert read["nonfinite"] == {"one": {"a.bias": [1, 0]}}


def test_a_manifest_holds_no_time_so_two_merges_are_alike() -> None:
    assert build() == build()


@pytest.mark.parametrize("entry", ["digest", "versions", "format"])
def test_extra_entries_cannot_replace_the_manifests_own(entry: str) -> None:
    with pytest.raises(ValueError, match=repr(entry)):
        build(**{entry: 1})


def test_versions_are_found_without_importing_torch() -> None:
    code = (
        "import sys; from fastmerge.engine.manifest import versions; print(versions()['torch'], 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    version, imported = result.stdout.split()
    assert version[0].isdigit() and imported == "False"
    assert package_version("no-such-package-at-all") == "unknown"


# -- the model card


INFO = {
    "method": "ties",
    "summary": "Trim, elect sign and merge.",
    "source": "Yadav et al. 2023",
    "base_model": "org/base",
    "models": ["org/one@main", "./two", "org/one"],
    "numerics": "fp32",
    "seed": 3,
    "version": "1.2.3",
    "digest": "abc123",
}


def front_matter(card: str) -> dict:
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def test_the_cards_front_matter_is_what_the_hub_reads() -> None:
    assert front_matter(model_card("a: 1", INFO)) == {
        "base_model": ["org/base", "org/one"],
        "library_name": "transformers",
        "tags": ["merge", "fastmerge"],
    }


def test_local_paths_stay_out_of_the_front_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    card = model_card("a: 1", {"base_model": "models/base", "models": ["/abs/x", "../y", "a/b/c", "gpt2"]})
    assert "base_model" not in front_matter(card)


def test_the_card_names_method_source_models_config_and_how_to_reproduce() -> None:
    text = model_card("merge_method: ties\nmodels: []\n", INFO)
    for part in (
        "`ties`: Trim, elect sign and merge.",
        "Source: Yadav et al. 2023",
        "- `org/base` (base)",
        "- `./two`",
    ):
        assert part in text
    assert "```yaml\nmerge_method: ties\nmodels: []\n```" in text
    assert "with fastmerge 1.2.3:" in text
    assert "fastmerge merge config.yml out --numerics fp32 --seed 3" in text
    assert "`abc123`" in text


def test_a_config_cannot_close_its_own_block() -> None:
    text = model_card("note: |\n  ```\n  # Not a heading\n  ````\n", {})
    assert "`````yaml\nnote: |" in text and text.count("`````\n") == 1


def test_a_card_needs_no_facts_at_all() -> None:
    assert "# Merged model" in model_card("", {})
