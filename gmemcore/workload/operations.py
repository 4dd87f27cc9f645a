"""Operations: the one form in which behaviours, traces and stress runs say what happens to a guest's memory.

A stream of operations is a structured array (or an iterator of such arrays), addressed by guest physical
address. It names no VM type and no revision, so that the same stream runs on all of them.
"""

from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

OPERATION = np.dtype(
    [
        ("step", "<u2"),  # gmemcore.engine.steps.Step
        ("variant", "<u2"),  # Access of a guest access, index of the page type of a populate, else 0
        ("guest", "<u4"),  # which guest of a fleet; 0 in a trace of one
        ("gpa", "<u8"),  # bytes
        ("size", "<u8"),  # bytes
        ("attributes", "<u8"),  # of a conversion: 8 (PRIVATE) or 0 (shared)
        ("flags", "<u8"),  # of a conversion: its content mode
        ("time_ns", "<u8"),  # when it was seen, from the start of the trace; 0 where nobody knows
    ]
)
"""One operation: 48 bytes, little-endian, the same in memory and in files."""

Operations = NDArray[Any]
"""A structured array of `OPERATION`, shape (n,)."""


class Access(IntEnum):
    """Kind of a guest's access, which it chooses on SNP and TDX."""

    AS_ATTRIBUTE = 0
    SHARED = 1
    PRIVATE = 2


def empty_operations(n: int) -> Operations:
    """Return n operations, all zero."""
    return np.zeros(n, OPERATION)
