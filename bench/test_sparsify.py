"""Sparsification: the four rules, the exact L1 sums behind the rescale, and the search for NaN and infinities."""

from __future__ import annotations

import independent
import numpy as np
import pytest
import torch
from adversarial import DTYPES, KINDS, family, values

from fastmerge import ops

BACKENDS = ["cpu", "reference"]
DENSITY = 0.4
SEED = 12345
NAME = "model.layers.0.mlp.up_proj.weight"
RULES = ["magnitude", "magnitude_outliers", "bernoulli", "della_magprune"]


def kept(rule: str, key: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The mask of a rule, worked out independently."""
    draws = {"seed": SEED, "identity": independent.tensor_id(NAME), "position": 0}
    if rule == "magnitude":
        return independent.magnitude_mask(key, DENSITY)
    if rule == "magnitude_outliers":
        return independent.outliers_mask(key, DENSITY, 0.01)
    if rule == "bernoulli":
        return independent.bernoulli_mask(key.size, DENSITY, **draws)
    return independent.della_mask(key, shape, DENSITY, 0.15, **draws)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES)
def test_sparsify(rule, kind, dtype, backend, size, row_length, measured):
    x = values(kind, DTYPES[dtype], size).reshape(-1, row_length)
    flat = independent.as_float32(x)
    mask = kept(rule, independent.keys(flat), tuple(x.shape))
    rescale = "l1" if rule in ("bernoulli", "della_magprune") else None
    scale = independent.l1_scale(flat, mask) if rescale else np.float32(1.0)
    expected = torch.from_numpy(np.where(mask, flat, np.float32(0.0)) * scale).reshape(x.shape).to(x.dtype)

    def run():
        identity = independent.tensor_id(NAME)
        return ops.sparsify(x, DENSITY, method=rule, rescale=rescale, seed=SEED, tensor_id=identity, backend=backend)

    def check(result):
        wrong = int((result != expected).sum())
        return f"{wrong} of {size} values are wrong" if wrong or result.dtype != x.dtype else None

    measured(run, check, size, 2 * x.nbytes)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_l1_sums_of_deltas(kind, dtype, backend, size, measured):
    base, models = family(kind, DTYPES[dtype], size)
    identity = independent.tensor_id(NAME)
    deltas = [independent.as_float32(model) - independent.as_float32(base) for model in models]
    scales = [
        float(
            independent.l1_scale(
                delta,
                independent.bernoulli_mask(size, DENSITY, seed=SEED, identity=identity, position=position),
            )
        )
        for position, delta in enumerate(deltas)
    ]
    rule = ops.SparsifyRule(
        "bernoulli", density=[DENSITY] * 3, positions=[0, 1, 2], seed=SEED, tensor_id=identity, offset=0
    )

    def run():
        return ops.l1_sums(base, models, rule, compute=torch.float32, backend=backend)

    def check(sums):
        found = [ops.l1_scale(limbs, torch.float32) for limbs in sums]
        return None if found == scales else f"factors {found}, not {scales}"

    measured(run, check, 3 * size, base.nbytes + sum(model.nbytes for model in models))


def with_nonfinite(kind: str, dtype: torch.dtype, size: int) -> torch.Tensor:
    """Values with a NaN or an infinity here and there."""
    x = values(kind, dtype, size)
    x[:: size // 64] = float("nan")
    x[7 :: size // 32] = float("-inf")
    return x


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_count_nonfinite(kind, dtype, backend, size, measured):
    x = with_nonfinite(kind, DTYPES[dtype], size)
    expected = [int(x.isnan().sum()), int(x.isinf().sum())]

    def check(counts):
        return None if counts.tolist() == expected else f"{counts.tolist()}, not {expected}"

    measured(lambda: ops.count_nonfinite(x, backend=backend), check, size, x.nbytes)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_nonfinite(dtype, backend, size, measured):
    x = with_nonfinite("normal", DTYPES[dtype], size)
    expected = x.nan_to_num(0.0, 0.0, 0.0)

    def check(result):
        return None if torch.equal(result, expected) else "values are wrong"

    measured(lambda: ops.zero_nonfinite_(x, backend=backend), check, size, 2 * x.nbytes)
