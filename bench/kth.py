"""How fast `ops.kth_magnitude` finds the k-th magnitude of 2^28 values, beside torch's own selections in the same run.

    python bench/kth.py                      # bf16 and float32, 2^28 values, k = half of them
    python bench/kth.py --log2 24 --rounds 3 --json bench/data/kth.json

The promise: at least 1 Gelem/s on bf16 and 0.5 Gelem/s on float32. Every result is counted against: fewer than k
magnitudes lie above it and at least k do not lie below it. A wrong one gets no speed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from adversarial import DTYPES, KINDS, values
from measure import environment
from peers.torch_select import PEERS

BARS = {"bf16": 1.0, "f32": 0.5}
"""Gelem/s."""


def wrong(x: torch.Tensor, k: int, value: float) -> str | None:
    """Why `value` is not the k-th largest magnitude of `x`, or None."""
    above = at_least = 0
    for part in x.split(1 << 24):
        magnitude = part.float().abs()
        above += int((magnitude > value).sum())
        at_least += int((magnitude >= value).sum())
    return None if above < k <= at_least else f"{above} magnitudes above, {at_least} not below, k = {k}"


def timed(run: Callable[[], object], rounds: int) -> tuple[float, object]:
    """Median seconds of so many calls, and the last result."""
    seconds = []
    result: object = None
    for _ in range(rounds):
        start = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), result


def measure(dtype: str, kind: str, size: int, rounds: int, peers: bool) -> dict[str, object]:
    """One row: our rate and the peers' on the same values."""
    from fastmerge import backends, measuring, ops

    x = values(kind, DTYPES[dtype], size)
    k = size // 2
    ops.kth_magnitude([x[: 1 << 16]], 1)  # loads the kernels
    seconds, value = timed(lambda: ops.kth_magnitude([x], k), rounds)
    row: dict[str, object] = {
        "dtype": dtype,
        "kind": kind,
        "elements": size,
        "backend": backends.resolve("auto").__name__.rpartition(".")[2],
        "problem": wrong(x, k, float(value)),  # type: ignore[arg-type]
    }
    if row["problem"] is None:
        row["gelem_per_s"] = size / seconds / 1e9
        row["fraction_of_copy"] = x.nbytes / seconds / measuring.copy_bandwidth("cpu", x.nbytes)
        row["bar_met"] = size / seconds / 1e9 >= BARS[dtype]
    for name, peer in PEERS.items() if peers else ():
        seconds, value = timed(lambda peer=peer: peer(x, k), 1)
        if wrong(x, k, float(value)) is None:  # type: ignore[arg-type]
            row[name] = size / seconds / 1e9
    return row


def render(row: dict[str, object]) -> str:
    """A row for people."""
    label = f"{row['dtype']:<5} {row['kind']:<12} {row['elements']} values:"
    if row["problem"] is not None:
        return f"{label} RED: {row['problem']}"
    bar = BARS[str(row["dtype"])]
    verdict = "ok" if row["bar_met"] else "MISSED"
    text = (
        f"{label} {row['gelem_per_s']:.2f} Gelem/s on {row['backend']} (>= {bar}: {verdict}), "
        f"{row['fraction_of_copy']:.0%} of a copy's bytes"
    )
    for name in PEERS:
        if name in row:
            text += f"; torch.{name} {row[name]:.3f}"
    return text


def main(arguments: list[str] | None = None) -> int:
    """Run it; 0 when every result was right (a bar that is missed is said, not failed)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--log2", type=int, default=28, help="log2 of the number of values")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["normal"])
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args(arguments)
    rows = []
    for dtype in options.dtypes:
        for kind in options.kinds:
            rows.append(measure(dtype, kind, 1 << options.log2, options.rounds, not options.no_peers))
            print(render(rows[-1]), flush=True)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=2) + "\n")
    return 0 if all(row["problem"] is None for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
