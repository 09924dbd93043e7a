"""The file of an expert: gaps, what is read back, and what is refused."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from fastmerge import ops
from fastmerge.engine import atomic, expert_file
from fastmerge.engine.expert_file import About, ExpertFile, ExpertWriter, TensorAbout, decode, encode, same_base
from fastmerge.errors import ArgumentError, CheckpointError, MergeError
from tests.engine.builders import write_raw
from tests.numeric import assert_bitwise_equal
from tests.strategies import DTYPES

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@st.composite
def columns(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """Rising columns of some rows, near and far apart, and the width of a row."""
    width = draw(st.sampled_from((1, 7, 255, 256, 257, 511, 1000, 70_000)))
    rows = draw(st.sampled_from((0, 1, 3, 255, 256, 257, 600)))
    k = draw(st.integers(0, min(width, 5)))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if draw(st.booleans()):
        first = generator.integers(0, width - k + 1, size=(rows, 1))
        return first + np.arange(k)[None, :], width
    picked = [np.sort(generator.choice(width, k, replace=False)) for _ in range(rows)]
    return np.array(picked, dtype=np.int64).reshape(rows, k), width


@given(case=columns(), padding=st.integers(0, 7), together=st.sampled_from((1, 600, 1 << 18)))
def test_gaps_are_decoded_to_what_was_encoded(case: tuple[np.ndarray, int], padding: int, together: int) -> None:
    with patch.object(expert_file, "_ENTRIES", together):
        check_gaps(*case, padding)


def check_gaps(kept: np.ndarray, width: int, padding: int) -> None:
    rows, k = kept.shape
    gaps, starts = encode(kept)
    assert gaps.dtype == np.uint8 and len(starts) == -(-rows // 256)
    padded = np.concatenate([gaps, np.full(padding, 255, np.uint8)])
    assert np.array_equal(decode(padded, starts, rows, k, width), kept)
    for number, start in enumerate(starts):  # each block of rows by itself
        first, end = number * 256, min(rows, number * 256 + 256)
        stop = starts[number + 1] if number + 1 < len(starts) else len(gaps)
        alone = decode(gaps[start:stop], np.zeros(1, np.int64), end - first, k, width)
        assert np.array_equal(alone, kept[first:end])


def test_what_coding_takes_is_a_few_times_the_code() -> None:
    """An embedding has tens of millions of kept elements: int64 numbers of all of them would fill the memory."""
    rows, k = 1 << 17, 8
    kept = np.tile(np.arange(k, dtype=np.uint16) * 300, (rows, 1))
    tracemalloc.start()
    try:
        gaps, starts = encode(kept)
        assert tracemalloc.get_traced_memory()[1] < 20 * rows * k
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        assert np.array_equal(decode(gaps, starts, rows, k, 3000), kept)
        assert tracemalloc.get_traced_memory()[1] - before < 20 * rows * k
    finally:
        tracemalloc.stop()
    for place, value in ((1, 3), (2, -1), (500, 1 << 40)):
        broken = starts.copy()
        broken[place] = value
        with pytest.raises(ValueError, match="starts|positions|beyond"):
            decode(gaps, broken, rows, k, 3000)


@pytest.mark.parametrize(
    ("gap", "coded"), [(0, [0]), (254, [254]), (255, [255, 0]), (256, [255, 1]), (510, [255, 255, 0])]
)
def test_long_gaps_go_on_in_the_next_byte(gap: int, coded: list[int]) -> None:
    gaps, starts = encode(np.array([[gap, gap + 2]]))
    assert gaps.tolist() == [*coded, 1] and starts.tolist() == [0]


def experts(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> dict[str, ops.Expert]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (300, 2000), "b": (5, 14, 220), "norm": (30,), "scale": (), "none": (0, 500), "wide": (2, 70_000)}
    return {
        name: ops.extract_expert(torch.randn(shape, generator=generator).to(dtype), 0.01)
        for name, shape in shapes.items()
    }


def about_of(given: dict[str, ops.Expert], **other: Any) -> About:
    tensors = {name: TensorAbout(one.shape, one.k, NAMES[one.dtype], "0" * 64) for name, one in given.items()}
    return About(**{"keep": 0.01, "scope": "row", "model": "math", "base": "base", "tensors": tensors} | other)


def written(path: Path, given: dict[str, ops.Expert], **other: Any) -> About:
    with ExpertWriter(path, about_of(given, **other)) as writer:
        for name, one in given.items():
            writer.add(name, one)
        return writer.finish(5.25, {name: f"{number:064x}" for number, name in enumerate(given)})


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_file_is_read_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    given = experts(dtype=dtype)
    path = tmp_path / "math.safetensors"
    about = written(path, given)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    with ExpertFile(path) as file:
        assert file.about == about and about.mu == 5.25 and about.keep == 0.01
        assert about.empty == ["norm", "scale"] and about.empty_rows == 2
        loaded = file.load()
    for name, one in given.items():
        back = loaded.tensors[name]
        assert back.shape == one.shape and back.k == one.k
        assert torch.equal(back.columns.to(torch.int64), one.columns.to(torch.int64))
        assert back.columns.dtype == one.columns.dtype
        assert_bitwise_equal(back.values, one.values)
    kept = sum(one.values.nbytes for one in given.values())
    entries = sum(one.values.numel() for one in given.values())
    assert path.stat().st_size <= kept + 1.3 * entries + 3 * 4096


def test_the_library_of_the_format_reads_it_too(tmp_path: Path) -> None:
    given = experts()
    written(tmp_path / "e.safetensors", given)
    with safe_open(tmp_path / "e.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "fastmerge expert"
        assert_bitwise_equal(file.get_tensor("a.values"), given["a"].values)


def test_bases_are_compared_tensor_by_tensor() -> None:
    one = about_of({name: each for name, each in experts().items() if name != "b"})
    other = about_of(experts())
    assert same_base(one, other) is None
    changed = dict(other.tensors) | {"a": TensorAbout((300, 2000), 20, "BF16", "1" * 64)}
    assert same_base(one, about_of({}, tensors=changed)) == "a"


# -- what is refused


def broken(path: Path, change: Any) -> Path:
    """The file with its header, or its data, changed."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), bytearray(raw[8 + length :])
    change(header, data)
    return write_raw(path, json.dumps(header).encode(), bytes(data))


def in_list(name: str, place: int, value: Any) -> Any:
    def change(header: Any, data: bytearray) -> None:
        tensors = json.loads(header["__metadata__"]["tensors"])
        tensors[name][place] = value
        header["__metadata__"]["tensors"] = json.dumps(tensors)

    return change


def said(key: str, value: str | None) -> Any:
    def change(header: Any, data: bytearray) -> None:
        if value is None:
            del header["__metadata__"][key]
        else:
            header["__metadata__"][key] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (said("format", "pt"), "is not an expert"),
        (said("version", "2"), "version '2'"),
        (said("keep", None), "does not say"),
        (said("keep", "much"), "does not say"),
        (said("mu", "nan"), "what cannot be"),
        (said("kind", "other"), "what cannot be"),
        (said("scope", "tensor"), "what cannot be"),
        (said("tensors", "[]"), "does not say"),
        (said("tensors", "{"), "not valid JSON"),
        (said("base_digest", "0" * 64), "was changed"),
        (in_list("a", 3, "1" * 64), "was changed"),
        (in_list("a", 1, 3000), "what cannot be"),
        (in_list("a", 1, "20"), "what cannot be"),
        (in_list("a", 0, [300, -2]), "what cannot be"),
        (in_list("a", 0, [10**30, 2000]), "what cannot be"),
        (in_list("scale", 0, [0, 1 << 40, 1 << 40]), "what cannot be"),
        (in_list("none", 0, [0, 1 << 31]), "what cannot be"),
        (in_list("a", 2, "I64"), "what cannot be"),
        (in_list("a", 1, 19), "other sizes"),
    ],
)
def test_claims_that_do_not_add_up(tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "e.safetensors"
    written(path, experts())
    with pytest.raises(CheckpointError, match=message):
        ExpertFile(broken(path, change))


def bytes_of(header: Any, name: str) -> tuple[int, int]:
    first, end = header[name]["data_offsets"]
    return first, end


@pytest.mark.parametrize(
    ("part", "at", "value", "message"),
    [
        ("gaps", 0, 255, "positions in place of|beyond its row"),
        ("gaps", 3, 254, "beyond its row|starts|positions"),
        ("starts", 8, 77, "starts"),
    ],
)
def test_codes_that_are_broken(tmp_path: Path, part: str, at: int, value: int, message: str) -> None:
    path = tmp_path / "e.safetensors"
    generator = torch.Generator().manual_seed(3)
    given = {"a": ops.extract_expert(torch.randn(300, 100, generator=generator), 0.3)}
    written(path, given)

    def change(header: Any, data: bytearray) -> None:
        first, _ = bytes_of(header, f"a.{part}")
        data[first + at] = value
        # Somebody who writes such codes can write their digest, too.
        whole = b"".join(data[slice(*bytes_of(header, f"a.{name}"))] for name in ("gaps", "starts", "values"))
        in_list("a", 4, blake3(whole).hexdigest())(header, data)

    with ExpertFile(broken(path, change)) as file, pytest.raises(CheckpointError, match=message):
        file.read("a")


@pytest.mark.parametrize("part", ["gaps", "starts", "values"])
def test_a_bit_that_has_flipped_is_noticed(tmp_path: Path, part: str) -> None:
    path = tmp_path / "e.safetensors"
    written(path, experts())

    def change(header: Any, data: bytearray) -> None:
        data[bytes_of(header, f"a.{part}")[1] - 1] ^= 1

    with ExpertFile(broken(path, change)) as file:
        assert file.read("b").k == experts()["b"].k
        with pytest.raises(CheckpointError, match="Tensor 'a' in .* is not what was written there"):
            file.read("a")


def test_a_tensor_that_is_missing_or_too_much(tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"

    def without(header: Any, data: bytearray) -> None:
        header["other"] = header.pop("a.values")

    written(path, experts())
    with pytest.raises(CheckpointError, match="not all there"):
        ExpertFile(broken(path, without))

    def surplus(header: Any, data: bytearray) -> None:
        header["other"] = {"dtype": "U8", "shape": [1], "data_offsets": [len(data), len(data) + 1]}
        data += b"x"

    path.unlink()
    written(path, experts())
    with pytest.raises(CheckpointError, match="belongs to no tensor"):
        ExpertFile(broken(path, surplus))


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    written(path, experts())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="cut short"):
        ExpertFile(path)


# -- whole or not at all


def test_nothing_is_there_before_it_is_finished(tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    given = experts()
    with pytest.raises(RuntimeError, match="stop"), ExpertWriter(path, about_of(given)) as writer:
        writer.add("a", given["a"])
        assert not path.exists()
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []
    ExpertWriter(path, about_of(given)).add("a", given["a"])
    atomic.abort_all()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    path.write_text("mine")
    with pytest.raises(ArgumentError, match="exists"):
        ExpertWriter(path, about_of(experts()))
    path.unlink()
    with ExpertWriter(path, about_of({})) as writer:
        path.write_text("mine")
        with pytest.raises(MergeError, match="somebody else"):
            writer.finish(1.0, {})
    assert path.read_text() == "mine" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(ArgumentError, match="not a directory"):
        ExpertWriter(tmp_path / "none" / "e.safetensors", about_of({}))


def test_the_header_fits_the_room_that_was_left_for_it(tmp_path: Path) -> None:
    names = [f'ключ.{number}."weight"' for number in range(40)]
    given: dict[str, ops.Expert] = {name: ops.extract_expert(torch.randn(3, 300), 0.02) for name in names}
    about = written(tmp_path / "e.safetensors", given)
    with ExpertFile(tmp_path / "e.safetensors") as file:
        assert file.about == about and list(file.load().tensors) == names
    assert expert_file._header_room(about) % 4096 == 0
