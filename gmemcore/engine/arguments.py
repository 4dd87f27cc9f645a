"""Conversion of arguments to unsigned 64-bit integers, the only type that kernels take."""

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import numpy as np

from gmemcore.errors import InvalidArgumentError
from gmemcore.names import bits, plain
from gmemcore.policy import content_flags
from gmemcore.uapi import PAGE_SIZE, ContentMode, FallocateMode, GuestMemfdFlag, MemoryAttribute
from gmemcore.units import parse_bytes

U64_MAX = (1 << 64) - 1


def _as_content_mode(text: str) -> int:
    return bits(ContentMode, text, ((flag.name, flag.bit) for flag in content_flags()))


def _as_attributes(text: str) -> int:
    private = int(MemoryAttribute.PRIVATE)
    return bits(MemoryAttribute, text, (("TO_PRIVATE", private), ("TO_SHARED", 0)))


def _as_bytes(text: str) -> int:
    if text.isdecimal():
        raise TypeError(f"a size must be an integer or have a unit, as '4k', not {text!r}")
    return parse_bytes(text)


def _as_step(text: str) -> int:
    from gmemcore.engine.steps import Step  # imports kernels

    if plain(text) not in Step.__members__:
        raise InvalidArgumentError(f"unknown step {text!r}; known: {', '.join(Step.__members__)}")
    return int(Step[plain(text)])


_TEXTS: Final[dict[str, Callable[[str], int]]] = {
    **dict.fromkeys(("address", "offset", "offsets", "gpa", "gmem_offset", "size", "sizes"), _as_bytes),
    "attributes": _as_attributes,
    "flags": _as_content_mode,
    "guest_memfd flags": partial(bits, GuestMemfdFlag),
    "mode": partial(bits, FallocateMode),
    "steps": _as_step,
}
"""Parsers of arguments that can be strings: sizes as ``"2m"``, attributes and flags by name."""


def as_int(value: Any, name: str) -> int:
    """Return an integer as an int. bool and float aren't integers.

    Parameters
    ----------
    value : int, NumPy integer or str
        A string only for sizes, attributes and flags: ``"2m"``, ``"private"``.
    name : str
        Name of the argument.

    Raises
    ------
    TypeError
        The value isn't an integer, nor a string that this argument can be.
    InvalidArgumentError
        EINVAL: a string that isn't a size or a known name.
    """
    if type(value) is int:
        return value
    if isinstance(value, str) and name in _TEXTS:
        return _TEXTS[name](value)
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}")
    return int(value)


def as_u64(value: Any, name: str) -> int:
    """Return an unsigned 64-bit integer as an int.

    Raises
    ------
    TypeError
        The value isn't an integer.
    InvalidArgumentError
        EINVAL: it is negative or at least 2**64.
    """
    number = as_int(value, name)
    if not 0 <= number <= U64_MAX:
        raise InvalidArgumentError(f"{name} {number:#x} doesn't fit in 64 bits; it must be 0 to {U64_MAX:#x}")
    return number


def as_u64s(values: tuple[Any, ...], names: tuple[str, ...]) -> tuple[int, ...]:
    """Apply `as_u64` to several values; fast if all of them are such ints."""
    for value in values:
        if type(value) is not int or value < 0 or value > U64_MAX:
            return tuple(as_u64(each, name) for each, name in zip(values, names, strict=True))
    return values


def as_u64_array(values: Any, name: str) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Return integers as a one-dimensional uint64 array.

    Raises
    ------
    TypeError
        The values aren't a one-dimensional array of integers.
    InvalidArgumentError
        EINVAL: one is negative or at least 2**64.
    """
    if isinstance(values, (list, tuple)):  # one by one: NumPy makes floats of large and negative integers
        return np.array([as_u64(value, name) for value in values], dtype=np.uint64)
    array = np.asarray(values)
    if array.ndim != 1 or (array.dtype.kind not in "ui" and array.size):
        raise TypeError(f"{name} must be a one-dimensional array of integers, not {array.dtype}{array.shape}")
    if array.dtype.kind == "i" and array.size and int(array.min()) < 0:
        raise InvalidArgumentError(f"{name} must be 0 to {U64_MAX:#x}, not {int(array.min())}")
    return np.ascontiguousarray(array, dtype=np.uint64)


def check_aligned(start: int, size: int, what: str, *, most: int | None = U64_MAX + 1) -> None:
    """Raise unless a range is at least one page, page aligned and doesn't wrap 2**64.

    Parameters
    ----------
    start, size : int
        Bytes.
    what : str
        The range, for the message.
    most : int or None
        Highest end. `U64_MAX` where KVM tests ``start + size < start``, to which an end at 2**64 wraps.
        None: the range can wrap.

    Raises
    ------
    InvalidArgumentError
        EINVAL.
    """
    if size <= 0:
        raise InvalidArgumentError(f"{what} {start:#x}+{size:#x} is empty; it must be at least one page")
    if most is not None and start + size > most:
        raise InvalidArgumentError(
            f"{what} {start:#x}+{size:#x} wraps 2^64; it must end at {most:#x} or before"
        )
    if (start | size) % PAGE_SIZE:
        raise InvalidArgumentError(
            f"{what} {start:#x}+{size:#x} isn't page aligned; both must be multiples of {PAGE_SIZE:#x}"
        )
