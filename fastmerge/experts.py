"""Light experts of whole models (FREE-Merging): files of them, and models that wear them for a while.

    fastmerge.experts.extract_to_file("base", "math", "math.safetensors", keep=0.01)
    experts = ExpertSet(model, {"math": "math.safetensors", "code": "code.safetensors"})
    with experts.active({"math": 0.7, "code": 0.3}):
        model.generate(...)

The model is a live module, of transformers or any other. Experts are put onto its weights in place, and taken off again
exactly: the weights get their very bits back. `fastmerge.routers` decides which experts a request needs.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from fastmerge.backends.rule import ExpertPart, saved_layout
from fastmerge.engine.expert_file import About, ModelExpert, same_base
from fastmerge.engine.expert_model import same_expert
from fastmerge.engine.matching import find
from fastmerge.engine.sources import TORCH_DTYPES, Source, StateDictSource
from fastmerge.errors import ArgumentError, ArgumentTypeError, CheckpointError
from fastmerge.expert_files import (
    Model,
    apply_to_checkpoint,
    describe,
    extract_expert,
    extract_to_file,
    finite,
    load,
    remove_from_checkpoint,
    source_of,
)
from fastmerge.ops import Expert, expert_apply_, expert_revert_
from fastmerge.ops.expert import sharing

__all__ = [
    "ExpertSet",
    "ModelExpert",
    "apply_to_checkpoint",
    "describe",
    "extract_expert",
    "extract_to_file",
    "load",
    "remove_from_checkpoint",
]

MODES = ("add", "replace")


@dataclass
class _Bound:
    """One parameter or buffer of the model that experts reach, and where its memory was when the set was made."""

    name: str
    owner: Tensor
    address: int

    @property
    def tensor(self) -> Tensor:
        """Its values, outside autograd."""
        return self.owner.detach()

    @property
    def there(self) -> bool:
        """Whether it is still where it was."""
        return self.owner.data_ptr() == self.address


@dataclass
class _Worn:
    """What is on the model, on one device: the tensors as they were then, the parts, the old bits."""

    bound: list[_Bound]
    tensors: list[Tensor]
    parts: list[ExpertPart]
    saved: Tensor


_WEARING: weakref.WeakKeyDictionary[torch.nn.Module, ExpertSet] = weakref.WeakKeyDictionary()
"""The set whose experts are on a model just now: two sets would take each other's for changed weights."""


class ExpertSet:
    """Experts for a live model: on its weights inside a `with`, or until the next switch, and taken off exactly.

    model: any module whose parameters have the names that the experts' tensors have.
    experts: by name, each a file or a `ModelExpert`. All must come from one base.
    mode: "add" puts an expert on top of what the model is; "replace" puts it in place of what the model changed in the
        base, where neither is 0.
    base: the base, for "replace", whose values are needed then at the places of experts; a checkpoint, a state dict or
        a module. If it is given, it must be the one that the experts come from.
    rescale: scale each expert by the factor mu that its file holds, times its weight.

    Weights are added up expert by expert in the order of `experts`, in float32, and rounded once. A parameter that the
    model has under two names is changed once. Use it from one thread at a time, and not while the model runs elsewhere.
    Errors: ArgumentError / CheckpointError, in a sentence; the model is as it was then.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        experts: Mapping[str, str | Path | ModelExpert],
        *,
        mode: str = "add",
        base: Model | None = None,
        rescale: bool = True,
        backend: str = "auto",
    ) -> None:
        if not isinstance(model, torch.nn.Module):
            raise ArgumentTypeError(f"model must be a torch.nn.Module, not {type(model).__name__}.")
        if mode not in MODES:
            raise ArgumentError(f"mode must be one of {', '.join(MODES)}, not {mode!r}.")
        if mode == "replace" and base is None:
            raise ArgumentError(
                'mode="replace" needs the values of the base; pass base=, a checkpoint or a state dict.'
            )
        if not isinstance(experts, Mapping):
            raise ArgumentTypeError(f"experts must be a mapping from names to experts, not {type(experts).__name__}.")
        if not experts:
            raise ArgumentError("experts is empty; pass at least one, by name.")
        for name, each in experts.items():
            if not isinstance(each, (str, Path, ModelExpert)):
                raise ArgumentTypeError(
                    f"the expert {name!r} is a {type(each).__name__}; pass a file's path, or what extract_expert() "
                    "returned."
                )
        self.mode = mode
        self.rescale = rescale
        # Weakly, or a model that wears experts would keep itself alive through the table of those that do.
        self._model = weakref.ref(model)
        self._backend = backend
        self._lock = threading.RLock()
        self._on: list[_Worn] | None = None
        self._weights: dict[str, float] = {}
        loaded = {str(name): each if isinstance(each, ModelExpert) else load(each) for name, each in experts.items()}
        self.experts: dict[str, About] = {name: each.about for name, each in loaded.items()}
        self._check_one_base()
        self._bound: list[_Bound] = []
        places = self._bind(model, loaded)
        bases = None if base is None else self._read_base(base, loaded, places)
        # expert -> place of the tensor -> what is put there
        self._held: dict[str, dict[int, tuple[Expert, Tensor | None]]] = {}
        for name, held in places.items():
            self._held[name] = {}
            for at, (tensor_name, expert) in held.items():
                device = self._bound[at].owner.device
                kept = None if bases is None or mode == "add" else bases[name][tensor_name].to(device)
                self._held[name][at] = expert.to(device), kept

    @property
    def names(self) -> list[str]:
        """The experts' names, in the order in which they are added up."""
        return list(self.experts)

    @property
    def on(self) -> dict[str, float]:
        """The experts that the model wears now, with their weights; empty where it is as it was."""
        return dict(self._weights)

    @contextmanager
    def active(self, weights: Mapping[str, float] | str) -> Iterator[ExpertSet]:
        """Put experts onto the model for a `with` block; however it ends, they are taken off again.

        weights: by name; or one name, for a weight of 1. A weight of 0 leaves the expert out.
        Errors: ArgumentError where a name is unknown, or the model wears experts already; where weights have been
        changed inside the block, and nothing is taken off then.
        """
        with self._lock:
            self._put(_weights(weights))
        try:
            yield self
        finally:
            with self._lock:
                self._take()

    def switch(self, weights: Mapping[str, float] | str | None) -> None:
        """Take off what the model wears, and put these experts on until the next switch; None: nothing.

        Errors: as of `active`. Where the new experts cannot be put on, the model is as it was before any.
        """
        with self._lock:
            wanted = {} if weights is None else _weights(weights)
            self._check_names(wanted)
            if self._on is not None:
                self._take()
            if wanted:
                self._put(wanted)

    def put_back(self) -> None:
        """Write the old bits back at the places of the experts, whatever stands there now; the rest stays changed.

        For a model whose weights were changed while it wore experts, which `switch` and `active` refuse to touch. Where
        it was moved or converted (.to(), .half()), so are the old values. A parameter that was replaced by one with
        other values is left alone.
        Errors: ArgumentError where a parameter has become something else; nothing is written then.
        """
        with self._lock:
            model = self._model()
            present = {} if model is None else _named(model)
            theirs = {id(x) for x in present.values()}
            back = []
            for worn in self._on or []:
                targets = [
                    bound.owner if id(bound.owner) in theirs else present.get(bound.name, bound.owner)
                    for bound in worn.bound
                ]
                for bound, then, now in zip(worn.bound, worn.tensors, targets, strict=True):
                    _check_like(bound.name, then, now)
                # A module that is moved keeps its parameters, with other memory, but gets new buffers.
                others = {
                    part.of
                    for part in worn.parts
                    if targets[part.of] is not worn.bound[part.of].owner
                    and not _holds(targets[part.of], worn.tensors[part.of], part.columns)
                }
                for (first, end), part in zip(saved_layout(worn.tensors, worn.parts), worn.parts, strict=True):
                    old = worn.saved[first:end].view(worn.tensors[part.of].dtype).view(part.columns.shape)
                    if part.of not in others:
                        back.append((targets[part.of].detach(), part.columns, old))
            for now, columns, old in back:
                _overwrite(now, columns, old)
            self._forget()

    # -- putting on and taking off

    def _put(self, weights: Mapping[str, float]) -> None:
        self._check_names(weights)
        model = self._model()
        if model is None:
            raise ArgumentError("the model of this set is gone; make a new ExpertSet for the one that is used now.")
        other = _WEARING.get(model)
        if other is not None:
            whose = "already" if other is self else "of another ExpertSet"
            raise ArgumentError(
                f"the model wears experts {whose} ({', '.join(other.on)}); an expert put on twice could not be taken "
                "off exactly. Leave the `with` block, or switch(None), first."
            )
        self._check_in_place("put on")
        done: list[_Worn] = []
        try:
            for worn in self._gather({name: weight for name, weight in weights.items() if weight != 0.0}):
                worn.saved = expert_apply_(worn.tensors, worn.parts, backend=self._backend)
                done.append(worn)
        except BaseException:
            for worn in done:
                expert_revert_(worn.tensors, worn.parts, worn.saved, backend=self._backend)
            raise
        self._on = done
        self._weights = {name: weights[name] for name in self.names if weights.get(name, 0.0) != 0.0}
        _WEARING[model] = self

    def _gather(self, weights: Mapping[str, float]) -> Iterator[_Worn]:
        """The parts of these experts, tensor by tensor, for each device its own."""
        by_device: dict[torch.device, list[int]] = {}
        for at, bound in enumerate(self._bound):
            if any(at in self._held[name] for name in weights):
                by_device.setdefault(bound.owner.device, []).append(at)
        for places in by_device.values():
            parts = []
            for of, at in enumerate(places):
                for name in self.names:
                    if name not in weights or at not in self._held[name]:
                        continue
                    expert, base = self._held[name][at]
                    factor = weights[name] * (self.experts[name].mu if self.rescale else 1.0)
                    parts.append(expert.part(of, factor, base))
            tensors = [self._bound[at].tensor for at in places]
            yield _Worn([self._bound[at] for at in places], tensors, parts, torch.empty(0))

    def _take(self) -> None:
        if self._on is None:
            raise ArgumentError("the model wears no experts; they were taken off inside the `with` block.")
        self._check_in_place("taken off")
        # All devices are looked at before anything is written anywhere.
        for place, worn in enumerate(self._on):
            changed = expert_revert_(worn.tensors, worn.parts, worn.saved, backend=self._backend)
            if any(changed):
                self._put_on_again(self._on[:place])
                at = next(number for number, count in enumerate(changed) if count)
                raise ArgumentError(
                    f"weights have been changed while the model wore experts: {changed[at]} values of "
                    f"{worn.bound[at].name!r} are not what was put there. Nothing was taken off; give them back their "
                    "values, or call put_back() to write the old bits over them."
                )
        self._forget()

    def _put_on_again(self, taken: Sequence[_Worn]) -> None:
        """Experts that were taken off one device before another one refused."""
        for worn in taken:
            worn.saved = expert_apply_(worn.tensors, worn.parts, backend=self._backend)

    def _forget(self) -> None:
        self._on = None
        self._weights = {}
        model = self._model()
        if model is not None:
            _WEARING.pop(model, None)

    def _check_names(self, weights: Mapping[str, float]) -> None:
        for name in weights:
            if name not in self.experts:
                raise ArgumentError(f"there is no expert {name!r}; this set has {', '.join(self.names)}.")

    def _check_in_place(self, what: str) -> None:
        model = self._model()
        present = None if model is None else {id(x) for x in (*model.parameters(), *model.buffers())}
        for bound in self._bound:
            if not bound.there or (present is not None and id(bound.owner) not in present):
                raise ArgumentError(
                    f"the experts cannot be {what}: {bound.name!r} was moved or given other memory since the set was "
                    "made (.to(), .data =, load_state_dict(assign=True)); move the model first and then make a new "
                    f"ExpertSet{'' if self._on is None else ', after put_back() if it wears experts now'}."
                )

    # -- binding

    def _check_one_base(self) -> None:
        first = self.names[0]
        for name in self.names[1:]:
            different = same_base(self.experts[first], self.experts[name])
            if different is not None:
                raise CheckpointError(
                    f"the experts {first!r} and {name!r} come from different bases ({different!r} differs); "
                    "experts of one set must be extracted with one base."
                )

    def _bind(
        self, model: torch.nn.Module, loaded: Mapping[str, ModelExpert]
    ) -> dict[str, dict[int, tuple[str, Expert]]]:
        """Each expert's tensors by the place of the model's tensor: a parameter under two names has one place."""
        owners = _named(model)
        places: dict[tuple[Any, ...], int] = {}
        result: dict[str, dict[int, tuple[str, Expert]]] = {}
        for name, whole in loaded.items():
            held: dict[int, tuple[str, Expert]] = {}
            for tensor_name, expert in whole.tensors.items():
                owner = self._fitting(name, tensor_name, expert, owners.get(tensor_name))
                if not expert.columns.numel():
                    continue
                key = owner.device, owner.data_ptr()
                if key not in places:
                    places[key] = len(self._bound)
                    self._bound.append(_Bound(tensor_name, owner, owner.data_ptr()))
                at = places[key]
                if tuple(self._bound[at].owner.shape) != expert.shape:
                    raise ArgumentError(
                        f"{tensor_name!r} and {self._bound[at].name!r} share memory in the model but not their shape; "
                        "experts cannot be put there."
                    )
                if at in held and not same_expert(held[at][1], expert):
                    raise CheckpointError(
                        f"the model has {held[at][0]!r} and {tensor_name!r} as one parameter, but the expert {name!r} "
                        "has different values for them: it belongs to a model that does not tie them."
                    )
                held.setdefault(at, (tensor_name, expert))
            result[name] = held
        shared = sharing([bound.tensor for bound in self._bound])
        if shared is not None:
            one, other = (self._bound[at].name for at in shared)
            raise ArgumentError(
                f"{one!r} and {other!r} share memory in the model and are not one tensor: what experts put into one "
                "would be taken for changed weights of the other. Make a copy of one of them first."
            )
        return result

    def _fitting(self, name: str, tensor_name: str, expert: Expert, owner: Tensor | None) -> Tensor:
        """The model's tensor of this name, which the expert must fit."""
        if owner is None:
            raise CheckpointError(
                f"the expert {name!r} has tensor {tensor_name!r}, which the model lacks: it belongs to another model, "
                "or the model's names have another prefix."
            )
        if tuple(owner.shape) != expert.shape:
            raise CheckpointError(
                f"{tensor_name!r} has the shape {list(owner.shape)} in the model, but {list(expert.shape)} in the "
                f"expert {name!r}: it belongs to another model."
            )
        if owner.dtype not in (torch.float32, torch.bfloat16, torch.float16) or owner.device.type not in (
            "cpu",
            "cuda",
        ):
            raise ArgumentTypeError(
                f"{tensor_name!r} of the model is {owner.dtype} on {owner.device}; experts are put onto float32, "
                "bfloat16 and float16 on a CPU or GPU."
            )
        if not owner.is_contiguous():
            raise ArgumentError(
                f"{tensor_name!r} of the model is not contiguous, so it cannot be changed in place; make it so first."
            )
        return owner

    def _read_base(
        self, base: Model, loaded: Mapping[str, ModelExpert], places: Mapping[str, Mapping[int, tuple[str, Expert]]]
    ) -> dict[str, dict[str, Tensor]]:
        """The base's values at the places of each expert; it is checked to be the one that they come from."""
        result: dict[str, dict[str, Tensor]] = {name: {} for name in loaded}
        holders: dict[str, list[tuple[str, Expert]]] = {}
        for name, held in places.items():
            for tensor_name, expert in held.values():
                holders.setdefault(tensor_name, []).append((name, expert))
        with ExitStack() as stack:
            source = source_of(base, "the base", stack)
            for tensor_name in sorted(holders):
                values = _read_whole(source, tensor_name)
                digest = blake3(values.view(-1).view(torch.uint8).numpy().data).hexdigest()
                for name, expert in holders[tensor_name]:
                    if self.experts[name].tensors[tensor_name].digest != digest:
                        raise CheckpointError(
                            f"{source.ref} is not the base that the expert {name!r} was extracted with: "
                            f"{tensor_name!r} differs."
                        )
                    if self.mode == "replace":
                        kept = expert.at(values)
                        result[name][tensor_name] = kept.to(torch.float32) if kept.dtype == torch.float64 else kept
        return result


def _named(model: torch.nn.Module) -> dict[str, Tensor]:
    """The tensors of a model, those that it has under several names under each of them."""
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return found | dict(model.named_buffers(remove_duplicate=False))


def _check_like(name: str, then: Tensor, now: Tensor) -> None:
    """Old values can be put back into what a parameter has become."""
    if now.shape != then.shape or not now.is_floating_point() or now.element_size() == 1:
        raise ArgumentError(
            f"the old values of {name!r} cannot be put back: it was {then.dtype}{list(then.shape)} and is "
            f"{now.dtype}{list(now.shape)} now; load its weights again."
        )


def _rows(x: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """The bits of a tensor's rows, a copy where it is not contiguous, and the columns for them, on its device."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.contiguous().view(columns.shape[0], -1).view(bits), columns.to(x.device).to(torch.int64)


def _holds(now: Tensor, then: Tensor, columns: Tensor) -> bool:
    """Whether a tensor has at these columns of its rows what another one has, in its own dtype."""
    bits, places = _rows(now.detach(), columns)
    others, _ = _rows(then.to(now.device, now.dtype), columns)
    return torch.equal(bits.gather(1, places), others.gather(1, places))


def _overwrite(x: Tensor, columns: Tensor, values: Tensor) -> None:
    """Write values, [rows, k], at the columns of a tensor's rows, wherever it is and in its dtype."""
    bits, places = _rows(x, columns)
    bits.scatter_(1, places, values.to(x.device, x.dtype).view(bits.dtype))
    if not x.is_contiguous():
        x.copy_(bits.view(x.dtype).view(x.shape))


def _read_whole(source: Source, name: str) -> Tensor:
    """One tensor of a model, on the CPU."""
    info = find(source, name)
    if info is None:
        raise CheckpointError(
            f"Tensor {name!r} of the experts is missing in {source.ref}; pass the base they come from."
        )
    if isinstance(source, StateDictSource):
        return source.view(info).cpu().view(info.shape)
    values = torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype])
    source.read_into(info, 0, values.view(-1).view(torch.uint8).numpy().data)
    return values


def _weights(given: Mapping[str, float] | str) -> dict[str, float]:
    if isinstance(given, str):
        return {given: 1.0}
    if not isinstance(given, Mapping):
        raise ArgumentTypeError(f"weights must be a mapping from names to numbers, not {type(given).__name__}.")
    return {str(name): finite(f"the weight of {name!r}", weight) for name, weight in given.items()}
