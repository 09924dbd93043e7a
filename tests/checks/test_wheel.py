"""A wheel, built from the sources and installed elsewhere, works with and without its kernels."""

import pytest

from checks import wheel

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kernels", [True, False], ids=["with kernels", "without kernels"])
def test_the_wheel_works_from_an_empty_folder(kernels):
    assert wheel.problems(kernels=kernels) == []
