"""Steps: everything that can be done to a range of guest memory, by number.

A conversion is one of them. Traces, behaviours and batches name them by these numbers, which are part of the
trace format: a new step gets the next one.
"""

from enum import IntEnum


class Step(IntEnum):
    """One thing that a host, a guest or its VMM does to a range of guest memory."""

    CONVERT = 0
    """KVM_SET_MEMORY_ATTRIBUTES2: attributes and content flags."""
    HOST_READ = 1
    HOST_WRITE = 2
    GUEST_READ = 3
    GUEST_WRITE = 4
    ACCEPT = 5
    """PVALIDATE, TDG.MEM.PAGE.ACCEPT."""
    ALLOCATE = 6
    """fallocate with KEEP_SIZE."""
    PUNCH_HOLE = 7
    PIN = 8
    UNPIN = 9
    POISON = 10
    POPULATE = 11
    """A launch update, in place."""
    LAUNCH_FINISH = 12
