"""Snapshot: frozen page state and counters of a Vm; what changed between two; many of them over time.

A snapshot holds page state and figures, and nothing that was in memory: no bytes, no seed, no key.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from gmemcore.analysis.bitmap import Bitmap
from gmemcore.analysis.tables import Table, make_table, stacked
from gmemcore.engine.arguments import U64_MAX
from gmemcore.engine.counters import COUNTER_NAMES, Counters
from gmemcore.engine.packed import BLOCK_PAGES, LINE_WORDS, PLANE_NAMES, PackedState
from gmemcore.html import facts, table
from gmemcore.machine import GuestMemfd, LegacyVm, VmFace
from gmemcore.uapi import PAGE_SHIFT, PAGE_SIZE
from gmemcore.workload import container

KIND: Final = "snapshot"


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
        """Write it to a file: a `Series` of one."""
        Series([self]).write(path)

    @classmethod
    def read(cls, path: str | Path) -> "Snapshot":
        """Read a file that holds one snapshot.

        Raises
        ------
        ContainerError
            Not a file of snapshots, damaged, or a series of several (`Series.read` takes those).
        """
        series = Series.read(path)
        if len(series) != 1:
            raise container.ContainerError(
                f"{path} holds {len(series)} snapshots; Series.read reads them all"
            )
        return series[0]


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


# ---- two snapshots -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Diff:
    """What changed from one snapshot to a later one. Made by `diff`.

    Attributes
    ----------
    before, after : Snapshot
        The two.
    changes : Table
        Rows (file, plane, set, cleared, ranges): pages that became set and cleared, in how many maximal runs
        of changed pages; planes without a change have none.
    counters : Counters
        Events between them.
    appeared, gone : tuple of int
        Files that only the later and only the earlier one has.
    """

    before: Snapshot
    after: Snapshot
    changes: Table
    counters: Counters
    appeared: tuple[int, ...]
    gone: tuple[int, ...]

    def _repr_html_(self) -> str:
        phases = f"{self.before.phase} to {self.after.phase}"
        values = {"from": f"{self.before.at:g}", "to": f"{self.after.at:g}"}
        values |= {"phase": phases} if self.before.phase != self.after.phase else {}
        values |= {"new files": ", ".join(map(str, self.appeared))} if self.appeared else {}
        values |= {"closed files": ", ".join(map(str, self.gone))} if self.gone else {}
        return facts("Diff", values, self.changes._repr_html_(), self.counters._repr_html_())

    def ranges(self, plane: str, file: int = 0) -> Table:
        """Ranges of pages in which a plane changed: rows (start, end, now), half-open pages of the file."""
        old, new = self.before.planes(file)[plane], self.after.planes(file)[plane]
        parts = [((new & ~old).ranges(), True), ((old & ~new).ranges(), False)]
        rows = [(start, end, now) for ranges, now in parts for start, end in ranges.tolist()]
        return make_table(
            f"pages whose plane {plane} changed, file {file}",
            [("start", "<i8"), ("end", "<i8"), ("now", "?")],
            sorted(rows),
            ("start",),
            {"start": "pages", "end": "pages"},
        )

    def __bool__(self) -> bool:
        return bool(len(self.changes) or self.appeared or self.gone or self.before.phase != self.after.phase)


def diff(before: Snapshot, after: Snapshot) -> Diff:
    """Compare two snapshots of a guest: planes page by page, counters, files.

    Raises
    ------
    ValueError
        A file that both have differs in size: they are of different guests.
    """
    old, new = ({file.index: file for file in snapshot.files} for snapshot in (before, after))
    rows: list[tuple[Any, ...]] = []
    for index in sorted(old.keys() & new.keys()):
        if old[index].size != new[index].size:
            sizes = f"{old[index].size:#x} and {new[index].size:#x}"
            raise ValueError(f"file {index} has {sizes} bytes; snapshots of one guest can be compared")
        planes = before.planes(index), after.planes(index)
        for name in PLANE_NAMES:
            was, now = planes[0][name], planes[1][name]
            changed = was ^ now
            total = changed.count()
            if total:
                became_set = (changed & now).count()
                rows.append((index, name, became_set, total - became_set, len(changed.ranges())))
    changes = make_table(
        "changes by file and plane",
        [("file", "<i8"), ("plane", "U12"), ("set", "<i8"), ("cleared", "<i8"), ("ranges", "<i8")],
        rows,
        ("file", "plane"),
        {"set": "pages", "cleared": "pages"},
    )
    appeared, gone = sorted(new.keys() - old.keys()), sorted(old.keys() - new.keys())
    return Diff(before, after, changes, after.counters - before.counters, tuple(appeared), tuple(gone))


# ---- many snapshots ----------------------------------------------------------------------------------


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
        files = [file for snapshot in self for file in snapshot.files]
        states = [state for file in files for state in (file.state, file.host) if state is not None]
        counters = [
            counters.values()
            for snapshot in self
            for counters in (snapshot.counters, *(file.counters for file in snapshot.files))
        ]
        slots = [slot for snapshot in self for slot in snapshot.slots]
        sections = {
            "counters": _rows(counters, len(COUNTER_NAMES)),
            "files": _rows([_file_row(file) for file in files], _FILE_COLUMNS),
            "slots": _rows([_slot_row(slot) for slot in slots], _SLOT_COLUMNS),
            "frames": _joined([snapshot.private_frames for snapshot in self], 2),
            "words": _joined([state.words.reshape(-1, 1) for state in states], 1),
            "lines": _joined([state.lines for state in states], LINE_WORDS),
        }
        meta = {"unit": self.unit, "snapshots": [msgspec.to_builtins(_meta(snapshot)) for snapshot in self]}
        container.write(path, KIND, meta, sections)

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
        read = container.read(path, KIND)
        try:
            meta = msgspec.convert(read.meta, _SeriesMeta)
            parts = _Parts(read.sections)
            series = cls([_restored(one, parts) for one in meta.snapshots], meta.unit)
            parts.check_used_up()
        except ValueError as error:  # msgspec's ValidationError is one
            raise container.ContainerError(f"{path}: not snapshots: {error}") from error
        return series


# ---- the file ----------------------------------------------------------------------------------------

_FILE_COLUMNS: Final = 5  # index, flags, pages, lines, lines of the host side
_SLOT_COLUMNS: Final = 5  # slot, gpa, size, file, offset
_COLUMNS: Final = {
    **{"counters": len(COUNTER_NAMES), "files": _FILE_COLUMNS, "slots": _SLOT_COLUMNS},
    **{"frames": 2, "words": 1, "lines": LINE_WORDS},
}
"""Sections, and the columns of each: rows of u64, those of one snapshot after those of the one before."""


class _SnapshotMeta(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    vm_type: str
    abi: str
    firmware: str
    phase: str
    legacy: bool
    at: float
    label: str
    files: int
    slots: int
    frames: int


class _SeriesMeta(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    unit: str
    snapshots: list[_SnapshotMeta]


class _Parts:
    """The sections of a file, taken row by row; what isn't there is a ValueError before it is memory."""

    def __init__(self, sections: Mapping[str, NDArray[Any]]) -> None:
        if set(sections) != set(_COLUMNS):
            raise ValueError(f"sections {', '.join(sections)}; {', '.join(_COLUMNS)} are due")
        for name, columns in _COLUMNS.items():
            dtype, shape = sections[name].dtype, sections[name].shape
            if dtype != np.dtype("<u8") or len(shape) != 2 or shape[1] != columns:
                raise ValueError(
                    f"section {name} is {dtype} of shape {shape}; u64 of {columns} columns are due"
                )
        self._left = dict(sections)

    def take(self, name: str, n: int) -> NDArray[np.uint64]:
        """The next n rows of a section."""
        left = self._left[name]
        if not 0 <= n <= len(left):
            raise ValueError(f"{n} more rows of section {name} are due, and {len(left)} are left")
        self._left[name] = left[n:]
        return left[:n]

    def check_used_up(self) -> None:
        """Make sure that nothing is left."""
        for name, left in self._left.items():
            if len(left):
                raise ValueError(f"section {name} has {len(left)} rows too many")


def _meta(snapshot: Snapshot) -> _SnapshotMeta:
    return _SnapshotMeta(
        vm_type=snapshot.vm_type,
        abi=snapshot.abi,
        firmware=snapshot.firmware,
        phase=snapshot.phase,
        legacy=snapshot.legacy,
        at=snapshot.at,
        label=snapshot.label,
        files=len(snapshot.files),
        slots=len(snapshot.slots),
        frames=len(snapshot.private_frames),
    )


def _file_row(file: FileState) -> tuple[int, ...]:
    host_lines = 0 if file.host is None else len(file.host.lines)
    return file.index, file.flags, file.state.n_pages, len(file.state.lines), host_lines


def _slot_row(slot: SlotState) -> tuple[int, ...]:
    return slot.slot & U64_MAX, slot.gpa, slot.size, slot.file, slot.offset


def _restored(meta: _SnapshotMeta, parts: _Parts) -> Snapshot:
    """The next snapshot of a file; parts that contradict each other are a ValueError."""
    counters = _counters(parts)
    files = [_restored_file(row, meta.legacy, parts) for row in parts.take("files", meta.files).tolist()]
    slots = [
        SlotState(slot if slot < 1 << 63 else slot - (1 << 64), *place)
        for slot, *place in parts.take("slots", meta.slots).tolist()
    ]
    frames = parts.take("frames", meta.frames)
    edges = frames.ravel()
    if np.any(edges[1:] <= edges[:-1]):
        raise ValueError("private frames that aren't in order")
    _check_slots(slots, files)
    return Snapshot(
        vm_type=meta.vm_type,
        abi=meta.abi,
        firmware=meta.firmware,
        phase=meta.phase,
        legacy=meta.legacy,
        at=meta.at,
        label=meta.label,
        counters=counters,
        files=tuple(files),
        slots=tuple(slots),
        private_frames=frames,
    )


def _restored_file(row: list[int], legacy: bool, parts: _Parts) -> FileState:
    index, flags, n_pages, lines, host_lines = row
    counters = _counters(parts)
    state = _restored_state(n_pages, lines, parts)
    host = _restored_state(n_pages, host_lines, parts) if legacy else None
    return FileState(index, flags, counters, state, host)


def _restored_state(n_pages: int, lines: int, parts: _Parts) -> PackedState:
    words = parts.take("words", -(-n_pages // BLOCK_PAGES))[:, 0]
    state = PackedState(n_pages, words, parts.take("lines", lines))
    state.check()
    return state


def _check_slots(slots: Sequence[SlotState], files: Sequence[FileState]) -> None:
    """Hold memslots to what `Memslots.add` promises of them."""
    sizes = {file.index: file.size for file in files}
    if len(sizes) != len(files):
        raise ValueError("a file number twice")
    for slot in slots:
        if slot.file not in sizes or slot.offset + slot.size > sizes[slot.file]:
            raise ValueError(f"memslot {slot.slot} isn't within a file")
        if (
            slot.size < 1
            or (slot.gpa | slot.size | slot.offset) % PAGE_SIZE
            or slot.gpa + slot.size > 1 << 64
        ):
            raise ValueError(f"memslot {slot.slot} isn't whole pages of guest memory")
    by_gpa = sorted((slot.gpa, slot.gpa + slot.size) for slot in slots)
    by_file = sorted((slot.file, slot.offset, slot.offset + slot.size) for slot in slots)
    if any(end > start for (_, end), (start, _) in pairwise(by_gpa)) or any(
        own == other and end > start for (own, _, end), (other, start, _) in pairwise(by_file)
    ):
        raise ValueError("memslots that overlap")


def _counters(parts: _Parts) -> Counters:
    return Counters(*parts.take("counters", 1)[0].tolist())


def _rows(rows: Sequence[tuple[int, ...]], columns: int) -> NDArray[np.uint64]:
    return np.array(rows, np.uint64).reshape(-1, columns)


def _joined(arrays: Sequence[NDArray[np.uint64]], columns: int) -> NDArray[np.uint64]:
    return np.concatenate([np.empty((0, columns), np.uint64), *arrays])
