"""The check of the kernels' sources finds what compiles and gives other bits, and nothing else."""

from __future__ import annotations

import pytest

from checks import triton_sources


def found(tmp_path, code: str) -> list[str]:
    folder = tmp_path / "triton_kernels"
    folder.mkdir()
    (folder / "family.py").write_text(code)
    return triton_sources.problems(tmp_path)


def test_the_kernels_keep_to_it():
    assert triton_sources.problems() == []
    assert list((triton_sources.ROOT / "triton_kernels").glob("*.py"))


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("x = tl.full((8,), -0.0, tl.float32)", "-0.0 is +0 in Triton"),
        ("x = tl.where(a, b, -0.0)", "-0.0 is +0 in Triton"),
        ("x = tl.exp(y)", "tl.exp does not"),
        ("x = tl.math.fma(y, y, y)", "tl.fma does not"),
        ("x = y.to(tl.bfloat16)", "rounds one way"),
        ("x = tl.dot(y, z)", "an order of the hardware's own"),
    ],
)
def test_what_gives_other_bits_is_found(tmp_path, code, sentence):
    (problem,) = found(tmp_path, f"\n{code}\n")
    assert problem.startswith("triton_kernels/family.py:2: ") and sentence in problem


def test_the_filter_may_multiply_matrices(tmp_path):
    assert found(tmp_path, "x = tl.dot(y, z)") != []
    (tmp_path / "triton_kernels" / "family.py").rename(tmp_path / "triton_kernels" / "highpass.py")
    assert triton_sources.problems(tmp_path) == []


@pytest.mark.parametrize(
    "code",
    [
        "x = tl.zeros((8,), tl.float32) * -1.0",
        "x = functions.exp(y)",
        "x = tl.div_rn(y, z) - 0.0",
        "x = y.to(tl.uint16).to(tl.bfloat16, bitcast=True)",
        "x = -0",
    ],
)
def test_what_is_right_is_left_alone(tmp_path, code):
    assert found(tmp_path, code) == []
