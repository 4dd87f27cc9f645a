"""What a snapshot is made of: memslots, files, and the planes of a file."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gmemcore.analysis.bitmap import Bitmap
from gmemcore.engine.counters import Counters
from gmemcore.engine.packed import PLANE_NAMES, PackedState
from gmemcore.uapi import PAGE_SIZE


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
    page_order : int
        Order of its huge pages, 9 or 18; 0: it has pages of 4 KiB.
    """

    index: int
    flags: int
    counters: Counters
    state: PackedState
    host: PackedState | None = None
    page_order: int = 0

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.state.n_pages * PAGE_SIZE


@dataclass(frozen=True, slots=True, eq=False)
class SnapshotState:
    """What a snapshot holds, and what its file does; see `gmemcore.analysis.snapshot.Snapshot`."""

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
