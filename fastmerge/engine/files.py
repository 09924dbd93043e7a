"""The names of a checkpoint's files: which are weights, which belong together, which are missing."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from pathlib import Path

from fastmerge.errors import CheckpointError

PICKLE_INDEX = "pytorch_model.bin.index.json"
SAFETENSORS_INDEX = "model.safetensors.index.json"
NOT_WEIGHTS = ("adapter_model*", "adapter.safetensors", "optimizer*", "scheduler*", "rng_state*", "training_args*")
SHARD_NAME = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5,})-of-(?P<count>\d{5,})\.\w+$")


def check_all_shards(ref: str, names: list[str]) -> None:
    """Without an index, `-00002-of-00003` in the names still says how many shards there must be."""
    groups: dict[tuple[str, int], set[int]] = {}
    for name in names:
        if match := SHARD_NAME.match(name):
            groups.setdefault((match["stem"], int(match["count"])), set()).add(int(match["number"]))
    for (stem, count), numbers in groups.items():
        if len(numbers) < count:
            raise CheckpointError(
                f"{ref} has {len(numbers)} of the {count} shards {stem}-*-of-{count:05d}; download the model again."
            )


def entries(directory: Path) -> list[Path]:
    """What lies in a directory, sorted; nothing where there is none. CheckpointError: it cannot be read."""
    try:
        return sorted(directory.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read ({error.strerror}); check its permissions.") from None


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether the name fits one of the shell patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def listed(names: list[str]) -> str:
    """The first few names, for a message."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
