"""Experts of whole models: extracted from checkpoints, put into a copy of one, and taken out of that again.

Tensors pass through memory in pieces of whole rows, which experts treat one by one: a few megabytes, however large the
model is. One thread reads and digests, one computes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from fastmerge.engine.ahead import IN_FLIGHT, ahead
from fastmerge.engine.expert_file import About, ExpertFile, TensorAbout
from fastmerge.engine.matching import copies_of_embeddings, match_models
from fastmerge.engine.safetensors_header import TensorInfo
from fastmerge.engine.sources import FLOATS, TORCH_DTYPES, Source, StateDictSource
from fastmerge.errors import ArgumentError, CheckpointError, MergeError
from fastmerge.ops import (
    Expert,
    ExpertPart,
    SparsifyRule,
    count_nonfinite,
    expert_apply_,
    expert_k,
    expert_rescale,
    extract_expert,
    l1_mass,
    l1_sums,
)
from fastmerge.ops.expert import rows_of

PIECE_BYTES = 8 << 20
"""Bytes of one tensor that are in memory at a time, unless a single row has more."""

Advance = Callable[[int, str], None]


@dataclass(frozen=True)
class Piece:
    """Some rows of one or several tensors that belong together, in memory.

    name: the tensor's. first, count: its rows; `last` where no more follow. tensors: [count, width] each. digest: of
    all bytes of the first tensor, BLAKE3 (hex), with its last piece.
    """

    name: str
    first: int
    count: int
    last: bool
    tensors: list[Tensor]
    digest: str


class _Ring:
    """Memory that pieces are read into, one place after the other."""

    def __init__(self) -> None:
        self._places: list[list[Tensor]] = [[] for _ in range(IN_FLIGHT)]
        self._turn = 0

    def next(self) -> None:
        self._turn = (self._turn + 1) % IN_FLIGHT

    def memory(self, number: int, nbytes: int) -> Tensor:
        """Memory for the piece's tensor of this number, uint8."""
        place = self._places[self._turn]
        while len(place) <= number:
            place.append(torch.empty(0, dtype=torch.uint8))
        if place[number].numel() < nbytes:
            place[number] = torch.empty(nbytes, dtype=torch.uint8)
        return place[number][:nbytes]


def pieces(
    wanted: Sequence[tuple[str, Sequence[tuple[Source, TensorInfo]]]], *, digests: bool, piece_bytes: int = PIECE_BYTES
) -> Iterator[Piece]:
    """Read tensors, each with those of other models that belong to it, in pieces of whole rows.

    A piece's memory is used again when the piece after the next one is asked for.
    """
    ring = _Ring()
    for name, inputs in wanted:
        rows, width = rows_of(inputs[0][1].shape)
        most = max(TORCH_DTYPES[info.dtype].itemsize for _, info in inputs)
        together = max(1, piece_bytes // max(1, width * most))
        # Flat, once: what does not lie in one piece is copied whole for that.
        lent = [source.view(info) if isinstance(source, StateDictSource) else None for source, info in inputs]
        hasher = blake3()
        for first in range(0, max(rows, 1), together):
            count = min(together, rows - first)
            ring.next()
            tensors = []
            for number, (source, info) in enumerate(inputs):
                flat, start = lent[number], first * width
                stop = start + count * width
                raw = _read(ring, number, source, info, start, stop - start) if flat is None else flat[start:stop]
                if digests and number == 0:
                    hasher.update(raw.cpu().view(torch.uint8).numpy().data)
                tensors.append(raw.view(count, width))
            last = first + count >= rows
            yield Piece(name, first, count, last, tensors, hasher.hexdigest() if digests and last else "")


def _read(ring: _Ring, number: int, source: Source, info: TensorInfo, start: int, count: int) -> Tensor:
    """Elements of a tensor in a file, flat."""
    dtype = TORCH_DTYPES[info.dtype]
    memory = ring.memory(number, count * dtype.itemsize)
    source.read_into(info, start * dtype.itemsize, memory.numpy().data)
    return memory.view(dtype)


# -- extracting


def selected(include: str | Sequence[str], exclude: str | Sequence[str]) -> Callable[[str], bool]:
    """Whether a tensor's name is found by one of `include` (by any, if there are none) and by none of `exclude`."""
    kept, dropped = (_patterns(name, given) for name, given in (("include", include), ("exclude", exclude)))
    return lambda name: (not kept or any(p.search(name) for p in kept)) and not any(p.search(name) for p in dropped)


def _patterns(argument: str, given: str | Sequence[str]) -> list[re.Pattern[str]]:
    found = []
    # A lone pattern is a sequence, too, of patterns of one letter that find nearly everything.
    for pattern in [given] if isinstance(given, str) else given:
        try:
            found.append(re.compile(pattern))
        except (re.error, TypeError) as error:
            raise ArgumentError(f"{argument} holds {pattern!r}, which is not a regular expression ({error}).") from None
    return found


@dataclass(frozen=True)
class Extraction:
    """What is to be extracted: an expert's description without digests, and where its tensors are read from."""

    about: About
    wanted: list[tuple[str, list[tuple[Source, TensorInfo]]]]
    notes: list[str]

    @property
    def nbytes(self) -> int:
        """The bytes that are read."""
        return sum(info.nbytes for _, inputs in self.wanted for _, info in inputs)

    @property
    def model_bytes(self) -> int:
        """The bytes of the model's tensors."""
        return sum(inputs[1][1].nbytes for _, inputs in self.wanted)


def plan_extraction(base: Source, model: Source, keep: float, wanted: Callable[[str], bool]) -> Extraction:
    """Line the models' tensors up, from headers alone. A tied head that both store is left to its embedding.

    Raises CheckpointError where the models do not fit together, ArgumentError where nothing is selected.
    """
    if not isinstance(keep, (int, float)) or not 0 < keep < 1:
        raise ArgumentError(f"keep={keep} is outside (0, 1); pass the fraction of each row to keep, such as 0.01.")
    matching = match_models(base, [model], lambda name: not wanted(name))
    chosen = []
    tensors = {}
    for match in matching.matches:
        if match.action != "merge" or match.again or not wanted(match.name):
            continue
        inputs = [(one.source, one.info) for one in match.inputs]
        stored = inputs[1][1]
        dtype = "F32" if stored.dtype == "F64" else stored.dtype
        k = expert_k(rows_of(stored.shape)[1], keep)
        chosen.append((match.name, inputs))
        tensors[match.name] = TensorAbout(stored.shape, k, dtype, "0" * 64)
    if not chosen:
        raise ArgumentError("no tensor of numbers is left to extract; include more, or exclude less.")
    about = About(keep, "row", _name_of(model.ref), _name_of(base.ref), tensors)
    return Extraction(about, chosen, matching.notes)


def _name_of(ref: str) -> str:
    """What a file may call a model: a path of this machine is nobody's business elsewhere."""
    return ref.rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1] if ref[:1] in "./~\\" or ref.count("/") > 1 else ref


def extract(
    plan: Extraction, add: Callable[[str, Expert], None], advance: Advance, backend: str = "auto"
) -> tuple[float, dict[str, str]]:
    """Extract tensor by tensor: each is handed to `add`. Returns mu, and the digests of the base's tensors.

    Raises MergeError where NaN or Inf would be kept.
    """
    about = plan.about
    digests: dict[str, str] = {}
    kept_means: list[float] = []
    delta_means: list[float] = []
    mass = 0.0
    columns = values = np.empty(0)
    everything = SparsifyRule("none")
    with ahead(pieces(plan.wanted, digests=True)) as found:
        for piece in found:
            one = about.tensors[piece.name]
            base, x = (t.to(torch.float32) if t.dtype == torch.float64 else t for t in piece.tensors)
            dtype = TORCH_DTYPES[one.dtype]
            expert = extract_expert(x, about.keep, base=base, dtype=dtype, backend=backend)
            if any(count_nonfinite(expert.values, backend=backend)):
                raise MergeError(
                    f"NaN or Inf in what {about.model} changed in {piece.name!r}, near row {piece.first}: an expert "
                    "with them would spoil every model; mend the model first."
                )
            mass += l1_mass(l1_sums(base, [x], everything, backend=backend)[0, 0])
            if piece.first == 0:
                columns, values = (np.empty((one.rows, one.k), _bits(y).dtype) for y in (expert.columns, expert.values))
            # numpy's copies, unlike torch's, wake no threads that would then wait for work in a loop.
            part = slice(piece.first, piece.first + piece.count)
            columns[part], values[part] = _bits(expert.columns), _bits(expert.values)
            advance(sum(t.nbytes for t in piece.tensors), piece.name)
            if not piece.last:
                continue
            digests[piece.name] = piece.digest
            whole = Expert(one.shape, torch.from_numpy(columns), torch.from_numpy(values).view(dtype))
            numel = max(1, one.rows * rows_of(one.shape)[1])
            kept = l1_mass(l1_sums(None, [whole.values], everything, backend="auto")[0, 0])
            kept_means.append(kept / numel)
            delta_means.append(mass / numel)
            add(piece.name, whole)
            mass = 0.0
    return expert_rescale(about.keep, kept_means, delta_means), digests


def _bits(x: Tensor) -> np.ndarray:
    """The tensor as numpy has it, bfloat16 as integers."""
    there = x.cpu()
    bits: np.ndarray = (there.view(torch.int16) if there.dtype == torch.bfloat16 else there).numpy()
    return bits


# -- applying to a checkpoint, and removing from one


def check_fits(about: About, model: Source) -> dict[str, str]:
    """Which tensor of the expert belongs to each of the model's tensors; CheckpointError where they do not fit.

    A stored head that repeats its embedding gets the embedding's, so that the two stay one.
    """
    belongs = {}
    for name, one in about.tensors.items():
        info = model.tensors.get(name)
        if info is None:
            raise CheckpointError(
                f"The expert of {about.model} has tensor {name!r}, which {model.ref} lacks: it is of another model."
            )
        if info.shape != one.shape:
            raise CheckpointError(
                f"Tensor {name!r} has the shape {list(info.shape)} in {model.ref}, but {list(one.shape)} in the expert "
                f"of {about.model}: it belongs to another model."
            )
        if info.dtype not in FLOATS or info.dtype == "F64":
            raise CheckpointError(
                f"Tensor {name!r} of {model.ref} is {info.dtype}; experts are put into BF16, F16 and F32 only."
            )
        belongs[name] = name
    for head, embedding in copies_of_embeddings(model).items():
        if head not in belongs and embedding in belongs:
            belongs[head] = embedding
    return belongs


def same_expert(one: Expert, other: Expert) -> bool:
    """Whether two keep the same, to the bit."""
    bits = {2: torch.int16, 4: torch.int32}[one.values.element_size()]
    return (
        one.dtype == other.dtype
        and one.k == other.k
        and torch.equal(one.columns.to(torch.int64), other.columns.to(torch.int64))
        and torch.equal(one.values.view(bits), other.values.view(bits))
    )


def check_ties(file: ExpertFile, model: Source) -> None:
    """A head that a model stores although it is its embedding must stay so; CheckpointError where it would not."""
    about = file.about
    for head, embedding in copies_of_embeddings(model).items():
        if head not in about.tensors:
            continue
        if embedding not in about.tensors or not same_expert(file.read(head), file.read(embedding)):
            raise CheckpointError(
                f"{model.ref} has {head!r} and {embedding!r} as one parameter, but the expert of {about.model} would "
                "change them differently: it belongs to a model that does not tie them."
            )


def changed_tensors(
    model: Source,
    belongs: Mapping[str, str],
    change: Callable[[str, Expert, Piece], None],
    read: Callable[[str], Expert],
    write: Callable[[str, int, Any], None],
    advance: Advance,
    *,
    digests: bool = False,
) -> None:
    """Copy a model piece by piece; of the tensors in `belongs`, `change` changes each piece first, in place.

    model: in files. belongs: of these tensors, the name of what `read` gives for them. write: takes a tensor's name,
    first byte and bytes.
    """
    wanted = [(name, [(model, info)]) for name, info in model.tensors.items()]
    expert: Expert | None = None
    with ahead(pieces(wanted, digests=digests)) as found:
        for piece in found:
            source = belongs.get(piece.name)
            (x,) = piece.tensors
            if source is not None:
                if piece.first == 0:
                    expert = read(source)
                assert expert is not None
                change(piece.name, _rows(expert, piece), piece)
            if x.numel():
                data = x.view(-1).view(torch.uint8).numpy().data
                write(piece.name, piece.first * x.shape[1] * x.element_size(), data)
            advance(x.nbytes, piece.name)


def _rows(expert: Expert, piece: Piece) -> Expert:
    """The expert of the piece's rows alone."""
    part = slice(piece.first, piece.first + piece.count)
    return Expert(tuple(piece.tensors[0].shape), expert.columns[part], expert.values[part])


def put_on(expert: Expert, x: Tensor, scale: float, backend: str = "auto") -> Tensor:
    """Add an expert to some rows in place; the bits that were there, [rows, k], as values of the rows' dtype."""
    saved = expert_apply_([x], [ExpertPart(0, expert.columns, expert.values, scale)], backend=backend)
    return saved.view(x.dtype).view(expert.columns.shape)


def put_back(old: Expert, x: Tensor) -> None:
    """Write old bits into some rows in place."""
    whole = {2: torch.int16, 4: torch.int32}[x.element_size()]
    x.view(whole).scatter_(1, old.columns.to(torch.int64), old.values.view(whole))


def restore_about(about: About, belongs: Mapping[str, str], model: Source) -> About:
    """What a file of the old bits of `model` is of, before its digests are known."""
    tensors = {
        name: TensorAbout(about.tensors[source].shape, about.tensors[source].k, model.tensors[name].dtype, "0" * 64)
        for name, source in belongs.items()
    }
    return About(about.keep, about.scope, about.model, _name_of(model.ref), tensors, about.mu, "restore")


def open_kind(path: Any, kind: str) -> ExpertFile:
    """Open a file of this kind. CheckpointError: it is something else."""
    file = ExpertFile(path)
    if file.about.kind == kind:
        return file
    file.close()
    if kind == "expert":
        raise CheckpointError(f"{path} holds the old bits of a checkpoint, not an expert; name the expert's file.")
    raise CheckpointError(f"{path} is an expert, not the old bits of a checkpoint; name what `expert apply` left.")
