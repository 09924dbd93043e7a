"""A wheel, built from the sources and installed elsewhere, works with and without its kernels.

That of the variant "cuda" is not built here, for its kernels take minutes: CONTRIBUTING says when.
"""

import pytest

from checks import wheel

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("variant", ["cpu", "plain"])
def test_the_wheel_works_from_an_empty_folder(variant):
    """Of unoptimised kernels, which take a third of the time to compile and give the same bits."""
    assert wheel.problems(variant, flags="-O0") == []
