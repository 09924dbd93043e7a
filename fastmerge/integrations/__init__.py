"""fastmerge inside the tools that people merge with: one part for each, which is imported when it is asked for.

A tool is a peer, not a dependency: nothing here imports one until its `enable()` is called.
"""

from __future__ import annotations

import importlib
from types import ModuleType

_TOOLS = ("fusion_bench", "mergekit", "peft", "sd_mecha")


def __getattr__(name: str) -> ModuleType:
    """Import a tool's part when it is first asked for."""
    if name in _TOOLS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_TOOLS})
