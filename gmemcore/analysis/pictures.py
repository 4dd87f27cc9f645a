"""Pictures of page state. Each takes and returns a matplotlib Axes."""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gmemcore.machine import GuestMemfd
from gmemcore.uapi import PAGE_SIZE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# State of a page, worst first: the first of these planes that is set names it. Okabe and Ito's colours, which
# people who see few of them can tell apart.
STATES = (
    ("poisoned", "poisoned", "#D55E00"),
    ("pinned", "pinned", "#CC79A7"),
    ("accepted", "private, accepted", "#0072B2"),
    ("assigned", "private, assigned", "#56B4E9"),
    ("private", "private", "#009E73"),
    ("allocated", "shared", "#E69F00"),
)
UNALLOCATED = ("shared, unallocated", "#F0E442")


def page_state_codes(gmem: GuestMemfd) -> NDArray[np.uint8]:
    """Name each page by its most telling plane.

    Returns
    -------
    ndarray of uint8, shape (n_pages,)
        Index into ``STATES``; ``len(STATES)`` for a shared page that isn't allocated.
    """
    codes = np.full(gmem.n_pages, len(STATES), np.uint8)
    for code, (plane, _, _) in reversed(list(enumerate(STATES))):
        codes[gmem.plane(plane)] = code
    return codes


def page_map(gmem: GuestMemfd, ax: "Axes | None" = None, *, columns: int = 64) -> "Axes":
    """Draw every page of a file in address order, one cell a page, coloured by its state.

    Parameters
    ----------
    gmem : GuestMemfd
        The file; up to 1 Mi pages.
    ax : matplotlib Axes or None
        Where to draw; None makes a figure.
    columns : int
        Pages a row; 64 makes a row 256 KiB.

    Returns
    -------
    matplotlib Axes

    Raises
    ------
    ValueError
        More pages than cells can be seen.
    """
    import matplotlib.pyplot as plt
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.patches import Patch

    if gmem.n_pages > 1 << 20:
        raise ValueError(f"{gmem.n_pages} pages can't be told apart in a picture; up to {1 << 20} can")
    codes = page_state_codes(gmem)
    names = [*((label, colour) for _, label, colour in STATES), UNALLOCATED]
    rows = -(-len(codes) // columns)
    cells: Any = np.ma.MaskedArray(np.zeros(rows * columns, np.uint8), mask=True)
    cells[: len(codes)] = codes
    if ax is None:
        _, ax = plt.subplots(figsize=(8, max(2.0, min(8.0, rows / 6))), layout="constrained")
    colours = ListedColormap([colour for _, colour in names])
    norm = BoundaryNorm(np.arange(len(names) + 1) - 0.5, len(names))
    ax.imshow(cells.reshape(rows, columns), cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
    ax.set_xlabel(f"page within the row ({columns * PAGE_SIZE >> 10} KiB a row)")
    ax.set_ylabel("row")
    ax.set_title(f"page states of {gmem.size / (1 << 20):g} MiB")
    present = sorted(set(codes.tolist()))
    handles = [Patch(facecolor=names[code][1], label=names[code][0]) for code in present]
    ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    return ax
