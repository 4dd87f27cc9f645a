"""States of a page: its planes in a word, in order of precedence."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gmemcore.analysis.bitmap import Bitmap
from gmemcore.analysis.parts import Planes
from gmemcore.engine.packed import PLANE_NAMES


class State(NamedTuple):
    """A state of a page: its name, and the plane (or planes) that it is read from."""

    name: str
    pages: Callable[[Planes], Bitmap]
    meaning: str


STATES: Final = (
    State("poisoned", lambda planes: planes.poisoned, "its memory has failed"),
    State("pinned", lambda planes: planes.pinned, "the host holds a long-term pin"),
    State("accepted", lambda planes: planes.accepted, "private, the guest has accepted it"),
    State(
        "assigned-unaccepted", lambda planes: planes.assigned, "private, in the RMP or S-EPT, not accepted"
    ),
    State("private-unassigned", lambda planes: planes.private & planes.allocated, "private, with memory"),
    State("shared", lambda planes: planes.allocated, "shared, with memory"),
    State("private-unallocated", lambda planes: planes.private, "private, no memory behind it yet"),
    State("shared-unallocated", lambda planes: ~planes.private, "shared, no memory behind it yet"),
)
"""States in order of precedence: a page is in the first that fits, so that they add up to the guest."""


def states_of(planes: Planes) -> dict[str, Bitmap]:
    """Partition a file: the pages of each of `STATES`, none in two of them."""
    left = Bitmap.uniform(planes.n_pages, True)
    result = {}
    for state in STATES:
        pages = state.pages(planes) & left
        result[state.name] = pages
        left &= ~pages
    return result


def state_of_masks() -> NDArray[np.uint8]:
    """Return the state of each combination of planes, as an index into `STATES`, shape (64,).

    Bit i of a combination is the plane ``PLANE_NAMES[i]``.
    """
    masks = np.arange(1 << len(PLANE_NAMES))
    planes: Any = SimpleNamespace(**{name: masks >> bit & 1 == 1 for bit, name in enumerate(PLANE_NAMES)})
    codes = np.full(len(masks), len(STATES), np.uint8)
    for code, state in enumerate(STATES):
        codes[state.pages(planes) & (codes == len(STATES))] = code
    return codes
