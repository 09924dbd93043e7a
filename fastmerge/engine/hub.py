"""Models of the Hugging Face hub: the local cache first, the network only for what it lacks."""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

from fastmerge.engine.files import NOT_WEIGHTS, PICKLE_INDEX, SAFETENSORS_INDEX, check_all_shards, entries, matches
from fastmerge.errors import CheckpointError

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_SMALL_FILES = (
    "*.json", "*.txt", "*.model", "*.tiktoken", "*.spm", "*.bpe", "*.codes", "*.jinja", "*.py", "tokenizer*",
    "LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*", "additional_chat_templates/*",
)  # fmt: skip


def locate_on_hub(ref: str, revision: str | None = None) -> tuple[Path, str | None]:
    """Return the local directory and the commit of the hub model `org/name[@revision]`, downloading what is missing.

    Raises:
        CheckpointError: a sentence that says what was tried.
    """
    repository, _, written = ref.partition("@")
    revision = written or revision
    if not _HUB_NAME.fullmatch(repository) or len(repository) > 96:  # the hub's own limit
        raise CheckpointError(
            f"{ref} does not exist: there is no such directory or file, and it is not the name of a hub model "
            "(org/name or org/name@revision); check the path."
        )
    try:
        import huggingface_hub
    except ImportError:
        raise CheckpointError(
            f"{ref} is not a directory or file here, and huggingface_hub is not installed to look it up on the hub; "
            "check the path or `pip install huggingface_hub`."
        ) from None

    cached = _cached(repository, revision)
    if cached is not None and _has_weights(cached) and _has_small_files(cached):
        return cached, _commit(cached)
    try:
        with _without_warnings():
            names = huggingface_hub.HfApi().list_repo_files(repository, revision=revision)
        wanted = [glob.escape(name) for name in select_hub_files(names)]
        directory = Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=wanted))
    except Exception as error:  # every way in which a network can fail, from three libraries
        if cached is not None and _has_weights(cached):
            return cached, _commit(cached)
        state = "holds only a part of it" if cached is not None else "does not hold it"
        first = str(error).strip().splitlines()
        reason = (first[0] if first else type(error).__name__).rstrip(".")
        raise CheckpointError(
            f"{ref} was not found: there is no such directory or file, the local Hugging Face cache {state}, and the "
            f"hub did not give it ({reason}); check the name, the connection and, for a gated model, HF_TOKEN."
        ) from error
    return directory, _commit(directory)


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """The library tells of each of its retries; a name that is none, or no network, needs one sentence."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def select_hub_files(names: list[str]) -> list[str]:
    """Of a repository's files, those that a merge needs: one copy of the weights, safetensors if there are any."""
    top = [name for name in names if "/" not in name]
    weights = [name for name in top if name.endswith(".safetensors") and not name.startswith("adapter_")]
    # Some repositories hold the weights twice, as model-*.safetensors and as one consolidated file.
    weights = [name for name in weights if name.startswith("model")] or weights
    if not weights:
        weights = [name for name in top if fnmatch.fnmatchcase(name, "pytorch_model*.bin")]
    small = [name for name in names if matches(name, _HUB_SMALL_FILES)]
    small = [name for name in small if "/" not in name or name.startswith("additional_chat_templates/")]
    return sorted(set(weights) | set(small))


def _cached(repository: str, revision: str | None) -> Path | None:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(repository, revision=revision, local_files_only=True))
    except Exception:  # not in the cache, in whatever words this version of the library says so
        return None


def _has_weights(directory: Path) -> bool:
    """Whether a cached snapshot has all of its weights: an earlier download may have been cut off or partial."""
    for index_name in (SAFETENSORS_INDEX, PICKLE_INDEX):
        index = directory / index_name
        if index.exists():
            try:
                shards = set(json.loads(index.read_bytes())["weight_map"].values())
            except (ValueError, KeyError, AttributeError, TypeError):
                return True  # a broken index is reported by the reader, in its own words
            return all(os.path.exists(directory / str(shard)) for shard in shards)
    names = [path.name for path in entries(directory) if path.exists()]
    weights = [name for name in names if name.endswith((".safetensors", ".bin")) and not matches(name, NOT_WEIGHTS)]
    try:
        check_all_shards(str(directory), weights)
    except CheckpointError:
        return False
    return bool(weights)


def _has_small_files(directory: Path) -> bool:
    """Whether config and tokenizer are there too: loading a model into the cache does not bring its tokenizer."""
    names = [path.name for path in entries(directory)]
    return "config.json" in names and any(matches(name, ("tokenizer*", "vocab*", "*.model")) for name in names)


def _commit(directory: Path) -> str | None:
    return directory.name if re.fullmatch(r"[0-9a-f]{40}", directory.name) else None
