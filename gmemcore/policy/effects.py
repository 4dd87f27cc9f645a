"""Effects: what a conversion does to bytes, one row each.

A row has one byte operation per page rank: unallocated, allocated, assigned, accepted.
"""

from dataclasses import dataclass
from typing import Final

from gmemcore.policy.ranks import ByteOperation, Operations, Rank

_NONE = ByteOperation.NONE
_ZERO = ByteOperation.ZERO
_XOR = ByteOperation.XOR
_SCRAMBLE = ByteOperation.SCRAMBLE
_PLATFORM = ByteOperation.PLATFORM


@dataclass(frozen=True, slots=True)
class Effect:
    """One effect on the bytes of a range.

    Attributes
    ----------
    name : str
        The name that policy rows use.
    operations : tuple of ByteOperation, length 4
        What is done to a page, by its `Rank` before the conversion.
    raises_to : Rank or None
        Rank of every page of the range afterwards, allocating those that need it; None if the effect itself
        changes no rank.
    summary : str
        One-line description.
    """

    name: str
    operations: Operations
    raises_to: Rank | None
    summary: str


#                  unallocated  allocated  assigned   accepted
_ROWS = (
    Effect("KEEP", (_PLATFORM, _PLATFORM, _PLATFORM, _PLATFORM), None, "the platform's own step stands"),
    Effect("ZERO", (_NONE, _ZERO, _ZERO, _ZERO), None, "zeros in allocated pages"),
    Effect("SCRAMBLE", (_NONE, _SCRAMBLE, _SCRAMBLE, _SCRAMBLE), None, "random bytes in allocated pages"),
    Effect("ENCRYPT", (_XOR, _XOR, _XOR, _NONE), Rank.ACCEPTED, "applies the guest's key to clear bytes"),
    Effect("DECRYPT", (_PLATFORM, _PLATFORM, _PLATFORM, _XOR), None, "removes the guest's key"),
)

EFFECTS: Final[dict[str, Effect]] = {row.name: row for row in _ROWS}
"""Every effect by name, in the order of the table."""
