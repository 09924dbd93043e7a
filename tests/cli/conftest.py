from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from tests.cli.support import Run, command, process_environment, save_model

SHAPES = {
    "model.embed_tokens.weight": (64, 16),
    "model.layers.0.mlp.up_proj.weight": (48, 16),
    "model.layers.1.mlp.up_proj.weight": (48, 16),
    "model.norm.weight": (16,),
}
CONFIG = """\
merge_method: ties
base_model: ./base
models:
  - model: ./one
    parameters: {weight: 0.5, density: 0.5}
  - model: ./two
    parameters: {weight: 0.5, density: 0.5}
dtype: bfloat16
"""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run ``fastmerge`` as a user does, in a process of its own and in the test's directory."""

    def run(*arguments: object, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(*arguments),
            cwd=tmp_path,
            env=process_environment() | (environment or {}),
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


@pytest.fixture
def family(tmp_path: Path) -> Path:
    """A directory with ``base``, ``one`` and ``two``, tiny models of the same shapes, and ``merge.yml``."""
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    for model in ("base", "one", "two"):
        noise = 0.0 if model == "base" else 0.01
        state = {
            name: (value + noise * torch.randn(value.shape, generator=generator)).to(torch.bfloat16)
            for name, value in base.items()
        }
        save_model(tmp_path / model, state)
    (tmp_path / "merge.yml").write_text(CONFIG)
    return tmp_path
