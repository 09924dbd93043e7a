"""Which kernel backends work here, and for those that do not, why.

A backend is a module with the functions of `fastmerge.backends.reference`. Nothing is imported until it is asked for,
and a backend that is missing or broken never breaks `import fastmerge`.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import os
from types import ModuleType

import torch

from ..errors import BackendError
from . import preferences

ENVIRONMENT_VARIABLE = "FASTMERGE_BACKEND"

# In the order in which "auto" prefers them.
_NAMES = ("cuda", "triton", "cpu", "reference")
FOR_GPUS = ("cuda", "triton")
"""Those with kernels for GPUs."""

# The devices for which "auto" takes them. A backend's own DEVICES may be more: by name it takes those, too.
_DEVICES = {"cuda": ("cuda",), "triton": ("cuda",), "cpu": ("cpu",), "reference": ("cpu", "cuda")}
_MISSING_HINT = {
    "cuda": "build it with nvcc at hand: `pip install .` in the sources",
    "cpu": "build it with a C++ compiler at hand: `pip install .` in the sources",
    "triton": "it comes with torch for GPUs, or by `pip install triton`",
}

_loaded: dict[str, ModuleType | str] = {}
_misconfigured: set[str] = set()


def names() -> tuple[str, ...]:
    """The names of all backends of this version, working or not, fastest first."""
    return _NAMES


def _load(name: str) -> ModuleType | str:
    """The backend's module, or the sentence that says why there is none."""
    if name not in _loaded:
        try:
            module = importlib.import_module(f"{__name__}.{name}")
            # A module that can be imported where it cannot run (to compile for machines elsewhere) says so itself.
            getattr(module, "check_usable", _always)()
            _loaded[name] = module
        except BackendError as error:
            # It is there, but a setting asks of it what it cannot do: nothing else may quietly take its place.
            _loaded[name] = str(error)
            _misconfigured.add(name)
        except Exception as error:
            # Whatever else is wrong with one backend must not reach the others.
            sentence = f"{type(error).__name__}: {error}"
            missing_module = isinstance(error, ImportError) and error.name
            _loaded[name] = f"{sentence} ({_MISSING_HINT[name]})" if missing_module else sentence
    return _loaded[name]


def _always() -> None:
    """Usable wherever it can be imported."""


def reason(name: str) -> str | None:
    """Why the backend does not work here, or None when it does. BackendError: there is no such backend."""
    _check_known(name, "backend")
    found = _load(name)
    return found if isinstance(found, str) else None


def available() -> dict[str, str | None]:
    """All backends, fastest first: None for each that works, and for each that does not, the reason."""
    return {name: reason(name) for name in _NAMES}


def resolve(name: str | None = None, device: torch.device | str | None = None) -> ModuleType:
    """The module of a backend.

    name: a backend's name; None or "auto" for the one that the environment variable FASTMERGE_BACKEND names, else the
        fastest that works for the device.
    device: where the tensors are; None means the CPU.
    Errors: BackendError when the name is unknown, the backend does not work here, or it cannot work on the device.
    """
    source = "backend"
    if name is None or name == "auto":
        source = ENVIRONMENT_VARIABLE
        name = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    kind = "cpu" if device is None else device.type if isinstance(device, torch.device) else torch.device(device).type
    if name == "auto":
        for candidate in _NAMES:
            if kind in _DEVICES[candidate]:
                found = _loaded.get(candidate) or _load(candidate)
                if not isinstance(found, str):
                    return _preferred(found, kind) if candidate in FOR_GPUS else found
                if candidate in _misconfigured:
                    raise BackendError(found)
        raise BackendError(f"no backend works on device {kind!r}; move the tensors to the CPU with .cpu()")
    _check_known(name, source)
    found = _load(name)
    if isinstance(found, str):
        raise BackendError(f"{source}={name!r} was asked for but does not work here: {found}")
    allowed = getattr(found, "DEVICES", _DEVICES[name])
    if kind not in allowed:
        raise BackendError(
            f"{source}={name!r} does not work on device {kind!r}; move the tensors to {' or '.join(allowed)} first"
        )
    return found


def _preferred(first: ModuleType, kind: str) -> ModuleType:
    """The first backend for a GPU, but for what is another's: where measurements of this kind of GPU say so, and calls
    of more models than it takes.
    """
    faster = preferences.FASTER.get(_capability(), {}) if preferences.FASTER else {}
    wanted = {name for name in faster.values() if name != name_of(first)}
    others = {name: found for name in wanted if not isinstance(found := _load(name), str)}

    def next_after(name: str) -> ModuleType | None:
        rest = (_load(other) for other in _NAMES[_NAMES.index(name) + 1 :] if kind in _DEVICES[other])
        return next((found for found in rest if not isinstance(found, str)), None)

    # To all who use it, it is a module.
    return preferences.Preferring(first, others, faster, next_after)  # type: ignore[return-value]


@functools.cache
def _capability() -> str:
    """The compute capability of the current GPU, as in "9.0"; nothing where there is none."""
    if not torch.cuda.is_available():
        return ""
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}"


def name_of(module: ModuleType) -> str:
    """The name of a backend's module, as `resolve` takes it."""
    return module.__name__.rpartition(".")[2]


def _check_known(name: str, source: str) -> None:
    if name not in _NAMES:
        near = difflib.get_close_matches(str(name), [*_NAMES, "auto"], n=1)
        guess = f"; did you mean {near[0]!r}?" if near else ""
        raise BackendError(f"{source}={name!r} is not a backend of this version; there are {', '.join(_NAMES)}{guess}")
