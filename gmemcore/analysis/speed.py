"""Pictures of what conversions cost: by effect, by cell of policy, over all axes, and by size."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from textwrap import fill
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from gmemcore.analysis.runs import BenchCell, Run
from gmemcore.analysis.style import (
    BLUE,
    FRACTION_MAP,
    GREEN,
    axes_for,
    legend_beside,
    line_style,
    size_axis,
    text_colour,
)
from gmemcore.results.bench_tables import CONVERSION, operation_words, setting_of, telling_words
from gmemcore.uapi import PAGE_SIZE
from gmemcore.units import size_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes

UNIFORM: Final = "uniform"
PALE: Final = "0.75"
"""Grey of the bars of primitives."""
_MOST_BEYOND: Final = 1.3
"""Where intervals are cut, in lengths of the longest bar: a wild one must not make all bars short."""
_IN_CELL: Final[dict[str, Any]] = {"ha": "center", "va": "center", "fontsize": 7.5}


def bench_effects(run: Run, ax: "Axes | None" = None) -> "Axes":
    """Draw GB/s of each effect next to memcpy, memset and XOR of the same run.

    Parameters
    ----------
    run : Run
        Of ``gmemcore bench``, read by `gmemcore.analysis.runs.read_run`.
    ax : matplotlib Axes or None

    Notes
    -----
    The figures are those of the run's verdict: the largest range, uniform memory, the first setting. A line
    through the end of a bar is its 95 % interval, cut at 1.3 times the longest bar. KEEP moves no byte
    and has no bar.

    Raises
    ------
    ValueError
        No effect that moves bytes was measured.
    """
    run.require("bench")
    bars: list[tuple[str, float, float, float, str]] = []
    shown = max((line.range for line in run.first.verdict.effects if line.gbps is not None), default=0)
    for curve in run.first.primitives_by_range:
        if curve.range == shown and curve.gbps is not None:
            spread = curve.ns_per_page.interval.inverse(PAGE_SIZE)
            bars.append((f"{curve.primitive} ({curve.by})", *spread[:3], PALE))
    for line in run.first.verdict.effects:
        if line.gbps is not None:
            name = _LINES.get(line.effect, line.effect)
            bars.append((name, line.gbps.median, line.gbps.low, line.gbps.high, BLUE))
    if not shown:
        raise ValueError("no effect that moves bytes was measured")
    drawn = axes_for(ax, (7.0, 0.9 + 0.34 * len(bars)))
    limit = _MOST_BEYOND * max(median_ for _, median_, *_ in bars)
    for y, (_, median_, low, high, colour) in enumerate(bars):
        end = min(max(high, median_), limit)
        drawn.barh(y, median_, color=colour, height=0.7)
        drawn.plot([low, end], [y, y], color="0.25", linewidth=1.2, solid_capstyle="butt")
        beside: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 9}
        drawn.annotate(f"{median_:.3g}", (end, y), (4, 0), **beside)
    drawn.set_yticks(range(len(bars)), [name for name, *_ in bars])
    drawn.invert_yaxis()
    drawn.tick_params("y", length=0)
    drawn.margins(x=0.1)
    drawn.set_xlim(left=0)
    drawn.set_xlabel("GB/s (1e9 bytes of guest memory)")
    drawn.set_title(f"Speed of conversions of {size_words(shown)}", loc="left")
    return drawn


def bench_cube(
    run: Run, ax: "Axes | None" = None, *, abi: str | None = None, size: int | None = None
) -> "Axes":
    """Draw what each cell of policy costs, or that it is refused: flags across, the rest down.

    Parameters
    ----------
    run : Run
        Of ``gmemcore bench``, read by `gmemcore.analysis.runs.read_run`.
    ax : matplotlib Axes or None
    abi : str or None
        Revision; None: the first of the run.
    size : int or None
        Bytes of one conversion; None: the largest of each cell.

    Notes
    -----
    A cell says what happens to the bytes, whether by the flag or by the platform itself, and what the
    conversion costs, in ns per 4 KiB page; the colour is the cost, on a logarithmic scale. Populate and copy
    have columns of their own in the run. Of several settings (backing, threads, page size) the first is
    drawn, of several fragmentations uniform memory.
    """
    cells = _cells_of(run_cells(run), abi)
    unknown = _unknown_flags(cells)
    cells = [cell for cell in cells if cell.flag not in unknown]
    chosen = _one_per_cell(cells, size)
    rows = list(dict.fromkeys(_row_of(cell) for cell in cells))
    flags = list(dict.fromkeys(cell.flag for cell in cells))
    costs: Any = np.ma.MaskedArray(np.zeros((len(rows), len(flags))), mask=True)
    for (row, flag), cell in chosen.items():
        if cell.effect is not None:
            costs[rows.index(row), flags.index(flag)] = _convert_ns(cell)
    drawn = axes_for(ax, (max(3.4 + 1.3 * len(flags), 6.5), max(1.6 + 0.28 * len(rows), 3.8)))
    image = _draw_costs(drawn, costs, "cost of the conversion")
    for (row, flag), cell in chosen.items():
        _mark_cell(drawn, image, flags.index(flag), rows.index(row), cell, costs)
    names = [flag.replace("PRESERVE_", "PRESERVE_\n") for flag in flags]
    _label_cells(drawn, names, [" ".join(row) for row in rows])
    for y in range(1, len(rows)):
        drawn.axhline(y - 0.5, color="black", linewidth=1.2 if rows[y][0] != rows[y - 1][0] else 0)
    if unknown:
        missing = fill(", ".join(unknown), 25 * max(len(flags), 2), break_long_words=False)
        drawn.set_xlabel(f"unknown to {cells[0].abi}, EINVAL everywhere:\n{missing}", fontsize=8, loc="left")
    of_size = "the largest range" if size is None else f"ranges of {size_words(size)}"
    title = f"{cells[0].abi}, firmware {cells[0].firmware}: {of_size}"
    drawn.set_title(title, loc="left", pad=24 if any("PRESERVE_" in flag for flag in flags) else 12)
    return drawn


def _unknown_flags(cells: Sequence[BenchCell]) -> list[str]:
    """Return the flags that the revision doesn't know, whose columns would be EINVAL throughout."""
    outcomes: dict[str, set[str]] = defaultdict(set)
    for cell in cells:
        outcomes[cell.flag].add(cell.outcome)
    return [flag for flag, own in outcomes.items() if own == {"EINVAL"}]


def bench_axes(run: Run, ax: "Axes | None" = None, *, abi: str | None = None) -> "Axes":
    """Draw the cost of each kind of work: sizes by fragmentation across, settings down.

    Parameters
    ----------
    run : Run
        Of ``gmemcore bench``.
    ax : matplotlib Axes or None
    abi : str or None
        Revision; None: all of the run.

    Notes
    -----
    Cells that do the same work share a row, and their figure is the median. Work that moves bytes comes
    first, per 4 KiB page that it touches, then conversions of attributes alone, per page of their range.

    Raises
    ------
    ValueError
        Every cell was refused.
    """
    cells = _all_cells(run) if abi is None else _cells_of(_all_cells(run), abi)
    measured = [cell for cell in cells if cell.effect is not None]
    if not measured:
        raise ValueError("every cell was refused; there is nothing to draw")
    settings = telling_words([setting_of(cell) for cell in measured])
    figures: dict[tuple[tuple[str, bool, str], tuple[bool, str, int]], list[float]] = defaultdict(list)
    for cell in measured:
        for moves, work, cost in _works(cell):
            figures[(settings[setting_of(cell)], not moves, work), _column(cell)].append(cost)
    order = list(settings.values())
    rows = sorted({row: None for row, _ in figures}, key=lambda row: (order.index(row[0]), row[1]))
    columns = sorted({column for _, column in figures})
    costs: Any = np.ma.MaskedArray(np.zeros((len(rows), len(columns))), mask=True)
    for (row, column), own in figures.items():
        costs[rows.index(row), columns.index(column)] = median(own)
    drawn = axes_for(ax, (max(5.5 + 0.8 * len(columns), 6.5), max(1.8 + 0.28 * len(rows), 3.8)))
    image = _draw_costs(drawn, costs, "cost")
    for y, x in np.argwhere(~np.ma.getmaskarray(costs)).tolist():
        colour = text_colour(image, costs[y, x])
        drawn.text(x, y, _cost_words(costs[y, x]), color=colour, **_IN_CELL)
    names = [size_words(size) + (f"\n{shape}" if apart else "") for apart, shape, size in columns]
    _label_cells(drawn, names, [f"{setting}: {work}" if setting else work for setting, _, work in rows])
    for y in range(1, len(rows)):
        if rows[y][:2] != rows[y - 1][:2]:
            drawn.axhline(y - 0.5, color="black", linewidth=1.2)
    drawn.set_title("Cost of work, by size of one conversion", loc="left", pad=12)
    return drawn


def _works(cell: BenchCell) -> Iterator[tuple[bool, str, float]]:
    """Yield what a cell was timed at: whether it moves bytes, its name, and ns per page."""
    where = cell.direction.replace("_", " ")
    legacy = cell.abi == "legacy"
    if cell.convert_gbps is not None:
        yield True, f"{cell.does or cell.effect} {where}", PAGE_SIZE / cell.convert_gbps
    if cell.populate_gbps is not None:
        how = "populate in place" if cell.primitive == "xor" else "populate from a source"
        yield True, f"legacy {where}, copy" if legacy else how, PAGE_SIZE / cell.populate_gbps
    if cell.bytes == "none":
        what = "legacy, with the discard" if legacy else "attributes"
        yield False, f"{cell.vm_type} {where}, {what}", _convert_ns(cell)


def _convert_ns(cell: BenchCell) -> float:
    """Return ns per 4 KiB page of the conversion: of the pages that it touches, if it moves bytes."""
    if cell.ns_per_page is not None:
        return cell.ns_per_page.median
    assert cell.seconds.median is not None
    return cell.seconds.median / cell.range * PAGE_SIZE * 1e9


def _column(cell: BenchCell) -> tuple[bool, str, int]:
    """Return the column of a cell: whether its pages alternate or are new, how, and the size."""
    shape = cell.fragmentation if cell.pages_allocated_before else "unallocated"
    return shape != UNIFORM, shape, cell.range


def _label_cells(ax: "Axes", columns: Sequence[str], rows: Sequence[str]) -> None:
    """Name the columns, above, and the rows of a heat map."""
    ax.set_xticks(range(len(columns)), columns)
    ax.set_yticks(range(len(rows)), rows)
    ax.tick_params(length=0, labelsize=8)
    ax.xaxis.tick_top()
    ax.spines[:].set_visible(False)


def _draw_costs(ax: "Axes", costs: Any, what: str) -> Any:
    """Draw the cells that have a cost, and the scale; returns the image."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FuncFormatter, NullFormatter

    positive = costs.compressed()
    low, high = positive.min(), positive.max()
    norm = LogNorm(low, max(high, low * 1.01))
    image = ax.imshow(costs, cmap=FRACTION_MAP, norm=norm, aspect="auto", interpolation="nearest")
    bar = ax.figure.colorbar(image, ax=ax, label=f"{what} (ns per 4 KiB page)", shrink=0.9)
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    return image


def _mark_cell(ax: "Axes", image: Any, x: int, y: int, cell: BenchCell, costs: Any) -> None:
    """Write into a cell what happens there: the effect and its cost, or the refusal over hatching."""
    from matplotlib.patches import Rectangle

    if cell.effect is not None:
        words = f"{cell.does or cell.effect} {_cost_words(costs[y, x])}"
        ax.text(x, y, words, color=text_colour(image, costs[y, x]), **_IN_CELL)
        return
    hatched = Rectangle(
        (x - 0.5, y - 0.5), 1, 1, facecolor="white", hatch="////", edgecolor="0.75", linewidth=0
    )
    ax.add_patch(hatched)
    box = {"boxstyle": "square,pad=0.1", "facecolor": "white", "linewidth": 0}
    ax.text(x, y, cell.outcome, color="0.35", bbox=box, **_IN_CELL)


def cost_by_range(run: Run, ax: "Axes | None" = None, *, abi: str | None = None) -> "Axes":
    """Draw speed against the size of one conversion: what moves bytes in GB/s, attributes in ns per page.

    A line is the median over the cells of one operation on bytes; its band reaches from the slowest to the
    fastest cell. Dotted lines are the memory primitives at each size. Conversions of attributes alone move no
    byte and have a panel of their own below.

    Parameters
    ----------
    run : Run
        Of ``gmemcore bench``.
    ax : matplotlib Axes or None
    abi : str or None
        Revision; None: all of the run.

    Raises
    ------
    ValueError
        Nothing was measured at a size.
    """
    cells = run_cells(run) if abi is None else _cells_of(run_cells(run), abi)
    speeds: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    keeps: dict[int, list[float]] = defaultdict(list)
    for cell in cells:
        if cell.convert_gbps is not None:
            speeds[_OPERATIONS.get(cell.bytes, cell.bytes)][cell.range].append(cell.convert_gbps)
        elif cell.abi == "legacy" and cell.populate_gbps is not None:
            speeds["copy (two backings)"][cell.range].append(cell.populate_gbps)
        elif cell.abi != "legacy" and cell.does == "KEEP" and cell.pages_allocated_before:
            keeps[cell.range].append(_convert_ns(cell))
    if not speeds and not keeps:
        raise ValueError("no conversion was measured")
    drawn = axes_for(ax, (7.5, 5.6 if speeds and keeps else 4.2))
    below = _panel_below(drawn) if speeds and keeps else drawn
    sizes = sorted({size for by_range in (*speeds.values(), keeps) for size in by_range})
    curves = _primitive_curves(run, cells)
    if speeds:
        for number, (operation, by_range) in enumerate(speeds.items()):
            _plot_by_range(drawn, by_range, operation, line_style(number))
        _speed_axes(drawn, sizes)
        _draw_primitives(drawn, {name: own for name, own in curves.items() if name != "bitmap"}, speed=True)
        drawn.set_ylabel("GB/s")
    if keeps:
        _plot_by_range(below, keeps, "attributes alone", KEEP_STYLE)
        _speed_axes(below, sizes)
        _draw_primitives(below, {name: own for name, own in curves.items() if name == "bitmap"}, speed=False)
        below.set_ylabel("ns per 4 KiB page")
    if below is not drawn:
        drawn.set_xlabel("")
        drawn.tick_params("x", labelbottom=False)
    drawn.set_title("Speed by the size of one conversion; dotted: memory primitives", loc="left")
    _add_legend(drawn, below, own_figure=ax is None)
    return drawn


def kernel_operations(run: Run, ax: "Axes | None" = None, *, vm_type: str | None = None) -> "Axes":
    """Draw the time per page of each operation of a real kernel, next to memcpy and memset of the same run.

    Parameters
    ----------
    run : Run
        Of ``gmemcore kvm bench``.
    ax : matplotlib Axes or None
    vm_type : str or None
        VM type; None: all of the run.

    Notes
    -----
    A point is the median of an operation at one range, a line its 95 % interval. Operations that don't
    grow with pages, such as creating a file, have none.

    Raises
    ------
    ValueError
        No operation has a time per page.
    """
    figures = [
        (operation_words(cell), cell.range, cell.ns_per_page)
        for cell in _all_cells(run)
        if cell.operation != CONVERSION and cell.ns_per_page and vm_type in (None, cell.vm_type)
    ]
    if not figures:
        raise ValueError("no operation of a kernel was measured per page")
    names = [*dict.fromkeys(name for name, *_ in figures)]
    drawn = axes_for(ax, (7.5, 1.2 + 0.34 * len(names)))
    for number, size in enumerate(sorted({size for _, size, _ in figures})):
        own = [(names.index(name), spread) for name, range_, spread in figures if range_ == size]
        style = line_style(number) | {"linestyle": ""}
        for y, spread in own:
            drawn.plot([spread.low, spread.high], [y, y], color=style["color"], linewidth=1.2)
        drawn.plot([spread.median for _, spread in own], [y for y, _ in own], label=size_words(size), **style)
    drawn.set_xscale("log")
    drawn.set_yticks(range(len(names)), [fill(name, 44) for name in names])
    drawn.invert_yaxis()
    drawn.grid(axis="x", color="0.9")
    drawn.set_axisbelow(True)
    drawn.set_xlabel("ns per 4 KiB page")
    drawn.set_title("Operations of the kernel", loc="left")
    legend_beside(drawn, title="range")
    return drawn


def _add_legend(ax: "Axes", below: "Axes", *, own_figure: bool) -> None:
    """Name the lines of both panels: under them in a figure of their own, else in the upper one."""
    labelled = [panel.get_legend_handles_labels() for panel in dict.fromkeys((ax, below))]
    handles, names = ([one for panel in labelled for one in panel[i]] for i in range(2))
    if own_figure:
        figure: Any = ax.figure
        figure.legend(handles, names, loc="outside lower left", ncols=2, frameon=False)
    else:
        ax.legend(handles=handles, labels=names, frameon=False)


def _panel_below(ax: "Axes") -> "Axes":
    """Return new Axes in the lower part of the place of others, which keep the upper part."""
    figure: Any = ax.figure
    place = ax.get_subplotspec()
    if place is None:
        return ax.inset_axes((0, -0.6, 1, 0.4))
    grid = place.subgridspec(2, 1, height_ratios=(2, 1))
    ax.set_subplotspec(grid[0])
    added: Axes = figure.add_subplot(grid[1])
    added.spines[["top", "right"]].set_visible(False)
    return added


def _plot_by_range(
    ax: "Axes", by_range: Mapping[int, Sequence[float]], label: str, style: Mapping[str, Any]
) -> None:
    """Draw medians by size, and the band from the least to the most."""
    ranges = sorted(by_range)
    ax.plot(ranges, [float(np.median(by_range[size])) for size in ranges], label=label, **style)
    if len(ranges) > 1:
        low, high = ([pick(by_range[size]) for size in ranges] for pick in (min, max))
        ax.fill_between(ranges, low, high, color=style["color"], alpha=0.15, linewidth=0)


def _speed_axes(ax: "Axes", sizes: Sequence[int]) -> None:
    """Let sizes and speeds be logarithmic, in plain numbers."""
    from matplotlib.ticker import LogFormatter

    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.yaxis.set_minor_formatter(LogFormatter())  # where there is room
    size_axis(ax.xaxis)
    ax.set_xticks(list(sizes), [size_words(size) for size in sizes])
    ax.set_xticks([], minor=True)
    ax.set_xlabel("size of one conversion")


def _primitive_curves(run: Run, cells: Sequence[BenchCell]) -> dict[str, dict[int, float]]:
    """Return ns per page of each primitive by size: the median over the cells that it was timed in turn with.

    A primitive that is no cell's yardstick at a size has the figure that was taken of it alone.
    """
    figures: dict[str, dict[int, float]] = defaultdict(dict)
    for curve in run.first.primitives_by_range:
        figures[curve.primitive][curve.range] = curve.ns_per_page.median
    in_turn: dict[tuple[str, int], list[float]] = defaultdict(list)
    for cell in cells:
        if cell.primitive is not None and cell.primitive_ns_per_page:
            in_turn[cell.primitive, cell.range].append(cell.primitive_ns_per_page)
    for (primitive, size), own in in_turn.items():
        figures[primitive][size] = median(own)
    return figures


def _draw_primitives(ax: "Axes", curves: Mapping[str, Mapping[int, float]], *, speed: bool) -> None:
    """Draw ns per page of each primitive by size, or GB/s, dotted, each with its name at the right."""
    curves = {
        name: {size: PAGE_SIZE / by_range[size] if speed else by_range[size] for size in sorted(by_range)}
        for name, by_range in curves.items()
    }
    style: dict[str, Any] = {"color": "0.45", "linewidth": 1.2, "linestyle": (0, (1, 1)), "zorder": 0}
    words: dict[str, Any] = {"va": "center", "fontsize": 9, "color": "0.45", "annotation_clip": False}
    for by_range in curves.values():
        ax.plot([*by_range], [*by_range.values()], **style)
    ends = {primitive: by_range[max(by_range)] for primitive, by_range in curves.items()}
    if ends:
        for (primitive, _), height in _spread(ends, ax).items():
            ax.annotate(f" {primitive}", (1, height), xycoords=("axes fraction", "data"), **words)


def _spread(speeds: Mapping[str, float], ax: "Axes") -> dict[tuple[str, float], float]:
    """Return heights for the names of speeds on a logarithmic axis, such that none covers another."""
    low, high = ax.get_ylim()
    apart = (max(high, *speeds.values()) / low) ** 0.05
    heights: dict[tuple[str, float], float] = {}
    below = 0.0
    for name, speed in sorted(speeds.items(), key=lambda item: item[1]):
        below = heights[name, speed] = max(speed, below * apart)
    return heights


_OPERATIONS: Final = {"zero": "zero", "xor": "XOR with the key stream", "random": "scramble"}
"""Operations on bytes, in words."""
_LINES: Final = {"populate": "populate in place", "copy": "copy (two backings)"}
"""Lines of the verdict that are no effect, in words."""
KEEP_STYLE: Final[dict[str, Any]] = {
    "color": GREEN,
    "linestyle": (0, (5, 1, 1, 1)),
    "marker": "*",
    "markersize": 7,
    "clip_on": False,
}


def run_cells(run: Run) -> list[BenchCell]:
    """Return the cells of a bench run of its first setting, and of uniform memory if there is any.

    Raises
    ------
    ValueError
        A run of another kind, or one without a cell.
    """
    return _of_one_setting(_all_cells(run))


def _all_cells(run: Run) -> list[BenchCell]:
    """Return the cells of a bench run, but for those that an interruption left without their time.

    Raises
    ------
    ValueError
        A run of another kind, or one without a cell.
    """
    run.require("bench")
    cells = [cell for cell in run.records if cell.effect is None or cell.seconds.median is not None]
    if not cells:
        raise ValueError("the run has no cell")
    return cells


def _of_one_setting(cells: Sequence[BenchCell]) -> list[BenchCell]:
    """Return refused cells, and of the others those of the first one's setting."""
    measured = [cell for cell in cells if cell.effect is not None]
    shapes = {cell.fragmentation for cell in measured}
    shape = UNIFORM if UNIFORM in shapes else measured[0].fragmentation if measured else ""
    wanted = {(*setting_of(cell), shape) for cell in measured[:1]}
    return [
        cell for cell in cells if cell.effect is None or (*setting_of(cell), cell.fragmentation) in wanted
    ]


def _cells_of(cells: Sequence[BenchCell], abi: str | None) -> list[BenchCell]:
    """Return the cells of one revision and its first firmware; None: of the first revision."""
    wanted = cells[0].abi if abi is None else abi
    own = [cell for cell in cells if cell.abi == wanted]
    if not own:
        known = ", ".join(dict.fromkeys(cell.abi for cell in cells))
        raise ValueError(f"the run has no cell of {wanted!r}; it has {known}")
    return [cell for cell in own if cell.firmware == own[0].firmware]


def _row_of(cell: BenchCell) -> tuple[str, str, str]:
    return cell.vm_type, cell.phase, cell.direction.replace("_", " ")


def _one_per_cell(
    cells: Sequence[BenchCell], size: int | None
) -> dict[tuple[tuple[str, str, str], str], BenchCell]:
    """Return the measurement that stands for each cell: of allocated memory if possible, and the largest."""
    chosen: dict[tuple[tuple[str, str, str], str], BenchCell] = {}
    for cell in sorted(cells, key=lambda cell: (cell.pages_allocated_before > 0, cell.range)):
        if size is None or cell.effect is None or cell.range == size:
            chosen[_row_of(cell), cell.flag] = cell
    if not any(cell.effect is not None for cell in chosen.values()):
        sizes = ", ".join(size_words(size) for size in sorted({cell.range for cell in cells}))
        raise ValueError(f"no cell was measured at that size; there are {sizes}")
    return chosen


def _cost_words(nanoseconds: float) -> str:
    return f"{nanoseconds:.0f}" if nanoseconds >= 10 else f"{nanoseconds:.2g}"
