"""Effects: what a conversion does to bytes, one row each.

A row holds the byte operation for each page rank in turn (unallocated, allocated, assigned, accepted). A new
effect is a new row here and its loop in the kernels.
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
        The word the policy rows use.
    operations : tuple of ByteOperation, length 4
        What is done to a page, by its `Rank` before the conversion.
    raises_to : Rank or None
        Rank that every page of the range has afterwards, whatever it had (allocating those that need it);
        None if the effect itself changes no rank.
    summary : str
        The row in words.
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
    Effect("ENCRYPT", (_XOR, _XOR, _XOR, _NONE), Rank.ACCEPTED, "the guest's key applied to what was clear"),
    Effect("DECRYPT", (_PLATFORM, _PLATFORM, _PLATFORM, _XOR), None, "the guest's key taken off again"),
)

EFFECTS: Final[dict[str, Effect]] = {row.name: row for row in _ROWS}
"""Every effect by name, in the order of the table."""
