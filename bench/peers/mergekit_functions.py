"""mergekit 0.1.5's own merge functions, one tensor at a time, in whatever dtype the tensors have."""

from __future__ import annotations

from typing import Any

import torch


def merged(
    method: str, base: torch.Tensor | None, models: list[torch.Tensor], parameters: dict[str, Any]
) -> torch.Tensor:
    """One tensor by mergekit's method object. parameters: by mergekit's names, those of models as lists."""
    from mergekit.merge_methods import registry
    from mergekit.merge_methods.base import TensorGroup

    tensors = models if base is None else [base, *models]
    group = TensorGroup.from_tensors(tensors, base_index=None if base is None else 0)
    (found,) = registry.get(method)([group], parameters=parameters)
    return found
