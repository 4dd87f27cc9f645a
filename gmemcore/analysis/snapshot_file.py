"""Files of snapshots: the sections of a container, and what is checked of them before they are believed."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from gmemcore.analysis.parts import FileState, SlotState
from gmemcore.analysis.snapshot import Snapshot
from gmemcore.engine.arguments import U64_MAX
from gmemcore.engine.counters import COUNTER_NAMES, Counters
from gmemcore.engine.packed import BLOCK_PAGES, LINE_WORDS, PackedState
from gmemcore.uapi import PAGE_SIZE
from gmemcore.workload import container

KIND: Final = "snapshot"

_FILE_COLUMNS: Final = 5  # index, flags, pages, lines, lines of the host side
_SLOT_COLUMNS: Final = 5  # slot, gpa, size, file, offset
_COLUMNS: Final = {
    **{"counters": len(COUNTER_NAMES), "files": _FILE_COLUMNS, "slots": _SLOT_COLUMNS},
    **{"frames": 2, "words": 1, "lines": LINE_WORDS},
}
"""Sections, and the columns of each: rows of u64, those of one snapshot after those of the one before."""


def write_snapshots(path: str | Path, snapshots: Sequence[Snapshot], unit: str) -> None:
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
    meta = {"unit": unit, "snapshots": [msgspec.to_builtins(_meta(snapshot)) for snapshot in snapshots]}
    container.write(path, KIND, meta, sections)


def read_snapshots(path: str | Path) -> tuple[list[Snapshot], str]:
    """Read the snapshots of a file, and the unit of their time; see `Series.read`."""
    read = container.read(path, KIND)
    try:
        meta = msgspec.convert(read.meta, _SeriesMeta)
        parts = _Parts(read.sections)
        snapshots = [_restored(one, parts) for one in meta.snapshots]
        parts.check_used_up()
    except ValueError as error:  # msgspec's ValidationError is one
        raise container.ContainerError(f"{path}: not snapshots: {error}") from error
    return snapshots, meta.unit


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
