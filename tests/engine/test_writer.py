from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from fastmerge.engine import atomic, outfile
from fastmerge.engine.atomic import AtomicDirectory, abort_all, check_target, replacing
from fastmerge.engine.writer import ITEM_SIZE, ModelWriter, OutputTensor, layout_shards, shard_header
from fastmerge.errors import ArgumentError, MergeError

TENSORS = [
    OutputTensor("embed", "BF16", (37, 8)),
    OutputTensor("layer.bias", "F32", (5,)),
    OutputTensor("empty", "F16", (0, 4)),
    OutputTensor("steps", "I64", ()),
    OutputTensor("mask", "BOOL", (3,)),
    OutputTensor("layer.weight", "F16", (4, 9)),
    OutputTensor("größe", "F64", (2, 2)),
]
MANIFEST = {"method": "linear"}
CARD = {"card_yaml": "merge_method: linear\n", "card_info": {"method": "linear"}}


def content(tensor: OutputTensor) -> bytes:
    seed = int.from_bytes(hashlib.sha256(tensor.name.encode()).digest()[:4], "little")
    data = np.random.default_rng(seed).integers(0, 2 if tensor.dtype == "BOOL" else 256, tensor.nbytes, dtype=np.uint8)
    return data.tobytes()


def write_all(model: ModelWriter, tensors: list[OutputTensor], step: int = 7) -> None:
    """All tensors, interleaved, in parts of ``step`` bytes."""
    for start in range(0, max(tensor.nbytes for tensor in tensors), step):
        for tensor in tensors:
            part = content(tensor)[start : start + step]
            if part:
                model.write(tensor.name, start, memoryview(part))


def make(out: Path, tensors: list[OutputTensor] = TENSORS, **options: object) -> ModelWriter:
    arguments: dict = {"shard_size": 10**9, "config": {"model_type": "llama"}, "side_files": []} | options
    return ModelWriter(out, tensors, **arguments)


def left_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def read_back(out: Path) -> dict[str, tuple[bytes, tuple[int, ...], str]]:
    """Every tensor as safetensors reads it, and the file that it was in."""
    found = {}
    for file in sorted(out.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            assert handle.metadata() == {"format": "pt"}
            for name in handle.keys():  # noqa: SIM118 - safe_open is not iterable
                tensor = handle.get_tensor(name)
                raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
                found[name] = (raw, tuple(tensor.shape), file.name)
    return found


# -- layout


tensor_lists = st.lists(
    st.tuples(st.sampled_from(sorted(ITEM_SIZE)), st.lists(st.integers(0, 7), max_size=3)), max_size=12
).map(lambda rows: [OutputTensor(f"t{index}", dtype, tuple(shape)) for index, (dtype, shape) in enumerate(rows)])


@given(tensor_lists, st.integers(1, 400))
def test_every_tensor_is_in_one_shard_in_order_and_shards_are_full_but_not_too_full(
    tensors: list[OutputTensor], shard_size: int
) -> None:
    shards = layout_shards(tensors, shard_size)
    order = {tensor.name: index for index, tensor in enumerate(tensors)}
    assert [t for shard in shards for t in sorted(shard, key=lambda t: order[t.name])] == tensors
    for shard in shards:
        assert shard
        assert sum(t.nbytes for t in shard) <= shard_size or len([t for t in shard if t.nbytes]) == 1
    for shard, following in itertools.pairwise(shards):
        first = min(following, key=lambda t: order[t.name])
        assert sum(t.nbytes for t in shard) + first.nbytes > shard_size


@given(tensor_lists)
def test_headers_are_valid_packed_and_aligned(tensors: list[OutputTensor]) -> None:
    shard = layout_shards(tensors, 10**9)[0] if tensors else []
    raw = shard_header(shard)
    length = int.from_bytes(raw[:8], "little")
    assert len(raw) == 8 + length and len(raw) % 4096 == 0
    entries = json.loads(raw[8:])
    assert entries.pop("__metadata__") == {"format": "pt"}
    offset = 0
    for tensor in shard:
        start, stop = entries[tensor.name]["data_offsets"]
        assert start == offset and stop - start == tensor.nbytes
        assert start % ITEM_SIZE[tensor.dtype] == 0
        offset = stop


def test_a_shard_size_below_one_byte_is_refused() -> None:
    with pytest.raises(ArgumentError, match="shard_size must be at least 1"):
        layout_shards(TENSORS, 0)


# -- whole models


@pytest.mark.parametrize(("shard_size", "files"), [(10**9, 1), (300, 2), (1, 6)])
def test_written_tensors_are_read_back_by_safetensors_and_digests_are_those_of_the_files(
    tmp_path: Path, shard_size: int, files: int
) -> None:
    out = tmp_path / "out"
    with make(out, shard_size=shard_size) as model:
        write_all(model, TENSORS)
        model.finish(manifest=MANIFEST, **CARD)
    found = read_back(out)
    names = {file for _, _, file in found.values()}
    assert len(names) == files
    for tensor in TENSORS:
        raw, shape, _ = found[tensor.name]
        assert (raw, shape) == (content(tensor), tensor.shape)
        assert model.digests[tensor.name] == blake3(raw).hexdigest()
    assert left_in(tmp_path) == ["out"]
    if files == 1:
        assert names == {"model.safetensors"}
        assert not (out / "model.safetensors.index.json").exists()
    else:
        assert names == {f"model-{i:05d}-of-{files:05d}.safetensors" for i in range(1, files + 1)}
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == {name: file for name, (_, _, file) in found.items()}
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS)
    assert json.loads((out / "config.json").read_text()) == {"model_type": "llama"}
    assert json.loads((out / "manifest.json").read_text()) == MANIFEST
    assert "merge_method: linear" in (out / "README.md").read_text()


def test_a_single_file_is_one_shard_whatever_the_shard_size(tmp_path: Path) -> None:
    with make(tmp_path / "out", shard_size=1, single_file=True) as model:
        write_all(model, TENSORS)
        model.finish(manifest=MANIFEST, **CARD)
    assert {file for _, _, file in read_back(tmp_path / "out").values()} == {"model.safetensors"}


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 4))
def test_any_cut_and_any_number_of_threads_give_the_same_files(
    tmp_path_factory: pytest.TempPathFactory, step: int, threads: int
) -> None:
    tensors = [OutputTensor(f"t{i}", "BF16", (i * 97 + 1, 3)) for i in range(6)]
    out = tmp_path_factory.mktemp("any") / "out"
    with make(out, tensors, shard_size=1500) as model:
        workers = [threading.Thread(target=write_all, args=(model, tensors[i::threads], step)) for i in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        model.finish(manifest=MANIFEST, **CARD)
    assert {name: raw for name, (raw, _, _) in read_back(out).items()} == {t.name: content(t) for t in tensors}


def test_transformers_loads_a_sharded_model(tmp_path: Path) -> None:
    transformers = pytest.importorskip(
        "transformers", reason="no transformers; safetensors reads what is written in other tests"
    )
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    source = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    state = source.state_dict()
    tensors = [OutputTensor(name, "BF16", tuple(value.shape)) for name, value in state.items()]
    out = tmp_path / "model"
    with make(out, tensors, shard_size=6000, config=source.config.to_dict() | {"dtype": "bfloat16"}) as model:
        for name, value in state.items():
            model.write(name, 0, memoryview(value.contiguous().view(torch.uint8).numpy()))
        model.finish(manifest=MANIFEST, **CARD)
    assert len(list(out.glob("*.safetensors"))) > 2
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.dtype == torch.bfloat16
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, state[name])


def test_side_files_are_copied_but_never_over_the_writers_own(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for name in ("tokenizer.json", "config.json", "README.md", "modeling_own.py"):
        (base / name).write_text(f"base {name}")
    (base / "link.json").symlink_to(base / "tokenizer.json")
    side_files = sorted(base.iterdir())
    with make(tmp_path / "out", side_files=side_files) as model:
        write_all(model, TENSORS)
        model.finish(manifest=MANIFEST, **CARD)
    out = tmp_path / "out"
    assert (out / "tokenizer.json").read_text() == "base tokenizer.json"
    assert (out / "modeling_own.py").read_text() == "base modeling_own.py"
    assert not (out / "link.json").is_symlink() and (out / "link.json").read_text() == "base tokenizer.json"
    assert json.loads((out / "config.json").read_text()) == {"model_type": "llama"}
    assert "base" not in (out / "README.md").read_text().split("---")[0]
    with make(tmp_path / "other", side_files=side_files, config=None) as model:
        write_all(model, TENSORS)
        model.finish(manifest=MANIFEST, **CARD)
    assert (tmp_path / "other" / "config.json").read_text() == "base config.json"


def test_a_missing_side_file_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(MergeError, match=r"tokenizer\.json failed: No such file"):
        make(tmp_path / "out", side_files=[tmp_path / "tokenizer.json"])
    assert left_in(tmp_path) == []


# -- the target


def test_an_empty_directory_is_filled_and_keeps_its_permissions(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir(mode=0o750)
    with make(out) as model:
        write_all(model, TENSORS)
        assert left_in(out) == []
        model.finish(manifest=MANIFEST, **CARD)
    assert out.stat().st_mode & 0o777 == 0o750
    assert "model.safetensors" in left_in(out)


def test_a_link_to_an_empty_directory_is_followed(tmp_path: Path) -> None:
    real = tmp_path / "elsewhere" / "real"
    real.mkdir(parents=True)
    (tmp_path / "out").symlink_to(real)
    with make(tmp_path / "out") as model:
        write_all(model, TENSORS)
        model.finish(manifest=MANIFEST, **CARD)
    assert (tmp_path / "out").is_symlink() and "model.safetensors" in left_in(real)


def test_missing_parents_are_made_and_removed_again_when_the_merge_fails(tmp_path: Path) -> None:
    model = make(tmp_path / "a" / "b" / "out")
    model.abort()
    assert left_in(tmp_path) == []
    with make(tmp_path / "a" / "b" / "out") as model:
        write_all(model, TENSORS)
        model.finish(manifest=MANIFEST, **CARD)
    assert left_in(tmp_path / "a" / "b") == ["out"]


def test_a_target_that_is_not_empty_is_refused_and_untouched(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("1")
    with pytest.raises(ArgumentError, match=r"out exists and is not empty"):
        make(out)
    assert left_in(tmp_path) == ["out"] and left_in(out) == ["precious"]


@pytest.mark.parametrize("kind", ["file", "parent is a file", "dangling link", "fifo"])
def test_a_target_that_cannot_be_a_directory_is_refused(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("1")
    elif kind == "parent is a file":
        out.write_text("1")
        out = out / "sub" / "out"
    elif kind == "fifo":
        os.mkfifo(out)
    else:
        out.symlink_to(tmp_path / "file" / "x")
        (tmp_path / "file").write_text("1")
    before = left_in(tmp_path)
    with pytest.raises(ArgumentError, match="is not a directory"):
        make(out)
    assert left_in(tmp_path) == before


def test_a_parent_that_is_not_writable_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Patched, since the superuser may write everywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ArgumentError, match="is not writable"):
        check_target(tmp_path / "out")


def test_a_target_filled_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"
    model = make(out)
    write_all(model, TENSORS)
    out.mkdir()
    (out / "precious").write_text("1")
    with pytest.raises(MergeError, match="filled by somebody else"):
        model.finish(manifest=MANIFEST, **CARD)
    assert left_in(tmp_path) == ["out"] and left_in(out) == ["precious"]


def test_too_little_free_space_is_said_in_bytes_before_anything_is_made(tmp_path: Path) -> None:
    huge = [OutputTensor("huge", "F32", (2**52,))]
    with pytest.raises(MergeError, match=r"needs \d+ TB \(\d+ bytes\) but its disk has .* \(\d+ bytes\) free"):
        make(tmp_path / "a" / "out", huge)
    assert left_in(tmp_path) == []


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([], "no tensors"),
        ([OutputTensor("a", "F8_NEW", (1,))], "dtype 'F8_NEW'"),
        ([OutputTensor("a", "F32", (1,)), OutputTensor("a", "F32", (1,))], "'a' twice"),
        ([OutputTensor("__metadata__", "F32", (1,))], "reserved"),
    ],
)
def test_impossible_outputs_are_refused(tmp_path: Path, tensors: list[OutputTensor], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make(tmp_path / "out", tensors)
    assert left_in(tmp_path) == []


# -- exactly once


def test_bytes_that_were_not_written_are_detected_and_nothing_is_left(tmp_path: Path) -> None:
    model = make(tmp_path / "out")
    write_all(model, TENSORS[1:])
    model.write("embed", 0, memoryview(content(TENSORS[0]))[:-1])
    with pytest.raises(MergeError, match=r"incomplete: 1 of 7 tensors.*'embed' \(591 of 592 bytes\)"):
        model.finish(manifest=MANIFEST, **CARD)
    assert left_in(tmp_path) == []


@pytest.mark.parametrize(("start", "length"), [(0, 4), (8, 4), (4, 17), (20, 1)])
def test_gaps_repeats_and_overruns_are_refused(tmp_path: Path, start: int, length: int) -> None:
    with make(tmp_path / "out") as model:
        model.write("layer.bias", 0, memoryview(bytes(4)))
        with pytest.raises(MergeError, match=r"'layer\.bias' has 20 bytes of which byte 4 comes next"):
            model.write("layer.bias", start, memoryview(bytes(length)))
    assert left_in(tmp_path) == []


def test_unknown_tensors_and_writes_after_the_end_are_refused(tmp_path: Path) -> None:
    model = make(tmp_path / "out")
    with pytest.raises(MergeError, match="'other' is not part"):
        model.write("other", 0, memoryview(b"1"))
    model.abort()
    with pytest.raises(MergeError, match="closed already"):
        model.write("layer.bias", 0, memoryview(bytes(20)))
    with pytest.raises(MergeError, match="closed already"):
        model.finish(manifest=MANIFEST, **CARD)


# -- failures


def test_abort_is_idempotent_and_after_finish_keeps_the_output(tmp_path: Path) -> None:
    model = make(tmp_path / "out")
    model.abort()
    model.abort()
    assert left_in(tmp_path) == []
    with make(tmp_path / "out") as model:
        write_all(model, TENSORS)
        model.finish(manifest=MANIFEST, **CARD)
    model.abort()
    abort_all()
    assert left_in(tmp_path) == ["out"] and "model.safetensors" in left_in(tmp_path / "out")


def test_an_interrupt_inside_the_with_block_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), make(tmp_path / "out") as model:
        model.write("layer.bias", 0, memoryview(bytes(20)))
        raise KeyboardInterrupt
    assert left_in(tmp_path) == []


def test_what_nobody_aborted_is_removed_by_abort_all(tmp_path: Path) -> None:
    models = [make(tmp_path / name) for name in ("one", "two")]
    assert len(left_in(tmp_path)) == len(models)
    abort_all()
    assert left_in(tmp_path) == []


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, r"the disk is full \(.* left there\); free some space"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EIO, "input/output error"),
        (errno.EROFS, "read-only"),
    ],
)
@pytest.mark.parametrize("function", ["pwrite", "fsync", "rename", "mkdir", "open"])
def test_errors_of_the_disk_are_sentences_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, number: int, message: str
) -> None:
    def fail(*arguments: object, **options: object) -> int:
        raise OSError(number, os.strerror(number))

    with pytest.raises(MergeError, match=message), monkeypatch.context() as patch:
        real_open = os.open
        failing = {
            "open": lambda path, flags, *rest, **o: (fail if flags & os.O_CREAT else real_open)(path, flags, *rest, **o)
        }
        patch.setattr(os, function, failing.get(function, fail))
        with make(tmp_path / "out") as model:
            write_all(model, TENSORS)
            model.finish(manifest=MANIFEST, **CARD)
    assert left_in(tmp_path) == []


def test_a_disk_that_fills_up_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.pwrite, 0

    def fill(descriptor: int, data: memoryview, offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", fill)
    with pytest.raises(MergeError, match="the disk is full"), make(tmp_path / "out") as model:
        write_all(model, TENSORS)
    assert calls == 21
    assert left_in(tmp_path) == []


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: real(descriptor, data[:3], offset))
    with make(tmp_path / "out") as model:
        write_all(model, TENSORS, step=100)
        model.finish(manifest=MANIFEST, **CARD)
    assert {name: raw for name, (raw, _, _) in read_back(tmp_path / "out").items()} == {
        t.name: content(t) for t in TENSORS
    }


def test_an_error_while_removing_does_not_hide_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(atomic.shutil, "rmtree", fail)
    with pytest.raises(ValueError, match="first"), make(tmp_path / "out"):
        raise ValueError("first")
    assert "could not be removed" in caplog.text


def test_where_the_file_system_cannot_allocate_files_get_their_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outfile, "_libc_function", lambda *arguments: None)
    with make(tmp_path / "out") as model:
        write_all(model, TENSORS)
        model.finish(manifest=MANIFEST, **CARD)
    assert set(read_back(tmp_path / "out")) == {tensor.name for tensor in TENSORS}


def test_a_write_in_flight_ends_before_descriptors_are_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, entered, go_on, seen = os.pwrite, threading.Event(), threading.Event(), []

    def slow(descriptor: int, data: memoryview, offset: int) -> int:
        entered.set()
        assert go_on.wait(10)
        seen.append(os.fstat(descriptor).st_ino)
        return real(descriptor, data, offset)

    model = make(tmp_path / "out")
    monkeypatch.setattr(os, "pwrite", slow)
    worker = threading.Thread(target=model.write, args=("layer.bias", 0, memoryview(bytes(20))))
    worker.start()
    assert entered.wait(10)
    aborting = threading.Thread(target=model.abort)
    aborting.start()
    aborting.join(0.1)
    assert aborting.is_alive()
    go_on.set()
    worker.join(10)
    aborting.join(10)
    assert len(seen) == 1
    assert left_in(tmp_path) == []


SCRIPT = """
import os, resource, sys
from pathlib import Path
from fastmerge.engine import atomic, outfile, writer
from fastmerge.errors import MergeError
out, mode = Path(sys.argv[1]), sys.argv[2]
if mode == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
if mode in ("allocate", "write"):
    atomic._free_bytes = lambda directory: None
if mode == "write":
    outfile._libc_function = lambda *arguments: None
tensors = [writer.OutputTensor(f"t{i}", "U8", (1 << 19,)) for i in range(20)]
try:
    with writer.ModelWriter(out, tensors, shard_size=1 << 21, config=None, side_files=[]) as model:
        print("made", flush=True)
        for tensor in tensors:
            model.write(tensor.name, 0, memoryview(bytes(tensor.nbytes)))
        model.finish(manifest={}, card_yaml="", card_info={})
except MergeError as error:
    print(error)
    print("left:", os.listdir(out.parent))
"""


def test_a_file_size_limit_is_a_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "sub" / "out"), "limit"]
    (tmp_path / "sub").mkdir()
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "the file is larger than this process or file system may write" in result.stdout
    assert result.stdout.endswith("left: []\n")


@pytest.mark.parametrize(
    ("mode", "message", "made"),
    [
        ("check", "needs 11.5 MB", False),
        ("allocate", "failed: the disk is full", False),
        ("write", "failed: the disk is full", True),
    ],
)
def test_a_disk_that_is_really_full_is_a_sentence_and_leaves_nothing(
    tmp_path: Path, mode: str, message: str, made: bool
) -> None:
    # A file system of 4 MB in a mount namespace of its own: it disappears with the process.
    inside = f'mount -t tmpfs -o size=4m none "$1" && exec {sys.executable} -c "$2" "$1/out" {mode}'
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", inside, "sh", str(tmp_path), SCRIPT]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here; other tests imitate a full disk: {error}")
    assert message in result.stdout
    assert result.stdout.startswith("made") == made
    assert result.stdout.endswith("left: []\n")


def test_an_atomic_directory_is_absent_until_it_is_whole(tmp_path: Path) -> None:
    directory = AtomicDirectory(tmp_path / "out")
    (directory.path / "file").write_text("1")
    assert directory.path.parent == tmp_path and not (tmp_path / "out").exists()
    directory.commit()
    assert left_in(tmp_path) == ["out"] and left_in(tmp_path / "out") == ["file"]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "scores.png"
    with replacing(target) as beside:
        assert beside.suffix == ".png"
        beside.write_text("old")
    with replacing(target):
        pass
    with (
        pytest.raises(MergeError, match=r"Writing .*scores\.png failed: the disk is full"),
        replacing(target) as beside,
    ):
        beside.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(KeyboardInterrupt), replacing(target) as beside:
        beside.write_text("half")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["scores.png"] and target.read_text() == "old"
    with replacing(target) as beside:
        beside.write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["scores.png"] and target.read_text() == "new"
