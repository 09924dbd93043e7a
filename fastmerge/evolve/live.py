"""The live model: the one set of tensors in which every trial is evaluated, alone or as a module's parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmerge.errors import ArgumentError, ArgumentTypeError
from fastmerge.evolve.members import Members


def subject(model: torch.nn.Module | None, state: dict[str, Tensor]) -> Any:
    """What an evaluator gets of a merge: the module with its values, or the merge itself where there is no module.

    Raises ArgumentError: the module is of another architecture.
    """
    if model is None:
        return state
    result = model.load_state_dict(state, strict=False)
    own = model.state_dict()
    written = {own[name].data_ptr() for name in state if name in own}
    left = [name for name in result.missing_keys if own[name].data_ptr() not in written]
    if result.unexpected_keys or left:
        name, where = (result.unexpected_keys[0], "model") if result.unexpected_keys else (left[0], "merge")
        raise ArgumentError(f"the {where} has no tensor {name!r}: the module and the merge are of two architectures.")
    return model


class Live:
    """What is evaluated. model: a module whose parameters take the trials' values; None makes a dict of tensors.

    tensors: by the members' names, those that a trial is written to. subject: what the evaluator gets: the module, or
    the dict.
    """

    def __init__(self, members: Members, model: torch.nn.Module | None) -> None:
        if model is None:
            self.tensors = {
                name: torch.empty_like(tensor)
                for name, tensor in members.tensors[0].items()
                if name not in members.aliases
            }
            whole = self.tensors | {name: self.tensors[home] for name, home in members.aliases.items()}
            self.subject: Any = {name: whole[name] for name in members.infos}
            return
        if not isinstance(model, torch.nn.Module):
            raise ArgumentTypeError(f"model must be a torch.nn.Module, or None, not {type(model).__name__}.")
        inputs = {t.data_ptr() for tensors in members.tensors for t in tensors.values() if t.numel()}
        own = {name: tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items()}
        self.subject = model
        self.tensors = {}
        written: dict[int, str] = {}
        for name, info in members.infos.items():
            tensor = own.get(name)
            if tensor is None:
                if name in members.aliases:
                    continue
                raise ArgumentError(
                    f"the model has no tensor {name!r}, which the members have; pass members of its architecture."
                )
            if tuple(tensor.shape) != info.shape:
                raise ArgumentError(
                    f"{name!r} has the shape {list(tensor.shape)} in the model and {list(info.shape)} in the members."
                )
            if name in members.aliases:
                if tensor.data_ptr() != own[members.aliases[name]].data_ptr():
                    raise ArgumentError(
                        f"{name!r} and {members.aliases[name]!r} are one parameter in the members, but two in the "
                        "model; tie them there, too."
                    )
                continue
            if tensor.numel() and written.setdefault(tensor.data_ptr(), name) != name:
                raise ArgumentError(
                    f"{written[tensor.data_ptr()]!r} and {name!r} are one parameter in the model, but two in the "
                    "members; pass members that tie them."
                )
            if tensor.data_ptr() in inputs:
                raise ArgumentError(
                    f"{name!r} of the model is the memory of one of the members, which must stay as they are; pass a "
                    "copy of the module (copy.deepcopy) as model."
                )
            self.tensors[name] = tensor
        held = set(written)
        for name, tensor in own.items():
            if name not in members.infos and tensor.numel() and tensor.data_ptr() not in held:
                raise ArgumentError(f"the model has the tensor {name!r}, which the members lack; pass whole members.")
