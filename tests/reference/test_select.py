"""The reference's selection against sorting, and its masks against rank lists written out element by element."""

from __future__ import annotations

import itertools
import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastmerge import ops
from fastmerge.reference import random, select
from tests import strategies


def ranking(x: Tensor) -> list[int]:
    """Flat indices by falling magnitude, equal ones by rising index, NaN first, by Python's stable sort."""
    flat = [abs(v) for v in x.reshape(-1).float().tolist()]
    return sorted(range(len(flat)), key=lambda i: -math.inf if math.isnan(flat[i]) else -flat[i] if flat[i] < math.inf
                  else -1e300)  # fmt: skip


def shape_without_blocks() -> st.SearchStrategy[tuple[int, ...]]:
    return strategies.shapes().filter(lambda shape: math.prod(shape) < 2000)


@given(st.data())
def test_band_keeps_exactly_the_ranks_asked_for(data: st.DataObject) -> None:
    x = data.draw(strategies.tensors(shape=data.draw(shape_without_blocks())))
    first, last = data.draw(strategies.ranks(x.numel()))
    bounds, ties = select.magnitude_bounds(None, [x], [first], [last], torch.float32)
    mask = select.topk_mask(x, bounds, ties).reshape(-1)
    assert sorted(mask.nonzero()[:, 0].tolist()) == sorted(ranking(x)[first:last])


@settings(max_examples=40)
@given(st.data())
def test_ties_are_counted_before_each_block_across_blocks(data: st.DataObject) -> None:
    count = select.TIE_BLOCK + data.draw(st.integers(1, 2 * select.TIE_BLOCK))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32 - 1)))
    x = torch.randint(-2, 3, (count,), generator=generator).float()
    k = data.draw(st.integers(0, count))
    bounds, ties = select.magnitude_bounds(None, [x], [0], [k], torch.float32)
    expected = torch.zeros(count, dtype=torch.bool)
    expected[torch.sort(x.abs(), descending=True, stable=True).indices[:k]] = True
    assert torch.equal(select.topk_mask(x, bounds, ties), expected)
    for block in range(ties.shape[2]):
        before = x[: block * select.TIE_BLOCK].abs()
        for which in range(2):
            threshold, c = bounds[0, which].tolist()
            tied = int((select.keys(before) == threshold).sum())
            assert ties[0, which, block] == (tied if c else 0)


@given(st.data())
def test_bounds_are_normalised(data: st.DataObject) -> None:
    x = data.draw(strategies.tensors())
    rank = data.draw(st.integers(0, x.numel()))
    key = select.keys(x.reshape(-1).float())
    threshold, ties = select.bound(key, rank)
    if rank in (0, x.numel()):
        assert (threshold, ties) == ((1 << 31) if rank == 0 else 0, 0)
    else:
        assert int((key > threshold).sum()) < rank
        assert 0 <= ties < int((key == threshold).sum())
        assert int((key >= threshold).sum() if ties == 0 else (key > threshold).sum() + ties) == rank


@given(st.data())
def test_kth_magnitude_is_what_topk_says(data: st.DataObject) -> None:
    shards = data.draw(st.lists(strategies.tensors(), min_size=1, max_size=3))
    together = torch.cat([shard.reshape(-1).float().abs() for shard in shards])
    if together.numel() == 0:
        return
    k = data.draw(st.integers(1, together.numel()))
    expected = torch.topk(together, k).values[-1]
    actual = select.kth_magnitude(shards, k)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected) or (bool(actual.isnan()) and bool(expected.isnan()))


@given(st.data())
def test_abs_histogram_counts_each_magnitude_of_half_types(data: st.DataObject) -> None:
    x = data.draw(strategies.tensors(dtype=data.draw(st.sampled_from((torch.bfloat16, torch.float16)))))
    histogram = select.abs_histogram([x], 32768)
    magnitudes = torch.arange(32768).to(torch.int16).view(x.dtype)
    expected, counts = x.reshape(-1)[~x.reshape(-1).isnan()].abs().float().unique(return_counts=True)
    met = histogram.nonzero()[:, 0]
    met = met[~magnitudes[met].isnan()]
    assert torch.equal(magnitudes[met].float(), expected) and torch.equal(histogram[met], counts)
    assert histogram.sum() == x.numel()
    canonical = 0x7FC0 if x.dtype == torch.bfloat16 else 0x7E00
    assert histogram[canonical] == x.isnan().sum()


@given(st.data())
def test_abs_histogram_of_float32_counts_leading_bits_and_adds_over_shards(data: st.DataObject) -> None:
    shards = data.draw(st.lists(strategies.tensors(dtype=torch.float32), min_size=1, max_size=3))
    fine = select.abs_histogram(shards, 32768)
    for bins in (1, 2, 256):
        assert torch.equal(select.abs_histogram(shards, bins), fine.view(bins, -1).sum(1))
    assert torch.equal(fine, sum(select.abs_histogram([shard], 32768) for shard in shards))
    x = shards[0].reshape(-1)
    ones = ((x.abs() >= 1) & (x.abs() < 1 + 2.0**-7)).sum()
    assert select.abs_histogram([x], 32768)[0x3F80_0000 >> 16] == ones


@settings(max_examples=80)
@given(st.data())
def test_two_level_histogram_finds_the_bounds_of_the_whole_tensor(data: st.DataObject) -> None:
    """Chunk by chunk, cut anywhere, the path over histograms gives the same bounds and masks as the whole tensor."""
    models = data.draw(strategies.models(most=2))
    compute = data.draw(strategies.computes)
    numel, count = models.numel, len(models.tensors)
    pairs = [data.draw(strategies.ranks(numel)) for _ in models.tensors]
    first, last = [p[0] for p in pairs], [p[1] for p in pairs]
    edges = sorted({0, numel, *data.draw(st.lists(st.integers(0, numel), max_size=3))})
    flat = [None if models.base is None else models.base.reshape(-1), *(x.reshape(-1) for x in models.tensors)]
    cuts = list(itertools.pairwise(edges)) or [(0, 0)]
    chunks = [[None if x is None else x[a:b] for x in flat] for a, b in cuts]

    def swept(prefix: list[int]) -> Tensor:
        parts = [ops.key_histogram(c[0], c[1:], prefix, compute=compute, backend="reference") for c in chunks]
        return torch.stack(parts).sum(0)

    level0 = swept([-1] * count)
    bounds = ops.bounds_from_histograms(
        level0, swept(ops.prefixes(level0, first)), swept(ops.prefixes(level0, last)), first, last
    )
    whole, ties = select.magnitude_bounds(models.base, models.tensors, first, last, compute)
    assert bounds.tolist() == whole.tolist()

    start = None
    masks = []
    for chunk in chunks:
        counts = ops.tie_counts(chunk[0], chunk[1:], bounds, compute=compute, backend="reference")
        before, start = ops.ties_before(counts, start)
        delta = select.difference(chunk[0], chunk[1], compute)
        masks.append(select.topk_mask(delta, bounds[:1], before[:1]))
    delta = select.difference(models.base, models.tensors[0], compute)
    assert torch.equal(torch.cat(masks), select.topk_mask(delta, whole[:1], ties[:1]))


@given(st.data())
def test_a_window_finds_the_bound_or_says_that_it_lies_outside(data: st.DataObject) -> None:
    models = data.draw(strategies.models(most=1))
    numel = models.numel
    if numel < 2:
        return
    rank = data.draw(st.integers(1, numel - 1))
    bounds, _ = select.magnitude_bounds(models.base, models.tensors, [0], [rank], torch.float32)
    threshold, ties = bounds[0, 1].tolist()
    width = data.draw(st.sampled_from((1, 7, 100_000)))
    low = max(0, threshold - data.draw(st.integers(0, 2 * width)))
    counts = torch.zeros(1, width + 1, dtype=torch.int64)
    half = numel // 2
    flat = [None if models.base is None else models.base.reshape(-1), *(x.reshape(-1) for x in models.tensors)]
    for part in (slice(0, half), slice(half, numel)):
        chunk = [None if x is None else x[part] for x in flat]
        ops.key_window_(chunk[0], chunk[1:], [low], counts, backend="reference")
    found = ops.bound_in_window(counts[0], low, rank)
    assert found == ((threshold, ties) if low <= threshold < low + width else None)


@given(st.data())
def test_hashed_ties_keep_as_many_and_rank_equals_by_their_words(data: st.DataObject) -> None:
    x = data.draw(strategies.tensors(shape=data.draw(shape_without_blocks())))
    first, last = data.draw(strategies.ranks(x.numel()))
    where = {"seed": data.draw(strategies.words64), "tensor_id": data.draw(strategies.words64)}
    position, offset = data.draw(strategies.positions), data.draw(strategies.offsets)
    bounds, _ = select.magnitude_bounds(None, [x], [first], [last], torch.float32)
    mask = select.hashed_mask(x, bounds, **where, position=position, offset=offset).reshape(-1)
    index = torch.arange(offset, offset + x.numel())
    high, low = (
        random.words_at(index, **where, stream=2 << 28 | generation << 12 | position).tolist() for generation in (0, 1)
    )
    key = select.keys(x.reshape(-1).float()).tolist()
    order = sorted(range(x.numel()), key=lambda i: (-key[i], high[i] << 32 | low[i], i))
    assert sorted(mask.nonzero()[:, 0].tolist()) == sorted(order[first:last])
