"""A sweep from a config to a directory: each candidate merged and scored, a line each, a picture, the best model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from fastmerge import methods
from fastmerge.engine.atomic import replacing
from fastmerge.engine.config import place
from fastmerge.errors import ArgumentError, ConfigError, EvaluationError, MergeError
from fastmerge.evolve import live, objects
from fastmerge.evolve.evaluator import DevelopmentScore, FinalScore, both
from fastmerge.evolve.history import History
from fastmerge.evolve.population import free_memory
from fastmerge.merging import merge_checkpoints
from fastmerge.sizes import format_size
from fastmerge.sweep import picture
from fastmerge.sweep.candidates import CandidateMerges
from fastmerge.sweep.config import KEY, METHOD, SweepConfig, described

RESULTS = "results.jsonl"
PICTURE = "scores.png"
BEST = "best"
BEST_CONFIG = "best.yml"


@dataclass(frozen=True)
class Scored:
    """One candidate: its number from 1 on, its score or why it has none, and whether it was scored before."""

    number: int
    count: int
    candidate: dict[str, Any]
    score: float | None
    error: str
    resumed: bool

    def line(self) -> str:
        """One line for a person."""
        result = f"failed: {self.error}" if self.score is None else f"{self.score:.6g}"
        again = " (scored before)" if self.resumed else ""
        return f"candidate {self.number} of {self.count}: {described(self.candidate)}: {result}{again}"


class Sweep:
    """A sweep that can be carried out: everything that headers tell is checked.

    Raises ConfigError, CheckpointError, ArgumentError: a candidate that cannot be merged, models that do not fit.
    """

    def __init__(self, config: SweepConfig, *, numerics: str = "fp32", backend: str | None = "auto") -> None:
        self.config, self.numerics, self.backend = config, numerics, backend
        _check_names(config)
        self.merges = CandidateMerges(config.merges, numerics=numerics, seed=config.seed, backend=backend)

    def plan(self) -> dict[str, Any]:
        """What `--dry-run` tells: the candidates, what is read, and how much memory that takes."""
        memory = self.merges.input_bytes + self.merges.output_bytes
        return {
            "candidates": self.config.candidates,
            "models": self.merges.refs,
            "bytes_read": self.merges.input_bytes,
            "memory": memory,
            "memory_free": free_memory(torch.device("cpu")),
            "notes": self.merges.notes,
        }

    def plan_lines(self) -> list[str]:
        """The same for a person."""
        said = self.plan()
        free = said["memory_free"]
        return [
            *(f"candidate {number:<4} {described(one)}" for number, one in enumerate(self.config.candidates, 1)),
            f"to read        {format_size(said['bytes_read'])}, once for all {len(self.config.candidates)}",
            f"memory         {format_size(said['memory'], binary=True)}: the models and one result"
            + ("" if free is None else f"; {format_size(free, binary=True)} are free"),
            *(f"note           {note}" for note in said["notes"]),
        ]

    def run(
        self,
        out: Path,
        *,
        write_best: bool = False,
        shard_size: str | int = "5GB",
        tell: Callable[[Scored], None] | None = None,
    ) -> dict[str, Any]:
        """Score every candidate that is not scored yet, in the directory `out`; returns the report as plain values.

        Raises EvaluationError: three candidates in a row failed, or all did.
        """
        config = self.config
        about = {
            "what": KEY,
            "merge": config.merge,
            "candidates": config.candidates,
            "score": config.score,
            "model": config.model,
            "seed": config.seed,
            "numerics": self.numerics,
            "models": self.merges.identities,
        }
        with objects.importable(config.folder):
            # What cannot be imported is told before anything is made.
            first = self.merges.refs[0]
            final = None if config.final is None else objects.score(config.final, first)
            scores = both(objects.score(config.score, first), final)
            objects.check_model(config.model)
            with History(out, about, RESULTS) as history:
                run = _Run(self, history, *scores, tell)
                run.go()
                report = run.report()
        notes = [*self.merges.notes, *_drawn(config, report["scores"], out / PICTURE)]
        best = report["best"]
        text = yaml.safe_dump(config.contents[best], sort_keys=False, allow_unicode=True)
        with replacing(out / BEST_CONFIG) as beside:
            beside.write_text(text, encoding="utf-8")
        if write_best:
            merged = merge_checkpoints(
                config.contents[best], out / BEST, device="cpu", seed=config.seed, numerics=self.numerics,
                shard_size=shard_size, backend=self.backend,
            )  # fmt: skip
            report |= {"digest": merged.digest, "written": str(out / BEST)}
        return report | {"out": str(out), "notes": notes}


class _Run:
    """One run: candidates that were scored are told from the results, the others merged and scored."""

    def __init__(
        self,
        sweep: Sweep,
        history: History,
        development: DevelopmentScore,
        final: FinalScore | None,
        tell: Callable[[Scored], None] | None,
    ) -> None:
        self.sweep, self.config, self.history, self.tell = sweep, sweep.config, history, tell
        self.development, self.final = development, final
        self.merge: Callable[[int], Any] | None = None
        self.model: Any = None
        self.scores: list[float | None] = []
        self.errors: list[str] = []
        self.resumed = 0
        self.final_score: tuple[float | None, str] = (None, "")

    def go(self) -> None:
        """All candidates, and the final score of the best."""
        for number, candidate in enumerate(self.config.candidates):
            self._one(number, candidate)
        if all(score is None for score in self.scores):
            raise EvaluationError(f"no candidate has a score; the last one failed: {self.errors[-1].rstrip('.')}.")
        if self.final is None:
            return
        told = self.history.told("final", {"candidate": self.best})
        if told is None:
            score, error = self.final.measure_once(self._subject(self.best))
            told = {"candidate": self.best, "score": score, **({"error": error} if error else {})}
            self.history.add("final", told)
        self.final_score = told["score"], told.get("error", "")

    @property
    def best(self) -> int:
        """The candidate with the best score; of equals the first."""
        return max(range(len(self.scores)), key=lambda number: (_or_least(self.scores[number]), -number))

    def _one(self, number: int, candidate: dict[str, Any]) -> None:
        what = {"number": number + 1, "candidate": candidate}
        told = self.history.told("candidate", what)
        self.resumed += told is not None
        if told is None:
            score, error = self._measured(number)
            self.history.add("candidate", {**what, "score": score, **({"error": error} if error else {})})
            self.history.flush()
        else:
            score, error = told["score"], told.get("error", "")
        self.scores.append(score)
        self.errors.append(error)
        if self.tell is not None:
            self.tell(Scored(number + 1, len(self.config.candidates), candidate, score, error, told is not None))
        self.development.count(error, f"candidate {number + 1} ({described(candidate)})")

    def _measured(self, number: int) -> tuple[float | None, str]:
        try:
            subject = self._subject(number)
        except MergeError as failed:
            return None, " ".join(str(failed).split())
        return self.development.measure(subject)

    def _subject(self, number: int) -> Any:
        if self.merge is None:
            # Nothing is read before something must be merged: a sweep that is finished only tells.
            self.model = objects.live_model(self.config.model, self.sweep.merges.refs[0])
            self.merge = self.sweep.merges.load(range(len(self.scores) if self.final is None else 0, self._count))
        return live.subject(self.model, self.merge(number))

    @property
    def _count(self) -> int:
        return len(self.config.candidates)

    def report(self) -> dict[str, Any]:
        """What was found, as plain values."""
        final, error = self.final_score
        return {
            "candidates": self.config.candidates,
            "scores": self.scores,
            "errors": self.errors,
            "best": self.best,
            "score": self.scores[self.best],
            "final": final,
            "final_error": error,
            "resumed": self.resumed,
            "failures": sum(score is None for score in self.scores),
        }


def _or_least(score: float | None) -> float:
    return float("-inf") if score is None else score


def _drawn(config: SweepConfig, scores: Sequence[float | None], path: Path) -> list[str]:
    with replacing(path) as beside:
        reason = picture.draw(config.candidates, scores, beside)
    return [] if reason is None else [reason]


def _check_names(config: SweepConfig) -> None:
    """Refuse parameters that a candidate's method does not have, or has once for all models."""
    for number, (candidate, merge) in enumerate(zip(config.candidates, config.merges, strict=True)):
        try:
            method = methods.get(merge.merge_method).name
        except ArgumentError as error:
            raise ConfigError(f"{merge.where(('merge_method',))}: {error}") from None
        known = methods.parameters(method)
        for name, value in candidate.items():
            where = f"{place(config.name, config.lines, config.places[number][name])}: candidate {number + 1}"
            if name == METHOD:
                continue
            if name not in known:
                raise ConfigError(f"{where}: {methods.explain_unknown_parameter(name, method)}")
            if isinstance(value, list) and not known[name].per_model:
                raise ConfigError(f"{where}: {name} is one number for all models with {method}, not a list; write one.")
