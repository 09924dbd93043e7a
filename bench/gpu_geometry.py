"""Inner products of models, and which of their elements matter, for bench/gpu.py: each part yields its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from adversarial import family
from gpu_rows import BF16, Bench, Row, on_host, release, same
from torch import Tensor

from fastmerge import ops

ROW = 4096
"""Elements of a row, where an op takes rows."""
Made = Callable[[Tensor, list[Tensor], str], Tensor]


def rows_of(bench: Bench, made: dict[str, tuple[Made, int, int, int]]) -> Iterator[Row]:
    """A row for each op. made: the op, models, passes over the inputs, bytes of the result for each element."""
    size = bench.size(28)
    for name, (run, models, passes, written) in made.items():
        base, tuned = family("normal", BF16, size, models, bench.device)
        host_base, host_tuned = base.cpu(), [x.cpu() for x in tuned]
        expected = on_host(lambda by, run=run, base=host_base, tuned=host_tuned: run(base, tuned, by))

        def on_device(run: Made = run, base: Tensor = base, tuned: list[Tensor] = tuned) -> Tensor:
            return run(base, tuned, bench.backend)

        yield bench.row(
            name,
            f"{models} models, normal" if models > 1 else "normal",
            on_device,
            elements=size,
            passes=passes,
            moves=passes * (models + 1) * base.nbytes + written * size,
            limit="copy" if written else "read",
            bar=None,
            check=same(expected),
        )
        del base, tuned, host_base, host_tuned, expected
        release()


def geometry(bench: Bench) -> Iterator[Row]:
    """The inner products of all pairs of deltas; no bar is set yet."""
    yield from rows_of(bench, {"gram": (lambda b, xs, by: ops.gram(b, xs, backend=by), bench.models[0], 1, 0)})


def importance(bench: Bench) -> Iterator[Row]:
    """The ops of nearswap, RAM, SCE and Arcee Fusion; no bar is set yet."""
    models = bench.models[0]

    def importances(base: Tensor, tensors: list[Tensor], by: str) -> Tensor:
        length = min(ROW, base.numel())
        found = ops.divergences(base, tensors[0], length, backend=by)
        return ops.importance(base, tensors[0], found, length, backend=by)

    yield from rows_of(
        bench,
        {
            "nearswap": (
                lambda b, xs, by: ops.nearswap(b, xs[0], 0.001, out_dtype=torch.bfloat16, backend=by),
                1,
                1,
                2,
            ),
            "ram_counts": (lambda b, xs, by: ops.ram_counts(b, xs, backend=by), models, 1, 0),
            "ram_apply": (
                lambda b, xs, by: ops.ram_apply(b, xs, 1.1, out_dtype=torch.bfloat16, backend=by),
                models,
                1,
                2,
            ),
            "model_variance": (lambda b, xs, by: ops.model_variance(b, xs, backend=by), models, 1, 4),
            "energy_sums": (lambda b, xs, by: ops.energy_sums(b, xs, backend=by), models, 1, 0),
            "importance": (importances, 1, 2, 4),
        },
    )
