"""Inner products of all pairs of models."""

from __future__ import annotations

import independent
import numpy as np
import pytest
from adversarial import DTYPES, KINDS, family

from fastmerge import ops

BACKENDS = ["cpu", "reference"]


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_gram_of_deltas(kind, dtype, backend, size, measured):
    base, models = family(kind, DTYPES[dtype], size)
    deltas = [
        (independent.as_float32(model) - independent.as_float32(base)).astype(np.float64).ravel() for model in models
    ]
    expected = [float(deltas[i] @ deltas[j]) for i in range(3) for j in range(i, 3)]
    allowed = [1e-12 * float(np.abs(deltas[i]) @ np.abs(deltas[j])) for i in range(3) for j in range(i, 3)]

    def run():
        return ops.gram(base, models, backend=backend)

    def check(sums):
        found = sums.sum(dim=(1, 2)).tolist()
        wrong = [each for each in zip(found, expected, allowed) if not abs(each[0] - each[1]) <= each[2]]
        return f"inner products {wrong}" if wrong else None

    measured(run, check, 3 * size, base.nbytes + sum(model.nbytes for model in models))
