"""What must hold after any operation, and digests of what is there."""

import hashlib

import numpy as np

from gmemcore.engine.state import Survey
from gmemcore.machine import GuestMemfd
from gmemcore.uapi import PAGE_SIZE, GuestMemfdFlag


class ViolationError(AssertionError):
    """Something that must hold doesn't."""


def check_file(gmem: GuestMemfd) -> Survey:
    """Check a file's page state, all of it, and that its counters lead there.

    Raises
    ------
    ViolationError
        accepted ⊆ assigned ⊆ allocated ∩ private, or pinned ⊆ allocated ∩ shared; counts of pages that aren't
        those of their bits; blocks split and merged, pages changed, assigned or allocated that don't add up.
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
    """Whether `changes` of one page each can lead from one number of pages to another."""
    return abs(after - before) <= changes and (after - before - changes) % 2 == 0


def state_digest(gmem: GuestMemfd, found: Survey) -> bytes:
    """What depends on a file's page state and, where it holds bytes, on the sum of every page's words.

    SHA-256 of the bytes themselves would cost more than the run that left them there.
    """
    state = found.folded.to_bytes(16, "little")
    if not gmem.has_bytes:
        return state
    words = gmem.memory.view(np.uint64).reshape(-1, PAGE_SIZE // 8)
    return hashlib.sha256(state + np.add.reduce(words, axis=1).tobytes()).digest()
