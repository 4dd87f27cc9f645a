"""Pictures of what conversions cost: a bench run by cell of policy, over all of its axes, and by size."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from textwrap import fill
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from gmemcore.analysis.runs import BenchCell, Run
from gmemcore.analysis.style import FRACTION_MAP, axes_for, line_style, size_axis, text_colour
from gmemcore.uapi import PAGE_SIZE
from gmemcore.units import size_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes

UNIFORM: Final = "uniform"
_IN_CELL: Final[dict[str, Any]] = {"ha": "center", "va": "center", "fontsize": 7.5}


def bench_cube(
    run: Run, ax: "Axes | None" = None, *, abi: str | None = None, size: int | None = None
) -> "Axes":
    """Draw what each cell of policy costs, or that it is refused: flags across, the rest down.

    Parameters
    ----------
    run : Run
        Of ``gmemcore bench --json``, read by `gmemcore.analysis.runs.read_run`.
    ax : matplotlib Axes or None
    abi : str or None
        Revision; None: the first of the run.
    size : int or None
        Bytes of one conversion; None: each cell's largest.

    Notes
    -----
    The figure is the conversion's alone, per page of 4 KiB, on a logarithmic scale; populate and copying have
    columns of their own in the run. Of a run of several settings (backing, huge pages, threads) the first is
    drawn, of several fragmentations uniform memory.
    """
    cells = _cells_of(run_cells(run), abi)
    unknown = _unknown_flags(cells)
    cells = [cell for cell in cells if cell.flag not in unknown]
    chosen = _one_a_cell(cells, size)
    rows = list(dict.fromkeys(_row_of(cell) for cell in cells))
    flags = list(dict.fromkeys(cell.flag for cell in cells))
    costs: Any = np.ma.MaskedArray(np.zeros((len(rows), len(flags))), mask=True)
    for (row, flag), cell in chosen.items():
        if cell.effect is not None and cell.seconds.median is not None:
            costs[rows.index(row), flags.index(flag)] = cell.seconds.median / cell.range * PAGE_SIZE * 1e9
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
        drawn.set_xlabel(f"unknown there, EINVAL everywhere:\n{missing}", fontsize=8, loc="left")
    of_size = "the largest range" if size is None else f"ranges of {size_words(size)}"
    title = f"{cells[0].abi}, firmware {cells[0].firmware}: {of_size}"
    drawn.set_title(title, loc="left", pad=24 if any("PRESERVE_" in flag for flag in flags) else 12)
    return drawn


def _unknown_flags(cells: Sequence[BenchCell]) -> list[str]:
    """Flags that the revision doesn't know: a column of EINVAL says no more than their names."""
    outcomes: dict[str, set[str]] = defaultdict(set)
    for cell in cells:
        outcomes[cell.flag].add(cell.outcome)
    return [flag for flag, own in outcomes.items() if own == {"EINVAL"}]


def bench_axes(run: Run, ax: "Axes | None" = None, *, abi: str | None = None) -> "Axes":
    """Draw what kinds of work cost over all axes of a run: sizes by fragmentation across, settings down.

    Parameters
    ----------
    run : Run
        Of ``gmemcore bench --json``.
    ax : matplotlib Axes or None
    abi : str or None
        Revision; None: all of the run.

    Notes
    -----
    Cells that do the same work are one row, their figure the median. Work that moves bytes comes first, per
    page of 4 KiB that it touches; then conversions of attributes alone, per page of their range.

    Raises
    ------
    ValueError
        Nothing was measured: all of the cells were refused.
    """
    cells = _all_cells(run) if abi is None else _cells_of(_all_cells(run), abi)
    measured = [cell for cell in cells if cell.effect is not None]
    if not measured:
        raise ValueError("every cell was refused; there is nothing to draw")
    settings = _setting_words([_setting(cell) for cell in measured])
    figures: dict[tuple[tuple[str, bool, str], tuple[bool, str, int]], list[float]] = defaultdict(list)
    for cell in measured:
        for moves, work, cost in _works(cell):
            figures[(settings[_setting(cell)], not moves, work), _column(cell)].append(cost)
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
    """Yield what a cell was timed at: whether it moves bytes, its name, and nanoseconds a page."""
    where = cell.direction.replace("_", " ")
    legacy = cell.abi == "legacy"
    if cell.convert_gbps is not None:
        yield True, f"{cell.effect} {where} ({cell.bytes})", PAGE_SIZE / cell.convert_gbps
    if cell.populate_gbps is not None:
        how = "populate in place" if cell.primitive == "xor" else "populate from a source"
        yield True, f"legacy {where}, copied across" if legacy else how, PAGE_SIZE / cell.populate_gbps
    if cell.bytes == "none" and cell.seconds.median is not None:
        what = "legacy, with the discard" if legacy else "attributes"
        yield False, f"{cell.vm_type} {where}, {what}", cell.seconds.median / cell.range * PAGE_SIZE * 1e9


def _column(cell: BenchCell) -> tuple[bool, str, int]:
    """Where a cell stands across: whether its pages alternate or are new, how, and the size."""
    shape = cell.fragmentation if cell.pages_allocated_before else "unallocated"
    return shape != UNIFORM, shape, cell.range


def _setting_words(settings: Sequence[tuple[str, bool, int, bool]]) -> dict[tuple[str, bool, int, bool], str]:
    """Each setting in the words that tell it from the others."""
    words = {
        (backing, huge, threads, enforce): (
            backing,
            "huge pages" if huge else "small pages",
            "1 thread" if threads == 1 else f"{threads} threads",
            "enforced" if enforce else "not enforced",
        )
        for backing, huge, threads, enforce in settings
    }
    telling = [len(set(column)) > 1 for column in zip(*words.values(), strict=True)]
    return {
        setting: ", ".join(word for word, tells in zip(own, telling, strict=True) if tells)
        for setting, own in words.items()
    }


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
    bar = ax.figure.colorbar(image, ax=ax, label=f"{what} (ns a 4 KiB page)", shrink=0.9)
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    return image


def _mark_cell(ax: "Axes", image: Any, x: int, y: int, cell: BenchCell, costs: Any) -> None:
    """Write into a cell what happens there: the effect and its cost, or the refusal over hatching."""
    from matplotlib.patches import Rectangle

    if cell.effect is not None:
        words = f"{cell.effect} {_cost_words(costs[y, x])}"
        ax.text(x, y, words, color=text_colour(image, costs[y, x]), **_IN_CELL)
        return
    hatched = Rectangle(
        (x - 0.5, y - 0.5), 1, 1, facecolor="white", hatch="////", edgecolor="0.75", linewidth=0
    )
    ax.add_patch(hatched)
    box = {"boxstyle": "square,pad=0.1", "facecolor": "white", "linewidth": 0}
    ax.text(x, y, cell.outcome, color="0.35", bbox=box, **_IN_CELL)


def cost_by_range(run: Run, ax: "Axes | None" = None, *, abi: str | None = None) -> "Axes":
    """Draw the speed of what moves bytes against the size of one conversion, below the primitives of the run.

    A line is the median over the cells of one operation on bytes, and its band reaches from the slowest to
    the fastest; in `legacy` it is copying from one backing to the other.

    Parameters
    ----------
    run : Run
        Of ``gmemcore bench --json``.
    ax : matplotlib Axes or None
    abi : str or None
        Revision; None: all of the run.
    """
    from matplotlib.ticker import LogFormatter

    cells = run_cells(run) if abi is None else _cells_of(run_cells(run), abi)
    speeds: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        if cell.convert_gbps is not None:
            speeds[_OPERATIONS.get(cell.bytes, cell.bytes)][cell.range].append(cell.convert_gbps)
        elif cell.abi == "legacy" and cell.populate_gbps is not None:
            speeds["copy across (legacy)"][cell.range].append(cell.populate_gbps)
    if not speeds:
        raise ValueError("no cell of the run moves bytes; bench with two-caps or legacy has some that do")
    drawn = axes_for(ax)
    for number, (operation, by_range) in enumerate(speeds.items()):
        ranges = sorted(by_range)
        style = line_style(number)
        middle = [float(np.median(by_range[size])) for size in ranges]
        drawn.plot(ranges, middle, label=operation, **style)
        if len(ranges) > 1:
            low, high = ([pick(by_range[size]) for size in ranges] for pick in (min, max))
            drawn.fill_between(ranges, low, high, color=style["color"], alpha=0.15, linewidth=0)
    every = sorted({size for by_range in speeds.values() for size in by_range})
    drawn.set_yscale("log")
    for (name, speed), height in _spread(run.first.primitives, drawn).items():
        drawn.axhline(speed, color="0.4", linewidth=1, linestyle=(0, (1, 1)), zorder=0)
        place: dict[str, Any] = {
            "xycoords": ("axes fraction", "data"),
            "va": "center",
            "fontsize": 9,
            "color": "0.4",
        }
        drawn.annotate(f" {name} {speed:.3g}", (1, height), annotation_clip=False, **place)
    drawn.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    drawn.yaxis.set_minor_formatter(LogFormatter())  # numbers in plain text, where there is room
    size_axis(drawn.xaxis)
    drawn.set_xticks(every, [size_words(size) for size in every])
    drawn.set_xticks([], minor=True)
    drawn.set_xlabel("size of one conversion")
    drawn.set_ylabel("speed (GB/s, 1e9 bytes of guest memory)")
    drawn.set_title("Cost against size, and the memory primitives as ceilings", loc="left")
    drawn.legend(
        loc="upper left", bbox_to_anchor=(0, -0.16), ncols=2, frameon=False
    )  # names are at the right
    return drawn


def _spread(speeds: Mapping[str, float], ax: "Axes") -> dict[tuple[str, float], float]:
    """Heights for the names of speeds on a logarithmic axis, such that none lies over another."""
    low, high = ax.get_ylim()
    apart = (max(high, *speeds.values()) / low) ** 0.05
    heights: dict[tuple[str, float], float] = {}
    below = 0.0
    for name, speed in sorted(speeds.items(), key=lambda item: item[1]):
        below = heights[name, speed] = max(speed, below * apart)
    return heights


_OPERATIONS: Final = {"zero": "zero", "xor": "XOR with the key stream", "random": "scramble"}
"""Operations on bytes, in words."""


def run_cells(run: Run) -> list[BenchCell]:
    """The cells of a bench run: of its first setting, and of uniform memory where it has any.

    Raises
    ------
    ValueError
        A run of another kind, or one without a cell.
    """
    return _of_one_setting(_all_cells(run))


def _all_cells(run: Run) -> list[BenchCell]:
    """The cells of a bench run.

    Raises
    ------
    ValueError
        A run of another kind, or one without a cell.
    """
    run.require("bench")
    if not run.records:
        raise ValueError("the run has no cell")
    return run.records


def _of_one_setting(cells: Sequence[BenchCell]) -> list[BenchCell]:
    """Cells that refuse, and of the others those of the first one's setting."""
    measured = [cell for cell in cells if cell.effect is not None]
    shapes = {cell.fragmentation for cell in measured}
    shape = UNIFORM if UNIFORM in shapes else measured[0].fragmentation if measured else ""
    wanted = {(*_setting(cell), shape) for cell in measured[:1]}
    return [cell for cell in cells if cell.effect is None or (*_setting(cell), cell.fragmentation) in wanted]


def _setting(cell: BenchCell) -> tuple[str, bool, int, bool]:
    return cell.backing, cell.huge_pages, cell.threads, cell.enforce


def _cells_of(cells: Sequence[BenchCell], abi: str | None) -> list[BenchCell]:
    """Cells of one revision and firmware, of the first where none is asked for."""
    wanted = cells[0].abi if abi is None else abi
    own = [cell for cell in cells if cell.abi == wanted]
    if not own:
        known = ", ".join(dict.fromkeys(cell.abi for cell in cells))
        raise ValueError(f"the run has no cell of {wanted!r}; it has {known}")
    return [cell for cell in own if cell.firmware == own[0].firmware]


def _row_of(cell: BenchCell) -> tuple[str, str, str]:
    return cell.vm_type, cell.phase, cell.direction.replace("_", " ")


def _one_a_cell(
    cells: Sequence[BenchCell], size: int | None
) -> dict[tuple[tuple[str, str, str], str], BenchCell]:
    """The measurement that stands for each cell: without holes where there is a choice, and the largest."""
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
