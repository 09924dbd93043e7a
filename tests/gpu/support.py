"""What the tests on a GPU share: tensors moved there as they lie, captured graphs, and kernels that nobody waits for.

Each test has two variants for each backend. "cuda" needs a GPU and is marked `gpu`; "interpreter" runs the same body on
CPU tensors in Triton's interpreter, or in the emulator of the CUDA kernels, where there is no GPU, so that the bodies
are known to work before they meet one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from hypothesis import Phase, settings
from torch import Tensor

from fastmerge import backends
from tests.numeric import assert_bitwise_equal

BACKENDS = ("cuda", "triton")
BACKEND = BACKENDS[0]
"""Set for each test (conftest.py)."""

HERE = torch.cuda.is_available()
EXAMPLES = int(os.environ.get("FASTMERGE_GPU_EXAMPLES", 100 if HERE else 3))
"""Of each op. The interpreter takes milliseconds for each tile, and a GPU a second to compile a kernel."""

drawn = settings(max_examples=EXAMPLES, phases=(Phase.explicit, Phase.reuse, Phase.generate))
"""Without looking for a smaller example, which would compile more kernels than fit the time that a GPU is lent for."""

cuda = pytest.param("cuda", marks=pytest.mark.gpu)
each_device = pytest.mark.parametrize("device", [cuda, pytest.param("cpu", id="interpreter")])
only_cuda = pytest.mark.parametrize("device", [cuda])


def usable(device: str) -> None:
    """Skip a variant whose kernels cannot run here, with the reason."""
    missing = backends.reason(BACKEND)
    if missing is not None:
        pytest.skip(f"{BACKEND}: {missing}")
    if device == "cpu" and HERE:
        pytest.skip("kernels are compiled here, not interpreted: the variant `cuda` runs")


def moved(given: Any, device: str) -> Any:
    """Tensors, and what holds tensors, in the device's memory: same strides, as far from a 16-byte boundary as before.

    Odd addresses, which no kernel on a GPU can read, become even ones.
    """
    if isinstance(given, Tensor):
        return _moved(given, device)
    if isinstance(given, list | tuple):
        return type(given)(moved(each, device) for each in given)
    if isinstance(given, dict):
        return {name: moved(each, device) for name, each in given.items()}
    if is_dataclass(given) and not isinstance(given, type):
        return type(given)(**{each.name: moved(getattr(given, each.name), device) for each in fields(given)})
    return given


def _moved(x: Tensor, device: str) -> Tensor:
    gap = x.data_ptr() % 16 // x.element_size()
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride())) if x.numel() else 0
    memory = torch.empty(gap + span, dtype=x.dtype, device=device)
    return memory.as_strided(x.shape, x.stride(), gap).copy_(x)


def same(actual: Any, expected: Any) -> None:
    """Equal bits, wherever each is; numbers are equal."""
    if isinstance(expected, Tensor):
        assert_bitwise_equal(actual.cpu(), expected.cpu())
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            same(one, other)
    elif is_dataclass(expected):
        same(
            [getattr(actual, each.name) for each in fields(actual)],
            [getattr(expected, each.name) for each in fields(expected)],
        )
    elif isinstance(expected, float):
        same(torch.tensor(actual), torch.tensor(expected))
    else:
        assert actual == expected


@contextmanager
def by_kernels() -> Iterator[None]:
    """Fails unless a kernel of the backend is launched."""
    before = launches()
    yield
    assert launches() > before, "no kernel was launched"


def launches() -> int:
    """How many kernels the backend has launched so far."""
    if BACKEND == "triton":
        from fastmerge.backends.triton.launch import launched

        return sum(launched.values())
    if BACKEND == "cuda":
        from fastmerge.backends.cuda.launch import compiled

        return int(compiled.launches())
    return 0


@contextmanager
def nobody_waits(device: str) -> Iterator[None]:
    """Fails where the host waits for the GPU."""
    if device != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(device: str, run: Callable[[], Any]) -> Callable[[], Any]:
    """A call that replays `run` from a CUDA graph, into the same results; in the interpreter one that runs it again."""
    if device != "cuda":
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()  # compiles, which cannot be captured
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def poisoned_out(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """Memory that fails a test where it is not written."""
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


def few_models(seed: int, count: int, size: int, device: str, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """A base and models near it, with ties among their deltas; drawn on the CPU, so that they are the same anywhere."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(size, generator=generator).to(dtype)
    steps = [torch.randint(-20, 21, (size,), generator=generator) / 256 for _ in range(count)]
    return [x.to(device) for x in (base, *((base.float() + step).to(dtype) for step in steps))]
