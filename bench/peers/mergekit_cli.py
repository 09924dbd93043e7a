"""mergekit's command line as a peer: the same YAML file, its own process."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path


def command(config: Path, out: Path) -> list[str] | None:
    """The command that merges ``config`` into ``out`` on the CPU, or None when mergekit is not installed here."""
    beside = Path(sys.executable).parent / "mergekit-yaml"
    program = str(beside) if beside.exists() else shutil.which("mergekit-yaml")
    return None if program is None else [program, str(config), str(out)]


def environment() -> dict[str, str]:
    """The peer reads nothing but the files it is given."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
