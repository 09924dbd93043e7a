"""The mutations that checks/mutations.py tries: a text, what stands in its place, and which tests must notice.

A text has to occur once in its file. A mutation stays a program that runs and computes something else: what does not
even compile proves nothing.
"""

from __future__ import annotations

from checks.mutation_list import (
    consensus,
    evolve,
    expert,
    geometry,
    highpass,
    importance,
    mergekit,
    pcb,
    searches,
    select,
    shared,
    sparsify,
    sweeps,
    verify,
)
from checks.mutation_list.mutation import Mutation

__all__ = ["MUTATIONS", "Mutation"]

_FAMILIES = (
    *(shared, select, sparsify, consensus, pcb, expert, geometry, highpass, importance, evolve),
    *(mergekit, verify, searches, sweeps),
)

MUTATIONS = [mutation for family in _FAMILIES for mutation in family.MUTATIONS]
