"""Every CUDA kernel compiles for every target without a spill, and the check finds what breaks a rule."""

from __future__ import annotations

import re

import pytest

from checks import cuda

needs_nvcc = pytest.mark.skipif(
    cuda.nvcc() is None, reason="no nvcc; tests/cuda runs the same sources in the emulator, which knows no registers"
)

LOG = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN9fastmerge8portable4cuda12merge_kernelILi3EEEvi' for 'sm_80'
ptxas info    : Function properties for _ZN9fastmerge8portable4cuda12merge_kernelILi3EEEvi
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 72 registers, used 1 barriers, 48 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN9fastmerge8portable4cuda12merge_kernelILi3EEEvi' for 'sm_90a'
ptxas info    : Function properties for _ZN9fastmerge8portable4cuda12merge_kernelILi3EEEvi
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers
"""


@needs_nvcc
@pytest.mark.slow
def test_no_kernel_spills_on_any_target_and_all_arithmetic_is_exact():
    logs = cuda.logs()
    found = [usage for family, log in logs.items() for usage in cuda.usages(log, family)]
    assert [warning for log in logs.values() for warning in cuda.warnings(log)] == []
    assert len({usage.kernel for usage in found}) >= 20
    assert cuda.problems(found) == []
    for family in cuda.FAMILIES:
        assert cuda.inexact(cuda.ptx(family), family) == []
    named = set(re.findall(r"^\| `(\w+\.\w+(?:<[^`]*>)?)` \|", cuda.PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    assert {usage.kernel for usage in found} <= named


def test_the_account_of_ptxas_is_read():
    first, second = cuda.usages(LOG, "consensus")
    assert first == cuda.Usage("consensus.merge_kernel<3>", "80", 72, 48, 0, 0)
    assert (second.architecture, second.registers, second.stack, second.spilled) == ("90a", 128, 16, 20)
    spills, missing = cuda.problems([first, second], ("80", "90a", "120"))
    assert "merge_kernel<3> on sm_90a: 16 bytes of stack, 20 bytes spilled" in spills
    assert missing.endswith("not compiled for sm_120")


def test_names_have_their_template_arguments():
    """Those of an enumeration, too, which c++filt shows as numbers of a type."""
    mangled = "_ZN9fastmerge8portable4cuda12_GLOBAL__N_113expert_kernelILNS2_4ModeE2EEEvPKNS1_10ExpertPartEiPli"
    assert cuda._name(mangled) == "expert_kernel<2>"


def test_a_warning_of_the_build_is_found():
    """Builds go on after one, for another compiler may warn of more; the check does not."""
    said = "ptxas warning : Registers are spilled to local memory in function 'merge_kernel'"
    assert cuda.warnings(LOG) == [] and cuda.warnings(f"{LOG}{said}\n") == [said]
    assert cuda.warnings('x.cu(3): warning #177-D: variable "y" was declared but never referenced') != []


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("div.full.f32 %f1, %f2, %f3;", "not rounded correctly"),
        ("rcp.approx.f32 %f1, %f2;", "an approximation"),
        ("fma.rn.f32 %f1, %f2, %f3, %f4;", "fused"),
        ("add.ftz.f32 %f1, %f2, %f3;", "denormals"),
        ("@%p1 red.global.add.f32 [%rd1], %f1;", "left to chance"),
    ],
)
def test_inexact_operations_are_found(line, why):
    (problem,) = cuda.inexact(f"\tadd.rn.f32 %f1, %f2, %f3;\n\t{line}\n") or [""]
    assert why in problem


def test_one_family_may_fuse_by_one_operation():
    """Rounded once to nearest, and nothing flushed to zero."""
    fused = "\tfma.rn.f32 %f1, %f2, %f3, %f4;\n"
    assert cuda.inexact(fused, "highpass") == [] and cuda.inexact(fused, "expert") != []
    for other in ("fma.rn.ftz.f32", "fma.rz.f32", "fma.rn.f64", "mad.f32", "div.approx.f32"):
        assert cuda.inexact(f"\t{other} %f1, %f2, %f3;\n", "highpass") != []
    assert list(cuda.FUSED) == ["highpass"]


def test_exact_operations_are_left_alone():
    assert (
        cuda.inexact(
            "\tdiv.rn.f32 %f1, %f2, %f3;\n\tmul.rn.f32 %f1, %f2, %f3;\n\tatom.global.add.u64 %rd1, [%rd2], 1;\n"
        )
        == []
    )
