"""TIES: keep each delta's largest elements, elect a sign, average those that agree (Yadav et al., arXiv 2306.01708)."""

from __future__ import annotations

from typing import ClassVar

from fastmerge.methods.consensus import ConsensusMethod, ScopedParameters
from fastmerge.methods.parameters import Parameters, shared


class TiesParameters(ScopedParameters):
    """The mean over the models that agree is the default."""

    normalize: bool = shared(True, "divide by the sum of the weights that took part")


class Ties(ConsensusMethod):
    """Exactly max(1, int(density * numel)) elements of each tensor are kept; the lowest index wins among equals."""

    name = "ties"
    title = "TIES"
    source = "https://arxiv.org/abs/2306.01708 (TIES-Merging)"
    sweeps = (
        "2 (one to find the exact threshold, seldom three), 1 with density 1; 1 more with rescale; "
        "scope model: 2 over the whole model"
    )
    sparsify = "magnitude"
    election = True
    Parameters: ClassVar[type[Parameters]] = TiesParameters
