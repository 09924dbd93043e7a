"""Inner products of models or of their deltas: what methods on spheres and planes need to know of a tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backends
from ..backends.rule import GRAM_BLOCK
from ..errors import ArgumentError
from . import _checks
from ._library import define


def _gram(base: Tensor | None, tensors: list[Tensor], row_length: int, backend: str) -> Tensor:
    _checks.models(base, tensors)
    _checks.integer("row_length", row_length, 1)
    if tensors[0].numel() % row_length:
        raise ArgumentError(
            f"row_length={row_length} does not divide the {tensors[0].numel()} elements of each tensor; "
            "pass tensors of whole rows."
        )
    result: Tensor = backends.resolve(backend, tensors[0].device).gram(
        _checks.optional_contiguous(base), _checks.contiguous(tensors), row_length
    )
    return result


def _gram_fake(base: Tensor | None, tensors: list[Tensor], row_length: int, backend: str) -> Tensor:
    models = _checks.models(base, tensors)
    rows = tensors[0].numel() // row_length
    blocks = (row_length + (GRAM_BLOCK - 1)) // GRAM_BLOCK
    return tensors[0].new_empty((models * (models + 1) // 2, rows, blocks), dtype=torch.float64)


_gram_op = define("gram(Tensor? base, Tensor[] tensors, SymInt row_length, str backend) -> Tensor", _gram, _gram_fake)


def gram(
    base: Tensor | None,
    tensors: Sequence[Tensor],
    *,
    row_length: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Inner products of all pairs of n tensors (of their deltas, with a base), in blocks, for every row.

    base, tensors: one shape, any strides; each delta is rounded to float32. Products are exact and added in float64 in
        a fixed order.
    row_length: elements of a row, which must divide the tensors'; None takes all of a tensor for one row.
    Returns float64[n (n + 1) / 2, rows, ceil(row_length / 4096)]: the pairs (0, 0), (0, 1), .. (1, 1), .. (i <= j), and
    of each the sums over blocks of 4096 elements, counted from the row's beginning. So chunks of a row that begin
    at multiples of 4096 have the sums of the whole row, and `math.fsum` adds them up without a trace of the cuts.
    NaN where the inputs hold NaN or infinities that meet zero or each other.
    Errors: ArgumentError / ArgumentTypeError, in a sentence that names the argument.
    """
    checked = _checks.input_tensors("tensors", tensors)
    if row_length is None:
        row_length = max(checked[0].numel(), 1)
    sums: Tensor = _gram_op(None if base is None else _checks.input_tensor("base", base), checked, row_length, backend)
    return sums
