"""Invariants of page state, and digests of page state and contents."""

import hashlib

from gmemcore.engine.state import Survey
from gmemcore.machine import GuestMemfd
from gmemcore.uapi import GuestMemfdFlag


class ViolationError(AssertionError):
    """Something that must hold doesn't hold."""


def check_file(gmem: GuestMemfd) -> Survey:
    """Check all page state of a file, and that its counters are consistent with it; return the survey.

    Raises
    ------
    ViolationError
        A page breaks accepted ⊆ assigned ⊆ allocated ∩ private or pinned ⊆ allocated ∩ shared, a count
        differs from its bits, or counters of splits, merges, changes, assignments or allocations don't add
        up.
    """
    found, counters = gmem.survey(), gmem.counters
    if found.wrong:
        raise ViolationError(found.wrong)
    at_first = 0 if gmem.flags & GuestMemfdFlag.INIT_SHARED else gmem.n_pages
    assignments = counters.rmp_updates + counters.sept_changes
    for what, holds in (
        ("mixed blocks", counters.blocks_2m_split - counters.blocks_2m_merged == found.mixed),
        ("private pages", _leads(at_first, counters.pages_changed, found.totals["private"])),
        ("assigned pages", _leads(0, assignments, found.totals["assigned"])),
        ("allocated pages", counters.pages_allocated >= found.totals["allocated"]),
    ):
        if not holds:
            raise ViolationError(f"{what}: {found.mixed} mixed, {found.totals} don't follow from {counters}")
    return found


def _leads(before: int, changes: int, after: int) -> bool:
    """Return whether `changes` of one page each can lead from `before` pages to `after`."""
    return abs(after - before) <= changes and (after - before - changes) % 2 == 0


def state_digest(gmem: GuestMemfd, found: Survey) -> bytes:
    """Return a digest of a file's page state and, if it holds bytes, of the sum of each page's words.

    SHA-256 over all bytes would take longer than the run that wrote them.
    """
    state = found.folded.to_bytes(16, "little")
    if not gmem.has_bytes:
        return state
    return hashlib.sha256(state + gmem.contents_sum().to_bytes(8, "little")).digest()
