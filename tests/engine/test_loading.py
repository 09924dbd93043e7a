"""Whole models in memory: the bytes of the files, whatever the tensors' sizes and the parts that are read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastmerge.engine import loading
from fastmerge.engine.checkpoint import open_checkpoint
from fastmerge.errors import MergeError
from tests.engine.small_family import SHAPES, family, save
from tests.numeric import assert_bitwise_equal


@pytest.mark.parametrize("part", [7, 1000, 16 << 20])
def test_every_tensor_has_the_bits_of_the_file(part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_PART", part)
    base, _ = family(1, shapes={name: shape for name, shape in SHAPES.items() if "q_proj" not in name or part > 7})
    tensors = {**base, "none": torch.zeros(0, 3), "steps": torch.arange(5), "flags": torch.tensor([True, False, True])}
    with open_checkpoint(save(tmp_path / "model", tensors, shards=3)) as opened:
        found = loading.read_all(opened)
        source = loading.LoadedSource(opened)
        assert list(found) == list(opened.tensors) and source.tied is opened.tied is False
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert_bitwise_equal(found[name], tensor)
        assert found[name].is_contiguous() and found[name].data_ptr() % 64 == 0
        assert source.view(source.tensors[name]).numel() == tensor.numel()
    assert len({tensor.data_ptr() for tensor in found.values() if tensor.numel()}) == len(tensors) - 1
    found["steps"].add_(1)
    assert_bitwise_equal(found["model.norm.scale"], tensors["model.norm.scale"])


def test_a_file_that_cannot_give_it_is_named(tmp_path: Path) -> None:
    base, _ = family(1)
    with open_checkpoint(save(tmp_path / "model", base)) as opened:
        file = tmp_path / "model/model.safetensors"
        with file.open("r+b") as short:
            short.truncate(file.stat().st_size - 2000)
        with pytest.raises(MergeError, match=r"model\.safetensors"):
            loading.read_all(opened)
