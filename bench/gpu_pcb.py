"""PCB-Merging beside its formula in eager PyTorch, for bench/gpu.py."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator

import torch
from adversarial import values
from gpu_rows import BF16, PCB_DENSITY, Bench, Row, on_host, release, same

from fastmerge import measuring, ops

CLIPPED = {"script": 1e-4, "vision_es": 1e-2}
"""The share of magnitudes that PCB-Merging's released code clips at either end."""


def clamp(x: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Rows clipped to their order statistics at these places, found by sorting, as in the released code."""
    ordered = torch.sort(x, dim=1).values
    count = x.shape[1]
    least = ordered[:, int(count * low)].unsqueeze(1)
    most = ordered[:, int(count * (1 - high) - 1)].unsqueeze(1)
    del ordered
    return torch.clamp(x, least, most)


def normalise(x: torch.Tensor) -> torch.Tensor:
    """Rows scaled to [0, 1]."""
    least = x.amin(dim=1, keepdim=True)
    return (x - least) / (x.amax(dim=1, keepdim=True) - least)


def eager_pcb(rows: torch.Tensor, variant: str) -> torch.Tensor:
    """PCB-Merging in eager PyTorch, all rows at once, step by step as the released code has it; float32[n, D]."""
    clipped = CLIPPED[variant]
    magnitude = clamp(rows.abs(), clipped, clipped)
    merged = torch.sign(rows) * magnitude
    strength = normalise(magnitude)
    del magnitude
    if variant == "script":
        rivalry = torch.tanh(rows * rows.sum(dim=0))
    else:
        unit = torch.sign(rows) * strength
        rivalry = torch.zeros_like(rows)
        for other in unit:
            rivalry += torch.tanh(unit * other)
        del unit
    scores = torch.exp(len(rows) * strength**2) * rivalry
    del strength, rivalry
    scale = normalise(clamp(scores, 1 - PCB_DENSITY, 0))
    return (merged * scale).sum(dim=0) / torch.clamp(scale.sum(dim=0), min=1e-12)


def pcb(bench: Bench) -> Iterator[Row]:
    """20 times the formula in eager PyTorch, in memory of at most 0.05 of the inputs."""
    models, size = bench.models[-1], bench.size(27)
    rows = [values("normal", BF16, size, i + 1, bench.device).mul_(1e-2) for i in range(models)]
    out = torch.zeros_like(rows[0])
    host = [x.cpu() for x in rows]
    for variant in CLIPPED:

        def merge(count: int = size, variant: str = variant) -> torch.Tensor:
            some = [x[:count] for x in rows]
            result: torch.Tensor = ops.pcb_merge(
                some, density=PCB_DENSITY, variant=variant, out=out[:count], backend=bench.backend
            )
            return result

        expected = on_host(
            lambda by, variant=variant: ops.pcb_merge(host, density=PCB_DENSITY, variant=variant, backend=by)
        )
        passes = 1 + measuring.PCB.get(bench.backend, 3)
        row = bench.row(
            "pcb_merge",
            f"{variant}, {models} models",
            merge,
            elements=size,
            passes=passes,
            moves=passes * models * out.nbytes + out.nbytes,
            limit="copy",
            bar=None,
            check=same(expected),
            out=out,
        )
        if row["problem"] is None:
            row |= extra_memory(merge, models * out.nbytes) | pcb_peer(bench, rows, variant, merge)
        yield row
        release()


def extra_memory(run: Callable[[], object], inputs: int) -> Row:
    """The most that a call holds of the device's memory besides what is there, as a fraction of its inputs."""
    if not torch.cuda.is_available():
        return {"extra_memory": None}
    release()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    share = (torch.cuda.max_memory_allocated() - before) / inputs
    return {"extra_memory": share, "extra_memory_bar": 0.05, "extra_memory_bar_met": share <= 0.05}


def pcb_peer(bench: Bench, rows: list[torch.Tensor], variant: str, merge: Callable[[int], torch.Tensor]) -> Row:
    """The formula in eager PyTorch beside ours, on as many elements of each row as it has memory for."""
    count = rows[0].numel()
    while True:
        try:
            seconds, different = eager_run(bench, [x[:count] for x in rows], variant, merge(count))
            break
        except torch.cuda.OutOfMemoryError:
            count //= 2
        release()  # only here is the error gone, and with it what it held
    release()
    times = seconds / statistics.median(bench.timed(lambda: merge(count)))
    eager: Row = {"elements": count, "seconds": seconds, "different": different, "times": times, "bar": 20.0}
    # Another exp, another order of sums: where a single row keeps an element, the last bit decides.
    if different > 1e-2:
        return {"eager": eager, "problem": f"{different:.1%} of the values by eager PyTorch are others"}
    return {"eager": eager | {"bar_met": times >= 20.0}}


def eager_run(bench: Bench, rows: list[torch.Tensor], variant: str, ours: torch.Tensor) -> tuple[float, float]:
    """Seconds of the formula in eager PyTorch, and the share of its values that are not ours."""
    given = torch.stack(rows).float()
    theirs = eager_pcb(given, variant)
    far = (ours.float() - theirs).abs() > 1e-2 * theirs.abs() + 1e-4 * theirs.abs().max()
    different = float(far.float().mean())
    del far, theirs
    return statistics.median([bench.watch.once(lambda: eager_pcb(given, variant)) for _ in range(2)]), different
