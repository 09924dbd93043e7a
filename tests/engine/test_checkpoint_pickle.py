"""Checkpoints in PyTorch's .bin format: read through weights_only loading, refused when that refuses."""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from fastmerge.engine.checkpoint import Checkpoint, open_checkpoint
from fastmerge.errors import CheckpointError, MergeError
from tests.engine.builders import write_index


def read(opened: Checkpoint, name: str, start: int = 0, count: int | None = None) -> bytes:
    info = opened.tensors[name]
    buffer = bytearray(info.nbytes - start if count is None else count)
    opened.read_into(info, start, memoryview(buffer))
    return bytes(buffer)


def refuse(ref: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(ref)
    message = str(caught.value)
    for word in words:
        assert word in message, message
    assert "\n" not in message and message.endswith(".")


class Explosive:
    """A pickle of it makes a file where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_tensors_of_every_dtype_and_stride_are_read_byte_for_byte(tmp_path: Path) -> None:
    square = torch.arange(12.0).reshape(3, 4)
    state = OrderedDict(
        plain=square, turned=square.T, part=square[1:, ::2], half=square.to(torch.bfloat16), scalar=torch.tensor(2.5),
        empty=torch.zeros(0, 3), whole=torch.arange(5), flag=torch.tensor([True, False]),
        parameter=torch.nn.Parameter(torch.ones(3, dtype=torch.float16)),
    )  # fmt: skip
    torch.save(state, tmp_path / "pytorch_model.bin")
    with open_checkpoint(tmp_path) as opened:
        assert list(opened.tensors) == list(state)
        for name, tensor in state.items():
            flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            assert read(opened, name) == flat
            assert opened.tensors[name].shape == tuple(tensor.shape)
        assert [opened.tensors[name].dtype for name in ("plain", "half", "parameter", "whole", "flag")] == [
            "F32", "BF16", "F16", "I64", "BOOL",
        ]  # fmt: skip
        assert read(opened, "turned", 5, 9) == square.T.contiguous().numpy().tobytes()[5:14]


def test_shards_with_an_index_and_a_single_file_are_read(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": torch.zeros(3)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    names = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    write_index(tmp_path, names, "pytorch_model.bin.index.json")
    assert list(open_checkpoint(tmp_path).tensors) == ["a", "b"]
    assert list(open_checkpoint(tmp_path / names["b"]).tensors) == ["b"]
    write_index(tmp_path, names | {"a": "../x.bin"}, "pytorch_model.bin.index.json")
    refuse(tmp_path, "leads out of the model's directory")


def test_a_state_dict_within_a_training_checkpoint_is_taken(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(2)}, "epoch": 3}, tmp_path / "last.pt")
    assert list(open_checkpoint(tmp_path / "last.pt").tensors) == ["a"]


def test_the_files_of_a_trainer_are_not_weights(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "weights.bin")
    (tmp_path / "training_args.bin").write_bytes(b"not torch's")
    assert list(open_checkpoint(tmp_path).tensors) == ["a"]


@pytest.mark.parametrize("old_format", [False, True])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path: Path, old_format: bool) -> None:
    state = {"a": torch.ones(2), "evil": Explosive(tmp_path / "ran")}
    path = tmp_path / "pytorch_model.bin"
    torch.save(state, path, _use_new_zipfile_serialization=not old_format)
    refuse(path, str(path), "is refused", "safetensors")
    assert not (tmp_path / "ran").exists()


def test_a_pickle_that_runs_code_is_told_apart_from_a_damaged_one(tmp_path: Path) -> None:
    torch.save({"evil": Explosive(tmp_path / "ran")}, tmp_path / "evil.bin")
    refuse(tmp_path / "evil.bin", "can run any code")
    (tmp_path / "noise.bin").write_bytes(b"PK\x03\x04" + os.urandom(500))
    refuse(tmp_path / "noise.bin", "cannot be read as a PyTorch file")
    (tmp_path / "bare.bin").write_bytes(pickle.dumps({"a": 1}))
    refuse(tmp_path / "bare.bin", "is refused")
    torch.save({"a": torch.ones(500)}, tmp_path / "cut.bin")
    os.truncate(tmp_path / "cut.bin", 900)
    refuse(tmp_path / "cut.bin", "is refused")


def test_the_old_file_format_is_refused_because_it_cannot_be_mapped(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    refuse(tmp_path / "old.bin", "old file format", "save_pretrained")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([torch.ones(2)], "no table of tensors"),
        ({"a": torch.ones(2), "step": 3}, "'step', which is not a named tensor"),
        ({3: torch.ones(2)}, "3, which is not a named tensor"),
        ({"a": torch.ones(2).to_sparse()}, "not a plain dense tensor"),
        ({"a": torch.ones(2, dtype=torch.complex128)}, "complex128"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "complex"),
        ({"a": torch.ones(2).to(torch.float8_e5m2)}, "FP8"),
        ({}, "no tensor at all"),
    ],
)
def test_what_is_not_a_table_of_plain_tensors_is_refused(tmp_path: Path, content: object, words: str) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    refuse(tmp_path, words)


def test_a_file_that_changes_is_noticed_before_its_pages_are_touched(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(100_000)}, path)
    opened = open_checkpoint(tmp_path)
    os.truncate(path, 5000)
    with pytest.raises(MergeError, match=r"pytorch_model\.bin changed .*'a'"):
        read(opened, "a")


def test_the_identity_knows_names_and_shapes(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2, 3)}, tmp_path / "one.bin")
    torch.save({"a": torch.ones(3, 2)}, tmp_path / "two.bin")
    one, two = (open_checkpoint(tmp_path / name).identity()["files"][0] for name in ("one.bin", "two.bin"))
    assert one["name"] == "one.bin" and one["size"] == (tmp_path / "one.bin").stat().st_size
    assert one["header_sha256"] != two["header_sha256"]
