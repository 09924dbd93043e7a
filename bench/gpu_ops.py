"""Consensus, selection and many tensors in one call, for bench/gpu.py: each part yields its rows."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from adversarial import family, values
from gpu_rows import BF16, CONSENSUS, DENSITY, WEIGHTS, Bench, Row, on_host, release, same

from fastmerge import measuring, ops

HARD = ("equal", "two_values", "denormals", "heavy_tail")


# -- consensus -------------------------------------------------------------------------------------------------------


def consensus_rows(bench: Bench, kind: str, models: int, methods: tuple[str, ...], bar: float | None) -> Iterator[Row]:
    """Whole merges, and the last pass alone, where the thresholds are known."""
    size = bench.size(28)
    base, tuned = family(kind, BF16, size, models, bench.device)
    out = torch.zeros_like(base)
    weights = [WEIGHTS[i % len(WEIGHTS)] for i in range(models)]
    host_base, host_tuned = base.cpu(), [x.cpu() for x in tuned]
    read, written = (models + 1) * base.nbytes, out.nbytes
    given = {"elements": size, "limit": "copy", "bar": bar, "out": out}
    for method in methods:
        arguments = CONSENSUS[method]
        expected = on_host(
            lambda by, arguments=arguments: ops.consensus_merge(host_base, host_tuned, weights, backend=by, **arguments)
        )

        def merge(arguments=arguments) -> torch.Tensor:
            return ops.consensus_merge(base, tuned, weights, out=out, backend=bench.backend, **arguments)

        passes = 1 + (measuring.OF_DELTAS.get(bench.backend, 1) if method == "ties" else 0)
        case = f"{method}, {models} models, {kind}"
        moves = passes * read + written
        yield bench.row("consensus_merge", case, merge, passes=passes, moves=moves, check=same(expected), **given)
        if method == "ties":
            last = [max(1, int(DENSITY * size))] * models
            bounds, before = ops.magnitude_bounds(base, tuned, [0] * models, last, backend=bench.backend)
            rule = ops.SparsifyRule("band", bounds=bounds, ties_before=before)

            def apply(rule=rule) -> torch.Tensor:
                return ops.consensus_apply(base, tuned, weights, rule=rule, out=out, backend=bench.backend)

            moves = read + written
            yield bench.row("consensus_apply", case, apply, passes=1, moves=moves, check=same(expected), **given)


def consensus(bench: Bench) -> Iterator[Row]:
    """0.90 of the bandwidth of a copy."""
    for models in bench.models:
        yield from consensus_rows(bench, "normal", models, ("ties", "task_arithmetic"), 0.9)
        release()


def hard(bench: Bench) -> Iterator[Row]:
    """Inputs on which selection and ties cost differently."""
    for kind in HARD:
        yield from consensus_rows(bench, kind, bench.models[0], ("ties",), None)
        release()


# -- selection -------------------------------------------------------------------------------------------------------


def histogram(bench: Bench) -> Iterator[Row]:
    """0.75 of the bandwidth of reading on normal values, 0.4 where all are equal."""
    for kind in ("normal", *HARD):
        x = values(kind, BF16, bench.size(28), device=bench.device)
        host = x.cpu()
        expected = on_host(lambda by, host=host: ops.abs_histogram(host, backend=by))
        yield bench.row(
            "abs_histogram",
            kind,
            lambda x=x: ops.abs_histogram(x, backend=bench.backend),
            elements=x.numel(),
            passes=1,
            moves=x.nbytes,
            limit="read",
            bar={"normal": 0.75, "equal": 0.4}.get(kind),
            check=same(expected),
        )
        release()


def not_the_kth(x: torch.Tensor, k: int, value: torch.Tensor) -> str | None:
    """Why `value` is not the k-th largest magnitude, or None: counted, not sorted."""
    above = at_least = 0
    for part in x.split(1 << 26):
        magnitude = part.float().abs()
        above += int((magnitude > value).sum())
        at_least += int((magnitude >= value).sum())
    return None if above < k <= at_least else f"{above} magnitudes above, {at_least} not below, k = {k}"


def kth(bench: Bench) -> Iterator[Row]:
    """20 times torch.topk and 5 times torch.sort on the same magnitudes, which are made for them beforehand."""
    for kind in ("normal", *HARD):
        x = values(kind, BF16, bench.size(30), device=bench.device)
        for share in (0.5, 0.1) if kind == "normal" else (0.5,):
            k = max(1, int(x.numel() * share))
            passes = measuring.KTH.get(bench.backend, 1)
            row = bench.row(
                "kth_magnitude",
                f"{kind}, k = {share} N",
                lambda x=x, k=k: torch.ops.fastmerge.kth_magnitude([x], k, bench.backend),
                elements=x.numel(),
                passes=passes,
                moves=passes * x.nbytes,
                limit="read",
                bar=None,
                check=lambda value, x=x, k=k: not_the_kth(x, k, value),
            )
            if kind == "normal" and row["problem"] is None:
                row |= kth_peers(bench, x, k, row["seconds"])
            yield row
        del x
        release()


def kth_peers(bench: Bench, x: torch.Tensor, k: int, ours: float) -> Row:
    """How long torch takes for the same number."""
    magnitude = x.abs()
    peers = {
        "topk": (20.0, lambda: torch.topk(magnitude, k, sorted=False).values),
        "sort": (5.0, lambda: torch.sort(magnitude, descending=True).values[k - 1]),
    }
    result: Row = {}
    for name, (bar, run) in peers.items():
        release()
        try:
            seconds = statistics.median([bench.watch.once(run) for _ in range(1 + min(bench.repeat, 3))][1:])
        except torch.cuda.OutOfMemoryError:
            result[f"torch_{name}"] = "ran out of memory"
        else:
            times = seconds / ours
            result[f"torch_{name}"] = {"seconds": seconds, "times": times, "bar": bar, "bar_met": times >= bar}
        release()
    return result


def masks(bench: Bench) -> Iterator[Row]:
    """Masks of exactly k elements, from the values to the mask."""
    for kind in ("normal", *HARD):
        x = values(kind, BF16, bench.size(28), device=bench.device)
        host = x.cpu()
        expected = on_host(lambda by, host=host: ops.topk_mask(host, DENSITY, backend=by))
        passes = 1 + measuring.BOUNDS.get(bench.backend, 1)
        yield bench.row(
            "topk_mask",
            kind,
            lambda x=x: ops.topk_mask(x, DENSITY, backend=bench.backend),
            elements=x.numel(),
            passes=passes,
            moves=passes * x.nbytes + x.numel(),
            limit="read",
            bar=None,
            check=same(expected),
        )
        release()


# -- trials of evolutionary search -----------------------------------------------------------------------------------


def trials(bench: Bench) -> Iterator[Row]:
    """0.8 of the bandwidth of a copy: a blend of two members, and a difference of two added to a third one."""
    numel = bench.size(28)
    for name, op, count in (("blend_trial", ops.blend_trial, 2), ("de_trial", ops.de_trial, 4)):
        first, others = family("normal", BF16, numel, count - 1, bench.device)
        tensors = [first, *others]
        host = [x.cpu() for x in tensors]
        key = {"seed": 1, "generation": 2, "member": 3, "tensor_id": 4}
        out = torch.zeros_like(first)

        def tried(op: Any = op, tensors: Any = tensors, key: Any = key, out: Any = out) -> torch.Tensor:
            result: torch.Tensor = op(*tensors, 0.3, 0.5, **key, out=out, backend=bench.backend)
            return result

        expected = on_host(lambda by, op=op, host=host, key=key: op(*host, 0.3, 0.5, **key, backend=by))
        yield bench.row(
            name,
            "normal",
            tried,
            elements=numel,
            passes=1,
            moves=(count + 1) * out.nbytes,
            limit="copy",
            bar=0.8,
            check=same(expected),
            out=out,
        )
        release()


# -- many tensors ----------------------------------------------------------------------------------------------------


MOST_TIMES = 1.5
"""Merging many tensors takes at most so many times what one tensor with as many elements takes."""


def many(bench: Bench) -> Iterator[Row]:
    """10,000 tensors of 4 K elements, prepared, within 1.5 times the time of one tensor with as many elements.

    The GPU's time, by events, and the time from the call until the result is there are both held to that. How long the
    host takes, and the same of a call that was not prepared, is told beside it.
    """
    models = bench.models[0]
    count, each = (10_000, 4096) if bench.elements is None else (7, bench.elements)
    base, tuned = family("normal", BF16, count * each, models, bench.device)
    out = torch.zeros_like(base)
    weights = [WEIGHTS[i % len(WEIGHTS)] for i in range(models)]
    parts = [list(x.view(count, each)) for x in (base, *tuned)]
    outs = list(out.view(count, each))
    host = [list(x.cpu().view(count, each)) for x in (base, *tuned)]
    prepared = ops.prepare_merge_many(parts[0], parts[1:], out=outs, backend=bench.backend)
    for method, arguments in CONSENSUS.items():

        def merge(arguments: Any = arguments) -> torch.Tensor:
            prepared.merge(weights, **arguments)
            return out

        def plain(arguments: Any = arguments) -> torch.Tensor:
            ops.consensus_merge_many(parts[0], parts[1:], weights, out=outs, backend=bench.backend, **arguments)
            return out

        def together(arguments: Any = arguments) -> torch.Tensor:
            return ops.consensus_merge(base, tuned, weights, out=out, backend=bench.backend, **arguments)

        expected = on_host(
            lambda by, arguments=arguments: torch.stack(
                ops.consensus_merge_many(host[0], host[1:], weights, backend=by, **arguments)
            ).view(-1)
        )
        wrong = measuring.difference(plain(), expected)
        passes = 1 + (measuring.OF_DELTAS.get(bench.backend, 1) if method == "ties" else 0)
        moves = passes * (models + 1) * base.nbytes + out.nbytes
        row = bench.row(
            "consensus_merge_many",
            f"{method}, {count} x {each}, {models} models",
            merge,
            elements=base.numel(),
            passes=passes,
            moves=moves,
            limit="copy",
            bar=None,
            check=lambda result, wrong=wrong, expected=expected: wrong or measuring.difference(result, expected),
            out=out,
        )
        if row["problem"] is None:
            row |= beside_one(bench, row["seconds"], merge, plain, together)
        yield row


def beside_one(
    bench: Bench,
    seconds: float,
    merge: Callable[[], object],
    plain: Callable[[], object],
    together: Callable[[], object],
) -> Row:
    """A prepared merge of many tensors, of so many seconds on the GPU, and a plain one, beside that of one tensor."""
    alone, (alone_host, alone_whole) = statistics.median(bench.timed(together)), bench.apart(together)
    (own_host, own_whole), (plain_host, plain_whole) = bench.apart(merge), bench.apart(plain)
    times, whole_times = seconds / alone, own_whole / alone_whole
    one = {"seconds": alone, "host_seconds": alone_host, "whole_seconds": alone_whole}
    one |= {"times": times, "whole_times": whole_times, "most": MOST_TIMES}
    return {
        "host_seconds": own_host,
        "whole_seconds": own_whole,
        "one_tensor": one | {"bar_met": max(times, whole_times) <= MOST_TIMES},
        "plain": {"host_seconds": plain_host, "whole_seconds": plain_whole, "whole_times": plain_whole / alone_whole},
    }
