"""fastmerge's algorithms run by FusionBench, beside its own. `python -m checks.peers fusion_bench` runs this."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastmerge
from fastmerge import ops
from fastmerge.errors import ArgumentError, ArgumentTypeError, MergeError
from fastmerge.integrations import fusion_bench as fast

if os.environ.get("FASTMERGE_PEER") == "fusion_bench":
    import fusion_bench
else:
    fusion_bench = pytest.importorskip(
        "fusion_bench", reason="no FusionBench; `python -m checks.peers fusion_bench` brings it"
    )
from fusion_bench.method import DareTaskArithmetic, TiesMergingAlgorithm
from fusion_bench.method.dare import DareTiesMerging
from fusion_bench.modelpool import BaseModelPool

CONFIGS = Path(fast.__file__).parent / "fusion_bench_config" / "method" / "fastmerge"
SAVED = """
import torch
from torch import nn


def make():
    return nn.Sequential(
        nn.Embedding(30, 24), nn.Linear(24, 40), nn.LayerNorm(40), nn.Linear(40, 24, bias=False), nn.BatchNorm1d(24)
    )


def load(path):
    model = make()
    model.load_state_dict(torch.load(path))
    return model
"""
_names: dict[str, Any] = {}
exec(SAVED, _names)


def make_pool(seed: int = 0, count: int = 3, tied: bool = False, dtype: torch.dtype = torch.float32) -> BaseModelPool:
    """A pretrained module and some that were tuned. tied: task vectors of few values, so that many cancel."""
    torch.manual_seed(seed)
    base = _names["make"]().to(dtype)
    models = {"_pretrained_": base}
    for number in range(count):
        tuned = copy.deepcopy(base)
        for name, x in tuned.state_dict().items():
            if not x.is_floating_point():
                continue
            if tied:
                # Exact in float32 whatever is added: the base's own numbers are cut to multiples of 2^-8.
                base.state_dict()[name].copy_((base.state_dict()[name] * 256).round() / 256)
                x.copy_(base.state_dict()[name] + torch.randint(-2, 3, x.shape) / 256)
            else:
                x.add_(0.1 * torch.randn_like(x))
        models[f"model{number}"] = tuned
    return BaseModelPool(models=models)


def fresh(pool: BaseModelPool) -> BaseModelPool:
    """A copy: algorithms write into the pretrained module."""
    return copy.deepcopy(pool)


def assert_same(ours: nn.Module, theirs: nn.Module, rtol: float = 1e-6, atol: float = 1e-7) -> None:
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for name, x in ours.state_dict().items():
        assert x.dtype == expected[name].dtype
        torch.testing.assert_close(x, expected[name], rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


# -- beside FusionBench's own


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 999),
    count=st.integers(1, 5),
    threshold=st.sampled_from([20, 1.5, 0.5, 0.0, 99, 60]),
    merge_func=st.sampled_from(["sum", "mean"]),
    scaling=st.sampled_from([0.3, 1.0, -0.5]),
    removed=st.sampled_from([[], ["1.weight"], ["0.weight", "4.num_batches_tracked"]]),
    tied=st.booleans(),
)
def test_ties_equals_fusion_benchs_own(seed, count, threshold, merge_func, scaling, removed, tied):
    pool = make_pool(seed, count, tied)
    parameters = {
        "scaling_factor": scaling, "threshold": threshold, "remove_keys": removed, "merge_func": merge_func,
    }  # fmt: skip
    theirs_pool = fresh(pool)
    expected = copy.deepcopy(theirs_pool.load_pretrained_model()).state_dict()
    theirs = _strictly(TiesMergingAlgorithm(**parameters), theirs_pool, removed, expected)
    ours = fast.Ties(**parameters).run(fresh(pool))
    assert_same(ours, theirs)


def _strictly(algorithm: Any, pool: BaseModelPool, removed: list[str], base: dict[str, torch.Tensor]) -> nn.Module:
    """FusionBench loads what it merged strictly, and so cannot leave keys out of a module: fill them in there."""
    model = pool.load_pretrained_model()
    strict = type(model).load_state_dict
    model.load_state_dict = lambda state: strict(model, {**{name: base[name] for name in removed}, **state})
    merged = algorithm.run(pool)
    del model.__dict__["load_state_dict"]
    return merged


def test_cancelled_task_vectors_follow_the_majority_of_the_whole_model():
    """Without the majority's sign, these cases would come out otherwise."""
    differing = 0
    for seed in range(6):
        pool = make_pool(seed, 2, tied=True)
        for x in pool.load_model("model0").state_dict().values():
            if x.is_floating_point() and seed % 2:
                x.sub_(1 / 256)  # most are negative
        theirs = TiesMergingAlgorithm(1.0, 90, [], "sum").run(fresh(pool))
        ours = fast.Ties(1.0, 90, [], "sum").run(fresh(pool))
        assert_same(ours, theirs)
        state, base = ours.state_dict(), pool.load_pretrained_model().state_dict()
        tuned = [pool.load_model(name).state_dict() for name in pool.model_names]
        for name, x in base.items():
            if x.is_floating_point():
                cancelled = (tuned[0][name] - x) == -(tuned[1][name] - x)
                signs = (state[name] - x)[cancelled].sign()
                differing |= 1 if bool((signs > 0).any()) else 0
                differing |= 2 if bool((signs < 0).any()) else 0
    assert differing == 3


class _Counted:
    """Stands in for torch.rand_like: our counter-based masks, tensor by tensor in FusionBench's order."""

    def __init__(self, pool: BaseModelPool, ratio: float, seed: int, linear: bool) -> None:
        base = pool.load_pretrained_model()
        linears = {id(m.weight) for m in base.modules() if isinstance(m, nn.Linear)}
        names = [n for n, p in base.named_parameters() if not linear or id(p) in linears]
        self.queue = [
            ops.consensus_merge(
                None, [torch.ones_like(base.get_parameter(name).data)], [1.0], inputs="deltas", method="bernoulli",
                density=1 - ratio, seed=seed, tensor_id=ops.tensor_id(name), model=place, election="none",
                divisor="none",
            )
            for place in range(len(pool.model_names))
            for name in names
        ]  # fmt: skip

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        mask = self.queue.pop(0)
        assert mask.shape == x.shape
        return torch.where(mask != 0, 2.0, -1.0)


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("linear", [True, False])
def test_dare_is_fusion_benchs_formula_on_counted_masks(linear, rescale, monkeypatch):
    pool, ratio, seed = make_pool(), 0.4, 77
    pool.load_model("model0")[2].weight.requires_grad_(False)
    for name in pool.all_model_names:
        pool.load_model(name)[2].bias.requires_grad_(False)
    if not linear:  # a frozen parameter has a mask drawn there, too
        for name in pool.all_model_names:
            pool.load_model(name)[2].weight.requires_grad_(False)
    else:
        pool.load_model("model0")[2].weight.requires_grad_(True)
    parameters = {"scaling_factor": 0.3, "sparsity_ratio": ratio, "only_on_linear_weights": linear, "rescale": rescale}
    ours = fast.Dare(**parameters, seed=seed).run(fresh(pool))
    monkeypatch.setattr(torch, "rand_like", _Counted(pool, ratio, seed, linear))
    theirs = DareTaskArithmetic(**parameters).run(fresh(pool))
    monkeypatch.undo()
    assert_same(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("linear", [True, False])
def test_dare_ties_is_fusion_benchs_formula_on_counted_masks(linear, monkeypatch):
    # FusionBench takes a model's buffers for their own task vectors there; they are left out.
    pool, ratio, seed, removed = make_pool(), 0.4, 77, ["4.running_mean", "4.running_var"]
    parameters = {
        "sparsity_ratio": ratio, "only_on_linear_weights": linear, "rescale": True, "scaling_factor": 0.5,
        "threshold": 20, "remove_keys": removed, "merge_func": "mean",
    }  # fmt: skip
    ours = fast.DareTies(**parameters, seed=seed).run(fresh(pool))
    monkeypatch.setattr(torch, "rand_like", _Counted(pool, ratio, seed, linear))
    theirs_pool = fresh(pool)
    with torch.no_grad():
        base = copy.deepcopy(theirs_pool.load_pretrained_model()).state_dict()
        theirs = _strictly(DareTiesMerging(**parameters), theirs_pool, removed, base)
    monkeypatch.undo()
    assert_same(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("algorithm", [fast.Ties, fast.Dare, fast.DareTies, fast.Pcb, fast.Fr])
def test_the_merged_module_is_trained_on_as_the_pretrained_one_was(algorithm):
    pool = make_pool()
    base = pool.load_pretrained_model()
    base[1].bias.requires_grad_(False)
    before = {name: x.requires_grad for name, x in base.named_parameters()}
    merged = algorithm().run(pool)
    assert merged is base
    assert {name: x.requires_grad for name, x in merged.named_parameters()} == before
    assert all(x.is_leaf and x.grad is None for x in merged.parameters())
    merged.eval()(torch.arange(5)).sum().backward()
    assert merged[1].weight.grad is not None and merged[1].bias.grad is None


def test_dare_takes_its_seed_from_torch_unless_it_is_given():
    pool = make_pool()

    def run(torch_seed: int, **parameters: Any) -> torch.Tensor:
        torch.manual_seed(torch_seed)
        return fast.Dare(**parameters).run(fresh(pool))[1].weight

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    assert torch.equal(run(1, seed=4), run(2, seed=4))


# -- what FusionBench does not have


def test_pcb_is_the_method_on_the_state_dicts():
    pool = make_pool()
    base, *models = [pool.load_model(name).state_dict() for name in ["_pretrained_", *pool.model_names]]
    expected = fastmerge.merge(models, base=base, method="pcb", density=0.2, lambda_=0.8)
    base_kept = base["1.weight"].clone()
    merged = fast.Pcb(scaling_factor=0.8, density=0.2).run(fresh(pool)).state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in merged.items())
    removed = fast.Pcb(scaling_factor=0.8, density=0.2, remove_keys=["1.weight"]).run(fresh(pool)).state_dict()
    assert torch.equal(removed["1.weight"], base_kept)
    assert not torch.equal(removed["3.weight"], expected["3.weight"])  # which competes with fewer now


def test_fr_is_the_method_on_the_state_dicts():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.Linear(24, 20)
            self.mlp = nn.Linear(20, 24)

    torch.manual_seed(0)
    models = {name: Named() for name in ("_pretrained_", "a", "b")}
    states = {name: copy.deepcopy(model.state_dict()) for name, model in models.items()}
    pool = BaseModelPool(models=models)
    for options, wanted in (
        ({}, {}),
        ({"ratio": 0.3, "mode": "official", "align": True}, {"ratio": 0.3, "mode": "official", "align": True}),
        ({"not_filtered": ["mlp.weight"]}, {"exclude_": r"^mlp\.weight$"}),
    ):
        expected = fastmerge.merge(
            [states["a"], states["b"]], base=states["_pretrained_"], method="fr", lambda_=0.5, **wanted
        )
        merged = fast.Fr(scaling_factor=0.5, **options).run(fresh(pool)).state_dict()
        assert all(torch.equal(x, expected[name]) for name, x in merged.items()), options


# -- what is refused


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        (lambda: fast.Ties(threshold=100), "threshold=100 is out of range"),
        (lambda: fast.Ties(threshold=-1), "threshold=-1 is out of range"),
        (lambda: fast.Ties(merge_func="max"), "merge_func='max' is not known here; use one of 'sum', 'mean'"),
        (lambda: fast.Dare(sparsity_ratio=1.0), "sparsity_ratio=1.0 is out of range"),
        (lambda: fast.DareTies(sparsity_ratio=-0.1), "sparsity_ratio=-0.1 is out of range"),
        (lambda: fast.Pcb(density=2), "density"),
    ],
)
def test_wrong_parameters_are_named(algorithm, message):
    with pytest.raises(ArgumentError, match=message):
        algorithm().run(make_pool())


def test_models_that_do_not_fit_are_named():
    pool = make_pool()
    pool.load_model("model1")[4].num_batches_tracked += 1
    with pytest.raises(ArgumentError, match=r"'4.num_batches_tracked' holds torch.int64 and differs .* 'model1'"):
        fast.Ties().run(pool)
    fast.Ties(remove_keys=["4.num_batches_tracked"]).run(pool)
    pool = make_pool()
    pool._models["model2"] = nn.Sequential(nn.Embedding(31, 24))
    with pytest.raises(ArgumentError, match=r"'0.weight' is \[31, 24\] in the model 'model2' and \[30, 24\]"):
        fast.Ties().run(pool)
    pool._models["model2"] = nn.Sequential(nn.Embedding(30, 24))
    with pytest.raises(ArgumentError, match=r"the model 'model2' has no tensor '1.weight'"):
        fast.Ties().run(pool)


@pytest.mark.parametrize("algorithm", [fast.Ties, fast.Dare, fast.DareTies, fast.Pcb, fast.Fr])
def test_nan_is_refused(algorithm):
    pool = make_pool()
    pool.load_model("model1")[1].weight.data[3, 4] = float("nan")
    with pytest.raises(MergeError, match="NaN"):
        algorithm().run(pool)


def test_a_pool_of_state_dicts_is_refused():
    pool = make_pool()
    pool._models["model1"] = pool.load_model("model1").state_dict()
    with pytest.raises((ArgumentTypeError, ValueError, TypeError)):
        fast.Ties().run(pool)


# -- the configurations, by FusionBench's own program


def test_fusion_benchs_own_program_runs_each_configuration_and_its_ties_equals_ours(tmp_path):
    """One start of FusionBench's command line for all: models loaded by its pool, merged, saved by it."""
    (tmp_path / "saved_models.py").write_text(SAVED)
    pool = make_pool()
    entries = []
    for name in pool.all_model_names:
        torch.save(pool.load_model(name).state_dict(), tmp_path / f"{name}.pt")
        entries.append(f"  {name}:\n    _target_: saved_models.load\n    path: {tmp_path / name}.pt\n")
    configs = tmp_path / "configs" / "modelpool"
    configs.mkdir(parents=True)
    (configs / "small.yaml").write_text(
        "_target_: fusion_bench.modelpool.BaseModelPool\n_recursive_: false\nmodels:\n" + "".join(entries)
    )
    ours = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    assert ours == ["dare", "dare_ties", "fr", "pcb", "ties"]
    arguments = [
        "fusion_bench",
        "--multirun",
        f"hydra.searchpath=[file://{tmp_path / 'configs'},pkg://fastmerge.integrations.fusion_bench_config]",
        f"hydra.sweep.dir={tmp_path / 'run'}",
        "modelpool=small",
        "method=" + ",".join([*(f"fastmerge/{name}" for name in ours), "ties_merging"]),
        "taskpool=dummy",
        "seed=3",
        f"merged_model_save_path={tmp_path}/merged_${{hydra:job.num}}.pt",
        "fabric.loggers=null",
        "fabric.accelerator=cpu",
    ]
    # The pool of plain modules has no way of its own to save one.
    program = f"""
import sys, torch
from fusion_bench.modelpool import BaseModelPool
BaseModelPool.save_model = lambda self, model, path, *a, **k: torch.save(model.state_dict(), path)
from fusion_bench.scripts.cli import _hydra_main
sys.argv = {arguments!r}
_hydra_main()
"""
    paths = os.pathsep.join([str(tmp_path), str(Path(fastmerge.__file__).parents[1])])
    run = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": paths}, cwd=tmp_path,
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-3000:]
    base = torch.load(tmp_path / "_pretrained_.pt")
    merged = {name: torch.load(tmp_path / f"merged_{number}.pt") for number, name in enumerate([*ours, "ties_merging"])}
    for name in ours:
        assert merged[name].keys() == base.keys()
        assert not torch.equal(merged[name]["1.weight"], base["1.weight"])
    for name, x in merged["ties_merging"].items():
        torch.testing.assert_close(merged["ties"][name], x, rtol=1e-6, atol=1e-7)
    for name in ("ties", "pcb", "fr"):
        expected = fast.Ties.from_yaml(CONFIGS / f"{name}.yaml").run(fresh(pool)).state_dict()
        assert all(torch.equal(x, expected[key]) for key, x in merged[name].items())


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_the_configurations_hold_the_defaults_and_survive_a_round_trip(name, tmp_path):
    algorithm = fast.Ties.from_yaml(CONFIGS / f"{name}.yaml")
    default = type(algorithm)()
    assert type(algorithm).__module__ == "fastmerge.integrations.fusion_bench"
    ours = {key: value for key, value in vars(algorithm).items() if not key.startswith("_")}
    for key, value in ours.items():
        assert getattr(default, key) == value, key
    algorithm.to_yaml(tmp_path / "again.yaml")
    again = fast.Ties.from_yaml(tmp_path / "again.yaml")
    assert {key: getattr(again, key) for key in ours} == ours
