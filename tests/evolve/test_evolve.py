"""`evolve`: what it finds, what it never does, how it fails, and that it goes on where it ended."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import differential_evolution
from torch import Tensor

from fastmerge import merge
from fastmerge.errors import ArgumentError, CheckpointError, EvaluationError, FastmergeError
from fastmerge.evolve import Cade, De, DevelopmentScore, Evolver, FinalScore, evolve, population
from fastmerge.evolve.members import gather
from fastmerge.evolve.population import Population
from tests.cli.support import process_environment
from tests.evolve.problems import PROBLEMS, as_model, points, score_of
from tests.numeric import assert_bitwise_equal

State = dict[str, Tensor]


def family(count: int = 6, size: int = 12, seed: int = 0) -> list[State]:
    return [as_model(point) for point in points("sphere", count, size, seed)]


def copies(models: list[State]) -> list[State]:
    return [{name: tensor.clone() for name, tensor in model.items()} for model in models]


def same(one: State, other: State) -> None:
    assert list(one) == list(other)
    for name, tensor in one.items():
        assert_bitwise_equal(tensor, other[name])


SPHERE = score_of("sphere")
STRATEGIES = [
    ("evolver", {}),
    ("de", {"F": 0.5, "CR": 0.5, "variants": "rand/1"}),
    ("de", {}),
    ("cade", {"period": 3, "restarts": True, "jitter": True}),
]


# -- what it finds


@pytest.mark.parametrize(("strategy", "options"), STRATEGIES)
def test_members_by_recipe_and_kept_are_the_same_bits_and_inputs_stay_as_they_were(
    strategy: str, options: dict[str, Any]
) -> None:
    models = family(count=7)
    before = copies(models)
    by_recipe, kept = (
        evolve(models, SPHERE, strategy=strategy, generations=4, members=members, seed=3, **options)
        for members in ("recipes", "tensors")
    )
    assert (by_recipe.held, kept.held) == ("recipes", "tensors")
    assert by_recipe.history == kept.history and by_recipe.digest == kept.digest
    same(by_recipe.state, kept.state)
    assert by_recipe.score == SPHERE(by_recipe.state)
    assert by_recipe.evaluations == 7 * 5 and not by_recipe.failures
    for model, then in zip(models, before, strict=True):
        same(model, then)


@pytest.mark.parametrize(("strategy", "options"), STRATEGIES)
def test_the_best_score_never_falls(strategy: str, options: dict[str, Any]) -> None:
    report = evolve(family(count=8), SPHERE, strategy=strategy, generations=12, **options)
    scores = [score for score in report.scores if score is not None]
    assert len(scores) == 13 and scores == sorted(scores) and report.score == scores[-1]
    assert scores[0] == report.first_score


@pytest.mark.parametrize(("strategy", "accepted"), [("evolver", 0), ("cade", 6), ("de", 6)])
def test_what_is_as_good_replaces_a_member_in_differential_evolution_alone(strategy: str, accepted: int) -> None:
    report = evolve(family(), lambda model: 1.0, strategy=strategy, generations=2)
    assert [each["accepted"] for each in report.history if each["event"] == "generation"] == [0, accepted, accepted]


def test_a_history_can_be_worked_out_by_hand() -> None:
    """Every trial of a run, made again from the history with plain torch, has the score that it says."""
    models = family(count=6)
    report = evolve(models, SPHERE, strategy="de", generations=3, seed=11, F=0.4, CR=0.7)
    nodes: list[Any] = [torch.cat([model["body.weight"].view(-1), model["head.bias"]]) for model in models]
    at, seen = list(range(6)), set()
    scores = [-math.inf] * 6
    for record in (each for each in report.history if each["event"] == "evaluation"):
        member = record["member"]
        if record["generation"] == 0:
            scores[member] = record["score"]
            continue
        seen.add(record["variant"])
        x, a, b, c, *more = (nodes[node] for node in (record["x"], *record["others"]))
        assert record["x"] == at[member]
        factors = [torch.tensor(factor) for factor in record["F"]]
        mixed = a + factors[0] * (b - c)
        for factor, p, q in zip(factors[1:], more[::2], more[1::2], strict=True):
            mixed = mixed + factor * (p - q)
        # Which elements were mixed only the score tells: all of those that can be told apart must be explained.
        if record["CR"] == 1.0:
            value = float(-(mixed.double() ** 2).sum())
            assert value == pytest.approx(record["score"], rel=1e-6)
        if record["score"] >= scores[member]:
            scores[member], at[member] = record["score"], len(nodes)
            nodes.append(_masked(x, mixed, record))
            assert float(-(nodes[-1].double() ** 2).sum()) == pytest.approx(record["score"], rel=1e-6)
    assert len(seen) >= 2 and len(nodes) > 6
    final = nodes[at[int(np.argmax(scores))]]
    assert torch.equal(torch.cat([report.state["body.weight"].view(-1), report.state["head.bias"]]), final)


def _masked(x: Tensor, mixed: Tensor, record: dict[str, Any]) -> Tensor:
    """Where the mask is on, mixed: the mask by the documented key of each element."""
    from fastmerge.ops import tensor_id
    from fastmerge.reference import random as streams

    parts, start = [], 0
    for name, numel in (("body.weight", 6), ("head.bias", 6)):
        stream = streams.stream_id(streams.DE_TRIAL, record["member"], record["generation"])
        words = streams.words(0, numel, seed=11, tensor_id=tensor_id(name), stream=stream)
        mask = words < int(record["CR"] * 2**32)
        if record["forced"] is not None and record["forced"][0] == name:
            mask[record["forced"][1]] = True
        parts.append(torch.where(mask, mixed[start : start + numel], x[start : start + numel]))
        start += numel
    return torch.cat(parts)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_de_optimises_as_well_as_scipys(problem: str) -> None:
    """rand/1/bin from the same points, with the same F, CR and number of evaluations; the mean of two seeds.

    `bench/evolve_optimise.py` goes further down, where single runs differ more.
    """
    function, _ = PROBLEMS[problem]
    size, count, generations = 100, 10, 30
    ours, theirs, starts = [], [], []
    for seed in range(2):
        first = points(problem, count, size, seed)
        report = evolve(
            [as_model(point) for point in first], score_of(problem), strategy=De(variants="rand/1", F=0.5, CR=0.1),
            generations=generations, seed=seed, members="tensors",
        )  # fmt: skip
        assert report.score is not None and report.first_score is not None
        ours.append(-report.score)
        starts.append(-report.first_score)
        peer = differential_evolution(
            function, [(-1e9, 1e9)] * size, strategy="rand1bin", init=first, mutation=0.5, recombination=0.1,
            maxiter=generations, tol=0, polish=False, rng=seed,
        )  # fmt: skip
        assert peer.nfev == report.evaluations
        theirs.append(peer.fun)
    assert sum(ours) <= 1.2 * sum(theirs) and sum(ours) < 0.93 * sum(starts)


# -- the live model


def test_a_module_takes_each_trial_and_in_the_end_the_best() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(5, 4)
            self.norm = torch.nn.BatchNorm1d(4)
            self.head = torch.nn.Linear(4, 5, bias=False)
            self.head.weight = self.embed.weight  # tied

    torch.manual_seed(0)
    nets = [Net() for _ in range(3)]
    for number, net in enumerate(nets):
        net.norm.num_batches_tracked += number
        net.norm.running_mean += torch.randn(4)
    live = Net().requires_grad_(True)
    homes = {name: tensor.data_ptr() for name, tensor in live.state_dict().items()}
    met = []

    def score(module: Net) -> float:
        assert module is live and module.head.weight is module.embed.weight
        met.append(int(module.norm.num_batches_tracked))
        return -float(sum((x.detach().double() ** 2).sum() for x in module.parameters()))

    assert gather(nets).evolved == ["embed.weight", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"]
    report = evolve(nets, score, model=live, generations=3, seed=1)
    assert {name: tensor.data_ptr() for name, tensor in live.state_dict().items()} == homes
    assert met == [0, 1, 2] * 4  # integers are each member's own, and stay so
    assert score(live) == report.score and report.best_member is not None
    assert int(live.norm.num_batches_tracked) == report.best_member
    assert report.state["head.weight"].data_ptr() == live.embed.weight.data_ptr()
    assert all(x.grad_fn is None for x in live.parameters())


def test_a_module_holds_the_best_so_far_where_a_run_is_interrupted() -> None:
    nets = [torch.nn.Linear(3, 2) for _ in range(3)]
    live = torch.nn.Linear(3, 2)
    left = 5

    def score(module: torch.nn.Linear) -> float:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return float(left == 3)  # the second input model

    with pytest.raises(ArgumentError, match=r"'weight' of the model is the memory of one of the members"):
        evolve(nets, never, model=nets[1], generations=3)
    with pytest.raises(KeyboardInterrupt):
        evolve(nets, score, model=live, generations=3)
    same(dict(live.state_dict()), dict(nets[1].state_dict()))


def test_a_member_that_an_interrupt_left_half_computed_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def interrupted(self: Population, *others: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Population, "_fill", interrupted)
    nets, live, scores = [torch.nn.Linear(3, 2) for _ in range(3)], torch.nn.Linear(3, 2), iter([1.0, 2.0, 3.0, 4.0])
    with pytest.raises(KeyboardInterrupt):
        evolve(nets, lambda module: next(scores), model=live, generations=3, members="tensors", CR=1.0)
    assert "holds the last trial, not the best member" in caplog.text
    assert not any(torch.equal(live.weight, net.weight) for net in nets)


def test_a_module_of_another_dtype_takes_the_rounded_values() -> None:
    nets = [torch.nn.Linear(9, 4).bfloat16() for _ in range(4)]
    live = torch.nn.Linear(9, 4)

    def score(module: torch.nn.Linear) -> float:
        return -float(module.weight.detach().double().square().sum())

    for members in ("recipes", "tensors"):
        report = evolve(nets, score, model=live, generations=2, strategy="cade", members=members)
        kept = evolve([net.state_dict() for net in nets], _norm_of_weight, generations=2, strategy="cade")
        assert kept.score == report.score
        assert_bitwise_equal(live.weight.detach(), kept.state["weight"].float())


def _norm_of_weight(state: State) -> float:
    return -float(state["weight"].double().square().sum())


def test_what_an_evaluator_does_to_the_live_tensors_does_no_harm() -> None:
    def spoiled(model: State) -> float:
        score = SPHERE(model)
        for tensor in model.values():
            tensor.fill_(9)
        return score

    for members in ("recipes", "tensors"):
        one, other = (
            evolve(family(), score, generations=3, members=members, exclude="bias") for score in (SPHERE, spoiled)
        )
        assert one.history == other.history
        same(one.state, other.state)


PIECE = 512


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(population, "PIECE", PIECE)


@pytest.mark.usefixtures("small_pieces")
def test_a_rejected_trial_leaves_nothing_and_takes_no_memory() -> None:
    """No trial is better: members keep their bits, and nothing of the model's size but the live tensors is taken."""
    models = [{"w": torch.randn(3 * PIECE, generator=torch.Generator().manual_seed(i))} for i in range(4)]
    taken: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            name = str(func)
            if isinstance(result, Tensor) and ("empty" in name or "clone" in name):
                taken.append(result.numel())
            return result

    for members in ("recipes", "tensors"):
        scores = iter([4.0, 3.0, 2.0, 1.0] + [0.0] * 12)
        taken.clear()
        with Watch():
            report = evolve(
                models, lambda model, left=scores: next(left), strategy="cade", generations=3, members=members
            )
        # The live model, once.
        assert [numel for numel in taken if numel >= PIECE] == [3 * PIECE]
        same(report.state, models[0])


@pytest.mark.usefixtures("small_pieces")
def test_tensors_longer_than_a_piece_go_through_a_chain_of_recipes() -> None:
    """Cuts of chains lie within the tensor; kept members are computed at once."""
    generator = torch.Generator().manual_seed(5)
    models = [{"w": torch.randn(3 * PIECE + 101, generator=generator).bfloat16()} for _ in range(3)]
    target = torch.randn(3 * PIECE + 101, generator=generator)

    def score(model: State) -> float:
        return -float((model["w"].double() - target).square().sum())

    one, other = (evolve(models, score, generations=3, members=members) for members in ("recipes", "tensors"))
    assert one.history == other.history and one.digest == other.digest
    assert sum(record.get("accepted", 0) for record in one.history) >= 4


def test_neither_the_order_of_names_nor_who_holds_the_trial_shows() -> None:
    """The element that changes in any case, and whose masks tied tensors have, follow names; digests follow members."""
    generator = torch.Generator().manual_seed(3)
    models: list[State] = []
    for _ in range(4):
        embedding = torch.randn(3, 5, generator=generator).bfloat16()
        body = torch.randn(7, generator=generator).bfloat16()
        models.append({"embed_tokens.weight": embedding, "lm_head.weight": embedding, "body": body, "zip": body})
    backwards = [dict(reversed(model.items())) for model in models]

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed_tokens, self.lm_head = torch.nn.Embedding(3, 5), torch.nn.Linear(5, 3, bias=False)
            self.lm_head.weight = self.embed_tokens.weight
            self.body = self.zip = torch.nn.Parameter(torch.empty(7))

    def score(model: Any) -> float:
        state = model if isinstance(model, dict) else model.state_dict()
        return -float(state["lm_head.weight"].double().square().sum() + state["body"].double().square().sum())

    assert gather(models).aliases == gather(backwards).aliases == {
        "lm_head.weight": "embed_tokens.weight", "zip": "body"
    }  # fmt: skip
    options: dict[str, Any] = {"strategy": "cade", "generations": 4, "CR": 0.05}
    one, other, held = evolve(models, score, **options), evolve(backwards, score, **options), Net()
    assert one.history == other.history and one.digest == other.digest
    assert sum(each.get("accepted", 0) for each in one.history) >= 3
    widened = evolve(models, score, model=held, **options)
    assert widened.state["body"].dtype == torch.float32 and widened.digest == one.digest


# -- mergers


def test_with_a_merger_what_members_merge_to_is_scored() -> None:
    models, base = family(count=3), as_model(points("sphere", 1, 12, seed=9)[0])
    named = {"method": "ties", "density": 0.5, "weight": 1.0}
    report = evolve(models, SPHERE, merger=named, base=base, generations=3, seed=2)
    assert report.first_score == SPHERE(merge(models, base=base, **named))  # type: ignore[arg-type]
    assert report.best_member is None and report.evaluations == 1 + 3 * 3
    assert report.scores == sorted(report.scores)  # type: ignore[type-var]
    calls: list[int] = []

    def merger(members: Any) -> Any:
        calls.append(len(members))
        return merge(members, base=base, **named)  # type: ignore[arg-type]

    again = evolve(models, SPHERE, merger=merger, generations=3, seed=2)
    assert again.scores == report.scores and set(calls) == {3} and len(calls) == 11
    same(again.state, report.state)


def test_a_trial_is_merged_in_its_members_place() -> None:
    models, calls = family(count=4), []

    def merger(members: Any) -> Any:
        calls.append(copies(members))
        return members[0]

    report = evolve(models, lambda model: 0.0, merger=merger, generations=2, F=0.5, CR=1.0)
    trials = [each for each in report.history if each["event"] == "evaluation"]
    assert len(calls) == 1 + 8 + 1 and sorted(each["member"] for each in trials[5:]) == [0, 1, 2, 3]
    for record, members in zip(trials[1:], calls[1:], strict=False):
        expected = copies(models)
        for name in ("body.weight", "head.bias"):
            x, ref = (models[node][name] for node in (record["x"], *record["others"]))
            expected[record["member"]][name] = 0.5 * x + 0.5 * ref
        for one, other in zip(members, expected, strict=True):
            same(one, other)


# -- failures


def test_a_failed_trial_is_logged_and_the_run_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[float] = []

    def score(model: State) -> float:
        calls.append(SPHERE(model))
        if len(calls) in (2, 3):
            raise RuntimeError("out of\ncheese")
        return {7: math.nan, 8: math.inf}.get(len(calls), calls[-1])

    report = evolve(family(), score, generations=2)
    assert report.failures == 4 and report.evaluations == 18 == len(calls)
    errors = [record["error"] for record in report.history if record.get("error")]
    assert errors[0] == "RuntimeError: out of cheese" and "the score is nan" in errors[2] and "inf" in errors[3]
    assert "models[1] failed: RuntimeError: out of cheese" in caplog.text
    assert report.history[2] == {"event": "evaluation", "generation": 0, "member": 1, "score": None} | {
        "error": errors[0]
    }
    json.dumps(report.to_dict(), allow_nan=False)


def test_without_any_score_there_is_no_best_model() -> None:
    with pytest.raises(EvaluationError, match="no evaluation has succeeded"):
        evolve(family(2), lambda model: math.nan, generations=0)


def test_three_failures_in_a_row_end_the_run_and_a_resumed_one_tries_again(tmp_path: Path) -> None:
    broken = True
    calls = 0

    def score(model: State) -> float:
        nonlocal calls
        calls += 1
        if broken and calls > 8:
            raise ValueError("no")
        return SPHERE(model)

    with pytest.raises(
        EvaluationError, match=r"3 evaluations in a row failed, the last one of member 4 in gen.*: no\."
    ):
        evolve(family(), score, generations=2, state=tmp_path)
    assert calls == 11
    broken = False
    report = evolve(family(), score, generations=2, state=tmp_path)
    assert (report.resumed, report.failures, calls) == (8, 0, 11 + 10)
    assert report.digest == evolve(family(), SPHERE, generations=2).digest


# -- development and final scores


def test_the_final_score_is_taken_once_of_the_chosen_member(tmp_path: Path) -> None:
    seen: list[float] = []

    def final(model: State) -> float:
        seen.append(SPHERE(model))
        model["head.bias"].zero_()
        return 42.0

    report = evolve(family(), SPHERE, generations=2, final_score=final, state=tmp_path)
    assert SPHERE(report.state) == report.score  # whatever the final evaluation did to it
    assert seen == [report.score] and report.final == 42.0
    again = evolve(family(), SPHERE, generations=2, final_score=final, state=tmp_path)
    assert len(seen) == 1 and again.final == 42.0 and again.resumed == again.evaluations
    same(again.state, report.state)
    once = FinalScore(len)
    assert evolve(family(), SPHERE, generations=1, final_score=once).final == 3
    with pytest.raises(ArgumentError, match="a FinalScore is taken once"):
        evolve(family(), never, generations=1, final_score=once)
    failing = evolve(family(), SPHERE, generations=1, final_score=lambda model: math.nan)
    assert failing.final is None and "the score is nan" in failing.final_error and failing.score is not None


@pytest.mark.parametrize(
    ("score", "final", "sentence"),
    [
        (SPHERE, SPHERE, "are the same function"),
        (SPHERE, FinalScore(SPHERE), "are the same function"),
        (DevelopmentScore(SPHERE), SPHERE, "are the same function"),
        (FinalScore(SPHERE), None, "the final score guides no search"),
        (SPHERE, DevelopmentScore(len), "which has seen every trial"),
        ("accuracy", None, "score must be a function of a model, not str"),
    ],
)
def test_scores_cannot_be_mixed_up(score: Any, final: Any, sentence: str) -> None:
    with pytest.raises(FastmergeError, match=sentence):
        evolve(family(), score, final_score=final)


# -- resume


@pytest.mark.parametrize("members", ["recipes", "tensors"])
def test_killed_anywhere_and_resumed_the_history_and_the_bits_are_the_same(tmp_path: Path, members: str) -> None:
    class Killed(BaseException):
        pass

    def killing(after: int) -> Callable[[State], float]:
        left = after

        def score(model: State) -> float:
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            return SPHERE(model)

        return score

    options: dict[str, Any] = {"strategy": "de", "generations": 7, "seed": 4, "members": members}
    whole = evolve(family(), SPHERE, state=tmp_path / "whole", **options)
    expected = (tmp_path / "whole" / "history.jsonl").read_bytes()
    state = tmp_path / "killed"
    torn = state / "history.jsonl"
    for after in (0, 3, 6, 11, 1, 17):
        with pytest.raises(Killed):
            evolve(family(), killing(after), state=state, **options)
        assert expected.startswith(torn.read_bytes())
        # The process died while it wrote a line.
        torn.write_bytes(expected[: torn.stat().st_size + 9])
    report = evolve(family(), SPHERE, state=state, **options)
    assert torn.read_bytes() == expected and report.digest == whole.digest and report.resumed == 38
    same(report.state, whole.state)


SLOW = """\
import sys, time
from fastmerge.evolve import evolve
from tests.evolve.problems import as_model, points, score_of
def score(model):
    global calls
    calls += 1
    time.sleep(0.002 if calls < 100 else 0.2)
    return score_of("sphere")(model)
calls = 0
models = [as_model(point) for point in points("sphere", 6, 12, 0)]
evolve(models, score, strategy="cade", generations=40, state=sys.argv[1])
"""


def test_killed_by_the_system_at_any_point_a_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    options: dict[str, Any] = {"strategy": "cade", "generations": 40}
    whole = evolve(family(), SPHERE, state=tmp_path / "whole", **options)
    expected = (tmp_path / "whole" / "history.jsonl").read_bytes()
    # Not before the run has begun, and then after so many bytes, wherever in an evaluation that is.
    enough = random.Random(20).randrange(1000, len(expected) // 3)
    torn = tmp_path / "killed" / "history.jsonl"
    with subprocess.Popen([sys.executable, "-c", SLOW, str(torn.parent)], env=process_environment()) as process:
        try:
            while process.poll() is None and not (torn.exists() and torn.stat().st_size >= enough):
                time.sleep(0.001)
            with pytest.raises(ArgumentError, match="Another run is at work in .*killed: wait until it has ended"):
                evolve(family(), never, state=torn.parent, **options)
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL and enough <= torn.stat().st_size < len(expected)
    assert expected.startswith(torn.read_bytes())
    report = evolve(family(), SPHERE, state=torn.parent, **options)
    assert 0 < report.resumed < report.evaluations and report.digest == whole.digest
    assert torn.read_bytes() == expected


def test_a_history_of_another_run_is_refused(tmp_path: Path) -> None:
    evolve(family(), SPHERE, generations=1, state=tmp_path)
    for options, key in (
        ({"seed": 1}, "seed was 0 there and is 1 now"),
        ({"generations": 2}, "generations was 1"),
        ({"CR": 0.4}, "settings was"),
        ({"strategy": "cade"}, "strategy was 'evolver' there and is 'cade' now"),
    ):
        with pytest.raises(ArgumentError, match=key):
            evolve(family(), SPHERE, **{"generations": 1, "state": tmp_path, **options})  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="models was"):
        evolve(family(seed=1), SPHERE, generations=1, state=tmp_path)
    path = tmp_path / "history.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:9], lines[9].replace('"F": [0.5]', '"F": [0.25]'), *lines[10:]]))
    with pytest.raises(ArgumentError, match=r"line 10, is not what this run does there \(F is \[0.25\] and would be"):
        evolve(family(), SPHERE, generations=1, state=tmp_path)
    path.write_text("".join(lines[:3]) + "{}}\n")
    with pytest.raises(ArgumentError, match="line 4, is not a line of a history"):
        evolve(family(), SPHERE, generations=1, state=tmp_path)


# -- what is refused


def changed(models: list[State], name: str, tensor: Tensor) -> list[State]:
    return [*models[:-1], {**models[-1], name: tensor}]


def never(model: State) -> float:
    raise AssertionError("an evaluation")


@pytest.mark.parametrize(
    ("models", "options", "sentence"),
    [
        (family(3), {"strategy": "cade"}, "3 models are too few: cade takes a member and three different others, so"),
        (family(5), {"strategy": "de"}, "5 models are too few: the variant rand/2 of de"),
        (family(1), {}, "1 models are too few: evolver mixes a member with another one, so list 2 at least"),
        (
            changed(family(), "head.bias", torch.zeros(5)),
            {},
            r"'head.bias' has the shape \[6\] in models\[0\] and \[5\]",
        ),
        (changed(family(), "head.bias", torch.zeros(6).half()), {}, "is F32 in models.0. and F16 in models.5."),
        (changed(family(), "more", torch.zeros(5)), {}, r"'more' of models\[5\] is missing in models\[0\]"),
        ([{"n": torch.tensor(1)}] * 2, {}, "has no tensor of floating-point numbers that may evolve"),
        ([{"n": torch.zeros(3).double()}] * 2, {}, "float64, which does not evolve"),
        (family(), {"exclude": "("}, "not a regular expression"),
        (family(), {"exclude": "."}, "exclude fewer"),
        (family(), {"F": 7}, "F=7 of evolver is out of range"),
        (family(), {"generations": -1}, "generations=-1 is out of range"),
        (family(), {"seed": 0.5}, "seed must be a whole number"),
        (family(), {"members": "some"}, "members must be one of auto, recipes, tensors"),
        (family(), {"merger": "linear", "strategy": "cade"}, "it takes no merger"),
        (family(), {"merger": "linear", "members": "recipes"}, "cannot be recipes"),
        (family(), {"merger": {"density": 1}}, "merger needs the name of a merge method"),
        (family(), {"merger": {"method": "ties", "densety": 1}}, "densety"),
        (family(), {"model": torch.nn.Linear(2, 2)}, "the model has no tensor 'body.weight'"),
        (family()[0], {}, "models must be a list"),
        ([], {}, "0 models are too few"),
        (["/nowhere/a", "/nowhere/b"], {}, "/nowhere/a"),
    ],
)
def test_what_is_refused_before_any_evaluation(models: Any, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(FastmergeError, match=sentence):
        evolve(models, never, **options)


def test_objects_are_strategies_too_and_a_run_does_not_change_them() -> None:
    de = De()
    first = evolve(family(), SPHERE, strategy=de, generations=8)
    assert first.history == evolve(family(), SPHERE, strategy=de, generations=8).history
    for given, name in ((Evolver(F=0.25), "evolver"), (Cade(), "cade")):
        assert evolve(family(), SPHERE, strategy=given, generations=1).history[0]["strategy"] == name


def test_members_of_checkpoints_may_use_the_memory_that_they_were_read_into(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    models = family(4)
    for number, model in enumerate(models):
        (tmp_path / str(number)).mkdir()
        save_file(model, tmp_path / str(number) / "model.safetensors")
    folders = [tmp_path / str(number) for number in range(4)]
    report = evolve(folders, SPHERE, strategy="cade", generations=6, state=tmp_path / "state")
    assert report.held == "tensors"
    # All members are brought from the files' values to where the history ends, at once and in place.
    resumed = evolve(folders, never, strategy="cade", generations=6, state=tmp_path / "state")
    assert resumed.digest == report.digest and resumed.resumed == 28
    again = evolve(models, SPHERE, strategy="cade", generations=6, members="recipes")
    assert [each["score"] for each in report.history if each["event"] == "evaluation"] == [
        each["score"] for each in again.history if each["event"] == "evaluation"
    ]
    assert report.digest == again.digest
    with pytest.raises(CheckpointError):
        evolve([tmp_path / "0", {"x": torch.zeros(2)}], never)


def test_members_are_kept_where_half_of_what_is_free_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the members are: a GPU's memory is no matter of the host's."""
    members = gather(family(4))
    assert members.nbytes == 12 * 4 + 8
    for free, kept in ((2 * 4 * 56, True), (2 * 4 * 56 - 1, False), (None, False)):
        assert population.fits_in_memory(members, lambda device, free=free: free) is kept
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 + device.index, 1000))
    assert population.free_memory(torch.device("cuda", 2)) == 7
    here = population.free_memory(torch.device("cpu"))
    assert here is not None and 1 << 20 < here < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_models_of_files_are_no_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their memory is the run's own, so that each trial is made from members and not from a chain that grows."""
    from safetensors.torch import save_file

    made: list[int] = []
    compute = Population._compute

    def watched(self: Population, name: str, recipes: Any, order: Any, *rest: Any) -> None:
        made.append(len(order))
        compute(self, name, recipes, order, *rest)

    monkeypatch.setattr(Population, "_compute", watched)
    models = family(4)
    for number, model in enumerate(models):
        save_file(model, tmp_path / f"{number}.safetensors")
    options: dict[str, Any] = {"strategy": "cade", "generations": 6, "members": "recipes"}
    lent = evolve(models, SPHERE, **options)
    assert lent.held == "recipes" and max(made) > 5
    made.clear()
    read = evolve([tmp_path / f"{number}.safetensors" for number in range(4)], SPHERE, **options)
    assert read.held == "tensors" and not made and read.digest == lent.digest
