"""The importance family in CUDA C++ where its kernels part ways: ends, several blocks, many models, long rows."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from fastmerge import ops
from fastmerge.backends.limits import TooManyModelsError
from tests.cuda.running import both_orders, needs_cuda, there, unaligned
from tests.importance_kernels import drawn
from tests.numeric import assert_bitwise_equal

pytestmark = [needs_cuda, pytest.mark.usefixtures("poisoned_memory")]


def check(base: Tensor, tensors: list[Tensor], length: int) -> None:
    """All of the family beside the reference."""
    numel = base.numel()
    generator = torch.Generator().manual_seed(numel)
    mask = torch.randint(0, 256, (-(-numel // 8),), dtype=torch.uint8, generator=generator)
    factors = [(-0.0, 1.5, -2.0)[i % 3] for i in range(len(tensors))]
    rows = torch.arange(numel // length) / 7.0
    own, models = there(base), [there(x) for x in tensors]
    for found, expected in (
        (
            ops.nearswap(own, models[0], 1e-3, backend="cuda"),
            ops.nearswap(base, tensors[0], 1e-3, backend="reference"),
        ),
        (
            ops.ram_apply(own, models, factors, epsilon=1e-3, out_dtype=torch.bfloat16, backend="cuda"),
            ops.ram_apply(base, tensors, factors, epsilon=1e-3, out_dtype=torch.bfloat16, backend="reference"),
        ),
        (
            ops.ram_counts(own, models, epsilon=1e-3, backend="cuda"),
            ops.ram_counts(base, tensors, epsilon=1e-3, backend="reference"),
        ),
        (
            ops.model_variance(own, models, backend="cuda"),
            ops.model_variance(base, tensors, backend="reference"),
        ),
        (
            ops.energy_sums(own, models, backend="cuda"),
            ops.energy_sums(base, tensors, backend="reference"),
        ),
        (
            ops.energy_sums(own, models, mask=there(mask), backend="cuda"),
            ops.energy_sums(base, tensors, mask=mask, backend="reference"),
        ),
        (
            ops.importance(own, models[0], there(rows), length, backend="cuda"),
            ops.importance(base, tensors[0], rows, length, backend="reference"),
        ),
    ):
        assert_bitwise_equal(found.cpu(), expected)


@both_orders
@pytest.mark.parametrize(("numel", "length"), [(1, 1), (7, 7), (2048, 1), (2049, 3), (6000, 1500)])
def test_ends_and_several_blocks(numel: int, length: int, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTMERGE_EMULATED_ORDER", order)
    base, *tensors = drawn(3, max(numel, 8))
    check(base[:numel], [x[:numel] for x in tensors], length)


@pytest.mark.parametrize("shift", [1, 2, 6])
def test_odd_addresses(shift: int) -> None:
    base, *tensors = drawn(2, 2500)
    check(unaligned(base, shift), [unaligned(x, shift) for x in tensors], 10)


def test_many_models() -> None:
    """As many as a launch takes, all of which take part somewhere; one more is refused."""
    base, *tensors = drawn(128, 40)
    check(base, tensors, 8)
    with pytest.raises(TooManyModelsError, match="at most 128 models at once, not 129"):
        ops.ram_counts(there(base), [there(base)] * 129, backend="cuda")


@both_orders
@pytest.mark.parametrize("length", [1, 31, 32, 33, 63, 65, 257, 5000])
def test_rows_of_all_lengths(length: int, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums in shared memory, and in memory that is handed over to a few rows at a time."""
    monkeypatch.setenv("FASTMERGE_EMULATED_ORDER", order)
    # Of its name the backend has a function, too.
    monkeypatch.setattr(importlib.import_module("fastmerge.backends.cuda.importance"), "MEMORY", 2 * 4096)
    generator = torch.Generator().manual_seed(length)
    base = 3.0 * torch.randn(5 * length, generator=generator) - 300.0
    x = (base + 0.3 * torch.randn(5 * length, generator=generator)).bfloat16()
    # A NaN with a sign and a payload.
    x.view(torch.int16)[0] = -0x3B
    x[length] = -float("inf")
    # Far above all others of its row, and its last one.
    x[2 * length - 1] = -100.0
    expected = ops.divergences(base, x, length, backend="reference")
    for limit in ("232448", "2048"):
        monkeypatch.setenv("FASTMERGE_EMULATED_SHARED", limit)
        assert_bitwise_equal(ops.divergences(there(base), there(x), length, backend="cuda").cpu(), expected)


def test_each_long_row_has_memory_of_its_own() -> None:
    """Rows are taken at the same time; the emulator takes one after the other, which would hide it."""
    from fastmerge.backends.cuda.launch import compiled, place, ref

    base, x = torch.randn(3 * 300), torch.randn(3 * 300)
    own, model, memory = there(base), there(x), there(torch.full((3, 256), float("nan")))
    out = torch.empty(3, device=own.device)
    where = place(own.device)
    compiled.divergences(where, ref(own), ref(model), 300, 0, 3, memory.data_ptr(), out.data_ptr())
    assert_bitwise_equal(out.cpu(), ops.divergences(base, x, 300, backend="reference"))
    assert not memory.isnan().any()
