"""Trials of evolutionary search: blends and differential evolution."""

from __future__ import annotations

import independent
import numpy as np
import pytest
import torch
from adversarial import DTYPES, KINDS, family

from fastmerge import ops

BACKENDS = ["cpu", "reference"]
F, CR = 0.3, 0.5
PURPOSES = {"blend": 3, "de": 4}
KEY = {"seed": 12345, "generation": 7, "member": 5, "tensor_id": 2**40 + 3}


def crossing(kind: str, size: int) -> np.ndarray:
    """Which elements cross over, worked out independently."""
    stream = PURPOSES[kind] << 28 | KEY["generation"] << 12 | KEY["member"]
    return independent.philox(KEY["seed"], KEY["tensor_id"], stream, size) < np.uint64(int(CR * 2.0**32))


def expected(kind: str, tensors: list[torch.Tensor]) -> torch.Tensor:
    """The trial in numpy, step by step in float32."""
    x, *others = (independent.as_float32(each).ravel() for each in tensors)
    with np.errstate(all="ignore"):
        if kind == "blend":
            new = np.float32(1.0 - F) * x + np.float32(F) * others[0]
        else:
            new = others[0] + np.float32(F) * (others[1] - others[2])
    mixed = torch.from_numpy(new).to(tensors[0].dtype).reshape(tensors[0].shape)
    mask = torch.from_numpy(crossing(kind, x.size)).reshape(tensors[0].shape)
    return torch.where(mask, mixed, tensors[0])


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", KINDS)
@pytest.mark.parametrize("kind", PURPOSES)
def test_trial(kind, values, dtype, backend, size, measured):
    base, models = family(values, DTYPES[dtype], size)
    tensors = [models[0], base] if kind == "blend" else [models[0], base, *models[1:3]]
    wanted = expected(kind, tensors)

    def run():
        op = ops.blend_trial if kind == "blend" else ops.de_trial
        return op(*tensors, F, CR, **KEY, backend=backend)

    def check(result):
        wrong = int((result != wanted).sum())
        return f"{wrong} of {size} values are wrong" if wrong or result.dtype != wanted.dtype else None

    measured(run, check, size, sum(x.nbytes for x in tensors) + wanted.nbytes)
