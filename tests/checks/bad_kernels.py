"""Kernels that each break one rule of checks/kernels.py, and some that break none: what is found in them, as JSON."""

from __future__ import annotations

import json
from typing import Any

import torch
import triton
import triton.language as tl

from checks.compiled import Launch
from checks.kernel_calls import NUMEL, Call, tensor
from checks.kernels import Form, results
from fastmerge._triton import functions, numbers


@triton.jit
def _tile(x, y, out, start, n, WHICH: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    a = numbers.loaded(x, start, n, BLOCK, WHOLE)
    b = numbers.loaded(y, start, n, BLOCK, WHOLE)
    if WHICH == "fine":
        r = tl.div_rn(a * b + a, b)
    elif WHICH == "fine_functions":
        r = functions.exp(a) - functions.tanh(b)
    elif WHICH == "fine_double":
        p = a.to(tl.float64) * 0.7 + b.to(tl.float64)
        r = (p / 3.7).to(tl.float32)
    elif WHICH == "fine_integers":
        place = start + tl.arange(0, BLOCK)
        r = tl.where(place // n == place % (n + 1), a, b)
    elif WHICH == "fine_conversions":
        r = (a.to(tl.float64) * 4294967296.0).to(tl.int64).to(tl.float32) + (b * 65536.0).to(tl.int64).to(tl.float32)
    elif WHICH == "approximate_division":
        r = a / b
    elif WHICH == "approximate_root":
        r = tl.sqrt(a)
    elif WHICH == "library_exp":
        r = tl.exp(a)
    elif WHICH == "fused":
        r = tl.fma(a, b, a)
    elif WHICH == "fused_double":
        r = tl.fma(a.to(tl.float64), b.to(tl.float64), a.to(tl.float64)).to(tl.float32)
    elif WHICH == "cast":
        r = (a + b).to(tl.bfloat16).to(tl.float32)
    else:
        r = a * b + a
    numbers.stored(out, start, n, r, BLOCK, WHOLE)


@triton.jit(do_not_specialize=["n"])
def elementwise(x, y, out, n, WHICH: tl.constexpr, BLOCK: tl.constexpr):
    """One step on whole tiles without a mask and on the last one with it."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    n = n.to(tl.int64)
    if start + BLOCK <= n:
        _tile(x, y, out, start, n, WHICH, BLOCK, True)
    else:
        _tile(x, y, out, start, n, WHICH, BLOCK, False)


@triton.jit(do_not_specialize=["n"])
def masked(x, y, out, n, BLOCK: tl.constexpr):
    """Every tile with a mask."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    _tile(x, y, out, start, n.to(tl.int64), "sum", BLOCK, False)


@triton.jit
def float_atomic(x, out, BLOCK: tl.constexpr):
    """A sum in an order that is left to chance."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(out + place % 16, numbers.widen(tl.load(x + place)))


@triton.jit
def crowded(x, out, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """More values than there are registers."""
    place = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(COUNT):
        total = total * tl.load(x + i * BLOCK + place) + total
    tl.store(out + place, tl.cumsum(total, 0) + total)


@triton.jit
def gathered(x, out, BLOCK: tl.constexpr):
    """A table in shared memory that is larger than any GPU's."""
    place = tl.arange(0, BLOCK)
    tl.store(out + place, tl.gather(tl.load(x + place), (place * 7) % BLOCK, 0))


@triton.jit
def multiplied(x, out, BLOCK: tl.constexpr):
    """A product of matrices by the hardware's instructions."""
    place = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    a = tl.load(x + place)
    tl.store(out + place, tl.dot(a, a, input_precision="tf32"))


def launches() -> dict[str, Launch]:
    """The launches by name."""
    options = {"num_warps": 4, "enable_fp_fusion": False}
    x, y, out = (tensor(torch.bfloat16) for _ in range(3))
    floats = [tensor(torch.float32) for _ in range(2)]
    tile = {"BLOCK": 1024, **options}

    def step(which: str, **changes: Any) -> Launch:
        return Launch(elementwise, (x, y, out, NUMEL), {"WHICH": which, **tile, **changes})

    made = {
        which: step(which)
        for which in (
            "fine",
            "fine_functions",
            "fine_double",
            "fine_integers",
            "fine_conversions",
            "approximate_division",
            "approximate_root",
            "library_exp",
            "fused",
            "fused_double",
            "cast",
        )
    }
    made["fusion_allowed"] = step("sum", enable_fp_fusion=True)
    odd = tensor(torch.bfloat16, aligned=False)
    made["unaligned"] = Launch(elementwise, (odd, odd, odd, NUMEL), {"WHICH": "fine", **tile})
    made["masked"] = Launch(masked, (x, y, out, NUMEL), dict(tile))
    made["float_atomic"] = Launch(float_atomic, (x, floats[0]), dict(tile))
    made["multiplied"] = Launch(multiplied, tuple(floats), {**options, "BLOCK": 32})
    made["crowded"] = Launch(crowded, tuple(floats), {"COUNT": 2, **options, "BLOCK": 16384, "num_warps": 1})
    made["gathered"] = Launch(gathered, tuple(floats), {**options, "BLOCK": 65536, "num_warps": 16})
    return made


def main() -> None:
    """Print what is found in each, for a new, an old and a foreign target."""
    named = {
        name: Form(launch, Call(name, "", ()), everywhere=True, wide=name not in ("float_atomic", "multiplied"))
        for name, launch in launches().items()
    }
    found: dict[str, dict[str, list[str]]] = {name: {} for name in named}
    for result in results(list(named.values()), ("sm_80", "sm_120", "gfx942")):
        found[result.form.call.function][result.target] = result.problems
    print(json.dumps(found))


if __name__ == "__main__":
    main()
