"""A stand-in for `fastmerge.ops.blend_trial` and `de_trial`, in plain torch. To be deleted where those are there."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor


def blend_trial(x: Any, ref: Any, F: float, CR: float, **named: Any) -> Any:  # noqa: N803
    """(1 - F) x + F ref where the mask is on, else x; of one tensor or of lists."""
    if isinstance(x, list):
        return [blend_trial(x[t], ref[t], F, CR, **_one(named, t)) for t in range(len(x))]
    factor = torch.tensor(F, dtype=torch.float32)
    mixed = x.float() * (1 - factor) + ref.float() * factor
    return _finish(x, mixed, CR, 3, **named)


def de_trial(x: Any, a: Any, b: Any, c: Any, F: float, CR: float, *, more: Any = (), **named: Any) -> Any:  # noqa: N803
    """Where the mask is on a + F (b - c), and + F2 (p - q) for each of `more`, else x; of one tensor or of lists."""
    if isinstance(x, list):
        return [
            de_trial(x[t], a[t], b[t], c[t], F, CR, more=[(f, p[t], q[t]) for f, p, q in more], **_one(named, t))
            for t in range(len(x))
        ]
    mixed = a.float()
    for factor, p, q in ((F, b, c), *more):
        mixed = mixed + (p.float() - q.float()) * torch.tensor(factor, dtype=torch.float32)
    return _finish(x, mixed, CR, 4, **named)


def _one(named: dict[str, Any], t: int) -> dict[str, Any]:
    return {name: value[t] if isinstance(value, list) else value for name, value in named.items()}


def _finish(
    x: Tensor,
    mixed: Tensor,
    CR: float,  # noqa: N803
    purpose: int,
    *,
    seed: int,
    generation: int,
    member: int,
    tensor_id: int,
    offset: int = 0,
    forced: int | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    random = importlib.import_module("fastmerge.reference.random")
    stream = random.stream_id(purpose, member, generation)
    words = random.words(offset, x.numel(), seed=seed, tensor_id=tensor_id, stream=stream, device=x.device)
    mask = words < int(CR * 4294967296.0)
    if forced is not None and offset <= forced < offset + x.numel():
        mask[forced - offset] = True
    result = torch.where(mask, mixed.view(-1).to(x.dtype), x.view(-1)).view(x.shape).to(out_dtype or x.dtype)
    return result if out is None else out.copy_(result)
