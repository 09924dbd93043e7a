"""Trials of evolutionary search in CUDA C++: `fastmerge/reference/evolve.py`, with the same bits."""

from __future__ import annotations

import torch
from torch import Tensor

from ..gpu import relative, rounded, same_dtypes
from ..lists import Lists, before, numbers, words
from ..rule import TrialRule
from .launch import CODES, compiled, place, ref, table

__all__ = ["trials"]

if not hasattr(compiled, "TRIAL_TILE"):
    raise ImportError("fastmerge._cuda was built from other sources than this package; build it again")

_KINDS = {"blend": 0, "de": 1}


def trials(
    models: list[list[Tensor]], rule: TrialRule, tensor_ids: list[int], forced: list[int], out: list[Tensor]
) -> None:
    """Trials of tensors, one launch for all that have the same dtypes; see `fastmerge.ops.blend_trial`."""
    factors = rounded(rule.factors)
    numbered = _KINDS[rule.kind], rule.places, factors, rule.limit, rule.seed, rule.stream, rule.offset
    places = relative(rule, forced)
    for group in same_dtypes(models, out):
        first, *others = group
        if not others:
            own = [ref(model[first]) for model in models]
            target = out[first]
            compiled.trial(
                place(target.device), numbered, own, target.numel(), tensor_ids[first], places[first], ref(target)
            )
            continue
        lists = Lists(None, [[model[t] for t in group] for model in models], [out[t] for t in group])
        tiles = (lists.lengths + (compiled.TRIAL_TILE - 1)) // compiled.TRIAL_TILE
        total = int(tiles.sum())
        ids, own_places = words([tensor_ids[t] for t in group]), numbers([places[t] for t in group])
        columns = [lists.lengths, lists.out_addresses, ids, own_places, before(tiles)]
        rows = torch.cat((torch.stack(columns, dim=1), lists.model_addresses), dim=1).flatten()
        there = table(torch.cat((rows, tiles)), lists.device)
        # Each tensor's number as often as it has tiles; told how many that are, nothing waits for the GPU.
        tensor_of = torch.arange(lists.tensors, dtype=torch.int32, device=lists.device)
        tensor_of = tensor_of.repeat_interleave(there[len(rows) :], output_size=total)
        dtypes = [(0, CODES[model[first].dtype]) for model in models]
        result = 0, CODES[out[first].dtype]
        there_and_tiles = there.data_ptr(), tensor_of.data_ptr(), total
        compiled.trial_many(place(lists.device), numbered, dtypes, result, *there_and_tiles)
