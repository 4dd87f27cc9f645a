"""Snapshot: frozen page state and counters of a Vm.

A snapshot holds page state and figures, and nothing that was in memory: no bytes, no seed, no key.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gmemcore.analysis.bitmap import Bitmap
from gmemcore.analysis.tables import Table
from gmemcore.engine.counters import Counters
from gmemcore.engine.packed import PLANE_NAMES, PackedState
from gmemcore.html import facts
from gmemcore.machine import GuestMemfd, LegacyVm, VmFace
from gmemcore.uapi import PAGE_SHIFT, PAGE_SIZE
from gmemcore.workload.container import ContainerError


@dataclass(frozen=True, slots=True)
class SlotState:
    """A memslot: where a range of a file shows in guest physical memory.

    Attributes
    ----------
    slot : int
        Its id.
    gpa, size, offset : int
        Bytes.
    file : int
        `FileState.index` of its file.
    """

    slot: int
    gpa: int
    size: int
    file: int
    offset: int


@dataclass(frozen=True, slots=True)
class Planes:
    """The planes of one file as a guest and its host see them.

    In place they are the file's own. In `legacy` attributes come by guest frame, and what is allocated is the
    side that the attribute names; pins are the host side's.

    Attributes
    ----------
    private, allocated, assigned, accepted, pinned, poisoned : Bitmap
    memory_pages : int
        Pages of memory behind them: in `legacy` those of both sides.
    """

    private: Bitmap
    allocated: Bitmap
    assigned: Bitmap
    accepted: Bitmap
    pinned: Bitmap
    poisoned: Bitmap
    memory_pages: int

    def __getitem__(self, name: str) -> Bitmap:
        bitmap = getattr(self, name) if name in PLANE_NAMES else None
        if bitmap is None:
            raise KeyError(f"no plane {name!r}; there are {', '.join(PLANE_NAMES)}")
        assert isinstance(bitmap, Bitmap)
        return bitmap

    @property
    def n_pages(self) -> int:
        """Pages of the file."""
        return self.private.n_pages


@dataclass(frozen=True, slots=True, eq=False)
class FileState:
    """One file of a snapshot.

    Attributes
    ----------
    index : int
        Its number among all files the Vm ever created, from 0.
    flags : int
        Flags of its creation.
    counters : Counters
        Events of this file.
    state : PackedState
        Its planes.
    host : PackedState or None
        In `legacy`: those of the host memory beside it.
    """

    index: int
    flags: int
    counters: Counters
    state: PackedState
    host: PackedState | None = None

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.state.n_pages * PAGE_SIZE


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """A guest's page state at one moment. Made by `take`, or read from a file.

    Attributes
    ----------
    vm_type, abi, firmware, phase : str
        As the Vm's.
    legacy : bool
        Two backings, and attributes by guest frame.
    counters : Counters
        Events since the Vm's creation.
    files : tuple of FileState
        Its open files, in the order of their creation.
    slots : tuple of SlotState
        Its memslots, by address.
    private_frames : ndarray of uint64, shape (n, 2)
        In `legacy`: runs of private guest frames, half-open.
    at : float
        When in its run: operations done, or seconds, as the `Series` says.
    label : str
        What it is of, in the user's words.
    """

    vm_type: str
    abi: str
    firmware: str
    phase: str
    legacy: bool
    counters: Counters
    files: tuple[FileState, ...]
    slots: tuple[SlotState, ...]
    private_frames: NDArray[np.uint64]
    at: float = 0.0
    label: str = ""

    def __repr__(self) -> str:
        return (
            f"Snapshot({self.vm_type}, abi={self.abi!r}, phase={self.phase}, files={len(self.files)}, "
            f"size={self.size:#x}, at={self.at:g}{f', label={self.label!r}' if self.label else ''})"
        )

    def _repr_html_(self) -> str:
        from gmemcore.analysis.distributions import state_mix

        values = {"abi": self.abi, "firmware": self.firmware, "phase": self.phase, "at": f"{self.at:g}"}
        values |= {"label": self.label} if self.label else {}
        mix = state_mix(self)
        occurring = Table(mix.title, mix.rows[mix["pages"] > 0], mix.keys, mix.units)
        title = f"Snapshot, {self.vm_type}: {self.n_pages:,} pages in {len(self.files)} files"
        return facts(title, values, occurring._repr_html_(), self.counters._repr_html_())

    @property
    def size(self) -> int:
        """Bytes of its files together."""
        return sum(file.size for file in self.files)

    @property
    def n_pages(self) -> int:
        """Pages of its files together."""
        return self.size >> PAGE_SHIFT

    @property
    def nbytes(self) -> int:
        """Bytes that the snapshot itself takes."""
        states = [state for file in self.files for state in (file.state, file.host) if state is not None]
        return self.private_frames.nbytes + sum(state.nbytes for state in states)

    @property
    def memory_pages(self) -> int:
        """Pages of memory in use: in `legacy` those of both sides."""
        states = [state for file in self.files for state in (file.state, file.host) if state is not None]
        return sum(state.totals["allocated"] for state in states)

    def file(self, index: int) -> FileState:
        """The file of this number.

        Raises
        ------
        KeyError
            There is none; the message names those that there are.
        """
        for file in self.files:
            if file.index == index:
                return file
        known = ", ".join(str(file.index) for file in self.files) or "none"
        raise KeyError(f"no file {index} in the snapshot; there are {known}")

    def planes(self, index: int) -> Planes:
        """The planes of a file, by its number."""
        file = self.file(index)
        own = _bitmaps(file.state)
        memory = file.state.totals["allocated"]
        if file.host is None:
            return Planes(**own, memory_pages=memory)
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

    def _private_pages(self, file: FileState) -> Bitmap:
        """Pages of a file whose guest frames are private, through its memslots."""
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
        from gmemcore.analysis.snapshot_file import write_snapshots

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
        from gmemcore.analysis.snapshot_file import read_snapshots

        snapshots, _ = read_snapshots(path)
        if len(snapshots) != 1:
            raise ContainerError(f"{path}: it holds {len(snapshots)} snapshots; Series.read reads them all")
        return snapshots[0]


def take(source: VmFace | GuestMemfd, *, at: float = 0.0, label: str = "") -> Snapshot:
    """Freeze a Vm, or one file of it.

    Parameters
    ----------
    source : Vm, LegacyVm or GuestMemfd
        A file alone keeps the memslots and frames that concern it; counters are then the file's own.
    at : float
        When in its run, in the unit of its series.
    label : str
        What it is of.

    Returns
    -------
    Snapshot
        All of one moment: conversions on other threads come wholly before or after it.
    """
    vm = source if isinstance(source, VmFace) else source.vm
    with vm.frozen():
        files = vm.files if isinstance(source, VmFace) else [source]
        states = tuple(
            FileState(
                gmem.index,
                int(gmem.flags),
                gmem.counters,
                gmem.packed_state(),
                gmem.packed_state(host=True) if vm.abi.legacy else None,
            )
            for gmem in files
        )
        slots = tuple(
            SlotState(slot.slot, slot.gpa, slot.size, slot.gmem.index, slot.gmem_offset)
            for slot in vm.memslots
            if slot.gmem in files
        )
        frames = vm.private_frames() if isinstance(vm, LegacyVm) else []
        return Snapshot(
            vm_type=vm.vm_type.value,
            abi=vm.abi.name,
            firmware=vm.firmware.value,
            phase=vm.phase.value,
            legacy=vm.abi.legacy,
            counters=source.counters,
            files=states,
            slots=slots,
            private_frames=np.array(frames, np.uint64).reshape(-1, 2),
            at=float(at),
            label=label,
        )


def as_snapshot(source: "Snapshot | VmFace | GuestMemfd") -> Snapshot:
    """Return a snapshot as it is, and take one of anything else."""
    return source if isinstance(source, Snapshot) else take(source)


def _bitmaps(state: PackedState) -> dict[str, Bitmap]:
    bitmaps = {}
    for name, (counts, mixed, lines) in state.planes().items():
        full = counts != 0
        full[mixed] = False
        bitmaps[name] = Bitmap(state.n_pages, full, mixed, lines)
    return bitmaps


def _merged(ranges: NDArray[np.int64]) -> NDArray[np.int64]:
    """Edges of ranges in order that may touch: where one ends and the next begins there is no edge."""
    edges = ranges.ravel()
    touching = np.flatnonzero(edges[1:-1:2] == edges[2::2]) * 2 + 1
    return np.delete(edges, np.concatenate([touching, touching + 1]))
