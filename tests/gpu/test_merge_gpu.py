"""Whole merges on a GPU: the CPU's digests with any of its memory, state dicts wherever they are, streams, failures.

Without a GPU, the variant "interpreter" runs the bodies on the fake device of tests/engine, which holds them to the
order that a real one needs.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

import fastmerge
from fastmerge import backends
from fastmerge.engine.device import CudaDevice, place_of
from fastmerge.errors import ArgumentError, MergeError
from fastmerge.merging import merge_checkpoints, plan_checkpoints
from tests.cli.support import command, process_environment
from tests.engine.fake_device import FakeDevice
from tests.engine.small_family import Tensors, config_for, family, knows_base, save_family, taken, weighed
from tests.engine.test_same_bits import CASES, WEIGHTS, parameters_for
from tests.gpu.support import HERE, each_device, only_cuda
from tests.numeric import assert_bitwise_equal

SHAPES = {
    "a.weight": (300, 1001),
    "b.weight": (5, 14, 22),
    "c.weight": (301,),
    "d.weight": (),
    "e.weight": (300, 1024),
}


@contextmanager
def place(device: str) -> Iterator[str]:
    """What to pass as a device."""
    if device == "cuda":
        yield device
        return
    with patch("fastmerge.merging.open_device", lambda place: FakeDevice(1, 0.4)):
        yield device


@pytest.fixture(scope="module")
def models() -> tuple[Tensors, list[Tensors]]:
    base, tuned = family(3, torch.bfloat16, SHAPES)
    for one in (base, *tuned):
        one["steps"] = torch.arange(700)
    return base, tuned


@pytest.fixture(scope="module")
def paths(models: tuple[Tensors, list[Tensors]], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return save_family(tmp_path_factory.mktemp("merge") / "in", *models, shards=2)


def config(case: str, paths: list[Path], **more: Any) -> dict[str, object]:
    return config_for(case.partition(" ")[0], paths, WEIGHTS, **parameters_for(case)) | more


def enough(case: str, gpu_memory: str | None) -> str | None:
    """That much, or where columns are brought together as much as the largest tensor takes."""
    return "32MiB" if "columns" in case else gpu_memory


def to(device: str, tensors: Tensors) -> Tensors:
    return {name: x.to(device) for name, x in tensors.items()}


# -- checkpoints


@each_device
@pytest.mark.parametrize("gpu_memory", ["400kB", "8MiB", None] if HERE else ["400kB"])
@pytest.mark.parametrize("case", CASES)
def test_the_digest_is_the_cpus(
    case: str, gpu_memory: str | None, device: str, paths: list[Path], tmp_path: Path
) -> None:
    expected = merge_checkpoints(config(case, paths), tmp_path / "cpu", device="cpu", seed=5)
    more = {"gpu_memory": enough(case, gpu_memory), "memory_budget": enough(case, "3MiB")}
    with place(device) as where:
        report = merge_checkpoints(config(case, paths), tmp_path / "gpu", device=where, seed=5, **more)
    assert report.digest == expected.digest
    assert report.device != "cpu"
    if device == "cuda":
        assert report.backend == "triton" and report.device.startswith("cuda:")


@each_device
@pytest.mark.parametrize("numerics", ["fp32", "mergekit"])
@pytest.mark.parametrize("method", ["ties", "della", "linear", "dare_ties"])
def test_other_dtypes_and_mergekits_numbers(
    method: str, numerics: str, device: str, paths: list[Path], tmp_path: Path
) -> None:
    merge = config(method, paths, out_dtype="float16", exclude=["c"])
    expected = merge_checkpoints(merge, tmp_path / "cpu", device="cpu", numerics=numerics)
    with place(device) as where:
        found = merge_checkpoints(merge, tmp_path / "gpu", device=where, numerics=numerics, gpu_memory="2MiB")
    assert found.digest == expected.digest


@each_device
@pytest.mark.parametrize("policy", ["warn", "zero", "error"])
def test_nan(policy: str, device: str, tmp_path: Path) -> None:
    base, tuned = family(2, torch.float32, SHAPES)
    tuned[1]["a.weight"].view(-1)[[3, 200_000]] = torch.tensor([float("nan"), float("inf")])
    paths = save_family(tmp_path / "in", base, tuned)
    merge = config_for("ties", paths, [0.5, 0.5], density=0.5)
    with place(device) as where:
        if policy == "error":
            with pytest.raises(MergeError, match=r"a\.weight.*holds 1 NaN and 1 Inf"):
                merge_checkpoints(merge, tmp_path / "gpu", device=where, gpu_memory="1MiB")
            assert not list(tmp_path.glob("*gpu*"))
            return
        found = merge_checkpoints(merge, tmp_path / "gpu", device=where, on_nonfinite=policy, gpu_memory="1MiB")
    expected = merge_checkpoints(merge, tmp_path / "cpu", device="cpu", on_nonfinite=policy)
    assert found.digest == expected.digest and found.nonfinite == expected.nonfinite


@only_cuda
def test_auto_takes_the_gpu_and_the_plan_says_what_of_it(device: str, paths: list[Path]) -> None:
    assert place_of("auto", None).type == "cuda" and place_of("auto", "cpu").type == "cpu"
    plan = plan_checkpoints(config("ties", paths))
    free = CudaDevice(place_of("cuda", None)).free_bytes()
    assert plan.device.startswith("cuda:") and plan.gpu_budget is not None
    assert 0.5 * free < plan.gpu_budget < free


# -- state dicts


@each_device
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("where", ["there", "here", "mixed"] if HERE else ["mixed"])
def test_state_dicts(case: str, where: str, device: str, models: tuple[Tensors, list[Tensors]]) -> None:
    base, tuned = models
    method = case.partition(" ")[0]
    tuned = taken(method, tuned)
    arguments: dict[str, Any] = {"method": method, "seed": 5, **parameters_for(case), **weighed(method, WEIGHTS)}

    def merged(base: Tensors, tuned: list[Tensors], **more: Any) -> Tensors:
        return fastmerge.merge(tuned, base=base if knows_base(method) else None, **arguments, **more)

    expected = merged(base, tuned)
    if where != "here":
        base = to(device, base)
    if where == "there":
        tuned = [to(device, one) for one in tuned]
    with place(device) as target:
        more = {"device": target, "gpu_memory": enough(case, "2MiB")} if where != "there" else {}
        found = merged(base, tuned, **more)
    for name, tensor in expected.items():
        assert found[name].device.type == device
        assert_bitwise_equal(found[name].cpu(), tensor)


@each_device
@pytest.mark.parametrize("where", ["there", "mixed"])
def test_many_merges_of_state_dicts(where: str, device: str, models: tuple[Tensors, list[Tensors]]) -> None:
    base, tuned = models
    candidates = [
        {"density": 0.3, "lambda": 0.5},
        {"density": [0.3, 0.6, 0.3], "rescale": True},
        {"density": 0.3, "rescale": True, "method": "breadcrumbs", "gamma": 0.1},
        {"density": 0.6, "scope": "model"},
        {"density": 0.6, "scope": "model", "weight": 0.2},
    ]
    expected = [fastmerge.merge(tuned, base=base, **{"weight": 1.0} | one) for one in candidates]
    there = [to(device, one) for one in tuned] if where == "there" else tuned
    with place(device) as target:
        more = {"device": target, "gpu_memory": "2MiB"} if where != "there" else {}
        results = fastmerge.merge_many(there, candidates, base=to(device, base), weight=1.0, reuse=True, **more)
        for one, (_, found) in zip(expected, results, strict=True):
            for name, tensor in one.items():
                assert found[name].device.type == device
                assert_bitwise_equal(found[name].cpu(), tensor)


@each_device
@pytest.mark.parametrize("policy", ["zero", "error"])
def test_nan_in_state_dicts_on_the_device(policy: str, device: str) -> None:
    base, tuned = family(2, torch.float32, SHAPES)
    tuned[1]["a.weight"].view(-1)[3] = float("nan")
    there = [to(device, one) for one in (base, *tuned)]
    if policy == "error":
        with pytest.raises(MergeError, match=r"models\[1\] holds 1 NaN and 0 Inf"):
            fastmerge.merge(there[1:], base=there[0], weight=0.5)
        return
    expected = fastmerge.merge(tuned, base=base, weight=0.5, density=0.5, on_nonfinite="zero")
    found = fastmerge.merge(there[1:], base=there[0], weight=0.5, density=0.5, on_nonfinite="zero")
    for name, tensor in expected.items():
        assert_bitwise_equal(found[name].cpu(), tensor)
    assert there[2]["a.weight"].isnan().any()


@only_cuda
def test_a_merge_follows_what_is_still_to_be_done_in_the_callers_stream(device: str) -> None:
    """Inputs that the GPU has yet to make, and a result that is used at once."""
    base, tuned = family(3, torch.float32, {"w": (1024, 4096)})
    expected = fastmerge.merge(tuned, base=base, weight=0.5, density=0.5)["w"]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = [torch.zeros_like(x["w"], device="cuda") for x in (base, *tuned)]
        torch.cuda._sleep(50_000_000)
        for x, values in zip(late, (base, *tuned), strict=True):
            x.copy_(values["w"].pin_memory(), non_blocking=True)
        found = fastmerge.merge([{"w": x} for x in late[1:]], base={"w": late[0]}, weight=0.5, density=0.5)["w"].clone()
        for x in late:
            x.zero_()
    stream.synchronize()
    assert_bitwise_equal(found.cpu(), expected)


@only_cuda
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    base, tuned = family(1, torch.float32, {"w": (3, 4)})
    with pytest.raises(ArgumentError, match="there is no GPU after cuda:"):
        fastmerge.merge(tuned, base=base, weight=1.0, device="cuda:99")
    with pytest.raises(ArgumentError, match="is on cuda:0, but the merge is on cpu"):
        fastmerge.merge([to("cuda", tuned[0])], base=base, weight=1.0, device="cpu")


# -- failures


@contextmanager
def little_memory() -> Iterator[None]:
    """torch may allocate next to nothing."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-6)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@only_cuda
def test_too_little_memory_is_one_sentence_and_leaves_nothing(device: str, tmp_path: Path) -> None:
    base, tuned = family(2, shapes={"w": (4000, 4001)})
    paths = save_family(tmp_path / "in", base, tuned)
    merge = config_for("ties", paths, [0.5, 0.5], density=0.5)
    with little_memory(), pytest.raises(MergeError, match=r"^cuda:\d+ has too little memory left; choose a smaller"):
        merge_checkpoints(merge, tmp_path / "out", device="cuda", gpu_memory="1GiB")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    merge_checkpoints(merge, tmp_path / "out", device="cuda", gpu_memory="1GiB")
    with little_memory(), pytest.raises(MergeError, match="too little memory left"):
        fastmerge.merge(tuned, base=base, weight=0.5, device="cuda")


@only_cuda
def test_the_command_line(device: str, paths: list[Path], tmp_path: Path) -> None:
    (tmp_path / "merge.yml").write_text(json.dumps(config("ties", paths)))

    def run(*options: str) -> Any:
        return subprocess.run(
            command("merge", "merge.yml", *options), cwd=tmp_path, env=process_environment(), capture_output=True,
            text=True, timeout=300,
        )  # fmt: skip

    reports = []
    for out, options in (("cpu", ["--device", "cpu"]), ("gpu", ["--device", "cuda", "--gpu-memory", "1MiB"])):
        result = run(out, "--json", *options)
        assert result.returncode == 0, result.stderr
        reports.append(json.loads(result.stdout))
    assert reports[0]["digest"] == reports[1]["digest"] and reports[1]["backend"] == "triton"
    refused = run("x", "--device", "cuda:99")
    assert refused.returncode == 2 and "cuda:99" in refused.stderr and not (tmp_path / "x").exists()
    told = subprocess.run(command("env"), env=process_environment(), capture_output=True, text=True, timeout=300).stdout
    assert "gpu cuda:0" in told and "CUDA tensors" in told and "ops run on triton" in told


@only_cuda
def test_the_memory_taken_is_within_the_budget(device: str, tmp_path: Path) -> None:
    assert backends.reason("triton") is None
    base, tuned = family(3, shapes={f"w{number}": (2000, 4001) for number in range(8)})
    paths = save_family(tmp_path / "in", base, tuned)
    for method in ("ties", "della", "pcb"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        merge = config_for(method, paths, WEIGHTS, density=0.5)
        merge_checkpoints(merge, tmp_path / method, device="cuda", gpu_memory="600MiB")
        assert torch.cuda.max_memory_allocated() - before <= 600 << 20
