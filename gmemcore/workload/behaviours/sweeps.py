"""Behaviours that go over all of memory: migration, and a guest that fragments it on purpose."""

from collections.abc import Iterator

import numpy as np

from gmemcore.engine.steps import Step
from gmemcore.uapi import PAGE_SIZE
from gmemcore.workload.behaviours.guest import BLOCK, PRIVATE, Guest, distinct, in_turn, operations, over
from gmemcore.workload.operations import Operations

HUGE_PAGE = 2 << 20


def migration_sweep(
    guest: Guest, *, piece: int, passes: int, dirty: float, read: int | None
) -> Iterator[Operations]:
    """Piece by piece, memory is shared, read by the host and taken back: all, then what was written since."""
    grid = guest.grid(piece)
    yield over(Step.CONVERT, guest.ranges, PRIVATE)
    n = grid.count
    for number in range(passes):
        stream = guest.stream.split("pass", number)
        for low in range(0, n, BLOCK):
            gpa, size = grid[distinct(stream, grid.count, n, low, min(low + BLOCK, n))]
            seen = size if read is None else np.minimum(size, np.uint64(read))
            yield in_turn(
                [
                    operations(Step.CONVERT, gpa, size),
                    operations(Step.HOST_READ, gpa, seen),
                    operations(Step.CONVERT, gpa, size, attributes=PRIVATE),
                    operations(Step.ACCEPT, gpa, size),
                    operations(Step.GUEST_WRITE, gpa, np.minimum(size, np.uint64(PAGE_SIZE))),
                ]
            )
        n = max(1, int(n * dirty))


def fragmentation(guest: Guest, *, pieces: int, run: int) -> Iterator[Operations]:
    """Every 2 MiB block gets `pieces` shared runs, each in a place of its own; then all of them go again."""
    grid = guest.grid(HUGE_PAGE)
    stride = np.uint64(HUGE_PAGE // pieces)
    # A run leaves a page of its place private at least, so that no two runs meet.
    length = min(run, int(stride) - PAGE_SIZE)
    room = (int(stride) - length) // PAGE_SIZE
    yield over(Step.CONVERT, guest.ranges, PRIVATE)
    turn = 0
    while True:
        stream = guest.stream.split("turn", turn)
        for attributes in (0, PRIVATE):
            for low in range(0, grid.count * pieces, BLOCK):
                # Piece by piece over all blocks: neighbours in time are no neighbours in memory.
                places = np.arange(low, min(low + BLOCK, grid.count * pieces), dtype=np.uint64)
                block, piece = places % np.uint64(grid.count), places // np.uint64(grid.count)
                gpa, size = grid[block]
                offset = piece * stride + stream.below(room, low, len(places)) * np.uint64(PAGE_SIZE)
                there = offset < size
                gpa, offset, size = gpa[there], offset[there], size[there]
                length_here = np.minimum(np.uint64(length), size - offset)
                yield operations(Step.CONVERT, gpa + offset, length_here, attributes=attributes)
        turn += 1


def scatter(guest: Guest, *, run: int) -> Iterator[Operations]:
    """Runs of 1 to so many pages, anywhere, to private or to shared."""
    grid = guest.grid(PAGE_SIZE)
    ends = np.array([start + size for start, size in guest.ranges], np.uint64)
    places, rest = guest.stream.split("place"), guest.stream.split("length and direction")
    low_half, half = np.uint64(0xFFFF_FFFF), np.uint64(32)
    yield over(Step.CONVERT, guest.ranges, PRIVATE)
    at, at_once = 0, 5 * BLOCK
    while True:
        gpa, _ = grid[places.below(grid.count, at, at_once)]
        words = rest.words(at, at_once)
        pages = ((words & low_half) * np.uint64(run // PAGE_SIZE) >> half) + np.uint64(1)
        size = np.minimum(pages * np.uint64(PAGE_SIZE), ends[np.searchsorted(ends, gpa, side="right")] - gpa)
        yield operations(Step.CONVERT, gpa, size, attributes=(words >> np.uint64(63)) * np.uint64(PRIVATE))
        at += at_once
