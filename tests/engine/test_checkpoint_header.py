"""The header of a safetensors file: good ones are read as the format's own library reads them, lies are refused."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fastmerge.engine.safetensors_header import MAX_HEADER_BYTES, read_header
from fastmerge.errors import CheckpointError
from tests.engine.builders import bf16, header_of, write_raw, write_safetensors


def entry(dtype: str = "BF16", shape: object = (2, 3), offsets: object = (0, 12)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def refuse(path: Path, *words: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    message = str(caught.value)
    for word in (str(path), *words):
        assert word in message
    assert "\n" not in message and message.endswith(".")
    return message


def test_a_file_of_the_formats_own_library_is_read_with_every_dtype(tmp_path: Path) -> None:
    tensors = {
        "b": torch.arange(6).reshape(2, 3).to(torch.bfloat16), "a": torch.zeros((), dtype=torch.float64),
        "half": torch.ones(5, dtype=torch.float16), "single": torch.ones(3), "empty": torch.zeros(0, 7),
        "int": torch.arange(4), "bool": torch.tensor([True, False]), "byte": torch.arange(3, dtype=torch.uint8),
    }  # fmt: skip
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    header = read_header(path)
    assert header.metadata == {"format": "pt"}
    assert header.size == path.stat().st_size
    content = path.read_bytes()
    with safetensors.safe_open(path, framework="pt") as peer:
        assert {info.name for info in header.tensors} == set(peer.keys())
        for info in header.tensors:
            part = peer.get_slice(info.name)
            assert (info.dtype, list(info.shape)) == (part.get_dtype(), part.get_shape())
            assert info.numel == tensors[info.name].numel()
            stored = tensors[info.name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            assert content[info.start : info.stop] == stored
    assert [info.start for info in header.tensors] == sorted(info.start for info in header.tensors)


@settings(max_examples=200, deadline=None)
@given(
    layout=st.lists(
        st.tuples(
            st.sampled_from(["BF16", "F16", "F32", "F64", "I64", "U8", "BOOL"]),
            st.lists(st.integers(0, 4), max_size=3),
        ),
        min_size=1,
        max_size=6,
    ),
    kind=st.integers(0, 7),
    random=st.randoms(use_true_random=False),
)
def test_any_change_of_an_offset_a_shape_or_the_size_is_noticed(tmp_path_factory, layout, kind, random) -> None:
    """Every file is refused or accepted as the format's own library does, whatever number is bent."""
    sizes = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I64": 8, "U8": 1, "BOOL": 1}
    tensors = {}
    for index, (dtype, shape) in enumerate(layout):
        count = sizes[dtype]
        for side in shape:
            count *= side
        tensors[f"t{index}"] = (dtype, shape, bytes(count))
    header = header_of(tensors)
    data = b"".join(part for _, _, part in tensors.values())
    victim = header[random.choice(sorted(header))]
    if kind in (1, 2):
        victim["data_offsets"][kind - 1] += random.choice([-2, -1, 1, 2])
    elif kind == 3 and victim["shape"]:
        victim["shape"][random.randrange(len(victim["shape"]))] += random.choice([-1, 1])
    elif kind == 4:
        victim["data_offsets"] = [offset + random.choice([1, 2, -1]) for offset in victim["data_offsets"]]
    elif kind == 5:
        data += b"\0"
    elif kind == 6:
        data = data[:-1]
    elif kind == 7:
        victim["dtype"] = random.choice(["F32", "BF16", "I8"])
    path = write_raw(tmp_path_factory.mktemp("bent") / "model.safetensors", header, data)
    try:
        with safetensors.safe_open(path, framework="pt"):
            good = True
    except safetensors.SafetensorError:
        good = False
    if good:
        assert len(read_header(path).tensors) == len(tensors)
    else:
        with pytest.raises(CheckpointError):
            read_header(path)


def test_spaces_after_the_header_are_padding(tmp_path: Path) -> None:
    text = json.dumps({"w": entry()}).encode() + b"      "
    header = read_header(write_raw(tmp_path / "m.safetensors", text, bytes(12)))
    assert header.tensors[0].start == 8 + len(text)


@pytest.mark.parametrize("content", [b"", b"1234567"])
def test_a_file_too_short_for_a_length_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    refuse(path, f"{len(content)} bytes long", "download it again")


def test_a_header_length_beyond_the_file_is_refused(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "m.safetensors", {"w": entry()}, bytes(12), length=5000)
    refuse(path, "is cut short", "5,000 bytes", "download it again")


@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1])
def test_a_huge_header_length_is_refused_before_anything_is_allocated(tmp_path: Path, length: int) -> None:
    path = write_raw(tmp_path / "m.safetensors", {"w": entry()}, bytes(12), length=length)
    os.truncate(path, 2 * MAX_HEADER_BYTES)  # sparse: the file is long enough for the first of these lengths
    refuse(path, f"{length:,} bytes, more than the 100,000,000")


def test_a_file_cut_within_its_header_is_refused(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "m.safetensors", {"w": bf16(2, 3)})
    os.truncate(path, 30)
    refuse(path, "is cut short", "download it again")


def test_a_file_cut_within_its_data_names_the_tensor_that_is_not_all_there(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "m.safetensors", {"first": bf16(2, 3), "second": bf16(4)})
    os.truncate(path, path.stat().st_size - 3)
    refuse(path, "is cut short", "'second'", "download it again")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"[1, 2]", "does not start with"),
        (b"{'w': 1}", "not valid JSON"),
        (b'{"w": ', "not valid JSON"),
        (b'{"w": NaN}', "NaN is not JSON"),
        (b'{"\xff": 1}', "not valid JSON"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"w": {"shape": [' + b"9" * 5000 + b"]}}", "not valid JSON"),
        (b'{"__metadata__": {"format": 1}}', "metadata"),
        (b'{"__metadata__": []}', "metadata"),
    ],
)
def test_a_header_that_is_not_a_table_in_json_is_refused(tmp_path: Path, text: bytes, words: str) -> None:
    refuse(write_raw(tmp_path / "m.safetensors", text), words)


def test_a_tensor_named_twice_is_refused(tmp_path: Path) -> None:
    one = json.dumps(entry())
    path = write_raw(tmp_path / "m.safetensors", f'{{"w": {one}, "w": {one}}}'.encode(), bytes(12))
    refuse(path, "'w'", "twice")


@pytest.mark.parametrize(
    ("description", "words"),
    [
        (7, "not described"),
        ({"dtype": "BF16", "shape": [6]}, "not described"),
        (entry() | {"more": 1}, "not described"),
        (entry(dtype="Q4_K"), "'Q4_K'"),
        (entry(dtype=3), "the dtype 3"),  # type: ignore[arg-type]
        (entry(shape=[-2, -3]), "[-2, -3]"),
        (entry(shape=[2.0, 3]), "[2.0, 3]"),
        (entry(shape=[True, 6]), "[True, 6]"),
        (entry(shape="23"), "'23'"),
        (entry(shape=[2**64, 0]), "whole number"),
        (entry(shape=[1] * 65), "65 sides"),
        (entry(shape=[2**40, 2**40]), "larger than any file"),
        (entry(shape=[2**33, 2**31, 6]), "larger than any file"),
        (entry(shape=[2, 4]), "needs 16"),
        (entry(dtype="F32"), "needs 24"),
        (entry(offsets=[0]), "two whole numbers"),
        (entry(offsets=[-12, 0]), "two whole numbers"),
        (entry(offsets=[0, 2**70]), "two whole numbers"),
        (entry(offsets=["0", "12"]), "two whole numbers"),
        (entry(offsets=[12, 0]), "before it starts"),
        (entry(offsets=[0, 10]), "takes 10 bytes"),
        (entry(offsets=[2**62, 2**62 + 12]), "belong to no tensor"),
    ],
)
def test_a_lie_about_a_tensor_is_refused_and_names_it(tmp_path: Path, description: object, words: str) -> None:
    refuse(write_raw(tmp_path / "m.safetensors", {"the.weight": description}, bytes(12)), "'the.weight'", words)


def test_offsets_beyond_the_file_are_refused(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "m.safetensors", {"w": entry(shape=[600], offsets=[0, 1200])}, bytes(12))
    refuse(path, "'w'", "ends at byte")


def test_tensors_that_overlap_are_refused(tmp_path: Path) -> None:
    header = {"w": entry(), "v": entry(offsets=[6, 18])}
    refuse(write_raw(tmp_path / "m.safetensors", header, bytes(18)), "'w' and 'v'", "overlap")


def test_two_names_for_the_same_bytes_are_refused(tmp_path: Path) -> None:
    refuse(write_raw(tmp_path / "m.safetensors", {"w": entry(), "v": entry()}, bytes(12)), "overlap")


def test_a_hole_between_tensors_is_refused(tmp_path: Path) -> None:
    header = {"w": entry(), "v": entry(offsets=[14, 26])}
    refuse(write_raw(tmp_path / "m.safetensors", header, bytes(26)), "2 bytes before tensor 'v'")


def test_bytes_after_the_last_tensor_are_refused(tmp_path: Path) -> None:
    refuse(write_raw(tmp_path / "m.safetensors", {"w": entry()}, bytes(13)), "1 bytes after its last tensor")


def test_the_pointer_that_git_lfs_leaves_is_recognised(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    refuse(path, "git lfs pull")


def test_a_missing_file_a_directory_a_pipe_and_a_dangling_link_are_refused(tmp_path: Path) -> None:
    refuse(tmp_path / "none.safetensors", "does not exist")
    (tmp_path / "folder.safetensors").mkdir()
    refuse(tmp_path / "folder.safetensors", "not a regular file")
    os.mkfifo(tmp_path / "pipe.safetensors")
    refuse(tmp_path / "pipe.safetensors", "not a regular file")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "blob")
    refuse(tmp_path / "link.safetensors", "a link to a file that is not there")


def test_only_the_header_is_read(tmp_path: Path) -> None:
    """A sparse file of 1 TiB would take long otherwise."""
    path = write_raw(tmp_path / "m.safetensors", {"w": entry(shape=[2**39], offsets=[0, 2**40])})
    try:
        os.truncate(path, path.stat().st_size + 2**40)
    except OSError as error:
        pytest.skip(f"this file system holds no file of 1 TiB; other tests read headers of small ones: {error}")
    info = read_header(path).tensors[0]
    assert (info.numel, info.nbytes) == (2**39, 2**40)


def test_the_digest_is_of_the_header_alone(tmp_path: Path) -> None:
    one = read_header(write_safetensors(tmp_path / "a.safetensors", {"w": bf16(4)}))
    other = read_header(write_safetensors(tmp_path / "b.safetensors", {"w": bf16(4, fill=9)}))
    renamed = read_header(write_safetensors(tmp_path / "c.safetensors", {"v": bf16(4)}))
    assert re.fullmatch("[0-9a-f]{64}", one.sha256)
    assert one.sha256 == other.sha256 != renamed.sha256
