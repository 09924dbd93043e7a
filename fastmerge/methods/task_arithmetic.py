"""Task arithmetic: add up the deltas (Ilharco et al., arXiv 2212.04089)."""

from __future__ import annotations

from typing import ClassVar

from fastmerge.methods.consensus import ConsensusMethod, ConsensusParameters
from fastmerge.methods.parameters import Fraction, Parameters, per_model, shared


class TaskArithmeticParameters(ConsensusParameters):
    """As the others of its kind, but nothing is sparsified."""

    density: tuple[Fraction, ...] = per_model("accepted and without effect: nothing is sparsified", default=1.0)
    rescale: bool = shared(False, "accepted and without effect: nothing is sparsified")


class TaskArithmetic(ConsensusMethod):
    """The result is base + lambda * sum_i(w_i delta_i)."""

    name = "task_arithmetic"
    title = "Task Arithmetic"
    source = "https://arxiv.org/abs/2212.04089 (Editing Models with Task Arithmetic)"
    sweeps = "1"
    Parameters: ClassVar[type[Parameters]] = TaskArithmeticParameters
