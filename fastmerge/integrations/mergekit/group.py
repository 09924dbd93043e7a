"""One group of tensors as mergekit hands it to a method, merged by fastmerge: or the reason why mergekit must do it.

What reaches a method is looked at before anything is computed. Whatever could give other numbers than mergekit's, and
whatever mergekit refuses, is left to mergekit's own function by raising LeftToPeer.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.autograd import forward_ad

from fastmerge import backends, methods, ops
from fastmerge.engine.at_once import merge_at_once
from fastmerge.errors import ArgumentError, BackendError
from fastmerge.integrations.mergekit.methods import numerics_of, underflows
from fastmerge.methods.base import Method, TensorContext
from fastmerge.methods.consensus import ConsensusMethod

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST_MODELS = 4096
_MOST_SEED = (1 << 63) - 1
_SOME = "this tensor"
"""What a tensor is called in reasons, lest each tensor has its own."""


class LeftToPeer(Exception):  # noqa: N818 (it says what happens, and nothing is wrong)
    """Raised before anything is computed: mergekit's own function must merge this. The message is the reason."""


@dataclass(frozen=True)
class Settings:
    """What `enable` was given.

    seed: of the random methods, where a tensor has a name. None, and tensors without a name, take one from torch's
    generator for each tensor, as mergekit's own functions do.
    """

    numerics: str = "mergekit"
    seed: int | None = 0
    backend: str = "auto"


@dataclass
class Switch:
    """What holds at the moment: the settings while fastmerge is enabled, else None."""

    settings: Settings | None = None


SWITCH = Switch()
"""There is one mergekit in a process, and so one switch."""


@dataclass
class Tally:
    """Who merged what since it was last set back.

    merged: tensors merged by fastmerge, by method. left: those left to mergekit, by (method, reason). seconds: spent
    in fastmerge; on a GPU that is the host's time, which does not wait for the GPU.
    """

    merged: Counter[str] = field(default_factory=Counter)
    left: Counter[tuple[str, str]] = field(default_factory=Counter)
    seconds: float = 0.0

    def lines(self) -> list[str]:
        """For people: what fastmerge merged, then what it left and why."""
        said = [f"{count} by {method}" for method, count in sorted(self.merged.items())]
        first = f"{self.merged.total()} tensor(s) merged by fastmerge in {self.seconds:.2f} s"
        lines = [f"{first}: {', '.join(said)}" if said else "no tensor was merged by fastmerge"]
        for (method, reason), count in sorted(self.left.items()):
            lines.append(f"{count} tensor(s) of {method} left to mergekit's own function: {reason}")
        return lines


_tally = Tally()
_lock = threading.Lock()


def tally() -> Tally:
    """A copy of what has been counted."""
    with _lock:
        return replace(_tally, merged=_tally.merged.copy(), left=_tally.left.copy())


def reset_tally() -> None:
    """Begin to count anew."""
    with _lock:
        _tally.merged.clear()
        _tally.left.clear()
        _tally.seconds = 0.0


def count_left(method: str, reason: str) -> None:
    """Note a tensor that mergekit's own function merges."""
    with _lock:
        _tally.left[method, reason] += 1


def count_merged(method: str, seconds: float) -> None:
    """Note a tensor that was merged here."""
    with _lock:
        _tally.merged[method] += 1
        _tally.seconds += seconds


# -- what can be merged here


def check_tensors(tensors: Sequence[torch.Tensor], settings: Settings) -> None:
    """LeftToPeer where the kernels cannot take these tensors, or would give other numbers than mergekit.

    tensors: all that meet in one output. They must be plain tensors of one shape, on the CPU or on one NVIDIA GPU, with
    numbers only, and nobody may want their gradients.
    """
    first = tensors[0]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise LeftToPeer("gradients are wanted")
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise LeftToPeer("gradients are wanted")
    for tensor in tensors:
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided or tensor.is_neg():
            raise LeftToPeer("a tensor is not a plain one")
        if tensor.dtype not in DTYPES:
            raise LeftToPeer(f"dtype {str(tensor.dtype).removeprefix('torch.')}")
        if tensor.shape != first.shape:
            raise LeftToPeer("shapes differ")
        if tensor.device != first.device:
            raise LeftToPeer("devices differ")
    if first.numel() == 0:
        raise LeftToPeer("no elements")
    if len(tensors) > _MOST_MODELS:
        raise LeftToPeer(f"more than {_MOST_MODELS} models")
    check_kernels(first.device, settings)


def check_kernels(device: torch.device, settings: Settings) -> None:
    """LeftToPeer where no kernels work on this device. A backend that was asked for by name is never replaced."""
    if settings.backend != "auto":
        return
    try:
        found = backends.name_of(backends.resolve("auto", device))
    except BackendError:
        raise LeftToPeer(f"no kernels for device {device.type}") from None
    if found == "reference":
        raise LeftToPeer(f"no kernels for device {device.type}")


def has_nonfinite(tensors: Sequence[torch.Tensor], backend: str) -> bool:
    """Whether any of them holds NaN or Inf."""
    counts = torch.stack([ops.count_nonfinite(tensor.detach(), backend=backend) for tensor in tensors])
    return bool(counts.any())


# -- merging


def draw_seed() -> int:
    """A seed from torch's generator, which `torch.manual_seed` and mergekit's --random-seed set."""
    return int(torch.randint(0, _MOST_SEED, (), dtype=torch.int64))


def _draws(method: Method, parameters: Any) -> bool:
    """Whether random words decide anything."""
    random = isinstance(method, ConsensusMethod) and method.sparsify in ("bernoulli", "della")
    return random and any(density < 1 for density in parameters.density)


def _clamped(value: Any) -> Any:
    """A density of 1 or more keeps everything in mergekit."""
    return min(float(value), 1.0)


def merge_group(
    method: Method,
    name: str | None,
    base: torch.Tensor | None,
    models: Sequence[torch.Tensor],
    shared: Mapping[str, Any],
    per_model: Sequence[Mapping[str, Any]],
    settings: Settings,
) -> torch.Tensor:
    """Merge tensors of one dtype, shape and device into a new one of that dtype.

    name: of the output tensor, which the random methods know it by; None where it has none. shared, per_model: the
    method's parameters by their names in YAML, those per model in the order of `models`.

    Raises LeftToPeer, before anything is computed, where mergekit's own function must merge it.
    """
    if not models:
        raise LeftToPeer("no model besides the base")
    everyone = models if base is None else [base, *models]
    check_tensors(everyone, settings)
    if underflows(method, models[0].dtype, settings.numerics):
        raise LeftToPeer("mergekit's own numbers vanish in float16, with numerics fp32 there are others")
    numerics = numerics_of(method, settings.numerics)
    per_model = [
        {key: _clamped(value) if key == "density" else value for key, value in given.items()} for given in per_model
    ]
    labels = [f"model {number}" for number in range(1, len(models) + 1)]
    try:
        parameters = methods.bind(method, shared, per_model, tensor=_SOME, labels=labels)
        context = TensorContext(
            name=name or "",
            shape=tuple(models[0].shape),
            parameters=parameters,
            positions=tuple(range(len(models))),
            compute=method.compute_dtype(models[0].dtype, numerics),
            numerics=numerics,
            backend=settings.backend,
            device=str(models[0].device),
        )
        method.check(replace(context, name=_SOME), labels)
        method.check_count(len(models))
    except ArgumentError as error:
        raise LeftToPeer(str(error)) from None
    began = time.perf_counter()
    if has_nonfinite(everyone, settings.backend):
        raise LeftToPeer("NaN or Inf in an input")
    if _draws(method, parameters):
        seed = draw_seed() if settings.seed is None or not name else settings.seed % (1 << 64)
        context = replace(context, seed=seed)
    with torch.no_grad():
        plain = [tensor.detach() for tensor in everyone]
        out = torch.empty(models[0].shape, dtype=models[0].dtype, device=models[0].device)
        merge_at_once(method, context, None if base is None else plain[0], plain[len(everyone) - len(models) :], out)
    count_merged(method.name, time.perf_counter() - began)
    return out
