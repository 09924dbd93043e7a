"""Model Breadcrumbs: drop each delta's largest and smallest elements (Davari and Belilovsky, arXiv 2312.06795)."""

from __future__ import annotations

from typing import ClassVar

from fastmerge.methods.consensus import ConsensusMethod, ScopedParameters
from fastmerge.methods.parameters import Fraction, Parameters, per_model


class BreadcrumbsParameters(ScopedParameters):
    """`gamma` is the fraction of outliers."""

    gamma: tuple[Fraction, ...] = per_model("fraction of the largest elements that is dropped first", default=0.01)


class Breadcrumbs(ConsensusMethod):
    """Exactly int(density * numel) elements are kept, next below the int(gamma * numel) largest."""

    name = "breadcrumbs"
    title = "Model Breadcrumbs"
    source = "https://arxiv.org/abs/2312.06795 (Model Breadcrumbs)"
    sweeps = (
        "2 (one to find the exact thresholds, seldom three), 1 with density 1; 1 more with rescale; "
        "scope model: 2 over the whole model"
    )
    sparsify = "outliers"
    Parameters: ClassVar[type[Parameters]] = BreadcrumbsParameters


class BreadcrumbsTies(Breadcrumbs):
    """The same, and only the models that agree in sign are added."""

    name = "breadcrumbs_ties"
    title = "Model Breadcrumbs with TIES"
    election = True
