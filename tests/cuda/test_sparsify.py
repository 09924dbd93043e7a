"""Masks and exact sums in CUDA C++ where their kernels part ways: parts of tie blocks, rows, all exponents."""

from __future__ import annotations

import pytest
import torch

from fastmerge import ops
from fastmerge.backends import reference
from fastmerge.backends.rule import TIE_BLOCK, SparsifyRule
from fastmerge.errors import BackendError
from fastmerge.reference import random
from fastmerge.reference.numbers import keys
from fastmerge.reference.sparsify import normalised_ranks
from tests.cuda.running import both_orders, needs_cuda, there, unaligned
from tests.numeric import assert_bitwise_equal

pytestmark = needs_cuda


def band(numel: int, tensors: list[torch.Tensor], low: float, high: float) -> SparsifyRule:
    """The elements between two shares, the greatest first."""
    count = len(tensors)
    found = reference.magnitude_bounds(
        None, tensors, [int(low * numel)] * count, [int(high * numel)] * count, torch.float32
    )
    return SparsifyRule("band", bounds=there(found[0]), ties_before=there(found[1]))


@both_orders
@pytest.mark.parametrize("numel", [2047, 70001, 2 * TIE_BLOCK])
def test_cuts_within_tie_blocks(order: str, numel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTMERGE_EMULATED_ORDER", order)
    generator = torch.Generator().manual_seed(numel)
    tensors = [torch.randint(-3, 4, (numel,), generator=generator).to(torch.bfloat16) for _ in range(2)]
    for low, high in ((0.0, 0.5), (0.2, 0.7)):
        rule = band(numel, tensors, low, high)
        for function in (ops.kept_masks, ops.l1_sums):
            expected = function(None, tensors, rule, backend="reference")
            assert_bitwise_equal(function(None, [there(x) for x in tensors], rule, backend="cuda").cpu(), expected)


@both_orders
def test_sums_of_all_exponents(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTMERGE_EMULATED_ORDER", order)
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(-(2**31), 2**31, (100003,), generator=generator).to(torch.int32)
    largest = torch.full((150001,), torch.finfo(torch.float32).max)
    for x in (bits.view(torch.float32), largest, (bits & 0x7FFFFF).view(torch.float32)):
        expected = ops.l1_sums(None, [x], SparsifyRule(), backend="reference")
        for given in (x, unaligned(x, 5)):
            assert_bitwise_equal(ops.l1_sums(None, [there(given)], SparsifyRule(), backend="cuda").cpu(), expected)


@both_orders
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_not_finite_anywhere(dtype: torch.dtype, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than the loads that are under way together, and the largest and least finite numbers everywhere else."""
    monkeypatch.setenv("FASTMERGE_EMULATED_ORDER", order)
    limits = torch.finfo(dtype)
    for numel in (70001, 400007):
        x = torch.tensor([limits.max, limits.min, limits.tiny, 0.0], dtype=dtype).repeat(numel)[:numel].clone()
        x[::2099] = float("inf")
        x[1::3001] = float("nan")
        x[-1] = -float("inf")
        for found in (there(x.clone()), there(unaligned(x, 3))):
            assert ops.count_nonfinite(found, backend="cuda").tolist() == [x.isnan().sum(), x.isinf().sum()]
            ops.zero_nonfinite_(found, backend="cuda")
            assert_bitwise_equal(found.cpu(), torch.where(x.isfinite(), x, 0.0))


@both_orders
@pytest.mark.parametrize(("rows", "length"), [(33, 3), (19, 1101), (1, 70000), (700, 1), (3, 5000)])
def test_rows_in_groups(rows: int, length: int, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTMERGE_EMULATED_ORDER", order)
    # A block has no room for rows but the shortest.
    monkeypatch.setenv("FASTMERGE_EMULATED_SHARED", "9300")
    monkeypatch.setattr("fastmerge.backends.cuda.sparsify.SORTED", 1)
    generator = torch.Generator().manual_seed(rows)
    base = torch.randn(rows, length, generator=generator).to(torch.bfloat16)
    tensors = [(base + 0.1 * torch.randn(rows, length, generator=generator)).to(torch.bfloat16), base.clone()]
    tensors += [torch.randn(rows, length, generator=generator)]
    spread = [0.1, 0.45, 0.0]
    rule = SparsifyRule("della", None, None, [0.4, 0.5, 0.3], spread, length, 2**64 - 3, 11, [0, 1, 4095], 4 * length)
    expected = ops.kept_masks(base, tensors, rule, backend="reference")
    found = ops.kept_masks(there(base), [there(x) for x in tensors], rule, backend="cuda")
    assert_bitwise_equal(found.cpu(), expected)


def values(kind: str, rows: int, length: int) -> torch.Tensor:
    """Rows whose keys lie far apart, close together, or on top of each other."""
    generator = torch.Generator().manual_seed(length)
    drawn = torch.randn(rows, length, generator=generator)
    few = torch.randint(0, 40, (rows, length), generator=generator)
    if kind == "equal":
        return torch.full((rows, length), -0.37)
    if kind == "zeros":
        return torch.where(few < 4, drawn, torch.where(few < 8, 2.0**-140, torch.where(few < 16, 0.0, -0.0)))
    if kind == "close":
        return 1 + few * 2.0**-22
    if kind == "pairs":
        return 1 + (torch.arange(rows * length) // 2).view(rows, length) * 2.0**-20
    if kind == "bits":
        return torch.randint(-(2**31), 2**31, (rows, length), generator=generator).to(torch.int32).view(torch.float32)
    return drawn


ROWS = [(700, 2), (37, 127), (21, 128), (21, 129), (10, 1024), (9, 1025), (2, 8192), (2, 8193)]


def assert_ranked(
    base: torch.Tensor | None, x: torch.Tensor, density: float, epsilon: float, seed: int = 2**64 - 3, offset: int = 3
) -> None:
    """The mask of one model is the reference's."""
    length = x.shape[1]
    rule = SparsifyRule("della", None, None, [density], [epsilon], length, seed, 11, [7], offset * length)
    expected = ops.kept_masks(base, [x], rule, backend="reference")
    assert_bitwise_equal(ops.kept_masks(there(base), [there(x)], rule, backend="cuda").cpu(), expected)


@both_orders
@pytest.mark.parametrize("kind", ["far", "equal", "zeros", "close", "pairs", "bits"])
@pytest.mark.parametrize(("rows", "length"), ROWS)
def test_rows_of_all_kinds(rows: int, length: int, kind: str, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTMERGE_EMULATED_ORDER", order)
    x = values(kind, rows, length)
    assert_ranked(None, x, 0.5, 0.45)
    if kind in ("far", "zeros", "bits"):
        assert_ranked(None, unaligned(x.to(torch.float16), 2), 0.3, 0.2)
        assert_ranked(values("far", rows, length).to(torch.bfloat16), unaligned(x.to(torch.bfloat16), 5), 0.7, 0.1)


@both_orders
@pytest.mark.parametrize("at_once", [1, 3])
def test_more_open_bins_than_are_refined_at_a_time(at_once: int, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTMERGE_EMULATED_ORDER", order)
    monkeypatch.setattr("fastmerge.backends.cuda.sparsify.OPEN", at_once)
    for kind in ("far", "close", "pairs", "bits"):
        assert_ranked(None, values(kind, 5, 333), 0.5, 0.45)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("length", [65, 257, 1025])
def test_words_at_the_very_limit(length: int, ties: bool) -> None:
    x = values("far", 1, length)
    x = (x * 8).round() / 8 if ties else x
    ranks = normalised_ranks(keys(x), length)
    seed, epsilon = 5, 0.125
    words = random.words(0, length, seed=seed, tensor_id=11, stream=random.stream_id(random.DELLA, 7))
    for place in range(0, length, length // 16):
        # A power of two divides the rank, so that all of this is exact.
        for limit in (int(words[place]), int(words[place]) + 1):
            density = limit / 2**32 + epsilon - 2 * epsilon * float(ranks[place])
            if epsilon < density < 1 - epsilon:
                assert_ranked(None, x, density, epsilon, seed, 0)


@both_orders
@pytest.mark.parametrize(("length", "room"), [(36001, 101376), (30000, 101376), (65535, 232448), (65536, 232448)])
def test_rows_for_which_a_block_has_no_room(
    length: int, room: int, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTMERGE_EMULATED_ORDER", order)
    monkeypatch.setenv("FASTMERGE_EMULATED_SHARED", str(room))
    from fastmerge.backends.cuda.launch import EMULATED, compiled

    if EMULATED:
        assert compiled.ranks_rows((0, 0), length) == (length in (30000, 65535))
    assert_ranked(None, values("far", 2, length), 0.4, 0.3)


def test_too_many_models() -> None:
    x = there(torch.ones(3))
    for function in (ops.kept_masks, ops.l1_sums):
        with pytest.raises(BackendError, match="at most 128 models"):
            function(None, [x] * 129, SparsifyRule(), backend="cuda")
