"""A guest, and a VMM, that ask for what they shouldn't, among what they may."""

from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from gmemcore.engine.steps import Step
from gmemcore.uapi import PAGE_SIZE
from gmemcore.workload.behaviours.guest import BLOCK, PRIVATE, SeededGuest, operations
from gmemcore.workload.operations import Access, Operations, join_operations
from gmemcore.workload.seeds import Stream, Words

Places = NDArray[np.intp]

_PAGE: Final = np.uint64(PAGE_SIZE)
_STEPS: Final = np.array(
    [step for step in Step if step not in (Step.POPULATE, Step.LAUNCH_FINISH)], np.uint16
)
_SIZES: Final = np.array([0, 1, PAGE_SIZE - 1, PAGE_SIZE + 1, 1 << 63, (1 << 64) - PAGE_SIZE], np.uint64)
_ATTRIBUTES: Final = np.array([1, 2, 4, 1 << 63, PRIVATE | 1, 16], np.uint64)
_FLAGS: Final = np.array([3, 1 << 63, 32, 1, 2, 4, 8, 16], np.uint64)

KINDS: Final = ("valid", "repeated", "overlapping", "boundary", "unaligned", "argument")
"""What an operation is like, in the order of the parameters that say how many there are of each."""


def hostile(
    guest: SeededGuest, *, valid: float, repeated: float, overlapping: float, boundary: float,
    unaligned: float, argument: float, run: int,
) -> Iterator[Operations]:  # fmt: skip
    """Valid requests, and such that repeat, overlap, cross the ends of memory, or are nonsense."""
    weights = (valid, repeated, overlapping, boundary, unaligned, argument)
    grid = guest.grid(PAGE_SIZE)
    edges = np.array([edge for gpa, size in guest.ranges for edge in (gpa, gpa + size)], np.uint64)
    names = ("kind", "step", "page", "size", "what", "access")
    streams = {name: guest.stream.split(name) for name in names}
    last: Operations | None = None
    done = 0
    while True:
        made = _valid(streams, grid[streams["page"].below(grid.count, done, BLOCK)][0], run, done)
        kinds = streams["kind"].choices(weights, done, BLOCK)
        what = streams["what"].words(done, BLOCK)
        repeats, overlaps, at_edges, bent, spoiled = (np.flatnonzero(kinds == kind) for kind in range(1, 6))
        _place_at_edges(made, at_edges, edges, what[at_edges])
        _bend(made, bent, what[bent])
        _spoil(made, spoiled, what[spoiled])
        before = join_operations([made[:1] if last is None else last, made])
        _overlap(made, overlaps, before[overlaps])
        # A repetition is of the last request that isn't one itself.
        before[1:] = made
        originals = np.arange(BLOCK + 1)
        originals[1 + repeats] = 0
        made[repeats] = before[np.maximum.accumulate(originals)[1 + repeats]]
        last = made[-1:].copy()
        yield made
        done += BLOCK


def _valid(streams: dict[str, Stream], gpa: Words, run: int, done: int) -> Operations:
    """Requests of any step, of whole pages in memory; a conversion every second one."""
    picks = streams["step"].below(2 * len(_STEPS), done, BLOCK)
    steps = np.where(picks < len(_STEPS), _STEPS[picks % np.uint64(len(_STEPS))], np.uint16(Step.CONVERT))
    size = (streams["size"].below(run // PAGE_SIZE, done, BLOCK) + np.uint64(1)) * _PAGE
    attributes = np.where(picks % np.uint64(2) == 0, np.uint64(PRIVATE), np.uint64(0))
    attributes[steps != Step.CONVERT] = 0
    access = streams["access"].below(len(Access), done, BLOCK).astype(np.uint16)
    access[(steps != Step.GUEST_READ) & (steps != Step.GUEST_WRITE)] = 0
    return operations(steps, gpa, size, attributes=attributes, variant=access)


def _overlap(made: Operations, where: Places, previous: Operations) -> None:
    """From the middle of the request before, and as long."""
    half = previous["size"] // _PAGE // np.uint64(2) * _PAGE
    made["gpa"][where] = previous["gpa"] + half
    made["size"][where] = np.maximum(previous["size"], _PAGE)


def _place_at_edges(made: Operations, where: Places, edges: Words, what: Words) -> None:
    """Around the ends of memory: up to, across, and beyond them."""
    edge = edges[(what % np.uint64(len(edges))).astype(np.intp)]
    back = (what >> np.uint64(32)) % np.uint64(3) * _PAGE  # begins there, or up to two pages before
    made["gpa"][where] = np.maximum(edge, back) - back
    made["size"][where] = _PAGE + (what >> np.uint64(40)) % np.uint64(3) * _PAGE


def _bend(made: Operations, where: Places, what: Words) -> None:
    """Start, size or both aren't whole pages."""
    odd = (what >> np.uint64(52)) | np.uint64(1)  # below a page
    side = what % np.uint64(3)
    made["gpa"][where] += np.where(side != 1, odd, np.uint64(0))
    made["size"][where] += np.where(side != 0, odd, np.uint64(0))


def _spoil(made: Operations, where: Places, what: Words) -> None:
    """One argument is invalid: a size, an attribute, a flag, or an address far away."""
    which, pick = what % np.uint64(4), what >> np.uint64(8)
    for number, (field, values) in enumerate(
        (("size", _SIZES), ("attributes", _ATTRIBUTES), ("flags", _FLAGS))
    ):
        those = which == number
        made[field][where[those]] = values[(pick[those] % np.uint64(len(values))).astype(np.intp)]
    conversions = where[(which == 1) | (which == 2)]
    made["step"][conversions] = Step.CONVERT
    made["variant"][conversions] = 0
    far = which == 3
    made["gpa"][where[far]] = pick[far] << np.uint64(12)
