"""What `fastmerge methods` and `fastmerge env` tell."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from pathlib import Path
from typing import Any

from fastmerge.cli_run import without_garbage_collection

_CPU_FEATURES = (
    "sse4_2",
    "avx",
    "avx2",
    "f16c",
    "fma",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_bf16",
    "asimd",
    "sve",
)


def method_page(method: dict[str, Any]) -> str:
    """A method as `methods.describe` has it, for a person."""
    heading = [
        ("title", method["title"]),
        ("source", method["source"]),
        (
            "base model",
            "required" if method["needs_base"] else "taken if given" if method["takes_base"] else "not needed",
        ),
        ("passes", method["passes"]),
    ]
    columns = ("PARAMETER", "SET", "DEFAULT", "RANGE", "MEANING")
    parameters = [
        (
            each["name"],
            "per model" if each["per_model"] else "once",
            "required" if each["required"] else _shown(each["default"]),
            _shown(each["range"]),
            each["help"],
        )
        for each in method["parameters"]
    ]
    return "\n".join([method["name"], *_table(heading), "", *_table([columns, *parameters])])


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "-" if value is None else str(value)


def environment() -> list[tuple[str, str]]:
    """What there is here: versions, processor, GPUs, backends and where they work, environment variables."""
    from fastmerge.engine.manifest import package_version

    with without_garbage_collection():
        import torch

        from fastmerge import backends

    rows = [
        ("fastmerge", package_version("fastmerge")),
        ("python", f"{platform.python_version()} ({sys.executable})"),
        ("torch", package_version("torch")),
        ("system", platform.platform()),
        ("processor", _processor()),
    ]
    available = backends.available()
    if available["cpu"] is None:
        from fastmerge.backends import cpu

        rows.append(("instructions", f"{cpu.isa()} (available: {', '.join(cpu.isas())})"))
        rows.append(("threads", str(cpu.threads())))
    else:
        rows.append(("instructions", "those that torch chooses: the compiled kernels do not work here"))
        rows.append(("threads", str(torch.get_num_threads())))
    rows += _gpus()
    for name, reason in available.items():
        works = f"works on {_devices_of(name)}" if reason is None else f"missing: {reason}"
        rows.append((f"backend {name}", " ".join(works.split())))
    rows += [(f"{kind} tensors", _backend_for(device)) for kind, device in _KINDS.items()]
    variables = sorted(key for key in os.environ if key.startswith("FASTMERGE_"))
    rows += [(key, os.environ[key]) for key in variables] or [("FASTMERGE_*", "no such variable is set")]
    return rows


_KINDS = {"CPU": "cpu", "CUDA": "cuda"}
"""The kinds of tensors that ops take, as people call them, and their devices."""


def _gpus() -> list[tuple[str, str]]:
    """Each GPU, with its memory; or why there is none."""
    import torch

    from fastmerge.engine.device import no_gpu
    from fastmerge.sizes import format_size

    missing = no_gpu()
    if missing is not None:
        return [("gpu", f"none: {missing}")]
    rows = []
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        rows.append((f"gpu cuda:{index}", f"{about.name}, {format_size(about.total_memory, binary=True)}"))
    return rows


def _devices_of(name: str) -> str:
    """The kinds of tensors that a backend takes."""
    from fastmerge import backends
    from fastmerge.errors import BackendError

    kinds = []
    for kind, device in _KINDS.items():
        with contextlib.suppress(BackendError):
            backends.resolve(name, device)
            kinds.append(kind)
    return f"{' and '.join(kinds)} tensors"


def _backend_for(device: str) -> str:
    """Where ops on tensors of a device run if nothing else is asked for, and why there."""
    from fastmerge import backends
    from fastmerge.engine.device import no_gpu
    from fastmerge.errors import BackendError

    missing = no_gpu() if device == "cuda" else None
    if missing is not None:
        return f"none here: {missing}"
    try:
        name = backends.name_of(backends.resolve(None, device))
    except BackendError as error:
        return f"ops refuse them: {error}"
    forced = os.environ.get(backends.ENVIRONMENT_VARIABLE)
    if forced not in (None, "", "auto"):
        return f"ops run on {name}, since {backends.ENVIRONMENT_VARIABLE} names it"
    why = "" if name != "reference" else ", in plain torch, since no faster backend works"
    return f"ops run on {name}{why or ', the fastest that works'}"


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    flags = set((facts.get("flags") or facts.get("Features") or "").split())
    present = [feature for feature in _CPU_FEATURES if feature in flags]
    return f"{facts.get('model name', platform.machine())}, {os.cpu_count()} cores, {' '.join(present) or 'no SIMD'}"


def print_table(rows: list[tuple[Any, ...]] | list[tuple[str, str]]) -> None:
    """Rows of cells, in columns."""
    print("\n".join(_table(rows)))


def _table(rows: list[Any]) -> list[str]:
    """Rows of cells as lines; the last column is as wide as it likes."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]) - 1)]
    return [
        "  ".join([f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)] + row[-1:]) for row in cells
    ]
