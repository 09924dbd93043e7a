"""PCB-Merging of whole rows in memory: all sweeps in pieces, with exact thresholds, however the rows are cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends.rule import L1_LIMBS, PcbRule
from ..errors import ArgumentError, ArgumentTypeError
from . import _checks, select
from ._score_keys import (
    LOW_BITS,
    SCORE_BINS,
    WINDOW_BLOCK,
    choose_window,
    highest_bin,
    pairs,
    pcb_means,
    pcb_ranks,
    pcb_thresholds,
    score_bound_in_window,
    score_keys,
    score_prefix,
)
from .pcb import checked_variant, pcb_apply, pcb_extremes, pcb_histogram, pcb_scores, pcb_sums, pcb_window_

_PIECE = 1 << 22
"""Elements of each row that a CPU's kernel is given at once; on any device fewer where they have to be copied."""
_RUN = 64
"""Neighbours that are sampled together."""
_FEW = 1 << 16
"""Rows of at most so many elements are sorted; longer ones are sampled."""
_SAMPLE = 1 << 19
_WINDOW_KEYS = 1 << 22
"""Keys in the windows of all rows together."""


@dataclass(frozen=True)
class _Rows:
    """n task vectors in memory, cut into shards in the same places."""

    form: str
    """"stacked", "rows" or "shards": how the caller passed them."""
    shards: list[list[Tensor]]
    """Flat, by shard, then by row."""
    base: list[Tensor] | None
    """Flat, by shard."""
    shapes: list[torch.Size]
    """Of the shards of a row, as the caller sees them."""

    @property
    def models(self) -> int:
        return len(self.shards[0])

    @property
    def device(self) -> torch.device:
        return self.shards[0][0].device

    @property
    def numel(self) -> int:
        return sum(shard[0].numel() for shard in self.shards)

    def pieces(self) -> Iterator[tuple[int, slice, Tensor | None, list[Tensor]]]:
        """All elements in order: (shard, place in it, base, rows), as kernels take them."""
        for number, rows in enumerate(self.shards):
            base = None if self.base is None else self.base[number]
            if not _ready(rows if base is None else [base, *rows]):
                size = max(_PIECE // 32, _PIECE // len(rows))
            elif self.device.type == "cpu":
                size = _PIECE
            else:
                size = max(1, rows[0].numel())
            for start in range(0, rows[0].numel(), size):
                place = slice(start, min(start + size, rows[0].numel()))
                yield (
                    number,
                    place,
                    None if base is None else _readable(base[place]),
                    [_readable(x[place]) for x in rows],
                )

    def __iter__(self) -> Iterator[tuple[Tensor | None, list[Tensor]]]:
        """All elements in order: (base, rows); as often as one likes."""
        for _, _, base, rows in self.pieces():
            yield base, rows

    def sample(self, size: int) -> tuple[Tensor | None, list[Tensor]]:
        """About `size` elements, in runs of _RUN neighbours, one somewhere in each stretch of equal length."""
        count = max(1, size // _RUN)
        generator = torch.Generator().manual_seed(0)
        stretch = self.numel // count
        jitter = (torch.rand(count, generator=generator, dtype=torch.float64) * (stretch - _RUN + 1)).to(torch.int64)
        starts = torch.arange(count) * self.numel // count + jitter
        index = (starts[:, None] + torch.arange(_RUN)).reshape(-1)
        ends = torch.tensor([shard[0].numel() for shard in self.shards]).cumsum(0)
        parts = torch.tensor_split(index, torch.searchsorted(index, ends)[:-1])
        begins = [0, *ends.tolist()]

        def gathered(shards: list[Tensor]) -> Tensor:
            places = [(part - begin).to(self.device) for part, begin in zip(parts, begins)]
            picked = [_readable(x[place]) for x, place in zip(shards, places)]
            return torch.cat([x.to(torch.float32) for x in picked])

        base = None if self.base is None else gathered(self.base)
        return base, [gathered([shard[i] for shard in self.shards]) for i in range(self.models)]


def _ready(tensors: Sequence[Tensor]) -> bool:
    """Whether kernels can read these as they are."""
    return all(x.is_contiguous() and x.dtype != torch.float64 for x in tensors)


def _readable(x: Tensor) -> Tensor:
    """What kernels can read: itself, or a copy."""
    return (x.to(torch.float32) if x.dtype == torch.float64 else x).contiguous()


def _rows(task_vectors: Any, base: Any = None) -> _Rows:
    """The task vectors, in any of the three forms, checked."""
    if isinstance(task_vectors, Tensor):
        stacked = _checks.tensor("task_vectors", task_vectors)
        if stacked.dim() < 2:
            raise ArgumentError(
                f"task_vectors has shape {list(stacked.shape)}, but a row for each model is needed; pass [n, D]."
            )
        form, rows = "stacked", [[row] for row in stacked]
    else:
        if isinstance(task_vectors, (str, bytes)) or not isinstance(task_vectors, Sequence):
            raise ArgumentTypeError(
                f"task_vectors must be a tensor [n, D], a list of n tensors or of n lists of tensors, not "
                f"{type(task_vectors).__name__}; pass one of these."
            )
        nested = [isinstance(row, (list, tuple)) for row in task_vectors]
        if any(nested) and not all(nested):
            raise ArgumentTypeError("task_vectors mixes tensors and lists; pass n tensors, or n lists of shards.")
        form = "shards" if any(nested) else "rows"
        rows = [
            _checks.tensor_list(f"task_vectors[{i}]", row) if nested[i] else [_checks.tensor(f"task_vectors[{i}]", row)]
            for i, row in enumerate(task_vectors)
        ]
    if not rows:
        raise ArgumentError("task_vectors is empty; pass at least one row.")
    shapes = [shard.shape for shard in rows[0]]
    for i, row in enumerate(rows):
        _same_cuts(f"task_vectors[{i}]", row, shapes)
    flat_base = None
    if base is not None:
        given = [base] if isinstance(base, Tensor) else base
        checked = _checks.tensor_list("base", given)
        _same_cuts("base", checked, shapes)
        flat_base = [x.reshape(-1) for x in checked]
    _same_device("task_vectors", [x for row in rows for x in row], rows[0][0].device)
    _same_device("base", flat_base or [], rows[0][0].device)
    shards = [[row[number].reshape(-1) for row in rows] for number in range(len(shapes))]
    return _Rows(form, shards, flat_base, shapes)


def _same_cuts(name: str, row: Sequence[Tensor], shapes: Sequence[torch.Size]) -> None:
    if [x.shape for x in row] != list(shapes):
        raise ArgumentError(
            f"{name} has shapes {[list(x.shape) for x in row]}, but task_vectors[0] has "
            f"{[list(shape) for shape in shapes]}; cut all rows in the same places."
        )


def _same_device(name: str, tensors: Sequence[Tensor], device: torch.device) -> None:
    for x in tensors:
        _checks.same_device(name, x, device)


def pcb_bounds(task_vectors: Any, *, variant: str = "vision_es", base: Any = None, backend: str = "auto") -> Tensor:
    """The bounds that the deltas of whole rows are scaled by, exactly: the first of the sweeps of `pcb_merge`.

    task_vectors: n rows, as in `pcb_merge`. base: a tensor of a row's shape (or a list of its shards) that is
        subtracted; None where the rows are deltas already.
    variant: as in `pcb_merge`.
    Returns `clip`, float32[n, 2]: the two magnitudes of each row that its |delta| is clipped to, order statistics at
    the places that `pcb_ranks` names. For "paper" `extremes`, float32[n (n + 1) / 2, 2], as in `pcb_extremes`.
    Errors: ArgumentError / ArgumentTypeError, in a sentence that names the argument.
    Source: PCB-Merging (arXiv 2410.02396) and its released code; docs/ops.md.
    """
    rows = _rows(task_vectors, base)
    checked_variant("variant", variant, rows.models)
    if rows.numel == 0:
        raise ArgumentError("task_vectors has no elements and so no bounds; pass rows of at least one element.")
    return _extremes(rows, backend) if variant == "paper" else _clip(rows, variant, backend)


def _extremes(rows: _Rows, backend: str) -> Tensor:
    parts = torch.stack([pcb_extremes(base, tensors, backend=backend) for base, tensors in rows])
    return torch.stack([parts[:, :, 0].amin(dim=0), parts[:, :, 1].amax(dim=0)], dim=1)


def _clip(rows: _Rows, variant: str, backend: str) -> Tensor:
    places = pcb_ranks(rows.numel, 0.0, variant)[:2]
    ranks = [rows.numel - place for place in places]
    if rows.base is None and all(_ready(shard) for shard in rows.shards):
        kth = torch.ops.fastmerge.kth_magnitude
        found = [kth([shard[i] for shard in rows.shards], k, backend) for i in range(rows.models) for k in ranks]
        return torch.stack(found).view(rows.models, 2)
    # What has to be computed or copied first goes through the kernels in pieces.
    level0 = _magnitude_counts(rows, [-1] * rows.models, backend)
    keys = []
    for k in ranks:
        bins = [highest_bin(counts, k) for counts in level0]
        level1 = _magnitude_counts(rows, [high for high, _ in bins], backend)
        keys.append([high << 15 | highest_bin(row, k - above)[0] for (high, above), row in zip(bins, level1)])
    return torch.tensor(keys, dtype=torch.int32).T.contiguous().view(torch.float32).to(rows.device)


def _magnitude_counts(rows: _Rows, prefix: list[int], backend: str) -> Tensor:
    parts = (select.key_histogram(base, tensors, prefix, backend=backend) for base, tensors in rows)
    total = next(parts)
    for part in parts:
        total += part
    return total.cpu()


def _score_bounds(
    rows: _Rows, rule: PcbRule, places: list[int], backend: str
) -> tuple[list[int], list[int]] | tuple[Tensor, Tensor]:
    """The keys of the scores at these places of each row, and of the highest ones; exact."""
    numel = rows.numel
    module = backends.resolve(backend, rows.device)
    if hasattr(module, "pcb_score_bounds"):
        found_there: tuple[Tensor, Tensor] = module.pcb_score_bounds(rows, rule, [numel - place for place in places])
        return found_there
    if numel <= _FEW:
        scores = torch.cat([pcb_scores(base, x, rule, backend=backend) for base, x in rows], dim=1)
        ordered = [score_keys(row).sort().values for row in scores]
        return [int(row[place]) for row, place in zip(ordered, places)], [int(row[-1]) for row in ordered]

    ranks = [numel - place for place in places]
    window = _likely_windows(rows, rule, places, backend)
    if window is not None:
        found, highest = _sweep_windows(rows, rule, *window, ranks, backend)
        keys = [key for key in found if key is not None]
        if len(keys) == rows.models:
            return keys, highest
    counts = torch.zeros(rows.models, SCORE_BINS, dtype=torch.int64, device=rows.device)
    for base, tensors in rows:
        counts += pcb_histogram(base, tensors, rule, [-1] * rows.models, backend=backend)
    low = [score_prefix(row, k) << LOW_BITS for row, k in zip(counts.cpu(), ranks)]
    found, highest = _sweep_windows(rows, rule, low, 1 << LOW_BITS, ranks, backend)
    return [key for key in found if key is not None], highest


def _sweep_windows(
    rows: _Rows, rule: PcbRule, low: list[int], width: int, ranks: list[int], backend: str
) -> tuple[list[int | None], list[int]]:
    """The keys of the k-th highest scores as far as they lie in the windows, and the highest keys."""
    counts = torch.zeros(rows.models, 1 + width, dtype=torch.int64, device=rows.device)
    highest = torch.zeros(rows.models, dtype=torch.int64, device=rows.device)
    for base, tensors in rows:
        pcb_window_(base, tensors, rule, low, counts, highest, backend=backend)
    found = [score_bound_in_window(row, start, k) for row, start, k in zip(counts.cpu(), low, ranks)]
    return found, highest.tolist()


def _likely_windows(rows: _Rows, rule: PcbRule, places: list[int], backend: str) -> tuple[list[int], int] | None:
    """Where a sample says that the scores at these places lie: the windows' first keys, and their common width.

    None where counting so many keys would take too much memory: a third of what is wanted is still worth trying.
    """
    numel = rows.numel
    most = max(WINDOW_BLOCK, min(_WINDOW_KEYS // rows.models, numel // 24))
    scores = pcb_scores(*rows.sample(min(_SAMPLE, max(_FEW, numel // 128))), rule, backend=backend)
    chosen = []
    for row, place in zip(scores, places):
        runs = torch.cat([score_keys(part) for part in row.split(WINDOW_BLOCK)]).reshape(-1, _RUN)
        low, width = choose_window(runs, place, numel, 3 * most)
        if width == 3 * most:
            return None
        chosen.append((low + max(0, width - most) // 2, min(width, most)))
    return [low for low, _ in chosen], max(width for _, width in chosen)


def pcb_rule(
    task_vectors: Any,
    *,
    density: float | Sequence[float] = 0.1,
    variant: str = "vision_es",
    base: Any = None,
    backend: str = "auto",
) -> PcbRule:
    """Everything that `pcb_apply` must know of whole rows in memory: all sweeps of `pcb_merge` but the last.

    task_vectors, density, variant: as in `pcb_merge`. base: a tensor of a row's shape (or a list of its shards) that is
        subtracted; None where the rows are deltas already.
    Returns a PcbRule with all parts that the variant needs.
    Errors: ArgumentError / ArgumentTypeError, in a sentence that names the argument.
    Source: PCB-Merging (arXiv 2410.02396) and its released code; docs/ops.md.
    """
    rows = _rows(task_vectors, base)
    checked_variant("variant", variant, rows.models)
    if rows.numel == 0:
        raise ArgumentError("task_vectors has no elements and so no thresholds; pass rows of at least one element.")
    return _found(rows, variant, _checks.fractions("density", density, rows.models), backend)


def _found(rows: _Rows, variant: str, density: list[float], backend: str) -> PcbRule:
    """Everything that the merge must know of whole rows; each part takes sweeps of its own."""
    if variant == "paper":
        rule = PcbRule("paper", extremes=_extremes(rows, backend))
        sums = torch.zeros(rows.models + pairs(rows.models), L1_LIMBS, dtype=torch.int64, device=rows.device)
        for base, tensors in rows:
            sums += pcb_sums(base, tensors, rule, backend=backend)
        means = pcb_means(sums.cpu(), rows.numel, rows.models).to(rows.device)
        rule = PcbRule("paper", extremes=rule.extremes, means=means)
    else:
        rule = PcbRule(variant, clip=_clip(rows, variant, backend))  # type: ignore[arg-type]
    places = [pcb_ranks(rows.numel, d, variant)[2] for d in density]
    keys, highest = _score_bounds(rows, rule, places, backend)
    thresholds = pcb_thresholds(keys, highest, density, variant).to(rows.device)
    return PcbRule(rule.variant, rule.clip, rule.extremes, rule.means, thresholds)


def _targets(rows: _Rows, out: Any) -> list[Tensor]:
    """Where each shard of the result goes, flat: new tensors, or what the caller passed."""
    if out is None:
        dtypes = [_readable(shard[0][:0]).dtype for shard in rows.shards]
        return [
            torch.empty(shape.numel(), dtype=dtype, device=rows.device) for shape, dtype in zip(rows.shapes, dtypes)
        ]
    given = list(out) if rows.form == "shards" and isinstance(out, (list, tuple)) else [out]
    if rows.form == "shards" and not isinstance(out, (list, tuple)):
        raise ArgumentTypeError("out must be a list of shards, as task_vectors has; pass one tensor for each shard.")
    if len(given) != len(rows.shapes):
        raise ArgumentError(f"out has {len(given)} shards, but each row has {len(rows.shapes)}; pass as many.")
    inputs = [x for shard in rows.shards for x in shard]
    for number, (x, shape) in enumerate(zip(given, rows.shapes)):
        _checks.out_tensor(x, None)
        _checks.target("out", x, shape, [*inputs, *given[:number]])
    return [(x.detach() if x.requires_grad else x).view(-1) for x in given]


def pcb_merge(
    task_vectors: Any,
    *,
    density: float | Sequence[float] = 0.1,
    variant: str = "vision_es",
    weight: float | Sequence[float] = 1.0,
    return_scale: bool = False,
    out: Any = None,
    backend: str = "auto",
) -> Any:
    """Merge n task vectors by PCB-Merging: parameters compete, each row keeps its best, scores weigh what is kept.

    task_vectors: the deltas of n models, whole: a tensor [n, D] (or [n, ...]); a list of n tensors of one shape; or a
        list of n lists of tensors ("shards"), each row cut in the same places. float32, bfloat16, float16, or float64
        (rounded to float32 first); dtypes may differ. Thresholds are exact over the whole row, however it is cut, and
        the cuts do not show in the result.
    density: the fraction of each row that may be kept, in [0, 1]; one number or one per model. 0 keeps nothing.
    variant: whose formula: "script", "nlp", "vision" and "vision_es" are in the released code, "paper" is the paper's
        (at most 160 rows). They give different results.
    weight: a factor for each row's part in the numerator (lambda); one number or one per model, finite.
    return_scale: also return S, by which the rows are weighed (for "paper": the scores that are kept).
    out: a contiguous float32, bfloat16 or float16 tensor of a row's shape (a list of such for shards) to write to; no
        input may overlap it.
    Returns the merged task vector, to be added to the base: a tensor of a row's shape, or a list of shards, in the
    dtypes of the first row; or `out`. With `return_scale` a pair of that and S: float32[n, D] (or [n, ...]), or n lists
    of shards. Besides these, about a tenth of the inputs' memory at most is used when the rows are long; rows of more
    than one dimension that are not contiguous are copied.
    NaN: a NaN in any row makes the element NaN, but 0 in "paper", where none of its scores is kept; a NaN score counts
        as the lowest.
    Errors: ArgumentError / ArgumentTypeError, in a sentence that names the argument.
    Source: Du et al., "Parameter Competition Balancing for Model Merging" (NeurIPS 2024, arXiv 2410.02396) and the code
        released with it; the formulas are in docs/ops.md.
    """
    rows = _rows(task_vectors)
    checked_variant("variant", variant, rows.models)
    densities = _checks.fractions("density", density, rows.models)
    weights = [_checks.real("weight", w) for w in _checks.per_model("weight", weight, rows.models)]
    targets = _targets(rows, out)
    scales = [torch.empty(rows.models, x.numel(), device=rows.device) for x in targets] if return_scale else []
    if rows.numel:
        rule = _found(rows, variant, densities, backend)
        for number, place, base, tensors in rows.pieces():
            share = scales[number][:, place] if return_scale else None
            written = None if share is None else share.contiguous()
            pcb_apply(base, tensors, weights, rule, out=targets[number][place], scale=written, backend=backend)
            if share is not None and written is not None and written is not share:
                share.copy_(written)
    if out is None:
        wanted = [x.dtype for x in _first_row(task_vectors)]
        shaped = [x.view(shape).to(dtype) for x, shape, dtype in zip(targets, rows.shapes, wanted)]
        result = shaped if rows.form == "shards" else shaped[0]
    else:
        result = out
    if not return_scale:
        return result
    if rows.form != "shards":
        return result, scales[0].view(rows.models, *rows.shapes[0])
    return result, [[x[i].view(shape) for x, shape in zip(scales, rows.shapes)] for i in range(rows.models)]


def _first_row(task_vectors: Any) -> list[Tensor]:
    first = task_vectors[0]
    return [first] if isinstance(first, Tensor) else list(first)
