"""Guest memory by address: which addresses there are, page states by block of them, runs of pages alike.

A page of guest memory has two numbers here. Its *gpa* is what the guest uses. Its *position* counts pages of
guest memory alone, without the holes between memslots; pictures and the explorer are drawn along it.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gmemcore.analysis.bitmap import Bitmap
from gmemcore.analysis.parts import Planes, SlotState
from gmemcore.analysis.states import STATES, states_of
from gmemcore.engine.packed import PLANE_NAMES
from gmemcore.errors import InvalidArgumentError
from gmemcore.uapi import PAGE_SHIFT, PAGE_SIZE
from gmemcore.units import format_size, parse_size

if TYPE_CHECKING:
    from gmemcore.analysis.snapshot import Snapshot

BLOCKS: Final = 1024
"""About as many blocks of addresses as guest memory is cut into, unless a size is asked for."""
_APART: Final = 1 << 30
"""Files without a memslot are put at multiples of this behind everything else."""


class GuestMemory:
    """The addresses at which snapshots of one guest show memory, in order.

    A file that never has a memslot has no address; it follows behind everything else, at a multiple of 1 GiB.

    Parameters
    ----------
    snapshots : iterable of Snapshot
        An address that one of them shows is there.

    Attributes
    ----------
    gpas, sizes : ndarray of uint64, shape (n,)
        Ranges of addresses without a hole, bytes.
    firsts : ndarray of int64, shape (n,)
        Position of the first page of each.
    pages : int
        Pages of all of them.
    loose : dict of int to int
        Files without a memslot, and the address that each is put at.
    """

    def __init__(self, snapshots: "Iterable[Snapshot]") -> None:
        slots: set[tuple[int, int]] = set()
        files: dict[int, int] = {}
        bound: set[int] = set()
        for snapshot in snapshots:
            slots.update((slot.gpa, slot.gpa + slot.size) for slot in snapshot.slots)
            bound.update(slot.file for slot in snapshot.slots)
            files.update((file.index, file.size) for file in snapshot.files)
        end = max((end for _, end in slots), default=0)
        self.loose: dict[int, int] = {}
        for index in sorted(files.keys() - bound):
            self.loose[index] = -(-end // _APART) * _APART
            end = self.loose[index] + files[index]
            slots.add((self.loose[index], end))
        ranges: list[tuple[int, int]] = []
        for low, high in sorted(slots):
            if ranges and low <= ranges[-1][1]:
                ranges[-1] = ranges[-1][0], max(ranges[-1][1], high)
            else:
                ranges.append((low, high))
        self.gpas = np.array([low for low, _ in ranges], np.uint64)
        self.sizes = np.array([high - low for low, high in ranges], np.uint64)
        ends = np.cumsum(self.sizes >> np.uint64(PAGE_SHIFT)).astype(np.int64)
        self.firsts = np.concatenate([np.zeros(1, np.int64), ends])[: len(ranges)]
        self.pages = int(ends[-1]) if len(ranges) else 0

    def __repr__(self) -> str:
        return f"GuestMemory({format_size(self.pages * PAGE_SIZE)} in {len(self.gpas)} ranges)"

    def gpa_of(self, position: int) -> int:
        """Address of the page at a position; of the end, the address after the last byte."""
        place = max(int(np.searchsorted(self.firsts, position, side="right")) - 1, 0)
        if position == self.pages:
            place = len(self.gpas) - 1
        return int(self.gpas[place]) + (position - int(self.firsts[place])) * PAGE_SIZE

    def position_of(self, gpa: int) -> int | None:
        """Position of the page at an address, or None where there is no memory."""
        place = int(np.searchsorted(self.gpas, np.uint64(gpa), side="right")) - 1
        if place < 0 or gpa - int(self.gpas[place]) >= int(self.sizes[place]):
            return None
        return int(self.firsts[place]) + (gpa - int(self.gpas[place])) // PAGE_SIZE

    def slots(self, snapshot: "Snapshot") -> list[tuple[SlotState, int]]:
        """Memslots of a snapshot, each with the position of its first page; loose files as if bound."""
        loose = [
            SlotState(-1, self.loose[file.index], file.size, file.index, 0)
            for file in snapshot.files
            if file.index in self.loose
        ]
        return [(slot, self.position_of(slot.gpa) or 0) for slot in (*snapshot.slots, *loose)]

    def blocks(self, size: int) -> "Blocks":
        """Cut guest memory at every multiple of `size` bytes, and where a range begins."""
        gpas: list[NDArray[np.uint64]] = [np.empty(0, np.uint64)]
        edges: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
        for low, long, first in zip(self.gpas.tolist(), self.sizes.tolist(), self.firsts, strict=True):
            inner = np.arange(low // size + 1, -(-(low + long) // size), dtype=np.uint64) * np.uint64(size)
            starts = np.concatenate([np.array([low], np.uint64), inner])
            gpas.append(starts)
            edges.append(((starts - np.uint64(low)) >> np.uint64(PAGE_SHIFT)).astype(np.int64) + first)
        return Blocks(size, np.concatenate(gpas), np.concatenate([*edges, np.array([self.pages])]))


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """Guest memory, cut.

    Attributes
    ----------
    size : int
        Bytes of a whole block.
    gpas : ndarray of uint64, shape (n,)
        Address of the first byte of each.
    edges : ndarray of int64, shape (n + 1,)
        Positions at which they begin, and the end of the last.
    """

    size: int
    gpas: NDArray[np.uint64]
    edges: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.gpas)

    @property
    def pages(self) -> NDArray[np.int64]:
        """Pages of each, shape (n,)."""
        return np.diff(self.edges)


def block_bytes(memory: GuestMemory, block: int | str | None, most: int = BLOCKS) -> int:
    """Return the bytes of a block of addresses: those asked for, or the power of two that makes up to `most`.

    Raises
    ------
    InvalidArgumentError
        EINVAL: not a positive multiple of a page.
    """
    if block is None:
        return PAGE_SIZE << max(-(-memory.pages // most) - 1, 0).bit_length()
    size = parse_size(block) if isinstance(block, str) else int(block)
    if size < PAGE_SIZE or size % PAGE_SIZE:
        raise InvalidArgumentError(f"block {size} must be a positive multiple of {PAGE_SIZE} bytes")
    return size


def states_by_block(memory: GuestMemory, snapshot: "Snapshot", blocks: Blocks) -> NDArray[np.int64]:
    """Count the pages of each block in each of `STATES`, shape (n, 8); where no memory is, none."""
    return pages_by_block(memory, snapshot, blocks, lambda planes: [*states_of(planes).values()], len(STATES))


def pages_by_block(
    memory: GuestMemory,
    snapshot: "Snapshot",
    blocks: Blocks,
    sets: Callable[[Planes], Sequence[Bitmap]],
    n_sets: int,
) -> NDArray[np.int64]:
    """Count the pages of each block in some sets, which are made of a file's planes; shape (n, n_sets)."""
    counts = np.zeros((len(blocks), n_sets), np.int64)
    slots = memory.slots(snapshot)
    for index in {slot.file for slot, _ in slots}:
        bitmaps = sets(snapshot.planes(index))
        for slot, first in slots:
            if slot.file != index:
                continue
            end = first + (slot.size >> PAGE_SHIFT)
            low, high = np.searchsorted(blocks.edges, [first, end])
            cuts = np.unique(np.concatenate([[first], blocks.edges[low:high], [end]]))
            into = np.searchsorted(blocks.edges, cuts[:-1], side="right") - 1
            pages = cuts - first + (slot.offset >> PAGE_SHIFT)
            for column, bitmap in enumerate(bitmaps):
                counts[into, column] += np.diff(bitmap.counts_before(pages))
    return counts


# ---- runs of pages alike ---------------------------------------------------------------------------------


class Runs(NamedTuple):
    """Maximal runs of pages with the same planes.

    Attributes
    ----------
    starts : ndarray of int64, shape (n,)
        Page, or position, at which each begins.
    masks : ndarray of uint8, shape (n,)
        Their planes: bit i is that of ``PLANE_NAMES[i]``.
    """

    starts: NDArray[np.int64]
    masks: NDArray[np.uint8]


ABSENT: Final = 0xFF
"""Mask of a position at which a snapshot has no memory."""


def plane_runs(planes: Planes) -> Runs:
    """Return the runs of one file, by its pages."""
    edges = [planes[name].edges() for name in PLANE_NAMES]
    starts = np.unique(np.concatenate([np.zeros(1, np.int64), *edges]))
    masks = np.zeros(len(starts), np.uint8)
    for bit, (name, own) in enumerate(zip(PLANE_NAMES, edges, strict=True)):
        set_ = (np.searchsorted(own, starts, side="right") % 2 == 1) ^ planes[name].first
        masks |= set_.astype(np.uint8) << np.uint8(bit)
    return Runs(starts, masks)


def guest_runs(memory: GuestMemory, snapshot: "Snapshot") -> Runs:
    """Return the runs of a guest by position, `ABSENT` where it has no memory now."""
    own = {index: plane_runs(snapshot.planes(index)) for index in {s.file for s, _ in memory.slots(snapshot)}}
    starts: list[NDArray[np.int64]] = []
    masks: list[NDArray[np.uint8]] = []
    at = 0
    for slot, first in sorted(memory.slots(snapshot), key=lambda pair: pair[1]):
        if first > at:
            starts.append(np.array([at]))
            masks.append(np.array([ABSENT], np.uint8))
        runs, low = own[slot.file], slot.offset >> PAGE_SHIFT
        at = first + (slot.size >> PAGE_SHIFT)
        begin = int(np.searchsorted(runs.starts, low, side="right")) - 1
        end = int(np.searchsorted(runs.starts, low + at - first))
        starts.append(np.maximum(runs.starts[begin:end], low) - low + first)
        masks.append(runs.masks[begin:end])
    if at < memory.pages:
        starts.append(np.array([at]))
        masks.append(np.array([ABSENT], np.uint8))
    none = np.empty(0, np.int64)
    return merged(Runs(np.concatenate([none, *starts]), np.concatenate([none.astype(np.uint8), *masks])))


def merged(runs: Runs) -> Runs:
    """Join neighbours that are alike."""
    if not len(runs.starts):
        return runs
    keep = np.concatenate([[True], runs.masks[1:] != runs.masks[:-1]])
    return Runs(runs.starts[keep], runs.masks[keep])


def page_masks(snapshots: "Collection[Snapshot]", gpa: int) -> NDArray[np.uint8]:
    """Return the planes of the page at an address in each snapshot, shape (n,); `ABSENT` where it isn't.

    Raises
    ------
    ValueError
        No snapshot has memory there.
    """
    memory = GuestMemory(snapshots)
    found = [_page_mask(memory, snapshot, gpa) for snapshot in snapshots]
    if all(mask == ABSENT for mask in found):
        raise ValueError(f"there is no memory at gpa {gpa:#x}")
    return np.array(found, np.uint8)


def _page_mask(memory: GuestMemory, snapshot: "Snapshot", gpa: int) -> int:
    for slot, _ in memory.slots(snapshot):
        if 0 <= gpa - slot.gpa < slot.size:
            page = gpa - slot.gpa + slot.offset >> PAGE_SHIFT
            planes = snapshot.planes(slot.file)
            return sum(
                int(planes[name].bits(page, page + 1)[0]) << bit for bit, name in enumerate(PLANE_NAMES)
            )
    return ABSENT
