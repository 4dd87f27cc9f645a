"""Series: snapshots of one run over time."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from gmemcore.analysis.snapshot import Snapshot, take
from gmemcore.analysis.snapshot_file import read_snapshots, write_snapshots
from gmemcore.analysis.tables import Table, stacked
from gmemcore.html import table
from gmemcore.machine import GuestMemfd, VmFace
from gmemcore.workload.container import ContainerError
from gmemcore.workload.operations import Operations
from gmemcore.workload.player import Player
from gmemcore.workload.streams import rechunk


class Series:
    """Snapshots of one run, in the order in which they were taken.

    Parameters
    ----------
    snapshots : iterable of Snapshot
        Their ``at`` may not decrease.
    unit : str
        Of ``at``: ``operations`` unless said otherwise, or ``s``.

    Raises
    ------
    ValueError
        An ``at`` before that of its predecessor.
    """

    def __init__(self, snapshots: Sequence[Snapshot] = (), unit: str = "operations") -> None:
        self.unit = unit
        self._snapshots: list[Snapshot] = []
        for snapshot in snapshots:
            self.append(snapshot)

    def __repr__(self) -> str:
        span = f", {self[0].at:g} to {self[-1].at:g} {self.unit}" if len(self) else ""
        return f"Series({len(self)} snapshots{span})"

    def _repr_html_(self) -> str:
        rows = [(f"{one.at:g}", one.phase, one.memory_pages, one.label) for one in self]
        return table(repr(self), (f"at ({self.unit})", "phase", "pages of memory", "label"), rows)

    def __len__(self) -> int:
        return len(self._snapshots)

    def __iter__(self) -> Iterator[Snapshot]:
        return iter(self._snapshots)

    def __getitem__(self, i: int) -> Snapshot:
        return self._snapshots[i]

    def append(self, snapshot: Snapshot) -> None:
        """Add a later snapshot."""
        if self._snapshots and snapshot.at < self._snapshots[-1].at:
            raise ValueError(f"a snapshot at {snapshot.at:g} after one at {self._snapshots[-1].at:g}")
        self._snapshots.append(snapshot)

    def take(self, source: VmFace | GuestMemfd, at: float, label: str = "") -> Snapshot:
        """Take a snapshot and add it."""
        snapshot = take(source, at=at, label=label)
        self.append(snapshot)
        return snapshot

    def tabulate(self, distribution: Callable[[Snapshot], Table]) -> Table:
        """Apply a distribution to each snapshot: its tables below each other, with a first column ``at``."""
        tables = [(snapshot.at, distribution(snapshot)) for snapshot in self]
        return stacked(tables, "at", "<f8", self.unit)

    def write(self, path: str | Path) -> None:
        """Write all of them to one file.

        Raises
        ------
        ContainerError
            So many that their header doesn't fit (thousands); nothing was written.
        OSError
            It can't be written there.
        """
        write_snapshots(path, self._snapshots, self.unit)

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
        snapshots, unit = read_snapshots(path)
        try:
            return cls(snapshots, unit)
        except ValueError as error:
            raise ContainerError(f"{path}: not snapshots: {error}") from error


def watch(
    vm: VmFace, stream: Operations | Iterable[Operations], *, every: int, seed: int = 0, discard: bool = True
) -> Series:
    """Run operations on a guest and take a snapshot before them, after each so many, and at the end.

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

    Returns
    -------
    Series
        ``at`` counts operations.
    """
    player = Player(vm, seed=seed, discard=discard)
    series = Series()
    series.take(vm, 0)
    chunks = [stream] if isinstance(stream, np.ndarray) else stream
    for operations in rechunk(chunks, every):
        player.run(operations)
        series.take(vm, player.done)
    return series
