"""What a merge method is: parameters, the statistics it needs first, and the merge of one chunk.

A method never opens a file and never loops over a model. The executor brings it chunks, lets its statistics observe
them, and hands the finished statistics back with each chunk that is to be merged.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from fastmerge import ops
from fastmerge.errors import ArgumentError
from fastmerge.methods.parameters import ParameterError, Parameters


@dataclass(frozen=True)
class Chunk:
    """Elements [offset, offset + numel) of one tensor, from the base and from each model: flat, contiguous tensors."""

    offset: int
    base: torch.Tensor | None
    models: list[torch.Tensor]

    @property
    def numel(self) -> int:
        """How many elements there are."""
        return self.models[0].numel()

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.models[0].device

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The base, if there is one, and the models."""
        return self.models if self.base is None else [self.base, *self.models]

    def clone(self) -> Chunk:
        """The same elements in memory of their own."""
        return replace(
            self,
            base=None if self.base is None else self.base.clone(),
            models=[model.clone() for model in self.models],
        )

    def part(self, start: int, stop: int) -> Chunk:
        """Elements [start, stop), counted from this chunk's beginning, as views."""
        return replace(
            self,
            offset=self.offset + start,
            base=None if self.base is None else self.base[start:stop],
            models=[model[start:stop] for model in self.models],
        )


@dataclass(frozen=True)
class TensorContext:
    """All that is known about one tensor's merge before any of its elements is read.

    parameters: the values for this tensor, one per model where the parameter is per model. compute: the dtype that
    intermediate results are rounded to. positions: each model's place among the models, which names its random stream.
    backend: of the ops on chunks. host_backend: of those on samples, which stay on the host wherever chunks are.
    device: where chunks are.
    """

    name: str
    shape: tuple[int, ...]
    parameters: Parameters
    positions: tuple[int, ...]
    compute: torch.dtype = torch.float32
    numerics: str = "fp32"
    seed: int = 0
    backend: str = "auto"
    host_backend: str = "auto"
    device: str = "cpu"

    @property
    def numel(self) -> int:
        """How many elements the tensor has."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def tensor_id(self) -> int:
        """What the random streams know the tensor by."""
        return ops.tensor_id(self.name)


def whole_model(contexts: Sequence[TensorContext], uniform: Sequence[str]) -> TensorContext:
    """All tensors of a model as if they were one, for statistics over all of them.

    uniform: the parameters that must be the same for every tensor then. Raises ParameterError naming two that differ.
    """
    first = contexts[0]
    for other in contexts[1:]:
        for name in uniform:
            one, two = getattr(first.parameters, name, None), getattr(other.parameters, name, None)
            if one != two:
                raise ParameterError(
                    f"{name} is {_shown(one)} for {first.name} but {_shown(two)} for {other.name}; with scope = model "
                    "it must be one value for all tensors.",
                    name,
                )
    return replace(first, name="the whole model", shape=(sum(context.numel for context in contexts),))


def _shown(value: Any) -> str:
    return ", ".join(f"{each:g}" for each in value) if isinstance(value, tuple) else str(value)


class Placed:
    """A small tensor that a statistic has found: the host's, and a copy for each device whose chunks ask for it."""

    def __init__(self, values: torch.Tensor) -> None:
        """values: on the host."""
        self.values = values
        self._copies = {values.device: values}

    def on(self, device: torch.device) -> torch.Tensor:
        """The tensor there."""
        found = self._copies.get(device)
        if found is None:
            found = self._copies[device] = self.values.to(device)
        return found


Known = Mapping[str, Any]
"""The statistics that are finished, by name."""


class Statistic(ABC):
    """What must be known about a whole tensor, or about a whole model, before any of it can be merged: a monoid.

    The states of disjoint chunks add up, in any grouping, to the state of all of them; `finish` turns the sum into what
    the merge needs. A statistic may use those listed before it, which are finished by then. States are where the chunks
    are; samples are on the host, and so is what `finish` returns, but for what is about the very chunk that is merged.
    """

    name: ClassVar[str]
    fallback: ClassVar[bool] = False
    """Whether it is rarely needed, because one listed before it mostly finds the same."""
    samples: ClassVar[bool] = False
    """Whether it wants to see a sample first."""

    def needed(self, known: Known) -> bool:
        """Whether it must be gathered at all, those before it being finished."""
        return True

    def prepare(self, sample: Chunk, known: Known) -> None:
        """See a sample of all that will be observed: it may decide how the result is found, never what it is."""
        return None

    @abstractmethod
    def observe(self, chunk: Chunk, known: Known) -> Any:
        """The state of one chunk."""

    def extend(self, state: Any, chunk: Chunk, known: Known) -> Any:
        """The state of what was observed before and of one more chunk."""
        return self.add(state, self.observe(chunk, known))

    @abstractmethod
    def add(self, state: Any, other: Any) -> Any:
        """The state of both."""

    # -- for merges of the same models, one after the other

    def depends_only_on(self) -> Hashable | None:
        """What the state of a whole tensor follows from besides its elements; merges that agree in it share the state.

        None: each merge finds its own.
        """
        return None

    def observe_with(self, others: Sequence[Any], chunk: Chunk, known: Known) -> list[Any]:
        """Its own state; and after it those of others of its kind, where all together cost less than one by one."""
        return [self.observe(chunk, known)]

    @abstractmethod
    def finish(self, state: Any, known: Known) -> Any:
        """What the merge needs, or None if that is to be found by a fallback."""

    # -- for statistics of a whole model, which a file may keep for the next merge of the same models

    def depends_on(self) -> dict[str, Any]:
        """What the result depends on besides the models, ready for JSON."""
        return {}

    def dump(self, result: Any) -> Any:
        """The result, ready for JSON; None if it is not worth keeping."""
        return None

    def load(self, stored: Any) -> Any:
        """The inverse of `dump`."""
        raise NotImplementedError


class Method(ABC):
    """One merge method. Instances hold no state."""

    name: ClassVar[str]
    title: ClassVar[str]
    source: ClassVar[str]
    needs_base: ClassVar[bool]
    takes_base: ClassVar[bool] = False
    """Whether a base that it does not need is a base to it. To others a base is one model more."""
    least_models: ClassVar[int] = 1
    most_models: ClassVar[int | None] = None
    """How many models it merges, besides the base."""
    sweeps: ClassVar[str]
    """In words, for people: the sweeps over a tensor that is cut, and what they are for."""
    Parameters: ClassVar[type[Parameters]]

    def check_count(self, models: int) -> None:
        """Refuse more models, or fewer, than it merges. models: how many there are besides the base."""
        most = self.most_models
        if self.least_models <= models and (most is None or models <= most):
            return
        wanted = f"at least {self.least_models}" if most is None else f"exactly {most}"
        besides = " besides the base" if self.needs_base else ", not counting a base" if self.takes_base else ""
        word = "model" if wanted.endswith(" 1") else "models"
        raise ArgumentError(
            f"{self.name} merges {wanted} {word}{besides}, and {models} {'is' if models == 1 else 'are'} given; "
            "give as many, or choose another method."
        )

    def check(self, context: TensorContext, labels: Sequence[str]) -> None:
        """Refuse values that are each in range but do not go together, with an ArgumentError. labels: the models'."""
        return None

    @abstractmethod
    def compute_dtype(self, dtype: torch.dtype, numerics: str) -> torch.dtype:
        """What intermediate results are rounded to when the inputs meet in `dtype`."""

    def cut_unit(self, context: TensorContext) -> int:
        """Chunks of this tensor must begin at multiples of so many elements."""
        return 1

    def workspace(self, context: TensorContext, numel: int) -> int:
        """Bytes that statistics and merge need beside a chunk of so many elements, if they grow with it."""
        return 0

    @abstractmethod
    def statistics(self, context: TensorContext, whole: bool) -> list[Statistic]:
        """What must be known first, in order; each costs a sweep over the tensor. none = it merges as it is read.

        whole: each statistic will observe one chunk that is the whole tensor, and never has to add.
        """

    def model_statistics(self, contexts: Sequence[TensorContext]) -> list[Statistic]:
        """What must be known about all these tensors together, in order; each costs a pass over them. none = nothing.

        Raises ParameterError where the tensors' parameters do not go together.
        """
        return []

    @abstractmethod
    def merge(self, context: TensorContext, chunk: Chunk, known: Known, out: torch.Tensor) -> None:
        """Write the merged chunk to `out` (flat, chunk.numel elements, any floating dtype)."""


class MethodWithoutPeer(Method):
    """A method that mergekit has not: it computes in float32 always."""

    def compute_dtype(self, dtype: torch.dtype, numerics: str) -> torch.dtype:
        """Always float32."""
        return torch.float32

    def check(self, context: TensorContext, labels: Sequence[str]) -> None:
        """There is no peer whose rounding could be followed."""
        if context.numerics == "mergekit":
            raise ParameterError(
                f"{self.name} goes with numerics fp32 only: mergekit has no such method.", "merge_method"
            )


class MethodInFloat32(Method):
    """A method that mergekit has, too, but whose rounding in the models' dtype is not followed: always float32."""

    def compute_dtype(self, dtype: torch.dtype, numerics: str) -> torch.dtype:
        """Always float32."""
        return torch.float32

    def check(self, context: TensorContext, labels: Sequence[str]) -> None:
        """Nobody may ask for the peer's rounding."""
        if context.numerics == "mergekit":
            raise ParameterError(
                f"{self.name} goes with numerics fp32 only: it computes in float32 and rounds once, where mergekit "
                "rounds each step to the models' dtype; leave numerics out.",
                "merge_method",
            )
