"""Two searches on development text: Evolver among the fine-tunes' weights, and one for PCB-Merging's lambda.

Both score by the mean of the domains, on text that is neither trained on nor scored in the table. What they choose is
scored on the table's text once, after the search.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from demo import family, text
from demo.score import bits_per_byte
from demo.verdict import BASE, mean
from fastmerge import evolve

DEVELOPMENT = 4_000
"""Bytes of each domain's development text that a trial is scored on."""
PIECE = 500
"""They come in pieces of so many, from all over it: a few documents say little of the others."""
GENERATIONS = 3
LAMBDAS = (0.1, 1.3)
EVALUATIONS = 7
SEED = 0

Scores = dict[str, float]
Logits = Callable[[torch.Tensor], torch.Tensor]


def development(
    splits: Mapping[str, text.Split], size: int = DEVELOPMENT, piece: int = PIECE
) -> Callable[[torch.nn.Module], float]:
    """The development score of a model: the mean over the domains of its bits per byte, negative: higher is better."""
    samples = {domain: text.sample(split.development, size, piece=piece) for domain, split in splits.items()}

    def score(model: torch.nn.Module) -> float:
        return -mean({domain: bits_per_byte(_logits(model), sample) for domain, sample in samples.items()})

    return score


class Final:
    """The final score, which keeps those of the domains. It may be taken once."""

    def __init__(self, score: Callable[[Logits], Scores]) -> None:
        self.scores: Scores = {}
        self._score = score

    def __call__(self, model: torch.nn.Module) -> float:
        """The mean over the domains, negative."""
        self.scores = self._score(_logits(model))
        return -mean(self.scores)


def evolver(
    models: Path,
    splits: Mapping[str, text.Split],
    score: Callable[[Logits], Scores],
    *,
    generations: int = GENERATIONS,
    seed: int = SEED,
    merger: str | None = None,
    size: int = DEVELOPMENT,
    piece: int = PIECE,
) -> tuple[Scores, evolve.EvolveReport]:
    """Evolver on the fine-tunes; the scores of the best member, or of what all merge to, and what the search says."""
    final = Final(score)
    report = evolve.evolve(
        [models / domain for domain in text.DOMAINS],
        development(splits, size, piece),
        strategy="evolver",
        generations=generations,
        seed=seed,
        merger=merger,
        model=family.load(models / BASE).eval(),
        final_score=final,
    )
    return final.scores, report


def pcb(
    models: Path, splits: Mapping[str, text.Split], score: Callable[[Logits], Scores], *, density: float, variant: str
) -> tuple[Scores, evolve.SearchReport]:
    """PCB-Merging with the lambda that scores best; the scores of that merge, and what the search says."""
    final = Final(score)
    report = evolve.search(
        [models / domain for domain in text.DOMAINS],
        development(splits),
        base=models / BASE,
        method="pcb",
        density=density,
        variant=variant,
        weight=1.0,
        space={"lambda": LAMBDAS},
        sampler=Line(),
        evaluations=EVALUATIONS,
        model=family.load(models / BASE).eval(),
        final_score=final,
    )
    return final.scores, report


def told(report: evolve.EvolveReport | evolve.SearchReport) -> str:
    """How the best development score went, and what was found if it is a number."""
    which = f", lambda {report.parameters['lambda_']:g}" if isinstance(report, evolve.SearchReport) else ""
    first, last = (-score if score is not None else math.nan for score in (report.scores[0], report.scores[-1]))
    return f"{report.evaluations} evaluations on development text, the best from {first:.3f} to {last:.3f} bits{which}"


class Line:
    """A sampler of one coordinate: five places along the line, and then between the best one and those beside it."""

    name = "line"

    def __init__(self) -> None:
        self._known: dict[float, float] = {}

    def ask(self) -> list[list[float]]:
        """The places of the next batch, from 0 to 1."""
        if not self._known:
            return [[number / 4] for number in range(5)]
        places = sorted(self._known)
        best = places.index(max(places, key=lambda place: self._known[place]))
        beside = [places[other] for other in (best - 1, best + 1) if 0 <= other < len(places)]
        return [[(places[best] + other) / 2] for other in beside]

    def tell(self, points: list[list[float]], scores: list[float]) -> None:
        """What was found there."""
        self._known |= {point[0]: value for point, value in zip(points, scores, strict=True)}


def _logits(model: torch.nn.Module) -> Logits:
    return lambda codes: model(input_ids=codes).logits
