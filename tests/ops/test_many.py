"""Many tensors at once give the bits of as many merges of one, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastmerge import backends, ops
from fastmerge.backends.lists import Lists
from fastmerge.backends.rule import TIE_BLOCK
from fastmerge.errors import ArgumentError, ArgumentTypeError
from fastmerge.ops import many, select
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


@each_working_backend
@settings(max_examples=25)
@given(data=st.data())
def test_a_prepared_merge_is_the_same_again_and_again(backend: str, data: st.DataObject) -> None:
    data.draw(configurations(backend))
    base, models = data.draw(families())
    strided = data.draw(st.integers(0, 4)) == 0
    if strided:
        models[0] = [torch.stack((x, x), dim=-1)[..., 0] for x in models[0]]
    inputs = data.draw(st.sampled_from(("models", "deltas")))
    ids = [data.draw(strategies.words64) for _ in models[0]]
    out_dtype = data.draw(st.sampled_from((None, torch.float32, torch.float16)))
    prepared = ops.prepare_merge_many(base, models, inputs=inputs, tensor_ids=ids, out_dtype=out_dtype, backend=backend)
    results = list(prepared.out)
    for again in range(3):
        if again == 2:
            for x in (*models[-1], *(base or [])):
                x.mul_(-0.5)
        options: dict[str, Any] = {
            "density": [data.draw(st.sampled_from((0.5, 0.3, 1.0, 0.0))) for _ in models],
            "method": data.draw(st.sampled_from((None, "magnitude", "magnitude_outliers", "bernoulli"))),
            "gamma": data.draw(st.sampled_from((0.01, 0.3))),
            "rescale": data.draw(st.sampled_from((None, None, "l1"))),
            "seed": data.draw(strategies.words64),
            "election": data.draw(st.sampled_from(("weighted", "none"))),
            "ties": data.draw(st.sampled_from(("lowest_index", "keep", "hashed"))),
            "lambda_": data.draw(st.sampled_from((1.0, 0.7))),
        }  # fmt: skip
        weights = [data.draw(st.sampled_from((1.0, 0.5, -1.0))) for _ in models]
        others = [poison_(torch.empty_like(x)) for x in results] if again == 1 and data.draw(st.booleans()) else None
        found = prepared.merge(weights, out=others, **options)
        expected = ops.consensus_merge_many(
            base, models, weights, inputs=inputs, tensor_ids=ids, out_dtype=out_dtype, backend="reference", **options
        )
        for one, target, other in zip(found, others or results, expected, strict=True):
            assert one is target
            assert_bitwise_equal(one, other)


@pytest.mark.skipif("cpu" not in FAST, reason="the cpu backend is missing; tests/cuda and tests/triton test the others")
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("method", ["magnitude_outliers", "bernoulli"])
def test_large_tensors_among_small_ones(method: str, threads: int) -> None:
    """Their ties are counted in several blocks."""
    backends.resolve("cpu").set_threads(threads)
    lengths = (3, TIE_BLOCK + 9, 0, 1000, 2 * TIE_BLOCK, TIE_BLOCK)
    everything = [[(torch.arange(n) * (i + 3) % 11 - 5).bfloat16() / 8 for n in lengths] for i in range(3)]
    base, models = everything[0], everything[1:]
    ids = list(range(7, 7 + len(lengths)))
    options: dict[str, Any] = {"density": [0.3, 0.6], "method": method, "gamma": 0.2, "tensor_ids": ids}
    expected = ops.consensus_merge_many(base, models, 1.0, backend="reference", **options)
    found = ops.consensus_merge_many(base, models, 1.0, backend="cpu", **options)
    for one, other in zip(found, expected, strict=True):
        assert_bitwise_equal(one, other)


def test_several_dtypes_are_refused_where_one_is_needed() -> None:
    lists = Lists(None, [[x, x.half()]], [x, x])
    for name in FAST:
        with pytest.raises(ValueError, match="tensors has several dtypes"):
            backends.resolve(name).magnitude_bounds_many(lists, torch.zeros(2, 1, 2), [], x.dtype, subtract=False)


def prepared_ones() -> tuple[list[Tensor], list[list[Tensor]], ops.PreparedMerge]:
    base = [torch.zeros(3), torch.zeros(2, 2)]
    models = [[torch.ones_like(x) for x in base] for _ in range(2)]
    return base, models, ops.prepare_merge_many(base, models)


def test_what_moved_since_it_was_prepared_is_refused() -> None:
    base, _, prepared = prepared_ones()
    base[1].data = torch.zeros(2, 2)
    with pytest.raises(ArgumentError, match=r"base\[1\] was resized or moved since it was prepared"):
        prepared.merge(1.0)
    _, models, prepared = prepared_ones()
    models[1][0].resize_(2)
    with pytest.raises(ArgumentError, match=r"tensors\[1\]\[0\] was resized or moved"):
        prepared.check()
    _, _, prepared = prepared_ones()
    prepared.out[0].resize_(100)
    with pytest.raises(ArgumentError, match=r"out\[0\] was resized or moved"):
        prepared.merge(1.0)


def test_ten_thousand_tensors_are_looked_at_in_turn() -> None:
    models = [list(torch.ones(many.LOOKED_AT, 1))]
    prepared = ops.prepare_merge_many(None, models)
    assert [float(x) for x in prepared.merge(2.0, divisor="none")] == [2.0] * many.LOOKED_AT
    prepared.out[-1].data = torch.zeros(1)
    with pytest.raises(ArgumentError, match=rf"out\[{many.LOOKED_AT - 1}\] was resized or moved"):
        prepared.merge(1.0)


def test_parameters_that_require_gradients_are_read_where_they_are() -> None:
    parameters = [torch.nn.Parameter(torch.ones(3))]
    prepared = ops.prepare_merge_many(None, [parameters])
    with torch.no_grad():
        parameters[0].mul_(3.0)
    assert prepared.merge(1.0)[0].tolist() == [3.0] * 3
    parameters[0].data = torch.zeros(3)
    with pytest.raises(ArgumentError, match=r"tensors\[0\]\[0\] was resized or moved"):
        prepared.merge(1.0)


@given(
    numels=st.lists(st.integers(0, 1 << 40), min_size=1, max_size=4),
    densities=st.lists(st.floats(0, 1.0) | st.sampled_from((0.0, 0.1, 0.5, 1.0)), min_size=1, max_size=4),
    gamma=st.none() | st.floats(0, 1.0),
)
def test_ranges_of_ranks_are_those_of_one(numels: list[int], densities: list[float], gamma: float | None) -> None:
    found = select.rank_ranges(torch.tensor(numels), densities, [gamma] * len(densities))
    assert found.tolist() == [[list(ops.rank_range(n, d, gamma)) for d in densities] for n in numels]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_compiled(backend: str) -> None:
    if backend not in (*FAST, "reference"):
        pytest.skip("the cpu backend is missing; the variant `reference` compiles the same op")
    base, models, _ = prepared_ones()
    merge = torch.compile(
        lambda base, models: ops.consensus_merge_many(base, models, 1.0, density=0.5, backend=backend),
        backend="eager",
        fullgraph=True,
    )
    for one, other in zip(merge(base, models), ops.consensus_merge_many(base, models, 1.0, density=0.5)):
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
        (lambda: ops.consensus_merge_many(None, [[x + 1, x]], 1.0, out=[x, x + 1]), r"out\[0\] overlaps another"),
        (lambda: ops.consensus_merge_many(None, [[x, x]], 1.0, out=[(y := x + 1), y]), r"out\[1\] overlaps another"),
        (
            lambda: ops.consensus_merge_many(None, [[(y := x.repeat(2))[::2]]], 1.0, out=[y[4:]]),
            r"out\[0\] overlaps an",
        ),
        (
            lambda: ops.consensus_merge_many(None, [[x, x]], 1.0, out=[x + 1, x.repeat(2)[::2]]),
            r"out\[1\] is not contiguous",
        ),
        (lambda: ops.consensus_merge_many(None, [[x, x]], 1.0, out=[x + 1, x[:3]]), r"out\[1\] has shape \[3\]"),
        (lambda: ops.prepare_merge_many(None, [[x]]).merge([1.0, 2.0]), "weights has 2 entries for 1 models"),
    ],
)
def test_wrong_lists_get_a_sentence(call: Any, sentence: str) -> None:
    with pytest.raises(ArgumentError, match=sentence):
        call()


def test_float64_is_not_prepared() -> None:
    with pytest.raises(ArgumentTypeError, match=r"tensors\[1\] has dtype float64"):
        ops.prepare_merge_many(None, [[x], [x.double()]])
