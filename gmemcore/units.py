"""Figures as people read and type them: sizes, times, numbers and ratios."""

import re
from typing import Final

from gmemcore.errors import InvalidArgumentError
from gmemcore.uapi import PAGE_SIZE

SIZE_UNITS: Final = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
"""Letters of a size, powers of 1024, as the kernel's selftests take them."""
_SIZE: Final = re.compile(
    r"(?:0x(?P<hex>[0-9a-f]{1,16})|(?P<count>0|[1-9][0-9]{0,19}) ?(?P<unit>[kmgt]?)(?:i?b)?)",
    re.IGNORECASE | re.ASCII,
)
_SIZE_LIMIT: Final = 1 << 63
NOISY: Final = 0.10
"""Coefficient of variation above which a figure deserves a warning."""
_TIME_UNITS: Final = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))


def parse_bytes(text: str) -> int:
    """Return a number of bytes from a text, as fio takes it.

    Parameters
    ----------
    text : str
        A whole number and a unit, powers of 1024 in either case: ``4k``, ``2M``, ``1GiB``, ``512 KB``; bytes
        without a unit; or a number of bytes in hex, ``0x1000``.

    Raises
    ------
    InvalidArgumentError
        EINVAL: not a size.

    Examples
    --------
    >>> parse_bytes("2MiB"), parse_bytes("0x1000"), parse_bytes("0")
    (2097152, 4096, 0)
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise InvalidArgumentError(f"{text!r} is not a size; use 4k, 2m or 1g")
    if match["hex"] is not None:
        return int(match["hex"], 16)
    return int(match["count"]) * SIZE_UNITS[match["unit"].lower()]


def parse_size(text: str) -> int:
    """Return the bytes of a size of memory.

    Parameters
    ----------
    text : str
        As `parse_bytes` takes it.

    Returns
    -------
    int
        Bytes: a positive multiple of the page size, below 2^63.

    Raises
    ------
    InvalidArgumentError
        EINVAL: not a size, zero, too large, or not whole pages.

    Examples
    --------
    >>> parse_size("2m")
    2097152
    """
    size = parse_bytes(text)
    if not 0 < size < _SIZE_LIMIT:
        raise InvalidArgumentError(f"size {text} must be more than 0 and less than 2^63 bytes")
    if size % PAGE_SIZE:
        raise InvalidArgumentError(f"size {text} must be a multiple of {format_size(PAGE_SIZE)}")
    return size


def format_size(size: int) -> str:
    """Return a size as it would be typed, with the largest unit that divides it.

    Examples
    --------
    >>> format_size(3 << 20)
    '3m'
    """
    for letter, unit in reversed(SIZE_UNITS.items()):
        if size and size % unit == 0:
            return f"{size // unit}{letter}"
    return "0"


def binary_unit(size: float) -> tuple[int, str]:
    """Return the largest of KiB to EiB that a size has at least one of: its bytes, and its name."""
    for shift, name in ((60, "EiB"), (50, "PiB"), (40, "TiB"), (30, "GiB"), (20, "MiB")):
        if size >= 1 << shift:
            return 1 << shift, name
    return 1 << 10, "KiB"


def size_words(size: int) -> str:
    """Return a size for people, in three digits.

    Examples
    --------
    >>> size_words(4096), size_words(3 << 29)
    ('4 KiB', '1.5 GiB')
    """
    unit, name = binary_unit(size)
    return f"{size / unit:.3g} {name}" if size >= 1 << 10 else f"{size} B"


def format_bytes(size: int) -> str:
    """Return a size as it is typed where that is short, else rounded in the unit next to it."""
    typed = format_size(size)
    if len(typed) <= 5:
        return typed
    power, letter = next(unit for unit in ((40, "t"), (30, "g"), (20, "m"), (10, "k")) if size >> unit[0])
    return f"{size / (1 << power):.4g}{letter}"


def counted(n: int, thing: str) -> str:
    """Return a number of things in words, in the singular for one.

    Examples
    --------
    >>> counted(1, "huge page"), counted(1200, "huge page")
    ('1 huge page', '1,200 huge pages')
    """
    return f"{n:,} {thing}{'s' * (n != 1)}"


def format_number(figure: float | None) -> str:
    """Return three significant digits; nothing for None.

    Examples
    --------
    >>> format_number(26.2345), format_number(1234.5), format_number(None)
    ('26.2', '1,234', '')
    """
    if figure is None:
        return ""
    return f"{figure:,.0f}" if figure >= 100 else f"{figure:.3g}"


def format_ratio(figure: float | None) -> str:
    """Return two decimals, below 0.1 two digits, below 0.01 only that it is; nothing for None.

    Examples
    --------
    >>> format_ratio(1.984), format_ratio(0.0341), format_ratio(0.00341)
    ('1.98', '0.034', '<0.01')
    """
    if figure is None:
        return ""
    if 0 < figure < 0.01:
        return "<0.01"
    return f"{figure:.2f}" if figure >= 0.1 else f"{figure:.2g}"


def format_percent(share: float) -> str:
    """Return a share in percent: 0 and 100 only where it is, otherwise three digits.

    Examples
    --------
    >>> format_percent(1.0), format_percent(0.3415), format_percent(0.9999), format_percent(0.0001)
    ('100 %', '34.1 %', '>99.9 %', '<0.1 %')
    """
    if 0 < share < 0.001:
        return "<0.1 %"
    if 0.999 < share < 1:
        return ">99.9 %"
    return f"{share * 100:.3g} %"


def format_time(seconds: float | None) -> str:
    """Return a time in the unit that suits it; nothing for None.

    Examples
    --------
    >>> format_time(0.0000123)
    '12.3 µs'
    """
    if seconds is None:
        return ""
    for unit, name in _TIME_UNITS:
        if seconds >= unit:
            return f"{format_number(seconds / unit)} {name}"
    return f"{format_number(seconds * 1e9)} ns"
