"""What the CUDA kernels of selection do differently from others: little shared memory, large and small tensors."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmerge import backends, ops
from fastmerge.errors import BackendError
from tests.cuda.running import needs_cuda
from tests.numeric import assert_bitwise_equal
from tests.ops.running import bounds_of_many

pytestmark = needs_cuda

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TIE_BLOCK = 65536

ODD = (-float("inf"), float("nan"), 0.0, -0.0, 65504.0, 1e-7, 1e30, -1e-30)


@pytest.fixture(params=["forward", "reverse, 99 KiB", "48 KiB"], autouse=True)
def _emulated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """States of the emulator that may not show. A GPU does not look at them."""
    if "reverse" in request.param:
        monkeypatch.setenv("FASTMERGE_EMULATED_ORDER", "reverse")
        monkeypatch.setenv("FASTMERGE_EMULATED_SHARED", "101376")
    elif request.param != "forward":
        monkeypatch.setenv("FASTMERGE_EMULATED_SHARED", "49152")


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def values(numel: int, dtype: torch.dtype, seed: int, shift: int = 0) -> Tensor:
    """Numbers with many ties, and odd ones, from `shift` elements past where memory begins."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(numel + shift, generator=generator) * 0.02
    x[torch.rand(numel + shift, generator=generator) < 0.3] = 0.0
    for place in range(0, min(numel, 4096), 64):
        x[place + shift] = ODD[place // 64 % len(ODD)]
    return x.to(dtype).to(device())[shift:]


def same(actual: Any, expected: Any) -> None:
    pairs = zip(actual, expected) if isinstance(expected, tuple) else [(actual, expected)]
    for one, other in pairs:
        assert_bitwise_equal(one, other)


def on_both(call: Any, *arguments: Any, **options: Any) -> None:
    same(call(*arguments, backend="cuda", **options), call(*arguments, backend="reference", **options))


@pytest.mark.parametrize("dtype", DTYPES)
def test_histograms_of_more_bins_than_fit(dtype: torch.dtype) -> None:
    shards = [values(TIE_BLOCK + 777, dtype, 1, shift=3), values(0, dtype, 2), values(5, dtype, 3)]
    on_both(ops.abs_histogram, shards)
    on_both(ops.abs_histogram, shards, bins=2)


@pytest.mark.parametrize("prefix", [[-1, -1], [0x3F800000 >> 15, 0]])
def test_levels_of_more_bins_than_fit(prefix: list[int]) -> None:
    models = [values(9000, torch.float32, 4, shift=1), values(9000, torch.bfloat16, 5)]
    models[0][:300] = 1.0 + torch.arange(300) * 2.0**-23
    on_both(ops.key_histogram, None, models, prefix)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("compute", "base"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)])
def test_bounds_of_several_tie_blocks(dtype: torch.dtype, compute: torch.dtype, base: bool) -> None:
    numel = 2 * TIE_BLOCK + 13
    models = [values(numel, dtype, 6, shift=1), values(numel, dtype, 7)]
    origin = values(numel, dtype, 8, shift=2) if base else None
    on_both(ops.magnitude_bounds, origin, models, [0, numel // 100], [numel // 3, numel * 9 // 10], compute=compute)


@pytest.mark.parametrize(("dtype", "value"), [(torch.float32, 0.5), (torch.bfloat16, 0.0), (torch.float16, 0.5)])
def test_equal_elements(dtype: torch.dtype, value: float) -> None:
    """In more than one tie block, the first of which the cut takes whole, or not."""
    x = torch.full((2 * TIE_BLOCK + 100,), value, dtype=dtype, device=device())
    for last in (TIE_BLOCK, TIE_BLOCK + 1, TIE_BLOCK + 50000, 2 * TIE_BLOCK + 99):
        bounds = on_reference_and_cuda_bounds(x, last // 2, last)
        same(topk("cuda", x, *bounds), topk("reference", x, *bounds))


def on_reference_and_cuda_bounds(x: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
    expected = ops.magnitude_bounds(None, [x], [first], [last], backend="reference")
    same(ops.magnitude_bounds(None, [x], [first], [last], backend="cuda"), expected)
    return expected


def topk(backend: str, x: Tensor, bounds: Tensor, ties_before: Tensor) -> Tensor:
    return backends.resolve(backend).topk_mask(x, bounds, ties_before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_of_any_limits(dtype: torch.dtype) -> None:
    """A limit need not be a key of the dtype: one of its keys, the number after it, and any number."""
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.float16).to(device())
    x = x if dtype == torch.float16 else x.view(torch.bfloat16).to(dtype)
    chance = random.Random(9)
    keys = (x.float().view(torch.int32) & 0x7FFFFFFF).tolist()
    limits = [
        0,
        1,
        1 << 31,
        0x7FC00000,
        0x7FC00001,
        0x7F800000,
        0x7F800001,
        0x477FE001,
        0x477FF000,
        0x33000000,
        0x33000001,
    ]
    limits += [min(key, 0x7FC00000) + more for key in chance.sample(keys, 8) for more in (0, 1)]
    limits += [chance.randrange(1 << 31) for _ in range(8)]
    none = torch.zeros(1, 2, 1, dtype=torch.int64, device=device())
    for first, last in zip(limits, reversed(limits)):
        bounds = torch.tensor([[[max(first, last), 0], [min(first, last), 0]]], device=device())
        same(topk("cuda", x, bounds, none), topk("reference", x, bounds, none))


@pytest.mark.parametrize(("dtype", "base"), [(torch.float32, True), (torch.bfloat16, False), (torch.float16, True)])
def test_many_tensors(dtype: torch.dtype, base: bool) -> None:
    """Small ones, one of which is empty, and large ones, which go other ways."""
    lengths = (0, TIE_BLOCK + 1, 1, 1000, 2 * TIE_BLOCK, TIE_BLOCK)
    models = [[values(numel, dtype, 10 + n, shift=n) for numel in lengths] for n in range(2)]
    bases = [values(numel, torch.bfloat16, 20) for numel in lengths] if base else None
    first = [[0, numel // 9] for numel in lengths]
    last = [[numel // 2, numel * 7 // 8] for numel in lengths]
    module = backends.resolve("cuda")
    both = bounds_of_many(module, bases, models, first, last)
    same(bounds_of_many(module, bases, models, first, last, kept=True), both)
    begin = 0
    for t, numel in enumerate(lengths):
        blocks = max(1, -(-numel // TIE_BLOCK))
        one = ops.magnitude_bounds(
            None if bases is None else bases[t], [model[t] for model in models], first[t], last[t], backend="reference"
        )
        same((both[0][t], both[1][:, :, begin : begin + blocks].contiguous()), one)
        begin += blocks


@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.bfloat16,), DTYPES])
def test_kth_of_shards(dtypes: tuple[torch.dtype, ...]) -> None:
    shards = [values(numel, dtype, 30) for dtype in dtypes for numel in (TIE_BLOCK + 9, 100)]
    for k in (1, 60000, sum(shard.numel() for shard in shards)):
        on_both(lambda *a, **o: torch.tensor(ops.kth_magnitude(*a, **o)), shards, k)


def test_a_window_of_more_keys_than_are_cached() -> None:
    bits = torch.arange(3 * 9000, dtype=torch.int32) % 9000 + 0x3C000000
    bits[:1000] = 0x3C000007
    x = bits.view(torch.float32).to(device())
    for dtype in (torch.float32, torch.float16):
        counts = [torch.full((1, 7001), 5, device=device()) for _ in range(2)]
        for backend, into in zip(("cuda", "reference"), counts):
            ops.key_window_(None, [x.to(dtype)], [0x3C000000 - 10], into, backend=backend)
        same(*counts)


def test_more_models_than_a_launch_takes() -> None:
    models = [values(3, torch.float32, n) for n in range(129)]
    ops.tie_counts(None, models[:128], torch.zeros(128, 2, 2, dtype=torch.int64, device=device()), backend="cuda")
    with pytest.raises(BackendError, match="triton"):
        ops.key_histogram(None, models, [-1] * 129, backend="cuda")
