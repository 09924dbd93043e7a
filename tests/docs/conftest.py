from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, TOOLS
from tests.engine.small_family import family, save

MODELS = ("math", "code", "chat")
"""What the pages call the fine-tunes of `base`."""

sys.path.insert(0, str(ROOT / "bench"))


@pytest.fixture
def workplace(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A directory with the tiny models that the pages merge: `base`, `math`, `code` and `chat`.

    Those of a page about another tool are models of an architecture that the tool knows.
    """
    page = getattr(request.node, "callspec", None) and request.node.callspec.params.get("page")
    if page is not None and page.stem in TOOLS:
        from make_family import make_family

        made = make_family(tmp_path, scale="tiny", models=len(MODELS))
        for name, folder in zip(MODELS, made.models, strict=True):
            folder.rename(tmp_path / name)
        return tmp_path
    base, tuned = family(models=len(MODELS))
    for name, tensors in zip(("base", *MODELS), (base, *tuned), strict=True):
        save(tmp_path / name, tensors, shards=2)
        (tmp_path / name / "tokenizer.json").write_text("{}")
        (tmp_path / name / "generation_config.json").write_text("{}")
    return tmp_path


@pytest.fixture
def shell_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which `fastmerge` and `fastmerge-yaml` are those of this tree, and no hub is asked."""
    tools = tmp_path_factory.mktemp("bin")
    for name, module in (("fastmerge", "fastmerge"), ("fastmerge-yaml", "fastmerge.integrations.mergekit.command")):
        command = tools / name
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {module} "$@"\n')
        command.chmod(0o755)
    kept = {key: value for key, value in os.environ.items() if not key.startswith("FASTMERGE_")}
    return kept | {
        "PATH": os.pathsep.join([str(tools), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "200",
        "LC_ALL": "C.UTF-8",
    }
