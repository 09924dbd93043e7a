"""The table of scores, and what must be true of it for the demo to have shown anything."""

import math
from collections.abc import Mapping

from demo.text import DOMAINS

BASE = "base"
HOME_GAIN = 0.08  # a fine-tune that gains less at home did not learn its domain, and its delta says nothing

Scores = Mapping[str, Mapping[str, float]]  # model -> domain -> bits per byte


def mean(scores: Mapping[str, float]) -> float:
    """The mean over the domains, each counting alike."""
    return sum(scores[domain] for domain in DOMAINS) / len(DOMAINS)


def failures(models: Scores, merges: Scores) -> list[str]:
    """Why the demo failed, a sentence each; none when every fine-tune gained at home and the best merge beats the base.

    ``models`` holds the base and the fine-tunes (named as their domains), ``merges`` the merged models.
    """
    found: list[str] = []
    base = models[BASE]
    for domain in DOMAINS:
        gain = 1 - models[domain][domain] / base[domain]
        if gain < HOME_GAIN:
            found.append(
                f"the {domain} fine-tune beats the base by {gain:.1%} on {domain} text; it must gain {HOME_GAIN:.0%}"
            )
    for name, scores in (*models.items(), *merges.items()):
        if not math.isfinite(mean(scores)):
            found.append(f"the scores of {name} are no finite numbers: {scores}")
    best = min(merges, key=lambda name: mean(merges[name]), default=None)
    if best is None:
        found.append("nothing was merged")
    elif mean(merges[best]) >= mean(base):
        found.append(
            f"the best merge, {best}, needs {mean(merges[best]):.3f} bits on the mean; the base needs {mean(base):.3f}"
        )
    return found


def table(models: Scores, merges: Scores) -> list[tuple[str, ...]]:
    """Rows of text: the header, the base, the fine-tunes, the merges. Scores bear their change from the base."""
    base = models[BASE]

    def row(name: str, scores: Mapping[str, float]) -> tuple[str, ...]:
        pairs = [(scores[domain], base[domain]) for domain in DOMAINS] + [(mean(scores), mean(base))]
        return (name, *(f"{score:.3f} {score / reference - 1:+6.1%}" for score, reference in pairs))

    header = ("bits per byte", *DOMAINS, "mean")
    return [header, *(row(*item) for item in models.items()), *(row(*item) for item in merges.items())]
