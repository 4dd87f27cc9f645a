"""Maps: guest memory by address, and along a Hilbert curve, and by address against time."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from gmemcore.analysis.address import (
    ABSENT,
    Blocks,
    GuestMemory,
    block_bytes,
    guest_runs,
    pages_by_block,
    states_by_block,
)
from gmemcore.analysis.bitmap import Bitmap
from gmemcore.analysis.distributions import Source
from gmemcore.analysis.hilbert import hilbert
from gmemcore.analysis.parts import Planes
from gmemcore.analysis.pictures.times import edges_of, time_label
from gmemcore.analysis.series import Series
from gmemcore.analysis.snapshot import Snapshot, as_snapshot
from gmemcore.analysis.states import STATES, state_of_masks, states_of
from gmemcore.analysis.style import FRACTION_MAP, STATE_COLOURS, axes_for, legend_beside
from gmemcore.engine.arguments import as_u64
from gmemcore.engine.packed import PLANE_NAMES
from gmemcore.uapi import PAGE_SHIFT, PAGE_SIZE
from gmemcore.units import counted, size_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_CELLS: Final = 1 << 20
"""Cells of a map; of a guest of more pages a cell is several, in the mean of their colours."""
ORDERS: Final = ("address", "hilbert")
"""How a page map lays out pages."""
_ROWS: Final = 512
"""Blocks of addresses of a heat map, about."""
_TICKS: Final = 9


# ---- the page map --------------------------------------------------------------------------------------


def page_map(
    source: Source,
    ax: "Axes | None" = None,
    *,
    order: str = "address",
    file: int | None = None,
    columns: int | None = None,
) -> "Axes":
    """Draw every page of a guest by its address, a cell per page, in the colour of its state.

    Of a guest of more than 1 Mi pages a cell is several pages, in the mean of their colours.

    Parameters
    ----------
    source : Snapshot, Vm or GuestMemfd
    ax : matplotlib Axes or None
        Where to draw; None makes a figure.
    order : {'address', 'hilbert'}
        Rows in address order, each beginning at a multiple of its size. Or along a Hilbert curve through
        guest memory without its holes: pages that are near each other in memory are near each other in the
        picture, and runs are patches.
    file : int or None
        Number of one file, by offset; None: all memory of the guest, by guest physical address.
    columns : int or None
        Cells per row in address order; None: what makes the picture about as wide as high.

    Returns
    -------
    matplotlib Axes

    Raises
    ------
    ValueError
        An order that doesn't exist, no columns, or a snapshot without a file.
    """
    if order not in ORDERS:
        raise ValueError(f"unknown order {order!r}; known: {', '.join(ORDERS)}")
    if columns is not None and columns < 1:
        raise ValueError(f"columns must be 1 or more, not {columns}")
    snapshot = as_snapshot(source)
    if not snapshot.files:
        raise ValueError("the snapshot has no file to draw")
    shown = snapshot if file is None else replace(snapshot, files=(snapshot.file(file),), slots=())
    memory = GuestMemory([shown])
    blocks = memory.blocks(cell_size(memory.pages) * PAGE_SIZE)
    counts, colours = _cells(memory, shown, blocks)
    drawn_by = _draw_curve if order == "hilbert" else _draw_rows
    drawn = drawn_by(ax, memory, blocks, colours, columns)
    _legend_of(drawn, counts.sum(axis=0))
    drawn.set_title(_title(snapshot, shown, blocks, file), loc="left")
    return drawn


def cell_size(n_pages: int) -> int:
    """Return the pages of a cell of the map: the least power of two with which all fit."""
    return 1 << max((-(-n_pages // MAX_CELLS) - 1).bit_length(), 0)


def _cells(
    memory: GuestMemory, snapshot: Snapshot, blocks: Blocks
) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Pages by state, summed up or by cell, and the colour of each cell: red, green, blue, opacity."""
    palette = state_palette()
    if blocks.size > PAGE_SIZE:
        counts = states_by_block(memory, snapshot, blocks)
        return counts, blended(counts, palette)
    runs = guest_runs(memory, snapshot)
    codes = np.full(ABSENT + 1, len(STATES), np.uint8)
    codes[: 1 << 6] = state_of_masks()
    states = codes[runs.masks]
    lengths = np.diff(runs.starts, append=memory.pages)
    counts = np.bincount(states, lengths, len(STATES) + 1)[: len(STATES)].astype(np.int64)
    return counts[None], np.vstack([palette, np.zeros(4)])[np.repeat(states, lengths)]


def state_palette() -> NDArray[np.float64]:
    """Return the colours of `STATES`: red, green, blue, opacity; shape (8, 4)."""
    from matplotlib.colors import to_rgba

    return np.array([to_rgba(STATE_COLOURS[state.name]) for state in STATES])


def blended(counts: NDArray[np.int64], palette: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean colour of the pages of each block; transparent where a block has none."""
    pages = counts.sum(axis=-1, keepdims=True)
    mean: NDArray[np.float64] = counts @ palette / np.maximum(pages, 1)
    return mean


def _draw_rows(
    ax: "Axes | None", memory: GuestMemory, blocks: Blocks, colours: NDArray[np.float64], columns: int | None
) -> "Axes":
    """Draw cells in rows that begin at multiples of their size, and a line where rows aren't neighbours."""
    width = _usual_columns(len(blocks)) if columns is None else columns
    row_bytes = np.uint64(width * blocks.size)
    rows, place = np.unique(blocks.gpas // row_bytes, return_inverse=True)
    across = (blocks.gpas % row_bytes // np.uint64(blocks.size)).astype(np.intp)
    grid = np.zeros((len(rows), width, 4))
    grid[place, across] = colours
    drawn = axes_for(ax, _map_size(width, len(rows)))
    drawn.imshow(_as_bytes(grid), aspect="auto", interpolation="antialiased", interpolation_stage="rgba")
    for gap in np.flatnonzero(np.diff(rows) > 1).tolist():
        drawn.axhline(gap + 0.5, color="0.5", linewidth=1)
    ticks = address_ticks(memory, [int(row * row_bytes) for row in rows.tolist()])
    drawn.set_yticks([row - 0.5 for row, _ in ticks], [label for _, label in ticks], family="monospace")
    steps = np.linspace(0, 1, 5)
    drawn.set_xticks(steps * width - 0.5, [size_words(int(step * int(row_bytes))) for step in steps])
    drawn.set_ylabel("offset in the file" if _by_offset(memory) else "guest physical address of the row")
    drawn.set_xlabel("offset within the row")
    drawn.tick_params(length=3)
    return drawn


def address_ticks(memory: GuestMemory, starts: Sequence[int], most: int = _TICKS) -> list[tuple[int, str]]:
    """Choose rows to label: where memory begins or goes on after a hole, and round addresses between.

    Parameters
    ----------
    memory : GuestMemory
        What the rows are of.
    starts : sequence of int
        Address at which each row begins.
    most : int
        Labels, about.

    Returns
    -------
    list of (row, label)
    """
    gpas = memory.gpas.tolist()
    apart = max(len(starts) / most / 2, 1)
    # A row in which memory begins is named by where it does.
    named = {
        int(np.searchsorted(starts, gpa, side="right")) - 1: max(gpa, starts[0]) for gpa in reversed(gpas)
    }
    chosen: dict[int, int] = {}
    for row in sorted(row for row in named if row >= 0):
        if all(abs(row - other) >= apart for other in chosen):
            chosen[row] = named[row]
    step = _bytes_between(starts) << max(-(-len(starts) // most) - 1, 0).bit_length()
    for row, start in enumerate(starts):
        if start % step == 0 and all(abs(row - other) >= apart for other in chosen):
            chosen[row] = start
    return [(row, f"{gpa:#x}") for row, gpa in sorted(chosen.items())]


def _bytes_between(starts: Sequence[int]) -> int:
    """Bytes of a row: the least distance of two."""
    return min((high - low for low, high in pairwise(starts)), default=PAGE_SIZE)


def _as_bytes(colours: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Round colours. Resampled as floats, areas of one colour are dithered, and files ten times as large."""
    return np.rint(colours * 255).astype(np.uint8)


def _draw_curve(
    ax: "Axes | None", memory: GuestMemory, blocks: Blocks, colours: NDArray[np.float64], _: int | None
) -> "Axes":
    """Draw cells along the curve, and mark where it begins and ends."""
    order = max(-(-(len(blocks) - 1).bit_length() // 2), 0)
    x, y = hilbert(np.arange(len(blocks)), order)
    grid = np.zeros((int(y.max()) + 1, int(x.max()) + 1, 4))  # an odd power of two needs half of the square
    grid[y, x] = colours
    drawn = axes_for(ax, _map_size(grid.shape[1], grid.shape[0]))
    drawn.imshow(_as_bytes(grid), interpolation="antialiased", interpolation_stage="rgba")
    size = 7 if len(blocks) > 1 else 0
    for place, marker in ((0, "o"), (-1, "s")):
        drawn.plot(
            x[place], y[place], marker, markersize=size, markerfacecolor="white", markeredgecolor="black",
            clip_on=False, zorder=3,
        )  # fmt: skip
    drawn.set(xticks=[], yticks=[], aspect="equal")
    drawn.spines[["left", "bottom"]].set_visible(False)
    first, last = int(blocks.gpas[0]), memory.gpa_of(memory.pages - 1)
    where = "offset" if _by_offset(memory) else "gpa"
    drawn.set_xlabel(f"Hilbert curve from the circle ({where} {first:#x}) to the square ({last:#x})")
    return drawn


def _by_offset(memory: GuestMemory) -> bool:
    return len(memory.gpas) == len(memory.loose) == 1


def _usual_columns(cells: int) -> int:
    """A power of two: rows as long as a few pages need, and the picture between square and twice as wide."""
    return min(max(64, 1 << (max(cells - 1, 1).bit_length() + 1) // 2), 1 << max(cells - 1, 0).bit_length())


def _map_size(width: int, height: int) -> tuple[float, float]:
    """Inches: cells are square where that gives a picture that is neither a stripe nor a tower."""
    wide = 5.4
    return wide + 4.2, float(np.clip(wide * height / width, 1.6, 6.5)) + 0.8


def _legend_of(ax: "Axes", pages: NDArray[np.int64]) -> None:
    """Name the states that occur, the commonest memory last, each with its share."""
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor=STATE_COLOURS[state.name], edgecolor="0.5", linewidth=0.5, label=label)
        for state, count in zip(STATES, pages.tolist(), strict=True)
        if count
        for label in [f"{state.name} ({percent(count / pages.sum())})"]
    ]
    legend_beside(ax, handles[::-1])


def _title(snapshot: Snapshot, shown: Snapshot, blocks: Blocks, file: int | None) -> str:
    what = snapshot.label or f"{snapshot.vm_type}, {snapshot.abi}, {snapshot.phase}"
    which = "" if file is None or len(snapshot.files) == 1 else f", file {file} of {len(snapshot.files)}"
    cell = "" if blocks.size == PAGE_SIZE else f", {size_words(blocks.size)} per cell"
    return f"Page states of {size_words(int(blocks.edges[-1]) << PAGE_SHIFT)}{which}{cell}: {what}"


def percent(fraction: float) -> str:
    """Return a share in words, small ones without a zero."""
    return "<0.1 %" if 0 < fraction < 0.001 else f"{fraction * 100:.1f} %"


# ---- address against time --------------------------------------------------------------------------------


def heat_map(
    series: Series,
    ax: "Axes | None" = None,
    *,
    show: str = "states",
    address: tuple[int | str, int | str] | None = None,
    block: int | str | None = None,
) -> "Axes":
    """Draw guest addresses against time: which memory is in which state, and when.

    Parameters
    ----------
    series : Series
        At least two snapshots.
    ax : matplotlib Axes or None
    show : str
        ``states``: the mean colour of each block's pages. A plane or a state, as ``private``: the share of
        the block's pages in it, on a scale.
    address : (low, high) or None
        Guest physical addresses to draw, bytes, as ``("1g", "1536m")``; None: all memory.
    block : int, str or None
        Bytes of a block of addresses; None: the power of two that makes up to 512 of them.

    Raises
    ------
    ValueError
        Fewer than two snapshots, nothing to show by that name, or no memory at those addresses.
    """
    if len(series) < 2:
        raise ValueError(f"a heat map of {counted(len(series), 'snapshot')}; at least two are needed")
    sets = _sets(show)
    memory = GuestMemory(series)
    low, high = (0, 1 << 64) if address is None else (as_u64(each, "gpa") for each in address)
    blocks = _within(memory, low, high, block)
    keep = (blocks.gpas <= np.uint64(high - 1)) & (blocks.gpas + np.uint64(blocks.size - 1) >= np.uint64(low))
    starts = blocks.gpas[keep].tolist()
    drawn = axes_for(ax, (8.6, 4.6))
    across, down = edges_of(series.times), np.arange(len(starts) + 1)
    if sets is None:
        states = [states_by_block(memory, snapshot, blocks)[keep] for snapshot in series]
        counts = np.stack(states, axis=1)
        drawn.pcolormesh(across, down, blended(counts, state_palette()), rasterized=True)
        _legend_of(drawn, counts.sum(axis=(0, 1)))
    else:
        pairs = [pages_by_block(memory, snapshot, blocks, sets, 2)[keep] for snapshot in series]
        counts = np.stack(pairs, axis=1)
        share = counts[:, :, 0] / np.maximum(counts.sum(axis=2), 1) * 100
        mesh = drawn.pcolormesh(across, down, share, cmap=FRACTION_MAP, vmin=0, vmax=100, rasterized=True)
        label = f"{show} (% of each {size_words(blocks.size)})"
        drawn.figure.colorbar(mesh, ax=drawn, label=label).outline.set_visible(False)
    for gap in [i for i in range(1, len(starts)) if starts[i] - starts[i - 1] > blocks.size]:
        drawn.axhline(gap, color="0.5", linewidth=1)
    ticks = address_ticks(memory, starts)
    drawn.set_yticks([row for row, _ in ticks], [label for _, label in ticks], family="monospace")
    drawn.set_xlim(across[0], across[-1])
    time_label(drawn, series)
    drawn.set_ylabel("guest physical address")
    what = "Page states" if sets is None else f"Memory that is {show}"
    drawn.set_title(f"{what} by address and time, {size_words(blocks.size)} per row", loc="left")
    return drawn


def _sets(show: str) -> Callable[[Planes], Sequence[Bitmap]] | None:
    """What is shown of pages, and the rest of them; None for all states in colours."""
    if show == "states":
        return None
    states = [state.name for state in STATES]
    if show in PLANE_NAMES:
        return lambda planes: [planes[show], ~planes[show]]
    if show in states:
        return lambda planes: [states_of(planes)[show], ~states_of(planes)[show]]
    known = ", ".join(dict.fromkeys(["states", *PLANE_NAMES, *states]))
    raise ValueError(f"nothing to show by the name {show!r}; known: {known}")


def _within(memory: GuestMemory, low: int, high: int, block: int | str | None) -> Blocks:
    """Cut memory so that what lies between two addresses is about `_ROWS` blocks."""
    gpas, ends = memory.gpas.tolist(), (memory.gpas + memory.sizes).tolist()
    inside = sum(max(min(end, high) - max(gpa, low), 0) for gpa, end in zip(gpas, ends, strict=True))
    if inside <= 0:
        raise ValueError(f"there is no memory from {low:#x} to {high:#x}")
    if block is None:
        rows = -(-(inside // PAGE_SIZE) // _ROWS)
        return memory.blocks(PAGE_SIZE << max(rows - 1, 0).bit_length())
    return memory.blocks(block_bytes(memory, block))
