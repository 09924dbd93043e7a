"""torch's own selections as peers of ``kth_magnitude``: the k-th largest magnitude by ``topk`` and by ``kthvalue``."""

from __future__ import annotations

import torch


def by_topk(values: torch.Tensor, k: int) -> torch.Tensor:
    """The last of the k largest magnitudes."""
    return torch.topk(values.abs(), k, sorted=False).values.min()


def by_kthvalue(values: torch.Tensor, k: int) -> torch.Tensor:
    """The magnitude of rank N + 1 - k from below."""
    return torch.kthvalue(values.abs(), values.numel() + 1 - k).values


PEERS = {"topk": by_topk, "kthvalue": by_kthvalue}
