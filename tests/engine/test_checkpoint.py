"""Opening checkpoints in every layout, reading their bytes, and refusing those that cannot be merged as they stand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastmerge.engine import checkpoint as module
from fastmerge.engine.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from fastmerge.errors import ArgumentError, CheckpointError, MergeError
from tests.engine.builders import bf16, write_index, write_model, write_raw, write_safetensors

TENSORS = {
    "model.embed_tokens.weight": bf16(8, 4),
    "model.layers.0.w": bf16(3, 5, fill=1),
    "model.layers.1.w": bf16(3, 5, fill=2),
    "model.norm.weight": bf16(4, fill=3),
    "scalar": ("F32", (), b"\x00\x00\x80?"),
    "nothing": ("F32", (0, 4), b""),
}


def read(opened: Checkpoint, name: str) -> bytes:
    info = opened.tensors[name]
    buffer = bytearray(info.nbytes)
    opened.read_into(info, 0, memoryview(buffer))
    return bytes(buffer)


def refuse(ref: str | Path, *words: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(ref)
    message = str(caught.value)
    for word in words:
        assert word in message, message
    assert "\n" not in message and message.endswith(".")
    return message


# -- layouts


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_a_directory_gives_every_tensor_whatever_its_shards(tmp_path: Path, shards: int) -> None:
    root = write_model(tmp_path / "m", TENSORS, shards=shards, config={"tie_word_embeddings": True})
    with open_checkpoint(root) as opened:
        assert set(opened.tensors) == set(TENSORS)
        assert {name: read(opened, name) for name in TENSORS} == {name: data for name, (_, _, data) in TENSORS.items()}
        assert opened.root == root and opened.ref == str(root)
        assert len(opened.files) == shards and opened.files == sorted(opened.files)
        assert opened.config == {"tie_word_embeddings": True} and opened.tied is True
        assert opened.nbytes == sum(len(data) for _, _, data in TENSORS.values())
        places = [(info.file, info.start) for info in opened.tensors.values()]
        assert places == sorted(places), "the order of the dict is the order to read in"


def test_a_single_file_is_a_checkpoint(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "any_name.safetensors", TENSORS)
    (tmp_path / "setup.py").write_text("")
    opened = open_checkpoint(str(path))
    assert read(opened, "model.norm.weight") == TENSORS["model.norm.weight"][2]
    assert opened.config is None and opened.tied is None
    assert opened.side_files() == [], "the neighbours of a lone file are not the model's"


def test_a_directory_without_an_index_takes_all_of_its_safetensors_files(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "part-a.safetensors", {"a": bf16(2)})
    write_safetensors(tmp_path / "part-b.safetensors", {"b": bf16(2)})
    write_safetensors(tmp_path / "adapter_model.safetensors", {"lora": bf16(2)})
    assert list(open_checkpoint(tmp_path).tensors) == ["a", "b"]


def test_model_safetensors_goes_before_other_files(tmp_path: Path) -> None:
    write_model(tmp_path, {"a": bf16(2)})
    write_safetensors(tmp_path / "consolidated.safetensors", {"a": bf16(2), "b": bf16(2)})
    assert list(open_checkpoint(tmp_path).tensors) == ["a"]


def test_safetensors_go_before_pickles(tmp_path: Path) -> None:
    write_model(tmp_path, {"a": bf16(2)})
    torch.save({"b": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    assert list(open_checkpoint(tmp_path).tensors) == ["a"]


def test_one_index_of_another_name_is_followed(tmp_path: Path) -> None:
    write_model(tmp_path, TENSORS, shards=2)
    (tmp_path / "model.safetensors.index.json").rename(tmp_path / "other.safetensors.index.json")
    assert set(open_checkpoint(tmp_path).tensors) == set(TENSORS)


def test_the_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    real = write_model(tmp_path / "blobs", TENSORS, shards=2)
    snapshot = tmp_path / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    for path in real.iterdir():
        blob = path.rename(path.with_name(f"{abs(hash(path.name)):x}"))
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    with open_checkpoint(snapshot) as opened:
        assert {name: read(opened, name) for name in TENSORS} == {name: data for name, (_, _, data) in TENSORS.items()}


def test_a_home_directory_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_model(tmp_path / "m", TENSORS)
    assert set(open_checkpoint("~/m").tensors) == set(TENSORS)


def test_opening_safetensors_loads_neither_torch_nor_the_hub(tmp_path: Path) -> None:
    write_model(tmp_path / "m", TENSORS)
    code = (
        "import sys; from fastmerge.engine.checkpoint import open_checkpoint; from fastmerge.engine import parameters\n"
        f"open_checkpoint({str(tmp_path / 'm')!r})\n"
        "sys.exit(', '.join({'torch', 'huggingface_hub', 'numpy'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# -- refusals: what is there


def test_an_empty_directory_tells_what_was_looked_for(tmp_path: Path) -> None:
    refuse(tmp_path, str(tmp_path), "model.safetensors.index.json", "pytorch_model.bin", "check the path")


def test_an_adapter_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    write_safetensors(tmp_path / "adapter_model.safetensors", {"lora": bf16(2)})
    refuse(tmp_path, "adapter", "merge_and_unload")


def test_gguf_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    refuse(tmp_path, "GGUF")
    refuse(tmp_path / "model.gguf", "neither a directory nor")


@pytest.mark.parametrize("ref", ["./none", "/no/such/model", "../none", "a/b/c", "name with space", "x" * 5000, "a\0b"])
def test_a_path_that_is_not_there_is_refused_without_asking_the_hub(ref: str) -> None:
    refuse(ref, "does not exist", "no such directory or file", "check the path")


def test_an_empty_name_is_refused() -> None:
    refuse("  ", "empty")


def test_a_model_with_an_adapter_is_refused_and_a_path_with_a_plus_is_not(tmp_path: Path) -> None:
    refuse("org/model+org/lora", "the adapter org/lora on org/model", "merge_and_unload")
    assert open_checkpoint(write_model(tmp_path / "a+b", TENSORS)).tensors


def test_two_sets_of_weights_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path, TENSORS, shards=2)
    write_safetensors(tmp_path / "model.safetensors", TENSORS)
    refuse(tmp_path, "two sets of weights", "model.safetensors")


def test_several_indices_are_refused(tmp_path: Path) -> None:
    write_index(tmp_path, {"a": "a.safetensors"}, "a.safetensors.index.json")
    write_index(tmp_path, {"b": "b.safetensors"}, "b.safetensors.index.json")
    refuse(tmp_path, "several indices", "a.safetensors.index.json")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_model(tmp_path, TENSORS, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    refuse(tmp_path, "lacks model-00002-of-00003.safetensors", "download", "3 shards")


def test_a_missing_shard_is_noticed_without_an_index_too(tmp_path: Path) -> None:
    write_model(tmp_path, TENSORS, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").unlink()
    refuse(tmp_path, "2 of the 3 shards", "download")


def test_a_tensor_of_the_index_that_its_shard_lacks_is_named(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a.safetensors", {"a": bf16(2)})
    write_index(tmp_path, {"a": "a.safetensors", "ghost": "a.safetensors"})
    refuse(tmp_path, "'ghost'", "a.safetensors", "lacks it")


def test_a_tensor_of_a_shard_that_the_index_lacks_is_named(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a.safetensors", {"a": bf16(2), "stray": bf16(2)})
    write_index(tmp_path, {"a": "a.safetensors"})
    refuse(tmp_path, "'stray'", "the index model.safetensors.index.json lacks")


def test_a_tensor_in_another_shard_than_the_index_says_is_named(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a.safetensors", {"a": bf16(2)})
    write_safetensors(tmp_path / "b.safetensors", {"b": bf16(2)})
    write_index(tmp_path, {"a": "b.safetensors", "b": "a.safetensors"})
    refuse(tmp_path, "'a'", "it is in a.safetensors")


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x.safetensors", {"a": bf16(2)})
    write_safetensors(tmp_path / "y.safetensors", {"a": bf16(2)})
    refuse(tmp_path, "'a'", "x.safetensors", "y.safetensors")


@pytest.mark.parametrize(
    "shard",
    [
        "/etc/passwd.safetensors", "../other/model.safetensors", "sub/../../model.safetensors", "..\\m.safetensors",
        "C:\\m.safetensors", "C:m.safetensors", "~/m.safetensors", "sub//m.safetensors", "\\\\host\\m.safetensors",
    ],
)  # fmt: skip
def test_an_index_that_leads_out_of_its_directory_is_refused_even_where_the_file_exists(
    tmp_path: Path, shard: str
) -> None:
    root = tmp_path / "m"
    write_model(root, {"a": bf16(2)})
    (root / "model.safetensors").rename(tmp_path / "model.safetensors")
    write_index(root, {"a": shard})
    refuse(root, repr(shard), "leads out of the model's directory", "'a'")


@pytest.mark.parametrize("shard", ["", 7, None, ["m.safetensors"], "a\0.safetensors", "a\n.safetensors"])
def test_an_index_that_names_no_file_is_refused(tmp_path: Path, shard: object) -> None:
    write_index(tmp_path, {"a": shard})
    refuse(tmp_path, "not the name of a file", "'a'")


def test_an_index_that_names_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    write_index(tmp_path, {"a": "pytorch_model.bin"})
    refuse(tmp_path, "not a .safetensors file")


def test_a_shard_in_a_folder_of_the_model_is_read(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write_safetensors(tmp_path / "sub" / "a.safetensors", {"a": bf16(2)})
    write_index(tmp_path, {"a": "sub/a.safetensors"})
    opened = open_checkpoint(tmp_path)
    assert read(opened, "a") == bf16(2)[2]
    assert opened.identity()["files"][0]["name"] == "sub/a.safetensors"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "no weight_map"),
        ("{}", "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": ["a"]}', "no weight_map"),
        ('{"weight_map": {"a": "a.safetensors", "a": "b.safetensors"}}', "'a' twice"),
    ],
)
def test_a_broken_index_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    refuse(tmp_path, str(path), words, "download")


def test_a_model_without_tensors_is_refused(tmp_path: Path) -> None:
    write_raw(tmp_path / "model.safetensors", {"__metadata__": {"format": "pt"}})
    refuse(tmp_path, "no tensor at all")


@pytest.mark.parametrize(("text", "words"), [("{oops", "not valid JSON"), ("[1]", "not a JSON object")])
def test_a_broken_config_json_is_refused(tmp_path: Path, text: str, words: str) -> None:
    write_model(tmp_path, TENSORS)
    (tmp_path / "config.json").write_text(text)
    refuse(tmp_path, str(tmp_path / "config.json"), words)


# -- refusals: what cannot be averaged


@pytest.mark.parametrize(
    ("dtype", "size", "name"),
    [
        ("F8_E4M3", 4, "FP8"), ("F8_E5M2", 4, "FP8"), ("F8_E8M0", 4, "FP8"), ("F4", 2, "FP4"), ("F6_E2M3", 3, "FP6"),
    ],
)  # fmt: skip
def test_codes_of_few_bits_are_refused_by_name(tmp_path: Path, dtype: str, size: int, name: str) -> None:
    write_model(tmp_path, {"fine": bf16(2), "the.weight": (dtype, (4,), bytes(size))})
    refuse(tmp_path, "'the.weight'", dtype, name, "dequantise")


def test_the_fp8_that_torch_saves_is_refused(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(4).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    refuse(tmp_path, "F8_E4M3 (FP8)", "dequantise")


def test_complex_numbers_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path, {"w": ("C64", (2,), bytes(16))})
    refuse(tmp_path, "'w'", "C64", "complex")


@pytest.mark.parametrize("key", ["quantization_config", "text"])
def test_a_quantised_models_config_is_refused_with_its_method(tmp_path: Path, key: str) -> None:
    settings = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    write_model(tmp_path, TENSORS, config=settings if key == "quantization_config" else {"text_config": settings})
    refuse(tmp_path, "quantised", "gptq", "dequantise")


@pytest.mark.parametrize(
    ("codes", "beside"),
    [
        (("I8", "l.weight"), "l.weight_scale"), (("U8", "l.weight"), "l.weight.absmax"), (("I8", "l.weight"), "l.SCB"),
        (("I8", "l.weight"), "l.scale"), (("I32", "l.qweight"), "l.scales"), (("I32", "l.qzeros"), "l.other"),
        (("U8", "l.weight"), "l.weight_scale_inv"), (("I32", "l.weight_packed"), "l.weight_scale"),
        (("I8", "l.w"), "l.w_scale"),
    ],
)  # fmt: skip
def test_integer_codes_are_known_by_the_tensors_beside_them(
    tmp_path: Path, codes: tuple[str, str], beside: str
) -> None:
    dtype, name = codes
    width = {"I8": 1, "U8": 1, "I32": 4}[dtype]
    write_model(tmp_path, {name: (dtype, (4,), bytes(4 * width)), beside: bf16(1)})
    refuse(tmp_path, "quantised weights", "dequantise")


def test_plain_integers_and_scales_of_plain_weights_are_fine(tmp_path: Path) -> None:
    tensors = {
        "position_ids": ("I64", (2,), bytes(16)), "mask": ("U8", (2,), bytes(2)), "logit_scale": bf16(1),
        "attn.weight": bf16(4), "attn.weight_scale": bf16(1), "flag": ("BOOL", (1,), b"\1"),
    }  # fmt: skip
    assert set(open_checkpoint(write_model(tmp_path, tensors)).tensors) == set(tensors)


# -- reading


def test_any_part_of_a_tensor_can_be_read(tmp_path: Path) -> None:
    data = bytes(range(250))
    opened = open_checkpoint(write_model(tmp_path, {"pad": ("U8", (3,), b"abc"), "w": ("U8", (250,), data)}))
    info = opened.tensors["w"]
    for start, count in [(0, 250), (0, 1), (249, 1), (7, 100), (250, 0), (0, 0)]:
        buffer = bytearray(b"\xee" * (count + 2))
        opened.read_into(info, start, memoryview(buffer)[1 : count + 1])
        assert bytes(buffer) == b"\xee" + data[start : start + count] + b"\xee"


def test_the_length_of_a_buffer_is_counted_in_bytes(tmp_path: Path) -> None:
    opened = open_checkpoint(write_model(tmp_path, {"w": bf16(6)}))
    target = torch.empty(2, 3, dtype=torch.int16)
    opened.read_into(opened.tensors["w"], 0, memoryview(target.numpy()))
    assert target.numpy().tobytes() == bf16(6)[2]
    opened.read_into(opened.tensors["w"], 0, memoryview(torch.empty(0, 3).numpy()))


@pytest.mark.parametrize(("start", "count"), [(-1, 2), (11, 2), (0, 13), (2**70, 1)])
def test_bytes_outside_a_tensor_are_not_read(tmp_path: Path, start: int, count: int) -> None:
    opened = open_checkpoint(write_model(tmp_path, {"w": bf16(6), "next": bf16(6)}))
    with pytest.raises(ArgumentError, match="outside tensor 'w' of 12 bytes"):
        opened.read_into(opened.tensors["w"], start, memoryview(bytearray(count)))


def test_only_this_checkpoints_tensors_and_writable_buffers_are_taken(tmp_path: Path) -> None:
    opened = open_checkpoint(write_model(tmp_path, {"w": bf16(6)}))
    forged = TensorInfo("w", "BF16", (6,), opened.files[0], 0, 12)
    with pytest.raises(ArgumentError, match="no tensor of"):
        opened.read_into(forged, 0, memoryview(bytearray(12)))
    with pytest.raises(ArgumentError, match="writable"):
        opened.read_into(opened.tensors["w"], 0, memoryview(bytes(12)))
    with pytest.raises(ArgumentError, match="contiguous"):
        opened.read_into(opened.tensors["w"], 0, memoryview(bytearray(24))[::2])


def test_a_file_that_gets_shorter_is_noticed_by_the_read(tmp_path: Path) -> None:
    root = write_model(tmp_path, {"first": bf16(50), "last": bf16(50)})
    with open_checkpoint(root) as opened:
        read(opened, "first")
        os.truncate(root / "model.safetensors", (root / "model.safetensors").stat().st_size - 60)
        assert read(opened, "first") == bf16(50)[2]
        with pytest.raises(MergeError, match=r"model\.safetensors got shorter .* tensor 'last'"):
            read(opened, "last")


@pytest.mark.parametrize("how", ["replace", "truncate", "touch"])
def test_a_file_that_changes_between_its_header_and_its_data_is_noticed(tmp_path: Path, how: str) -> None:
    root = write_model(tmp_path / "m", {"w": bf16(50)})
    path = root / "model.safetensors"
    opened = open_checkpoint(root)
    if how == "replace":
        write_safetensors(tmp_path / "new", {"w": bf16(50, fill=5)})
        os.utime(tmp_path / "new", ns=(path.stat().st_mtime_ns,) * 2)
        os.replace(tmp_path / "new", path)
    elif how == "truncate":
        os.truncate(path, 40)
    else:
        os.utime(path, ns=(1, 1))
    with pytest.raises(MergeError, match=r"model\.safetensors changed after its header"):
        read(opened, "w")


def test_a_file_that_vanishes_is_noticed(tmp_path: Path) -> None:
    root = write_model(tmp_path, {"w": bf16(5)})
    opened = open_checkpoint(root)
    (root / "model.safetensors").unlink()
    with pytest.raises(MergeError, match=r"model\.safetensors cannot be opened any more"):
        read(opened, "w")


def test_threads_read_at_once_and_get_their_own_bytes(tmp_path: Path) -> None:
    tensors = {f"t{index}": bf16(3000 + index, fill=index) for index in range(24)}
    opened = open_checkpoint(write_model(tmp_path, tensors, shards=3))
    wrong: list[str] = []

    def work(offset: int) -> None:
        for turn in range(60):
            name = f"t{(turn + offset) % 24}"
            if read(opened, name) != tensors[name][2]:
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(5 * number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_reads_larger_than_one_call_moves_are_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_READ", 7)
    opened = open_checkpoint(write_model(tmp_path, {"w": bf16(50)}))
    assert read(opened, "w") == bf16(50)[2]


def test_a_system_without_preadv_reads_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "preadv")
    opened = open_checkpoint(write_model(tmp_path, {"w": bf16(50)}))
    assert read(opened, "w") == bf16(50)[2]


def test_closing_lets_go_of_the_files_and_a_later_read_opens_them_again(tmp_path: Path) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = descriptors()
    opened = open_checkpoint(write_model(tmp_path, TENSORS, shards=3))
    assert descriptors() == before, "nothing stays open after the headers"
    for name in TENSORS:
        read(opened, name)
    assert descriptors() > before
    opened.close()
    assert descriptors() == before
    assert read(opened, "model.norm.weight") == TENSORS["model.norm.weight"][2]
    opened.close()


def test_more_shards_than_the_soft_limit_of_open_files_are_read(tmp_path: Path) -> None:
    tensors = {f"t{index}": bf16(2, fill=index) for index in range(60)}
    root = write_model(tmp_path / "m", tensors, shards=60)
    code = (
        "import resource, sys; sys.path.insert(0, '.')\n"
        "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
        "from fastmerge.engine.checkpoint import open_checkpoint\n"
        f"opened = open_checkpoint({str(root)!r})\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (32, hard))\n"
        "for info in opened.tensors.values(): opened.read_into(info, 0, memoryview(bytearray(4)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# -- what else a merge takes from a model


def test_side_files_are_what_a_merged_directory_needs_and_nothing_else(tmp_path: Path) -> None:
    wanted = {
        "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
        "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "qwen.tiktoken", "generation_config.json",
        "chat_template.jinja", "chat_template.json", "preprocessor_config.json", "video_preprocessor_config.json",
        "processor_config.json", "modeling_own.py", "configuration_own.py", "LICENSE", "LICENSE.txt", "NOTICE",
        "additional_chat_templates/tool_use.jinja",
    }  # fmt: skip
    others = {
        "README.md", "trainer_state.json", "training_args.bin", "optimizer.pt", "pytorch_model.bin", "model.gguf",
        "pytorch_model.bin.index.json", "mergekit_config.yml", ".gitattributes", "tokenizer.bin",
        "original/params.json", "eval_results.json", "tokenizer/deep.json",
    }  # fmt: skip
    root = write_model(tmp_path / "m", TENSORS, shards=2)
    for name in wanted | others:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("x")
    (root / "tokenizer_of_another.json").symlink_to("nowhere")
    opened = open_checkpoint(root)
    assert {path.relative_to(root).as_posix() for path in opened.side_files()} == wanted


def test_the_identity_knows_the_files_and_changes_with_them(tmp_path: Path) -> None:
    root = write_model(tmp_path / "m", TENSORS, shards=2)
    first = open_checkpoint(root).identity()
    assert first["ref"] == str(root) and "revision" not in first
    assert [entry["name"] for entry in first["files"]] == [path.name for path in sorted(root.glob("*.safetensors"))]
    assert all(set(entry) == {"name", "size", "mtime_ns", "header_sha256"} for entry in first["files"])
    assert json.loads(json.dumps(first)) == open_checkpoint(root).identity()
    write_model(root, TENSORS | {"more": bf16(1)}, shards=2)
    assert open_checkpoint(root).identity() != first


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({}, None),
        ({"tie_word_embeddings": False}, False),
        ({"tie_word_embeddings": True}, True),
        ({"text_config": {"tie_word_embeddings": True}}, True),
        ({"text_config": 3}, None),
    ],
)
def test_tied_is_what_config_json_says(tmp_path: Path, config: dict[str, object], tied: bool | None) -> None:
    assert open_checkpoint(write_model(tmp_path, TENSORS, config=config or {"a": 1})).tied is tied
