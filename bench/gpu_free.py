"""The frequency filter and light experts, for bench/gpu.py: each part yields its rows."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from adversarial import values
from gpu_models import LLAMA_2_7B, shapes
from gpu_rows import BF16, Bench, Row, launches, on_host, release

from fastmerge import measuring, ops

FILTERS = [
    ((4096, 4096), 8, "ideal", 0.01, torch.float32, 0.6),
    ((4096, 4096), 8, "ideal", 0.02, torch.float32, 0.6),
    ((4096, 4096), 8, "ideal", 0.02, BF16, None),
    ((4096, 4096), 8, "official", 0.7, torch.float32, 0.6),
    ((4096, 4096), 8, "ideal", 0.1, torch.float32, None),
    ((4096, 4096), 8, "ideal", 0.5, torch.float32, None),
    ((4096, 11008), 3, "official", 0.9, torch.float32, None),
    ((11008, 4096), 3, "official", 0.9, torch.float32, None),
    ((4096, 11008), 3, "ideal", 0.1, BF16, None),
]
"""Shape, matrices, mode, ratio, dtype, and where the low-rank route is expected its share of a copy's bandwidth."""

MOST_OF_TRANSFORMS = 1.1
"""The route by transforms takes at most so many times what torch's rfft2 and irfft2 take."""
TOLERANCE = 1e-6
MOST_SECONDS = 0.010
"""For putting an expert onto a model of 7 billion parameters."""
KEEP = 0.01


# -- the filter ------------------------------------------------------------------------------------------------------


def far(result: torch.Tensor, expected: torch.Tensor, x: torch.Tensor) -> str | None:
    """Why a filtered matrix is wrong, or None: float32 within a millionth, 16 bits within a rounding besides."""
    step = 0.0 if result.dtype == torch.float32 else torch.finfo(result.dtype).eps
    error = (result.cpu().float() - expected.float()).abs()
    room = TOLERANCE * float(x.abs().max()) + step * expected.float().abs()
    wrong = int((~(error <= room)).sum())
    return f"{wrong} of {expected.numel()} values are off by {float(error.max()):.2g} at most" if wrong else None


def highpass(bench: Bench) -> Iterator[Row]:
    """0.6 of a copy's bandwidth by the low-rank route, 1.1 times the time of cuFFT's transforms by the other one.

    One matrix of each batch is checked on the CPU.
    """
    for shape, count, mode, ratio, dtype, bar in FILTERS:
        if bench.elements is not None:
            shape, count = (64, 64 * shape[1] // shape[0]) if shape[0] <= shape[1] else (128, 64), 2
        x = values("normal", dtype, count * math.prod(shape), device=bench.device).view(count, *shape)
        out = torch.empty_like(x)
        sampled = x[-1].cpu()
        expected = on_host(lambda by, m=sampled, r=ratio, mode=mode: ops.highpass(m, r, mode=mode, backend=by))
        where = "cuda" if bench.backend in ("cuda", "triton") else "cpu"
        route = ops.highpass_plan(shape, ratio, mode=mode, dtype=dtype, device=where).route

        def run(x: torch.Tensor = x, out: torch.Tensor = out, ratio: float = ratio, mode: str = mode) -> torch.Tensor:
            return ops.highpass(x, ratio, mode=mode, out=out, backend=bench.backend)

        row = bench.row(
            "highpass",
            f"{route}: {mode} {ratio}, {count} x {shape[0]} x {shape[1]}, {str(dtype).removeprefix('torch.')}",
            run,
            elements=x.numel(),
            passes=2 if route == "lowrank" else 1,
            moves=2 * x.nbytes,
            limit="copy",
            bar=bar if route == "lowrank" else None,
            check=lambda result, expected=expected, m=sampled: far(result[-1], expected, m),
            out=out,
        )
        if row["problem"] is None and dtype == torch.float32:
            row["transforms"] = beside_transforms(bench, x, row["seconds"], route)
        yield row
        del x, out
        release()


def beside_transforms(bench: Bench, x: torch.Tensor, seconds: float, route: str) -> Row:
    """How the filter's time relates to that of the whole transform and its inverse, in the same batch."""

    def both() -> torch.Tensor:
        return torch.fft.irfft2(torch.fft.rfft2(x), s=x.shape[-2:])

    taken = statistics.median(bench.timed(both))
    times = seconds / taken
    known: Row = {"seconds": taken, "times": times, "most": MOST_OF_TRANSFORMS}
    return known | {"bar_met": times <= MOST_OF_TRANSFORMS if route == "rfft" else None}


# -- experts ---------------------------------------------------------------------------------------------------------


def expert_of(x: torch.Tensor, seed: int) -> ops.Expert:
    """An expert of a hundredth of each row, at least one element: one in each of as many stretches of the row."""
    rows, width = (x.shape[0], x.shape[1]) if x.dim() == 2 else (1, x.shape[0])
    k = max(1, int(width * KEEP))
    generator = torch.Generator(x.device).manual_seed(seed)
    drawn = torch.rand(rows, k, generator=generator, device=x.device, dtype=torch.float64)
    columns = ((torch.arange(k, device=x.device) + drawn) * (width / k)).to(torch.int64).clamp_(max=width - 1)
    return ops.Expert(
        x.shape, columns.to(torch.uint16), values("normal", x.dtype, rows * k, seed, x.device.type).view(rows, k)
    )


def experts(bench: Bench) -> Iterator[Row]:
    """An expert of one percent of a model like Llama 2 7B is on in 10 ms, from the call until the GPU has done it.

    Two tensors are checked on the CPU, and the bits that they have when it was taken off again.
    """
    wanted = shapes(*(LLAMA_2_7B if bench.elements is None else (1, 32, 256, 64)))
    tensors = [values("normal", BF16, math.prod(shape), 1, bench.device).view(shape) for shape in wanted]
    parts = [expert_of(x, seed).part(seed, 0.7) for seed, x in enumerate(tensors)]
    places = sum(part.columns.numel() for part in parts)
    sampled = sorted(range(len(wanted)), key=lambda t: (math.prod(wanted[t]), t))
    sampled = [sampled[0], sampled[len(sampled) // 2]]
    before = {t: tensors[t].cpu() for t in sampled}
    expected = {t: on_host(lambda by, t=t: worn(before[t], parts[t], by)) for t in sampled}
    counted = launches(bench.backend)
    host, applied, reverted = [], [], []
    problem: str | None = None
    for turn in range(1 + bench.repeat):
        saved, returned, whole = taken(bench, lambda: ops.expert_apply_(tensors, parts, backend=bench.backend))
        problem = problem or next(
            (why for t, x in expected.items() if (why := measuring.difference(tensors[t], x))), None
        )
        changed, _, back = taken(
            bench, lambda saved=saved: ops.expert_revert_(tensors, parts, saved, backend=bench.backend)
        )
        problem = problem or next(
            (why for t, x in before.items() if (why := measuring.difference(tensors[t], x))), None
        )
        if any(changed):
            problem = problem or f"{sum(changed)} places do not hold what was put there"
        if turn:
            host.append(returned)
            applied.append(whole)
            reverted.append(back)
    now = launches(bench.backend)
    # Of each place its column, its value and the element before and after, and the element's bits once more.
    moves = places * (2 + 4 * 2)
    row: Row = {
        "benchmark": "expert_apply_",
        "case": f"{len(tensors)} tensors, {places:,} places",
        "elements": places,
        "passes": 1,
        "bytes": moves,
        "launches": {name: now[name] - counted.get(name, 0) for name in now if now[name] > counted.get(name, 0)},
        "problem": problem,
    }
    if problem is None:
        middle = statistics.median(applied)
        row |= {"seconds": middle, "seconds_all": applied, "gb_per_s": moves / middle / 1e9, "bar": None}
        row |= {"limit": "copy", "fraction": moves / middle / bench.limits["copy"], "bar_met": None}
        row |= {"host_seconds": statistics.median(host), "revert_seconds": statistics.median(reverted)}
        row["within"] = {"most": MOST_SECONDS, "bar_met": middle <= MOST_SECONDS if bench.elements is None else None}
    yield row
    tensors.clear()
    release()


def worn(x: torch.Tensor, part: ops.ExpertPart, by: str) -> torch.Tensor:
    """One tensor with its part, by the CPU."""
    result = x.clone()
    there = ops.Expert(x.shape, part.columns.cpu(), part.values.cpu())
    ops.expert_apply_([result], [there.part(0, part.scale)], backend=by)
    return result


def taken(bench: Bench, run: Callable[[], object]) -> tuple[object, float, float]:
    """What a call returns, and the seconds until it returns, and until the device has done its work."""
    bench.settle()
    start = time.perf_counter()
    result = run()
    returned = time.perf_counter() - start
    bench.settle()
    return result, returned, time.perf_counter() - start
