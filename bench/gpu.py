"""What fastmerge promises of a GPU, measured on one, in one run; raw figures as JSON.

    python bench/gpu.py --json bench/results/local/gpu.json
    python bench/gpu.py --only kth pcb --repeat 9
    TRITON_INTERPRET=1 python bench/gpu.py --device cpu --elements 4096 --repeat 1      # does everything run?

The limits are measured in the same run: a device-to-device copy (bytes read plus bytes written), the fastest of torch's
reductions (bytes read), copies between pinned host memory and the device. Times are medians by CUDA events after a
warm-up, with more written between two runs than the L2 holds; inputs are random. Each input and output counts once per
pass; how many passes an op takes is in its row. Every result is held against the compiled CPU backend on the same
inputs, bit for bit, at full size; a row whose check is red reports no speed. A bar that is missed is said, not failed.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from adversarial import family, values
from make_family import make_family
from measure import environment

from fastmerge import backends, measuring, ops

BF16 = torch.bfloat16
HARD = ("equal", "two_values", "denormals", "heavy_tail")
WEIGHTS = (1.0, 0.7, 0.4)
DENSITY = 0.5
CONSENSUS = {"ties": measuring.TIES, "task_arithmetic": measuring.TASK_ARITHMETIC}
CLIPPED = {"script": 1e-4, "vision_es": 1e-2}
"""The share of magnitudes that PCB-Merging's released code clips at either end."""
PCB_DENSITY = 0.1
GIB = 1 << 30

Row = dict[str, Any]


# -- how a row is made -----------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """One run: the device, the sizes, and the limits that figures are held against."""

    device: str
    backend: str
    elements: int | None
    repeat: int
    models: tuple[int, ...]
    folder: Path
    limits: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.watch = measuring.Stopwatch(self.device, self.bytes(1 << 28))

    def size(self, log2: int) -> int:
        """Elements: the promise's, or what is asked for on the command line."""
        return 1 << log2 if self.elements is None else self.elements

    def bytes(self, full: int) -> int:
        """Bytes of a limit's buffer: small where everything is."""
        return full if self.elements is None else min(full, 64 * self.elements)

    def timed(self, run: Callable[[], object]) -> list[float]:
        """Seconds of so many calls, after one to warm up."""
        self.watch.once(run)
        return [self.watch.once(run) for _ in range(self.repeat)]

    def row(
        self,
        benchmark: str,
        case: str,
        run: Callable[[], Any],
        *,
        elements: int,
        passes: int,
        moves: int,
        limit: str,
        bar: float | None,
        check: Callable[[Any], str | None],
        out: torch.Tensor | None = None,
    ) -> Row:
        """Check a result, time it, check again, tell it as a fraction of a limit; `out` is poisoned before checks."""

        def problem_of() -> str | None:
            if out is not None:
                out.fill_(float("nan"))
            return check(run())

        row: Row = {"benchmark": benchmark, "case": case, "elements": elements, "passes": passes, "bytes": moves}
        before = launches(self.backend)
        problem = problem_of()
        now = launches(self.backend)
        row["launches"] = {name: now[name] - before.get(name, 0) for name in now if now[name] > before.get(name, 0)}
        if problem is None:
            seconds = self.timed(run)
            problem = problem_of()
        row["problem"] = problem
        if problem is None:
            middle = statistics.median(seconds)
            fraction = moves / middle / self.limits[limit]
            row |= {"seconds": middle, "seconds_all": seconds, "gb_per_s": moves / middle / 1e9}
            row |= {"limit": limit, "fraction": fraction, "bar": bar}
            row["bar_met"] = None if bar is None else fraction >= bar
        return row


def launches(backend: str) -> dict[str, int]:
    """How often each of Triton's kernels was launched so far, and those in CUDA together."""
    if backend == "cuda":
        from fastmerge.backends.cuda.launch import compiled

        return {"kernels in CUDA": compiled.launches()}
    if backend != "triton":
        return {}
    from fastmerge.backends.triton.launch import launched

    return dict(launched)


def on_host(run: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """A result by the compiled kernels, or by the definition where there are none."""
    return run("reference" if backends.reason("cpu") else "cpu")


def same(expected: torch.Tensor) -> Callable[[torch.Tensor], str | None]:
    """A check: bit for bit this."""
    return lambda result: measuring.difference(result, expected)


def release() -> None:
    """Give the device's memory back before a benchmark takes its own."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# -- limits ----------------------------------------------------------------------------------------------------------


def limits(bench: Bench) -> None:
    """Measure what no kernel and no merge can beat here: bytes per second."""
    bench.limits["copy"] = measuring.copy_bandwidth(bench.device, bench.bytes(4 * GIB))
    source = torch.randint(-100, 100, (bench.bytes(2 * GIB) // 4,), dtype=torch.int32, device=bench.device).float()
    reductions = {"sum": source.sum, "max": source.max, "norm": source.norm}
    rates = {name: source.nbytes / statistics.median(bench.timed(run)) for name, run in reductions.items()}
    # A read cannot be slower than the reading half of the best that was seen of a copy.
    bench.limits["read"] = max(*rates.values(), bench.limits["copy"])
    del source
    release()
    host = torch.randint(-100, 100, (bench.bytes(GIB) // 4,), dtype=torch.int32)
    if bench.device == "cuda":
        host = host.pin_memory()
    there = torch.empty_like(host, device=bench.device)
    for name, run in (
        ("host_to_device", lambda: there.copy_(host, non_blocking=True)),
        ("device_to_host", lambda: host.copy_(there, non_blocking=True)),
    ):
        bench.limits[name] = host.nbytes / statistics.median(bench.timed(run))


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


# -- many tensors ----------------------------------------------------------------------------------------------------


def many(bench: Bench) -> Iterator[Row]:
    """10,000 tensors of 4 K elements within 1.5 times the time of one tensor with as many elements."""
    models = bench.models[0]
    count, each = (10_000, 4096) if bench.elements is None else (7, bench.elements)
    base, tuned = family("normal", BF16, count * each, models, bench.device)
    out = torch.zeros_like(base)
    weights = [WEIGHTS[i % len(WEIGHTS)] for i in range(models)]
    parts = [list(x.view(count, each)) for x in (base, *tuned)]
    outs = list(out.view(count, each))
    host = [list(x.cpu().view(count, each)) for x in (base, *tuned)]
    for method, arguments in CONSENSUS.items():

        def merge(arguments: Any = arguments) -> torch.Tensor:
            ops.consensus_merge_many(parts[0], parts[1:], weights, out=outs, backend=bench.backend, **arguments)
            return out

        def together(arguments: Any = arguments) -> torch.Tensor:
            return ops.consensus_merge(base, tuned, weights, out=out, backend=bench.backend, **arguments)

        expected = on_host(
            lambda by, arguments=arguments: torch.stack(
                ops.consensus_merge_many(host[0], host[1:], weights, backend=by, **arguments)
            ).view(-1)
        )
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
            check=same(expected),
            out=out,
        )
        if row["problem"] is None:
            alone = statistics.median(bench.timed(together))
            times = row["seconds"] / alone
            row["one_tensor"] = {"seconds": alone, "times": times, "most": 1.5, "bar_met": times <= 1.5}
        yield row


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


# -- PCB-Merging -----------------------------------------------------------------------------------------------------


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


# -- whole merges ----------------------------------------------------------------------------------------------------


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


# -- all of it -------------------------------------------------------------------------------------------------------


PARTS = {
    "consensus": consensus,
    "histogram": histogram,
    "masks": masks,
    "kth": kth,
    "many": many,
    "pcb": pcb,
    "llama": llama,
    "whole": whole,
    "hard": hard,
}


def render(row: Row) -> str:
    """A row for people."""
    label = f"{row['benchmark']:<17} {row['case']:<34}"
    if row.get("problem") is not None:
        return f"{label} RED: {row['problem']}"
    text = f"{label} {row['seconds'] * 1e3:10.3f} ms {row['gb_per_s']:8.1f} GB/s"
    text += f" {row['fraction']:6.1%} of {row['limit']}, {row['passes']} pass(es){verdict(row)}"
    for name in ("torch_topk", "torch_sort", "eager"):
        peer = row.get(name)
        if isinstance(peer, dict):
            text += f"; {peer['times']:.1f} x {name}{verdict(peer)}"
        elif peer is not None:
            text += f"; {name}: {peer}"
    if isinstance(alone := row.get("one_tensor"), dict):
        met = "ok" if alone["bar_met"] else "MISSED"
        text += f"; {alone['times']:.2f} x one tensor (<= {alone['most']}: {met})"
    if row.get("extra_memory") is not None:
        met = "ok" if row["extra_memory_bar_met"] else "MISSED"
        text += f"; extra memory {row['extra_memory']:.3f} (<= {row['extra_memory_bar']}: {met})"
    return text


def below(figures: Row) -> int:
    """How many bars are missed, those against peers included."""
    own = sum(value is False for name, value in figures.items() if name.endswith("bar_met"))
    return own + sum(below(value) for value in figures.values() if isinstance(value, dict))


def verdict(figures: Row) -> str:
    """Whether a bar is met, where there is one."""
    if figures.get("bar") is None:
        return ""
    return f" (>= {figures['bar']:g}: {'ok' if figures['bar_met'] else 'MISSED'})"


def arguments(given: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--backend", default=None, help="by default cuda or triton where one works, else cpu")
    parser.add_argument("--elements", type=int, default=None, help="of every tensor, for a dry run")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--models", type=int, nargs="+", default=[3, 8], help="the first is used for hard inputs")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"), help="where whole merges read and write")
    parser.add_argument("--seconds", type=float, default=None, help="begin no further part after so many")
    parser.add_argument("--json", type=Path, default=None)
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> int:
    """Run it; 0 when every result was right."""
    options = arguments(given)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "gpu.py: this torch sees no GPU; a dry run takes --device cpu --elements 4096 --repeat 1", file=sys.stderr
        )
        return 2
    working = [name for name in ("cuda", "triton") if backends.reason(name) is None]
    backend = options.backend or (working[0] if working else "cpu")
    began = time.perf_counter()
    bench = Bench(options.device, backend, options.elements, options.repeat, tuple(options.models), options.folder)
    limits(bench)
    print("  ".join(f"{name} {rate / 1e9:.1f} GB/s" for name, rate in bench.limits.items()), flush=True)
    report: dict[str, Any] = {
        "environment": environment() | measuring.machine(options.device),
        "command": sys.argv[1:] if given is None else given,
        "backend": backend,
        "limits_bytes_per_s": bench.limits,
        "rows": [],
        "skipped": [],
    }
    for name in options.only:
        if options.seconds is not None and time.perf_counter() - began > options.seconds:
            report["skipped"].append(name)
            continue
        release()
        start = time.perf_counter()
        try:
            for row in PARTS[name](bench):
                report["rows"].append({"part": name, **row})
                print(render(row), flush=True)
        except Exception as error:  # what one part cannot do must not cost the others' figures
            message = f"{type(error).__name__}: {error}"
            report["rows"].append({"part": name, "benchmark": name, "case": "-", "problem": message})
            print(render(report["rows"][-1]), flush=True)
        report.setdefault("part_seconds", {})[name] = time.perf_counter() - start
        if options.json is not None:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(report, indent=1) + "\n")
    red = [row for row in report["rows"] if row.get("problem") is not None]
    missed = sum(below(row) for row in report["rows"])
    skipped = ", ".join(report["skipped"]) or "nothing"
    print(f"{len(report['rows'])} rows, {len(red)} red, {missed} figures below a bar; skipped: {skipped}")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
