"""The merge in Triton where it differs from other backends: cuts within tie blocks, tables of models, alignments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastmerge import backends
from fastmerge.backends import reference
from fastmerge.backends.lists import Lists
from fastmerge.backends.rule import TIE_BLOCK, SparsifyRule
from fastmerge.ops import keep_ties
from tests.numeric import assert_bitwise_equal, poison_

if backends.available()["triton"] is not None:
    pytest.skip(
        f"no triton backend here; tests/ops holds the others to the same: {backends.reason('triton')}",
        allow_module_level=True,
    )

from fastmerge.backends import triton
from fastmerge.backends.triton import launch

DEVICE = torch.device("cpu" if launch.INTERPRETED else "cuda")
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
MANY = 11
"""More models than kernels take by value."""


def drawn(count: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0, shift: int = 0) -> Tensor:
    """Numbers with many ties and zeros, some NaN and Inf among the first, `shift` elements past an aligned address."""
    generator = torch.Generator().manual_seed(seed)
    grid = torch.randint(-4, 5, (count + shift,), generator=generator) / 8
    x = torch.where(torch.rand(count + shift, generator=generator) < 0.5, grid, grid * 1.375).to(dtype)
    for place, value in ((1, float("nan")), (4, float("inf")), (6, float("-inf"))):
        x[place + shift : place + shift + 1] = value
    return x[shift:]


def band(base: Tensor | None, tensors: list[Tensor], first: list[int], last: list[int]) -> SparsifyRule:
    """The rule that keeps the ranks from first[i] to last[i]."""
    bounds, ties_before = reference.magnitude_bounds(base, tensors, first, last, torch.float32)
    return SparsifyRule("band", bounds=bounds, ties_before=ties_before)


def moved(value: Any) -> Any:
    """Tensors, in lists and rules, too, where kernels run."""
    if isinstance(value, Tensor):
        # Where alignment is at stake, a copy would lose it.
        return value if value.device == DEVICE else value.to(DEVICE)
    if isinstance(value, SparsifyRule):
        fields = {name: moved(getattr(value, name)) for name in ("bounds", "ties_before", "masks")}
        return SparsifyRule(**{**vars(value), **fields})
    return [moved(each) for each in value] if isinstance(value, list) else value


def check(base: Tensor | None, tensors: list[Tensor], out_dtype: torch.dtype = torch.bfloat16, **changes: Any) -> None:
    """The merge has the reference's bits."""
    count = len(tensors)
    settings: dict[str, Any] = {
        "inputs": "models",
        "rule": SparsifyRule(),
        "scales": [1.0] * count,
        "election": "weighted",
        "zero_sign": "positive",
        "divisor": "weights",
        "divisor_value": 0.7,
        "lambda_": 1.0,
        "compute": torch.float32,
        **changes,
    }
    weights = [(1.0, 0.5, -0.25, 1.0)[i % 4] for i in range(count)]
    expected = torch.empty(tensors[0].shape, dtype=out_dtype)
    reference.consensus_apply(base, tensors, weights, out=expected, **settings)
    actual = poison_(torch.empty(tensors[0].shape, dtype=out_dtype)).to(DEVICE)
    settings["rule"] = moved(settings["rule"])
    launch.launched.clear()
    triton.consensus_apply(moved(base), moved(tensors), weights, out=actual, **settings)
    assert launch.launched["merge" if count <= 8 else "merge_listed"] == 1
    assert_bitwise_equal(actual.cpu(), expected)


@pytest.mark.parametrize("count", [1, 8, MANY])
@pytest.mark.parametrize("election", ["none", "weighted", "total", "frequency"])
@pytest.mark.parametrize("zero_sign", ["positive", "negative", "zero"])
def test_elections_of_any_number_of_models(count: int, election: str, zero_sign: str) -> None:
    models = [drawn(700, seed=i) for i in range(count)]
    divisor = {"none": "none", "weighted": "weights", "total": "count", "frequency": "value"}[election]
    check(drawn(700, seed=99), models, election=election, zero_sign=zero_sign, divisor=divisor, lambda_=0.7)


@pytest.mark.parametrize("method", ["band", "bernoulli", "mask", "della"])
@pytest.mark.parametrize("count", [2, MANY])
@pytest.mark.parametrize("scale", [1.0, 1.7])
def test_rules_of_any_number_of_models(method: str, count: int, scale: float) -> None:
    base, models = drawn(960, seed=99), [drawn(960, seed=i) for i in range(count)]
    rule = SparsifyRule(
        method,  # type: ignore[arg-type]
        density=[(0.5, 1.0, 0.0, 0.9)[i % 4] for i in range(count)],
        epsilon=[0.05] * count,
        row_length=96,
        seed=(5 << 40) + 3,
        tensor_id=(7 << 61) + 1,
        positions=[4095 - i for i in range(count)],
        offset=96 * (1 << 33),
        masks=torch.randint(0, 256, (count, 120), dtype=torch.uint8),
    )
    if method == "band":
        rule = band(base, models, [10 * i for i in range(count)], [300 + 31 * i for i in range(count)])
    scales = [scale if scale == 1.0 else scale + i / 8 for i in range(count)]
    check(base, models, rule=rule, scales=scales, election="none", divisor="none")
    check(base, models, rule=rule, scales=scales)


@pytest.mark.parametrize("count", [2, MANY])
@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16])
def test_rounding_every_step(count: int, compute: torch.dtype) -> None:
    models = [drawn(600, compute, seed=i) for i in range(count)]
    check(drawn(600, compute, seed=99), models, compute=compute, scales=[1.3] * count, lambda_=0.9, out_dtype=compute)


@pytest.mark.parametrize("count", [3, MANY])
def test_models_of_several_dtypes(count: int) -> None:
    models = [drawn(900, DTYPES[i % 3], seed=i) for i in range(count)]
    check(drawn(900, torch.float16, seed=99), models, out_dtype=torch.float32)
    check(None, models, inputs="deltas", out_dtype=torch.float16)


@pytest.mark.parametrize("shift", [1, 4, 8])
@pytest.mark.parametrize("count", [2, MANY])
def test_tensors_at_any_address(shift: int, count: int) -> None:
    base = drawn(5000, seed=99)
    models = [drawn(5000, seed=i, shift=shift) for i in range(count)]
    check(base, models, rule=band(base, models, [0] * count, [1500] * count))


def test_addresses_between_elements() -> None:
    memory = bytearray(1) + bytearray(drawn(500).view(torch.uint8).numpy().tobytes())
    x = torch.frombuffer(memory, dtype=torch.bfloat16, count=500, offset=1)
    if DEVICE.type == "cpu":
        check(drawn(500, seed=9), [x, drawn(500, seed=1)])


# Cuts in the middle, at the beginning and at the end of tiles, pieces and blocks; 8192 elements are a program's.
@pytest.mark.parametrize("place", [1, 512, 8191, 8192, 40000, 65535, 65536, 65537, 66001])
def test_a_cut_anywhere_among_ties(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launch.BLOCK_VARIABLE, "2048")
    tied = torch.full((TIE_BLOCK + 500,), 0.5).bfloat16()
    other = drawn(TIE_BLOCK + 500, seed=1)
    ranks = [place, 100], [TIE_BLOCK + 400, 30000]
    rule = band(None, [tied, other], *ranks)
    check(None, [tied, other], rule=rule)
    bounds = keep_ties(rule.bounds)
    check(None, [tied, other], rule=SparsifyRule("band", bounds=bounds, ties_before=rule.ties_before))
    if place == TIE_BLOCK - 1:
        # Alone, no other cut goes through its block.
        check(None, [tied], rule=band(None, [tied], [0], [place]))


def test_the_last_tie_that_is_kept_may_be_alone_in_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launch.BLOCK_VARIABLE, "4096")
    x = torch.full((2 * TIE_BLOCK + 600,), 0.25).bfloat16()
    x[[5, 70, 900, TIE_BLOCK + 33, 2 * TIE_BLOCK + 1, 2 * TIE_BLOCK + 599]] = 0.5
    check(None, [x], rule=band(None, [x], [0], [4]))


def test_a_cut_in_one_of_many_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launch.BLOCK_VARIABLE, "2048")
    models = [drawn(20000, seed=i) for i in range(MANY)]
    check(None, models, rule=band(None, models, [7] * MANY, [9000 + 5 * i for i in range(MANY)]))


# Of the numbers alone, and of so many that there are whole tiles.
@pytest.mark.parametrize("repeats", [30, 150])
def test_bands_at_the_ends_of_the_keys(repeats: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launch.BLOCK_VARIABLE, "512")
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-40, -1.0, 3.4e38])
    nans = torch.tensor([0x7F800001, 0x7FFFFFFF, 0x7FC00001, -0x7FFFFF, -1], dtype=torch.int32).view(torch.float32)
    x = torch.cat([special, nans]).repeat(repeats)
    for threshold in (0, 1, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000, 0x7FC00001, 1 << 31):
        for other in (0, 0x3F800000, 0x7F800000, 0x7FC00000, 0x7FC00001, 1 << 31):
            bounds = torch.tensor([[[threshold, 0], [other, 0]]])
            rule = SparsifyRule("band", bounds=bounds, ties_before=torch.zeros(1, 2, 1, dtype=torch.int64))
            check(None, [x], rule=rule, election="none", divisor="none", out_dtype=torch.float32)


@pytest.mark.parametrize("method", ["none", "band", "bernoulli"])
@pytest.mark.parametrize("count", [2, MANY])
@pytest.mark.parametrize("with_base", [True, False])
def test_many_tensors_at_once(method: str, count: int, with_base: bool) -> None:
    lengths = (1, 700, 0, 4097, 5000)
    if method == "band" and count == 2:
        # One of them is a tie block, after which the next one's comes, and one has two.
        lengths = (1, 700, 0, TIE_BLOCK, TIE_BLOCK + 900)
    bases = [drawn(n, torch.float32, seed=50 + t) for t, n in enumerate(lengths)] if with_base else None
    models = [[drawn(n, seed=10 * i + t, shift=t % 2) for t, n in enumerate(lengths)] for i in range(count)]
    ids = [3 << 62, 5, 6, 7, 8]
    rules = []
    for t, n in enumerate(lengths):
        rule = SparsifyRule()
        if method == "band":
            own = None if bases is None else bases[t]
            rule = band(own, [one[t] for one in models], [n // 9] * count, [n // 3 + i for i in range(count)])
        elif method == "bernoulli":
            densities = [(0.5, 1.0, 0.3)[i % 3] for i in range(count)]
            rule = SparsifyRule("bernoulli", density=densities, seed=4, tensor_id=ids[t], positions=list(range(count)))
        rules.append(rule)
    together = rules[0]
    if method == "band":
        together = SparsifyRule(
            "band",
            bounds=torch.stack([rule.bounds for rule in rules]),
            ties_before=torch.cat([rule.ties_before for rule in rules], dim=2),
        )
    settings: dict[str, Any] = {
        "inputs": "models",
        "scales": [1.0] * count,
        "election": "weighted",
        "zero_sign": "positive",
        "divisor": "weights",
        "divisor_value": 1.0,
        "lambda_": 0.7,
        "compute": torch.float32,
    }
    weights = [1.0, 0.5, -0.25, *[1.0] * count][:count]
    expected = [torch.empty(n, dtype=torch.float16) for n in lengths]
    actual = [poison_(torch.empty(n, dtype=torch.float16)).to(DEVICE) for n in lengths]
    for t, target in enumerate(expected):
        own = None if bases is None else bases[t]
        reference.consensus_apply(own, [one[t] for one in models], weights, rule=rules[t], out=target, **settings)
    launch.launched.clear()
    lists = Lists(moved(bases), moved(models), actual, ids)
    triton.consensus_apply_many(lists, weights, rule=moved(together), **settings)
    assert launch.launched["merge_tensors"] == (1 if count <= 8 else 0)
    for got, want in zip(actual, expected):
        assert_bitwise_equal(got.cpu(), want)


def test_many_tensors_refuse_what_one_launch_cannot_take() -> None:
    x = drawn(10).to(DEVICE)
    settings: dict[str, Any] = {
        "inputs": "models", "scales": [1.0], "election": "none", "zero_sign": "positive", "divisor": "none",
        "divisor_value": 1.0, "lambda_": 1.0, "compute": torch.float32,
    }  # fmt: skip
    out = [torch.empty_like(x), torch.empty_like(x)]
    with pytest.raises(ValueError, match="several dtypes"):
        triton.consensus_apply_many(Lists(None, [[x, x.float()]], out), [1.0], rule=SparsifyRule(), **settings)
    with pytest.raises(ValueError, match="della"):
        triton.consensus_apply_many(Lists(None, [[x, x]], out), [1.0], rule=SparsifyRule("della"), **settings)
