"""A tensor merged by itself has the bits that it has in a merge of whole models, by every method."""

from __future__ import annotations

import pytest
import torch

import fastmerge
from fastmerge import methods
from fastmerge.engine.at_once import merge_at_once
from fastmerge.methods.base import TensorContext
from tests.engine.small_family import knows_base, taken
from tests.engine.test_same_bits import follows_peer

GIVEN = {
    **{"density": 0.4, "scope": "tensor", "weight": 0.7, "gamma": 0.05, "epsilon": 0.1},
    **{"t": 0.3, "select_topk": 0.5, "filter_wise": True},
}


@pytest.mark.parametrize("numerics", ["fp32", "mergekit"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("shape", [(37, 50), (), (5, 6, 7), (0, 3), (4099,)], ids=str)
@pytest.mark.parametrize("name", methods.names())
def test_a_tensor_by_itself_has_the_bits_of_a_whole_merge(name, shape, dtype, numerics):
    method = methods.get(name)
    if numerics == "mergekit" and not follows_peer(name):
        pytest.skip("there are no such numbers for it")
    generator = torch.Generator().manual_seed(3)
    base, *models = ((torch.randn(shape, generator=generator) * 0.1).to(dtype) for _ in range(3))
    before = [base.clone(), *(model.clone() for model in models)]
    models, labels = taken(name, models), taken(name, ["a", "b"])
    known = methods.parameters(name)
    given = {key: value for key, value in GIVEN.items() if key in known}
    if numerics == "mergekit" or name == "linear":
        given.pop("scope", None)
    tensor = "model.layers.0.mlp.up_proj.weight"
    expected = fastmerge.merge(
        [{tensor: model} for model in models],
        base={tensor: base} if knows_base(name) else None,
        method=name,
        numerics=numerics,
        seed=9,
        **given,
    )[tensor]
    shared = {key: value for key, value in given.items() if not known[key].per_model}
    each = {key: value for key, value in given.items() if known[key].per_model}
    context = TensorContext(
        name=tensor,
        shape=shape,
        parameters=methods.bind(method, shared, [each for _ in models], tensor=tensor, labels=labels),
        positions=tuple(range(len(models))),
        compute=method.compute_dtype(dtype, numerics),
        numerics=numerics,
        seed=9,
    )
    out = torch.full(shape, float("nan"), dtype=dtype)
    strided = [torch.stack([model, model], dim=-1)[..., 0] for model in models]
    result = merge_at_once(method, context, base if knows_base(name) else None, strided, out)
    assert result is out
    assert torch.equal(out, expected)
    assert all(torch.equal(x, kept) for x, kept in zip([base, *models], before, strict=False))
