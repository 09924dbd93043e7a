"""Bits per byte, on distributions whose entropy is known."""

import math

import pytest
import torch

from demo.score import bits_per_byte


def uniform(codes: torch.Tensor) -> torch.Tensor:
    return torch.zeros(*codes.shape, 256)


def knows_the_next(codes: torch.Tensor) -> torch.Tensor:
    """Expects each byte to be followed by its successor."""
    return 100.0 * torch.nn.functional.one_hot((codes + 1) % 256, 256).float()


def test_a_uniform_guess_needs_eight_bits():
    assert bits_per_byte(uniform, bytes(range(256)) * 3) == pytest.approx(8.0)


def test_certainty_needs_none_across_window_borders():
    assert bits_per_byte(knows_the_next, bytes(range(256)) * 4, context=10, batch=3) == pytest.approx(0.0, abs=1e-6)


def test_a_known_distribution_needs_its_entropy():
    probabilities = {ord("a"): 0.5, ord("b"): 0.25, ord("c"): 0.25}
    logits = torch.full((256,), -math.inf)
    for code, probability in probabilities.items():
        logits[code] = math.log(probability)
    # The first byte is not predicted; those after it are distributed as the model says.
    text = b"b" + b"aabc" * 100
    assert bits_per_byte(lambda codes: logits.expand(*codes.shape, 256), text) == pytest.approx(1.5)


@pytest.mark.parametrize("length", [2, 3, 10, 11, 12, 21, 22, 95, 100, 101])
def test_every_byte_but_the_first_is_predicted_once(length):
    seen = []

    def watch(codes: torch.Tensor) -> torch.Tensor:
        seen.append(codes.numel())
        return uniform(codes)

    assert bits_per_byte(watch, bytes(length), context=10, batch=2) == pytest.approx(8.0)
    assert sum(seen) == length - 1


def test_the_score_does_not_depend_on_the_batch():
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(256, 256, generator=generator)
    text = bytes(torch.randint(256, (1000,), generator=generator).tolist())
    scores = {bits_per_byte(lambda codes: table[codes], text, context=16, batch=batch) for batch in (1, 4, 100)}
    assert max(scores) - min(scores) < 1e-5


def test_one_byte_has_no_score():
    with pytest.raises(ValueError, match="two bytes"):
        bits_per_byte(uniform, b"a")
