"""Selection: histograms, the k-th magnitude (with torch's own selections as peers), masks and rank bounds."""

from __future__ import annotations

import independent
import numpy as np
import pytest
import torch
from adversarial import DTYPES, KINDS, family, values
from peers.torch_select import PEERS

from fastmerge import ops

BACKENDS = ["cpu", "reference"]
DENSITIES = [0.1, 0.5]


def magnitude_counts(x: torch.Tensor, bins: int) -> np.ndarray:
    """How many magnitudes have each leading bit pattern, by numpy's bincount on the bits."""
    if x.dtype == torch.float32:
        keys, width = independent.keys(x.numpy()), 31
    else:
        keys, width = x.view(torch.int16).numpy().view(np.uint16) & np.uint16(0x7FFF), 15
    return np.bincount(keys >> (width - (bins.bit_length() - 1)), minlength=bins)


def is_kth(x: torch.Tensor, k: int, value: float) -> str | None:
    """Fewer than k magnitudes lie above the k-th one, and at least k at or above it."""
    above = at_least = 0
    for part in x.split(1 << 24):
        magnitude = part.float().abs()
        above += int((magnitude > value).sum())
        at_least += int((magnitude >= value).sum())
    return None if above < k <= at_least else f"{value}: {above} magnitudes above and {at_least} not below, k = {k}"


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_abs_histogram(kind, dtype, backend, size, measured):
    x = values(kind, DTYPES[dtype], size)
    expected = magnitude_counts(x, 32768)

    def check(histogram):
        return None if np.array_equal(histogram.numpy(), expected) else "the counts are wrong"

    measured(lambda: ops.abs_histogram(x, backend=backend), check, size, x.nbytes)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_kth_magnitude(kind, dtype, backend, size, measured):
    x = values(kind, DTYPES[dtype], size)
    k = size // 2
    measured(lambda: ops.kth_magnitude([x], k, backend=backend), lambda value: is_kth(x, k, value), size, x.nbytes)


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_kth_magnitude_by_torch(kind, dtype, peer, size, measured):
    x = values(kind, DTYPES[dtype], size)
    k = size // 2
    measured(lambda: PEERS[peer](x, k), lambda value: is_kth(x, k, float(value)), size, x.nbytes)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_topk_mask(kind, dtype, backend, density, size, measured):
    x = values(kind, DTYPES[dtype], size)
    expected = independent.magnitude_mask(independent.keys(independent.as_float32(x)), density)

    def check(mask):
        return None if np.array_equal(mask.numpy(), expected) else "another set of elements is marked"

    measured(lambda: ops.topk_mask(x, density, backend=backend), check, size, x.nbytes + size)


def delta_keys(base: torch.Tensor, models: list[torch.Tensor]) -> list[np.ndarray]:
    """The keys of each model's float32 delta."""
    return [independent.keys(independent.as_float32(model) - independent.as_float32(base)) for model in models]


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_magnitude_bounds_of_deltas(kind, dtype, backend, size, measured):
    base, models = family(kind, DTYPES[dtype], size)
    keys = delta_keys(base, models)
    last = [size // 2, size // 10, size - 1]

    def check(found):
        bounds, ties_before = found
        for model, key in enumerate(keys):
            threshold, ties = (int(part) for part in bounds[model, 1])
            equal = key == threshold
            reached = int((key > threshold).sum()) + (ties or int(equal.sum()))
            if reached != last[model]:
                return f"model {model}: the bound lies at rank {reached}, not {last[model]}"
            starts = np.arange(ties_before.shape[2]) * ops.TIE_BLOCK
            before = np.concatenate([[0], np.cumsum(equal)])[starts] * (ties > 0)
            if not np.array_equal(ties_before[model, 1].numpy(), before):
                return f"model {model}: the ties before the blocks are wrong"
        return None

    def run():
        return ops.magnitude_bounds(base, models, [0] * 3, last, compute=torch.float32, backend=backend)

    measured(run, check, 3 * size, base.nbytes + sum(model.nbytes for model in models))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_key_histogram_of_deltas(kind, dtype, backend, size, measured):
    base, models = family(kind, DTYPES[dtype], size)
    expected = np.stack([np.bincount(key >> 15, minlength=65536) for key in delta_keys(base, models)])

    def check(histograms):
        return None if np.array_equal(histograms.numpy(), expected) else "the counts are wrong"

    def run():
        return ops.key_histogram(base, models, [-1] * 3, compute=torch.float32, backend=backend)

    measured(run, check, 3 * size, base.nbytes + sum(model.nbytes for model in models))
