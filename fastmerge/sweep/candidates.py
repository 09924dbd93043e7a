"""Checkpoints that are read once and merged in memory, several times."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from fastmerge import backends
from fastmerge.engine.checkpoint import open_checkpoint
from fastmerge.engine.config import MergeConfig
from fastmerge.engine.loading import LoadedSource
from fastmerge.engine.plan import Plan
from fastmerge.engine.sources import Source
from fastmerge.merging import plan_config, wanted_by
from fastmerge.merging_arguments import PLENTY, check_common
from fastmerge.merging_in_memory import Resident, Series


class CandidateMerges:
    """Merges of checkpoints that are read once, each as a config of its own says.

    Each has the bits that `merge_checkpoints` writes for its config. configs: of one folder of models, as a sweep makes
    them. numerics, seed, on_nonfinite, backend: as of `merge_checkpoints`.

    Raises ConfigError, CheckpointError, ArgumentError: what does not fit, from headers alone.

    Attributes:
        refs: the checkpoints. identities: what tells each from other files. input_bytes, output_bytes: of all models
        together, and of the largest result: what is held in memory. notes: what a person should know.
    """

    def __init__(
        self,
        configs: Sequence[MergeConfig],
        *,
        numerics: str = "fp32",
        seed: int = 0,
        on_nonfinite: str = "error",
        backend: str | None = None,
    ) -> None:
        check_common(numerics, seed, on_nonfinite)
        backends.resolve(backend, "cpu")
        self._configs, self._backend, self._on_nonfinite = configs, backend, on_nonfinite
        self._numbers: dict[str, Any] = {"numerics": numerics, "seed": seed, "backend": backend}
        self._wanted = [wanted_by(config) for config in configs]
        self.refs = list(dict.fromkeys(ref for wanted in self._wanted for ref in wanted.refs))
        with ExitStack() as stack:
            opened = {ref: stack.enter_context(open_checkpoint(ref)) for ref in self.refs}
            plans = self._plans(opened, range(len(configs)))
            self.identities = [opened[ref].identity() for ref in self.refs]
            self.input_bytes = sum(one.nbytes for one in opened.values())
        self.output_bytes = max((plan.bytes_written for plan in plans), default=0)
        self.notes = list(dict.fromkeys(note for plan in plans for note in plan.notes))

    def _plans(self, sources: Mapping[str, Source], numbers: Iterable[int]) -> list[Plan]:
        return [
            plan_config(
                self._configs[number],
                self._wanted[number],
                [sources[ref] for ref in self._wanted[number].refs],
                budget=PLENTY,
                shard_size=PLENTY,
                device="cpu",
                gpu_budget=None,
                **self._numbers,
            )
            for number in numbers
        ]

    def load(self, numbers: Sequence[int]) -> Callable[[int], dict[str, torch.Tensor]]:
        """Read the models; returns what merges the candidate of a number, one of these, over the one before."""
        sources = {}
        for ref in dict.fromkeys(ref for number in numbers for ref in self._wanted[number].refs):
            with open_checkpoint(ref) as opened:
                sources[ref] = LoadedSource(opened)
        plans = self._plans(sources, numbers)
        where = Resident(list(sources.values()), None, self._backend, None, self._on_nonfinite)
        series = Series(where, [lambda budget, plan=plan: plan for plan in plans], plans, reuse=True)  # type: ignore[misc]
        places = {number: place for place, number in enumerate(numbers)}
        return lambda number: series.merge(places[number])[0]
