"""Files of snapshots: the sections of a container, and what is checked of them before they are believed.

Counters and planes are stored by name: the header lists both, in the order of the columns of ``counters`` and
of the fields of ``words``. A counter or a plane that a file doesn't name is 0 in all its snapshots, so a new
one leaves old files as readable as they were. A counter that this gmemcore doesn't know is passed over; a
plane that it doesn't know is refused if any page is in it. Files of gmemcore 0.1 name neither. The orders of
huge pages are in the header too, and only if there are any.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from gmemcore.analysis.parts import FileState, SlotState, SnapshotState
from gmemcore.engine.arguments import U64_MAX
from gmemcore.engine.counters import COUNTER_NAMES, Counters
from gmemcore.engine.packed import BLOCK_PAGES, LINE_WORDS, PLANE_NAMES, PackedState, block_sizes
from gmemcore.policy.huge_pages import ORDERS
from gmemcore.uapi import PAGE_SHIFT, PAGE_SIZE
from gmemcore.units import counted
from gmemcore.workload import container

KIND: Final = "snapshot"

_FILE_COLUMNS: Final = 5  # index, flags, pages, lines, lines of the host side
_SLOT_COLUMNS: Final = 5  # slot, gpa, size, file, offset
_COLUMNS: Final = {
    "files": _FILE_COLUMNS,
    "slots": _SLOT_COLUMNS,
    "frames": 2,
    "words": 1,
    "lines": LINE_WORDS,
}
"""Sections, and the columns of each: rows of u64, those of one snapshot after those of the one before.

``counters`` has a column per counter that the header names.
"""
_FIELD_BITS: Final = 10  # of a block word, per plane
_MOST_PLANES: Final = 64 // _FIELD_BITS
_MOST_COUNTERS: Final = 256

_FIRST_COUNTERS: Final = (
    *("pages_changed", "bytes_zeroed", "bytes_xored", "bytes_scrambled", "pages_allocated", "rmp_updates"),
    *("sept_changes", "pages_accepted", "blocks_2m_split", "blocks_2m_merged", "memory_faults"),
    "notifications",
)
"""Counters of files that don't name theirs."""
_FIRST_PLANES: Final = ("private", "allocated", "assigned", "accepted", "pinned", "poisoned")
"""Planes of files that don't name theirs."""

_FACTS: Final = ("vm_type", "abi", "firmware", "phase", "legacy", "at", "label")
_State = TypeVar("_State", bound=SnapshotState)
_Name = Annotated[str, msgspec.Meta(max_length=200)]
_Count = Annotated[int, msgspec.Meta(ge=0)]


def write_snapshots(path: str | Path, snapshots: Sequence[SnapshotState], unit: str) -> None:
    """Write snapshots to one file; see `Series.write`."""
    files = [file for snapshot in snapshots for file in snapshot.files]
    states = [state for file in files for state in (file.state, file.host) if state is not None]
    counters = [
        counters.values()
        for snapshot in snapshots
        for counters in (snapshot.counters, *(file.counters for file in snapshot.files))
    ]
    slots = [slot for snapshot in snapshots for slot in snapshot.slots]
    sections = {
        "counters": _rows(counters, len(COUNTER_NAMES)),
        "files": _rows([_file_row(file) for file in files], _FILE_COLUMNS),
        "slots": _rows([_slot_row(slot) for slot in slots], _SLOT_COLUMNS),
        "frames": _joined([snapshot.private_frames for snapshot in snapshots], 2),
        "words": _joined([state.words.reshape(-1, 1) for state in states], 1),
        "lines": _joined([state.lines for state in states], LINE_WORDS),
    }
    meta = _SeriesMeta(unit, [_meta(snapshot) for snapshot in snapshots], COUNTER_NAMES, PLANE_NAMES)
    container.write(path, KIND, msgspec.to_builtins(meta), sections)


def read_snapshots(path: str | Path, make: Callable[..., _State]) -> tuple[list[_State], str]:
    """Read the snapshots of a file, and the unit of their time; see `Series.read`.

    Parameters
    ----------
    path : str or Path
        Where.
    make : callable
        Makes a snapshot of the fields of `SnapshotState`.
    """
    read = container.read(path, KIND)
    try:
        meta = msgspec.convert(read.meta, _SeriesMeta)
        parts = _Parts(read.sections, meta.counters, meta.planes)
        snapshots = [make(**_restored(one, parts)) for one in meta.snapshots]
        parts.check_used_up()
    except (ValueError, OverflowError) as error:  # msgspec's ValidationError is a ValueError
        raise container.ContainerError(f"{path}: not snapshots: {error}") from error
    return snapshots, meta.unit


class _SnapshotMeta(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    vm_type: _Name
    abi: _Name
    firmware: _Name
    phase: _Name
    legacy: bool
    at: Annotated[float, msgspec.Meta(ge=0, le=1 << 63)]
    label: str
    files: _Count
    slots: _Count
    frames: _Count
    page_orders: tuple[_Count, ...] = ()  # of each file, if one has huge pages

    def __post_init__(self) -> None:
        if self.page_orders and len(self.page_orders) != self.files:
            raise ValueError(f"page_orders must be {self.files} orders or none, not {len(self.page_orders)}")


class _SeriesMeta(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    unit: _Name
    snapshots: list[_SnapshotMeta]
    counters: tuple[_Name, ...] = _FIRST_COUNTERS
    planes: tuple[_Name, ...] = _FIRST_PLANES

    def __post_init__(self) -> None:
        for names, what, most in (
            (self.counters, "counters", _MOST_COUNTERS),
            (self.planes, "planes", _MOST_PLANES),
        ):
            if not 1 <= len(names) <= most or len(set(names)) < len(names):
                raise ValueError(f"the header must name 1 to {most} {what}, each once")


class _Parts:
    """The sections of a file, taken row by row; what isn't there is a ValueError before it is memory."""

    def __init__(
        self, sections: Mapping[str, NDArray[Any]], counters: Sequence[str], planes: Sequence[str]
    ) -> None:
        wanted = {"counters": len(counters), **_COLUMNS}
        if set(sections) != set(wanted):
            raise ValueError(f"sections must be {', '.join(wanted)}, not {', '.join(sections)}")
        for name, columns in wanted.items():
            dtype, shape = sections[name].dtype, sections[name].shape
            if dtype != np.dtype("<u8") or len(shape) != 2 or shape[1] != columns:
                raise ValueError(
                    f"section {name} must be u64 of {columns} columns, not {dtype} of shape {shape}"
                )
        self._left = dict(sections)
        self._counters, self._planes = tuple(counters), tuple(planes)

    def take(self, name: str, n: int) -> NDArray[np.uint64]:
        """The next n rows of a section."""
        left = self._left[name]
        if not 0 <= n <= len(left):
            raise ValueError(f"section {name} must have {n} more rows, and has {len(left)}")
        self._left[name] = left[n:]
        return left[:n]

    def counters(self) -> Counters:
        """The next row of counters, by name; those that the file doesn't have are 0."""
        figures = dict(zip(self._counters, self.take("counters", 1)[0].tolist(), strict=True))
        if max(figures.values(), default=0) >= 1 << 63:
            raise ValueError("a counter must be less than 2^63")
        return Counters(*(figures.get(name, 0) for name in COUNTER_NAMES))

    def state(self, n_pages: int, lines: int) -> PackedState:
        """The next page state, with the planes that this gmemcore has."""
        words = self.take("words", -(-n_pages // BLOCK_PAGES))[:, 0]
        state = _by_name(n_pages, words, self.take("lines", lines), self._planes)
        state.check()
        return state

    def check_used_up(self) -> None:
        """Make sure that nothing is left."""
        for name, left in self._left.items():
            if len(left):
                raise ValueError(f"section {name} has {counted(len(left), 'row')} too many")


def _by_name(
    n_pages: int, words: NDArray[np.uint64], lines: NDArray[np.uint64], planes: Sequence[str]
) -> PackedState:
    """Return page state whose planes a file has in another order, or of which it has others."""
    if tuple(planes) == PLANE_NAMES or not len(words):
        return PackedState(n_pages, words, lines)
    sizes = block_sizes(n_pages)
    ordered = np.zeros(len(words), np.uint64)
    own: dict[str, NDArray[np.uint64]] = {}
    begin = 0
    for place, name in enumerate(planes):
        counts = words >> np.uint64(place * _FIELD_BITS) & np.uint64((1 << _FIELD_BITS) - 1)
        mixed = int(np.count_nonzero((counts != 0) & (counts != sizes)))
        own[name] = lines[begin : begin + mixed]
        begin += mixed
        if name in PLANE_NAMES:
            ordered |= counts << np.uint64(PLANE_NAMES.index(name) * _FIELD_BITS)
        elif counts.any():
            raise ValueError(f"plane {name!r} is of a newer gmemcore")
    if begin != len(lines) or np.any(words >> np.uint64(len(planes) * _FIELD_BITS - 1) >> np.uint64(1)):
        raise ValueError("block words and lines that don't fit each other")
    return PackedState(
        n_pages, ordered, _joined([own[name] for name in PLANE_NAMES if name in own], LINE_WORDS)
    )


def _meta(snapshot: SnapshotState) -> _SnapshotMeta:
    orders = tuple(file.page_order for file in snapshot.files)
    return _SnapshotMeta(
        **{name: getattr(snapshot, name) for name in _FACTS},
        files=len(snapshot.files),
        slots=len(snapshot.slots),
        frames=len(snapshot.private_frames),
        page_orders=orders if any(orders) else (),
    )


def _file_row(file: FileState) -> tuple[int, ...]:
    host_lines = 0 if file.host is None else len(file.host.lines)
    return file.index, file.flags, file.state.n_pages, len(file.state.lines), host_lines


def _slot_row(slot: SlotState) -> tuple[int, ...]:
    return slot.slot & U64_MAX, slot.gpa, slot.size, slot.file, slot.offset


def _restored(meta: _SnapshotMeta, parts: _Parts) -> dict[str, Any]:
    """Return the fields of the next snapshot; parts that contradict each other are a ValueError."""
    counters = parts.counters()
    rows = parts.take("files", meta.files).tolist()
    orders = meta.page_orders or (0,) * meta.files
    files = [_restored_file(row, order, meta.legacy, parts) for row, order in zip(rows, orders, strict=True)]
    slots = [
        SlotState(slot if slot < 1 << 63 else slot - (1 << 64), *place)
        for slot, *place in parts.take("slots", meta.slots).tolist()
    ]
    frames = parts.take("frames", meta.frames)
    edges = frames.ravel()
    if np.any(edges[1:] <= edges[:-1]) or np.any(edges[-1:] > np.uint64(1 << 64 - PAGE_SHIFT)):
        raise ValueError("private frames must be in order, and guest frames")
    _check_slots(slots, files)
    return {
        **{name: getattr(meta, name) for name in _FACTS},
        **{"counters": counters, "files": tuple(files), "slots": tuple(slots), "private_frames": frames},
    }


def _restored_file(row: list[int], order: int, legacy: bool, parts: _Parts) -> FileState:
    index, flags, n_pages, lines, host_lines = row
    if index >= 1 << 31 or flags >= 1 << 63:
        raise ValueError(
            f"file {index} with flags {flags:#x} must have a number below 2^31 and flags below 2^63"
        )
    if order not in (0, *ORDERS) or n_pages % (1 << order):
        raise ValueError(f"file {index} of {n_pages} pages can't have huge pages of order {order}")
    if not legacy and host_lines:
        raise ValueError(f"file {index} has lines of a host side; only legacy has one")
    counters = parts.counters()
    state = parts.state(n_pages, lines)
    host = parts.state(n_pages, host_lines) if legacy else None
    return FileState(index, flags, counters, state, host, order)


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


def _rows(rows: Sequence[tuple[int, ...]], columns: int) -> NDArray[np.uint64]:
    return np.array(rows, np.uint64).reshape(-1, columns)


def _joined(arrays: Sequence[NDArray[np.uint64]], columns: int) -> NDArray[np.uint64]:
    return np.concatenate([np.empty((0, columns), np.uint64), *arrays])
