"""What the explorer's page gets: page states as runs that change over time, operations, sums.

Everything is counted in pages. A position is a page of guest memory without its holes, see
`gmemcore.analysis.address`. Numbers are little-endian base 128 (seven bits per byte, the top bit says that
more follow), and the whole is deflated.

* States: for each snapshot the number of its segments, then each of them: pages since the end of the one
  before, its pages, its code. The first snapshot is all of memory; a later one is what changed in it. A code
  is a place in the palette: planes of a page, or shares of the states of a block.
* Operations: for each the difference of its number to the one before, its kind (a place in a table), the
  difference of its first page (gpa) to the one before, zigzag, the pages that were asked for, and those of
  them that it acted on.
"""

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from gmemcore.analysis.address import (
    GuestMemory,
    Runs,
    guest_runs,
    plane_runs,
    states_by_block,
)
from gmemcore.analysis.frames import Change
from gmemcore.analysis.history import CALLERS, Events, outcome_name, step_words
from gmemcore.analysis.parts import FileState, SlotState
from gmemcore.analysis.snapshot import Snapshot, planes_of
from gmemcore.engine.packed import BLOCK_PAGES, LINE_WORDS, PLANE_NAMES, PackedState
from gmemcore.policy import flag_name
from gmemcore.uapi import PAGE_SHIFT, PAGE_SIZE, ContentMode

MOST_BYTES: Final = 24 << 20
"""Bytes of page states before they are deflated; of more, blocks of addresses are told instead of pages."""
MOST_RUNS: Final = 1 << 21
"""Runs of one snapshot, for the same."""
CELLS: Final = 1 << 17
"""About how many blocks of addresses are sent in that case."""
_LEVELS: Final = 31
"""Steps of a share of a state in a block."""


@dataclass(frozen=True, slots=True)
class Segments:
    """What changed: stretches of positions, in order, each with what it is now.

    Attributes
    ----------
    starts, ends : ndarray of int64, shape (n,)
    codes : ndarray of int64, shape (n,)
    """

    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    codes: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts)

    def encode(self) -> bytes:
        """Return them as the page reads them."""
        gaps = self.starts - np.concatenate([np.zeros(1, np.int64), self.ends])[: len(self)]
        columns = np.stack([gaps, self.ends - self.starts, self.codes], axis=1)
        return varints(np.concatenate([[len(self)], columns.ravel()]))


@dataclass(frozen=True, slots=True)
class States:
    """Page states of a series as the page reads them.

    Attributes
    ----------
    blob : bytes
        Segments of each snapshot, one after the other.
    palette : list
        By code: the planes (a number) of a page, or the shares of `STATES` of a block; None: no memory there.
    cell : int
        Pages that are told apart: 1, or those of a block.
    """

    blob: bytes
    palette: list[Any]
    cell: int


def encode_states(snapshots: Iterable[Snapshot], memory: GuestMemory) -> States:
    """Return page states by page, where they fit; else by block of addresses."""
    parts: list[bytes] = []
    size = 0
    for segments in page_segments(snapshots, memory):
        parts.append(segments.encode())
        size += len(parts[-1])
        if size > MOST_BYTES or len(segments) > MOST_RUNS:
            return _by_block(snapshots, memory)
    return States(b"".join(parts), [*range(1 << len(PLANE_NAMES)), None], 1)


def page_segments(snapshots: Iterable[Snapshot], memory: GuestMemory) -> Iterator[Segments]:
    """Yield the planes of all pages of the first snapshot, then what changed in each of the others."""
    before: Snapshot | None = None
    runs: Runs | None = None
    for snapshot in snapshots:
        if before is None:
            runs = guest_runs(memory, snapshot)
            yield _all_of(runs, memory.pages)
        elif _same_places(before, snapshot):
            yield _changed_in_place(before, snapshot, memory)
            runs = None
        else:
            old = guest_runs(memory, before) if runs is None else runs
            runs = guest_runs(memory, snapshot)
            yield changed(old, runs, memory.pages)
        before = snapshot


def _coded(masks: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Masks as places in the palette."""
    return np.minimum(masks, 1 << len(PLANE_NAMES)).astype(np.int64)


def _all_of(runs: Runs, pages: int) -> Segments:
    return Segments(runs.starts, np.append(runs.starts[1:], pages)[: len(runs.starts)], _coded(runs.masks))


def changed(old: Runs, new: Runs, pages: int) -> Segments:
    """Return the stretches in which two runs differ, joined where they touch and are alike now."""
    starts = np.union1d(old.starts, new.starts)
    ends = np.append(starts[1:], pages)[: len(starts)]
    was = old.masks[np.searchsorted(old.starts, starts, side="right") - 1]
    now = new.masks[np.searchsorted(new.starts, starts, side="right") - 1]
    differs = was != now
    return _joined(starts[differs], ends[differs], _coded(now[differs]))


def _joined(starts: NDArray[np.int64], ends: NDArray[np.int64], codes: NDArray[np.int64]) -> Segments:
    if not len(starts):
        return Segments(starts, ends, codes)
    fresh = np.concatenate([[True], (starts[1:] != ends[:-1]) | (codes[1:] != codes[:-1])])
    last = np.append(np.flatnonzero(fresh)[1:] - 1, len(starts) - 1)
    return Segments(starts[fresh], ends[last], codes[fresh])


# ---- what changed, by looking at blocks that changed only --------------------------------------------------
def _same_places(before: Snapshot, after: Snapshot) -> bool:
    """Whether files are at the same places, and what they show follows from them alone."""
    return (
        not after.legacy
        and before.slots == after.slots
        and [(file.index, file.size) for file in before.files]
        == [(file.index, file.size) for file in after.files]
    )


def _changed_in_place(before: Snapshot, after: Snapshot, memory: GuestMemory) -> Segments:
    pieces: list[Segments] = []
    old_files: dict[int, FileState] = {file.index: file for file in before.files}
    slots = memory.slots(after)
    for file in after.files:
        own = [(slot, first) for slot, first in slots if slot.file == file.index]
        of_file = _changed_pages(old_files[file.index].state, file.state)
        pieces += [_shown(of_file, slot, first) for slot, first in own]
    starts, ends, codes = (
        np.concatenate([np.empty(0, np.int64), *(getattr(piece, name) for piece in pieces)])
        for name in ("starts", "ends", "codes")
    )
    order = np.argsort(starts, kind="stable")
    return _joined(starts[order], ends[order], codes[order])


def _changed_pages(old: PackedState, new: PackedState) -> Segments:
    """Return what changed in a file, by its pages."""
    change = Change.between(old, new)
    n_blocks = len(new.words)
    blocks = np.union1d(change.blocks, change.keys % max(n_blocks, 1)).astype(np.intp)
    if not len(blocks):
        none = np.empty(0, np.int64)
        return Segments(none, none, none)
    small = changed(_runs_of(old, blocks), _runs_of(new, blocks), len(blocks) * BLOCK_PAGES)
    # Blocks stood beside each other that don't in the file: cut there, then move each to its place.
    cuts = np.union1d(small.starts, np.arange(len(blocks)) * BLOCK_PAGES)
    cuts = np.union1d(cuts, small.ends)
    place = np.searchsorted(small.starts, cuts, side="right") - 1
    ends = np.append(cuts[1:], len(blocks) * BLOCK_PAGES)
    inside = (place >= 0) & (cuts < small.ends[np.maximum(place, 0)])
    shift = (blocks - np.arange(len(blocks))) * BLOCK_PAGES
    moved = shift[np.minimum(cuts // BLOCK_PAGES, len(blocks) - 1)]
    starts = (cuts + moved)[inside]
    return _joined(starts, np.minimum(ends + moved, new.n_pages)[inside], small.codes[place[inside]])


def _runs_of(state: PackedState, blocks: NDArray[np.intp]) -> Runs:
    """Return the runs of some blocks as if they were a file of their own."""
    words, lines, begin = state.words[blocks], [], 0
    for mixed in state.mixed().values():
        place = np.searchsorted(mixed, blocks)
        found = place < len(mixed)
        found[found] = mixed[place[found]] == blocks[found]
        lines.append(state.lines[begin + place[found]])
        begin += len(mixed)
    whole = state.n_pages - int(blocks[-1]) * BLOCK_PAGES
    n_pages = (len(blocks) - 1) * BLOCK_PAGES + min(whole, BLOCK_PAGES)
    small = PackedState(n_pages, words, np.concatenate([np.empty((0, LINE_WORDS), np.uint64), *lines]))
    return plane_runs(planes_of(small))


def _shown(segments: Segments, slot: SlotState, first: int) -> Segments:
    """Return what a memslot shows of a file's segments, by position."""
    low = slot.offset >> PAGE_SHIFT
    high = low + (slot.size >> PAGE_SHIFT)
    keep = (segments.ends > low) & (segments.starts < high)
    shift = first - low
    return Segments(
        np.maximum(segments.starts[keep], low) + shift,
        np.minimum(segments.ends[keep], high) + shift,
        segments.codes[keep],
    )


# ---- by block ----------------------------------------------------------------------------------------------
def _by_block(snapshots: Iterable[Snapshot], memory: GuestMemory) -> States:
    """Return shares of states by block of addresses: for series that have more detail than a page takes."""
    cell = 1 << max(-(-memory.pages // CELLS) - 1, 0).bit_length()
    blocks = memory.blocks(cell * PAGE_SIZE)
    known: dict[bytes, int] = {}
    palette: list[Any] = []
    parts: list[bytes] = []
    before: NDArray[np.int64] | None = None
    for snapshot in snapshots:
        counts = states_by_block(memory, snapshot, blocks)
        pages = np.maximum(counts.sum(axis=1, keepdims=True), 1)
        shares = np.rint(counts * _LEVELS / pages).astype(np.uint8)
        shares[(counts > 0) & (shares == 0)] = 1  # what is there is seen
        rows, inverse = np.unique(shares, axis=0, return_inverse=True)
        codes = np.empty(len(rows), np.int64)
        for i, row in enumerate(rows):
            key = row.tobytes()
            if key not in known:
                known[key] = len(palette)
                palette.append((row / max(int(row.sum()), 1)).round(4).tolist() if row.any() else None)
            codes[i] = known[key]
        now = codes[inverse.ravel()]
        differs = np.ones(len(now), np.bool_) if before is None else now != before
        segments = _joined(blocks.edges[:-1][differs], blocks.edges[1:][differs], now[differs])
        parts.append(segments.encode())
        before = now
    return States(b"".join(parts), palette, cell)


# ---- operations --------------------------------------------------------------------------------------------
def encode_events(events: Events) -> tuple[bytes, list[list[Any]]]:
    """Return operations as the page reads them, and the table of their kinds.

    Returns
    -------
    bytes
        See the module.
    list of [step, caller, call, flags, outcome, set, clear]
        Kinds, by number.
    """
    names = ["step", "attributes", "flags", "outcome", "set", "clear"]
    kinds, kind = np.unique(events[names], return_inverse=True)
    page = np.uint64(PAGE_SHIFT)
    marks = events["start"] != events["gpa"] & ~np.uint64(PAGE_SIZE - 1)
    first = np.where(marks, events["start"], events["gpa"]) >> page
    below = np.uint64(PAGE_SIZE - 1)  # sums of senseless addresses and sizes would wrap
    edges = (events["gpa"] & below) + (events["size"] & below) + below >> page
    asked = np.where(marks, np.uint64(1), (events["size"] >> page) + edges)
    done = (events["end"] - events["start"]) >> page
    columns = [
        np.diff(events["operation"].astype(np.int64), prepend=0),
        kind.ravel(),
        _zigzag(np.diff(first.astype(np.int64), prepend=np.int64(0)).astype(np.int64)),
        asked.astype(np.int64),
        done.astype(np.int64),
    ]
    rows = [
        [
            step_words(int(one["step"]), int(one["attributes"])),
            *CALLERS[int(one["step"])],
            flag_name(ContentMode(int(one["flags"]))) if one["flags"] else "",
            outcome_name(int(one["outcome"])),
            int(one["set"]),
            int(one["clear"]),
        ]
        for one in kinds
    ]
    return varints(np.stack(columns, axis=1).ravel()), rows


def _zigzag(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return signed numbers as unsigned ones, small where they were near 0."""
    return (values << 1) ^ (values >> 63)


# ---- numbers -----------------------------------------------------------------------------------------------
def varints(values: NDArray[np.int64] | Sequence[int]) -> bytes:
    """Return numbers in base 128, the lowest digit first, the top bit of a byte set where more follow."""
    left = np.asarray(values, np.int64).astype(np.uint64)
    if not len(left):
        return b""
    digits = np.maximum((_bit_lengths(left) + 6) // 7, 1)
    out = np.zeros(int(digits.sum()), np.uint8)
    at = np.concatenate([[0], np.cumsum(digits)[:-1]])
    for digit in range(int(digits.max())):
        alive = digits > digit
        part = (left[alive] >> np.uint64(7 * digit) & np.uint64(0x7F)).astype(np.uint8)
        out[at[alive] + digit] = part | ((digits[alive] > digit + 1).astype(np.uint8) << np.uint8(7))
    return out.tobytes()


def _bit_lengths(values: NDArray[np.uint64]) -> NDArray[np.int64]:
    lengths = np.zeros(len(values), np.int64)
    left = values.copy()
    for shift in (32, 16, 8, 4, 2, 1):
        large = left >> np.uint64(shift) > 0
        lengths[large] += shift
        left[large] >>= np.uint64(shift)
    return lengths + (left > 0)


def deflated(blob: bytes) -> bytes:
    """Return bytes as the page inflates them (zlib)."""
    return zlib.compress(blob, 9)
