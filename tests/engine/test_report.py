from __future__ import annotations

import io
import json
import subprocess
import sys
import threading

import pytest

from fastmerge.engine.report import PHASES, MergeReport, Progress, copy_bandwidth, copy_fraction


def report(**changes: object) -> MergeReport:
    values: dict = {
        "out": "merged",
        "method": "ties",
        "tensors": 146,
        "parameters": 553_000_000,
        "bytes_read": 4_424_000_000,
        "bytes_written": 1_106_000_000,
        "passes": 1,
        "seconds": dict(zip(PHASES, (1.0, 0.5, 1.25, 0.75, 0.25, 2.0), strict=True)),
        "digest": "abc",
        "backend": "cpu",
        "copy_fraction": 0.125,
    }
    return MergeReport(**(values | changes))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


# -- the report


def test_the_table_names_every_phase_and_the_speed() -> None:
    lines = dict(line.split("  ", 1) for line in report().table().splitlines())
    shown = {name.strip(): value.strip() for name, value in lines.items()}
    assert (shown["method"], shown["passes"]) == ("ties", "1")
    assert shown["tensors"] == "146 (0.553B parameters)"
    assert (shown["read"], shown["written"]) == ("4.42 GB", "1.11 GB")
    assert (shown["start-up"], shown["computing"], shown["total"]) == ("1.00 s", "1.25 s", "2.00 s")
    assert {phase.replace("_", "-") for phase in PHASES} <= set(shown)
    assert shown["speed"] == "2.77 GB/s, 12% of this machine's copy bandwidth"
    assert shown["NaN and Inf"] == "none in the inputs"
    assert (shown["digest"], shown["output"]) == ("abc", "merged")


def test_the_table_counts_nonfinite_values_and_lists_the_first_tensors() -> None:
    found = {"one": {f"t{i}": (i, 1) for i in range(7)}, "two": {"clean": (0, 0)}}
    text = report(nonfinite=found, passes=2, copy_fraction=None).table()
    assert "in 7 input tensors" in text and "one: t4: 4 NaN, 1 Inf" in text and "and 2 more" in text
    assert "clean" not in text and "t5" not in text
    assert "1, and up to 2 over large tensors" in text and "copy bandwidth" not in text


def test_the_report_as_a_dict_survives_json() -> None:
    read = json.loads(json.dumps(report(nonfinite={"one": {"t": (1, 2)}}).to_dict()))
    assert read["nonfinite"] == {"one": {"t": [1, 2]}}
    assert read["seconds"]["start_up"] == 1.0 and read["copy_fraction"] == 0.125


def test_the_copy_bandwidth_is_that_of_a_real_copy() -> None:
    bandwidth = copy_bandwidth()
    assert 1e8 < bandwidth < 1e13
    # A merge that moves as much as a copy does in the same time reaches it all.
    assert copy_fraction(int(bandwidth), 1.0, bandwidth) == pytest.approx(1.0)
    assert copy_fraction(10, 2.0, 10.0) == pytest.approx(0.5)
    assert copy_fraction(10, 0.0, 1.0) is None
    used = memoryview(bytearray(b"ab" * 500))
    assert copy_bandwidth(used, nbytes=1000) > 0
    assert used[:500] == used[500:]


# -- the progress line


def test_off_a_terminal_there_is_one_plain_line() -> None:
    stream = io.StringIO()
    with Progress(stream) as progress:
        progress.begin(3_000_000, 2)
        progress.advance(3_000_000, "weight")
    assert stream.getvalue() == "fastmerge: reading 3.00 MB in up to 2 passes\n"


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_quiet_means_nothing_at_all(stream: io.StringIO) -> None:
    with Progress(stream, quiet=True) as progress:
        progress.begin(100, 1)
        progress.advance(100, "weight")
    assert stream.getvalue() == ""


def test_on_a_terminal_the_line_tells_share_rate_and_tensor_and_disappears() -> None:
    stream = Terminal()
    progress = Progress(stream)
    progress.begin(1000, 1)
    progress.advance(1000, "pass 1/2: layers.[3].weight")
    progress.close()
    progress.close()
    progress.advance(1, "after the end")
    text = stream.getvalue()
    assert "100%" in text and "GB/s" in text and "layers.[3].weight" in text
    assert "after the end" not in text
    assert text.endswith("\x1b[2K")  # the line was erased


def test_progress_counts_from_many_threads() -> None:
    progress = Progress(Terminal())
    progress.begin(8000, 1)
    workers = [threading.Thread(target=lambda: [progress.advance(1, "tensor") for _ in range(1000)]) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert progress._bar.tasks[0].completed == 8000
    progress.close()


def test_rich_and_torch_are_not_imported_off_a_terminal() -> None:
    code = (
        "import sys; from fastmerge.engine.report import Progress; p = Progress(); p.begin(1, 1); p.advance(1, 'x');"
        "p.close(); print([name for name in ('rich', 'torch') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
