"""Trials in CUDA C++ where its kernels part ways: ends, blocks, tables, odd addresses, each number of parents."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastmerge import ops
from tests.cuda.edges import Edge
from tests.cuda.running import both_orders, needs_cuda, there, unaligned
from tests.numeric import assert_bitwise_equal

pytestmark = [needs_cuda, pytest.mark.usefixtures("poisoned_memory")]

TYPES = (torch.bfloat16, torch.float32, torch.float16)
SPECIAL = [float("nan"), float("inf"), -float("inf"), 2.0**-149, 1e-30, 3.4e38, 0.0, -0.0]
KEY = {"seed": 2**63 + 9, "generation": 65535, "member": 4095}


def drawn(roles: int, numel: int, first: int = 0) -> list[Tensor]:
    """So many tensors of all dtypes by turns, with some special values."""
    generator = torch.Generator().manual_seed(numel)
    made = torch.randn(roles, max(numel, 8), generator=generator)
    made[:, :8] = torch.tensor(SPECIAL)
    return [x[:numel].to(TYPES[(first + i) % 3]) for i, x in enumerate(made)]


def check(tensors: list[Tensor], **options: object) -> None:
    """A trial of all of these beside the reference; two of them are a blend."""
    own = [there(x) for x in tensors]

    def tried(xs: list[Tensor], backend: str) -> Tensor:
        if len(xs) == 2:
            return ops.blend_trial(*xs, 0.3, 0.4, **KEY, **options, backend=backend)
        more = [(0.3, *xs[at : at + 2]) for at in range(4, len(xs), 2)]
        return ops.de_trial(*xs[:4], 0.7, 0.4, more=more, **KEY, **options, backend=backend)

    assert_bitwise_equal(tried(own, "cuda").cpu(), tried(tensors, "reference"))


@both_orders
@pytest.mark.parametrize("numel", [1, 7, 2048, 2049, 6001])
@pytest.mark.parametrize("roles", [2, 4, 6, 8])
def test_ends_and_several_blocks(roles: int, numel: int, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTMERGE_EMULATED_ORDER", order)
    check(drawn(roles, numel, first=numel), tensor_id=2**64 - 5, offset=2**34 - 1000 + numel % 4, forced=2**34 - 990)


def test_the_member_may_come_again() -> None:
    x, best, c, d = drawn(4, 100)
    check([x, x, best, x, c, d])
    check([x, x])


@pytest.mark.parametrize("shift", [1, 2, 6])
def test_odd_addresses(shift: int) -> None:
    """In place, too."""
    tensors = drawn(4, 2500)
    check([unaligned(x, shift) for x in tensors])
    expected = ops.de_trial(*tensors, 0.7, 0.4, **KEY, backend="reference")
    own = [there(unaligned(x, shift)) for x in tensors]
    assert_bitwise_equal(ops.de_trial(*own, 0.7, 0.4, **KEY, out=own[0], backend="cuda").cpu(), expected)


@both_orders
def test_one_launch_for_tensors_of_the_same_dtypes(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastmerge.backends.cuda.launch import compiled

    monkeypatch.setenv("FASTMERGE_EMULATED_ORDER", order)
    sizes = (2100, 0, 1, 2048, 5000)
    lists = [list(each) for each in zip(*(drawn(6, numel) for numel in sizes))]
    own = [[there(x) for x in each] for each in lists]
    ids, forced = [2**64 - 1, 3, 2**33, 5, 6], [None, None, None, None, 4999]

    def tried(xs: list[list[Tensor]], backend: str) -> list[Tensor]:
        return ops.de_trial(
            *xs[:4], 0.7, 0.4, more=[(0.3, *xs[4:])], tensor_id=ids, forced=forced, **KEY, backend=backend
        )

    before = compiled.launches()
    found = tried(own, "cuda")
    # What describes the tensors is written by launches, as many numbers by each.
    numbers = len(sizes) * (5 + 6 + 1) - (5 + 6 + 1)
    assert compiled.launches() - before == 1 + -(-numbers // compiled.MOST_NUMBERS)
    for one, other in zip(found, tried(lists, "reference")):
        assert_bitwise_equal(one.cpu(), other)


@pytest.mark.parametrize(("numel", "gap"), [(1, 0), (7, 1), (2043, 5), (2056, 0)])
def test_no_byte_past_an_end_is_touched(numel: int, gap: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastmerge.backends.cuda.launch import EMULATED

    if not EMULATED:
        pytest.skip("compute-sanitizer looks for it on a GPU")
    edge = Edge(monkeypatch)
    tensors = drawn(4, numel)
    expected = ops.de_trial(*tensors, 0.7, 0.4, backend="reference")
    placed = [edge.place(x, gap * x.element_size()) for x in tensors]
    assert_bitwise_equal(ops.de_trial(*placed, 0.7, 0.4, out=placed[0], backend="cuda"), expected)
