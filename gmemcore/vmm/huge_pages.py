"""What userspace has to handle when a conversion of several huge pages fails, by running it."""

from contextlib import suppress
from typing import NamedTuple

from gmemcore.errors import PagePinnedError
from gmemcore.machine import GuestMemfd, create_vm
from gmemcore.policy import Abi
from gmemcore.uapi import PAGE_SIZE, Direction, GuestMemfdFlag

_HUGETLB = GuestMemfdFlag.MMAP | GuestMemfdFlag.HUGETLB


class AfterFailure(NamedTuple):
    """What a caller finds after a conversion of some huge pages to private that fails at any one of them.

    Attributes
    ----------
    states : int
        States that the range can be in, over all huge pages that can fail.
    calls_to_finish : int
        Most requests that it takes to convert the rest once nothing fails any more.
    calls_to_undo : int
        Most requests that it takes to have everything as it was before.
    """

    states: int
    calls_to_finish: int
    calls_to_undo: int


def after_failure(abi: str | Abi, huge_pages: int = 5, order: int = 9) -> AfterFailure:
    """Let a conversion fail at each of some huge pages, by a pin, and count what a caller has to handle.

    Parameters
    ----------
    abi : str or Abi
        A revision with huge pages.
    huge_pages, order : int
        How many, and of which order.

    Raises
    ------
    InvalidArgumentError
        EINVAL: the revision has no huge pages.
    """
    states, finish, undo = set(), 0, 0
    for failing in range(huge_pages):
        with create_vm("SW_PROTECTED", abi, backing="none") as vm:
            gmem = vm.create_guest_memfd(huge_pages * PAGE_SIZE << order, _HUGETLB, order)
            gmem.convert(0, gmem.size, Direction.TO_SHARED)
            gmem.pin(failing * PAGE_SIZE << order, PAGE_SIZE)
            with suppress(PagePinnedError):
                gmem.convert(0, gmem.size, Direction.TO_PRIVATE)
            gmem.unpin(0, gmem.size)
            states.add(tuple(gmem.runs()))
            undo = max(undo, _calls(gmem, "private"))
            finish = max(finish, _calls(gmem, "shared"))
    return AfterFailure(len(states), finish, undo)


def _calls(gmem: GuestMemfd, side: str) -> int:
    """Count the requests that it takes until no page has an attribute: one per run of such pages."""
    return sum(each == side for _, _, each in gmem.runs())
