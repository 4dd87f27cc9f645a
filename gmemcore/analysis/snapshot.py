"""Snapshot: frozen page state and counters of a Vm.

A snapshot holds page state and figures, and nothing that was in memory: no bytes, no seed, no key.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmemcore.analysis.address import GuestMemory, block_bytes, states_by_block
from gmemcore.analysis.bitmap import Bitmap
from gmemcore.analysis.parts import FileState, Planes, SlotState, SnapshotState
from gmemcore.analysis.plots import SnapshotPlot
from gmemcore.analysis.snapshot_file import read_snapshots, write_snapshots
from gmemcore.analysis.states import STATES, states_of
from gmemcore.analysis.tables import Table, extra, make_table, write_parquet
from gmemcore.engine.counters import COUNTER_NAMES
from gmemcore.engine.packed import BLOCK_PAGES, PackedState
from gmemcore.html import facts
from gmemcore.machine import GuestMemfd, Vm
from gmemcore.names import is_real
from gmemcore.uapi import PAGE_SHIFT
from gmemcore.units import counted, size_words
from gmemcore.workload.container import ContainerError


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Snapshot(SnapshotState):
    """A guest's page state at one moment. Made by `take`, or read from a file.

    Attributes
    ----------
    vm_type, abi, firmware, phase : str
        As the Vm's.
    legacy : bool
        Whether each memslot has two backings, and attributes are kept by guest frame.
    counters : Counters
        Events since the Vm's creation.
    files : tuple of FileState
        Its open files, in the order of their creation.
    slots : tuple of SlotState
        Its memslots, by address.
    private_frames : ndarray of uint64, shape (n, 2)
        In `legacy`: runs of private guest frames, half-open.
    at : float
        Its place in the run: operations done, or seconds, in the unit of its `Series`.
    label : str
        What it shows, in the user's words.
    """

    def __repr__(self) -> str:
        label = f", {self.label!r}" if self.label else ""
        head = (
            f"Snapshot of {size_words(self.size)} in {counted(len(self.files), 'file')}: {self.vm_type}, "
            f"{self.abi}, firmware {self.firmware}, {self.phase}, at {self.at:g}{label}"
        )
        return f"{head}\n{self._occurring()!r}"

    def _repr_html_(self) -> str:
        values = {"abi": self.abi, "firmware": self.firmware, "phase": self.phase, "at": f"{self.at:g}"}
        values |= {"label": self.label} if self.label else {}
        title = (
            f"Snapshot, {self.vm_type}: {counted(self.n_pages, 'page')} in {counted(len(self.files), 'file')}"
        )
        return facts(title, values, self._occurring()._repr_html_(), self.counters._repr_html_())

    def _occurring(self) -> Table:
        """Return the states that at least one page is in."""
        pages = {name: count for name, count in self.state_pages().items() if count}
        rows = [(name, count, count << PAGE_SHIFT, count / self.n_pages) for name, count in pages.items()]
        columns = [("state", "U20"), ("pages", "<i8"), ("bytes", "<i8"), ("fraction", "<f8")]
        units = {"pages": "pages", "bytes": "bytes", "fraction": "1"}
        return make_table("page states", columns, rows, ("state",), units)

    @property
    def size(self) -> int:
        """Total size of its files in bytes."""
        return sum(file.size for file in self.files)

    @property
    def n_pages(self) -> int:
        """Total pages of its files."""
        return self.size >> PAGE_SHIFT

    @property
    def nbytes(self) -> int:
        """Memory that the snapshot itself takes, in bytes."""
        states = [state for file in self.files for state in (file.state, file.host) if state is not None]
        return self.private_frames.nbytes + sum(state.nbytes for state in states)

    @property
    def memory_pages(self) -> int:
        """Pages of memory in use: in `legacy` those of both sides, in huge pages all pages of each."""
        pages = 0
        for file in self.files:
            if file.page_order:
                pages += sum(self.count_folios(file)) << file.page_order
            else:
                states = [state for state in (file.state, file.host) if state is not None]
                pages += sum(state.totals["allocated"] for state in states)
        return pages

    @property
    def plot(self) -> SnapshotPlot:
        """Pictures of it."""
        return SnapshotPlot(self)

    def state_pages(self) -> dict[str, int]:
        """Count the pages of its files in each of `STATES`."""
        totals = dict.fromkeys((state.name for state in STATES), 0)
        for file in self.files:
            for name, pages in states_of(self.planes(file.index)).items():
                totals[name] += pages.count()
        return totals

    def to_pandas(self, block: int | str | None = None) -> Any:
        """Return a pandas DataFrame: a row per block of guest addresses, a column per state, in pages.

        Parameters
        ----------
        block : int, str or None
            Bytes of a block, as ``"2m"``; None: the power of two that makes up to 1,024 of them.

        Returns
        -------
        DataFrame
            Its index is ``address`` (gpa of the first byte); its ``attrs`` have title, block and units.

        Raises
        ------
        ImportError
            pandas isn't installed.
        """
        pandas = extra("pandas", "to_pandas()")
        memory = GuestMemory([self])
        blocks = memory.blocks(block_bytes(memory, block))
        counts = states_by_block(memory, self, blocks)
        index = pandas.Index(blocks.gpas, name="address")
        frame = pandas.DataFrame(counts, index, [state.name for state in STATES])
        title = f"page states by {size_words(blocks.size)} of guest memory"
        frame.attrs |= {"title": title, "block": blocks.size, "units": {"address": "bytes", "pages": "pages"}}
        return frame

    def to_xarray(self, block: int | str | None = None) -> Any:
        """Return an xarray Dataset: pages by address and state, and the counters.

        Parameters
        ----------
        block : int, str or None
            Bytes of a block of addresses; see `to_pandas`.

        Returns
        -------
        Dataset
            ``pages`` (address, state), ``counters`` (counter), ``memory`` (bytes in use). Every variable has
            its unit; ``attrs`` name the guest.

        Raises
        ------
        ImportError
            xarray or pandas isn't installed.
        """
        return states_dataset([self], np.array([self.at]), block).isel(operation=0, drop=True)

    def to_parquet(self, path: str | Path, block: int | str | None = None) -> None:
        """Write `to_pandas` as Parquet; an old file is replaced whole.

        Raises
        ------
        ImportError
            pandas or pyarrow isn't installed.
        OSError
            It can't be written there.
        """
        write_frame(self.to_pandas(block), path)

    def file(self, index: int) -> FileState:
        """Return the file with this number.

        Raises
        ------
        KeyError
            No file has this number; the message lists those that exist.
        """
        for file in self.files:
            if file.index == index:
                return file
        known = ", ".join(str(file.index) for file in self.files) or "none"
        raise KeyError(f"no file {index} in the snapshot; there are {known}")

    def planes(self, index: int) -> Planes:
        """Return the planes of a file, given its number."""
        file = self.file(index)
        if file.host is None:
            return planes_of(file.state)
        own = _bitmaps(file.state)
        memory = file.state.totals["allocated"]
        host = _bitmaps(file.host)
        private = self._private_pages(file)
        return Planes(
            private=private,
            allocated=(private & own["allocated"]) | (~private & host["allocated"]),
            assigned=private & own["assigned"],
            accepted=private & own["accepted"],
            pinned=host["pinned"],
            poisoned=own["poisoned"],
            memory_pages=memory + file.host.totals["allocated"],
        )

    def count_folios(self, file: FileState) -> tuple[int, int]:
        """Count the huge pages of a file in use that are whole folios, and those that are split.

        Page state decides: a huge page is in use if one of its pages is allocated, and then whole if all of
        them are private.
        """
        planes, blocks = self.planes(file.index), (1 << file.page_order) // BLOCK_PAGES
        private, _ = planes.private.uniform_blocks(blocks)
        _, absent = planes.allocated.uniform_blocks(blocks)
        return int((private & ~absent).sum()), int((~private & ~absent).sum())

    def _private_pages(self, file: FileState) -> Bitmap:
        """Return the pages of a file whose guest frames are private, through its memslots."""
        edges = []
        for slot in sorted(self.slots, key=lambda slot: slot.offset):
            if slot.file == file.index:
                low, end = slot.gpa >> PAGE_SHIFT, (slot.gpa + slot.size) >> PAGE_SHIFT
                within = self.private_frames[
                    (self.private_frames[:, 1] > low) & (self.private_frames[:, 0] < end)
                ]
                edges.append(np.clip(within, low, end).astype(np.int64) - low + (slot.offset >> PAGE_SHIFT))
        if not edges:
            return Bitmap.uniform(file.state.n_pages, False)
        return Bitmap.from_edges(file.state.n_pages, _merged(np.concatenate(edges)))

    def write(self, path: str | Path) -> None:
        """Write it to a file, as a `Series` of one."""
        write_snapshots(path, [self], "operations")

    @classmethod
    def read(cls, path: str | Path) -> "Snapshot":
        """Read a file that holds one snapshot.

        Raises
        ------
        ContainerError
            Not a file of snapshots, damaged, or a series of several (`Series.read` takes those).
        OSError
            It can't be opened or read.
        """
        snapshots, _ = read_snapshots(path, cls)
        if len(snapshots) != 1:
            raise ContainerError(f"{path}: must hold one snapshot, not {len(snapshots)}; use Series.read")
        return snapshots[0]


def take(source: Vm | GuestMemfd, *, at: float = 0.0, label: str = "") -> Snapshot:
    """Freeze a Vm, or one file of it.

    Parameters
    ----------
    source : Vm, LegacyVm or GuestMemfd
        Of one file, the snapshot has its memslots, their frames and the file's own counters.
    at : float
        Its place in the run, in the unit of its series.
    label : str
        What it shows.

    Returns
    -------
    Snapshot
        All of one moment: each conversion on another thread is wholly before or after it.

    Raises
    ------
    TypeError
        The source is something else, or `at` isn't a number.
    BadFileError
        EBADF: the file is closed.
    """
    if not isinstance(source, (Vm, GuestMemfd)):
        raise TypeError(f"a snapshot is of a Vm or a GuestMemfd, not of {type(source).__name__}")
    if not is_real(at):
        raise TypeError(f"at must be a number, not {type(at).__name__}")
    vm = source if isinstance(source, Vm) else source.vm
    moment = vm.freeze(None if isinstance(source, Vm) else [source])
    files = [file.gmem for file in moment.files]
    states = tuple(
        FileState(
            file.gmem.index,
            int(file.gmem.flags),
            file.counters,
            file.state,
            file.host,
            file.gmem.page_order,
        )
        for file in moment.files
    )
    slots = tuple(
        SlotState(slot.slot, slot.gpa, slot.size, slot.gmem.index, slot.gmem_offset)
        for slot in moment.memslots
        if slot.gmem in files
    )
    return Snapshot(
        vm_type=vm.vm_type.value,
        abi=vm.abi.name,
        firmware=vm.firmware.value,
        phase=moment.phase.value,
        legacy=vm.abi.legacy,
        counters=moment.counters if isinstance(source, Vm) else moment.files[0].counters,
        files=states,
        slots=slots,
        private_frames=moment.private_frames,
        at=float(at),
        label=label,
    )


def as_snapshot(source: "Snapshot | Vm | GuestMemfd") -> Snapshot:
    """Return `source` if it is a snapshot; otherwise take one."""
    return source if isinstance(source, Snapshot) else take(source)


def states_dataset(
    snapshots: Collection[Snapshot],
    index: NDArray[Any],
    block: int | str | None,
    dimension: str = "operation",
    unit: str = "operations",
) -> Any:
    """Return an xarray Dataset of snapshots of one guest: page states by time, address and state."""
    xarray = extra("xarray", "to_xarray()")
    memory = GuestMemory(snapshots)
    blocks = memory.blocks(block_bytes(memory, block))
    pages = np.empty((len(snapshots), len(blocks), len(STATES)), np.int64)
    for number, snapshot in enumerate(snapshots):
        pages[number] = states_by_block(memory, snapshot, blocks)
    first = next(iter(snapshots))
    return xarray.Dataset(
        {
            "pages": ((dimension, "address", "state"), pages, {"units": "pages"}),
            "memory": (
                dimension,
                [one.memory_pages << PAGE_SHIFT for one in snapshots],
                {"units": "bytes", "long_name": "memory in use"},
            ),
            "counters": (
                (dimension, "counter"),
                np.array([one.counters.values() for one in snapshots], np.int64).reshape(len(snapshots), -1),
                {"units": "events", "long_name": "events since the Vm's creation"},
            ),
        },
        {
            dimension: (dimension, index, {"units": unit}),
            "address": ("address", blocks.gpas, {"units": "bytes", "long_name": "guest physical address"}),
            "block_pages": ("address", blocks.pages, {"units": "pages"}),
            "state": [state.name for state in STATES],
            "counter": list(COUNTER_NAMES),
            "phase": (dimension, [one.phase for one in snapshots]),
            "label": (dimension, [one.label for one in snapshots]),
        },
        {
            "title": "page states of a guest",
            "vm_type": first.vm_type,
            "abi": first.abi,
            "firmware": first.firmware,
            "block": blocks.size,
        },
    )


def write_frame(frame: Any, path: str | Path) -> None:
    """Write a pandas DataFrame as Parquet, whole or not at all."""
    arrow = extra("pyarrow", "to_parquet()")
    write_parquet(arrow.Table.from_pandas(frame), path)


def planes_of(state: PackedState) -> Planes:
    """Return the planes of a state as they are: those of a file that is converted in place."""
    return Planes(**_bitmaps(state), memory_pages=state.totals["allocated"])


def _bitmaps(state: PackedState) -> dict[str, Bitmap]:
    full, bitmaps, begin = state.uniform(), {}, 0
    for name, mixed in state.mixed().items():
        lines = state.lines[begin : begin + len(mixed)]
        bitmaps[name] = Bitmap(state.n_pages, full[name], mixed, lines)
        begin += len(mixed)
    return bitmaps


def _merged(ranges: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the edges of ordered ranges, without those where one range ends and the next begins."""
    edges = ranges.ravel()
    touching = np.flatnonzero(edges[1:-1:2] == edges[2::2]) * 2 + 1
    return np.delete(edges, np.concatenate([touching, touching + 1]))
