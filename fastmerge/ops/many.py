"""Consensus merging of many tensors at once: on a GPU each step is one launch for all of them, whatever their sizes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import attrgetter, eq
from types import ModuleType
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from .. import backends
from ..backends.lists import Lists, copied, numbers
from ..backends.rule import SparsifyRule
from ..errors import ArgumentError, ArgumentTypeError
from . import _checks, consensus, select
from ._library import define, signed64, unsigned64
from .consensus import consensus_merge, total_divisor

_TOGETHER = (None, "magnitude", "magnitude_outliers", "bernoulli")
"""The methods whose rules serve many tensors at once; rows are ranked tensor by tensor."""


_SHAPE = attrgetter("shape")


# -- the merge -------------------------------------------------------------------------------------------------------


class _Formula(NamedTuple):
    """What is the same for all tensors of a merge, in the order of the op's schema; see `consensus_merge`.

    method: "none" keeps everything. keep_ties: a group of equal magnitudes is not cut.
    """

    weights: list[float]
    inputs: str
    method: str
    density: list[float]
    gamma: list[float]
    keep_ties: bool
    seed: int
    positions: list[int]
    election: str
    zero_sign: str
    divisor: str
    lambda_: float

    def check(self, models: int) -> None:
        """What the kernels rely on whoever calls the op."""
        for name in ("weights", "density", "gamma", "positions"):
            _checks.one_per_model(name, getattr(self, name), models)
        _checks.choice("inputs", self.inputs, consensus.INPUTS)
        _checks.choice("method", self.method, ("none", *_TOGETHER[1:]))
        _checks.choice("election", self.election, consensus.ELECTIONS)
        _checks.choice("zero_sign", self.zero_sign, consensus.ZERO_SIGNS)
        _checks.choice("divisor", self.divisor, consensus.DIVISORS)

    @property
    def gammas(self) -> list[float | None]:
        """Those that `select.rank_range` takes."""
        return [gamma if self.method == "magnitude_outliers" else None for gamma in self.gamma]

    def rule(self, tensor_id: int = 0, bounds: Tensor | None = None, ties_before: Tensor | None = None) -> SparsifyRule:
        """Of each tensor with this number."""
        if bounds is not None:
            if self.keep_ties:
                bounds = select.keep_ties(bounds.view(-1, 2, 2)).view_as(bounds)
            return SparsifyRule("band", bounds=bounds, ties_before=ties_before)
        if self.method != "bernoulli":
            return SparsifyRule()
        seed = unsigned64(self.seed)
        return SparsifyRule("bernoulli", density=self.density, seed=seed, tensor_id=tensor_id, positions=self.positions)


def _merge(lists: Lists, formula: _Formula, backend: str) -> None:
    """Merge lists that have been checked into their results."""
    module = backends.resolve(backend, lists.device)
    options: dict[str, Any] = {
        "inputs": formula.inputs,
        "scales": [1.0] * len(lists.models),
        "election": formula.election,
        "zero_sign": formula.zero_sign,
        "divisor": formula.divisor,
        "divisor_value": total_divisor(formula.weights) if formula.divisor == "weights" else 1.0,
        "lambda_": formula.lambda_,
        "compute": torch.float32,
    }
    if hasattr(module, "consensus_apply_many") and lists.uniform:
        rule = formula.rule(0, *_bounds(lists, formula, module))
        module.consensus_apply_many(lists, formula.weights, rule=rule, **options)
    else:
        _one_by_one(lists, formula, module, options)


def _bounds(lists: Lists, formula: _Formula, module: ModuleType) -> tuple[Tensor, Tensor] | tuple[()]:
    """The rank bounds of every tensor of every model; nothing where ranks do not matter."""
    if formula.method in ("none", "bernoulli"):
        return ()
    # What is kept for the next merge is worked out on the GPU, without a copy that a graph could not capture.
    lengths = lists.once("lengths", lambda: copied(lists.lengths, lists.device) if lists.kept else lists.lengths)
    ranks = select.rank_ranges(lengths, formula.density, formula.gammas)
    inside = [
        cuts
        for d, g in zip(formula.density, formula.gammas)
        for cuts in (d < 1 and g is not None, d < 1 and (g is not None or d > 0))
    ]
    bounds, ties_before = module.magnitude_bounds_many(
        lists, ranks, inside, torch.float32, subtract=lists.base is not None and formula.inputs == "models"
    )
    return bounds, ties_before


def _one_by_one(lists: Lists, formula: _Formula, module: ModuleType, options: dict[str, Any]) -> None:
    assert lists.out is not None
    ranked = formula.method not in ("none", "bernoulli")
    for t, target in enumerate(lists.out):
        base = None if lists.base is None else lists.base[t]
        tensors = [model[t] for model in lists.models]
        bounds: tuple[Tensor, Tensor] | tuple[()] = ()
        if ranked:
            ranges = [
                select.rank_range(target.numel(), d, g) for d, g in zip(formula.density, formula.gammas, strict=True)
            ]
            bounds = module.magnitude_bounds(
                base if formula.inputs == "models" else None,
                tensors,
                [first for first, _ in ranges],
                [last for _, last in ranges],
                torch.float32,
            )
        rule = formula.rule(lists.tensor_ids[t], *bounds)
        module.consensus_apply(base, tensors, formula.weights, rule=rule, out=target, **options)


# -- what may be merged together -------------------------------------------------------------------------------------


def _checked(base: list[Tensor], models: list[list[Tensor]], out: list[Tensor], ids: Sequence[int]) -> Lists:
    """Lists that kernels may take: all tensors are looked at together, and one by one only where something is wrong."""
    # Shapes are compared as they are read: thousands of new tuples would have the garbage collector look at everything.
    everything = [*base, *chain.from_iterable(models), *out]
    shapes = [x.shape for x in models[0]]
    others = [*models[1:], out, *([base] if base else [])]
    devices = {x.device for x in everything}
    dense = [x.is_contiguous() for x in everything]
    lists = Lists(base or None, models, out, ids)
    if (
        len(ids) != len(shapes)
        or len(devices) != 1
        or not {device.type for device in devices} <= set(_checks.DEVICES)
        or not set().union(*lists.dtypes.values()) <= set(_checks.KERNEL_DTYPES)
        or {x.layout for x in everything} != {torch.strided}
        or any(len(each) != len(shapes) or not all(map(eq, map(_SHAPE, each), shapes)) for each in others)
        or not all(dense[-len(out) :])
    ):
        _explain(base, models, out, ids)
    if not all(dense):
        for i, x in enumerate(everything[: -len(out)]):
            if not dense[i]:
                _checks.target(f"out[{i % len(out)}]", out[i % len(out)], x.shape, [x])
        lists = Lists(_checks.contiguous(base) or None, [_checks.contiguous(one) for one in models], out, ids)
    if (t := _overlapping(lists)) is not None:
        _explain(base, models, out, ids)
        raise ArgumentError(f"out[{t}] overlaps another tensor of the lists in memory; pass a tensor of its own.")
    return lists


def _explain(
    base: Sequence[Tensor], models: Sequence[Sequence[Tensor]], out: Sequence[Tensor], ids: Sequence[int]
) -> None:
    """ArgumentError or ArgumentTypeError that names the first tensor that is wrong; nothing where none is."""
    _check_inputs(base, models)
    count = len(models[0])
    if len(out) != count or len(ids) != count:
        raise ArgumentError(f"out and tensor_ids need an entry for each of the {count} tensors.")
    for t, target in enumerate(out):
        _checks.target(f"out[{t}]", target, models[0][t].shape, [model[t] for model in models] + list(base[t : t + 1]))


def _check_inputs(base: Sequence[Tensor], models: Sequence[Sequence[Tensor]]) -> None:
    count = len(models[0])
    if base and len(base) != count:
        raise ArgumentError(f"base has {len(base)} tensors, but each model has {count}; pass as many.")
    for t in range(count):
        _checks.models(base[t] if base else None, [model[t] for model in models])
        _checks.same_device(f"tensors[0][{t}]", models[0][t], models[0][0].device)


def _overlapping(lists: Lists) -> int | None:
    """The place of a result that shares memory with an input or with another result; None where none does."""
    assert lists.out is not None
    begins = [*([lists.base_addresses] if lists.base else []), *lists.model_addresses.T, lists.out_addresses]
    sizes = [_sizes(lists, each) for each in (*([lists.base] if lists.base else []), *lists.models, lists.out)]
    starts = torch.cat(begins).numpy()
    stops = starts + torch.cat(sizes).numpy()
    return first_overlapping(starts, stops, len(starts) - lists.tensors)


def first_overlapping(starts: Any, stops: Any, first_out: int) -> int | None:
    """The number of a result that shares memory with an input or with another result; None where none does.

    starts, stops: numpy's int64, the addresses of the inputs and, from `first_out` on, of the results.
    """
    # Nothing overlaps a tensor without elements. Of the others, one that begins before any earlier one has ended does.
    order = starts.argsort(kind="stable")
    order = order[(stops > starts)[order]]
    starts, stops, written = starts[order], stops[order], order >= first_out
    ended = numpy.maximum.accumulate(stops)
    out_ended = numpy.maximum.accumulate(numpy.where(written, stops, 0))
    touching = numpy.flatnonzero((starts[1:] < out_ended[:-1]) | (written[1:] & (starts[1:] < ended[:-1])))
    if len(touching) == 0:
        return None
    i = int(touching[0])
    if written[i + 1]:
        return int(order[i + 1]) - first_out
    return int(order[: i + 1][(stops[: i + 1] == out_ended[i]) & written[: i + 1]][0]) - first_out


def _sizes(lists: Lists, tensors: Sequence[Tensor]) -> Tensor:
    """Bytes of each."""
    return lists.lengths * tensors[0].element_size() if lists.uniform else numbers([x.nbytes for x in tensors])


# -- schema, kernel, fake --------------------------------------------------------------------------------------------


def _by_model(tensors: Sequence[Tensor], count: int) -> list[list[Tensor]]:
    """The models, each a list of `count` tensors, from a flat list."""
    if count < 1 or len(tensors) % count or not tensors:
        raise ArgumentError(f"tensors has {len(tensors)} entries, which are not {count} for each model.")
    return [list(tensors[first : first + count]) for first in range(0, len(tensors), count)]


def _merge_many(base: list[Tensor], tensors: list[Tensor], count: int, tensor_ids: list[int], *rest: Any) -> None:
    *numbers, out, backend = rest
    models = _by_model(tensors, count)
    formula = _Formula(*numbers)
    formula.check(len(models))
    ids = [unsigned64(number) for number in tensor_ids] if any(tensor_ids) else list(tensor_ids)
    _merge(_checked(list(base), models, list(out), ids), formula, backend)


_merge_many_op = define(
    "consensus_merge_many_(Tensor[] base, Tensor[] tensors, int count, int[] tensor_ids, float[] weights, str inputs, "
    "str method, float[] density, float[] gamma, bool keep_ties, int seed, int[] positions, str election, "
    "str zero_sign, str divisor, float lambda_, Tensor(a!)[] out, str backend) -> ()",
    _merge_many,
    lambda base, tensors, count, *rest: _check_inputs(base, _by_model(tensors, count)),
)


# -- public ----------------------------------------------------------------------------------------------------------


class _Given(NamedTuple):
    """The tensors of a merge, of sound types, and their numbers. base: an empty list where there is none."""

    base: list[Tensor]
    models: list[list[Tensor]]
    ids: list[int]
    out: list[Tensor] | None

    @classmethod
    def of(
        cls,
        base: Sequence[Tensor] | None,
        tensors: Sequence[Sequence[Tensor]],
        tensor_ids: Sequence[int] | None,
        out: Sequence[Tensor] | None,
    ) -> _Given:
        models = [_checks.tensor_list(f"tensors[{i}]", one) for i, one in enumerate(tensors)]
        if not models:
            raise ArgumentError("tensors is empty; pass at least one model.")
        count = len(models[0])
        bases = [] if base is None else _checks.tensor_list("base", base)
        for name, listed in (*((f"tensors[{i}]", one) for i, one in enumerate(models)), ("base", bases)):
            if len(listed) != count and (listed or name != "base"):
                raise ArgumentError(f"{name} has {len(listed)} tensors, but tensors[0] has {count}; pass as many.")
        ids = [0] * count if tensor_ids is None else [_checks.integer("tensor_ids", number) for number in tensor_ids]
        targets = None if out is None else list(out)
        for name, entries in (("tensor_ids", ids), ("out", targets)):
            if entries is not None and len(entries) != count:
                raise ArgumentError(f"{name} has {len(entries)} entries for {count} tensors; pass one for each.")
        return cls(bases, models, ids, targets)

    def wide(self) -> str | None:
        """The name of a list that holds float64; None where none does."""
        names = ["base", *(f"tensors[{i}]" for i in range(len(self.models)))]
        return next((n for n, each in zip(names, (self.base, *self.models)) if _has_float64(each)), None)

    def results(self, out_dtype: torch.dtype | None) -> list[Tensor]:
        """Those to write to: as they were given, or new ones."""
        if self.out is None:
            dtypes = [out_dtype or x.dtype for x in (self.base or self.models[0])]
            return [torch.empty(x.shape, dtype=d, device=x.device) for x, d in zip(self.models[0], dtypes)]
        if any(not isinstance(x, Tensor) for x in self.out) or not {x.dtype for x in self.out} <= (
            {out_dtype} if out_dtype else set(_checks.KERNEL_DTYPES)
        ):
            for t, target in enumerate(self.out):
                _checks.out_tensor(target, out_dtype, f"out[{t}]")
        return self.out


def _has_float64(tensors: Sequence[Tensor]) -> bool:
    return torch.float64 in {x.dtype for x in tensors}


def _together(method: str | None, rescale: str | None, numerics: str, ties: str) -> bool:
    """Whether a merge of this kind takes all tensors at once."""
    return method in _TOGETHER and rescale is None and numerics == "fp32" and ties != "hashed"


def _formula(
    models: int,
    weights: float | Sequence[float],
    *,
    inputs: str,
    density: float | Sequence[float],
    method: str | None,
    gamma: float | Sequence[float],
    seed: int,
    model: int | Sequence[int] | None,
    election: str,
    zero_sign: str,
    divisor: str,
    ties: str,
    lambda_: float,
) -> _Formula:
    """The numbers of a merge of so many models, checked."""
    _checks.choice("ties", ties, select.TIES)
    densities = _checks.fractions("density", density, models)
    formula = _Formula(
        weights=[_checks.real("weights", w) for w in _checks.per_model("weights", weights, models)],
        inputs=inputs,
        method=method if method is not None and any(d < 1 for d in densities) else "none",
        density=densities,
        gamma=_checks.fractions("gamma", gamma, models),
        keep_ties=ties == "keep",
        seed=signed64(_checks.integer("seed", seed)),
        positions=_checks.positions("model", model, models),
        election=election,
        zero_sign=zero_sign,
        divisor=divisor,
        lambda_=_checks.real("lambda_", lambda_),
    )
    formula.check(models)
    return formula


def consensus_merge_many(
    base: Sequence[Tensor] | None,
    tensors: Sequence[Sequence[Tensor]],
    weights: float | Sequence[float],
    *,
    inputs: str = "models",
    density: float | Sequence[float] = 1.0,
    method: str | None = "magnitude",
    rescale: str | None = None,
    gamma: float | Sequence[float] = 0.01,
    epsilon: float | Sequence[float] = 0.15,
    seed: int = 0,
    tensor_ids: Sequence[int] | None = None,
    model: int | Sequence[int] | None = None,
    election: str = "weighted",
    zero_sign: str = "positive",
    divisor: str = "weights",
    ties: str = "lowest_index",
    lambda_: float = 1.0,
    numerics: str = "fp32",
    out_dtype: torch.dtype | None = None,
    out: Sequence[Tensor] | None = None,
    backend: str = "auto",
) -> list[Tensor]:
    """`consensus_merge` for a list of tensors, each with thresholds of its own, in a few launches on a GPU.

    base: T tensors of any shapes, or None. tensors: n models, each a list of T tensors of the base's shapes, all on one
        device. Where all bases have one dtype, all models one and all results one, a step is one launch for all T;
        else, and for rescaling, DELLA, hashed ties and mergekit's numerics, the tensors are merged one after the other.
    tensor_ids: the number of each tensor, which selects its random words (`tensor_id`); None: 0 for all.
    out: T contiguous tensors to write to; they may not overlap the inputs, nor each other.
    All else is as in `consensus_merge`, and the same for all tensors. To merge the same tensors again and again, see
    `prepare_merge_many`.
    Returns a list of T tensors with the bits of as many calls of `consensus_merge`, or `out`.
    Errors: ArgumentError / ArgumentTypeError, in a sentence that names the argument.
    Source: as for `consensus_merge`.
    """
    given = _Given.of(base, tensors, tensor_ids, out)
    if not _together(method, rescale, numerics, ties) or given.wide() is not None or out_dtype == torch.float64:
        return [
            consensus_merge(
                given.base[t] if given.base else None, [one[t] for one in given.models], weights, inputs=inputs,
                density=density, method=method, rescale=rescale, gamma=gamma, epsilon=epsilon, seed=seed,
                tensor_id=number, model=model, election=election, zero_sign=zero_sign, divisor=divisor, ties=ties,
                lambda_=lambda_, numerics=numerics, out_dtype=out_dtype,
                out=None if given.out is None else given.out[t], backend=backend,
            )
            for t, number in enumerate(given.ids)
        ]  # fmt: skip
    formula = _formula(
        len(given.models), weights, inputs=inputs, density=density, method=method, gamma=gamma, seed=seed, model=model,
        election=election, zero_sign=zero_sign, divisor=divisor, ties=ties, lambda_=lambda_,
    )  # fmt: skip
    results = given.results(out_dtype)
    flat = list(chain.from_iterable(given.models))
    ids = [signed64(number) for number in given.ids] if any(given.ids) else given.ids
    _merge_many_op(given.base, flat, len(given.ids), ids, *formula, results, backend)
    return results


LOOKED_AT = 512
"""How many tensors a prepared merge looks at: as many as cost little, though there may be ten thousand."""


class PreparedMerge:
    """Lists of tensors that are merged again and again; made by `prepare_merge_many`."""

    def __init__(self, given: _Given, watched: list[Tensor], out: list[Tensor], inputs: str, backend: str) -> None:
        """watched: the inputs as the caller has them; those that require gradients are read as other objects."""
        self.out = out
        self._given = given
        self._inputs = inputs
        self._backend = backend
        lists = _checked(given.base, given.models, out, [unsigned64(number) for number in given.ids])
        # Where copies had to be made, they would grow old.
        self._lists = None
        if lists.models is given.models:
            self._lists = Lists(lists.base, lists.models, out, lists.tensor_ids, kept=True)
        self._all = [*watched, *out]
        self._addresses = [x.data_ptr() for x in self._all]
        self._shapes = [x.shape for x in self._all]
        # While these are held, what the tables point to is not given to others, even where a tensor's `.data` changes.
        self._memory = [x.untyped_storage() for x in self._all]
        self._next = 0

    def merge(
        self,
        weights: float | Sequence[float],
        *,
        density: float | Sequence[float] = 1.0,
        method: str | None = "magnitude",
        rescale: str | None = None,
        gamma: float | Sequence[float] = 0.01,
        epsilon: float | Sequence[float] = 0.15,
        seed: int = 0,
        model: int | Sequence[int] | None = None,
        election: str = "weighted",
        zero_sign: str = "positive",
        divisor: str = "weights",
        ties: str = "lowest_index",
        lambda_: float = 1.0,
        numerics: str = "fp32",
        out: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """Merge the tensors as they are now, with the bits of `consensus_merge_many`.

        out: T contiguous tensors to write to, at the price of a call of `consensus_merge_many`; None: the tensors of
            `self.out`, which each merge overwrites.
        All else is as in `consensus_merge`.
        Returns the tensors that were written to.
        Errors: as for `consensus_merge_many`; ArgumentError where a tensor was resized or moved since. Each call looks
            at up to 512 tensors, in turn: at all, if there are no more (`check` always looks at all).
        """
        self._look(self._next, LOOKED_AT)
        self._next = (self._next + LOOKED_AT) % len(self._all)
        given, lists = self._given, self._lists
        if out is not None or lists is None or not _together(method, rescale, numerics, ties):
            return consensus_merge_many(
                given.base or None, given.models, weights, inputs=self._inputs, density=density, method=method,
                rescale=rescale, gamma=gamma, epsilon=epsilon, seed=seed, tensor_ids=given.ids, model=model,
                election=election, zero_sign=zero_sign, divisor=divisor, ties=ties, lambda_=lambda_,
                numerics=numerics, out=self.out if out is None else out, backend=self._backend,
            )  # fmt: skip
        formula = _formula(
            len(given.models), weights, inputs=self._inputs, density=density, method=method, gamma=gamma, seed=seed,
            model=model, election=election, zero_sign=zero_sign, divisor=divisor, ties=ties, lambda_=lambda_,
        )  # fmt: skip
        _merge(lists, formula, self._backend)
        return self.out

    def check(self) -> None:
        """Look at all tensors. Errors: ArgumentError where one was resized or moved since they were prepared."""
        self._look(0, len(self._all))

    def _look(self, first: int, count: int) -> None:
        some = slice(first, first + count)
        tensors = self._all[some]
        found = [x.data_ptr() for x in tensors]
        shapes = [x.shape for x in tensors]
        if found == self._addresses[some] and shapes == self._shapes[some]:
            return
        wrong = next(
            i
            for i, (address, shape) in enumerate(zip(found, shapes), first)
            if address != self._addresses[i] or shape != self._shapes[i]
        )
        raise ArgumentError(
            f"{self._name(wrong)} was resized or moved since it was prepared; call prepare_merge_many again."
        )

    def _name(self, place: int) -> str:
        """What the caller calls the tensor of this place."""
        lists = [("base", self._given.base), *((f"tensors[{i}]", one) for i, one in enumerate(self._given.models))]
        for name, tensors in lists:
            if place < len(tensors):
                return f"{name}[{place}]"
            place -= len(tensors)
        return f"out[{place}]"


def prepare_merge_many(
    base: Sequence[Tensor] | None,
    tensors: Sequence[Sequence[Tensor]],
    *,
    inputs: str = "models",
    tensor_ids: Sequence[int] | None = None,
    out_dtype: torch.dtype | None = None,
    out: Sequence[Tensor] | None = None,
    backend: str = "auto",
) -> PreparedMerge:
    """Prepare lists of tensors to be merged again and again, with other weights or after their values have changed.

    base, tensors, inputs, tensor_ids, out_dtype, backend: as in `consensus_merge_many`.
    out: T contiguous tensors that each merge writes to; None: new ones, which are the result's `out`.
    Returns a `PreparedMerge`. It holds the tensors, and on a GPU, from the first merge on, tables of where they are; so
    a merge, `merge(weights, density=...)`, costs launches, not a look at every tensor, and can be captured in a CUDA
    graph once it has run. Keep it for as long as its merges are under way, and as such a graph is replayed. The tensors
    must stay where they are; their values may change. Where some are not contiguous, and for merges that take one
    tensor after the other, nothing is gained. float64 is refused.
    Errors: as for `consensus_merge_many`.
    Source: as for `consensus_merge`.
    """
    given = _Given.of(base, tensors, tensor_ids, out)
    _checks.choice("inputs", inputs, consensus.INPUTS)
    if (name := given.wide()) is not None:
        raise ArgumentTypeError(f"{name} has dtype float64, which kernels do not read; convert it to float32 first.")
    watched = [*(base or ()), *chain.from_iterable(tensors)]
    return PreparedMerge(given, watched, given.results(out_dtype), inputs, backend)
