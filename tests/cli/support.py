"""What the tests of the command line share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def command(*arguments: object) -> list[str]:
    """The command line that runs fastmerge."""
    return [sys.executable, "-m", "fastmerge", *map(str, arguments)]


def process_environment() -> dict[str, str]:
    """This process's environment without fastmerge's own variables, with the sources under test in the path."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("FASTMERGE_")}
    root = str(Path(__file__).parents[2])
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])), "COLUMNS": "200"}


def save_model(directory: Path, state: dict[str, torch.Tensor]) -> None:
    """A Hugging Face style directory of one shard, with a config and a tokenizer file."""
    directory.mkdir(exist_ok=True)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "vocab_size": 64}
    (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True, "dtype": "bfloat16"}))
    (directory / "tokenizer.json").write_text('{"of": "' + directory.name + '"}')
