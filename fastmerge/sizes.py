"""Sizes in bytes, as people write them and as people read them.

Decimal units (kB, MB, GB, TB) are powers of 1000 and binary units (KiB, MiB, GiB, TiB) powers of 1024, as on disks and
in memory. A bare letter ("4G") is refused: tools disagree on what it means by up to 10 %, which is the difference
between fitting in memory and not.
"""

from __future__ import annotations

import re
from fractions import Fraction

from fastmerge.errors import ArgumentError, ArgumentTypeError

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{letter}b": 1000**power for power, letter in enumerate("kmgt", start=1)}
_UNITS |= {f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", start=1)}
_PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", re.ASCII)
_LARGEST = 2**63 - 1


def parse_size(size: str | int, *, name: str = "size") -> int:
    """Turn ``"4GiB"``, ``"500MB"``, ``"1.5 GB"``, ``"1048576"`` or an int into a number of bytes.

    Args:
        size: a positive int (bytes), or a number with an optional unit: B, kB, MB, GB, TB (powers of 1000) or
            KiB, MiB, GiB, TiB (powers of 1024); case does not matter. Fractions of a byte are dropped.
        name: what the size is of, for the error message, such as ``"memory_budget"``.

    Returns:
        The size in bytes, at least 1.

    Raises:
        ArgumentError: the text is not a size, or it is below 1 byte or above 2**63 - 1 bytes.
        ArgumentTypeError: ``size`` is neither a string nor an int.
    """
    if isinstance(size, bool) or not isinstance(size, (str, int)):
        raise ArgumentTypeError(f"{name} must be a number of bytes or a text such as '4GiB', not {size!r}.")
    if isinstance(size, int):
        nbytes = size
    else:
        match = _PATTERN.fullmatch(size)
        unit = match.group(2).lower() if match else None
        if match and unit in ("k", "m", "g", "t"):
            short = f"{match.group(1)}{unit.upper()}"
            raise ArgumentError(
                f"{name} {size!r} is ambiguous: write '{short}B' for powers of 1000 or '{short}iB' for powers of 1024."
            )
        if match is None or unit not in _UNITS:
            raise ArgumentError(f"{name} {size!r} is not a size: write a number and a unit, such as '4GiB' or '500MB'.")
        nbytes = int(Fraction(match.group(1)) * _UNITS[unit])
    if not 1 <= nbytes <= _LARGEST:
        raise ArgumentError(f"{name} must be between 1 byte and 2**63 - 1 bytes, not {size!r}.")
    return nbytes


def format_size(nbytes: float, *, binary: bool = False) -> str:
    """Write a number of bytes for a reader: three significant digits and a decimal unit (or a binary one).

    >>> format_size(1_101_004_800), format_size(4 * 2**30, binary=True), format_size(17)
    ('1.10 GB', '4.00 GiB', '17 B')
    """
    step, units = (1024, ("B", "KiB", "MiB", "GiB", "TiB")) if binary else (1000, ("B", "kB", "MB", "GB", "TB"))
    value = float(nbytes)
    index = 0
    # 999.5 already reads as "1000" with three digits, so it moves on to the next unit.
    while abs(value) >= step - 0.5 and index < len(units) - 1:
        value /= step
        index += 1
    if index == 0:
        return f"{value:.0f} B"
    decimals = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{decimals}f} {units[index]}"
