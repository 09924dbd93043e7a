"""What several merges of the same models have in common, found once.

Thresholds, L1 sums and inner products do not depend on the weights with which models are merged. So whoever merges the
same models in several ways, one after the other, lets the executor ask here first: what one merge has found, the next
one needs not find again, and what several need of a tensor is found for all of them while it is in the cache.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastmerge.engine.jobs import Job
from fastmerge.engine.nonfinite import Clean
from fastmerge.engine.plan import Plan
from fastmerge.methods.base import Chunk, Known, Method, Statistic

_Inputs = tuple[Hashable, ...]
_Key = tuple[_Inputs, type[Statistic], Hashable]


class Shared:
    """Known of models that stay as they are while the plans of several merges are carried out.

    plans: of all merges to come, of sources that are the same objects in each of them. What is kept is small: bounds
    and sums, nothing for each element.
    """

    def __init__(self, plans: Sequence[Plan]) -> None:
        self.clean: Clean = set()
        self._jobs: dict[str, list[tuple[Method, Job]]] = {}
        for plan in plans:
            for job in plan.jobs:
                if job.context is not None and job.whole:
                    self._jobs.setdefault(job.name, []).append((plan.method, job))
        self._wanted: dict[str, list[tuple[_Key, Statistic]]] = {}
        self._states: dict[str, dict[_Key, Any]] = {}
        self._of_models: list[tuple[bool, str, Any, Any]] = []

    # -- of one tensor

    def state(self, job: Job, statistic: Statistic, chunk: Chunk, known: Known) -> Any:
        """The state of a whole tensor: as it was found before, or for all merges to come that need one of its kind."""
        depends = statistic.depends_only_on()
        if depends is None:
            return statistic.observe(chunk, known)
        key = (_inputs(job), type(statistic), depends)
        states = self._states.setdefault(job.name, {})
        if key not in states:
            also = {other: one for other, one in self._all(job.name) if other[:2] == key[:2] and other not in states}
            also.pop(key, None)
            found = statistic.observe_with(list(also.values()), chunk, known)
            states.update(zip([key, *also], found, strict=False))
        return states[key]

    def _all(self, name: str) -> list[tuple[_Key, Statistic]]:
        """The statistics of a tensor that any of the merges wants and shares."""
        if name not in self._wanted:
            self._wanted[name] = [
                ((_inputs(job), type(statistic), depends), statistic)
                for method, job in self._jobs.get(name, [])
                if job.context is not None
                for statistic in method.statistics(job.context, whole=True)
                if (depends := statistic.depends_only_on()) is not None
            ]
        return self._wanted[name]

    # -- of the whole model

    def with_known(self, plan: Plan) -> Plan:
        """The plan with what is known of the whole model already."""
        known: dict[str, Any] = dict(plan.known)
        for statistic in plan.model_statistics:
            for has_base, name, depends, value in self._of_models:
                if (has_base, name, depends) == (_has_base(plan), statistic.name, _plain(statistic.depends_on())):
                    known.setdefault(statistic.name, statistic.load(value))
        return replace(plan, known=known)

    def learn(self, plan: Plan, known: Mapping[str, Any]) -> None:
        """Keep what a merge has found about the whole model, as far as it can be kept."""
        for statistic in plan.model_statistics:
            about = (_has_base(plan), statistic.name, _plain(statistic.depends_on()))
            if statistic.name not in known or any(entry[:3] == about for entry in self._of_models):
                continue
            value = statistic.dump(known[statistic.name])
            if value is not None:
                self._of_models.append((*about, value))


def _inputs(job: Job) -> _Inputs:
    """What is read for a tensor: merges may differ in which models they take, and in what these are converted to."""
    read: Iterable[Hashable] = ((one.source.ref, one.info.name) for one in job.inputs)
    compute = None if job.context is None else job.context.compute
    return (job.match.base is not None, compute, *read, *job.held)


def _has_base(plan: Plan) -> bool:
    return any(job.match.base is not None for job in plan.counted)


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))
