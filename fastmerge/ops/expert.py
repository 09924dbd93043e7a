"""Light experts: the few largest elements of each row of a delta, and models that wear them for a while."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends.rule import ExpertPart, column_dtype, saved_layout
from ..errors import ArgumentError, ArgumentTypeError
from . import _checks
from ._library import define

SCOPES = ("row",)
WIDEST = (1 << 31) - 1
_LARGEST = torch.finfo(torch.float32).max

_PARTS = "int[] of, Tensor[] columns, Tensor[] values, float[] scales, Tensor[] bases"
_PART_FIELDS = 5


def rows_of(shape: Sequence[int]) -> tuple[int, int]:
    """How many rows a tensor has, and how many elements each: runs along the last dimension, one for a number."""
    width = shape[-1] if shape else 1
    return (math.prod(shape[:-1]) if width else 0), width


def sharing(tensors: Sequence[Tensor]) -> tuple[int, int] | None:
    """Two of these contiguous tensors, by number, whose memory overlaps; None where each has its own."""
    spans = sorted((str(x.device), x.data_ptr(), x.nbytes, t) for t, x in enumerate(tensors) if x.numel())
    for (device, start, nbytes, one), (other_device, other_start, _, other) in itertools.pairwise(spans):
        if device == other_device and other_start < start + nbytes:
            return min(one, other), max(one, other)
    return None


# -- schema, kernel, fake --------------------------------------------------------------------------------------------


def _check_dtype(dtype: Any) -> None:
    if dtype not in _checks.KERNEL_DTYPES:
        raise ArgumentTypeError(f"dtype={dtype!r} is none that values are kept in; use float32, bfloat16 or float16.")


def _extract_checks(base: Tensor | None, x: Tensor, k: int, dtype: torch.dtype) -> tuple[int, int]:
    _checks.models(base, [x])
    _check_dtype(dtype)
    rows, width = rows_of(x.shape)
    if not 0 <= k <= width:
        raise ArgumentError(f"k={k} is out of range for rows of {width} elements; pass 0 <= k <= {width}.")
    if width > WIDEST:
        raise ArgumentError(f"rows of {width} elements are wider than the {WIDEST} that columns can tell apart.")
    return rows, width


def _extract(
    base: Tensor | None, x: Tensor, k: int, dtype: torch.dtype, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    _extract_checks(base, x, k, dtype)
    columns, values = backends.resolve(backend, x.device).expert_extract(
        _checks.optional_contiguous(base), x.contiguous(), k, dtype
    )
    return columns, values


def _extract_fake(
    base: Tensor | None, x: Tensor, k: int, dtype: torch.dtype, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    rows, width = _extract_checks(base, x, k, dtype)
    return x.new_empty((rows, k), dtype=column_dtype(width)), x.new_empty((rows, k), dtype=dtype)


_extract_op = define(
    'expert_extract(Tensor? base, Tensor x, int k, ScalarType dtype, str backend="auto") -> (Tensor, Tensor)',
    _extract,
    _extract_fake,
)


def _flat(parts: Sequence[ExpertPart]) -> tuple[Any, ...]:
    """The parts as the arguments that _PARTS names."""
    for part in parts:
        if not isinstance(part, ExpertPart):
            raise ArgumentTypeError(
                f"parts holds {type(part).__name__}, not ExpertPart; expert.part(i) makes one of an Expert for the "
                "tensor at place i."
            )
        # NaN is not smaller, either.
        if not abs(part.scale) <= _LARGEST:
            raise ArgumentError(f"scale={part.scale} is not finite in float32; pass one of at most {_LARGEST:g}.")
    bases = [part.base for part in parts if part.base is not None]
    if bases and len(bases) < len(parts):
        raise ArgumentError("some parts have the base's values and others have not; give them to all or to none.")
    return (
        [part.of for part in parts],
        [part.columns for part in parts],
        [part.values for part in parts],
        [part.scale for part in parts],
        bases,
    )


def _parts(tensors: Sequence[Tensor], flat: Sequence[Any]) -> list[ExpertPart]:
    """The parts of a kernel call, with everything checked that kernels rely on but what the columns hold."""
    of, columns, values, scales, bases = flat
    _checks.kernel_inputs("tensors", tensors)
    for name, given in (("columns", columns), ("values", values), ("scales", scales)):
        if len(given) != len(of):
            raise ArgumentError(f"{name} has {len(given)} entries for {len(of)} parts; pass one for each.")
    if bases and len(bases) != len(of):
        raise ArgumentError(f"bases has {len(bases)} entries for {len(of)} parts; pass one for each, or none.")
    if list(of) != sorted(of) or any(not 0 <= t < len(tensors) for t in of):
        raise ArgumentError(f"of must name tensors, 0 to {len(tensors) - 1}, in rising order.")
    for t, x in enumerate(tensors):
        if not x.is_contiguous():
            raise ArgumentError(
                f"tensors[{t}] is not contiguous, so it cannot be changed in place; make it so with .contiguous()."
            )
    for place, t in enumerate(of):
        rows, width = rows_of(tensors[t].shape)
        kept = columns[place]
        if kept.dtype != column_dtype(width) or kept.dim() != 2 or kept.shape[0] != rows:
            raise ArgumentError(
                f"columns[{place}] is {kept.dtype}{list(kept.shape)}; of tensors[{t}], which has {rows} rows of "
                f"{width}, it must be {column_dtype(width)}[{rows}, k]."
            )
        for name, given in (("values", values), ("bases", bases)):
            if given:
                _checks.kernel_inputs(f"{name}[{place}]", [tensors[t], given[place]])
                if given[place].shape != kept.shape:
                    raise ArgumentError(
                        f"{name}[{place}] has shape {list(given[place].shape)}, but columns[{place}] has "
                        f"{list(kept.shape)}; pass tensors of one shape."
                    )
        _checks.same_device(f"columns[{place}]", kept, tensors[t].device, f"tensors[{t}]")
    columns, values, bases = (_checks.contiguous(given) for given in (columns, values, bases))
    return [ExpertPart(t, columns[i], values[i], scales[i], bases[i] if bases else None) for i, t in enumerate(of)]


def _apply(tensors: list[Tensor], *rest: Any) -> Tensor:
    *flat, backend = rest
    parts = _parts(tensors, flat)
    worn = sorted({part.of for part in parts})
    shared = sharing([tensors[t] for t in worn])
    if shared is not None:
        # Whichever was changed last would be taken for the other one's changed values.
        one, other = (worn[t] for t in shared)
        raise ArgumentError(
            f"tensors[{one}] and tensors[{other}] share memory, so their old bits could not be put back; pass a tensor "
            "that has two names once."
        )
    saved: Tensor = backends.resolve(backend, tensors[0].device).expert_apply_(tensors, parts)
    return saved


def _apply_fake(tensors: list[Tensor], *rest: Any) -> Tensor:
    places = saved_layout(tensors, _parts(tensors, rest[:_PART_FIELDS]))
    return tensors[0].new_empty((places[-1][1] if places else 0,), dtype=torch.uint8)


_apply_op = define(
    f"expert_apply_(Tensor(a!)[] tensors, {_PARTS}, str backend) -> Tensor",
    _apply,
    _apply_fake,
)


def _revert(tensors: list[Tensor], *rest: Any) -> Tensor:
    *flat, saved, backend = rest
    parts = _parts(tensors, flat)
    places = saved_layout(tensors, parts)
    need = places[-1][1] if places else 0
    if saved.dtype != torch.uint8 or saved.shape != (need,) or not saved.is_contiguous():
        raise ArgumentError(
            f"saved is {saved.dtype}{list(saved.shape)}; it must be the uint8[{need}] of expert_apply_."
        )
    _checks.same_device("saved", saved, tensors[0].device)
    changed: Tensor = backends.resolve(backend, tensors[0].device).expert_revert_(tensors, parts, saved)
    return changed


def _revert_fake(tensors: list[Tensor], *rest: Any) -> Tensor:
    _parts(tensors, rest[:_PART_FIELDS])
    return tensors[0].new_empty((len(tensors),), dtype=torch.int64)


_revert_op = define(
    f"expert_revert_(Tensor(a!)[] tensors, {_PARTS}, Tensor saved, str backend) -> Tensor",
    _revert,
    _revert_fake,
)


# -- public ----------------------------------------------------------------------------------------------------------


def expert_apply_(tensors: Sequence[Tensor], parts: Sequence[ExpertPart], *, backend: str = "auto") -> Tensor:
    """Put parts of experts onto tensors, in place: many tensors, and several experts, in one call.

    tensors: contiguous. parts: for each of them those that belong to it, tensor by tensor. Where parts meet, the sum is
        taken from left to right and rounded once.
    Returns the bits that the tensors had there, uint8, for `expert_revert_`.
    Errors: ArgumentError / ArgumentTypeError, in a sentence that names the argument; nothing has been changed then.
    """
    checked = _checks.tensor_list("tensors", tensors)
    saved: Tensor = _apply_op(checked, *_flat(parts), backend)
    return saved


def expert_revert_(
    tensors: Sequence[Tensor], parts: Sequence[ExpertPart], saved: Tensor, *, backend: str = "auto"
) -> list[int]:
    """Take parts of experts off again: the tensors get the very bits back that they had before `expert_apply_`.

    tensors, parts: as they were given there. saved: what it returned.
    Returns of each tensor how many of its places do not hold what was put there. Unless all are 0, nothing is changed.
    Errors: ArgumentError / ArgumentTypeError, in a sentence that names the argument.
    """
    checked = _checks.tensor_list("tensors", tensors)
    changed: list[int] = _revert_op(checked, *_flat(parts), saved, backend).tolist()
    return changed


def _is_real(x: Tensor) -> bool:
    return not torch.compiler.is_compiling() and type(x) is Tensor


class Expert:
    """What an expert keeps of one tensor: of each row the k largest elements of its delta.

    shape: the tensor's. columns: [rows, k], uint16 (int32 where rows are wider than 65536), rising within each row.
    values: [rows, k], unscaled.
    Errors: ArgumentError where these do not fit together.
    """

    def __init__(self, shape: Sequence[int], columns: Tensor, values: Tensor) -> None:
        self.shape = tuple(shape)
        rows, width = rows_of(self.shape)
        if columns.dtype != column_dtype(width) or columns.dim() != 2 or columns.shape[0] != rows:
            raise ArgumentError(
                f"columns is {columns.dtype}{list(columns.shape)}; for {rows} rows of {width} elements it must be "
                f"{column_dtype(width)}[{rows}, k]."
            )
        if values.shape != columns.shape:
            raise ArgumentError(
                f"values has shape {list(values.shape)}, but columns has {list(columns.shape)}; pass one for each."
            )
        _checks.kernel_inputs("values", [values])
        _checks.same_device("columns", columns, values.device, "values")
        # A GPU would have to be waited for; fake tensors hold nothing, and neither do those that a compiler traces.
        if columns.device.type == "cpu" and _is_real(columns) and columns.numel():
            places = columns.numpy()
            if (places[:, 1:] <= places[:, :-1]).any() or places[:, 0].min() < 0 or places[:, -1].max() >= width:
                raise ArgumentError(
                    f"columns must rise within each row and lie within its {width} elements: a place that was named "
                    "twice could not be given its old bits back."
                )
        self.columns = columns
        self.values = values
        self._worn: tuple[Tensor, ExpertPart, Tensor] | None = None

    @property
    def k(self) -> int:
        """How many elements of each row are kept."""
        return self.columns.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the values."""
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        """The bytes that columns and values take."""
        return self.columns.nbytes + self.values.nbytes

    def part(self, of: int = 0, scale: float = 1.0, base: Tensor | None = None) -> ExpertPart:
        """What `expert_apply_` takes: the expert for the tensor at place `of`."""
        return ExpertPart(of, self.columns, self.values, _checks.real("scale", scale), base)

    def at(self, tensor: Tensor) -> Tensor:
        """A tensor's values at the places that are kept, [rows, k]."""
        rows, width = rows_of(self.shape)
        if tuple(tensor.shape) != self.shape:
            raise ArgumentError(f"tensor has shape {list(tensor.shape)}, but the expert has {list(self.shape)}.")
        return tensor.detach().reshape(rows, width).gather(1, self.columns.to(torch.int64))

    def dense(self) -> Tensor:
        """The expert as a tensor of its shape, 0 where it keeps nothing."""
        rows, width = rows_of(self.shape)
        out = self.values.new_zeros((rows, width))
        return out.scatter_(1, self.columns.to(torch.int64), self.values).view(self.shape)

    def to(self, device: torch.device | str) -> Expert:
        """The same expert on another device."""
        return Expert(self.shape, self.columns.to(device), self.values.to(device))

    def apply_(self, tensor: Tensor, scale: float = 1.0, *, base: Tensor | None = None, backend: str = "auto") -> None:
        """Add `scale` times the expert to a tensor, in place: in float32, rounded once. `revert_` takes it off.

        tensor: of the expert's shape and any dtype that kernels read, contiguous, on the expert's device.
        base: the base's tensor, where the expert shall replace what the tensor has changed (where neither is 0).
        Errors: ArgumentError / ArgumentTypeError, also where it is on a tensor already; nothing is changed then.
        """
        x = self._target(tensor)
        if self._worn is not None:
            raise ArgumentError("the expert is on a tensor already; take it off with revert_ first.")
        part = self.part(0, scale, None if base is None else self.at(_checks.input_tensor("base", base)))
        self._worn = x, part, expert_apply_([x], [part], backend=backend)

    def revert_(self, tensor: Tensor, *, backend: str = "auto") -> None:
        """Take the expert off the tensor that it was put onto, which gets its very bits back.

        Errors: ArgumentError where it is not on this tensor, or where its places have been changed since; nothing is
        changed then.
        """
        x = self._target(tensor)
        if self._worn is None:
            raise ArgumentError("the expert is not on a tensor; put it on with apply_ first.")
        worn, part, saved = self._worn
        if worn.data_ptr() != x.data_ptr() or worn.dtype != x.dtype or worn.device != x.device:
            raise ArgumentError("the expert is on another tensor; pass the one that apply_ was given.")
        (changed,) = expert_revert_([x], [part], saved, backend=backend)
        if changed:
            raise ArgumentError(
                f"{changed} of the places that the expert was put onto do not hold what apply_ wrote: the tensor has "
                "been changed since; give it back its values first. Nothing was taken off."
            )
        self._worn = None

    def _target(self, tensor: Any) -> Tensor:
        x = _checks.tensor("tensor", tensor)
        if x.dtype == torch.float64:
            raise ArgumentTypeError("tensor has dtype float64, which kernels do not write; convert it with .float().")
        if tuple(x.shape) != self.shape:
            raise ArgumentError(
                f"tensor has shape {list(x.shape)}, but the expert was extracted from one of {list(self.shape)}."
            )
        return x

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"Expert(shape={list(self.shape)}, k={self.k}, {dtype})"


def expert_k(width: int, keep: float) -> int:
    """How many of a row's `width` elements an expert keeps: int(width * keep), which can be 0."""
    return int(width * _checks.fraction("keep", keep))


def extract_expert(
    delta: Tensor,
    keep: float,
    *,
    scope: str = "row",
    base: Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Expert:
    """Keep the int(width * keep) largest magnitudes of each row, a run along the last dimension.

    delta: of any shape; or a model's tensor, when `base` is given: the delta is then their float32 difference.
    keep: from 0 to 1; a row too narrow for a single element gets none.
    scope: "row".
    dtype: of the values; None: that of `delta`. A delta is ranked before it is rounded to it.
    Of equal magnitudes those with the lowest index are kept; NaN counts as larger than all.
    Source: FREE-Merging, arXiv 2411.16815.
    Errors: ArgumentError / ArgumentTypeError, in a sentence that names the argument.
    """
    _checks.choice("scope", scope, SCOPES)
    x = _checks.input_tensor("delta", delta)
    reference = None if base is None else _checks.input_tensor("base", base)
    k = expert_k(rows_of(x.shape)[1], keep)
    if dtype is not None:
        _check_dtype(dtype)
    columns, values = _extract_op(reference, x, k, x.dtype if dtype is None else dtype, backend)
    return Expert(x.shape, columns, values)


def expert_rescale(keep: float, kept: Sequence[float], deltas: Sequence[float]) -> float:
    """The factor mu that an expert is scaled by: -log10(keep) * (mean kept / keep) / mean delta.

    keep: the fraction of each row that was kept. kept: of each tensor the mean magnitude of the expert, its zeros
    included. deltas: of each tensor the mean magnitude of the delta. Tensors count alike, whatever their size.
    Returns 1.0 where all deltas are 0, since then there is nothing to scale.
    Source: FREE-Merging, arXiv 2411.16815.
    Errors: ArgumentError where keep is not between 0 and 1, or there is no tensor.
    """
    fraction = _checks.fraction("keep", keep)
    if fraction == 0:
        raise ArgumentError("keep=0 keeps nothing that could be scaled; pass a fraction such as 0.01.")
    _checks.one_per_model("deltas", deltas, len(kept))
    if not kept:
        raise ArgumentError("kept is empty; pass a mean for each tensor.")
    mean = math.fsum(deltas) / len(deltas)
    if mean == 0:
        return 1.0
    return -math.log10(fraction) * (math.fsum(kept) / len(kept) / fraction) / mean
