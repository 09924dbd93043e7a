"""Many tensors that are merged together: lists of them, their lengths and addresses, and what backends keep of them."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import BackendError
from .rule import TIE_BLOCK, SparsifyRule

T = TypeVar("T")


class Lists:
    """T tensors of each of n models, their bases where there are any, and those to write to; all contiguous.

    base, out: T tensors, or None. models: n lists of T tensors, of the same lengths. tensor_ids: each tensor's number,
    unsigned 64-bit. kept: they will be merged again, so tables of them stay in the device's memory, and what changes
    from merge to merge is worked out there. Addresses and lengths are looked up when first asked for, and stay.
    """

    def __init__(
        self,
        base: list[Tensor] | None,
        models: list[list[Tensor]],
        out: list[Tensor] | None = None,
        tensor_ids: Sequence[int] | None = None,
        *,
        kept: bool = False,
    ) -> None:
        self.base = base
        self.models = models
        self.out = out
        self.tensor_ids = [0] * len(models[0]) if tensor_ids is None else tensor_ids
        self.kept = kept
        self._made: dict[Hashable, Any] = {}

    def once(self, name: Hashable, make: Callable[[], T]) -> T:
        """What `make` returns, made by the first call of this name, and kept where the lists are.

        Errors: BackendError where it would have to be made while a CUDA graph is captured, into that graph's memory.
        """
        if not self.kept:
            return make()
        if name not in self._made:
            there = self.device.type == "cuda"
            if there and torch.cuda.is_current_stream_capturing():
                raise BackendError("the first merge of prepared lists makes their tables; merge once before a capture.")
            self._made[name] = make()
            if there:
                # The next merge may be on another stream.
                torch.cuda.current_stream(self.device).synchronize()
        made: T = self._made[name]
        return made

    @property
    def tensors(self) -> int:
        """T."""
        return len(self.models[0])

    @property
    def device(self) -> torch.device:
        """Where all of them are."""
        return self.models[0][0].device

    @cached_property
    def dtypes(self) -> dict[str, set[torch.dtype]]:
        """Those of the bases, of the models and of the results."""
        return {
            "base": {x.dtype for x in self.base or ()},
            "tensors": {x.dtype for model in self.models for x in model},
            "out": {x.dtype for x in self.out or ()},
        }

    @property
    def uniform(self) -> bool:
        """Whether one launch can take them: a kernel is compiled for one dtype of each role."""
        return all(len(dtypes) <= 1 for dtypes in self.dtypes.values())

    def need_uniform(self) -> None:
        """ValueError where they are not."""
        for name, dtypes in self.dtypes.items():
            if len(dtypes) > 1:
                raise ValueError(f"{name} has several dtypes; take its tensors one by one")

    @cached_property
    def lengths(self) -> Tensor:
        """int64[T], on the host as all that follows."""
        return numbers([x.numel() for x in self.models[0]])

    @cached_property
    def blocks(self) -> Tensor:
        """How many tie blocks each has; an empty one counts as one: int64[T]."""
        return ((self.lengths + (TIE_BLOCK - 1)) // TIE_BLOCK).clamp(min=1)

    @cached_property
    def base_addresses(self) -> Tensor:
        """int64[T]; 0 where there is none."""
        return torch.zeros_like(self.lengths) if self.base is None else addresses(self.base)

    @cached_property
    def model_addresses(self) -> Tensor:
        """int64[T, n]."""
        return torch.stack([addresses(model) for model in self.models], dim=1)

    @cached_property
    def out_addresses(self) -> Tensor:
        """int64[T]; 0 where there is none."""
        return torch.zeros_like(self.lengths) if self.out is None else addresses(self.out)


def for_whole_tensors(rule: SparsifyRule) -> None:
    """ValueError where a rule is not one for many whole tensors."""
    if rule.method not in ("none", "band", "bernoulli") or rule.offset:
        raise ValueError(f"a rule {rule.method!r} is not for many tensors; take them one by one")


def words(values: Sequence[int]) -> Tensor:
    """Unsigned 64-bit numbers as the signed ones with their bits, at least one."""
    return torch.frombuffer(array("Q", values), dtype=torch.int64)


def numbers(values: Iterable[int]) -> Tensor:
    """int64 numbers, at least one."""
    return torch.frombuffer(array("q", values), dtype=torch.int64)


def addresses(tensors: Sequence[Tensor]) -> Tensor:
    """Where these begin, at least one."""
    return numbers([x.data_ptr() for x in tensors])


def before(counts: Tensor) -> Tensor:
    """For each how many the ones before have together."""
    return counts.cumsum(0) - counts


def multiple_of(*addressed: Tensor) -> int:
    """Of how many bytes all addresses are multiples, 16 at most."""
    number = 16
    while number > 1 and any(bool((each & (number - 1)).any()) for each in addressed):
        number //= 2
    return number


def signed(number: int) -> int:
    """An unsigned 64-bit integer as the signed one with its bits."""
    return (number & 0xFFFFFFFFFFFFFFFF) - ((number & 1 << 63) << 1)


def copied(host: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host in the device's memory, copied while the host goes on."""
    # Pinned memory is given back only when the copy has been made: PyTorch sees to it.
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)
