"""The model card: what a merged model is made of, for a reader and for the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?", re.ASCII)


def model_card(config_yaml: str, info: Mapping[str, Any]) -> str:
    """Write the model card (README.md) of a merge.

    Args:
        config_yaml: the merge configuration, as YAML.
        info: what is known about the merge; every key is optional.
            ``name`` (title), ``method``, ``summary`` (one sentence), ``source`` (citation of the method),
            ``base_model`` (reference or None), ``models`` (list of references), ``numerics``, ``seed``,
            ``dtype``, ``version`` (of fastmerge), ``digest`` (of the merged tensors), ``command`` (what makes the model
            again, where that is not a merge of the configuration).

    Returns:
        Markdown with YAML front matter. It depends on the arguments alone: no date, no machine.
    """
    method = str(info.get("method") or "unknown")
    base = info.get("base_model")
    models = [str(model) for model in info.get("models") or ()]
    if base is not None and str(base) not in models:
        models.insert(0, str(base))
    sections = [
        _front_matter(models),
        f"# {info.get('name') or 'Merged model'}",
        "This model was merged from other models with [fastmerge](https://pypi.org/project/fastmerge/).",
        "## Method",
        _method(method, info),
        "## Models",
        "\n".join(f"- `{model}`" + (" (base)" if model == base else "") for model in models) or "- none",
        "## Configuration",
        _fenced(config_yaml, "yaml"),
        "## Reproduce",
        _reproduce(info),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(models: Sequence[str]) -> str:
    # The hub refuses a card whose base_model is not a repository, so paths of the merging machine stay out of it.
    hub = [model.partition("@")[0] for model in models if _HUB_ID.fullmatch(model) and not Path(model).exists()]
    lines = ["---"]
    if hub:
        lines += ["base_model:", *(f"- {name}" for name in dict.fromkeys(hub))]
    lines += ["library_name: transformers", "tags:", "- merge", "- fastmerge", "---"]
    return "\n".join(lines)


def _method(method: str, info: Mapping[str, Any]) -> str:
    text = f"`{method}`"
    if info.get("summary"):
        text += f": {str(info['summary']).rstrip('.')}."
    if info.get("source"):
        text += f"\n\nSource: {info['source']}"
    return text


def _reproduce(info: Mapping[str, Any]) -> str:
    command = ["fastmerge merge config.yml out"]
    if info.get("numerics"):
        command.append(f"--numerics {info['numerics']}")
    if info.get("seed") is not None:
        command.append(f"--seed {info['seed']}")
    version = f" with fastmerge {info['version']}" if info.get("version") else ""
    if info.get("command"):
        text = f"Run{version}:\n\n" + _fenced(str(info["command"]), "sh")
    else:
        text = f"Save the configuration above as `config.yml`, then{version}:\n\n" + _fenced(" ".join(command), "sh")
    if info.get("digest"):
        text += (
            "\n\nThe result has the same bits on every machine, whatever the shard size, memory budget or number of "
            f"threads. The `digest` in `manifest.json` is then `{info['digest']}`."
        )
    return text


def _fenced(text: str, language: str) -> str:
    # A fence longer than any run of backticks inside cannot be closed by the text.
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
