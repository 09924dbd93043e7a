"""Whole models for bench/gpu.py: one that lies on the GPU, and merges of files and of what is in the host's memory."""

from __future__ import annotations

import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from adversarial import values
from gpu_rows import BF16, CONSENSUS, DENSITY, PCB_DENSITY, WEIGHTS, Bench, Row, on_host, release
from make_family import make_family

from fastmerge import measuring, ops

# -- on the GPU ------------------------------------------------------------------------------------------------------


LLAMA_2_7B = (32, 4096, 11008, 32000)
"""Layers, width, width within a layer, words."""


def shapes(layers: int, width: int, inner: int, words: int) -> list[tuple[int, ...]]:
    """The tensors of a model like Llama 2."""
    layer = [(width, width)] * 4 + [(inner, width)] * 2 + [(width, inner), (width,), (width,)]
    return [(words, width), *layer * layers, (width,), (words, width)]


def llama(bench: Bench) -> Iterator[Row]:
    """Eight fine-tuned models and their base, all on the GPU: does it fit, and how close to a copy's time is it?

    Thresholds are each tensor's own. A small tensor and a matrix are checked on the CPU. PCB-Merging takes the models
    as task vectors, one tensor after the other, which is what its scope `tensor` does.
    """
    size = LLAMA_2_7B if bench.elements is None else (1, 32, 48, 64)
    wanted = shapes(*size)
    models = 8 if bench.elements is None else bench.models[-1]
    total = sum(math.prod(shape) for shape in wanted)
    need = (models + 2) * 2 * total
    if bench.device == "cuda" and torch.cuda.mem_get_info()[0] < need * 1.01:
        models = int(torch.cuda.mem_get_info()[0] / (2 * total) - 2.2)
        if models < 2:
            return
    base = [values("normal", BF16, math.prod(shape), 1, bench.device).mul_(0.02) for shape in wanted]
    tuned = [[near(x, seed) for x in base] for seed in range(2, models + 2)]
    out = [torch.empty_like(x) for x in base]
    weights = [WEIGHTS[i % len(WEIGHTS)] for i in range(models)]
    sampled = sorted(range(len(wanted)), key=lambda t: (math.prod(wanted[t]), t))
    sampled = [sampled[0], sampled[len(sampled) // 2]]

    def ties() -> list[torch.Tensor]:
        return ops.consensus_merge_many(base, tuned, weights, out=out, backend=bench.backend, **measuring.TIES)

    def competing() -> list[torch.Tensor]:
        for t, target in enumerate(out):
            rows = [model[t] for model in tuned]
            ops.pcb_merge(rows, density=PCB_DENSITY, variant="vision_es", out=target, backend=bench.backend)
        return out

    def one(t: int, name: str, by: str) -> torch.Tensor:
        first, rest = base[t].cpu(), [model[t].cpu() for model in tuned]
        if name == "ties":
            merged: torch.Tensor = ops.consensus_merge(first, rest, weights, backend=by, **measuring.TIES)
        else:
            merged = ops.pcb_merge(rest, density=PCB_DENSITY, variant="vision_es", backend=by)
        return merged

    for name, run, before in (
        ("ties", ties, measuring.OF_DELTAS.get(bench.backend, 1)),
        ("pcb", competing, measuring.PCB.get(bench.backend, 3)),
    ):
        expected = {t: on_host(lambda by, t=t, name=name: one(t, name, by)) for t in sampled}

        def check(result: list[torch.Tensor], expected: dict[int, torch.Tensor] = expected) -> str | None:
            return next((why for t, x in expected.items() if (why := measuring.difference(result[t], x))), None)

        passes = 1 + before
        row = bench.row(
            "llama-2-7b",
            f"{name}, {models} models" + (" and their base" if name == "ties" else ""),
            run,
            elements=total,
            passes=passes,
            moves=(passes * (models + (name == "ties")) + 1) * 2 * total,
            limit="copy",
            bar=None,
            check=check,
        )
        if row["problem"] is None:
            once = (models + 2) * 2 * total / bench.limits["copy"]
            row |= {"inputs_bytes": (models + 1) * 2 * total, "seconds_of_one_pass_at_the_limit": once}
        yield row
    for held in (base, out, *tuned):
        held.clear()
    release()


def near(x: torch.Tensor, seed: int) -> torch.Tensor:
    """A fine-tuned tensor."""
    return values("normal", BF16, x.numel(), seed, x.device.type).mul_(1e-3).add_(x)


# -- from files and from the host's memory ---------------------------------------------------------------------------


def place(bench: Bench, scale: str) -> Path:
    """A folder in memory that holds two families, else one on the disk."""
    need = 12e9 if scale == "full" else 1e8
    if bench.folder.is_dir() and shutil.disk_usage(bench.folder).free > need:
        return Path(tempfile.mkdtemp(prefix="fastmerge-bench-", dir=bench.folder))
    return Path(tempfile.mkdtemp(prefix="fastmerge-bench-"))


def config(folders: list[Path], method: str) -> dict[str, Any]:
    """A merge of a family, the base first, as fastmerge reads it."""
    parameters: dict[str, float] = {"density": DENSITY} if method == "ties" else {}
    models = [
        {"model": str(folder), "parameters": {"weight": WEIGHTS[i % len(WEIGHTS)], **parameters}}
        for i, folder in enumerate(folders[1:])
    ]
    return {"merge_method": method, "base_model": str(folders[0]), "models": models, "dtype": "bfloat16"}


def whole(bench: Bench) -> Iterator[Row]:
    """0.8 of the bandwidth of pinned host memory to the device, from files in memory to files in memory."""
    import fastmerge

    scale = "full" if bench.elements is None else "tiny"
    work = place(bench, scale)
    try:
        made = make_family(work / "family", scale=scale)
        read = sum(file.stat().st_size for file in made.weight_files())
        out = work / "merged"
        for method in CONSENSUS:
            settings = config(made.folders, method)

            def merge(device: str = bench.device, settings: dict[str, Any] = settings) -> Any:
                shutil.rmtree(out, ignore_errors=True)
                report = fastmerge.merge_checkpoints(settings, out, device=device)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                return report

            expected = merge("cpu").digest
            row: Row = {"benchmark": "merge_checkpoints", "case": f"{method}, {scale}", "elements": made.parameters}
            row |= {"passes": 1, "bytes": read, "folder": str(work), "cpu_digest": expected}
            reports, seconds = [], []
            for _ in range(1 + min(bench.repeat, 3)):  # the first compiles
                start = time.perf_counter()
                reports.append(merge())
                seconds.append(time.perf_counter() - start)
            wrong = [report.digest for report in reports if report.digest != expected]
            yield finished(bench, row, f"another digest than the CPU's: {wrong[0]}" if wrong else None, seconds[1:]) | {
                "stages": reports[-1].seconds,
                "backend": reports[-1].backend,
            }
        shutil.rmtree(out, ignore_errors=True)
        yield from streamed(bench, made.folders, read, scale)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def streamed(bench: Bench, folders: list[Path], read: int, scale: str) -> Iterator[Row]:
    """The same models as state dicts in the host's memory, pinned and not."""
    from safetensors.torch import load_file

    import fastmerge

    states = []
    for folder in folders:
        state: dict[str, torch.Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            state |= load_file(file)
        states.append(state)
    parameters = sum(x.numel() for x in states[0].values())
    for pinned in (False, True) if bench.device == "cuda" else (False,):
        if pinned:
            states = [{name: x.pin_memory() for name, x in state.items()} for state in states]

        def merge(device: str = bench.device, states: list[Any] = states) -> dict[str, torch.Tensor]:
            base, *models = states
            weights = [WEIGHTS[i % len(WEIGHTS)] for i in range(len(models))]
            merged = fastmerge.merge(models, base=base, method="task_arithmetic", weight=weights, device=device)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return merged

        expected = merge("cpu")
        row: Row = {"benchmark": "merge", "case": f"task_arithmetic, {scale}, {'pinned' if pinned else 'pageable'}"}
        row |= {"elements": parameters, "passes": 1, "bytes": read}
        seconds = []
        problem = None
        for _ in range(1 + min(bench.repeat, 3)):
            start = time.perf_counter()
            merged = merge()
            seconds.append(time.perf_counter() - start)
            wrong = [name for name, x in expected.items() if measuring.difference(merged[name], x)]
            problem = problem or (f"{len(wrong)} tensors are others than the CPU's: {wrong[0]}" if wrong else None)
        yield finished(bench, row, problem, seconds[1:])


def finished(bench: Bench, row: Row, problem: str | None, seconds: list[float]) -> Row:
    """A row of a whole merge: its inputs' bytes per second beside what the bus carries."""
    row = row | {"problem": problem}
    if problem is not None:
        return row
    middle = statistics.median(seconds)
    fraction = row["bytes"] / middle / bench.limits["host_to_device"]
    row |= {"seconds": middle, "seconds_all": seconds, "gb_per_s": row["bytes"] / middle / 1e9}
    return row | {"limit": "host_to_device", "fraction": fraction, "bar": 0.8, "bar_met": fraction >= 0.8}
