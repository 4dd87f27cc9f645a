"""Accesses that a trace of conversions doesn't have: both sides of each converted page are used."""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from gmemcore.engine.steps import Step
from gmemcore.uapi import MemoryAttribute
from gmemcore.workload.operations import (
    OPERATION,
    Operations,
    as_words,
    empty_operations,
    join_operations,
)
from gmemcore.workload.ranges import Cells, cells_of
from gmemcore.workload.trace import Trace

_ACCESSES: Final = (
    *(Step.HOST_READ, Step.HOST_WRITE, Step.GUEST_READ, Step.GUEST_WRITE),
    *(Step.ACCEPT, Step.ALLOCATE, Step.PIN),
)
_USES: Final = {True: (Step.ACCEPT, Step.GUEST_WRITE), False: (Step.HOST_WRITE,)}
"""How a range is used, by whether it is private."""


def shows_accesses(operations: Operations) -> bool:
    """Whether anything but conversions and a launch allocates memory."""
    return bool(np.isin(operations["step"], _ACCESSES).any())


def with_touches(trace: Trace) -> Trace:
    """Return a trace in which every converted page is used, before its first conversion and after each one.

    A guest that runs accepts and writes what is private; a host writes what is shared. Before the launch has
    ended the guest uses nothing.
    """
    operations = trace.operations
    finishes = np.flatnonzero(operations["step"] == Step.LAUNCH_FINISH)
    runs = int(finishes[0]) + 1 if len(finishes) else len(operations)
    parts = [
        _used_after_each(operations[:runs], guest_runs=False),
        _used_before_first(trace, runs),
        _used_after_each(operations[runs:], guest_runs=True),
    ]
    return Trace(trace.header, join_operations(parts), trace.start)


def _private(operations: Operations) -> NDArray[np.bool_]:
    """Whether each operation converts to private."""
    attribute = operations["attributes"] & np.uint64(MemoryAttribute.PRIVATE)
    private: NDArray[np.bool_] = (operations["step"] == Step.CONVERT) & (attribute > 0)
    return private


def _used_after_each(operations: Operations, *, guest_runs: bool) -> Operations:
    """Return operations, behind each conversion the uses of its range."""
    private = _private(operations)
    shared = (operations["step"] == Step.CONVERT) & ~private
    counts = np.ones(len(operations), np.intp)
    for mask, uses in ((shared, _USES[False]), (private, _USES[True] if guest_runs else ())):
        counts[mask] += len(uses)
    order = np.repeat(np.arange(len(operations)), counts)
    made = as_words(np.ascontiguousarray(operations))[order].view(OPERATION).reshape(-1)
    place = np.cumsum(counts) - counts
    for mask, uses in ((shared, _USES[False]), (private, _USES[True] if guest_runs else ())):
        for i, step in enumerate(uses, start=1):
            at = place[mask] + i
            made["step"][at] = step
            made["attributes"][at] = made["flags"][at] = 0
    return made


def _used_before_first(trace: Trace, runs: int) -> Operations:
    """Return uses of the pages that are first seen in a conversion by the guest that runs, as they began."""
    operations = trace.operations
    cells, private = begins(trace)
    converts = np.append(operations["step"] == Step.CONVERT, False)
    used = (cells.region >= 0) & (cells.first >= runs) & converts.take(cells.first)
    made = []
    for state, uses in _USES.items():
        first, end = cells.ranges(used & (private == state)).T
        for step in uses if len(first) else ():
            operation = empty_operations(len(first))
            operation["step"] = step
            operation["gpa"], operation["size"] = cells.edges[first], cells.edges[end] - cells.edges[first]
            made.append(operation)
    return join_operations(made)


def begins(trace: Trace) -> tuple[Cells, NDArray[np.bool_]]:
    """Return memory cut by the operations of a trace, and whether each piece begins private."""
    low, high = trace.start[:, 0], trace.start[:, 0] + trace.start[:, 1]
    every = np.ones(len(trace.operations), np.bool_)
    cells = cells_of(trace.header.layout, trace.operations, every, (low, high))
    if not len(low):
        return cells, cells.private
    at = np.searchsorted(low, cells.edges[:-1], side="right") - 1
    excepted = (at >= 0) & (cells.edges[:-1] < high.take(np.maximum(at, 0)))
    return cells, np.where(excepted, trace.start[:, 2].take(np.maximum(at, 0)) > 0, cells.private)


def always_shared(trace: Trace) -> int:
    """Return how many pages begin shared and are never converted."""
    operations = trace.operations
    converts = np.append(operations["step"] == Step.CONVERT, False)
    only = Trace(trace.header, operations[converts[:-1]], trace.start)
    cells, private = begins(only)
    return int(cells.pages[(cells.region >= 0) & (cells.first < 0) & ~private].sum())
