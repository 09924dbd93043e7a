"""Trials on every backend: the reference's bits on drawn inputs, lists, chunks, in place, and what is refused."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastmerge import backends, ops
from fastmerge.errors import ArgumentError, ArgumentTypeError, FastmergeError
from tests import strategies
from tests.numeric import assert_bitwise_equal, bits, poison_
from tests.ops.running import FAST, configurations, each_backend, only

on_cpus = pytest.mark.parametrize("backend", [name for name in FAST if name == "cpu"])

factors = st.sampled_from((0.5, 0.1, 1.0, -0.0, -1.7, 3e38, 1e300))
rates = strategies.densities


@st.composite
def keys(draw: st.DrawFn, chunk: bool = True) -> dict[str, Any]:
    """What random words depend on, and the element that always crosses over."""
    made = {
        "seed": draw(strategies.words64),
        "generation": draw(st.sampled_from((0, 1, 65535))),
        "member": draw(st.sampled_from((0, 3, 4095))),
    }
    if chunk:
        offset = draw(strategies.offsets)
        made |= {"tensor_id": draw(strategies.words64), "offset": offset}
        made["forced"] = draw(st.one_of(st.none(), st.integers(max(offset - 1, 0), offset + 600), st.just(0)))
    return made


@st.composite
def calls(
    draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype | None = None
) -> tuple[Callable[..., Any], list[Tensor], tuple[Any, ...], Any]:
    """An op, tensors, some of them the same, its numbers, and where its further differences are taken from."""
    blend = draw(st.booleans())
    differences = 0 if blend else draw(st.integers(1, 3))
    roles = 2 if blend else 2 + 2 * differences
    made = [draw(strategies.tensors(shape=shape, dtype=dtype))]
    for _ in range(roles - 1):
        again = draw(st.integers(0, 3)) == 0
        made.append(draw(st.sampled_from(made)) if again else draw(strategies.tensors(shape=shape, dtype=dtype)))
    numbers = draw(factors), draw(rates)
    if blend:
        return ops.blend_trial, made, numbers, {}
    return ops.de_trial, made[:4], numbers, [(draw(factors), *made[at : at + 2]) for at in range(4, roles, 2)]


def tried(call: tuple[Any, ...], **options: Any) -> Any:
    """The result of a drawn call."""
    op, tensors, numbers, more = call
    return op(*tensors, *numbers, **({"more": more} if more else {}), **options)


@each_backend
@given(data=st.data())
def test_trials(backend: str, data: st.DataObject) -> None:
    data.draw(configurations(backend))
    call = data.draw(calls(data.draw(strategies.shapes(blocks=backend == "cpu"))))
    key = data.draw(keys())
    out_dtype = data.draw(st.one_of(st.none(), strategies.dtypes))
    expected = tried(call, **key, out_dtype=out_dtype, backend="reference")
    out = poison_(torch.empty_like(expected, memory_format=torch.contiguous_format))
    with only(backend, "trials"):
        assert_bitwise_equal(tried(call, **key, out_dtype=out_dtype, backend=backend), expected)
        tried(call, **key, out=out, backend=backend)
    assert_bitwise_equal(out, expected)


@each_backend
@given(data=st.data())
def test_in_place(backend: str, data: st.DataObject) -> None:
    """Over x, or over another parent; at odd addresses, too."""
    data.draw(configurations(backend))
    call = _, tensors, *_ = data.draw(calls((data.draw(st.integers(1, 700)),)))
    key = data.draw(keys())
    place = data.draw(st.integers(0, len(tensors) - 1))
    expected = tried(call, **key, out_dtype=tensors[place].dtype, backend="reference")
    if not tensors[place].is_contiguous():
        tensors[place] = tensors[place].contiguous()
    with only(backend, "trials"):
        written = tried(call, **key, out=tensors[place], backend=backend)
    assert written is tensors[place]
    assert_bitwise_equal(written, expected)


@on_cpus
@settings(max_examples=40)
@given(data=st.data())
def test_tensors_of_bfloat16_alone(backend: str, data: st.DataObject) -> None:
    """They take a way of their own where words come in whole blocks: at all offsets that four divides."""
    data.draw(configurations(backend))
    call = _, tensors, *_ = data.draw(calls((data.draw(st.integers(128, 700)),), torch.bfloat16))
    key = data.draw(keys())
    key["offset"] -= key["offset"] % 4
    expected = tried(call, **key, backend="reference")
    with only(backend, "trials"):
        assert_bitwise_equal(tried(call, **key, backend=backend), expected)
        tensors[0] = tensors[0].contiguous()
        assert_bitwise_equal(tried(call, **key, out=tensors[0], backend=backend), expected)


@on_cpus
@pytest.mark.parametrize("rate", [0.4, 1.0])
def test_tensors_of_bfloat16_without_nan(backend: str, rate: float) -> None:
    """What is drawn often has a NaN, and tiles with one take the common way."""
    made = torch.randn(8, 700, generator=torch.Generator().manual_seed(2)).bfloat16()
    x, a, b, c, *rest = made
    more = [(-0.7, *rest[:2]), (1.3, *rest[2:])]

    def call(differences: int, backend: str) -> Tensor:
        options: dict[str, Any] = {"offset": 2**36 + 8, "forced": 2**36 + 77, "backend": backend}
        if differences == 0:
            return ops.blend_trial(x, a, 0.3, rate, **options)
        return ops.de_trial(x, a, b, c, 0.3, rate, more=more[: differences - 1], **options)

    module = backends.resolve(backend)
    for differences in range(4):
        expected = call(differences, "reference")
        for isa in module.isas():
            module.set_isa(isa)
            assert_bitwise_equal(call(differences, backend), expected)


@on_cpus
def test_results_that_no_cache_keeps(backend: str) -> None:
    """From 8 MB on they are written past the caches, if they begin at a line; there may be a NaN anywhere."""
    numel, half = (1 << 22) + 300, 1 << 21
    memory = torch.randn(numel + 35, generator=torch.Generator().manual_seed(0)).bfloat16()
    memory[5000] = memory[numel - 200] = math.nan
    x, a, b = memory[:numel], memory[1 : numel + 1], memory[2 : numel + 2]

    def call(part: slice, **options: Any) -> Tensor:
        options |= {"offset": part.start, "forced": half + 1, "seed": 3, "backend": backend}
        return ops.de_trial(x[part], a[part], b[part], a[part], 0.3, 0.5, **options)

    module = backends.resolve(backend)
    for isa in module.isas():
        module.set_isa(isa)
        expected = torch.cat([call(slice(0, half)), call(slice(half, numel))])
        for start in (0, 1):
            out = poison_(torch.empty(numel + 1, dtype=torch.bfloat16))[start : start + numel]
            assert_bitwise_equal(call(slice(0, numel), out=out), expected)
    x = x.clone()
    assert_bitwise_equal(call(slice(0, numel), out=x), expected)


@each_backend
@given(data=st.data())
def test_lists(backend: str, data: st.DataObject) -> None:
    """Tensors of several sizes and dtypes, some in place; as many single calls have the same bits."""
    data.draw(configurations(backend))
    count = data.draw(st.integers(1, 4))
    sizes = [data.draw(st.sampled_from(((), (0,), (5,), (3, 7), (129,), (1000,)))) for _ in range(count)]
    dtypes = data.draw(st.sampled_from((strategies.DTYPES[:1], strategies.DTYPES)))
    roles = data.draw(st.sampled_from((2, 4, 8)))
    lists = [
        [data.draw(strategies.tensors(shape=size, dtype=dtypes[(t + r) % len(dtypes)])) for t, size in enumerate(sizes)]
        for r in range(roles)
    ]
    if data.draw(st.booleans()):
        lists[-1] = lists[0]
    key = data.draw(keys(chunk=False))
    ids = [data.draw(strategies.words64) for _ in sizes]
    places: list[int | None] = [None] * count
    if data.draw(st.booleans()):
        places[data.draw(st.integers(0, count - 1))] = data.draw(st.integers(0, 130))
    numbers = data.draw(factors), data.draw(rates)

    def call(tensors: list[Any], **options: Any) -> Any:
        if roles == 2:
            return ops.blend_trial(*tensors, *numbers, **key, **options)
        more = [(0.25, *tensors[at : at + 2]) for at in range(4, roles, 2)]
        return ops.de_trial(*tensors[:4], *numbers, more=more, **key, **options)

    expected = [
        call([each[t] for each in lists], tensor_id=ids[t], forced=places[t], backend="reference") for t in range(count)
    ]
    with only(backend, "trials"):
        found = call(lists, tensor_id=ids, forced=places, backend=backend)
        own = [x.contiguous() for x in lists[0]]
        lists = [own if each is lists[0] else each for each in lists]
        assert call(lists, tensor_id=ids, forced=places, out=own, backend=backend) is own
    for t in range(count):
        assert_bitwise_equal(found[t], expected[t])
        assert_bitwise_equal(own[t], expected[t])


@each_backend
def test_chunks_join(backend: str) -> None:
    """Whatever the cuts; of several tie blocks where a kernel knows them."""
    numel = 140_003 if backend == "cpu" else 5003
    generator = torch.Generator().manual_seed(0)
    x, ref = torch.randn(2, numel, generator=generator).bfloat16()
    whole = ops.blend_trial(x, ref, 0.3, 0.4, seed=3, tensor_id=8, forced=77, backend=backend)
    assert_bitwise_equal(whole, ops.blend_trial(x, ref, 0.3, 0.4, seed=3, tensor_id=8, forced=77, backend="reference"))
    cuts = [0, 1, 78, 1030, numel // 2 + 1, numel]
    parts = [
        ops.blend_trial(x[a:b], ref[a:b], 0.3, 0.4, seed=3, tensor_id=8, offset=a, forced=77, backend=backend)
        for a, b in itertools.pairwise(cuts)
    ]
    assert_bitwise_equal(torch.cat(parts), whole)


@each_backend
def test_what_does_not_cross_over_is_not_touched(backend: str) -> None:
    """NaNs with payloads, -0 and denormals keep their bits; what does cross over has the one NaN."""
    for dtype in strategies.DTYPES:
        width = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
        generator = torch.Generator().manual_seed(1)
        x = torch.randint(-(2**31), 2**31, (600,), generator=generator).to(width).view(dtype)
        kept = ops.blend_trial(x, torch.ones_like(x), 0.5, 0.0, forced=9, backend=backend)
        same = bits(kept) == bits(x)
        assert same.sum() == 599 and not same[9]
        gone = ops.blend_trial(x, torch.full_like(x, math.nan), 0.5, 1.0, backend=backend)
        assert_bitwise_equal(gone, torch.full_like(x, math.nan))


def test_a_tensor_that_comes_again_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    module = backends.resolve("reference")
    original = module.trials

    def watched(models: Any, rule: Any, *rest: Any) -> None:
        given.append((models, rule))
        original(models, rule, *rest)

    monkeypatch.setattr(module, "trials", watched)
    x, best, c, d = torch.randn(4, 8)
    ops.de_trial(x, x, best, x, 0.5, 0.5, more=[(0.5, c, d)], backend="reference")
    ((models, rule),) = given
    assert [model[0].data_ptr() for model in models] == [each.data_ptr() for each in (x, best, c, d)]
    assert rule.places == [0, 1, 0, 2, 3]


x, memory = torch.arange(6.0).reshape(2, 3), torch.zeros(7)
NUMBERS = ([0.5], 0.5, 0, 0, 0, 0, 0, -1, torch.float32, "auto")
REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: ops.blend_trial(x, x, math.inf, 0.5), r"F=inf is not finite"),
    (lambda: ops.blend_trial(x, x, "a", 0.5), r"F must be a number, not str"),
    (lambda: ops.blend_trial(x, x, 0.5, 1.5), r"CR=1.5 is outside \[0, 1\]"),
    (lambda: ops.blend_trial(x, x, 0.5, math.nan), r"CR=nan is not finite"),
    (lambda: ops.blend_trial(x, x[:1], 0.5, 0.5), r"ref has shape \[1, 3\], but x has shape \[2, 3\]"),
    (lambda: ops.blend_trial(x, x.long(), 0.5, 0.5), r"ref has dtype int64: integer buffers never evolve"),
    (lambda: ops.blend_trial(x.bool(), x, 0.5, 0.5), r"x has dtype bool: integer buffers never evolve"),
    (lambda: ops.blend_trial(None, x, 0.5, 0.5), r"x must be a torch.Tensor or a list"),
    (lambda: ops.blend_trial(x, x, 0.5, 0.5, generation=65536), r"generation=65536 is out of range"),
    (lambda: ops.blend_trial(x, x, 0.5, 0.5, member=4096), r"member=4096 is out of range"),
    (lambda: ops.blend_trial(x, x, 0.5, 0.5, member=1.0), r"member must be an integer"),
    (lambda: ops.blend_trial(x, x, 0.5, 0.5, offset=-1), r"offset=-1 is out of range"),
    (lambda: ops.blend_trial(x, x, 0.5, 0.5, forced=-1), r"forced=-1 is out of range"),
    (lambda: ops.blend_trial(x, x, 0.5, 0.5, out_dtype=torch.int8), r"out_dtype=torch.int8 is not supported"),
    (lambda: ops.blend_trial(x, x, 0.5, 0.5, out=torch.empty(6)), r"out has shape \[6\]"),
    (lambda: ops.blend_trial(memory[:6], x.view(6), 0.5, 0.5, out=memory[1:]), r"out overlaps an input in memory"),
    (lambda: ops.blend_trial(x, x + 1, 0.5, 0.5, out=torch.empty(3, 2).mT), r"out is not contiguous"),
    (lambda: ops.de_trial(x, x, x, x[0], 0.5, 0.5), r"c has shape \[3\]"),
    (lambda: ops.de_trial(x, x, x, x, 0.5, 0.5, more=[(0.5, x)]), r"more\[0\] must be a tuple"),
    (lambda: ops.de_trial(x, x, x, x, 0.5, 0.5, more=[(0.5, x, x[0])]), r"more\[0\]\[2\] has shape \[3\]"),
    (lambda: ops.de_trial(x, x, x, x, 0.5, 0.5, more=[(0.5, x, x)] * 3), r"more has 3 entries; a trial takes at most"),
    (lambda: ops.blend_trial([x, x], [x], 0.5, 0.5), r"ref has 1 tensors, but x has 2"),
    (lambda: ops.blend_trial([x], x, 0.5, 0.5), r"ref must be a list of tensors"),
    (lambda: ops.blend_trial([], [], 0.5, 0.5), r"x is empty"),
    (lambda: ops.blend_trial([x], [x.int()], 0.5, 0.5), r"ref\[0\] has dtype int32: integer buffers never evolve"),
    (lambda: ops.blend_trial([x], [x], 0.5, 0.5, tensor_id=3), r"tensor_id must be a list"),
    (lambda: ops.blend_trial([x], [x], 0.5, 0.5, tensor_id=[3, 4]), r"tensor_id has 2 entries for 1 tensors"),
    (lambda: ops.blend_trial([x, x], [x, x], 0.5, 0.5, forced=[1, 1]), r"forced has several elements"),
    (lambda: ops.blend_trial([x, x], [x, x], 0.5, 0.5, offset=2), r"offset=2 is for a chunk of one tensor"),
    (lambda: ops.blend_trial([x, x + 1], [x, x], 0.5, 0.5, out=[x, x]), r"out\[1\] overlaps another tensor"),
    (lambda: ops.blend_trial([x], [x], 0.5, 0.5, out=[x, x]), r"out has 2 entries for 1 tensors"),
    (lambda: torch.ops.fastmerge.blend_trial(x, [x, x], *NUMBERS), r"parents has 2 entries for each tensor"),
]


@pytest.mark.parametrize(("call", "said"), REFUSED)
def test_what_does_not_fit_is_refused(call: Callable[[], Any], said: str) -> None:
    with pytest.raises((ArgumentError, ArgumentTypeError), match=said) as caught:
        call()
    assert isinstance(caught.value, FastmergeError) and str(caught.value)[-1] in ".)"


def test_float64_is_computed_in_float32_and_returned_as_float64() -> None:
    found = ops.blend_trial(x.double(), (x + 0.25).double(), 0.125, 0.5)
    assert found.dtype == torch.float64
    assert_bitwise_equal(found, ops.blend_trial(x, x + 0.25, 0.125, 0.5).double())
    assert [each.dtype for each in ops.blend_trial([x.double(), x], [x, x], 0.5, 0.5)] == [torch.float64, torch.float32]


def test_parameters_may_require_gradients() -> None:
    own = x.clone().requires_grad_()
    found = ops.blend_trial(own, x + 1, 0.5, 1.0, out=own)
    assert found is own and torch.equal(own.detach(), x + 0.5)
