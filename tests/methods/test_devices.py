"""Statistics and merges of chunks on a GPU: nothing but what finishes comes to the host, and nothing is mixed.

There need be no GPU: torch's meta tensors have a device and no values, and refuse to be mixed or brought to the host.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastmerge import methods, ops
from fastmerge.backends.rule import PcbRule, SparsifyRule
from fastmerge.methods.base import Chunk, Placed, Statistic, TensorContext
from fastmerge.methods.geometry import Coefficients
from fastmerge.methods.pcb_statistics import RuleOfWhole
from fastmerge.methods.ram import Factors
from fastmerge.methods.sce import Energies, SelectedOfWhole
from fastmerge.methods.statistics import Rescale, StreamedBounds
from tests.engine.small_family import taken
from tests.engine.test_same_bits import follows_peer

NUMEL, ROW = 70_000, 1000
ELSEWHERE = torch.device("meta")
FORMS: dict[str, dict[str, Any]] = {
    "linear": {},
    "task_arithmetic": {},
    "ties": {"density": [0.4, 0.2]},
    "ties whole": {"density": [0.4, 0.2], "scope": "model"},
    "breadcrumbs": {"density": [0.4, 0.2], "gamma": 0.05},
    "dare_ties": {"density": [0.4, 0.2]},
    "della": {"density": [0.4, 0.2], "epsilon": 0.1},
    "pcb": {"density": [0.4, 0.2]},
    "pcb paper": {"density": [0.4, 0.2], "variant": "paper"},
    "pcb each": {"density": [0.4, 0.2], "scope": "tensor"},
    "slerp": {"t": 0.3},
    "nuslerp": {},
    "nuslerp rows": {"nuslerp_flatten": False},
    "nuslerp columns": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
    "multislerp": {},
    "karcher": {},
    "model_stock": {},
    "model_stock rows": {"filter_wise": True},
    "passthrough": {"scale": 0.7},
    "nearswap": {"t": 0.5},
    "sce": {"select_topk": 0.5},
    "sce all": {},
    "ram": {},
    "ramplus_tl": {},
    "arcee_fusion": {},
}


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ops take meta tensors, and are watched: all that one is given, rules included, must be in one place."""
    monkeypatch.setattr("fastmerge.ops._checks.DEVICES", ("cpu", "meta"))
    for name in ops.__all__:
        function = getattr(ops, name)
        if callable(function) and not isinstance(function, type):
            monkeypatch.setattr(ops, name, watched(name, function))


def watched(name: str, function: Any) -> Any:
    def call(*arguments: Any, **named: Any) -> Any:
        places = {x.device for argument in (*arguments, *named.values()) for x in tensors_in(argument)}
        assert len(places) <= 1, f"{name} is given tensors in {places}"
        return function(*arguments, **named)

    return call


def tensors_in(argument: Any) -> list[torch.Tensor]:
    if isinstance(argument, list | tuple):
        return [x for each in argument for x in tensors_in(each)]
    if isinstance(argument, SparsifyRule | PcbRule):
        return tensors_of(argument)
    return [argument] if isinstance(argument, torch.Tensor) else []


def context_for(case: str, numerics: str) -> tuple[methods.Method, TensorContext]:
    method = methods.get(case.partition(" ")[0])
    given = FORMS[case]
    per_model = methods.parameters(method.name)
    shared = {name: value for name, value in given.items() if not per_model[name].per_model}
    per_model_given = {name: value for name, value in given.items() if name not in shared}
    each = [
        {name: v[index] if isinstance(v, list) else v for name, v in per_model_given.items()}
        | ({"weight": weight} if "weight" in per_model else {})
        for index, weight in enumerate((0.7, -0.3)[: method.most_models])
    ]
    parameters = methods.bind(method, shared, each, tensor="w", labels=["a", "b"][: method.most_models])
    compute = method.compute_dtype(torch.bfloat16, numerics)
    return method, TensorContext("w", (NUMEL // ROW, ROW), parameters, (0, 1), compute, numerics, seed=3)


def chunk_of(case: str, device: torch.device | str, numel: int = NUMEL, offset: int = 0) -> Chunk:
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(numel, generator=generator).bfloat16().to(device) for _ in range(3)]
    return Chunk(offset, drawn[0], taken(case.partition(" ")[0], drawn[1:]))


def tensors_of(state: Any) -> list[torch.Tensor]:
    """The tensors that a state is made of."""
    if isinstance(state, torch.Tensor):
        return [state]
    return [value for value in vars(state).values() if isinstance(value, torch.Tensor)]


def needed_for(method: methods.Method, context: TensorContext, case: str) -> list[Statistic]:
    return [*method.model_statistics([context]), *method.statistics(context, whole=False)]


def known_on_host(method: methods.Method, context: TensorContext, case: str) -> tuple[list[Statistic], dict[str, Any]]:
    """All statistics of a tensor that is cut, with what they find on the host."""
    chunk = chunk_of(case, "cpu")
    known: dict[str, Any] = {}
    needed = needed_for(method, context, case)
    for statistic in needed:
        statistic.prepare(chunk, known)
        known[statistic.name] = statistic.finish(statistic.observe(chunk, known), known)
    for found in known.values():
        if isinstance(found, StreamedBounds):
            # Ties that chunks of the host had: no tensor has chunks in two places.
            found._before.clear()
            found._total = None
    return needed, known


@pytest.mark.parametrize("numerics", ["fp32", "mergekit"])
@pytest.mark.parametrize("case", FORMS)
def test_states_stay_on_the_device_of_the_chunks(case: str, numerics: str) -> None:
    if numerics == "mergekit" and not follows_peer(case):
        return
    method, context = context_for(case, numerics)
    needed, known = known_on_host(method, context, case)
    for value in known.values():
        assert not isinstance(value, StreamedBounds | Placed) or value.values.device.type == "cpu"
    for statistic in needed:
        state = statistic.observe(chunk_of(case, ELSEWHERE, 40_000), known)
        for grown in (
            state,
            statistic.extend(state, chunk_of(case, ELSEWHERE, 30_000, 40_000), known),
            statistic.add(statistic.observe(chunk_of(case, ELSEWHERE, 30_000, 40_000), known), state),
        ):
            found = tensors_of(grown)
            assert found and all(x.device == ELSEWHERE for x in found), statistic.name
    if method.cut_unit(context) == NUMEL:
        return  # it is never cut
    for offset in (0, 40_000):
        chunk = chunk_of(case, ELSEWHERE, 30_000, offset)
        out = torch.empty(30_000, dtype=torch.float16, device=ELSEWHERE)
        method.merge(context, chunk, known, out)


@pytest.mark.parametrize("numerics", ["fp32", "mergekit"])
@pytest.mark.parametrize("case", FORMS)
def test_tensors_in_memory_are_merged_where_they_are(case: str, numerics: str) -> None:
    if numerics == "mergekit" and not follows_peer(case):
        return
    method, context = context_for(case, numerics)
    known: dict[str, Any] = {}
    if method.model_statistics([context]):
        known = known_on_host(method, context, case)[1]
    chunk = chunk_of(case, ELSEWHERE)
    for statistic in method.statistics(context, whole=True):
        if isinstance(statistic, RuleOfWhole | SelectedOfWhole):
            return  # looks at values on the way
        state = statistic.observe(chunk, known)
        assert all(x.device == ELSEWHERE for x in tensors_of(state))
        known[statistic.name] = (
            [1.0, 1.0]
            if isinstance(statistic, Rescale | Coefficients | Energies | Factors)
            else statistic.finish(state, known)
        )
    method.merge(context, chunk, known, torch.empty(NUMEL, dtype=torch.bfloat16, device=ELSEWHERE))


def test_a_small_result_is_copied_to_each_device_once() -> None:
    placed = Placed(torch.arange(3))
    assert placed.on(torch.device("cpu")) is placed.values
    there = placed.on(ELSEWHERE)
    assert there.device == ELSEWHERE and placed.on(ELSEWHERE) is there
