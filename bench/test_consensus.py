"""Consensus: whole merges of one tensor by every method, and the last pass alone, where everything is known."""

from __future__ import annotations

import independent
import numpy as np
import pytest
import torch
from adversarial import DTYPES, KINDS, family

from fastmerge import ops

BACKENDS = ["cpu", "reference"]
DENSITY = 0.5
WEIGHTS = [1.0, 0.7, -0.4]
SEED = 99
NAME = "model.layers.0.mlp.down_proj.weight"
RULES = {"none": None, "bernoulli": "bernoulli", "della": "della_magprune"}


def compare(result: torch.Tensor, expected: torch.Tensor) -> str | None:
    """How many values are wrong, or None."""
    if result.dtype != expected.dtype:
        return f"dtype {result.dtype}, not {expected.dtype}"
    wrong = int((result != expected).sum())
    return f"{wrong} of {expected.numel()} values are wrong" if wrong else None


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", independent.METHODS)
def test_consensus_merge(method, kind, dtype, backend, size, row_length, measured):
    base, models = family(kind, DTYPES[dtype], size)
    base, models = base.reshape(-1, row_length), [model.reshape(-1, row_length) for model in models]
    rule = independent.METHODS[method]
    density = 1.0 if rule.sparsify == "none" else DENSITY
    expected = independent.expected_tensor(method, NAME, base, models, WEIGHTS, density=density, seed=SEED)

    def run():
        return ops.consensus_merge(
            None if method == "linear" else base,
            models,
            WEIGHTS,
            density=density,
            method=RULES.get(rule.sparsify, rule.sparsify),
            rescale="l1" if rule.rescale else None,
            election="weighted" if rule.elect else "none",
            divisor="weights" if rule.normalize else "none",
            seed=SEED,
            tensor_id=independent.tensor_id(NAME),
            backend=backend,
        )

    moved = (len(models) + (method != "linear") + 1) * base.nbytes
    measured(run, lambda result: compare(result, expected), len(models) * size, moved)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_consensus_apply_after_the_thresholds_are_known(kind, dtype, backend, size, measured):
    base, models = family(kind, DTYPES[dtype], size)
    expected = independent.expected_tensor("ties", NAME, base, models, WEIGHTS, density=DENSITY)
    count = max(1, int(DENSITY * size))
    bounds, ties = ops.magnitude_bounds(base, models, [0] * 3, [count] * 3, compute=torch.float32, backend=backend)
    rule = ops.SparsifyRule("band", bounds=bounds, ties_before=ties)
    out = torch.full_like(base, float("nan"))

    def run():
        return ops.consensus_apply(base, models, WEIGHTS, rule=rule, out=out, backend=backend)

    measured(run, lambda result: compare(result, expected), len(models) * size, (len(models) + 2) * base.nbytes)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_fused_sum(kind, dtype, backend, size, measured):
    _, models = family(kind, DTYPES[dtype], size)
    expected = np.zeros(size, dtype=np.float32)
    for model, weight in zip(models, WEIGHTS, strict=True):
        product = independent.as_float32(model).ravel().astype(np.float64) * float(np.float32(weight))
        # 64 bits of mantissa are rounded twice, too, but hardly ever with another result.
        expected = (product.astype(np.longdouble) + expected).astype(np.float32)

    def check(result):
        found = result.numpy()
        wrong = int(((found != expected) & ~(np.isnan(found) & np.isnan(expected))).sum())
        return f"{wrong} of {size} values are wrong" if wrong > 1 + size // 1_000_000 else None

    moved = sum(model.nbytes for model in models) + 4 * size
    measured(lambda: ops.fused_sum(models, WEIGHTS, backend=backend), check, len(models) * size, moved)
