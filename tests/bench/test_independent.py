"""The benchmarks' own oracle against published numbers and cases small enough to work out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch


def test_philox_gives_the_published_words():
    from independent import philox

    assert [hex(word) for word in philox(0, 0, 0, 4)] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]


def test_of_equal_magnitudes_the_first_are_kept():
    from independent import keys, magnitude_mask, outliers_mask

    key = keys(np.array([1.0, -2.0, 2.0, -1.0, 2.0, 0.5], dtype=np.float32))
    assert magnitude_mask(key, 0.34).tolist() == [False, True, True, False, False, False]
    assert magnitude_mask(key, 0.01).tolist() == [False, True, False, False, False, False]
    assert not magnitude_mask(key, 0.0).any()
    assert outliers_mask(key, 0.34, 0.5).tolist() == [True, False, False, True, False, False]


def test_ties_by_hand():
    from independent import expected_tensor

    base = torch.tensor([1.0, 1.0, 1.0, 1.0])
    models = [torch.tensor([3.0, 0.0, 1.0, 1.5]), torch.tensor([0.0, -3.0, 1.0, 1.25])]
    # Deltas (2, -1, 0, .5) and (-1, -4, 0, .25); density 0.5 keeps (2, -1) and (-1, -4); the signs elected are +, -.
    merged = expected_tensor("ties", "x", base, models, [1.0, 1.0], density=0.5)
    assert merged.tolist() == [3.0, -1.5, 1.0, 1.0]


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_random_methods_keep_the_norm_and_about_the_density(method):
    from independent import expected_tensor

    x = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    merged = expected_tensor(method, "x", torch.zeros_like(x), [x], [1.0], density=0.4)
    assert abs(float((merged != 0).float().mean()) - 0.4) < 0.01
    assert float(merged.abs().double().sum()) == pytest.approx(float(x.abs().double().sum()), rel=1e-6)
