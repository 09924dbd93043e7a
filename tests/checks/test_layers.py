"""The layers check finds what points the wrong way, and nothing else."""

from pathlib import Path

import pytest

from checks import layers


def python(tmp_path: Path, where: str, code: str) -> list[str]:
    path = tmp_path / "fastmerge" / where
    path.parent.mkdir(parents=True)
    path.write_text(code)
    return layers.python_problems(tmp_path / "fastmerge")


def test_the_repository_keeps_its_layers():
    assert layers.problems() == []
    assert list((layers.ROOT / "fastmerge").rglob("*.py")) and list((layers.ROOT / "csrc").rglob("*.h"))


@pytest.mark.parametrize(
    ("where", "code"),
    [
        ("reference/select.py", "import numpy"),
        ("reference/select.py", "from fastmerge.errors import ArgumentError"),
        ("reference/select.py", "from ..backends import rule"),
        ("backends/cpu.py", "from fastmerge import ops"),
        ("backends/cpu.py", "import fastmerge"),
        ("backends/__init__.py", "from ..ops.select import topk_mask"),
        ("ops/select.py", "from fastmerge.methods.ties import Ties"),
        ("ops/select.py", "from fastmerge.reference import select"),
        ("ops/select.py", "import fastmerge._cpu"),
        ("ops/select.py", "import safetensors.torch"),
        ("ops/__init__.py", "from .. import engine"),
        ("methods/ties.py", "def late():\n    from fastmerge.engine import plan"),
        ("methods/ties.py", "from fastmerge import backends, merging"),
        ("methods/ties.py", "import yaml"),
        ("engine/plan.py", "from fastmerge.cli import app"),
        ("engine/plan.py", "import fastmerge.integrations.mergekit"),
        ("engine/plan.py", "from fastmerge import _cpu"),
        ("merging.py", "from fastmerge import evolve"),
        ("evolve/population.py", "from fastmerge.reference import evolve"),
        ("evolve/evolution.py", "from fastmerge.cli_evolve import app"),
        ("errors.py", "from fastmerge.ops import sparsify"),
        ("engine/plan.py", "import mergekit.config"),
        ("cli.py", "def late():\n    from mergekit.scripts import run_yaml"),
    ],
)
def test_an_import_upwards_is_found(tmp_path, where, code):
    (problem,) = python(tmp_path, where, code)
    assert problem.startswith(f"fastmerge/{where}:{1 + code.count(chr(10))}: ")


@pytest.mark.parametrize(
    ("where", "code"),
    [
        ("reference/select.py", "import math, torch\nfrom fastmerge.reference import keys\nfrom . import tile"),
        ("backends/cpu.py", "from fastmerge import _cpu, reference\nfrom fastmerge.errors import BackendError"),
        ("ops/select.py", "from fastmerge import backends\nfrom fastmerge._dtypes import WIDTH\nfrom . import checks"),
        ("methods/ties.py", "from fastmerge import ops\nimport pydantic"),
        ("engine/plan.py", "from fastmerge import methods, ops\nimport safetensors, yaml"),
        ("cli.py", "from fastmerge import _cpu, backends, merging\nfrom fastmerge.engine import plan"),
        ("integrations/mergekit.py", "import mergekit\nfrom fastmerge import ops"),
        ("integrations/mergekit/group.py", "import mergekit.sparsify\nfrom fastmerge.engine import at_once"),
        ("__init__.py", "from fastmerge.merging import merge"),
    ],
)  # fmt: skip
def test_an_import_downwards_is_fine(tmp_path, where, code):
    assert python(tmp_path, where, code) == []


def cpp(tmp_path: Path, where: str, include: str) -> list[str]:
    for name in ("include/fastmerge/keys.h", "cpu/pool.h", "cuda/tile.h", "bindings/checks.h"):
        path = tmp_path / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "csrc" / where).write_text(f"#pragma once\n#include {include}\n")
    return layers.cpp_problems(tmp_path / "csrc")


@pytest.mark.parametrize(
    ("where", "include"),
    [
        ("include/fastmerge/keys.h", '"cpu/pool.h"'),
        ("include/fastmerge/keys.h", '"../../bindings/checks.h"'),
        ("include/fastmerge/keys.h", "<torch/extension.h>"),
        ("cpu/pool.cpp", '"bindings/checks.h"'),
        ("cpu/pool.cpp", "<Python.h>"),
        ("cpu/pool.cpp", '"cuda/tile.h"'),
        ("cuda/select.cu", '"cpu/pool.h"'),
        ("cuda/select.cu", "<cuda_runtime.h>"),
        ("bindings/cpu.cpp", "<cuda_runtime.h>"),
        ("cuda/select.cu", "<pybind11/pybind11.h>"),
        ("cpu/pool.cpp", "<pybind11/pybind11.h>"),
        ("cpu/pool.cpp", '"ATen/ATen.h"'),
    ],
)
def test_an_include_upwards_is_found(tmp_path, where, include):
    (problem,) = cpp(tmp_path, where, include)
    assert problem.startswith(f"csrc/{where}:2: ")


@pytest.mark.parametrize(
    ("where", "include"),
    [
        ("include/fastmerge/keys.h", "<stdint.h>"),
        ("cpu/pool.cpp", '"fastmerge/keys.h"'),
        ("cpu/pool.cpp", '"pool.h"'),
        ("cuda/select.cu", '"cuda/tile.h"'),
        ("cuda/device.h", "<cuda_runtime.h>"),
        ("bindings/cpu.cpp", '"cpu/pool.h"'),
        ("bindings/cpu.cpp", "<pybind11/pybind11.h>"),
    ],
)
def test_an_include_downwards_is_fine(tmp_path, where, include):
    assert cpp(tmp_path, where, include) == []


@pytest.mark.parametrize("code", ["import torch", "from ..errors import BackendError", "from numpy import array"])
def test_kernels_in_triton_know_only_triton(tmp_path, code):
    kernels = tmp_path / "triton_kernels"
    kernels.mkdir()
    (kernels / "select.py").write_text(f"import triton.language as tl\nfrom . import numbers\n{code}\n")
    (problem,) = layers.triton_problems(kernels)
    assert problem.startswith("triton_kernels/select.py:3: ")
