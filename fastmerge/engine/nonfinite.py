"""NaN and Inf in the inputs: counted when a tensor is read for the first time, refused, or zeroed in every sweep."""

from __future__ import annotations

from typing import Literal

import torch

from fastmerge import ops
from fastmerge.engine.jobs import READ_BYTES, Load
from fastmerge.engine.matching import Input
from fastmerge.engine.sources import TORCH_DTYPES, StateDictSource
from fastmerge.errors import MergeError

OnNonfinite = Literal["error", "warn", "zero"]
Counts = dict[str, dict[str, tuple[int, int]]]
Clean = set[tuple[str, str, torch.dtype]]
"""Inputs without any: the model, the tensor's name there, and what it was converted to."""


class Nonfinite:
    """What is known about the inputs' NaN and Inf. Used by the thread that reads."""

    def __init__(self, policy: OnNonfinite, backend: str, host_backend: str, clean: Clean | None = None) -> None:
        """policy: "error" refuses, "warn" counts, "zero" zeroes. host_backend: of the ops on the host's tensors.

        clean: what other merges of the same inputs know, to which this one adds.
        """
        self.zeroes = policy == "zero"
        self.refuses = policy == "error"
        self.counts: Counts = {}
        self._clean: Clean = set() if clean is None else clean
        self._checked: set[str] = set()
        self._backend = backend
        self._host_backend = host_backend

    def done_with(self, load: Load) -> None:
        """After the last load of a tensor's first sweep there is nothing more to count in it."""
        if load.stop != load.job.numel or load.sample:
            return
        name = load.job.name
        self._checked.add(name)
        for one, dtype in zip(load.job.inputs, load.job.held, strict=True):
            if name not in self.counts.get(one.source.ref, {}):
                self._clean.add((one.source.ref, one.info.name, dtype))

    def found_in(self, load: Load, one: Input, piece: torch.Tensor) -> bool:
        """Whether the piece holds NaN or Inf; counted when it is read for the first time."""
        if not piece.is_floating_point() or (one.source.ref, one.info.name, piece.dtype) in self._clean:
            return False
        name = load.job.name
        if name in self._checked and name not in self.counts.get(one.source.ref, {}):
            return False
        nan, inf = self._count(piece)
        if not nan and not inf:
            return False
        if name not in self._checked and not load.sample:
            counts = self.counts.setdefault(one.source.ref, {})
            so_far = counts.get(name, (0, 0))
            counts[name] = (so_far[0] + nan, so_far[1] + inf)
        return True

    def zero(self, piece: torch.Tensor) -> None:
        """Put zeros in their place."""
        if piece.dtype == torch.float64:
            piece.masked_fill_(~piece.isfinite(), 0.0)
        else:
            ops.zero_nonfinite_(piece, backend=self._backend_for(piece))

    def refuse_if_found(self, load: Load, one: Input, dtype: torch.dtype) -> None:
        """Stop the merge if the tensor that this load is of holds any, and that is not wanted."""
        found = self.counts.get(one.source.ref, {}).get(load.job.name)
        if not self.refuses or found is None:
            return
        nan, inf = (here + later for here, later in zip(found, self._count_rest(load, one, dtype), strict=True))
        raise MergeError(
            f"Tensor {one.info.name!r} of {one.source.ref} holds {nan} NaN and {inf} Inf; mend the "
            "model, or merge with on_nonfinite warn (count them) or zero (put zeros in their place)."
        )

    def _count_rest(self, load: Load, one: Input, dtype: torch.dtype) -> tuple[int, int]:
        """Read what comes after this load, so that the message is about the whole tensor."""
        if isinstance(one.source, StateDictSource):
            return self._count(one.source.view(one.info)[load.stop :].to(dtype))
        total = (0, 0)
        stored = TORCH_DTYPES[one.info.dtype]
        step = max(READ_BYTES // stored.itemsize, 1)
        buffer = bytearray(step * stored.itemsize)
        for start in range(load.stop, one.info.numel, step):
            count = min(step, one.info.numel - start)
            one.source.read_into(one.info, start * stored.itemsize, memoryview(buffer)[: count * stored.itemsize])
            nan, inf = self._count(torch.frombuffer(buffer, dtype=stored, count=count).to(dtype))
            total = (total[0] + nan, total[1] + inf)
        return total

    def _count(self, x: torch.Tensor) -> tuple[int, int]:
        if x.dtype == torch.float64:
            return int(x.isnan().sum()), int(x.isinf().sum())
        nan, inf = ops.count_nonfinite(x, backend=self._backend_for(x)).tolist()
        return nan, inf

    def _backend_for(self, x: torch.Tensor) -> str:
        return self._host_backend if x.device.type == "cpu" else self._backend
