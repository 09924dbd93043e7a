"""Trials of evolutionary search in Triton: `fastmerge/reference/evolve.py`, with the same bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._triton import evolve as kernels
from ..gpu import loadable, relative, rounded, same_dtypes
from ..lists import Lists, before, copied, multiple_of, numbers, signed
from ..rule import TrialRule
from .launch import CODES, block, flat, launch, table, tiles
from .sparsify import alignment, padded, usable

__all__ = ["trials"]

BLOCK = 1024
"""Elements per tile: eight for each thread, one load of 16 bytes where they are 16-bit numbers."""

_KINDS = {"blend": 0, "de": 1}


def packed(values: Sequence[int], bits: int) -> int:
    """Small numbers in one, the first in the lowest bits."""
    return sum(value << bits * i for i, value in enumerate(values))


def _draw(rule: TrialRule) -> int:
    """The stream and the limit of its words, as kernels take them: see `sparsify.drawn`."""
    return -1 if rule.limit <= 0 else rule.stream << 32 | (rule.limit - 1)


def _key(seed: int, tensor_id: int) -> int:
    return signed(((seed >> 32 ^ tensor_id >> 32) & 0xFFFFFFFF) << 32 | seed & 0xFFFFFFFF)


def trials(
    models: list[list[Tensor]], rule: TrialRule, tensor_ids: list[int], forced: list[int], out: list[Tensor]
) -> None:
    """Trials of tensors, one launch for all that have the same dtypes; see `fastmerge.ops.blend_trial`."""
    factors = tuple(rounded(rule.factors))
    size = block(BLOCK)
    places = relative(rule, forced)
    constants = {
        "COUNT": len(models),
        "KIND": _KINDS[rule.kind],
        "PLACES": packed(rule.places, 4),
        "BLOCK": size,
    }
    for group in same_dtypes(models, out):
        first, *others = group
        if not others:
            own = [usable(model[first]) for model in models]
            target = loadable(out[first])
            launch(
                kernels.trial,
                (tiles(target.numel(), size),),
                target.device,
                *padded(own, None),
                factors,
                flat(target),
                target.numel(),
                _key(rule.seed, tensor_ids[first]),
                tensor_ids[first] & 0xFFFFFFFF,
                rule.offset,
                _draw(rule),
                places[first],
                FOURS=rule.offset % 4 == 0,
                ALIGN=alignment(*own, target),
                **constants,
            )
            if target is not out[first]:
                out[first].copy_(target)
            continue
        targets = [loadable(out[t]) for t in group]
        lists = Lists(None, [[loadable(model[t]) for t in group] for model in models], targets)
        counts = (lists.lengths + (size - 1)) // size
        programs = int(counts.sum())
        keys = numbers([_key(rule.seed, tensor_ids[t]) for t in group])
        low = numbers([tensor_ids[t] & 0xFFFFFFFF for t in group])
        own_places = numbers([places[t] for t in group])
        columns = [before(counts), lists.lengths, keys, low, own_places, lists.out_addresses]
        rows = torch.cat((torch.stack(columns, dim=1), lists.model_addresses), dim=1)
        # Each tensor's number as often as it has programs; told how many that are, nothing waits for the GPU.
        tensor_of = torch.arange(lists.tensors, dtype=torch.int32, device=lists.device)
        tensor_of = tensor_of.repeat_interleave(copied(counts, lists.device), output_size=programs)
        together = multiple_of(lists.out_addresses, lists.model_addresses)
        launch(
            kernels.trial_tensors,
            (programs,),
            lists.device,
            table(rows.flatten(), lists.device),
            tensor_of,
            factors,
            _draw(rule),
            DTYPES=packed([CODES[model[first].dtype] for model in models], 2),
            OUT_DTYPE=CODES[out[first].dtype],
            ALIGN=together if together >= 8 else 1,
            **constants,
        )
        for t, target in zip(group, targets):
            if target is not out[t]:
                out[t].copy_(target)
