"""Merges in CUDA C++ where their kernels part ways: numbers of models, cuts between equals, parts, alignment."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastmerge import backends, ops
from fastmerge.backends import reference
from fastmerge.backends.lists import Lists
from fastmerge.backends.rule import TIE_BLOCK, SparsifyRule
from fastmerge.errors import BackendError
from tests.cuda.running import both_orders, needs_cuda, there, unaligned
from tests.numeric import assert_bitwise_equal, poison_

pytestmark = needs_cuda

TIES: dict[str, Any] = {
    "inputs": "models",
    "election": "weighted",
    "zero_sign": "positive",
    "divisor": "weights",
    "divisor_value": 1.0,
    "lambda_": 1.0,
    "compute": torch.float32,
}


def grid(count: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Few different values, so that every cut goes between equals."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-4, 5, (count,), generator=generator) / 8).to(dtype)


def bounds_of(base: Tensor | None, tensors: list[Tensor], shares: list[tuple[float, float]]) -> tuple[Tensor, Tensor]:
    """The bands between two shares of each delta, its greatest elements first."""
    numel = tensors[0].numel()
    first, last = [int(a * numel) for a, _ in shares], [int(b * numel) for _, b in shares]
    return reference.magnitude_bounds(base, tensors, first, last, torch.float32)


def band(base: Tensor | None, tensors: list[Tensor], shares: list[tuple[float, float]]) -> SparsifyRule:
    """The rule that keeps them."""
    bounds, ties = bounds_of(base, tensors, shares)
    return SparsifyRule("band", bounds=bounds, ties_before=ties)


def check(
    base: Tensor | None,
    tensors: list[Tensor],
    weights: list[float],
    rule: SparsifyRule,
    out: Tensor | None = None,
    **changed: Any,
) -> None:
    """The merge has the reference's bits."""
    options = {**TIES, "rule": rule, "scales": [1.0] * len(tensors), **changed}
    dtype = torch.bfloat16 if out is None else out.dtype
    expected = ops.consensus_apply(base, tensors, weights, out_dtype=dtype, backend="reference", **options)
    given = out if out is not None else there(poison_(torch.empty_like(expected)))
    moved = {name: there(getattr(rule, name)) for name in ("bounds", "ties_before", "masks")}
    options["rule"] = SparsifyRule(**{**vars(rule), **moved})
    ops.consensus_apply(there(base), [there(x) for x in tensors], weights, out=given, backend="cuda", **options)
    assert_bitwise_equal(given.cpu(), expected)


@pytest.mark.parametrize("models", [1, 2, 3, 4, 5, 8, 9, 17])
@pytest.mark.parametrize("election", ["weighted", "total", "frequency", "none"])
def test_any_number_of_models(models: int, election: str) -> None:
    base = grid(5003, 99)
    tensors = [grid(5003, i) for i in range(models)]
    shares = [(0.05 * (i % 3), 0.4 + 0.05 * (i % 9)) for i in range(models)]
    weights = [0.5 + 0.25 * i for i in range(models)]
    check(base, tensors, weights, band(base, tensors, shares), election=election)
    check(None, tensors, weights, SparsifyRule(), election=election, inputs="deltas", divisor="count")
    words = SparsifyRule("bernoulli", density=[0.3] * models, seed=5, positions=list(range(models)), offset=3)
    check(base, tensors, weights, words, election=election, divisor="none", lambda_=0.7, scales=[1.25] * models)


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 3, (torch.bfloat16, torch.float16, torch.bfloat16)])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("divisor", ["weights", "count", "value", "none"])
def test_types(dtypes: tuple[torch.dtype, ...], compute: torch.dtype, divisor: str) -> None:
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(3001, generator=generator).to(dtypes[0])
    tensors = [(base.float() + 0.1 * torch.randn(3001, generator=generator)).to(dtype) for dtype in dtypes]
    bounds, ties = reference.magnitude_bounds(base, tensors, [0] * 3, [int(0.5 * 3001)] * 3, compute)
    rule = SparsifyRule("band", bounds=bounds, ties_before=ties)
    for weights in ([1.0, 1.0, 1.0], [1.0, -0.5, 0.3], [0.0, 1.0, 0.0]):
        check(base, tensors, weights, rule, compute=compute, divisor=divisor, divisor_value=3.0)


@both_orders
def test_cuts_within_tie_blocks(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTMERGE_EMULATED_ORDER", order)
    numel = 2 * TIE_BLOCK + 12345
    base = grid(numel, 7)
    tensors = [grid(numel, 1), grid(numel, 2), base.clone(), torch.full((numel,), float("nan"), dtype=torch.bfloat16)]
    for low, high in ((0.0, 0.3), (0.11, 0.93), (0.499, 0.5), (0.8, 0.2)):
        check(base, tensors, [1.0] * 4, band(base, tensors, [(low, high)] * 4))


@pytest.mark.parametrize("shift", [1, 2, 4, 7, 8, 15])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_data_may_begin_anywhere(shift: int, dtype: torch.dtype) -> None:
    base = grid(4111, 7, dtype)
    tensors = [grid(4111, i, dtype) for i in range(3)]
    rule = band(base, tensors, [(0.0, 0.37)] * 3)
    moved = [unaligned(tensors[0], shift), tensors[1], unaligned(tensors[2], 16 - shift)]
    check(unaligned(base, 3), moved, [1.0] * 3, rule)
    size = torch.empty((), dtype=dtype).element_size()
    memory = bytearray(4111 * size + shift)
    check(base, tensors, [1.0] * 3, rule, out=torch.frombuffer(memory, dtype=dtype, count=4111, offset=shift))
    assert not any(memory[:shift])


@pytest.mark.parametrize("part", [2048, 16384, TIE_BLOCK])
@pytest.mark.parametrize("models", [2, 9])
@both_orders
def test_many_tensors(part: int, models: int, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = backends.resolve("cuda")
    monkeypatch.setenv("FASTMERGE_EMULATED_ORDER", order)
    monkeypatch.setattr("fastmerge.backends.cuda.consensus.part_of", lambda _: part)
    lengths = [5, 0, 4096, TIE_BLOCK + 7, 1, 2049]
    bases = [grid(length, 50 + t) for t, length in enumerate(lengths)]
    tensors = [[grid(length, 10 * i + t) for t, length in enumerate(lengths)] for i in range(models)]
    weights = [1.0 + i for i in range(models)]
    ids = [3, 2**64 - 1, 5, 6, 2**63, 8]
    one = [[x[t] for x in tensors] for t in range(len(lengths))]
    bands = [bounds_of(bases[t], one[t], [(0.1, 0.6)] * models) for t in range(len(lengths))]
    bounds, ties = torch.stack([b for b, _ in bands]), torch.cat([t for _, t in bands], dim=2)
    words = SparsifyRule("bernoulli", density=[0.5] * models, seed=2**63 + 1, positions=list(range(models)))
    for rule in (SparsifyRule("band", bounds=there(bounds), ties_before=there(ties)), words):
        options = {**TIES, "scales": [1.0] * models}
        out = [there(poison_(torch.empty(length, dtype=torch.float32))) for length in lengths]
        lists = Lists([there(x) for x in bases], [[there(x) for x in each] for each in tensors], out, ids)
        cuda.consensus_apply_many(lists, weights, rule=rule, **options)
        for t, found in enumerate(out):
            own = SparsifyRule(**{**vars(words), "tensor_id": ids[t]})
            if rule is not words:
                own = SparsifyRule("band", bounds=bands[t][0], ties_before=bands[t][1])
            expected = ops.consensus_apply(
                bases[t], one[t], weights, rule=own, out_dtype=torch.float32, backend="reference", **options
            )
            assert_bitwise_equal(found.cpu(), expected)


def test_a_signalling_nan_takes_no_part() -> None:
    odd = torch.tensor([0x7F81, 0x7FC1, -0x7F, 0x7F80], dtype=torch.int16).view(torch.bfloat16)
    models = [odd, torch.zeros(4).bfloat16(), torch.full((4,), -1.25).bfloat16()]
    check(None, models, [1.0] * 3, SparsifyRule(), inputs="deltas")


def test_what_many_tensors_must_be() -> None:
    cuda = backends.resolve("cuda")
    x, y = there(torch.ones(3)), there(torch.ones(3, dtype=torch.bfloat16))
    options = {**TIES, "scales": [1.0]}
    with pytest.raises(ValueError, match="out has several dtypes"):
        cuda.consensus_apply_many(Lists(None, [[x, x]], [x, y]), [1.0], rule=SparsifyRule(), **options)
    with pytest.raises(ValueError, match="a rule 'bernoulli' is not for many tensors"):
        rule = SparsifyRule("bernoulli", density=[0.5], positions=[0], offset=1)
        cuda.consensus_apply_many(Lists(None, [[x, x]], [x, x]), [1.0], rule=rule, **options)


def test_too_many_models(monkeypatch: pytest.MonkeyPatch) -> None:
    x = there(torch.ones(3))
    with pytest.raises(BackendError, match=r'at most 128 models at once, not 129; use backend="triton"'):
        ops.consensus_apply(
            None, [x] * 129, [1.0] * 129, rule=SparsifyRule(), scales=[1.0] * 129, backend="cuda", **TIES
        )
    if backends.reason("triton") is None:
        # As first of those that "auto" tries, wherever the tensors are.
        for name in ("cuda", "triton"):
            monkeypatch.setitem(backends._DEVICES, name, backends.resolve(name).DEVICES)
        one, other = (
            ops.consensus_merge(None, [x] * 129, 0.5, inputs="deltas", density=0.5, backend=by)
            for by in ("auto", "reference")
        )
        assert_bitwise_equal(one, other)
    check(None, [torch.tensor([1.0, -1.0, 0.0])] * 128, [1.0] * 128, SparsifyRule(), inputs="deltas")
