"""The kernels' self-check passes here, on an x86-64 processor of 2008 and on arm64; the emulation is a real test."""

import platform
from pathlib import Path

import pytest

from checks import portable

pytestmark = pytest.mark.slow
x86_only = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="an older x86-64 is emulated on an x86-64; arm64 is, anywhere"
)

PROJECT = f"""
cmake_minimum_required(VERSION 3.18)
project(trial CXX)
add_executable({portable.TARGET} trial.cpp)
"""
USES_AVX2 = """
#include <immintrin.h>
__attribute__((target("avx2"))) int main(int count, char**) {
    __m256i sum = _mm256_add_epi32(_mm256_set1_epi32(count), _mm256_set1_epi32(41));
    return _mm256_extract_epi32(sum, 7) - 42;
}
"""
USES_NOTHING = """
#include <stdio.h>
int main() { return puts(sizeof(void*) == 8 ? "fine" : "odd") < 0; }
"""


def built(folder: Path, *, root: Path = portable.ROOT, arm64: bool = False) -> Path:
    try:
        return portable.build(folder, root=root, arm64=arm64)
    except portable.MissingToolError as reason:
        pytest.skip(str(reason))


def run(binary: Path, *emulator: str) -> str:
    try:
        return portable.run(binary, *emulator)
    except portable.MissingToolError as reason:
        pytest.skip(str(reason))


def trial(folder: Path, code: str, *, arm64: bool = False) -> Path:
    (folder / "CMakeLists.txt").write_text(PROJECT)
    (folder / "trial.cpp").write_text(code)
    return built(folder / "build", root=folder, arm64=arm64)


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """The self-check, built for this machine."""
    return built(tmp_path_factory.mktemp("here"))


def test_the_kernels_work_here(here):
    assert run(here)


@x86_only
def test_the_kernels_work_on_an_old_processor(here):
    assert run(here, *portable.OLD_X86) == "kernels agree: baseline\n"


def test_the_kernels_work_on_arm64(tmp_path):
    assert run(built(tmp_path, arm64=True), *portable.ARM64) == "kernels agree: neon\n"


@x86_only
def test_a_newer_instruction_ends_a_program_on_the_old_processor(tmp_path):
    with pytest.raises(RuntimeError, match="ended with"):
        run(trial(tmp_path, USES_AVX2), *portable.OLD_X86)


@x86_only
def test_a_program_of_old_instructions_runs_on_the_old_processor(tmp_path):
    assert run(trial(tmp_path, USES_NOTHING), *portable.OLD_X86) == "fine\n"


def test_a_program_for_arm64_runs_on_arm64_only(tmp_path):
    binary = trial(tmp_path, USES_NOTHING, arm64=True)
    assert run(binary, *portable.ARM64) == "fine\n"
    assert binary.read_bytes()[18:20] == b"\xb7\x00"  # the machine in its ELF header


def test_a_missing_tool_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(portable.MissingToolError, match="no-such-compiler is not installed"):
        portable.tool("no-such-compiler")


def test_a_program_that_does_not_compile_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="error"):
        trial(tmp_path, "int main() { return nothing; }")
