"""Methods on spheres and planes: each against its formula, with vectors and in float64; and where vectors vanish,
coincide or cancel.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastmerge
from fastmerge import methods
from fastmerge.backends.rule import GRAM_BLOCK
from fastmerge.errors import ArgumentError, ConfigError, MergeError
from fastmerge.merging import merge_checkpoints, plan_checkpoints
from fastmerge.methods.base import TensorContext
from fastmerge.methods.geometry import Coefficients
from fastmerge.methods.slerp import Slerp
from tests.engine.small_family import config_for, family, load, save_family
from tests.numeric import assert_bitwise_equal

NAME = "model.layers.0.self_attn.q_proj.weight"
SHAPES = [(), (1,), (301,), (40, 120), (3, 5000), (5, 14, 22)]
TYPES = [torch.bfloat16, torch.float16, torch.float32]


def drawn(models: int, shape: tuple[int, ...], dtype: torch.dtype, spread: float = 0.3, seed: int = 0) -> list[Tensor]:
    """A base and models around it, as far from it as `spread` says."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    tuned = [base + spread * torch.randn(shape, generator=generator) for _ in range(models)]
    return [x.to(dtype) for x in (base, *tuned)]


def merged(method: str, tensors: list[Tensor], **arguments: Any) -> Tensor:
    """A merge of a base, where the method knows one, and models."""
    base, *tuned = tensors
    known = methods.get(method).needs_base or methods.get(method).takes_base
    given = {"base": {NAME: base}} if known else {}
    return fastmerge.merge([{NAME: x} for x in tuned], **({"method": method} | given | arguments))[NAME]


def assert_near(actual: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    """Coefficients and sums are rounded to float32, the result to its dtype, once."""
    largest = max((float(x.abs().max()) for x in (*inputs, expected) if x.numel()), default=0.0)
    assert actual.shape == expected.shape and not actual.isnan().any()
    allowed = torch.finfo(actual.dtype).eps * expected.abs() / 2 + 2.0**-21 * largest
    assert bool(((actual.double() - expected).abs() <= allowed).all()), (actual.double() - expected).abs().max()


# -- formulas, with vectors in float64 ---------------------------------------------------------------------------------


def on_great_circle(a: Tensor, b: Tensor, t: float) -> Tensor:
    """From a to b, both as long as they are."""
    cosine = (a * b).sum() / a.norm() / b.norm()
    if cosine.abs() > 0.9995:
        return (1 - t) * a + t * b
    between = cosine.clamp(-1, 1).acos()
    return ((1 - t) * between).sin() / between.sin() * a + (t * between).sin() / between.sin() * b


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, -0.5, 7.25])
def test_slerp(t: float, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for spread in (0.01, 1.5):
        tensors = drawn(1, shape, dtype, spread)
        expected = on_great_circle(*(x.double() for x in tensors), t)
        assert_near(merged("slerp", tensors, t=t), expected, [8 * x for x in tensors])


def by_weights(a: Tensor, b: Tensor, weights: list[float]) -> Tensor:
    t = weights[1] / sum(weights)
    cosine = ((a / a.norm().clamp(min=1e-7)) * (b / b.norm().clamp(min=1e-7))).sum().clamp(-1, 1)
    if float(cosine.float().abs()) == 1.0:
        return (1 - t) * a + t * b
    between = cosine.acos()
    return (((1 - t) * between).sin() * a + (t * between).sin() * b) / between.sin()


WEIGHTS = [[1.0, 3.0], [0.7, 0.7], [2.0, -0.5]]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("based", [True, False])
def test_nuslerp(based: bool, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensors = drawn(2, shape, dtype)
    base, one, other = (x.double() for x in tensors)
    if dtype != torch.float32 and based and len(shape) == 0:
        return  # deltas of one number, rounded: nothing to be near to
    for weights in WEIGHTS:
        if based:
            result, expected = merged("nuslerp", tensors, weight=weights), base + by_weights(one - base, other - base,
                                                                                             weights)  # fmt: skip
        else:
            result = merged("nuslerp", tensors, weight=weights, base=None)
            expected = by_weights(one, other, weights)
        assert_near(result, expected, [4 * x for x in tensors])


@pytest.mark.parametrize("shape", [(301,), (40, 120), (3, 5000), (120, 40), (5, 14, 22)])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("row_wise", [False, True])
def test_nuslerp_of_rows_and_of_columns(row_wise: bool, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensors = drawn(2, shape, dtype)
    base, one, other = (x.double() for x in tensors)
    axis = 0 if row_wise else -1
    vectors = [(x - base).movedim(axis, -1) for x in (one, other)]
    flat = [x.reshape(-1, x.shape[-1]) for x in vectors]
    rows = torch.stack([by_weights(a, b, [1.0, 3.0]) for a, b in zip(*flat, strict=True)])
    expected = base + rows.reshape(vectors[0].shape).movedim(-1, axis)
    result = merged("nuslerp", tensors, weight=[1.0, 3.0], nuslerp_flatten=False, nuslerp_row_wise=row_wise)
    assert_near(result, expected, tensors)
    # By rows, it is another result than by tensors.
    if len(shape) > 1:
        assert (result - merged("nuslerp", tensors, weight=[1.0, 3.0])).abs().max() > 1e-3


def in_tangent_space(vectors: list[Tensor], weights: list[float], normalize: bool) -> Tensor:
    """Multi-SLERP as it is described: to the tangent space at the mean of directions, and back to the sphere."""
    eps = 1e-8
    share = torch.tensor(weights, dtype=torch.float64)
    share = share / share.sum() if normalize else share
    norms = torch.stack([x.norm() for x in vectors])
    units = [x / (norm + eps) for x, norm in zip(vectors, norms, strict=True)]
    mean = sum(w * u for w, u in zip(share, units, strict=True))
    mean = mean / mean.norm()
    tangent = sum(w * (u - (u * mean).sum() * mean) for w, u in zip(share, units, strict=True))
    length = tangent.norm() + eps
    return (mean * length.cos() + tangent * (length.sin() / length)) * (norms * share).sum()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("based", [True, False])
def test_multislerp(based: bool, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for count in (2, 3, 8):
        tensors = drawn(count, shape, dtype, seed=count)
        weights = [0.5 + 0.3 * i for i in range(count)]
        for normalize in (True, False):
            given = {"weight": weights, "normalize_weights": normalize}
            vectors = [x.double() for x in tensors[1:]]
            if based:
                vectors = [x - tensors[0].double() for x in vectors]
                expected = tensors[0].double() + in_tangent_space(vectors, weights, normalize)
                result = merged("multislerp", tensors, **given)
            else:
                expected = in_tangent_space(vectors, weights, normalize)
                result = merged("multislerp", tensors, base=None, **given)
            if shape in ((), (1,)) and len({bool(x > 0) for x in vectors}) > 1:
                continue  # numbers of both signs cancel
            assert_near(result, expected, [2 * x for x in (*tensors, expected)])


def step_by_step(vectors: list[Tensor], steps: int = 10, tolerance: float = 1e-5) -> Tensor:
    """The Karcher mean of the directions, times the mean of the norms."""
    norms = [x.norm() for x in vectors]
    units = [x / norm for x, norm in zip(vectors, norms, strict=True)]
    mean = sum(units) / len(units)
    mean = mean / mean.norm()
    for _ in range(steps):
        tangent = torch.zeros_like(mean)
        for unit in units:
            cosine = (mean * unit).sum().clamp(-1, 1)
            between = cosine.acos()
            if between >= tolerance:
                tangent = tangent + between / between.sin() * (unit - cosine * mean) / len(units)
        length = tangent.norm()
        if length < tolerance:
            break
        mean = length.cos() * mean + length.sin() * tangent / length
        mean = mean / mean.norm()
    return sum(norms) / len(norms) * mean


@pytest.mark.parametrize("shape", [(301,), (40, 120), (3, 5000), (5, 14, 22)])
@pytest.mark.parametrize("dtype", TYPES)
def test_karcher(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for count in (2, 3, 8):
        for spread in (0.01, 3.0):
            tensors = drawn(count, shape, dtype, spread, seed=count)
            vectors = [x.double() for x in tensors[1:]]
            for steps in (10, 1):
                result = merged("karcher", tensors, max_iter=steps)
                assert_near(result, step_by_step(vectors, steps), [2 * x for x in tensors])


def test_karcher_ends_where_the_angles_balance() -> None:
    """The sum of the logarithms vanishes there; a longer norm alone does not draw it nearer."""
    tensors = drawn(3, (4000,), torch.float32, 2.0)
    tensors[2] = 5 * tensors[2]
    mean = merged("karcher", tensors, max_iter=100, tol=1e-9).double()
    units = [x.double() / x.double().norm() for x in tensors[1:]]
    direction = mean / mean.norm()
    logarithms = []
    for unit in units:
        between = (direction * unit).sum().acos()
        logarithms.append(between / between.sin() * (unit - between.cos() * direction))
    assert sum(logarithms).norm() < 1e-5 < min(each.norm() for each in logarithms)


def stock(base: Tensor, vectors: list[Tensor]) -> Tensor:
    """Between the base and the mean of the models, by the mean cosine."""
    count = len(vectors)
    cosines = [
        (a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-6) for i, a in enumerate(vectors) for b in vectors[i + 1 :]
    ]
    cosine = sum(cosines) / len(cosines)
    t = count * cosine / (1 + (count - 1) * cosine)
    return t * sum(base + x for x in vectors) / count + (1 - t) * base


@pytest.mark.parametrize("shape", [(301,), (40, 120), (3, 5000), (5, 14, 22)])
@pytest.mark.parametrize("dtype", TYPES)
def test_model_stock(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for count in (2, 3, 8):
        common = 0.5 * torch.randn(shape, generator=torch.Generator().manual_seed(99))
        base, *tuned = drawn(count, shape, torch.float32, seed=count)
        tensors = [base.to(dtype), *((x + common).to(dtype) for x in tuned)]
        vectors = [x.double() - tensors[0].double() for x in tensors[1:]]
        assert_near(merged("model_stock", tensors), stock(tensors[0].double(), vectors), tensors)
        rows = [x.reshape(-1, shape[-1]) for x in (tensors[0].double(), *vectors)]
        expected = torch.stack([stock(row[0], list(row[1:])) for row in zip(*rows, strict=True)]).view(shape)
        assert_near(merged("model_stock", tensors, filter_wise=True), expected, tensors)


@pytest.mark.parametrize("numerics", ["fp32", "mergekit"])
@pytest.mark.parametrize("dtype", TYPES)
def test_passthrough(dtype: torch.dtype, numerics: str) -> None:
    tensors = drawn(1, (40, 120), dtype)
    assert_bitwise_equal(merged("passthrough", tensors, numerics=numerics), tensors[1])
    for scale in (0.3, -2.0, 0.0):
        expected = (tensors[1].float() * torch.tensor(scale)).to(dtype)
        assert_bitwise_equal(merged("passthrough", tensors, scale=scale, numerics=numerics), expected)


# -- where vectors vanish, coincide or cancel --------------------------------------------------------------------------

ZERO, ONES = torch.zeros(50), torch.ones(50)
RAMP = torch.linspace(-1, 2, 50)
ACROSS = torch.tensor([1.0, -1.0] * 25)


def near(result: Tensor, expected: Tensor) -> bool:
    return bool((result - expected).abs().max() <= 4e-7 * expected.abs().max().clamp(min=1.0))


def test_slerp_of_vectors_that_vanish_coincide_or_cancel() -> None:
    assert near(merged("slerp", [RAMP, RAMP], t=0.3), RAMP)
    assert near(merged("slerp", [RAMP, 3 * RAMP], t=0.5), 2 * RAMP)
    assert near(merged("slerp", [RAMP, -RAMP], t=0.25), 0.5 * RAMP)
    # What has no direction is at a right angle to everything, as in the peer.
    assert near(merged("slerp", [ZERO, RAMP], t=0.5), math.sin(math.pi / 4) * RAMP)
    assert_bitwise_equal(merged("slerp", [ZERO, ZERO], t=0.5), ZERO)
    assert near(merged("slerp", [ONES, ACROSS], t=0.5), math.sqrt(0.5) * (ONES + ACROSS))


def test_nuslerp_of_vectors_that_vanish_coincide_or_cancel() -> None:
    weights = {"weight": [1.0, 3.0]}
    for form in ({}, {"nuslerp_flatten": False}):
        assert near(merged("nuslerp", [RAMP, RAMP, RAMP], **weights, **form), RAMP)
        assert near(merged("nuslerp", [ZERO, RAMP, 3 * RAMP], **weights, **form), 2.5 * RAMP)
        assert near(merged("nuslerp", [ZERO, RAMP, -RAMP], **weights, **form), -0.5 * RAMP)
        assert near(merged("nuslerp", [RAMP, RAMP, RAMP + ONES], weight=[1.0, 1.0], **form), RAMP + math.sqrt(0.5))
    assert near(merged("nuslerp", [ZERO, ONES, ACROSS], weight=[1.0, -1.0]), math.sqrt(0.5) * (ONES + ACROSS))
    # Only the proportion counts.
    once, twice = (merged("nuslerp", [RAMP, ONES, ACROSS], weight=w) for w in ([1.0, 3.0], [2.0, 6.0]))
    assert_bitwise_equal(once, twice)
    # Rows vanish and cancel one by one, and coincide with columns in a matrix of one row.
    base = torch.zeros(3, 50)
    tensors = [base, torch.stack([RAMP, RAMP, ZERO]), torch.stack([-RAMP, RAMP, ONES])]
    rows = merged("nuslerp", tensors, nuslerp_flatten=False, **weights)
    assert near(rows[:2], torch.stack([-0.5 * RAMP, RAMP])) and near(rows[2], math.sin(0.375 * math.pi) * ONES)


def test_multislerp_of_vectors_that_vanish_coincide_or_cancel() -> None:
    assert near(merged("multislerp", [ZERO, RAMP, RAMP, 4 * RAMP], weight=1.0), 2 * RAMP)
    assert near(merged("multislerp", [RAMP, RAMP, RAMP], weight=1.0), RAMP)
    # Two that cancel are added as they are; three have no mean.
    assert near(merged("multislerp", [ZERO, RAMP, -3 * RAMP], weight=[0.5, 0.5]), -RAMP)
    with pytest.raises(MergeError, match=rf"directions of {NAME} cancel out"):
        merged("multislerp", [ZERO, RAMP, -3 * RAMP, ZERO], weight=[1.0, 1.0, 1.0])
    # A tensor that no model changed, which mergekit refuses, stays the base.
    assert_bitwise_equal(merged("multislerp", [RAMP, RAMP, RAMP, RAMP], weight=[1.0, 0.7, 0.4]), RAMP)
    assert_bitwise_equal(merged("multislerp", [RAMP, RAMP, RAMP], weight=1.0, eps=0.0), RAMP)
    one = drawn(1, (33,), torch.float32)
    assert_bitwise_equal(merged("multislerp", one, weight=0.3), one[1])
    with pytest.raises(ArgumentError, match=r"add up to 0.*normalize_weights: false"):
        merged("multislerp", [ZERO, RAMP, ONES], weight=[1.0, -1.0])
    assert merged("multislerp", [ZERO, RAMP, ONES], weight=[1.0, -1.0], normalize_weights=False).isfinite().all()
    assert near(merged("multislerp", [ZERO, ZERO, RAMP], weight=1.0, eps=0.0), 0.5 * RAMP)


def test_karcher_of_vectors_that_vanish_coincide_or_cancel() -> None:
    assert near(merged("karcher", [ZERO, RAMP, RAMP, 4 * RAMP]), 2 * RAMP)
    assert_bitwise_equal(merged("karcher", [ONES, ZERO, ZERO]), ZERO)
    # What vanishes has no direction, but counts among the norms.
    assert near(merged("karcher", [ONES, ZERO, RAMP]), 0.5 * RAMP)
    # What cancels is begun with the first, and what is opposite to it leaves it there.
    assert near(merged("karcher", [ONES, RAMP, -3 * RAMP]), 2 * RAMP)
    one = drawn(1, (33,), torch.float32)
    assert_bitwise_equal(merged("karcher", one), one[1])
    assert near(merged("karcher", [ONES, RAMP, ACROSS], max_iter=0), merged("karcher", [ONES, RAMP, ACROSS]))


def test_model_stock_of_vectors_that_vanish_coincide_or_cancel() -> None:
    for form in ({}, {"filter_wise": True}):
        assert near(merged("model_stock", [RAMP, RAMP + ONES, RAMP + ONES], **form), RAMP + ONES)
        assert_bitwise_equal(merged("model_stock", [RAMP, RAMP, RAMP], **form), RAMP)
        assert near(merged("model_stock", [RAMP, RAMP + 2 * ONES, RAMP - ONES], **form), RAMP)
        assert near(merged("model_stock", [ZERO, ONES, ACROSS], **form), ZERO)
    # Norms whose product is below 1e-6 count as that.
    small = 1e-4 * ONES
    assert near(merged("model_stock", [ZERO, small, small]) / 1e-4, torch.full((50,), 2 * 0.5 / 1.5))


@pytest.mark.parametrize("method", ["slerp", "nuslerp", "multislerp", "karcher", "model_stock", "passthrough"])
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_nothing_is_merged_of_nothing(method: str, shape: tuple[int, ...]) -> None:
    count = methods.get(method).most_models or 2
    given = {"slerp": {"t": 0.5}, "nuslerp": {"weight": 1.0, "nuslerp_flatten": False}, "multislerp": {"weight": 1.0},
             "model_stock": {"filter_wise": True}}  # fmt: skip
    tensors = [torch.empty(shape, dtype=torch.bfloat16)] * (count + 1)
    assert_bitwise_equal(merged(method, tensors, **given.get(method, {})), tensors[0])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.filterwarnings("ignore:NaN or Inf")
def test_what_is_not_finite_spoils_its_vector_and_nothing_else(dtype: torch.dtype) -> None:
    base, one, other = drawn(2, (4, 60), dtype)
    for bad in (math.nan, math.inf):
        one[1, 7] = bad
        whole = merged("nuslerp", [base, one, other], weight=1.0, on_nonfinite="warn")
        assert_bitwise_equal(whole, torch.full_like(base, math.nan))
        rows = merged("nuslerp", [base, one, other], weight=1.0, nuslerp_flatten=False, on_nonfinite="warn")
        assert rows.isnan().any(dim=1).tolist() == [False, True, False, False]
        assert_bitwise_equal(rows[1], torch.full_like(rows[1], math.nan))
        assert merged("karcher", [base, one, other], on_nonfinite="warn").isnan().all()
    # Differences that float32 cannot hold, too.
    far = [torch.full((5,), 3e38), torch.full((5,), -3e38), torch.full((5,), 1.0)]
    assert merged("multislerp", far, weight=1.0).isnan().all()


def test_chunks_begin_at_blocks_and_blocks_are_added_up_as_real_numbers() -> None:
    class Norm(Slerp):
        def coefficients(self, context: TensorContext, gram: Tensor) -> Tensor:
            return gram[0]

    method = Norm()
    context = TensorContext("w", (5, 7000), method.Parameters(t=0.5), (0,))
    assert method.cut_unit(context) == GRAM_BLOCK
    blocks = torch.tensor([[[1e100, 1.0, -1e100, 2.0**-40]]], dtype=torch.float64)
    for order in ([0, 1, 2, 3], [1, 3, 0, 2], [2, 3, 1, 0]):
        assert Coefficients(method, context).finish(blocks[..., order], {}) == [1.0 + 2.0**-40]
    rows = methods.get("model_stock")
    by_rows = TensorContext("w", (5, 7000), rows.Parameters(filter_wise=True), (0, 1))
    assert rows.cut_unit(by_rows) == 7000 and rows.statistics(by_rows, whole=False) == []


# -- what a method takes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "models", "sentence"),
    [
        ("slerp", 2, "slerp merges exactly 1 model besides the base, and 2 are given"),
        ("nuslerp", 1, "nuslerp merges exactly 2 models, not counting a base, and 1 is given"),
        ("nuslerp", 3, "nuslerp merges exactly 2 models, not counting a base, and 3 are given"),
        ("model_stock", 1, "model_stock merges at least 2 models besides the base, and 1 is given"),
        ("passthrough", 2, "passthrough merges exactly 1 model, and 2 are given"),
    ],
)
def test_too_many_models_or_too_few(method: str, models: int, sentence: str, tmp_path: Any) -> None:
    tensors = drawn(models, (5,), torch.float32)
    with pytest.raises(ArgumentError, match=sentence):
        merged(method, tensors)
    base, *tuned = [{NAME: x} for x in tensors]
    paths = save_family(tmp_path, base, tuned)
    config = config_for("task_arithmetic", paths, [1.0] * models)
    config |= {"merge_method": method, "models": [{"model": str(path)} for path in paths[1:]]}
    if not (methods.get(method).needs_base or methods.get(method).takes_base):
        del config["base_model"]
    with pytest.raises(ConfigError, match=sentence):
        plan_checkpoints(config)


@pytest.mark.parametrize("method", ["slerp", "nuslerp", "multislerp", "karcher", "model_stock"])
def test_the_peers_numbers_are_refused(method: str) -> None:
    count = methods.get(method).most_models or 2
    given = {"slerp": {"t": 0.5}}.get(method, {"weight": 1.0} if "weight" in methods.parameters(method) else {})
    with pytest.raises(ArgumentError, match=f"{method} goes with numerics fp32 only"):
        merged(method, drawn(count, (5,), torch.float32), numerics="mergekit", **given)


def test_parameters_that_cannot_be_used() -> None:
    two, three = drawn(1, (5,), torch.float32), drawn(2, (5,), torch.float32)
    for method, tensors, given, sentence in [
        ("slerp", two, {}, r"slerp needs t \(tensor .*\): give it once for all models"),
        ("slerp", two, {"t": math.inf}, "t = inf"),
        ("karcher", three, {"max_iter": 2.5}, "max_iter is a whole number, 0 or more"),
        ("karcher", three, {"max_iter": -1}, "max_iter is a whole number, 0 or more"),
        ("karcher", three, {"tol": -1}, "tol is 0 or more"),
        ("multislerp", three, {"weight": 1.0, "eps": -1}, "eps is 0 or more"),
        ("nuslerp", three, {}, r"nuslerp needs weight for models\[0\]"),
        ("slerp", two, {"t": 0.5, "base": None}, "slerp needs a base, and no base is given"),
        ("ties", three, {"weight": 1.0, "filter_wise": True}, "belongs to model_stock"),
        ("ties", three, {"weight": 1.0, "t": 1}, "belongs to slerp, nearswap"),
    ]:
        with pytest.raises(ArgumentError, match=sentence):
            merged(method, tensors, **given)


def test_the_base_of_slerp_may_be_listed_in_any_place(tmp_path: Any) -> None:
    """As in the peer's YAML: its first end is the base, wherever it stands; gradients and filters of t hold."""
    base, tuned = family(1)
    paths = save_family(tmp_path / "family", base, tuned)
    listed = [{"model": str(paths[1])}, {"model": str(paths[0])}]
    t = [{"filter": "self_attn", "value": [0, 1]}, {"value": 0.5}]
    results = []
    for number, models in enumerate((listed, listed[::-1], listed[:1])):
        config = {"merge_method": "slerp", "base_model": str(paths[0]), "models": models, "parameters": {"t": t}}
        merge_checkpoints(config, tmp_path / str(number))
        results.append(load(tmp_path / str(number)))
    for name, tensor in results[0].items():
        assert_bitwise_equal(results[1][name], tensor)
        assert_bitwise_equal(results[2][name], tensor)
        layer = "layers.1" in name
        expected = fastmerge.merge(tuned, base=base, method="slerp", t=float(layer) if "self_attn" in name else 0.5)
        assert_bitwise_equal(tensor, expected[name])


def test_a_base_is_optional_to_some_and_a_model_to_others(tmp_path: Any) -> None:
    base, tuned = family(2, shapes={NAME: (30, 40)})
    paths = save_family(tmp_path / "family", base, tuned)
    models = [{"model": str(path)} for path in paths[1:]]
    for number, (method, given) in enumerate([("nuslerp", {"weight": 1.0}), ("multislerp", {"weight": 1.0}),
                                              ("karcher", {})]):  # fmt: skip
        for based in (True, False):
            config: dict[str, Any] = {"merge_method": method, "models": models, "parameters": given}
            config |= {"base_model": str(paths[0])} if based else {}
            out = tmp_path / f"{number}{based}"
            merge_checkpoints(config, out)
            in_memory = fastmerge.merge(tuned, base=base if based else None, method=method, **given)
            assert_bitwise_equal(load(out)[NAME], in_memory[NAME])
    with_base = fastmerge.merge(tuned, base=base, method="karcher")
    assert_bitwise_equal(with_base[NAME], fastmerge.merge([*tuned, base], method="karcher")[NAME])


def test_layers_may_be_scaled_by_filters(tmp_path: Any) -> None:
    base, _ = family(1)
    (path,) = save_family(tmp_path / "family", base, [])
    scale = [{"filter": "q_proj", "value": 0.5}, {"value": 1.0}]
    config = {"merge_method": "passthrough", "models": [{"model": str(path), "parameters": {"scale": scale}}]}
    merge_checkpoints(config, tmp_path / "out")
    for name, tensor in load(tmp_path / "out").items():
        assert_bitwise_equal(tensor, base[name] * 0.5 if "q_proj" in name else base[name])
