"""Pictures of measurements: a bench run over all of its axes, and memory of two backings beside one."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from gmemcore.analysis.style import binary_unit, legend_beside, line_style
from gmemcore.uapi import PAGE_SIZE
from gmemcore.units import format_number, format_size, format_time

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, Any]
"""A cell's line of ``gmemcore bench --json``."""

Figures = tuple[str, tuple[str, int], float]
"""Row, column and figure of one cell."""
Cells = Sequence[Figures]
UNIFORM: Final = "uniform"


def speed_map(records: Sequence[Record]) -> "Figure":
    """Draw the cube of a run: kinds of work down, sizes by fragmentation across, a pair of panels a setting.

    Cells that do the same work are one row. Of a pair the upper one has what moves bytes, GB/s of bytes that
    the step touches, the lower one what moves none, nanoseconds a page. Colours are logarithmic, lighter is
    faster.

    Parameters
    ----------
    records : sequence of mapping
        The cells' lines of ``gmemcore bench --json``.

    Returns
    -------
    matplotlib Figure

    Raises
    ------
    ValueError
        Nothing was measured: all of the cells were refused.
    """
    from matplotlib.figure import Figure

    panels: list[tuple[str, Cells, str]] = []
    for setting, own in _by_setting(records).items():
        for cells, what, colours in (
            (list(_speeds(own)), "bytes moved: GB/s", "viridis"),
            (list(_times(own)), "no bytes moved: nanoseconds a page", "viridis_r"),
        ):
            if cells:
                panels.append((f"{setting}. {what}", cells, colours))
    if not panels:
        raise ValueError("every cell was refused; there is nothing to draw")
    heights = [len({row for row, _, _ in cells}) + 2.5 for _, cells, _ in panels]
    columns = max(len({column for _, column, _ in cells}) for _, cells, _ in panels)
    figure = Figure(figsize=(4 + 0.6 * columns, 1 + 0.3 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
    for ax, panel in zip(axes, panels, strict=True):
        _heat(ax, *panel)
    return figure


def _by_setting(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Sort cells by memory and threads, in words."""
    found: dict[str, list[Record]] = {}
    for record in records:
        pages = "huge pages" if record["huge_pages"] else "small pages"
        threads = "1 thread" if record["threads"] == 1 else f"{record['threads']} threads"
        enforced = ", enforced by mprotect" if record.get("enforce") else ""
        found.setdefault(f"{record['backing']}, {pages}, {threads}{enforced}", []).append(record)
    return found


def _speeds(records: Iterable[Record]) -> Iterator[Figures]:
    """Yield row, column and GB/s of every step that moves bytes."""
    for record in records:
        where = record["direction"].replace("_", " ")
        if record["convert_gbps"] is not None:
            yield f"{record['effect']} {where} ({record['bytes']})", _column(record), record["convert_gbps"]
        if record["populate_gbps"] is not None:
            how = "populate in place" if record["primitive"] == "xor" else "populate from a source"
            if record["abi"] == "legacy":
                how = f"legacy {where}, copied across"
            yield how, _column(record), record["populate_gbps"]


def _times(records: Iterable[Record]) -> Iterator[Figures]:
    """Yield row, column and nanoseconds a page of every conversion that moves no bytes."""
    for record in records:
        seconds = record["seconds"]["median"]
        if seconds is not None and record["bytes"] == "none":
            what = "legacy, with the discard" if record["abi"] == "legacy" else "attributes"
            row = f"{record['vm_type']} {record['direction'].replace('_', ' ')}, {what}"
            yield row, _column(record), seconds / (record["range"] / PAGE_SIZE) * 1e9


def _column(record: Record) -> tuple[str, int]:
    """What a column is: how page state alternates, and the size."""
    shape = record["fragmentation"] if record["pages_allocated_before"] else "unallocated"
    return shape, record["range"]


def _heat(ax: "Axes", title: str, cells: Cells, colours: str) -> None:
    """Draw one panel; several figures for one place become their median."""
    from matplotlib.colors import LogNorm

    rows = list(dict.fromkeys(row for row, _, _ in cells))
    columns = sorted({column for _, column, _ in cells}, key=lambda each: (each[0] != UNIFORM, each))
    places: dict[tuple[int, int], list[float]] = {}
    for row, column, figure in cells:
        places.setdefault((rows.index(row), columns.index(column)), []).append(figure)
    values: Any = np.full((len(rows), len(columns)), np.nan)
    for place, figures in places.items():
        values[place] = median(figures)
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    norm = LogNorm(low, max(high, low * 1.01))
    image = ax.imshow(np.ma.masked_invalid(values), cmap=colours, norm=norm, aspect="auto")
    for y, x in places:
        shade = image.cmap(norm(values[y, x]))
        bright = float(np.dot(shade[:3], (0.299, 0.587, 0.114))) > 0.55
        text = format_number(values[y, x])
        ax.text(x, y, text, ha="center", va="center", size=7, color="black" if bright else "white")
    names = [format_size(size) + ("" if shape == UNIFORM else f" {shape}") for shape, size in columns]
    ax.set_yticks(range(len(rows)), rows, size=8)
    ax.set_xticks(range(len(columns)), names, size=7, rotation=40, ha="right")
    ax.set_title(title, loc="left", size=10)


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
