"""fastmerge inside mergekit: the same calls through mergekit's own registry, with `enable()` and without."""

from __future__ import annotations

import importlib.metadata
import random
import sys
import threading
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastmerge
from fastmerge import integrations
from fastmerge.errors import ArgumentError, BackendError
from tests.compat.mergekit_calls import RELEASE, merge_by_registry, registry
from tests.compat.mergekit_peer import (
    DETERMINISTIC,
    DTYPES,
    RANDOM,
    SHAPES,
    Case,
    draw_case,
    draw_models,
    our_merge,
    tied_positions,
)
from tests.compat.test_mergekit_functions import assert_equal_outside
from tests.compat.test_mergekit_importance import draw as draw_sce

pytest.importorskip("mergekit", reason="no mergekit (the extra `peers`)")

inside = integrations.mergekit

NEW_API = pytest.mark.skipif(RELEASE == "0.1.4", reason="groups and batches came with mergekit 0.1.5")
OWN_WAYS = "mergekit 0.1.4"
"""How the reasons begin for which a release computes on: 0.1.4 has ways of its own with small tensors."""


@contextmanager
def enabled(**arguments):
    inside.enable(**arguments)
    inside.reset_tally()
    try:
        yield
    finally:
        inside.disable()


@pytest.fixture(autouse=True)
def _always_off_again():
    assert not inside.enabled()
    yield
    inside.disable()


def plain_case(method: str, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Case:
    """A merge of three models in which no release of mergekit has ways of its own."""
    base, *models = draw_models(seed, (40, 56), 3, dtype, "heavy")
    sparse = [] if method in ("linear", "task_arithmetic") else [0.5, 0.3, 0.8]
    return Case(method, base, models, [0.5, -0.3, 0.9], sparse, [0.05] * 3 if "breadcrumbs" in method else [])


def both(case: Case, name: str | None = "w", **more):
    """(mergekit's result or its exception, ours or its exception, the reason why it was left to mergekit or None)."""
    results = []
    for ours in (False, True):
        torch.manual_seed(5)
        try:
            if ours:
                with enabled():
                    results.append(merge_by_registry(case, name, **more))
            else:
                results.append(merge_by_registry(case, name, **more))
        except Exception as error:
            results.append(error)
    counted = inside.tally()
    # What is left of one tensor is counted once for the method, and again for each function of sparsify.
    reasons = [reason for (method, reason) in counted.left if method == case.method]
    assert counted.merged[case.method] + len(reasons) == 1, counted
    return (*results, reasons[0] if reasons else None)


# -- the same numbers


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", DETERMINISTIC)
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_replaced_method_gives_mergekits_values_outside_tied_positions(method, dtype, seed):
    case = draw_case(method, DTYPES[dtype], seed)
    theirs, ours, reason = both(case)
    if reason is not None:
        assert reason.startswith(OWN_WAYS), reason
        if isinstance(theirs, Exception):
            assert type(ours) is type(theirs)
            return
    tied = tied_positions(method, case.base, case.models, case.density, case.gamma)
    assert_equal_outside(tied, ours, theirs)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "breadcrumbs_ties"])
def test_rescaled_methods_give_mergekits_values_in_half_precision(method, dtype):
    for seed in range(40):
        case = draw_case(method, DTYPES[dtype], seed)
        case.rescale = True
        theirs, ours, _ = both(case)
        if not isinstance(theirs, Exception):
            tied = tied_positions(method, case.base, case.models, case.density, case.gamma)
            assert_equal_outside(tied, ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", RANDOM)
def test_a_random_method_drops_what_fastmerge_drops_for_the_tensors_name(method, dtype):
    base, *models = draw_models(1, (40, 56), 3, DTYPES[dtype], "normal")
    extra = {"epsilon": [0.1] * 3} if method.startswith("della") else {}
    case = Case(method, base, models, [0.5, 0.3, 0.9], [0.5, 0.3, 0.8], **extra)
    with enabled(seed=11):
        ours = merge_by_registry(case, "model.layers.1.mlp.up_proj.weight")
        again = merge_by_registry(case, "model.layers.1.mlp.up_proj.weight")
        elsewhere = merge_by_registry(case, "model.layers.2.mlp.up_proj.weight")
        assert inside.tally().merged == {method: 3}
    expected = our_merge(case, name="model.layers.1.mlp.up_proj.weight", seed=11)
    assert torch.equal(ours, expected)
    assert torch.equal(again, expected)
    assert not torch.equal(elsewhere, expected)
    with enabled(seed=12):
        assert not torch.equal(merge_by_registry(case, "model.layers.1.mlp.up_proj.weight"), expected)


@pytest.mark.parametrize("method", RANDOM)
def test_without_a_seed_or_a_name_torchs_generator_says_what_is_dropped(method):
    base, *models = draw_models(2, (64, 64), 2, torch.float32, "normal")
    case = Case(method, base, models, [0.5, 0.5], [0.5, 0.5])

    def merged(name: str | None, first: int, **arguments) -> list[torch.Tensor]:
        torch.manual_seed(first)
        with enabled(**arguments):
            return [merge_by_registry(case, name) for _ in range(2)]

    for name, arguments in ((None, {}), ("w", {"seed": None})):
        one, two = merged(name, 3, **arguments)
        again = merged(name, 3, **arguments)
        other = merged(name, 4, **arguments)
        assert torch.equal(one, again[0]) and torch.equal(two, again[1])
        assert not torch.equal(one, two) and not torch.equal(one, other[0])


@pytest.mark.parametrize("method", [*DETERMINISTIC, *RANDOM])
def test_a_random_method_that_keeps_everything_gives_mergekits_values(method):
    base, *models = draw_models(3, (24, 40), 3, torch.bfloat16, "heavy")
    case = Case(method, base, models, [0.5, -0.3, 0.9], [] if method in ("linear", "task_arithmetic") else [1.0] * 3)
    theirs, ours, reason = both(case)
    assert reason is None
    assert torch.equal(ours, theirs)


def test_densities_above_one_keep_everything_as_in_mergekit():
    base, *models = draw_models(3, (24, 40), 2, torch.bfloat16, "normal")
    for method in ("ties", "dare_linear", "della", "breadcrumbs"):
        theirs, ours, reason = both(Case(method, base, models, [0.5, 0.7], [1.5, 1.0]))
        assert reason is None
        assert torch.equal(ours, theirs), method


@pytest.mark.parametrize("numerics", ["fp32", "mergekit"])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_numerics_and_backend_are_those_that_were_asked_for(numerics, backend):
    case = plain_case("ties", 6)
    with enabled(numerics=numerics, backend=backend):
        ours = merge_by_registry(case)
    expected = fastmerge.merge(
        [{"w": model} for model in case.models],
        base={"w": case.base},
        method="ties",
        numerics=numerics,
        **case.parameters("lambda_"),
    )["w"]
    assert torch.equal(ours, expected)


def test_int8_mask_changes_nothing_as_in_mergekit():
    for method in ("ties", "breadcrumbs_ties", "task_arithmetic"):
        base, *models = draw_models(9, (32, 32), 3, torch.float32, "heavy")
        case = Case(method, base, models, [0.5, -0.3, 0.9])
        theirs, ours, reason = both(case, int8_mask=True)
        assert reason is None
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("method", [*DETERMINISTIC, *RANDOM])
def test_strided_and_transposed_inputs_are_merged_and_left_as_they_were(method):
    tensors = [tensor.reshape(30, 40)[::2].T for tensor in draw_models(4, (30, 40), 2, torch.float32, "normal")]
    before = [tensor.clone() for tensor in tensors]
    sparse = {} if method in ("linear", "task_arithmetic") else {"density": [0.5, 0.5]}
    strided = Case(method, tensors[0], tensors[1:], [0.5, 0.7], **sparse)
    dense = Case(method, before[0].contiguous(), [one.contiguous() for one in before[1:]], [0.5, 0.7], **sparse)
    with enabled():
        assert torch.equal(merge_by_registry(strided), merge_by_registry(dense))
        assert inside.tally().merged == {method: 2}
    assert all(torch.equal(one, other) for one, other in zip(tensors, before, strict=True))


# -- slerp and sce, which compute in float32 here

UNITS = {"slerp": 2.0, "sce": 5.0}
"""What they may differ from mergekit's by, in units of the dtype of the largest number at that place."""


def draw_float32(method: str, dtype: torch.dtype, seed: int) -> tuple[Case, dict[str, float], torch.Tensor]:
    """A merge by slerp or sce, its parameter, and where mergekit's rounding decides what is selected or elected."""
    if method == "slerp":
        t = random.Random(seed).choice((0.0, 1.0, 0.5, 0.8125, -0.25))
        shape = SHAPES[1:][seed % len(SHAPES[1:])]  # a number without dimensions is too much for mergekit 0.1.4
        base, *models = draw_models(seed, shape, 1, torch.float32, "normal")
        far = [(base + 30 * (model - base)).to(dtype) for model in models]
        return Case(method, base.to(dtype), far, []), {"t": t}, torch.zeros(base.shape, dtype=torch.bool)
    base, models, parameters = draw_sce("sce", dtype, seed)
    if base.dim() == 0:  # mergekit 0.1.4 weighs those alike
        base, models = base[None], [model[None] for model in models]
    deltas = torch.stack([model.double() - base.double() for model in models])
    unit = torch.finfo(dtype).eps
    left_open = (deltas.sum(0).abs() <= len(models) * unit * deltas.abs().sum(0)) & deltas.any(0)
    variance = deltas.var(dim=0, unbiased=False)
    k = int(int((variance > 1e-18).sum()) * parameters["select_topk"])
    if 0 < parameters["select_topk"] < 1 and k:
        threshold = variance.flatten().sort(descending=True).values[k - 1]
        left_open |= (variance - threshold).abs() <= max(2.5 * unit, 1e-3) * threshold
    return Case(method, base, models, []), parameters, left_open


def our_float32(case: Case, parameters: dict[str, float]) -> torch.Tensor:
    models = [{"w": model} for model in case.models]
    return fastmerge.merge(models, base={"w": case.base}, method=case.method, **parameters)["w"]


@pytest.mark.parametrize(("method", "dtype"), [("slerp", "bf16"), ("slerp", "fp16"), ("sce", "bf16"), ("sce", "f32")])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_slerp_and_sce_are_mergekits_but_for_its_rounding(method, dtype, seed):
    case, parameters, left_open = draw_float32(method, DTYPES[dtype], seed)
    theirs = merge_by_registry(case, **parameters)
    with enabled():
        ours = merge_by_registry(case, base_place=seed % 2, **parameters)
        assert inside.tally().merged == {method: 1}
    assert torch.equal(ours, our_float32(case, parameters))
    if ours.shape != theirs.shape:  # mergekit 0.1.4 broadcasts a mask that selects nothing
        assert RELEASE == "0.1.4" and torch.equal(ours, case.base)
        return
    reach = torch.stack([tensor.double().abs() for tensor in (case.base, *case.models)]).amax(0)
    allowed = UNITS[method] * torch.finfo(ours.dtype).eps * reach + 1e-9
    if left_open.any():  # what is selected there moves the energies that weigh all of a tensor
        allowed += 0.2 * torch.stack([(model.double() - case.base.double()).abs() for model in case.models]).amax(0)
    wrong = ((ours.double() - theirs.double()).abs() > allowed) & ~left_open
    assert not wrong.any(), (ours[wrong][:3], theirs[wrong][:3])


def test_sce_in_float16_is_mergekits_unless_float32_is_asked_for():
    base, *models = draw_models(3, (16, 24), 3, torch.float16, "normal")
    case, parameters = Case("sce", base, models, []), {"select_topk": 0.5}
    theirs, ours, reason = both(case, **parameters)
    assert reason is not None and "float16" in reason
    assert torch.equal(ours, theirs)
    with enabled(numerics="fp32"):
        assert torch.equal(merge_by_registry(case, **parameters), our_float32(case, parameters))
        assert inside.tally().merged == {"sce": 1}


def test_slerp_of_three_is_refused_by_mergekit():
    base, *models = draw_models(3, (4, 6), 2, torch.float32, "normal")
    with enabled(), pytest.raises((RuntimeError, ValueError)):
        merge_by_registry(Case("slerp", base, models, []), t=0.5)
    assert not inside.tally().merged


@NEW_API
def test_a_batch_of_slerps_takes_a_t_for_each_output_and_the_base_where_it_is():
    from mergekit.merge_methods import TensorBatch, get

    first, second = (draw_models(seed, (6, 8), 1, torch.float32, "normal") for seed in (1, 2))
    batch = TensorBatch(tuple(torch.stack(pair) for pair in zip(first, second, strict=True)), base_index=1)
    t = torch.tensor([0.25, 0.75])
    with enabled():
        one, two = get("slerp").merge_batch(batch, t=t)
        assert inside.tally().merged == {"slerp": 2}
        with pytest.raises(ValueError, match="base"):
            get("slerp").merge_batch(TensorBatch(batch.tensors), t=t)
        assert inside.tally().left == {("slerp", "there is no base"): 1}
        with pytest.raises(ValueError, match="one other"):
            get("slerp").merge_batch(TensorBatch((*batch.tensors, batch.tensors[0]), base_index=0), t=t)
    assert torch.equal(one, our_float32(Case("slerp", first[1], first[:1], []), {"t": 0.25}))
    assert torch.equal(two, our_float32(Case("slerp", second[1], second[:1], []), {"t": 0.75}))


@NEW_API
@pytest.mark.parametrize("wanted", ["a tensor", "t"])
def test_gradients_of_slerp_are_mergekits_own(wanted):
    from mergekit.merge_methods import TensorBatch, get

    tensors = [one[None] for one in draw_models(6, (5, 7), 1, torch.float32, "normal")]
    t = torch.tensor([0.25], requires_grad=wanted == "t")
    tensors[1].requires_grad_(wanted != "t")
    with enabled():
        get("slerp").merge_batch(TensorBatch(tuple(tensors), base_index=0), t=t).sum().backward()
        assert inside.tally().left == {("slerp", "gradients are wanted"): 1}
    assert (t if wanted == "t" else tensors[1]).grad.abs().sum() > 0


@pytest.mark.skipif(RELEASE != "0.1.4", reason="mergekit 0.1.5 brings all tensors to one dtype")
@pytest.mark.parametrize(("method", "parameters"), [("slerp", {"t": 0.3}), ("sce", {"select_topk": 0.5})])
def test_dtypes_that_differ_are_widened_by_mergekit(method, parameters):
    base, *models = draw_models(6, (5, 7), 1 if method == "slerp" else 2, torch.float32, "normal")
    theirs, ours, reason = both(Case(method, base.bfloat16(), models, []), **parameters)
    assert reason == "dtypes differ"
    assert torch.equal(ours, theirs)


# -- what is left to mergekit


def left_cases():
    base, *models = draw_models(5, (6, 8), 2, torch.float32, "normal")
    nan = models[0].clone()
    nan[1, 2] = float("nan")
    infinite = base.clone()
    infinite[0, 0] = float("inf")
    none = torch.empty(0, 4)
    plain = {"weight": [0.5, 0.7]}
    return {
        "float64": (Case("ties", base.double(), [m.double() for m in models], **plain), "dtype float64"),
        "a NaN": (Case("ties", base, [nan, models[1]], density=[0.5, 0.5], **plain), "NaN or Inf"),
        "an infinite base": (Case("task_arithmetic", infinite, models, **plain), "NaN or Inf"),
        "no elements": (Case("task_arithmetic", none, [none, none], **plain), "no elements"),
        "an infinite weight": (Case("task_arithmetic", base, models, [float("inf"), 1.0]), "weight = inf"),
        "a negative density": (Case("breadcrumbs", base, models, density=[-0.1, 0.5], **plain), "density = -0.1"),
        "a probability below 0": (
            Case("della", base, models, density=[0.1, 0.5], epsilon=[0.2, 0.1], **plain),
            "epsilon = 0.2",
        ),
        "a subclass": (
            Case("task_arithmetic", base, [torch.nn.Buffer(models[0]).as_subclass(Other), models[1]], **plain),
            "not a plain one",
        ),
    }


class Other(torch.Tensor):
    """A tensor of a kind that nobody knows."""


@pytest.mark.parametrize("what", left_cases())
def test_what_the_kernels_cannot_take_is_left_to_mergekit(what):
    case, expected = left_cases()[what]
    theirs, ours, reason = both(case)
    assert reason is not None and (expected in reason or reason.startswith(OWN_WAYS))
    if isinstance(theirs, Exception):
        assert type(ours) is type(theirs) and str(ours) == str(theirs)
    else:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties"])
def test_gradients_are_mergekits_own(method):
    def gradients() -> list[torch.Tensor]:
        tensors = [one.requires_grad_() for one in draw_models(6, (5, 7), 2, torch.float32, "normal")]
        case = Case(method, tensors[0], tensors[1:], [0.5, 0.7], density=[0.5, 0.5] if method == "ties" else [])
        merged = merge_by_registry(case)
        merged.square().sum().backward()
        return [tensor.grad for tensor in tensors if tensor.grad is not None]

    theirs = gradients()
    with enabled(numerics="fp32"):
        ours = gradients()
        assert inside.tally().left[method, "gradients are wanted"] == 1
        assert not inside.tally().merged[method]
    assert len(ours) == len(theirs) >= 2
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_parameters_of_modules_are_merged_where_no_gradients_are_recorded():
    tensors = [torch.nn.Parameter(one) for one in draw_models(6, (5, 7), 2, torch.float32, "normal")]
    case = Case("ties", tensors[0], tensors[1:], [0.5, 0.7], density=[0.5, 0.5])
    with torch.no_grad():
        theirs, ours, reason = both(case)
    assert reason is None
    assert not ours.requires_grad
    assert torch.equal(ours, theirs)


def test_forward_gradients_are_mergekits_own():
    from torch.autograd import forward_ad

    base, *models = draw_models(6, (5, 7), 2, torch.float32, "normal")
    with forward_ad.dual_level():
        models[0] = forward_ad.make_dual(models[0], torch.ones_like(models[0]))
        with enabled():
            merged = merge_by_registry(Case("task_arithmetic", base, models, [0.5, 0.7]))
            assert inside.tally().left == {("task_arithmetic", "gradients are wanted"): 1}
        assert torch.equal(forward_ad.unpack_dual(merged).tangent, torch.full((5, 7), 0.5))


def test_where_no_kernels_work_mergekit_goes_on(monkeypatch):
    monkeypatch.setenv("FASTMERGE_BACKEND", "reference")
    theirs, ours, reason = both(plain_case("ties", 8))
    assert reason == "no kernels for device cpu"
    assert torch.equal(ours, theirs)


# -- groups and batches of 0.1.5


def linear_in_float32(models: list[torch.Tensor], weight: list[float]) -> torch.Tensor:
    return fastmerge.merge([{"w": model} for model in models], method="linear", weight=weight)["w"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_in_float32_is_fastmerges(dtype):
    case = plain_case("linear", dtype=DTYPES[dtype])
    with enabled(numerics="fp32"):
        ours = merge_by_registry(case)
        assert inside.tally().merged == {"linear": 1}
    assert torch.equal(ours, linear_in_float32(case.models, case.weight))
    zero = Case("linear", case.base, case.models, [1.0, 0.5, -1.5])
    theirs = merge_by_registry(zero)
    with enabled(numerics="fp32"):
        torch.testing.assert_close(merge_by_registry(zero), theirs, rtol=0, atol=0, equal_nan=True)
        ((_, reason),) = inside.tally().left
        assert "add up to 0" in reason


@NEW_API
def test_a_batch_of_many_tensors_with_weights_of_their_own_is_merged_tensor_by_tensor():
    from mergekit.merge_methods import PerGroupValues, TensorGroup, get

    drawn = [draw_models(seed, (4, 8), 2, torch.bfloat16, "normal") for seed in range(7)]
    drawn.append(draw_models(9, (33,), 2, torch.bfloat16, "normal"))
    weights = [[0.25 * number, 0.75, 0.5] for number in range(8)]
    groups = [TensorGroup.from_tensors(tensors) for tensors in drawn]
    with enabled(numerics="fp32"):
        assert get("linear").supports_batching
        ours = get("linear")(groups, parameters={"weight": PerGroupValues(weights)})
        assert inside.tally().merged == {"linear": 8}
    for one, tensors, weight in zip(ours, drawn, weights, strict=True):
        assert torch.equal(one, linear_in_float32(tensors, weight))


@NEW_API
def test_the_kernel_of_batches_may_be_called_by_itself():
    from mergekit.merge_methods import TensorBatch, get

    first, second = (plain_case("linear", seed).models for seed in (1, 2))
    batch = TensorBatch(tuple(torch.stack(pair) for pair in zip(first, second, strict=True)))
    weight = torch.tensor([[0.125, 0.25, 0.375], [0.5, -0.5, 0.75]])
    theirs = get("linear").merge_batch(batch, weight=weight)
    with enabled():
        assert torch.equal(get("linear").merge_batch(batch, weight=weight), theirs)
        assert inside.tally().merged == {"linear": 2} and not inside.tally().left
    with enabled(numerics="fp32"):
        one, two = get("linear").merge_batch(batch, weight=weight)
        assert inside.tally().merged == {"linear": 2} and not inside.tally().left
        assert torch.equal(one, linear_in_float32(first, weight[0].tolist()))
        assert torch.equal(two, linear_in_float32(second, weight[1].tolist()))
        with pytest.raises(RuntimeError):
            get("linear").merge_batch(batch, weight=weight.repeat(2, 1)[:3])
        assert inside.tally().left == {("linear", "weight has another shape than the batch"): 1}
        with pytest.raises(TypeError, match="weight"):
            get("linear").merge_batch(batch)


@NEW_API
def test_state_dicts_are_merged_through_mergekits_own_function():
    from mergekit.merge_methods import merge_state_dicts

    models = [
        {"a": one, "b": one.bfloat16(), "steps": torch.tensor(3)}
        for one in draw_models(2, (16, 16), 2, torch.float32, "normal")
    ]
    arguments = {"base": 0, "parameters": {"weight": [0.5, 0.7], "density": 1.0}, "out_dtype": torch.float16}
    theirs = merge_state_dicts(models, "ties", **arguments)
    with enabled():
        ours = merge_state_dicts(models, "ties", **arguments)
        assert inside.tally().merged == {"ties": 2}
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


@NEW_API
def test_a_tensor_that_only_the_base_has_is_the_bases():
    from mergekit.merge_methods import TensorGroup, get

    base = torch.ones(3)
    for method in ("ties", "pcb", "fr"):
        with enabled():
            parameters = {"weight": []} if method == "ties" else {}
            (merged,) = get(method)([TensorGroup.from_tensors([base], base_index=0)], parameters=parameters)
        assert torch.equal(merged, base)


@NEW_API
def test_what_a_method_says_about_itself_stays():
    before = {name: method.spec for name, method in registry().items()}
    kind = registry()["ties"].sparsification_method
    with enabled():
        for name, spec in before.items():
            assert registry()[name].spec is spec
        assert registry()["ties"].sparsification_method is kind
        with pytest.raises(AttributeError):
            registry()["ties"].no_such_thing  # noqa: B018


# -- the functions of mergekit.sparsify

FUNCTIONS = ("magnitude", "magnitude_outliers", "bernoulli", "della_magprune")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["magnitude", "magnitude_outliers"])
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    density=st.floats(0.0, 1.0),
    gamma=st.sampled_from([0.01, 0.2]),
    norm=st.sampled_from([None, "l1"]),
)
def test_sparsify_gives_mergekits_values(name, dtype, seed, density, gamma, norm):
    import mergekit.sparsify as peer

    shape = ((137,), (16, 33), (3, 40, 5))[seed % 3]
    _, x = draw_models(seed, shape, 1, DTYPES[dtype], "heavy")
    if dtype == "f32":
        norm = None
    extra = {"gamma": gamma} if name == "magnitude_outliers" else {}

    def call():
        try:
            return getattr(peer, name)(x, density, norm, **extra)
        except AssertionError as error:
            return error

    theirs = call()
    with enabled():
        ours = call()
        assert len(inside.tally().merged) + len(inside.tally().left) == 1
    if isinstance(theirs, AssertionError):
        assert isinstance(ours, AssertionError)
        return
    method = "ties" if name == "magnitude" else "breadcrumbs"
    tied = tied_positions(method, torch.zeros_like(x), [x], [density], [gamma])
    assert_equal_outside(tied, ours, theirs)


@pytest.mark.parametrize("name", ["bernoulli", "della_magprune"])
def test_random_sparsification_takes_its_seed_from_torchs_generator(name):
    import mergekit.sparsify as peer

    x = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    extra = {"epsilon": 0.1} if name == "della_magprune" else {}
    with enabled(seed=3):
        results = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            results.append(getattr(peer, name)(x, 0.4, rescale_norm=peer.RescaleNorm.l1, **extra))
        following = getattr(peer, name)(x, 0.4, rescale_norm=peer.RescaleNorm.l1, **extra)
        assert inside.tally().merged == {f"sparsify.{name}": 4}
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2]) and not torch.equal(results[2], following)
    for sparse in results:
        kept = sparse != 0
        assert abs(float(kept.double().mean()) - 0.4) < 4 * (0.24 / x.numel()) ** 0.5
        assert torch.allclose(sparse[kept] / x[kept], x.abs().sum() / x[kept].abs().sum())


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_other_norms_are_left_to_mergekit(name, norm):
    import mergekit.sparsify as peer

    x = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    extra = {"epsilon": 0.1} if name == "della_magprune" else {}
    torch.manual_seed(1)
    theirs = getattr(peer, name)(x, 0.4, rescale_norm=norm, **extra)
    torch.manual_seed(1)
    with enabled():
        ours = getattr(peer, name)(x, density=0.4, rescale_norm=norm, **extra)
        assert inside.tally().left == {(f"sparsify.{name}", "rescaling by another norm than l1"): 1}
    assert torch.equal(ours, theirs)


# -- methods that mergekit has not


@pytest.mark.parametrize("method", ["pcb", "fr"])
def test_added_methods_are_fastmerges_of_one_tensor(method):
    name = "model.layers.0.mlp.up_proj.weight"
    base, *models = draw_models(7, (48, 64), 3, torch.bfloat16, "heavy")
    case = Case(method, base, models, [0.9, 0.5, 1.1], lambda_=0.8)
    with enabled():
        ours = merge_by_registry(case, name)
        assert inside.tally().merged == {method: 1}
    extra = {"scope": "tensor"} if method == "pcb" else {}
    expected = fastmerge.merge(
        [{name: model} for model in models],
        base={name: base},
        method=method,
        weight=[0.9, 0.5, 1.1],
        lambda_=0.8,
        **extra,
    )[name]
    assert torch.equal(ours, expected)
    assert not torch.equal(ours, base)


@pytest.mark.parametrize("method", ["pcb", "fr"])
def test_added_methods_refuse_what_nobody_else_would_merge(method):
    base, *models = draw_models(7, (8, 8), 2, torch.float32, "normal")
    models[0][0, 0] = float("nan")
    with enabled(), pytest.raises(inside.MergekitError, match=f"{method} cannot merge w inside mergekit: NaN or Inf"):
        merge_by_registry(Case(method, base, models, [1.0, 1.0]))


@NEW_API
def test_the_parameters_of_added_methods_are_checked_while_mergekit_plans():
    with enabled():
        specs = {each.name: each for each in registry()["pcb"].spec.parameters}
        assert set(specs) == set(fastmerge.methods.parameters("pcb"))
        assert specs["scope"].default == specs["scope"].validate("tensor") == "tensor"
        assert specs["density"].validate("0.25") == 0.25
        with pytest.raises(ValueError, match="run the same YAML with `fastmerge merge`"):
            specs["scope"].validate("model")
        for name, value in (("variant", "newest"), ("density", 1.5), ("weight", float("nan"))):
            with pytest.raises(ValueError):
                specs[name].validate(value)
        ratio = next(each for each in registry()["fr"].spec.parameters if each.name == "ratio")
        assert ratio.validate(None) is None and ratio.validate(0.3) == 0.3


# -- on and off


def places() -> dict[str, object]:
    import mergekit.sparsify as peer

    return dict(registry()) | {f"sparsify.{name}": getattr(peer, name) for name in FUNCTIONS}


def test_disable_puts_the_very_objects_back():
    before = places()
    inside.enable()
    during = places()
    assert list(during)[: len(registry()) - 2] == list(before)[: len(registry()) - 2]
    changed = {name for name in before if during[name] is not before[name]}
    assert changed == {*DETERMINISTIC, *RANDOM, "slerp", "sce", *(f"sparsify.{name}" for name in FUNCTIONS)}
    assert set(during) - set(before) == {"pcb", "fr"}
    inside.enable(numerics="fp32", seed=4)
    again = places()
    assert all(again[name] is during[name] for name in during)
    inside.disable()
    after = places()
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    inside.disable()
    assert all(places()[name] is before[name] for name in before)


def test_what_somebody_else_put_over_ours_stays_and_ours_beneath_gives_way():
    table = registry()
    original = table["ties"]
    case = draw_case("ties", torch.float32, 1)
    theirs = merge_by_registry(case)
    inside.enable()
    ours = table["ties"]
    stranger = object()
    table["ties"] = stranger
    inside.disable()
    try:
        assert table["ties"] is stranger
        table["ties"] = ours
        inside.reset_tally()
        assert torch.equal(merge_by_registry(case), theirs)
        assert not inside.tally().merged
    finally:
        table["ties"] = original


def test_threads_may_merge_at_once():
    cases = [plain_case(method, number) for number, method in enumerate((*DETERMINISTIC, *RANDOM) * 3)]
    with enabled():
        expected = [merge_by_registry(case) for case in cases]
        results: list[list[torch.Tensor]] = [[] for _ in range(4)]

        def work(mine: list[torch.Tensor]) -> None:
            mine.extend(merge_by_registry(case) for case in cases)

        threads = [threading.Thread(target=work, args=(mine,)) for mine in results]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert inside.tally().merged.total() == 5 * len(cases) and not inside.tally().left
    for mine in results:
        assert all(torch.equal(one, other) for one, other in zip(mine, expected, strict=True))


@pytest.mark.parametrize("version", ["0.1.3", "0.1.6", "0.2.0", "0.1.5.post1"])
def test_an_unknown_release_is_refused_and_left_alone(version, monkeypatch):
    before = places()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.raises(inside.MergekitError, match=f"mergekit {version} is not known"):
        inside.enable()
    assert not inside.enabled()
    assert all(places()[name] is before[name] for name in before)


def test_a_missing_mergekit_is_said_to_be(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(inside.MergekitError, match="not installed"):
        inside.enable()


def test_a_mergekit_that_is_not_the_release_that_it_says_is_refused_and_left_alone(monkeypatch):
    import mergekit.sparsify as peer

    before = places()
    monkeypatch.setattr(peer, "bernoulli", lambda tensor, density, power: tensor)
    with pytest.raises(inside.MergekitError, match="its sparsify.bernoulli is another"):
        inside.enable()
    monkeypatch.undo()
    monkeypatch.delitem(registry(), "della")
    with pytest.raises(inside.MergekitError, match="its registry has no della"):
        inside.enable()
    monkeypatch.undo()
    assert not inside.enabled()
    assert all(places()[name] is before[name] for name in before)


def test_arguments_are_checked_before_anything_is_replaced():
    before = places()
    for arguments in ({"numerics": "bf16"}, {"seed": 1.5}, {"seed": True}):
        with pytest.raises(ArgumentError):
            inside.enable(**arguments)
    with pytest.raises(BackendError):
        inside.enable(backend="metal")
    assert not inside.enabled()
    assert all(places()[name] is before[name] for name in before)


def test_importing_fastmerge_and_its_integrations_does_not_import_mergekit():
    import subprocess

    code = (
        "import sys, fastmerge; fastmerge.integrations.mergekit.enabled(); "
        "assert 'mergekit' not in sys.modules, 'mergekit was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert "mergekit" in dir(integrations)
    with pytest.raises(AttributeError):
        integrations.no_such_tool  # noqa: B018
