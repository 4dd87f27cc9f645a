"""Figures as people read and type them: sizes, times, numbers and ratios."""

from typing import Final

SIZE_UNITS: Final = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
"""Letters of a size, powers of 1024, as the kernel's selftests take them."""
_TIME_UNITS: Final = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))


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


def format_number(figure: float | None) -> str:
    """Return three significant digits; nothing for None.

    Examples
    --------
    >>> format_number(26.2345), format_number(1234.5), format_number(None)
    ('26.2', '1234', '')
    """
    if figure is None:
        return ""
    return f"{figure:.0f}" if figure >= 100 else f"{figure:.3g}"


def format_ratio(figure: float | None) -> str:
    """Return two decimals, or two digits where those would be zeros; nothing for None."""
    if figure is None:
        return ""
    return f"{figure:.2f}" if figure >= 0.1 else f"{figure:.2g}"


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
