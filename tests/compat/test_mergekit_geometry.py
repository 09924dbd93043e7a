"""Methods about angles beside mergekit's own functions: equal within one rounding.

The peer takes slerp in float32 and the others in the models' dtype, where deltas, norms, directions, cosines and
weights are all rounded, and in float16 norms overflow; here nothing is rounded before the result. So its functions are
given the same values in float64, and what may differ is the rounding of the result. Vectors that are exactly opposite
are left out: nuslerp's result is there made of the last bit of the peer's cosine.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastmerge
from fastmerge import methods
from tests.compat.mergekit_peer import DTYPES

pytest.importorskip("mergekit", reason="no mergekit (the extra `peers`); tests/methods/test_geometry.py has formulas")

UNIT = {"bf16": 2.0**-8, "fp16": 2.0**-11, "f32": 2.0**-24}
"""Half of a last place: what rounding the result may move it by, of its magnitude."""
SLACK = {"slerp": 4e-6, "nuslerp": 2e-6, "multislerp": 2e-6, "karcher": 2e-6, "model_stock": 2e-6}
"""What else may differ, of the largest number at hand: slerp's sums in float32 there, coefficients in float32 here."""

SHAPES = ((63,), (129,), (1000,), (33, 65), (64, 96), (5, 7, 64), (40, 5000))
"""Vectors of many elements, whose angles are not chance's: model_stock divides by what may vanish there."""


def peer(method: str, base: Tensor | None, models: list[Tensor], parameters: dict[str, Any]) -> Tensor:
    """The merge by mergekit's own method object."""
    from mergekit.merge_methods import registry
    from mergekit.merge_methods.base import TensorGroup

    tensors = models if base is None else [base, *models]
    group = TensorGroup.from_tensors(tensors, base_index=None if base is None else 0)
    (merged,) = registry.get(method)([group], parameters=parameters)
    return merged


def ours(method: str, base: Tensor | None, models: list[Tensor], parameters: dict[str, Any]) -> Tensor:
    known = None if base is None else {"w": base}
    return fastmerge.merge([{"w": x} for x in models], base=known, method=method, **parameters)["w"]


def case(method: str, dtype: torch.dtype, seed: int) -> tuple[Tensor | None, list[Tensor], dict[str, Any]]:
    """A merge drawn from a seed: 2 to 8 models that share a part of what they changed, with all that a method takes."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    count = methods.get(method).most_models or draw.randint(2, 8)
    shape = draw.choice(SHAPES)
    base = torch.randn(shape, generator=generator) * draw.choice((0.02, 1.0))
    common = torch.randn(shape, generator=generator) * 0.3
    size = draw.choice((0.3, 1.0)) * base.std().nan_to_num(1.0)
    models = [base + size * (common + torch.randn(shape, generator=generator)) for _ in range(count)]
    weights = [draw.uniform(0.3, 1.5) for _ in range(count)]
    parameters: dict[str, Any] = {}
    if method == "slerp":
        parameters = {"t": draw.choice((0.0, 1.0, 0.5, draw.random()))}
    elif method == "nuslerp":
        parameters = {"weight": weights}
        if draw.random() < 0.6:
            parameters |= {"nuslerp_flatten": False, "nuslerp_row_wise": draw.random() < 0.5}
    elif method == "multislerp":
        parameters = {"weight": weights, "normalize_weights": draw.random() < 0.7}
    elif method == "karcher":
        parameters = {"max_iter": draw.choice((1, 10, 30))}
    elif method == "model_stock":
        parameters = {"filter_wise": draw.random() < 0.5}
    known = methods.get(method).needs_base or (methods.get(method).takes_base and draw.random() < 0.6)
    return base.to(dtype) if known else None, [x.to(dtype) for x in models], parameters


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["slerp", "nuslerp", "multislerp", "karcher", "model_stock"])
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_methods_about_angles_equal_the_peer_in_float64(method: str, dtype: str, seed: int) -> None:
    base, models, parameters = case(method, DTYPES[dtype], seed)
    expected = peer(method, None if base is None else base.double(), [x.double() for x in models], parameters)
    result = ours(method, base, models, parameters)
    assert expected.dtype == torch.float64
    assert result.dtype == DTYPES[dtype] and result.shape == expected.shape
    largest = max(float(x.abs().max()) for x in (*models, expected))
    allowed = 1.01 * UNIT[dtype] * expected.abs() + SLACK[method] * largest + torch.finfo(DTYPES[dtype]).tiny
    wrong = (result.double() - expected).abs() > allowed
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()}"


@pytest.mark.parametrize("scale", [None, 1.0, 0.3, -2.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_passthrough_equals_the_peer(dtype: str, scale: float | None) -> None:
    x = torch.randn(33, 65, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])
    given = {} if scale is None else {"scale": scale}
    expected = peer("passthrough", None, [x], {} if scale is None else {"scale": [scale]})
    assert torch.equal(ours("passthrough", None, [x], given), expected)
    assert torch.equal(ours("passthrough", None, [x], given | {"numerics": "mergekit"}), expected)


ZERO, RAMP, ONES = torch.zeros(64), torch.linspace(-1, 2, 64), torch.ones(64)


@pytest.mark.parametrize(
    ("method", "base", "models", "parameters"),
    [
        ("slerp", RAMP, [RAMP], {"t": 0.3}),
        ("slerp", RAMP, [-RAMP], {"t": 0.25}),
        ("slerp", ZERO, [RAMP], {"t": 0.5}),
        ("slerp", ZERO, [ZERO], {"t": 0.5}),
        ("nuslerp", RAMP, [RAMP, RAMP + 1], {"weight": [1.0, 3.0]}),
        ("nuslerp", None, [RAMP, ONES], {"weight": [1.0, -1.0]}),
        ("multislerp", ZERO, [RAMP, -RAMP], {"weight": [0.5, 0.5]}),
        ("multislerp", RAMP, [RAMP, RAMP + 1], {"weight": [0.5, 0.5]}),
        ("multislerp", RAMP, [ONES], {"weight": [0.5]}),
        ("karcher", None, [RAMP, -RAMP], {}),
        ("karcher", None, [ZERO, RAMP], {}),
        ("karcher", None, [ZERO, ZERO], {}),
        ("karcher", None, [RAMP, RAMP, RAMP], {}),
        ("model_stock", RAMP, [RAMP, RAMP], {}),
        ("model_stock", RAMP, [RAMP + 1, RAMP - 1], {}),
        ("model_stock", RAMP, [RAMP + 1e-4, RAMP + 1e-4], {}),
        ("model_stock", RAMP, [RAMP + 1, RAMP - 1], {"filter_wise": True}),
    ],
)
def test_vectors_that_vanish_coincide_or_cancel_are_merged_as_the_peer_merges_them(
    method: str, base: Tensor | None, models: list[Tensor], parameters: dict[str, Any]
) -> None:
    expected = peer(method, base, models, parameters)
    torch.testing.assert_close(ours(method, base, models, parameters), expected, rtol=2e-6, atol=2e-6)
