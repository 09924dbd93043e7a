"""Selection in Triton where it differs from the other backends: tiles, copies, tables, digits, and what is hot."""

from __future__ import annotations

import random as chance
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmerge import backends
from fastmerge.backends import reference
from fastmerge.backends.rule import TIE_BLOCK
from tests import strategies
from tests.numeric import assert_bitwise_equal
from tests.ops import running

if backends.available()["triton"] is not None:
    pytest.skip(
        f"no triton backend here; tests/ops holds the others to the same: {backends.reason('triton')}",
        allow_module_level=True,
    )

from fastmerge.backends.triton import launch
from fastmerge.backends.triton import select as adapter

DEVICE = torch.device("cpu" if launch.INTERPRETED else "cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ABOVE_ALL = 1 << 31


def moved(value: Any, device: torch.device) -> Any:
    """A tensor, or the tensors of a list or tuple, on a device; anything else as it is."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return type(value)(moved(each, device) for each in value) if isinstance(value, (list, tuple)) else value


class Selection:
    """The adapter's functions, run where kernels run, on tensors of the CPU."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            there = moved(arguments, DEVICE)
            result = getattr(adapter, name)(*there)
            for here, changed in zip(arguments, there):
                if isinstance(here, torch.Tensor):
                    here.copy_(changed)
            return moved(result, torch.device("cpu"))

        return call


select = Selection()


def bounds_of_many(
    base: Any, tensors: Any, first: Any, last: Any, compute: torch.dtype = torch.float32, kept: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The bounds of tensors of the CPU."""
    there = moved(base, DEVICE), moved(tensors, DEVICE)
    found = running.bounds_of_many(adapter, *there, first, last, compute, kept)
    return found[0].cpu(), found[1].cpu()


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launch.BLOCK_VARIABLE, "128")
    launch.launched.clear()


def numbers(count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)).to(dtype)


def hot(count: int, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Inputs in which most or all elements share a bin."""
    yield torch.zeros(count, dtype=dtype)
    yield torch.full((count,), -2.5, dtype=dtype)
    yield torch.full((count,), torch.nan, dtype=dtype)
    yield (torch.arange(count) % 2).to(dtype)
    yield torch.where(torch.arange(count) % 7 == 3, numbers(count), torch.zeros(count)).to(dtype)


def check_bounds(base: torch.Tensor | None, models: list[torch.Tensor], first: list[int], last: list[int]) -> None:
    for compute in DTYPES:
        expected = reference.magnitude_bounds(base, models, first, last, compute)
        actual = select.magnitude_bounds(base, models, first, last, compute)
        assert_bitwise_equal(actual[0], expected[0])
        assert_bitwise_equal(actual[1], expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_rank_of_a_small_vector_with_every_kind_of_number(dtype: torch.dtype) -> None:
    x = torch.tensor([*strategies.SPECIAL, 2.0**-24, 3 * 2.0**-24, 2.0**-14, 1.5, 1.5, 65504.0]).to(dtype)
    for k in range(1, x.numel() + 1):
        assert_bitwise_equal(select.kth_magnitude([x], k), reference.kth_magnitude([x], k))
    assert launch.launched["count_digit"] == x.numel() * (4 if dtype == torch.float32 else 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_hot_bins(dtype: torch.dtype) -> None:
    for x in hot(700, dtype):
        for k in (1, 99, 100, 101, 350, 700):
            assert_bitwise_equal(select.kth_magnitude([x], k), reference.kth_magnitude([x], k))
        for bins in (32768, 256):
            assert_bitwise_equal(select.abs_histogram([x], bins), reference.abs_histogram([x], bins))
        for prefix in (-1, 0, 32640):
            expected = reference.key_histogram(None, [x], [prefix], torch.float32)
            assert_bitwise_equal(select.key_histogram(None, [x], [prefix], torch.float32), expected)
        check_bounds(None, [x], [99], [350])


def test_shards_of_several_dtypes_and_empty_ones() -> None:
    shards = [numbers(300), numbers(0), numbers(129, torch.bfloat16, 1), numbers(257, torch.float16, 2), numbers(5)]
    for k in (1, 2, 300, 690, 691):
        assert_bitwise_equal(select.kth_magnitude(shards, k), reference.kth_magnitude(shards, k))
        halves = shards[2:4]
        k = min(k, 386)
        assert_bitwise_equal(select.kth_magnitude(halves, k), reference.kth_magnitude(halves, k))
    same = [numbers(300), numbers(0), numbers(500, seed=3), numbers(1)]
    for bins in (1, 2, 256, 512, 32768):
        assert_bitwise_equal(select.abs_histogram(same, bins), reference.abs_histogram(same, bins))
        assert_bitwise_equal(select.abs_histogram([same[1]], bins), torch.zeros(bins, dtype=torch.int64))


def test_odd_addresses() -> None:
    base, x = numbers(1000, torch.bfloat16), numbers(1000, torch.float16, 1)
    for shift in range(1, 9):
        check_bounds(base[shift:], [x[: 1000 - shift], base[: 1000 - shift]], [7, 0], [300, 400])
        cut = torch.tensor([[[ABOVE_ALL, 0], [0x3F000000, 0]]]), torch.zeros(1, 2, 1, dtype=torch.int64)
        assert_bitwise_equal(select.topk_mask(x[shift:], *cut), reference.topk_mask(x[shift:], *cut))


def test_ten_models_of_several_dtypes() -> None:
    base = numbers(600, torch.bfloat16)
    models = [(base.float() + 0.01 * numbers(600, seed=i)).to(DTYPES[i % 3]) for i in range(10)]
    check_bounds(base, models, [60 * i for i in range(10)], [600 - 50 * i for i in range(10)])
    check_bounds(None, models, [0] * 10, [600] * 10)
    for prefix in ([-1] * 10, [32000 + 20 * i for i in range(10)]):
        expected = reference.key_histogram(base, models, prefix, torch.float32)
        assert_bitwise_equal(select.key_histogram(base, models, prefix, torch.float32), expected)


def test_ranks_at_the_ends_need_no_sweep() -> None:
    check_bounds(None, [numbers(300), numbers(300)], [0, 300], [300, 0])
    assert not launch.launched["count_digit"]
    check_bounds(None, [numbers(0)], [0], [0])


@pytest.mark.parametrize("tile", (1024, 4096, 65536))
def test_ties_across_blocks_whatever_the_tile(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launch.BLOCK_VARIABLE, str(tile))
    count = 2 * TIE_BLOCK + 777
    x = (torch.arange(count) % 5).to(torch.bfloat16)
    x[::3] = numbers(count, torch.bfloat16)[::3]
    base = torch.zeros(count)
    equal = int((x == 2).sum())
    above = int((x.abs() > 2).sum())
    # Cuts before, in, between and after the ties of each block.
    for first, last in pairwise((0, above, above + 1, above + equal // 3, above + equal - 1, above + equal)):
        expected = reference.magnitude_bounds(base, [x], [first], [last], torch.float32)
        actual = select.magnitude_bounds(base, [x], [first], [last], torch.float32)
        assert_bitwise_equal(actual[0], expected[0])
        assert_bitwise_equal(actual[1], expected[1])
        counts = select.tie_counts(base, [x], expected[0], torch.float32)
        assert_bitwise_equal(counts, reference.tie_counts(base, [x], expected[0], torch.float32))
        assert_bitwise_equal(select.topk_mask(x, *expected), reference.topk_mask(x, *expected))


def test_a_mask_walks_only_through_the_block_that_a_bound_divides() -> None:
    count = 3 * TIE_BLOCK
    x = torch.ones(count, dtype=torch.bfloat16)
    for rank in (1, TIE_BLOCK - 1, TIE_BLOCK, TIE_BLOCK + 1, 2 * TIE_BLOCK, count - TIE_BLOCK + 1, count - 1):
        bounds, before = reference.magnitude_bounds(None, [x], [0], [rank], torch.float32)
        mask = select.topk_mask(x, bounds, before)
        assert int(mask.sum()) == rank
        assert mask[:rank].all()


def test_a_histogram_of_more_blocks_than_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launch.BLOCK_VARIABLE, "4096")
    monkeypatch.setattr(adapter, "COPIES", 8)
    models = [numbers(3 * TIE_BLOCK + 5), numbers(3 * TIE_BLOCK + 5, seed=1)]
    for prefix in ([-1, -1], [32512, 32384]):
        expected = reference.key_histogram(None, models, prefix, torch.float32)
        assert_bitwise_equal(select.key_histogram(None, models, prefix, torch.float32), expected)
    assert launch.launched["count_keys"] == 2


def test_copies_count_further_than_32_bits_where_that_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert adapter._copies(40000, 15, (1 << 31) - 1, 2, cpu).dtype == torch.int32
    wide = adapter._copies(40000, 15, 1 << 31, 2, cpu)
    assert wide.dtype == torch.int64
    assert wide.shape == (2, adapter.COPIES, 1 << 15)
    monkeypatch.setattr(
        adapter, "_copies", lambda blocks, width, *_: torch.zeros(1, 2, 1 << width, dtype=torch.int64, device=DEVICE)
    )
    x = numbers(1000)
    assert_bitwise_equal(select.abs_histogram([x], 4096), reference.abs_histogram([x], 4096))


def test_windows_on_hot_keys_and_past_all_keys() -> None:
    for x in hot(700, torch.float32):
        for low in (0, 0x40200000 - 3, 0x40200000, 0x7FC00000, 0x7FFFFFFF, ABOVE_ALL):
            for width in (1, 5, 1 << 12):
                expected, actual = torch.full((1, width + 1), 5), torch.full((1, width + 1), 5)
                reference.key_window_(None, [x], [low], torch.float32, expected)
                select.key_window_(None, [x], [low], torch.float32, actual)
                assert_bitwise_equal(actual, expected)


def random_models(generator: chance.Random, tensors: int, models: int) -> list[list[torch.Tensor]]:
    lengths = [generator.choice((0, 1, 130, 700, 1500)) for _ in range(tensors)]
    grid = torch.Generator().manual_seed(generator.randrange(1 << 30))
    return [
        [(torch.randint(-9, 10, (length,), generator=grid) / 64).to(torch.bfloat16) for length in lengths]
        for _ in range(models)
    ]


@given(
    seed=st.integers(0, 1 << 30), count=st.integers(1, 6), models=st.integers(1, 3), with_base=st.booleans(),
    compute=strategies.computes, kept=st.booleans(),
)  # fmt: skip
@settings(max_examples=12)
def test_many_tensors_are_what_they_are_one_by_one(
    seed: int, count: int, models: int, with_base: bool, compute: torch.dtype, kept: bool
) -> None:
    generator = chance.Random(seed)
    everything = random_models(generator, count, models + 1)
    base, tensors = (everything[0] if with_base else None), everything[1:]
    lengths = [x.numel() for x in tensors[0]]
    first = [[generator.randint(0, n) for _ in range(models)] for n in lengths]
    last = [[generator.choice((0, n, generator.randint(0, n))) for _ in range(models)] for n in lengths]
    bounds, ties = bounds_of_many(base, tensors, first, last, compute, kept)
    parts = [
        reference.magnitude_bounds(
            None if base is None else base[t], [model[t] for model in tensors], first[t], last[t], compute
        )
        for t in range(count)
    ]
    assert_bitwise_equal(bounds, torch.stack([part[0] for part in parts]))
    assert_bitwise_equal(ties, torch.cat([part[1] for part in parts], dim=2))


def test_as_many_launches_for_many_tensors_as_for_one() -> None:
    one = [numbers(200)]
    many = [numbers(100 + i, seed=i) for i in range(40)]
    made = []
    for tensors in (one, many):
        launch.launched.clear()
        bounds, _ = bounds_of_many(None, [tensors], [[0]] * len(tensors), [[50]] * len(tensors))
        made.append({name: number for name, number in launch.launched.items() if name != "write_row"})
        for x, found in zip(tensors, bounds):
            assert_bitwise_equal(found, reference.magnitude_bounds(None, [x], [0], [50], torch.float32)[0])
    assert made[0] == made[1] == {"count_digit": 4, "descend": 3, "settle": 1}


@pytest.mark.parametrize("settled", [adapter.SETTLED, 2])
def test_many_tensors_with_ties_across_blocks(settled: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """settled: how many tie blocks are added up at once."""
    monkeypatch.setenv(launch.BLOCK_VARIABLE, "4096")
    monkeypatch.setattr(adapter, "SETTLED", settled)
    tensors = [(torch.arange(n) % 3).to(torch.bfloat16) for n in (TIE_BLOCK + 9, 17, 2 * TIE_BLOCK + 1)]
    ranks = [[x.numel() // 2] for x in tensors]
    bounds, ties = bounds_of_many(None, [tensors], [[0]] * 3, ranks)
    parts = [reference.magnitude_bounds(None, [x], [0], rank, torch.float32) for x, rank in zip(tensors, ranks)]
    assert_bitwise_equal(bounds, torch.stack([part[0] for part in parts]))
    assert_bitwise_equal(ties, torch.cat([part[1] for part in parts], dim=2))


def test_more_blocks_than_copies_of_a_histogram(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launch.BLOCK_VARIABLE, "4096")
    monkeypatch.setattr(adapter, "COPIES", 2)
    models = [(torch.arange(2 * TIE_BLOCK + 1) % n).to(torch.bfloat16) for n in (3, 5)]
    expected = reference.key_histogram(None, models, [0x3F80, 0x4000], torch.float32)
    assert_bitwise_equal(select.key_histogram(None, models, [0x3F80, 0x4000], torch.float32), expected)


def test_many_tensors_must_have_one_dtype_per_role() -> None:
    x, y = numbers(10), numbers(10, torch.bfloat16)
    with pytest.raises(ValueError, match="tensors has several dtypes"):
        bounds_of_many(None, [[x, y]], [[0], [0]], [[5], [5]])
    with pytest.raises(ValueError, match="base has several dtypes"):
        bounds_of_many([x, y], [[x, x]], [[0], [0]], [[5], [5]])


def test_a_table_of_any_length() -> None:
    for count in (0, 1, 16, 17, launch.LONG_TABLE, launch.LONG_TABLE + 1, 500):
        values = [(-1) ** i * (1 << 40) * i for i in range(count)]
        assert launch.table(values, DEVICE).tolist()[:count] == values


def test_hashed_masks_are_those_of_the_reference() -> None:
    assert adapter.hashed_mask is reference.hashed_mask
