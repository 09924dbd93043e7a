"""How the build finds nvcc, and for which GPUs it lets it compile."""

from __future__ import annotations

from pathlib import Path

import pytest

from checks import cuda

build = cuda._build()


def fake_nvcc(folder: Path, listed: str) -> str:
    """A program that names the architectures that it knows."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "nvcc"
    path.write_text(f'#!/bin/sh\n[ "$1" = --list-gpu-arch ] && printf "{listed}"\n')
    path.chmod(0o755)
    return str(path)


@pytest.fixture(autouse=True)
def _nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NVCC", "CUDA_HOME", "CUDA_PATH", "FASTMERGE_CUDA_ARCHITECTURES"):
        monkeypatch.delenv(name, raising=False)


def test_an_older_nvcc_compiles_for_the_gpus_that_it_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = fake_nvcc(tmp_path, "".join(f"compute_{each}\\n" for each in (75, 80, 86, 87, 89, 90)))
    assert build.architectures(old) == ["80", "86", "89", "90a"]
    assert "does not know 100, 120" in capsys.readouterr().err
    flags = build.code_flags(build.architectures(old))
    assert flags[-2:] == ["-gencode=arch=compute_90a,code=sm_90a", "-gencode=arch=compute_89,code=compute_89"]
    monkeypatch.setenv("FASTMERGE_CUDA_ARCHITECTURES", "100, 120")
    assert build.architectures(old) == ["100", "120"]


def test_a_new_nvcc_compiles_for_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = fake_nvcc(tmp_path, "".join(f"compute_{each}\\n" for each in (80, 86, 89, 90, 100, 103, 120, 121)))
    assert build.architectures(new) == list(build.ARCHITECTURES)
    assert capsys.readouterr().err == ""


def test_an_nvcc_that_knows_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="names none of 80"):
        build.architectures(fake_nvcc(tmp_path, "compute_75\\n"))


def test_nvcc_is_looked_for_where_it_is_mostly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = [fake_nvcc(tmp_path / name, "") for name in ("named", "home/bin", "path", "usual")]
    monkeypatch.setattr(build, "USUAL_NVCC", places[3])
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert build.nvcc() == places[3]
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert build.nvcc() == places[2]
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert build.nvcc() == places[1]
    monkeypatch.setenv("NVCC", places[0])
    assert build.nvcc() == places[0]


def test_no_warning_ends_the_build_of_a_user() -> None:
    assert not [flag for flag in (*build.NVCC_FLAGS, *build.COMMON_FLAGS) if "error" in flag.lower()]
