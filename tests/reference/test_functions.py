"""exp, tanh, log: within the stated distance of the exact values in every binade, the same bits in every backend."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastmerge import backends
from fastmerge.reference import functions
from tests.numeric import assert_bitwise_equal, bits
from tests.ops.running import restored

FUNCTIONS = {"exp": functions.exp, "tanh": functions.tanh, "log": functions.log}
EXACT = {"exp": torch.exp, "tanh": torch.tanh, "log": torch.log}
BOUNDS = {"exp": 1.0, "tanh": 2.7, "log": 0.9}
"""In units of the last place, as the docstrings state them."""

each_function = pytest.mark.parametrize("name", FUNCTIONS)
cpu_needed = pytest.mark.skipif(
    backends.available()["cpu"] is not None, reason="no cpu backend was built, so there are no instruction sets"
)


def every_binade(signs: tuple[int, ...] = (0, 1)) -> Tensor:
    """The ends of each binade of float32 (the denormals are one) and values between them, drawn and evenly spaced."""
    generator = torch.Generator().manual_seed(7)
    drawn = torch.randint(0, 1 << 23, (2000,), generator=generator)
    ends = torch.tensor([0, 1, 2, (1 << 22) - 1, 1 << 22, (1 << 23) - 2, (1 << 23) - 1])
    mantissas = torch.cat([ends, drawn, torch.arange(0, 1 << 23, 1 << 13)])
    patterns = (torch.arange(255)[:, None] << 23 | mantissas).reshape(-1)
    return torch.cat([(patterns - (sign << 31)).to(torch.int32) for sign in signs]).view(torch.float32)


def near(*values: float) -> Tensor:
    """A few thousand float32 values on either side of each of these."""
    patterns = torch.tensor(values, dtype=torch.float32).view(torch.int32)[:, None] + torch.arange(-3000, 3001)
    return patterns.reshape(-1).to(torch.int32).view(torch.float32)


def distance(result: Tensor, exact: Tensor) -> Tensor:
    """|result - exact| in units of the last place of float32 at the exact value; denormals have those of 2**-126."""
    _, exponent = torch.frexp(exact)
    unit = torch.ldexp(torch.ones_like(exact), exponent.clamp(min=-125).to(torch.float64) - 24)
    return (result.to(torch.float64) - exact).abs() / unit


def hard_places() -> Tensor:
    """Where results become 0, denormal, infinite or 1, where arguments are clamped, and where k changes."""
    changes = [(k + 0.5) * math.log(2) for k in range(-151, 130)]
    places = (-104.0, -103.97208, -87.33655, 88.72284, 89.0, 10.0, 9.010914, 1.0, *changes, *(c / 2 for c in changes))
    return near(*places, math.sqrt(0.5), math.sqrt(2.0), 1.3971704)


@each_function
def test_the_distance_to_the_exact_value(name: str) -> None:
    x = torch.cat([every_binade(), hard_places()])
    result, exact = FUNCTIONS[name](x), EXACT[name](x.to(torch.float64))
    rounded = exact.to(torch.float32)
    assert torch.equal(result.isinf(), rounded.isinf()) and torch.equal(result.isnan(), rounded.isnan())
    finite = rounded.isfinite()
    assert distance(result[finite], exact[finite]).max() <= BOUNDS[name]


def test_exp_at_its_ends() -> None:
    limits = torch.tensor([-math.inf, -3e38, -104.0, -1e-45, -0.0, 0.0, 1e-45, 88.5, 3e38, math.inf])
    result = functions.exp(limits)
    assert result.tolist() == [0, 0, 0, 1, 1, 1, 1, pytest.approx(math.exp(88.5)), math.inf, math.inf]
    assert not torch.signbit(result).any()
    denormal = functions.exp(torch.linspace(-103.9, -87.4, 5000))
    assert ((denormal > 0) & (denormal < 2.0**-126)).all()


def test_tanh_is_odd_and_stays_within_one() -> None:
    x = torch.cat([every_binade((0,)), hard_places().abs()])
    result = functions.tanh(x)
    assert_bitwise_equal(functions.tanh(-x), -result)
    assert ((result >= 0) & (result <= 1)).all()
    assert (result[x >= 9.02] == 1).all()


def test_tanh_of_the_tiny_is_itself() -> None:
    x = every_binade()
    x = x[x.abs() < 2.0**-25]
    assert_bitwise_equal(functions.tanh(x), x)
    assert bits(functions.tanh(torch.tensor([0.0, -0.0]))).tolist() == [0, -(2**31)]


def test_tanh_of_infinity() -> None:
    assert functions.tanh(torch.tensor([math.inf, -math.inf])).tolist() == [1, -1]


def test_log_at_its_ends() -> None:
    limits = torch.tensor([0.0, -0.0, -1.0, -1e-45, -math.inf, math.inf, 1.0, 1e-45])
    result = functions.log(limits)
    assert result[:2].tolist() == [-math.inf, -math.inf] and result[2:5].isnan().all()
    assert result[5:7].tolist() == [math.inf, 0.0] and not torch.signbit(result[6])
    assert result[7].item() == pytest.approx(-149 * math.log(2))


def test_log_loses_nothing_near_one() -> None:
    x = near(1.0)
    torch.testing.assert_close(functions.log(x).double(), torch.log1p(x.double() - 1), rtol=1.2e-7, atol=0)


@each_function
def test_nan_stays_nan(name: str) -> None:
    patterns = torch.tensor([0x7FC00000, 0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF, -0x400000], dtype=torch.int32)
    assert FUNCTIONS[name](patterns.view(torch.float32)).isnan().all()


@each_function
@pytest.mark.parametrize("shape", [(0,), (), (1,), (3, 5)])
def test_shapes(name: str, shape: tuple[int, ...]) -> None:
    assert FUNCTIONS[name](torch.zeros(shape)).shape == shape


@cpu_needed
@each_function
def test_every_instruction_set_gives_the_same_bits(name: str) -> None:
    cpu = backends.resolve("cpu")
    x = torch.cat([every_binade(), hard_places()])
    expected = FUNCTIONS[name](x)
    with restored("cpu"):
        for isa in cpu.isas():
            cpu.set_isa(isa)
            for part in (slice(None), slice(3, 10), slice(1, 2), slice(0, 0)):
                assert_bitwise_equal(cpu.functions(x[part], name), expected[part])
            assert cpu.functions(torch.tensor([math.nan, -math.nan]), name).isnan().all()
