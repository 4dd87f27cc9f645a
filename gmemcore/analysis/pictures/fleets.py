"""Pictures of fleets, and of workloads on many revisions: what guests ask for, and what comes of it."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from gmemcore.analysis.runs import Run
from gmemcore.analysis.style import FRACTION_MAP, LINES, axes_for, legend_beside, line_style, text_colour
from gmemcore.uapi import PAGE_SIZE
from gmemcore.units import format_percent, size_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CLASSES: Final = ((0, 0), (1, 3), (4, 8), (9, 17), (18, 63))
"""Sizes that bars tell apart, as powers of two of pages: 4 KiB, up to 64 KiB, 2 MiB, 1 GiB, and above."""
_PAST_THE_ENDS: Final = 1.16
"""Where a legend begins, as a share of the picture's width: right of the counts at the ends of bars."""


def conversion_sizes(run: Run, ax: "Axes | None" = None) -> "Axes":
    """Draw how large the conversions of a fleet are: a bar per behaviour, its conversions by size.

    Parameters
    ----------
    run : Run
        Of ``gmemcore stress --json`` or ``gm.stress``.
    ax : matplotlib Axes or None

    Raises
    ------
    ValueError
        A run of another kind, or one without a conversion.
    """
    run.require("stress")
    counts: dict[str, NDArray[np.float64]] = defaultdict(lambda: np.zeros(64))
    for cell, sums in run.last.cells.items():
        counts[cell.partition(" ")[0]][: len(sums.sizes)] += np.asarray(sums.sizes, np.float64)
    made = {name: own for name, own in counts.items() if own.any()}
    if not made:
        raise ValueError("no guest asked for a conversion")
    parts = {
        _class_words(low, high): [own[low : high + 1].sum() for own in made.values()] for low, high in CLASSES
    }
    drawn = share_bars(list(made), parts, _shades(len(CLASSES)), ax)
    drawn.set_xlabel("share of the behaviour's conversions (%)")
    drawn.set_title("Conversions by size", loc="left")
    legend_beside(drawn, title="size of the range", right_of=_PAST_THE_ENDS)
    return drawn


def _class_words(low: int, high: int) -> str:
    if low == high:
        return size_words(PAGE_SIZE << low)
    if high == CLASSES[-1][1]:
        return f"{size_words(PAGE_SIZE << low)} and more"
    return f"below {size_words(PAGE_SIZE << high + 1)}"


def fleet_outcomes(run: Run, ax: "Axes | None" = None) -> "Axes":
    """Draw what came of the operations of a fleet: a bar per kind of guest, its operations by outcome.

    Raises
    ------
    ValueError
        A run of another kind, or one without an operation.
    """
    run.require("stress")
    cells = {cell: sums.outcomes for cell, sums in run.last.cells.items() if sum(sums.outcomes.values())}
    if not cells:
        raise ValueError("the fleet ran no operation")
    total: Counter[str] = Counter()
    for outcomes in cells.values():
        total.update(outcomes)
    names = ["OK", *(name for name, _ in total.most_common() if name != "OK")]
    parts = {name: [outcomes.get(name, 0) for outcomes in cells.values()] for name in names}
    colours = ["#D3E5F1", *(LINES[i % len(LINES)][0] for i in range(1, len(names)))]
    drawn = share_bars(list(cells), parts, colours, ax)
    drawn.set_xlabel("share of operations (%)")
    drawn.set_title("Operations by outcome", loc="left")
    legend_beside(drawn, right_of=_PAST_THE_ENDS)
    return drawn


def share_bars(
    rows: Sequence[str],
    parts: Mapping[str, Sequence[float]],
    colours: Sequence[Any],
    ax: "Axes | None",
    ends: Sequence[str] | None = None,
) -> "Axes":
    """Draw one stacked bar per row, each 100 % long, and a text at its end; by default what it counts."""
    totals = np.sum(list(parts.values()), axis=0)
    drawn = axes_for(ax, (8.0, 1.5 + 0.36 * len(rows)))
    left = np.zeros(len(rows))
    for (name, counts), colour in zip(parts.items(), colours, strict=True):
        widths = np.asarray(counts) / np.maximum(totals, 1) * 100
        if widths.any():
            drawn.barh(
                range(len(rows)), widths, left=left, label=name, color=colour, height=0.75,
                edgecolor="white", linewidth=0.5,
            )  # fmt: skip
        left += widths
    for row, text in enumerate(ends or [f"{int(total):,}" for total in totals]):
        drawn.text(101, row, text, va="center", fontsize=8)
    drawn.set_yticks(range(len(rows)), rows)
    drawn.invert_yaxis()
    drawn.set_xlim(0, 100)
    drawn.spines[["left", "bottom"]].set_visible(False)
    drawn.tick_params(length=0)
    return drawn


def _shades(n: int) -> list[Any]:
    """Colours of an order, light to dark, the same for people who see few of them."""
    from matplotlib import colormaps

    return list(colormaps[FRACTION_MAP](np.linspace(0.05, 0.95, n)))


def refusal_map(run: Run, ax: "Axes | None" = None) -> "Axes":
    """Draw the share of a workload's conversions that is refused: revisions down, VM types across.

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
    for replay in run.records:
        refused[abis.index(replay.abi), vm_types.index(replay.vm_type)] = replay.refused_share * 100
    drawn = axes_for(ax, (3.6 + 1.1 * len(vm_types), max(1.6 + 0.32 * len(abis), 2.6)))
    image = drawn.imshow(refused, cmap=FRACTION_MAP, vmin=0, vmax=100, aspect="auto", interpolation="nearest")
    bar = drawn.figure.colorbar(image, ax=drawn, label="conversions refused (%)", shrink=0.9)
    bar.outline.set_visible(False)
    for y, x in np.argwhere(~np.ma.getmaskarray(refused)).tolist():
        share = float(refused[y, x])
        colour = text_colour(image, share)
        drawn.text(x, y, format_percent(share / 100), ha="center", va="center", fontsize=8, color=colour)
    drawn.set_xticks(range(len(vm_types)), vm_types)
    drawn.set_yticks(range(len(abis)), abis)
    drawn.tick_params(length=0, labelsize=8)
    drawn.xaxis.tick_top()
    drawn.spines[:].set_visible(False)
    drawn.set_title("Conversions refused", loc="left", pad=12)
    return drawn


_HUGE_EVENTS: Final = {
    "huge pages split": ("folios_2m_split", "folios_1g_split"),
    "huge pages merged": ("folios_2m_merged", "folios_1g_merged"),
    "pages restructured": ("pages_restructured",),
    "pages of struct pages": ("vmemmap_pages_allocated", "vmemmap_pages_freed"),
    "TLB flushes": ("tlb_flushes",),
    "RMP or S-EPT entries split": ("psmashes", "sept_demotions"),
}
"""What a conversion in huge pages costs, and the counters that add up to it."""


_BELOW_TICKS: Final = 20
"""Points from the axis to what is written below the labels of its ticks."""
_LINE_HEIGHT: Final = 14
"""Points."""


def cost_by_page_size(run: Run, ax: "Axes | None" = None) -> "Axes":
    """Draw what a workload's conversions cost in pages of each size: predicted time, or else counters.

    Parameters
    ----------
    run : Run
        Of ``gmemcore replay --page-size 4k,2m,1g --json``. With a cost file, bars are predicted times by
        event; without, lines are events. Revisions and VM types are beside each other.
    ax : matplotlib Axes or None

    Raises
    ------
    ValueError
        A run of another kind, or one without a replay.
    """
    run.require("replay")
    if not run.records:
        raise ValueError("the trace was replayed nowhere")
    targets: dict[tuple[str, ...], list[Any]] = {}
    for replay in run.records:
        targets.setdefault((replay.abi, replay.vm_type, replay.firmware), []).append(replay)
    groups = [sorted(each, key=lambda replay: replay.page_size) for each in targets.values()]
    records = [replay for group in groups for replay in group]
    drawn = axes_for(ax, (max(7.0, 3.5 + max(0.7 * len(records), 1.4 * len(groups))), 4.2))
    if all(replay.predicted for replay in records):
        _bars_of_events(drawn, records)
    else:
        _lines_of_events(drawn, groups)
    drawn.set_xticks(range(len(records)), [size_words(each.page_size) for each in records])
    drawn.set_xlabel("page size of the guest's files")
    if len(groups) > 1:
        _label_groups(drawn, list(targets), [len(group) for group in groups])
    drawn.set_title(f"Cost of {records[0].conversions:,} conversions", loc="left")
    return drawn


def _label_groups(ax: "Axes", targets: Sequence[tuple[str, ...]], sizes: Sequence[int]) -> None:
    """Write below the page sizes of each target what tells it from the others, and part the targets."""
    telling = [len(set(column)) > 1 for column in zip(*targets, strict=True)]
    names = ["\n".join(word for word, tells in zip(own, telling, strict=True) if tells) for own in targets]
    ends = np.cumsum(sizes)
    below = ax.secondary_xaxis("bottom")
    below.set_xticks((ends - np.array(sizes) + ends - 1) / 2, names)
    below.tick_params(length=0, pad=_BELOW_TICKS)
    below.spines["bottom"].set_visible(False)
    ax.xaxis.labelpad = _LINE_HEIGHT * sum(telling)
    between, height = ends[:-1] - 0.5, ax.get_xaxis_transform()
    ax.vlines(between, 0, 1, transform=height, color="0.85", linewidth=1, zorder=0)


def _bars_of_events(ax: "Axes", records: Sequence[Any]) -> None:
    priced = dict.fromkeys(event for replay in records for event in replay.predicted.by_event)
    base, places = np.zeros(len(records)), range(len(records))
    for number, event in enumerate(priced):
        heights = np.array([replay.predicted.by_event.get(event, 0.0) for replay in records]) * 1e3
        if heights.any():
            ax.bar(places, heights, bottom=base, label=event, color=LINES[number % len(LINES)][0], width=0.6)
        base += heights
    ax.set_ylabel("predicted time (ms)")
    legend_beside(ax, title="event")


def _lines_of_events(ax: "Axes", groups: Sequence[Sequence[Any]]) -> None:
    for number, (label, names) in enumerate(_HUGE_EVENTS.items()):
        figures = [
            np.array([sum(each.counters.get(name, 0) for name in names) for each in own]) for own in groups
        ]
        place = 0
        for own in figures if any(each.any() for each in figures) else []:
            ax.plot(
                range(place, place + len(own)), own, label=label if not place else None, **line_style(number)
            )
            place += len(own)
    ax.set_yscale("symlog", linthresh=1)
    ax.set_ylim(bottom=0)
    ax.set_ylabel("events")
    legend_beside(ax)
