"""NearSwap, SCE, RAM and Arcee Fusion beside mergekit's own functions.

They compute in float32 here and round once. So the peer's functions run in float64 on the same values: what is left is
the rounding of float32, for which there is a tolerance, and places where rounding decides whether an element is
selected. Those are left out, and counted. In the models' own dtype the peer rounds each step, in float32 as the methods
do here: that is held to a wider tolerance where its rounding decides nothing.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastmerge
from tests.compat.mergekit_peer import DTYPES, SHAPES, draw_models

pytest.importorskip("mergekit", reason="no mergekit (the extra `peers`); tests/methods has each method's formula")

METHODS = ("nearswap", "sce", "ram", "ramplus_tl", "arcee_fusion")
NEAR_THRESHOLD = 1e-3
"""How near a value is to a threshold, as a fraction of it, where rounding may decide."""

Tensors = list[torch.Tensor]


def peer_merge(method: str, base: torch.Tensor, models: Tensors, parameters: dict[str, Any]) -> torch.Tensor:
    registry = pytest.importorskip("mergekit.merge_methods.registry")
    groups = pytest.importorskip("mergekit.merge_methods.base")
    group = groups.TensorGroup.from_tensors([base, *models], base_index=0)
    (merged,) = registry.get(method)([group], parameters=parameters)
    return merged


def our_merge(method: str, base: torch.Tensor, models: Tensors, parameters: dict[str, Any]) -> torch.Tensor:
    return fastmerge.merge([{"w": x} for x in models], base={"w": base}, method=method, **parameters)["w"]


def draw(method: str, dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, Tensors, dict[str, Any]]:
    """A base, 1 to 8 models near it, and parameters, with the edges."""
    choose = random.Random(seed)
    shapes = [shape for shape in SHAPES if shape] if method == "arcee_fusion" else SHAPES
    count = 1 if method in ("nearswap", "arcee_fusion") else choose.randint(2, 8)
    base, *models = draw_models(
        seed, choose.choice(shapes), count, dtype, choose.choice(("normal", "heavy", "discrete"))
    )
    if method in ("sce", "arcee_fusion"):
        # Far enough for energies above a millionth, and for divergences.
        models = [(base.float() + choose.choice((1, 8, 30)) * (x.float() - base.float())).to(dtype) for x in models]
    parameters: dict[str, Any] = {}
    if method == "nearswap":
        parameters = {"t": choose.choice((1e-3, 1e-4, 0.0, 1.0))}
    elif method == "sce":
        parameters = {"select_topk": choose.choice((1.0, 0.0, choose.random(), 0.5))}
    elif method != "arcee_fusion":
        parameters = {"epsilon": choose.choice((1e-5, 1e-3, 0.0))}
    if method == "ramplus_tl":
        parameters |= {"r": choose.choice((0.1, 1.0, -0.5)), "alpha": choose.choice((0.2, 5.0, 0.0))}
    return base, models, parameters


def open_places(method: str, base: torch.Tensor, models: Tensors, parameters: dict[str, Any]) -> torch.Tensor:
    """Where rounding, or the peer's choice among equals, decides what is selected. All arguments are float64."""
    none = torch.zeros(base.shape, dtype=torch.bool)
    deltas = [x - base for x in models]
    if method == "nearswap" or base.numel() == 0:
        return none
    if method == "sce":
        variance = torch.stack(deltas).var(dim=0, unbiased=False)
        votes = torch.stack(deltas).sum(dim=0).abs()
        # Votes that cancel but for rounding elect any sign.
        cancel = votes <= 1e-6 * torch.stack(deltas).abs().sum(dim=0)
        share = parameters["select_topk"]
        k = int(int((variance > 1e-18).sum()) * share)
        if not 0 < share < 1 or k == 0:
            return cancel
        threshold = variance.flatten().sort(descending=True).values[k - 1]
        return cancel | ((variance - threshold).abs() <= NEAR_THRESHOLD * threshold)
    if method == "arcee_fusion":
        from mergekit.merge_methods import arcee_fusion as peer

        score = peer._compute_importance(models[0], base)
        threshold = peer.DynamicThresholdFusion().calculate_dynamic_threshold(score)
        return (score - threshold).abs() <= NEAR_THRESHOLD * threshold + 1e-15
    epsilon = parameters["epsilon"]
    if epsilon == 0:
        return none
    return torch.stack([(d.abs() - epsilon).abs() <= 1e-6 * epsilon for d in deltas]).any(dim=0)


def counts_hang_on_rounding(method: str, open_: torch.Tensor) -> bool:
    """Whether an open place changes others, too: RAM's counts, SCE's energies."""
    return bool(open_.any()) and method in ("ramplus_tl", "sce")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1))
def test_the_peers_function_in_float64_agrees(method: str, dtype: str, tied_share: Any, seed: int) -> None:
    base, models, parameters = draw(method, DTYPES[dtype], seed)
    wide = base.double(), [x.double() for x in models]
    open_ = open_places(method, *wide, parameters)
    tied_share(f"{method} {dtype}", open_)
    exact = peer_merge(method, *wide, parameters)
    actual = our_merge(method, base, models, parameters)
    assert actual.dtype == base.dtype and actual.shape == base.shape
    unit = torch.finfo(actual.dtype).eps
    # Selections that hang on rounding move the energies that weigh all of a tensor a little.
    loose = 0.02 if counts_hang_on_rounding(method, open_) else 3e-6
    reach = torch.stack([(x - wide[0]).abs() for x in wide[1]]).amax(dim=0)
    slack = 0.51 * unit * exact.abs() + loose * reach + 1e-7 * wide[0].abs() + 6e-8
    wrong = ((actual.double() - exact).abs() > slack) & ~open_
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()}: {actual[wrong][:3]} against {exact[wrong][:3]}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["nearswap", "ram"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1))
def test_the_peers_function_in_the_models_dtype_agrees_but_for_its_rounding(
    method: str, dtype: str, tied_share: Any, seed: int
) -> None:
    base, models, parameters = draw(method, DTYPES[dtype], seed)
    unit = torch.finfo(base.dtype).eps
    open_ = torch.zeros(base.shape, dtype=torch.bool)
    if method == "ram":
        # Deltas so near epsilon that rounding them, or it, decides.
        deltas = [x.double() - base.double() for x in models]
        open_ = torch.stack([(d.abs() - parameters["epsilon"]).abs() <= unit * d.abs() + 6e-8 for d in deltas]).any(
            dim=0
        )
        open_ &= torch.tensor(parameters["epsilon"] > 0)
    tied_share(f"{method} {dtype}, rounded as the peer does", open_)
    theirs = peer_merge(method, base, models, parameters).double()
    ours = our_merge(method, base, models, parameters).double()
    reach = torch.stack([x.double().abs() for x in (base, *models)]).amax(dim=0)
    # nearswap rounds two products and their sum, ram a delta, a quotient and a sum for each model.
    wrong = ((ours - theirs).abs() > (len(models) + 2) * unit * reach + 6e-8) & ~open_
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()}: {ours[wrong][:3]} against {theirs[wrong][:3]}"


@pytest.mark.parametrize("method", METHODS)
def test_names_and_defaults_are_the_peers(method: str) -> None:
    registry = pytest.importorskip("mergekit.merge_methods.registry")
    theirs = {parameter.name: parameter.default for parameter in registry.get(method).spec.parameters}
    ours = {each["name"]: each for each in fastmerge.methods.describe(method)["parameters"]}
    assert set(ours) == set(theirs)
    assert all(each["required"] or each["default"] == theirs[name] for name, each in ours.items())
