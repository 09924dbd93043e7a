"""Launches: whose device they are made on, and what numbers they write into its memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fastmerge import backends

launch = pytest.importorskip(
    "fastmerge.backends.cuda.launch",
    reason="no cuda backend here; tests/ops holds the others to the same",
    exc_type=ImportError,
)

pytestmark = pytest.mark.skipif(not launch.EMULATED, reason="tests/gpu has the tests that run on a GPU")


def test_the_host_gets_its_device_back() -> None:
    """The emulator refuses a launch where the one before has left another device behind."""
    out = torch.zeros(3, dtype=torch.int64)
    for device in (1, 0, 2, 2):
        launch.compiled.write_numbers((device, 0), [device, 5, 6], out.data_ptr())
        assert out.tolist() == [device, 5, 6]
    with pytest.raises(ValueError, match="more numbers than a launch takes"):
        launch.compiled.write_numbers((1, 0), [0] * 10000, out.data_ptr())
    launch.compiled.write_numbers((0, 0), [7], out.data_ptr())
    assert out.tolist() == [7, 5, 6]


@pytest.mark.parametrize("count", [0, 1, 480, 481, 1920, 1921, 5000])
@pytest.mark.parametrize("captured", [False, True])
def test_numbers_are_written_by_launches_where_a_graph_is_captured(
    count: int, captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_captured", lambda device: captured)
    values = [(-1) ** i * (i + (1 << 40)) for i in range(count)]
    for given in (values, torch.tensor(values, dtype=torch.int64)):
        before = launch.compiled.launches()
        assert launch.table(given, torch.device("cpu")).tolist() == values
        by_launches = captured or count <= 1920
        assert launch.compiled.launches() - before == (-(-count // 480) if by_launches else 0)


@pytest.mark.parametrize("text", ["12", "9-3", "1-2;"])
def test_the_emulator_takes_no_list_that_is_none(text: str) -> None:
    program = "import torch\nfrom fastmerge import ops\nops.count_nonfinite(torch.ones(3), backend='cuda')\n"
    environment = {"FASTMERGE_CUDA_EMULATED": "1", "FASTMERGE_EMULATED_FORBIDDEN": text}
    command = ["env", *(f"{name}={value}" for name, value in environment.items()), sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode != 0 and "is no list of ranges" in result.stderr


def test_a_gpu_that_the_kernels_were_not_compiled_for_is_said_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that "auto" takes another backend instead of failing at the first call."""
    monkeypatch.setattr("fastmerge.backends.cuda.EMULATED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(launch.compiled, "ARCHITECTURES", "90a,100")
    monkeypatch.setattr(launch.compiled, "check_usable", lambda: "its kernels cannot run on this GPU: no kernel image")
    monkeypatch.setattr(backends, "_loaded", {})
    assert backends.reason("cuda") == (
        "ImportError: its kernels cannot run on this GPU: no kernel image; this build has code for 90a,100"
    )
