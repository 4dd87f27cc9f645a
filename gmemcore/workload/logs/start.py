"""Where each page of an imported guest began: private or shared, by what the log shows of it first.

A page that is converted to shared was private before, and the other way round; a launch update needs a
private page; an access that faulted met the other kind. Pages that a log never shows take their region's
default. The rule is the same whoever says where memory is.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from gmemcore.engine.steps import Step
from gmemcore.uapi import MemoryAttribute
from gmemcore.workload.layout import Layout
from gmemcore.workload.operations import Access, Operations
from gmemcore.workload.ranges import cells_of

SHOWN: Final = {
    Step.CONVERT: "first converted",
    Step.POPULATE: "launch update",
    Step.GUEST_READ: "first accessed",
}
"""What decides how a page began, by the first step that touches it."""
NEVER: Final = "never shown"
"""Pages that no operation touches."""
MIXED: Final = "mixed"
"""Pages first shown in a range of which some were private and some shared."""

_UNKNOWN: Final = 2


@dataclass(frozen=True, slots=True)
class Start:
    """How the pages of a guest began.

    Attributes
    ----------
    ranges : uint64 array of shape (n, 3)
        gpa, size (bytes) and attributes of pages that don't begin as their region does; each range lies in
        one region.
    pages : dict of (str, bool) to int
        Pages by what decided them, and whether they begin private.
    """

    ranges: NDArray[np.uint64]
    pages: dict[tuple[str, bool], int]


def needs(operations: Operations, mixed: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Return what each operation shows of its pages: 1 private before it, 0 shared, 2 nothing.

    Parameters
    ----------
    operations : Operations
        Shape (n,).
    mixed : bool array of shape (n,)
        Conversions of ranges that had pages of each kind.
    """
    step = operations["step"]
    found = np.full(len(operations), _UNKNOWN, np.uint8)
    converts = step == Step.CONVERT
    to_private = (operations["attributes"] & np.uint64(MemoryAttribute.PRIVATE)) > 0
    found[converts] = ~to_private[converts]
    found[step == Step.POPULATE] = 1
    reads = step == Step.GUEST_READ
    found[reads] = operations["variant"][reads] == Access.SHARED
    found[mixed] = _UNKNOWN
    return found


def start_of(
    layout: Layout, operations: Operations, shown: NDArray[np.uint8], touches: NDArray[np.bool_]
) -> Start:
    """Return how the pages of a layout began.

    Parameters
    ----------
    layout : Layout
        Its regions say what pages begin as that no operation decides.
    operations : Operations
        Shape (n,).
    shown : uint8 array of shape (n,)
        As `needs` returns it.
    touches : bool array of shape (n,)
        Which operations touch guest memory.
    """
    cells = cells_of(layout, operations, touches)
    decided = (cells.first >= 0) & (cells.region >= 0)
    by = np.where(decided, cells.first, 0)
    none = np.zeros(len(by), np.uint16)
    shows = np.where(decided, shown.take(by) if len(shown) else none, _UNKNOWN)
    private = np.where(shows == _UNKNOWN, cells.private, shows == 1)
    steps = operations["step"].take(by) if len(operations) else none
    reasons = {NEVER: (cells.region >= 0) & ~decided, MIXED: decided & (shows == _UNKNOWN)}
    reasons |= {name: decided & (shows != _UNKNOWN) & (steps == step) for step, name in SHOWN.items()}
    pages = cells.pages
    counted = {}
    for name, mask in reasons.items():
        for state in (True, False):
            if n := int(pages[mask & (private == state)].sum()):
                counted[name, state] = n
    first, end = cells.ranges((cells.region >= 0) & (private != cells.private), private).T
    attributes = np.where(private[first], np.uint64(MemoryAttribute.PRIVATE), np.uint64(0))
    ranges = np.stack([cells.edges[first], cells.edges[end] - cells.edges[first], attributes], axis=1)
    return Start(ranges, counted)
