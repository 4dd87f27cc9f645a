"""The one gate for numbers: what only Python can check, before anything reaches a kernel."""

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
    from gmemcore.engine.steps import Step  # which needs kernels

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
"""Arguments that may be texts, by name: bytes as ``"2m"``, attributes and flags by their names."""


def as_int(value: Any, name: str) -> int:
    """Return an exact Python int; NumPy integers are taken, bool and float are not.

    Parameters
    ----------
    value : int, NumPy integer or str
        A text where `name` is a number of bytes, attributes or flags: ``"2m"``, ``"private"``.
    name : str
        Name of the argument.

    Raises
    ------
    TypeError
        The value isn't an integer, nor a text that could stand for one.
    InvalidArgumentError
        EINVAL: a size or a name that doesn't exist.
    """
    if type(value) is int:
        return value
    if isinstance(value, str) and name in _TEXTS:
        return _TEXTS[name](value)
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}")
    return int(value)


def as_u64(value: Any, name: str) -> int:
    """Return an int that fits the interface's unsigned 64 bits.

    Raises
    ------
    TypeError
        The value isn't an integer.
    InvalidArgumentError
        EINVAL: negative, or 2**64 and more.
    """
    number = as_int(value, name)
    if not 0 <= number <= U64_MAX:
        raise InvalidArgumentError(f"{name} {number:#x} doesn't fit in 64 bits; 0 to {U64_MAX:#x} would")
    return number


def as_u64s(values: tuple[Any, ...], names: tuple[str, ...]) -> tuple[int, ...]:
    """Return several values as by `as_u64`; quick for those that are plain and fit."""
    for value in values:
        if type(value) is not int or value < 0 or value > U64_MAX:
            return tuple(as_u64(each, name) for each, name in zip(values, names, strict=True))
    return values


def as_u64_array(values: Any, name: str) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Return a one-dimensional uint64 array with exactly the values given.

    Raises
    ------
    TypeError
        Not a one-dimensional array of integers.
    InvalidArgumentError
        EINVAL: a value that doesn't fit 64 unsigned bits.
    """
    if isinstance(values, (list, tuple)):  # one by one: NumPy would make floats of mixed magnitudes
        return np.array([as_u64(value, name) for value in values], dtype=np.uint64)
    array = np.asarray(values)
    if array.ndim != 1 or (array.dtype.kind not in "ui" and array.size):
        raise TypeError(f"{name} must be a one-dimensional array of integers, not {array.dtype}{array.shape}")
    if array.dtype.kind == "i" and array.size and int(array.min()) < 0:
        raise InvalidArgumentError(f"{name} holds {int(array.min())}; 0 to {U64_MAX:#x} would be accepted")
    return np.ascontiguousarray(array, dtype=np.uint64)


def check_aligned(start: int, size: int, what: str, *, most: int | None = U64_MAX + 1) -> None:
    """Raise unless a range is at least one page, page aligned and does not wrap 2**64.

    Parameters
    ----------
    start, size : int
        Bytes.
    what : str
        The range, for the message.
    most : int or None
        Highest end. KVM's tests of the form ``start + size < start`` take an end at 2**64 for a range that
        wraps: `U64_MAX`. None: a range may wrap.

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
