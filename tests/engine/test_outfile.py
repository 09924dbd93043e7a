from __future__ import annotations

import errno
import fcntl
import itertools
import os
import random
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmerge.engine.outfile import _STAGING_BYTES, PAGE, OutputFile

REAL_PWRITE = os.pwrite


def some_bytes(size: int) -> bytes:
    return np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8).tobytes()


def is_direct(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)


def needs_direct(directory: Path) -> None:
    try:
        os.close(os.open(directory / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError as error:
        pytest.skip(
            f"this file system takes no direct writes, so that files are written as in the tests without them: {error}"
        )


def write_parts(file: OutputFile, content: bytes, cuts: list[int], head: int) -> None:
    edges = [head, *sorted(cuts), len(content)]
    for start, stop in itertools.pairwise(edges):
        file.write(start, memoryview(content)[start:stop])


@settings(max_examples=40, deadline=None)
@given(st.data(), st.booleans())
def test_any_parts_in_any_alignment_make_the_same_file(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, direct: bool
) -> None:
    size = data.draw(st.integers(1, 40 * PAGE), label="size")
    head = data.draw(st.sampled_from(sorted({0, 1, min(100, size), size})), label="head")
    cuts = data.draw(st.lists(st.integers(head, size), max_size=6), label="cuts")
    content = some_bytes(size)
    path = tmp_path_factory.mktemp("parts") / "file"
    file = OutputFile(path, size, content[:head], direct=direct)
    assert path.stat().st_size == size
    write_parts(file, content, cuts, head)
    file.close()
    assert path.read_bytes() == content


@pytest.mark.parametrize("shift", [0, 1, 512, PAGE - 1])
def test_parts_larger_than_the_staging_buffer_are_written_from_any_address(tmp_path: Path, shift: int) -> None:
    size = 2 * _STAGING_BYTES + 3 * PAGE + 17
    memory = np.empty(size + 2 * PAGE, np.uint8)
    begin = -memory.ctypes.data % PAGE + shift
    content = some_bytes(size)
    memory[begin : begin + size] = np.frombuffer(content, np.uint8)
    file = OutputFile(tmp_path / "file", size, b"")
    file.write(0, memoryview(memory)[begin : begin + size])
    assert (tmp_path / "file").read_bytes() == content


def test_whole_pages_go_directly_and_only_the_ends_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_direct(tmp_path)
    pages: dict[bool, set[int]] = {True: set(), False: set()}

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        pages[is_direct(descriptor)].update(range(offset // PAGE, (offset + len(data) - 1) // PAGE + 1))
        return REAL_PWRITE(descriptor, data, offset)

    content = some_bytes(20 * PAGE)
    file = OutputFile(tmp_path / "file", len(content), content[:PAGE])
    monkeypatch.setattr(os, "pwrite", pwrite)
    write_parts(file, content, [4 * PAGE, 4 * PAGE + 10, 11 * PAGE - 1], PAGE)
    assert pages[False] == {4, 10}
    assert pages[True] == set(range(1, 20)) - {4, 10}
    assert (tmp_path / "file").read_bytes() == content


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
@pytest.mark.parametrize("refused", ["open", "first write", "second write"])
def test_where_direct_writing_is_refused_the_cache_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str, number: int
) -> None:
    needs_direct(tmp_path)
    real_open, direct_writes = os.open, 0

    def open_(path: Path, flags: int, *arguments: int) -> int:
        if refused == "open" and flags & os.O_DIRECT:
            raise OSError(number, os.strerror(number))
        return real_open(path, flags, *arguments)

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        nonlocal direct_writes
        if is_direct(descriptor):
            direct_writes += 1
            if direct_writes == (1 if refused == "first write" else 2):
                raise OSError(number, os.strerror(number))
        return REAL_PWRITE(descriptor, data, offset)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "pwrite", pwrite)
    content = some_bytes(30 * PAGE + 5)
    file = OutputFile(tmp_path / "file", len(content), content[:7])
    write_parts(file, content, [10 * PAGE + 1, 20 * PAGE + 2], 7)
    assert direct_writes == {"open": 0, "first write": 1, "second write": 2}[refused]
    assert (tmp_path / "file").read_bytes() == content


def test_other_errors_of_direct_writing_are_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_direct(tmp_path)

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        if is_direct(descriptor):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return REAL_PWRITE(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    file = OutputFile(tmp_path / "file", 4 * PAGE, b"")
    with pytest.raises(OSError, match="No space left"):
        file.write(0, memoryview(bytes(4 * PAGE)))
    file.close()
    file.close()


@pytest.mark.parametrize("most", [PAGE, 3 * PAGE, 1000])
def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(
        os,
        "pwrite",
        lambda descriptor, data, offset: REAL_PWRITE(
            descriptor, data[: max(most, PAGE) if is_direct(descriptor) else most], offset
        ),
    )
    content = some_bytes(17 * PAGE + 99)
    file = OutputFile(tmp_path / "file", len(content), content[:9])
    write_parts(file, content, [5 * PAGE + 3], 9)
    assert (tmp_path / "file").read_bytes() == content


def test_threads_write_one_file_and_its_descriptors_are_closed_after_the_last_byte(tmp_path: Path) -> None:
    content = some_bytes(64 * PAGE + 1)
    before = len(os.listdir("/proc/self/fd"))
    file = OutputFile(tmp_path / "file", len(content), b"")
    parts = [(start, min(start + 5000, len(content))) for start in range(0, len(content), 5000)]
    random.Random(0).shuffle(parts)

    def work(mine: list[tuple[int, int]]) -> None:
        for start, stop in mine:
            file.write(start, memoryview(content)[start:stop])

    workers = [threading.Thread(target=work, args=(parts[index::4],)) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert (tmp_path / "file").read_bytes() == content
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(FileExistsError):
        OutputFile(tmp_path / "file", 3, b"")
    assert (tmp_path / "file").read_text() == "precious"
