"""FR-Merging's frequency filter of delta matrices, and what it would cost."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backends
from ..backends.filters import HighpassPlan, plan
from ..errors import ArgumentError, ArgumentTypeError
from . import _checks
from ._library import define

MODES = ("ideal", "official")


# -- schema, kernel, fake ---------------------------------------------------------------------------------------------


def _run(x: Tensor, ratio: float, mode: str, out: Tensor, backend: str) -> None:
    _checks.fraction("ratio", ratio)
    _checks.choice("mode", mode, MODES)
    module = backends.resolve(backend, x.device)
    module.highpass(x if x.is_contiguous() else x.contiguous(), ratio, mode, out)


def _matrices(x: Tensor) -> None:
    _checks.kernel_inputs("x", [x])
    _checks.matrices("x", x.shape)


def _highpass(x: Tensor, ratio: float, mode: str, backend: str) -> Tensor:
    _matrices(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _run(x, ratio, mode, out, backend)
    return out


def _highpass_fake(x: Tensor, ratio: float, mode: str, backend: str) -> Tensor:
    _matrices(x)
    return x.new_empty(x.shape)


_highpass_op = define("highpass(Tensor x, float ratio, str mode, str backend) -> Tensor", _highpass, _highpass_fake)


def _highpass_out(x: Tensor, ratio: float, variant: str, out: Tensor, backend: str) -> None:
    _matrices(x)
    if out.dtype != x.dtype:
        raise ArgumentTypeError(f"out has dtype {out.dtype}, but x has {x.dtype}; make them equal.")
    _checks.target("out", out, x.shape, [x])
    _run(x, ratio, variant, out, backend)


def _highpass_out_fake(x: Tensor, ratio: float, variant: str, out: Tensor, backend: str) -> None:
    _matrices(x)


# Not `mode`: torch's functionalisation passes the arguments of an op that writes by name, and has a `mode` of its own.
_highpass_out_op = define(
    "highpass_out(Tensor x, float ratio, str variant, Tensor(a!) out, str backend) -> ()",
    _highpass_out,
    _highpass_out_fake,
)


# -- public -----------------------------------------------------------------------------------------------------------


def highpass(
    x: Tensor, ratio: float, *, mode: str = "ideal", out: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Take the low frequencies out of each matrix of a tensor.

    x: [..., H, W]; float32, bfloat16, float16, or float64 (rounded to float32 first). Finite: one NaN or Inf makes NaN
        of the rows and columns that it meets, most often of the whole matrix.
    ratio: from 0 to 1: for "ideal" a larger one drops more, and 0 nothing; for "official" a larger one keeps more.
    mode: "ideal", a disc of ratio * min(H, W) / 2 bins around frequency 0 is dropped, wrap-around included; "official",
        the mask of the released code: kept are the bins within ratio * min(H, W) of the highest frequency, and those
        at the distance min(H, W) // 10 of it are doubled.
    out: a contiguous tensor of x's shape and dtype (float32 for float64) to write to, apart from x.
    Returns the filtered tensor, of x's shape and dtype, or `out`. It is computed in float32, within 1e-6 of the largest
    magnitude, and rounded once; this op is the one that does not promise equal bits (docs/numbers.md).
    Errors: ArgumentError / ArgumentTypeError, in a sentence that names the argument.
    Source: FREE-Merging (arXiv 2411.16815) and its released code; docs/fr.md.
    """
    wide = isinstance(x, Tensor) and x.dtype == torch.float64
    given = _checks.input_tensor("x", x)
    _checks.matrices("x", given.shape)
    ratio, mode = _checks.fraction("ratio", ratio), _checks.choice("mode", mode, MODES)
    if out is None:
        filtered: Tensor = _highpass_op(given, ratio, mode, backend)
        return filtered.to(torch.float64) if wide else filtered
    _checks.out_tensor(out, None)
    _highpass_out_op(given, ratio, mode, out.detach() if out.requires_grad else out, backend)
    return out


def highpass_plan(
    shape: Sequence[int],
    ratio: float,
    *,
    mode: str = "ideal",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> HighpassPlan:
    """How `highpass` would filter a tensor of this shape, and at what cost; nothing is computed.

    shape: [..., H, W]. ratio, mode: as in `highpass`. dtype: float32, bfloat16 or float16. device: where x would be.
    Returns a HighpassPlan: `route` ("nothing", "lowrank" or "rfft"); `axis`, along which rfft's first transform runs;
    `rank`, the vectors that lowrank projects on; `dropped`, the lines of the spectrum that rfft need not transform
    further, and `columns`, those that it transforms along the other axis; `seconds`, predicted for the machine that
    the model was measured on; `workspace`, the bytes taken beside x and the result.
    Errors: ArgumentError / ArgumentTypeError, in a sentence that names the argument.
    """
    if not isinstance(shape, Sequence):
        raise ArgumentTypeError(f"shape must be a sequence of sizes, not {type(shape).__name__}; pass (height, width).")
    sizes = [_checks.integer("shape", size, 0) for size in shape]
    _checks.matrices("shape", sizes)
    ratio, mode = _checks.fraction("ratio", ratio), _checks.choice("mode", mode, MODES)
    _checks.compute_dtype("dtype", dtype)
    try:
        kind = torch.device(device).type
    except (RuntimeError, TypeError):
        kind = ""
    if kind not in _checks.DEVICES:
        raise ArgumentError(f"device={str(device)!r} has no kernels; pass 'cpu' or 'cuda'.")
    return plan(sizes[-2], sizes[-1], ratio, mode, dtype.itemsize, kind, math.prod(sizes[:-2]))
