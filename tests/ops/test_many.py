"""Many tensors at once give the bits of as many merges of one, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastmerge import ops
from fastmerge.errors import ArgumentError
from tests import strategies
from tests.numeric import assert_bitwise_equal, poison_
from tests.ops.running import FAST, configurations

each_working_backend = pytest.mark.parametrize("backend", ["reference", *FAST])


@st.composite
def families(draw: st.DrawFn) -> tuple[list[Tensor] | None, list[list[Tensor]]]:
    """A base, or none, and 1 to 3 models, each of 1 to 4 tensors, mostly of one dtype for each role."""
    shapes = [draw(strategies.shapes(blocks=False)) for _ in range(draw(st.integers(1, 4)))]
    mixed = draw(st.integers(0, 4)) == 0

    def one(dtype: torch.dtype) -> list[Tensor]:
        return [
            draw(strategies.tensors(shape=shape, dtype=draw(strategies.dtypes) if mixed else dtype)) for shape in shapes
        ]

    base = one(draw(strategies.dtypes)) if draw(st.booleans()) else None
    model_dtype = draw(strategies.dtypes)
    return base, [one(model_dtype) for _ in range(draw(st.integers(1, 3)))]


@each_working_backend
@settings(max_examples=100)
@given(data=st.data())
def test_consensus_merge_many(backend: str, data: st.DataObject) -> None:
    data.draw(configurations(backend))
    base, models = data.draw(families())
    method = data.draw(st.sampled_from((None, "magnitude", "magnitude_outliers", "bernoulli", "della_magprune")))
    options: dict[str, Any] = {
        "inputs": data.draw(st.sampled_from(("models", "deltas"))),
        "density": [data.draw(st.sampled_from((0.5, 0.3, 1.0, 0.7))) for _ in models],
        "method": method,
        "epsilon": 0.1,
        "rescale": data.draw(st.sampled_from((None, None, "l1"))),
        "seed": data.draw(strategies.words64),
        "election": data.draw(st.sampled_from(("weighted", "none", "total", "frequency"))),
        "divisor": data.draw(st.sampled_from(("weights", "none", "count"))),
        "ties": data.draw(st.sampled_from(("lowest_index", "keep", "hashed"))),
        "lambda_": data.draw(st.sampled_from((1.0, 0.7))),
        "out_dtype": data.draw(st.sampled_from((None, torch.float32, torch.bfloat16))),
    }
    weights = [data.draw(st.sampled_from((1.0, 0.5, -1.0))) for _ in models]
    ids = [data.draw(strategies.words64) for _ in models[0]]
    expected = [
        ops.consensus_merge(
            None if base is None else base[t],
            [model[t] for model in models],
            weights,
            tensor_id=ids[t],
            backend="reference",
            **options,
        )
        for t in range(len(models[0]))
    ]
    out = [poison_(torch.empty_like(x, memory_format=torch.contiguous_format)) for x in expected]
    chosen = out if data.draw(st.booleans()) else None
    found = ops.consensus_merge_many(base, models, weights, tensor_ids=ids, out=chosen, backend=backend, **options)
    assert chosen is None or all(one is other for one, other in zip(found, out, strict=True))
    for one, other in zip(found, expected, strict=True):
        assert_bitwise_equal(one, other)


x = torch.ones(4)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: ops.consensus_merge_many(None, [], 1.0), "tensors is empty"),
        (lambda: ops.consensus_merge_many([x], [[x, x]], 1.0), r"base has 1 tensors, but tensors\[0\] has 2"),
        (lambda: ops.consensus_merge_many(None, [[x], [x, x]], 1.0), r"tensors\[1\] has 2 tensors, but tensors\[0\]"),
        (lambda: ops.consensus_merge_many([x], [[x[:3]]], 1.0), r"tensors\[0\] has shape \[3\], but base has"),
        (lambda: ops.consensus_merge_many(None, [[x]], 1.0, tensor_ids=[1, 2]), "tensor_ids has 2 entries for 1"),
        (lambda: ops.consensus_merge_many(None, [[x]], 1.0, out=[x]), r"out\[0\] overlaps an input"),
        (lambda: ops.consensus_merge_many(None, [[x]], 1.0, out=[]), "out has 0 entries for 1"),
    ],
)
def test_wrong_lists_get_a_sentence(call: Any, sentence: str) -> None:
    with pytest.raises(ArgumentError, match=sentence):
        call()
