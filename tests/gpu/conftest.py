"""Every test here runs by each backend for GPUs, and skips, with the reason, where its kernels cannot run."""

from __future__ import annotations

import pytest

from fastmerge import backends
from tests.gpu import support


@pytest.fixture(autouse=True, params=support.BACKENDS, ids=lambda name: f"by_{name}")
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend that the tests name, and that merges take by themselves."""
    monkeypatch.setattr(support, "BACKEND", request.param)
    # As first of those that "auto" tries, which what stays on the host does not see.
    monkeypatch.setattr(backends, "_NAMES", (request.param, *(x for x in backends.names() if x != request.param)))


@pytest.fixture(autouse=True)
def _usable(request: pytest.FixtureRequest, _backend: None) -> None:
    """Looks at the mark `gpu`, and at the parameter `device` of the tests that have one."""
    if request.node.get_closest_marker("gpu") is not None and not support.HERE:
        pytest.skip(
            "no CUDA GPU: torch.cuda.is_available() is False; what needs none is run by the variant `interpreter`"
        )
    call = getattr(request.node, "callspec", None)
    if call is not None and call.params.get("device") in ("cuda", "cpu"):
        support.usable(call.params["device"])
