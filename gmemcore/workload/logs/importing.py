"""A log as traces: one guest of it, launch by launch.

::

    reading   bytes -> Log             events, threads, memslots, what can't be read, what was lost
    guests    which events are one guest's
    launches  where each VM begins, and how its launch ended
    memory    where RAM is, and what a RAMBlock's offsets are
    start     how each page began
    here      operations, and the account: every event is one, or it is named

Each event of the log becomes an operation or is counted in `Account`, which names what became of it.
"""

from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from gmemcore.engine.steps import Step
from gmemcore.spelling import option
from gmemcore.uapi import MemoryAttribute, PageType
from gmemcore.workload.layout import Layout, spans
from gmemcore.workload.logs import launches, memory, start
from gmemcore.workload.logs.forms import DISCARDED, EVENTS, MIXTURE, Kind
from gmemcore.workload.logs.guests import choose
from gmemcore.workload.logs.log import Events, Log, Slot, check_readable
from gmemcore.workload.logs.memory import Memory
from gmemcore.workload.operations import (
    FROM_SOURCE,
    Access,
    Operations,
    empty_operations,
    end_of_launch,
    join_operations,
    shows_launch,
)
from gmemcore.workload.ranges import first_over
from gmemcore.workload.trace import Header, Trace, TraceError

MEMSLOTS, GIVEN, TOUCHED = "memslots of the log", "as given", "around what the log touches"
"""Where a layout comes from."""

_BY_LAUNCH, _BY_CONVERSION = "as before a launch", "as the first conversion there needs"
_FOUR_GIB: Final = 4 << 30
_VMSA: Final = tuple(PageType).index(PageType.VMSA)
_VMSA_UPDATE: Final = _VMSA | FROM_SOURCE
_CONVERSIONS: Final = (Kind.CONVERT, Kind.ATTRIBUTES, Kind.BLOCK)
_LAUNCH: Final = (Kind.INIT, Kind.START, Kind.UPDATE, Kind.FINISH, Kind.STATE)
_STEPS: Final = np.full(max(Kind) + 1, Step.LAUNCH_FINISH, np.uint16)
_STEPS[list(_CONVERSIONS)] = Step.CONVERT
_STEPS[Kind.FAULT] = Step.GUEST_READ
_STEPS[Kind.UPDATE] = Step.POPULATE
_WINDOW: Final = 256
"""Conversions back to which the repetition of one is looked for."""


@dataclass(slots=True)
class Account:
    """What became of the events of a launch.

    Attributes
    ----------
    events : int
        Events that operations are made of.
    repeats : int
        Conversions that were reported twice, by QEMU and by KVM, or as a request and as its result.
    continued : int
        Launch updates whose rest was asked for again; each is what came before that.
    outside : int
        Conversions outside of RAM, which change nothing.
    outside_ranges : list of (int, int)
        Where those were: start and end, bytes.
    unplaced : int
        Changes of a RAMBlock at offsets that no memslot shows.
    vmsa : int
        Launch updates of vCPU state, which touch no guest memory.
    late : int
        Launch updates behind the end of the launch.
    """

    events: int = 0
    repeats: int = 0
    continued: int = 0
    outside: int = 0
    outside_ranges: list[tuple[int, int]] = field(default_factory=list)
    unplaced: int = 0
    vmsa: int = 0
    late: int = 0


@dataclass(frozen=True, slots=True)
class Launch:
    """One VM of a log.

    Attributes
    ----------
    number : int
        From 1.
    trace : Trace
        Its operations, layout and start.
    layout_from : str
        Who says where memory is.
    pages : dict of (str, bool) to int
        Pages by what decides how they began, see `gmemcore.workload.logs.start`, and whether private.
    default_from : str
        Why the pages that no operation touches begin as they do.
    account : Account
        What became of its events.
    lines : tuple of int
        Its first and last line.
    assumed_running : bool
        The log shows no launch, so LAUNCH_FINISH was put first.
    finish_line : int or None
        Where the launch ended.
    failures : list of (int, str)
        What was refused: line, and what QEMU printed.
    unconfirmed : bool
        Changes of state are in the log, and none shows that the launch ended well.
    """

    number: int
    trace: Trace
    layout_from: str
    pages: dict[tuple[str, bool], int]
    default_from: str
    account: Account
    lines: tuple[int, int]
    assumed_running: bool
    finish_line: int | None
    failures: list[tuple[int, str]]
    unconfirmed: bool


@dataclass(frozen=True, slots=True)
class Imported:
    """A log as traces.

    Attributes
    ----------
    launches : tuple of Launch
        One or more.
    log : Log
        What was read.
    others : int
        Events of other guests.
    """

    launches: tuple[Launch, ...]
    log: Log
    others: int


def import_log(
    log: Log,
    name: str,
    *,
    layout: Layout | None = None,
    seed: int = 0,
    launching: bool = False,
    guest: str | None = None,
) -> Imported:
    """Make traces of a log.

    Parameters
    ----------
    log : Log
        As `gmemcore.workload.logs.reading.read_log` returns it.
    name : str
        Its name.
    layout : Layout or None
        The guest's RAM; None: as the log's memslots say, else around what it touches. How pages begin doesn't
        follow from it. What launch updates touch elsewhere is memory too.
    seed : int
        Of the contents, which no log has.
    launching : bool
        Whether a log that shows no launch was taken before the guest ran.
    guest : str or None
        Which guest, see `gmemcore.workload.logs.guests.choose`.

    Raises
    ------
    TraceError
        No event at all, or a third that can't be read; several guests; a launch within a launch; offsets of
        RAMBlocks and no layout.
    InvalidArgumentError
        EINVAL: a seed that doesn't fit, or memory in more regions than a layout has.
    """
    check_readable(log)
    chosen = choose(log, guest)
    events = log.events if chosen is None else log.events[chosen]
    found = launches.split(events)
    if not found:
        raise TraceError(f"no line names an event that can be replayed; known: {', '.join(EVENTS)}")
    made, slots = [], None
    for number, span in enumerate(found, start=1):
        of_span = events[span.start : span.end]
        slots = memory.of_slots(_slots(log, of_span)) or slots
        importer = _Importer(log, events, span, slots, layout)
        made.append(importer.launch(number, name, seed, launching=launching))
    return Imported(tuple(made), log, len(log.events) - len(events))


def _slots(log: Log, events: Events) -> list[Slot]:
    return [log.slots[i] for i in events["value"][events["kind"] == Kind.SLOT].tolist()]


class _Importer:
    """Makes the trace of one launch; each method is a step, and they run in the order of `launch`."""

    def __init__(
        self, log: Log, events: Events, span: launches.Span, slots: Memory | None, given: Layout | None
    ) -> None:
        self._log, self._all, self._span, self._slots = log, events, span, slots
        self._given = None if given is None else memory.of_layout(given)
        own = events[span.start : span.end]
        becomes = np.isin(own["kind"], launches.OPERATIONS)
        late = 0
        if span.finish is not None:
            at = span.finish - span.start
            becomes[at] = True
            late = int(np.count_nonzero(own["kind"][at:] == Kind.UPDATE))
        self._events = own.copy() if becomes.all() else own[becomes]
        self._account = Account(events=len(self._events), late=late)
        self._mixed = np.zeros(len(self._events), np.bool_)

    def launch(self, number: int, name: str, seed: int, *, launching: bool) -> Launch:
        """Return the launch."""
        self._place_blocks()
        self._drop_repeats()
        self._cut_continued_updates()
        operations = self._operations()
        ram, layout_from = self._memory(operations)
        operations = self._inside(operations, ram)
        layout = self._layout(operations, ram)
        touches = ~((operations["step"] == Step.POPULATE) & (operations["variant"] == _VMSA_UPDATE))
        began = start.start_of(layout, operations, start.needs(operations, self._mixed), touches)
        assumed = not (shows_launch(operations) or launching)
        if assumed:
            operations = join_operations([end_of_launch(), operations])
        span, lines = self._span, self._all["line"]
        return Launch(
            number,
            Trace(Header(name, f"log {name}", layout, seed, self._vm_type()), operations, began.ranges),
            layout_from,
            began.pages,
            _BY_LAUNCH if self._shows_launch() else _BY_CONVERSION,
            self._account,
            (int(lines[span.start]), int(lines[span.end - 1])),
            assumed,
            None if span.finish is None else int(lines[span.finish]),
            launches.failures_of(span, self._all, self._log.failures),
            span.traces_states and span.finish is not None and not span.confirmed,
        )

    # ---- events --------------------------------------------------------------------------------------------
    def _keep(self, kept: NDArray[np.bool_]) -> None:
        self._events, self._mixed = self._events[kept], self._mixed[kept]

    def _place_blocks(self) -> None:
        """Give changes of RAMBlocks their addresses."""
        blocks = np.flatnonzero(self._events["kind"] == Kind.BLOCK)
        if not len(blocks):
            return
        known = self._slots if self._slots is not None and self._slots.blocks else self._given
        if known is None:
            kinds = self._events["kind"]
            if not np.isin(kinds, (Kind.CONVERT, Kind.ATTRIBUTES)).any():
                raise TraceError(
                    "offsets of a RAMBlock are no addresses: trace kvm_set_user_memory too, or say where "
                    f"memory is with {option('memory')}"
                )
            # RamBlockAttributes record what the log has as requests.
            self._account.repeats += len(blocks)
            self._keep(kinds != Kind.BLOCK)
            return
        ranges: dict[int, list[memory.Range]] = {}
        for i, offset, size in zip(
            blocks.tolist(), *(self._events[name][blocks].tolist() for name in ("gpa", "size")), strict=True
        ):
            ranges[i] = known.addresses(offset, size) or []
        self._account.unplaced = sum(not found for found in ranges.values())
        self._mixed[blocks] = self._events["value"][blocks] >> np.uint64(8) == MIXTURE
        self._events, self._mixed = _split(self._events, self._mixed, ranges)

    def _drop_repeats(self) -> None:
        """Drop conversions that are in the log twice: as a request, as KVM does it, as QEMU records it."""
        places = np.flatnonzero(np.isin(self._events["kind"], _CONVERSIONS))
        kind, low, size = (self._events[name][places] for name in ("kind", "gpa", "size"))
        high, to_private = low + size, self._to_private()[places]
        repeats = np.zeros(len(self._events), np.bool_)
        waiting = np.flatnonzero(kind > kind.min()) if len(kind) else places
        for back in range(1, _WINDOW + 1):
            waiting = waiting[waiting >= back]
            earlier = waiting - back
            # Requests come before what they cause.
            above = (
                (kind[earlier] < kind[waiting])
                & (low[earlier] < high[waiting])
                & (low[waiting] < high[earlier])
            )
            last, own = earlier[above], waiting[above]
            covered = (low[last] <= low[own]) & (high[own] <= high[last])
            repeats[places[own]] = covered & (to_private[last] == to_private[own])
            waiting = waiting[~above]
            if not len(waiting):
                break
        self._account.repeats += int(np.count_nonzero(repeats))
        if repeats.any():
            self._keep(~repeats)

    def _to_private(self) -> NDArray[np.bool_]:
        value, blocks = self._events["value"], self._events["kind"] == Kind.BLOCK
        by_attribute = (value & np.uint64(MemoryAttribute.PRIVATE)) > 0
        return np.where(blocks, value & np.uint64(0xFF) == DISCARDED, by_attribute)

    def _cut_continued_updates(self) -> None:
        """Cut launch updates whose rest follows."""
        kinds = self._events["kind"]
        ended = np.append(np.flatnonzero(np.isin(kinds, (Kind.FINISH, Kind.STATE))), len(kinds))[0]
        updates = np.flatnonzero(kinds[:ended] == Kind.UPDATE)
        size, rest = cut_continued(self._events[updates])
        if not rest:
            return
        self._events["size"][updates] = size
        self._account.continued = rest
        kept = np.ones(len(self._events), np.bool_)
        kept[updates[size == 0]] = False
        self._keep(kept)

    # ---- operations ----------------------------------------------------------------------------------------
    def _operations(self) -> Operations:
        events = self._events
        kind, value = events["kind"], events["value"]
        made = empty_operations(len(events))
        made["step"] = _STEPS.take(kind)
        for name in ("gpa", "size"):
            made[name] = events[name]
        made["gpa"][made["step"] == Step.LAUNCH_FINISH] = 0
        converts = np.isin(kind, _CONVERSIONS)
        made["attributes"][converts] = value[converts]
        blocks = kind == Kind.BLOCK
        made["attributes"][blocks] = self._to_private()[blocks] * np.uint64(MemoryAttribute.PRIVATE)
        updates, faults = kind == Kind.UPDATE, kind == Kind.FAULT
        made["variant"][updates] = value[updates] | np.uint64(FROM_SOURCE)
        private = (value[faults] & np.uint64(MemoryAttribute.PRIVATE)) > 0
        made["variant"][faults] = np.where(private, Access.PRIVATE, Access.SHARED)
        self._account.vmsa = int(np.count_nonzero(updates & (value == _VMSA)))
        stamped = events["time_ns"] > 0
        if stamped.any():
            first = events["time_ns"][stamped].min()
            made["time_ns"][stamped] = events["time_ns"][stamped] - first
        return made

    def _memory(self, operations: Operations) -> tuple[Memory, str]:
        """Return where memory is, and who says so."""
        populates = operations["step"] == Step.POPULATE
        touching = populates & (operations["variant"] != _VMSA_UPDATE)
        loaded = spans(operations[touching])
        if self._given is not None:
            added = [] if self._slots is None else _below_four_gib(self._slots, self._given)
            return memory.with_ranges(self._given, [*added, *loaded]), GIVEN
        if self._slots is not None:
            return memory.with_ranges(self._slots, loaded), MEMSLOTS
        return memory.of_operations(operations[touching | ~populates]), TOUCHED

    def _inside(self, operations: Operations, ram: Memory) -> Operations:
        """Cut conversions to what lies in RAM; those that lie elsewhere change nothing and are counted."""
        converts = np.flatnonzero(operations["step"] == Step.CONVERT)
        gpa = operations["gpa"][converts]
        end = gpa + operations["size"][converts]
        starts, ends = memory.stretches(ram)
        at = np.searchsorted(starts, gpa, side="right").astype(np.intp) - 1
        within = (at >= 0) & (end <= ends.take(np.maximum(at, 0)))
        if within.all():
            return operations
        ranges: dict[int, list[memory.Range]] = {}
        odd = np.flatnonzero(~within)
        for i, low, high, first in zip(
            converts[odd].tolist(), gpa[odd].tolist(), end[odd].tolist(), at[odd].tolist(), strict=True
        ):
            parts = []
            for j in range(max(first, 0), len(starts)):
                if starts[j] >= high:
                    break
                part = max(low, int(starts[j])), min(high, int(ends[j]))
                if part[0] < part[1]:
                    parts.append(part)
            ranges[i] = parts
        outside = [i for i, parts in ranges.items() if not parts]
        self._account.outside = len(outside)
        self._account.outside_ranges = spans(operations[outside])
        operations, self._mixed = _split(operations, self._mixed, ranges)
        return operations

    def _layout(self, operations: Operations, ram: Memory) -> Layout:
        """Return the layout: private once a launch is seen, else as a region's first conversion needs it."""
        if self._shows_launch():
            return memory.layout_of(ram, [True] * len(ram.ranges))
        converts = operations[operations["step"] == Step.CONVERT]
        to_shared = converts["attributes"] & np.uint64(MemoryAttribute.PRIVATE) == 0
        usual = bool(to_shared[0]) if len(to_shared) else False
        starts = np.array([low for low, _ in ram.ranges], np.uint64)
        low = np.searchsorted(starts, converts["gpa"], side="right") - 1
        high = np.searchsorted(starts, converts["gpa"] + converts["size"])
        first = first_over(low, high, len(starts)).tolist()
        return memory.layout_of(ram, [usual if i < 0 else bool(to_shared[i]) for i in first])

    def _vm_type(self) -> str:
        """Return the VM type that the log is of; empty if it doesn't say, or names several."""
        return next(iter(self._log.vm_types)) if len(self._log.vm_types) == 1 else ""

    def _shows_launch(self) -> bool:
        """Whether anything of a launch is in the log, be it of its beginning only."""
        return bool(np.isin(self._all["kind"][self._span.start : self._span.end], _LAUNCH).any())


def cut_continued(updates: Events) -> tuple[NDArray[np.uint64], int]:
    """Return how much each launch update did, and how many were followed by one for their rest.

    KVM may do less than it was asked for; QEMU asks again for what is left, and traces that too.
    """
    gpa, size, value = (updates[name].copy() for name in ("gpa", "size", "value"))
    end = gpa + size
    rest = (value[1:] == value[:-1]) & (end[1:] == end[:-1]) & (gpa[1:] >= gpa[:-1])
    size[:-1][rest] = (gpa[1:] - gpa[:-1])[rest]
    return size, int(np.count_nonzero(rest))


def _below_four_gib(slots: Memory, given: Memory) -> list[memory.Range]:
    """Return memslots in the hole below 4 GiB, such as firmware, that a size of memory doesn't count."""
    return [
        (low, high)
        for low, high in slots.ranges
        if high <= _FOUR_GIB and not any(start < high and low < end for start, end in given.ranges)
    ]


def _split(
    rows: Operations | Events, mixed: NDArray[np.bool_], ranges: dict[int, list[memory.Range]]
) -> tuple[Operations, NDArray[np.bool_]]:
    """Return rows, those of `ranges` once for each range of theirs."""
    counts = np.ones(len(rows), np.intp)
    for i, parts in ranges.items():
        counts[i] = len(parts)
    order = np.repeat(np.arange(len(rows)), counts)
    made = rows[order]
    places = np.cumsum(counts) - counts
    for i, parts in ranges.items():
        for j, (low, high) in enumerate(parts):
            made[places[i] + j]["gpa"], made[places[i] + j]["size"] = low, high - low
    return made, mixed[order]
