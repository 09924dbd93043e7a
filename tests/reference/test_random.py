"""The reference's random words against a scalar Philox in Python's integers, and what they depend on."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastmerge.reference import random
from tests import strategies


def scalar_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 as its paper states it."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 1 << 32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % (1 << 32), (k1 + 0xBB67AE85) % (1 << 32)
    return [c0, c1, c2, c3]


def scalar_word(index: int, seed: int, tensor_id: int, stream: int) -> int:
    block = index // 4
    counter = [block % 2**32, block // 2**32, tensor_id % 2**32, stream]
    return scalar_philox(counter, [seed % 2**32, (seed // 2**32) ^ (tensor_id // 2**32)])[index % 4]


VECTORS = [
    ([0, 0, 0, 0], [0, 0], "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), VECTORS)
def test_published_vectors(counter: list[int], key: list[int], words: str) -> None:
    expected = [int(word, 16) for word in words.split()]
    assert scalar_philox(counter, key) == expected
    vectorised = random.philox4x32([torch.tensor([c]) for c in counter], (key[0], key[1]))
    assert [int(word) for word in vectorised] == expected


@given(
    offset=strategies.offsets,
    count=st.integers(0, 13),
    seed=strategies.words64,
    tensor_id=strategies.words64,
    stream=st.integers(0, 2**32 - 1),
)
def test_words_equal_scalar_philox(offset: int, count: int, seed: int, tensor_id: int, stream: int) -> None:
    expected = [scalar_word(offset + i, seed, tensor_id, stream) for i in range(count)]
    arguments = {"seed": seed, "tensor_id": tensor_id, "stream": stream}
    assert random.words(offset, count, **arguments).tolist() == expected
    index = torch.arange(offset, offset + count)
    assert random.words_at(index, **arguments).tolist() == expected


@given(offset=strategies.offsets, cuts=st.lists(st.integers(0, 50), max_size=4))
def test_words_do_not_depend_on_the_chunks(offset: int, cuts: list[int]) -> None:
    arguments = {"seed": 5, "tensor_id": 6, "stream": 7}
    edges = sorted([0, *cuts, 50])
    pieces = [random.words(offset + a, b - a, **arguments) for a, b in itertools.pairwise(edges)]
    assert torch.cat(pieces).tolist() == random.words(offset, 50, **arguments).tolist()


def test_no_two_purposes_generations_or_positions_share_a_stream() -> None:
    purposes = [random.BERNOULLI, random.DELLA, random.HASHED_TIES, random.BLEND_TRIAL, random.DE_TRIAL]
    generations = [0, 1, 2, 255, 4095, 4096, 65535]
    positions = [0, 1, 15, 16, 4094, 4095]
    combinations = list(itertools.product(purposes, positions, generations))
    streams = {random.stream_id(*combination) for combination in combinations}
    assert len(streams) == len(combinations)
    assert all(0 <= stream < 2**32 for stream in streams)


def test_stream_layout_is_purpose_generation_position() -> None:
    assert random.stream_id(2, position=0x345, generation=0xABCD) == 0x2ABCD345


@pytest.mark.parametrize("probability", [0.01, 0.3, 0.5, 0.9])
def test_words_are_below_the_threshold_as_often_as_they_should(probability: float) -> None:
    count = 200_000
    limit = int(random.threshold(torch.tensor(probability, dtype=torch.float64)))
    kept = int((random.words(3, count, seed=1, tensor_id=2, stream=3) < limit).sum())
    assert abs(kept - probability * count) < 4 * math.sqrt(count * probability * (1 - probability))


@pytest.mark.parametrize(
    "other", [{"seed": 2}, {"seed": 1 + 2**32}, {"tensor_id": 3}, {"tensor_id": 2 + 2**32}, {"stream": 4}]
)
def test_words_of_other_seeds_tensors_and_streams_are_independent(other: dict[str, int]) -> None:
    """Of two independent fair masks, both are on in a quarter of the places."""
    count = 100_000
    arguments = {"seed": 1, "tensor_id": 2, "stream": 3}
    mine = random.words(0, count, **arguments) < 2**31
    theirs = random.words(0, count, **{**arguments, **other}) < 2**31
    both = int((mine & theirs).sum())
    assert abs(both - count / 4) < 4 * math.sqrt(count * 3 / 16)


@pytest.mark.parametrize(
    ("probability", "limit"),
    [
        (0.0, 0),
        (-0.5, 0),
        (2.0**-33, 0),
        (2.0**-32, 1),
        (0.5, 2**31),
        (1 - 2.0**-33, 2**32 - 1),
        (1.0, 2**32),
        (3.0, 2**32),
    ],
)
def test_threshold_is_the_floor_and_keeps_all_from_one_on(probability: float, limit: int) -> None:
    assert int(random.threshold(torch.tensor(probability, dtype=torch.float64))) == limit
