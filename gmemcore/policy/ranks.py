"""The two words that platform rows and effect rows share: page ranks and byte operations."""

from enum import IntEnum, StrEnum


class Rank(IntEnum):
    """How far a page has come; accepted ⊆ assigned ⊆ allocated, so one number says it all."""

    UNALLOCATED = 0
    ALLOCATED = 1
    ASSIGNED = 2
    ACCEPTED = 3


class ByteOperation(StrEnum):
    """What is done to the DRAM of a page. PLATFORM stands for the platform's own step, see `Platform`."""

    NONE = "none"
    ZERO = "zero"
    XOR = "xor"
    SCRAMBLE = "scramble"
    PLATFORM = "platform"


Operations = tuple[ByteOperation, ByteOperation, ByteOperation, ByteOperation]
"""A byte operation for each `Rank`, in their order."""
