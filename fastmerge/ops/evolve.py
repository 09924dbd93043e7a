"""Trials of evolutionary search: a tensor that is crossed over, here and there, with what others have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, TypeVar

import numpy
import torch
from torch import Tensor

from .. import backends
from ..backends.gpu import keep_limit
from ..backends.rule import MOST_DIFFERENCES, TrialRule
from ..errors import ArgumentError, ArgumentTypeError
from . import _checks
from ._library import define, signed64, unsigned64
from .many import first_overlapping

MAX_GENERATION = 65535

Trial = TypeVar("Trial", Tensor, list[Tensor])
"""A tensor, or a list of tensors that are tried together."""


# -- schema, kernel, fake --------------------------------------------------------------------------------------------


def _check_numbers(
    kind: str,
    roles: int,
    factors: Sequence[float],
    rate: float,
    generation: int,
    member: int,
    offset: int,
    tensors: int,
) -> None:
    """What the kernels rely on whoever calls the op. roles: parents of each tensor."""
    wanted = 1 if kind == "blend" else 1 + 2 * len(factors)
    if roles != wanted or not factors or (kind == "blend" and len(factors) != 1):
        raise ArgumentError(f"parents has {roles} entries for each tensor, and F {len(factors)}; they do not fit.")
    if len(factors) > MOST_DIFFERENCES:
        raise ArgumentError(
            f"more has {len(factors) - 1} entries; a trial takes at most {MOST_DIFFERENCES} differences, so leave out "
            "what is beyond."
        )
    for factor in factors:
        _checks.real("F", factor)
    _checks.fraction("CR", rate)
    _checks.integer("generation", generation, 0, MAX_GENERATION)
    _checks.integer("member", member, 0, _checks.MAX_POSITION)
    _checks.integer("offset", offset, 0)
    if tensors > 1 and offset:
        raise ArgumentError(f"offset={offset} is for a chunk of one tensor; lists are of whole tensors, so leave it 0.")


def _by_role(x: Sequence[Tensor], parents: Sequence[Tensor]) -> list[list[Tensor]]:
    """The roles: x and its parents, each a list of as many tensors, of the shapes of x's."""
    count = len(x)
    if not count or len(parents) % count:
        raise ArgumentError(f"parents has {len(parents)} entries, which are not {count} for each parent.")
    roles = [list(x), *(list(parents[first : first + count]) for first in range(0, len(parents), count))]
    for t in range(count):
        _checks.models(None, [role[t] for role in roles])
        _checks.same_device(f"x[{t}]", x[t], x[0].device)
    return roles


def _distinct(roles: Sequence[list[Tensor]]) -> tuple[list[list[Tensor]], list[int]]:
    """Those that are not the same memory as one before, x the first; and the place of each role among them."""
    known: dict[Any, int] = {}
    distinct: list[list[Tensor]] = []
    places = []
    for role in roles:
        key = tuple((x.data_ptr(), x.dtype, x.stride()) for x in role)
        if key not in known:
            known[key] = len(distinct)
            distinct.append(role)
        places.append(known[key])
    return distinct, places


def _is_same(x: Tensor, out: Tensor) -> bool:
    """Whether a trial may be written over this tensor: each element is where the result's is."""
    return x.data_ptr() == out.data_ptr() and x.dtype == out.dtype and x.is_contiguous()


def _check_out(roles: Sequence[Sequence[Tensor]], out: Sequence[Tensor]) -> None:
    if len(out) != len(roles[0]):
        raise ArgumentError(f"out has {len(out)} entries for {len(roles[0])} tensors; pass one for each.")
    for t, target in enumerate(out):
        name = "out" if len(out) == 1 else f"out[{t}]"
        own = [role[t] for role in roles]
        _checks.kernel_inputs(name, [own[0], target])
        _checks.target(name, target, own[0].shape, [x for x in own if not _is_same(x, target)])
    others = [x for role in roles for x, target in zip(role, out) if x.is_contiguous() and not _is_same(x, target)]
    everything = [*others, *out]
    starts = numpy.array([x.data_ptr() for x in everything], dtype=numpy.int64)
    stops = starts + numpy.array([x.nbytes for x in everything], dtype=numpy.int64)
    found = first_overlapping(starts, stops, len(others))
    if found is not None:
        raise ArgumentError(f"out[{found}] overlaps another tensor of the lists in memory; pass a tensor of its own.")


def _run(
    kind: Any,
    roles: list[list[Tensor]],
    factors: Sequence[float],
    rate: float,
    seed: int,
    generation: int,
    member: int,
    tensor_ids: Sequence[int],
    offset: int,
    forced: Sequence[int],
    out: list[Tensor],
    backend: str,
) -> None:
    _check_numbers(kind, len(roles) - 1, factors, rate, generation, member, offset, len(out))
    for name, numbers in (("tensor_id", tensor_ids), ("forced", forced)):
        if len(numbers) != len(out):
            raise ArgumentError(f"{name} has {len(numbers)} entries for {len(out)} tensors; pass one for each.")
    distinct, places = _distinct(roles)
    rule = TrialRule(
        kind=kind,
        places=places[1:],
        factors=[1.0 - factors[0], factors[0]] if kind == "blend" else list(factors),
        limit=keep_limit(rate),
        seed=unsigned64(seed),
        generation=generation,
        member=member,
        offset=offset,
    )
    models = [_checks.contiguous(each) for each in distinct]
    ids = [unsigned64(number) for number in tensor_ids]
    backends.resolve(backend, out[0].device).trials(models, rule, ids, list(forced), out)


def _define(kind: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Register a kind of trial twice: of one tensor, with a new tensor; and of several, into tensors that are given."""

    def fresh(x: Tensor, parents: list[Tensor], *rest: Any) -> Tensor:
        factors, rate, seed, generation, member, tensor_id, offset, forced, out_dtype, backend = rest
        roles = _by_role([x], parents)
        _checks.kernel_out_dtype(out_dtype)
        out = torch.empty(x.shape, dtype=out_dtype, device=x.device)
        _run(
            kind, roles, factors, rate, seed, generation, member, [tensor_id], offset, [forced], [out], backend
        )  # fmt: skip
        return out

    def fresh_fake(x: Tensor, parents: list[Tensor], *rest: Any) -> Tensor:
        _by_role([x], parents)
        _checks.kernel_out_dtype(rest[-2])
        return x.new_empty(x.shape, dtype=rest[-2])

    def into(x: list[Tensor], parents: list[Tensor], *rest: Any) -> None:
        factors, rate, seed, generation, member, tensor_ids, offset, forced, out, backend = rest
        roles = _by_role(x, parents)
        _check_out(roles, out)
        _run(
            kind, roles, factors, rate, seed, generation, member, tensor_ids, offset, forced, list(out), backend
        )  # fmt: skip

    def into_fake(x: list[Tensor], parents: list[Tensor], *rest: Any) -> None:
        _by_role(x, parents)

    start = "float[] factors, float CR, int seed, int generation, int member"
    return (
        define(
            f"{kind}_trial(Tensor x, Tensor[] parents, {start}, int tensor_id, SymInt offset, SymInt forced, "
            "ScalarType out_dtype, str backend) -> Tensor",
            fresh,
            fresh_fake,
        ),
        define(
            f"{kind}_trials_(Tensor[] x, Tensor[] parents, {start}, int[] tensor_ids, SymInt offset, SymInt[] forced, "
            "Tensor(a!)[] out, str backend) -> ()",
            into,
            into_fake,
        ),
    )


_blend_ops = _define("blend")
_de_ops = _define("de")


# -- public ----------------------------------------------------------------------------------------------------------


def _parent(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor) and not value.is_floating_point() and not value.is_complex():
        raise ArgumentTypeError(
            f"{name} has dtype {str(value.dtype).removeprefix('torch.')}: integer buffers never evolve; "
            "leave it as the member has it."
        )
    return _checks.input_tensor(name, value)


def _lists(names: Sequence[str], values: Sequence[Any]) -> list[list[Tensor]]:
    """The roles, x and its parents, each as a list of tensors, of x's shapes."""
    if not isinstance(values[0], (Tensor, list, tuple)):
        raise ArgumentTypeError(
            f"x must be a torch.Tensor or a list of tensors, not {type(values[0]).__name__}; pass a member's weights."
        )
    if isinstance(values[0], Tensor):
        roles = [[_parent(name, value)] for name, value in zip(names, values)]
    else:
        roles = []
        for name, value in zip(names, values):
            if not isinstance(value, (list, tuple)):
                raise ArgumentTypeError(f"{name} must be a list of tensors as x is, not {type(value).__name__}.")
            roles.append([_parent(f"{name}[{t}]", each) for t, each in enumerate(value)])
    first = roles[0]
    if not first:
        raise ArgumentError("x is empty; pass at least one tensor.")
    for name, role in zip(names, roles):
        if len(role) != len(first):
            raise ArgumentError(f"{name} has {len(role)} tensors, but x has {len(first)}; pass as many.")
        for t, each in enumerate(role):
            place = "" if isinstance(values[0], Tensor) else f"[{t}]"
            if each.shape != first[t].shape:
                raise ArgumentError(
                    f"{name}{place} has shape {list(each.shape)}, but x{place} has shape {list(first[t].shape)}; "
                    "pass members of one architecture."
                )
            _checks.same_device(f"{name}{place}", each, first[0].device, "x")
    return roles


def _forced(value: Any, name: str = "forced") -> int:
    return -1 if value is None else _checks.integer(name, value, 0, (1 << 63) - 1)


def _for_each(name: str, value: Any, tensors: int, default: Any) -> list[Any]:
    """As many numbers as there are tensors in lists."""
    if value is default:
        return [default] * tensors
    if isinstance(value, (str, Tensor)) or not isinstance(value, Sequence):
        raise ArgumentTypeError(f"{name} must be a list with an entry for each tensor of x, as x is a list.")
    if len(value) != tensors:
        raise ArgumentError(f"{name} has {len(value)} entries for {tensors} tensors; pass one for each.")
    return list(value)


def _tried(
    ops: tuple[Callable[..., Any], Callable[..., Any]],
    names: Sequence[str],
    values: Sequence[Any],
    factors: Sequence[Any],
    rate: float,
    *,
    seed: int,
    generation: int,
    member: int,
    tensor_id: Any,
    offset: int,
    forced: Any,
    out: Any,
    out_dtype: torch.dtype | None,
    backend: str,
) -> Any:
    fresh, into = ops
    x = values[0]
    one = isinstance(x, Tensor)
    roles = _lists(names, values)
    numbers = (
        [_checks.real("F", factor) for factor in factors],
        _checks.fraction("CR", rate),
        signed64(_checks.integer("seed", seed)),
        _checks.integer("generation", generation, 0, MAX_GENERATION),
        _checks.integer("member", member, 0, _checks.MAX_POSITION),
    )
    count = len(roles[0])
    if one:
        ids, places = [_checks.integer("tensor_id", tensor_id)], [_forced(forced)]
    else:
        ids = [_checks.integer("tensor_id", number) for number in _for_each("tensor_id", tensor_id, count, 0)]
        places = [_forced(place) for place in _for_each("forced", forced, count, None)]
        if sum(place >= 0 for place in places) > 1:
            raise ArgumentError("forced has several elements; a trial has at most one in all of its tensors.")
    ids = [signed64(number) for number in ids]
    offset = _checks.integer("offset", offset, 0)
    originals = [x] if one else list(x)
    parents = list(chain.from_iterable(roles[1:]))
    wanted = None if out_dtype is None else _checks.out_dtype(out_dtype)
    if out is not None:
        targets = [out] if one else _checks.tensor_list("out", out)
        for t, target in enumerate(targets):
            _checks.out_tensor(target, wanted, "out" if one else f"out[{t}]")
        written = [target.detach() if target.requires_grad else target for target in targets]
        into(roles[0], parents, *numbers, ids, offset, places, written, backend)
        return out
    dtypes = [each.dtype if wanted is None else wanted for each in originals]
    narrow = [torch.float32 if dtype == torch.float64 else dtype for dtype in dtypes]
    if one:
        results = [fresh(roles[0][0], parents, *numbers, ids[0], offset, places[0], narrow[0], backend)]
    else:
        results = [torch.empty(own.shape, dtype=d, device=own.device) for own, d in zip(roles[0], narrow)]
        into(roles[0], parents, *numbers, ids, offset, places, results, backend)
    results = [result.to(dtype) for result, dtype in zip(results, dtypes)]
    return results[0] if one else results


def blend_trial(
    x: Trial,
    ref: Trial,
    F: float,  # noqa: N803
    CR: float,  # noqa: N803
    *,
    seed: int = 0,
    generation: int = 0,
    member: int = 0,
    tensor_id: int | Sequence[int] = 0,
    offset: int = 0,
    forced: int | Sequence[int | None] | None = None,
    out: Trial | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Trial:
    """Cross a member over with a blend of itself and another one.

        mask ? (1 - F) x + F ref : x                 mask(e) = word(e) < floor(CR 2**32), or e is `forced`

    x, ref: a member's tensor and the other one's, a whole tensor or a chunk; one shape and device, any dtypes of
        float32, bfloat16, float16, or float64 (rounded to float32 first). Or lists of as many whole tensors, which on a
        GPU take one launch for all that have the same dtypes.
    F: any finite number. CR: the share that crosses over, in [0, 1].
    seed, generation, member, tensor_id, offset: what the random words depend on: any integers mod 2**64 for the seed
        and the tensor's number (`tensor_id`), the generation (0 to 65535), the member's number (0 to 4095), and the
        flat index of x's first element in its tensor. Of lists tensor_id is one, too (0: 0 for all), and offset is 0.
    forced: the flat index, in its whole tensor, of an element that crosses over in any case; one elsewhere than in this
        chunk does nothing. Of lists it is a list with at most one number, and None for the others.
    out: a contiguous float32, bfloat16 or float16 tensor of x's shape to write to, or a list of them; it may be x
        itself (or the other one), but may not overlap them in part. out_dtype: the result's dtype; None: x's.
    Returns the trial, or a list of them, or `out`. Each step is rounded to float32, 1 - F once, and the result once.
    Where the mask is off a result of x's dtype has x's own bits, those of NaNs, too.
    Errors: ArgumentError / ArgumentTypeError, in a sentence that names the argument.
    Source: Evolver, knowledge fusion by evolving weights (arXiv 2406.12208).
    """
    tried: Trial = _tried(
        _blend_ops, ("x", "ref"), (x, ref), [F], CR, seed=seed, generation=generation, member=member,
        tensor_id=tensor_id, offset=offset, forced=forced, out=out, out_dtype=out_dtype, backend=backend,
    )  # fmt: skip
    return tried


def de_trial(
    x: Trial,
    a: Trial,
    b: Trial,
    c: Trial,
    F: float,  # noqa: N803
    CR: float,  # noqa: N803
    *,
    more: Sequence[tuple[float, Trial, Trial]] = (),
    seed: int = 0,
    generation: int = 0,
    member: int = 0,
    tensor_id: int | Sequence[int] = 0,
    offset: int = 0,
    forced: int | Sequence[int | None] | None = None,
    out: Trial | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Trial:
    """Cross a member over with another one that is moved by differences of others: binomial crossover.

        mask ? a + F (b - c) [+ F2 (p - q) ...] : x          mask(e) = word(e) < floor(CR 2**32), or e is `forced`

    x, a, b, c: members, as in `blend_trial`; what is passed several times is read once. F, CR: as in `blend_trial`.
    more: up to two further differences as (F2, p, q), added from left to right.
    All else is as in `blend_trial`; the random words are others.
    Returns the trial, or a list of them, or `out`.
    Errors: ArgumentError / ArgumentTypeError, in a sentence that names the argument.
    Source: differential evolution (Storn and Price, Journal of Global Optimization 11, 1997): rand/1/bin with three
        distinct others, current-to-best/1 with a = x, b the best, c = x and one more difference.
    """
    names, values, factors = ["x", "a", "b", "c"], [x, a, b, c], [F]
    further = list(more)
    if len(further) >= MOST_DIFFERENCES:
        raise ArgumentError(
            f"more has {len(further)} entries; a trial takes at most {MOST_DIFFERENCES} differences, so pass up to "
            f"{MOST_DIFFERENCES - 1}."
        )
    for i, each in enumerate(further):
        if not isinstance(each, (tuple, list)) or len(each) != 3:
            raise ArgumentTypeError(f"more[{i}] must be a tuple of a factor and two members, (F2, p, q).")
        names += [f"more[{i}][1]", f"more[{i}][2]"]
        values += each[1:]
        factors.append(each[0])
    tried: Trial = _tried(
        _de_ops, names, values, factors, CR, seed=seed, generation=generation, member=member,
        tensor_id=tensor_id, offset=offset, forced=forced, out=out, out_dtype=out_dtype, backend=backend,
    )  # fmt: skip
    return tried
