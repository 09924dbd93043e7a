"""One merge, one digest: whatever the chunks, budget, shards, backend and threads, and from files or memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

import fastmerge
from fastmerge import backends, methods
from fastmerge.engine.executor import DictSink, execute
from fastmerge.engine.plan import make_plan
from fastmerge.engine.sources import StateDictSource
from fastmerge.merging import merge_checkpoints
from fastmerge.merging_in_memory import fixed_parameters
from fastmerge.methods.base import MethodInFloat32, MethodWithoutPeer
from fastmerge.methods.statistics import KeyHistogram
from tests.engine.small_family import Tensors, config_for, family, knows_base, load, save_family, taken, weighed
from tests.numeric import assert_bitwise_equal

WEIGHTS = [0.7, -0.2, 0.45]
INTERPRETED = "triton" if backends.reason("triton") is None and not torch.cuda.is_available() else None
"""Triton's interpreter is slow: whole merges are run by it once, below, on very small models."""
WORKING = [name for name, reason in backends.available().items() if reason is None and name != INTERPRETED]


MODEL_SCOPE = ["ties whole", "breadcrumbs whole", "pcb script", "pcb paper", "pcb each"]
OF_ROWS = ["nuslerp rows", "nuslerp columns", "model_stock rows"]
CASES = [*(name for name in methods.names() if name != "fr"), *MODEL_SCOPE, *OF_ROWS, "sce all"]
"""Methods, some with a word that says which form of them. fr, which promises a tolerance, is in tests/methods."""

WITHOUT_DENSITY: dict[str, dict[str, Any]] = {
    "linear": {},
    "nearswap": {"t": 1e-4},
    "sce": {"select_topk": 0.4},
    "ram": {"epsilon": 1e-4},
    "ramplus_tl": {"epsilon": 1e-4, "r": 0.5, "alpha": 1.5},
    "arcee_fusion": {},
}

FORMS: dict[str, dict[str, Any]] = {
    "all": {"select_topk": 1.0},
    "whole": {"scope": "model"},
    "each": {"scope": "tensor"},
    "script": {"variant": "script"},
    "paper": {"variant": "paper"},
    "rows": {"filter_wise": True},
    "columns": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
}
GEOMETRIC: dict[str, dict[str, Any]] = {
    "slerp": {"t": 0.3},
    "nuslerp": {},
    "multislerp": {},
    "karcher": {},
    "model_stock": {},
    "passthrough": {"scale": 0.7},
}
REFUSED = ("pcb", *(name for name in GEOMETRIC if name != "passthrough"))
"""Methods that do not go with mergekit's numbers."""


def parameters_for(case: str) -> dict[str, Any]:
    method, _, form = case.partition(" ")
    if method in GEOMETRIC:
        rows = {"nuslerp_flatten": False} if case == "nuslerp rows" else FORMS.get(form, {})
        return GEOMETRIC[method] | rows
    given: dict[str, Any] = dict(WITHOUT_DENSITY.get(method, {"density": 0.4}))
    if method not in WITHOUT_DENSITY and method != "pcb":
        given["rescale"] = True
    given |= FORMS.get(form, {})
    if method.startswith("breadcrumbs"):
        given["gamma"] = 0.05
    if method.startswith("della"):
        given["epsilon"] = 0.2
    return given


def follows_peer(case: str) -> bool:
    """Whether the method knows mergekit's numbers: not those that mergekit has not, and not those of float32 alone."""
    own = isinstance(methods.get(case.partition(" ")[0]), MethodWithoutPeer | MethodInFloat32)
    return not own and not case.startswith(REFUSED) and "whole" not in case


def in_chunks(
    method: str, base: Tensors, tuned: list[Tensors], backend: str, chunk: int | None, numerics: str
) -> Tensors:
    """A merge in memory with every tensor cut into chunks of so many elements."""
    chosen = methods.get(method.partition(" ")[0])
    tuned = taken(chosen.name, tuned)
    plan = make_plan(
        chosen,
        StateDictSource("base", base) if knows_base(chosen.name) else None,
        [StateDictSource(f"models[{index}]", one) for index, one in enumerate(tuned)],
        fixed_parameters(chosen, parameters_for(method) | weighed(chosen.name, WEIGHTS), len(tuned)),
        budget=1 << 62,
        numerics=numerics,
        seed=5,
        backend=backend,
        chunk_elements=chunk,
    )
    sink = DictSink(plan)
    execute(plan, sink, backend=backend)
    return sink.tensors


@pytest.mark.parametrize("numerics", ["fp32", "mergekit"])
@pytest.mark.parametrize("backend", WORKING)
@pytest.mark.parametrize("method", CASES)
def test_cuts_do_not_show(method: str, backend: str, numerics: str) -> None:
    if numerics == "mergekit" and not follows_peer(method):
        return  # refused
    base, tuned = family()
    whole = in_chunks(method, base, tuned, "reference", None, numerics)
    for chunk in (10_007,) if backend == "reference" else (65536, 10_007, 4001):
        cut = in_chunks(method, base, tuned, backend, chunk, numerics)
        for name in whole:
            assert_bitwise_equal(cut[name], whole[name])


@pytest.mark.parametrize("backend", WORKING)
@pytest.mark.parametrize("method", ["ties", "breadcrumbs"])
def test_ties_across_many_blocks_and_odd_cuts(method: str, backend: str) -> None:
    """Three magnitudes in 200,000 elements: every cut falls into a tie group that spans all blocks and chunks."""
    generator = torch.Generator().manual_seed(3)
    base = {"w": torch.zeros(200_000)}
    tuned = [{"w": torch.randint(-2, 3, (200_000,), generator=generator).float()} for _ in range(3)]
    whole = in_chunks(method, base, tuned, "reference", None, "fp32")["w"]
    for chunk in (70_001,) if backend == "reference" else (65536, 70_001, 20_011):
        assert_bitwise_equal(in_chunks(method, base, tuned, backend, chunk, "fp32")["w"], whole)


@pytest.mark.parametrize(("mass", "keys"), [(0.03, 1 << 22), (0.0, 8), (1.0, 4)])
@pytest.mark.parametrize("method", ["ties", "breadcrumbs_ties"])
def test_a_sample_that_misleads_costs_sweeps_and_no_bits(
    method: str, mass: float, keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The window around the sample's ranks may be right, narrow and wrong, or cover a few keys only."""
    monkeypatch.setattr("fastmerge.methods.statistics._WINDOW_MASS", mass)
    monkeypatch.setattr("fastmerge.methods.statistics._WINDOW_KEYS", keys)
    sweeps = []
    generator = torch.Generator().manual_seed(1)
    scale = torch.linspace(0.5, 2.0, 150_000)
    base = {"w": torch.zeros(150_000)}
    tuned = [{"w": torch.randn(150_000, generator=generator) * scale} for _ in range(3)]
    whole = in_chunks(method, base, tuned, "reference", None, "fp32")["w"]
    prepare = KeyHistogram.observe
    monkeypatch.setattr(KeyHistogram, "observe", lambda *a: sweeps.append(1) or prepare(*a))
    assert_bitwise_equal(in_chunks(method, base, tuned, WORKING[0], 30_011, "fp32")["w"], whole)
    assert bool(sweeps) == (keys < 100)


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Path]]:
    root = tmp_path_factory.mktemp("families")
    base, tuned = family()
    return {shards: save_family(root / str(shards), base, tuned, shards=shards) for shards in (1, 3, 7)}


@pytest.mark.parametrize("method", CASES)
def test_one_digest_for_files_of_any_number_within_any_budget_and_the_bits_of_memory(
    method: str, families: dict[int, list[Path]], tmp_path: Path
) -> None:
    digests = set()
    runs: list[tuple[int, dict[str, Any]]] = [
        (1, {}),
        (3, {"shard_size": "100kB"}),
        (7, {"memory_budget": "200kB"}),
        (1, {"memory_budget": "3MiB", "shard_size": 1}),
        *((3, {"backend": backend, "memory_budget": "1MiB"}) for backend in WORKING),
        *((1, {"threads": threads, "memory_budget": "400kB"}) for threads in (1, 2)),
    ]
    for number, (shards, arguments) in enumerate(runs):
        config = config_for(method.partition(" ")[0], families[shards], WEIGHTS, **parameters_for(method))
        if method.startswith(("della", "arcee", *GEOMETRIC)) and "kB" in str(arguments.get("memory_budget")):
            arguments = arguments | {"memory_budget": "1MiB"}
        report = merge_checkpoints(config, tmp_path / str(number), seed=5, **arguments)
        digests.add(report.digest)
    assert len(digests) == 1

    base, tuned = family()
    name = method.partition(" ")[0]
    in_memory = fastmerge.merge(
        taken(name, tuned),
        base=base if knows_base(name) else None,
        method=name,
        seed=5,
        **parameters_for(method) | weighed(name, WEIGHTS),
    )
    written = load(tmp_path / "0")
    assert written.keys() == in_memory.keys()
    for name, tensor in written.items():
        assert_bitwise_equal(in_memory[name], tensor)


@pytest.mark.parametrize("method", ["dare_ties", "della"])
def test_the_seed_shows(method: str) -> None:
    base, tuned = family()
    one, same, other = (
        fastmerge.merge(tuned, base=base, method=method, weight=0.5, density=0.5, seed=seed)
        for seed in (1, 1 + 2**64, 2)
    )
    name = "model.layers.0.self_attn.q_proj.weight"
    assert_bitwise_equal(one[name], same[name])
    assert not torch.equal(one[name], other[name])


@pytest.mark.skipif(INTERPRETED is None, reason="Triton interprets nothing here; tests/gpu merges on a GPU")
@pytest.mark.parametrize("chunk", [None, 700])
@pytest.mark.parametrize("method", CASES)
def test_the_kernels_in_triton(method: str, chunk: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTMERGE_TRITON_BLOCK", "1024")
    base, tuned = family(shapes={"a.weight": (9, 201), "b.weight": (5, 14, 2), "c.weight": (31,)})
    with patch("fastmerge.engine.plan.MODEL_SAMPLE", 1000):
        expected = in_chunks(method, base, tuned, "reference", None, "fp32")
        merged = in_chunks(method, base, tuned, "triton", chunk, "fp32")
    for name in expected:
        assert_bitwise_equal(merged[name], expected[name])
