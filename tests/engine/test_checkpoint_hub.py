"""Hub models: a whole local cache is enough; what it lacks is asked for; failures tell what was tried."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from fastmerge.engine.checkpoint import open_checkpoint
from fastmerge.engine.hub import select_hub_files
from fastmerge.errors import CheckpointError
from tests.engine.builders import bf16, write_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TENSORS = {"a": bf16(2), "b": bf16(3), "c": bf16(4)}


class FakeHub:
    """Stands for the hub and its cache: `remote` is what the hub holds, `local` what was downloaded before."""

    def __init__(self, folder: Path) -> None:
        self.remote = folder / "remote"
        self.local = folder / "cache" / COMMIT
        self.failure: Exception | None = None
        self.asked: list[tuple[str, str | None]] = []
        self.downloads = 0
        self.level = logging.NOTSET

    def list_repo_files(self, repo_id: str, *, revision: str | None = None) -> list[str]:
        self.asked.append((repo_id, revision))
        self.level = logging.getLogger("huggingface_hub.utils").getEffectiveLevel()
        if self.failure is not None:
            raise self.failure
        return [path.relative_to(self.remote).as_posix() for path in self.remote.rglob("*") if path.is_file()]

    def snapshot_download(
        self, repo_id: str, *, revision: str | None = None, local_files_only: bool = False, **settings: Any
    ) -> str:
        if local_files_only:
            if not self.local.exists():
                raise FileNotFoundError("not in the cache")
            return str(self.local)
        self.downloads += 1
        self.local.mkdir(parents=True, exist_ok=True)
        for name in settings["allow_patterns"]:
            shutil.copy(self.remote / name, self.local / name)
        return str(self.local)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.chdir(tmp_path)
    return fake


def write_repository(root: Path, shards: int = 2) -> Path:
    write_model(root, TENSORS, shards=shards)
    (root / "tokenizer.json").write_text("{}")
    return root


def test_a_whole_model_in_the_cache_is_used_without_asking_the_hub(hub: FakeHub) -> None:
    write_repository(hub.local)
    opened = open_checkpoint("org/model")
    assert set(opened.tensors) == set(TENSORS)
    assert hub.asked == []
    assert opened.identity()["revision"] == COMMIT


def test_a_model_that_is_not_cached_is_downloaded_with_its_tokenizer_and_nothing_needless(hub: FakeHub) -> None:
    write_repository(hub.remote)
    (hub.remote / "consolidated.safetensors").write_bytes(b"the same weights again")
    (hub.remote / "model.onnx").write_bytes(b"")
    opened = open_checkpoint("org/model")
    assert set(opened.tensors) == set(TENSORS)
    assert [path.name for path in opened.side_files()] == ["tokenizer.json"]
    assert not (hub.local / "consolidated.safetensors").exists()


def test_a_cached_model_that_lacks_a_shard_is_completed(hub: FakeHub) -> None:
    write_repository(hub.remote)
    write_repository(hub.local)
    (hub.local / "model-00002-of-00002.safetensors").unlink()
    assert set(open_checkpoint("org/model").tensors) == set(TENSORS)
    assert hub.downloads == 1


def test_a_cached_model_without_its_tokenizer_is_completed_and_offline_used_as_it_is(hub: FakeHub) -> None:
    write_repository(hub.remote)
    write_model(hub.local, TENSORS)
    hub.failure = ConnectionError("offline")
    opened = open_checkpoint("org/model")
    assert set(opened.tensors) == set(TENSORS) and opened.side_files() == []
    hub.failure = None
    shutil.rmtree(hub.remote)
    write_repository(hub.remote, shards=1)
    assert [path.name for path in open_checkpoint("org/model").side_files()] == ["tokenizer.json"]


@pytest.mark.parametrize(
    ("ref", "revision", "asked"),
    [
        ("org/model", None, ("org/model", None)),
        ("org/model@v1.0", None, ("org/model", "v1.0")),
        ("org/model@refs/pr/3", None, ("org/model", "refs/pr/3")),
        ("org/model", "dev", ("org/model", "dev")),
        ("org/model@v1.0", "dev", ("org/model", "v1.0")),
    ],
)
def test_the_revision_is_passed_on(hub: FakeHub, ref: str, revision: str | None, asked: tuple[str, str | None]) -> None:
    write_repository(hub.remote)
    open_checkpoint(ref, revision=revision)
    assert hub.asked == [asked]


@pytest.mark.parametrize(("cached", "state"), [(False, "does not hold it"), (True, "holds only a part of it")])
def test_what_is_nowhere_tells_what_was_tried(hub: FakeHub, cached: bool, state: str) -> None:
    hub.failure = ConnectionError("401 Client Error.\nwith many lines")
    if cached:
        hub.local.mkdir(parents=True)
        (hub.local / "config.json").write_text("{}")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint("org/model")
    message = str(caught.value)
    for words in ("org/model was not found", "no such directory or file", state, "(401 Client Error)", "HF_TOKEN"):
        assert words in message
    assert "\n" not in message


def test_the_real_library_offline_with_an_empty_cache_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real huggingface_hub, told to stay offline: no request leaves the machine."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"org/model was not found.*does not hold it"):
        open_checkpoint("org/model")


def test_the_real_librarys_cache_layout_is_read_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    storage = tmp_path / "models--org--model"
    blobs = write_repository(storage / "blobs")
    snapshot = storage / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for path in list(blobs.iterdir()):
        blob = path.rename(path.with_name(f"blob-{path.stem}"))
        (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
    (storage / "refs").mkdir()
    (storage / "refs" / "main").write_text(COMMIT)
    real = huggingface_hub.snapshot_download
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: real(*a, cache_dir=tmp_path, **k))
    monkeypatch.chdir(tmp_path)
    opened = open_checkpoint("org/model@main")
    assert set(opened.tensors) == set(TENSORS)
    assert opened.identity()["revision"] == COMMIT
    buffer = bytearray(4)
    opened.read_into(opened.tensors["a"], 0, memoryview(buffer))
    assert bytes(buffer) == TENSORS["a"][2]


def test_one_copy_of_the_weights_and_the_small_files_are_selected() -> None:
    small = ["config.json", "tokenizer.json", "tokenizer.model", "LICENSE", "modeling_x.py", "generation_config.json"]
    names = [*small, "README.md", "original/params.json", "onnx/model.onnx", "pytorch_model.bin", "flax_model.msgpack"]
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    assert select_hub_files([*names, *shards, "consolidated.safetensors"]) == sorted(small + shards)
    assert select_hub_files([*names, "weights.safetensors"]) == sorted([*small, "weights.safetensors"])
    assert select_hub_files(names) == sorted([*small, "pytorch_model.bin"])


def test_retries_are_not_told_one_by_one(hub: FakeHub) -> None:
    hub.failure = ConnectionError("no network")
    before = logging.getLogger("huggingface_hub").level
    with pytest.raises(CheckpointError, match="no network"):
        open_checkpoint("org/model")
    assert hub.level == logging.ERROR
    assert logging.getLogger("huggingface_hub").level == before
