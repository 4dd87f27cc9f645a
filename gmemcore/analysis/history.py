"""History: which operations touched a page, and since which one it is in its state.

A series that is recorded operation by operation (`gmemcore.analysis.watch`) keeps each of them with what it
sets and clears. A page's state is followed through those that touched it, from the first snapshot on. Where
what they say doesn't come to what a snapshot shows, the last one that touched the page is named instead, and
`Since.exact` is False.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gmemcore.engine.rules import plane_changes
from gmemcore.engine.steps import ACCESS_KINDS, Step, step_rows
from gmemcore.machine import VmFace
from gmemcore.policy import Abi, cell
from gmemcore.uapi import PAGE_SIZE, ContentMode, Direction, MemoryAttribute, Phase, VmType
from gmemcore.workload.operations import Operations
from gmemcore.workload.outcomes import CODES, NAMES, Outcomes

EVENT: Final = np.dtype(
    [
        ("operation", "<u8"),  # its number in the run, from 0
        ("gpa", "<u8"),  # what was asked for, bytes
        ("size", "<u8"),
        ("start", "<u8"),  # gpa of what it acted on, bytes, half-open: empty where it was refused whole
        ("end", "<u8"),
        ("flags", "<u8"),  # content mode of a conversion
        ("step", "u1"),  # gmemcore.engine.steps.Step
        ("attributes", "u1"),  # of a conversion: 8 (PRIVATE) or 0
        ("variant", "<u2"),
        ("outcome", "<u2"),  # gmemcore.workload.outcomes.CODES
        ("set", "u1"),  # planes that pages from start to end have afterwards, as bits of their numbers
        ("clear", "u1"),  # planes that they don't have
    ]
)
"""One operation of a history: 56 bytes."""

Events = NDArray[Any]
"""A structured array of `EVENT`, shape (n,), in order."""

CALLERS: Final[Mapping[int, tuple[str, str]]] = {
    Step.CONVERT: ("VMM", "KVM_SET_MEMORY_ATTRIBUTES2"),
    Step.HOST_READ: ("host", "read"),
    Step.HOST_WRITE: ("host", "write"),
    Step.GUEST_READ: ("guest", "read"),
    Step.GUEST_WRITE: ("guest", "write"),
    Step.ACCEPT: ("guest", "PVALIDATE, TDG.MEM.PAGE.ACCEPT"),
    Step.ALLOCATE: ("VMM", "fallocate"),
    Step.PUNCH_HOLE: ("VMM", "fallocate(PUNCH_HOLE)"),
    Step.PIN: ("host", "long-term pin"),
    Step.UNPIN: ("host", "unpin"),
    Step.POISON: ("hardware", "memory failure"),
    Step.POPULATE: ("VMM", "launch update"),
    Step.LAUNCH_FINISH: ("VMM", "launch finish"),
}
"""Who takes a step, and by which call."""

MOST_EVENTS: Final = 1 << 18
"""Operations that a series keeps; of more, the last on each page, or block, between two snapshots."""

_OK: Final = CODES["OK"]
_PAGE_MASK: Final = np.uint64((1 << 64) - PAGE_SIZE)
_PER_SLOT: Final = np.isin(
    np.arange(len(Step)),
    (Step.CONVERT, Step.HOST_READ, Step.HOST_WRITE, Step.ALLOCATE, Step.PUNCH_HOLE, Step.PIN, Step.UNPIN),
)
"""Whether a step that is refused stands in the memslots before the one that refused it."""


class Since(NamedTuple):
    """Since when a page is in its state.

    Attributes
    ----------
    operation : int or None
        Number of the operation; None: since before the first snapshot, or nothing is known.
    step, caller : str
        What it was, and who took it.
    gpa, size : int
        What it was asked for, bytes.
    exact : bool
        Whether following the page through all operations gave its state. Where False, the operation is the
        last that touched the page before the snapshot in which it changed.
    """

    operation: int | None
    step: str
    caller: str
    gpa: int
    size: int
    exact: bool

    def __str__(self) -> str:
        if self.operation is None:
            return "since the first snapshot" if self.exact else "no operation is known"
        how = "" if self.exact else "last touched by "
        what = f"{self.step} {self.gpa:#x}+{self.size:#x}"
        return f"{how}operation {self.operation:,}: {what} by the {self.caller}"


UNKNOWN: Final = Since(None, "", "", 0, 0, False)
"""Nothing is known of a page."""


def events_of(vm: VmFace, operations: Operations, outcomes: Outcomes, first: int, phase: Phase) -> Events:
    """Return what operations that were run did.

    Parameters
    ----------
    vm : Vm or LegacyVm
        The guest they were run on.
    operations, outcomes
        Shape (n,), as a `Player` took and gave them.
    first : int
        Number of the first operation.
    phase : Phase
        Launch phase before the first operation.

    Returns
    -------
    Events
        A record per operation, and another one for the page that a refused operation left changed.
    """
    events = np.zeros(len(operations), EVENT)
    events["operation"] = np.arange(first, first + len(operations), dtype=np.uint64)
    for name in ("gpa", "size", "flags", "step", "variant"):
        events[name] = operations[name]
    events["attributes"] = operations["attributes"] & np.uint64(MemoryAttribute.PRIVATE)
    events["outcome"] = outcomes["code"]
    finishes = (events["step"] == Step.LAUNCH_FINISH) & (events["outcome"] == _OK)
    running = np.logical_or.accumulate(finishes) | (phase == Phase.RUNNING)
    marks = np.zeros(len(events), np.uint8)
    for of_phase, inside in ((Phase.LAUNCHING, ~running), (Phase.RUNNING, running)):
        if inside.any():
            _set_planes(events, marks, inside, vm, of_phase)
    stopped = outcomes["error_gpa"]
    slot, in_memory = _slots_of(vm, stopped)
    _set_range(events, stopped, slot, in_memory)
    marked = np.flatnonzero(in_memory & (marks != 0))
    left = events[marked]
    left["start"] = stopped[marked] & _PAGE_MASK
    left["end"] = left["start"] + np.uint64(PAGE_SIZE)
    left["set"], left["clear"] = marks[marked], 0
    both = np.concatenate([events, left])
    return both[np.argsort(both["operation"], kind="stable")]


def _slots_of(vm: VmFace, gpas: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """Where the memslots of addresses begin, and whether there is one: a hole refuses before all else."""
    if not len(vm.memslots):
        return gpas, np.zeros(len(gpas), np.bool_)
    slots = np.array([(slot.gpa, slot.size) for slot in vm.memslots], np.uint64)
    place = np.maximum(np.searchsorted(slots[:, 0], gpas, side="right") - 1, 0)
    begin, size = slots[place].T
    return begin, (gpas >= begin) & (gpas - begin < size)


def _set_range(
    events: Events, stopped: NDArray[np.uint64], slot: NDArray[np.uint64], in_memory: NDArray[np.bool_]
) -> None:
    """Set what each operation acted on: all of it, what lies before where it stopped, or nothing."""
    refused = events["outcome"] != _OK
    end = np.where(refused, events["gpa"], events["gpa"] + events["size"])
    populates = refused & (events["step"] == Step.POPULATE)
    poisons = refused & in_memory & (events["step"] == Step.POISON)
    end[populates | poisons] = stopped[populates | poisons]
    per_slot = refused & in_memory & _PER_SLOT[events["step"]] & (slot > events["gpa"])
    end[per_slot] = slot[per_slot]
    nothing = end <= events["gpa"]
    events["start"] = events["gpa"] & _PAGE_MASK
    events["end"] = end + np.uint64(PAGE_SIZE - 1) & _PAGE_MASK
    events["end"][nothing] = events["start"][nothing]


def _set_planes(
    events: Events, marks: NDArray[np.uint8], inside: NDArray[np.bool_], vm: VmFace, phase: Phase
) -> None:
    """Set the planes that operations of one phase set and clear, and those of a page that refused."""
    steps = events["step"][inside]
    variants = np.minimum(events["variant"][inside], len(ACCESS_KINDS) - 1)
    changes, left = _step_changes(vm.abi, vm.vm_type, phase)
    events["set"][inside], events["clear"][inside] = changes[steps, variants].T
    marks[inside] = left[steps, variants, np.minimum(events["outcome"][inside], left.shape[2] - 1)]
    converts = inside & (events["step"] == Step.CONVERT)
    for attributes, flags in np.unique(events[["attributes", "flags"]][converts]).tolist():
        own = converts & (events["attributes"] == attributes) & (events["flags"] == flags)
        direction = Direction.TO_PRIVATE if attributes else Direction.TO_SHARED
        answer = cell(vm.abi, vm.vm_type, vm.firmware, phase, direction, ContentMode(flags))
        set_, clear = plane_changes(answer, direction)
        events["set"][own], events["clear"][own] = int(set_), int(clear)


@cache
def _step_changes(abi: Abi, vm_type: VmType, phase: Phase) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Planes set and cleared by step and variant, and planes that a refused page is left with, by outcome."""
    changes = np.zeros((len(Step), len(ACCESS_KINDS), 2), np.uint8)
    left = np.zeros((len(Step), len(ACCESS_KINDS), max(CODES.values()) + 2), np.uint8)
    for step, rows in step_rows(abi, vm_type, phase).items():
        for variant in range(len(ACCESS_KINDS)):
            row = rows[variant % len(rows)]
            changes[step, variant] = int(row.set), int(row.clear)
            for term in row.terms if row.refusal is None else ():
                left[step, variant, CODES[term.refusal]] |= int(term.mark)
    return changes, left


# ---- fewer of them -----------------------------------------------------------------------------------------
def thinned(events: Events, intervals: NDArray[np.uint64], most: int = MOST_EVENTS) -> Events:
    """Keep the operations that were the last on some page between two snapshots, or on some larger block.

    Parameters
    ----------
    events : Events
        In order.
    intervals : ndarray of uint64, shape (m,)
        Numbers of operations at which snapshots were taken, ascending.
    most : int
        How many are kept; blocks grow until no more are left.
    """
    block = PAGE_SIZE
    while len(events) > most:
        parts = np.split(events, np.searchsorted(events["operation"], intervals))
        events = np.concatenate([part[_last_somewhere(part, block)] for part in parts])
        block *= 512 if block == PAGE_SIZE else 8
    return events


def _last_somewhere(events: Events, block: int) -> NDArray[np.bool_]:
    """Whether an operation is the last one that acted on some block.

    Which operation is on top is found for the stretches between all starts and ends at once: each range is
    covered by two of a power of two in length, and powers hand down what covers them to their halves.
    """
    size = np.uint64(block)
    low, high = events["start"] // size, (events["end"] + size - np.uint64(1)) // size
    acts = np.flatnonzero(low < high)
    if not len(acts):
        return np.zeros(len(events), np.bool_)
    edges, place = np.unique(np.concatenate([low[acts], high[acts]]), return_inverse=True)
    first, last = place[: len(acts)], place[len(acts) :]
    level = np.log2(last - first).astype(np.intp)
    top = np.full((int(level.max()) + 1, len(edges)), -1, np.intp)
    np.maximum.at(top, (level, first), acts)
    np.maximum.at(top, (level, last - (1 << level)), acts)
    for i in range(len(top) - 1, 0, -1):
        half = 1 << i - 1
        np.maximum(top[i - 1], top[i], out=top[i - 1])
        np.maximum(top[i - 1, half:], top[i, :-half], out=top[i - 1, half:])
    found = np.zeros(len(events) + 1, np.bool_)
    found[top[0]] = True
    return found[:-1]


# ---- one page ----------------------------------------------------------------------------------------------
def follow(events: Events, gpa: int, masks: NDArray[np.uint8], at: NDArray[np.float64], number: int) -> Since:
    """Return since when a page is in the state that a snapshot shows.

    Parameters
    ----------
    events : Events
        All that are kept.
    gpa : int
        Address of the page.
    masks : ndarray of uint8, shape (n,)
        Its planes in each snapshot.
    at : ndarray of float64, shape (n,)
        Operations done at each.
    number : int
        Which snapshot.
    """
    mine = events[(events["start"] <= gpa) & (gpa < events["end"])]
    mine = mine[(mine["operation"] >= at[0]) & (mine["operation"] < at[number])]
    mask, last = int(masks[0]), None
    for i, (set_, clear) in enumerate(zip(mine["set"].tolist(), mine["clear"].tolist(), strict=True)):
        after = mask & ~clear | set_
        if after != mask:
            mask, last = after, i
    if mask == int(masks[number]):
        return Since(None, "", "", 0, 0, True) if last is None else _since(mine[last], True)
    differs = np.flatnonzero(masks[: number + 1] != masks[number])
    before = at[differs[-1] + 1] if len(differs) else at[number]
    touched = mine[mine["operation"] < before]
    return _since(touched[-1], False) if len(touched) else UNKNOWN


def _since(event: Any, exact: bool) -> Since:
    return Since(
        int(event["operation"]),
        step_words(int(event["step"]), int(event["attributes"])),
        CALLERS[int(event["step"])][0],
        int(event["gpa"]),
        int(event["size"]),
        exact,
    )


def step_words(step: int, attributes: int) -> str:
    """Return a step in words, a conversion with its direction."""
    name = Step(step).name
    if step != Step.CONVERT:
        return name
    return f"{name} to {'private' if attributes & MemoryAttribute.PRIVATE else 'shared'}"


def outcome_name(code: int) -> str:
    """Return the name of an outcome."""
    return NAMES[code]
