"""The PCB kernels against the reference, bit for bit; chunks against the whole; errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastmerge import backends, ops
from fastmerge.backends.rule import PcbRule
from fastmerge.errors import ArgumentError, ArgumentTypeError, FastmergeError
from tests import strategies
from tests.numeric import assert_bitwise_equal, poison_
from tests.ops.running import FAST, configurations, each_backend, only

VARIANTS = ("script", "nlp", "vision", "vision_es", "paper")
each_working_backend = pytest.mark.parametrize("backend", ["reference", *FAST])
each_variant = pytest.mark.parametrize("variant", VARIANTS)


# -- equal bits -------------------------------------------------------------------------------------------------------


numbers = st.sampled_from((0.0, 0.25, 1.0, 1.5, 3.0, 1e-40, 1e30, math.inf, -0.5, math.nan))
positive = st.sampled_from((0.5, 1.0, 2.5, 1e-20, 3e5))


@st.composite
def rules(draw: st.DrawFn, given_models: strategies.Models, variants: tuple[str, ...] = VARIANTS) -> PcbRule:
    """Mostly what the sweeps over these models find; sometimes any numbers in any order."""
    variant = draw(st.sampled_from(variants))
    n = len(given_models.tensors)
    pairs = n * (n + 1) // 2
    if given_models.numel and draw(st.integers(0, 3)):
        return ops.pcb_rule(
            [x.reshape(-1) for x in given_models.tensors],
            base=None if given_models.base is None else given_models.base.reshape(-1),
            density=draw(st.sampled_from((0.1, 0.5, 0.0, 1.0))),
            variant=variant,
            backend="reference",
        )

    def table(count: int) -> Tensor:
        return torch.tensor([[draw(numbers), draw(numbers)] for _ in range(count)], dtype=torch.float32)

    if variant != "paper":
        return PcbRule(variant, clip=table(n), thresholds=table(n))
    means = torch.tensor([draw(positive) for _ in range(n + pairs)])
    return PcbRule("paper", extremes=table(pairs), means=means, thresholds=table(n))


@each_backend
@given(data=st.data())
def test_pcb_scores(backend: str, data: st.DataObject) -> None:
    data.draw(configurations(backend))
    models = data.draw(strategies.models(blocks=False))
    rule = data.draw(rules(models))
    expected = ops.pcb_scores(models.base, models.tensors, rule, backend="reference")
    with only(backend, "pcb_scores"):
        actual = ops.pcb_scores(models.base, models.tensors, rule, backend=backend)
    assert_bitwise_equal(actual, expected)


@each_backend
@pytest.mark.parametrize("variant", VARIANTS[:-1])
@pytest.mark.parametrize(
    "bounds", [(math.inf, math.inf), (0.0, math.inf), (math.nan, 1.0), (0.5, 0.5), (2.0, 1.0), (0.0, 1.0)]
)
def test_scores_of_special_numbers_between_special_bounds(
    backend: str, variant: str, bounds: tuple[float, float]
) -> None:
    """No numbers, equal ones, and bounds out of order, of which the lower wins; a NaN has no sign, even in a z of 0; a
    score that is too small for a number is +0, whatever its sign."""
    one = [0.0, -0.0, 1.0, math.inf, math.nan, 1.5, -1.5, 1e-30]
    other = [0.0, 2.0, -0.0, 1.0, 0.5, math.nan, 0.25, -1.4e-15]
    rows = [torch.tensor(one), torch.tensor(other)]
    rule = PcbRule(variant, clip=torch.tensor([bounds, (0.0, 1.0)]))  # type: ignore[arg-type]
    expected = ops.pcb_scores(None, rows, rule, backend="reference")
    with only(backend, "pcb_scores"):
        assert_bitwise_equal(ops.pcb_scores(None, rows, rule, backend=backend), expected)


@each_backend
@settings(max_examples=120)
@given(data=st.data())
def test_pcb_window(backend: str, data: st.DataObject) -> None:
    data.draw(configurations(backend))
    models = data.draw(strategies.models(most=3, blocks=False))
    rule = data.draw(rules(models))
    count = len(models.tensors)
    scores = ops.pcb_scores(models.base, models.tensors, rule, backend="reference").reshape(-1)
    width = data.draw(st.sampled_from((1, 2, 1000, 1 << 20)))
    low = []
    for _ in range(count):
        key = 0
        if scores.numel():
            key = int(ops.score_keys(scores[data.draw(st.integers(0, scores.numel() - 1))]))
        near = key - data.draw(st.integers(-1, width))
        low.append(min(max(data.draw(st.sampled_from((near, near, near, 0, 1 << 31, 1 << 32))), 0), 1 << 32))
    start = data.draw(st.sampled_from((0, 1 << 31, (1 << 32) - 1)))
    expected = torch.full((count, width + 1), 3), torch.full((count,), start)
    ops.pcb_window_(models.base, models.tensors, rule, low, *expected, backend="reference")
    actual = torch.full((count, width + 1), 3), torch.full((count,), start)
    with only(backend, "pcb_window_"):
        ops.pcb_window_(models.base, models.tensors, rule, low, *actual, backend=backend)
    assert_bitwise_equal(actual[0], expected[0])
    assert_bitwise_equal(actual[1], expected[1])


@each_backend
@settings(max_examples=120)
@given(data=st.data())
def test_pcb_histogram(backend: str, data: st.DataObject) -> None:
    data.draw(configurations(backend))
    models = data.draw(strategies.models(most=3, blocks=False))
    rule = data.draw(rules(models))
    count = len(models.tensors)
    level0 = ops.pcb_histogram(models.base, models.tensors, rule, [-1] * count, backend="reference")
    prefix = [-1] * count
    if models.numel:
        ranks = [data.draw(st.integers(1, models.numel)) for _ in range(count)]
        found = [ops.score_prefix(row, k) for row, k in zip(level0, ranks)]
        prefix = [data.draw(st.sampled_from((-1, p, p, 0, 65535))) for p in found]
    expected = ops.pcb_histogram(models.base, models.tensors, rule, prefix, backend="reference")
    with only(backend, "pcb_histogram"):
        actual = ops.pcb_histogram(models.base, models.tensors, rule, prefix, backend=backend)
    assert_bitwise_equal(actual, expected)


@each_backend
@given(data=st.data())
def test_pcb_extremes(backend: str, data: st.DataObject) -> None:
    data.draw(configurations(backend))
    models = data.draw(strategies.models(blocks=False))
    expected = ops.pcb_extremes(models.base, models.tensors, backend="reference")
    with only(backend, "pcb_extremes"):
        actual = ops.pcb_extremes(models.base, models.tensors, backend=backend)
    assert_bitwise_equal(actual, expected)


@each_backend
@each_variant
def test_rows_of_several_blocks(variant: str, backend: str) -> None:
    """Drawn rows are short, for the reference is slow; these are cut among threads and end within a block."""
    generator = torch.Generator().manual_seed(1)
    size = (1 if backend == "triton" else 2) * 65536 + 4099
    base = torch.randn(size, generator=generator).to(torch.bfloat16)
    tensors = [(base + 0.02 * torch.randn(size, generator=generator)).to(torch.bfloat16) for _ in range(3)]
    rule = ops.pcb_rule(tensors, base=base, variant=variant, density=0.3, backend="reference")

    def found(by: str) -> list[Tensor]:
        counts, highest = torch.zeros(3, 4097, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
        assert rule.thresholds is not None
        low = [int(key) - 2048 for key in ops.score_keys(rule.thresholds[:, 0].contiguous())]
        ops.pcb_window_(base, tensors, rule, low, counts, highest, backend=by)
        scale = torch.empty(3, size)
        return [
            ops.pcb_scores(base, tensors, rule, backend=by),
            ops.pcb_histogram(base, tensors, rule, [-1, low[1] >> 16, -1], backend=by),
            ops.pcb_extremes(base, tensors, backend=by),
            *([ops.pcb_sums(base, tensors, rule, backend=by)] if variant == "paper" else []),
            ops.pcb_apply(base, tensors, [1.0, 0.5, 2.0], rule, scale=scale, backend=by),
            counts,
            highest,
            scale,
        ]

    for actual, expected in zip(found(backend), found("reference"), strict=True):
        assert_bitwise_equal(actual, expected)


@each_backend
@given(data=st.data())
def test_pcb_sums(backend: str, data: st.DataObject) -> None:
    data.draw(configurations(backend))
    models = data.draw(strategies.models(blocks=False))
    rule = data.draw(rules(models, ("paper",)))
    expected = ops.pcb_sums(models.base, models.tensors, rule, backend="reference")
    with only(backend, "pcb_sums"):
        actual = ops.pcb_sums(models.base, models.tensors, rule, backend=backend)
    assert_bitwise_equal(actual, expected)


@each_backend
@given(data=st.data())
def test_pcb_apply(backend: str, data: st.DataObject) -> None:
    data.draw(configurations(backend))
    models = data.draw(strategies.models(blocks=False))
    rule = data.draw(rules(models))
    count = len(models.tensors)
    weights = [data.draw(st.sampled_from((1.0, 0.3, -1.2, 0.0, 1e-30, 1e38))) for _ in range(count)]
    out_dtype = data.draw(strategies.dtypes)
    shape = models.tensors[0].shape
    scale = poison_(torch.empty(count, models.numel))
    expected_scale = scale.clone()
    expected = poison_(torch.empty(shape, dtype=out_dtype))
    given_models = models.base, models.tensors, weights, rule
    ops.pcb_apply(*given_models, out=expected, scale=expected_scale, backend="reference")
    shift = data.draw(st.integers(0, 5))
    guarded = poison_(torch.empty(models.numel + shift + 3, dtype=out_dtype))
    untouched = guarded.clone()
    out = guarded[shift : shift + models.numel].view(shape)
    wants_scale = data.draw(st.booleans())
    with only(backend, "pcb_apply"):
        returned = ops.pcb_apply(*given_models, out=out, scale=scale if wants_scale else None, backend=backend)
    assert returned is out
    assert_bitwise_equal(out, expected)
    if wants_scale:
        assert_bitwise_equal(scale, expected_scale)
    untouched[shift : shift + models.numel] = out.reshape(-1)
    assert_bitwise_equal(guarded, untouched)


@each_backend
@each_variant
def test_weights_multiply_last_and_shares_of_nan_carry_nothing(variant: str, backend: str) -> None:
    rows = list(torch.randn(2, 300, generator=torch.Generator().manual_seed(4)))
    rule = ops.pcb_rule(rows, density=0.5, variant=variant, backend="reference")
    rows[0][3:6] = torch.tensor([0x7FC00005, -0x3FFFFF, 0x7F800001], dtype=torch.int32).view(torch.float32)
    scale, expected_scale = torch.empty(2, 2, 300)
    expected = ops.pcb_apply(None, rows, [0.3, -1.1], rule, scale=expected_scale, backend="reference")
    with only(backend, "pcb_apply"):
        actual = ops.pcb_apply(None, rows, [0.3, -1.1], rule, scale=scale, backend=backend)
    assert actual.dtype == torch.float32
    assert_bitwise_equal(actual, expected)
    assert_bitwise_equal(scale, expected_scale)


@each_backend
@each_variant
@pytest.mark.parametrize("n", [8, 16, 90])
def test_many_rows(variant: str, n: int, backend: str) -> None:
    if backend == "triton":
        n = min(n, 12)  # pairs of rows take the interpreter minutes; beyond eight, a loop has them all
    generator = torch.Generator().manual_seed(n)
    size = 777 if n < 90 else 260
    rows = [torch.randn(size, generator=generator).to(strategies.DTYPES[i % 3]) for i in range(n)]
    rule = ops.pcb_rule(rows, variant=variant, backend="reference")
    counts = [ops.pcb_histogram(None, rows, rule, [-1] * n, backend=b) for b in ("reference", backend)]
    assert_bitwise_equal(counts[1], counts[0])
    merged = [ops.pcb_merge(rows, variant=variant, return_scale=True, backend=b) for b in ("reference", backend)]
    assert_bitwise_equal(merged[1][0], merged[0][0])
    assert_bitwise_equal(merged[1][1], merged[0][1])


@each_backend
@settings(max_examples=60)
@given(data=st.data())
def test_pcb_merge(backend: str, data: st.DataObject) -> None:
    data.draw(configurations(backend))
    models = data.draw(strategies.models(blocks=False))
    count = len(models.tensors)
    arguments = {
        "variant": data.draw(st.sampled_from(VARIANTS)),
        "density": [data.draw(strategies.densities) for _ in range(count)],
        "weight": [data.draw(st.sampled_from((1.0, 1.2, -0.5, 0.0))) for _ in range(count)],
        "return_scale": True,
    }
    expected = ops.pcb_merge(models.tensors, **arguments, backend="reference")
    with only(backend, "pcb_apply") if models.numel else patch.object(ops, "pcb_apply"):
        actual = ops.pcb_merge(models.tensors, **arguments, backend=backend)
    assert_bitwise_equal(actual[0], expected[0])
    assert_bitwise_equal(actual[1], expected[1])


# -- chunks and forms -------------------------------------------------------------------------------------------------


def family(n: int, count: int, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """A base, and models near it."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(count, generator=generator)
    return base, [base + 0.01 * torch.randn(count, generator=generator) for _ in range(n)]


@each_working_backend
@each_variant
def test_chunks_add_up_to_the_whole(variant: str, backend: str) -> None:
    base, models = family(3, 5000)
    chunks = [slice(0, 1), slice(1, 1001), slice(1001, 1001), slice(1001, 5000)]
    cut = [(base[c], [x[c] for x in models]) for c in chunks]
    rule = ops.pcb_rule(models, base=base, density=[0.1, 0.3, 0.9], variant=variant, backend=backend)
    whole = (base, models)

    parts = [ops.pcb_histogram(*chunk, rule, [-1, 0x8012, -1], backend=backend) for chunk in cut]
    assert_bitwise_equal(sum(parts), ops.pcb_histogram(*whole, rule, [-1, 0x8012, -1], backend=backend))
    extremes = torch.stack([ops.pcb_extremes(*chunk, backend=backend) for chunk in cut])
    together = torch.stack([extremes[:, :, 0].amin(0), extremes[:, :, 1].amax(0)], dim=1)
    assert_bitwise_equal(together, ops.pcb_extremes(*whole, backend=backend))
    if variant == "paper":
        parts = [ops.pcb_sums(*chunk, rule, backend=backend) for chunk in cut]
        sums = ops.pcb_sums(*whole, rule, backend=backend)
        for limbs, expected in zip(sum(parts).tolist(), sums.tolist()):
            assert sum(x << 32 * i for i, x in enumerate(limbs)) == sum(x << 32 * i for i, x in enumerate(expected))
        assert_bitwise_equal(ops.pcb_means(sum(parts), 5000, 3), rule.means)
    low = [int(ops.score_keys(rule.thresholds[i, :1])) - 500 for i in range(3)]
    counted = torch.zeros(3, 1001, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    for chunk in cut:
        ops.pcb_window_(*chunk, rule, low, *counted, backend=backend)
    at_once = torch.zeros(3, 1001, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    ops.pcb_window_(*whole, rule, low, *at_once, backend=backend)
    assert_bitwise_equal(counted[0], at_once[0])
    assert_bitwise_equal(counted[1], at_once[1])
    assert ops.score_of_key(int(counted[1][0])) == rule.thresholds[0, 1]
    merged = [ops.pcb_apply(*chunk, [1.0, 0.5, 2.0], rule, backend=backend) for chunk in cut]
    assert_bitwise_equal(torch.cat(merged), ops.pcb_apply(*whole, [1.0, 0.5, 2.0], rule, backend=backend))


@each_working_backend
@each_variant
def test_every_form_of_the_rows_gives_the_same_bits(variant: str, backend: str) -> None:
    rows = 0.01 * torch.randn(3, 70, 100, generator=torch.Generator().manual_seed(5))
    arguments = {"variant": variant, "density": 0.2, "weight": 1.1, "return_scale": True, "backend": backend}
    merged, scale = ops.pcb_merge(rows, **arguments)
    assert (merged.shape, scale.shape) == ((70, 100), (3, 70, 100))
    strided = rows.reshape(3, -1).T.contiguous().T
    wide = rows.reshape(3, -1).double()
    forms = [list(rows), rows.reshape(3, -1), list(rows.transpose(1, 2).contiguous().transpose(1, 2)), strided, wide]
    for form in forms:
        again, shares = ops.pcb_merge(form, **arguments)
        assert again.dtype == form[0].dtype
        assert_bitwise_equal(again.float().reshape(70, 100), merged)
        assert_bitwise_equal(shares.reshape(3, 70, 100), scale)
    cuts = [[row[:13], row[13:13], row[13:14], row[14:]] for row in rows]
    again, shares = ops.pcb_merge(cuts, **arguments)
    assert [x.shape for x in again] == [x.shape for x in cuts[0]]
    assert_bitwise_equal(torch.cat(again), merged)
    assert_bitwise_equal(torch.stack([torch.cat(row) for row in shares]), scale)
    assert_bitwise_equal(ops.pcb_merge(rows, variant=variant, density=0.2, weight=1.1, backend=backend), merged)


@each_working_backend
@each_variant
def test_pieces_do_not_show(variant: str, backend: str) -> None:
    rows = 0.01 * torch.randn(2, 3000, generator=torch.Generator().manual_seed(6))
    arguments = {"variant": variant, "return_scale": True, "backend": backend}
    merged, scale = ops.pcb_merge(rows, **arguments)
    with patch.object(ops.pcb_rows, "_PIECE", 700):
        for form in (rows, rows.double()):
            again, shares = ops.pcb_merge(form, **arguments)
            assert_bitwise_equal(again.float(), merged)
            assert_bitwise_equal(shares, scale)


@each_working_backend
def test_out_is_written_and_returned(backend: str) -> None:
    rows = [0.01 * torch.randn(40, 50, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(3)]
    merged = ops.pcb_merge([x.float() for x in rows], backend=backend)
    half = ops.pcb_merge(rows, backend=backend)
    assert_bitwise_equal(half, merged.bfloat16())
    out = poison_(torch.empty(40, 50, dtype=torch.float16))
    assert ops.pcb_merge(rows, out=out, backend=backend) is out
    assert_bitwise_equal(out, merged.half())
    outs = [poison_(torch.empty(10, 50)), poison_(torch.empty(30, 50, dtype=torch.bfloat16))]
    assert ops.pcb_merge([list(x.split([10, 30])) for x in rows], out=outs, backend=backend) is outs
    assert_bitwise_equal(outs[0], merged[:10])
    assert_bitwise_equal(outs[1], merged[10:].bfloat16())


@each_working_backend
def test_a_merge_of_deltas_put_on_the_base(backend: str) -> None:
    base, models = family(3, 2000)
    rule = ops.pcb_rule(models, base=base, backend=backend)
    deltas = [x - base for x in models]
    merged = ops.pcb_merge(deltas, backend=backend)
    assert_bitwise_equal(ops.pcb_apply(base, models, [1.0] * 3, rule, backend=backend), base + merged)
    assert_bitwise_equal(rule.clip, ops.pcb_bounds(deltas, backend=backend))
    for form in ([list(x.split(999)) for x in models],):
        bounds = ops.pcb_bounds(form, base=list(base.split(999)), backend=backend)
        assert_bitwise_equal(bounds, rule.clip)


@each_working_backend
@each_variant
def test_a_nan_stays_in_its_element(variant: str, backend: str) -> None:
    rows = torch.randn(3, 1000, generator=torch.Generator().manual_seed(1))
    rows[1, 17] = math.nan
    merged, scale = ops.pcb_merge(rows, variant=variant, return_scale=True, backend=backend)
    if variant == "paper":
        # All scores of the element are NaN there, and no score that is not above the threshold is kept.
        assert not merged.isnan().any()
        assert not scale[:, 17].any()
    else:
        assert merged.isnan().nonzero().tolist() == [[17]]
    assert int((scale[2] > 0).sum()) in (99, 100)


@each_working_backend
def test_nothing_to_merge(backend: str) -> None:
    merged, scale = ops.pcb_merge(torch.empty(3, 0), return_scale=True, backend=backend)
    assert (merged.shape, scale.shape) == ((0,), (3, 0))
    assert [x.shape for x in ops.pcb_merge([[torch.empty(0, 2)]] * 2, backend=backend)] == [(0, 2)]


# -- arguments --------------------------------------------------------------------------------------------------------

x = torch.arange(1.0, 7.0)
rows = [x, -x]
clip = torch.tensor([[1.0, 6.0]] * 2)
rule = PcbRule("script", clip=clip, thresholds=torch.tensor([[0.0, 1.0]] * 2))
counts = torch.zeros(2, 5, dtype=torch.int64)
highest = torch.zeros(2, dtype=torch.int64)

VALUES: list[tuple[Callable[[], Any], str]] = [
    (lambda: ops.pcb_merge(rows, variant="vison"), r"variant='vison' is not known.*Did you mean 'vision'"),
    (lambda: ops.pcb_merge(rows, density=1.5), r"density=1.5 is outside \[0, 1\]"),
    (lambda: ops.pcb_merge(rows, density=[0.1, -0.1]), r"density=-0.1 is outside"),
    (lambda: ops.pcb_merge(rows, density=math.nan), r"density=nan is not finite"),
    (lambda: ops.pcb_merge(rows, density=[0.1]), r"density has 1 entries for 2 models"),
    (lambda: ops.pcb_merge(rows, weight=[1.0, math.inf]), r"weight=inf is not finite"),
    (lambda: ops.pcb_merge(rows, weight=[1.0] * 3), r"weight has 3 entries for 2 models"),
    (lambda: ops.pcb_merge([]), r"task_vectors is empty"),
    (lambda: ops.pcb_merge(torch.empty(0, 5)), r"task_vectors is empty"),
    (lambda: ops.pcb_merge([[], []]), r"task_vectors\[0\] is empty"),
    (lambda: ops.pcb_merge(x), r"task_vectors has shape \[6\], but a row for each model is needed; pass \[n, D\]"),
    (lambda: ops.pcb_merge([x, x[:3]]), r"task_vectors\[1\] has shapes \[\[3\]\].*cut all rows in the same places"),
    (lambda: ops.pcb_merge([[x, x], [x]]), r"task_vectors\[1\] has shapes \[\[6\]\], but task_vectors\[0\] has"),
    (lambda: ops.pcb_merge([[x[:2], x[2:]], [x[:3], x[3:]]]), r"task_vectors\[1\] has shapes \[\[3\], \[3\]\]"),
    (lambda: ops.pcb_merge([x.to("meta")] * 2), r"task_vectors\[0\] is on device 'meta'"),
    (lambda: ops.pcb_merge(rows, out=torch.empty(5)), r"out has shape \[5\], but the result has \[6\]"),
    (lambda: ops.pcb_merge(rows, out=torch.empty(12)[::2]), r"out is not contiguous"),
    (lambda: ops.pcb_merge(rows, out=x), r"out overlaps an input"),
    (lambda: ops.pcb_merge([[x], [x]], out=[x.clone(), x.clone()]), r"out has 2 shards, but each row has 1"),
    (lambda: ops.pcb_merge([x] * 161, variant="paper"), r'variant="paper" takes at most 160 rows, not 161'),
    (lambda: ops.pcb_bounds(torch.empty(2, 0)), r"task_vectors has no elements"),
    (lambda: ops.pcb_rule(torch.empty(2, 0)), r"task_vectors has no elements"),
    (lambda: ops.pcb_bounds(rows, base=x[:3]), r"base has shapes \[\[3\]\]"),
    (lambda: ops.pcb_bounds(rows, variant="es"), r"variant='es' is not known"),
    (lambda: ops.pcb_scores(None, rows, PcbRule("script")), r"rule.clip is missing; this sweep needs it"),
    (lambda: ops.pcb_scores(None, rows, PcbRule("Script")), r"rule.variant='Script' is not known.*Did you mean 'scr"),  # type: ignore[arg-type]
    (lambda: ops.pcb_scores(None, [x], rule), r"rule.clip is torch.float32\[2, 2\]; it must be float32\[1, 2\]"),
    (lambda: ops.pcb_scores(None, rows, PcbRule("nlp", clip=clip.double())), r"rule.clip is torch.float64"),
    (lambda: ops.pcb_scores(None, [], rule), r"tensors is empty"),
    (lambda: ops.pcb_scores(x[:2], rows, rule), r"tensors\[0\] has shape \[6\], but base has shape \[2\]"),
    (lambda: ops.pcb_scores(None, rows, PcbRule("paper")), r"rule.extremes is missing"),
    (lambda: ops.pcb_sums(None, rows, rule), r"rule.variant='script' needs no sums; they belong to \"paper\""),
    (lambda: ops.pcb_apply(None, rows, [1.0], rule), r"weights has 1 entries for 2 models"),
    (lambda: ops.pcb_apply(None, rows, [1.0, math.nan], rule), r"weights=nan is not finite"),
    (lambda: ops.pcb_apply(None, rows, [1.0] * 2, PcbRule("script", clip=clip)), r"rule.thresholds is missing"),
    (lambda: ops.pcb_apply(None, rows, [1.0] * 2, rule, scale=torch.empty(2, 5)), r"scale has shape \[2, 5\]"),
    (lambda: ops.pcb_window_(None, rows, rule, [0], counts, highest), r"low has 1 entries for 2 models"),
    (lambda: ops.pcb_window_(None, rows, rule, [0, 1 << 33], counts, highest), r"low holds a number that is no key"),
    (lambda: ops.pcb_window_(None, rows, rule, [0, 0], counts[:1], highest), r"counts must be int64\[2, window \+ 1\]"),
    (lambda: ops.pcb_window_(None, rows, rule, [0, 0], counts, highest[:1]), r"highest has shape \[1\]"),
    (lambda: ops.pcb_window_(None, rows, rule, [0, 0], counts.T.contiguous().T, highest), r"counts is not contiguous"),
    (lambda: ops.pcb_histogram(None, rows, rule, [0, 65536]), r"prefix holds a number that is no prefix"),
    (lambda: ops.pcb_histogram(None, rows, rule, [0]), r"prefix has 1 entries for 2 models"),
    (lambda: ops.score_of_key(1 << 32), r"key=4294967296 is out of range"),
    (lambda: ops.pcb_ranks(0, 0.1, "nlp"), r"numel=0 is out of range"),
    (
        lambda: ops.pcb_means(torch.zeros(2, 12, dtype=torch.int64), 3, 2),
        r"sums has shape \[2, 12\]; it must be \[5, 12",
    ),
]

TYPES: list[tuple[Callable[[], Any], str]] = [
    (lambda: ops.pcb_merge(None), r"task_vectors must be a tensor \[n, D\], a list of n tensors.*not NoneType"),
    (lambda: ops.pcb_merge("abc"), r"task_vectors must be a tensor"),
    (lambda: ops.pcb_merge([x, [x]]), r"task_vectors mixes tensors and lists"),
    (lambda: ops.pcb_merge([x, 3.0]), r"task_vectors\[1\] must be a torch.Tensor, not float"),
    (lambda: ops.pcb_merge([x.long(), x]), r"task_vectors\[0\] has dtype int64"),
    (lambda: ops.pcb_merge([[x], [x]], out=x.clone()), r"out must be a list of shards"),
    (lambda: ops.pcb_merge(rows, out=x.double()), r"out has dtype float64"),
    (lambda: ops.pcb_merge(rows, weight="1"), r"weight must be a number, not str"),  # type: ignore[arg-type]
    (lambda: ops.pcb_apply(None, rows, [1.0] * 2, rule, scale=torch.empty(2, 6).double()), r"scale has dtype"),
    (lambda: ops.pcb_apply(None, rows, [1.0] * 2, rule, out_dtype=torch.int8), r"out_dtype=torch.int8"),
    (lambda: ops.pcb_scores(None, rows, {"variant": "nlp"}), r"rule must be an ops.PcbRule, not dict"),  # type: ignore[arg-type]
    (lambda: ops.score_keys(x.double()), r"scores must be a float32 tensor"),
]


@pytest.mark.parametrize(("call", "sentence"), VALUES)
def test_wrong_values(call: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ArgumentError, match=sentence) as raised:
        call()
    assert isinstance(raised.value, FastmergeError)


@pytest.mark.parametrize(("call", "sentence"), TYPES)
def test_wrong_types(call: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ArgumentTypeError, match=sentence):
        call()


def test_float64_is_rounded_first_and_returned_as_float64() -> None:
    wide = torch.tensor([[1.0, 2.0000000001, -3.0], [0.5, 1.0, 4.0]], dtype=torch.float64)
    merged = ops.pcb_merge(wide, density=0.5, backend="reference")
    assert merged.dtype == torch.float64
    assert torch.equal(merged, ops.pcb_merge(wide.float(), density=0.5, backend="reference").double())
    rule = ops.pcb_rule(wide, density=0.5, backend="reference")
    assert_bitwise_equal(ops.pcb_apply(None, list(wide), [1.0, 1.0], rule, backend="reference"), merged)


def test_backends_are_asked_for_by_name() -> None:
    with pytest.raises(backends.BackendError, match="'opencl'"):
        ops.pcb_merge(rows, backend="opencl")
