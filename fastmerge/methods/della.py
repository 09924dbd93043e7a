"""DELLA: drop at random, large elements of a row less often than small ones (Deep et al., arXiv 2406.11617)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field

from fastmerge.methods.base import TensorContext
from fastmerge.methods.consensus import ConsensusMethod, ConsensusParameters
from fastmerge.methods.parameters import ParameterError, Parameters, per_model, shared

Spread = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class DellaLinearParameters(ConsensusParameters):
    """The probability of being kept rises from density - epsilon to density + epsilon with the rank in the row."""

    rescale: bool = shared(True, "give each sparsified delta its L1 norm back")
    epsilon: tuple[Spread, ...] = per_model("how far the probability reaches below and above density", default=0.15)


class DellaParameters(DellaLinearParameters):
    """With the sign election, the mean over the models that agree is the default."""

    normalize: bool = shared(True, "divide by the sum of the weights that took part")


class DellaLinear(ConsensusMethod):
    """Rank-dependent random sparsification, then the weighted sum."""

    name = "della_linear"
    title = "Linear DELLA"
    source = "https://arxiv.org/abs/2406.11617 (DELLA-Merging)"
    sweeps = "2 (one for the L1 norms), 1 with density 1 or without rescale; cuts fall between rows"
    sparsify = "della"
    Parameters: ClassVar[type[Parameters]] = DellaLinearParameters

    def check(self, context: TensorContext, labels: Sequence[str]) -> None:
        """Probabilities must lie strictly between 0 and 1."""
        parameters: Any = context.parameters
        for label, density, epsilon in zip(labels, parameters.density, parameters.epsilon, strict=True):
            if 0 < density < 1 and not (density - epsilon > 0 and density + epsilon < 1):
                raise ParameterError(
                    f"epsilon = {epsilon:g} with density = {density:g} for {context.name} of {label} is not usable: "
                    f"density - epsilon must be above 0 and density + epsilon below 1 (epsilon below "
                    f"{min(density, 1 - density):g}).",
                    "epsilon",
                    label,
                )


class Della(DellaLinear):
    """Rank-dependent random sparsification, then the mean over the models that agree in sign."""

    name = "della"
    title = "DELLA"
    election = True
    Parameters: ClassVar[type[Parameters]] = DellaParameters
