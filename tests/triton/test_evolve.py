"""Trials in Triton where they differ from other backends: tiles, tables, odd addresses, launches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastmerge import backends, ops
from tests.numeric import assert_bitwise_equal

if backends.available()["triton"] is not None:
    pytest.skip(
        f"no triton backend here; tests/ops holds the others to the same: {backends.reason('triton')}",
        allow_module_level=True,
    )

from fastmerge.backends.triton import launch

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DEVICE = torch.device("cpu" if launch.INTERPRETED else "cuda")
TYPES = (torch.bfloat16, torch.float32, torch.float16)
KEY = {"seed": 2**63 + 9, "generation": 65535, "member": 4095}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that a tensor has several."""
    monkeypatch.setenv(launch.BLOCK_VARIABLE, "128")


def drawn(roles: int, sizes: tuple[int, ...], types: tuple[torch.dtype, ...] = TYPES) -> list[list[Tensor]]:
    """So many lists of tensors of these sizes; every role has its dtype."""
    generator = torch.Generator().manual_seed(roles)
    return [[torch.randn(n, generator=generator).to(types[r % len(types)]) for n in sizes] for r in range(roles)]


def there(lists: list[list[Tensor]]) -> list[list[Tensor]]:
    return [[x.to(DEVICE) for x in each] for each in lists]


@pytest.mark.parametrize("differences", [1, 2, 3])
def test_one_launch_for_tensors_of_the_same_dtypes(differences: int) -> None:
    """Programs of several tensors, ends within tiles, tensors without elements; the element of one is forced."""
    lists = drawn(2 + 2 * differences, (300, 0, 1, 128, 257))
    own = there(lists)
    ids, forced = [2**64 - 1, 3, 2**33, 5, 6], [None, None, None, None, 256]
    launch.launched.clear()
    more = [[(0.25, *each[at : at + 2]) for at in range(4, len(each), 2)] for each in (lists, own)]
    found = ops.de_trial(*own[:4], 0.5, 0.3, more=more[1], tensor_id=ids, forced=forced, **KEY, backend="triton")
    assert launch.launched["trial_tensors"] == 1 and launch.launched["trial"] == 0
    expected = ops.de_trial(
        *lists[:4], 0.5, 0.3, more=more[0], tensor_id=ids, forced=forced, **KEY, backend="reference"
    )
    for one, other in zip(found, expected):
        assert_bitwise_equal(one.cpu(), other)


def test_other_dtypes_have_launches_of_their_own() -> None:
    x, ref = drawn(2, (40, 50, 60), TYPES[:1])
    x[1] = x[1].float()
    own = there([x, ref])
    launch.launched.clear()
    found = ops.blend_trial(*own, 0.5, 0.5, backend="triton")
    assert launch.launched["trial_tensors"] == launch.launched["trial"] == 1
    for one, other in zip(found, ops.blend_trial(x, ref, 0.5, 0.5, backend="reference")):
        assert_bitwise_equal(one.cpu(), other)


@pytest.mark.skipif(not launch.INTERPRETED, reason="a GPU's memory begins at multiples of elements")
@pytest.mark.parametrize("count", [1, 2])
def test_odd_addresses_in_place(count: int) -> None:
    def odd(x: Tensor) -> Tensor:
        memory = bytearray(1) + bytearray(x.view(torch.uint8).numpy().tobytes())
        return torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=1)

    x, ref = drawn(2, (300,) * count, TYPES[:1])
    expected = ops.blend_trial(x, ref, 0.5, 0.5, **KEY, backend="reference")
    own = [odd(each) for each in x]
    assert ops.blend_trial(own, [odd(each) for each in ref], 0.5, 0.5, **KEY, out=own, backend="triton") is own
    for one, other in zip(own, expected):
        assert_bitwise_equal(one, other)
