"""What fastmerge promises of a GPU, measured on one, in one run; raw figures as JSON.

    python bench/gpu.py --json bench/results/local/gpu.json
    python bench/gpu.py --only kth pcb --repeat 9
    TRITON_INTERPRET=1 python bench/gpu.py --device cpu --elements 4096 --repeat 1      # does everything run?

The limits are measured in the same run: a device-to-device copy (bytes read plus bytes written), the fastest of torch's
reductions (bytes read), copies between pinned host memory and the device. Times are medians by CUDA events after a
warm-up, with more written between two runs than the L2 holds; inputs are random. Each input and output counts once per
pass; how many passes an op takes is in its row. Every result is held against the compiled CPU backend on the same
inputs, bit for bit, at full size; a row whose check is red reports no speed. A bar that is missed is said, not failed.

Parts are in gpu_ops.py, gpu_geometry.py, gpu_pcb.py, gpu_free.py and gpu_models.py; gpu_rows.py is how a row is made.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from gpu_free import experts, highpass
from gpu_geometry import geometry, importance
from gpu_models import llama, whole
from gpu_ops import consensus, hard, histogram, kth, many, masks, trials
from gpu_pcb import pcb
from gpu_rows import Bench, Row, limits, release
from measure import environment

from fastmerge import backends, measuring

PARTS = {
    "consensus": consensus,
    "histogram": histogram,
    "masks": masks,
    "kth": kth,
    "many": many,
    "trials": trials,
    "geometry": geometry,
    "importance": importance,
    "pcb": pcb,
    "highpass": highpass,
    "experts": experts,
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
        text += f"; {alone['times']:.2f} x one tensor by the GPU's time, {alone['whole_times']:.2f} x with the host's"
        text += f" (<= {alone['most']}: {met}); host {row['host_seconds'] * 1e3:.3f} ms"
        text += f", not prepared {row['plain']['host_seconds'] * 1e3:.1f} ms and {row['plain']['whole_times']:.1f} x"
    if isinstance(other := row.get("transforms"), dict):
        text += f"; {other['times']:.2f} x rfft2 and irfft2"
        if other["bar_met"] is not None:
            text += f" (<= {other['most']}: {'ok' if other['bar_met'] else 'MISSED'})"
    if isinstance(within := row.get("within"), dict):
        text += f"; host {row['host_seconds'] * 1e3:.3f} ms, off again {row['revert_seconds'] * 1e3:.3f} ms"
        if within["bar_met"] is not None:
            text += f" (<= {within['most'] * 1e3:g} ms: {'ok' if within['bar_met'] else 'MISSED'})"
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


def save(report: dict[str, Any], path: Path | None) -> None:
    """Write what is known so far: whole or not at all, whenever it is stopped."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(f"{path.name}.part")
    written.write_text(json.dumps(report, indent=1) + "\n")
    written.replace(path)


def main(given: list[str] | None = None) -> int:
    """Run it; 0 when every result was right. An interrupt, which is how a time limit comes, costs only the row that was
    being made.
    """
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
    save(report, options.json)
    for name in options.only:
        if options.seconds is not None and time.perf_counter() - began > options.seconds:
            report["skipped"].append(name)
            continue
        release()
        start = time.perf_counter()
        try:
            for row in PARTS[name](bench):
                report["rows"].append({"part": name, **row})
                save(report, options.json)
                print(render(row), flush=True)
        except KeyboardInterrupt:
            report["interrupted"] = name
            break
        except Exception as error:  # what one part cannot do must not cost the others' figures
            message = f"{type(error).__name__}: {error}"
            report["rows"].append({"part": name, "benchmark": name, "case": "-", "problem": message})
            print(render(report["rows"][-1]), flush=True)
        report.setdefault("part_seconds", {})[name] = time.perf_counter() - start
        save(report, options.json)
    save(report, options.json)
    red = [row for row in report["rows"] if row.get("problem") is not None]
    missed = sum(below(row) for row in report["rows"])
    skipped = ", ".join(report["skipped"]) or "nothing"
    print(f"{len(report['rows'])} rows, {len(red)} red, {missed} figures below a bar; skipped: {skipped}")
    if "interrupted" in report:
        print(f"interrupted in {report['interrupted']}; what was measured before is kept", file=sys.stderr)
        return 130
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
