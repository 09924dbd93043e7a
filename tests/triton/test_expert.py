"""Light experts in Triton where they differ from other backends: one launch, tables, several programs, bad columns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastmerge import backends, ops
from tests.numeric import assert_bitwise_equal, bits
from tests.strategies import DTYPES

if backends.available()["triton"] is not None:
    pytest.skip(
        f"no triton backend here; tests/ops holds the others to the same: {backends.reason('triton')}",
        allow_module_level=True,
    )

from fastmerge.backends.triton import launch

pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="tests/gpu has the tests that run on a GPU")

SHAPES = [(13, 33), (2, 70_001), (7, 4, 21), (300,), (9, 64), (5, 3)]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs so small that a part has several."""
    monkeypatch.setenv(launch.BLOCK_VARIABLE, "128")


def unaligned(x: Tensor) -> Tensor:
    """The same numbers, not at a multiple of 16 bytes."""
    flat = x.reshape(-1)
    return torch.cat([flat[:1], flat])[1:].view(x.shape)


def family(most: int, replaced: bool, odd: bool = False) -> tuple[list[Tensor], list[ops.ExpertPart]]:
    """Tensors of all dtypes, and up to so many experts of each that meet at most of their places."""
    generator = torch.Generator().manual_seed(most)
    tensors, parts = [], []
    for of, shape in enumerate(SHAPES):
        theta = torch.randint(-9, 10, shape, generator=generator) / 8
        tensors.append(theta.to(DTYPES[of % 3]))
        # The base's values: here and there the model has changed nothing.
        base = torch.where(torch.rand(shape, generator=generator) < 0.3, theta, theta + 0.5)
        ranked = torch.randn(shape, generator=generator)
        for number in range((of + 1) % (most + 1)):
            delta = ranked + 0.3 * torch.randn(shape, generator=generator)
            delta[torch.rand(shape, generator=generator) < 0.4] = 0.0
            keep = 0.002 if shape[-1] > 65536 else (0.9, 0.2, 0.5)[number % 3]
            expert = ops.extract_expert(delta, keep, dtype=DTYPES[number % 3], backend="reference")
            at_base = expert.at(base).to(DTYPES[(number + 1) % 3]) if replaced else None
            columns, values = expert.columns, expert.values
            if odd:
                columns, values = unaligned(columns), unaligned(values)
            parts.append(ops.ExpertPart(of, columns, values, 0.75 - number / 3, at_base))
    return tensors, parts


def of_the_family() -> dict[str, int]:
    """The launches since they were last cleared, but for those that write short tables."""
    return {name: count for name, count in launch.launched.items() if name != "write_row"}


@pytest.mark.parametrize(("most", "replaced", "odd"), [(1, False, False), (3, False, True), (4, True, False)])
def test_one_launch_takes_all_tensors_and_one_those_of_several_parts(most: int, replaced: bool, odd: bool) -> None:
    tensors, parts = family(most, replaced, odd)
    before = [x.clone() for x in tensors]
    expected = [x.clone() for x in tensors]
    wanted = ops.expert_apply_(expected, parts, backend="reference")
    launch.launched.clear()
    saved = ops.expert_apply_(tensors, parts, backend="triton")
    launches = 1 if most == 1 else 2
    assert of_the_family() == {"apply": launches}
    assert_bitwise_equal(saved, wanted)
    for one, other in zip(tensors, expected):
        assert_bitwise_equal(one, other)
    launch.launched.clear()
    assert not any(ops.expert_revert_(tensors, parts, saved, backend="triton"))
    assert of_the_family() == {"count_changed": launches, "revert": launches}
    for one, other in zip(tensors, before):
        assert_bitwise_equal(one, other)


def test_places_that_were_changed_are_counted_once_each_and_nothing_is_written() -> None:
    tensors, parts = family(3, False)
    saved = ops.expert_apply_(tensors, parts, backend="triton")
    for x in tensors[1::2]:
        bits(x)[::3] ^= 1
    worn = [x.clone() for x in tensors]
    wanted = ops.expert_revert_([x.clone() for x in tensors], parts, saved, backend="reference")
    assert ops.expert_revert_(tensors, parts, saved, backend="triton") == wanted
    assert wanted[0] == 0 and max(wanted) > 60
    for one, other in zip(tensors, worn):
        assert_bitwise_equal(one, other)


def test_the_last_part_that_holds_a_place_says_what_was_there() -> None:
    """Old bits that do not agree, which `expert_apply_` never returns, are the definition's to choose among."""
    tensors, parts = family(4, False)
    saved = ops.expert_apply_(tensors, parts, backend="triton")
    torch.manual_seed(0)
    other = torch.where(torch.rand(saved.shape) < 0.5, saved, saved ^ 1)
    for given in (saved, other):
        expected = [x.clone() for x in tensors]
        wanted = ops.expert_revert_(expected, parts, given, backend="reference")
        actual = [x.clone() for x in tensors]
        assert ops.expert_revert_(actual, parts, given, backend="triton") == wanted
        for one, another in zip(actual, expected):
            assert_bitwise_equal(one, another)


@pytest.mark.parametrize("width", [50, 70_000])
def test_a_column_beyond_its_row_names_no_place(width: int) -> None:
    """The tensor lies in the middle of memory that has to stay as it is."""
    memory = torch.zeros(5, width)
    x = memory[2:3]
    expert = ops.extract_expert(torch.arange(1.0, width + 1).view(1, width), 3.5 / width)
    columns = expert.columns.to(torch.int64)
    columns[0] = torch.tensor([-3 if width > 65536 else width + 7, width - 1, width])
    part = ops.ExpertPart(0, columns.to(expert.columns.dtype), expert.values, 1.0)
    saved = ops.expert_apply_([x], [part], backend="triton")
    assert int((memory != 0).sum()) == 1 and x[0, -1] == expert.values[0, 1]
    assert not saved.any()
    assert ops.expert_revert_([x], [part], saved, backend="triton") == [0]
    assert not memory.any()


def test_old_bits_at_an_odd_address() -> None:
    tensors, parts = family(2, False)
    before = [x.clone() for x in tensors]
    saved = ops.expert_apply_(tensors, parts, backend="triton")
    moved = torch.cat([saved[:3], saved])[3:]
    assert moved.data_ptr() % 8
    assert not any(ops.expert_revert_(tensors, parts, moved, backend="triton"))
    for one, other in zip(tensors, before):
        assert_bitwise_equal(one, other)
