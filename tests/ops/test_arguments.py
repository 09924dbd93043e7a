"""Bad arguments raise a sentence that names the argument and the fix; good edge cases work."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastmerge import ops
from fastmerge.backends.rule import SparsifyRule
from fastmerge.errors import ArgumentError, ArgumentTypeError, FastmergeError
from tests.numeric import assert_bitwise_equal, poison_

x = torch.arange(6.0).reshape(2, 3)
bounds = torch.zeros(1, 2, 2, dtype=torch.int64)
ties = torch.zeros(1, 2, 1, dtype=torch.int64)


def merge(**changes: Any) -> Any:
    arguments: dict[str, Any] = {"base": x, "tensors": [x + 1, x], "weights": [1.0, 1.0], "density": 0.5, **changes}
    return ops.consensus_merge(
        arguments.pop("base"), arguments.pop("tensors"), arguments.pop("weights"), **arguments
    )  # fmt: skip


def apply(**changes: Any) -> Any:
    return ops.consensus_apply(x, [x, x], changes.pop("weights", [1.0, 1.0]), **changes)


VALUES: list[tuple[Callable[[], Any], str]] = [
    (lambda: ops.sparsify(x, math.nan), r"density=nan is not finite"),
    (lambda: ops.sparsify(x, 1.5), r"density=1.5 is outside \[0, 1\]; pass a fraction"),
    (lambda: ops.sparsify(x, -0.1), r"density=-0.1 is outside"),
    (lambda: ops.topk_mask(x, 2), r"density=2.0 is outside"),
    (lambda: ops.topk_mask(x, 0.5, ties="lowest"), r"ties='lowest' is not known.*Did you mean 'lowest_index'"),
    (lambda: ops.sparsify(x, 0.5, method="magnitud"), r"method='magnitud'.*Did you mean 'magnitude'"),
    (lambda: ops.sparsify(x, 0.5, rescale="l2"), r"rescale='l2' is not known; use one of None, 'l1'"),
    (lambda: ops.sparsify(x, 0.5, numerics="fp16"), r"numerics='fp16'.*'fp32'"),
    (lambda: ops.sparsify(x, 0.5, gamma=3), r"gamma=3.0 is outside"),
    (lambda: ops.sparsify(x, 0.9, method="della_magprune"), r"epsilon=0.15 is too large for density=0.9"),
    (lambda: ops.sparsify(x, 0.1, method="della_magprune"), r"density - epsilon > 0"),
    (lambda: ops.sparsify(x, 0.5, model=4096), r"model=4096 is out of range.*between 0 and 4095"),
    (lambda: ops.sparsify(x, 0.5, offset=-1), r"offset=-1 is out of range.*at least 0"),
    (lambda: ops.sparsify(x, 0.5, method="della_magprune", offset=2), r"row_length=3 does not divide.*offset 2"),
    (lambda: ops.abs_histogram(x, bins=100), r"bins=100 is not a power of two"),
    (lambda: ops.abs_histogram(x, bins=65536), r"bins=65536 is not a power of two between 1 and 32768"),
    (lambda: ops.abs_histogram(x, bins=0), r"bins=0 is not"),
    (lambda: ops.abs_histogram([]), r"x is empty; pass at least one tensor"),
    (lambda: ops.abs_histogram([x, x.bfloat16()]), r"shards of x have different dtypes"),
    (lambda: ops.kth_magnitude([x], 0), r"k=0 is out of range for 6 elements"),
    (lambda: ops.kth_magnitude([x], 7), r"k=7 is out of range for 6 elements; pass 1 <= k <= 6"),
    (lambda: ops.kth_magnitude([x[:0]], 1), r"k=1 is out of range for 0 elements"),
    (lambda: ops.kth_magnitude(x.to("meta"), 1), "shards is on device 'meta', where no kernel works; move it with"),
    (lambda: ops.magnitude_bounds(None, [x], [0], [7]), r"last holds rank 7 of 6 elements"),
    (lambda: ops.magnitude_bounds(None, [x], [0, 1], [1]), r"first has 2 entries for 1 models"),
    (lambda: ops.key_histogram(None, [x, x], [-1, 5]), r"prefix mixes negative entries"),
    (lambda: ops.key_histogram(None, [x], [70000]), r"prefix=70000 is out of range"),
    (lambda: ops.tie_counts(None, [x], bounds[:, :1]), r"bounds has shape \[1, 1, 2\]; it must be \[1, 2, 2\]"),
    (lambda: merge(weights=[1.0]), r"weights has 1 entries for 2 models; pass one for each"),
    (lambda: merge(weights=[1.0, math.inf]), r"weights=inf is not finite"),
    (lambda: merge(density=[0.5, 0.5, 0.5]), r"density has 3 entries for 2 models"),
    (lambda: merge(tensors=[]), r"tensors is empty"),
    (lambda: merge(tensors=[x, x.T]), r"tensors\[1\] has shape \[3, 2\], but base has shape \[2, 3\]"),
    (lambda: merge(base=None, tensors=[x, x.T]), r"tensors\[1\] has shape \[3, 2\], but tensors\[0\] has"),
    (lambda: merge(election="weigthed"), r"election='weigthed'.*Did you mean 'weighted'"),
    (lambda: merge(zero_sign="+"), r"zero_sign='\+' is not known"),
    (lambda: ops.fused_sum([x, x], [1.0]), r"weights has 1 entries for 2 models; pass one for each"),
    (lambda: ops.fused_sum([x, x.t()], [1.0, 1.0]), r"tensors\[1\] has shape \[3, 2\]"),
    (lambda: merge(divisor="weight"), r"divisor='weight'.*Did you mean 'weights'"),
    (lambda: merge(inputs="delta"), r"inputs='delta'.*Did you mean 'deltas'"),
    (lambda: merge(lambda_=math.nan), r"lambda_=nan is not finite"),
    (lambda: merge(model=[0]), r"model has 1 entries for 2 models"),
    (lambda: merge(model=3), r"model has 1 entries for 2 models"),
    (lambda: merge(out=torch.empty(3)), r"out has shape \[3\], but the result has \[2, 3\]"),
    (lambda: merge(out=torch.empty(3, 2).T), r"out is not contiguous"),
    (lambda: merge(out=x), r"out overlaps an input"),
    (lambda: apply(scales=[1.0]), r"scales has 1 entries for 2 models"),
    (lambda: apply(compute=torch.float64), r"compute=torch.float64 is not known"),
    (lambda: apply(rule=SparsifyRule("band")), r'rule.bounds or rule.ties_before is missing; method "band"'),
    (lambda: apply(rule=SparsifyRule("band", bounds=bounds, ties_before=ties)), r"bounds has shape \[1, 2, 2\]"),
    (lambda: apply(rule=SparsifyRule("bernoulli", density=[0.5])), r"rule.density has 1 entries for 2 models"),
    (
        lambda: apply(rule=SparsifyRule("bernoulli", density=[0.5, math.nan], positions=[0, 1])),
        r"rule.density=nan is not finite",
    ),
    (
        lambda: apply(rule=SparsifyRule("della", density=[0.5] * 2, epsilon=[0.1] * 2, positions=[0, 1], row_length=4)),
        r"rule.row_length=4 does not divide",
    ),
    (
        lambda: apply(rule=SparsifyRule("della", density=[0.9] * 2, epsilon=[0.2] * 2, positions=[0, 1], row_length=3)),
        r"epsilon=0.2 is too large",
    ),
    (lambda: ops.gram(None, [x], row_length=4), r"row_length=4 does not divide the 6 elements.*whole rows"),
    (lambda: ops.gram(None, [x], row_length=0), r"row_length=0 is out of range"),
    (lambda: ops.gram(x, [x, x.T]), r"tensors\[1\] has shape \[3, 2\], but base has shape \[2, 3\]"),
    (lambda: ops.highpass(x[0], 0.5), r"x has 1 dimensions, but the filter is one of matrices; pass a tensor \[..., H"),
    (lambda: ops.highpass(x, math.nan), r"ratio=nan is not finite"),
    (lambda: ops.highpass(x, 1.5), r"ratio=1.5 is outside \[0, 1\]"),
    (lambda: ops.highpass(x, -0.1), r"ratio=-0.1 is outside"),
    (lambda: ops.highpass(x, 0.5, mode="offical"), r"mode='offical' is not known.*Did you mean 'official'"),
    (lambda: ops.highpass(x, 0.5, out=torch.empty(3, 2)), r"out has shape \[3, 2\], but the result has \[2, 3\]"),
    (lambda: ops.highpass(x, 0.5, out=x), r"out overlaps an input"),
    (lambda: ops.highpass_plan((4,), 0.5), r"shape has 1 dimensions"),
    (lambda: ops.highpass_plan((4, -1), 0.5), r"shape=-1 is out of range"),
    (lambda: ops.highpass_plan((4, 4), 2), r"ratio=2.0 is outside"),
    (lambda: ops.highpass_plan((4, 4), 0.5, dtype=torch.float64), r"dtype=torch.float64 is not known"),
    (lambda: ops.highpass_plan((4, 4), 0.5, device="meta"), r"device='meta' has no kernels"),
    (lambda: torch.ops.fastmerge.highpass(x, 0.5, "none", "auto"), r"mode='none' is not known"),
    (lambda: torch.ops.fastmerge.highpass(x, 7.0, "ideal", "auto"), r"ratio=7.0 is outside"),
    (lambda: ops.l1_scale(torch.zeros(12, dtype=torch.int64)), r"limbs must be one model's int64\[2, 12\] row"),
]

TYPES: list[tuple[Callable[[], Any], str]] = [
    (lambda: ops.sparsify(x.int(), 0.5), r"x has dtype int32.*convert it with \.float\(\)"),
    (lambda: ops.sparsify(x > 1, 0.5), r"x has dtype bool"),
    (lambda: ops.sparsify(x.to(torch.complex64), 0.5), r"x has dtype complex64.*real and imaginary parts"),
    (lambda: ops.sparsify(x.to(torch.float8_e4m3fn), 0.5), r"x has dtype float8_e4m3fn.*dequantise"),
    (lambda: ops.sparsify(x.to_sparse(), 0.5), r"x has layout torch.sparse_coo; make it dense"),
    (lambda: ops.sparsify([1.0, 2.0], 0.5), r"x must be a torch.Tensor, not list"),  # type: ignore[arg-type]
    (lambda: ops.sparsify(x, "half"), r"density must be a number, not str"),  # type: ignore[arg-type]
    (lambda: ops.topk_mask(x, True), r"density must be a number, not bool"),
    (lambda: ops.kth_magnitude(x, 1.5), r"k must be an integer, not float"),  # type: ignore[arg-type]
    (lambda: ops.kth_magnitude("abc", 1), r"shards must be a list of tensors, not str"),  # type: ignore[arg-type]
    (lambda: merge(tensors=x), r"tensors must be a list of tensors, not Tensor; wrap a single tensor"),
    (lambda: merge(tensors=[x, x.long()]), r"tensors\[1\] has dtype int64"),
    (lambda: ops.fused_sum([x.long()], [1.0]), r"tensors\[0\] has dtype int64"),
    (lambda: merge(base=x.long()), r"base has dtype int64"),
    (lambda: merge(seed="abc"), r"seed must be an integer, not str"),
    (lambda: merge(out=torch.empty(2, 3, dtype=torch.float64)), r"out has dtype float64"),
    (lambda: merge(out=torch.empty(2, 3), out_dtype=torch.bfloat16), r"out has dtype torch.float32, but out_dtype"),
    (lambda: merge(out_dtype=torch.int8), r"out_dtype=torch.int8 is not supported"),
    (lambda: ops.tie_counts(None, [x], bounds.int()), r"bounds has dtype torch.int32; it must be torch.int64"),
    (lambda: ops.zero_nonfinite_(x.double()), r"x has dtype float64, which is not changed in place"),
    (lambda: ops.highpass(x.int(), 0.5), r"x has dtype int32.*convert it with \.float\(\)"),
    (lambda: ops.highpass(x, "half"), r"ratio must be a number, not str"),  # type: ignore[arg-type]
    (lambda: ops.highpass(x, 0.5, out=x.bfloat16()), r"out has dtype torch.bfloat16, but x has torch.float32"),
    (lambda: ops.tensor_id(3), r"name must be a string, not int"),  # type: ignore[arg-type]
    (lambda: torch.ops.fastmerge.count_nonfinite(x.double()), r"x has dtype float64; round it to float32 first"),
]


@pytest.mark.parametrize(("call", "sentence"), VALUES)
def test_wrong_values(call: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ArgumentError, match=sentence) as raised:
        call()
    assert isinstance(raised.value, ValueError)
    assert isinstance(raised.value, FastmergeError)


@pytest.mark.parametrize(("call", "sentence"), TYPES)
def test_wrong_types(call: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ArgumentTypeError, match=sentence) as raised:
        call()
    assert isinstance(raised.value, TypeError)
    assert isinstance(raised.value, FastmergeError)


def test_float64_is_rounded_to_float32_first_and_returned_as_float64() -> None:
    wide = torch.tensor([1.0 + 2.0**-40, 3.0, 1e300], dtype=torch.float64)
    sparse = ops.sparsify(wide, 1.0)
    assert sparse.dtype == torch.float64
    assert sparse.tolist() == [1.0, 3.0, math.inf]
    merged = ops.consensus_merge(wide, [wide.float()], 1.0)
    assert merged.dtype == torch.float64
    assert ops.kth_magnitude(wide[:2], 2) == 1.0
    assert ops.count_nonfinite(wide).tolist() == [0, 1]


@pytest.mark.parametrize("method", ["magnitude", "magnitude_outliers", "bernoulli", "della_magprune"])
@pytest.mark.parametrize("ties", ["lowest_index", "hashed", "keep"])
@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0)])
def test_empty_tensors(method: str, ties: str, shape: tuple[int, ...]) -> None:
    empty = torch.empty(shape, dtype=torch.bfloat16)
    arguments = {"method": method, "rescale": "l1", "ties": ties, "density": 0.5}
    assert_bitwise_equal(ops.consensus_merge(empty, [empty, empty], 1.0, **arguments), empty)
    assert ops.topk_mask(empty, 0.5, ties=ties).shape == shape


@pytest.mark.parametrize("method", ["magnitude", "magnitude_outliers", "bernoulli"])
def test_density_zero_is_zeros_and_density_one_is_the_tensor(method: str) -> None:
    y = torch.tensor([1.0, -0.0, 3.0, math.inf])
    assert_bitwise_equal(ops.sparsify(y, 0.0, method=method), torch.zeros(4))
    assert_bitwise_equal(ops.sparsify(y, 1.0, method=method, rescale="l1"), y)


def test_magnitude_keeps_one_element_at_the_least() -> None:
    assert ops.topk_mask(torch.tensor([1.0, 5.0, 2.0]), 1e-9).tolist() == [False, True, False]


def test_outliers_are_dropped_and_fewer_where_there_is_no_room() -> None:
    y = torch.arange(1.0, 11.0)
    kept = ops.sparsify(y, 0.3, method="magnitude_outliers", gamma=0.2)
    assert kept.nonzero()[:, 0].tolist() == [5, 6, 7]
    kept = ops.sparsify(y, 0.9, method="magnitude_outliers", gamma=0.2)
    assert kept.nonzero()[:, 0].tolist() == list(range(9))
    assert ops.sparsify(y, 0.3, method="magnitude_outliers", gamma=0.01).nonzero()[:, 0].tolist() == [7, 8, 9]


def test_ties_lowest_index_keep_and_hashed() -> None:
    y = torch.tensor([2.0, -1.0, 1.0, 1.0, 0.5, -1.0])
    assert ops.topk_mask(y, 0.5).nonzero()[:, 0].tolist() == [0, 1, 2]
    assert ops.topk_mask(y, 0.5, ties="keep").nonzero()[:, 0].tolist() == [0, 1, 2, 3, 5]
    masks = {tuple(ops.topk_mask(y, 0.5, ties="hashed", seed=s).tolist()) for s in range(60)}
    assert all(sum(mask) == 3 and mask[0] and not mask[4] for mask in masks)
    assert len(masks) == 6
    dropped = ops.sparsify(y, 1 / 3, method="magnitude_outliers", gamma=1 / 3, ties="keep")
    assert dropped.tolist() == [0.0, -1.0, 1.0, 1.0, 0.0, -1.0]
    assert ops.sparsify(y, 0.0, method="magnitude_outliers", gamma=1 / 3, ties="keep").tolist() == [0.0] * 6


def test_hashed_merge_equals_the_merge_of_hashed_deltas() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randint(-3, 4, (40,), generator=generator).float()
    others = [base + torch.randint(-2, 3, (40,), generator=generator) for _ in range(2)]
    where = {"seed": 7, "tensor_id": 8, "ties": "hashed"}
    merged = ops.consensus_merge(base, others, [1.0, 0.5], density=0.3, rescale="l1", **where)
    deltas = [ops.sparsify(o - base, 0.3, rescale="l1", model=i, **where) for i, o in enumerate(others)]
    assert_bitwise_equal(merged, ops.consensus_merge(base, deltas, [1.0, 0.5], inputs="deltas"))


def test_out_is_written_returned_and_of_the_dtype_asked_for() -> None:
    expected = merge(out_dtype=torch.float16)
    out = poison_(torch.empty(2, 3, dtype=torch.float16))
    assert merge(out=out) is out
    assert_bitwise_equal(out, expected)


def test_the_kernel_writes_straight_into_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastmerge.backends import reference

    written: list[int] = []
    monkeypatch.setattr(reference, "consensus_apply", lambda *_, out, **__: written.append(out.data_ptr()))
    out = torch.empty(2, 3)
    merge(out=out, backend="reference")
    assert written == [out.data_ptr()]


def test_della_ranks_along_dimension_one_where_the_peer_is_followed() -> None:
    y = torch.randn(3, 50, 4, generator=torch.Generator().manual_seed(3))
    arguments = {"method": "della_magprune", "seed": 5, "rescale": "l1"}
    moved = y.movedim(1, -1).contiguous()
    peer = ops.sparsify(y, 0.5, numerics="mergekit", **arguments)
    assert_bitwise_equal(peer.movedim(1, -1), ops.sparsify(moved, 0.5, **arguments))
    assert peer.is_contiguous()
    out = poison_(torch.empty(3, 50, 4))
    assert_bitwise_equal(ops.sparsify(y, 0.5, numerics="mergekit", out=out, **arguments), peer)


def test_mixed_dtypes_widen_and_the_result_has_the_bases() -> None:
    base = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
    merged = ops.consensus_merge(
        base, [torch.tensor([1.5, 2.0]), torch.tensor([1.0, 4.0]).half()], 1.0, election="none", divisor="none"
    )
    assert_bitwise_equal(merged, torch.tensor([1.5, 4.0], dtype=torch.bfloat16))


def test_tensor_id_is_the_head_of_sha256_little_endian() -> None:
    digest = hashlib.sha256(b"lm_head.weight").hexdigest()[:16]
    assert ops.tensor_id("lm_head.weight") == int("".join(reversed([digest[i : i + 2] for i in range(0, 16, 2)])), 16)
    assert ops.tensor_id("a") != ops.tensor_id("b")


def test_seeds_and_tensor_ids_are_taken_modulo_two_to_the_64() -> None:
    y = torch.ones(100)
    one = ops.sparsify(y, 0.5, method="bernoulli", seed=2**64 - 1, tensor_id=2**63)
    other = ops.sparsify(y, 0.5, method="bernoulli", seed=-1, tensor_id=-(2**63))
    assert_bitwise_equal(one, other)
    assert not torch.equal(one, ops.sparsify(y, 0.5, method="bernoulli", seed=0, tensor_id=2**63))


def test_random_masks_do_not_depend_on_the_chunks() -> None:
    y = torch.ones(1000)
    arguments = {"method": "bernoulli", "seed": 3, "tensor_id": 4, "model": 2}
    whole = ops.sparsify(y, 0.5, **arguments)
    parts = [ops.sparsify(y[a:b], 0.5, offset=a, **arguments) for a, b in ((0, 1), (1, 450), (450, 1000))]
    assert_bitwise_equal(torch.cat(parts), whole)
