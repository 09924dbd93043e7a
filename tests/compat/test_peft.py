"""fastmerge inside PEFT beside PEFT alone, on the same adapters of small models."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from fastmerge import ops
from fastmerge.errors import ArgumentError, FastmergeError, PeerError
from fastmerge.integrations import low_rank, peft_injection
from fastmerge.integrations import peft as inside

peft = pytest.importorskip("peft", reason="no PEFT (the extra `peers`)")

NAMES = ["one", "two", "three", "four", "five"]
SVD_KINDS = ["svd", "ties_svd", "magnitude_prune_svd", "dare_ties_svd", "dare_linear_svd"]


class Small(nn.Module):
    """One layer of each kind that LoRA knows, with the names that the tests target."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.embed = nn.Embedding(23, 12)
        self.query = nn.Linear(12, 20)
        self.down = nn.Linear(20, 12)
        self.turned = Conv1D(18, 12)
        self.conv = nn.Conv2d(3, 10, 3)
        self.point = nn.Conv2d(10, 9, 1)


ALL = ["embed", "query", "down", "turned", "conv", "point"]
LINEAR = ["query", "down"]


def make(
    count: int = 3,
    seed: int = 0,
    targets: list[Any] | None = None,
    rank: int | list[int] = 4,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Any:
    """A model with adapters "one", "two", ... of random numbers."""
    targets = targets or [ALL] * count
    ranks = [rank] * count if isinstance(rank, int) else rank
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = None
        for name, targeted, r in zip(NAMES, targets, ranks):
            lora = peft.LoraConfig(r=r, lora_alpha=3 * r, target_modules=targeted, **config)
            if model is None:
                model = peft.get_peft_model(Small(), lora, adapter_name=name)
            else:
                model.add_adapter(name, lora)
    generator = torch.Generator().manual_seed(seed)
    assert model is not None
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype)
    return model


def add(model: Any, kind: str, weights: list[float], *, name: str, **options: Any) -> dict[str, torch.Tensor]:
    """The tensors of the merged adapter, by name."""
    if name in model.peft_config:
        model.delete_adapter(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_weighted_adapter(NAMES[: len(weights)], weights, name, combination_type=kind, **options)
    tensors = {}
    for key, x in (*model.named_parameters(), *model.named_buffers()):
        if f".{name}" in key and "lora_" in key:
            tensors[key.replace(f".{name}", "")] = x.detach().clone()
    assert tensors
    return tensors


def both(model: Any, kind: str, weights: list[float], **options: Any) -> tuple[Any, Any]:
    """PEFT's tensors and ours."""
    inside.disable()
    theirs = add(model, kind, weights, name="theirs", **options)
    inside.enable()
    try:
        ours = add(model, kind, weights, name="ours", **options)
    finally:
        inside.disable()
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        assert ours[name].shape == x.shape and ours[name].dtype == x.dtype, name
    return theirs, ours


def assert_close(theirs: Any, ours: Any, rtol: float = 2e-6, atol: float = 1e-6, equal_nan: bool = False) -> None:
    for name, x in theirs.items():
        torch.testing.assert_close(
            ours[name],
            x,
            rtol=rtol,
            atol=atol,
            equal_nan=equal_nan,
            msg=lambda m, name=name: f"{name}: {m}",
        )


def products(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """B A of each layer."""
    found = {}
    for name, a in tensors.items():
        if "lora_A" in name or "lora_embedding_A" in name:
            b = tensors[name.replace("_A", "_B")]
            found[name] = b.flatten(1).double() @ a.flatten(1).double()
    return found


def scaling_once_more(module: Any, name: str) -> float:
    """What the SVD forms of this PEFT multiply an adapter by, besides its weight and its own scaling."""
    release = ".".join(peft.__version__.split(".")[:2])
    return float(module.scaling[name]) if release in ("0.19", "0.20") else 1.0


@pytest.fixture(autouse=True)
def peft_as_it_was():
    """No test leaves PEFT patched."""
    yield
    inside.disable()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """How often each of PEFT's own merging methods ran, and our op."""
    from peft.tuners.lora.model import LoraModel

    counts: dict[str, int] = {}

    def counting(name: str, function: Any) -> Any:
        counts[name] = 0

        def counted(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        return functools.wraps(function)(counted)

    for name, short in (
        ("_generalized_task_arithmetic_weighted_adapter", "factors"),
        ("_svd_generalized_task_arithmetic_weighted_adapter", "svd"),
    ):
        monkeypatch.setattr(LoraModel, name, counting(short, LoraModel.__dict__[name]))
    monkeypatch.setattr(ops, "consensus_merge_many", counting("many", ops.consensus_merge_many))
    yield counts
    inside.disable()  # before the counters go


# -- the factors


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(["ties", "magnitude_prune"]),
    weights=st.lists(st.sampled_from([1.0, 0.3, -0.7, 2, 0.0, 1.25]), min_size=2, max_size=5),
    density=st.sampled_from([0.2, 0.5, 0.01, 0.0, 0.999, 1.0, 1.5, 1]),
    election=st.sampled_from(["total", "frequency"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    rslora=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_deterministic_forms_equal_peft(kind, weights, density, election, dtype, rslora, seed):
    model = make(len(weights), seed, dtype=dtype, use_rslora=rslora)
    if dtype == torch.bfloat16:
        untie(model)
    theirs, ours = both(model, kind, weights, density=density, majority_sign_method=election)
    assert_close(theirs, ours, **({} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-6}))


def untie(model: Any) -> None:
    """Give every element of every adapter a magnitude of its own in bfloat16, as far as there are bit patterns."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            count = parameter.numel()
            generator = torch.Generator().manual_seed(len(name) + count)
            ranks = torch.randperm(count, generator=generator)
            signs = torch.randint(0, 2, (count,), generator=generator) * 2 - 1
            bits = (ranks + 0x3E00).to(torch.int16)
            parameter.data = (bits.view(torch.bfloat16) * signs).to(torch.bfloat16).view(parameter.shape)


def test_all_layers_are_merged_in_one_call_and_pefts_own_merges_do_not_run(calls):
    model = make()
    both(model, "ties", [1.0, 0.5, 0.2], density=0.3)
    assert calls == {"factors": len(ALL), "svd": 0, "many": 1}  # the former by the other side of the comparison


def test_layers_that_only_some_adapters_have_are_merged_of_those(calls):
    model = make(targets=[["query"], ["query", "down"], ["down", "embed"]])
    theirs, ours = both(model, "ties", [1.0, 0.5, -0.2], density=0.5)
    assert_close(theirs, ours)
    assert calls["many"] > 1


def test_each_layers_own_scaling_counts():
    model = make(alpha_pattern={"down": 1, "conv": 40})
    theirs, ours = both(model, "ties", [1.0, 0.5, -0.2], density=0.5)
    assert_close(theirs, ours)


def test_an_adapter_without_a_fitting_shape_is_left_to_peft_to_refuse():
    model = make(3, rank=4, targets=[LINEAR] * 3)
    model.base_model.model.query.lora_A["two"].weight.data = torch.randn(3, 12)
    inside.enable()
    with pytest.raises(RuntimeError, match="stack expects each tensor to be equal size"):
        add(model, "ties", [1.0, 1.0, 1.0], name="ours", density=0.5)
    assert "ours" not in model.peft_config


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["ties", "magnitude_prune"])
def test_layers_with_nan_or_infinity_come_out_as_pefts(kind, poison, calls):
    model = make()
    model.base_model.model.down.lora_A["two"].weight.data[1, 2] = poison
    theirs, ours = both(model, kind, [1.0, 0.5, 0.7], density=0.5)
    assert_close(theirs, ours, equal_nan=True)
    assert not all(bool(x.isfinite().all()) for x in theirs.values())
    assert calls["factors"] == len(ALL) + 1


def test_float64_adapters_are_left_to_peft(calls):
    model = make(targets=[LINEAR] * 3, dtype=torch.float64)
    theirs, ours = both(model, "ties", [1.0, 0.5, 0.7], density=0.5)
    assert calls["many"] == 0
    assert all(torch.equal(x, theirs[name]) for name, x in ours.items())


def test_adapters_that_share_memory_are_looked_at_one_by_one(calls):
    model = make(targets=[["query"]] * 3)
    layer = model.base_model.model.query
    shared = torch.randn(8, 12)
    shared[6, 3] = float("inf")  # of the first alone; the second begins at the same place and is as large
    layer.lora_A["one"].weight.data = shared[::2]
    layer.lora_A["two"].weight.data = shared[:4]
    theirs, ours = both(model, "ties", [1.0, 0.5, 0.7], density=0.5)
    assert_close(theirs, ours, equal_nan=True)
    assert not all(bool(x.isfinite().all()) for x in theirs.values())
    assert calls["factors"] == 2


@pytest.mark.parametrize("kind", ["linear", "cat"])
def test_other_forms_are_pefts(kind, calls):
    model = make(targets=[LINEAR] * 3)
    theirs, ours = both(model, kind, [1.0, 0.5, 0.7])
    assert calls["many"] == 0
    assert all(torch.equal(x, theirs[name]) for name, x in ours.items())


def test_one_adapter_alone_is_what_peft_makes_of_it():
    theirs, ours = both(make(), "ties", [0.6], density=0.5)
    assert_close(theirs, ours, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"density": None}, TypeError),
        ({"density": -0.5}, ValueError),
        ({"density": 0.5, "majority_sign_method": "most"}, RuntimeError),
    ],
)
@pytest.mark.parametrize("kind", ["ties", "ties_svd"])
def test_arguments_that_peft_refuses_are_refused_with_its_words(kind, options, error):
    messages = []
    for enabled in (False, True):
        model = make(targets=[LINEAR] * 3)
        if enabled:
            inside.enable()
        with pytest.raises(error) as caught:
            add(model, kind, [1.0, 1.0, 1.0], name="merged", **options)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_a_density_of_one_warns_once():
    model = make()
    inside.enable()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.add_weighted_adapter(NAMES[:3], [1.0] * 3, "merged", combination_type="ties", density=1.0)
    assert [str(one.message) for one in caught if "pruned" in str(one.message)] == [
        "The density 1.0 is at least 1: no values are pruned."
    ]


# -- random forms


def kept_mask(model: Any, layer: str, letter: str, position: int, density: float, seed: int) -> torch.Tensor:
    """The mask that the seed, the layer's name and the adapter's position stand for."""
    module = getattr(model.base_model.model, layer)
    shape = getattr(module, f"lora_{letter}")[NAMES[position]].weight.shape
    tensor_id = ops.tensor_id(f"{layer}.lora_{letter}")
    ones = torch.ones(shape)
    kept = ops.consensus_merge(
        None, [ones], [1.0], inputs="deltas", density=density, method="bernoulli", seed=seed, tensor_id=tensor_id,
        model=position, election="none", divisor="none",
    )  # fmt: skip
    return kept != 0


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("density", [0.3, 0.9])
def test_random_forms_are_pefts_formula_on_counted_masks(kind, density, monkeypatch):
    from peft.utils import merge_utils

    model, weights, seed = make(), [1.0, -0.5, 0.7], 123
    inside.enable(seed=seed)
    ours = add(model, kind, weights, name="ours", density=density)
    inside.disable()
    for layer in LINEAR:
        module = getattr(model.base_model.model, layer)
        for letter in "AB":
            deltas = [getattr(module, f"lora_{letter}")[name].weight.data for name in NAMES[:3]]
            masks = iter([kept_mask(model, layer, letter, i, density, seed) for i in range(3)])
            monkeypatch.setattr(torch, "bernoulli", lambda *a, masks=masks, **k: next(masks).float())
            roots = [abs(w * module.scaling["one"]) ** 0.5 for w in weights]
            signed = [root * (1 if letter == "B" or w >= 0 else -1) for root, w in zip(roots, weights)]
            expected = getattr(merge_utils, kind)(deltas, torch.tensor(signed), density)
            monkeypatch.undo()
            found = next(x for name, x in ours.items() if f"{layer}.lora_{letter}" in name)
            torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties", "dare_ties_svd", "dare_linear_svd"])
def test_torchs_seed_decides_unless_one_is_given(kind):
    model = make()

    def merged(torch_seed: int, **options: Any) -> dict[str, torch.Tensor]:
        inside.enable(**options)
        torch.manual_seed(torch_seed)
        found = add(model, kind, [1.0, 0.5, 0.7], name="ours", density=0.5)
        inside.disable()
        return found

    def same(one: Any, other: Any) -> bool:
        return all(torch.equal(x, other[name]) for name, x in one.items())

    assert same(merged(1), merged(1))
    assert not same(merged(1), merged(2))
    assert same(merged(1, seed=5), merged(2, seed=5))
    assert not same(merged(1, seed=5), merged(1, seed=6))


def test_adapters_and_layers_have_masks_of_their_own():
    model = make(targets=[LINEAR] * 3)
    for _, parameter in model.named_parameters():
        parameter.data = torch.ones_like(parameter)
    inside.enable(seed=1)
    merged = add(model, "dare_linear", [1.0, 10.0, 100.0], name="ours", density=0.5)
    sums = torch.cat([x.flatten() for name, x in merged.items() if "query" in name])
    assert len(sums.unique()) >= 7  # of the eight subsets
    patterns = {tuple((x.flatten()[:48] != 0).tolist()) for x in merged.values()}
    assert len(patterns) == len(merged)


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties", "dare_linear_svd"])
def test_a_density_of_zero_divides_by_zero_as_pefts_does(kind):
    model = make(targets=[LINEAR] * 3)
    if kind.endswith("svd"):
        inside.enable()
        with pytest.raises(torch.linalg.LinAlgError):
            add(model, kind, [1.0] * 3, name="ours", density=0.0)
        return
    theirs, ours = both(model, kind, [1.0, 0.5, 0.7], density=0.0)
    assert_close(theirs, ours, equal_nan=True)


# -- by singular values


@pytest.mark.parametrize("rank", [None, 1, 3, 9])
@pytest.mark.parametrize("kind", ["svd", "ties_svd", "magnitude_prune_svd"])
def test_svd_forms_have_pefts_product(kind, rank, calls):
    model = make(3, rank=[2, 4, 3])
    options = {} if kind == "svd" else {"density": 0.4}
    theirs, ours = both(model, kind, [1.0, -0.5, 0.7], svd_rank=rank, **options)
    assert calls["svd"] == len(ALL)
    expected, found = products(theirs), products(ours)
    assert len(expected) == len(ALL)
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=0, atol=2e-5 * float(x.norm()), msg=name)


@pytest.mark.parametrize("kind", ["svd", "ties_svd"])
def test_svd_forms_hold_singular_vectors_as_pefts_do(kind):
    model = make(3, rank=2, targets=[LINEAR] * 3)
    theirs, ours = both(model, kind, [1.0, 0.5, 0.7], svd_rank=8, **({} if kind == "svd" else {"density": 0.4}))
    for name, a in ours.items():
        if "lora_A" not in name:
            continue
        b, peers_b = (tensors[name.replace("_A", "_B")] for tensors in (ours, theirs))
        torch.testing.assert_close(a @ a.T, torch.eye(8), rtol=0, atol=1e-5)  # even beyond the rank of the sum
        values = torch.linalg.vector_norm(b, dim=0)
        torch.testing.assert_close(values, torch.linalg.vector_norm(peers_b, dim=0), rtol=0, atol=1e-5 * values[0])


def test_svd_of_bfloat16_adapters_is_closer_to_the_sum_than_pefts():
    model = make(targets=[LINEAR] * 3, dtype=torch.bfloat16)
    weights = [1.0, -0.5, 0.7]
    theirs, ours = both(model, "svd", weights, svd_rank=12)
    for layer in LINEAR:
        module = getattr(model.base_model.model, layer)
        exact = sum(
            w
            * scaling_once_more(module, n)
            * module.scaling[n]
            * module.lora_B[n].weight.double()
            @ module.lora_A[n].weight.double()
            for n, w in zip(NAMES, weights)
        ).detach()
        name = next(key for key in ours if f"{layer}.lora_A" in key)
        error, peers = (float((products(x)[name] - exact).norm()) for x in (ours, theirs))
        assert error < 1e-4 * float(exact.norm())
        assert error < peers


@pytest.mark.parametrize(
    ("options", "fits"),
    [({"svd_clamp": 0.9}, True), ({"svd_rank": 13}, False), ({"svd_driver": "gesvd"}, False)],
)
def test_what_is_not_taken_is_pefts_own(options, fits, calls):
    model = make(targets=[LINEAR] * 3)
    if fits:
        theirs, ours = both(model, "svd", [1.0, 0.5, 0.7], **options)
        assert all(torch.equal(x, theirs[name]) for name, x in ours.items())
        assert calls["svd"] == 2 * len(LINEAR)
    else:
        inside.enable()
        with pytest.raises(RuntimeError):
            add(model, "svd", [1.0, 0.5, 0.7], name="ours", **options)
        assert calls["svd"] == 1
        assert "ours" not in model.peft_config


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["svd", "ties_svd"])
def test_svd_forms_of_what_is_not_finite_are_pefts_to_refuse(kind, poison, calls):
    model = make(targets=[LINEAR] * 3)
    model.base_model.model.query.lora_A["two"].weight.data[1, 2] = poison
    inside.enable()
    with pytest.raises(torch.linalg.LinAlgError):
        add(model, kind, [1.0, 0.5, 0.7], name="ours", **({} if kind == "svd" else {"density": 0.5}))
    assert calls["svd"] == 1


def test_random_svd_forms_are_the_svd_of_the_merge_on_counted_masks():
    model, weights, density, seed = make(targets=[LINEAR] * 3), [1.0, 0.5, 0.7], 0.6, 9
    inside.enable(seed=seed)
    ours = add(model, "dare_ties_svd", weights, name="ours", density=density, svd_rank=12)
    inside.disable()
    for layer in LINEAR:
        module = getattr(model.base_model.model, layer)
        deltas = [module.get_delta_weight(name).detach() for name in NAMES[:3]]
        scaled = [w * scaling_once_more(module, name) / density for name, w in zip(NAMES, weights)]
        expected = ops.consensus_merge(
            None, deltas, scaled, inputs="deltas", density=density, method="bernoulli", seed=seed,
            tensor_id=ops.tensor_id(layer), election="total", divisor="count",
        )  # fmt: skip
        found = next(x for name, x in products(ours).items() if layer in name)
        torch.testing.assert_close(found, expected.double(), rtol=0, atol=1e-5 * float(expected.norm()))


# -- on and off


def test_disable_restores_the_very_objects():
    from peft.tuners.lora.model import LoraModel

    before = dict(LoraModel.__dict__)
    inside.enable()
    assert inside.enabled()
    assert {name for name in before if LoraModel.__dict__[name] is not before[name]} == set(inside._SEAM)
    inside.enable(seed=3)
    inside.disable()
    assert not inside.enabled()
    assert all(LoraModel.__dict__[name] is value for name, value in before.items())
    inside.disable()


def test_a_patch_by_somebody_else_is_not_undone(monkeypatch):
    from peft.tuners.lora.model import LoraModel

    inside.enable()
    ours = LoraModel.add_weighted_adapter
    with monkeypatch.context() as patch:
        patch.setattr(LoraModel, "add_weighted_adapter", lambda self: None)
        with pytest.raises(PeerError, match=r"add_weighted_adapter was replaced after fastmerge was enabled"):
            inside.disable()
    assert LoraModel.add_weighted_adapter is ours
    inside.disable()


@pytest.mark.parametrize("version", ["0.18.0", "0.22.0", "1.0"])
def test_versions_that_are_not_known_are_refused(version, monkeypatch):
    from peft.tuners.lora.model import LoraModel

    before = LoraModel.add_weighted_adapter
    monkeypatch.setattr(peft, "__version__", version)
    with pytest.raises(PeerError, match=rf"peft {version} is not a version that fastmerge knows \(0.19, 0.20, 0.21\)"):
        inside.enable()
    assert LoraModel.add_weighted_adapter is before


@pytest.mark.parametrize("name", list(inside._SEAM))
def test_changed_signatures_are_refused(name, monkeypatch):
    from peft.tuners.lora.model import LoraModel

    before = dict(LoraModel.__dict__)
    with monkeypatch.context() as patch:
        patch.setattr(LoraModel, name, lambda self, adapters, weights: None)
        with pytest.raises(PeerError, match=rf"{name} takes \(self, adapters, weights\)"):
            inside.enable()
    assert all(LoraModel.__dict__[key] is value for key, value in before.items())


def test_wrong_options_are_refused():
    with pytest.raises(ArgumentError, match="seed must be an integer"):
        inside.enable(seed=0.5)  # type: ignore[arg-type]
    with pytest.raises(FastmergeError):
        inside.enable(backend="abacus")
    assert not inside.enabled()


# -- around the merge


def portrait(model: Any) -> dict[str, Any]:
    """All that there is to see of a model but the merged numbers: modules, attributes, tensors, configurations."""
    seen: dict[str, Any] = {}
    for name, module in model.named_modules():
        plain = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, str | int | float | bool | list | dict | tuple | type(None)) and key[0] != "_"
        }
        children = list(module._modules), list(module._parameters), list(module._buffers)
        extra = (
            type(module),
            module.training,
            set(vars(module)),
            module.extra_repr(),
            getattr(module, "_active_adapter", 0),
        )
        seen[name] = str(plain) if "lora" not in name else plain, children, extra
    for name, x in (*model.named_parameters(), *model.named_buffers()):
        kind = type(x), x.shape, x.dtype, x.device, x.requires_grad, x.is_leaf, x.grad is None
        seen[f"tensor {name}"] = kind, None if ".merged" in name else x.detach().clone().tolist()
    tuner = model.base_model
    seen["configurations"] = {name: config.to_dict() for name, config in model.peft_config.items()}
    seen["tuner"] = model.active_adapters, tuner.targeted_module_names, sorted(tuner.__dict__)
    seen["state"] = list(model.state_dict())
    return seen


def two_active(model: Any) -> None:
    model.base_model.set_adapter(["one", "three"])


def frozen_and_not(model: Any) -> None:
    """As nobody would leave it: each third parameter is the other way round."""
    for number, (_, parameter) in enumerate(model.named_parameters()):
        if number % 3 == 0:
            parameter.requires_grad = not parameter.requires_grad


def merged_in(model: Any) -> None:
    model.merge_adapter(["two"])


SCENES = {
    "all kinds of layers": ({}, None),
    "dense layers": ({"targets": [LINEAR] * 3}, None),
    "layers that not all have": ({"targets": [["query"], ["query", "down"], ["query"]]}, None),
    "by a pattern": ({"targets": [r".*(query|down)"] * 3}, None),
    "dropout and rslora": ({"targets": [LINEAR] * 3, "lora_dropout": 0.1, "use_rslora": True}, None),
    "two active": ({"targets": [LINEAR] * 3}, two_active),
    "inference": ({"targets": [LINEAR] * 3, "inference_mode": True}, None),
    "gradients as nobody leaves them": ({"targets": [LINEAR] * 3}, frozen_and_not),
    "evaluated": ({"targets": [LINEAR] * 3}, lambda model: model.eval()),
    "disabled": ({"targets": [LINEAR] * 3}, lambda model: model.base_model.disable_adapter_layers()),
    "merged into the base": ({"targets": [LINEAR] * 3}, merged_in),
    "of bfloat16": ({"targets": [LINEAR] * 3, "dtype": torch.bfloat16}, lambda model: model.to(torch.bfloat16)),
    "float32 on bfloat16": (
        {"targets": [LINEAR] * 3},
        lambda model: model.base_model.model.query.base_layer.bfloat16(),
    ),
    "modules that are saved": ({"targets": [["query"]] * 3, "modules_to_save": ["down"]}, None),
    "gaussian numbers": ({"targets": [LINEAR] * 3, "init_lora_weights": "gaussian"}, None),
    "patterns of ranks": ({"targets": [LINEAR] * 3, "alpha_pattern": {"down": 1}, "rank_pattern": {"query": 4}}, None),
}


@pytest.mark.parametrize("kind", ["ties", "svd"])
@pytest.mark.parametrize("scene", SCENES)
def test_the_model_looks_as_peft_leaves_it(scene, kind, monkeypatch):
    options, arrange = SCENES[scene]
    portraits = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = make(**options)
        if arrange is not None:
            arrange(model)
        if enabled:
            inside.enable()
        try:
            add(model, kind, [1.0, 0.5, 0.7], name="merged", **({"density": 0.5} if kind == "ties" else {}))
        except ValueError as error:  # PEFT refuses modules_to_save
            portraits.append(str(error))
        else:
            portraits.append(portrait(model))
        inside.disable()
    theirs, ours = portraits
    if isinstance(theirs, str):
        assert ours == theirs
        return
    assert ours.keys() == theirs.keys()
    for name, one in theirs.items():
        assert ours[name] == one, name


@pytest.mark.parametrize("name", ["o", "down", "lora_A", "weight", "wo", "query_lora"])
def test_others_whose_names_hold_the_new_one_are_frozen_as_peft_does(name):
    def gradients(enabled: bool) -> dict[str, bool]:
        model = make(targets=[LINEAR] * 3)
        for parameter in model.parameters():
            parameter.requires_grad = True
        if enabled:
            inside.enable()
        add(model, "ties", [1.0, 0.5, 0.7], name=name, density=0.5)
        inside.disable()
        return {key: x.requires_grad for key, x in model.named_parameters()}

    assert gradients(True) == gradients(False)


def test_twenty_target_modules_are_condensed_as_peft_does():
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(
                [nn.ModuleDict({"up": nn.Linear(4, 4), "by": nn.Linear(4, 4)}) for _ in range(12)]
            )

    def targets(enabled: bool) -> Any:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=[f"parts.{i}.up" for i in range(12)])
        # With an adapter of this name there are modules within LoRA layers whose names end as those of targets do.
        model = peft.get_peft_model(Many(), config, adapter_name="up")
        model.add_adapter("two", peft.LoraConfig(r=2, target_modules=[f"parts.{i}.by" for i in range(12)]))
        if enabled:
            inside.enable()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.add_weighted_adapter(["up", "two"], [1.0] * 2, "m", combination_type="ties", density=0.5)
        inside.disable()
        return model.peft_config["m"].target_modules

    assert targets(True) == targets(False)


def test_pefts_own_walk_is_taken_where_its_sources_are_not_known(monkeypatch):
    monkeypatch.setattr(peft_injection, "_KNOWN", {})
    walked = []
    walk = peft_injection._lora_layers
    monkeypatch.setattr(peft_injection, "_lora_layers", lambda model: walked.append(1) or walk(model))
    theirs, ours = both(make(), "ties", [1.0, 0.5, 0.7], density=0.5)
    assert_close(theirs, ours)
    assert not walked


def test_the_sources_of_this_peft_are_known():
    from peft.tuners.lora.model import LoraModel

    assert peft_injection.sources(LoraModel) in peft_injection._KNOWN


def test_a_plain_layer_takes_an_adapter_without_pefts_update_and_shows_its_insides_again(monkeypatch):
    from peft.tuners.lora.layer import LoraLayer

    model = make(targets=[[*LINEAR, "turned"]] * 3)
    updated = []
    update = LoraLayer.update_layer
    inside.enable()
    monkeypatch.setattr(LoraLayer, "update_layer", lambda self, *a, **k: updated.append(1) or update(self, *a, **k))
    before = [name for name, _ in model.named_modules()]
    add(model, "ties", [1.0, 0.5, 0.7], name="ours", density=0.5)
    assert len(updated) == 1  # of the layer that is no nn.Linear underneath
    after = [name for name, _ in model.named_modules()]
    assert [name for name in after if ".ours" not in name] == before and len(after) > len(before)
    for module in model.modules():
        assert not {"named_modules", "update_layer"} & vars(module).keys()


def test_no_random_number_is_drawn_for_what_is_overwritten():
    model = make()
    inside.enable()
    before = torch.get_rng_state()
    add(model, "ties", [1.0, 0.5, 0.7], name="ours", density=0.5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", ["ties", "svd"])
def test_a_merge_that_fails_leaves_no_adapter(kind, monkeypatch):
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise MemoryError("no more")

    model = make()
    inside.enable()
    monkeypatch.setattr(ops, "consensus_merge_many", fail)
    monkeypatch.setattr(low_rank, "of_products", fail)
    with pytest.raises(MemoryError):
        add(model, kind, [1.0, 0.5, 0.7], name="ours", **({"density": 0.5} if kind == "ties" else {}))
    assert "ours" not in model.peft_config
    assert not any("ours" in name for name, _ in model.named_parameters())
    assert inside._running.call is None


def test_dora_adapters_get_their_magnitudes():
    model = make(targets=[LINEAR] * 3, use_dora=True)
    theirs, ours = both(model, "ties", [1.0, 0.5, 0.7], density=0.5)
    assert_close(theirs, ours)
    assert any("magnitude" in name for name in ours)


def test_an_adapter_that_is_there_already_stays():
    model = make()
    inside.enable()
    first = add(model, "ties", [1.0, 0.5, 0.7], name="ours", density=0.5)
    model.add_weighted_adapter(NAMES[:3], [2.0, 2.0, 2.0], "ours", combination_type="ties", density=0.9)
    for name, x in model.named_parameters():
        if ".ours" in name:
            assert torch.equal(x, first[name.replace(".ours", "")])


def test_the_methods_beneath_work_when_called_by_themselves():
    model = make(targets=[LINEAR] * 3)
    lora, layer = model.base_model, model.base_model.model.query
    arguments = ("ties", NAMES[:3], [1.0, 0.5, 0.7], layer, 0.5, "total")
    theirs = lora._generalized_task_arithmetic_weighted_adapter(*arguments)
    inside.enable()
    ours = lora._generalized_task_arithmetic_weighted_adapter(*arguments)
    for x, y in zip(theirs, ours, strict=True):
        torch.testing.assert_close(y, x, rtol=2e-6, atol=1e-6)
