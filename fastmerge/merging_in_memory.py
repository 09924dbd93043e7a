"""Merging state dicts and modules: one result, or several of the same models."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from fastmerge import backends, methods
from fastmerge.engine.device import GPU_MEMORY_SHARE, Device, open_device, place_of
from fastmerge.engine.executor import DictSink, Outcome, execute
from fastmerge.engine.plan import Plan, make_plan
from fastmerge.engine.shared import Shared
from fastmerge.engine.sources import StateDictSource
from fastmerge.errors import ArgumentError, ArgumentTypeError, CheckpointError
from fastmerge.merging_arguments import PLENTY, check_common, dtype_of
from fastmerge.sizes import parse_size


def merge(
    models: Sequence[Mapping[str, torch.Tensor] | torch.nn.Module],
    *,
    base: Mapping[str, torch.Tensor] | torch.nn.Module | None = None,
    method: str = "ties",
    backend: str | None = "auto",
    device: torch.device | str | None = None,
    gpu_memory: str | int | None = None,
    dtype: torch.dtype | str | None = None,
    numerics: str = "fp32",
    seed: int = 0,
    exclude: str | Iterable[str] = (),
    on_nonfinite: str = "error",
    **parameters: Any,
) -> dict[str, torch.Tensor]:
    """Merge models in memory.

    Args:
        models: state dicts (name -> tensor) or modules, all with the same names and shapes. Any strides; float32,
            bfloat16, float16 or float64 (computed in float32), mixed as you like. They are not changed.
        base: what the models were fine-tuned from; most methods need it. linear, karcher and passthrough know none:
            to them it is one model more, the last, with parameters of its own.
        method: a name from `fastmerge.methods.names()`.
        backend: "auto" (the fastest that works), "cuda", "triton", "cpu" or "reference".
        device: where to compute, and where the result is: "cpu", "cuda", "cuda:1"; "auto" for a GPU if one works, else
            the CPU; None for the GPU that any of the tensors is on, else the CPU. Tensors on the CPU are brought to a
            GPU piece by piece.
        gpu_memory: bytes that may be taken of the GPU for that, such as "8GiB", besides the result; None for 80 % of
            what is free.
        dtype: the output's dtype (float32, bfloat16 or float16); None for the base's, tensor by tensor, and for linear
            the one in which the inputs' dtypes meet.
        numerics: "fp32", or "mergekit" to round as mergekit does.
        seed: of the random methods; the same seed drops the same elements whatever the machine.
        exclude: regular expressions; tensors whose name one of them finds are copied from the base (the first model).
        on_nonfinite: "error" where an input holds NaN or Inf, "warn", or "zero" to merge zeros in their place.
        **parameters: the method's, see `fastmerge.methods.describe(method)`: a number, or for those that are per model
            a list with one per model. lambda is written `lambda_`.

    Returns:
        name -> tensor, contiguous, never an alias of an input. Tensors of integers and bools are copied from the base.
        The values are the bits that `merge_checkpoints` writes for the same models.

    Raises:
        ArgumentError, ArgumentTypeError: models that do not fit together, or parameters that the method cannot take.
        MergeError: NaN or Inf in an input; a GPU that fails or runs out of memory.

    Sources: `fastmerge.methods.describe(method)["source"]`.
    """
    chosen = methods.get(method)
    check_common(numerics, seed, on_nonfinite)
    based, sources = _in_memory(base, models)
    merges = Resident([*sources, *([] if based is None else [based])], device, backend, gpu_memory, on_nonfinite)

    def planned(gpu_budget: int | None) -> Plan:
        return merges.plan(
            chosen, based, sources, parameters, gpu_budget, dtype=dtype, numerics=numerics, seed=seed, exclude=exclude
        )

    tensors, outcome = merges.merged(planned, planned(None))
    if outcome.nonfinite and on_nonfinite == "warn":
        warnings.warn(_nonfinite_sentence(outcome), stacklevel=2)
    return tensors


def merge_many(
    models: Sequence[Mapping[str, torch.Tensor] | torch.nn.Module],
    candidates: Iterable[Mapping[str, Any]],
    *,
    base: Mapping[str, torch.Tensor] | torch.nn.Module | None = None,
    method: str = "ties",
    backend: str | None = "auto",
    device: torch.device | str | None = None,
    gpu_memory: str | int | None = None,
    dtype: torch.dtype | str | None = None,
    numerics: str = "fp32",
    seed: int = 0,
    exclude: str | Iterable[str] = (),
    on_nonfinite: str = "error",
    reuse: bool = False,
    **parameters: Any,
) -> Iterator[tuple[dict[str, Any], dict[str, torch.Tensor]]]:
    """Merge the same models in several ways, one after the other, with what these have in common found once.

    Thresholds of all densities are found in one sweep over a tensor, when it is first merged; L1 sums, inner products
    and statistics of whole models, and that no input holds NaN or Inf, are found once, too. What is left of each merge
    is one pass over the models. Beside the models and the result next to nothing is held.

    Args:
        models: as of `merge`; they must stay as they are until the last candidate is merged.
        candidates: of each the parameters, as `merge` takes them: `{"density": 0.3, "weight": [1.0, 0.5]}`. A method
            of its own stands among them as "method".
        base: as of `merge`.
        method: of the candidates that do not name one.
        backend: as of `merge`.
        device: as of `merge`.
        gpu_memory: as of `merge`.
        dtype: as of `merge`.
        numerics: as of `merge`.
        seed: as of `merge`.
        exclude: as of `merge`.
        on_nonfinite: as of `merge`.
        reuse: merge each candidate into the memory of the one before, which saves the time in which the system makes
            fresh memory ready. The tensors that came with a candidate hold its values until the next one is asked for.
        **parameters: what all candidates share; what a candidate says itself goes before.

    Returns:
        An iterator of (candidate, name -> tensor), in the order given. The bits of each are those of `merge` with the
        same parameters. A candidate is merged when it is asked for.

    Raises:
        ArgumentError, ArgumentTypeError: at once, before any tensor is looked at; the message names the candidate.
        MergeError: as of `merge`, from the iterator.

    Sources: `fastmerge.methods.describe(method)["source"]`.
    """
    check_common(numerics, seed, on_nonfinite)
    given = _candidates(candidates)
    based, sources = _in_memory(base, models)
    merges = Resident([*sources, *([] if based is None else [based])], device, backend, gpu_memory, on_nonfinite)

    def planner(index: int, one: dict[str, Any]) -> Callable[[int | None], Plan]:
        def planned(gpu_budget: int | None) -> Plan:
            try:
                chosen = methods.get(one.get("method", method))
                # Of lambda and lambda_ the one that comes last holds, which is the candidate's.
                merged = {name: value for name, value in {**parameters, **one}.items() if name != "method"}
                return merges.plan(
                    chosen, based, sources, merged, gpu_budget,
                    dtype=dtype, numerics=numerics, seed=seed, exclude=exclude,
                )  # fmt: skip
            except ArgumentError as error:
                raise ArgumentError(f"candidates[{index}]: {error}") from None

        return planned

    planners = [planner(index, one) for index, one in enumerate(given)]
    plans = [planned(None) for planned in planners]

    def each() -> Iterator[tuple[dict[str, Any], dict[str, torch.Tensor]]]:
        series = Series(merges, planners, plans, reuse)
        for number, one in enumerate(given):
            tensors, outcome = series.merge(number)
            if outcome.nonfinite and on_nonfinite == "warn":
                warnings.warn(_nonfinite_sentence(outcome), stacklevel=2)
            yield one, tensors
            # Whoever has dropped a result by now needs no memory for two.
            del tensors

    return each()


def _candidates(candidates: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if isinstance(candidates, str | Mapping) or not isinstance(candidates, Iterable):
        raise ArgumentTypeError("candidates must be a list of dicts, each with the parameters of one merge.")
    found = []
    for index, one in enumerate(candidates):
        if not isinstance(one, Mapping) or not all(isinstance(name, str) for name in one):
            raise ArgumentTypeError(f"candidates[{index}] must be a dict of parameters, such as {{'density': 0.3}}.")
        found.append(dict(one))
    if not found:
        raise ArgumentError("candidates is empty; list the parameters of at least one merge.")
    return found


def _in_memory(base: Any, models: Any) -> tuple[StateDictSource | None, list[StateDictSource]]:
    if isinstance(models, Mapping | torch.nn.Module) or not isinstance(models, Sequence):
        raise ArgumentTypeError("models must be a list of state dicts or modules; wrap a single one as [model].")
    sources = [StateDictSource(f"models[{index}]", model) for index, model in enumerate(models)]
    return None if base is None else StateDictSource("base", base), sources


class Resident:
    """Merges of models in memory: where they are computed, and how."""

    def __init__(
        self,
        sources: Sequence[StateDictSource],
        device: torch.device | str | None,
        backend: str | None,
        gpu_memory: str | int | None,
        on_nonfinite: str,
    ) -> None:
        """sources: of all merges."""
        place = None if device is None else place_of(device, backend)
        self.backend = backend
        self.place = _place_together(place, sources)
        backends.resolve(backend, self.place)
        self.elsewhere = any(source.places.keys() - {self.place} for source in sources)
        self.device_name = open_device(self.place).name
        self.budget = None if gpu_memory is None else parse_size(gpu_memory, name="gpu_memory")
        self.on_nonfinite = on_nonfinite

    def plan(
        self,
        method: methods.Method,
        base: StateDictSource | None,
        models: Sequence[StateDictSource],
        parameters: Mapping[str, Any],
        gpu_budget: int | None,
        *,
        dtype: torch.dtype | str | None,
        numerics: str,
        seed: int,
        exclude: str | Iterable[str],
    ) -> Plan:
        """The plan of one merge whose parameters are the same for every tensor."""
        sources = list(models)
        if base is not None and not (method.needs_base or method.takes_base):
            sources.append(base)
            base = None
        if sources:
            method.check_count(len(sources))
        try:
            return make_plan(
                method,
                base,
                sources,
                fixed_parameters(method, parameters, len(sources)),
                budget=PLENTY,
                numerics=numerics,
                seed=seed % (1 << 64),
                out_dtype=dtype_of(dtype),
                exclude=[exclude] if isinstance(exclude, str) else list(exclude),
                backend=self.backend or "auto",
                device=self.device_name,
                gpu_budget=gpu_budget,
            )
        except CheckpointError as error:
            raise ArgumentError(str(error)) from None

    def merged(
        self,
        planned: Callable[[int | None], Plan],
        plan: Plan,
        shared: Shared | None = None,
        again: Mapping[str, torch.Tensor] | None = None,
    ) -> tuple[dict[str, torch.Tensor], Outcome]:
        """Carry a plan out. planned: makes it anew for so many bytes of a GPU. again: tensors to merge over."""
        computer = open_device(self.place)
        sink = _dict_sink(plan, computer, again)
        if computer.stages and self.elsewhere:
            # What the result takes is gone by now.
            plan = planned(self.budget if self.budget is not None else int(GPU_MEMORY_SHARE * computer.free_bytes()))
        outcome = execute(
            plan,
            sink,
            on_nonfinite=self.on_nonfinite,  # type: ignore[arg-type]
            backend=self.backend or "auto",
            device=computer,
            shared=shared,
        )
        return sink.tensors, outcome


class Series:
    """Merges of the same models in memory, each of which is made when it is asked for."""

    def __init__(
        self, where: Resident, planners: Sequence[Callable[[int | None], Plan]], plans: Sequence[Plan], reuse: bool
    ) -> None:
        self._where, self._planners, self._plans, self._reuse = where, planners, plans, reuse
        self._shared = Shared(plans)
        self._last: dict[str, torch.Tensor] | None = None

    def merge(self, number: int) -> tuple[dict[str, torch.Tensor], Outcome]:
        """One of them; with `reuse` in the memory of the one before, whose values are gone then."""
        tensors, outcome = self._where.merged(self._planners[number], self._plans[number], self._shared, self._last)
        if self._reuse:
            self._last = dict(tensors)
        return tensors, outcome


def _place_together(place: torch.device | None, sources: Sequence[StateDictSource]) -> torch.device:
    """Where tensors are merged that may be in several places."""
    elsewhere = {where: (source.ref, name) for source in sources for where, name in source.places.items()}
    gpus = [where for where in elsewhere if where.type != "cpu"]
    if place is None:
        place = gpus[0] if gpus else torch.device("cpu")
    for where in gpus:
        if where != place:
            ref, name = elsewhere[where]
            raise ArgumentError(
                f"{name!r} of {ref} is on {where}, but the merge is on {place}; move it there with .to({str(place)!r})."
            )
    return place


def _dict_sink(plan: Plan, device: Device, again: Mapping[str, torch.Tensor] | None) -> DictSink:
    try:
        return DictSink(plan, device.place, again)
    except RuntimeError as error:
        told = device.explain(error)
        if told is None:
            raise
        raise told from error


def fixed_parameters(method: methods.Method, given: Mapping[str, Any], models: int) -> Any:
    """Resolves keyword arguments: the same values for every tensor."""
    known = methods.parameters(method.name)
    by_python_name = {parameter.python_name: parameter for parameter in known.values()}
    shared: dict[str, Any] = {}
    each: list[dict[str, Any]] = [{} for _ in range(models)]
    for name, value in given.items():
        parameter = by_python_name.get(name) or known.get(name)
        if parameter is None:
            raise ArgumentError(methods.explain_unknown_parameter(name.removesuffix("_"), method.name))
        if isinstance(value, torch.Tensor):
            value = value.tolist()
        if not parameter.per_model:
            shared[parameter.name] = value
            continue
        values = list(value) if isinstance(value, list | tuple) else [value] * models
        if len(values) != models:
            raise ArgumentError(
                f"{name} has {len(values)} values for {models} models; give one number or one per model."
            )
        for mapping, one in zip(each, values, strict=True):
            mapping[parameter.name] = one
    return lambda tensor: (shared, each)


def _nonfinite_sentence(outcome: Outcome) -> str:
    found = [(ref, name, *counts) for ref, tensors in outcome.nonfinite.items() for name, counts in tensors.items()]
    ref, name, nan, inf = found[0]
    more = f" and {len(found) - 1} more tensors" if len(found) > 1 else ""
    return f"NaN or Inf in the inputs: {name!r} of {ref} ({nan} NaN, {inf} Inf){more}."
