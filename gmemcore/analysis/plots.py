"""Plots: the pictures of a thing as methods of its ``plot``, as in ``run.plot.states()``.

Each takes and returns matplotlib Axes. The pictures themselves are functions of `gmemcore.analysis.pictures`
and `gmemcore.analysis.speed`, which are loaded when the first one is drawn.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from gmemcore.analysis.runs import Run
    from gmemcore.analysis.series import Series
    from gmemcore.analysis.snapshot import Snapshot


def _draw(name: str, *arguments: Any, **options: Any) -> "Axes":
    """Draw a picture by name; the modules that draw stand above what is drawn."""
    axes: Axes = getattr(import_module("gmemcore.analysis.pictures"), name)(*arguments, **options)
    return axes


class Pictures:
    """The pictures of a thing; its repr names them."""

    def __repr__(self) -> str:
        kinds = [kind for kind in type(self).__mro__ if issubclass(kind, Pictures)]
        names = [name for kind in reversed(kinds) for name in vars(kind) if not name.startswith("_")]
        return f"Pictures: {', '.join(f'{name}()' for name in names)}"


class SnapshotPlot(Pictures):
    """Pictures of one moment of a guest.

    Parameters
    ----------
    snapshot : Snapshot
        What they show.
    """

    def __init__(self, snapshot: "Snapshot") -> None:
        self._snapshot = snapshot

    def map(self, ax: "Axes | None" = None, *, file: int | None = None, columns: int | None = None) -> "Axes":
        """Draw every page in address order; see `gmemcore.analysis.page_map`."""
        return _draw("page_map", self._snapshot, ax, file=file, columns=columns)

    def hilbert(self, ax: "Axes | None" = None, *, file: int | None = None) -> "Axes":
        """Draw every page along a Hilbert curve; see `gmemcore.analysis.page_map`."""
        return _draw("page_map", self._snapshot, ax, order="hilbert", file=file)

    def states(self, ax: "Axes | None" = None) -> "Axes":
        """Draw how much memory is in each state; see `gmemcore.analysis.state_bars`."""
        return _draw("state_bars", {"": self._snapshot}, ax)

    def runs(self, ax: "Axes | None" = None, *, weight: str = "pages") -> "Axes":
        """Draw how long runs of one attribute are; see `gmemcore.analysis.run_length_cdf`."""
        return _draw("run_length_cdf", self._snapshot, ax, weight=weight)

    def compare(
        self, other: "Snapshot | Mapping[str, Snapshot]", ax: "Axes | None" = None, *, what: str = "states"
    ) -> "Axes":
        """Draw it beside other snapshots.

        Parameters
        ----------
        other : Snapshot, or mapping of str to Snapshot
            One more, or several by name.
        ax : matplotlib Axes or None
        what : {'states', 'runs'}
            Memory by state, or the lengths of runs of one attribute.
        """
        return _draw("compare_snapshots", self._snapshot, other, ax, what=what)


class SeriesPlot(Pictures):
    """Pictures of a run over time.

    Parameters
    ----------
    series : Series
        What they show.
    """

    def __init__(self, series: "Series") -> None:
        self._series = series

    def states(self, ax: "Axes | None" = None) -> "Axes":
        """Draw how much memory is in each state over time; see `gmemcore.analysis.state_stream`."""
        return _draw("state_stream", self._series, ax)

    def heatmap(
        self,
        ax: "Axes | None" = None,
        *,
        show: str = "states",
        address: tuple[int | str, int | str] | None = None,
        block: int | str | None = None,
    ) -> "Axes":
        """Draw guest addresses against time; see `gmemcore.analysis.heat_map`."""
        return _draw("heat_map", self._series, ax, show=show, address=address, block=block)

    def mappable(self, ax: "Axes | None" = None) -> "Axes":
        """Draw what large entries could map over time; see `gmemcore.analysis.mappability_over_time`."""
        return _draw("mappability_over_time", self._series, ax)

    def memory(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the memory in use over time; see `gmemcore.analysis.memory_over_time`."""
        return _draw("memory_over_time", {self._series.name: self._series}, ax)

    def struct_pages(self, ax: "Axes | None" = None) -> "Axes":
        """Draw what split huge pages need; see `gmemcore.analysis.struct_pages_over_time`."""
        return _draw("struct_pages_over_time", {self._series.name: self._series}, ax)

    def runs(self, ax: "Axes | None" = None, *, weight: str = "pages") -> "Axes":
        """Draw how long runs of one attribute are, at the begin and at the end of the run."""
        return _draw("runs_of_series", self._series, ax, weight=weight)

    def map(self, ax: "Axes | None" = None, *, number: int = -1, file: int | None = None) -> "Axes":
        """Draw every page of one snapshot in address order; the last one by default."""
        return SnapshotPlot(self._series[number]).map(ax, file=file)

    def hilbert(self, ax: "Axes | None" = None, *, number: int = -1, file: int | None = None) -> "Axes":
        """Draw every page of one snapshot along a Hilbert curve; the last one by default."""
        return SnapshotPlot(self._series[number]).hilbert(ax, file=file)

    def compare(self, other: Any, ax: "Axes | None" = None, *, what: str = "memory") -> "Axes":
        """Draw it beside other runs, over time.

        Parameters
        ----------
        other : Series, a result of ``gm.run``, or a mapping of names to them
            One more, or several by name.
        ax : matplotlib Axes or None
        what : str
            ``memory`` in use, ``struct pages`` of split huge pages, ``mappable`` by 2 MiB entries, or a
            state, as ``shared``.
        """
        return _draw("compare_series", self._series, other, ax, what=what)


class RunPlot(Pictures):
    """Pictures of a run of results.

    Parameters
    ----------
    run : Run
        What they show.
    """

    def __init__(self, run: "Run") -> None:
        self._run = run


class BenchPlot(RunPlot):
    """Pictures of a bench run."""

    def effects(self, ax: "Axes | None" = None) -> "Axes":
        """Draw GB/s of each effect, next to memory primitives; see `gmemcore.analysis.bench_effects`."""
        return _draw("bench_effects", self._run, ax)

    def cube(self, ax: "Axes | None" = None, *, abi: str | None = None, size: int | None = None) -> "Axes":
        """Draw what each cell of policy costs; see `gmemcore.analysis.bench_cube`."""
        return _draw("bench_cube", self._run, ax, abi=abi, size=size)

    def axes(self, ax: "Axes | None" = None, *, abi: str | None = None) -> "Axes":
        """Draw what work costs over all axes that were measured; see `gmemcore.analysis.bench_axes`."""
        return _draw("bench_axes", self._run, ax, abi=abi)

    def cost(self, ax: "Axes | None" = None, *, abi: str | None = None) -> "Axes":
        """Draw speed against the size of one conversion; see `gmemcore.analysis.cost_by_range`."""
        return _draw("cost_by_range", self._run, ax, abi=abi)


class ReplayPlot(RunPlot):
    """Pictures of a replay on several revisions and VM types."""

    def refusals(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the operations refused, by revision and VM type; see `gmemcore.analysis.refusal_map`."""
        return _draw("refusal_map", self._run, ax)

    def page_sizes(self, ax: "Axes | None" = None) -> "Axes":
        """Draw what conversions cost, by page size; see `gmemcore.analysis.cost_by_page_size`."""
        return _draw("cost_by_page_size", self._run, ax)


class StressPlot(RunPlot):
    """Pictures of a fleet."""

    def sizes(self, ax: "Axes | None" = None) -> "Axes":
        """Draw conversions by size, a bar per behaviour; see `gmemcore.analysis.conversion_sizes`."""
        return _draw("conversion_sizes", self._run, ax)

    def outcomes(self, ax: "Axes | None" = None) -> "Axes":
        """Draw operations by outcome, a bar per kind of guest; see `gmemcore.analysis.fleet_outcomes`."""
        return _draw("fleet_outcomes", self._run, ax)


PLOTS: Final[Mapping[str, type[RunPlot]]] = {"bench": BenchPlot, "replay": ReplayPlot, "stress": StressPlot}
"""Kind of run -> its pictures."""
