"""Which elements of each model's delta are kept: the one argument that the statistics and the merge kernels share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from ..reference.expert import column_dtype, saved_layout
from ..reference.random import BLEND_TRIAL, DE_TRIAL, stream_id

__all__ = [
    "GRAM_BLOCK",
    "L1_LIMBS",
    "MOST_DIFFERENCES",
    "TIE_BLOCK",
    "ExpertPart",
    "PcbRule",
    "SparsifyRule",
    "TrialRule",
    "column_dtype",
    "saved_layout",
]

SparsifyMethod = Literal["none", "band", "bernoulli", "della", "mask"]

TIE_BLOCK = 65536
"""Elements per tie-count block: `ties_before` holds one number per model, bound and block."""

L1_LIMBS = 12
"""Limbs of 32 bits in an exact L1 sum, little end first, in units of 2**-149."""

GRAM_BLOCK = 4096
"""Elements whose products are added up to one number; blocks are counted from a row's beginning."""

MOST_DIFFERENCES = 3
"""Differences of a trial of differential evolution: with x and a they are of eight tensors."""


@dataclass(frozen=True)
class SparsifyRule:
    """How a chunk of n models is sparsified.

    method: "none" keeps all; "band" keeps the elements whose rank by falling magnitude lies in [first, last), given by
        `bounds` int64[n, 2, 2] and `ties_before` int64[n, 2, blocks]; "bernoulli" keeps each with probability
        `density[i]`; "della" ranks each row of `row_length` elements and spreads the probability by `epsilon[i]`;
        "mask" keeps what `masks` uint8[n, ceil(numel / 8)] says, a bit for each element, low bit first.
    seed, tensor_id: unsigned 64-bit. positions: each model's place among the models. offset: flat index of the chunk's
        first element in its tensor.
    """

    method: SparsifyMethod = "none"
    bounds: torch.Tensor | None = None
    ties_before: torch.Tensor | None = None
    density: list[float] = field(default_factory=list)
    epsilon: list[float] = field(default_factory=list)
    row_length: int = 1
    seed: int = 0
    tensor_id: int = 0
    positions: list[int] = field(default_factory=list)
    offset: int = 0
    masks: torch.Tensor | None = None


PcbVariant = Literal["script", "nlp", "vision", "vision_es", "paper"]


@dataclass(frozen=True)
class PcbRule:
    """How the competition scores of n models are made, and what the sweeps before have found; each sweep needs a part.

    variant: which of PCB-Merging's formulas. clip: float32[n, 2], the least and the greatest magnitude of each row's
        deltas after clipping (not `paper`). extremes: float32[n (n + 1) / 2, 2], the least and the greatest product of
        each pair of rows, and means: float32[n + n (n + 1) / 2], the means of the exponentials (`paper`). thresholds:
        float32[n, 2], the score at which each row begins to be kept, and its highest score.
    """

    variant: PcbVariant = "vision_es"
    clip: torch.Tensor | None = None
    extremes: torch.Tensor | None = None
    means: torch.Tensor | None = None
    thresholds: torch.Tensor | None = None


@dataclass(frozen=True)
class ExpertPart:
    """What one expert holds of one tensor, and how it is put there.

    of: which of the tensors at hand. columns: uint16[rows, k] (int32 where rows are wider than 65536), rising within
    each row, and values: [rows, k] of any dtype that kernels read. scale: what the values are multiplied by. base: the
    base's values at these places, [rows, k], where the expert replaces what the model changed; None where it is added.
    """

    of: int
    columns: torch.Tensor
    values: torch.Tensor
    scale: float
    base: torch.Tensor | None = None


@dataclass(frozen=True)
class TrialRule:
    """How a trial is made of distinct tensors, of which x is the first; see `fastmerge.reference.evolve`.

    kind: "blend" takes `factors` 1 - F and F, and one place, of the reference; "de" a factor for each difference, and
    the places of a and of both sides of each difference. places: in the list of distinct tensors. limit: words below
    it cross over, at most 2**32. seed: unsigned 64-bit. generation: 16 bits, member: 12. offset: flat index of the
    chunk's first element in its tensor.
    """

    kind: Literal["blend", "de"]
    places: list[int]
    factors: list[float]
    limit: int
    seed: int
    generation: int
    member: int
    offset: int = 0

    @property
    def stream(self) -> int:
        """The id of the stream of its random words."""
        purpose = BLEND_TRIAL if self.kind == "blend" else DE_TRIAL
        return stream_id(purpose, self.member, self.generation)
