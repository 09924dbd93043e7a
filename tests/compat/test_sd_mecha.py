"""fastmerge's methods run by sd-mecha on small files, beside its own. `python -m checks.peers sd_mecha` runs this."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from fastmerge import ops
from fastmerge.integrations import sd_mecha as fast

if os.environ.get("FASTMERGE_PEER") == "sd_mecha":
    import sd_mecha
else:
    sd_mecha = pytest.importorskip("sd_mecha", reason="no sd-mecha; `python -m checks.peers sd_mecha` brings it")

SHAPES = {"unet.in.weight": (24, 40), "unet.conv.weight": (6, 5, 3, 3), "unet.norm.bias": (17,), "one": (1,)}


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """A base and three models."""
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    paths = [tmp_path / "base.safetensors"]
    save_file(base, paths[0])
    for number in range(3):
        tuned = {name: x + 0.1 * torch.randn(x.shape, generator=generator) for name, x in base.items()}
        paths.append(tmp_path / f"model{number}.safetensors")
        save_file(tuned, paths[-1])
    return paths


def merged(
    files: list[Path], method: Any, output: Path, threads: int = 2, **parameters: Any
) -> dict[str, torch.Tensor]:
    base, *models = [sd_mecha.model(path) for path in files]
    recipe = base + method(*(model - base for model in models), **parameters)
    sd_mecha.merge(recipe, output=output, merge_dtype=torch.float32, output_dtype=torch.float32, threads=threads)
    return load_file(output)


def deltas_of(files: list[Path]) -> tuple[dict[str, torch.Tensor], dict[str, list[torch.Tensor]]]:
    base, *models = [load_file(path) for path in files]
    return base, {name: [model[name] - x for model in models] for name, x in base.items()}


@pytest.mark.parametrize(("k", "vote_sgn"), [(0.2, False), (0.7, True)])
def test_ties_of_files_equals_sd_mechas_own(files, k, vote_sgn, tmp_path):
    ours = merged(files, fast.ties_sum, tmp_path / "ours.safetensors", k=k, vote_sgn=vote_sgn)
    theirs = merged(files, sd_mecha.ties_sum, tmp_path / "theirs.safetensors", k=k, vote_sgn=vote_sgn)
    assert ours.keys() == theirs.keys() == SHAPES.keys()
    for name, x in theirs.items():
        torch.testing.assert_close(ours[name], x, rtol=1e-6, atol=1e-7, msg=name)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 9), max_size=3),
    count=st.integers(1, 5),
    k=st.sampled_from([0.0, 0.1, 0.5, 0.999, 1.0]),
    vote_sgn=st.booleans(),
    tied=st.booleans(),
    seed=st.integers(0, 999),
)
def test_ties_of_tensors_equals_sd_mechas_own_even_where_magnitudes_are_equal(shape, count, k, vote_sgn, tied, seed):
    generator = torch.Generator().manual_seed(seed)
    draw = (
        (lambda: torch.randint(-3, 4, shape, generator=generator) / 4)
        if tied
        else (lambda: torch.randn(shape, generator=generator))
    )
    models = [draw() for _ in range(count)]
    ours = fast.ties_sum.__wrapped__(*models, k=k, vote_sgn=vote_sgn)
    theirs = sd_mecha.ties_sum.__wrapped__(*models, k=k, vote_sgn=vote_sgn)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rescale", [False, True])
def test_dropout_is_sd_mechas_formula_on_counted_masks(files, rescale, tmp_path):
    base, deltas = deltas_of(files)
    probability, k, seed = 0.6, 0.3, 5
    ours = merged(
        files, fast.ties_sum_with_dropout, tmp_path / "ours.safetensors", probability=probability, k=k, seed=seed,
        rescale=rescale,
    )  # fmt: skip
    for name, tensors in deltas.items():
        kept = [
            ops.consensus_merge(
                None, [torch.ones_like(x)], [1.0], inputs="deltas", method="bernoulli", density=1 - probability,
                seed=seed, tensor_id=ops.tensor_id(name), model=place, election="none", divisor="none",
            )
            for place, x in enumerate(tensors)
        ]  # fmt: skip
        expected = sd_mecha.ties_sum.__wrapped__(*(x * mask for x, mask in zip(tensors, kept)), k=k)
        expected = base[name] + (expected / (1 - probability) if rescale else expected)
        torch.testing.assert_close(ours[name], expected, rtol=1e-6, atol=1e-6, msg=name)
        if tensors[0].numel() > 100:
            share = float(kept[0].mean())
            assert abs(share - (1 - probability)) < 0.15 and not torch.equal(kept[0], kept[1])


def test_dropout_does_not_depend_on_threads_but_on_the_seed(files, tmp_path):
    def run(name: str, threads: int, seed: int) -> dict[str, torch.Tensor]:
        return merged(files, fast.ties_sum_with_dropout, tmp_path / name, threads, probability=0.5, seed=seed)

    first, again, other = run("a.safetensors", 0, 1), run("b.safetensors", 4, 1), run("c.safetensors", 4, 2)
    assert all(torch.equal(x, again[name]) for name, x in first.items())
    assert not all(torch.equal(x, other[name]) for name, x in first.items())


def test_pcb_of_files_is_the_op_on_each_tensor(files, tmp_path):
    base, deltas = deltas_of(files)
    ours = merged(files, fast.pcb_sum, tmp_path / "ours.safetensors", density=0.4)
    for name, x in base.items():
        torch.testing.assert_close(ours[name], x + ops.pcb_merge(deltas[name], density=0.4), rtol=1e-6, atol=1e-6)


def test_fr_of_files_filters_matrices_and_adds_the_rest(files, tmp_path):
    base, deltas = deltas_of(files)
    ours = merged(files, fast.fr_sum, tmp_path / "ours.safetensors", ratio=0.3)
    for name, x in base.items():
        added = deltas[name][0] + deltas[name][1] + deltas[name][2]
        expected = ops.highpass(added, 0.3) if x.dim() == 2 else added
        torch.testing.assert_close(ours[name], x + expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(ours["unet.in.weight"], base["unet.in.weight"] + sum(deltas["unet.in.weight"]))


def test_a_recipe_that_was_written_down_runs_again(files, tmp_path):
    first = merged(files, fast.ties_sum, tmp_path / "first.safetensors", k=0.5)
    with safe_open(tmp_path / "first.safetensors", "pt") as file:
        assert "fastmerge_ties_sum" in file.metadata()["mecha_recipe"]
    base, *models = [sd_mecha.model(path) for path in files]
    # Not finalized: the layout that sd-mecha infers from files it does not know has a name that it cannot read again.
    stored = sd_mecha.serialize(base + fast.ties_sum(*(model - base for model in models), k=0.5), finalize=False)
    assert '"fastmerge_ties_sum"' in stored
    again = sd_mecha.merge(sd_mecha.deserialize(stored.splitlines()), output_dtype=torch.float32)
    assert all(torch.equal(x, again[name]) for name, x in first.items())


@pytest.mark.parametrize(
    ("method", "parameters", "message"),
    [
        (fast.ties_sum, {"k": 1.5}, "k=1.5 is out of range"),
        (fast.ties_sum_with_dropout, {"probability": 1.0, "key": "x"}, "probability=1.0 is out of range"),
        (fast.pcb_sum, {"density": 2.0}, "density"),
        (fast.pcb_sum, {"variant": "best"}, "variant='best' is not known"),
        (fast.fr_sum, {"mode": "low"}, "mode='low' is not known"),
    ],
)
def test_wrong_parameters_are_named(method, parameters, message):
    with pytest.raises(ValueError, match=message):
        method.__wrapped__(torch.ones(3, 3), **parameters)


@pytest.mark.parametrize("method", [fast.ties_sum, fast.ties_sum_with_dropout, fast.pcb_sum, fast.fr_sum])
def test_deltas_that_are_trained_on_are_merged_as_numbers(method):
    deltas = [torch.randn(6, 5, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    expected = method.__wrapped__(*deltas, **({"key": "x"} if method is fast.ties_sum_with_dropout else {}))
    trained = [nn.Parameter(x.clone()) for x in deltas]
    with torch.no_grad():  # as sd-mecha calls it
        merged = method.__wrapped__(*trained, **({"key": "x"} if method is fast.ties_sum_with_dropout else {}))
    assert torch.equal(merged, expected) and not merged.requires_grad


def test_no_delta_at_all_is_refused():
    for method in (fast.ties_sum, fast.pcb_sum, fast.fr_sum):
        with pytest.raises(ValueError, match="at least one delta"):
            method.__wrapped__()
