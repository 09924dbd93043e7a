"""`fastmerge bench`: every op on every backend has a figure; a wrong result has none; mistakes are told in a line."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fastmerge import backends, cli, measuring, ops
from tests.cli.support import Run


def test_every_op_on_every_backend_is_checked_and_measured(run: Run) -> None:
    result = run("bench", "--size", 2000, "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["copy_gb_per_s"] > 0 and report["machine"]["torch"] == torch.__version__
    measured = [name for name in ("cpu", "reference") if backends.reason(name) is None]
    names = [(row["backend"], row["op"], row["detail"]) for row in report["rows"]]
    assert names == [(backend, case.op, case.detail) for backend in measured for case in measuring.CASES]
    for row in report["rows"]:
        assert row["problem"] is None and row["elements"] == 2000
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["seconds"] / 1e9)
        assert row["fraction_of_copy"] == pytest.approx(row["gb_per_s"] / report["copy_gb_per_s"])


def test_the_ops_that_are_promised_are_there() -> None:
    named = {(case.op, case.detail) for case in measuring.CASES}
    assert {op for op, _ in named} == {
        "abs_histogram", "kth_magnitude", "topk_mask", "sparsify", "consensus_merge", "pcb_merge", "count_nonfinite",
    }  # fmt: skip
    assert {detail for op, detail in named if op == "sparsify"} == {"magnitude", "bernoulli", "della"}
    assert {detail for op, detail in named if op == "consensus_merge"} == {"ties", "task_arithmetic"}


def test_one_op_on_one_backend_is_a_table_of_one_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", "--op", "topk_mask", "--backend", "reference", "--size", "1500"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("A copy of cpu memory: ") and lines[1] == ""
    assert lines[2].split() == ["OP", "METHOD", "BACKEND", "ELEMENTS", "PASSES", "SECONDS", "GB/s", "OF", "A", "COPY"]
    assert lines[3].split()[:4] == ["topk_mask", "-", "reference", "1500"] and lines[3].endswith("%")
    assert len(lines) == 4


def test_a_wrong_result_has_no_figure_and_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(given: measuring.Inputs, backend: str) -> torch.Tensor:
        counts = ops.count_nonfinite(given.base, backend=backend)
        return counts + (backend != "reference")

    def broken(given: measuring.Inputs, backend: str) -> torch.Tensor:
        if backend == "reference":
            return ops.count_nonfinite(given.base, backend=backend)
        raise RuntimeError("the kernel\nfell over")

    case = measuring.CASES[-1]
    backend = backends.name_of(backends.resolve("cpu"))
    monkeypatch.setattr(measuring, "CASES", (replace(case, run=wrong), replace(case, run=broken), case))
    assert cli.run(["bench", "--backend", backend, "--size", "1000", "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["problem"] for row in rows] == [
        "2 of 2 elements are not the reference's",
        "RuntimeError: the kernel",
        None,
    ]
    assert [row["seconds"] is None for row in rows] == [True, True, False]
    assert cli.run(["bench", "--backend", backend, "--size", "1000"]) == 1
    assert "RED: 2 of 2 elements" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "tpk_mask"], "did you mean 'topk_mask'?"),
        (["--device", "gpu"], "device='gpu' is not known"),
        (["--backend", "opencl"], "backend='opencl' is not a backend"),
        (["--size", "0"], "size=0 is no number of elements"),
        *([] if torch.cuda.is_available() else [(["--device", "cuda"], "sees no GPU")]),
    ],
)
def test_what_is_not_here_is_one_line_and_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["bench", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and message in captured.err


class TestMeasuring:
    def test_bytes_are_counted_once_per_pass(self) -> None:
        by_name = {(case.op, case.detail): case for case in measuring.CASES}
        ties = by_name["consensus_merge", "ties"]
        # Four inputs of two bytes in a sweep for thresholds, and again in the merge, which writes one.
        assert ties.passes("cpu") == ties.passes("reference") == 2
        assert ties.moves(10, "cpu") == 10 * (2 * 4 * 2 + 2)
        assert by_name["topk_mask", ""].moves(10, "cpu") == 10 * (2 * 2 + 1)
        assert by_name["abs_histogram", ""].moves(10, "triton") == 20

    def test_an_unlike_result_is_told(self) -> None:
        x = torch.tensor([0.0, 1.0])
        assert measuring.difference(x, x.clone()) is None
        assert "1 of 2" in str(measuring.difference(torch.tensor([-0.0, 1.0]), x))
        assert "float16" in str(measuring.difference(x.half(), x))
        assert measuring.difference(torch.tensor([True]), torch.tensor([False])) is not None

    def test_a_copy_is_measured(self) -> None:
        assert 1e6 < measuring.copy_bandwidth("cpu", 1 << 20, 3) < 1e14

    def test_slow_runs_are_not_repeated_forever(self, monkeypatch: pytest.MonkeyPatch) -> None:
        watch = measuring.Stopwatch("cpu", 4)
        for seconds, expected in ((0.001, 5), (0.3, 3), (3.0, 1)):
            monkeypatch.setattr(watch, "once", lambda run, seconds=seconds: seconds)
            assert len(watch.several(lambda: None, 5, 0.5)) == expected

    def test_on_a_gpu_a_call_is_timed_by_events_behind_a_head_start(self, monkeypatch: pytest.MonkeyPatch) -> None:
        done: list[str] = []

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                done.append("record")

            def synchronize(self) -> None:
                done.append("wait")

            def elapsed_time(self, other: Event) -> float:
                return 250.0

        watch = measuring.Stopwatch("cpu", 4)
        watch.device = SimpleNamespace(type="cuda")  # type: ignore[assignment]
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: done.append("idle"))
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append("sleep"))
        assert watch.once(lambda: done.append("run")) == 0.25
        assert done == ["idle", "sleep", "record", "run", "record", "wait"]

    def test_tritons_interpreter_is_measured_only_if_it_is_named(self) -> None:
        if not measuring.interpreted("triton") or backends.reason("triton"):
            pytest.skip("Triton interprets nothing here; bench/gpu.py tells launches on a GPU")
        assert "triton" not in measuring.backends_of("cpu")
        assert measuring.backends_of("cpu", "triton") == ["triton"]

    @pytest.mark.parametrize("case", measuring.CASES, ids=lambda case: f"{case.op} {case.detail}".strip())
    def test_triton_takes_the_passes_that_are_counted(self, case: measuring.Case) -> None:
        if not measuring.interpreted("triton") or backends.reason("triton"):
            pytest.skip("Triton interprets nothing here; bench/gpu.py tells launches on a GPU")
        from fastmerge.backends.triton.launch import launched

        before = launched["count_digit"]
        case.run(measuring.inputs(2048, "cpu"), "triton")
        sweeps = launched["count_digit"] - before
        if case.op == "pcb_merge":
            sweeps //= measuring.MODELS  # a row at a time
            assert sweeps < case.passes("triton")
        else:
            # An order statistic by itself is what its last sweep finds; all others sweep once more.
            assert case.passes("triton") == (sweeps if case.op == "kth_magnitude" else sweeps + 1)
