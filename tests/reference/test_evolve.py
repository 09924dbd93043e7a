"""Trials by their formulas, element by element, and what their random words are like."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from fastmerge import ops
from fastmerge.reference import random

f32 = numpy.float32
COUNT = 4096
KEYS = ("seed", "generation", "member", "tensor_id")


def drawn(count: int, numel: int = 40) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    return list(torch.randn(count, numel, generator=generator))


def words(purpose: int, numel: int, seed: int, generation: int, member: int, tensor_id: int, offset: int) -> list[int]:
    """Those of one element after the other."""
    stream = purpose << 28 | generation << 12 | member
    index = torch.arange(offset, offset + numel)
    found: list[int] = random.words_at(index, seed=seed, tensor_id=tensor_id, stream=stream).tolist()
    return found


def expected(x: Tensor, new: Any, word: list[int], rate: float, offset: int, forced: int | None) -> Tensor:
    """The trial, element by element; new(e): what crossing over puts in the place of element e, float32."""
    chosen = [
        float(new(e)) if word[e] < math.floor(rate * 2**32) or e + offset == forced else float(x[e])
        for e in range(x.numel())
    ]
    return torch.tensor(chosen)


@pytest.mark.parametrize(("factor", "rate"), [(0.5, 0.5), (0.3, 0.9), (-1.7, 0.0), (1.0, 1.0)])
def test_blends(factor: float, rate: float) -> None:
    x, ref = drawn(2)
    key = {"seed": 2**63 + 5, "generation": 65535, "member": 4095, "tensor_id": 2**40 + 3, "offset": 11}
    out = ops.blend_trial(x, ref, factor, rate, **key, forced=13, backend="reference")
    own, other = f32(1.0 - factor), f32(factor)

    def blend(e: int) -> Any:
        return f32(own * f32(x[e].item())) + f32(other * f32(ref[e].item()))

    assert torch.equal(out, expected(x, blend, words(3, 40, **key), rate, 11, 13))


def test_one_minus_f_is_rounded_once() -> None:
    """Of 1 - 0.9 in float32 the last bit is another."""
    x = torch.ones(1)
    assert ops.blend_trial(x, x * 0, 0.9, 1.0, backend="reference").item() == f32(1 - 0.9) != f32(1) - f32(0.9)


@pytest.mark.parametrize("differences", [1, 2, 3])
def test_differences(differences: int) -> None:
    x, a, b, c, *others = drawn(4 + 2 * (differences - 1))
    more = [(0.3 * (i + 1), others[2 * i], others[2 * i + 1]) for i in range(differences - 1)]
    key = {"seed": 7, "generation": 3, "member": 2, "tensor_id": 9, "offset": 2}
    out = ops.de_trial(x, a, b, c, 0.7, 0.6, more=more, **key, backend="reference")

    def moved(e: int) -> Any:
        total = f32(a[e].item())
        for factor, plus, minus in [(0.7, b, c), *more]:
            total = total + f32(f32(factor) * (f32(plus[e].item()) - f32(minus[e].item())))
        return total

    assert torch.equal(out, expected(x, moved, words(4, 40, **key), 0.6, 2, None))


def test_current_to_best_takes_the_member_again() -> None:
    x, best, c, d = drawn(4)
    out = ops.de_trial(x, x, best, x, 0.4, 1.0, more=[(0.2, c, d)], backend="reference")
    step = torch.tensor(0.4) * (best - x)
    assert torch.equal(out, (x + step) + torch.tensor(0.2) * (c - d))


def masks(**changes: int) -> Tensor:
    """Where elements of a tensor cross over, bool[COUNT]."""
    key = {"seed": 1, "generation": 2, "member": 3, "tensor_id": 4, **changes}
    return ops.blend_trial(torch.zeros(COUNT), torch.ones(COUNT), 1.0, 0.5, **key, backend="reference") == 1


@pytest.mark.parametrize("rate", [0.02, 0.2, 0.5, 0.93])
def test_the_rate_is_what_was_asked_for(rate: float) -> None:
    """Within four and a half standard deviations of the binomial distribution; seeds are fixed."""
    numel = 1 << 16
    trial = ops.de_trial(*drawn(1, 1)[0].new_zeros(4, numel).add_(torch.tensor([[0.0], [1.0], [0.0], [0.0]])),
                         0.5, rate, seed=5, backend="reference")  # fmt: skip
    crossed = int((trial == 1).sum())
    assert abs(crossed - rate * numel) < 4.5 * math.sqrt(numel * rate * (1 - rate))


def pairs() -> Iterator[tuple[str, Tensor, Tensor]]:
    """Masks that should know nothing of each other: neighbours, other keys, other purposes."""
    mask = masks()
    for lag in (1, 2, 3, 4, 8, 128):
        yield f"lag {lag}", mask[:-lag], mask[lag:]
    for name in KEYS:
        for value in (0, 5, 2**11):
            yield f"{name} {value}", mask, masks(**{name: value})
    yield "high word of the seed", mask, masks(seed=1 + 2**32)
    yield "high word of the tensor", mask, masks(tensor_id=4 + 2**32)
    other = ops.de_trial(*torch.zeros(1, COUNT), torch.ones(COUNT), torch.zeros(COUNT), torch.zeros(COUNT), 1.0, 0.5,
                         seed=1, generation=2, member=3, tensor_id=4, backend="reference")  # fmt: skip
    yield "purpose", mask, other == 1


def test_masks_know_nothing_of_each_other() -> None:
    """Chi-square of the four ways in which two masks meet, with one degree of freedom; above 15 in 1 of 9000 tables."""
    for name, one, other in pairs():
        both, count = torch.stack([one.double(), other.double()]), len(one)
        share, rest = both.mean(dim=1), 1 - both.mean(dim=1)
        square = 0.0
        for i, j in itertools.product((0, 1), repeat=2):
            found = float(((one == bool(i)) & (other == bool(j))).sum())
            wanted = float(count * (share[0] if i else rest[0]) * (share[1] if j else rest[1]))
            square += (found - wanted) ** 2 / wanted
        assert square < 15, (name, square)


def test_elements_of_a_block_cross_over_alike_often() -> None:
    """The sixteen ways in which four neighbours cross over, chi-square with fifteen degrees of freedom."""
    ways = (masks().view(-1, 4).long() << torch.arange(4)).sum(dim=1).bincount(minlength=16)
    wanted = COUNT / 4 / 16
    assert float(((ways - wanted) ** 2 / wanted).sum()) < 45
