"""Pictures over time: states, large mappings and memory in use; runs beside each other."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from gmemcore.analysis.distributions import mappability, mapping_sizes, state_mix
from gmemcore.analysis.series import Series
from gmemcore.analysis.states import STATES
from gmemcore.analysis.style import STATE_COLOURS, axes_for, legend_beside, line_style
from gmemcore.uapi import PAGE_SIZE
from gmemcore.units import binary_unit, counted, format_time

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ENTRIES: Final = {"2m": "2 MiB", "1g": "1 GiB"}


def state_stream(series: Series, ax: "Axes | None" = None) -> "Axes":
    """Draw how much memory is in each state over a run, stacked up to the guest's size."""
    from matplotlib.patches import Patch

    at = _times(series, "a stream")
    table = state_mix(series)
    bytes_ = {state.name: table.where(state=state.name)["bytes"] for state in STATES}
    occurring = [state.name for state in reversed(STATES[:-2]) if bytes_[state.name].any()]
    occurring += [state.name for state in STATES[-2:] if bytes_[state.name].any()]  # no memory: on top
    size = max(snapshot.size for snapshot in series)
    unit, name = binary_unit(size)
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
    drawn.set_ylim(0, size / unit)
    drawn.set_ylabel(f"memory ({name})")
    drawn.set_title("Memory by state", loc="left")
    return drawn


def mappability_over_time(series: Series, ax: "Axes | None" = None) -> "Axes":
    """Draw which share of the guest a nested page table could map with 2 MiB and with 1 GiB entries."""
    at = _times(series, "mappability over time")
    table = mappability(series)
    drawn = axes_for(ax)
    shares = []
    for number, (size, label) in enumerate(_ENTRIES.items()):
        own = table.where(size=size)
        if own["blocks"].any():
            shares.append(own["fraction"] * 100)
            drawn.plot(at, shares[-1], label=label, **line_style(number, marks=len(at)))
    _time_axis(drawn, series, at)
    _share_axis(drawn, shares)
    drawn.set_ylabel("memory in blocks of one attribute (%)")
    drawn.set_title("What large entries could map", loc="left")
    if shares:
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
    times = _times_of(runs)
    size = max(snapshot.size for series in runs.values() for snapshot in series)
    unit, unit_name = binary_unit(size)
    drawn = axes_for(ax)
    for number, (name, series) in enumerate(runs.items()):
        used = np.array([snapshot.memory_pages for snapshot in series]) * PAGE_SIZE / unit
        drawn.plot(times[name], used, label=name, **line_style(number, marks=len(used)))
    drawn.axhline(size / unit, color="0.5", linewidth=1, label="size of the guest", zorder=0)
    _finish(drawn, runs, times)
    drawn.set_ylim(bottom=0)
    drawn.set_ylabel(f"memory in use ({unit_name})")
    drawn.set_title("Memory behind a guest", loc="left")
    return drawn


def struct_pages_over_time(runs: Mapping[str, Series], ax: "Axes | None" = None) -> "Axes":
    """Draw the memory that split huge pages need for their struct pages, a line per run.

    Parameters
    ----------
    runs : mapping of str to Series
        Runs by name, for instance one in 2 MiB and one in 1 GiB pages; of one unit.
    ax : matplotlib Axes or None

    Raises
    ------
    ValueError
        No run, runs of different units, or fewer than two snapshots.
    """
    times = _times_of(runs)
    needed = {name: _struct_pages(series) for name, series in runs.items()}
    unit, unit_name = binary_unit(max(int(each.max()) for each in needed.values()))
    drawn = axes_for(ax)
    for number, (name, figures) in enumerate(needed.items()):
        style = line_style(number, marks=len(figures)) | {"drawstyle": "steps-post"}
        drawn.plot(times[name], figures / unit, label=name, **style)
    _finish(drawn, runs, times)
    drawn.set_ylim(bottom=0)
    drawn.set_ylabel(f"struct pages ({unit_name})")
    drawn.set_title("Memory that split huge pages take", loc="left")
    return drawn


def _struct_pages(series: Series) -> NDArray[np.int64]:
    """Bytes at each snapshot."""
    return np.array([mapping_sizes(snapshot)["struct_pages"].sum() for snapshot in series])


def compare_series(series: Series, other: Any, ax: "Axes | None" = None, *, what: str = "memory") -> "Axes":
    """Draw a run beside others, over time.

    Parameters
    ----------
    series : Series
    other : Series, a result with a ``series``, or a mapping of names to them
    ax : matplotlib Axes or None
    what : str
        ``memory`` in use, ``struct pages`` of split huge pages, ``mappable`` by 2 MiB entries, or the name of
        a state.

    Raises
    ------
    ValueError
        Nothing to compare by that name, or fewer than two snapshots.
    """
    runs = _named(series, other)
    if what in _OF_RUNS:
        return _OF_RUNS[what](runs, ax)
    states = [state.name for state in STATES]
    if what not in {"mappable", *states}:
        known = ", ".join(["memory", "mappable", *states, "struct pages"])
        raise ValueError(f"nothing to compare by the name {what!r}; known: {known}")
    times = _times_of(runs)
    drawn, shares = axes_for(ax), []
    for number, (name, own) in enumerate(runs.items()):
        if what == "mappable":
            share = mappability(own).where(size="2m")["fraction"] * 100
        else:
            share = state_mix(own).where(state=what)["fraction"] * 100
        shares.append(share)
        drawn.plot(times[name], share, label=name, **line_style(number, marks=len(share)))
    _finish(drawn, runs, times)
    _share_axis(drawn, shares)
    title = "What 2 MiB entries could map" if what == "mappable" else f"Memory that is {what}"
    drawn.set_ylabel("share of memory (%)")
    drawn.set_title(title, loc="left")
    return drawn


_OF_RUNS: "Final[Mapping[str, Callable[..., Axes]]]" = {
    "memory": memory_over_time,
    "struct pages": struct_pages_over_time,
}
"""What is compared by a picture that takes several runs anyway."""


def _named(series: Series, other: Any) -> dict[str, Series]:
    """Runs by name; names that two of them share get a number."""
    others = dict(other) if isinstance(other, Mapping) else {"": other}
    runs = {series.name or "this run": series}
    for name, each in others.items():
        one = getattr(each, "series", each)
        if one is series:
            continue
        called = name or one.name or "the other run"
        while called in runs:
            called += " (again)"
        runs[called] = one
    return runs


# ---- measured memory -------------------------------------------------------------------------------------


def memory_of_ways(
    works: Mapping[str, Mapping[str, Sequence[tuple[float, int]]]], guest_bytes: int
) -> "Figure":
    """Draw measured memory over time: in place against two backings, one panel per work.

    Parameters
    ----------
    works : mapping of str to mapping of str to sequence of (float, int)
        For each work and each way to do it: seconds, and resident bytes then.
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


# ---- axes ------------------------------------------------------------------------------------------------


def edges_of(times: NDArray[Any]) -> NDArray[np.float64]:
    """Return where the column of each snapshot begins, and where the last one ends, shape (n + 1,).

    A snapshot stands for the time up to the next one; the last, for as long as the others in the median.
    """
    at = times.astype(np.float64)
    gaps = np.diff(at)
    last = float(np.median(gaps[gaps > 0])) if (gaps > 0).any() else 1.0
    return np.append(at, at[-1] + last)


def time_label(ax: "Axes", series: Series) -> None:
    """Name the time axis; large numbers of operations in k and M."""
    from matplotlib.ticker import EngFormatter

    ax.set_xlabel("time (s)" if series.unit == "s" else series.unit)
    if series.unit != "s" and ax.get_xlim()[1] >= 10_000:
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))


def _times(series: Series, what: str) -> NDArray[np.float64]:
    if len(series) < 2:
        raise ValueError(f"{what} of {counted(len(series), 'snapshot')}; at least two are needed")
    return series.times.astype(np.float64)


def _times_of(runs: Mapping[str, Series]) -> dict[str, NDArray[np.float64]]:
    if not runs:
        raise ValueError("no run to draw")
    if len({series.unit for series in runs.values()}) > 1:
        raise ValueError("runs whose times have different units; use runs of one unit")
    return {name: _times(series, f"run {name!r}") for name, series in runs.items()}


def _finish(ax: "Axes", runs: Mapping[str, Series], times: Mapping[str, NDArray[np.float64]]) -> None:
    _time_axis(ax, next(iter(runs.values())), np.concatenate(list(times.values())))
    legend_beside(ax)


def _time_axis(ax: "Axes", series: Series, at: NDArray[np.float64]) -> None:
    ax.set_xlim(at.min(), at.max() if at.max() > at.min() else at.min() + 1)
    time_label(ax, series)


def _share_axis(ax: "Axes", shares: Sequence[Any]) -> None:
    """Let an axis of per cent show where the figures are, not all from 0 to 100; five points at least."""
    figures = np.concatenate([np.asarray(share, float) for share in shares] or [np.array([0.0, 100.0])])
    low, high = float(figures.min()), float(figures.max())
    middle, half = (low + high) / 2, max((high - low) / 2 * 1.1, 2.5)
    edge = half / 25
    ax.set_ylim(max(middle - half, -edge), min(middle + half, 100 + edge))
