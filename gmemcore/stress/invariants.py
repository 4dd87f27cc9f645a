"""What must hold after any operation, and digests of what is there."""

import hashlib
from typing import Final

import numpy as np

from gmemcore.engine.packed import PackedState, Planes
from gmemcore.machine import GuestMemfd
from gmemcore.uapi import PAGE_SIZE, GuestMemfdFlag


class ViolationError(AssertionError):
    """Something that must hold doesn't."""


# Section 2 of the specification: pages with the first planes and without the second can't be.
_IMPOSSIBLE: Final = (
    (("accepted",), ("assigned",)),
    (("assigned",), ("allocated",)),
    (("assigned",), ("private",)),
    (("pinned",), ("allocated",)),
    (("pinned", "private"), ()),
)


def check_file(gmem: GuestMemfd, state: PackedState) -> Planes:
    """Check a file's page state, all of it, and that its counters lead there; returns its planes.

    Raises
    ------
    ViolationError
        accepted ⊆ assigned ⊆ allocated ∩ private, or pinned ⊆ allocated ∩ shared; counts of pages that aren't
        those of their bits; blocks split and merged, pages changed, assigned or allocated that don't add up.
    """
    try:
        planes = state.check()
    except ValueError as error:
        raise ViolationError(str(error)) from error
    totals = {name: int(counts.sum(dtype=np.uint64)) for name, (counts, _, _) in planes.items()}
    for wanted, unwanted in _IMPOSSIBLE:
        offset = gmem.find_page(wanted, unwanted) if all(totals[name] for name in wanted) else None
        if offset is not None:
            without = f" and not {' or '.join(unwanted)}" if unwanted else ""
            raise ViolationError(f"the page at {offset:#x} is {' and '.join(wanted)}{without}")
    _check_counters(gmem, len(planes["private"][1]), totals)
    return planes


def _check_counters(gmem: GuestMemfd, mixed: int, totals: dict[str, int]) -> None:
    """Check that a file's counters since its creation lead to the page state that is there."""
    counters = gmem.counters
    at_first = 0 if gmem.flags & GuestMemfdFlag.INIT_SHARED else gmem.n_pages
    assignments = counters.rmp_updates + counters.sept_changes
    for what, holds in (
        (
            f"{mixed} blocks are mixed",
            counters.blocks_2m_split - counters.blocks_2m_merged == mixed,
        ),
        (
            f"{totals['private']} pages are private",
            _leads(at_first, counters.pages_changed, totals["private"]),
        ),
        (f"{totals['assigned']} pages are assigned", _leads(0, assignments, totals["assigned"])),
        (f"{totals['allocated']} pages are allocated", counters.pages_allocated >= totals["allocated"]),
    ):
        if not holds:
            raise ViolationError(f"{what}, which doesn't follow from {counters}")


def _leads(before: int, changes: int, after: int) -> bool:
    """Whether so many changes of one page each can lead from one number of pages to another."""
    return abs(after - before) <= changes and (after - before - changes) % 2 == 0


def state_digest(gmem: GuestMemfd, planes: Planes) -> bytes:
    """SHA-256 of a file's page state and, where it holds bytes, of the sum of every page's words.

    A sum a page, of 64 bits: SHA-256 of the bytes themselves would cost more than the run that left them
    there. Planes that are set nowhere, as many often are, cost nothing.
    """
    digest = hashlib.sha256()
    for name, (counts, _, lines) in planes.items():
        if counts.any():
            digest.update(name.encode())
            digest.update(counts.data)
            digest.update(np.ascontiguousarray(lines).data)
    if gmem.has_bytes:
        words = gmem.memory.view(np.uint64).reshape(-1, PAGE_SIZE // 8)
        digest.update(np.add.reduce(words, axis=1).data)
    return digest.digest()
