"""Merges through a GPU that is not there: order, memory, failures; and that each wait is needed and would be missed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmerge import methods
from fastmerge.engine import fresh, staging
from fastmerge.engine.buffers import ALIGNMENT, Ring
from fastmerge.engine.cutting import STATE_BYTES
from fastmerge.engine.device import CudaDevice, _best, open_device, place_of
from fastmerge.engine.executor import DictSink, _Execution, execute
from fastmerge.engine.plan import make_plan
from fastmerge.engine.report import MergeReport
from fastmerge.engine.sources import StateDictSource
from fastmerge.errors import ArgumentError, MergeError
from fastmerge.merging import merge_checkpoints, plan_checkpoints
from fastmerge.merging_in_memory import fixed_parameters
from tests.engine.fake_device import FakeDevice, HazardError
from tests.engine.small_family import (
    Tensors,
    config_for,
    family,
    knows_base,
    load,
    save_family,
    some_parameters,
    taken,
    weighed,
)
from tests.engine.test_same_bits import CASES, WEIGHTS, parameters_for
from tests.numeric import assert_bitwise_equal

SHAPES = {"a.weight": (64, 129), "b.weight": (5, 14, 22), "c.weight": (301,), "d.weight": (), "e.weight": (64, 129)}


def enough(case: str, gpu_memory: int) -> int:
    """That much, or where columns are brought together as much as a whole tensor takes."""
    return max(gpu_memory, 1 << 20) if "columns" in case else gpu_memory


@contextmanager
def on(device: FakeDevice) -> Iterator[None]:
    """Merges compute there."""
    with patch("fastmerge.merging.open_device", lambda place: device):
        yield


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    base, tuned = family(shapes=SHAPES)
    for one in (base, *tuned):
        one["steps"] = torch.arange(700)
    return save_family(tmp_path_factory.mktemp("device") / "in", base, tuned, shards=2)


@pytest.fixture(scope="module")
def digests(paths: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the CPU makes of each method, with everything held whole."""
    root = tmp_path_factory.mktemp("host")
    return {case: merged(case, paths, root / str(number)).digest for number, case in enumerate(CASES)}


def merged(case: str, paths: list[Path], out: Path, **arguments: Any) -> MergeReport:
    more = arguments.pop("config", {})
    config = config_for(case.partition(" ")[0], paths, WEIGHTS, **parameters_for(case)) | more
    report = merge_checkpoints(config, out, seed=5, **arguments)
    Path(f"{out}.statistics.json").unlink(missing_ok=True)
    return report


def merged_on(device: FakeDevice, case: str, paths: list[Path], out: Path, **arguments: Any) -> MergeReport:
    try:
        with on(device):
            return merged(case, paths, out, device="cpu", **arguments)
    finally:
        shutil.rmtree(out, ignore_errors=True)


# -- the same bits, in any order that the device may choose


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=5)
@given(
    seed=st.integers(0, 1 << 30),
    haste=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    gpu_memory=st.sampled_from([60_000, 100_000, 300_000, 1 << 20, 1 << 30]),
    memory_budget=st.sampled_from([100_000, 250_000, 1 << 30]),
)
def test_one_digest_whatever_the_device_does_first(
    case: str,
    paths: list[Path],
    digests: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    haste: float,
    gpu_memory: int,
    memory_budget: int,
) -> None:
    gpu_memory = enough(case, gpu_memory)
    device = FakeDevice(seed, haste, limit=gpu_memory)
    out = tmp_path_factory.getbasetemp() / "out"
    report = merged_on(device, case, paths, out, gpu_memory=gpu_memory, memory_budget=memory_budget)
    assert report.digest == digests[case]
    assert device.taken <= gpu_memory and device.pinned_bytes <= memory_budget
    assert device.copies >= 4 * 2 and device.runs >= 4 and device.closed
    assert report.device == "fake" and report.bytes_read > 0


@pytest.mark.parametrize("numerics", ["fp32", "mergekit"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("method", ["ties", "della", "linear"])
def test_outputs_of_another_dtype(method: str, dtype: str, numerics: str, paths: list[Path], tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"config": {"out_dtype": dtype, "exclude": ["c"]}, "numerics": numerics}
    expected = merged(method, paths, tmp_path / "host", **arguments).digest
    for seed, gpu_memory in enumerate((100_000, 1 << 30)):
        device = FakeDevice(seed, 0.3)
        assert merged_on(device, method, paths, tmp_path / "out", gpu_memory=gpu_memory, **arguments).digest == expected


@pytest.mark.parametrize("gpu_memory", [100_000, 1 << 30])
@pytest.mark.parametrize("policy", ["warn", "zero", "error"])
def test_nan_is_found_on_the_way_up(policy: str, gpu_memory: int, tmp_path: Path) -> None:
    base, tuned = family(2, torch.float32, SHAPES)
    tuned[1]["a.weight"].view(-1)[[3, 8000]] = torch.tensor([float("nan"), float("inf")])
    paths = save_family(tmp_path / "in", base, tuned)
    config = config_for("ties", paths, [0.5, 0.5], density=0.5)
    arguments: dict[str, Any] = {"on_nonfinite": policy, "gpu_memory": gpu_memory}
    with on(FakeDevice(1, 0.2)):
        if policy == "error":
            with pytest.raises(MergeError, match=r"a\.weight.*model-1 holds 1 NaN and 1 Inf"):
                merge_checkpoints(config, tmp_path / "out", **arguments)
            assert not list(tmp_path.glob("*out*"))
            return
        report = merge_checkpoints(config, tmp_path / "out", **arguments)
    assert report.nonfinite == {str(paths[2]): {"a.weight": (1, 1)}}
    host = merge_checkpoints(config, tmp_path / "host", on_nonfinite=policy)
    assert report.digest == host.digest


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("budget", [100_000, 1 << 30])
def test_state_dicts_are_brought_up_piecewise(case: str, budget: int) -> None:
    base, tuned = family(3, torch.float32, SHAPES)
    budget = enough(case, budget)
    base["a.weight"] = base["a.weight"].T.contiguous().T
    base["steps"] = torch.arange(9)
    tuned = [{name: x.double() if name == "c.weight" else x for name, x in one.items()} for one in tuned]
    for one in tuned:
        one["steps"] = torch.arange(9)
    whole = in_memory(case, base, tuned, None)
    on_device = in_memory(case, base, tuned, budget)
    for name, tensor in whole.items():
        assert_bitwise_equal(on_device[name], tensor)


def in_memory(case: str, base: Tensors, tuned: list[Tensors], budget: int | None) -> Tensors:
    chosen = methods.get(case.partition(" ")[0])
    tuned = taken(chosen.name, tuned)
    plan = make_plan(
        chosen,
        StateDictSource("base", base) if knows_base(chosen.name) else None,
        [StateDictSource(f"models[{index}]", one) for index, one in enumerate(tuned)],
        fixed_parameters(chosen, parameters_for(case) | weighed(chosen.name, WEIGHTS), len(tuned)),
        budget=1 << 62,
        device="cpu" if budget is None else "fake",
        gpu_budget=budget,
        exclude=["d"],
    )
    sink = DictSink(plan)
    device = None if budget is None else FakeDevice(3, 0.2, limit=budget)
    execute(plan, sink, device=device)
    return sink.tensors


# -- memory


@pytest.mark.parametrize("method", [name for name in methods.names() if name != "fr"])  # holds whole matrices
@pytest.mark.parametrize("gpu_memory", ["60kB", "1MiB", "2GiB"])
def test_the_plan_stays_within_both_budgets(method: str, gpu_memory: str, paths: list[Path]) -> None:
    from fastmerge.sizes import parse_size

    config = config_for(method, paths, WEIGHTS, **some_parameters(method))
    with on(FakeDevice()):
        plan = plan_checkpoints(config, device="cpu", gpu_memory=gpu_memory, memory_budget="250kB")
    assert plan.gpu is not None and plan.gpu_budget == parse_size(gpu_memory)
    assert plan.gpu.peak_memory <= plan.gpu.budget
    assert plan.in_bytes + plan.out_bytes + plan.gpu.staging_bytes <= 250_000
    assert plan.gpu.slot_bytes * 2 <= plan.gpu.staging_bytes
    staged = [load.nbytes for load in plan.loads() if plan.staged(load)]
    here = [load.nbytes for load in plan.loads() if not plan.staged(load)]
    assert max(staged) <= plan.gpu.in_bytes and max(here) <= plan.in_bytes
    assert not any(load.sample for load in plan.loads() if plan.staged(load))
    said = plan.describe()
    assert said["device"] == "fake" and said["gpu_budget"] == plan.gpu.budget
    assert any(line.startswith("gpu memory ") and "on fake within" in line for line in plan.lines())


def test_a_budget_decides_what_is_held_whole(paths: list[Path]) -> None:
    config = config_for("ties", paths, WEIGHTS, density=0.5)
    with on(FakeDevice()):
        small = plan_checkpoints(config, device="cpu", gpu_memory="100kB")
        large = plan_checkpoints(config, device="cpu", gpu_memory="1GiB", memory_budget="2MiB")
    assert small.passes == 2 and large.passes == 1
    assert large.gpu is not None and large.gpu.state_bytes >= STATE_BYTES


def test_four_fifths_of_what_is_free_are_taken_if_nothing_is_said(paths: list[Path]) -> None:
    with on(FakeDevice(limit=1_000_000)):
        plan = plan_checkpoints(config_for("ties", paths, WEIGHTS, density=0.5), device="cpu")
    assert plan.gpu_budget == 800_000


def test_a_budget_that_holds_no_row_is_refused_with_one_that_does(tmp_path: Path) -> None:
    paths = save_family(tmp_path, *family(2, shapes={"w": (2, 100_000)}))
    config = config_for("della", paths, [1, 1], density=0.5)
    with on(FakeDevice()):
        with pytest.raises(ArgumentError, match=r"gpu_memory of 256 KiB is too small for w.* give at least") as caught:
            plan_checkpoints(config, device="cpu", gpu_memory="256KiB")
        enough = str(caught.value).rsplit("at least ", 1)[1].rstrip(".")
        assert plan_checkpoints(config, device="cpu", gpu_memory=enough)


def test_a_merge_without_a_gpu_stages_nothing(paths: list[Path]) -> None:
    plan = plan_checkpoints(config_for("ties", paths, WEIGHTS), device="cpu", gpu_memory="1GiB")
    assert plan.gpu is None and plan.gpu_budget is None and plan.device == "cpu"
    assert not any(line.startswith("gpu") for line in plan.lines())


class Numbered:
    def __init__(self, number: int) -> None:
        self.number = number

    def synchronize(self) -> None:
        raise AssertionError("rings never wait")


def test_a_ring_goes_round_and_says_what_must_be_waited_for() -> None:
    ring = Ring(4 * ALIGNMENT, FakeDevice().memory(4 * ALIGNMENT))
    blocks = [ring.take(ALIGNMENT) for _ in range(3)]
    assert [block.start // ALIGNMENT for block in blocks if block] == [0, 1, 2]
    for number, block in enumerate(blocks):
        assert block is not None and block.after is None
        ring.give_after(block, Numbered(number))
    # The place that was never used, then those that were used longest ago.
    fourth, both, last = ring.take(ALIGNMENT), ring.take(2 * ALIGNMENT), ring.take(ALIGNMENT)
    assert fourth is not None and both is not None and last is not None and ring.take(1) is None
    assert (fourth.start, fourth.after) == (3 * ALIGNMENT, None)
    assert both.start == 0 and isinstance(both.after, Numbered) and both.after.number == 1
    assert last.start == 2 * ALIGNMENT and isinstance(last.after, Numbered) and last.after.number == 2


def test_memory_that_was_made_ready_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    fresh.prepare(9 << 20)
    fresh.release()
    fresh.release()
    assert fresh._ready is None


# -- failures


def test_too_little_memory_is_one_sentence_and_leaves_nothing(paths: list[Path], tmp_path: Path) -> None:
    device = FakeDevice(limit=50_000)
    with pytest.raises(MergeError, match=r"^fake has too little memory left; choose a smaller --gpu-memory.*cpu\.$"):
        merged_on(device, "ties", paths, tmp_path / "out", gpu_memory=200_000)
    assert list(tmp_path.iterdir()) == [] and device.closed


@pytest.mark.parametrize("where", ["copy", "synchronize", "run", "fetch"])
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with ..."), "illegal memory"),
        (RuntimeError("Triton Error [CUDA]: device-side assert triggered"), "device-side assert"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "too little memory left"),
        (RuntimeError("something else"), None),
    ],
)
def test_a_device_that_fails_is_one_sentence_and_leaves_nothing(
    where: str, error: Exception, said: str | None, paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = FakeDevice(2, 0.5)
    calls = 0
    real = getattr(device, where)

    def breaks(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise error
        return real(*arguments, **named)

    monkeypatch.setattr(device, where, breaks)
    expected = MergeError if said is not None else RuntimeError
    with pytest.raises(expected, match=said or "something else") as caught:
        merged_on(device, "ties", paths, tmp_path / "out", gpu_memory=100_000, memory_budget=100_000)
    assert "\n" not in str(caught.value) and type(caught.value) is expected
    assert list(tmp_path.iterdir()) == [] and device.closed


# -- the real one, in front of a torch.cuda that does everything at once


class Told:
    """What the stand-ins for torch.cuda's classes were told."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def stream(self, *arguments: Any) -> Any:
        return SimpleNamespace(
            wait_event=lambda event: self.calls.append("wait"), synchronize=lambda: self.calls.append("drain")
        )

    def event(self, *, blocking: bool) -> Any:
        assert blocking, "a thread that waits must sleep"
        return SimpleNamespace(
            record=lambda stream: self.calls.append("record"), synchronize=lambda: self.calls.append("synchronize")
        )


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    told = Told()
    real = torch.empty
    monkeypatch.setattr(torch.cuda, "Stream", told.stream)
    monkeypatch.setattr(torch.cuda, "current_stream", told.stream)
    monkeypatch.setattr(torch.cuda, "Event", told.event)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 1 << 31))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1000)
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **named: real(*a, **named))
    return told


@pytest.mark.parametrize("case", ["ties", "della", "pcb", "linear"])
def test_what_a_gpu_is_told(case: str, told: Told, digests: dict[str, str], paths: list[Path], tmp_path: Path) -> None:
    device = CudaDevice(torch.device("cpu"))
    device.name = "cuda:7"
    assert device.free_bytes() == (1 << 30) + 2000
    report = merged_on(device, case, paths, tmp_path / "out", gpu_memory=100_000)  # type: ignore[arg-type]
    assert report.digest == digests[case] and report.device == "cuda:7"
    assert "on cuda:7" in report.table()
    assert {"wait", "record", "synchronize"} <= set(told.calls) and told.calls[-3:] == ["drain"] * 3


def test_memory_that_cannot_be_pinned_is_one_sentence(
    told: Told, paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, pin_memory: bool = False, **named: Any) -> Any:
        raise RuntimeError("CUDA error: out of memory\nMore")

    device = CudaDevice(torch.device("cpu"))
    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(MergeError, match=r"pins no \d+ MiB .*out of memory.*choose a smaller --memory-budget"):
        merged_on(device, "ties", paths, tmp_path / "out", gpu_memory=100_000)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_that_cannot_be_opened_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> Any:
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\nCompile with ...")

    monkeypatch.setattr(torch.cuda, "Stream", broken)
    with pytest.raises(MergeError, match=r"^cuda:0 cannot be used \(CUDA error: all .* unavailable\); see"):
        open_device(torch.device("cuda", 0))


def test_where_a_merge_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert place_of("auto", None) == place_of("cpu", None) == place_of("cpu:0", None) == cpu
    with pytest.raises(ArgumentError, match="device 'mps' is not supported"):
        place_of("mps", None)
    with pytest.raises(ArgumentError, match="device must be 'auto'"):
        place_of("gpu", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ArgumentError, match=r"device 'cuda:1' cannot be used: (this torch|torch finds)"):
        place_of("cuda:1", None)
    assert _best(None) == cpu
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert place_of("cuda", None) == torch.device("cuda", 1) and place_of("cuda:0", None).index == 0
    with pytest.raises(ArgumentError, match="there is no GPU after cuda:1"):
        place_of("cuda:2", None)
    assert _best("cpu") == cpu and _best("reference") == cpu
    monkeypatch.setattr("fastmerge.backends.resolve", lambda name, device: SimpleNamespace(__name__="x.triton"))
    assert _best(None) == torch.device("cuda", 1)


# -- sabotage: what the fake device must notice


def sabotaged(device: FakeDevice, paths: list[Path], out: Path, case: str = "ties") -> str:
    return merged_on(device, case, paths, out, gpu_memory=70_000, memory_budget=100_000).digest


@pytest.fixture(scope="module")
def waits(paths: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    device = FakeDevice(0, 0.0)
    sabotaged(device, paths, tmp_path_factory.mktemp("waits") / "out")
    return device.waits


WAITS = {
    "up": "a load is put into a block that is still being computed with, or that came from the compute lane",
    "compute": "a load is merged before it is there, or into a block that is still being brought down",
    "down": "a piece is brought down before it is merged",
    "sync reader": "a piece is read into a slot that is still being sent up",
    "sync writer": "a piece is written before it has come down",
}


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4, 0.6, 0.8, 0.95])
@pytest.mark.parametrize("what", WAITS)
def test_a_wait_that_is_left_out_is_noticed(
    what: str, share: float, waits: dict[str, int], paths: list[Path], tmp_path: Path
) -> None:
    number = int(share * waits[what])
    assert waits[what] > 5
    for haste in (0.0, 1.0):
        with pytest.raises(HazardError):
            sabotaged(FakeDevice(0, haste, ignored=(what, number)), paths, tmp_path / "out")


def _early_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """The block of a load is given back before it has been merged."""
    real = _Execution._merge_load

    def merge(self: _Execution, filled: Any) -> None:
        if self.plan.staged(filled.load):
            self.staging.used(filled.block)
        real(self, filled)

    monkeypatch.setattr(_Execution, "_merge_load", merge)
    give = _Execution._give_back
    monkeypatch.setattr(
        _Execution, "_give_back", lambda self, load, block: None if self.plan.staged(load) else give(self, load, block)
    )


def _early_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """The block of a merged piece is given back with what was in the lane before its copy."""

    def bring_down(self: staging.Staging, block: Any, target: Any, nbytes: int) -> Any:
        self.device.wait("down", self.device.record("compute"))
        before = self.device.record("down")
        self.device.copy("down", target.range(0, nbytes), block.range(0, nbytes))
        self.outputs.give_after(block, before)
        return self.device.record("down")

    monkeypatch.setattr(staging.Staging, "bring_down", bring_down)


def _early_arrival(monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer is told of a piece with what was in the lane before its copy."""

    def bring_down(self: staging.Staging, block: Any, target: Any, nbytes: int) -> Any:
        self.device.wait("down", self.device.record("compute"))
        before = self.device.record("down")
        self.device.copy("down", target.range(0, nbytes), block.range(0, nbytes))
        self.outputs.give_after(block, self.device.record("down"))
        return before

    monkeypatch.setattr(staging.Staging, "bring_down", bring_down)


def _unwritten_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinned memory is lent again before the writer has seen what is in it."""
    real = _Execution._deliver_here

    def deliver(self: _Execution, job: Any, offset: int, numel: int, block: Any, ready: Any = None) -> None:
        real(self, job, offset, numel, block, ready)
        with self.changed:
            block.arena._free = [(0, block.arena.nbytes)]

    monkeypatch.setattr(_Execution, "_deliver_here", deliver)
    monkeypatch.setattr("fastmerge.engine.writer.ModelWriter.write", _slowly)


def _slowly(*arguments: Any) -> None:
    import time

    time.sleep(0.01)


def _one_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots are used again without a look at their copies."""
    real = staging.Slots.send

    def send(self: staging.Slots, *arguments: Any) -> None:
        real(self, *arguments)
        self._sent = [None] * len(self._sent)

    monkeypatch.setattr(staging.Slots, "send", send)


def _sent_before_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slot is sent up before anything has been read into it."""
    real = staging.StagedLanding.piece

    def piece(self: staging.StagedLanding, start: int, count: int) -> Any:
        found = real(self, start, count)
        real_put(self)
        return found

    real_put = staging.StagedLanding.put
    monkeypatch.setattr(staging.StagedLanding, "piece", piece)
    monkeypatch.setattr(staging.StagedLanding, "put", lambda self: None)


def _ready_before_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A load counts as there when its first piece is not."""
    from fastmerge.engine.reader import Reader

    real = Reader.fill

    def fill(self: Reader, load: Any, block: Any) -> Any:
        before = self._device.record("up")
        tensors, ready = real(self, load, block)
        return tensors, None if ready is None else before

    monkeypatch.setattr(Reader, "fill", fill)


def _ring_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are lent without what their next user must wait for."""
    monkeypatch.setattr("fastmerge.engine.buffers.Ring._claim", lambda self, start, stop: None)


def _wrong_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ring lends what is not free: the same place twice."""
    from fastmerge.engine.buffers import Block, Ring

    real = Ring.take

    def take(self: Ring, nbytes: int) -> Any:
        block = real(self, nbytes)
        return None if block is None else Block(self, 0, block.nbytes, block.after)

    monkeypatch.setattr(Ring, "take", take)
    monkeypatch.setattr(Ring, "give", lambda self, block: setattr(self, "_free", [(0, self.nbytes)]))


SABOTAGES = {
    function.__name__.strip("_"): function
    for function in (
        _early_use,
        _early_output,
        _early_arrival,
        _unwritten_output,
        _one_slot,
        _sent_before_read,
        _ready_before_sent,
        _ring_without_memory,
        _wrong_place,
    )
}


@pytest.mark.parametrize("what", SABOTAGES)
def test_a_broken_order_is_noticed(
    what: str, digests: dict[str, str], paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the fake device, or where the host is to blame, by other bits in some order of events."""
    SABOTAGES[what](monkeypatch)
    noticed = []
    for seed, haste in enumerate((0.0, 1.0, 0.5, 0.5)):
        try:
            noticed.append(sabotaged(FakeDevice(seed, haste), paths, tmp_path / "out") != digests["ties"])
        except HazardError:
            noticed.append(True)
    assert any(noticed)


def test_what_is_right_is_not_noticed(digests: dict[str, str], paths: list[Path], tmp_path: Path) -> None:
    for seed, haste in enumerate((0.0, 1.0, 0.5, 0.5)):
        assert sabotaged(FakeDevice(seed, haste), paths, tmp_path / "out") == digests["ties"]


def test_written_files_are_those_of_the_host(paths: list[Path], tmp_path: Path) -> None:
    config = config_for("ties", paths, WEIGHTS, density=0.4)
    merge_checkpoints(config, tmp_path / "host")
    with on(FakeDevice(5, 0.3)):
        merge_checkpoints(config, tmp_path / "out", device="cpu", gpu_memory="80kB")
    for name, tensor in load(tmp_path / "host").items():
        assert_bitwise_equal(load(tmp_path / "out")[name], tensor)
