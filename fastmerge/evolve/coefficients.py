"""`search`: the best coefficients of a merge method (weights, lambda, density), by CMA-ES or Optuna."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmerge import methods
from fastmerge.engine.sources import StateDictSource
from fastmerge.errors import ArgumentError, ArgumentTypeError, EvaluationError, MergeError
from fastmerge.evolve import live
from fastmerge.evolve.evaluator import DevelopmentScore, FinalScore, Score, both
from fastmerge.evolve.history import History
from fastmerge.evolve.members import Model, digest_of, load
from fastmerge.evolve.progress import GenerationReport
from fastmerge.evolve.samplers import Sampler, make
from fastmerge.merging_in_memory import fixed_parameters, merge

Range = tuple[float, float]


@dataclass
class SearchReport:
    """What a search among coefficients found.

    Attributes:
        state: name -> tensor of the best merge; with a module, what was copied into it.
        parameters: the best coefficients, as `fastmerge.merge` takes them, with the fixed ones.
        score: their development score.
        final: the final score, or None if there was none or it failed; then `final_error` says why.
        scores: the best development score after each batch.
        evaluations, failures: of the development score. resumed: how many of them came from the history.
        digest: of the best merge's tensors, as in a manifest.
        history: all records, as in `history.jsonl`.
    """

    state: dict[str, Tensor]
    parameters: dict[str, Any]
    score: float
    final: float | None
    final_error: str
    scores: list[float | None]
    evaluations: int
    failures: int
    resumed: int
    digest: str
    history: list[dict[str, Any]] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """All but the tensors and the history, as plain values."""
        return {name: value for name, value in vars(self).items() if name not in ("state", "history")}


def search(
    models: Sequence[Model],
    score: Score | DevelopmentScore,
    *,
    space: Mapping[str, Range | Sequence[Range]],
    base: Model | None = None,
    method: str = "ties",
    sampler: str | Sampler = "cma",
    evaluations: int = 50,
    seed: int = 0,
    model: torch.nn.Module | None = None,
    final_score: Score | FinalScore | None = None,
    state: str | Path | None = None,
    backend: str = "auto",
    progress: Callable[[GenerationReport], None] | None = None,
    **fixed: Any,
) -> SearchReport:
    """Search the parameters of a merge method for the merge that scores best.

    Args:
        models: checkpoints, state dicts or modules, as many as are merged. They are held in memory and not changed.
        score: the development score of a merge, higher is better, as of `evolve`.
        space: what to search: a parameter's name (as `fastmerge.merge` takes it) and its range, (lowest, highest); of
            one that is per model, a list of ranges with one per model gives each model a value of its own.
        base: what the models were fine-tuned from; most methods need it.
        method: a name from `fastmerge.methods.names()`.
        sampler: "cma" (CMA-ES, of the package `cma`), "optuna" (its TPE sampler), or an object with `ask` and `tell`.
        evaluations: how many merges are scored.
        seed: of the sampler and of random methods.
        model: a module that takes each merge's values and is scored; without it the dict of tensors is.
        final_score: taken once, at the end, of the best merge, on examples that `score` has not seen.
        state: a directory for `history.jsonl`; a run that finds its own there goes on where it ended.
        backend: of the ops.
        progress: told after each batch of the sampler.
        **fixed: the method's other parameters.

    Returns:
        The best merge and its coefficients.

    Raises:
        ArgumentError, ArgumentTypeError: before any evaluation, also where the sampler's package is missing.
        EvaluationError: three evaluations in a row failed, or none succeeded.

    Sources: CMA-ES, Hansen 2016 (arXiv 1604.00772); TPE, Bergstra et al. 2011.
    """
    development, final = both(score, final_score)
    if isinstance(evaluations, bool) or not isinstance(evaluations, int) or evaluations < 1:
        raise ArgumentError(f"evaluations must be a whole number from 1 on, not {evaluations!r}.")
    if isinstance(models, str | Path | Mapping | torch.nn.Module) or not isinstance(models, Sequence):
        raise ArgumentTypeError("models must be a list of state dicts, modules or checkpoints.")
    axes = _axes(space, method, len(models), fixed)
    for end in (0.0, 1.0):
        _check_parameters(method, _parameters(axes, fixed, [end] * len(axes)), len(models))
    asked = make(sampler, len(axes), seed)
    tensors = [load(one, f"models[{index}]")[1] for index, one in enumerate(models)]
    based = None if base is None else load(base, "base")[1]
    about = {
        "what": "search",
        "method": method,
        "fixed": {name: list(v) if isinstance(v, tuple) else v for name, v in fixed.items()},
        "space": [[axis.name, axis.model, axis.low, axis.high] for axis in axes],
        "sampler": asked.name,
        "evaluations": evaluations,
        "seed": seed,
        "models": [_digest(one) for one in ([] if based is None else [based]) + tensors] if state is not None else None,
    }

    def merged(parameters: Mapping[str, Any]) -> dict[str, Tensor]:
        return merge(tensors, base=based, method=method, seed=seed, backend=backend, **parameters)

    with History(state, about) as history:
        run = _Search(axes, fixed, asked, evaluations, development, merged, model, history, progress)
        return run.go(final)


@dataclass(frozen=True)
class _Axis:
    """One coefficient: a parameter's, or with a number that of one model."""

    name: str
    model: int | None
    low: float
    high: float


def _axes(space: Mapping[str, Any], method: str, models: int, fixed: Mapping[str, Any]) -> list[_Axis]:
    if not isinstance(space, Mapping) or not space:
        raise ArgumentError("space is empty; name what to search, as in space={'density': (0.1, 1.0)}.")
    known = {each.python_name: each for each in methods.parameters(method).values()}
    axes = []
    for given, ranges in space.items():
        name = given if given in known else f"{given}_"
        if name not in known:
            raise ArgumentError(methods.explain_unknown_parameter(given.removesuffix("_"), method))
        if name in fixed or given in fixed:
            raise ArgumentError(f"{given} stands in space and has a fixed value, too; keep one.")
        if _is_range(ranges):
            axes.append(_axis(name, None, ranges))
            continue
        if not isinstance(ranges, list | tuple) or not known[name].per_model or len(ranges) != models:
            which = f"or a list with one for each of the {models} models" if known[name].per_model else "two numbers"
            raise ArgumentError(f"space[{given!r}] must be a range, (lowest, highest), {which}; it is {ranges!r}.")
        axes.extend(_axis(name, number, one) for number, one in enumerate(ranges))
    return axes


def _is_range(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(isinstance(end, int | float) and not isinstance(end, bool) for end in value)
    )


def _axis(name: str, model: int | None, value: Any) -> _Axis:
    if not _is_range(value) or not (math.isfinite(value[0]) and math.isfinite(value[1]) and value[0] < value[1]):
        raise ArgumentError(f"the range of {name} must be (lowest, highest), the second one larger, not {value!r}.")
    return _Axis(name, model, float(value[0]), float(value[1]))


def _parameters(axes: Sequence[_Axis], fixed: Mapping[str, Any], point: Sequence[float]) -> dict[str, Any]:
    """What a point of the unit cube stands for, as `fastmerge.merge` takes it."""
    found: dict[str, Any] = dict(fixed)
    for axis, share in zip(axes, point, strict=True):
        value = axis.low + (axis.high - axis.low) * min(max(float(share), 0.0), 1.0)
        if axis.model is None:
            found[axis.name] = value
        else:
            found.setdefault(axis.name, []).append(value)
    return found


def _check_parameters(method: str, parameters: Mapping[str, Any], models: int) -> None:
    """ParameterError: the method would refuse these: asked at both ends, lest it does so in the middle of a search."""
    chosen = methods.get(method)
    shared, each = fixed_parameters(chosen, parameters, models)("any")
    labels = [f"models[{index}]" for index in range(models)]
    methods.bind(chosen, shared, each, tensor="any", labels=labels)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    return digest_of(StateDictSource("a model", tensors).tensors, tensors)[0]


class _Search:
    """One run: points asked for, merged, scored and told."""

    def __init__(
        self,
        axes: list[_Axis],
        fixed: Mapping[str, Any],
        sampler: Sampler,
        evaluations: int,
        development: DevelopmentScore,
        merged: Callable[[Mapping[str, Any]], dict[str, Tensor]],
        model: torch.nn.Module | None,
        history: History,
        progress: Callable[[GenerationReport], None] | None,
    ) -> None:
        self.axes, self.fixed, self.sampler, self.most = axes, fixed, sampler, evaluations
        self.development, self.merged, self.model = development, merged, model
        self.history, self.progress = history, progress
        self.best: tuple[float, dict[str, Any]] | None = None
        self.worst = math.inf
        self.evaluations = self.failures = self.resumed = 0
        self.scores: list[float | None] = []

    def go(self, final: FinalScore | None) -> SearchReport:
        """All batches, the choice, and the final score."""
        while self.evaluations < self.most:
            self._batch()
        if self.best is None:
            raise EvaluationError(
                "no evaluation has succeeded, so there is no best merge; see the history for the reasons."
            )
        value, parameters = self.best
        state = self.merged(parameters)
        digest = _digest(state)
        score, error = self._final(final, live.subject(self.model, state))
        return SearchReport(
            state=state,
            parameters=parameters,
            score=value,
            final=score,
            final_error=error,
            scores=self.scores,
            evaluations=self.evaluations,
            failures=self.failures,
            resumed=self.resumed,
            digest=digest,
            history=self.history.records,
        )

    def _batch(self) -> None:
        points = self.sampler.ask()
        found: list[float | None] = []
        before, failed = self.resumed, self.failures
        for point in points[: self.most - self.evaluations]:
            found.append(self._score(_parameters(self.axes, self.fixed, point)))
        known = [score for score in found if score is not None]
        self.worst = min([*known, self.worst])
        # A sampler wants a number for each point: a failed one is as bad as the worst. Before there is any score no
        # number would do: 0 may be better than all that come.
        if len(found) == len(points) and math.isfinite(self.worst):
            self.sampler.tell(points, [self.worst if score is None else score for score in found])
        best = None if self.best is None else self.best[0]
        self.scores.append(best)
        self.history.flush()
        if self.progress is not None:
            self.progress(
                GenerationReport(
                    generation=len(self.scores),
                    generations=len(self.scores) + math.ceil((self.most - self.evaluations) / len(points)),
                    best=best,
                    mean=math.fsum(known) / len(known) if known else None,
                    accepted=0,
                    failed=self.failures - failed,
                    evaluations=self.evaluations,
                    resumed=self.resumed - before == len(found),
                )
            )

    def _score(self, parameters: dict[str, Any]) -> float | None:
        what = {"generation": len(self.scores) + 1, "parameters": parameters}
        told = self.history.told("evaluation", what)
        self.evaluations += 1
        if told is not None:
            score, error = told["score"], told.get("error", "")
            self.resumed += 1
        else:
            # What the method refuses is refused for the first point, before any evaluation.
            try:
                subject = live.subject(self.model, self.merged(parameters))
            except MergeError as failed:
                score, error = None, " ".join(str(failed).split())
            else:
                score, error = self.development.measure(subject)
            self.history.add("evaluation", {**what, "score": score, **({"error": error} if error else {})})
        self.failures += bool(error)
        self.development.count(error, f"point {self.evaluations}")
        if score is not None and (self.best is None or score > self.best[0]):
            self.best = score, parameters
        return score

    def _final(self, final: FinalScore | None, subject: Any) -> tuple[float | None, str]:
        if final is None:
            return None, ""
        told = self.history.told("final", {})
        if told is not None:
            return told["score"], told.get("error", "")
        score, error = final.measure_once(subject)
        self.history.add("final", {"score": score, **({"error": error} if error else {})})
        self.history.flush()
        return score, error
