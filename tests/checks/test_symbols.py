"""The symbols check finds code that the linker would share between instruction sets; the kernels have none."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from checks import symbols

COMPILER = shutil.which("g++") or shutil.which("c++")
pytestmark = pytest.mark.skipif(
    COMPILER is None or shutil.which("nm") is None,
    reason="no C++ compiler or no nm, to make and read objects; without them nothing is built either",
)

SHARED = "inline int twice(int x) { return 2 * x; }\nint {}(int x) { return twice(x); }"
OWN = "namespace {} { static int twice(int x) { return 2 * x; }\nint run(int x) { return twice(x); } }"


def compiled(folder: Path, name: str, code: str) -> Path:
    source = folder / f"{name}.cpp"
    source.write_text(code)
    subprocess.run([str(COMPILER), "-O0", "-c", str(source), "-o", str(source.with_suffix(".o"))], check=True)
    return source.with_suffix(".o")


def of(template: str, name: str) -> str:
    return template.replace("{}", name, 1) if template is OWN else template.replace("int {}", f"int {name}")


def objects(folder: Path, template: str, parts: tuple[str, ...]) -> dict[str, list[Path]]:
    return {part: [compiled(folder, part, of(template, f"run_{part}"))] for part in parts}


@pytest.mark.parametrize("parts", [("avx2", "avx512"), ("baseline", "avx512"), ("driver", "avx2")])
def test_an_inline_function_in_two_instruction_sets_is_found(tmp_path, parts):
    (problem,) = symbols.problems(objects(tmp_path, SHARED, parts))
    assert problem.startswith("twice(int): ") and all(part in problem for part in parts)


def test_the_parts_that_run_everywhere_may_share(tmp_path):
    assert symbols.problems(objects(tmp_path, SHARED, ("driver", "bindings", "baseline"))) == []


def test_functions_in_namespaces_of_their_own_are_fine(tmp_path):
    assert symbols.problems(objects(tmp_path, OWN, ("baseline", "avx2", "avx512"))) == []


def test_objects_of_an_earlier_build_count_only_where_no_source_is_newer(tmp_path):
    sources, folder = tmp_path / "csrc", tmp_path / "objects"
    sources.mkdir()
    for name in ("setup.py", "csrc/kernel.cpp"):
        (tmp_path / name).touch()
    assert symbols.kept(folder, tmp_path) == {}
    for name in ("avx2", "driver", "emulated-bindings", "cuda-bindings"):
        (folder / name).mkdir(parents=True)
        (folder / name / "x.o").touch()
        os.utime(folder / name / "x.o", (2**31, 2**31))
    assert symbols.kept(folder, tmp_path) == {name: [folder / name / "x.o"] for name in ("avx2", "driver")}
    os.utime(sources / "kernel.cpp", (2**31 + 1, 2**31 + 1))
    assert symbols.kept(folder, tmp_path) == {}


@pytest.mark.slow
def test_the_kernels_share_no_code_between_instruction_sets(tmp_path):
    built = symbols.kept() or symbols.build(tmp_path)
    assert {"driver", "bindings"} < set(built) and len(built) > 2
    assert symbols.problems(built) == []
