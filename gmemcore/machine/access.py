"""Arguments of host and guest accesses."""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from gmemcore.engine.arguments import U64_MAX
from gmemcore.engine.steps import ACCESS_KINDS
from gmemcore.errors import InvalidArgumentError

Data = bytes | bytearray | memoryview | NDArray[np.uint8]
"""Data that can be written to memory."""

_VARIANTS: Final = {kind: variant for variant, kind in enumerate(ACCESS_KINDS)}


def as_bytes(data: Data) -> NDArray[np.uint8]:
    """View data as uint8, shape (n,).

    Raises
    ------
    TypeError
        The data isn't contiguous bytes.
    InvalidArgumentError
        EINVAL: it is empty.
    """
    try:
        buffer = memoryview(data)  # type: ignore[arg-type]  # NumPy arrays are buffers at run time
    except TypeError:
        raise TypeError(f"data must be bytes-like, not {type(data).__name__}") from None
    if not buffer.c_contiguous:
        raise TypeError("data must be contiguous bytes")
    view = np.frombuffer(buffer, np.uint8)
    if not len(view):
        raise InvalidArgumentError("data must be at least one byte, not empty")
    return view


def check_guest_range(gpa: int, size: int) -> None:
    """Raise unless a range is at least one byte and doesn't wrap 2^64.

    Raises
    ------
    InvalidArgumentError
        EINVAL.
    """
    if size <= 0 or gpa + size > U64_MAX + 1:
        raise InvalidArgumentError(
            f"guest range {gpa:#x}+{size:#x} must be at least one byte and end at 2^64 or before"
        )


def variant_of(private: bool | None) -> int:
    """Return the index of a kind of access in `ACCESS_KINDS`.

    Raises
    ------
    TypeError
        The kind isn't True, False or None.
    """
    if private is not None and not isinstance(private, (bool, np.bool_)):
        raise TypeError(f"private must be True, False or None, not {type(private).__name__}")
    return _VARIANTS[None if private is None else bool(private)]
