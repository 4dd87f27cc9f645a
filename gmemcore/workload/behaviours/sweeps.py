"""Behaviours that go over all of memory: migration, and a guest that fragments it on purpose."""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from gmemcore.engine.steps import Step
from gmemcore.uapi import PAGE_SIZE
from gmemcore.workload.behaviours.guest import (
    BLOCK,
    PRIVATE,
    SeededGuest,
    distinct,
    in_turn,
    operations,
    over,
)
from gmemcore.workload.operations import Operations
from gmemcore.workload.seeds import Words


def migration_sweep(
    guest: SeededGuest, *, piece: int, passes: int, dirty: float, read: int | None
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


def fragmentation(guest: SeededGuest, *, block: int, pieces: int, run: int) -> Iterator[Operations]:
    """Every block gets `pieces` shared runs, each in a place of its own; then all of them go again."""
    grid = guest.grid(block)
    total = grid.count * pieces
    stride = np.uint64(block // PAGE_SIZE // pieces * PAGE_SIZE)
    # A run leaves a page of its place private where there are two, so that no two runs touch.
    longest = min(np.uint64(run), stride - np.uint64(PAGE_SIZE))

    @lru_cache(maxsize=1)  # a small guest has one part, and many turns
    def part(low: int) -> tuple[Words, Words, Words, NDArray[np.bool_]]:
        """First address, run length and number of possible offsets of some places; whether each exists."""
        # Piece by piece over all blocks: neighbours in time are no neighbours in memory.
        places = np.arange(low, min(low + BLOCK, total), dtype=np.uint64)
        gpa, size = grid[places % np.uint64(grid.count)]
        start = places // np.uint64(grid.count) * stride
        room = np.minimum(np.maximum(size, start) - start, stride)  # the last block may be short
        length = np.minimum(room, longest)
        ways = np.maximum((room - length) // np.uint64(PAGE_SIZE), np.uint64(1))
        return gpa + start, length, ways, room > 0

    yield over(Step.CONVERT, guest.ranges, PRIVATE)
    turn = 0
    while True:
        stream = guest.stream.split("turn", turn)
        for attributes in (0, PRIVATE):
            for low in range(0, total, BLOCK):
                gpa, length, ways, there = part(low)
                gpa = gpa + stream.below(ways, low, len(ways)) * np.uint64(PAGE_SIZE)
                yield operations(Step.CONVERT, gpa[there], length[there], attributes=attributes)
        turn += 1


def scatter(guest: SeededGuest, *, run: int) -> Iterator[Operations]:
    """Random ranges of 1 to `run` pages, to private or to shared."""
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
