"""What all tests share: how hypothesis runs, and memory whose use before it is written shows."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

# Without a GPU, kernels in Triton run in its interpreter. It must be chosen before Triton is imported.
# Those in CUDA C++ run in the emulator, where it was built.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if importlib.util.find_spec("fastmerge._cuda_emulated") is not None:
        os.environ.setdefault("FASTMERGE_CUDA_EMULATED", "1")

settings.register_profile(
    "default",
    max_examples=200,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("thorough", settings.get_profile("default"), max_examples=2000)
# For checks/mutations.py: that there is a counterexample is enough, and which is the smallest does not matter.
settings.register_profile(
    "first_failure", settings.get_profile("default"), phases=[Phase.explicit, Phase.reuse, Phase.generate]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


# Beside other workers each has one core: a second thread of torch's would only be waited for. Tests of the kernels' own
# threads say how many they want.
if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1:
    torch.set_num_threads(1)

# Memory that a test gave back goes to the next one instead of the system, which would clear its pages first: a third of
# the time of small kernels. Of this process alone; what a test starts allocates as users' programs do.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
if mallopt is not None:
    mallopt(M_MMAP_THRESHOLD, 32 << 20)
    mallopt(M_TRIM_THRESHOLD, 1 << 30)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that hold slow tests come first: beside them, the many quick ones keep the other workers busy."""
    slow = {item.path for item in items if item.get_closest_marker("slow") is not None}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="module")
def poisoned_memory() -> Iterator[None]:
    """torch.empty returns NaN or the largest integer everywhere: an element that nobody wrote fails the test."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


INTERPRETED_EXAMPLES = int(os.environ.get("FASTMERGE_TRITON_EXAMPLES", "20"))
"""Drawn examples of each test of a kernel in Triton's interpreter, which is far slower than compiled code."""


@pytest.fixture(autouse=True)
def _fewer_examples_where_kernels_are_interpreted(request: pytest.FixtureRequest) -> Iterator[None]:
    callspec = getattr(request.node, "callspec", None)
    test = getattr(request.node, "obj", None)
    given = getattr(test, "_hypothesis_internal_use_settings", None)
    interpreted = callspec is not None and callspec.params.get("backend") == "triton"
    if given is None or not interpreted or os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    fewer = settings(given, max_examples=min(given.max_examples, INTERPRETED_EXAMPLES))
    test._hypothesis_internal_use_settings = fewer
    yield
    test._hypothesis_internal_use_settings = given
