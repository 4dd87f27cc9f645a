"""Series: snapshots of one run over time, and the operations between them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from gmemcore.analysis.address import GuestMemory, page_masks
from gmemcore.analysis.frames import Frames
from gmemcore.analysis.history import (
    CALLERS,
    EVENT,
    MOST_EVENTS,
    UNKNOWN,
    Events,
    Since,
    events_of,
    follow,
    outcome_name,
    step_words,
    thinned,
)
from gmemcore.analysis.plots import SeriesPlot
from gmemcore.analysis.snapshot import Snapshot, states_dataset, take, write_frame
from gmemcore.analysis.snapshot_file import read_snapshots, write_snapshots
from gmemcore.analysis.states import STATES
from gmemcore.analysis.tables import Table, extra, make_table, stacked
from gmemcore.engine.arguments import as_u64
from gmemcore.html import table
from gmemcore.machine import GuestMemfd, VmFace
from gmemcore.policy import flag_name
from gmemcore.uapi import PAGE_SIZE, ContentMode, Phase
from gmemcore.units import counted
from gmemcore.workload.container import ContainerError
from gmemcore.workload.operations import Operations
from gmemcore.workload.outcomes import Outcomes
from gmemcore.workload.player import Player
from gmemcore.workload.streams import rechunk

_DIMENSIONS = {"operations": "operation", "s": "second"}


class Series(Sequence[Snapshot]):
    """Snapshots of one run, in the order in which they were taken.

    They are kept by what changed from one to the next, so a hundred snapshots of a large guest take little
    more than one. ``series[3]`` is a `Snapshot`, ``series[1:3]`` a Series.

    Parameters
    ----------
    snapshots : iterable of Snapshot
        Their ``at`` may not decrease.
    unit : str
        Of ``at``: ``operations`` (the default) or ``s``.
    source : str
        What was run, in words.

    Attributes
    ----------
    events : Events
        The operations between the snapshots that are known; see `gmemcore.analysis.history`.
    complete : bool
        Whether they are all of them.

    Raises
    ------
    ValueError
        An ``at`` before that of its predecessor.
    """

    def __init__(
        self, snapshots: Iterable[Snapshot] = (), unit: str = "operations", source: str = ""
    ) -> None:
        self.unit = unit
        self.source = source
        self.events: Events = np.empty(0, EVENT)
        self.complete = True
        self._frames = Frames()
        for snapshot in snapshots:
            self.append(snapshot)

    def __repr__(self) -> str:
        span = f", {self.times[0]:g} to {self.times[-1]:g} {self.unit}" if len(self) else ""
        head = f"Series of {counted(len(self), 'snapshot')}{span}{f': {self.source}' if self.source else ''}"
        return head if not len(self) else f"{head}\n{self._overview()!r}"

    def _repr_html_(self) -> str:
        if not len(self):
            return table(repr(self), (), [])
        return self._overview()._repr_html_()

    def __len__(self) -> int:
        return len(self._frames)

    def __iter__(self) -> Iterator[Snapshot]:
        return (self._frames[number] for number in range(len(self)))

    @overload
    def __getitem__(self, which: int) -> Snapshot: ...

    @overload
    def __getitem__(self, which: slice) -> "Series": ...

    def __getitem__(self, which: int | slice) -> "Snapshot | Series":
        if isinstance(which, slice):
            return self._part(range(len(self))[which])
        return self._frames[range(len(self))[which]]

    def _part(self, numbers: range) -> "Series":
        if numbers.step < 0:
            raise ValueError("a series can't go back in time; use a step of 1 or more")
        part = Series((self._frames[number] for number in numbers), self.unit, self.source)
        if len(part):
            done = self.events["operation"]
            part.events = self.events[(done >= part.times[0]) & (done < part.times[-1])]
        part.complete = self.complete
        return part

    # ---- what it is ----------------------------------------------------------------------------

    @property
    def times(self) -> NDArray[Any]:
        """When the snapshots were taken, in `unit`, shape (n,); int64 where they count operations."""
        times = np.array([self._frames.at(number) for number in range(len(self))])
        whole = self.unit == "operations" and bool((times == np.floor(times)).all())
        return times.astype(np.int64) if whole else times

    @property
    def plot(self) -> SeriesPlot:
        """Pictures of it."""
        return SeriesPlot(self)

    @property
    def name(self) -> str:
        """What a legend calls it: the label of its snapshots, what was run, or the revision."""
        if not len(self):
            return self.source
        first = self._frames[0]
        return first.label or self.source or f"{first.vm_type}, {first.abi}"

    @property
    def dimension(self) -> str:
        """Name of time in tables and datasets: ``operation`` or ``second``."""
        return _DIMENSIONS.get(self.unit, self.unit)

    @property
    def nbytes(self) -> int:
        """Bytes that page state and events take."""
        return self._frames.nbytes + self.events.nbytes

    # ---- taking --------------------------------------------------------------------------------

    def append(self, snapshot: Snapshot) -> None:
        """Add a later snapshot."""
        if len(self) and snapshot.at < self._frames.at(len(self) - 1):
            raise ValueError(f"a snapshot at {snapshot.at:g} after one at {self.times[-1]:g}")
        self._frames.append(snapshot)

    def take(self, source: VmFace | GuestMemfd, at: float, label: str = "") -> Snapshot:
        """Take a snapshot and add it."""
        snapshot = take(source, at=at, label=label)
        self.append(snapshot)
        return snapshot

    def record(
        self, vm: VmFace, operations: Operations, outcomes: Outcomes, first: int, phase: Phase | None = None
    ) -> None:
        """Keep operations that were run, and what they did.

        Parameters
        ----------
        vm : Vm or LegacyVm
            The guest they were run on.
        operations, outcomes
            Shape (n,), as a `Player` took and gave them.
        first : int
            Number of the first operation in the run.
        phase : Phase or None
            Launch phase before it; None: as it is now.
        """
        new = events_of(vm, operations, outcomes, first, vm.phase if phase is None else phase)
        self.events = np.concatenate([self.events, new])
        if len(self.events) > 2 * MOST_EVENTS:
            self.events = thinned(self.events, self.times.astype(np.uint64))
            self.complete = False

    # ---- questions -----------------------------------------------------------------------------

    def tabulate(self, distribution: Callable[[Snapshot], Table]) -> Table:
        """Apply a distribution to each snapshot: its tables below each other, the time as a first column."""
        tables = list(zip(self.times, map(distribution, self), strict=True))
        return stacked(tables, self.dimension, self.times.dtype, self.unit)

    def since(self, gpa: int | str, number: int = -1) -> Since:
        """Return since which operation the page at an address is in its state, and whose it was.

        Parameters
        ----------
        gpa : int or str
            An address in the page: ``0x1000``, ``"1g"``.
        number : int
            Snapshot that shows the state; the last one by default.

        Raises
        ------
        ValueError
            There is no memory at that address, or no snapshot of that number.
        """
        address = as_u64(gpa, "gpa") & ~(PAGE_SIZE - 1)
        try:
            place = range(len(self))[number]
        except IndexError:
            raise ValueError(f"no snapshot {number}; the series has {len(self)}") from None
        masks = page_masks(self, address)
        if not len(self.events) or self.unit != "operations":
            return UNKNOWN
        return follow(self.events, address, masks, self.times, place)

    def history(self, gpa: int | str, size: int | str = PAGE_SIZE) -> Table:
        """List the operations that asked for a part of a range of guest memory, refused ones included.

        Parameters
        ----------
        gpa, size : int or str
            Bytes.

        Returns
        -------
        Table
            One row per operation: operation, step, caller, gpa, size, flags, outcome.
        """
        low = as_u64(gpa, "gpa")
        high = low + as_u64(size, "size")
        asked = self.events[(self.events["gpa"] < high) & (self.events["gpa"] + self.events["size"] > low)]
        asked = asked[np.unique(asked["operation"], return_index=True)[1]]
        rows = [
            (
                int(event["operation"]),
                step_words(int(event["step"]), int(event["attributes"])),
                CALLERS[int(event["step"])][0],
                int(event["gpa"]),
                int(event["size"]),
                flag_name(ContentMode(int(event["flags"]))) if event["flags"] else "",
                outcome_name(int(event["outcome"])),
            )
            for event in asked
        ]
        columns = [
            *(("operation", "<i8"), ("step", "U20"), ("caller", "U8"), ("gpa", "<u8"), ("size", "<u8")),
            *(("flags", "U32"), ("outcome", "U16")),
        ]
        title = f"operations on {low:#x}+{high - low:#x}"
        return make_table(title, columns, rows, ("operation",), {"gpa": "bytes", "size": "bytes"})

    def _overview(self) -> Table:
        """A row per snapshot: the states that occur, and the memory in use."""
        pages = [snapshot.state_pages() for snapshot in self]
        occurring = [state.name for state in STATES if any(one[state.name] for one in pages)]
        labelled = any(one.label for one in self)
        rows = [
            (at, one.phase, *(n[name] for name in occurring), one.memory_pages, *([one.label] * labelled))
            for at, one, n in zip(self.times, self, pages, strict=True)
        ]
        figures = [(name, "<i8") for name in [*occurring, "memory"]]
        columns = [(self.dimension, self.times.dtype), ("phase", "U9"), *figures]
        columns += [("label", f"U{max(len(one.label) for one in self)}")] * labelled
        title = f"pages by state{f': {self.source}' if self.source else ''}"
        return make_table(title, columns, rows, (self.dimension,), {"memory": "pages"})

    # ---- to other libraries --------------------------------------------------------------------

    def to_pandas(self) -> Any:
        """Return a pandas DataFrame: a row per snapshot, a column per state, in pages.

        Returns
        -------
        DataFrame
            Its index is ``operation`` (or ``second``); ``memory``, ``phase`` and ``label`` follow the states,
            and ``attrs`` have title and units.

        Raises
        ------
        ImportError
            pandas isn't installed.
        """
        pandas = extra("pandas", "to_pandas()")
        rows = [
            one.state_pages() | {"memory": one.memory_pages, "phase": one.phase, "label": one.label}
            for one in self
        ]
        names = [state.name for state in STATES]
        index = pandas.Index(self.times, name=self.dimension)
        frame = pandas.DataFrame(rows, index, [*names, "memory", "phase", "label"])
        units = {self.dimension: self.unit, **dict.fromkeys([*names, "memory"], "pages")}
        frame.attrs |= {"title": "pages by state", "source": self.source, "units": units}
        return frame

    def to_xarray(self, block: int | str | None = None) -> Any:
        """Return an xarray Dataset: pages by operation, address and state, counters, and memory in use.

        Parameters
        ----------
        block : int, str or None
            Bytes of a block of guest addresses, as ``"2m"``; None: the power of two that makes up to 1,024.

        Returns
        -------
        Dataset
            ``pages`` (operation, address, state), ``counters`` (operation, counter), ``memory`` (operation);
            ``phase`` and ``label`` by operation. ``attrs`` say what it is of, every variable has its units.

        Raises
        ------
        ImportError
            xarray or pandas isn't installed.
        ValueError
            The series has no snapshot.
        """
        if not len(self):
            raise ValueError("a series of no snapshots; at least one is needed")
        return states_dataset(self, self.times, block, self.dimension, self.unit)

    def to_parquet(self, path: str | Path) -> None:
        """Write `to_pandas` as Parquet; an old file is replaced whole.

        Raises
        ------
        ImportError
            pandas or pyarrow isn't installed.
        OSError
            It can't be written there.
        """
        write_frame(self.to_pandas(), path)

    def memory(self) -> GuestMemory:
        """Return the addresses at which its snapshots show memory."""
        return GuestMemory(self)

    # ---- files ---------------------------------------------------------------------------------

    def write(self, path: str | Path) -> None:
        """Write all of them to one file.

        Raises
        ------
        ContainerError
            Too many for one header (thousands); nothing was written.
        OSError
            It can't be written there.
        """
        write_snapshots(path, list(self), self.unit)

    @classmethod
    def read(cls, path: str | Path) -> "Series":
        """Read a file of snapshots.

        Raises
        ------
        ContainerError
            Not a file of snapshots, damaged, or one whose parts contradict each other.
        OSError
            It can't be opened or read.
        """
        snapshots, unit = read_snapshots(path, Snapshot)
        try:
            return cls(snapshots, unit)
        except ValueError as error:
            raise ContainerError(f"{path}: not snapshots: {error}") from error


def watch(
    vm: VmFace,
    stream: Operations | Iterable[Operations],
    *,
    every: int,
    seed: int = 0,
    discard: bool = True,
    source: str = "",
) -> Series:
    """Run operations on a guest and take a snapshot before them, after every `every` of them, and at the end.

    Parameters
    ----------
    vm : Vm or LegacyVm
        The guest, built already.
    stream : Operations, or iterable of them
        What is run, by `gmemcore.workload.player.Player`.
    every : int
        Operations between snapshots, 1 or more.
    seed, discard
        As the player's.
    source : str
        What is run, in words, for the series.

    Returns
    -------
    Series
        ``at`` counts operations; their history is kept.
    """
    player = Player(vm, seed=seed, discard=discard)
    series = Series(source=source)
    series.take(vm, 0)
    chunks = [stream] if isinstance(stream, np.ndarray) else stream
    for operations in rechunk(chunks, every):
        run_and_record(series, player, operations)
        series.take(vm, player.done)
    return series


def run_and_record(series: Series, player: Player, operations: Operations) -> Outcomes:
    """Run operations and keep them in a series; returns their outcomes."""
    first, phase = player.done, player.vm.phase
    outcomes = player.run(operations)
    series.record(player.vm, operations, outcomes, first, phase)
    return outcomes
