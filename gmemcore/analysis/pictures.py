"""Pictures of page state and of what conversions cost. Each takes and returns a matplotlib Axes."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gmemcore.analysis.bitmap import Bitmap
from gmemcore.analysis.distributions import Source, mappability, run_lengths, state_mix
from gmemcore.analysis.hilbert import hilbert
from gmemcore.analysis.parts import FileState
from gmemcore.analysis.runs import Run
from gmemcore.analysis.series import Series
from gmemcore.analysis.snapshot import Snapshot, as_snapshot
from gmemcore.analysis.speed import bench_axes, bench_cube, cost_by_range
from gmemcore.analysis.states import STATES, states_of
from gmemcore.analysis.style import (
    FRACTION_MAP,
    STATE_COLOURS,
    axes_for,
    legend_beside,
    line_style,
    size_axis,
    text_colour,
)
from gmemcore.engine.packed import BLOCK_PAGES
from gmemcore.uapi import PAGE_SIZE
from gmemcore.units import binary_unit, format_time, size_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
    drawn.set_title(_map_title(snapshot, chosen), loc="left")
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
    wide = 5.4
    return wide + 3.1, float(np.clip(wide * height / width, 1.6, 6.5)) + 0.8


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
    ax.tick_params(length=3)
    if order == "hilbert":
        ax.set(xticks=[], yticks=[], aspect="equal")
        ax.spines[["left", "bottom"]].set_visible(False)
        ax.set_xlabel("Hilbert curve, from the upper left corner to the upper right one")
        return
    row = shape[1] * cell_pages * PAGE_SIZE
    across, down = np.linspace(0, row, 5), np.linspace(0, size, 5)
    (across_unit, across_name), (down_unit, down_name) = binary_unit(row), binary_unit(size)
    # A cell reaches half a unit to each side of its index: offsets are those of its edges.
    ax.set_xticks(across / row * shape[1] - 0.5, [f"{at / across_unit:.4g}" for at in across])
    ax.set_yticks(down / row - 0.5, [f"{at / down_unit:.4g}" for at in down])
    ax.set_xlabel(f"offset within the row ({across_name})")
    ax.set_ylabel(f"offset in the file ({down_name})")


def _map_title(snapshot: Snapshot, file: FileState) -> str:
    what = snapshot.label or f"{snapshot.vm_type}, {snapshot.abi}, {snapshot.phase}"
    which = f", file {file.index} of {len(snapshot.files)}" if len(snapshot.files) > 1 else ""
    return f"Page states of {size_words(file.size)}{which}: {what}"


def _percent(fraction: float) -> str:
    return "<0.1 %" if 0 < fraction < 0.001 else f"{fraction * 100:.1f} %"


# ---- runs ----------------------------------------------------------------------------------------------


def run_length_cdf(
    sources: "Source | Mapping[str, Source]", ax: "Axes | None" = None, *, weight: str = "pages"
) -> "Axes":
    """Draw how long runs of one attribute are: the share of memory (or runs) in runs up to each length.

    Parameters
    ----------
    sources : Snapshot, Vm or GuestMemfd, or a mapping of names to them
        One, or several to compare.
    ax : matplotlib Axes or None
    weight : {'pages', 'runs'}
        What the share is of; of pages it says where memory lies, of runs how many calls it takes.
    """
    if weight not in ("pages", "runs"):
        raise ValueError(f"weight {weight!r}; pages or runs would be accepted")
    named = sources if isinstance(sources, Mapping) else {"": sources}
    drawn = axes_for(ax)
    for number, (name, source) in enumerate(named.items()):
        lengths = run_lengths(source)
        for attribute, dash in (("private", "-"), ("shared", "--")):
            own = lengths.where(attribute=attribute)
            if len(own):
                colour = line_style(number)["color"] if len(named) > 1 else STATE_COLOURS[_SOLID[attribute]]
                label = f"{name}, {attribute}" if name else attribute
                sizes = np.concatenate([own["length"][:1], own["length"]]) * PAGE_SIZE
                shares = np.concatenate([[0], own[f"cdf_{weight}"]])
                drawn.step(sizes, shares, where="post", color=colour, linestyle=dash, label=label)
    size_axis(drawn.xaxis)
    drawn.set_xlim(left=PAGE_SIZE * 0.9)
    drawn.set_xlabel("length of the run")
    drawn.set_ylabel({"pages": "share of the attribute's memory", "runs": "share of its runs"}[weight])
    drawn.set_ylim(-0.02, 1.02)
    for size in (2 << 20, 1 << 30):
        if size <= drawn.get_xlim()[1]:
            drawn.axvline(size, color="0.6", linewidth=0.8, zorder=0)
            place: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "fontsize": 8, "color": "0.4"}
            drawn.annotate(f" {size_words(size)}", (size, 1), va="top", **place)
    title = {"pages": "Memory in runs of one attribute", "runs": "Runs of one attribute"}[weight]
    drawn.set_title(f"{title}, up to a length", loc="left")
    if drawn.get_legend_handles_labels()[0]:
        legend_beside(drawn)
    return drawn


_SOLID: Final = {"private": "accepted", "shared": "shared"}
"""The state whose colour stands for an attribute."""


# ---- over time -----------------------------------------------------------------------------------------


def state_stream(series: Series, ax: "Axes | None" = None) -> "Axes":
    """Draw how much memory is in each state over a run, stacked up to the guest's size."""
    from matplotlib.patches import Patch

    at = _times(series, "a stream")
    table = series.tabulate(state_mix)
    bytes_ = {state.name: table.where(state=state.name)["bytes"] for state in STATES}
    occurring = [state.name for state in reversed(STATES[:-2]) if bytes_[state.name].any()]
    occurring += [state.name for state in STATES[-2:] if bytes_[state.name].any()]  # no memory: on top
    unit, name = binary_unit(max(snapshot.size for snapshot in series))
    drawn = axes_for(ax)
    drawn.stackplot(
        at,
        [bytes_[state] / unit for state in occurring],
        colors=[STATE_COLOURS[state] for state in occurring],
        edgecolor="white",
        linewidth=0.4,
    )
    handles = [Patch(facecolor=STATE_COLOURS[s], edgecolor="0.5", linewidth=0.5, label=s) for s in occurring]
    legend_beside(drawn, handles[::-1])
    _time_axis(drawn, series, at)
    drawn.set_ylim(0, max(snapshot.size for snapshot in series) / unit)
    drawn.set_ylabel(f"memory ({name})")
    drawn.set_title("Memory by state", loc="left")
    return drawn


def mappability_over_time(series: Series, ax: "Axes | None" = None) -> "Axes":
    """Draw which share of the guest a nested page table could map with 2 MiB and with 1 GiB entries."""
    at = _times(series, "mappability over time")
    table = series.tabulate(mappability)
    drawn = axes_for(ax)
    for number, (size, label) in enumerate((("2m", "2 MiB"), ("1g", "1 GiB"))):
        own = table.where(size=size)
        if own["blocks"].any():
            drawn.plot(at, own["fraction"] * 100, label=label, **line_style(number, marks=len(at)))
    _time_axis(drawn, series, at)
    drawn.set_ylim(-2, 102)
    drawn.set_ylabel("memory in blocks of one attribute (%)")
    drawn.set_title("What could be mapped whole", loc="left")
    if drawn.get_legend_handles_labels()[0]:
        legend_beside(drawn, title="entry")
    return drawn


def memory_over_time(runs: Mapping[str, Series], ax: "Axes | None" = None) -> "Axes":
    """Draw the memory that runs of one guest take: converted in place against two backings.

    Parameters
    ----------
    runs : mapping of str to Series
        Runs by name, for instance in place, legacy, and legacy with discard; of one unit.
    ax : matplotlib Axes or None
    """
    if not runs:
        raise ValueError("no run to draw")
    if len({series.unit for series in runs.values()}) > 1:
        raise ValueError("runs whose times have different units; one unit can be drawn")
    times = {name: _times(series, f"run {name!r}") for name, series in runs.items()}
    size = max(snapshot.size for series in runs.values() for snapshot in series)
    unit, unit_name = binary_unit(size)
    drawn = axes_for(ax)
    for number, (name, series) in enumerate(runs.items()):
        used = np.array([snapshot.memory_pages for snapshot in series]) * PAGE_SIZE / unit
        drawn.plot(times[name], used, label=name, **line_style(number, marks=len(used)))
    drawn.axhline(size / unit, color="0.5", linewidth=1, label="size of the guest", zorder=0)
    first = next(iter(runs.values()))
    _time_axis(drawn, first, np.concatenate(list(times.values())))
    drawn.set_ylim(bottom=0)
    drawn.set_ylabel(f"memory in use ({unit_name})")
    drawn.set_title("Memory behind a guest", loc="left")
    legend_beside(drawn)
    return drawn


def memory_of_ways(
    works: Mapping[str, Mapping[str, Sequence[tuple[float, int]]]], guest_bytes: int
) -> "Figure":
    """Draw measured memory over time: in place against two backings, a panel a work.

    Parameters
    ----------
    works : mapping of str to mapping of str to sequence of (float, int)
        Of each work, of each way to do it: seconds, and resident bytes then.
    guest_bytes : int
        Size of the guest, a line to compare with.

    Returns
    -------
    matplotlib Figure
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.4 + 2.6 * len(works)), layout="constrained")
    unit, unit_name = binary_unit(guest_bytes)
    for ax, (work, ways) in zip(figure.subplots(len(works), squeeze=False)[:, 0], works.items(), strict=True):
        for number, (way, points) in enumerate(ways.items()):
            at = [seconds for seconds, _ in points]
            label = f"{way}, {format_time(at[-1])}"
            used = [resident / unit for _, resident in points]
            ax.plot(at, used, label=label, **line_style(number, marks=len(points)))
        ax.axhline(guest_bytes / unit, color="0.5", linewidth=1, label="size of the guest", zorder=0)
        ax.set_ylim(bottom=0)
        ax.set_title(work, loc="left")
        ax.set_ylabel(f"resident ({unit_name})")
        ax.set_xlabel("seconds of work")
        legend_beside(ax)
    return figure


def _times(series: Series, what: str) -> NDArray[np.float64]:
    if len(series) < 2:
        raise ValueError(f"{what} of {len(series)} snapshots; at least two are needed")
    return np.array([snapshot.at for snapshot in series])


def _time_axis(ax: "Axes", series: Series, at: NDArray[np.float64]) -> None:
    from matplotlib.ticker import EngFormatter

    ax.set_xlim(at.min(), at.max() if at.max() > at.min() else at.min() + 1)
    ax.set_xlabel("time (s)" if series.unit == "s" else series.unit)
    if series.unit != "s" and at.max() >= 10_000:
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))


# ---- what fleets ask for ---------------------------------------------------------------------------------


def conversion_sizes(run: Run, ax: "Axes | None" = None) -> "Axes":
    """Draw how many conversions of a fleet asked for ranges of which size, a line a behaviour.

    Parameters
    ----------
    run : Run
        Of ``gmemcore stress --json``.
    ax : matplotlib Axes or None

    Raises
    ------
    ValueError
        A run of another kind, or one without a conversion.
    """
    from matplotlib.ticker import EngFormatter, NullFormatter

    run.require("stress")
    counts: dict[str, NDArray[np.float64]] = defaultdict(lambda: np.zeros(64))
    for cell, sums in run.last.cells.items():
        counts[cell.partition(" ")[0]][: len(sums.sizes)] += sums.sizes
    made = {name: own for name, own in counts.items() if own.any()}
    if not made:
        raise ValueError("no guest asked for a conversion")
    drawn = axes_for(ax)
    sizes = PAGE_SIZE * 2.0 ** np.arange(64)
    for number, (name, own) in enumerate(made.items()):
        counted = np.where(own > 0, own, np.nan)  # sizes that nobody asked for part the line
        drawn.plot(sizes, counted, label=name, **line_style(number))
    drawn.set_yscale("log")
    drawn.yaxis.set_major_formatter(EngFormatter(sep=""))
    drawn.yaxis.set_minor_formatter(NullFormatter())
    size_axis(drawn.xaxis)
    drawn.set_xlabel("size of the range, from each power of two up to the next")
    drawn.set_ylabel("conversions")
    drawn.set_title("Conversions by size", loc="left")
    drawn.locator_params("x", numticks=9)
    drawn.legend(loc="upper right", frameon=False, title="behaviour")
    return drawn


# ---- where workloads are refused -------------------------------------------------------------------------


def refusal_map(run: Run, ax: "Axes | None" = None) -> "Axes":
    """Draw how many operations of a workload are refused: revisions down, VM types across.

    Parameters
    ----------
    run : Run
        Of ``gmemcore replay --json``, with one firmware.
    ax : matplotlib Axes or None

    Raises
    ------
    ValueError
        A run of another kind, or one without a replay.
    """
    run.require("replay")
    if not run.records:
        raise ValueError("the trace was replayed nowhere")
    abis = list(dict.fromkeys(replay.abi for replay in run.records))
    vm_types = list(dict.fromkeys(replay.vm_type for replay in run.records))
    refused: Any = np.ma.MaskedArray(np.zeros((len(abis), len(vm_types))), mask=True)
    counts: dict[tuple[int, int], int] = {}
    for replay in run.records:
        place = abis.index(replay.abi), vm_types.index(replay.vm_type)
        refused[place] = replay.refused / max(replay.operations, 1) * 100
        counts[place] = replay.refused
    drawn = axes_for(ax, (3.6 + 1.1 * len(vm_types), max(1.6 + 0.32 * len(abis), 2.6)))
    image = drawn.imshow(refused, cmap=FRACTION_MAP, vmin=0, vmax=100, aspect="auto", interpolation="nearest")
    bar = drawn.figure.colorbar(image, ax=drawn, label="operations refused (%)", shrink=0.9)
    bar.outline.set_visible(False)
    for (y, x), count in counts.items():
        colour = text_colour(image, refused[y, x])
        drawn.text(x, y, f"{count:,}", ha="center", va="center", fontsize=8, color=colour)
    drawn.set_xticks(range(len(vm_types)), vm_types)
    drawn.set_yticks(range(len(abis)), abis)
    drawn.tick_params(length=0, labelsize=8)
    drawn.xaxis.tick_top()
    drawn.spines[:].set_visible(False)
    drawn.set_title("Operations refused", loc="left", pad=12)
    return drawn


# ---- by name -------------------------------------------------------------------------------------------


class Picture(NamedTuple):
    """A picture that can be asked for by name."""

    shows: str
    of: str
    """What it takes: a snapshot, snapshots by name, a series, series by name, or a run of a kind."""
    draw: "Callable[..., Axes]"


PICTURES: Final = {
    "map": Picture("every page in address order", "snapshot", page_map),
    "hilbert": Picture("every page along a Hilbert curve", "snapshot", partial(page_map, order="hilbert")),
    "runs": Picture("lengths of runs of one attribute", "snapshots", run_length_cdf),
    "stream": Picture("memory by state over time", "series", state_stream),
    "mappable": Picture("what large entries could map over time", "series", mappability_over_time),
    "memory": Picture("memory in use over time, a line a file", "several series", memory_over_time),
    "cube": Picture("what each cell of policy costs", "bench", bench_cube),
    "axes": Picture("what work costs over all axes that were measured", "bench", bench_axes),
    "cost": Picture("speed against the size of one conversion", "bench", cost_by_range),
    "sizes": Picture("conversions by size, a line a behaviour", "stress", conversion_sizes),
    "refusals": Picture("operations refused, by revision and VM type", "replay", refusal_map),
}
"""Pictures by name."""
