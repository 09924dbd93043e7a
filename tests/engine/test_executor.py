"""The executor: files and memory, dtypes, NaN, failures in every thread, and that nothing is left behind."""

from __future__ import annotations

import errno
import json
import mmap
import os
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastmerge
from fastmerge.engine import executor as executor_module
from fastmerge.engine import fresh
from fastmerge.engine.buffers import ALIGNMENT, Arena
from fastmerge.engine.checkpoint import Checkpoint
from fastmerge.engine.executor import DictSink, _Execution
from fastmerge.engine.writer import ModelWriter
from fastmerge.errors import ArgumentError, ArgumentTypeError, FastmergeError, MergeError
from fastmerge.merging import merge_checkpoints, plan_checkpoints
from fastmerge.methods.statistics import KeyWindow
from tests.engine.small_family import Tensors, config_for, family, load, save, save_family
from tests.numeric import assert_bitwise_equal

NAME = "model.layers.0.self_attn.q_proj.weight"


def run(tmp_path: Path, base: Tensors, tuned: list[Tensors], method: str = "ties", **arguments: Any) -> Tensors:
    model_config = arguments.pop("model_config", {})
    config = arguments.pop("config", {})
    paths = save_family(tmp_path / "in", base, tuned, **model_config)
    density = {} if method == "linear" else {"density": 0.5}
    merge_checkpoints(config_for(method, paths, [0.5] * len(tuned), **density) | config, tmp_path / "out", **arguments)
    return load(tmp_path / "out")


def left_behind(tmp_path: Path) -> list[str]:
    return [path.name for path in tmp_path.iterdir() if path.name != "in"]


def no_threads() -> bool:
    return not [thread for thread in threading.enumerate() if thread.name.startswith("fastmerge-")]


# -- what comes out


def test_the_directory_is_complete(tmp_path: Path) -> None:
    base, tuned = family(2)
    paths = save_family(tmp_path / "in", base, tuned)
    (paths[0] / "tokenizer.json").write_text("{}")
    config = config_for("ties", paths, [0.5, 0.5], density=0.5) | {"out_dtype": "float32"}
    report = merge_checkpoints(config, tmp_path / "out", shard_size="200kB", seed=3)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["torch_dtype"] == "float32" and written["num_hidden_layers"] == 2
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["digest"] == report.digest and manifest["seed"] == 3 and len(manifest["inputs"]) == 3
    assert manifest["tensors"].keys() == base.keys()
    assert report.tensors == len(base) and report.bytes_written == sum(4 * x.numel() for x in base.values())
    assert report.bytes_read == sum(3 * 2 * x.numel() for x in base.values())
    assert set(report.seconds) == {"start_up", "reading", "computing", "writing", "waiting", "total"}
    assert report.passes == 1 and not report.nonfinite and no_threads()


def test_bare_files_need_no_config(tmp_path: Path) -> None:
    base, tuned = family(2)
    paths = save_family(tmp_path / "in", base, tuned)
    for path in paths:
        (path / "config.json").unlink()
    files = [path / "model.safetensors" for path in paths]
    merge_checkpoints(config_for("ties", files, [0.5, 0.5]), tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists() and load(tmp_path / "out").keys() == base.keys()


def test_mixed_dtypes_are_widened(tmp_path: Path) -> None:
    base, tuned = family(3, torch.float32)
    mixed = [{name: x.to(dtype) for name, x in one.items()}
             for one, dtype in zip(tuned, (torch.bfloat16, torch.float16, torch.float64), strict=True)]  # fmt: skip
    widened = [{name: x.float() for name, x in one.items()} for one in mixed]
    merged = run(tmp_path, base, mixed)
    expected = fastmerge.merge(widened, base=base, weight=0.5, density=0.5)
    for name in base:
        assert_bitwise_equal(merged[name], expected[name])


@pytest.mark.parametrize("method", ["ties", "linear"])
def test_mergekit_numerics_cast_the_inputs_to_the_dtype_and_the_result_by_way_of_it(
    tmp_path: Path, method: str
) -> None:
    base, tuned = family(2, torch.float32)
    merged = run(
        tmp_path, base, tuned, method, config={"dtype": "bfloat16", "out_dtype": "float32"}, numerics="mergekit"
    )
    half_base, *half = [{name: x.bfloat16() for name, x in one.items()} for one in (base, *tuned)]
    given: dict[str, Any] = {"density": 0.5, "base": half_base} if method == "ties" else {}
    expected = fastmerge.merge(half, method=method, weight=0.5, numerics="mergekit", **given)
    for name in base:
        assert_bitwise_equal(merged[name], expected[name].float())


@pytest.mark.parametrize(("dtype", "odd"), [("float16", 1001), ("float32", 1001)])
def test_outputs_of_another_dtype_in_odd_pieces(tmp_path: Path, dtype: str, odd: int) -> None:
    base, tuned = family(2, torch.bfloat16, {NAME: (70, odd)})
    merged = run(tmp_path, base, tuned, config={"out_dtype": dtype}, numerics="mergekit", memory_budget="250kB")
    wide = fastmerge.merge(tuned, base=base, weight=0.5, density=0.5, numerics="mergekit")
    assert_bitwise_equal(merged[NAME], wide[NAME].to(getattr(torch, dtype)))


def test_integers_that_are_the_same_are_copied(tmp_path: Path) -> None:
    base, tuned = family(2)
    for one in (base, *tuned):
        one |= {
            "steps": torch.arange(5),
            "flags": torch.tensor([True, False]),
            "empty": torch.zeros(0, 3, dtype=torch.int32),
        }
    merged = run(tmp_path, base, tuned, config={"dtype": "float32"})
    for name in ("steps", "flags", "empty"):
        assert_bitwise_equal(merged[name], base[name])
    in_memory = fastmerge.merge(tuned, base=base, weight=0.5)
    assert_bitwise_equal(in_memory["steps"], base["steps"])


def test_integers_that_differ_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    base, tuned = family(2)
    for index, one in enumerate((base, *tuned)):
        one["steps"] = torch.arange(5) + (index == 2)
    with pytest.raises(MergeError, match=r"'steps' .I64. is not the same in .*base and in .*model-1"):
        run(tmp_path, base, tuned)
    assert left_behind(tmp_path) == []
    with pytest.raises(MergeError, match=r"'steps'.*models\[1\]"):
        fastmerge.merge(tuned, base=base, weight=0.5)


def test_a_tied_head_is_merged_from_the_embedding_and_config_json_says_what_holds(tmp_path: Path) -> None:
    base, tuned = family(2)
    bare = {name: x for name, x in base.items() if name != "lm_head.weight"}
    paths = [
        save(tmp_path / "base", bare, config={"tie_word_embeddings": True}),
        save(tmp_path / "a", tuned[0]),
        save(tmp_path / "b", tuned[1]),
    ]
    merge_checkpoints(config_for("task_arithmetic", paths, [1.0, 1.0]), tmp_path / "out")
    expected = fastmerge.merge(tuned, base=base | {"lm_head.weight": base["model.embed_tokens.weight"]},
                               method="task_arithmetic", weight=1.0)  # fmt: skip
    assert_bitwise_equal(load(tmp_path / "out")["lm_head.weight"], expected["lm_head.weight"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


# -- in memory


def test_results_are_no_aliases_and_inputs_stay_as_they_are() -> None:
    base, tuned = family(2, torch.float32)
    base["same"] = torch.arange(4)
    for one in tuned:
        one["same"] = base["same"]
    before = {name: x.clone() for name, x in base.items()}
    result = fastmerge.merge(tuned, base=base, weight=0.5, exclude=["embed"])
    owned = {x.untyped_storage().data_ptr() for one in (base, *tuned) for x in one.values()}
    assert not owned & {x.untyped_storage().data_ptr() for x in result.values()}
    for name, x in before.items():
        assert_bitwise_equal(base[name], x)
    assert_bitwise_equal(result["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
    assert not torch.equal(result[NAME], base[NAME])


def test_strides_shared_memory_modules_and_gradients_do_not_matter() -> None:
    base, tuned = family(2, torch.float32, {"weight": (31, 47), "bias": (31,)})
    expected = fastmerge.merge(tuned, base=base, weight=0.5, density=0.5)
    strided = [
        {"weight": one["weight"].t().contiguous().t(), "bias": one["bias"].repeat_interleave(2)[::2]} for one in tuned
    ]
    for one in strided:
        one["weight"].requires_grad_()
    module = torch.nn.Linear(47, 31)
    module.load_state_dict(base)
    result = fastmerge.merge(strided, base=module, weight=0.5, density=0.5)
    for name in base:
        assert_bitwise_equal(result[name], expected[name])
    assert not result["weight"].requires_grad and result["weight"].is_contiguous()


def test_linear_takes_a_base_in_memory_as_one_model_more() -> None:
    base, tuned = family(2, torch.float32)
    with_base = fastmerge.merge(tuned, base=base, method="linear", weight=[1, 2, 3])
    without = fastmerge.merge([*tuned, base], method="linear", weight=[1, 2, 3])
    assert_bitwise_equal(with_base[NAME], without[NAME])


def test_dtype_is_the_outputs() -> None:
    base, tuned = family(2)
    assert fastmerge.merge(tuned, base=base, weight=0.5, dtype="float16")[NAME].dtype == torch.float16
    copied = fastmerge.merge(tuned, base=base, weight=0.5, dtype=torch.float32, exclude=NAME)[NAME]
    assert_bitwise_equal(copied, base[NAME].float())


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"device": "cuda"}, ArgumentError, "cuda"),
        ({"device": "nonsense"}, ArgumentError, "nonsense"),
        ({"dtype": "int8"}, ArgumentError, "int8"),
        ({"numerics": "fp16"}, ArgumentError, "fp16"),
        ({"on_nonfinite": "ignore"}, ArgumentError, "ignore"),
        ({"seed": 1.5}, ArgumentTypeError, "seed"),
        ({"exclude": ["("]}, ArgumentError, "regular expression"),
        ({"backend": "gpu"}, FastmergeError, "gpu"),
        ({"models": {}}, ArgumentTypeError, "list"),
        ({"models": []}, ArgumentError, "nothing to merge"),
        ({"models": [3]}, ArgumentTypeError, "state dict"),
        ({"models": [{}]}, ArgumentError, "no tensors"),
        ({"models": [{NAME: 3}]}, ArgumentTypeError, "not a tensor"),
        ({"models": [{NAME: torch.zeros(1, dtype=torch.complex64)}]}, ArgumentTypeError, "complex64"),
        ({"models": [{NAME: torch.zeros(2, device="meta")}]}, ArgumentError, "meta"),
        ({"models": [{NAME: torch.zeros(2, 2).to_sparse()}]}, ArgumentError, "sparse"),
        ({"base": None}, ArgumentError, "no base is given"),
    ],
)
def test_arguments_that_cannot_be_used(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    base, tuned = family(2)
    with pytest.raises(kind, match=message):
        fastmerge.merge(**({"models": tuned, "base": base, "weight": 0.5} | arguments))


# -- NaN and Inf


def spoilt(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensors, list[Tensors]]:
    base, tuned = family(2, dtype)
    flat = tuned[1][NAME].view(-1)
    flat[[5, 40_000, 69_999]] = torch.tensor([float("nan"), float("nan"), float("inf")], dtype=dtype)
    return base, tuned


@pytest.mark.parametrize("budget", ["200kB", "1GiB"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_nan_stops_the_merge_with_model_tensor_and_counts(tmp_path: Path, dtype: torch.dtype, budget: str) -> None:
    base, tuned = spoilt(dtype)
    with pytest.raises(MergeError, match=rf"{NAME}.*model-1 holds 2 NaN and 1 Inf"):
        run(tmp_path, base, tuned, memory_budget=budget)
    assert left_behind(tmp_path) == [] and no_threads()
    with pytest.raises(MergeError, match=r"models\[1\] holds 2 NaN and 1 Inf"):
        fastmerge.merge(tuned, base=base, weight=0.5)


@pytest.mark.parametrize("budget", ["200kB", "1GiB"])
def test_nan_can_be_merged_and_is_reported_once(tmp_path: Path, budget: str) -> None:
    base, tuned = spoilt()
    paths = save_family(tmp_path / "in", base, tuned)
    config = config_for("ties", paths, [0.5, 0.5], density=0.5)
    report = merge_checkpoints(config, tmp_path / "out", memory_budget=budget, on_nonfinite="warn")
    assert report.nonfinite == {str(paths[2]): {NAME: (2, 1)}}
    with pytest.warns(UserWarning, match="2 NaN, 1 Inf"):
        expected = fastmerge.merge(tuned, base=base, weight=0.5, density=0.5, on_nonfinite="warn")
    assert_bitwise_equal(load(tmp_path / "out")[NAME], expected[NAME])


@pytest.mark.parametrize("budget", ["200kB", "1GiB"])
def test_zero_puts_zeros_in_their_place_in_every_sweep(tmp_path: Path, budget: str) -> None:
    base, tuned = spoilt()
    mended = [{name: torch.where(x.isfinite(), x, 0.0) for name, x in one.items()} for one in tuned]
    expected = fastmerge.merge(mended, base=base, weight=0.5, density=0.5)
    merged = run(tmp_path, base, tuned, memory_budget=budget, on_nonfinite="zero")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        in_memory = fastmerge.merge(tuned, base=base, weight=0.5, density=0.5, on_nonfinite="zero")
    assert_bitwise_equal(merged[NAME], expected[NAME])
    assert_bitwise_equal(in_memory[NAME], expected[NAME])
    assert tuned[1][NAME].isnan().any()


# -- failures


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    base, tuned = family(2)
    with pytest.raises(MergeError, match="space"):
        run(tmp_path, base, tuned)
    assert left_behind(tmp_path) == [] and no_threads()


class Interrupting:
    """Presses Ctrl-C in the calling thread once some tensors are merged."""

    def __init__(self) -> None:
        self.calls = 0

    def begin(self, total_bytes: int, passes: int) -> None:
        self.total = total_bytes

    def advance(self, nbytes: int, current: str) -> None:
        self.calls += 1
        if self.calls == 3:
            raise KeyboardInterrupt

    def close(self) -> None:
        self.closed = True


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    base, tuned = family(2)
    progress = Interrupting()
    with pytest.raises(KeyboardInterrupt, match="nothing of it is left"):
        run(tmp_path, base, tuned, progress=progress)
    assert progress.calls == 3 and progress.closed
    assert left_behind(tmp_path) == [] and no_threads()


@pytest.mark.parametrize(
    ("decided", "sweep", "needed"),
    [((1, False), 2, True), ((1, True), 2, False), ((2, False), 2, True), ((2, True), 2, True), ((2, True), 3, False)],
)
def test_the_sweep_that_merges_is_read_however_late_the_reader_asks(
    tmp_path: Path, decided: tuple[int, bool], sweep: int, needed: bool
) -> None:
    paths = save_family(tmp_path / "in", *family(2))
    plan = plan_checkpoints(config_for("ties", paths, [0.5, 0.5], density=0.5), memory_budget="200kB")
    job = next(job for job in plan.jobs if job.most_sweeps > job.sweeps)
    execution = _Execution(plan, DictSink(plan), "error", "auto", None)
    execution.decided[job.name] = decided
    assert execution._another_sweep(job, sweep) is needed


def test_an_output_that_was_not_merged_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Should the reader ever stop too early, nothing is returned rather than memory that nobody wrote."""
    base, tuned = family(2)
    monkeypatch.setattr(_Execution, "_another_sweep", lambda self, job, sweep: False)
    monkeypatch.setattr(KeyWindow, "finish", lambda self, state, known: None)
    with pytest.raises(MergeError, match="not merged"):
        run(tmp_path, base, tuned, memory_budget="200kB")
    assert left_behind(tmp_path) == [] and no_threads()


def test_progress_adds_up_to_what_was_announced(tmp_path: Path) -> None:
    class Counting:
        done = 0

        def begin(self, total_bytes: int, passes: int) -> None:
            self.total, self.passes = total_bytes, passes

        def advance(self, nbytes: int, current: str) -> None:
            self.done += nbytes

        def close(self) -> None:
            self.closed = True

    progress = Counting()
    run(tmp_path, *family(2), memory_budget="200kB", progress=progress)
    assert progress.done == progress.total > 0 and progress.passes == 2 and progress.closed


@pytest.mark.parametrize("where", ["reader", "merge", "writer"])
def test_an_error_in_any_thread_stops_all_and_reaches_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    class StrangeError(Exception):
        pass

    calls = 0

    def breaks(real: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 4:
                raise StrangeError
            return real(*arguments, **named)

        return call

    owner: Any = {"reader": Checkpoint, "merge": executor_module._Execution, "writer": ModelWriter}[where]
    attribute = {"reader": "read_into", "merge": "_merge_piece", "writer": "write"}[where]
    monkeypatch.setattr(owner, attribute, breaks(getattr(owner, attribute)))
    base, tuned = family(2)
    began = time.monotonic()
    with pytest.raises(StrangeError):
        run(tmp_path, base, tuned, memory_budget="200kB")
    assert time.monotonic() - began < 20 and left_behind(tmp_path) == [] and no_threads()


def test_inputs_that_shrink_while_they_are_read_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = family(2)
    paths = save_family(tmp_path / "in", base, tuned)
    file = paths[2] / "model.safetensors"
    real = ModelWriter.__init__

    def shorten(self: ModelWriter, *arguments: Any, **named: Any) -> None:
        real(self, *arguments, **named)
        file.write_bytes(file.read_bytes()[:-1000])

    monkeypatch.setattr(ModelWriter, "__init__", shorten)
    with pytest.raises(MergeError, match="model-1"):
        merge_checkpoints(config_for("ties", paths, [0.5, 0.5]), tmp_path / "out")
    assert left_behind(tmp_path) == []


# -- memory


def test_an_arena_lends_the_lowest_place_and_joins_what_comes_back() -> None:
    arena = Arena(10 * ALIGNMENT)
    blocks = [arena.take(2 * ALIGNMENT) for _ in range(5)]
    assert [block.start for block in blocks if block] == [0, 8192, 16384, 24576, 32768] and arena.take(1) is None
    for index in (1, 3, 2):
        block = blocks[index]
        assert block is not None
        arena.give(block)
    joined = arena.take(6 * ALIGNMENT)
    assert joined is not None and joined.start == 2 * ALIGNMENT


def test_blocks_do_not_overlap() -> None:
    arena = Arena(4 * ALIGNMENT)
    one, other = arena.take(100), arena.take(100)
    assert one is not None and other is not None
    tensors: list[Tensor] = [block.tensor(8, torch.float32, 20).fill_(value) for value, block in ((1, one), (2, other))]
    assert tensors[0].sum() == 20 and tensors[1].sum() == 40
    assert bytes(one.memory(8, 4)) == torch.ones(1).view(torch.uint8).numpy().tobytes()


def test_memory_made_ready_is_zero_and_lent_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    fresh.prepare(9 << 20)
    ready = fresh.take(9 << 20)
    assert len(ready) == 9 << 20 and not any(ready[:: 1 << 12])
    assert fresh.take(1 << 20) is not ready
    fresh.prepare(9 << 20)
    assert len(fresh.take(10 << 20)) == 10 << 20


@pytest.mark.parametrize(
    ("what", "error"),
    [("mmap.mmap", OSError), ("mmap.mmap", MemoryError), ("threading.Thread.start", RuntimeError)],
)
def test_memory_that_cannot_be_made_ready_is_taken_later(
    what: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error("no")

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    with monkeypatch.context() as patched:
        patched.setattr(f"fastmerge.engine.fresh.{what}", refuse)
        fresh.prepare(9 << 20)
    assert fresh._ready is None and len(fresh.take(9 << 20)) == 9 << 20


def test_a_system_without_large_pages_lends_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fresh.mmap, "MADV_HUGEPAGE", -1, raising=False)
    with pytest.raises(OSError, match="Invalid argument"):
        mmap.mmap(-1, 1 << 20).madvise(-1)
    assert len(fresh.reserve(1 << 20)) == 1 << 20


def test_small_loads_are_read_ahead_but_never_beyond_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = 0
    most = 0
    real_take, real_give = Arena.take, Arena.give

    def take(self: Arena, nbytes: int) -> Any:
        nonlocal taken, most
        block = real_take(self, nbytes)
        if block is not None:
            taken += block.nbytes
            most = max(most, taken)
        return block

    def give(self: Arena, block: Any) -> None:
        nonlocal taken
        taken -= block.nbytes
        real_give(self, block)

    monkeypatch.setattr(Arena, "take", take)
    monkeypatch.setattr(Arena, "give", give)
    run(tmp_path, *family(2), memory_budget="200kB")
    assert 0 < most <= 200_000 and taken == 0
