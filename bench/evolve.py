"""Trials on the CPU beside the generator of their random words alone, and beside the same expression in PyTorch.

Each side has its time as the least of some rounds that alternate. The generator is timed by itself, and its words are
kept nowhere, so that nothing but they is paid for. The trial is timed without words, too (CR = 1 needs none): what its
tensors' way through memory and the arithmetic take. A trial whose values are wrong has no time.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fastmerge import _cpu, measuring, ops
from fastmerge.backends import cpu
from fastmerge.reference import random

F, CR = 0.3, 0.5
KEY = {"seed": 12345, "generation": 7, "member": 5, "tensor_id": 2**40 + 3}
OF_THE_GENERATOR, OF_TORCH = 0.7, 10.0


def seconds(run: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def words(numel: int) -> None:
    """As many words as a trial needs."""
    stream = random.stream_id(random.BLEND_TRIAL, KEY["member"], KEY["generation"])
    _cpu.discarded_words(KEY["seed"], KEY["tensor_id"], stream, 0, numel)


def blend(x: Tensor, ref: Tensor) -> Tensor:
    """The expression in PyTorch, on float32 steps as ours."""
    mask = torch.rand(x.shape) < CR
    return torch.where(mask, (1 - F) * x + F * ref, x)


def difference(x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The same of differential evolution."""
    mask = torch.rand(x.shape) < CR
    return torch.where(mask, a + F * (b - c), x)


def wrong(trial: Callable[..., Tensor], tensors: list[Tensor]) -> str | None:
    """What is wrong with the first and the last stretch of a trial; they are compared with the definition."""
    result, numel, length = trial(*tensors, F, CR, **KEY, backend="cpu"), tensors[0].numel(), 1 << 18
    for first in {0, max(0, numel - length)}:
        part = slice(first, first + length)
        expected = trial(*(x[part] for x in tensors), F, CR, **KEY, offset=first, backend="reference")
        if problem := measuring.difference(result[part], expected):
            return problem
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log2", type=int, default=27, help="log2 of the elements")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None, help="of both sides")
    parser.add_argument("--isa", default=None)
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args()
    cpu.set_threads(given.threads)
    torch.set_num_threads(cpu.threads())
    if given.isa:
        cpu.set_isa(given.isa)
    numel = 1 << given.log2
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(numel, generator=generator).bfloat16() for _ in range(4)]
    out = torch.empty_like(tensors[0])
    rows, failed = [], False
    for name, trial, plain, count in (("blend", ops.blend_trial, blend, 2), ("de", ops.de_trial, difference, 4)):
        xs = tensors[:count]
        if problem := wrong(trial, xs):
            print(f"{name}: RED: {problem}")
            failed = True
            continue
        sides: dict[str, Callable[[], object]] = {
            "trial": lambda trial=trial, xs=xs: trial(*xs, F, CR, **KEY, out=out, backend="cpu"),
            "generator": lambda: words(numel),
            "without words": lambda trial=trial, xs=xs: trial(*xs, F, 1.0, **KEY, out=out, backend="cpu"),
            "torch": lambda plain=plain, xs=xs: plain(*xs),
        }
        times: dict[str, list[float]] = {side: [] for side in sides}
        for number in range(given.rounds):
            for side, run in sides.items():
                # PyTorch takes so long that two rounds tell enough.
                if side != "torch" or number < 2:
                    times[side].append(seconds(run))
        best = {side: min(each) for side, each in times.items()}
        of_generator, of_torch = best["generator"] / best["trial"], best["torch"] / best["trial"]
        rows.append({"trial": name, "elements": numel, "isa": cpu.isa(), "threads": cpu.threads(), "seconds": best})
        rows[-1] |= {"of_generator": of_generator, "of_torch": of_torch}
        print(
            f"{name:6} {numel / best['trial'] / 1e9:6.3f} Gelem/s on {cpu.threads()} threads, {cpu.isa()}: "
            f"{of_generator:.2f} of the generator alone (bar {OF_THE_GENERATOR}), "
            f"{of_torch:.1f} x PyTorch (bar {OF_TORCH:.0f}); the generator alone is at "
            f"{best['generator'] / best['without words']:.2f} of the trial without words"
        )
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
