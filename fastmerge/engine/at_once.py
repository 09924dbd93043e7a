"""One tensor that is in memory, merged by itself: for callers that read and write on their own."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastmerge.engine.gathering import Gathering
from fastmerge.methods.base import Chunk, Method, TensorContext


def merge_at_once(
    method: Method,
    context: TensorContext,
    base: torch.Tensor | None,
    models: Sequence[torch.Tensor],
    out: torch.Tensor,
) -> torch.Tensor:
    """Gather what the method must know about the tensor, and merge it in one piece.

    method, context: as in a plan; `context.parameters` are checked already. base, models: tensors of `context.shape` on
    one device, float32, bfloat16 or float16, any strides. out: a contiguous tensor of that shape, of a dtype of those,
    which overlaps none of them.

    Returns `out`, with the bits that `fastmerge.merge` gives for the same tensor and context. Statistics of a whole
    model are not gathered: methods that have them for these parameters are not for this.
    """
    if out.numel() == 0:
        return out
    chunk = Chunk(0, None if base is None else base.reshape(-1), [model.reshape(-1) for model in models])
    gathering = Gathering(None, method.statistics(context, whole=True))
    gathering.observe_whole(chunk)
    method.merge(context, chunk, gathering.known, out.view(-1))
    return out
