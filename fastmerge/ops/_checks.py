"""Argument checks that the op families share. Each raises a sentence that names the argument and the fix."""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import ArgumentError, ArgumentTypeError

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICES = ("cpu", "cuda")
MAX_POSITION = 4095

T = TypeVar("T")


def choice(argument: str, value: Any, allowed: Iterable[T]) -> T:
    """`value`, which must be one of `allowed`."""
    options = list(allowed)
    for option in options:
        if value is option or (isinstance(value, str) and value == option):
            return option
    shown = ", ".join(repr(option) for option in options)
    near = difflib.get_close_matches(str(value), [str(option) for option in options], n=1)
    guess = f" Did you mean {near[0]!r}?" if near else ""
    raise ArgumentError(f"{argument}={value!r} is not known; use one of {shown}.{guess}")


def integer(argument: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    """`value` as an int within [low, high]."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ArgumentTypeError(f"{argument} must be an integer, not {type(value).__name__}; pass an int.") from None
    if (low is not None and number < low) or (high is not None and number > high):
        limits = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ArgumentError(f"{argument}={number} is out of range; pass an integer that is {limits}.")
    return number


def real(argument: str, value: Any) -> float:
    """`value` as a finite float."""
    if type(value) is not float:
        if isinstance(value, (bool, str, complex)):
            raise ArgumentTypeError(f"{argument} must be a number, not {type(value).__name__}; pass a float.")
        try:
            value = float(value)
        except (TypeError, ValueError, RuntimeError):
            raise ArgumentTypeError(f"{argument} must be a number, not {type(value).__name__}; pass a float.") from None
    if not math.isfinite(value):
        raise ArgumentError(f"{argument}={value} is not finite; pass a finite number.")
    return value


def fraction(argument: str, value: Any) -> float:
    """`value` as a float within [0, 1]."""
    number = real(argument, value)
    if not 0.0 <= number <= 1.0:
        raise ArgumentError(f"{argument}={number} is outside [0, 1]; pass a fraction such as 0.5.")
    return number


def fractions(argument: str, value: Any, models: int) -> list[float]:
    """One fraction for all models or one for each, as a list with one for each."""
    return [fraction(argument, each) for each in per_model(argument, value, models)]


def tensor(argument: str, value: Any) -> Tensor:
    """`value`, a dense floating-point tensor on a CPU or GPU, detached from autograd; float64 is allowed."""
    if not isinstance(value, Tensor):
        raise ArgumentTypeError(f"{argument} must be a torch.Tensor, not {type(value).__name__}; pass a tensor.")
    if value.dtype not in KERNEL_DTYPES and value.dtype != torch.float64:
        name = str(value.dtype).removeprefix("torch.")
        if value.is_complex():
            fix = "merge its real and imaginary parts separately"
        elif value.is_floating_point():
            fix = "its codes mean nothing without their scales; dequantise it to bfloat16 first"
        else:
            fix = "integers and bools cannot be merged; convert it with .float() if it holds numbers"
        raise ArgumentTypeError(
            f"{argument} has dtype {name}, but only float32, bfloat16, float16 and float64 are supported: {fix}."
        )
    if value.device.type not in DEVICES:
        raise ArgumentError(
            f"{argument} is on device {str(value.device)!r}, where no kernel works; move it with .cpu() or .cuda()."
        )
    if value.layout != torch.strided:
        raise ArgumentTypeError(f"{argument} has layout {value.layout}; make it dense with .to_dense() first.")
    return value.detach() if value.requires_grad else value


def input_tensor(argument: str, value: Any) -> Tensor:
    """As `tensor`, with float64 values rounded to float32, which is what the kernels read."""
    checked = tensor(argument, value)
    return checked.to(torch.float32) if checked.dtype == torch.float64 else checked


def tensor_list(argument: str, values: Any) -> list[Tensor]:
    """A non-empty list of tensors as `tensor` takes them, in their own dtypes."""
    if isinstance(values, (Tensor, str)) or not isinstance(values, Iterable):
        raise ArgumentTypeError(
            f"{argument} must be a list of tensors, not {type(values).__name__}; wrap a single tensor as [tensor]."
        )
    listed = list(values)
    if not listed:
        raise ArgumentError(f"{argument} is empty; pass at least one tensor.")
    return listed if _sound(listed) else [tensor(f"{argument}[{i}]", value) for i, value in enumerate(listed)]


def _sound(values: list[Any]) -> bool:
    """Whether `tensor` would return all of them as they are: quickly told, for lists may hold ten thousand."""
    return (
        {type(value) for value in values} <= {Tensor, torch.nn.Parameter}
        and {x.dtype for x in values} <= {*KERNEL_DTYPES, torch.float64}
        and {device.type for device in {x.device for x in values}} <= set(DEVICES)
        and {x.layout for x in values} == {torch.strided}
        and True not in {x.requires_grad for x in values}
    )


def input_tensors(argument: str, values: Any) -> list[Tensor]:
    """As `tensor_list`, with float64 values rounded to float32, which is what the kernels read."""
    return [x.to(torch.float32) if x.dtype == torch.float64 else x for x in tensor_list(argument, values)]


def shards(argument: str, value: Any) -> list[Tensor]:
    """One tensor or a list of tensors that together are one vector, as a list."""
    return [input_tensor(argument, value)] if isinstance(value, Tensor) else input_tensors(argument, value)


def same_shape(base: Tensor | None, tensors: Sequence[Tensor], argument: str = "tensors") -> None:
    """The base and all tensors must have one shape, and be on one device."""
    first, owner = (base, "base") if base is not None else (tensors[0], f"{argument}[0]")
    for i, x in enumerate(tensors):
        if x.shape != first.shape:
            raise ArgumentError(
                f"{argument}[{i}] has shape {list(x.shape)}, but {owner} has shape {list(first.shape)}; "
                "pass tensors of one shape."
            )
        same_device(f"{argument}[{i}]", x, first.device, owner)


def same_device(argument: str, x: Tensor, device: torch.device, owner: str = "the first tensor") -> None:
    """Kernels reach one device's memory."""
    if x.device != device:
        raise ArgumentError(f"{argument} is on {x.device}, but {owner} is on {device}; move them to one device.")


def one_per_model(argument: str, values: Sequence[Any], models: int) -> None:
    """There must be as many values as models."""
    if len(values) != models:
        raise ArgumentError(f"{argument} has {len(values)} entries for {models} models; pass one for each model.")


def per_model(argument: str, value: Any, models: int) -> list[Any]:
    """One value for all models or one for each, as a list with one for each."""
    if isinstance(value, (list, tuple)):
        one_per_model(argument, value, models)
        return list(value)
    if isinstance(value, Tensor) and value.dim() == 1:
        return per_model(argument, value.tolist(), models)
    return [value] * models


def positions(argument: str, value: Any, models: int) -> list[int]:
    """The models' positions: None counts from 0; a single number will do for a single model."""
    if value is None:
        return list(range(models))
    values = value if isinstance(value, (list, tuple, range)) else [value]
    one_per_model(argument, values, models)
    return [integer(argument, position, 0, MAX_POSITION) for position in values]


def matrices(argument: str, shape: Sequence[int]) -> None:
    """The shape of one matrix or of several: [..., H, W]."""
    if len(shape) < 2:
        raise ArgumentError(
            f"{argument} has {len(shape)} dimensions, but the filter is one of matrices; pass a tensor [..., H, W]."
        )


def out_dtype(value: Any) -> torch.dtype:
    """A dtype that a result can be returned in."""
    if value not in KERNEL_DTYPES and value != torch.float64:
        raise ArgumentTypeError(
            f"out_dtype={value} is not supported; use torch.float32, torch.bfloat16, torch.float16 or torch.float64."
        )
    dtype: torch.dtype = value
    return dtype


def out_tensor(value: Any, dtype: torch.dtype | None, argument: str = "out") -> None:
    """`out`, which must be a tensor that kernels can write, of the dtype that was asked for, if one was."""
    tensor(argument, value)
    if value.dtype == torch.float64:
        raise ArgumentTypeError(f"{argument} has dtype float64, which kernels do not write; omit it or use float32.")
    if dtype is not None and value.dtype != dtype:
        raise ArgumentTypeError(f"{argument} has dtype {value.dtype}, but out_dtype is {dtype}; make them equal.")


def kernel_out_dtype(value: torch.dtype) -> None:
    """A dtype that kernels can write."""
    if value not in KERNEL_DTYPES:
        raise ArgumentTypeError(f"out_dtype={value} cannot be written; use float32, bfloat16 or float16.")


def target(argument: str, value: Tensor, shape: Sequence[int], inputs: Iterable[Tensor]) -> None:
    """A tensor that a kernel may write: of this shape, contiguous, and in memory of its own."""
    inputs = list(inputs)
    kernel_inputs(argument, [*inputs[:1], value])
    if value.shape != tuple(shape):
        raise ArgumentError(
            f"{argument} has shape {list(value.shape)}, but the result has {list(shape)}; allocate it like that."
        )
    if not value.is_contiguous():
        raise ArgumentError(f"{argument} is not contiguous; pass a tensor made by torch.empty(shape).")
    start, stop = value.data_ptr(), value.data_ptr() + value.nbytes
    for x in inputs:
        if x.untyped_storage().data_ptr() == value.untyped_storage().data_ptr() and _touches(x, start, stop):
            raise ArgumentError(f"{argument} overlaps an input in memory; pass a tensor of its own.")


def _touches(x: Tensor, start: int, stop: int) -> bool:
    """Whether the bytes from x's first to its last element meet [start, stop)."""
    if x.numel() == 0:
        return False
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
    return bool(x.data_ptr() < stop and start < x.data_ptr() + span * x.element_size())


def compute_dtype(argument: str, value: Any) -> torch.dtype:
    """`value`, which must be a dtype that intermediate results can be rounded to."""
    if value not in KERNEL_DTYPES:
        raise ArgumentError(f"{argument}={value} is not known; use torch.float32, torch.bfloat16 or torch.float16.")
    dtype: torch.dtype = value
    return dtype


def kernel_inputs(argument: str, tensors: Sequence[Tensor]) -> None:
    """What every kernel relies on whoever calls it: dense tensors of dtypes that it reads, on one device."""
    if not tensors:
        raise ArgumentError(f"{argument} is empty; pass at least one tensor.")
    for x in tensors:
        if x.dtype not in KERNEL_DTYPES or x.device.type not in DEVICES or x.layout != torch.strided:
            tensor(argument, x)
            raise ArgumentTypeError(f"{argument} has dtype float64; round it to float32 first.")
        same_device(argument, x, tensors[0].device)


def models(base: Tensor | None, tensors: Sequence[Tensor]) -> int:
    """How many tensors there are: at least one, of one shape that the base has, too, and that kernels can read."""
    kernel_inputs("tensors", tensors)
    if base is not None:
        kernel_inputs("base", [base])
    same_shape(base, tensors)
    return len(tensors)


def counts_tensor(argument: str, value: Tensor, shape: Sequence[int], device: torch.device | None = None) -> None:
    """An int64 tensor of this shape, such as bounds and tie counts; on this device, if one is named."""
    if device is not None:
        same_device(argument, value, device, "what it is about")
    if value.dtype != torch.int64:
        raise ArgumentTypeError(f"{argument} has dtype {value.dtype}; it must be torch.int64.")
    if value.dim() != len(shape) or any(have != want for have, want in zip(value.shape, shape)):
        raise ArgumentError(f"{argument} has shape {list(value.shape)}; it must be {list(shape)}.")


def contiguous(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in row-major order, copied only where they are not already."""
    return [x if x.is_contiguous() else x.contiguous() for x in tensors]


def optional_contiguous(x: Tensor | None) -> Tensor | None:
    """As `contiguous`, for one tensor that may be absent."""
    return x if x is None or x.is_contiguous() else x.contiguous()
