"""What devices make a guest do: bounce buffers, assigned devices, ballooning, reporting, hotplug."""

from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from gmemcore.engine.steps import Step
from gmemcore.uapi import PAGE_SIZE
from gmemcore.workload.behaviours.guest import (
    BLOCK,
    PRIVATE,
    Grid,
    Range,
    SeededGuest,
    Toggles,
    distinct,
    in_turn,
    operations,
    over,
)
from gmemcore.workload.operations import Operations, join_operations
from gmemcore.workload.seeds import Words

_SHARED_STEPS: Final = (Step.CONVERT, Step.HOST_WRITE, Step.GUEST_READ)
"""A part is shared, and used by a device and the guest."""


def bounce_churn(guest: SeededGuest, *, pool: float, buffer: int, granularity: int) -> Iterator[Operations]:
    """Buffers of random sizes are shared, used by device and guest, and made private again."""
    area, grid, toggles, sizes = pool_of(guest, pool, buffer, granularity)
    yield over(Step.CONVERT, area, PRIVATE)
    while True:
        cells, shared = toggles.next_block()
        gpa, room = grid[cells]
        size = np.minimum(room, sizes[cells])
        yield in_turn(
            [
                _convert(gpa, size, shared),
                operations(_either(shared, Step.HOST_WRITE, Step.ACCEPT), gpa, size),
                operations(_either(shared, Step.GUEST_READ, Step.GUEST_WRITE), gpa, size),
            ]
        )


def pool_of(
    guest: SeededGuest, pool: float, buffer: int, granularity: int
) -> tuple[list[Range], Grid, Toggles, Words]:
    """Return a pool of buffers, all of them private, and the size of each."""
    most = -(-buffer // granularity)
    area, grid, toggles = _pool(guest, pool, most * granularity, granularity)
    units = guest.stream.split("sizes").below(most, 0, grid.count) + np.uint64(1)
    return area, grid, toggles, units * np.uint64(granularity)


def vfio_pin(guest: SeededGuest, *, pool: float, buffer: int, late: float) -> Iterator[Operations]:
    """Memory is shared and mapped for an assigned device, and unmapped before it is made private again."""
    area, grid, toggles = _pool(guest, pool, buffer)
    lateness = guest.stream.split("late")
    yield over(Step.CONVERT, area, PRIVATE)
    while True:
        begins = toggles.done
        cells, shared = toggles.next_block()
        is_late = lateness.choices([late, 1 - late], begins, len(cells)) == 0
        gpa, size = grid[cells]
        yield in_turn(
            [
                operations(Step.CONVERT, gpa, size, attributes=PRIVATE),  # too early: still pinned
                operations(Step.UNPIN, gpa, size),
                _convert(gpa, size, shared),
                operations(_either(shared, Step.PIN, Step.ACCEPT), gpa, size),
                operations(_either(shared, Step.HOST_WRITE, Step.GUEST_WRITE), gpa, PAGE_SIZE),
            ],
            [~shared & is_late, ~shared, True, True, True],
        )


def balloon(guest: SeededGuest, *, target: float, unit: int) -> Iterator[Operations]:
    """The guest gives pages to the host, which discards them, and takes them back, again and again."""
    grid = guest.grid(unit)
    n = min(max(1, round(target * grid.count)), grid.count)
    yield over(Step.CONVERT, guest.ranges, PRIVATE)
    turn = 0
    while True:
        stream = guest.stream.split("turn", turn)
        for deflates in (False, True):
            for low in range(0, n, BLOCK):
                gpa, size = grid[distinct(stream, grid.count, n, low, min(low + BLOCK, n))]
                yield from _taken(gpa, size) if deflates else (operations(Step.PUNCH_HOLE, gpa, size),)
        turn += 1


def free_page_reporting(guest: SeededGuest, *, pool: float, order: int, accept: int) -> Iterator[Operations]:
    """Free blocks are reported to the host, which discards them, and accepted again when used."""
    area, grid, toggles = _pool(guest, pool, order)
    pieces = max(order // accept, 1)
    yield over(Step.CONVERT, area, PRIVATE)
    while True:
        cells, free = toggles.next_block()
        gpa, size = grid[cells]
        first_page = np.minimum(size, np.uint64(PAGE_SIZE))
        accepts, there = [], []
        for piece in range(pieces):
            offset = np.uint64(piece * accept)
            there.append(~free & (size > offset))
            left = size - np.minimum(offset, size)
            accepts.append(operations(Step.ACCEPT, gpa + offset, np.minimum(left, np.uint64(accept))))
        yield in_turn(
            [operations(Step.PUNCH_HOLE, gpa, size), *accepts, operations(Step.GUEST_WRITE, gpa, first_page)],
            [free, *there, ~free],
        )


def hotplug(
    guest: SeededGuest, *, pluggable: float, block: int, accept: int, shared: int
) -> Iterator[Operations]:
    """Memory is plugged block by block, used and partly shared, and unplugged in the opposite order."""
    area = _top(guest, pluggable)
    grid = Grid(area, block)
    plugged: dict[Range, Operations] = {}  # by how a block lies on what is accepted at a time, and its size
    turn = 0
    while True:
        stream = guest.stream.split("turn", turn)
        for cells in grid.blocks():
            gpas, sizes = grid[cells]
            free_pages = (sizes - np.minimum(sizes, np.uint64(shared))) // np.uint64(PAGE_SIZE)
            places = stream.below(free_pages + np.uint64(1), int(cells[0]), len(cells)) * np.uint64(PAGE_SIZE)
            for gpa, size, place in zip(gpas.tolist(), sizes.tolist(), places, strict=True):
                lies = (gpa % accept, size)
                if lies not in plugged:
                    plugged[lies] = _plug(*lies, accept, min(shared, size))
                block_plugged = plugged[lies].copy()
                block_plugged["gpa"] += np.uint64(gpa - lies[0])
                block_plugged["gpa"][len(block_plugged) - len(_SHARED_STEPS) * bool(shared) :] += place
                yield block_plugged
        for low in range(grid.count, 0, -BLOCK):
            cells = np.arange(max(low - BLOCK, 0), low, dtype=np.uint64)[::-1]
            gpa, size = grid[cells]
            # What its drivers shared comes back with the block, whose memory then goes.
            yield in_turn(
                [
                    operations(Step.CONVERT, gpa, size, attributes=PRIVATE),
                    operations(Step.PUNCH_HOLE, gpa, size),
                ]
            )
        turn += 1


# --- parts --------------------------------------------------------------------------------------------
def _pool(
    guest: SeededGuest, share: float, cell: int, granularity: int = PAGE_SIZE
) -> tuple[list[Range], Grid, Toggles]:
    """The top of memory as a pool of cells, all of them off."""
    area = _top(guest, share, granularity)
    grid = Grid(area, cell)
    return area, grid, Toggles(guest.stream.split("cells"), np.zeros(grid.count, np.bool_))


def _top(guest: SeededGuest, share: float, granularity: int = PAGE_SIZE) -> list[Range]:
    """The last part of memory, one page at least, ascending; it begins at a multiple of the granularity."""
    left = max(int(share * guest.memory) // PAGE_SIZE, 1) * PAGE_SIZE
    area = []
    for gpa, size in reversed(guest.ranges):
        part = min(size, left)
        start = max((gpa + size - part) // granularity * granularity, gpa)
        area.append((start, gpa + size - start))
        left -= part
        if not left:
            break
    return area[::-1]


def _convert(gpa: Words, size: Words, shared: NDArray[np.bool_]) -> Operations:
    return operations(Step.CONVERT, gpa, size, attributes=_either(shared, 0, PRIVATE))


def _either(on: NDArray[np.bool_], then: int, otherwise: int) -> NDArray[np.int64]:
    return np.where(on, int(then), int(otherwise))


def _taken(gpa: Words, size: Words) -> Iterator[Operations]:
    """Memory that the guest takes into use: accepted, as what was discarded isn't any more, and written."""
    yield in_turn([operations(Step.ACCEPT, gpa, size), operations(Step.GUEST_WRITE, gpa, size)])


def _plug(gpa: int, size: int, accept: int, shared: int) -> Operations:
    """A block comes: private, accepted, used; a part of it, here its start, is shared with a device."""
    pieces = Grid([(gpa, size)], accept)
    low, length = pieces[np.arange(pieces.count, dtype=np.uint64)]
    parts = [
        over(Step.CONVERT, [(gpa, size)], PRIVATE),
        in_turn(
            [
                operations(Step.ACCEPT, low, length),
                operations(Step.GUEST_WRITE, low, np.minimum(length, np.uint64(PAGE_SIZE))),
            ]
        ),
    ]
    if shared:
        parts += [over(step, [(gpa, shared)]) for step in _SHARED_STEPS]
    return join_operations(parts)
