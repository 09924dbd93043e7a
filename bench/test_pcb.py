"""PCB-Merging: whole merges, the merge of a chunk, and the sweeps that find the thresholds, each checked by sorting."""

from __future__ import annotations

from collections.abc import Callable

import independent
import numpy as np
import pytest
import torch
from adversarial import DTYPES, KINDS, values

from fastmerge import ops

BACKENDS = ["cpu", "reference"]
VARIANTS = ["script", "nlp", "vision", "vision_es"]
CLIPPED = {"script": 1e-4, "nlp": 1e-2, "vision": 1e-2, "vision_es": 1e-2}
DENSITY = 0.1
ROWS = 3


def rows_of(kind: str, dtype: torch.dtype, size: int) -> list[torch.Tensor]:
    """Deltas of this kind, no larger than deltas are."""
    scale = 1.0 if kind in ("denormals", "bf16_deltas") else 1e-2
    return [values(kind, dtype, size, seed=i + 1).mul_(scale * (-1) ** i) for i in range(ROWS)]


def at(values: np.ndarray, place: float) -> np.float32:
    """An order statistic at a truncated place."""
    index = min(max(int(place), 0), values.size - 1)
    return np.partition(values, index)[index]


def clip_bounds(rows: list[np.ndarray], variant: str) -> np.ndarray:
    """The magnitudes that each row is clipped to, float32[n, 2]."""
    q = CLIPPED[variant]
    return np.array([[at(np.abs(x), x.size * q), at(np.abs(x), x.size * (1 - q) - 1)] for x in rows])


def rounded(function: Callable[[np.ndarray], np.ndarray], x: np.ndarray) -> np.ndarray:
    """A function of float32 values, computed in float64 and rounded once."""
    return function(x.astype(np.float64)).astype(np.float32)


def scores_of(rows: list[np.ndarray], clip: np.ndarray, variant: str) -> tuple[np.ndarray, np.ndarray]:
    """The scores and the clipped deltas of some columns, in float32 as it is promised: differences cancel alike."""
    t = np.stack(rows)
    n = np.float32(len(t))
    low, high = clip.T[:, :, None]
    a = np.clip(np.abs(t), low, high)
    width = high - low
    z = np.where(width == 0, np.float32(0), (a - low) / np.where(width == 0, np.float32(1), width))
    u = np.sign(t) * z
    if variant == "vision_es":
        inter = sum(rounded(np.tanh, u * x) for x in u)
    else:
        inter = rounded(np.tanh, t * sum(u if variant == "vision" else t))
    return rounded(np.exp, z * z * n - n / np.float32(2)) * inter, np.sign(t) * a


def few(size: int) -> np.ndarray:
    """Columns that are looked at one by one."""
    return np.unique(np.linspace(0, size - 1, 1 << 16).astype(np.int64))


def shares_of(b: np.ndarray, thresholds: torch.Tensor) -> np.ndarray:
    """S, float64."""
    start, most = thresholds.double().numpy().T[:, :, None]
    width = np.where(most > start, most - start, 1.0)
    return np.where(most > start, (np.clip(b, start, most) - start) / width, 0.0)


def wrong_merge(merged: torch.Tensor, rows: list[np.ndarray], rule: ops.PcbRule, variant: str) -> str | None:
    """Why `merged` is not the merge of these rows with this rule, or None."""
    columns = few(merged.numel())
    b, c = scores_of([x[columns] for x in rows], rule.clip.numpy(), variant)
    share = shares_of(b, rule.thresholds)
    c = c.astype(np.float64)
    total = np.maximum(share.sum(axis=0), 1e-12)
    value = (c * share).sum(axis=0) / total
    found = independent.as_float32(merged)[columns]
    precision = torch.finfo(merged.dtype).eps
    lost = 2.0**-148 * ROWS / total  # what products of denormals round off
    far = np.abs(found - value) > 1e-5 * np.abs(value).max() + precision * np.abs(value) + lost
    # Where hardly anything is kept, the last bit of a score decides whose value it is; that is within the rows' limits.
    edge = (share > 0).any(axis=0) & (share.max(axis=0) < 1e-5)
    edge |= (np.abs(b - rule.thresholds[:, :1].numpy()) <= 1e-5 * np.abs(b).max()).any(axis=0)
    outside = np.abs(found) > np.abs(c).max(axis=0) * (1 + precision) + lost
    count = int((far & ~edge).sum() + (outside & edge).sum())
    return f"{count} of {columns.size} values are wrong" if count else None


def wrong_rule(rule: ops.PcbRule, rows: list[torch.Tensor], variant: str, backend: str) -> str | None:
    """Why the bounds and thresholds are not those that sorting finds, or None."""
    flat = [independent.as_float32(x) for x in rows]
    if not np.array_equal(rule.clip.numpy(), clip_bounds(flat, variant)):
        return "the clip bounds are others"
    scores = ops.pcb_scores(None, rows, rule, backend=backend).numpy()
    expected = np.array([[at(b, b.size * (1 - DENSITY)), b.max()] for b in scores])
    if not np.array_equal(rule.thresholds.numpy(), expected):
        return f"thresholds {rule.thresholds.tolist()}, not {expected.tolist()}"
    columns = few(rows[0].numel())
    b, _ = scores_of([x[columns] for x in flat], rule.clip.numpy(), variant)
    off = np.abs(scores[:, columns] - b).max(axis=1) > 1e-5 * np.abs(b).max(axis=1)
    return f"the scores of {int(off.sum())} rows are wrong" if off.any() else None


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_pcb_merge(variant, kind, dtype, backend, size, measured):
    rows = rows_of(kind, DTYPES[dtype], size)
    flat = [independent.as_float32(x) for x in rows]
    rule = ops.pcb_rule(rows, density=DENSITY, variant=variant, backend=backend)
    problem = wrong_rule(rule, rows, variant, backend)
    out = torch.zeros(size, dtype=DTYPES[dtype])

    def run():
        return ops.pcb_merge(rows, density=DENSITY, variant=variant, out=out, backend=backend)

    def check(merged):
        return problem or wrong_merge(merged, flat, rule, variant)

    measured(run, check, ROWS * size, sum(x.nbytes for x in rows) + out.nbytes)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "bf16_deltas"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_pcb_apply(variant, kind, dtype, backend, size, measured):
    rows = rows_of(kind, DTYPES[dtype], size)
    flat = [independent.as_float32(x) for x in rows]
    rule = ops.pcb_rule(rows, density=DENSITY, variant=variant, backend=backend)
    out = torch.zeros(size, dtype=DTYPES[dtype])

    def run():
        return ops.pcb_apply(None, rows, [1.0] * ROWS, rule, out=out, backend=backend)

    measured(
        run,
        lambda merged: wrong_merge(merged, flat, rule, variant),
        ROWS * size,
        sum(x.nbytes for x in rows) + out.nbytes,
    )


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_pcb_histogram(kind, dtype, backend, size, measured):
    rows = rows_of(kind, DTYPES[dtype], size)
    rule = ops.PcbRule("vision_es", clip=ops.pcb_bounds(rows, variant="vision_es", backend=backend))
    scores = ops.pcb_scores(None, rows, rule, backend=backend).numpy()
    bits = scores.view(np.uint32)
    keys = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31)) >> 16
    expected = torch.from_numpy(np.stack([np.bincount(row, minlength=65536) for row in keys]))

    def check(counts):
        return None if torch.equal(counts, expected) else "counts are wrong"

    measured(
        lambda: ops.pcb_histogram(None, rows, rule, [-1] * ROWS, backend=backend),
        check,
        ROWS * size,
        sum(x.nbytes for x in rows),
    )


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_pcb_window(kind, dtype, backend, size, measured):
    rows = rows_of(kind, DTYPES[dtype], size)
    rule = ops.PcbRule("vision_es", clip=ops.pcb_bounds(rows, variant="vision_es", backend=backend))
    scores = ops.pcb_scores(None, rows, rule, backend=backend)
    width = 1 << 18
    place = min(int(size * (1 - DENSITY)), size - 1)
    keys = [ops.score_keys(row) for row in scores]
    expected = [int(key.kthvalue(place + 1).values) for key in keys]
    low = [max(0, key - width // 2) for key in expected]

    def run():
        counts, highest = torch.zeros(ROWS, width + 1, dtype=torch.int64), torch.zeros(ROWS, dtype=torch.int64)
        ops.pcb_window_(None, rows, rule, low, counts, highest, backend=backend)
        return counts, highest

    def check(result):
        counts, highest = result
        found = [ops.score_bound_in_window(row, start, size - place) for row, start in zip(counts, low, strict=True)]
        if highest.tolist() != [int(key.max()) for key in keys]:
            return "the highest keys are others"
        return None if found == expected else f"thresholds {found}, not {expected}"

    measured(run, check, ROWS * size, sum(x.nbytes for x in rows))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pcb_merge_of_the_paper(dtype, backend, size, measured):
    rows = rows_of("normal", DTYPES[dtype], size)
    t = np.stack([independent.as_float32(x) for x in rows]).astype(np.float64)
    b = np.zeros_like(t)
    for i in range(ROWS):
        for j in range(ROWS):
            p = t[i] * t[j]
            e = np.exp((p - p.min()) / (p.max() - p.min()))
            b[i] += e / e.mean()
    square = t * t
    a = np.exp(ROWS * (square - square.min(axis=1)[:, None]) / np.ptp(square, axis=1)[:, None])
    b *= a / a.mean(axis=1)[:, None]
    start = np.array([at(row, size * (1 - DENSITY)) for row in b])[:, None]
    share = np.where(b >= start, b, 0.0)
    total = share.sum(axis=0)
    expected = (t * share).sum(axis=0) / np.where(total == 0, 1.0, total)
    edge = (np.abs(b - start) <= 1e-5 * start).any(axis=0)
    out = torch.zeros(size, dtype=DTYPES[dtype])
    precision = torch.finfo(out.dtype).eps

    def check(merged):
        off = np.abs(independent.as_float32(merged) - expected)
        far = (off > 1e-5 * np.abs(expected).max() + precision * np.abs(expected)) & ~edge
        return f"{int(far.sum())} of {size} values are wrong" if far.any() or edge.mean() > 0.01 else None

    measured(
        lambda: ops.pcb_merge(rows, density=DENSITY, variant="paper", out=out, backend=backend),
        check,
        ROWS * size,
        sum(x.nbytes for x in rows) + out.nbytes,
    )
