"""Methods on spheres and planes: the result is a combination of the inputs, and what it is made of are angles.

    out = base + sum_i(c_i x_i)        x_i = the models or their deltas, c a function of their inner products alone

Whatever such a method does with vectors (it normalises, projects onto a tangent space, goes along a great circle), it
stays in what the inputs span, and can be done with their coefficients once all inner products are known. Those come
from one sweep, exact but for the rounding of float64 sums; coefficients are computed in float64 and rounded to float32.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastmerge import ops
from fastmerge.backends.rule import GRAM_BLOCK, SparsifyRule
from fastmerge.methods.base import Chunk, Known, Method, Statistic, TensorContext
from fastmerge.methods.parameters import ParameterError

Rows = Literal["whole", "last", "first"]
"""What a vector is: a whole tensor, or each of those along its last or its first dimension."""

_BLOCK = 1 << 17
"""Elements that are combined at once by coefficients of rows: their float32 temporaries stay in the cache."""
_GPU_BLOCK = 1 << 24
"""The same on a GPU, which must be told each step."""

_EVERYTHING = SparsifyRule(method="none")


class GeometricMethod(Method):
    """A method is its coefficients, and what they are coefficients of."""

    def compute_dtype(self, dtype: torch.dtype, numerics: str) -> torch.dtype:
        """Always float32."""
        return torch.float32

    def check(self, context: TensorContext, labels: Sequence[str]) -> None:
        """The peer's rounding is that of the machine that it runs on."""
        if context.numerics == "mergekit":
            raise ParameterError(
                f"{self.name} goes with numerics fp32 only: mergekit's sums over the elements of a tensor are rounded "
                "in the order of the machine that it runs on, and so are its angles.",
                "merge_method",
            )

    # -- what a method says

    def operands(self, base: Tensor | None, models: list[Tensor]) -> tuple[Tensor | None, list[Tensor]]:
        """What is combined: the base that is subtracted from the rest and added to the result, if any; and the rest."""
        return (base, models) if len(models) > 1 else (None, models)

    def rows(self, context: TensorContext) -> Rows:
        """What has coefficients of its own."""
        return "whole"

    @abstractmethod
    def coefficients(self, context: TensorContext, gram: Tensor) -> Tensor:
        """float64[n, rows], from the inner products float64[n, n, rows].

        Those may be NaN where there are several rows. Only of what IEEE 754 rounds in one way, and of `angles`.
        """

    # -- statistics and merge

    def cut_unit(self, context: TensorContext) -> int:
        """Whole blocks of inner products, or whole rows."""
        kind = self.rows(context)
        if kind == "whole":
            return GRAM_BLOCK
        return max(context.numel if kind == "first" else context.shape[-1], 1)

    def workspace(self, context: TensorContext, numel: int) -> int:
        """Sums of rows in float64; and rows that do not lie in one piece are brought into one first."""
        kind = self.rows(context)
        if kind == "whole":
            return 0
        count = len(context.positions) + 1
        length = context.shape[0 if kind == "first" else -1]
        rows = numel // max(length, 1)
        copies = count * numel * 4 if kind == "first" else 0
        return copies + 8 * count * count * rows + 4 * 4 * min(numel, max(_some(context.device), length))

    def statistics(self, context: TensorContext, whole: bool) -> list[Statistic]:
        """The coefficients of a whole tensor; those of rows are found as they are merged."""
        if context.numel == 0 or self.rows(context) != "whole":
            return []
        return [Coefficients(self, context)]

    def merge(self, context: TensorContext, chunk: Chunk, known: Known, out: Tensor) -> None:
        """One pass over the chunk, as soon as its coefficients are known."""
        base, tensors = self.operands(chunk.base, chunk.models)
        if self.rows(context) != "whole" and chunk.numel:
            self._merge_rows(context, base, tensors, out)
            return
        found: list[float] = known.get(Coefficients.name, [1.0] * len(tensors))
        if all(map(math.isfinite, found)):
            combine(base, tensors, found, out, context.backend)
        else:
            out.fill_(math.nan)

    def _merge_rows(self, context: TensorContext, base: Tensor | None, tensors: list[Tensor], out: Tensor) -> None:
        first = self.rows(context) == "first"
        length = context.shape[0 if first else -1]
        if first:
            sums = ops.gram(
                None if base is None else _columns(base, length),
                [_columns(x, length) for x in tensors],
                row_length=length,
                backend=context.backend,
            )
        else:
            sums = ops.gram(base, tensors, row_length=length, backend=context.backend)
        total = sums[:, :, 0]
        for block in range(1, sums.shape[2]):
            total = total + sums[:, :, block]
        found = self.coefficients(context, symmetric(total, len(tensors))).to(torch.float32)

        # As a matrix, whose rows or columns have coefficients of their own.
        height, width = (length, out.numel() // length) if first else (out.numel() // length, length)
        some = max(1, _some(out.device.type) // width)
        for top in range(0, height, some):
            here = slice(top * width, min(top + some, height) * width)
            factors = found[:, None, :] if first else found[:, top : top + some, None]
            based = None if base is None else base[here].view(-1, width).to(torch.float32)
            mixed = None
            for x, factor in zip(tensors, factors, strict=True):
                value = x[here].view(-1, width).to(torch.float32)
                term = (value if based is None else value - based) * factor
                mixed = term if mixed is None else mixed.add_(term)
            assert mixed is not None
            mixed = mixed if based is None else mixed.add_(based)
            # Rounded, and NaN made the one without a payload, as in every output.
            combine(None, [mixed.view(-1)], [1.0], out[here], context.backend)


def combine(base: Tensor | None, tensors: list[Tensor], factors: Sequence[float], out: Tensor, backend: str) -> None:
    """Write base + sum_i(factor_i (tensor_i - base)), or sum_i(factor_i tensor_i), in one pass, and round once."""
    ops.consensus_apply(
        base,
        tensors,
        list(factors),
        inputs="models",
        rule=_EVERYTHING,
        election="none",
        divisor="none",
        out=out,
        backend=backend,
    )


def symmetric(pairs: Tensor, count: int) -> Tensor:
    """The pairs i <= j of `ops.gram` as a whole matrix: [count, count, ...]."""
    places = torch.empty(count, count, dtype=torch.int64)
    for place, (one, other) in enumerate((i, j) for i in range(count) for j in range(i, count)):
        places[one, other] = places[other, one] = place
    return pairs[places.to(pairs.device)]


def _some(device: str) -> int:
    """Elements that are combined at once there."""
    return _BLOCK if device == "cpu" else _GPU_BLOCK


def _columns(x: Tensor, height: int) -> Tensor:
    """The columns of a matrix of so many rows, each in one piece."""
    return x.view(height, -1).t().contiguous().view(-1)


@dataclass(frozen=True)
class Coefficients(Statistic):
    """A method's coefficients of one tensor: one for each operand, or NaN where what they are made of is not finite."""

    method: GeometricMethod
    context: TensorContext
    name = "coefficients"

    def depends_only_on(self) -> Hashable:
        """What the operands are; coefficients are made of their inner products afterwards."""
        return type(self.method)

    def observe(self, chunk: Chunk, known: Known) -> Tensor:
        """float64[pairs, 1, blocks of the chunk]."""
        base, tensors = self.method.operands(chunk.base, chunk.models)
        return ops.gram(base, tensors, backend=self.context.backend)

    def add(self, state: Tensor, other: Tensor) -> Tensor:
        """Blocks are kept side by side, in any order."""
        return torch.cat([state, other], dim=2)

    def finish(self, state: Tensor, known: Known) -> list[float]:
        """Blocks are added up as real numbers and rounded once, so that their order does not show."""
        pairs = state.shape[0]
        count = (math.isqrt(8 * pairs + 1) - 1) // 2
        blocks = state[:, 0].cpu()
        if not blocks.isfinite().all():
            return [math.nan] * count
        sums = torch.tensor([math.fsum(each) for each in blocks.tolist()], dtype=torch.float64)
        found: list[float] = self.method.coefficients(self.context, symmetric(sums[:, None], count))[:, 0].tolist()
        return found


def numbers(gram: Tensor) -> list[list[float]]:
    """The inner products of a whole tensor as Python's numbers."""
    matrix: list[list[float]] = gram[:, :, 0].tolist()
    return matrix


def column(values: Sequence[float]) -> Tensor:
    """Coefficients of a whole tensor as `coefficients` returns them."""
    return torch.tensor(list(values), dtype=torch.float64)[:, None]
