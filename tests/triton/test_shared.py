"""What all kernels in Triton share, against the reference, bit for bit: numbers, functions, random words, tables."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmerge import backends
from fastmerge.reference import functions as reference_functions
from fastmerge.reference import numbers as reference_numbers
from fastmerge.reference import random as reference_random
from tests.numeric import assert_bitwise_equal, poison_

if backends.available()["triton"] is not None:
    pytest.skip(
        f"no triton backend here; tests/ops holds the others to the same: {backends.reason('triton')}",
        allow_module_level=True,
    )

from fastmerge._triton import functions, numbers, random, tables
from fastmerge.backends.triton.launch import CODES, INTERPRETED, float_bits, launch, table

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
BLOCK = 4096
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EDGES = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-40, 65504.0, 65519.9, 65520.0, 3.4e38, math.inf, -math.inf, math.nan]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@triton.jit(do_not_specialize=["n"])
def elementwise(x, y, out, n, WHICH: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    n = n.to(tl.int64)
    a = numbers.loaded(x, start, n, BLOCK, False)
    b = numbers.loaded(y, start, n, BLOCK, False)
    if WHICH == "copy":
        r = a
    elif WHICH == "round_to":
        r = numbers.round_to(a, COMPUTE)
    elif WHICH == "difference":
        r = numbers.difference(b, a, True, COMPUTE)
    elif WHICH == "alone":
        r = numbers.difference(b, a, False, COMPUTE)
    elif WHICH == "sign":
        r = numbers.sign(a)
    elif WHICH == "exp":
        r = functions.exp(a)
    elif WHICH == "log":
        r = functions.log(a)
    else:
        r = functions.tanh(a)
    numbers.stored(out, start, n, r, BLOCK, False)


@triton.jit(do_not_specialize=["n"])
def whole_tiles(x, out, n, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    n = n.to(tl.int64)
    if start + BLOCK <= n:
        numbers.stored(out, start, n, numbers.loaded(x, start, n, BLOCK, True), BLOCK, True)
    else:
        numbers.stored(out, start, n, numbers.loaded(x, start, n, BLOCK, False), BLOCK, False)


@triton.jit
def magnitude_keys(x, out, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + place, numbers.magnitude_key(numbers.widen(tl.load(x + place))).to(tl.int64))


@triton.jit(do_not_specialize=["first", "key", "low", "stream"])
def random_words(out, first, key, low, stream, BLOCK: tl.constexpr, FOURS: tl.constexpr):
    word = random.words(first.to(tl.int64), key.to(tl.int64), low.to(tl.int64), stream.to(tl.int64), BLOCK, FOURS)
    tl.store(out + tl.arange(0, BLOCK), word.to(tl.int64))


@triton.jit
def through_table(numbers_of, out, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    x = tables.address_of(tl.load(numbers_of), tl.bfloat16, ALIGNED)
    factor = tables.float_of(tl.load(numbers_of + 1))
    place = tl.arange(0, BLOCK)
    tl.store(out + place, numbers.widen(tl.load(x + place)) * factor)


def bits_of(dtype: torch.dtype) -> Tensor:
    """Bit patterns of a dtype: all of a 16-bit one, and of float32 random ones and those next to every half of each."""
    if dtype != torch.float32:
        return torch.arange(1 << 16).to(torch.uint16).view(dtype)
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randint(-(2**31), 2**31, (40_000,), generator=generator)
    # Where rounding to 16 bits is decided: the places halfway between two bfloat16 or float16, and their neighbours.
    halves = [drawn[:8000] & ~0xFFFF | 0x8000, drawn[8000:16000] & ~0x1FFF | 0x1000]
    near = [half + step for half in halves for step in (-1, 0, 1)]
    return torch.cat([drawn, *near, torch.tensor(EDGES).view(torch.int32)]).to(torch.int32).view(torch.float32)


def computed(x: Tensor, which: str, y: Tensor | None = None, *, out: torch.dtype, compute: int = 0) -> Tensor:
    """What the step `which` makes of x."""
    x = x.to(DEVICE)
    y = x if y is None else y.to(DEVICE)
    result = poison_(torch.empty(x.numel(), dtype=out, device=DEVICE))
    grid = (-(-x.numel() // BLOCK),)
    launch(elementwise, grid, DEVICE, x, y, result, x.numel(), WHICH=which, COMPUTE=compute, BLOCK=BLOCK)
    return result.cpu()


@each_dtype
def test_widening_is_exact_and_canonical(dtype: torch.dtype) -> None:
    x = bits_of(dtype)
    assert_bitwise_equal(computed(x, "copy", out=torch.float32), reference_numbers.canonical_nan(x.float()))


@each_dtype
def test_storing_rounds_once_to_nearest_even_and_writes_one_nan(dtype: torch.dtype) -> None:
    x = bits_of(torch.float32)
    assert_bitwise_equal(computed(x, "copy", out=dtype), reference_numbers.canonical_nan(x.to(dtype)))


@each_dtype
def test_rounding_to_the_compute_dtype(dtype: torch.dtype) -> None:
    x = bits_of(torch.float32)
    expected = reference_numbers.canonical_nan(reference_numbers.round_to(x, dtype))
    assert_bitwise_equal(computed(x, "round_to", out=torch.float32, compute=CODES[dtype]), expected)


@each_dtype
def test_differences_round_each_step(dtype: torch.dtype) -> None:
    x, y = bits_of(torch.float32), bits_of(torch.float32).flip(0)
    expected = reference_numbers.canonical_nan(reference_numbers.difference(y, x, dtype))
    assert_bitwise_equal(computed(x, "difference", y, out=torch.float32, compute=CODES[dtype]), expected)
    alone = reference_numbers.canonical_nan(reference_numbers.difference(None, x, dtype))
    assert_bitwise_equal(computed(x, "alone", y, out=torch.float32, compute=CODES[dtype]), alone)


def test_signs() -> None:
    x = bits_of(torch.float32)
    assert_bitwise_equal(computed(x, "sign", out=torch.float32), reference_numbers.sign(x))


@each_dtype
def test_magnitude_keys(dtype: torch.dtype) -> None:
    x = bits_of(dtype)
    x = x[: x.numel() // 1024 * 1024].to(DEVICE)
    x[:4] = torch.tensor([math.nan, math.inf, -math.inf, -0.0])
    out = torch.empty(x.numel(), dtype=torch.int64, device=DEVICE)
    launch(magnitude_keys, (x.numel() // 1024,), DEVICE, x, out, BLOCK=1024)
    assert_bitwise_equal(out.cpu(), reference_numbers.keys(x.cpu().float()))


def test_nan_has_one_key_whatever_its_payload() -> None:
    patterns = [0x7F800001, 0x7FC00000, 0x7FFFFFFF, -1, -0x7FFFFF, 0x7F800000, -0x800000, 0]
    x = torch.tensor(patterns, dtype=torch.int32).view(torch.float32).to(DEVICE)
    out = torch.empty(8, dtype=torch.int64, device=DEVICE)
    launch(magnitude_keys, (1,), DEVICE, x, out, BLOCK=8)
    assert out.tolist() == [0x7FC00000] * 5 + [0x7F800000] * 2 + [0]


@pytest.mark.parametrize("name", ["exp", "tanh", "log"])
def test_functions_have_the_references_bits(name: str) -> None:
    generator = torch.Generator().manual_seed(5)
    scales = torch.tensor([1e-30, 1e-5, 0.01, 0.3, 1.0, 10.0, 60.0, 100.0])
    places = [-104.0, -103.97208, -87.33655, 88.72284, 89.0, 10.0, 9.010914, 0.0, 0.70710677, 1.0, 1.4142135]
    near = torch.tensor(places).view(torch.int32)[:, None] + torch.arange(-50, 51)
    near = near.to(torch.int32).reshape(-1).view(torch.float32)
    drawn = (torch.randn(2000, 8, generator=generator) * scales).reshape(-1)
    x = torch.cat([bits_of(torch.float32), drawn, near])
    expected = reference_numbers.canonical_nan(getattr(reference_functions, name)(x))
    assert_bitwise_equal(computed(x, name, out=torch.float32), expected)


@each_dtype
@pytest.mark.parametrize("numel", [1, 255, 256, 257, 700])
def test_nothing_is_written_or_read_past_the_end(dtype: torch.dtype, numel: int) -> None:
    x = torch.arange(numel + 300).to(dtype).to(DEVICE)
    guarded = poison_(torch.empty(numel + 300, dtype=dtype, device=DEVICE))
    expected = guarded.clone()
    expected[:numel] = x[:numel]
    launch(whole_tiles, (-(-numel // 256),), DEVICE, x, guarded, numel, BLOCK=256)
    assert_bitwise_equal(guarded.cpu(), expected.cpu())


@pytest.mark.parametrize("first", [0, 3, 8, 2**34 - 8, 2**34 - 5, 2**40 + 1])
@pytest.mark.parametrize("fours", [True, False])
def test_random_words(first: int, fours: bool) -> None:
    first -= first % 4 if fours else 0
    seed, tensor_id, stream = 0x9234567890ABCDEF, 0xFEDCBA9876543210, reference_random.stream_id(1, 3)
    key = seed & 0xFFFFFFFF | (seed >> 32 ^ tensor_id >> 32) << 32
    key -= 1 << 64 if key >> 63 else 0
    out = torch.empty(64, dtype=torch.int64, device=DEVICE)
    launch(
        random_words, (1,), DEVICE, out, first, key, tensor_id & 0xFFFFFFFF, stream, BLOCK=64, FOURS=fours, num_warps=1
    )
    expected = reference_random.words(first, 64, seed=seed, tensor_id=tensor_id, stream=stream)
    assert_bitwise_equal(out.cpu(), expected)


@pytest.mark.parametrize("count", [0, 1, 16, 17, 64, 65])
def test_tables_hold_their_numbers(count: int) -> None:
    values = [(-1) ** i * ((1 << 40) + i) for i in range(count)]
    assert table(values, DEVICE)[:count].tolist() == values


@pytest.mark.parametrize("aligned", [True, False])
def test_addresses_and_floats_come_out_of_tables(aligned: bool) -> None:
    x = torch.arange(65).to(torch.bfloat16).to(DEVICE)[0 if aligned else 1 :][:64]
    out = torch.empty(64, device=DEVICE)
    numbers_of = table([x.data_ptr(), float_bits(-0.7)], DEVICE)
    launch(through_table, (1,), DEVICE, numbers_of, out, ALIGNED=aligned, BLOCK=64)
    assert_bitwise_equal(out, x.float() * torch.tensor(-0.7).to(DEVICE))
