"""The flags check finds what makes results depend on the machine, and no comment about it."""

import pytest

from checks import flags

# Put together here, so that this file does not name them either.
NATIVE, FAST = "-march=" + "native", "-ffast" + "-math"


def test_the_repository_names_no_such_flag():
    assert flags.problems() == []


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("setup.py", f'flags = ["{NATIVE}"]'),
        ("CMakeLists.txt", f"add_compile_options({FAST})  # quick"),
        ("Makefile", f"\tg++ {NATIVE} a.cpp"),
        ("csrc/kernel.cu", "// see above\n#define FLAGS use_fast" + "_math"),
        ("csrc/kernel.cpp", '#pragma GCC optimize("-Ofast' + '")'),
        ("pyproject.toml", "args = ['-mcpu=" + "native']"),
        ("tools/build.sh", "nvcc --fmad=" + "true"),
        (".ci/run", f"export CXXFLAGS={FAST}"),
    ],
)
def test_a_flag_is_found_where_builds_are_written(tmp_path, name, line):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(line + "\n")
    (problem,) = flags.problems(tmp_path)
    assert problem.startswith(f"{name}:{1 + line.count(chr(10))}: ")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("setup.py", f"# never {NATIVE}: wheels travel"),
        ("csrc/kernel.cpp", f"int x;  // {FAST} would fuse this"),
        ("notes.md", f"No {FAST}."),
        ("setup.py", 'flags = ["-march=x86-64-v3", "-ffp-contract=off"]'),
        ("build/setup.py", f'flags = ["{NATIVE}"]'),
    ],
)
def test_talk_of_a_flag_is_fine(tmp_path, name, line):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(line + "\n")
    assert flags.problems(tmp_path) == []
