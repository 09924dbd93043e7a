"""The benchmarks for a GPU run through without one; a red row has no figure; the script changes no setting."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import adversarial
import gpu
import gpu_ops
import gpu_pcb
import gpu_rows
import pytest
import report
import torch

from fastmerge import backends, ops

SCRIPT = Path(gpu.__file__)
CHECK = SCRIPT.with_name("gpu_check.sh")
MOST_SECONDS = 540
interpreted = pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="kernels are compiled here, not interpreted; bench/gpu_check.sh runs here without --dry-run",
)


def environment(**more: str) -> dict[str, str]:
    root = str(SCRIPT.parents[1])
    kept = {key: value for key, value in os.environ.items() if not key.startswith("FASTMERGE_")}
    return kept | {"PYTHONPATH": root, "PYTHON": sys.executable, "TRITON_INTERPRET": "1", **more}


def bench(tmp_path: Path, **given: Any) -> gpu_rows.Bench:
    backend = backends.name_of(backends.resolve("auto"))
    made = gpu_rows.Bench("cpu", backend, 3000, 1, (2, 3), tmp_path, **given)
    gpu_rows.limits(made)
    return made


@interpreted
@pytest.mark.slow
def test_every_part_runs_through_without_a_gpu(tmp_path: Path) -> None:
    """In the emulator, where it was built: in Triton's interpreter all parts would take minutes."""
    sizes = ["--device", "cpu", "--elements", "4096", "--repeat", "1", "--folder", tmp_path]
    command = [sys.executable, SCRIPT, *sizes, "--json", tmp_path / "figures.json"]
    emulated = environment(FASTMERGE_CUDA_EMULATED=os.environ.get("FASTMERGE_CUDA_EMULATED", "0"))
    result = subprocess.run(command, env=emulated, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    made = json.loads((tmp_path / "figures.json").read_text())
    assert made["backend"] in ("cuda", "triton") and made["skipped"] == []
    assert set(made["limits_bytes_per_s"]) == {"copy", "read", "host_to_device", "device_to_host"}
    assert {row["part"] for row in made["rows"]} == set(gpu.PARTS)
    for row in made["rows"]:
        assert row["problem"] is None and row["fraction"] > 0, row
        if row["part"] != "whole":
            assert sum(row["launches"].values()) > 0
    bars = {(row["benchmark"], row["case"]): row["bar"] for row in made["rows"]}
    for method in ("ties", "task_arithmetic"):
        for models in (3, 8):
            assert bars["consensus_merge", f"{method}, {models} models, normal"] == 0.9
    assert bars["consensus_apply", "ties, 8 models, normal"] == 0.9
    assert (bars["abs_histogram", "normal"], bars["abs_histogram", "equal"]) == (0.75, 0.4)
    (kth, *_) = (row for row in made["rows"] if row["benchmark"] == "kth_magnitude")
    assert (kth["torch_topk"]["bar"], kth["torch_sort"]["bar"]) == (20.0, 5.0)
    competing = [row for row in made["rows"] if row["benchmark"] == "pcb_merge"]
    assert len(competing) == 2 and all(row["eager"]["bar"] == 20.0 and "extra_memory" in row for row in competing)
    assert {bars[key] for key in bars if key[0] in ("merge", "merge_checkpoints")} == {0.8}
    filters = [row for row in made["rows"] if row["benchmark"] == "highpass"]
    assert any(row["bar"] == 0.6 for row in filters) and any("transforms" in row for row in filters)
    (worn,) = (row for row in made["rows"] if row["benchmark"] == "expert_apply_")
    assert worn["within"]["most"] == 0.01 and worn["revert_seconds"] > 0
    assert list(tmp_path.iterdir()) == [tmp_path / "figures.json"]


def test_every_part_runs_through_on_the_backend_that_there_is(tmp_path: Path) -> None:
    made = bench(tmp_path)
    for name, part in gpu.PARTS.items():
        rows = list(part(made))
        assert rows and all(row["problem"] is None for row in rows), (name, rows)
        assert all(gpu.render(row) for row in rows)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_result_has_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = bench(tmp_path)
    right = ops.abs_histogram
    monkeypatch.setattr(ops, "abs_histogram", lambda x, backend: right(x, backend=backend) + (backend == made.backend))
    monkeypatch.setattr(gpu_ops, "on_host", lambda run: run("reference"))
    if made.backend == "reference":
        pytest.skip("there is no backend but the reference, with which it would be compared")
    for row in gpu_ops.histogram(made):
        assert "are not the reference's" in row["problem"]
        assert "seconds" not in row and "RED" in gpu.render(row)


def test_what_one_part_cannot_do_does_not_cost_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(made: gpu_rows.Bench) -> Any:
        raise RuntimeError("no such kernel")
        yield

    monkeypatch.setitem(gpu.PARTS, "kth", broken)
    given = ["--device", "cpu", "--elements", "2000", "--repeat", "1", "--only", "kth", "histogram"]
    backend = backends.name_of(backends.resolve("auto"))
    assert gpu.main([*given, "--backend", backend, "--json", str(tmp_path / "figures.json")]) == 1
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert rows[0]["problem"] == "RuntimeError: no such kernel" and len(rows) == 6
    assert gpu.main([*given[:-1], "--backend", backend, "--seconds", "0"]) == 0
    assert "skipped: kth" in capsys.readouterr().out


def test_an_interrupt_costs_no_row_that_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "figures.json"

    def stopped(made: gpu.Bench) -> Any:
        yield next(iter(gpu.PARTS["histogram"](made)))
        assert len(json.loads(file.read_text())["rows"]) == 1  # written before the next is begun
        raise KeyboardInterrupt

    monkeypatch.setitem(gpu.PARTS, "kth", stopped)
    backend = backends.name_of(backends.resolve("auto"))
    given = ["--device", "cpu", "--elements", "2000", "--repeat", "1", "--backend", backend, "--json", str(file)]
    assert gpu.main([*given, "--only", "kth", "histogram"]) == 130
    kept = report.read(file)
    assert [row["benchmark"] for row in kept["rows"]] == ["abs_histogram"] and kept["interrupted"] == "kth"
    assert "interrupted in kth" in capsys.readouterr().err
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("variant", gpu_pcb.CLIPPED)
def test_the_eager_formula_is_that_of_pcb_merging(variant: str) -> None:
    rows = torch.stack([adversarial.values("normal", torch.float32, 5000, seed) for seed in range(4)]) * 1e-2
    expected = ops.pcb_merge(rows, variant=variant, density=gpu_rows.PCB_DENSITY)
    actual = gpu_pcb.eager_pcb(rows, variant)
    far = (actual - expected).abs() > 1e-4 * expected.abs().max()
    assert int(far.sum()) <= 5


def test_adversarial_values_depend_on_nothing_but_the_seed() -> None:
    for kind in adversarial.KINDS:
        first, second = (adversarial.values(kind, torch.bfloat16, 1000, 3, "cpu") for _ in range(2))
        assert torch.equal(first.view(torch.int16), second.view(torch.int16))


# -- the script --------------------------------------------------------------------------------------------------------


def check(*parts: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [CHECK, *parts], env=environment(**more), capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL
    )


def test_the_check_is_a_script_that_bash_can_read() -> None:
    assert os.access(CHECK, os.X_OK)
    subprocess.run(["bash", "-n", CHECK], check=True)


def test_the_checks_steps_end_within_nine_minutes() -> None:
    limits: dict[str, int] = {}
    for name, limit, command in re.findall(r"^ *step (\S+) (\d+) (.*)$", CHECK.read_text(), re.MULTILINE):
        if not re.search(r"interpreter and|tiny|--size 1000|--version", command):  # these are of the dry run
            limits[name] = int(limit)
    steps = 'environment build-cpu build-cuda tests drawn "$tool" "$backend" report fastmerge'
    assert set(limits) == set(steps.split())
    assert sum(limits.values()) + limits['"$tool"'] + limits['"$backend"'] <= MOST_SECONDS  # of these there are two


def test_the_check_changes_no_setting_of_the_gpu() -> None:
    """Nor does anything else here call nvidia-smi but to ask."""
    for file in SCRIPT.parent.rglob("*"):
        if file.suffix in (".py", ".sh"):
            for line in file.read_text().splitlines():
                if "nvidia-smi " in line and not line.lstrip().startswith(("#", "echo")):
                    assert re.search(r"nvidia-smi --query-gpu=[\w.,]+ --format=csv$", line) or "command -v" in line, (
                        line
                    )


def test_the_sanitizer_sees_only_cudas_kernels() -> None:
    text = CHECK.read_text()
    (found,) = re.findall(r'^ +variant="(.*not interpreter)"$', text, re.MULTILINE)
    assert found == "by_cuda and not interpreter" and '-k "$once and $variant"' in text


def test_nvcc_is_found_beside_the_path_and_what_is_missing_is_said(tmp_path: Path) -> None:
    """The build of CUDA's kernels fails where it cannot be made, instead of passing without them."""
    assert re.search(r"build-cuda \d+ env FASTMERGE_CPU=0 FASTMERGE_CUDA=1 ", CHECK.read_text())
    (tmp_path / "home" / "bin").mkdir(parents=True)
    nvcc = tmp_path / "home" / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\necho nvcc of this test\n")
    nvcc.chmod(0o755)
    tools = tmp_path / "tools"
    tools.mkdir()
    needed = "bash cat cut dirname env grep head mkdir mktemp rm sort tail tee timeout"
    for name in needed.split():
        (tools / name).symlink_to(str(shutil.which(name)))
    python = tools / "python"
    python.write_text(f'#!/bin/sh\n[ "$1" = - ] && exec {sys.executable} "$@"\nexit 3\n')
    python.chmod(0o755)
    given = {"PATH": str(tools), "CUDA_HOME": str(tmp_path / "home"), "PYTHON": str(python)}
    result = check("tests", "--dry-run", OUT=str(tmp_path / "figures"), **given)
    assert "nvcc of this test" in result.stdout
    assert re.search(r"^MISSING: ", result.stdout.partition("== summary")[2], re.MULTILINE)


def test_an_unknown_part_is_refused() -> None:
    result = check("benchmarks", "--dry-run")
    assert result.returncode == 2 and result.stderr.startswith("usage: ")


@interpreted
@pytest.mark.slow
def test_a_dry_run_of_the_check_passes_every_step(tmp_path: Path) -> None:
    without_plugins = "-p no:timeout -p no:xdist -p no:benchmark"  # they may be missing where there is a GPU
    result = check("--dry-run", str(tmp_path / "figures"), PYTEST_ADDOPTS=without_plugins)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr
    summary = result.stdout.partition("== summary")[2]
    steps = "environment build-cpu build-cuda tests drawn memcheck racecheck cuda triton report fastmerge"
    for step in steps.split():
        assert re.search(rf"^{re.escape(step)} +passed", summary, re.MULTILINE), step
    made = sorted(file.name for file in (tmp_path / "figures").iterdir())
    assert made == ["cuda.json", "drawn.xml", "log.txt", "ops.json", "tests.xml", "triton.json"]
    assert all(report.read(tmp_path / "figures" / f"{name}.json")["backend"] == name for name in ("cuda", "triton"))
    assert json.loads((tmp_path / "figures" / "ops.json").read_text())["rows"]


@interpreted
def test_a_step_that_fails_does_not_stop_the_next(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 3\n")
    python.chmod(0o755)
    result = check("bench", "--dry-run", OUT=str(tmp_path / "figures"), PYTHON=str(python))
    assert result.returncode == 1
    summary = result.stdout.partition("== summary")[2]
    for step in ("environment", "build-cpu", "build-cuda", "cuda", "triton", "report", "fastmerge"):
        assert re.search(rf"^{re.escape(step)} +failed \(3\)", summary, re.MULTILINE), summary
