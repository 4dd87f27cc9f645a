"""Pictures of page state and of what conversions cost. Each takes and returns a matplotlib Axes."""

from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from gmemcore.analysis.bitmap import Bitmap
from gmemcore.analysis.distributions import STATES, Source, states_of
from gmemcore.analysis.hilbert import hilbert
from gmemcore.analysis.snapshot import Snapshot, as_snapshot
from gmemcore.analysis.style import (
    FRACTION_MAP,
    STATE_COLOURS,
    axes_for,
    binary_unit,
    legend_beside,
    size_words,
)
from gmemcore.engine.packed import BLOCK_PAGES
from gmemcore.uapi import PAGE_SIZE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_CELLS: Final = 1 << 20
"""Cells of a page map; a guest of more pages is shown by the fraction that is private in each cell."""

ORDERS: Final = ("address", "hilbert")
"""How a page map lays out pages."""


# ---- the page map --------------------------------------------------------------------------------------


def page_map(
    source: Source,
    ax: "Axes | None" = None,
    *,
    order: str = "address",
    file: int | None = None,
    columns: int | None = None,
) -> "Axes":
    """Draw every page of a file, one cell a page, coloured by its state.

    A file of more than 1 Mi pages is drawn by cells of several, coloured by the fraction that is private.

    Parameters
    ----------
    source : Snapshot, Vm or GuestMemfd
    ax : matplotlib Axes or None
        Where to draw; None makes a figure.
    order : {'address', 'hilbert'}
        Rows in address order; or along a Hilbert curve, where pages that are near each other in memory are
        near each other in the picture, and runs are patches.
    file : int or None
        Number of the file; None: the first.
    columns : int or None
        Cells a row in address order; None: what makes the picture about as wide as high.

    Returns
    -------
    matplotlib Axes

    Raises
    ------
    ValueError
        An order that doesn't exist, no columns, or a snapshot without a file.
    """
    if order not in ORDERS:
        raise ValueError(f"order {order!r}; known: {', '.join(ORDERS)}")
    if columns is not None and columns < 1:
        raise ValueError(f"{columns} columns; at least one is needed")
    snapshot = as_snapshot(source)
    if not snapshot.files:
        raise ValueError("the snapshot has no file to draw")
    chosen = snapshot.files[0] if file is None else snapshot.file(file)
    planes = snapshot.planes(chosen.index)
    cell_pages = cell_size(planes.n_pages)
    if cell_pages == 1:
        cells: NDArray[Any] = state_codes(states_of(planes))
    else:
        cells = fractions(planes.private, cell_pages)
    if order == "hilbert":
        grid = _along_curve(cells)
    else:
        grid = _in_rows(cells, columns or _usual_columns(len(cells)))
    height, width = grid.shape
    drawn = axes_for(ax, _map_size(width, height))
    if cell_pages == 1:
        _draw_states(drawn, grid, cells)
    else:
        _draw_fractions(drawn, grid, cell_pages)
    _label_map(drawn, order, chosen.size, grid.shape, cell_pages)
    drawn.set_title(_map_title(snapshot, chosen.size), loc="left")
    return drawn


def cell_size(n_pages: int) -> int:
    """Pages a cell of the map: the least power of two with which all fit."""
    return 1 << max((-(-n_pages // MAX_CELLS) - 1).bit_length(), 0)


def state_codes(states: dict[str, Bitmap]) -> NDArray[np.uint8]:
    """Index into `STATES` of each page, shape (n_pages,)."""
    n_pages = next(iter(states.values())).n_pages
    codes = np.zeros(n_pages, np.uint8)
    for code, state in enumerate(STATES):
        codes[states[state.name].bits()] = code
    return codes


def fractions(bitmap: Bitmap, cell_pages: int) -> NDArray[np.float64]:
    """Fraction of the pages of each cell that are in; the last cell is of the pages that there are."""
    if cell_pages >= BLOCK_PAGES:
        counts = bitmap.counts().astype(np.int64)
        counts = np.add.reduceat(counts, np.arange(0, len(counts), cell_pages // BLOCK_PAGES))
    else:
        counts = np.concatenate(
            [
                np.add.reduceat(
                    bitmap.bits(start, end), np.arange(0, end - start, cell_pages), dtype=np.int64
                )
                for start in range(0, bitmap.n_pages, MAX_CELLS)
                for end in [min(start + MAX_CELLS, bitmap.n_pages)]
            ]
        )
    pages = np.full(len(counts), cell_pages)
    pages[-1] = bitmap.n_pages - (len(counts) - 1) * cell_pages
    result: NDArray[np.float64] = counts / pages
    return result


def _usual_columns(cells: int) -> int:
    """A power of two: rows as long as a few pages need, and the picture between square and twice as wide."""
    return min(max(64, 1 << (max(cells - 1, 1).bit_length() + 1) // 2), cells)


def _in_rows(cells: NDArray[Any], columns: int) -> Any:
    rows = -(-len(cells) // columns)
    grid: Any = np.ma.MaskedArray(np.zeros(rows * columns, cells.dtype), mask=True)
    grid[: len(cells)] = cells
    return grid.reshape(rows, columns)


def _along_curve(cells: NDArray[Any]) -> Any:
    order = -(-(len(cells) - 1).bit_length() // 2)
    x, y = hilbert(np.arange(len(cells)), order)
    grid: Any = np.ma.MaskedArray(np.zeros((1 << order, 1 << order), cells.dtype), mask=True)
    grid[y, x] = cells
    return grid[: y.max() + 1, : x.max() + 1]  # half of the square is enough for an odd power of two


def _map_size(width: int, height: int) -> tuple[float, float]:
    """Inches: cells are square where that gives a picture that is neither a stripe nor a tower."""
    wide = 6.0
    return wide + 2.0, float(np.clip(wide * height / width, 1.6, 6.5)) + 0.8


def _draw_states(ax: "Axes", grid: Any, cells: NDArray[Any]) -> None:
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.patches import Patch

    colours = ListedColormap([STATE_COLOURS[state.name] for state in STATES])
    norm = BoundaryNorm(np.arange(len(STATES) + 1) - 0.5, len(STATES))
    ax.imshow(grid, cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
    counts = np.bincount(cells, minlength=len(STATES))
    handles = [
        Patch(facecolor=STATE_COLOURS[state.name], edgecolor="0.5", linewidth=0.5, label=label)
        for state, count in zip(STATES, counts, strict=True)
        if count
        for label in [f"{state.name} ({_percent(count / len(cells))})"]
    ]
    legend_beside(ax, handles[::-1])


def _draw_fractions(ax: "Axes", grid: Any, cell_pages: int) -> None:
    image = ax.imshow(grid, cmap=FRACTION_MAP, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    label = f"fraction private of each {size_words(cell_pages * PAGE_SIZE)}"
    bar = ax.figure.colorbar(image, ax=ax, label=label, shrink=0.9)
    bar.outline.set_visible(False)


def _label_map(ax: "Axes", order: str, size: int, shape: tuple[int, int], cell_pages: int) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    if order == "hilbert":
        ax.set(xticks=[], yticks=[], aspect="equal")
        ax.set_xlabel("Hilbert curve from the upper left corner")
        return
    row = shape[1] * cell_pages * PAGE_SIZE
    (across, across_name), (down, down_name) = binary_unit(row), binary_unit(size)
    cell = cell_pages * PAGE_SIZE
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x * cell / across:g}"))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y * row / down:g}"))
    ax.set_xticks(np.linspace(0, shape[1], 5))
    ax.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 4, 5, 8, 10]))
    ax.set_ylim(shape[0] - 0.5, -0.5)
    ax.set_xlim(-0.5, shape[1] - 0.5)
    ax.set_xlabel(f"offset within the row ({across_name})")
    ax.set_ylabel(f"offset in the file ({down_name})")


def _map_title(snapshot: Snapshot, size: int) -> str:
    what = snapshot.label or f"{snapshot.vm_type}, {snapshot.abi}, {snapshot.phase}"
    return f"Page states of {size_words(size)}: {what}"


def _percent(fraction: float) -> str:
    return "<0.1 %" if 0 < fraction < 0.001 else f"{fraction * 100:.3g} %"
