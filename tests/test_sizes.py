from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastmerge.errors import ArgumentError, ArgumentTypeError
from fastmerge.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("1", 1),
        ("17B", 17),
        ("2kB", 2000),
        ("2 KiB", 2048),
        ("500MB", 500 * 10**6),
        ("500mib", 500 * 2**20),
        (" 4GiB ", 4 * 2**30),
        ("1.5GB", 1_500_000_000),
        ("0.1GB", 100_000_000),
        ("2TB", 2 * 10**12),
        ("1TiB", 2**40),
        (12345, 12345),
    ],
)
def test_sizes_are_read_as_written(text: str | int, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "4 4GB", "-1GB", "1e9", "4XB", "0", "0.1B", "nan", "inf", "٤GB", 0, -5, 2**63]
)
def test_what_is_no_size_is_refused_by_name(text: str | int) -> None:
    with pytest.raises(ArgumentError, match="--memory-budget"):
        parse_size(text, name="--memory-budget")


@pytest.mark.parametrize("text", ["4G", "500m", "1.5k", "2 T"])
def test_a_bare_letter_is_refused_with_both_readings(text: str) -> None:
    with pytest.raises(ArgumentError, match=r"ambiguous.*B' for powers of 1000 or '.*iB' for powers of 1024"):
        parse_size(text)


@pytest.mark.parametrize("value", [None, 1.5, True, b"4GB", ["4GB"]])
def test_other_types_are_refused(value: object) -> None:
    with pytest.raises(ArgumentTypeError, match="size must be"):
        parse_size(value)  # type: ignore[arg-type]


def test_sizes_are_written_with_three_digits() -> None:
    written = [format_size(n) for n in (0, 17, 999, 1000, 12_345, 999_499, 999_500, 1_101_004_800, 2 * 10**15)]
    assert written == ["0 B", "17 B", "999 B", "1.00 kB", "12.3 kB", "999 kB", "1.00 MB", "1.10 GB", "2000 TB"]
    assert format_size(4 * 2**30, binary=True) == "4.00 GiB"


@given(st.integers(1, 10**15))
def test_a_written_size_is_read_back_within_three_digits(nbytes: int) -> None:
    # Half of the third digit, and the part of a byte that reading cuts off.
    for read in (parse_size(format_size(nbytes)), parse_size(format_size(nbytes, binary=True))):
        assert abs(read - nbytes) <= 5.1e-3 * nbytes + 1
