"""PCB-Merging over 2^33 parameters that no disk holds: time per parameter, memory, and whether the counts are right.

A generator stands in for the checkpoints: tensors of 2^27 elements that repeat one stretch of random numbers. So every
order statistic of all of them together is known from sorting that stretch once, and what the merge finds is compared
with it. Three sizes show that time grows with the size and memory does not.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path

import torch

from fastmerge import methods, ops
from fastmerge.engine.executor import execute
from fastmerge.engine.plan import make_plan
from fastmerge.engine.safetensors_header import TensorInfo

PERIOD = 1 << 22
TENSOR = 1 << 27
MODELS = 2
DENSITY = 0.1
VARIANT = "vision_es"


class Repeating:
    """A model whose every tensor is one stretch of bf16 numbers, over and over."""

    config = None
    tied = None

    def __init__(self, ref: str, stretch: torch.Tensor, tensors: int) -> None:
        self.ref = ref
        self.stretch = memoryview(stretch.view(torch.uint8).numpy())
        self.tensors = {
            name: TensorInfo(name, "BF16", (TENSOR,), None, 0, 2 * TENSOR)
            for name in (f"layers.{number}.weight" for number in range(tensors))
        }

    def same(self, one: str, other: str) -> bool:
        """Each tensor counts."""
        return False

    def read_into(self, info: TensorInfo, start_byte: int, buffer: memoryview) -> None:
        """The stretch, from wherever it is cut."""
        done = 0
        while done < len(buffer):
            at = (start_byte + done) % len(self.stretch)
            count = min(len(buffer) - done, len(self.stretch) - at)
            buffer[done : done + count] = self.stretch[at : at + count]
            done += count


class Checking:
    """Takes the merged bytes and compares them with the stretch that they must repeat."""

    def __init__(self, expected: torch.Tensor) -> None:
        self.expected = memoryview(expected.view(torch.uint8).numpy())
        self.checked = 0

    def target(self, name: str, start: int, stop: int) -> None:
        """Nothing is kept."""
        return None

    def write(self, name: str, start_byte: int, data: memoryview) -> None:
        """Compare."""
        done = 0
        while done < len(data):
            at = (start_byte + done) % len(self.expected)
            count = min(len(data) - done, len(self.expected) - at)
            if data[done : done + count] != self.expected[at : at + count]:
                raise SystemExit(f"{name}: wrong values near byte {start_byte + done}")
            done += count
        self.checked += len(data) // 2


def expected_of(base: torch.Tensor, tuned: list[torch.Tensor], repeats: int) -> torch.Tensor:
    """The merged stretch, its order statistics found by sorting one stretch that is there `repeats` times."""
    deltas = [one.float() - base.float() for one in tuned]
    numel = PERIOD * repeats
    low, high, threshold = ops.pcb_ranks(numel, DENSITY, VARIANT)
    clip = []
    for delta in deltas:
        ordered = delta.abs().sort().values
        clip.append([float(ordered[low // repeats]), float(ordered[high // repeats])])
    rule = ops.PcbRule(VARIANT, clip=torch.tensor(clip))
    scores = ops.pcb_scores(None, deltas, rule, backend="reference")
    ordered = scores.sort(dim=1).values
    thresholds = torch.stack([ordered[:, threshold // repeats], ordered[:, -1]], dim=1)
    rule = ops.PcbRule(VARIANT, clip=rule.clip, thresholds=thresholds)
    return ops.pcb_apply(base, tuned, [1.0] * MODELS, rule, backend="reference")


def run(tensors: int, budget: int) -> dict[str, float]:
    """Merge so many tensors; seconds, and the process's highest memory so far."""
    generator = torch.Generator().manual_seed(0)
    base = (0.02 * torch.randn(PERIOD, generator=generator)).bfloat16()
    tuned = [(base + 1e-3 * torch.randn(PERIOD, generator=generator)).bfloat16() for _ in range(MODELS)]
    expected = expected_of(base, tuned, tensors * TENSOR // PERIOD)
    plan = make_plan(
        methods.get("pcb"),
        Repeating("base", base, tensors),
        [Repeating(f"model-{number}", one, tensors) for number, one in enumerate(tuned)],
        lambda name: ({"variant": VARIANT}, [{"density": DENSITY}] * MODELS),
        budget=budget,
    )
    sink = Checking(expected)
    started = time.perf_counter()
    outcome = execute(plan, sink)
    seconds = time.perf_counter() - started
    if sink.checked != tensors * TENSOR:
        raise SystemExit(f"{sink.checked} of {tensors * TENSOR} elements were merged")
    return {
        "parameters": tensors * TENSOR,
        "seconds": seconds,
        "nanoseconds_per_parameter": seconds / (tensors * TENSOR) * 1e9,
        "bytes_read": outcome.bytes_read,
        "passes": outcome.bytes_read / (2 * (MODELS + 1) * tensors * TENSOR),
        "peak_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--log2", type=int, nargs="+", default=[29, 31, 33], help="sizes, as powers of two from 27 on")
    parser.add_argument("--budget", type=int, default=1 << 28)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    print("parameters     seconds  ns each  passes  peak MB")
    for power in arguments.log2:
        row = run(1 << (power - 27), arguments.budget)
        rows.append(row)
        print(
            f"2^{power:<10} {row['seconds']:9.1f} {row['nanoseconds_per_parameter']:8.2f} {row['passes']:7.2f} "
            f"{row['peak_megabytes']:8.0f}",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
