"""Light experts: every backend against the definition bit for bit, and what is promised about putting on and off."""

from __future__ import annotations

import math
import random
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastmerge import ops
from fastmerge.errors import ArgumentError, ArgumentTypeError
from fastmerge.ops.expert import rows_of
from fastmerge.reference import expert as definition
from tests import strategies
from tests.numeric import assert_bitwise_equal, bits
from tests.ops.running import configurations, each_backend, only

keeps = st.one_of(st.sampled_from((0.0, 0.01, 0.05, 0.1, 0.5, 1.0)), st.floats(0, 1))
scales = st.one_of(st.sampled_from((1.0, 0.0, -0.5, 5.1)), st.floats(-8, 8))


def plainly(delta: Tensor, k: int) -> Tensor:
    """Which elements are kept, by a stable sort of each row."""
    rows, width = rows_of(delta.shape)
    kept = torch.zeros(rows, width, dtype=torch.bool)
    for row, mask in zip(delta.reshape(rows, width).tolist(), kept):
        order = sorted(range(width), key=lambda i: (not math.isnan(row[i]), -abs(row[i]) if row[i] == row[i] else 0, i))
        mask[order[:k]] = True
    return kept


@each_backend
@given(data=st.data())
def test_extract(backend: str, data: st.DataObject) -> None:
    data.draw(configurations(backend))
    models = data.draw(strategies.models(most=1))
    (x,) = models.tensors
    k = ops.expert_k(rows_of(x.shape)[1], data.draw(keeps))
    dtype = data.draw(strategies.dtypes)
    arguments = (models.base, x, k, dtype)
    expected = torch.ops.fastmerge.expert_extract(*arguments, "reference")
    with only(backend, "expert_extract"):
        actual = torch.ops.fastmerge.expert_extract(*arguments, backend)
    for one, other in zip(actual, expected):
        assert_bitwise_equal(one, other)


@given(data=st.data())
def test_the_definition_keeps_the_largest_of_each_row(data: st.DataObject) -> None:
    x = data.draw(strategies.tensors(shape=data.draw(strategies.shapes(blocks=False))))
    keep = data.draw(keeps)
    expert = ops.extract_expert(x, keep, backend="reference")
    rows, width = rows_of(x.shape)
    kept = plainly(x, int(width * keep))
    columns = [row.nonzero().reshape(-1).tolist() for row in kept]
    assert expert.columns.to(torch.int64).tolist() == columns
    assert torch.equal(
        expert.values.nan_to_num(7.0), x.reshape(rows, width)[kept].view(expert.values.shape).nan_to_num(7.0)
    )
    dense = torch.where(kept.view(x.shape), x, torch.zeros((), dtype=x.dtype))
    assert torch.equal(expert.dense().nan_to_num(7.0), dense.nan_to_num(7.0))


class Case:
    """Tensors, and for each some experts of its shape: several meet at places, some keep nothing."""

    def __init__(self, data: st.DataObject, most: int = 3) -> None:
        self.tensors: list[Tensor] = []
        self.parts: list[ops.ExpertPart] = []
        replaced = data.draw(st.booleans())
        for of in range(data.draw(st.integers(1, 3))):
            shape = data.draw(strategies.shapes(blocks=False))
            dtype = data.draw(strategies.dtypes)
            target = data.draw(strategies.values(math.prod(shape), dtype)).view(shape)
            if of % 2 and target.numel():  # an address that suits nobody
                memory = bytearray(3) + bytearray(target.reshape(-1).view(torch.uint8).numpy().tobytes())
                target = torch.frombuffer(memory, dtype=dtype, count=target.numel(), offset=3).view(shape)
            self.tensors.append(target)
            base = data.draw(strategies.tensors(shape=shape)) if replaced else None
            if base is not None and data.draw(st.booleans()):
                base = torch.where(torch.arange(base.numel()).view(shape) % 3 == 0, target.to(base.dtype), base)
            for _ in range(data.draw(st.integers(0, most))):
                expert = ops.extract_expert(data.draw(strategies.tensors(shape=shape)), data.draw(keeps))
                kept = None if base is None else expert.at(base)
                self.parts.append(expert.part(of, data.draw(scales), kept))

    def copies(self) -> list[Tensor]:
        return [x.clone() for x in self.tensors]


@each_backend
@given(data=st.data())
def test_apply_and_revert(backend: str, data: st.DataObject) -> None:
    data.draw(configurations(backend))
    case = Case(data)
    expected, actual = case.copies(), case.tensors
    before = case.copies()
    expected_saved = ops.expert_apply_(expected, case.parts, backend="reference")
    with only(backend, "expert_apply_"):
        saved = ops.expert_apply_(actual, case.parts, backend=backend)
    assert_bitwise_equal(saved, expected_saved)
    for one, other in zip(actual, expected):
        assert_bitwise_equal(one, other)
    worn = [x.clone() for x in actual]

    spot = data.draw(st.integers(0, 200))
    touched = [at for at, part in enumerate(case.parts) if part.columns.numel()]
    if touched:
        part = case.parts[touched[spot % len(touched)]]
        x = actual[part.of]
        width = rows_of(x.shape)[1]
        entry = spot % part.columns.numel()
        column = int(part.columns.reshape(-1)[entry].to(torch.int64))
        place = entry // part.columns.shape[1] * width + column
        whole = x.view(-1).view(torch.int16 if x.element_size() == 2 else torch.int32)
        whole[place] ^= 1
        for which in (backend, "reference"):
            changed = ops.expert_revert_(actual, case.parts, saved, backend=which)
            assert changed == [int(t == part.of) for t in range(len(actual))]
        whole[place] ^= 1
    for one, other in zip(actual, worn):
        assert_bitwise_equal(one, other)  # a refusal has written nothing

    with only(backend, "expert_revert_"):
        assert not any(ops.expert_revert_(actual, case.parts, saved, backend=backend))
    for one, other in zip(actual, before):
        assert_bitwise_equal(one, other)


@given(data=st.data())
def test_the_definition_adds_in_float32_and_rounds_once(data: st.DataObject) -> None:
    case = Case(data)
    before = case.copies()
    ops.expert_apply_(case.tensors, case.parts, backend="reference")
    for of, (old, new) in enumerate(zip(before, case.tensors)):
        own = [part for part in case.parts if part.of == of]
        rows, width = rows_of(old.shape)
        for row in range(min(rows, 3)):
            total: dict[int, Tensor] = {}
            theta = old.reshape(rows, width)[row].float()
            for part in own:
                for j, column in enumerate(part.columns[row].tolist()):
                    total.setdefault(column, theta[column])
                    if (
                        part.base is not None
                        and part.values[row, j] != 0
                        and theta[column] != part.base[row, j].float()
                    ):
                        total[column] = part.base[row, j].float()
            for part in own:
                for j, column in enumerate(part.columns[row].tolist()):
                    total[column] = total[column] + part.values[row, j].float() * torch.tensor(part.scale)
            for column in range(width):
                actual = new.reshape(rows, width)[row, column]
                if column in total:
                    assert torch.equal(actual.nan_to_num(7.0), total[column].to(new.dtype).nan_to_num(7.0))
                else:
                    assert_bitwise_equal(actual, old.reshape(rows, width)[row, column])


class Walked(list[Any]):
    """A list that counts how often it is walked through."""

    walks = 0

    def __iter__(self) -> Iterator[Any]:
        self.walks += 1
        return super().__iter__()


def test_the_definition_bears_models_of_many_tensors() -> None:
    """GPUs run it: the list of parts is not walked for each tensor, and no second copy of the model is held."""
    expert = ops.extract_expert(torch.randn(2, 100), 0.02)
    tensors = [torch.zeros(2, 100) for _ in range(50)]
    parts = Walked(expert.part(of) for of in range(50))
    saved = definition.expert_apply_(tensors, parts)
    with Held() as held:
        assert not definition.expert_revert_(tensors, parts, saved).any()
    assert all(not x.any() for x in tensors)
    assert parts.walks < 10
    assert held.most < 10 * tensors[0].nbytes


class Held(TorchDispatchMode):
    """How many bytes of new tensors are held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not any(result is given for given in args) and result._base is None:
            self.now += result.nbytes
            self.most = max(self.most, self.now)
            weakref.finalize(result, self._gone, result.nbytes)
        return result

    def _gone(self, nbytes: int) -> None:
        self.now -= nbytes


@each_backend
def test_rows_wider_than_16_bits(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 70_001, generator=generator)
    expert = ops.extract_expert(x, 0.001, backend=backend)
    assert expert.columns.dtype == torch.int32 and int(expert.columns.max()) > 65536
    assert torch.equal(expert.dense() != 0, plainly(x, 70).view(x.shape))
    target = torch.randn(x.shape, generator=generator)
    before = target.clone()
    expert.apply_(target, 2.0, backend=backend)
    assert_bitwise_equal(target, torch.where(expert.dense() != 0, before + 2.0 * expert.dense(), before))
    expert.revert_(target, backend=backend)
    assert_bitwise_equal(target, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_hundred_random_switches_end_with_the_same_bits(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    target = torch.randn(37, 211, generator=generator).to(dtype)
    before = target.clone()
    experts = [ops.extract_expert(torch.randn(37, 211, generator=generator).to(dtype), 0.05) for _ in range(4)]
    drawn = random.Random(2)
    for _ in range(100):
        worn = drawn.sample(experts, drawn.randint(1, 4))
        for expert in worn:
            expert.apply_(target, drawn.uniform(-3, 3))
        assert not torch.equal(bits(target), bits(before))
        for expert in reversed(worn):
            expert.revert_(target)
    assert_bitwise_equal(target, before)


def test_a_row_too_narrow_keeps_nothing() -> None:
    expert = ops.extract_expert(torch.randn(4, 99), 0.01)
    assert expert.k == 0 and expert.columns.shape == (4, 0)
    x = torch.randn(4, 99)
    before = x.clone()
    expert.apply_(x)
    assert_bitwise_equal(x, before)
    expert.revert_(x)


@pytest.mark.parametrize(
    ("keep", "kept", "delta", "expected"),
    [
        (0.1, [0.2], [0.5], 4.0),
        (0.01, [1.0, 3.0], [1.0, 1.0], 400.0),
        (1.0, [1.0], [1.0], 0.0),
        (0.5, [0.0], [0.0], 1.0),
    ],
)
def test_rescale(keep: float, kept: list[float], delta: list[float], expected: float) -> None:
    assert ops.expert_rescale(keep, kept, delta) == pytest.approx(expected, abs=1e-12)


class TestRefusals:
    def setup_method(self) -> None:
        self.x = torch.arange(24.0).view(4, 6)
        self.expert = ops.extract_expert(self.x, 0.5)

    def test_put_on_twice(self) -> None:
        self.expert.apply_(self.x)
        with pytest.raises(ArgumentError, match="on a tensor already"):
            self.expert.apply_(self.x.clone())

    def test_taken_off_without_having_been_on(self) -> None:
        with pytest.raises(ArgumentError, match="not on a tensor"):
            self.expert.revert_(self.x)

    def test_taken_off_another_tensor(self) -> None:
        self.expert.apply_(self.x)
        with pytest.raises(ArgumentError, match="on another tensor"):
            self.expert.revert_(self.x.clone())

    def test_changed_meanwhile(self) -> None:
        before = self.x.clone()
        self.expert.apply_(self.x, 0.25)
        worn = self.x.clone()
        self.x[2, 5] += 1
        with pytest.raises(ArgumentError, match="1 of the places .* Nothing was taken off"):
            self.expert.revert_(self.x)
        self.x[2, 5] -= 1
        assert_bitwise_equal(self.x, worn)
        self.expert.revert_(self.x)
        assert_bitwise_equal(self.x, before)

    @pytest.mark.parametrize(
        ("target", "message"),
        [
            (torch.zeros(6, 4), "has shape"),
            (torch.zeros(6, 4).T, "not contiguous"),
            (torch.zeros(4, 6, dtype=torch.float64), "float64"),
            (torch.zeros(4, 6, dtype=torch.int64), "int64"),
            ("x", "must be a torch.Tensor"),
        ],
    )
    def test_targets(self, target: object, message: str) -> None:
        with pytest.raises((ArgumentError, ArgumentTypeError), match=message):
            self.expert.apply_(target)  # type: ignore[arg-type]

    @pytest.mark.parametrize("keep", [-0.1, 1.5, math.nan, "x"])
    def test_keep(self, keep: object) -> None:
        with pytest.raises((ArgumentError, ArgumentTypeError), match="keep"):
            ops.extract_expert(self.x, keep)  # type: ignore[arg-type]

    def test_scope(self) -> None:
        with pytest.raises(ArgumentError, match="scope"):
            ops.extract_expert(self.x, 0.5, scope="tensor")

    @each_backend
    def test_a_column_beyond_its_row_is_refused_before_anything_is_written(self, backend: str) -> None:
        if backend != "cpu":
            return  # plain torch refuses an index beyond the tensor by itself
        columns = self.expert.columns.clone()
        columns[3, 2] = 6
        x = self.x.clone()
        with pytest.raises(ValueError, match="beyond its row"):
            ops.expert_apply_([x], [ops.ExpertPart(0, columns, self.expert.values, 1.0)], backend=backend)
        assert_bitwise_equal(x, self.x)

    @each_backend
    def test_tensors_that_share_memory(self, backend: str) -> None:
        """Their old bits could not be put back, as each would be taken for the other's changed values."""
        memory = torch.arange(36.0)
        for other in (memory[:24], memory[6:30], memory[12:36]):
            tensors = [memory[:24].view(4, 6), other.view(4, 6)]
            with pytest.raises(ArgumentError, match=r"tensors\[0\] and tensors\[1\] share memory"):
                ops.expert_apply_(tensors, [self.expert.part(0), self.expert.part(1)], backend=backend)
            assert torch.equal(memory, torch.arange(36.0))
            saved = ops.expert_apply_(tensors, [self.expert.part(1)], backend=backend)
            assert not any(ops.expert_revert_(tensors, [self.expert.part(1)], saved, backend=backend))

    @pytest.mark.parametrize("scale", [1e39, -1e300, math.inf, math.nan])
    def test_a_scale_that_is_not_finite_in_float32(self, scale: float) -> None:
        part = ops.ExpertPart(0, self.expert.columns, self.expert.values, scale)
        with pytest.raises(ArgumentError, match="is not finite in float32"):
            ops.expert_apply_([self.x], [part])
        assert torch.equal(self.x, torch.arange(24.0).view(4, 6))

    @pytest.mark.parametrize("row", [[1, 1, 4], [2, 1, 4], [1, 4, 6], [0, 1, 65535]])
    def test_columns_that_do_not_rise_within_their_row(self, row: list[int]) -> None:
        columns = torch.tensor([[0, 1, 2], row], dtype=torch.uint16)
        with pytest.raises(ArgumentError, match="columns must rise within each row"):
            ops.Expert((2, 6), columns, torch.ones(2, 3))

    def test_negative_columns(self) -> None:
        columns = torch.tensor([[-1, 1]], dtype=torch.int32)
        with pytest.raises(ArgumentError, match="columns must rise within each row"):
            ops.Expert((1, 70_000), columns, torch.ones(1, 2))

    def test_an_expert_is_no_part(self) -> None:
        with pytest.raises(ArgumentTypeError, match=r"holds Expert, not ExpertPart; expert\.part"):
            ops.expert_apply_([self.x], [self.expert])  # type: ignore[list-item]

    @pytest.mark.parametrize("dtype", [torch.float64, torch.int32, "bf16"])
    def test_dtype(self, dtype: object) -> None:
        with pytest.raises(ArgumentTypeError, match="^dtype="):
            ops.extract_expert(self.x, 0.5, dtype=dtype)  # type: ignore[arg-type]

    def test_parts_that_do_not_fit(self) -> None:
        part = self.expert.part()
        for parts, message in (
            ([self.expert.part(1)], "of must name"),
            ([ops.ExpertPart(0, part.columns[:2], part.values, 1.0)], "columns"),
            ([ops.ExpertPart(0, part.columns, part.values[:, :1], 1.0)], "values"),
            ([part, self.expert.part(0, 1.0, part.values)], "to all or to none"),
            ([ops.ExpertPart(0, part.columns.int(), part.values, 1.0)], "columns"),
        ):
            with pytest.raises(ArgumentError, match=message):
                ops.expert_apply_([self.x], parts)
        saved = ops.expert_apply_([self.x], [part])
        with pytest.raises(ArgumentError, match="saved"):
            ops.expert_revert_([self.x], [part], saved[1:])
