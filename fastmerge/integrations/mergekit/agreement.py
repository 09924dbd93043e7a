"""What fastmerge and mergekit owe each other on one tensor: where they must agree, how nearly, and why not elsewhere.

With numerics "mergekit" every value is mergekit's, but for the exceptions that docs/numbers.md lists. With "fp32" what
is merged here is held against mergekit's function computed more exactly on the same values, float32 or float64 in place
of the models' dtype: what is left between the two is the last rounding. So it is seen of every difference whether it
comes from mergekit's rounding, and none is allowed because it is small.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor

MAGNITUDES = ("ties", "breadcrumbs", "breadcrumbs_ties")
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")
CONSENSUS = ("task_arithmetic", *MAGNITUDES, *RANDOM)
ELECTIONS = ("ties", "breadcrumbs_ties", "dare_ties", "della")
ANGLES: Mapping[str, float] = {
    "slerp": 1.5,
    "nuslerp": 6.0,
    "multislerp": 25.0,
    "karcher": 25.0,
    "model_stock": 25.0,
}
"""Methods about angles, and by how many units of float32, of the largest number at hand, they may differ."""
IMPORTANCE = ("nearswap", "sce", "ram", "ramplus_tl", "arcee_fusion")

REASONS: Mapping[str, str] = {
    "ties": "equal to the threshold; which of these elements stays is arbitrary in mergekit",
    "rounding": "mergekit rounds every step to the models' dtype; computed more exactly, it gives the values here",
    "order": "mergekit adds five models or more in another order in a tensor's last N % 32 elements",
    "rescale": "mergekit's L1 sums carry rounding errors, and those here are exact",
    "overflow": "mergekit's float16 overflows",
    "fused": "mergekit adds by fused multiply-adds, and what is added here is rounded first",
    "accuracy": "the last digits of float32",
    "edge": "so near a threshold, or vectors so nearly opposite, that rounding decides",
    "release": "this release of mergekit computes it otherwise than 0.1.5, which is followed here",
    "draws": "other elements are dropped at random; compared are the merge with nothing dropped, and what each keeps",
}
"""Why elements differ that may."""

UNEXPLAINED = "unexplained"
_FINE = 2.0**-20
"""What float32 may lose in a few operations, as a part of what is added up."""
_NEAR_THRESHOLD = 1e-3
_LANES = 32
_MOST_SUBSETS = 10


@dataclass(frozen=True)
class Case:
    """One tensor's merge. tensors: the base first if there is one. values: mergekit's, see `peer.Values`.

    compute: the dtype in which mergekit merges them. otherwise: whether this release of mergekit merges them in another
    way than the one whose numbers are followed.
    """

    method: str
    numerics: str
    tensors: Sequence[Tensor]
    has_base: bool
    values: Mapping[str, Any]
    compute: torch.dtype
    otherwise: bool = False

    @property
    def base(self) -> Tensor | None:
        """The base, if there is one."""
        return self.tensors[0] if self.has_base else None

    @property
    def models(self) -> Sequence[Tensor]:
        """The others."""
        return self.tensors[1:] if self.has_base else self.tensors

    @property
    def judged_in(self) -> torch.dtype:
        """The dtype in which mergekit's function must agree with what is merged here."""
        if self.numerics == "mergekit":
            return self.compute
        return torch.float64 if self.method in ANGLES or self.method in IMPORTANCE else torch.float32


@dataclass
class Comparison:
    """How far two merges of one tensor are from each other, and how many elements may not be so.

    differ: elements with another value. largest, ulps: the largest difference, absolute and in units of the last place
    of the output's dtype. relative: Frobenius norm of the difference, as a part of that of mergekit's merge. reasons:
    elements that differ, by why. wrong: elements that are not what they must be.
    """

    elements: int
    differ: int = 0
    largest: float = 0.0
    ulps: float = 0.0
    relative: float = 0.0
    reasons: dict[str, int] = field(default_factory=dict)
    wrong: int = 0


def compare(case: Case, ours: Tensor, seen: Tensor, judge: Tensor) -> Comparison:
    """Compare a merge with mergekit's.

    ours: what fastmerge merged, in the output's dtype. seen: what mergekit's command would write. judge: what its
    function gives in `case.judged_in`, not rounded any further. All of one shape, on the CPU.
    """
    out = ours.dtype
    a, b, exact = (x.reshape(-1).double() for x in (ours, seen.to(out), judge))
    differ = ~_equal(a, b)
    difference = (a - b).abs()
    finite = differ & difference.isfinite()
    slack = allowed(case, exact)
    if case.numerics != "mergekit":
        slack = slack + 0.5 * unit_of(torch.maximum(a.abs(), exact.abs()), out)
    left_open = open_places(case, b)
    wrong = ~_equal(a, exact) & ~((a - exact).abs() <= slack)
    for mask in left_open.values():
        wrong &= ~mask
    reasons = {}
    rest = differ & ~wrong
    for reason, mask in left_open.items():
        if count := int((rest & mask).sum()):
            reasons[reason] = count
        rest = rest & ~mask
    if count := int(rest.sum()):
        reasons[_rest(case)] = count
    if count := int(wrong.sum()):
        reasons[UNEXPLAINED] = count
    norm = float(torch.where(b.isfinite(), b, 0.0).norm())
    return Comparison(
        elements=a.numel(),
        differ=int(differ.sum()),
        largest=float(difference[finite].max()) if finite.any() else 0.0,
        ulps=float((difference / unit_of(torch.maximum(a.abs(), b.abs()), out))[finite].max()) if finite.any() else 0.0,
        relative=float(difference[finite].norm()) / norm if norm > 0 else float(differ.any()),
        reasons=reasons,
        wrong=int(wrong.sum()),
    )


def _equal(a: Tensor, b: Tensor) -> Tensor:
    return (a == b) | (a.isnan() & b.isnan())


def _rest(case: Case) -> str:
    """Why elements differ that no place is left open for."""
    if case.numerics == "mergekit":
        return "rescale" if case.values.get("rescale") else "order"
    if case.compute != torch.float32:
        return "rounding"
    if case.method == "linear":
        return "fused"
    return "rescale" if case.method in CONSENSUS and case.values.get("rescale") else "accuracy"


def unit_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The unit in the last place of numbers of this magnitude in a dtype, float64."""
    about = torch.finfo(dtype)
    finite = torch.where(x.isfinite(), x.abs(), 1.0).clamp(min=about.smallest_normal)
    return torch.ldexp(torch.full_like(x, about.eps), torch.frexp(finite).exponent - 1)


# -- how nearly


def allowed(case: Case, exact: Tensor) -> Tensor:
    """By how much each element may differ from mergekit's, where no place is left open: float64, flat."""
    none = torch.zeros_like(exact)
    models = [x.reshape(-1).double() for x in case.models]
    if case.method == "linear":
        return none if case.numerics == "mergekit" else _FINE * _reach_of_linear(case, models)
    if case.method == "passthrough":
        return none if case.numerics == "mergekit" else _FINE * exact.abs()
    if case.method in ANGLES:
        largest = max((float(x.abs().max()) for x in (*models, exact) if x.numel()), default=0.0)
        return none + (ANGLES[case.method] * 2.0**-24 + 1e-6) * largest
    assert case.base is not None
    base = case.base.reshape(-1).double()
    if case.method in IMPORTANCE:
        reach = torch.stack([(x - base).abs() for x in models]).amax(dim=0)
        # Places that are chosen by a hair move the counts and energies that weigh all others.
        hangs = _selects(case) and bool(_edges(case).any())
        return (0.02 if hangs else 3e-6) * reach + 1e-7 * base.abs() + 6e-8
    reach = base.abs() + _strength(case) * sum(
        (abs(weight) * (x - base).abs() for weight, x in zip(case.values["weight"], models, strict=True)), none
    )
    if case.numerics != "mergekit":
        return _FINE * reach
    if case.compute != torch.float32:
        return none
    if case.values.get("rescale"):
        return _FINE * reach
    tail = exact.numel() % _LANES if len(models) > 4 else 0
    return torch.cat([none[: none.numel() - tail], _FINE * reach[none.numel() - tail :]])


def _selects(case: Case) -> bool:
    """Whether the elements that are chosen say how much the others count."""
    return case.method == "ramplus_tl" or (case.method == "sce" and 0 < float(case.values["select_topk"]) < 1)


def _reach_of_linear(case: Case, models: Sequence[Tensor]) -> Tensor:
    weights = [float(weight) for weight in case.values["weight"]]
    total = sum(weights) if case.values.get("normalize", True) else 1.0
    added = sum((abs(weight) * x.abs() for weight, x in zip(weights, models, strict=True)), torch.zeros_like(models[0]))
    return added / (abs(total) or 1.0)


def _strength(case: Case) -> float:
    """The most by which what is added up may be multiplied: lambda, scales, and the least divisor."""
    weights = [float(weight) for weight in case.values["weight"]]
    least = 1.0
    if case.values.get("normalize"):
        sums = [sum(weights)]
        if case.method in ELECTIONS:
            few = weights[:_MOST_SUBSETS]
            sums = [sum(w for w, in_ in zip(few, chosen) if in_) for chosen in product((0, 1), repeat=len(few))]
        least = min((abs(one) for one in sums if abs(one) > 1e-6), default=1.0)
    scale = 1.0
    if case.values.get("rescale"):
        scale = 4.0 / max(min((float(one) for one in case.values["density"]), default=1.0), 1e-3)
    return abs(float(case.values.get("lambda", 1.0))) * scale / min(least, 1.0)


# -- where nothing is owed


def open_places(case: Case, theirs: Tensor) -> dict[str, Tensor]:
    """Elements of which nothing is known, by reason: flat masks. theirs: what mergekit writes, flat."""
    if case.otherwise:
        return {"release": torch.ones(theirs.shape, dtype=torch.bool)}
    found = {}
    if case.method in MAGNITUDES:
        found["ties"] = tied(case)
    if case.method in IMPORTANCE or case.method in ("slerp", "nuslerp"):
        found["edge"] = _edges(case)
    if case.compute == torch.float16:
        found["overflow"] = ~theirs.isfinite()
    if case.method in ELECTIONS and len(case.models) > 4 and torch.float32 in (case.compute, case.judged_in):
        found["order"] = _votes_that_cancel(case)
    return found


def tied(case: Case) -> Tensor:
    """Where a delta equals the threshold that a magnitude rule cuts at, and not all of its like are kept."""
    assert case.base is not None
    base = case.base.to(case.judged_in).reshape(-1)
    found = torch.zeros(base.shape, dtype=torch.bool)
    for number, model in enumerate(case.models):
        density = float(case.values["density"][number])
        if density >= 1 or base.numel() == 0:
            continue
        magnitude = (model.to(case.judged_in).reshape(-1) - base).abs().float()
        falling = magnitude.sort(descending=True).values
        for cut in _cuts(case, number, density, base.numel()):
            if 0 < cut < base.numel() and falling[cut - 1] == falling[cut]:
                found |= magnitude == falling[cut]
    return found


def _cuts(case: Case, number: int, density: float, numel: int) -> tuple[int, int]:
    """First and last rank, by falling magnitude, of what is kept."""
    if case.method == "ties":
        return 0, 0 if density <= 0 else max(1, int(density * numel))
    kept, top = int(density * numel), int(float(case.values["gamma"][number]) * numel)
    bottom = max(0, numel - kept - top)
    return numel - bottom - kept, numel - bottom


def _votes_that_cancel(case: Case) -> Tensor:
    """In a tensor's last elements, where the order of a sum may decide its sign, whichever models are kept there."""
    assert case.base is not None
    base = case.base.reshape(-1).double()
    found = torch.zeros(base.shape, dtype=torch.bool)
    first = base.numel() - base.numel() % _LANES
    added = torch.stack(
        [w * (x.reshape(-1).double() - base)[first:] for w, x in zip(case.values["weight"], case.models, strict=True)]
    )
    if len(added) > _MOST_SUBSETS:
        found[first:] = True
        return found
    subsets = torch.tensor(list(product((0.0, 1.0), repeat=len(added)))[1:], dtype=torch.float64)
    found[first:] = ((subsets @ added).abs() <= _FINE * (subsets @ added.abs())).any(dim=0)
    return found


def _edges(case: Case) -> Tensor:
    """Where a threshold of a method of importance, or an angle, is so near that rounding decides."""
    models = [x.double() for x in case.models]
    none = torch.zeros(models[0].numel(), dtype=torch.bool)
    base = None if case.base is None else case.base.double()
    if case.method == "nuslerp":
        return _nearly_opposite(case, base, models)
    if base is None or case.method == "nearswap" or base.numel() == 0:
        return none
    if case.method == "slerp":
        norms = base.norm() * models[0].norm()
        near = abs(abs(float((base * models[0]).sum() / norms)) - 0.9995) < 1e-6 if norms > 0 else False
        return none | near
    deltas = torch.stack([(x - base).reshape(-1) for x in models])
    if case.method == "sce":
        return _edges_of_sce(float(case.values["select_topk"]), deltas)
    if case.method == "arcee_fusion":
        score = _importance(models[0], base).reshape(-1)
        low, middle, high = score.sort().values[(torch.tensor([0.25, 0.5, 0.75]) * (score.numel() - 1)).long()].tolist()
        threshold = middle + 1.5 * (high - low)
        return (score - threshold).abs() <= _NEAR_THRESHOLD * abs(threshold) + 1e-15
    epsilon = float(case.values["epsilon"])
    if epsilon == 0:
        return none
    return ((deltas.abs() - epsilon).abs() <= 1e-6 * epsilon).any(dim=0)


def _nearly_opposite(case: Case, base: Tensor | None, models: Sequence[Tensor]) -> Tensor:
    """Vectors so nearly opposite that the last digit of their cosine decides."""
    x, y = (model if base is None else model - base for model in models)
    if case.values.get("nuslerp_flatten", True) or x.dim() == 0:
        x, y = x.reshape(1, -1), y.reshape(1, -1)
    axis = 0 if case.values.get("nuslerp_row_wise") and not case.values.get("nuslerp_flatten", True) else -1
    norms = x.norm(dim=axis, keepdim=True) * y.norm(dim=axis, keepdim=True)
    cosine = (x * y).sum(dim=axis, keepdim=True) / norms.clamp(min=1e-300)
    return (cosine < -1 + 1e-6).expand_as(x).reshape(-1)


def _edges_of_sce(share: float, deltas: Tensor) -> Tensor:
    votes = deltas.sum(dim=0).abs()
    cancel = votes <= 1e-6 * deltas.abs().sum(dim=0)
    if not 0 < share < 1:
        return cancel
    variance = deltas.var(dim=0, unbiased=False)
    falling = variance.sort(descending=True).values
    # Models that agree have no variance here, and what rounding leaves of it in mergekit's function.
    thresholds = [
        float(falling[k - 1])
        for k in (int(int((variance > 1e-18).sum()) * share), int(int(torch.count_nonzero(variance)) * share))
        if k > 0
    ]
    if not thresholds:
        return cancel
    near = (variance >= (1 - _NEAR_THRESHOLD) * min(thresholds)) & (variance <= (1 + _NEAR_THRESHOLD) * max(thresholds))
    return cancel | near


def _importance(model: Tensor, base: Tensor) -> Tensor:
    """Distance times divergence of the row, as docs/methods.md has it."""
    if model.dim() == 0:
        return torch.zeros_like(model)
    p, q = (torch.softmax(x, dim=-1) + 1e-8 for x in (model, base))
    return (model - base).abs() * (p * torch.log(p / q)).sum(dim=-1, keepdim=True)
