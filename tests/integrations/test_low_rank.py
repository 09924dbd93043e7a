"""The largest singular triplets beside the full decomposition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmerge.integrations import low_rank


def matrix_of(values: torch.Tensor, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """A matrix with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    u, _ = torch.linalg.qr(torch.randn(rows, len(values), generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(columns, len(values), generator=generator, dtype=torch.float64))
    return (u * values.double() @ v.T).float()


SPECTRA = {
    "falling": 0.97 ** torch.arange(300.0),
    "flat but for some": torch.cat([torch.linspace(9, 5, 20), torch.linspace(2, 0.1, 280)]),
    "all the same": torch.ones(300),
    "equal at the cut": torch.cat([torch.full((24,), 3.0), torch.linspace(1, 0, 276)]),
    "of rank 5": torch.cat([torch.linspace(2, 1, 5), torch.zeros(295)]),
    "zero": torch.zeros(300),
    "tiny": 1e-30 * 0.9 ** torch.arange(300.0),
    "huge": 1e30 * 0.9 ** torch.arange(300.0),
}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_largest_triplets_are_those_of_the_full_decomposition(spectrum, turned):
    rank, values = 16, SPECTRA[spectrum]
    matrix = matrix_of(values, 420, 300)
    if turned:
        matrix = matrix.T
    u, s, vh = low_rank.of_matrix(matrix, rank)
    assert u.shape == (matrix.shape[0], rank) and s.shape == (rank,) and vh.shape == (rank, matrix.shape[1])
    largest = float(values[0])
    torch.testing.assert_close(s, values[:rank], rtol=0, atol=1e-5 * largest)
    assert bool((s[1:] <= s[:-1]).all())
    for vectors in (u.T, vh):
        torch.testing.assert_close(vectors @ vectors.T, torch.eye(rank), rtol=0, atol=2e-5)
    torch.testing.assert_close(matrix @ vh.T, u * s, rtol=0, atol=1e-5 * largest)
    torch.testing.assert_close(matrix.T @ u, vh.T * s, rtol=0, atol=1e-5 * largest)


def test_lanczos_finds_them_where_the_spectrum_falls_and_gives_up_where_it_is_level(monkeypatch):
    found = []
    lanczos = low_rank._lanczos
    monkeypatch.setattr(low_rank, "_lanczos", lambda *a: found.append(lanczos(*a)) or found[-1])
    low_rank.of_matrix(matrix_of(0.9 ** torch.arange(400.0), 400, 500), 16)
    assert found[-1] is not None
    low_rank.of_matrix(matrix_of(torch.linspace(1, 0.9, 400), 400, 500), 16)
    assert found[-1] is None
    low_rank.of_matrix(torch.randn(200, 300), 16)
    assert len(found) == 2  # small ones are decomposed in full


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 40), k=st.integers(1, 40), ranks=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    asked=st.integers(1, 40), seed=st.integers(0, 999),
)  # fmt: skip
def test_triplets_of_products_are_those_of_their_sum(m, k, ranks, asked, seed):
    generator = torch.Generator().manual_seed(seed)
    left = [torch.randn(m, r, generator=generator) for r in ranks]
    right = [torch.randn(r, k, generator=generator) for r in ranks]
    asked = min(asked, m, k)
    u, s, vh = low_rank.of_products(left, right, asked)
    exact = sum(b.double() @ a.double() for b, a in zip(left, right))
    es = torch.linalg.svdvals(exact)
    largest = float(es[0])
    torch.testing.assert_close(s.double(), es[:asked], rtol=0, atol=1e-5 * largest)
    for vectors in (u.T, vh):
        torch.testing.assert_close(vectors @ vectors.T, torch.eye(asked), rtol=0, atol=2e-5)
    torch.testing.assert_close(exact @ vh.T.double(), (u * s).double(), rtol=0, atol=1e-5 * largest)
