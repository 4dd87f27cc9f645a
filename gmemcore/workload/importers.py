"""Importers: logs of real hosts as operations.

A log is read line by line. A line that names an event of `EVENTS` is one, whatever stands before the name
(time stamps, process ids, names of programs); all others and comments are skipped. What an event's line says
is its row's function: adding one is a function and a row.
"""

import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from gmemcore.engine.steps import Step
from gmemcore.uapi import PAGE_SHIFT, PAGE_SIZE, MemoryAttribute, PageType
from gmemcore.workload.container import ContainerError, open_regular
from gmemcore.workload.layout import Layout, Region, spans
from gmemcore.workload.operations import (
    FROM_SOURCE,
    OPERATION,
    Access,
    Operations,
    end_of_launch,
    join_operations,
    shows_launch,
)
from gmemcore.workload.trace import Header, Trace, TraceError, record

LAUNCH_START, LAUNCH_UPDATE, LAUNCH_FINISH = (
    f"kvm_sev_snp_launch_{event}" for event in ("start", "update", "finish")
)
"""QEMU's events of an SNP launch."""

REGION_ALIGN: Final = 2 << 20
"""Regions of an imported guest begin and end at multiples of this, so that blocks split where they would."""
REGION_GAP: Final = 1 << 30
"""Memory that a log names at places no further apart than this is one region: it names few pages of many."""

_ADDRESS_BITS: Final = 52
"""Width of a physical address on AMD64; what lies beyond is no address of a guest."""
_HEX: Final = r"0x([0-9a-f]{1,16})"
_TIME: Final = re.compile(r"\b(\d{1,10})\.(\d{6}|\d{9}):\s*(?:[\w-]+:)?\s*$", re.ASCII)
_LOST: Final = re.compile(r"\[LOST (\d{1,12}) EVENTS\]|LOST (\d{1,12}) events", re.ASCII)
_CHUNK: Final = 1 << 14
_MAX_LINE: Final = 1 << 20


class Line(NamedTuple):
    """A line that names an event: its number from 1, what precedes the name, the name, what follows it."""

    number: int
    prefix: str
    event: str
    arguments: str


class Update(NamedTuple):
    """A launch update, as its line has it."""

    line: int
    gpa: int
    size: int
    page_type: PageType


class Done(NamedTuple):
    """What an event was, in the fields of an operation."""

    step: Step
    gpa: int = 0
    size: int = 0
    variant: int = 0
    attributes: int = 0


def event_lines(lines: Iterable[str], events: Collection[str]) -> Iterator[Line]:
    """Yield the lines that name one of the events."""
    named = re.compile(rf"^(.*?)\b({'|'.join(map(re.escape, events))})\b(.*)", re.DOTALL)
    for number, line in enumerate(lines, start=1):
        found = None if line.startswith("#") else named.match(line)
        if found is not None:
            yield Line(number, *found.groups())


# ---- one function an event ---------------------------------------------------------------------------------
def launch_update(line: Line) -> Update:
    """Read ``src 0x… gpa 0x… len 0x… (Normal page)``.

    Raises
    ------
    TraceError
        Malformed, a page type that doesn't exist, or no guest memory.

    References
    ----------
    QEMU, ``target/i386/kvm/trace-events`` and ``sev_snp_launch_update`` in ``target/i386/sev.c``.
    """
    form = rf"src 0x[0-9a-f]{{1,16}} gpa {_HEX} len {_HEX} \((\w+) page\)"
    gpa, size, kind = _arguments(line, form, "src 0x… gpa 0x… len 0x… (Normal page)")
    if kind not in _PAGE_TYPES:
        raise TraceError(f"line {line.number}: page type {kind!r}; known: {', '.join(_PAGE_TYPES)}")
    return Update(line.number, *_memory(line, "gpa", gpa, size), _PAGE_TYPES[kind])


_PAGE_TYPES: Final = {
    "Normal": PageType.NORMAL,
    "Zero": PageType.ZERO,
    "Unmeasured": PageType.UNMEASURED,
    "Secrets": PageType.SECRETS,
    "Cpuid": PageType.CPUID,
}
"""Page types as QEMU's trace names them. No VMSA: KVM measures those itself at launch finish."""


def _launch_update(line: Line) -> Done:
    update = launch_update(line)
    variant = tuple(PageType).index(update.page_type) | FROM_SOURCE
    return Done(Step.POPULATE, update.gpa, update.size, variant)


def _launch_finish(_line: Line) -> Done:
    return Done(Step.LAUNCH_FINISH)


def _convert_memory(line: Line) -> Done:
    """Read a conversion that a guest asked QEMU for (``kvm_convert_memory`` in ``accel/kvm/kvm-all.c``)."""
    form = rf"start {_HEX} size {_HEX} (shared_to_private|private_to_shared)"
    start, size, direction = _arguments(line, form, "start 0x… size 0x… shared_to_private")
    attributes = MemoryAttribute.PRIVATE if direction == "shared_to_private" else 0
    return Done(Step.CONVERT, *_memory(line, "start", start, size), attributes=attributes)


def _memory_fault(line: Line) -> Done:
    """Read a KVM_EXIT_MEMORY_FAULT: an access of the other kind than the page's (``kvm_cpu_exec``)."""
    form = rf"start {_HEX} size {_HEX} flags {_HEX}"
    start, size, flags = _arguments(line, form, "start 0x… size 0x… flags 0x8")
    kind = Access.PRIVATE if int(flags, 16) & MemoryAttribute.PRIVATE else Access.SHARED
    return Done(Step.GUEST_READ, *_memory(line, "start", start, size), kind)


def _set_mem_attributes(line: Line) -> Done:
    """Read KVM's own tracepoint, in guest frames with the end exclusive (``include/trace/events/kvm.h``)."""
    start, end, attributes = _arguments(line, rf": {_HEX} -- {_HEX} \[{_HEX}\]", ": 0x… -- 0x… [0x8]")
    first, last = int(start, 16), int(end, 16)
    gpa, size = _memory(line, "gfn", f"{first << PAGE_SHIFT:x}", f"{max(last - first, 0) << PAGE_SHIFT:x}")
    return Done(Step.CONVERT, gpa, size, attributes=int(attributes, 16))


EVENTS: Final[dict[str, Callable[[Line], Done]]] = {
    "kvm_convert_memory": _convert_memory,
    "kvm_memory_fault": _memory_fault,
    LAUNCH_UPDATE: _launch_update,
    LAUNCH_FINISH: _launch_finish,
    "kvm_vm_set_mem_attributes": _set_mem_attributes,
}
"""Event -> what its line says."""


def _arguments(line: Line, form: str, example: str) -> tuple[str, ...]:
    """Match what follows the name of an event."""
    found = re.fullmatch(rf"\s*{form}\s*", line.arguments, re.IGNORECASE | re.ASCII)
    if found is None:
        raise TraceError(
            f"line {line.number}: malformed {line.event}: {line.arguments.strip()[:120]!r}; "
            f"'{example}' would be accepted"
        )
    return found.groups()


def _memory(line: Line, name: str, start: str, length: str) -> tuple[int, int]:
    """Return gpa and size of hexadecimal fields, or say that no guest has such memory."""
    gpa, size = int(start, 16), int(length, 16)
    if not size or (gpa | size) % PAGE_SIZE or (gpa + size) >> _ADDRESS_BITS:
        text = line.arguments.strip()[:120]
        raise TraceError(
            f"line {line.number}: {line.event} {text!r}: {name} {gpa:#x} len {size:#x}; "
            f"multiples of {PAGE_SIZE:#x} within {_ADDRESS_BITS} address bits would be accepted"
        )
    return gpa, size


# ---- whole logs --------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Imported:
    """A log as a trace, and what had to be made up.

    Attributes
    ----------
    trace : Trace
        Its regions start private where what the log first says of them needs that.
    lines : int
        Lines that were events.
    lost : int
        Events that the tracer says it lost.
    assumed_running : bool
        The log shows no launch, so the guest was taken to run already: LAUNCH_FINISH was put first.
    """

    trace: Trace
    lines: int
    lost: int
    assumed_running: bool


def import_log(
    lines: Iterable[str], name: str, *, layout: Layout | None = None, seed: int = 0, launching: bool = False
) -> Imported:
    """Read a log of QEMU's trace, of ftrace or of perf script.

    Parameters
    ----------
    lines : iterable of str
        The log.
    name : str
        Its name.
    layout : Layout or None
        The guest's memory; None: regions around what the log touches, see `REGION_GAP`.
    seed : int
        Of the contents, which no log has.
    launching : bool
        Whether a log that shows no launch was taken before the guest ran.

    Raises
    ------
    TraceError
        No event at all, or one that can't be read: the message has its line and its text.
    InvalidArgumentError
        EINVAL: a seed that doesn't fit, or memory in more regions than a layout has.
    """
    watch = _Watch()
    header = Header(name, f"log {name}", layout or Layout.single(PAGE_SIZE), seed)
    trace = record(header, _chunks(watch.pass_on(lines)))
    operations = trace.operations
    if not len(operations):
        raise TraceError(f"no line names an event; known: {', '.join(EVENTS)}")
    stamped = operations["time_ns"] > 0
    if stamped.any():
        operations["time_ns"][stamped] -= operations["time_ns"][stamped].min()
    assume = not (shows_launch(operations) or launching)
    chosen = layout or guessed_layout(operations)
    if assume:
        operations = join_operations([end_of_launch(), operations])
    header = Header(header.name, header.source, chosen, seed)
    return Imported(Trace(header, operations), len(trace.operations), watch.lost, assume)


def read_log(path: str | os.PathLike[str]) -> Iterator[str]:
    """Yield the lines of a log, whatever bytes it holds.

    Raises
    ------
    TraceError
        A line longer than any log's, with its number; not a regular file.
    OSError
        It can't be opened or read.
    """
    try:
        with open_regular(path) as file:
            number = 0
            while line := file.readline(_MAX_LINE + 1):
                number += 1
                if len(line) > _MAX_LINE:
                    raise TraceError(f"line {number}: longer than {_MAX_LINE:,} bytes: not a log")
                yield line.decode("utf-8", errors="replace")
    except TraceError:
        raise
    except ContainerError as error:
        raise TraceError(str(error)) from error


class _Watch:
    """Counts the events that a tracer says it lost."""

    def __init__(self) -> None:
        self.lost = 0

    def pass_on(self, lines: Iterable[str]) -> Iterator[str]:
        for line in lines:
            if "LOST" in line and (found := _LOST.search(line)):
                self.lost += int(found[1] or found[2])
            yield line


def _chunks(lines: Iterable[str]) -> Iterator[Operations]:
    rows: list[tuple[int, ...]] = []
    for line in event_lines(lines, EVENTS):
        done = EVENTS[line.event](line)
        rows.append(
            (done.step, done.variant, 0, done.gpa, done.size, done.attributes, 0, _time_ns(line.prefix))
        )
        if len(rows) == _CHUNK:
            yield np.array(rows, OPERATION)
            rows = []
    yield np.array(rows, OPERATION)


def _time_ns(prefix: str) -> int:
    """Return the time stamp that ends a prefix, or 0."""
    found = _TIME.search(prefix)
    return int(found[1]) * 10**9 + int(found[2].ljust(9, "0")) if found else 0


def guessed_layout(operations: Operations) -> Layout:
    """Return regions around what operations touch; one starts private where its first operation needs it."""
    touching = operations[operations["size"] > 0]
    regions: list[Region] = []
    for start, end in spans(touching, gap=REGION_GAP):
        low, high = start // REGION_ALIGN * REGION_ALIGN, -(-end // REGION_ALIGN) * REGION_ALIGN
        inside = touching[(touching["gpa"] >= start) & (touching["gpa"] < end)]
        regions.append(Region(low, high - low, _needs_private(inside[0])))
    return Layout(tuple(regions))


def _needs_private(operation: Operations) -> bool:
    """Whether an operation finds private memory, if it does anything."""
    if operation["step"] == Step.CONVERT:
        return not int(operation["attributes"]) & MemoryAttribute.PRIVATE
    return bool(operation["step"] == Step.POPULATE or operation["variant"] == Access.SHARED)
