"""What a kernel in Triton becomes for a GPU that is not here: compiled ahead of time, and the compiled code read.

A `Launch` is what the backend would run: a kernel with the types, alignments and compile-time constants of its
arguments, worked out by Triton's own launcher code. `compiled` turns it into code for one target and `Code.problems`
says what in that code breaks the rules of `docs/numbers.md` or is slower than it has to be.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from fastmerge.backends.triton.launch import REGISTERS


@dataclass(frozen=True)
class Target:
    """A kind of GPU: how Triton calls it, and how many bytes of shared memory a program may have there."""

    gpu: GPUTarget
    shared: int


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 << 10),
    "sm_86": Target(GPUTarget("cuda", 86, 32), 99 << 10),
    "sm_89": Target(GPUTarget("cuda", 89, 32), 99 << 10),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 << 10),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 << 10),
    "sm_120": Target(GPUTarget("cuda", 120, 32), 99 << 10),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 << 10),
}

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 16
"""Bytes of the widest load that every target has."""


@dataclass(frozen=True)
class Launch:
    """One launch as the backend makes it. arguments: tensors, numbers, tuples of them. constants: num_warps, too."""

    kernel: JITFunction
    arguments: tuple[Any, ...]
    constants: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel's file and name, as in `consensus.merge`."""
        return f"{self.kernel.fn.__module__.rpartition('.')[2]}.{self.kernel.fn.__name__}"

    def specialised(self, target: GPUTarget) -> tuple[dict[str, Any], dict[Any, Any], dict[Any, Any], dict[str, Any]]:
        """Signature, compile-time constants, attributes and options, as a launch on that GPU would compile it for."""
        backend = make_backend(target)
        given = dict(self.constants)
        if target.backend == "hip":
            given.pop(REGISTERS, None)
            if "PRECISION" in given:
                given["PRECISION"] = "ieee"
        bind = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        bound, specialization, options = bind(*self.arguments, **given)
        chosen, signature, constants, attributes = self.kernel._pack_args(
            backend, dict(given), bound, specialization, options
        )
        return signature, constants, attributes, vars(chosen)

    def key(self) -> str:
        """The same text for launches that compile to the same code."""
        return f"{self.name} {self.specialised(TARGETS['sm_90'].gpu)[:3]} {sorted(map(str, self.constants.items()))}"

    def streamed(self, writes: Sequence[str], least: int) -> tuple[list[int], list[int]]:
        """Bytes per element of the float tensors of at least that many elements: of those read, and those written.

        writes: names of arguments that are only written. A tensor whose address comes in a table is known by its type,
        a compile-time constant; where there is no base, something else stands in its place and is not read.
        """
        read = [kind.primitive_bitwidth // 8 for kind in self.constants.values() if isinstance(kind, tl.dtype)]
        written: list[int] = []
        for parameter, argument in zip(self.kernel.params, self.arguments):
            if parameter.name == "base" and not self.constants.get("HAS_BASE", True):
                continue
            for tensor in argument if isinstance(argument, tuple) else (argument,):
                if isinstance(tensor, torch.Tensor) and tensor.dtype in FLOATS and tensor.numel() >= least:
                    (written if parameter.name in writes else read).append(tensor.element_size())
        return read, written


@dataclass
class Code:
    """What was read in compiled code. loads, stores: how many of global memory there are, by bytes per thread.

    Of narrow ones only those that no mask guards are counted: they are how masks look. arithmetic: sentences about
    operations that give other bits than the reference. products: how many instructions multiply matrices.
    """

    registers: int
    shared: int
    spilled: int
    loads: Counter[int] = field(default_factory=Counter)
    stores: Counter[int] = field(default_factory=Counter)
    arithmetic: list[str] = field(default_factory=list)
    products: int = 0

    def problems(self, limit: int, spilled: int = 0, products: bool = False) -> list[str]:
        """What is wrong whatever the kernel is for.

        limit: bytes of shared memory. spilled: as many bytes may be. products: whether it may multiply matrices.
        """
        found = list(self.arithmetic)
        if self.products and not products:
            found.append(
                f"multiplies matrices by {self.products} instructions that sum in an order, and with roundings, of "
                "their own; the reference's bits need plain additions"
            )
        if self.spilled > spilled:
            found.append(f"keeps {self.spilled} bytes per thread in local memory: registers spill; take smaller tiles")
        if self.shared > limit:
            found.append(f"needs {self.shared} bytes of shared memory, and the target has {limit}")
        return found


def compiled(launch: Launch, target: Target) -> Code:
    """Compile a launch for a target and read the code."""
    signature, constants, attributes, options = launch.specialised(target.gpu)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    kernel = triton.compile(source, target=target.gpu, options=options)
    code = _read_amd(kernel) if target.gpu.backend == "hip" else _read_nvidia(kernel)
    code.arithmetic += _inexact_llvm(kernel.asm["llir"])
    return code


# --- LLVM: what both kinds of GPU are compiled from -------------------------------------------------------------------

_LLVM_FLOAT = re.compile(r"= (?:tail )?(?:call )?((?:f(?:add|sub|mul|div|neg|cmp))\b[^,\n]*)")
_LLVM_LOOSE = re.compile(r"\b(fast|contract|afn|arcp|reassoc|nnan|ninf|nsz)\b")
_LLVM_FUSED = re.compile(r"@llvm\.(fma|fmuladd)\.\S+?\(|@__nv_\w+\(|@__ocml_\w+\(")


def _inexact_llvm(text: str) -> list[str]:
    """Operations that allow the compiler to reorder, fuse or approximate, and library functions."""
    loose = Counter(
        " ".join(found.group(1).split()[:2]) for found in _LLVM_FLOAT.finditer(text) if _LLVM_LOOSE.search(found[1])
    )
    loose.update(found.group().rstrip("(") for found in _LLVM_FUSED.finditer(text) if "declare" not in found.string)
    if "!fpmath" in text:
        loose["!fpmath"] += text.count("!fpmath")
    return [f"LLVM: {count} x {name} may not have the reference's bits" for name, count in sorted(loose.items())]


# --- NVIDIA -----------------------------------------------------------------------------------------------------------

_PTX = re.compile(r"^\s*(@!?%p\d+\s+)?([a-z][\w.:]*)", re.MULTILINE)
_PTX_MEMORY = re.compile(r"(ld|st)\.global(?:\.[a-z_:0-9]+)*?(?:\.v(\d))?\.[busf](\d+)$")
_PTX_INEXACT = (
    (re.compile(r"div\.(full|approx)"), "division that is not rounded correctly; use tl.div_rn"),
    (re.compile(r"(sqrt|rcp|rsqrt)\.approx|(ex2|lg2|tanh|sin|cos)\."), "an approximation"),
    (re.compile(r"(fma|mad)\.\S*(f16|f32|f64)"), "a fused multiply-add"),
    (re.compile(r"\S*\.ftz\b"), "denormals flushed to zero"),
    (re.compile(r"(add|sub|mul)\.(f16|bf16|f32|f64)(x2)?$"), "rounding left to the assembler, which may fuse"),
    (re.compile(r"cvt\.\S*\bbf16"), "a conversion of bfloat16, which the interpreter rounds otherwise"),
    (re.compile(r"(atom|red)\.\S*(f16|f32|f64)"), "an atomic sum of floats, whose order is left to chance"),
)

_PTX_COPY = re.compile(r"cp\.async\.c[ag]\.shared\.global\b[^;]*\], 0x([0-9a-f]+)")
_PTX_PRODUCT = re.compile(r"(mma|wgmma|tcgen05)\.(mma|sync)")


def _read_nvidia(kernel: Any) -> Code:
    text = kernel.asm["ptx"]
    usage = _resource_usage(kernel.asm["cubin"])
    code = Code(usage["REG"], max(usage["SHARED"], kernel.metadata.shared), usage["STACK"] + usage["LOCAL"])
    # Copies to shared memory that wait for nothing have a mask or none, and look the same.
    code.loads.update(int(found[1], 16) for found in _PTX_COPY.finditer(text))
    inexact: Counter[tuple[str, str]] = Counter()
    for found in _PTX.finditer(text):
        guard, operation = found.groups()
        memory = _PTX_MEMORY.match(operation)
        if memory:
            kind, lanes, bits = memory.groups()
            width = int(lanes or 1) * int(bits) // 8
            if not guard or width >= WIDEST:
                (code.loads if kind == "ld" else code.stores)[width] += 1
            continue
        code.products += bool(_PTX_PRODUCT.match(operation))
        for pattern, why in _PTX_INEXACT:
            if pattern.match(operation):
                inexact[operation, why] += 1
    code.arithmetic += [f"PTX: {count} x {name}: {why}" for (name, why), count in sorted(inexact.items())]
    return code


def _resource_usage(cubin: bytes) -> Counter[str]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        shown = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    usage: Counter[str] = Counter()
    for name, number in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", shown.stdout):
        usage[name] = max(usage[name], int(number))
    return usage


# --- AMD --------------------------------------------------------------------------------------------------------------

_GCN = re.compile(r"^\s+([a-z][a-z0-9_]+)(?=\s|$)", re.MULTILINE)
_GCN_PLACE = re.compile(r"^\s*\.loc\s+(\d+ \d+ \d+)", re.MULTILINE)
_GCN_MEMORY = re.compile(r"(?:global|buffer|flat)_(load|store)_(\w+)")
_GCN_WIDTH = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "ushort": 2, "sshort": 2}
_GCN_INEXACT = (
    (re.compile(r"v_(exp|log|sin|cos|sqrt|rsq|tanh)_"), "an approximation"),
    (re.compile(r"v_(pk_)?(mad|mac|dot\w*)_\w*f(16|32|64)|v_mad_mix\w*|v_fma_mix\w*"), "a fused multiply-add"),
    (re.compile(r"v_cvt_pkrtz_|v_cvt_pk_bf16"), "a conversion that rounds otherwise"),
    (re.compile(r"s_(setreg|denorm_mode|round_mode)"), "a change of how floats are rounded"),
    (re.compile(r"\w+_atomic_(pk_)?(add|min|max)_(f|bf)"), "an atomic operation on floats"),
)
_GCN_PRODUCT = re.compile(r"v_s?(mfma|mfmac|wmma)")
# A division that is rounded correctly is these instructions, whatever compiles it: an estimate of the reciprocal that
# fused multiply-adds refine, and the last step (div_fmas, div_fixup), which rounds. A division of 64-bit integers
# begins with the estimate of a float reciprocal, two fused multiply-adds and one truncation, and ends with integers. A
# conversion to a 64-bit integer truncates, takes the high half by a multiplication and `floor`, and the low half by a
# fused multiply-add, all of them exact.
_FUSED_PER_DIVISION = 5
_FUSED_PER_INTEGER_DIVISION = 2
_FUSED_PER_CONVERSION = 1


def _read_amd(kernel: Any) -> Code:
    text = kernel.asm["amdgcn"]

    def number(name: str) -> int:
        return int(re.search(rf"^\s*\.{name}:\s*(\d+)", text, re.MULTILINE)[1])  # type: ignore[index]

    # Registers that are put aside in memory are in the private segment. Those shared by all threads (sgpr_spill_count)
    # are put into the lanes of another register instead, which costs no memory.
    spilled = number("private_segment_fixed_size")
    code = Code(number("vgpr_count"), max(number("group_segment_fixed_size"), kernel.metadata.shared), spilled)
    inexact: Counter[tuple[str, str]] = Counter()
    places: dict[str, Counter[str]] = {}
    place = ""
    for line in text.splitlines():
        if moved := _GCN_PLACE.match(line):
            place = moved[1]
            continue
        found = _GCN.match(line)
        if not found:
            continue
        operation = found[1]
        if memory := _GCN_MEMORY.match(operation):
            width = _GCN_WIDTH.get(memory[2].removesuffix("_d16").removesuffix("_d16_hi"), 1)
            (code.loads if memory[1] == "load" else code.stores)[width] += 1
        code.products += bool(_GCN_PRODUCT.match(operation))
        for pattern, why in _GCN_INEXACT:
            if pattern.match(operation):
                inexact[operation, why] += 1
        places.setdefault(place, Counter())[re.sub(r"_e\d\d$|_sdwa$|_dpp$", "", operation)] += 1
    code.arithmetic += [f"GCN: {count} x {name}: {why}" for (name, why), count in sorted(inexact.items())]
    code.arithmetic += _fused_outside_divisions(places)
    for mode in ("float_denorm_mode_32 3", "float_denorm_mode_16_64 3", "float_round_mode_32 0"):
        if f".amdhsa_{mode}" not in text:
            code.arithmetic.append(f"GCN: .amdhsa_{mode} is not set: denormals or rounding are not IEEE's")
    return code


def _fused_outside_divisions(places: dict[str, Counter[str]]) -> list[str]:
    """Fused multiply-adds and estimated reciprocals that no division accounts for.

    places: how often each operation comes from each place of the source. A division's last step may be moved to where
    its result is used, so that divisions are counted in all places together.
    """
    found = []
    for bits in ("f32", "f64"):
        names = [f"v_{name}_{bits}" for name in ("fma", "fmac", "fmamk", "fmaak")]
        fused = {
            place: sum(operations[name] for name in names) + 2 * operations[f"v_pk_fma_{bits}"]
            for place, operations in places.items()
        }
        total: Counter[str] = Counter()
        for operations in places.values():
            total.update(operations)
        divisions, estimates = total[f"v_div_fixup_{bits}"], total[f"v_rcp_{bits}"]
        conversions = total[f"v_floor_{bits}"]
        integers = total[f"v_trunc_{bits}"] - conversions
        allowed = (
            _FUSED_PER_DIVISION * divisions
            + _FUSED_PER_INTEGER_DIVISION * integers
            + _FUSED_PER_CONVERSION * conversions
        )
        anchors = (f"v_rcp_{bits}", f"v_floor_{bits}")
        astray = sum(count for place, count in fused.items() if not any(places[place][name] for name in anchors))
        if sum(fused.values()) != allowed or estimates != divisions + integers or astray:
            found.append(
                f"GCN: {sum(fused.values())} fused multiply-adds and {estimates} estimated reciprocals of {bits} for "
                f"{divisions} divisions rounded correctly, {integers} of integers and {conversions} conversions to "
                f"them; {astray} of them where there is none of these"
            )
    return found
