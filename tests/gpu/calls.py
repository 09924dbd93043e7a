"""Calls of every op, drawn by hypothesis: on the CPU, to be moved to where they are to run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from fastmerge import ops
from tests import strategies
from tests.gpu import support
from tests.ops.test_equal_bits import sparsify_methods, weights
from tests.ops.test_pcb import VARIANTS
from tests.ops.test_pcb import rules as pcb_rules

f32 = torch.float32
Draw = Callable[[st.SearchStrategy[Any]], Any]


@dataclass
class Call:
    """A function with a `backend` argument, and all its other arguments, on the CPU."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to launch a kernel for."""
        # Models come as a list; what stands beside it is room for results, or has as many elements.
        lists = [x for each in self.arguments if isinstance(each, list) for x in each if isinstance(x, Tensor)]
        found = lists or [each for each in self.arguments if isinstance(each, Tensor)]
        return sum(x.numel() for x in found) == 0

    def run(self, device: str, backend: str) -> Any:
        """Run it on copies in the memory of a device."""
        arguments, keywords = support.moved(self.arguments, device), support.moved(self.keywords, device)
        return self.function(*arguments, **keywords, backend=backend)


def window(base: Tensor | None, tensors: list[Tensor], low: list[int], counts: Tensor, **keywords: Any) -> Tensor:
    ops.key_window_(base, tensors, low, counts, **keywords)
    return counts


def pcb_window(
    base: Tensor | None, tensors: list[Tensor], rule: Any, low: Any, counts: Any, highest: Any, **k: Any
) -> Any:
    ops.pcb_window_(base, tensors, rule, low, counts, highest, **k)
    return counts, highest


def pcb_apply(
    base: Tensor | None, tensors: list[Tensor], given: list[float], rule: Any, out: Tensor, scale: Tensor, **k: Any
) -> Any:
    ops.pcb_apply(base, tensors, given, rule, out=out, scale=scale, **k)
    return out, scale


def _models(draw: Draw, most: int = 4) -> strategies.Models:
    return draw(strategies.models(most=most, blocks=support.HERE))


def _tensor(draw: Draw) -> Tensor:
    return draw(strategies.tensors(shape=draw(strategies.shapes(support.HERE))))


def _out(draw: Draw, shape: Sequence[int]) -> Tensor:
    """Where a result goes, at any distance from a 16-byte boundary; it fails a test where it is not written."""
    shift = draw(st.integers(0, 7))
    memory = torch.full((shift + prod(shape),), float("nan"), dtype=draw(strategies.dtypes))
    return memory[shift:].view(shape)


def abs_histogram(draw: Draw) -> Call:
    dtype = draw(strategies.dtypes)
    shards = [
        draw(strategies.tensors(shape=draw(strategies.shapes(False)), dtype=dtype))
        for _ in range(draw(st.integers(1, 3)))
    ]
    return Call(ops.abs_histogram, (shards,), {"bins": 1 << draw(st.sampled_from((15, 8, 0, 14)))})


def kth_magnitude(draw: Draw) -> Call:
    shards = [draw(strategies.tensors(shape=(draw(st.integers(1, 1600)),))) for _ in range(draw(st.integers(1, 3)))]
    return Call(ops.kth_magnitude, (shards, draw(st.integers(1, sum(x.numel() for x in shards)))))


def magnitude_bounds(draw: Draw) -> Call:
    models = _models(draw)
    ranks = [draw(strategies.ranks(models.numel)) for _ in models.tensors]
    given = models.base, models.tensors, [pair[0] for pair in ranks], [pair[1] for pair in ranks]
    return Call(ops.magnitude_bounds, given, {"compute": draw(strategies.computes)})


def key_histogram(draw: Draw) -> Call:
    models, compute = _models(draw, 3), draw(strategies.computes)
    prefix = [-1] * len(models.tensors)
    if draw(st.booleans()):
        level0 = ops.key_histogram(models.base, models.tensors, prefix, compute=compute, backend="reference")
        prefix = ops.prefixes(level0, [draw(st.integers(0, models.numel)) for _ in models.tensors])
    return Call(ops.key_histogram, (models.base, models.tensors, prefix), {"compute": compute})


def key_window(draw: Draw) -> Call:
    models = _models(draw, 3)
    count = len(models.tensors)
    somewhere = st.sampled_from((0, 0x3F800000 - 500, 0x7F800000, 1 << 31))
    counts = torch.full((count, draw(st.sampled_from((1, 1000))) + 1), 3)
    given = models.base, models.tensors, [draw(somewhere) for _ in range(count)], counts
    return Call(window, given, {"compute": draw(strategies.computes)})


def tie_counts(draw: Draw) -> Call:
    bounded = magnitude_bounds(draw)
    bounds, _ = bounded.function(*bounded.arguments, **bounded.keywords, backend="reference")
    return Call(ops.tie_counts, (*bounded.arguments[:2], bounds), bounded.keywords)


def topk_mask(draw: Draw) -> Call:
    ties = draw(st.sampled_from(("lowest_index", "keep", "hashed")))
    return Call(ops.topk_mask, (_tensor(draw), draw(strategies.densities)), {"ties": ties})


def _under_a_rule(function: Callable[..., Any], draw: Draw) -> Call:
    models, compute = _models(draw), draw(strategies.computes)
    rule = draw(strategies.rules(models, True, compute))
    return Call(function, (models.base, models.tensors, rule), {"compute": compute})


def l1_sums(draw: Draw) -> Call:
    return _under_a_rule(ops.l1_sums, draw)


def kept_masks(draw: Draw) -> Call:
    return _under_a_rule(ops.kept_masks, draw)


def gram(draw: Draw) -> Call:
    models = _models(draw)
    lengths = [length for length in range(1, models.numel + 1) if models.numel % length == 0]
    return Call(
        ops.gram,
        (models.base, models.tensors),
        {"row_length": draw(st.one_of(st.none(), st.sampled_from(lengths[-6:] or [1])))},
    )


def _based(draw: Draw, most: int = 4) -> tuple[Tensor, list[Tensor]]:
    models = _models(draw, most)
    base = models.base
    return draw(strategies.tensors(shape=tuple(models.tensors[0].shape))) if base is None else base, models.tensors


def nearswap(draw: Draw) -> Call:
    base, (x,) = _based(draw, 1)
    return Call(ops.nearswap, (base, x, draw(st.sampled_from((0.0, 1e-3, 0.25)))), {"out": _out(draw, x.shape)})


def ram_apply(draw: Draw) -> Call:
    base, tensors = _based(draw, 12)
    factors = [draw(st.sampled_from((1.0, 1.02, -0.0))) for _ in tensors]
    return Call(ops.ram_apply, (base, tensors, factors), {"epsilon": 1e-3, "out": _out(draw, tensors[0].shape)})


def ram_counts(draw: Draw) -> Call:
    return Call(ops.ram_counts, _based(draw, 12), {"epsilon": draw(st.sampled_from((0.0, 1e-3)))})


def model_variance(draw: Draw) -> Call:
    return Call(ops.model_variance, _based(draw, 12))


def energy_sums(draw: Draw) -> Call:
    base, tensors = _based(draw)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    mask = torch.randint(0, 256, (-(-base.numel() // 8),), dtype=torch.uint8, generator=generator)
    return Call(ops.energy_sums, (base, tensors), {"mask": draw(st.sampled_from((None, mask)))})


def divergences(draw: Draw) -> Call:
    base, (x,) = _based(draw, 1)
    lengths = [length for length in range(1, x.numel() + 1) if x.numel() % length == 0]
    return Call(ops.divergences, (base, x, draw(st.sampled_from(lengths[-6:] or [1]))))


def importance(draw: Draw) -> Call:
    base, x, length = divergences(draw).arguments
    return Call(ops.importance, (base, x, torch.arange(x.numel() // length) / 7.0, length))


def _trial(draw: Draw) -> dict[str, Any]:
    offset = draw(strategies.offsets)
    return {
        "seed": draw(strategies.words64),
        "generation": draw(st.sampled_from((0, 65535))),
        "member": draw(strategies.positions),
        "tensor_id": draw(strategies.words64),
        "offset": offset,
        "forced": draw(st.sampled_from((None, offset, offset + 3))),
    }


def blend_trial(draw: Draw) -> Call:
    shape = draw(strategies.shapes())
    tensors = [draw(strategies.tensors(shape=shape)) for _ in range(2)]
    numbers = draw(st.sampled_from((0.5, -1.7))), draw(strategies.densities)
    return Call(ops.blend_trial, (*tensors, *numbers), _trial(draw) | {"out": _out(draw, shape)})


def de_trial(draw: Draw) -> Call:
    shape = draw(strategies.shapes())
    tensors = [draw(strategies.tensors(shape=shape)) for _ in range(4)]
    more = [(0.3, draw(strategies.tensors(shape=shape)), tensors[0])] * draw(st.integers(0, 2))
    numbers = draw(st.sampled_from((0.5, -1.7))), draw(strategies.densities)
    return Call(ops.de_trial, (*tensors, *numbers), _trial(draw) | {"more": more})


def count_nonfinite(draw: Draw) -> Call:
    return Call(ops.count_nonfinite, (_tensor(draw),))


def zero_nonfinite(draw: Draw) -> Call:
    return Call(ops.zero_nonfinite_, (_tensor(draw),))


def consensus_apply(draw: Draw) -> Call:
    models, compute = _models(draw), draw(strategies.computes)
    inputs = draw(st.sampled_from(("models", "deltas")))
    count = len(models.tensors)
    keywords = {
        "inputs": inputs,
        "rule": draw(strategies.rules(models, inputs == "models", compute)),
        "scales": [draw(st.sampled_from((1.0, 1.25, 0.0))) for _ in range(count)],
        "election": draw(st.sampled_from(("weighted", "none", "total", "frequency"))),
        "zero_sign": draw(st.sampled_from(("positive", "negative", "zero"))),
        "divisor": draw(st.sampled_from(("weights", "none", "count", "value"))),
        "divisor_value": 0.7,
        "lambda_": draw(st.sampled_from((1.0, 0.7, 0.0))),
        "compute": compute,
    }
    out = _out(draw, models.tensors[0].shape)
    given = [draw(weights) for _ in range(count)]
    return Call(ops.consensus_apply, (models.base, models.tensors, given), keywords | {"out": out})


def _whole(draw: Draw, methods: st.SearchStrategy[Any]) -> dict[str, Any]:
    return {
        "method": draw(methods),
        "rescale": draw(st.sampled_from((None, "l1"))),
        "seed": draw(strategies.words64),
        "tensor_id": draw(strategies.words64),
        "ties": draw(st.sampled_from(("lowest_index", "keep", "hashed"))),
        "numerics": draw(st.sampled_from(("fp32", "mergekit"))),
    }


def sparsify(draw: Draw) -> Call:
    return Call(
        ops.sparsify, (_tensor(draw), draw(st.sampled_from((0.5, 0.3, 0.8, 0.0, 1.0)))), _whole(draw, sparsify_methods)
    )


def consensus_merge(draw: Draw) -> Call:
    models = _models(draw)
    keywords = _whole(draw, st.one_of(sparsify_methods, st.none())) | {
        "density": [draw(st.sampled_from((0.5, 0.3, 0.8, 1.0))) for _ in models.tensors],
        "election": draw(st.sampled_from(("weighted", "none", "total", "frequency"))),
        "divisor": draw(st.sampled_from(("weights", "none", "count"))),
    }
    return Call(ops.consensus_merge, (models.base, models.tensors, [draw(weights) for _ in models.tensors]), keywords)


def _pcb(draw: Draw, variants: tuple[str, ...] = VARIANTS) -> tuple[Tensor | None, list[Tensor], Any]:
    models = draw(strategies.models(most=3, blocks=False))
    return models.base, models.tensors, draw(pcb_rules(models, variants))


def pcb_scores(draw: Draw) -> Call:
    return Call(ops.pcb_scores, _pcb(draw))


def pcb_sums(draw: Draw) -> Call:
    return Call(ops.pcb_sums, _pcb(draw, ("paper",)))


def pcb_extremes(draw: Draw) -> Call:
    return Call(ops.pcb_extremes, _pcb(draw)[:2])


def pcb_histogram(draw: Draw) -> Call:
    base, tensors, rule = _pcb(draw)
    return Call(
        ops.pcb_histogram, (base, tensors, rule, [draw(st.sampled_from((-1, 0x8012, 0xBF80))) for _ in tensors])
    )


def pcb_window_(draw: Draw) -> Call:
    base, tensors, rule = _pcb(draw)
    count = len(tensors)
    low = [draw(st.sampled_from((0, 0x80000000 - 500, 0xBF800000 - 500, 1 << 32))) for _ in range(count)]
    return Call(
        pcb_window, (base, tensors, rule, low, torch.full((count, 1001), 3), torch.zeros(count, dtype=torch.int64))
    )


def pcb_apply_(draw: Draw) -> Call:
    base, tensors, rule = _pcb(draw)
    count, numel = len(tensors), tensors[0].numel()
    out = _out(draw, tensors[0].shape)
    scale = torch.full((count, numel), float("nan"))
    given = [draw(st.sampled_from((1.0, 0.3, -1.2, 0.0))) for _ in range(count)]
    return Call(pcb_apply, (base, tensors, given, rule, out, scale))


def pcb_merge(draw: Draw) -> Call:
    shape = (draw(st.integers(1, 1600)),)
    rows = [draw(strategies.tensors(shape=shape)) for _ in range(draw(st.integers(1, 3)))]
    keywords = {
        "variant": draw(st.sampled_from(VARIANTS)),
        "density": draw(st.sampled_from((0.1, 0.5, 1.0))),
        "return_scale": True,
    }
    return Call(ops.pcb_merge, (rows,), keywords)


CALLS: dict[str, Callable[[Draw], Call]] = {
    "abs_histogram": abs_histogram,
    "kth_magnitude": kth_magnitude,
    "magnitude_bounds": magnitude_bounds,
    "key_histogram": key_histogram,
    "key_window_": key_window,
    "tie_counts": tie_counts,
    "topk_mask": topk_mask,
    "l1_sums": l1_sums,
    "kept_masks": kept_masks,
    "gram": gram,
    "nearswap": nearswap,
    "ram_apply": ram_apply,
    "ram_counts": ram_counts,
    "model_variance": model_variance,
    "energy_sums": energy_sums,
    "divergences": divergences,
    "importance": importance,
    "blend_trial": blend_trial,
    "de_trial": de_trial,
    "count_nonfinite": count_nonfinite,
    "zero_nonfinite_": zero_nonfinite,
    "consensus_apply": consensus_apply,
    "sparsify": sparsify,
    "consensus_merge": consensus_merge,
    "pcb_scores": pcb_scores,
    "pcb_window_": pcb_window_,
    "pcb_histogram": pcb_histogram,
    "pcb_extremes": pcb_extremes,
    "pcb_sums": pcb_sums,
    "pcb_apply": pcb_apply_,
    "pcb_merge": pcb_merge,
}
