"""A new LoRA adapter beside others, by PEFT's own `inject_adapter`, which is spared most of its work.

What that costs is Python: several walks over all modules, most of which are the insides of LoRA layers, and three
rounds of initialising, moving and marking for every new matrix. While `spared` is on, plain LoRA layers do not show
their insides to those who walk over the model, and take a new adapter without its numbers, which the merge brings.
The model comes out as it does without this; layers of other kinds are left alone but for random numbers, which the
merge overwrites and which are not drawn.

It holds for the sources whose digests are in `_KNOWN`. With others everything is PEFT's own.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["sources", "spared"]

_KNOWN = {
    "15c43a22bb5720f6": False,  # 0.19.0, 0.19.1
    "361916342c0d4106": False,  # 0.20.0
    "bee7768c7beff2d5": True,  # 0.21.0
    "f6bc57d0ce14401d": True,  # 0.21.1, 0.21.2
}
"""Digests of PEFT's sources as `sources` returns them, and whether that `inject_adapter` gives the parameters that
were there before their `requires_grad` back."""

_PLAIN_INITS = (True, False, "gaussian")
"""Values of `init_lora_weights` that only draw numbers, which the merge overwrites."""

_CONDENSED = 20
"""From so many target modules on, PEFT looks for a shorter list of them, and looks at all names for that."""

_INNER_NAMES = ("base_layer", "lora_dropout", "lora_A", "lora_B", "weight", "bias")
"""Of modules and parameters within a plain layer."""


def sources(owner: type) -> str:
    """A digest of what PEFT's LoraModel does to add an adapter; empty where that cannot be read."""
    from peft.tuners.lora import layer
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
    from peft.utils.other import _freeze_adapter

    parts = (
        owner.__dict__["add_weighted_adapter"],
        owner.__dict__["_create_and_replace"],
        BaseTuner.inject_adapter,
        BaseTuner._mark_only_adapters_as_trainable,
        BaseTuner.set_adapter,
        BaseTunerLayer.set_adapter,
        BaseTunerLayer._move_adapter_to_device_of_base_layer,
        layer.LoraLayer.update_layer,
        layer.Linear.__init__,
        _freeze_adapter,
    )
    if layer.Linear.update_layer is not layer.LoraLayer.update_layer:
        return ""
    try:
        text = "".join(inspect.getsource(part) for part in parts)
    except (OSError, TypeError):
        return ""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextmanager
def spared(model: Any, adapters: Sequence[str], adapter_name: str, digest: str) -> Iterator[list[Any] | None]:
    """While this is on, adding an adapter to a LoraModel is quicker, and draws no random numbers for it.

    adapters: those that are merged; adapter_name: the new one. digest: PEFT's, as `sources` returns it.
    Yields the LoRA layers that there are, where PEFT's sources are known and its walk over all modules can be spared.
    """
    config = model.peft_config.get(adapters[0]) if adapters else None
    if getattr(config, "init_lora_weights", None) not in _PLAIN_INITS:
        yield None
        return
    if digest not in _KNOWN or not _plain_model(model, adapters):
        with _DrawNothing():
            yield None
        return
    changed: list[nn.Module] = []
    before: list[tuple[Tensor, bool]] = []
    variants: list[Any] = []
    try:
        layers = _lora_layers(model.model)
        for name, layer in layers:
            if {"named_modules", "update_layer"} & layer.__dict__.keys():
                continue
            changed.append(layer)
            if _plain_layer(layer) and not _named_within(adapter_name, name, model):
                before.extend((x, x.requires_grad) for x in _insides(layer))
                layer.__dict__["named_modules"] = functools.partial(_without_insides, layer)
                layer.__dict__["update_layer"] = functools.partial(_take, layer, variants)
            else:
                layer.__dict__["update_layer"] = functools.partial(_draw_nothing, layer)
        yield [layer for _, layer in layers]
    finally:
        for layer in changed:
            layer.__dict__.pop("named_modules", None)
            layer.__dict__.pop("update_layer", None)
        if _KNOWN[digest]:
            for x, required in before:
                x.requires_grad = required


# -- what is plain ---------------------------------------------------------------------------------------------------


def _plain_model(model: Any, adapters: Sequence[str]) -> bool:
    """Whether all of its adapters are plain LoRA, and none of PEFT's rarer ways of finding layers is taken."""
    from peft import LoraConfig
    from peft.tuners.lora.model import LoraModel

    if type(model) is not LoraModel or (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    configs: dict[str, Any] = dict(model.peft_config)
    if not all(type(one) is LoraConfig and not one.lora_bias and one.bias == "none" for one in configs.values()):
        return False
    targets = [configs[adapter].target_modules for adapter in adapters if adapter in configs]
    if any(isinstance(target, str) for target in targets):
        return "all-linear" not in targets
    return len(set().union(*(target or () for target in targets))) < _CONDENSED


def _plain_layer(layer: Any) -> bool:
    """Whether it is LoRA of a dense layer, and no more than that."""
    from peft.tuners.lora.layer import Linear

    if type(layer) is not Linear:
        return False
    base = layer.base_layer
    return (
        type(base) is nn.Linear
        and type(base.weight) is nn.Parameter
        and base.weight.is_floating_point()
        and base.weight.device.type in ("cpu", "cuda")
        and not layer.lora_variant
        and not layer.lora_magnitude_vector
        and not hasattr(layer, "lora_arrow")
        and getattr(base, "_hf_tp_plan", None) is None
    )


def _named_within(adapter_name: str, layer: str, model: Any) -> bool:
    """Whether PEFT, which freezes what has the new adapter's name in its own, would find others within this layer."""
    return (
        not adapter_name
        or "." in adapter_name
        or any(adapter_name in name for name in (layer, *_INNER_NAMES, *model.peft_config))
    )


def _lora_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """All LoRA layers with their names, in the order of `named_modules`."""
    from peft.tuners.lora.layer import LoraLayer

    found, left = [], [("", model)]
    seen = set()
    while left:
        name, module = left.pop()
        if module in seen:
            continue
        seen.add(module)
        if isinstance(module, LoraLayer):
            found.append((name, module))
            children = {"base_layer": module._modules.get("base_layer")}
        else:
            children = module._modules
        named = [(f"{name}.{key}" if name else key, child) for key, child in children.items() if child is not None]
        left.extend(reversed(named))
    return found


def _insides(layer: nn.Module) -> Iterator[Tensor]:
    """The parameters of a LoRA layer, without its base layer's."""
    for name, child in layer._modules.items():
        if name != "base_layer" and child is not None:
            yield from (x for x in child._parameters.values() if x is not None)
            yield from _insides(child)


# -- in place of a layer's methods -----------------------------------------------------------------------------------


def _without_insides(
    layer: Any, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules` of a layer that consists of nothing but its base layer."""
    memo = set() if memo is None else memo
    if layer in memo:
        return
    for name, module in ((prefix, layer), (f"{prefix}.base_layer" if prefix else "base_layer", layer.base_layer)):
        if module not in memo:
            if remove_duplicate:
                memo.add(module)
            yield name, module


def _take(
    layer: Any, variants: list[Any], adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any
) -> None:
    """`update_layer` of a plain layer: everything but numbers, and but what `inject_adapter` sets once more at its end.

    New matrices are on the base layer's device and of its dtype, where PEFT's own has moved them. variants: what the
    first plain layer made of the configuration, which holds for all.
    """
    if not variants:
        variants.append(layer.resolve_lora_variant(config=config))
    if r <= 0 or kwargs.get("tied_adapter") or variants[0] is not None:
        with _DrawNothing():
            type(layer).update_layer(layer, adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
        return
    weight = layer.base_layer.weight
    layer.r[adapter_name] = r
    layer.lora_alpha[adapter_name] = lora_alpha
    layer.lora_dropout[adapter_name] = nn.Dropout(p=config.lora_dropout) if config.lora_dropout > 0.0 else nn.Identity()
    layer.lora_A[adapter_name] = _linear(layer.in_features, r, weight)
    layer.lora_B[adapter_name] = _linear(r, layer.out_features, weight)
    layer.lora_bias[adapter_name] = config.lora_bias
    layer.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
    layer.use_rslora[adapter_name] = config.use_rslora
    layer.use_dora[adapter_name] = config.use_dora


def _linear(inputs: int, outputs: int, like: Tensor) -> nn.Linear:
    """A dense layer without bias whose weight has no elements yet: the merge hands it all of them."""
    dense = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(dense)
    dense.in_features = inputs
    dense.out_features = outputs
    dense.weight = nn.Parameter(torch.empty(0, 0, dtype=like.dtype, device=like.device))
    dense.register_parameter("bias", None)
    return dense


def _draw_nothing(layer: Any, *args: Any, **kwargs: Any) -> None:
    """A layer's own `update_layer`, without random numbers."""
    with _DrawNothing():
        type(layer).update_layer(layer, *args, **kwargs)


class _DrawNothing(TorchFunctionMode):
    """Zeros instead of random numbers where a new adapter is initialised: in this thread, while it is on."""

    _DRAWING: tuple[Callable[..., Any], ...] = (
        Tensor.uniform_,
        Tensor.normal_,
        nn.init.kaiming_uniform_,
        nn.init.normal_,
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self._DRAWING:
            with torch.no_grad():
                return (args[0] if args else kwargs["tensor"]).zero_()
        if func is torch.randn and "generator" not in kwargs:
            return torch.zeros(*args, **kwargs)
        return func(*args, **kwargs)
