"""Operations: the one form in which behaviours, traces and stress runs say what happens to a guest's memory.

A stream of operations is a structured array (or an iterator of such arrays), addressed by guest physical
address. It names no VM type and no revision, so that the same stream runs on all of them.
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from gmemcore.engine.steps import Step
from gmemcore.errors import InvalidArgumentError
from gmemcore.uapi import PageType

OPERATION = np.dtype(
    [
        ("step", "<u2"),  # gmemcore.engine.steps.Step
        ("variant", "<u2"),  # Access of a guest access; of a populate index of PageType, FROM_SOURCE; else 0
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

LOOPS: Final = "gmemcore.workload.loops"
"""The module of compiled loops over operations."""


class Access(IntEnum):
    """Kind of a guest's access, which it chooses on SNP and TDX."""

    AS_ATTRIBUTE = 0
    SHARED = 1
    PRIVATE = 2


def empty_operations(n: int) -> Operations:
    """Return n operations, all zero."""
    return np.zeros(n, OPERATION)


def join_operations(parts: Sequence[Operations]) -> Operations:
    """Return the operations of all parts, in order, in one array.

    As bytes: NumPy joins structured arrays field by field, which takes sixteen times as long.
    """
    if not parts:
        return empty_operations(0)
    return np.concatenate([np.ascontiguousarray(part).view(np.uint8) for part in parts]).view(OPERATION)


_IS_OF_LAUNCH: Final = np.isin(np.arange(len(Step) + 1), (Step.POPULATE, Step.LAUNCH_FINISH))


def shows_launch(operations: Operations) -> bool:
    """Whether a launch, or the end of one, is among the operations."""
    step = np.ascontiguousarray(operations["step"])
    return bool(_IS_OF_LAUNCH.take(step, mode="clip").any())


def end_of_launch() -> Operations:
    """Return the one operation that comes before all others of a guest that runs already."""
    finish = empty_operations(1)
    finish["step"] = Step.LAUNCH_FINISH
    return finish


def as_words(operations: Operations) -> NDArray[np.uint64]:
    """View contiguous operations as 64-bit words, shape (n, 6), which NumPy moves as they are."""
    return operations.view(np.uint64).reshape(len(operations), OPERATION.itemsize // 8)


FROM_SOURCE: Final = 1 << 8
"""Bit of a populate's variant: the image comes from the VMM's own memory, not from what is in place."""

_VARIANTS: Final = np.zeros((len(Step), FROM_SOURCE + len(PageType)), bool)
_VARIANTS[:, 0] = True
_VARIANTS[[Step.GUEST_READ, Step.GUEST_WRITE], : len(Access)] = True
_VARIANTS[Step.POPULATE, [i + source for i in range(len(PageType)) for source in (0, FROM_SOURCE)]] = True


def check_array(operations: Operations) -> None:
    """Raise unless an object is an array of operations.

    Raises
    ------
    TypeError
        Not a one-dimensional array of `OPERATION`.
    """
    if not isinstance(operations, np.ndarray) or operations.dtype != OPERATION or operations.ndim != 1:
        raise TypeError("operations are a one-dimensional array of OPERATION")


def check_operations(operations: Operations) -> None:
    """Refuse what isn't an array of operations that exist.

    Raises
    ------
    TypeError
        Not a one-dimensional array of `OPERATION`.
    InvalidArgumentError
        EINVAL: a step or a variant that doesn't exist; the message has the number of the first one.
    """
    check_array(operations)
    step, variant = (np.ascontiguousarray(operations[name]) for name in ("step", "variant"))
    if not variant.any() and (step < len(Step)).all():
        return
    most = tuple(n - 1 for n in _VARIANTS.shape)
    place = np.minimum(step, most[0]) * np.intp(_VARIANTS.shape[1]) + np.minimum(variant, most[1])
    exists = _VARIANTS.ravel().take(place) & (step <= most[0]) & (variant <= most[1])
    if not exists.all():
        first = int(np.argmin(exists))
        raise InvalidArgumentError(
            f"operation {first}: step {step[first]} with variant {variant[first]:#x} doesn't exist; "
            f"steps are 0 to {max(Step)} ({', '.join(member.name for member in Step)})"
        )
