"""No CUDA kernel touches a byte past a tensor, wherever it begins, and where it ends within a word of 16 bytes."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmerge import ops
from fastmerge.backends.filters import Mask
from fastmerge.backends.rule import PcbRule, SparsifyRule
from fastmerge.reference import pcb as reference_pcb
from tests.cuda.edges import Edge
from tests.highpass_kernels import PLAIN
from tests.numeric import assert_bitwise_equal, poison_
from tests.strategies import DTYPES

launch = pytest.importorskip(
    "fastmerge.backends.cuda.launch",
    reason="no cuda backend here; tests/ops holds the others to the same",
    exc_type=ImportError,
)
pcb = pytest.importorskip(
    "fastmerge.backends.cuda.pcb",
    reason="no cuda backend here; tests/ops holds the others to the same",
    exc_type=ImportError,
)

KERNELS = pytest.importorskip(
    "fastmerge.backends.cuda.highpass",
    reason="no cuda backend here; tests/ops holds the others to the same",
    exc_type=ImportError,
).KERNELS

pytestmark = pytest.mark.skipif(not launch.EMULATED, reason="compute-sanitizer looks for it on a GPU")

each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_place = pytest.mark.parametrize(("numel", "gap"), [(1, 0), (7, 1), (8, 3), (2043, 5), (2056, 0), (4101, 3)])
"""Elements of a tensor, and between its end and that of its page: together they say where it begins."""


@pytest.fixture
def edge(monkeypatch: pytest.MonkeyPatch) -> Edge:
    return Edge(monkeypatch)


def models(numel: int, count: int, dtype: torch.dtype) -> list[Tensor]:
    """A base and models near it; few different values, one of them NaN, another infinite."""
    generator = torch.Generator().manual_seed(numel)
    made = [(torch.randint(-5, 6, (numel,), generator=generator) / 8).to(dtype) for _ in range(count + 1)]
    made[-1][numel // 2] = float("nan")
    made[-1][numel // 3] = float("inf")
    return made


def at_edges(edge: Edge, tensors: list[Tensor], gap: int) -> list[Tensor]:
    """All at the end itself, or each one element further from it."""
    return [edge.place(x, (gap + i if gap else 0) * x.element_size()) for i, x in enumerate(tensors)]


def same(found: Any, expected: Any) -> None:
    for one, other in zip(found, expected, strict=True):
        assert_bitwise_equal(one, other)


@each_dtype
@each_place
def test_selection(dtype: torch.dtype, numel: int, gap: int, edge: Edge) -> None:
    base, *tensors = models(numel, 2, dtype)
    placed = at_edges(edge, [base, *tensors], gap)
    first, last = [0, numel // 4], [numel // 2, numel - 1]
    for origin, own in ((base, placed[0]), (None, None)):
        expected = ops.magnitude_bounds(origin, tensors, first, last, backend="reference")
        same(ops.magnitude_bounds(own, placed[1:], first, last, backend="cuda"), expected)
        counted = ops.tie_counts(origin, tensors, expected[0], backend="reference")
        assert_bitwise_equal(ops.tie_counts(own, placed[1:], expected[0], backend="cuda"), counted)
        counts = [torch.zeros(2, 101, dtype=torch.int64) for _ in range(2)]
        for backend, x, given, into in zip(("reference", "cuda"), (origin, own), (tensors, placed[1:]), counts):
            ops.key_window_(x, given, [0, 0x3E000000], into, backend=backend)
        same(*[[each] for each in counts])
    for x, own in zip(tensors, placed[1:]):
        assert_bitwise_equal(ops.topk_mask(own, 0.4, backend="cuda"), ops.topk_mask(x, 0.4, backend="reference"))
    histogram = ops.abs_histogram(placed, backend="cuda")
    assert_bitwise_equal(histogram, ops.abs_histogram([base, *tensors], backend="reference"))


@each_dtype
@each_place
def test_sparsification(dtype: torch.dtype, numel: int, gap: int, edge: Edge) -> None:
    base, *tensors = models(numel, 2, dtype)
    own, *placed = at_edges(edge, [base, *tensors], gap)
    bounds, ties = ops.magnitude_bounds(base, tensors, [0, 0], [numel // 2, numel // 3], backend="reference")
    band = SparsifyRule("band", bounds=bounds, ties_before=ties)
    della = SparsifyRule("della", None, None, [0.4, 0.5], [0.1, 0.45], numel, 3, 11, [0, 1])
    for rule in (band, della):
        for function in (ops.kept_masks, ops.l1_sums):
            expected = function(base, tensors, rule, backend="reference")
            assert_bitwise_equal(function(own, placed, rule, backend="cuda"), expected)
    counted = ops.count_nonfinite(placed[1], backend="cuda")
    assert_bitwise_equal(counted, ops.count_nonfinite(tensors[1], backend="reference"))
    for x, backend in ((placed[1], "cuda"), (tensors[1], "reference")):
        ops.zero_nonfinite_(x, backend=backend)
    assert_bitwise_equal(placed[1], tensors[1])


@each_dtype
@each_place
@pytest.mark.parametrize("count", [2, 6, 9])
def test_merges(dtype: torch.dtype, numel: int, gap: int, count: int, edge: Edge) -> None:
    base, *tensors = models(numel, count, dtype)
    own, *placed = at_edges(edge, [base, *tensors], gap)
    expected = torch.empty(numel, dtype=DTYPES[count % 3])
    out = edge.place(poison_(torch.empty_like(expected)), gap * expected.element_size())
    ops.consensus_merge(base, tensors, 0.5, density=0.5, out=expected, backend="reference")
    ops.consensus_merge(own, placed, 0.5, density=0.5, out=out, backend="cuda")
    assert_bitwise_equal(out, expected)


@each_dtype
@each_place
def test_competition(dtype: torch.dtype, numel: int, gap: int, edge: Edge) -> None:
    base, *tensors = models(numel, 3, dtype)
    own, *placed = at_edges(edge, [base, *tensors], gap)
    rule = PcbRule("vision", clip=torch.tensor([[0.1, 0.5]] * 3), thresholds=torch.tensor([[0.0, 1.0]] * 3))
    assert_bitwise_equal(pcb.pcb_scores(own, placed, rule), reference_pcb.pcb_scores(base, tensors, rule))
    assert_bitwise_equal(pcb.pcb_extremes(own, placed), reference_pcb.pcb_extremes(base, tensors))
    expected = torch.empty(numel, dtype=dtype)
    out = edge.place(poison_(torch.empty_like(expected)), gap * expected.element_size())
    reference_pcb.pcb_apply(base, tensors, rule, [0.3, 1.0, -1.0], expected, None)
    pcb.pcb_apply(own, placed, rule, [0.3, 1.0, -1.0], out, None)
    assert_bitwise_equal(out, expected)


@each_dtype
@pytest.mark.parametrize(("shape", "gap"), [((1, 1, 1), 0), ((1, 2, 4), 0), ((2, 66, 68), 0), ((1, 37, 65), 3)])
def test_filters(dtype: torch.dtype, shape: tuple[int, ...], gap: int, edge: Edge) -> None:
    """On integers, of which sums are exact."""
    generator = torch.Generator().manual_seed(shape[1])
    n, height, width = shape
    classes = 2 if height % 2 == 0 else 1
    x = torch.randint(-4, 5, shape, generator=generator).to(dtype)
    bases = [torch.randint(-2, 3, (height // classes, 16 + gap), generator=generator).float() for _ in range(classes)]
    coefficients = torch.randint(-2, 3, (n, classes * (16 + gap), width), generator=generator).float()
    own, given = edge.place(x, gap * x.element_size()), edge.place(coefficients, 4 * gap)
    own_bases = [edge.place(basis, 4 * gap) for basis in bases]
    found, out = edge.place(poison_(torch.empty_like(given)), 4 * gap), edge.place(poison_(torch.empty_like(x)), 0)
    KERNELS.project(own, own_bases, found)
    KERNELS.subtract(own, own_bases, given, out)
    expected, rest = torch.empty_like(coefficients), torch.empty_like(x)
    PLAIN.project(x, bases, expected)
    PLAIN.subtract(x, bases, coefficients, rest)
    assert torch.equal(found, expected) and torch.equal(out, rest)
    if dtype == torch.float32:
        lines = torch.complex(x, x)
        placed = edge.place(lines, 8 * (gap % 2))
        limits = Mask(2 * height, width, 0.5, "ideal").limits(0)
        KERNELS.mask_(placed, limits, 0, 0.5)
        PLAIN.mask_(lines, limits, 0, 0.5)
        assert torch.equal(placed, lines)


@each_dtype
@pytest.mark.parametrize(("rows", "width", "gap"), [(1, 1, 0), (3, 50, 1), (70, 60, 0)])
def test_experts(dtype: torch.dtype, rows: int, width: int, gap: int, edge: Edge) -> None:
    generator = torch.Generator().manual_seed(width)
    x, *tuned = (torch.randint(-9, 10, (rows, width), generator=generator).to(dtype) / 8 for _ in range(3))
    experts = [ops.extract_expert(each, 1.0 if width == 1 else 0.6, backend="reference") for each in tuned]
    there = [ops.Expert(one.shape, *(edge.place(y, gap * 4) for y in (one.columns, one.values))) for one in experts]
    own = edge.place(x, gap * x.element_size())
    for count in (1, 2):
        wanted, parts = x.clone(), [one.part(0, 0.5, one.at(tuned[1])) for one in experts[:count]]
        kept = ops.expert_apply_([wanted], parts, backend="reference")
        worn = [one.part(0, 0.5, edge.place(part.base, 0)) for one, part in zip(there, parts)]
        saved = ops.expert_apply_([own], worn, backend="cuda")
        assert_bitwise_equal(own, wanted)
        assert_bitwise_equal(saved, kept)
        assert ops.expert_revert_([own], worn, edge.place(saved, 0), backend="cuda") == [0]
        assert_bitwise_equal(own, x)


def test_the_emulator_notices() -> None:
    """A word that a tensor ends in, told of one element less than it has room for."""
    program = (
        "import os, torch\n"
        "from fastmerge import ops\n"
        "x = torch.ones(16)\n"
        "os.environ['FASTMERGE_EMULATED_FORBIDDEN'] = f'{x.data_ptr() + 60}-{x.data_ptr() + 64}'\n"
        "ops.count_nonfinite(x[:15], backend='cuda')\n"
        "print('so far', flush=True)\n"
        "ops.count_nonfinite(x, backend='cuda')\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode < 0 and result.stdout == "so far\n"
    assert "what is no tensor's" in result.stderr
