"""What userspace has to handle when a conversion of several huge pages fails, by running it."""

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
    needs_page_size : bool
        Whether ``error_offset`` tells what was converted only to a caller that knows the size of the huge
        pages.
    """

    states: int
    calls_to_finish: int
    calls_to_undo: int
    needs_page_size: bool


def after_failure(abi: str | Abi, huge_pages: int = 5, order: int = 9) -> AfterFailure:
    """Let a conversion fail at each of some huge pages, by a pin in its middle; count what a caller handles.

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
    states, finish, undo, needs_page_size = set(), 0, 0, False
    size = PAGE_SIZE << order
    for failing in range(huge_pages):
        with create_vm("SW_PROTECTED", abi, backing="none") as vm:
            gmem = vm.create_guest_memfd(huge_pages * size, _HUGETLB, order)
            gmem.convert(0, gmem.size, Direction.TO_SHARED)
            gmem.pin(failing * size + size // 2, PAGE_SIZE)
            error_offset = _error_offset(gmem)
            gmem.unpin(0, gmem.size)
            states.add(tuple(gmem.runs()))
            converted = gmem.count("private") * PAGE_SIZE
            needs_page_size |= converted not in (0, error_offset)
            undo = max(undo, _calls(gmem, "private"))
            finish = max(finish, _calls(gmem, "shared"))
    return AfterFailure(len(states), finish, undo, needs_page_size)


def _error_offset(gmem: GuestMemfd) -> int | None:
    """Convert all of a file, of which a page is pinned, and return where it failed."""
    try:
        gmem.convert(0, gmem.size, Direction.TO_PRIVATE)
    except PagePinnedError as error:
        return error.error_offset
    raise AssertionError("a pinned page was converted")


def _calls(gmem: GuestMemfd, side: str) -> int:
    """Count the requests that it takes until no page has an attribute: one per run of such pages."""
    return sum(each == side for _, _, each in gmem.runs())
