"""`evolve`: a population of models, improved trial by trial."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmerge import backends
from fastmerge.errors import ArgumentError, ArgumentTypeError, EvaluationError, MergeError
from fastmerge.evolve import mergers
from fastmerge.evolve.draws import Draws
from fastmerge.evolve.evaluator import DevelopmentScore, FinalScore, Score, both
from fastmerge.evolve.history import History
from fastmerge.evolve.live import Live
from fastmerge.evolve.members import Members, Model, digest_of, gather, load
from fastmerge.evolve.population import Population, fits_in_memory, free_memory
from fastmerge.evolve.progress import GenerationReport
from fastmerge.evolve.recipes import Recipe
from fastmerge.evolve.strategies import Coefficient, Strategy, make, settings

MOST_GENERATIONS = (1 << 16) - 1
MOST_MEMBERS = 1 << 12
"""As many as the ids of random streams have numbers for."""

HOLDINGS = ("auto", "recipes", "tensors")

_log = logging.getLogger("fastmerge")


@dataclass
class EvolveReport:
    """What a search among weights found.

    Attributes:
        state: name -> tensor of the chosen model; with a module, its own tensors, which hold the chosen values now.
        score: its development score. first_score: the best one among the input models (with a merger, what they merge
            to); None where its evaluation failed.
        final: the final score, or None if there was no `final_score` or it failed; then `final_error` says why.
        best_member: the number of the chosen member; with a merger None, all members are merged.
        scores: the best development score after each generation, from generation 0, the input models.
        evaluations, failures: of the development score. resumed: how many of them came from the history.
        digest: of the chosen model's tensors, as in a manifest.
        history: all records, as in `history.jsonl`.
        held: "recipes" or "tensors": how members were held.
    """

    state: dict[str, Tensor]
    score: float | None
    first_score: float | None
    final: float | None
    final_error: str
    best_member: int | None
    scores: list[float | None]
    evaluations: int
    failures: int
    resumed: int
    digest: str
    history: list[dict[str, Any]] = field(repr=False)
    held: str = "recipes"

    def to_dict(self) -> dict[str, Any]:
        """All but the tensors and the history, as plain values."""
        return {name: value for name, value in vars(self).items() if name not in ("state", "history")}


def evolve(
    models: Sequence[Model],
    score: Score | DevelopmentScore,
    *,
    base: Model | None = None,
    strategy: str | Strategy = "evolver",
    generations: int = 15,
    F: Coefficient = None,  # noqa: N803
    CR: Coefficient = None,  # noqa: N803
    seed: int = 0,
    merger: str | Mapping[str, Any] | mergers.Merger | None = None,
    model: torch.nn.Module | None = None,
    final_score: Score | FinalScore | None = None,
    state: str | Path | None = None,
    members: str = "auto",
    exclude: str | Sequence[str] = (),
    backend: str = "auto",
    progress: Callable[[GenerationReport], None] | None = None,
    **options: Any,
) -> EvolveReport:
    """Evolve models: mix members of a population in random places, keep what scores better.

    The input models are the first members. In each generation every member is tried once against a mixture, which takes
    its place at once if it scores better (with `de` and `cade`: no worse). Integers and bools never change.

    Args:
        models: checkpoints (a directory, a file, or org/name of the hub), state dicts or modules, all of one
            architecture: the same names, shapes and dtypes (float32, bfloat16, float16). They are not changed.
        score: the development score of a model, higher is better. It gets `model`, or else a dict of tensors, valid
            during the call. If it raises, or returns NaN, the trial has failed and is dropped; three failures in a row
            end the run.
        base: what the models were fine-tuned from; only a merger may need it.
        strategy: "evolver", "de", "cade", or an object such as `fastmerge.evolve.De(variants="rand/1")`.
        generations: how many, after the input models have been scored.
        F: how far values move; see the strategy. None for its default.
        CR: the share of elements that move; see the strategy. None for its default.
        seed: the same seed makes the same trials, on every machine and backend.
        merger: with `evolver`: members are merged, and what they merge to is scored. A merge method's name, a mapping
            such as {"method": "ties", "density": 0.5}, or a function of a list of state dicts.
        model: a module whose parameters take the values of each trial in turn, and in the end those of the best; also
            where the run is interrupted. It needs the memory of one model; without it a dict of tensors does.
        final_score: taken once, at the end, of the chosen model, on examples that `score` has not seen.
        state: a directory for `history.jsonl`. A run that finds its own there goes on where it ended, to the same bits.
        members: "recipes" holds members as the numbers that they are made again from: the memory of the inputs and one
            model. "tensors" keeps their values, which saves computing. "auto": tensors where memory allows. Models
            read from files are always kept, in the memory that they were read into.
        exclude: regular expressions; tensors whose name one of them finds do not evolve.
        backend: of the ops: "auto", "cuda", "triton", "cpu" or "reference".
        progress: told after each generation.
        **options: the strategy's further settings, such as `period=40` of cade.

    Returns:
        The best model and how it was found.

    Raises:
        ArgumentError, ArgumentTypeError, CheckpointError: before any evaluation.
        EvaluationError: three evaluations in a row failed, or none succeeded.
        MergeError: the history cannot be written.

    Sources: Evolver, arXiv 2406.12208; SaDE, Qin, Huang, Suganthan 2009; CADE; see docs/evolve.md.
    """
    development, final = both(score, final_score)
    chosen = make(strategy, F, CR, options)
    _check(models, chosen, generations, seed, merger, members)
    inputs = gather(models, exclude)
    backends.resolve(backend, inputs.tensors[0][inputs.evolved[0]].device)
    merged, merger_name = None, None
    if merger is not None:
        based = None if base is None else load(base, "base")[1]
        merged, merger_name = mergers.make(merger, based, seed, backend)
    live = Live(inputs, model)
    kept = members == "tensors" or merged is not None or (members == "auto" and fits_in_memory(inputs, free_memory))
    about = {
        "what": "evolve",
        "strategy": chosen.name,
        "settings": settings(chosen),
        "generations": generations,
        "seed": seed,
        "merger": merger_name,
        "excluded": len(inputs.infos) - len(inputs.evolved),
        "models": [digest_of(inputs.infos, tensors)[0] for tensors in inputs.tensors] if state is not None else None,
    }
    with History(state, about) as history:
        run = _Run(
            inputs, chosen, generations, seed, development, live, merged, history, progress,
            Population(inputs, seed=seed, kept=kept, backend=backend),
        )  # fmt: skip
        return run.go(final)


def _check(models: Sequence[Model], strategy: Strategy, generations: int, seed: int, merger: Any, members: str) -> None:
    for name, value, low, high in (("generations", generations, 0, MOST_GENERATIONS), ("seed", seed, 0, (1 << 64) - 1)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ArgumentTypeError(f"{name} must be a whole number, not {value!r}.")
        if not low <= value <= high:
            raise ArgumentError(f"{name}={value} is out of range; give a number from {low} to {high}.")
    if members not in HOLDINGS:
        raise ArgumentError(f"members must be one of {', '.join(HOLDINGS)}, not {members!r}.")
    if merger is not None and strategy.name != "evolver":
        raise ArgumentError(f"{strategy.name} compares members' own scores, so it takes no merger; use evolver.")
    if merger is not None and members == "recipes":
        raise ArgumentError("a merger needs all members at once, so they cannot be recipes; use members='tensors'.")
    if isinstance(models, Sequence) and not isinstance(models, str):
        least, why = strategy.least_members()
        if len(models) < least:
            raise ArgumentError(f"{len(models)} models are too few: {why}, so list {least} at least.")
        if len(models) > MOST_MEMBERS:
            raise ArgumentError(f"{len(models)} models are too many; list {MOST_MEMBERS} at most.")


class _Run:
    """One run: scores, acceptances, and the records of both."""

    def __init__(
        self,
        inputs: Members,
        strategy: Strategy,
        generations: int,
        seed: int,
        development: DevelopmentScore,
        live: Live,
        merger: mergers.Merger | None,
        history: History,
        progress: Callable[[GenerationReport], None] | None,
        population: Population,
    ) -> None:
        self.inputs = inputs
        self.strategy = strategy
        self.generations = generations
        self.seed = seed
        self.development = development
        self.live = live
        self.merger = merger
        self.history = history
        self.progress = progress
        self.population = population
        self.count = len(inputs.tensors)
        # Of each member, or with a merger of what they merge to; -inf where the evaluation failed.
        self.scores = [-math.inf] * (1 if merger else self.count)
        self.evaluations = self.failures = self.resumed = 0
        self.best_of_generation: list[float | None] = []
        # With a merger, a trial waits here while the live tensors hold what all members merge to.
        self.scratch = self._scratch() if merger else {}

    def go(self, final: FinalScore | None) -> EvolveReport:
        """All generations, the choice, and the final score. A module holds the best so far, however this ends."""
        try:
            self._first_generation()
            first = _finite(max(self.scores))
            for step in range(self.generations):
                self._generation(step)
        except BaseException:
            if isinstance(self.live.subject, torch.nn.Module) and math.isfinite(max(self.scores)):
                if self.population.whole:
                    self._show_best()
                else:
                    _log.warning("The module holds the last trial, not the best member, which was being computed.")
            raise
        if not math.isfinite(max(self.scores)):
            raise EvaluationError(
                "no evaluation has succeeded, so there is no best model; see the history for the reasons."
            )
        best = self._show_best()
        score, error = self._final(final)
        state: dict[str, Tensor] = {}
        for name in self.inputs.infos:
            home = self.inputs.aliases.get(name, name)
            state[name] = self.live.tensors[home]
        return EvolveReport(
            state=state,
            score=_finite(max(self.scores)),
            first_score=first,
            final=score,
            final_error=error,
            best_member=None if self.merger else best,
            scores=self.best_of_generation,
            evaluations=self.evaluations,
            failures=self.failures,
            resumed=self.resumed,
            digest=digest_of(self.inputs.infos, state)[0],
            history=self.history.records,
            held="tensors" if self.population.kept else "recipes",
        )

    # -- generations

    def _first_generation(self) -> None:
        for member in range(len(self.scores)):
            what = {"generation": 0} if self.merger else {"generation": 0, "member": member}

            def show(member: int = member) -> None:
                if self.merger is None:
                    self.population.write(member, self.live.tensors)
                else:
                    self._show_merged(None, 0)

            name = "what the input models merge to" if self.merger else self.inputs.refs[member]
            self.scores[member] = self._score(what, show, name)
        self._end_generation(0, 0)

    def _generation(self, step: int) -> None:
        generation, accepted = step + 1, 0
        order = range(self.count)
        if self.merger:
            # As in the authors' code: whoever comes first profits from nobody, so the order is drawn anew.
            order = Draws(self.seed, generation).distinct(self.count, order)  # type: ignore[assignment]
        for member in order:
            draws = Draws(self.seed, generation, member)
            known = None if self.merger else self.scores
            trial = self.strategy.trial(member, self.count, step, self.generations, known, draws)
            slots = self.population.slots
            forced = self.inputs.element(draws.below(self.inputs.evolved_elements)) if trial.forced else None
            recipe = Recipe(
                trial.kind, slots[member], tuple(slots[other] for other in trial.others), trial.factors,
                trial.crossover, generation, member, forced, trial.variant,
            )  # fmt: skip

            def show(recipe: Recipe = recipe) -> None:
                if self.merger is None:
                    self.population.write(recipe, self.live.tensors)
                else:
                    self.population.write(recipe, self.scratch)
                    self._show_merged(self.scratch, recipe.member)

            score = self._score(recipe.to_dict(), show, f"member {member} in generation {generation}")
            at = 0 if self.merger else member
            success = score > self.scores[at] or (
                self.strategy.equal_replaces and score == self.scores[at] and math.isfinite(score)
            )
            if success:
                self.scores[at] = score
                self.population.accept(recipe)
                accepted += 1
            self.strategy.learn(step, trial, success)
        self._end_generation(generation, accepted)

    def _end_generation(self, generation: int, accepted: int) -> None:
        best = _finite(max(self.scores))
        self.best_of_generation.append(best)
        finite = [score for score in self.scores if math.isfinite(score)]
        failed = self.failures - self._failed_before
        self._failed_before = self.failures
        what = {
            "generation": generation,
            "best": best,
            "scores": [_finite(score) for score in self.scores],
            "accepted": accepted,
        }
        told = self.history.told("generation", what)
        if told is None:
            self.history.add("generation", what)
            self.history.flush()
        if self.progress is not None:
            mean = math.fsum(finite) / len(finite) if finite else None
            self.progress(
                GenerationReport(
                    generation, self.generations, best, mean, accepted, failed, self.evaluations, told is not None
                )
            )

    _failed_before = 0

    # -- scores

    def _score(self, what: dict[str, Any], show: Callable[[], None], name: str) -> float:
        """The score of what `show` puts into the live tensors, from the history if it is there; -inf if it failed."""
        told = self.history.told("evaluation", what)
        self.evaluations += 1
        if told is not None:
            score, error = told.get("score"), told.get("error", "")
            self.resumed += 1
        else:
            score, error = self._measured(show, what["generation"])
            self.history.add("evaluation", {**what, "score": score, **({"error": error} if error else {})})
        self.failures += bool(error)
        self.development.count(error, name)
        return -math.inf if score is None else float(score)

    def _measured(self, show: Callable[[], None], generation: int) -> tuple[float | None, str]:
        try:
            show()
        except MergeError as error:
            # What the input models merge to is the user's matter; later, a trial that cannot be merged is a bad one.
            if generation == 0:
                raise
            return None, " ".join(str(error).split())
        return self.development.measure(self.live.subject)

    def _show_best(self) -> int:
        """Put the best member, or what all members merge to, into the live tensors."""
        best = max(range(len(self.scores)), key=lambda member: (self.scores[member], -member))
        if self.merger is None:
            self.population.write(best, self.live.tensors)
        else:
            self._show_merged(None, 0)
        return best

    def _final(self, final: FinalScore | None) -> tuple[float | None, str]:
        if final is None:
            return None, ""
        told = self.history.told("final", {})
        if told is not None:
            return told["score"], told.get("error", "")
        score, error = final.measure_once(self.live.subject)
        # Whatever it has done to the live tensors.
        self._show_best()
        self.history.add("final", {"score": score, **({"error": error} if error else {})})
        self.history.flush()
        return score, error

    # -- merging

    def _scratch(self) -> dict[str, Tensor]:
        first = self.inputs.tensors[0]
        return {name: torch.empty_like(first[name]) for name in self.inputs.evolved}

    def _show_merged(self, trial: Mapping[str, Tensor] | None, member: int) -> None:
        """Merge all members, the one of this number replaced by the trial, into the live tensors."""
        assert self.merger is not None
        everyone: list[Mapping[str, Tensor]] = []
        for number in range(self.count):
            values = self.population.values(number)
            replaced = {**values, **trial} if trial is not None and number == member else values
            everyone.append(replaced | {name: replaced[home] for name, home in self.inputs.aliases.items()})
        merged = self.merger(everyone)
        for name, tensor in self.live.tensors.items():
            tensor.copy_(merged[name])


def _finite(score: float) -> float | None:
    return score if math.isfinite(score) else None
