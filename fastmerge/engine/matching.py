"""Which tensor of each model goes with which: names, shapes and dtypes compared, from headers alone.

The base says what the output looks like (the first model where there is no base). What does not fit is refused with a
sentence; the one difference between checkpoints that is resolved is a tied output head, which only some of them store.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from fastmerge.engine.safetensors_header import TensorInfo
from fastmerge.engine.sources import FLOATS, Source
from fastmerge.errors import CheckpointError

_HEAD = re.compile(r"(^|.*\.)(lm_head|embed_out|output)\.weight$")
_EMBEDDING = re.compile(r"(^|.*\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings)\.weight$")
# Computed from the config when a model is built; checkpoints keep them or not depending on who saved them.
_DERIVED = re.compile(r".*\.(rotary_emb\.inv_freq|position_ids|masked_bias)$")

Action = Literal["merge", "copy", "same"]


@dataclass(frozen=True)
class Input:
    """One tensor of one model."""

    source: Source
    info: TensorInfo


@dataclass(frozen=True)
class Match:
    """One output tensor and what it is made from.

    action: "merge"; "copy" the first input (excluded tensors); or "same": inputs that are not floating-point numbers,
    copied from the first and refused when the others differ. base is None where a method takes none. again: a tied
    head that every model stores beside its embedding, so that these weights are there twice.
    """

    name: str
    action: Action
    base: Input | None
    models: tuple[Input, ...]
    again: bool = False

    @property
    def inputs(self) -> tuple[Input, ...]:
        """Base first, then the models."""
        return self.models if self.base is None else (self.base, *self.models)


@dataclass(frozen=True)
class Matching:
    """All output tensors in the order of the first model's files.

    untied: the output has a head of its own although the config taken over ties it to the embedding. notes: what a
    person should know, in sentences.
    """

    matches: list[Match]
    untied: bool
    notes: list[str]


def match_models(base: Source | None, models: Sequence[Source], exclude: Callable[[str], bool]) -> Matching:
    """Line the models' tensors up. Raises CheckpointError naming model and tensor where that cannot be done."""
    sources = list(models) if base is None else [base, *models]
    skeleton = sources[0]
    names = list(skeleton.tensors)
    notes: list[str] = []
    untied = False

    for source in sources[1:]:
        for name in source.tensors:
            if name in skeleton.tensors or name in names:
                continue
            if _HEAD.match(name) and _embedding_of(skeleton, name) is not None:
                if source.tied is True:
                    continue  # a stored copy of its embedding, which the output ties as well
                names.append(name)
                untied = True
                notes.append(f"{name}: untied in {source.ref}, so the output gets a head of its own.")
            elif _DERIVED.match(name) or source.tensors[name].dtype not in FLOATS:
                notes.append(f"{name}: only in {source.ref} and not a weight, left out.")
            else:
                raise CheckpointError(
                    f"Tensor {name!r} is in {source.ref} but not in {skeleton.ref}: these are different architectures; "
                    "merge models that were fine-tuned from one base."
                )
    matches = [_match(name, base, models, exclude(name)) for name in names]
    return Matching(matches, untied, list(dict.fromkeys(notes)))


def _match(name: str, base: Source | None, models: Sequence[Source], excluded: bool) -> Match:
    sources = list(models) if base is None else [base, *models]
    found = [find(source, name) for source in sources]
    first = next(info for info in found if info is not None)
    if first.dtype not in FLOATS or (None in found and _DERIVED.match(name)):
        present = [Input(source, info) for source, info in zip(sources, found, strict=True) if info is not None]
        for other in present[1:]:
            if (other.info.dtype, other.info.shape) != (first.dtype, first.shape):
                raise CheckpointError(
                    f"Tensor {name!r} is {_kind(first)} in {present[0].source.ref} but {_kind(other.info)} in "
                    f"{other.source.ref}; only floating-point tensors can be merged, so the others must be the same."
                )
        return Match(name, "copy" if excluded else "same", None, tuple(present))
    if excluded:
        return Match(name, "copy", None, (Input(sources[0], _present(sources[0], found[0], name, sources[-1].ref)),))

    inputs = []
    for source, info in zip(sources, found, strict=True):
        elsewhere = next(other.ref for other, there in zip(sources, found, strict=True) if there is not None)
        inputs.append(Input(source, _present(source, info, name, elsewhere)))
    for one in inputs[1:]:
        if one.info.dtype not in FLOATS:
            raise CheckpointError(
                f"Tensor {name!r} is {inputs[0].info.dtype} in {inputs[0].source.ref} but {one.info.dtype} in "
                f"{one.source.ref}; a floating-point tensor and another kind cannot be mixed."
            )
        if one.info.shape != inputs[0].info.shape:
            raise CheckpointError(_shapes_differ(name, inputs[0], one))
    again = _HEAD.match(name) is not None and all(_is_copy(source, name) for source in sources)
    if base is None:
        return Match(name, "merge", None, tuple(inputs), again)
    return Match(name, "merge", inputs[0], tuple(inputs[1:]), again)


def copies_of_embeddings(source: Source) -> dict[str, str]:
    """The heads that a model stores although they are its embedding again, each with that embedding's name."""
    found = {}
    for name in source.tensors:
        embedding = _embedding_of(source, name) if _HEAD.match(name) else None
        if embedding is not None and _is_copy(source, name):
            found[name] = embedding.name
    return found


def _is_copy(source: Source, head: str) -> bool:
    """Whether a head is its embedding again: the config says so, or both are the same memory."""
    embedding = _embedding_of(source, head)
    if embedding is None:
        return False
    if head not in source.tensors:
        return True
    return source.tied is True or source.same(head, embedding.name)


def find(source: Source, name: str) -> TensorInfo | None:
    """The tensor, or the embedding where it is a tied head that is not stored."""
    info = source.tensors.get(name)
    if info is None and _HEAD.match(name) and source.tied is not False and source.config is not None:
        return _embedding_of(source, name)
    return info


def _embedding_of(source: Source, head: str) -> TensorInfo | None:
    """The one input embedding that belongs to this head: of the same part of the model, if it has several."""
    candidates = [name for name in source.tensors if _EMBEDDING.match(name)]
    if len(candidates) > 1:
        part = head.rsplit(".", 2)[0] if head.count(".") > 1 else ""
        candidates = [name for name in candidates if part and name.startswith(f"{part}.")]
    return source.tensors[candidates[0]] if len(candidates) == 1 else None


def _present(source: Source, info: TensorInfo | None, name: str, elsewhere: str) -> TensorInfo:
    if info is not None:
        return info
    if _HEAD.match(name):
        why = "says that it is not tied" if source.tied is False else "is missing, so nothing says that it is tied"
        if source.tied is not False and source.config is not None:
            why = "ties it, but its embedding was not found"
        raise CheckpointError(
            f"Tensor {name!r} is missing in {source.ref} (it is in {elsewhere}), and the model's config {why}; "
            "complete the model, or give it a config with tie_word_embeddings: true if its head is its embedding."
        )
    raise CheckpointError(
        f"Tensor {name!r} is missing in {source.ref} (it is in {elsewhere}): the models have different architectures "
        "or the checkpoint is incomplete; merge models that were fine-tuned from one base."
    )


def _shapes_differ(name: str, one: Input, other: Input) -> str:
    ours, theirs = one.info.shape, other.info.shape
    both = f"Tensor {name!r} is {_sides(ours)} in {one.source.ref} but {_sides(theirs)} in {other.source.ref}"
    if (_HEAD.match(name) or _EMBEDDING.match(name)) and ours and theirs and ours[1:] == theirs[1:]:
        return (
            f"{both}: the vocabularies have {ours[0]} and {theirs[0]} entries; bring {other.source.ref} to {ours[0]} "
            f"first (transformers: model.resize_token_embeddings({ours[0]})), if those mean the same tokens."
        )
    return f"{both}; only tensors of one shape can be merged, so merge models that were fine-tuned from one base."


def _sides(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a single number"


def _kind(info: TensorInfo) -> str:
    return f"{info.dtype} {_sides(info.shape)}"
