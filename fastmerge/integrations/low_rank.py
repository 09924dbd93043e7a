"""The largest singular triplets of a matrix, without the others: what an SVD that keeps a few of thousands is for.

`of_products` takes a sum of thin products as its factors and never forms it. `of_matrix` takes a dense matrix: block
Golub-Kahan-Lanczos with full reorthogonalisation (Golub, Luk, Overton, "A block Lanczos method for computing the
singular values and corresponding singular vectors of a matrix", ACM TOMS 1981), from a fixed random start, until every
triplet that is asked for is good to `TOLERANCE`; where that takes too long, all of them are computed.

Products of matrices are torch's: bits depend on its library and on the number of threads. Signs of singular vectors
are as they fall; the product of the three is what is meant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

TOLERANCE = 2e-6
"""A triplet (u, s, v) of A is taken where |A^T u - s v| and |A v - s u| are below this times the largest singular
value: what a full SVD in float32 leaves."""

SMALL = 256
"""Matrices with a shorter side up to this are decomposed in full, which is quicker."""

_SEED = 20240229


def of_products(left: Sequence[Tensor], right: Sequence[Tensor], rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` largest singular triplets of sum_i left[i] @ right[i].

    left: n matrices [m, r_i]; right: n matrices [r_i, k]; floating, on one device, computed in float32. The sum has a
        rank of at most sum(r_i): beyond that, singular values are 0 and vectors complete an orthonormal set.
    rank: at most min(m, k).
    Returns U [m, rank], S [rank] falling, Vh [rank, k], float32.
    Source: QR of the stacked factors, and the SVD of the small product of their triangles.
    """
    b, b_scale = _near_one(torch.cat([x.float() for x in left], dim=1))
    a, a_scale = _near_one(torch.cat([x.float() for x in right], dim=0).T)
    missing = rank - b.shape[1]
    if missing > 0:  # the QR of a column of zeros is a unit vector that is orthogonal to the others
        b = torch.nn.functional.pad(b, (0, missing))
        a = torch.nn.functional.pad(a, (0, missing))
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return q_b @ u[:, :rank], s[:rank] * b_scale * a_scale, vh[:rank] @ q_a.T


def of_matrix(matrix: Tensor, rank: int, *, tolerance: float = TOLERANCE) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` largest singular triplets of a dense matrix.

    matrix: float32 [m, k], finite. rank: at most min(m, k).
    Returns U [m, rank], S [rank] falling, Vh [rank, k], float32.
    """
    matrix, scale = _near_one(matrix)
    short = min(matrix.shape)
    if short > SMALL and 8 * rank <= short:
        lies = matrix.shape[0] < matrix.shape[1]
        found = _lanczos(matrix.T if lies else matrix, rank, tolerance)
        if found is not None:
            u, s, vh = found
            return (vh.T, s * scale, u.T) if lies else (u, s * scale, vh)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank], s[:rank] * scale, vh[:rank]


def _near_one(matrix: Tensor) -> tuple[Tensor, float]:
    """A matrix whose squares neither vanish nor overflow in float32, and the power of 2 that makes it what it was."""
    if matrix.numel() == 0:
        return matrix, 1.0
    low, high = (float(x) for x in torch.aminmax(matrix))
    largest = max(-low, high)
    if largest == 0 or 1e-9 < largest < 1e9:
        return matrix, 1.0
    exponent = math.frexp(largest)[1]
    return torch.ldexp(matrix, torch.tensor(-exponent, device=matrix.device)), math.ldexp(1.0, exponent)


def _lanczos(matrix: Tensor, rank: int, tolerance: float) -> tuple[Tensor, Tensor, Tensor] | None:
    """`of_matrix` for a matrix [m, k] with m >= k; None where the bases grew to a quarter of k without an end.

    The bases V [k, j b] and U [m, j b] are orthonormal, A V = U T with T block bidiagonal, and
    A^T U = V T^T + V' C where V' is the next block of V, and C [b, j b] is 0 but for its last block. So for
    T = X S Y^T, the triplets (U x_i, s_i, V y_i) miss by |C x_i| in the one direction and by nothing in the other.
    """
    width = matrix.shape[1]
    block = max(8, rank)
    generator = torch.Generator().manual_seed(_SEED)
    start = torch.randn(width, block, generator=generator).to(matrix.device)
    v, _ = _orthonormal(start, None)
    u, diagonal = _orthonormal(matrix @ v, None)
    most = width // 4 // block
    core = torch.zeros(most * block, most * block, device=matrix.device)
    core[:block, :block] = diagonal
    for blocks in range(1, most):
        known = blocks * block
        last = slice(known - block, known)
        # [k, b]: what A^T makes of the last block of U, beyond V.
        beyond, coupling = _orthonormal(matrix.T @ u[:, last], v)
        x, s, y = torch.linalg.svd(core[:known, :known])
        missed = torch.linalg.vector_norm(coupling @ x[last, :rank], dim=0)
        if float(missed.max()) <= tolerance * float(s[0]):
            return u @ x[:, :rank], s[:rank], y[:rank] @ v.T
        v = torch.cat([v, beyond], dim=1)
        core[last, known : known + block] = coupling.T
        fresh, diagonal = _orthonormal(matrix @ beyond, u)
        u = torch.cat([u, fresh], dim=1)
        core[known : known + block, known : known + block] = diagonal
    return None


def _orthonormal(x: Tensor, basis: Tensor | None) -> tuple[Tensor, Tensor]:
    """Q [n, b] and R [b, b] with Q orthonormal, orthogonal to `basis` [n, j], and x = Q R + a part within the basis.

    Three rounds: where a column of x has next to nothing outside the basis, what is left of it after the first is
    rounding, which the next one turns away from the basis again.
    """
    if basis is None:
        q, r = torch.linalg.qr(x)
        return q, r
    total = None
    for _ in range(3):
        x = x - basis @ (basis.T @ x)
        x, r = torch.linalg.qr(x)
        total = r if total is None else r @ total
    assert total is not None
    return x, total
