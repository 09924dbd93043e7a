"""DARE: drop each element of a delta at random and rescale the rest (Yu et al., arXiv 2311.03099)."""

from __future__ import annotations

from typing import ClassVar

from fastmerge.methods.consensus import ConsensusMethod, ConsensusParameters
from fastmerge.methods.parameters import Parameters, shared


class DareParameters(ConsensusParameters):
    """Rescaling is the default: by the ratio of the L1 norms before and after, not by 1 / density."""

    rescale: bool = shared(True, "give each sparsified delta its L1 norm back")


class DareLinear(ConsensusMethod):
    """Random sparsification, then the weighted sum."""

    name = "dare_linear"
    title = "Linear DARE"
    source = "https://arxiv.org/abs/2311.03099 (Language Models are Super Mario)"
    sweeps = "2 (one for the L1 norms), 1 with density 1 or without rescale"
    sparsify = "bernoulli"
    Parameters: ClassVar[type[Parameters]] = DareParameters


class DareTies(DareLinear):
    """Random sparsification, then the sum over the models that agree in sign."""

    name = "dare_ties"
    title = "DARE TIES"
    election = True
