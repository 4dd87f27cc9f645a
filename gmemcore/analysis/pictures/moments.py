"""Pictures of moments of guests: memory by state, and how long runs of one attribute are."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from gmemcore.analysis.distributions import Source, run_lengths, state_mix
from gmemcore.analysis.series import Series
from gmemcore.analysis.snapshot import Snapshot, as_snapshot
from gmemcore.analysis.states import STATES
from gmemcore.analysis.style import STATE_COLOURS, axes_for, legend_beside, line_style, size_axis
from gmemcore.uapi import PAGE_SIZE
from gmemcore.units import binary_unit, size_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SOLID: Final = {"private": "accepted", "shared": "shared"}
"""The state whose colour stands for an attribute."""
_WEIGHTS: Final = {"pages": "share of the attribute's memory", "runs": "share of its runs"}


def state_bars(sources: "Mapping[str, Source]", ax: "Axes | None" = None) -> "Axes":
    """Draw memory by state, a bar per guest, each up to its guest's size.

    Parameters
    ----------
    sources : mapping of str to Snapshot, Vm or GuestMemfd
        Guests by name.
    ax : matplotlib Axes or None
    """
    snapshots = {name: as_snapshot(source) for name, source in sources.items()}
    if not snapshots:
        raise ValueError("no snapshot to draw")
    unit, unit_name = binary_unit(max(snapshot.size for snapshot in snapshots.values()))
    mixes = {name: state_mix(snapshot) for name, snapshot in snapshots.items()}
    drawn = axes_for(ax, (7.0, 1.5 + 0.5 * len(snapshots)))
    left = np.zeros(len(mixes))
    for place, state in enumerate(STATES):
        widths = np.array([mix["bytes"][place] for mix in mixes.values()]) / unit
        if widths.any():
            drawn.barh(
                range(len(mixes)), widths, left=left, height=0.7, label=state.name,
                color=STATE_COLOURS[state.name], edgecolor="white", linewidth=0.4,
            )  # fmt: skip
        left += widths
    drawn.set_yticks(range(len(mixes)), list(mixes))
    drawn.invert_yaxis()
    drawn.set_xlim(0, max(float(left.max()), 1e-12))
    drawn.set_xlabel(f"memory ({unit_name})")
    drawn.set_title("Memory by state", loc="left")
    legend_beside(drawn)
    return drawn


def compare_snapshots(
    snapshot: Snapshot,
    other: "Source | Mapping[str, Source]",
    ax: "Axes | None" = None,
    *,
    what: str = "states",
) -> "Axes":
    """Draw a snapshot beside others: memory by state, or the lengths of runs of one attribute.

    Raises
    ------
    ValueError
        Nothing to compare by that name.
    """
    others = dict(other) if isinstance(other, Mapping) else {"": other}
    sources: dict[str, Source] = {_name_of(snapshot) or "this one": snapshot}
    for name, each in others.items():
        called = name or _name_of(as_snapshot(each)) or "the other one"
        while called in sources:
            called += " (again)"
        sources[called] = each
    if what not in ("states", "runs"):
        raise ValueError(f"nothing to compare by the name {what!r}; known: states, runs")
    return state_bars(sources, ax) if what == "states" else run_length_cdf(sources, ax)


def _name_of(snapshot: Snapshot) -> str:
    return snapshot.label or f"{snapshot.vm_type}, {snapshot.abi}, at {snapshot.at:g}"


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
        What the share is of: of pages, where memory lies; of runs, how many calls it takes.
    """
    if weight not in _WEIGHTS:
        raise ValueError(f"weight must be pages or runs, not {weight!r}")
    named = sources if isinstance(sources, Mapping) else {"": sources}
    drawn = axes_for(ax)
    shortest, longest = [], []
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
                shortest.append(int(sizes.min()))
                longest.append(int(sizes.max()))
    size_axis(drawn.xaxis)
    low, high = min(shortest, default=PAGE_SIZE), max(longest, default=PAGE_SIZE)
    drawn.set_xlim(low / 1.2, high * 1.2)
    drawn.set_xlabel("length of the run")
    drawn.set_ylabel(_WEIGHTS[weight])
    drawn.set_ylim(-0.02, 1.02)
    for size in (2 << 20, 1 << 30):
        if low <= size <= high:
            drawn.axvline(size, color="0.6", linewidth=0.8, zorder=0)
            place: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "fontsize": 8, "color": "0.4"}
            drawn.annotate(f" {size_words(size)}", (size, 1), va="top", **place)
    title = {"pages": "Memory in runs of one attribute", "runs": "Runs of one attribute"}[weight]
    drawn.set_title(f"{title}, up to a length", loc="left")
    if shortest:
        legend_beside(drawn)
    return drawn


def runs_of_series(series: Series, ax: "Axes | None" = None, *, weight: str = "pages") -> "Axes":
    """Draw how long runs of one attribute are at the begin and at the end of a run."""
    if not len(series):
        raise ValueError("a series of no snapshots; at least one is needed")
    word = "operation" if series.unit == "operations" else series.unit
    moments = {f"{word} {series.times[number]:,}": series[number] for number in (0, -1)}
    return run_length_cdf(moments, ax, weight=weight)
