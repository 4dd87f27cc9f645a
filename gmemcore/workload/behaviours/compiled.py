"""Compiled generators for behaviours that fleets run most: the same operations as their definitions."""

from collections.abc import Iterator
from typing import Final

import numpy as np

from gmemcore.engine.jit import load
from gmemcore.engine.steps import Step
from gmemcore.uapi import PAGE_SIZE
from gmemcore.workload.behaviours.devices import pool_of
from gmemcore.workload.behaviours.guest import BLOCK, PRIVATE, SeededGuest, over
from gmemcore.workload.operations import LOOPS, OPERATION, Operations, as_words

_USES: Final = np.array(
    [[Step.HOST_WRITE, Step.GUEST_READ], [Step.ACCEPT, Step.GUEST_WRITE]], np.uint64
)  # of a buffer that comes, and of one that goes


def _unwritten(n: int) -> Operations:
    """Return n operations whose every word is still to be written."""
    return np.empty(n, OPERATION)


def scatter(guest: SeededGuest, *, run: int) -> Iterator[Operations]:
    """See `gmemcore.workload.behaviours.sweeps.scatter`."""
    fill = load(LOOPS).scatter
    ranges = guest.grid(PAGE_SIZE).rows
    keys = [np.uint64(guest.stream.split(name).key) for name in ("place", "length and direction")]
    head, at = over(Step.CONVERT, guest.ranges, PRIVATE), 0
    while True:
        made = _unwritten(len(head) + 5 * BLOCK)
        made[: len(head)] = head
        fill(as_words(made), len(head), *keys, np.uint64(at), ranges, np.uint64(run // PAGE_SIZE))
        yield made
        head, at = head[:0], at + 5 * BLOCK


def fragmentation(guest: SeededGuest, *, block: int, pieces: int, run: int) -> Iterator[Operations]:
    """See `gmemcore.workload.behaviours.sweeps.fragmentation`."""
    fill = load(LOOPS).fragment
    grid = guest.grid(block)
    total, of_all = grid.count * pieces, (grid.rows, grid.cell, np.uint64(pieces), np.uint64(run))
    yield over(Step.CONVERT, guest.ranges, PRIVATE)
    turn = 0
    while True:
        key = np.uint64(guest.stream.split("turn", turn).key)
        for attributes in (0, PRIVATE):
            for low in range(0, total, 5 * BLOCK):
                made = _unwritten(min(5 * BLOCK, total - low))
                yield made[: fill(as_words(made), key, np.uint64(low), *of_all, np.uint64(attributes))]
        turn += 1


def bounce_churn(guest: SeededGuest, *, pool: float, buffer: int, granularity: int) -> Iterator[Operations]:
    """See `gmemcore.workload.behaviours.devices.bounce_churn`."""
    fill = load(LOOPS).churn
    area, grid, toggles, sizes = pool_of(guest, pool, buffer, granularity)
    key, at = np.uint64(toggles.stream.key), 0
    yield over(Step.CONVERT, area, PRIVATE)
    while True:
        made = _unwritten(3 * BLOCK)
        fill(as_words(made), key, np.uint64(at), grid.rows, grid.cell, toggles.on, sizes, _USES)
        yield made
        at += BLOCK
