"""The manifest: what went into a merge and what came out, tensor by tensor, so that two merges can be compared."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any, Protocol

FORMAT = 1
"""Version of the manifest's own layout."""


class TensorLike(Protocol):
    """What the manifest needs to know of a tensor: name, safetensors dtype name, shape."""

    @property
    def name(self) -> str:
        """Name of the tensor."""
        ...

    @property
    def dtype(self) -> str:
        """Its safetensors dtype name."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        ...


def merge_digest(tensors: Iterable[TensorLike], digests: Mapping[str, str]) -> str:
    """One SHA-256 (hex) over all tensors of a model.

    It covers the sorted lines ``name dtype shape digest`` (shape as in ``[2,3]``, each line ended by a newline) and
    nothing else: the same tensors have the same digest however they are sharded and whenever they were made.

    Args:
        tensors: the tensors.
        digests: BLAKE3 (hex) of each tensor's bytes, by name.
    """
    lines = sorted(
        f"{tensor.name} {tensor.dtype} {json.dumps(list(tensor.shape), separators=(',', ':'))} {digests[tensor.name]}\n"
        for tensor in tensors
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def build_manifest(
    *,
    method: str,
    config: Any,
    inputs: Sequence[Mapping[str, Any]],
    tensors: Sequence[TensorLike],
    digests: Mapping[str, str],
    numerics: str,
    seed: int,
    backend: str,
    **extra: Any,
) -> dict[str, Any]:
    """Build the contents of ``manifest.json``.

    Args:
        method: name of the merge method.
        config: the configuration as given: a dict, or the YAML text.
        inputs: the identity of each model, base first (see ``Checkpoint.identity``).
        tensors: the output's tensors.
        digests: BLAKE3 (hex) of each tensor's bytes, by name.
        numerics: ``"fp32"`` or ``"mergekit"``.
        seed: the seed of the random methods.
        backend: the backend that computed.
        **extra: further entries, such as counts of non-finite values. They may not replace the ones above.

    Returns:
        A dict that ``json.dumps`` accepts, with the key ``digest`` (see :func:`merge_digest`).
    """
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "digest": merge_digest(tensors, digests),
        "versions": versions(),
        "method": method,
        "numerics": numerics,
        "seed": seed,
        "backend": backend,
        "config": config,
        "inputs": [dict(identity) for identity in inputs],
    }
    clashes = sorted(set(extra) & set(manifest))
    if clashes:
        raise ValueError(f"The manifest has its own entry {clashes[0]!r}.")
    manifest |= extra
    manifest["tensors"] = {
        tensor.name: {"dtype": tensor.dtype, "shape": list(tensor.shape), "blake3": digests[tensor.name]}
        for tensor in sorted(tensors, key=lambda tensor: tensor.name)
    }
    return manifest


def versions() -> dict[str, str]:
    """Versions of fastmerge, torch and Python, found without importing torch."""
    return {
        "fastmerge": package_version("fastmerge"),
        "torch": package_version("torch"),
        "python": platform.python_version(),
    }


def package_version(name: str) -> str:
    """The version of a package, from the module if it is imported, else from its metadata, else ``"unknown"``."""
    version = getattr(sys.modules.get(name), "__version__", None)
    if version is not None:
        return str(version)
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown"
