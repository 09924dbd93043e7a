"""PCB-Merging against its formulas written literally: in float64 on whole rows, and step by step on float32 scalars."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastmerge import ops
from fastmerge.backends import reference
from fastmerge.backends.rule import PcbRule
from fastmerge.reference import functions
from tests import strategies
from tests.numeric import assert_bitwise_equal

VARIANTS = ("script", "nlp", "vision", "vision_es", "paper")
Q = {"script": 1e-4, "nlp": 1e-2, "vision": 1e-2, "vision_es": 1e-2}
f32 = np.float32


# -- the formulas on whole rows, float64 ------------------------------------------------------------------------------


def at(ordered: np.ndarray, place: float) -> np.ndarray:
    """The order statistic of each row at a truncated place."""
    return ordered[:, [min(max(int(place), 0), ordered.shape[1] - 1)]]


def norm(x: np.ndarray) -> np.ndarray:
    """Each row from 0 to 1; a constant one is 0."""
    least, most = x.min(axis=-1, keepdims=True), x.max(axis=-1, keepdims=True)
    return np.where(most == least, 0.0, (x - least) / np.where(most == least, 1.0, most - least))


class Expected:
    """What the formulas give for rows [n, D]."""

    def __init__(self, rows: Tensor, variant: str, density: float, weights: list[float]) -> None:
        self.cancelled: np.ndarray | None = None
        t = rows.double().numpy()
        n, count = t.shape
        self.jumps = variant == "paper"
        if variant == "paper":
            self.value = t
            products = t[:, None] * t[None]
            intra = np.exp(n * norm(t * t))
            inter = np.exp(norm(products))
            share = inter / inter.mean(axis=2, keepdims=True)
            self.score = intra / intra.mean(axis=1, keepdims=True) * share.sum(axis=1)
            self.start = at(np.sort(self.score), count * (1 - density))
            self.scale = np.where((self.score >= self.start) & (density > 0), self.score, 0.0)
        else:
            magnitude = np.abs(t)
            ordered = np.sort(magnitude)
            a = np.clip(magnitude, at(ordered, count * Q[variant]), at(ordered, count * (1 - Q[variant]) - 1))
            z = norm(a)
            self.value, u = np.sign(t) * a, np.sign(t) * z
            if variant in ("script", "nlp"):
                inter = np.tanh(t * t.sum(axis=0))
            elif variant == "vision":
                inter = np.tanh(t * u.sum(axis=0))
            else:
                inter = np.tanh(u[:, None] * u[None]).sum(axis=1)
            self.score = np.exp(n * z**2) * inter
            if variant in ("script", "nlp", "vision"):
                # A float32 sum of terms that cancel is off by a part of the terms, not of itself.
                terms = u if variant == "vision" else t
                off = np.abs(t) * n * 2.0**-23 * np.abs(terms).sum(axis=0)
                least = np.maximum(np.abs(t * terms.sum(axis=0)) - off, 0)
                self.cancelled = np.exp(n * z**2) * np.minimum(off * (1 - np.tanh(least) ** 2), 2)
            self.start = at(np.sort(self.score), count * (1 - density))
            self.scale = norm(np.clip(self.score, self.start, self.score.max(axis=1, keepdims=True)))
        self.weighted = self.value * np.array(weights)[:, None]
        self.total = self.scale.sum(axis=0)
        self.merged = (self.weighted * self.scale).sum(axis=0) / np.where(self.total == 0, 1.0, self.total)

    def check(self, merged: Tensor, scale: Tensor, error: float) -> None:
        """`error`: how far a row's float32 scores may be off, as a fraction of the highest.

        So small a score may be kept or not. Where all of an element's are, so is the element's value within its limits.
        """
        if self.cancelled is not None:
            span = self.score.max(axis=1, keepdims=True) - self.start
            error += float((self.cancelled / np.where(span > 0, span, np.inf)).max())
        found, shares = merged.double().numpy(), scale.double().numpy()
        assert not np.isnan(found).any()
        assert not np.isnan(shares).any()
        most = self.scale.max(axis=1, keepdims=True)
        at_the_edge = np.zeros_like(self.score, dtype=bool)
        if self.jumps:
            at_the_edge = np.abs(self.score - self.start) <= error * np.abs(self.start)
        off = np.abs(shares - self.scale)
        assert (off <= error * most)[~at_the_edge].all()
        limit = np.abs(self.weighted).max(axis=0)
        sure = ~at_the_edge.any(axis=0) & ((self.total == 0) | (self.total > 100 * error * most.max()))
        slack = error * most.sum() * limit / np.where(self.total == 0, 1.0, self.total)
        allowed = np.where(sure, 1e-5 * limit.max(initial=0) + 4 * slack, limit * (1 + 1e-5))
        exact_zero = sure & (self.total == 0) & (shares == 0).all(axis=0)
        assert (np.abs(np.where(sure, found - self.merged, found)) <= allowed).all()
        assert (found[exact_zero] == 0).all()


def draw_rows(kind: str, n: int, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, count, generator=generator)
    if kind == "heavy":
        rows = rows**3
    elif kind == "alike":
        rows = rows * 0.3 + torch.randn(count, generator=generator)
    elif kind == "sparse":
        rows = rows * (torch.rand(n, count, generator=generator) < 0.2)
    elif kind == "tiny":
        rows = rows * 1e-3
    return rows


def merge_and_check(rows: Tensor, variant: str, density: float, weights: list[float], error: float) -> None:
    merged, scale = ops.pcb_merge(
        rows, density=density, variant=variant, weight=weights, return_scale=True, backend="reference"
    )
    Expected(rows, variant, density, weights).check(merged, scale, error)


@settings(max_examples=100)
@given(
    kind=st.sampled_from(("normal", "heavy", "alike", "sparse", "tiny")),
    variant=st.sampled_from(VARIANTS),
    n=st.sampled_from((1, 2, 3, 5, 8)),
    count=st.one_of(st.integers(50, 3000), st.integers(10001, 12000)),
    density=st.sampled_from((0.05, 0.1, 0.2, 0.5, 0.9)),
    seed=st.integers(0, 2**32 - 1),
)
def test_close_to_the_formulas_in_float64(
    kind: str, variant: str, n: int, count: int, density: float, seed: int
) -> None:
    weights = [1.0 + 0.25 * i for i in range(n)]
    merge_and_check(draw_rows(kind, n, count, seed), variant, density, weights, 1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("n", [16, 90])
def test_many_rows(variant: str, n: int) -> None:
    """exp(n) has left float32 with 89 rows; errors of z count n times."""
    merge_and_check(draw_rows("normal", n, 400, n), variant, 0.1, [1.2] * n, 1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("n", "density"), [*itertools.product((2, 3, 8, 16), (0.0, 0.1, 1.0)), (90, 0.1)])
def test_rows_with_nothing_to_tell_apart(variant: str, n: int, density: float) -> None:
    zeros = torch.zeros(n, 60)
    constant = torch.full((n, 60), 0.5)
    same = torch.randn(60, generator=torch.Generator().manual_seed(n)).expand(n, 60)
    one_dead = draw_rows("normal", n, 60, 7)
    one_dead[n // 2] = 0.0
    one_flat = draw_rows("normal", n, 60, 8)
    one_flat[0] = -0.25
    single = draw_rows("normal", n, 1, 9)
    pair = draw_rows("normal", n, 2, 10)
    for rows in (zeros, constant, same, one_dead, one_flat, single, pair):
        merge_and_check(rows, variant, density, [1.0] * n, 1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_density_zero_keeps_nothing(variant: str) -> None:
    rows = draw_rows("normal", 3, 500, 1)
    merged, scale = ops.pcb_merge(rows, density=0.0, variant=variant, return_scale=True, backend="reference")
    assert not merged.any()
    assert not scale.any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_row_has_its_own_density_and_weight(variant: str) -> None:
    rows = draw_rows("normal", 3, 2000, 2)
    densities, weights = [0.05, 0.5, 0.0], [1.0, 2.0, 3.0]
    merged, scale = ops.pcb_merge(
        rows, density=densities, weight=weights, variant=variant, return_scale=True, backend="reference"
    )
    for i, density in enumerate(densities):
        alike = ops.pcb_merge(rows, density=density, variant=variant, return_scale=True, backend="reference")[1]
        assert_bitwise_equal(scale[i], alike[i])
        # The element at the threshold is kept by "paper"; elsewhere its share is 0.
        place = ops.pcb_ranks(2000, density, variant)[2]
        assert int((scale[i] > 0).sum()) == (0 if density == 0 else 2000 - place - (variant != "paper"))
    only = (scale[0] > 0) & (scale[1] == 0)
    if variant == "paper":
        expected = rows[0]
    else:
        low, high = ops.pcb_bounds(rows, variant=variant)[0]
        expected = rows[0].sign() * rows[0].abs().clamp(low, high)
    assert torch.allclose(merged[only], expected[only], rtol=1e-6)


@pytest.mark.parametrize(("n", "most"), [(1, 0.5), (90, 45.0), (160, 80.0), (161, 80.0), (200, 80.0)])
def test_the_highest_scores_stay_within_float32(n: int, most: float) -> None:
    """With z = 1 and one rival, a score is e^(n - shift) times tanh 1."""
    assert ops.pcb_scores(
        None,
        [torch.tensor([2.0]), *[torch.zeros(1)] * (n - 1)],
        PcbRule("vision_es", clip=torch.tensor([[1.0, 2.0]] * n)),
        backend="reference",
    )[0].item() == pytest.approx(math.exp(most) * math.tanh(1), rel=1e-5)


# -- the order of operations, one float32 scalar at a time ------------------------------------------------------------


def apply_function(function: object, x: np.float32) -> np.float32:
    return f32(function(torch.tensor([float(x)], dtype=torch.float32)).item())  # type: ignore[operator]


def exp(x: np.float32) -> np.float32:
    return apply_function(functions.exp, x)


def tanh(x: np.float32) -> np.float32:
    return apply_function(functions.tanh, x)


def clip(x: np.float32, low: np.float32, high: np.float32) -> np.float32:
    return low if x < low else high if x > high else x


def scaled(x: np.float32, low: np.float32, high: np.float32) -> np.float32:
    width = high - low
    return f32(0) if width == 0 else (x - low) / width


def shift(n: int) -> np.float32:
    return f32(n / 2 if n <= 160 else n - 80)


def column_of_released(d: list[np.float32], variant: str, bounds: np.ndarray) -> tuple[list, list]:
    """b and c of one element of all rows."""
    n = len(d)
    a = [clip(abs(x), low, high) for x, (low, high) in zip(d, bounds)]
    z = [scaled(x, low, high) for x, (low, high) in zip(a, bounds)]
    g = [f32(1) if x > 0 else f32(-1) if x < 0 else f32(0) if x == 0 else x for x in d]
    u = [s * x for s, x in zip(g, z)]
    b = []
    for i in range(n):
        if variant == "vision_es":
            inter = tanh(u[i] * u[0])
            for j in range(1, n):
                inter = inter + tanh(u[i] * u[j])
        else:
            rivals = u if variant == "vision" else d
            together = rivals[0]
            for x in rivals[1:]:
                together = together + x
            if variant != "vision":
                together = clip(together, -np.finfo(f32).max, np.finfo(f32).max)
            inter = tanh(d[i] * together)
        b.append(exp((z[i] * z[i]) * f32(n) - shift(n)) * inter + f32(0))
    return b, [s * x for s, x in zip(g, a)]


def exponentials_of(d: list[np.float32], edges: np.ndarray) -> tuple[list, dict]:
    """A of each row and B of each pair, of one element."""
    n = len(d)
    half = np.finfo(f32).max / f32(2)
    spread = {}
    for (i, j), (low, high) in zip(itertools.combinations_with_replacement(range(n), 2), edges):
        spread[i, j] = spread[j, i] = scaled(clip(d[i] * d[j], -half, half), low, high)
    return [exp(spread[i, i] * f32(n) - shift(n)) for i in range(n)], {pair: exp(x) for pair, x in spread.items()}


def column_of_paper(d: list[np.float32], edges: np.ndarray, means: np.ndarray) -> tuple[list, list]:
    """b and the deltas of one element of all rows."""
    n = len(d)
    intra, inter = exponentials_of(d, edges)
    place = {}
    for number, (i, j) in enumerate(itertools.combinations_with_replacement(range(n), 2)):
        place[i, j] = place[j, i] = n + number
    b = []
    for i in range(n):
        rivalry = inter[i, 0] / means[place[i, 0]]
        for j in range(1, n):
            rivalry = rivalry + inter[i, j] / means[place[i, j]]
        b.append((intra[i] / means[i]) * rivalry + f32(0))
    return b, d


def merged_column(
    base: np.float32 | None, b: list, c: list, weights: list[float], thresholds: np.ndarray, paper: bool
) -> tuple[list, np.float32]:
    """S of each row and the merged value of one element."""
    shares = []
    for x, (start, most) in zip(b, thresholds):
        if paper:
            shares.append(x if x >= start else f32(0))
        else:
            shares.append((clip(x, start, most) - start) / (most - start) if most > start else f32(0))
    total = (c[0] * shares[0]) * f32(weights[0])
    divisor = shares[0]
    for x, s, w in zip(c[1:], shares[1:], weights[1:]):
        total, divisor = total + (x * s) * f32(w), divisor + s
    if paper:
        tau = f32(0) if divisor == 0 else total / divisor
    else:
        tau = total / (f32(1e-12) if divisor < f32(1e-12) else divisor)
    return shares, tau if base is None else base + tau


def canonical(values: object) -> Tensor:
    x = torch.from_numpy(np.array(values, dtype=f32))
    return torch.where(x.isnan(), torch.nan, x)


@settings(max_examples=60)
@given(st.data())
def test_every_step_is_one_float32_operation_in_the_order_that_is_written(data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from(((1,), (7,), (3, 4))))
    n = data.draw(st.integers(1, 4))
    tensors = [data.draw(strategies.tensors(shape=shape)) for _ in range(n)]
    base = data.draw(st.one_of(st.none(), strategies.tensors(shape=shape)))
    variant = data.draw(st.sampled_from(VARIANTS))
    rule = data.draw(strategies_of_rules(n, variant))
    weights = [data.draw(st.sampled_from((1.0, 0.3, -2.0, 0.0))) for _ in range(n)]

    start = None if base is None else base.float().reshape(-1).numpy()
    rows = [x.float().reshape(-1).numpy() for x in tensors]
    scores, shares, merged = [], [], []
    with np.errstate(all="ignore"):
        for k in range(rows[0].size):
            d = [x[k] if start is None else x[k] - start[k] for x in rows]
            if variant == "paper":
                b, c = column_of_paper(d, rule.extremes.numpy(), rule.means.numpy())
            else:
                b, c = column_of_released(d, variant, rule.clip.numpy())
            share, value = merged_column(
                None if start is None else start[k], b, c, weights, rule.thresholds.numpy(), variant == "paper"
            )
            scores.append(b)
            shares.append(share)
            merged.append(value)
    assert_bitwise_equal(reference.pcb_scores(base, tensors, rule), canonical(scores).T.contiguous())
    out, scale = torch.empty(shape), torch.empty(n, rows[0].size)
    reference.pcb_apply(base, tensors, rule, weights, out, scale)
    assert_bitwise_equal(scale, canonical(shares).T.contiguous())
    assert_bitwise_equal(out, canonical(merged).reshape(shape))


@st.composite
def strategies_of_rules(draw: st.DrawFn, n: int, variant: str) -> PcbRule:
    """Any numbers do as bounds, means and thresholds, in any order."""
    numbers = st.sampled_from((0.0, 0.25, 1.0, 1.5, 3.0, 1e-40, 1e30, math.inf, -0.5, math.nan))
    positive = st.sampled_from((0.5, 1.0, 2.5, 1e-20, 3e5))

    def table(count: int) -> Tensor:
        return torch.tensor([[draw(numbers), draw(numbers)] for _ in range(count)], dtype=torch.float32)

    pairs = n * (n + 1) // 2
    if variant != "paper":
        return PcbRule(variant, clip=table(n), thresholds=table(n))
    means = torch.tensor([draw(positive) for _ in range(n + pairs)])
    return PcbRule("paper", extremes=table(pairs), means=means, thresholds=table(n))


@settings(max_examples=60)
@given(st.data())
def test_extremes_and_sums_are_those_of_each_element(data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from(((0,), (1,), (9,), (3, 4))))
    n = data.draw(st.integers(1, 3))
    tensors = [data.draw(strategies.tensors(shape=shape)) for _ in range(n)]
    base = data.draw(st.one_of(st.none(), strategies.tensors(shape=shape)))
    edges = reference.pcb_extremes(base, tensors)
    sums = reference.pcb_sums(base, tensors, PcbRule("paper", extremes=edges))
    pairs = list(itertools.combinations_with_replacement(range(n), 2))
    start = None if base is None else base.float().reshape(-1).numpy()
    rows = [x.float().reshape(-1).numpy() for x in tensors]
    half = np.finfo(f32).max / f32(2)
    expected = [[math.inf, -math.inf] for _ in pairs]
    totals = [Fraction(0)] * (n + len(pairs))
    with np.errstate(all="ignore"):
        for k in range(rows[0].size):
            d = [x[k] if start is None else x[k] - start[k] for x in rows]
            for edge, (i, j) in zip(expected, pairs):
                p = float(clip(d[i] * d[j], -half, half))
                if p == p:
                    edge[:] = min(edge[0], p), max(edge[1], p)
            intra, inter = exponentials_of(d, edges.numpy())
            for place, x in enumerate([*intra, *(inter[pair] for pair in pairs)]):
                totals[place] += Fraction(float(x)) if math.isfinite(x) else 0
    assert torch.equal(edges, torch.tensor(expected, dtype=torch.float32))
    assert not (edges.signbit() & (edges == 0)).any()
    for limbs, total in zip(sums.tolist(), totals):
        assert sum(limb << 32 * place for place, limb in enumerate(limbs)) == total * 2**149


# -- keys -------------------------------------------------------------------------------------------------------------


@given(st.data())
def test_keys_order_as_scores_do(data: st.DataObject) -> None:
    scores = data.draw(strategies.tensors(shape=(data.draw(st.integers(1, 200)),), dtype=torch.float32)) + 0.0
    keys = ops.score_keys(scores)
    assert keys.dtype == torch.int64
    assert ((keys >= 0) & (keys < 1 << 32)).all()
    assert torch.equal(keys == 0, scores.isnan())
    values, known = scores.tolist(), keys.tolist()
    for a, b in itertools.combinations(range(min(len(values), 30)), 2):
        if values[a] == values[a] and values[b] == values[b]:
            assert (values[a] < values[b]) == (known[a] < known[b])
    back = torch.tensor([ops.score_of_key(key) for key in known], dtype=torch.float32)
    assert_bitwise_equal(back.nan_to_num(7.0), scores.contiguous().nan_to_num(7.0))


def test_keys_of_known_scores() -> None:
    scores = torch.tensor([-math.inf, -1.0, 0.0, 1.0, math.inf, math.nan])
    expected = [0x007FFFFF, 0x407FFFFF, 0x80000000, 0xBF800000, 0xFF800000, 0]
    assert ops.score_keys(scores).tolist() == expected


@given(numel=st.integers(1, 300), density=st.floats(0, 1), variant=st.sampled_from(VARIANTS), seed=st.integers(0, 99))
def test_thresholds_are_what_sorting_finds(numel: int, density: float, variant: str, seed: int) -> None:
    assume(density > 0)
    rows = draw_rows("normal", 2, numel, seed)
    rule = ops.pcb_rule(rows, density=density, variant=variant, backend="reference")
    ordered = ops.pcb_scores(None, list(rows), rule, backend="reference").numpy()
    ordered.sort(axis=1)
    place = min(max(int(numel * (1 - density)), 0), numel - 1)
    assert np.array_equal(rule.thresholds.numpy(), ordered[:, [place, numel - 1]])
    if variant != "paper":
        magnitudes = np.sort(np.abs(rows.numpy()), axis=1)
        q = Q[variant]
        places = [int(numel * q), max(0, int(numel * (1 - q) - 1))]
        assert np.array_equal(rule.clip.numpy(), magnitudes[:, places])
