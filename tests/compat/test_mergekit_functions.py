"""numerics="mergekit" beside mergekit's own functions on the same tensors.

Deterministic methods: equal outside tied positions, and everywhere on float32 inputs without ties. Random methods draw
other numbers than the peer, so their law is tested: how many elements stay, at which ranks, that two models' masks are
independent, and that the rescale is the ratio of L1 norms.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.compat.mergekit_peer import (
    DETERMINISTIC,
    DTYPES,
    RANDOM,
    Case,
    draw_case,
    draw_models,
    our_merge,
    peer_merge,
    tied_positions,
)

pytest.importorskip("mergekit", reason="no mergekit (the extra `peers`); tests/methods has each method's formula")

SIGMAS = 4.0


def assert_equal_outside(tied: torch.Tensor, ours: torch.Tensor, peers: torch.Tensor) -> None:
    assert ours.dtype == peers.dtype
    assert ours.shape == peers.shape
    wrong = (ours != peers) & ~tied
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {wrong.numel()} values differ: {ours[wrong][:3]} against {peers[wrong][:3]}"
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", DETERMINISTIC)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1))
def test_deterministic_methods_equal_the_peer_outside_tied_positions(method, dtype, tied_share, seed):
    case = draw_case(method, DTYPES[dtype], seed)
    tied = tied_positions(method, case.base, case.models, case.density, case.gamma)
    tied_share(f"{method} {dtype}", tied)
    assert_equal_outside(tied, our_merge(case), peer_merge(case))


@pytest.mark.parametrize("method", DETERMINISTIC)
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_deterministic_methods_equal_the_peer_everywhere_on_float32_without_ties(method, seed):
    case = draw_case(method, torch.float32, seed)
    assume(not tied_positions(method, case.base, case.models, case.density, case.gamma).any())
    ours, peers = our_merge(case), peer_merge(case)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, peers)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "breadcrumbs_ties"])
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_magnitude_rules_with_rescale_equal_the_peer_in_half_precision(method, dtype, seed):
    case = draw_case(method, DTYPES[dtype], seed)
    case.rescale = True
    # Any of the tied elements has the same magnitude, so the norms, and with them all other elements, are the same.
    tied = tied_positions(method, case.base, case.models, case.density, case.gamma)
    assert_equal_outside(tied, our_merge(case), peer_merge(case))


@pytest.mark.parametrize("reference", [True, False], ids=["reference", "auto"])
@pytest.mark.parametrize("method", DETERMINISTIC)
def test_every_backend_equals_the_peer(method, reference):
    backend = "reference" if reference else "auto"
    for seed in range(5):
        case = draw_case(method, torch.bfloat16, seed)
        tied = tied_positions(method, case.base, case.models, case.density, case.gamma)
        assert_equal_outside(tied, our_merge(case, backend=backend), peer_merge(case))


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "breadcrumbs"])
def test_mixed_dtypes_meet_in_the_dtype_the_peer_promotes_to(method):
    base, first, second = draw_models(3, (40, 50), 2, torch.float32, "normal")
    case = Case(method, base.bfloat16(), [first.half(), second.bfloat16()], [0.6, 0.9])
    if method != "task_arithmetic":
        case.density = [0.4, 0.7]
    ours, peers = our_merge(case), peer_merge(case)
    widened = [tensor.float() for tensor in case.models]
    tied = tied_positions(method, case.base.float(), widened, case.density)
    assert peers.dtype == torch.float32
    wrong = (ours.float() != peers.to(ours.dtype).float()) & ~tied
    assert not wrong.any()


# -- the functions of mergekit.sparsify


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", ["magnitude", "magnitude_outliers"])
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), density=st.floats(0.0, 1.0), gamma=st.sampled_from([0.0, 0.01, 0.2]))
def test_sparsify_keeps_what_the_peer_keeps(rule, dtype, seed, density, gamma):
    import mergekit.sparsify as peer

    from fastmerge import ops

    shape = ((37,), (16, 33), (1,), (3, 4, 5))[seed % 4]
    _, x = draw_models(seed, shape, 1, DTYPES[dtype], "heavy")
    if rule == "magnitude":
        ours, theirs = ops.sparsify(x, density, method=rule), peer.magnitude(x, density)
        tied = tied_positions("ties", torch.zeros_like(x), [x], [density])
    else:
        ours = ops.sparsify(x, density, method=rule, gamma=gamma)
        theirs = peer.magnitude_outliers(x, density, gamma=gamma)
        tied = tied_positions("breadcrumbs", torch.zeros_like(x), [x], [density], [gamma])
    assert_equal_outside(tied, ours, theirs)
    assert int((ours != 0).sum()) == int((theirs != 0).sum())


# -- random methods


def lone_delta(method: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int, **parameters: object) -> Case:
    """A merge whose output is the sparsified delta itself: one model, weight one, on a base of zeros."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.01
    values = torch.where(values == 0, torch.full_like(values, 1e-3), values).to(dtype)
    return Case(method, torch.zeros(shape, dtype=dtype), [values], [1.0], normalize=False, **parameters)


def within(kept: float, expected: float, variance: float) -> bool:
    return abs(kept - expected) <= SIGMAS * math.sqrt(variance) + 1e-9


def rank_share(x: torch.Tensor) -> torch.Tensor:
    """Each element's rank by magnitude within its row, from 0 to 1."""
    order = x.float().abs().argsort(dim=-1, stable=True).argsort(dim=-1)
    return order.double() / (x.shape[-1] - 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", [0.1, 0.37, 0.5, 0.9])
@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_keeps_each_element_with_its_probability_in_every_tensor(method, density, dtype):
    for number, shape in enumerate([(4096,), (64, 129), (3, 50, 70), (256, 256)] * 3):
        case = lone_delta(method, shape, DTYPES[dtype], number, density=[density], rescale=False)
        kept = our_merge(case, name=f"model.layers.{number}.weight", seed=7) != 0
        count = kept.numel()
        assert within(int(kept.sum()), count * density, count * density * (1 - density)), (shape, int(kept.sum()))


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.15), (0.3, 0.25), (0.7, 0.05)])
@pytest.mark.parametrize("method", ["della_linear", "della"])
def test_della_keeps_each_rank_decile_with_its_probability_in_every_tensor(method, density, epsilon, dtype):
    for number, shape in enumerate([(128, 300), (64, 1024), (40, 999)]):
        # Equal magnitudes share their middle rank here and get arbitrary ones in the peer; these values are distinct.
        generator = torch.Generator().manual_seed(number)
        levels = torch.linspace(1.0, 2.0, shape[-1]) if dtype == "f32" else torch.arange(1, shape[-1] + 1)
        rows = torch.stack([levels[torch.randperm(shape[-1], generator=generator)] for _ in range(shape[0])])
        values = rows if dtype == "f32" else distinct_bfloat16(rows)
        case = lone_delta(method, shape, DTYPES[dtype], number, density=[density], epsilon=[epsilon], rescale=False)
        case.models = [values]
        kept = our_merge(case, name=f"model.layers.{number}.weight", seed=11) != 0
        share = rank_share(values)
        probability = (density - epsilon) + 2 * epsilon * share
        for decile in range(10):
            inside = (share * 10).floor().clamp(max=9) == decile
            p = probability[inside]
            assert within(int(kept[inside].sum()), float(p.sum()), float((p * (1 - p)).sum())), (shape, decile)


def distinct_bfloat16(ranks: torch.Tensor) -> torch.Tensor:
    """A bfloat16 value for each rank, rising with it: every bit pattern is used once."""
    return (ranks.to(torch.int16) + 0x3C00).view(torch.bfloat16)


@pytest.mark.parametrize("method", RANDOM)
def test_the_masks_of_two_models_are_independent(method):
    shape, density = (200, 256), 0.4
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        first = torch.rand(shape, generator=generator) + 1.0
        second = torch.rand(shape, generator=generator) + 4.0
        extra = {"epsilon": [0.1, 0.1]} if method.startswith("della") else {}
        case = Case(method, torch.zeros(shape), [first, second], [1.0, 1.0], [density] * 2, **extra)
        case.normalize, case.rescale = False, False
        merged = our_merge(case, name="model.norm.weight", seed=seed)
        both = merged == first + second
        one, two = both | (merged == first), both | (merged == second)
        assert bool((one | two | (merged == 0)).all())
        p1 = p2 = torch.full(shape, density, dtype=torch.float64)
        if extra:
            p1, p2 = (density - 0.1 + 0.2 * rank_share(x) for x in (first, second))
        covariance = ((one.double() - p1) * (two.double() - p2)).sum()
        variance = (p1 * (1 - p1) * p2 * (1 - p2)).sum()
        assert within(float(covariance), 0.0, float(variance))
        assert not torch.equal(one, two)


@pytest.mark.parametrize("method", RANDOM)
def test_masks_depend_on_the_seed_and_on_the_name_and_on_nothing_else(method):
    extra = {"epsilon": [0.1]} if method.startswith("della") else {}
    case = lone_delta(method, (64, 64), torch.float32, 0, density=[0.5], **extra)
    here = our_merge(case, name="a", seed=1)
    assert torch.equal(here, our_merge(case, name="a", seed=1))
    assert not torch.equal(here, our_merge(case, name="a", seed=2))
    assert not torch.equal(here, our_merge(case, name="b", seed=1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", RANDOM)
def test_the_rescale_is_the_ratio_of_the_norms_and_the_peers_own_on_the_same_mask(method, dtype):
    from mergekit.sparsify import RescaleNorm, rescaled_masked_tensor

    extra = {"epsilon": [0.1]} if method.startswith("della") else {}
    for number, shape in enumerate([(500,), (33, 65), (128, 200)]):
        case = lone_delta(method, shape, DTYPES[dtype], number, density=[0.37], rescale=True, **extra)
        x = case.models[0]
        merged = our_merge(case, name="model.embed_tokens.weight", seed=number)
        mask = merged != 0
        kept = torch.where(mask, x, torch.zeros_like(x)).float()
        before = math.fsum(x.float().abs().flatten().tolist())
        after = math.fsum(kept.abs().flatten().tolist())

        # Exactly: the norms as real numbers, rounded where the peer rounds them (float16 works in float32 there).
        if dtype == "bf16":
            scale = (torch.tensor(before).bfloat16() / torch.tensor(after).bfloat16()).float()
        else:
            scale = torch.tensor(before / after, dtype=torch.float64).float()
        assert torch.equal(merged, (kept * scale).to(x.dtype))

        # The norm is what it was, within the rounding of the scale and of the elements.
        unit = {"bf16": 2.0**-8, "fp16": 2.0**-11, "f32": 2.0**-23}[dtype]
        rescaled = math.fsum(merged.float().abs().flatten().tolist())
        assert abs(rescaled - before) <= 3 * unit * before

        # The peer's function on our mask: equal in bfloat16; its float32 sums round on the way.
        if dtype == "bf16":
            assert torch.equal(merged, rescaled_masked_tensor(x, mask.to(x.dtype), RescaleNorm.l1))
        else:
            theirs = rescaled_masked_tensor(x.float(), mask.float(), RescaleNorm.l1).to(x.dtype)
            torch.testing.assert_close(merged, theirs, rtol=2e-6 if dtype == "f32" else 2 * unit, atol=0)


@pytest.mark.parametrize("method", RANDOM)
@pytest.mark.parametrize("dtype", DTYPES)
def test_random_methods_with_density_one_equal_the_peer(method, dtype):
    base, *models = draw_models(5, (64, 96), 3, DTYPES[dtype], "normal")
    case = Case(method, base, models, [0.5, -0.3, 1.1], [1.0, 1.0, 1.0], lambda_=0.7)
    assert torch.equal(our_merge(case), peer_merge(case))


@pytest.mark.parametrize("method", ["della", "della_linear"])
def test_della_ranks_along_the_peers_dimension_in_tensors_of_three(method):
    """The peer ranks dimension 1, which is not the last one of a fused expert's tensor."""
    shape = (6, 101, 8)
    generator = torch.Generator().manual_seed(0)
    rows = torch.stack([torch.randperm(101, generator=generator).float() + 1 for _ in range(48)])
    values = rows.reshape(6, 8, 101).transpose(1, 2).contiguous()
    density, epsilon = 0.5, 0.49
    case = Case(method, torch.zeros(shape), [values], [1.0], [density], epsilon=[epsilon], rescale=False)
    case.normalize = False
    kept = our_merge(case, name="model.layers.0.mlp.experts.weight", seed=3) != 0
    share = (values - 1).double() / 100
    for decile in range(10):
        inside = (share * 10).floor().clamp(max=9) == decile
        p = (density - epsilon) + 2 * epsilon * share[inside]
        assert within(int(kept[inside].sum()), float(p.sum()), float((p * (1 - p)).sum())), decile
