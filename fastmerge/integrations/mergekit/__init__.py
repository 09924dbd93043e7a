"""fastmerge inside mergekit: its planner, its reading and its writing, with these kernels in place of its own.

    import fastmerge
    fastmerge.integrations.mergekit.enable()

Or by `fastmerge-yaml` in place of `mergekit-yaml`. docs/mergekit.md tells what is replaced in which release.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import threading
from types import ModuleType

from fastmerge import backends
from fastmerge.errors import ArgumentError
from fastmerge.integrations.mergekit.group import SWITCH, Settings, Tally, reset_tally, tally
from fastmerge.integrations.mergekit.patches import MergekitError, Patch

__all__ = ["MergekitError", "Tally", "disable", "enable", "enabled", "reset_tally", "tally"]

RELEASES = {"0.1.4": "release_0_1_4", "0.1.5": "release_0_1_5"}
"""The releases of mergekit that are known, and the part that knows each."""

NUMERICS = ("mergekit", "fp32")

_patches: list[Patch] = []
_lock = threading.RLock()


def enable(*, numerics: str = "mergekit", seed: int | None = 0, backend: str = "auto") -> None:
    """Let mergekit compute by fastmerge, in this process, until `disable`.

    Replaced are the methods linear, task_arithmetic, ties, dare_linear, dare_ties, breadcrumbs, breadcrumbs_ties,
    della, della_linear, slerp and sce, as `mergekit.merge_methods.get` finds them, and the four functions of
    `mergekit.sparsify`; added are the methods pcb and fr, of one tensor at a time. What the kernels cannot take, or
    would give other numbers for, mergekit's own functions go on to compute; `tally` says what that was. Where it is
    enabled already, only the arguments change. Call it while nothing is being merged.

    Args:
        numerics: "mergekit" to round as this release of mergekit does on a CPU, on whatever device; "fp32" to compute
            in float32 and round once, as slerp and sce always do.
        seed: of the random methods: with the output tensor's name and the model's place it says which elements are
            dropped, whatever the machine. None takes a seed from torch's generator for each tensor, which
            `torch.manual_seed` sets; so do tensors without a name, and the functions of `mergekit.sparsify`, always.
        backend: "auto", or the name of a backend, which then must work wherever mergekit computes.

    Raises:
        ArgumentError: an argument that is not one of these.
        MergekitError: mergekit is not installed, or it is a release that is not known. Nothing is changed then.
        BackendError: the backend does not work here.
    """
    if numerics not in NUMERICS:
        raise ArgumentError(f"numerics = {numerics!r} is not known; choose {' or '.join(NUMERICS)}.")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise ArgumentError(f"seed = {seed!r} is not a whole number; pass one, or None for torch's generator.")
    if backend != "auto":
        device = "cuda" if backend in backends.FOR_GPUS else "cpu"
        backends.resolve(backend, device)
    with _lock:
        if not _patches:
            made = _release().patches()
            for patch in made:
                patch.put()
            _patches.extend(made)
        SWITCH.settings = Settings(numerics, seed, backend)


def disable() -> None:
    """Put everything of mergekit's back as it was: the very objects. Does nothing where it is not enabled."""
    with _lock:
        SWITCH.settings = None
        while _patches:
            _patches.pop().take_back()


def enabled() -> bool:
    """Whether mergekit computes by fastmerge now."""
    return SWITCH.settings is not None


def installed() -> str:
    """The version of mergekit that is installed. MergekitError where there is none."""
    try:
        return importlib.metadata.version("mergekit")
    except importlib.metadata.PackageNotFoundError:
        raise MergekitError("mergekit is not installed here; `pip install mergekit==0.1.5` installs it.") from None


def _release() -> ModuleType:
    """The part that knows the release that is installed."""
    version = installed()
    if version not in RELEASES:
        raise MergekitError(
            f"mergekit {version} is not known to this version of fastmerge, which would have to change it blindly; it "
            f"knows {' and '.join(RELEASES)}: install one of them, or merge with `fastmerge merge`."
        )
    return importlib.import_module(f"{__name__}.{RELEASES[version]}")
