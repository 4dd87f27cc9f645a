"""Page ranks and byte operations, which rows of platforms and effects share."""

from enum import IntEnum, StrEnum


class Rank(IntEnum):
    """How far a page has come: accepted ⊆ assigned ⊆ allocated, so one number is enough."""

    UNALLOCATED = 0
    ALLOCATED = 1
    ASSIGNED = 2
    ACCEPTED = 3


class ByteOperation(StrEnum):
    """What is done to the DRAM of a page. PLATFORM is the platform's own step, see `Platform`."""

    NONE = "none"
    ZERO = "zero"
    XOR = "xor"
    SCRAMBLE = "scramble"
    PLATFORM = "platform"


Operations = tuple[ByteOperation, ByteOperation, ByteOperation, ByteOperation]
"""One byte operation per `Rank`, in order."""
