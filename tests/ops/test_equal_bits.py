"""Every kernel of every backend against the reference, bit for bit, on inputs drawn to break kernels."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastmerge import ops
from fastmerge.backends import gpu
from fastmerge.backends.rule import SparsifyRule
from fastmerge.reference import random
from tests import strategies
from tests.numeric import assert_bitwise_equal, poison_
from tests.ops.running import FAST, configurations, each_backend, only


@each_backend
@given(data=st.data())
def test_abs_histogram(backend: str, data: st.DataObject) -> None:
    data.draw(configurations(backend))
    dtype = data.draw(strategies.dtypes)
    shards = data.draw(st.lists(strategies.tensors(dtype=dtype), min_size=1, max_size=3))
    bins = 1 << data.draw(st.sampled_from((15, 8, 0, 5, 14)))
    expected = ops.abs_histogram(shards, bins=bins, backend="reference")
    with only(backend, "abs_histogram"):
        actual = ops.abs_histogram(shards, bins=bins, backend=backend)
    assert_bitwise_equal(actual, expected)


@each_backend
@given(data=st.data())
def test_kth_magnitude(backend: str, data: st.DataObject) -> None:
    data.draw(configurations(backend))
    shards = data.draw(st.lists(strategies.tensors(), min_size=1, max_size=3))
    total = sum(shard.numel() for shard in shards)
    if total == 0:
        return
    k = data.draw(st.one_of(st.integers(1, total), st.sampled_from((1, total))))
    expected = ops.kth_magnitude(shards, k, backend="reference")
    with only(backend, "kth_magnitude"):
        actual = ops.kth_magnitude(shards, k, backend=backend)
    assert_bitwise_equal(torch.tensor(actual), torch.tensor(expected))


@each_backend
@given(data=st.data())
def test_magnitude_bounds(backend: str, data: st.DataObject) -> None:
    data.draw(configurations(backend))
    models = data.draw(strategies.models())
    compute = data.draw(strategies.computes)
    pairs = [data.draw(strategies.ranks(models.numel)) for _ in models.tensors]
    arguments = (models.base, models.tensors, [p[0] for p in pairs], [p[1] for p in pairs])
    expected = ops.magnitude_bounds(*arguments, compute=compute, backend="reference")
    with only(backend, "magnitude_bounds"):
        actual = ops.magnitude_bounds(*arguments, compute=compute, backend=backend)
    assert_bitwise_equal(actual[0], expected[0])
    assert_bitwise_equal(actual[1], expected[1])


@each_backend
@given(data=st.data())
def test_key_histogram(backend: str, data: st.DataObject) -> None:
    data.draw(configurations(backend))
    models = data.draw(strategies.models(most=3))
    compute = data.draw(strategies.computes)
    count = len(models.tensors)
    level0 = ops.key_histogram(models.base, models.tensors, [-1] * count, compute=compute, backend="reference")
    prefix = [-1] * count
    if data.draw(st.booleans()):
        prefix = ops.prefixes(level0, [data.draw(st.integers(0, models.numel)) for _ in models.tensors])
    expected = ops.key_histogram(models.base, models.tensors, prefix, compute=compute, backend="reference")
    with only(backend, "key_histogram"):
        actual = ops.key_histogram(models.base, models.tensors, prefix, compute=compute, backend=backend)
    assert_bitwise_equal(actual, expected)


@each_backend
@given(data=st.data())
def test_key_window(backend: str, data: st.DataObject) -> None:
    data.draw(configurations(backend))
    models = data.draw(strategies.models(most=3))
    compute = data.draw(strategies.computes)
    count = len(models.tensors)
    width = data.draw(st.sampled_from((1, 2, 1000, 1 << 20)))
    somewhere = st.one_of(st.integers(0, 1 << 31), st.sampled_from((0, 0x3F800000 - 500, 0x7F800000, 1 << 31)))
    low = [data.draw(somewhere) for _ in range(count)]
    expected = torch.full((count, width + 1), 3)
    ops.key_window_(models.base, models.tensors, low, expected, compute=compute, backend="reference")
    actual = torch.full((count, width + 1), 3)
    with only(backend, "key_window_"):
        ops.key_window_(models.base, models.tensors, low, actual, compute=compute, backend=backend)
    assert_bitwise_equal(actual, expected)


@each_backend
@pytest.mark.parametrize("count", [20, 3000])
def test_a_window_has_its_first_key_and_not_the_one_after_its_last(count: int, backend: str) -> None:
    first = 0x3F800000
    x = torch.arange(first, first + count, dtype=torch.int32).view(torch.float32)
    counts = torch.zeros(3, 6, dtype=torch.int64)
    with only(backend, "key_window_"):
        ops.key_window_(None, [x, x, x], [first, first + 7, first + count - 5], counts, backend=backend)
    assert counts.tolist() == [[count - 5, 1, 1, 1, 1, 1], [count - 12, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]]


@each_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_nan_is_one_key_whatever_it_carries(dtype: torch.dtype, backend: str) -> None:
    lowest = 0x7C01 if dtype == torch.float16 else 0x7F81
    bits = torch.tensor([lowest, lowest + 5, 0x7FFF, -0x8000 + lowest, -1, 0x3000, 0x7C00], dtype=torch.int16)
    x = bits.view(dtype).repeat(9)
    with only(backend, "abs_histogram"):
        histogram = ops.abs_histogram(x, backend=backend)
    assert_bitwise_equal(histogram, ops.abs_histogram(x, backend="reference"))
    assert histogram.max() == 45
    for k in range(1, 8):
        expected, _ = ops.magnitude_bounds(None, [x], [0], [9 * k - 1], backend="reference")
        with only(backend, "magnitude_bounds"):
            actual, _ = ops.magnitude_bounds(None, [x], [0], [9 * k - 1], backend=backend)
        assert_bitwise_equal(actual, expected)


@each_backend
@given(data=st.data())
def test_tie_counts(backend: str, data: st.DataObject) -> None:
    data.draw(configurations(backend))
    models = data.draw(strategies.models())
    compute = data.draw(strategies.computes)
    pairs = [data.draw(strategies.ranks(models.numel)) for _ in models.tensors]
    bounds, _ = ops.magnitude_bounds(
        models.base, models.tensors, [p[0] for p in pairs], [p[1] for p in pairs], compute=compute, backend="reference"
    )
    expected = ops.tie_counts(models.base, models.tensors, bounds, compute=compute, backend="reference")
    with only(backend, "tie_counts"):
        actual = ops.tie_counts(models.base, models.tensors, bounds, compute=compute, backend=backend)
    assert_bitwise_equal(actual, expected)


@each_backend
@given(data=st.data())
def test_topk_mask(backend: str, data: st.DataObject) -> None:
    data.draw(configurations(backend))
    x = data.draw(strategies.tensors())
    density = data.draw(strategies.densities)
    ties = data.draw(st.sampled_from(("lowest_index", "keep")))
    expected = ops.topk_mask(x, density, ties=ties, backend="reference")
    with only(backend, "topk_mask"):
        actual = ops.topk_mask(x, density, ties=ties, backend=backend)
    assert_bitwise_equal(actual, expected)


@each_backend
@given(data=st.data())
def test_gram(backend: str, data: st.DataObject) -> None:
    data.draw(configurations(backend))
    # In Triton's interpreter long tensors take long; tests/triton has some of many blocks.
    models = data.draw(strategies.models(most=9, blocks=backend != "triton"))
    lengths = [length for length in range(1, models.numel + 1) if models.numel % length == 0]
    row_length = data.draw(st.one_of(st.none(), st.sampled_from(lengths[-6:] or [1])))
    expected = ops.gram(models.base, models.tensors, row_length=row_length, backend="reference")
    with only(backend, "gram"):
        actual = ops.gram(models.base, models.tensors, row_length=row_length, backend=backend)
    assert_bitwise_equal(actual, expected)


@each_backend
@given(data=st.data())
def test_l1_sums(backend: str, data: st.DataObject) -> None:
    data.draw(configurations(backend))
    # The interpreter takes minutes for long tensors; tests/triton has sums over many programs.
    models = data.draw(strategies.models(blocks=backend != "triton"))
    compute = data.draw(strategies.computes)
    rule = data.draw(strategies.rules(models, True, compute))
    expected = ops.l1_sums(models.base, models.tensors, rule, compute=compute, backend="reference")
    with only(backend, "l1_sums"):
        actual = ops.l1_sums(models.base, models.tensors, rule, compute=compute, backend=backend)
    assert_bitwise_equal(actual, expected)


@each_backend
@given(data=st.data())
def test_kept_masks(backend: str, data: st.DataObject) -> None:
    data.draw(configurations(backend))
    models = data.draw(strategies.models())
    compute = data.draw(strategies.computes)
    rule = data.draw(strategies.rules(models, True, compute))
    expected = ops.kept_masks(models.base, models.tensors, rule, compute=compute, backend="reference")
    with only(backend, "kept_masks"):
        actual = ops.kept_masks(models.base, models.tensors, rule, compute=compute, backend=backend)
    assert_bitwise_equal(actual, expected)
    again = SparsifyRule("mask", masks=expected)
    arguments = {"compute": compute, "backend": backend}
    assert_bitwise_equal(
        ops.l1_sums(models.base, models.tensors, again, **arguments),
        ops.l1_sums(models.base, models.tensors, rule, **arguments),
    )


@each_backend
@pytest.mark.parametrize(("rows", "length"), [(3, 70001), (40000, 5), (9, 16381)])
def test_kept_masks_of_rows_that_end_within_a_byte(backend: str, rows: int, length: int) -> None:
    if backend == "triton":
        rows = min(rows, 4000 if length < 10 else 2)  # the interpreter takes as long as ten machines
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(rows, length, generator=generator).to(torch.bfloat16) for _ in range(2)]
    rule = SparsifyRule("della", None, None, [0.5, 1.0], [0.1, 0.1], length, 1, 2, [0, 1])
    expected = ops.kept_masks(None, tensors, rule, backend="reference")
    assert_bitwise_equal(ops.kept_masks(None, tensors, rule, backend=backend), expected)


weights = st.one_of(st.sampled_from((1.0, 0.5, 0.3, -1.0, 0.0, 1e-30)), st.floats(-4, 4))


@each_backend
@given(data=st.data())
def test_consensus_apply(backend: str, data: st.DataObject) -> None:
    data.draw(configurations(backend))
    models = data.draw(strategies.models())
    compute = data.draw(strategies.computes)
    inputs = data.draw(st.sampled_from(("models", "deltas")))
    count = len(models.tensors)
    arguments = {
        "inputs": inputs,
        "rule": data.draw(strategies.rules(models, inputs == "models", compute)),
        "scales": [data.draw(st.sampled_from((1.0, 1.25, 3.7, 0.0))) for _ in range(count)],
        "election": data.draw(st.sampled_from(("weighted", "none", "total", "frequency"))),
        "zero_sign": data.draw(st.sampled_from(("positive", "negative", "zero"))),
        "divisor": data.draw(st.sampled_from(("weights", "none", "count", "value"))),
        "divisor_value": data.draw(st.sampled_from((1.0, 3.0, 0.7, -1e-3))),
        "lambda_": data.draw(st.sampled_from((1.0, 0.7, -2.0, 0.0))),
        "compute": compute,
    }
    weight = [data.draw(weights) for _ in range(count)]
    out_dtype = data.draw(strategies.dtypes)
    shape = models.tensors[0].shape
    expected = ops.consensus_apply(
        models.base, models.tensors, weight, **arguments, out_dtype=out_dtype, backend="reference"
    )
    shift = data.draw(st.integers(0, 5))
    guarded = poison_(torch.empty(models.numel + shift + 3, dtype=out_dtype))
    untouched = guarded.clone()
    out = guarded[shift : shift + models.numel].view(shape)
    with only(backend, "consensus_apply"):
        returned = ops.consensus_apply(models.base, models.tensors, weight, **arguments, out=out, backend=backend)
    assert returned is out
    assert_bitwise_equal(out, expected)
    untouched[shift : shift + models.numel] = out.reshape(-1)
    assert_bitwise_equal(guarded, untouched)


@each_backend
@given(data=st.data())
def test_fused_sum(backend: str, data: st.DataObject) -> None:
    data.draw(configurations(backend))
    # On GPUs it is the definition's own steps, in blocks: see below.
    models = data.draw(strategies.models(blocks=backend == "cpu"))
    weight = [data.draw(st.one_of(weights, st.sampled_from((0.0, -0.0, 1e38)))) for _ in models.tensors]
    expected = ops.fused_sum(models.tensors, weight, backend="reference")
    with only(backend, "fused_sum"):
        actual = ops.fused_sum(models.tensors, weight, backend=backend)
    assert_bitwise_equal(actual, expected)


UNIT = 2.0**-23
HALFWAY = [(1 + UNIT, (1 - UNIT) * UNIT / 2), (1 + 2.0**-11, (1 - 2.0**-11 + 2.0**-22) * UNIT / 2)]
"""Factors whose product is next to half a unit of 1, below it and above it, nearer than float64 tells beside a 1."""


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_a_fused_multiply_add_is_rounded_once(backend: str) -> None:
    (low, low_weight), (high, high_weight) = HALFWAY
    first = torch.tensor([1.0, 1 + UNIT, -1.0, -1 - UNIT] * 7)
    sign = torch.tensor([1.0, 1.0, -1.0, -1.0] * 7)
    below = ops.fused_sum([first, low * sign], [1.0, low_weight], backend=backend)
    above = ops.fused_sum([first, high * sign], [1.0, high_weight], backend=backend)
    less = ops.fused_sum([first, -low * sign], [1.0, low_weight], backend=backend)
    assert_bitwise_equal(below, first)
    assert_bitwise_equal(above, torch.tensor([1 + UNIT, 1 + 2 * UNIT, -1 - UNIT, -1 - 2 * UNIT] * 7))
    assert_bitwise_equal(less, torch.tensor([1 - UNIT / 2, 1 + UNIT, -1 + UNIT / 2, -1 - UNIT] * 7))


def test_a_sum_on_a_gpu_is_made_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [torch.randn(1000, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    expected = ops.fused_sum(models, [0.3, -0.7, 1.9], backend="reference")
    monkeypatch.setattr(gpu, "_SUMMED_AT_ONCE", 77)
    assert_bitwise_equal(gpu.fused_sum(models, [0.3, -0.7, 1.9]), expected)


@each_backend
@given(data=st.data())
def test_count_nonfinite(backend: str, data: st.DataObject) -> None:
    data.draw(configurations(backend))
    x = data.draw(strategies.tensors())
    with only(backend, "count_nonfinite"):
        actual = ops.count_nonfinite(x, backend=backend)
    assert actual.tolist() == [int(x.isnan().sum()), int(x.isinf().sum())]


@each_backend
@given(data=st.data())
def test_zero_nonfinite(backend: str, data: st.DataObject) -> None:
    data.draw(configurations(backend))
    x = data.draw(strategies.tensors())
    expected = torch.where(x.isfinite(), x, torch.zeros_like(x)).contiguous()
    with only(backend, "zero_nonfinite_"):
        assert ops.zero_nonfinite_(x, backend=backend) is x
    assert_bitwise_equal(x.contiguous(), expected)


@each_backend
@pytest.mark.parametrize("election", ["none", "weighted", "total", "frequency"])
@pytest.mark.parametrize("divisor", ["none", "weights", "count", "value"])
def test_every_election_goes_with_every_divisor(election: str, divisor: str, backend: str) -> None:
    generator = torch.Generator().manual_seed(2)
    base, *everyone = (torch.randn(300, generator=generator).to(torch.bfloat16) for _ in range(6))
    for tensor in everyone:
        tensor[::7] = base[::7]
    settings = {"election": election, "divisor": divisor, "divisor_value": 0.7, "lambda_": 0.9}
    # On CPUs two, three and four models have a loop each.
    counts = (2, 3, 4, 5) if backend == "cpu" else (3,)
    for zero_sign, count in itertools.product(("positive", "negative", "zero"), counts):
        tensors, weights = everyone[:count], [1.0, 0.3, -0.6, 0.7, 0.1][:count]
        options = {"zero_sign": zero_sign, **settings}
        expected = ops.consensus_apply(base, tensors, weights, backend="reference", **options)  # type: ignore[arg-type]
        with only(backend, "consensus_apply"):
            actual = ops.consensus_apply(base, tensors, weights, backend=backend, **options)  # type: ignore[arg-type]
        assert_bitwise_equal(actual, expected)


@each_backend
@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("divisor", ["none", "weights", "count", "value"])
@pytest.mark.parametrize("election", ["none", "weighted", "total"])
def test_every_step_is_rounded_to_the_compute_dtype(
    election: str, divisor: str, compute: torch.dtype, backend: str
) -> None:
    """Inputs and output are float32, which shows a step that is not, and another order of models; so does the sum of
    these weights."""
    generator = torch.Generator().manual_seed(3)
    base, *tensors = (torch.randn(300, generator=generator) for _ in range(4))
    weights = [1.0, torch.finfo(torch.bfloat16 if compute == torch.float32 else compute).eps * 1.5, 0.75]
    settings = {"election": election, "divisor": divisor, "divisor_value": 0.7, "compute": compute}
    for added, lambda_ in itertools.product((base, None), (1.0, 0.9)):
        options = {"lambda_": lambda_, **settings}
        expected = ops.consensus_apply(added, tensors, weights, backend="reference", **options)  # type: ignore[arg-type]
        with only(backend, "consensus_apply"):
            actual = ops.consensus_apply(added, tensors, weights, backend=backend, **options)  # type: ignore[arg-type]
        assert actual.dtype == torch.float32
        assert_bitwise_equal(actual, expected)


@each_backend
@pytest.mark.parametrize("election", ["weighted", "total", "frequency"])
@pytest.mark.parametrize("zero_sign", ["positive", "negative", "zero"])
@pytest.mark.parametrize("count", [3, 11])
def test_what_a_sum_that_is_no_number_elects(count: int, zero_sign: str, election: str, backend: str) -> None:
    """One model is NaN, or two are infinite with either sign; the others have both signs."""
    nan, inf = float("nan"), float("inf")
    rows = [[nan, inf, 1.0, nan], [2.0, -inf, nan, -2.0], *([1.5, 0.5, -3.0, 1.0] for _ in range(count - 2))]
    tensors = [torch.tensor(row).repeat(50) for row in rows]
    settings = {"inputs": "deltas", "election": election, "zero_sign": zero_sign, "divisor": "count"}
    expected = ops.consensus_apply(None, tensors, [1.0] * count, backend="reference", **settings)  # type: ignore[arg-type]
    with only(backend, "consensus_apply"):
        actual = ops.consensus_apply(None, tensors, [1.0] * count, backend=backend, **settings)  # type: ignore[arg-type]
    assert_bitwise_equal(actual, expected)


@each_backend
def test_a_word_equal_to_the_limit_is_dropped(backend: str) -> None:
    """Drawn densities never meet a word: here they are made from the words themselves. All 64 bits of a seed count."""
    numbers = {"seed": 0x0123456789ABCDEF, "tensor_id": 0xFEDCBA9876543210}
    words = random.words(0, 12, stream=random.stream_id(random.BERNOULLI), **numbers)
    x = torch.ones(12)
    for place, word in enumerate(words.tolist()):
        with only(backend, "consensus_apply"):
            at_it = ops.sparsify(x, word / 2**32, method="bernoulli", backend=backend, **numbers)
            past_it = ops.sparsify(x, (word + 1) / 2**32, method="bernoulli", backend=backend, **numbers)
        assert_bitwise_equal(at_it != 0, words < word)
        assert at_it[place] == 0 and past_it[place] != 0
    half = ops.sparsify(x, 0.5, method="bernoulli", backend=backend, **numbers)
    for first in range(1, 6):  # a chunk of the tensor, whose words begin within a block of four
        part = ops.sparsify(x[first:], 0.5, method="bernoulli", offset=first, backend=backend, **numbers)
        assert_bitwise_equal(part, half[first:])


@each_backend
def test_a_word_equal_to_the_limit_of_its_rank_is_dropped(backend: str) -> None:
    """The lesser of two has the least probability, density - epsilon; these numbers are exact."""
    x, epsilon = torch.tensor([[1.0, 2.0]]), 2.0**-10
    tried = 0
    for seed in range(12):
        word = random.words(0, 2, stream=random.stream_id(random.DELLA), seed=seed, tensor_id=0)[0].item() / 2**32
        if 0.01 < word < 0.99:
            options = {"method": "della_magprune", "epsilon": epsilon, "seed": seed, "backend": backend}
            with only(backend, "consensus_apply"):
                assert ops.sparsify(x, word + epsilon, **options)[0, 0] == 0  # type: ignore[arg-type]
                assert ops.sparsify(x, word + epsilon + 2.0**-32, **options)[0, 0] == 1  # type: ignore[arg-type]
            tried += 1
    assert tried > 6


sparsify_methods = st.sampled_from(("magnitude", "magnitude_outliers", "bernoulli", "della_magprune"))
ties = st.sampled_from(("lowest_index", "keep", "hashed"))
della_densities = st.sampled_from((0.5, 0.3, 0.8, 0.0, 1.0))


@each_backend
@given(data=st.data())
def test_sparsify(backend: str, data: st.DataObject) -> None:
    data.draw(configurations(backend))
    x = data.draw(strategies.tensors())
    method = data.draw(sparsify_methods)
    density = data.draw(della_densities if method == "della_magprune" else strategies.densities)
    arguments = {
        "method": method,
        "rescale": data.draw(st.sampled_from((None, "l1"))),
        "gamma": data.draw(st.sampled_from((0.01, 0.3, 0.0))),
        "seed": data.draw(strategies.words64),
        "tensor_id": data.draw(strategies.words64),
        "model": data.draw(strategies.positions),
        "ties": data.draw(ties),
        "numerics": data.draw(st.sampled_from(("fp32", "mergekit"))),
    }
    expected = ops.sparsify(x, density, **arguments, backend="reference")
    with only(backend, "consensus_apply"):
        actual = ops.sparsify(x, density, **arguments, backend=backend)
    assert_bitwise_equal(actual, expected)


@each_backend
@given(data=st.data())
def test_consensus_merge(backend: str, data: st.DataObject) -> None:
    data.draw(configurations(backend))
    models = data.draw(strategies.models())
    count = len(models.tensors)
    method = data.draw(st.one_of(sparsify_methods, st.none()))
    density = della_densities if method == "della_magprune" else strategies.densities
    arguments = {
        "inputs": data.draw(st.sampled_from(("models", "deltas"))),
        "density": [data.draw(density) for _ in range(count)],
        "method": method,
        "rescale": data.draw(st.sampled_from((None, "l1"))),
        "seed": data.draw(strategies.words64),
        "election": data.draw(st.sampled_from(("weighted", "none", "total", "frequency"))),
        "divisor": data.draw(st.sampled_from(("weights", "none", "count"))),
        "ties": data.draw(ties),
        "lambda_": data.draw(st.sampled_from((1.0, 0.7))),
        "numerics": data.draw(st.sampled_from(("fp32", "mergekit"))),
    }
    weight = [data.draw(weights) for _ in range(count)]
    expected = ops.consensus_merge(models.base, models.tensors, weight, **arguments, backend="reference")
    with only(backend, "consensus_apply"):
        actual = ops.consensus_merge(models.base, models.tensors, weight, **arguments, backend=backend)
    assert_bitwise_equal(actual, expected)
