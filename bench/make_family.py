"""Make "the family": a Llama-layout base and its fine-tunes, for benchmarks and tests.

The full family has 0.55 billion parameters for each model (hidden 1536, 16 layers, vocabulary 32000, untied) in bf16
shards of 500 MB. The weights are drawn, not trained: what a merge costs and what can go wrong in it depend on the
layout, the dtype and the distribution of the deltas, and those are kept realistic. A fine-tune is the base plus a
heavy-tailed update, rounded to the dtype of the file: in bf16 a part of the small updates vanishes in the rounding
and the others fall on few magnitudes, so that many deltas tie, as they do in real checkpoints.

    python bench/make_family.py
    python bench/make_family.py --out small --scale tiny --dtype float32 --models 2

Every block of every tensor has its own generator, keyed by the seed, the model and the tensor's name, so the bytes do
not depend on the number of threads. Memory stays at a few blocks, whatever the size of the model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

BLOCK = 1 << 21
"""Elements drawn at once: a few tens of MB of temporaries for each thread."""

DTYPES = {"bfloat16": (torch.bfloat16, "BF16"), "float16": (torch.float16, "F16"), "float32": (torch.float32, "F32")}

BASE_SPREAD = 0.02
UPDATE_SPREAD = 2e-4
"""In bf16 this leaves a sixth of the weights as they were, and a few percent of the deltas tie at the median."""


@dataclass(frozen=True)
class Scale:
    """The shape of a model and the size of its shards (bytes)."""

    hidden: int
    layers: int
    intermediate: int
    vocabulary: int
    heads: int
    kv_heads: int
    shard_bytes: int


SCALES = {
    "full": Scale(1536, 16, 4096, 32000, 12, 12, 500_000_000),
    "small": Scale(512, 8, 1376, 8000, 8, 8, 25_000_000),
    "tiny": Scale(64, 3, 160, 300, 4, 2, 100_000),
}


@dataclass(frozen=True)
class Family:
    """Where a family lies: the folder of the base and those of the fine-tunes."""

    base: Path
    models: list[Path]
    parameters: int

    @property
    def folders(self) -> list[Path]:
        """All model folders, the base first."""
        return [self.base, *self.models]

    def weight_files(self) -> list[Path]:
        """Every safetensors file of every model, the base's first."""
        return [file for folder in self.folders for file in sorted(folder.glob("*.safetensors"))]


def tensor_shapes(scale: Scale) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama's tensors in the order of its modules."""
    hidden, inner = scale.hidden, scale.intermediate
    narrow = hidden // scale.heads * scale.kv_heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (scale.vocabulary, hidden)}
    for layer in range(scale.layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "self_attn.q_proj.weight": (hidden, hidden),
            prefix + "self_attn.k_proj.weight": (narrow, hidden),
            prefix + "self_attn.v_proj.weight": (narrow, hidden),
            prefix + "self_attn.o_proj.weight": (hidden, hidden),
            prefix + "mlp.gate_proj.weight": (inner, hidden),
            prefix + "mlp.up_proj.weight": (inner, hidden),
            prefix + "mlp.down_proj.weight": (hidden, inner),
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "post_attention_layernorm.weight": (hidden,),
        }
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (scale.vocabulary, hidden)}


def plan_shards(shapes: dict[str, tuple[int, ...]], item_bytes: int, shard_bytes: int) -> list[list[str]]:
    """Fill shards in order, starting a new one when the next tensor would not fit."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * item_bytes
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _generator(*key: object) -> torch.Generator:
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def draw_block(name: str, block: int, size: int, models: int, seed: int, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Yield one block (``[size]``) of a tensor: of the base first, then of each fine-tune."""
    base = torch.randn(size, generator=_generator(seed, "base", name, block)).mul_(BASE_SPREAD)
    if "norm" in name:
        base.add_(1.0)  # a norm's gain lies around one
    base = base.to(dtype)
    yield base
    for model in range(models):
        update = torch.randn(size, generator=_generator(seed, model, name, block))
        # z + z^3/2: most updates are small, a few are a hundred times larger
        update.mul_(update.square().mul_(0.5).add_(1.0)).mul_(UPDATE_SPREAD)
        yield update.add_(base).to(dtype)


def _as_bytes(values: torch.Tensor) -> memoryview:
    return memoryview(values.view(torch.uint8).numpy())


class _Shards:
    """The safetensors files of one model, opened for writing at given places."""

    def __init__(self, folder: Path, shapes: dict[str, tuple[int, ...]], shards: list[list[str]], dtype: str) -> None:
        torch_dtype, code = DTYPES[dtype]
        self.places: dict[str, tuple[int, int]] = {}
        self.files: list[int] = []
        weight_map: dict[str, str] = {}
        total = 0
        for number, names in enumerate(shards, start=1):
            single = len(shards) == 1
            file = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            header: dict[str, object] = {"__metadata__": {"format": "pt"}}
            offset = 0
            for name in names:
                end = offset + math.prod(shapes[name]) * torch_dtype.itemsize
                header[name] = {"dtype": code, "shape": list(shapes[name]), "data_offsets": [offset, end]}
                weight_map[name] = file
                offset = end
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            descriptor = os.open(folder / file, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            os.pwrite(descriptor, len(text).to_bytes(8, "little") + text, 0)
            for name in names:
                start = header[name]["data_offsets"][0]  # type: ignore[index]
                self.places[name] = (descriptor, 8 + len(text) + start)
            self.files.append(descriptor)
            total += offset
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def write(self, name: str, byte: int, values: torch.Tensor) -> None:
        """Put ``values`` at ``byte`` of the tensor ``name``; any thread may call this."""
        descriptor, start = self.places[name]
        data, place = _as_bytes(values), start + byte
        while data:
            written = os.pwrite(descriptor, data, place)
            data, place = data[written:], place + written

    def close(self) -> None:
        """Close every file."""
        for descriptor in self.files:
            os.close(descriptor)


def _write_side_files(folder: Path, scale: Scale, dtype: str) -> None:
    """Write config and tokenizer files small enough to be made here, and enough for both tools."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": scale.hidden,
        "intermediate_size": scale.intermediate,
        "num_hidden_layers": scale.layers,
        "num_attention_heads": scale.heads,
        "num_key_value_heads": scale.kv_heads,
        "vocab_size": scale.vocabulary,
        "max_position_embeddings": 2048,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": dtype,
    }
    special = ["<unk>", "<s>", "</s>"]
    words = special + [f"w{number}" for number in range(scale.vocabulary - len(special))]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": number,
                "content": word,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for number, word in enumerate(special)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {word: number for number, word in enumerate(words)},
            "unk_token": "<unk>",
        },
    }
    tokens = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    files = {
        "config.json": config,
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2},
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 2048, **tokens},
        "special_tokens_map.json": tokens,
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def make_family(
    out: Path | str,
    *,
    scale: str = "full",
    dtype: str = "bfloat16",
    models: int = 3,
    seed: int = 0,
    shard_bytes: int | None = None,
    threads: int | None = None,
) -> Family:
    """Make a family under ``out``, or return the one that is there when it was made with the same settings.

    Args:
        out: folder that gets ``base``, ``model-1``, ``model-2`` and so on.
        scale: a name in ``SCALES``.
        dtype: "bfloat16", "float16" or "float32", of all files.
        models: how many fine-tunes.
        seed: another seed gives another family.
        shard_bytes: size of a shard; the scale's own when None.
        threads: how many blocks are drawn at once; the bytes do not depend on it.
    """
    out = Path(out)
    shape = SCALES[scale]
    torch_dtype = DTYPES[dtype][0]
    shard_bytes = shard_bytes or shape.shard_bytes
    shapes = tensor_shapes(shape)
    parameters = sum(map(math.prod, shapes.values()))
    family = Family(out / "base", [out / f"model-{number}" for number in range(1, models + 1)], parameters)
    recipe = {"format": 1, **asdict(shape), "shard_bytes": shard_bytes, "dtype": dtype, "models": models, "seed": seed}
    marker = out / "family.json"
    if marker.exists() and json.loads(marker.read_text()) == recipe:
        return family
    marker.unlink(missing_ok=True)

    shards = plan_shards(shapes, torch_dtype.itemsize, shard_bytes)
    writers = []
    for folder in family.folders:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("model*.safetensors*"):
            old.unlink()
        _write_side_files(folder, shape, dtype)
        writers.append(_Shards(folder, shapes, shards, dtype))

    def fill(job: tuple[str, int, int]) -> None:
        name, block, size = job
        place = block * BLOCK * torch_dtype.itemsize
        for writer, values in zip(writers, draw_block(name, block, size, models, seed, torch_dtype), strict=True):
            writer.write(name, place, values)

    jobs = [
        (name, block, min(BLOCK, math.prod(sizes) - block * BLOCK))
        for name, sizes in shapes.items()
        for block in range(math.ceil(math.prod(sizes) / BLOCK))
    ]
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the blocks are the parallelism
    try:
        with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
            for _ in pool.map(fill, jobs):
                pass
    finally:
        torch.set_num_threads(before)
        for writer in writers:
            writer.close()
    marker.write_text(json.dumps(recipe, indent=2) + "\n")
    return family


def main(arguments: list[str] | None = None) -> None:
    """Command line: make a family and say where it is."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "data" / "family-full-bfloat16")
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--models", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-bytes", type=int, default=None)
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    family = make_family(
        options.out,
        scale=options.scale,
        dtype=options.dtype,
        models=options.models,
        seed=options.seed,
        shard_bytes=options.shard_bytes,
    )
    size = sum(file.stat().st_size for file in family.weight_files())
    seconds = time.perf_counter() - start
    models = f"{family.parameters / 1e6:.1f}M parameters x {len(family.folders)} models"
    print(f"{models}, {size / 1e9:.2f} GB in {options.out}, {seconds:.1f} s")


if __name__ == "__main__":
    main()
