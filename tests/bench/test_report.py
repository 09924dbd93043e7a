"""What is told of GPU figures is what the files say: tables, verdicts, what auto prefers; bad files are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import report


def row(benchmark: str, case: str, seconds: float | None, **more: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"part": "p", "benchmark": benchmark, "case": case, "problem": None, "bytes": 10**9}
    if seconds is None:
        return made | {"problem": "3 of 9 values are others"}
    rate = 10**9 / seconds
    return made | {"seconds": seconds, "gb_per_s": rate / 1e9, "limit": "copy", "fraction": rate / 4e12, **more}


def run(backend: str, *rows: dict[str, Any], capability: str = "9.0") -> dict[str, Any]:
    return {
        "environment": {"gpu": "GPU X", "gpu_capability": capability},
        "backend": backend,
        "limits_bytes_per_s": {"copy": 4e12},
        "rows": list(rows),
    }


CUDA = run(
    "cuda",
    row("abs_histogram", "normal", 0.001, bar=0.75, bar_met=False),
    row("abs_histogram", "equal", 0.004),
    row("consensus_apply", "ties", 0.002, bar=0.9, bar_met=True),
    row("topk_mask", "normal", None),
)
TRITON = run(
    "triton",
    row("abs_histogram", "normal", 0.002),
    row("abs_histogram", "equal", 0.003),
    row("consensus_apply", "ties", 0.0015),
    row("topk_mask", "normal", 0.001),
)


def test_the_table_tells_every_row_and_no_figure_of_a_wrong_one():
    text = report.table([CUDA, TRITON])
    assert "**GPU X** (copy 4,000 GB/s)" in text
    assert "| abs_histogram | normal | 1,000 GB/s, 0.25 (bar 0.75: missed) | 500 GB/s, 0.12 |" in text
    assert "| topk_mask | normal | wrong | 1,000 GB/s, 0.25 |" in text
    assert "(bar 0.9: met)" in text


def test_without_results_the_pages_say_so(tmp_path):
    assert "No GPU has run" in report.table([])
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.put(page, report.table([]))
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text and report.NOTHING in text


def test_auto_prefers_what_was_faster_over_all_cases_of_a_function(tmp_path):
    chosen = report.faster([CUDA, TRITON])
    functions = {"abs_histogram": "cuda", "consensus_apply": "triton", "tie_counts": "triton", "topk_mask": "triton"}
    assert chosen == {"9.0": functions}
    assert report.faster([CUDA]) == {}
    path = tmp_path / "preferences.py"
    path.write_text(report.PREFERENCES.read_text())
    for wanted in (chosen, {}):
        report.prefer(wanted, path)
        names: dict[str, Any] = {"__package__": "fastmerge.backends", "__name__": "preferences"}
        exec(compile(path.read_text(), str(path), "exec"), names)
        assert names["FASTER"] == wanted


def test_what_was_wrong_where_the_other_was_right_is_not_preferred():
    slow, fast = row("consensus_apply", "ties", 0.003), row("consensus_apply", "ties", 0.001)
    red = row("consensus_apply", "linear", None)
    right = row("consensus_apply", "linear", 0.5)
    for cuda, triton, taken in (
        ([fast, red], [slow, right], "triton"),
        ([red], [right], "triton"),
        ([slow, right], [fast, red], "cuda"),
        ([fast, red], [slow, red], "cuda"),
        ([slow, red], [fast], "triton"),
    ):
        chosen = report.faster([run("cuda", *cuda), run("triton", *triton)])
        assert chosen == {"9.0": {"consensus_apply": taken}}
    assert report.faster([run("cuda", red), run("triton", red)]) == {}


def test_a_part_that_died_was_wrong_in_what_it_did_not_come_to():
    died = row("masks", "-", None)
    chosen = report.faster([run("cuda", died), run("triton", row("topk_mask", "normal", 1.0))])
    assert chosen == {"9.0": {"tie_counts": "triton", "topk_mask": "triton"}}
    other = died | {"part": "another"}
    assert report.faster([run("cuda", other), run("triton", row("topk_mask", "normal", 1.0))]) == {}


def test_how_much_faster_cuda_is_than_triton_is_told_beside_its_bar():
    text = report.table([CUDA, TRITON])
    assert "`abs_histogram` 1.22 (0.75 to 2.00; bar 1.15: met)" in text
    assert "`topk_mask` cuda wrong" in text and "`consensus_merge_many` not measured by both." in text
    slow = run("cuda", row("abs_histogram", "normal", 0.0018))
    assert "`abs_histogram` 1.11 (1.11 to 1.11; bar 1.15: missed)" in report.table([slow, TRITON])
    assert "bar 1.15" not in report.table([CUDA])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting"),
        ("[]", "not a report"),
        (json.dumps({"backend": "cuda"}), "not a report"),
        (json.dumps(run("cuda", {"benchmark": "x", "case": "y"})), "whether it was right"),
        (json.dumps(run("cuda", row("x", "y", None) | {"seconds": 1.0})), "has a figure nevertheless"),
    ],
)
def test_a_file_that_is_no_report_is_refused_by_name(tmp_path, capsys, text, reason):
    path = tmp_path / "figures.json"
    path.write_text(text)
    assert report.main([str(path)]) == 1
    said = capsys.readouterr().err
    assert str(path) in said and reason in said


def test_reports_are_found_but_for_those_of_the_moment(tmp_path):
    for folder in ("h200", "local"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "cuda.json").write_text(json.dumps(CUDA))
    (tmp_path / "h200" / "ops.json").write_text("[1]")
    assert report.found(tmp_path) == [tmp_path / "h200" / "cuda.json"]


def test_the_picture_is_drawn(tmp_path, capsys):
    files: list[Path] = []
    for name, made in (("cuda", CUDA), ("triton", TRITON)):
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps(made))
    picture = tmp_path / "roofline.png"
    assert report.main([*map(str, files), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
