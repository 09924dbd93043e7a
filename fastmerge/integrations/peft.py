"""fastmerge inside PEFT: `add_weighted_adapter` with fastmerge's kernels, and without SVDs of whole matrices.

    import fastmerge.integrations.peft
    fastmerge.integrations.peft.enable()
    model.add_weighted_adapter(["a", "b", "c"], [1.0, 1.0, 1.0], "merged", combination_type="ties", density=0.2)

PEFT's own method still does the bookkeeping. While it runs, the two methods that merge one layer are ours: they hand
out empty tensors and note what belongs into them, and all layers are merged together at the end. Whatever is not taken
(see `_taken`) goes to PEFT's own methods.

Formulas: TIES (arXiv 2306.01708) and DARE (2311.03099) as PEFT writes them, `merge_utils.py`; docs/peers.md has what
differs in numbers.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import threading
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastmerge import backends, ops
from fastmerge.errors import ArgumentError, PeerError
from fastmerge.integrations import low_rank, peft_injection

__all__ = ["disable", "enable", "enabled"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of adapters that the kernels take."""

_SCALED_TWICE = {"0.19": True, "0.20": True, "0.21": False}
"""The versions that are known, and whether their SVD routes multiply by an adapter's scaling once more than is due."""

_SEAM = {
    "add_weighted_adapter": (
        "self adapters weights adapter_name combination_type svd_rank svd_clamp svd_full_matrices svd_driver density "
        "majority_sign_method"
    ),
    "_svd_generalized_task_arithmetic_weighted_adapter": (
        "self combination_type adapters weights new_rank target target_lora_A target_lora_B density "
        "majority_sign_method clamp full_matrices driver"
    ),
    "_generalized_task_arithmetic_weighted_adapter": (
        "self combination_type adapters weights target density majority_sign_method"
    ),
}
"""The methods of PEFT's LoraModel that are replaced, with the parameters that they must have."""

_WHOLE, _SVD, _FACTORS = _SEAM


class _Form(NamedTuple):
    """A combination type in our words. pruning: how a delta is sparsified; elects: whether a sign is elected."""

    pruning: str | None
    elects: bool


_FORMS = {
    "ties": _Form("magnitude", True),
    "magnitude_prune": _Form("magnitude", False),
    "dare_ties": _Form("bernoulli", True),
    "dare_linear": _Form("bernoulli", False),
}
_SVD_FORMS = {"svd": _Form(None, False), **{f"{name}_svd": form for name, form in _FORMS.items()}}


# -- on and off ------------------------------------------------------------------------------------------------------


class _Patch(NamedTuple):
    """What `enable` replaced: the class, the functions that were there and ours."""

    owner: type
    before: dict[str, Any]
    ours: dict[str, Any]


_patch: _Patch | None = None


def enable(*, seed: int | None = None, backend: str = "auto") -> None:
    """Let PEFT's `LoraModel.add_weighted_adapter` compute with fastmerge, in this process, until `disable`.

    seed: of the random masks of the DARE forms; None draws one from torch's default generator at each call, so that
        `torch.manual_seed` decides. A mask depends on the seed, on the layer's name, on the adapter's position and on
        the element's place in its tensor.
    backend: as for the ops.
    Enabling again changes seed and backend.
    Errors: PeerError where PEFT is missing, has a version that is not known (0.19 to 0.21 are), or has other methods
        than those; BackendError where the backend is not to be had.
    """
    global _patch
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise ArgumentError(f"seed must be an integer or None, not {seed!r}.")
    if backend != "auto":
        backends.resolve(backend, torch.device("cuda" if backend in ("cuda", "triton") else "cpu"))
    owner, twice = _known_peft()
    if _patch is not None:
        disable()
    before = {name: owner.__dict__[name] for name in _SEAM}
    for name, expected in _SEAM.items():
        found = " ".join(inspect.signature(before[name]).parameters)
        if found != expected:
            raise PeerError(
                f"PEFT's LoraModel.{name} takes ({found.replace(' ', ', ')}), which fastmerge does not know; install "
                "an unmodified peft 0.19 to 0.21, or merge without fastmerge.integrations.peft."
            )
    ours = _methods(before, _Settings(seed, backend, twice, peft_injection.sources(owner)))
    for name, function in ours.items():
        setattr(owner, name, function)
    _patch = _Patch(owner, before, ours)


def disable() -> None:
    """Give PEFT its own methods back, the very objects; nothing where `enable` was not called.

    Errors: PeerError where somebody else has replaced them since.
    """
    global _patch
    if _patch is None:
        return
    for name, function in _patch.ours.items():
        if _patch.owner.__dict__.get(name) is not function:
            raise PeerError(
                f"PEFT's LoraModel.{name} was replaced after fastmerge was enabled; undo that first, then call disable."
            )
    for name, function in _patch.before.items():
        setattr(_patch.owner, name, function)
    _patch = None


def enabled() -> bool:
    """Whether PEFT computes with fastmerge now."""
    return _patch is not None


def _known_peft() -> tuple[type, bool]:
    """PEFT's LoraModel, and whether its SVD routes scale twice."""
    try:
        import peft
        from peft.tuners.lora.model import LoraModel
    except ImportError as error:
        raise PeerError(f"PEFT cannot be imported ({error}); install it with `pip install peft`.") from error
    version = str(peft.__version__)
    release = ".".join(version.split(".")[:2])
    if release not in _SCALED_TWICE:
        raise PeerError(
            f"peft {version} is not a version that fastmerge knows ({', '.join(_SCALED_TWICE)}); install one of these, "
            "or merge without fastmerge.integrations.peft."
        )
    return LoraModel, _SCALED_TWICE[release]


class _Settings(NamedTuple):
    """seed, backend: as given to `enable`. scaled_twice: see `_SCALED_TWICE`. sources: PEFT's, see `peft_injection`."""

    seed: int | None
    backend: str
    scaled_twice: bool
    sources: str


# -- one call --------------------------------------------------------------------------------------------------------


class _Merge(NamedTuple):
    """One tensor to be merged later. again: PEFT's own result for it, where an input turns out not to be finite."""

    tensors: list[Tensor]
    weights: tuple[float, ...]
    name: Callable[[], str]
    out: Tensor
    again: Callable[[], Tensor]


class _Call:
    """One call of `add_weighted_adapter`, or of a method beneath it by somebody else."""

    def __init__(self, model: nn.Module, settings: _Settings, form: _Form | None, density: Any, election: Any) -> None:
        self.settings = settings
        self.form = form
        self.density = density
        self.election = election
        self.pending: list[_Merge] = []
        self._model = model
        self._finite = _finite

    @functools.cached_property
    def seed(self) -> int:
        """Of this call's random masks."""
        if self.settings.seed is not None:
            return self.settings.seed
        return int(torch.randint(0, 2**63 - 1, ()))

    @functools.cached_property
    def _names(self) -> dict[int, str]:
        model = getattr(self._model, "model", self._model)
        return {id(module): name for name, module in model.named_modules()}

    def name(self, target: nn.Module) -> str:
        """What a layer is called in its model."""
        return self._names.get(id(target), "")

    def formula(self, form: _Form, weights: Sequence[float], numel: int) -> dict[str, Any]:
        """The arguments of `ops.consensus_merge` for a tensor of so many elements."""
        density, method = min(1.0, float(self.density)) if form.pruning else 1.0, form.pruning
        scale = 1.0
        if method is not None and density >= 1:
            method = None
        elif method == "bernoulli":
            scale = 1 / density
        elif int(density * numel) == 0:
            density = 0.0
        return {
            "weights": [weight * scale for weight in weights],
            "inputs": "deltas",
            "method": method,
            "density": density,
            "election": self.election if form.elects else "none",
            "divisor": "count" if form.elects else "none",
            "backend": self.settings.backend,
            **({"seed": self.seed} if method == "bernoulli" else {}),
        }

    def look_ahead(self, layers: Sequence[Any], adapters: Sequence[str]) -> None:
        """Begin to look for NaN and Inf in the adapters of these layers, which will be merged."""
        tensors = [x for layer in layers for adapter in adapters for x in _factors(layer, adapter) or ()]
        if tensors and all(x.device.type == "cpu" and x.dtype in _DTYPES for x in tensors):
            self._finite = _Beforehand(tensors).finite

    def add(self, merge: _Merge) -> None:
        """Note a tensor to be merged."""
        self.pending.append(merge)

    def finish(self) -> None:
        """Merge what is pending, together where it can be."""
        assert self.form is not None or not self.pending
        pending, self.pending = self.pending, []
        groups: dict[Any, list[_Merge]] = defaultdict(list)
        for merge, finite in zip(pending, self._finite([merge.tensors for merge in pending])):
            if not finite:
                merge.out.copy_(merge.again())
                continue
            assert self.form is not None
            formula = self.formula(self.form, merge.weights, merge.out.numel())
            key = (merge.out.device, merge.out.dtype, merge.weights, formula["density"])
            groups[key].append(merge)
        for group in groups.values():
            assert self.form is not None
            formula = self.formula(self.form, group[0].weights, group[0].out.numel())
            if formula["method"] == "bernoulli":
                formula["tensor_ids"] = [ops.tensor_id(merge.name()) for merge in group]
            by_model = [list(one) for one in zip(*(merge.tensors for merge in group))]
            ops.consensus_merge_many(None, by_model, out=[merge.out for merge in group], **formula)


def _finite(groups: Sequence[Sequence[Tensor]]) -> list[bool]:
    """For each group whether none of its tensors holds NaN or Inf; "no" where squares leave float32, too."""
    if not groups:
        return []
    norms = _norms([x for group in groups for x in group])
    return [bool(part.isfinite().all()) for part in norms.split([len(group) for group in groups])]


def _norms(tensors: Sequence[Tensor]) -> Tensor:
    """A number of each tensor that is finite only if all of its elements are: on the CPU, float32."""
    by_kind: dict[Any, list[int]] = defaultdict(list)
    for i, x in enumerate(tensors):
        by_kind[x.device, x.dtype].append(i)
    norms = torch.empty(len(tensors))
    for places in by_kind.values():
        found = torch._foreach_norm([tensors[i] for i in places], 2, dtype=torch.float32)
        norms[places] = torch.stack(list(found)).cpu()
    return norms


class _Beforehand(threading.Thread):
    """Looks for NaN and Inf while PEFT's bookkeeping, which is Python, is under way."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__(name="fastmerge-finite", daemon=True)
        self._tensors = tensors
        self._found: dict[Any, float] = {}
        self.start()

    def run(self) -> None:
        norms = _norms(self._tensors).tolist()
        self._found = dict(zip(map(_place, self._tensors), norms))

    def finite(self, groups: Sequence[Sequence[Tensor]]) -> list[bool]:
        """As `_finite`."""
        self.join()
        found = self._found
        places = [[_place(x) for x in group] for group in groups]
        if not all(place in found for group in places for place in group):
            return _finite(groups)
        return [all(math.isfinite(found[place]) for place in group) for group in places]


def _place(x: Tensor) -> tuple[Any, ...]:
    """Where a tensor's elements lie in memory."""
    return x.data_ptr(), x.shape, x.stride(), x.dtype


_running = threading.local()


@contextmanager
def _call(call: _Call) -> Iterator[_Call]:
    """Make this the call that methods beneath add to."""
    before = getattr(_running, "call", None)
    _running.call = call
    try:
        yield call
        call.finish()
    finally:
        _running.call = before


# -- what is taken ---------------------------------------------------------------------------------------------------


def _taken(form: _Form | None, weights: Any, density: Any, election: Any) -> bool:
    """Whether these arguments are ones that we merge by; PEFT's own methods know what to say to all others."""
    if form is None or not isinstance(weights, Sequence) or isinstance(weights, str):
        return False
    if not all(isinstance(w, int | float) and math.isfinite(w) for w in weights):
        return False
    if form.elects and election not in ("total", "frequency"):
        return False
    if form.pruning is None:
        return True
    if not isinstance(density, int | float) or not math.isfinite(density) or density < 0:
        return False
    return density > 0 or form.pruning != "bernoulli"  # a mask of nothing is divided by 0 there


def _tensors_taken(tensors: Sequence[Tensor], one_shape: bool = True) -> bool:
    """Whether they are ones that the kernels work on, of one dtype, device and, unless it does not matter, shape."""
    first = tensors[0]
    return (
        first.dtype in _DTYPES
        and first.device.type in ("cpu", "cuda")
        and all(
            type(x) in (Tensor, nn.Parameter)
            and (x.shape == first.shape or not one_shape)
            and x.dtype == first.dtype
            and x.device == first.device
            for x in tensors
        )
    )


def _factors(target: Any, adapter: str) -> tuple[Tensor, Tensor] | None:
    """A and B of an adapter in a layer, as they are stored; None where it has none."""
    if adapter in target.lora_A:
        return target.lora_A[adapter].weight.data, target.lora_B[adapter].weight.data
    if adapter in target.lora_embedding_A:
        return target.lora_embedding_A[adapter].data, target.lora_embedding_B[adapter].data
    return None


def _present(target: Any, adapters: Sequence[str], weights: Sequence[float]) -> list[tuple[str, float, Tensor, Tensor]]:
    """The adapters that a layer has: name, weight, A and B."""
    found = []
    for adapter, weight in zip(adapters, weights):
        factors = _factors(target, adapter)
        if factors is not None:
            found.append((adapter, weight, *factors))
    return found


def _warn_about(density: Any, form: _Form) -> None:
    if form.pruning is not None and density >= 1:
        warnings.warn(f"The density {density} is at least 1: no values are pruned.", stacklevel=4)


# -- the methods -----------------------------------------------------------------------------------------------------


def _methods(before: dict[str, Any], settings: _Settings) -> dict[str, Any]:
    """Our three methods, around PEFT's."""
    whole, factors, svd = before[_WHOLE], before[_FACTORS], before[_SVD]
    signature = inspect.signature(whole)

    @functools.wraps(whole)
    def add_weighted_adapter(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            given = signature.bind(self, *args, **kwargs)
        except TypeError:
            return whole(self, *args, **kwargs)
        given.apply_defaults()
        values = {name: value for name, value in given.arguments.items() if name != "self"}
        kind, density, election = (values[n] for n in ("combination_type", "density", "majority_sign_method"))
        form = _FORMS.get(kind) or _SVD_FORMS.get(kind)
        if not _taken(form, values["weights"], density, election):
            return whole(self, *args, **kwargs)
        assert form is not None
        _warn_about(density, form)
        known = set(self.peft_config)
        try:
            new = _Call(self, settings, form, density, election)
            quickly = peft_injection.spared(self, values["adapters"], values["adapter_name"], settings.sources)
            with _call(new), quickly as layers:
                if layers is None:
                    whole(self, *args, **kwargs)
                else:
                    _added(self, new, layers, **values)
        except BaseException:
            # Its tensors may not have been written: nobody shall take them for an adapter.
            if values["adapter_name"] in set(self.peft_config) - known:
                self.delete_adapter(values["adapter_name"])
            raise

    @functools.wraps(factors)
    def merge_factors(
        self: Any, combination_type: Any, adapters: Any, weights: Any, target: Any, density: Any, election: Any
    ) -> Any:
        arguments = (combination_type, adapters, weights, target, density, election)
        form = _FORMS.get(combination_type)
        if not _taken(form, weights, density, election):
            return factors(self, *arguments)
        present = _present(target, adapters, weights)
        lists = [[a for _, _, a, _ in present], [b for _, _, _, b in present]]
        if not present or not all(map(_tensors_taken, lists)):
            return factors(self, *arguments)
        results: list[Tensor] = []
        with _joined(_Call(self, settings, form, density, election)) as call:
            scaled = [weight * target.scaling[adapter] for adapter, weight, _, _ in present]
            roots = [math.sqrt(abs(weight)) for weight in scaled]
            signed = tuple(math.copysign(root, weight) if root else 0.0 for root, weight in zip(roots, scaled))
            for side, (letter, tensors, by) in enumerate(zip("AB", lists, (signed, tuple(roots)))):
                out = torch.empty(tensors[0].shape, dtype=tensors[0].dtype, device=tensors[0].device)
                again = functools.partial(lambda side: factors(self, *arguments)[side], side)
                name = functools.partial(lambda letter: f"{call.name(target)}.lora_{letter}", letter)
                call.add(_Merge(tensors, by, name, out, again))
                results.append(out)
        return results

    @functools.wraps(svd)
    def merge_by_svd(
        self: Any,
        combination_type: Any,
        adapters: Any,
        weights: Any,
        new_rank: Any,
        target: Any,
        target_a: Any,
        target_b: Any,
        density: Any,
        election: Any,
        clamp: Any = None,
        full_matrices: Any = True,
        driver: Any = None,
    ) -> Any:
        form = _SVD_FORMS.get(combination_type)
        result = None
        # Clamping is by a quantile of signed entries, and the signs are as the SVD throws them; a driver is a wish.
        if clamp is None and driver is None and _taken(form, weights, density, election):
            present = _present(target, adapters, weights)
            assert form is not None
            stored = [x for _, _, a, b in present for x in (a, b)]
            if present and _tensors_taken(stored, one_shape=False) and _all_finite(present):
                call = getattr(_running, "call", None) or _Call(self, settings, form, density, election)
                result = _decomposed(call, form, present, new_rank, target, target_a, target_b)
        if result is not None:
            return result
        return svd(
            self, combination_type, adapters, weights, new_rank, target, target_a, target_b, density, election,
            clamp, full_matrices=full_matrices, driver=driver,
        )  # fmt: skip

    return {_WHOLE: add_weighted_adapter, _SVD: merge_by_svd, _FACTORS: merge_factors}


def _added(
    model: Any,
    call: _Call,
    layers: Sequence[Any],
    *,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str,
    svd_rank: int | None,
    svd_clamp: float | None,
    svd_full_matrices: bool,
    svd_driver: str | None,
    density: float | None,
    majority_sign_method: str,
) -> None:
    """`add_weighted_adapter` of a model whose LoRA layers are known: what PEFT's does, without a walk to find them."""
    from peft.utils.other import _freeze_adapter

    if adapter_name in model.peft_config:
        return
    kind, rank, targets = model._check_add_weighted_adapter(
        adapters=adapters, combination_type=combination_type, svd_rank=svd_rank
    )
    model.peft_config[adapter_name] = dataclasses.replace(
        model.peft_config[adapters[0]],
        r=rank,
        lora_alpha=rank,
        target_modules=targets,
        alpha_pattern={},
        rank_pattern={},
    )
    if kind in _FORMS:
        call.look_ahead(layers, adapters)
    model.inject_adapter(model.model, adapter_name)
    _freeze_adapter(model.model, adapter_name)
    for layer in layers:
        if adapter_name in layer.lora_A:
            a, b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
        elif adapter_name in layer.lora_embedding_A:
            a, b = layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name]
        else:
            continue
        if kind in _SVD_FORMS:
            a.data, b.data = getattr(model, _SVD)(
                kind, adapters, weights, rank, layer, a, b, density, majority_sign_method, svd_clamp,
                full_matrices=svd_full_matrices, driver=svd_driver,
            )  # fmt: skip
        else:
            a.data, b.data = getattr(model, _FACTORS)(kind, adapters, weights, layer, density, majority_sign_method)


@contextmanager
def _joined(new: _Call) -> Iterator[_Call]:
    """The call that is running, or a new one that is finished at once."""
    running = getattr(_running, "call", None)
    if running is not None:
        yield running
        return
    with _call(new) as call:
        yield call


# -- by singular values ----------------------------------------------------------------------------------------------


def _all_finite(present: Sequence[tuple[str, float, Tensor, Tensor]]) -> bool:
    return all(_finite([[a, b] for _, _, a, b in present]))


def _decomposed(
    call: _Call,
    form: _Form,
    present: Sequence[tuple[str, float, Tensor, Tensor]],
    rank: int,
    target: Any,
    target_a: Tensor,
    target_b: Tensor,
) -> tuple[Tensor, Tensor] | None:
    """A and B of the merged adapter: the largest singular triplets of the merged delta. None: left to PEFT."""
    from peft.tuners.lora.layer import Conv2d, Embedding, Linear

    again = [target.scaling[adapter] if call.settings.scaled_twice else 1.0 for adapter, _, _, _ in present]
    weights = [weight * scale for (_, weight, _, _), scale in zip(present, again)]
    convolves = isinstance(target, Conv2d)
    by_factors = type(target).get_delta_weight in (Linear.get_delta_weight, Embedding.get_delta_weight)
    with torch.no_grad():
        if form.pruning is None and by_factors:
            a, b = present[0][2:]
            if rank > min(b.shape[0], a.shape[1]):
                return None
            scaled = [b.float() * (w * target.scaling[name]) for (name, _, _, b), w in zip(present, weights)]
            u, s, vh = low_rank.of_products(scaled, [a for _, _, a, _ in present], rank)
        else:
            deltas = [target.get_delta_weight(adapter).detach() for adapter, _, _, _ in present]
            if not _tensors_taken(deltas):
                return None
            formula = call.formula(form, weights, deltas[0].numel())
            if formula["method"] == "bernoulli":
                formula["tensor_id"] = ops.tensor_id(call.name(target))
            merged = ops.consensus_merge(None, deltas, out_dtype=torch.float32, **formula)
            del deltas
            if convolves:
                merged = merged.flatten(start_dim=1)
            embeds = any(adapter in target.lora_embedding_A for adapter, _, _, _ in present)
            if getattr(target, "fan_in_fan_out", False) or embeds:
                merged = merged.T
            if merged.dim() != 2 or rank > min(merged.shape) or not all(_finite([[merged]])):
                return None
            u, s, vh = low_rank.of_matrix(merged, rank)
        u = u * s
    if convolves:
        return vh.reshape(target_a.shape), u.reshape(target_b.shape)
    return vh.contiguous(), u.contiguous()
