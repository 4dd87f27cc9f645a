"""Sizes on the command line, written as the kernel's selftests take them: ``4k``, ``2m``, ``1g``."""

import re
from collections.abc import Sequence
from typing import Final

from gmemcore.errors import InvalidArgumentError
from gmemcore.uapi import PAGE_SIZE
from gmemcore.units import SIZE_UNITS, format_size

_SIZE: Final = re.compile(r"(0|[1-9][0-9]{0,19})([kmgt]?)", re.IGNORECASE | re.ASCII)
_LIMIT: Final = 1 << 63


def parse_size(text: str) -> int:
    """Return the bytes that a size stands for.

    Parameters
    ----------
    text : str
        A whole number and one of k, m, g, t (powers of 1024, either case), or bytes without a letter.

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
    match = _SIZE.fullmatch(text)
    if match is None:
        raise InvalidArgumentError(f"{text!r} is not a size; 4k, 2m or 1g would be accepted")
    size = int(match[1]) * SIZE_UNITS[match[2].lower()]
    if not 0 < size < _LIMIT:
        raise InvalidArgumentError(f"size {text}: more than 0 and less than 2^63 bytes would be accepted")
    if size % PAGE_SIZE:
        raise InvalidArgumentError(f"size {text}: a multiple of {format_size(PAGE_SIZE)} would be accepted")
    return size


def parse_sizes(text: str) -> tuple[int, ...]:
    """Return the bytes of each size of a comma-separated list, in order and without repetitions.

    Raises
    ------
    InvalidArgumentError
        EINVAL: as `parse_size`, for the first that is no size.
    """
    return tuple(dict.fromkeys(parse_size(part) for part in text.split(",")))


def format_sizes(sizes: Sequence[int]) -> str:
    """Return sizes as a comma-separated list."""
    return ",".join(map(format_size, sizes))
