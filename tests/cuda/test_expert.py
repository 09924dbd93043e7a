"""Light experts in CUDA C++ where their kernels part ways: blocks of entries, many parts, any address, bad columns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastmerge import backends, ops
from fastmerge.ops import Expert, ExpertPart
from tests.cuda.running import both_orders, unaligned
from tests.numeric import assert_bitwise_equal
from tests.strategies import DTYPES

if backends.reason("cuda") is not None:
    pytest.skip(
        f"no cuda backend here; tests/ops holds the others to the same: {backends.reason('cuda')}",
        allow_module_level=True,
    )

from fastmerge.backends.cuda import launch

pytestmark = [
    pytest.mark.skipif(not launch.EMULATED, reason="tests/gpu has the tests that run on a GPU"),
    pytest.mark.usefixtures("poisoned_memory"),
]

ENTRIES = launch.compiled.EXPERT_ENTRIES


def expert(generator: torch.Generator, rows: int, width: int, kept: int, dtype: torch.dtype, shift: int = 0) -> Expert:
    """Of few different values, zeros among them, at columns drawn row by row."""
    columns = torch.rand(rows, width, generator=generator).argsort(1)[:, :kept].sort(1).values
    values = (torch.randint(-3, 4, (rows, kept), generator=generator) / 4).to(dtype)
    given = columns.to(torch.uint16 if width <= 1 << 16 else torch.int32), values
    return Expert((rows, width), *(unaligned(x, shift) if shift else x for x in given))


def check(tensors: list[Tensor], parts: list[ExpertPart], shift: int = 0) -> None:
    """On and off again, as the definition has it; and off when a place has been changed, which changes nothing."""
    expected, before = [x.clone() for x in tensors], [x.clone() for x in tensors]
    wanted = ops.expert_apply_(expected, parts, backend="reference")
    saved = ops.expert_apply_(tensors, parts, backend="cuda")
    assert_bitwise_equal(saved, wanted)
    for x, y in zip(tensors, expected):
        assert_bitwise_equal(x, y)
    saved = unaligned(saved, shift) if shift else saved
    last = parts[-1]
    row = tensors[last.of][-1]
    place = int(last.columns[-1, -1].to(torch.int64))
    kept = row[place].clone()
    row[place] = 100.0
    changed = ops.expert_revert_(tensors, parts, saved, backend="cuda")
    assert changed == [int(number == last.of) for number in range(len(tensors))]
    row[place] = kept
    for x, y in zip(tensors, expected):
        assert_bitwise_equal(x, y)
    assert not any(ops.expert_revert_(tensors, parts, saved, backend="cuda"))
    for x, y in zip(tensors, before):
        assert_bitwise_equal(x, y)


@both_orders
@pytest.mark.parametrize("shift", [0, 1, 2, 3])
@pytest.mark.parametrize("replaced", [False, True])
def test_parts_of_several_blocks(order: str, shift: int, replaced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that end within a block and rows longer than one, one expert or three at a place, at any first byte."""
    monkeypatch.setenv("FASTMERGE_EMULATED_ORDER", order)
    generator = torch.Generator().manual_seed(shift)
    tensors, parts = [], []
    shapes = [(231, 90, 31, 1), (3, 2 * ENTRIES, ENTRIES + 77, 1), (110, 41, 20, 3), (2, 66000, 70, 2)]
    for number, (rows, width, kept, count) in enumerate(shapes):
        x = (torch.randint(-9, 10, (rows, width), generator=generator) / 8).to(DTYPES[(number + shift) % 3])
        base = (torch.randint(-9, 10, (rows, width), generator=generator) / 8).to(DTYPES[number % 3])
        tensors.append(unaligned(x, shift) if shift else x)
        for which in range(count):
            own = expert(generator, rows, width, kept, DTYPES[(number + which) % 3], shift)
            start = None if not replaced else unaligned(own.at(base), shift) if shift else own.at(base)
            parts.append(own.part(number, 0.3 + which, start))
    check(tensors, parts, shift)


@both_orders
@pytest.mark.parametrize("count", [33, 1100])
def test_many_tensors_with_and_without_parts(order: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is one launch, or two, whatever there is of them, beside those that write or copy the table."""
    monkeypatch.setenv("FASTMERGE_EMULATED_ORDER", order)
    generator = torch.Generator().manual_seed(count)
    tensors = [torch.randn(3, 7, generator=generator).to(DTYPES[i % 3]) for i in range(count)]
    parts = [expert(generator, 3, 7, i % 3, DTYPES[i % 2]).part(i, 0.5) for i in range(count) if i % 5 != 1]
    parts += [expert(generator, 3, 7, 2, torch.float32).part(count - 1, 2.0)]
    before = launch.compiled.launches()
    saved = ops.expert_apply_(tensors, parts, backend="cuda")
    ops.expert_revert_(tensors, parts, saved, backend="cuda")
    written = sum(part.columns.numel() > 0 for part in parts) * 17
    tables = -(-written // launch.compiled.MOST_NUMBERS) if written <= 4 * launch.compiled.MOST_NUMBERS else 0
    assert launch.compiled.launches() - before == 3 + 2 * tables
    check(tensors, parts)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("count", [1, 2])
def test_a_column_beyond_its_row_is_nowhere(wide: bool, count: int) -> None:
    width = 70000 if wide else 6
    x = torch.arange(4.0 * width).view(4, width)
    before = x.clone()
    columns = torch.tensor([[0, 3], [1, width], [2, -1 if wide else 65535], [width - 1, width]])
    columns = columns.to(torch.int32 if wide else torch.uint16)
    parts = [ExpertPart(0, columns, torch.ones(4, 2), 1.0)] * count
    saved = ops.expert_apply_([x], parts, backend="cuda")
    added = torch.zeros(4, width)
    added[[0, 0, 1, 2, 3], [0, 3, 1, 2, width - 1]] = count
    assert_bitwise_equal(x, before + added)
    assert ops.expert_revert_([x], parts, saved, backend="cuda") == [0]
    assert_bitwise_equal(x, before)


def test_old_bits_that_do_not_agree() -> None:
    """`expert_apply_` never returns such; the definition takes those of the last part that has the place."""
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(20, 30, generator=generator)
    parts = [expert(generator, 20, 30, 12, torch.float32).part(0, 1.0 + i) for i in range(3)]
    worn = before.clone()
    saved = ops.expert_apply_([worn], parts, backend="reference")
    saved.view(torch.int32)[: 2 * 20 * 12 : 7] ^= 1
    results = []
    for backend in ("cuda", "reference"):
        for x in (worn.clone(), before.clone()):
            results.append((ops.expert_revert_([x], parts, saved, backend=backend), x))
    for (count, x), (wanted, y) in zip(results[:2], results[2:]):
        assert count == wanted and count[0] > 0
        assert_bitwise_equal(x, y)
    # Those of places that a later part has are never looked at.
    later = ops.expert_apply_([before.clone()], [parts[0], parts[0]], backend="reference")
    later[: later.numel() // 2] = 0
    x = before.clone()
    ops.expert_apply_([x], [parts[0], parts[0]], backend="cuda")
    assert ops.expert_revert_([x], [parts[0], parts[0]], later, backend="cuda") == [0]
    assert_bitwise_equal(x, before)


def test_the_last_part_that_replaces_says_where_the_sum_starts() -> None:
    """Bases of one place may differ where they were rounded to other dtypes."""
    columns = torch.tensor([[1]], dtype=torch.uint16)
    given = [(1.0, 10.0), (2.0, 20.0), (0.0, 30.0)]
    parts = [ExpertPart(0, columns, torch.tensor([[v]]), 1.0, torch.tensor([[b]])) for v, b in given]
    x = torch.tensor([[5.0, 6.0, 7.0]])
    ops.expert_apply_([x], parts, backend="cuda")
    assert x.tolist() == [[5.0, 23.0, 7.0]]
