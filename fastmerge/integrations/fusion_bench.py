"""fastmerge's methods as algorithms of FusionBench: subclasses of its `BaseAlgorithm`, with a YAML file each.

    fusion_bench "hydra.searchpath=[pkg://fastmerge.integrations.fusion_bench_config]" method=fastmerge/ties ...

Ties, Dare and DareTies take the parameters of FusionBench's own and compute what those do; Pcb and Fr are not in it.
They take a model pool (a BaseModelPool, or a dict of modules with `_pretrained_` among them) and return the pretrained
module, merged.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastmerge import ops
from fastmerge.backends.rule import TIE_BLOCK, SparsifyRule
from fastmerge.errors import ArgumentError, ArgumentTypeError, MergeError, PeerError
from fastmerge.merging import merge

__all__ = ["Dare", "DareTies", "Fr", "Pcb", "Ties"]

try:
    from fusion_bench.method import BaseAlgorithm
    from fusion_bench.mixins import auto_register_config

    _missing: ImportError | None = None
except ImportError as error:
    _missing = error

    class BaseAlgorithm:  # type: ignore[no-redef]
        """Stands in for FusionBench's where that cannot be imported, and says so when it is used."""

        def __init__(self, **kwargs: Any) -> None:
            raise PeerError(f"FusionBench cannot be imported ({_missing}); install it with `pip install fusion-bench`.")

    def auto_register_config(cls: type) -> type:
        """Nothing to register."""
        return cls


_MERGE_FUNCS = {"sum": "none", "mean": "count"}
"""FusionBench's names for what is done with the values that agree, and our divisors."""


# -- model pools -----------------------------------------------------------------------------------------------------


class _Models:
    """What a pool holds: the pretrained module, and the state dicts of all."""

    def __init__(self, modelpool: Any, remove_keys: Iterable[str] = ()) -> None:
        from fusion_bench.compat.modelpool import to_modelpool

        pool = to_modelpool(modelpool)
        self.pretrained: nn.Module = pool.load_pretrained_model()
        self.names = list(pool.model_names)
        self.models = [pool.load_model(name) for name in self.names]
        for name, model in [("_pretrained_", self.pretrained), *zip(self.names, self.models)]:
            if not isinstance(model, nn.Module):
                raise ArgumentTypeError(
                    f"the model {name!r} of the pool is a {type(model).__name__}; fastmerge's algorithms take modules, "
                    "so have the pool load whole models (load_lazy: false)."
                )
        if not self.models:
            raise ArgumentError("the model pool has no models besides the pretrained one; add at least one.")
        removed = set(remove_keys)
        self.base = {name: x for name, x in self.pretrained.state_dict().items() if name not in removed}
        self.states = [self._state(name, model) for name, model in zip(self.names, self.models)]

    def _state(self, name: str, model: nn.Module) -> dict[str, Tensor]:
        state = model.state_dict()
        for key, x in self.base.items():
            if key not in state:
                raise ArgumentError(
                    f"the model {name!r} has no tensor {key!r}, which the pretrained one has; put it into remove_keys."
                )
            if state[key].shape != x.shape:
                raise ArgumentError(
                    f"{key!r} is {list(state[key].shape)} in the model {name!r} and {list(x.shape)} in the pretrained "
                    "one; put it into remove_keys."
                )
            if not x.is_floating_point() and not torch.equal(state[key], x):
                raise ArgumentError(
                    f"{key!r} holds {x.dtype} and differs between the model {name!r} and the pretrained one; put it "
                    "into remove_keys."
                )
        return state

    @property
    def floating(self) -> list[str]:
        """The names of what is merged, in order."""
        return sorted(name for name, x in self.base.items() if x.is_floating_point() and x.numel())

    def check_finite(self) -> None:
        """MergeError where a tensor that is merged holds NaN or Inf."""
        for label, state in [("_pretrained_", self.base), *zip(self.names, self.states)]:
            for name in self.floating:
                if int(ops.count_nonfinite(state[name].detach()).sum()):
                    raise MergeError(f"{name!r} of the model {label!r} holds NaN or Inf; repair it, or leave it out.")

    def finished(self, merged: Mapping[str, Tensor]) -> nn.Module:
        """The pretrained module, holding these tensors."""
        self.pretrained.load_state_dict(dict(merged), strict=False)
        return self.pretrained


# -- the algorithms --------------------------------------------------------------------------------------------------


@auto_register_config
class Ties(BaseAlgorithm):
    """TIES-Merging over the whole model (arXiv 2306.01708), as FusionBench's TiesMergingAlgorithm.

    scaling_factor: what the merged task vector is multiplied by. threshold: how much of each task vector is kept, in
    percent, or a fraction when at most 1: of d elements, those of at least the magnitude of the (int(d * threshold) +
    1)-th largest. remove_keys: names of tensors that stay the pretrained model's. merge_func: "sum" or "mean" of what
    agrees with the elected sign; where task vectors cancel, that is the majority's sign.
    """

    def __init__(
        self,
        scaling_factor: float = 0.3,
        threshold: float = 20,
        remove_keys: Sequence[str] = (),
        merge_func: str = "sum",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.scaling_factor = scaling_factor
        self.threshold = threshold
        self.remove_keys = list(remove_keys)
        self.merge_func = merge_func

    @torch.no_grad()
    def run(self, modelpool: Any) -> nn.Module:
        """Merge the models of a pool into its pretrained one, which is returned.

        Errors: ArgumentError for parameters and models that do not fit, MergeError for NaN or Inf.
        """
        share, divisor = _kept_share(self.threshold), _divisor(self.merge_func)
        models = _Models(modelpool, self.remove_keys)
        models.check_finite()
        deltas = [
            {name: state[name].float() - models.base[name].float() for name in models.floating}
            for state in models.states
        ]
        return models.finished(_ties(models.base, deltas, share, divisor, float(self.scaling_factor)))


@auto_register_config
class Dare(BaseAlgorithm):
    """Task arithmetic with DARE (arXiv 2311.03099), as FusionBench's DareTaskArithmetic but for the random masks.

    scaling_factor: what the sum is multiplied by. sparsity_ratio: the share of elements that is dropped.
    only_on_linear_weights: drop nothing but in the weights of linear layers. rescale: divide by 1 - sparsity_ratio.
    seed: of the masks; None takes one from torch's default generator. A mask depends on the seed, the tensor's name,
    the model's place in the pool and the element's place in the tensor.
    Parameters that need no gradient, and buffers, stay the pretrained model's.
    """

    def __init__(
        self,
        scaling_factor: float = 0.3,
        sparsity_ratio: float = 0.5,
        only_on_linear_weights: bool = False,
        rescale: bool = True,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.scaling_factor = scaling_factor
        self.sparsity_ratio = sparsity_ratio
        self.only_on_linear_weights = only_on_linear_weights
        self.rescale = rescale
        self.seed = seed

    @torch.no_grad()
    def run(self, modelpool: Any) -> nn.Module:
        """As `Ties.run`."""
        density, scale = _drop(self.sparsity_ratio, self.rescale)
        models = _Models(modelpool)
        models.check_finite()
        trained = {
            name for model in models.models for name, parameter in model.named_parameters() if parameter.requires_grad
        }
        names = [name for name in models.floating if name in trained]
        dropped = _droppable(models.pretrained, self.only_on_linear_weights)
        seed = _seed(self.seed)
        merged: dict[str, Tensor] = {}
        factor = float(self.scaling_factor)
        for chosen, method, weight in (
            ([name for name in names if name in dropped], "bernoulli", factor * scale),
            ([name for name in names if name not in dropped], None, factor),
        ):
            if not chosen:
                continue
            results = ops.consensus_merge_many(
                [models.base[name] for name in chosen],
                [[state[name] for name in chosen] for state in models.states],
                weight,
                method=method,
                density=density,
                seed=seed,
                tensor_ids=[ops.tensor_id(name) for name in chosen],
                election="none",
                divisor="none",
            )
            merged.update(zip(chosen, results))
        return models.finished(merged)


@auto_register_config
class DareTies(BaseAlgorithm):
    """DARE, then TIES over the whole model, as FusionBench's DareTiesMerging but for the random masks.

    Parameters: those of `Dare` and `Ties`.
    """

    def __init__(
        self,
        sparsity_ratio: float = 0.5,
        only_on_linear_weights: bool = False,
        rescale: bool = True,
        scaling_factor: float = 0.5,
        threshold: float = 20,
        remove_keys: Sequence[str] = (),
        merge_func: str = "sum",
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.sparsity_ratio = sparsity_ratio
        self.only_on_linear_weights = only_on_linear_weights
        self.rescale = rescale
        self.scaling_factor = scaling_factor
        self.threshold = threshold
        self.remove_keys = list(remove_keys)
        self.merge_func = merge_func
        self.seed = seed

    @torch.no_grad()
    def run(self, modelpool: Any) -> nn.Module:
        """As `Ties.run`."""
        density, scale = _drop(self.sparsity_ratio, self.rescale)
        share, divisor = _kept_share(self.threshold), _divisor(self.merge_func)
        models = _Models(modelpool, self.remove_keys)
        models.check_finite()
        dropped = _droppable(models.pretrained, self.only_on_linear_weights)
        seed = _seed(self.seed)
        deltas: list[dict[str, Tensor]] = []
        for place, state in enumerate(models.states):
            delta = {name: state[name].float() - models.base[name].float() for name in models.floating}
            for name in models.floating:
                if name in dropped:
                    delta[name] = ops.consensus_merge(
                        None, [delta[name]], scale, inputs="deltas", method="bernoulli", density=density, seed=seed,
                        tensor_id=ops.tensor_id(name), model=place, election="none", divisor="none",
                    )  # fmt: skip
            deltas.append(delta)
        return models.finished(_ties(models.base, deltas, share, divisor, float(self.scaling_factor)))


class _Whole(BaseAlgorithm):
    """A method of fastmerge over a pool."""

    method: str
    scaling_factor: float
    remove_keys: Sequence[str]

    def _parameters(self) -> dict[str, Any]:
        raise NotImplementedError

    @torch.no_grad()
    def run(self, modelpool: Any) -> nn.Module:
        """Merge the models of a pool into its pretrained one, which is returned.

        Errors: as for `fastmerge.merge`.
        """
        models = _Models(modelpool, self.remove_keys)
        states = [{name: state[name] for name in models.base} for state in models.states]
        merged = merge(
            states, base=models.base, method=self.method, lambda_=float(self.scaling_factor), **self._parameters()
        )
        return models.finished(merged)


@auto_register_config
class Pcb(_Whole):
    """PCB-Merging (arXiv 2410.02396).

    scaling_factor: the method's lambda. density, variant, scope: see `fastmerge methods pcb`. remove_keys: names of
    tensors that stay the pretrained model's.
    """

    method = "pcb"

    def __init__(
        self,
        scaling_factor: float = 1.0,
        density: float = 0.1,
        variant: str = "vision_es",
        scope: str = "model",
        remove_keys: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.scaling_factor = scaling_factor
        self.density = density
        self.variant = variant
        self.scope = scope
        self.remove_keys = list(remove_keys)

    def _parameters(self) -> dict[str, Any]:
        return {"density": float(self.density), "variant": self.variant, "scope": self.scope}


@auto_register_config
class Fr(_Whole):
    """FR-Merging (arXiv 2411.16815).

    scaling_factor: the method's lambda. ratio, mode, combine, align: see `fastmerge methods fr`. remove_keys: names of
    tensors that stay the pretrained model's. not_filtered: names of tensors that are merged without the filter.
    """

    method = "fr"

    def __init__(
        self,
        scaling_factor: float = 0.7,
        ratio: float | None = None,
        mode: str = "ideal",
        combine: str = "sum",
        align: bool = False,
        remove_keys: Sequence[str] = (),
        not_filtered: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.scaling_factor = scaling_factor
        self.ratio = ratio
        self.mode = mode
        self.combine = combine
        self.align = align
        self.remove_keys = list(remove_keys)
        self.not_filtered = list(not_filtered)

    def _parameters(self) -> dict[str, Any]:
        names = "|".join(f"^{re.escape(name)}$" for name in self.not_filtered)
        parameters = {"mode": self.mode, "combine": self.combine, "align": bool(self.align), "exclude_": names}
        return parameters if self.ratio is None else {**parameters, "ratio": float(self.ratio)}


# -- TIES over a whole model -----------------------------------------------------------------------------------------


def _kept_share(threshold: float) -> float:
    share = float(threshold) / 100 if threshold > 1 else float(threshold)
    if not 0 <= share < 1:
        raise ArgumentError(
            f"threshold={threshold} is out of range; pass percent from above 1 to below 100, or a fraction below 1."
        )
    return share


def _divisor(merge_func: str) -> str:
    if merge_func not in _MERGE_FUNCS:
        raise ArgumentError(f"merge_func={merge_func!r} is not known here; use one of 'sum', 'mean'.")
    return _MERGE_FUNCS[merge_func]


def _drop(sparsity_ratio: float, rescale: bool) -> tuple[float, float]:
    """The share that is kept, and what that is multiplied by."""
    if not 0 <= sparsity_ratio < 1:
        raise ArgumentError(f"sparsity_ratio={sparsity_ratio} is out of range; pass a number from 0 to below 1.")
    density = 1 - float(sparsity_ratio)
    return density, 1 / density if rescale else 1.0


def _droppable(model: nn.Module, only_linear: bool) -> set[str]:
    """Names of the parameters whose task vectors lose elements."""
    if not only_linear:
        return {name for name, _ in model.named_parameters()}
    return {
        f"{name}.weight" if name else "weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


def _seed(seed: int | None) -> int:
    return int(torch.randint(0, 2**63 - 1, ())) if seed is None else int(seed)


def _ties(
    base: Mapping[str, Tensor], deltas: list[dict[str, Tensor]], share: float, divisor: str, scaling: float
) -> dict[str, Tensor]:
    """TIES with thresholds, and the majority's sign, of the whole model.

    base: all its tensors; those that are not floating count as zeros of the task vectors. deltas: float32, by name.
    """
    models, names = len(deltas), list(deltas[0])
    if not names:
        return {}
    total = sum(x.numel() for x in base.values())
    rank = min(int(total * share) + 1, sum(x.numel() for x in deltas[0].values()))
    tensors = {name: [delta[name] for delta in deltas] for name in names}

    def histogram(prefix: Sequence[int]) -> Tensor:
        counts = [ops.key_histogram(None, tensors[name], prefix).cpu() for name in names]
        return torch.stack(counts).sum(dim=0)

    ranks = [rank] * models
    coarse = histogram([-1] * models)
    fine = histogram(ops.prefixes(coarse, ranks))
    bounds = ops.keep_ties(ops.bounds_from_histograms(coarse, fine, fine, [0] * models, ranks))

    def rule(x: Tensor) -> SparsifyRule:
        blocks = max(1, -(-x.numel() // TIE_BLOCK))
        none_before = torch.zeros(models, 2, blocks, dtype=torch.int64, device=x.device)
        return SparsifyRule("band", bounds=bounds.to(x.device), ties_before=none_before)

    majority = 0
    for name in names:
        added = ops.consensus_apply(
            None, tensors[name], [1.0] * models, inputs="deltas", rule=rule(tensors[name][0]), election="none",
            divisor="none",
        )  # fmt: skip
        majority += int(added.sign().sum(dtype=torch.float64))
    return {
        name: ops.consensus_apply(
            base[name], tensors[name], [1.0] * models, inputs="deltas", rule=rule(tensors[name][0]), election="total",
            zero_sign="positive" if majority > 0 else "negative", divisor=divisor, lambda_=scaling,
        )
        for name in names
    }  # fmt: skip
