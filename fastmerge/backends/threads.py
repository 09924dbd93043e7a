"""How many threads the kernels use: what this process may use, not what the host has."""

from __future__ import annotations

import math
import os
from pathlib import Path

from ..errors import BackendError

ENVIRONMENT_VARIABLE = "FASTMERGE_THREADS"


def _quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """The CPU quota of the process's control group in cores (version 2, then version 1), or None."""
    try:
        limit, period = (root / "cpu.max").read_text().split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        pass
    try:
        limit_us = int((root / "cpu/cpu.cfs_quota_us").read_text())
        period_us = int((root / "cpu/cpu.cfs_period_us").read_text())
        return limit_us / period_us if limit_us > 0 and period_us > 0 else None
    except (OSError, ValueError):
        return None


def default_threads() -> int:
    """FASTMERGE_THREADS, else the cores that the process's affinity and its control group's quota leave it.

    Errors: BackendError when FASTMERGE_THREADS is not a positive whole number.
    """
    forced = os.environ.get(ENVIRONMENT_VARIABLE)
    if forced:
        if not forced.isdigit() or int(forced) < 1:
            raise BackendError(
                f"{ENVIRONMENT_VARIABLE}={forced!r} is not a positive whole number; set it to one, or unset it"
            )
        return int(forced)
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not every system has affinities
        cores = os.cpu_count() or 1
    quota = _quota()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))
