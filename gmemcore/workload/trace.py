"""Traces: the operations of one guest in a file, as a binary container, JSON Lines or Parquet.

All forms hold the same; the third one is in `gmemcore.workload.parquet`. The binary form has the header as
meta and the sections ``operations`` and, if pages begin otherwise than their region, ``start``. The text form
is a line with the header, one for each range of such pages, and one for each operation; fields that are zero
are left out:

.. code-block:: json

    {"trace": 1, "name": "boot", "source": "boot.log", "seed": 0, "layout": {"regions": […]}, "operations": 2}
    {"starts": "shared", "gpa": 0, "size": 2097152}
    {"step": "POPULATE", "gpa": 8388608, "size": 36864, "page_type": "ZERO", "from_source": true}
    {"step": "CONVERT", "gpa": 1048576, "size": 4096, "attributes": 8, "flags": 2, "time_ns": 125}
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from gmemcore.engine.arguments import as_u64
from gmemcore.engine.steps import Step
from gmemcore.errors import GmemError, InvalidArgumentError
from gmemcore.files.kinds import MAGIC
from gmemcore.files.writing import replace_file
from gmemcore.uapi import PAGE_SIZE, MemoryAttribute, PageType, VmType
from gmemcore.units import counted, format_bytes
from gmemcore.workload.container import (
    MAX_BYTES,
    MAX_HEADER,
    ContainerError,
    is_container,
    open_regular,
    read,
    write,
)
from gmemcore.workload.layout import Layout
from gmemcore.workload.operations import (
    FROM_SOURCE,
    OPERATION,
    Access,
    Operations,
    check_operations,
)

MAX_OPERATIONS: Final = 1 << 26
"""Operations of a trace: 3 GiB of them."""
TEXT_SUFFIXES: Final = (".jsonl", ".ndjson")
"""Endings of names that are written as JSON Lines."""
PARQUET_SUFFIX: Final = ".parquet"
"""Ending of names that are written as Parquet."""

_PARQUET_MAGIC: Final = b"PAR1"
_VERSION: Final = 1
_SECTION: Final = "operations"
_START: Final = "start"
_MAX_LINE: Final = 1 << 12
_MIN_LINE: Final = len('{"step":"PIN"}')
_MIN_START: Final = len('{"starts":"shared","gpa":0,"size":4096}')
_CHUNK: Final = 1 << 14
_STEPS: Final = {step.name: int(step) for step in Step}
_PAGE_TYPES: Final = {page_type.value: i for i, page_type in enumerate(PageType)}
_ACCESSES: Final = {access.name: int(access) for access in Access}


class TraceError(ContainerError):
    """What can't be read as a trace; the message says at which line or byte, and why."""


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a trace says about itself.

    Attributes
    ----------
    name : str
        A word or two.
    source : str
        Where it is from: a behaviour with its parameters, the name of a log.
    layout : Layout
        The guest's memory.
    seed : int
        u64 that contents, and a behaviour's random numbers, are made of. A guest's key is never written.
    vm_type : str
        The VM type that it is from, or for; empty if unknown.
    """

    name: str
    source: str
    layout: Layout
    seed: int = 0
    vm_type: str = ""

    def __post_init__(self) -> None:
        as_u64(self.seed, "seed")


@dataclass(frozen=True, slots=True)
class Trace:
    """Operations of one guest, and where it begins.

    Attributes
    ----------
    header : Header
        Name, source, layout, seed, VM type.
    operations : Operations
        In order, shape (n,).
    start : uint64 array of shape (m, 3)
        gpa, size (bytes) and attributes of the pages that begin otherwise than their region does; each range
        lies in one region.
    """

    header: Header
    operations: Operations
    start: NDArray[np.uint64] = field(default_factory=lambda: np.zeros((0, 3), np.uint64))

    def __repr__(self) -> str:
        own = self.header
        kind = f" of {own.vm_type}" if own.vm_type else ""
        return (
            f"Trace {own.name!r} from {own.source}: {counted(len(self.operations), 'operation')}, "
            f"a guest{kind} with {format_bytes(own.layout.size)}"
        )


# ---- both forms -------------------------------------------------------------------------------------------
def write_trace(path: str | os.PathLike[str], trace: Trace) -> None:
    """Write a trace, whole or not at all, in the form that the name asks for.

    `TEXT_SUFFIXES` are JSON Lines, `PARQUET_SUFFIX` is Parquet, all others are binary.

    Raises
    ------
    TypeError, InvalidArgumentError
        Operations that don't exist; nothing was written.
    MissingExtraError
        Parquet, and pyarrow isn't installed.
    ContainerError, OSError
        As `gmemcore.workload.container.write`.
    """
    _check(trace)
    suffix = Path(path).suffix.lower()
    if suffix in TEXT_SUFFIXES:
        replace_file(path, _lines(trace), mode=0o600)
    elif suffix == PARQUET_SUFFIX:
        from gmemcore.workload import parquet  # with pyarrow, which is large

        parquet.write(path, trace)
    else:
        sections: dict[str, NDArray[Any]] = {_SECTION: trace.operations}
        if len(trace.start):
            sections[_START] = np.ascontiguousarray(trace.start)
        write(path, "trace", msgspec.to_builtins(trace.header), sections)


def read_trace(path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> Trace:
    """Read a trace of any form, whatever its name.

    Parameters
    ----------
    path : path-like
        A regular file.
    max_bytes : int
        The largest file to be taken.

    Raises
    ------
    ContainerError
        Not a trace, or damaged; `TraceError` where it is a container, or text, and yet no trace.
    OSError
        The file can't be opened or read.
    """
    try:
        trace = _reader(path)(path, max_bytes)
        _check(trace)
        return trace
    except (GmemError, TypeError, TraceError) as error:
        what = error.strerror if isinstance(error, GmemError) else error
        raise TraceError(f"{os.fspath(path)}: {what}") from error


def _reader(path: str | os.PathLike[str]) -> Callable[[str | os.PathLike[str], int], Trace]:
    """Return what reads the form that a file has."""
    if is_container(path):
        return _read_binary
    with open_regular(path) as file:
        if file.read(len(_PARQUET_MAGIC)) != _PARQUET_MAGIC:
            return _read_text
    from gmemcore.workload import parquet

    return parquet.read


def _check(trace: Trace) -> None:
    """Refuse a VM type or operations that don't exist, and a start that isn't of the layout."""
    if trace.header.vm_type not in {"", *VmType}:
        raise TraceError(f"unknown VM type {trace.header.vm_type!r}; known: {', '.join(VmType)}")
    check_operations(trace.operations)
    check_start(trace.header.layout, trace.start)


def check_start(layout: Layout, start: NDArray[np.uint64]) -> None:
    """Refuse what isn't the start of pages of a layout; see `Trace`.

    Raises
    ------
    TypeError
        Not a uint64 array of shape (n, 3).
    InvalidArgumentError
        EINVAL: not whole pages, unknown attributes, ranges that overlap or aren't ascending, or not in one
        region each.
    """
    if not isinstance(start, np.ndarray) or start.dtype != np.uint64 or start.shape[1:] != (3,):
        raise TypeError("the start of pages must be a uint64 array of shape (n, 3)")
    if not len(start):
        return
    gpa, size, attributes = start.T
    end = gpa + size
    bounds = np.array(sorted((region.gpa, region.end) for region in layout.regions), np.uint64)
    region = np.searchsorted(bounds[:, 0], gpa, side="right") - 1
    wrong = {
        "must be whole pages": ((gpa | size) % np.uint64(PAGE_SIZE) > 0) | (size == 0),
        "must be private (8) or shared (0)": attributes & ~np.uint64(MemoryAttribute.PRIVATE) > 0,
        "must lie in one region": (region < 0)
        | (end < gpa)
        | (end > bounds[:, 1].take(np.maximum(region, 0))),
        "must be behind the one before": np.concatenate([[False], gpa[1:] < end[:-1]]),
    }
    for what, rows in wrong.items():
        if rows.any():
            first = int(np.argmax(rows))
            raise InvalidArgumentError(f"start of pages, range {first}: {what}")


def is_trace(head: bytes) -> bool:
    """Whether a file that begins so is a trace of any form, or claims to be: a log begins otherwise."""
    return head.startswith((MAGIC, _PARQUET_MAGIC, b"{"))


class Recorder:
    """Keeps the operations that pass.

    Parameters
    ----------
    header : Header
        What the trace's header reports.
    max_operations : int
        How many are kept at most.

    Examples
    --------
    ``player.play(vm, recorder.tap(stream))`` runs a stream, and ``recorder.trace()`` is what was run.
    """

    def __init__(self, header: Header, *, max_operations: int = MAX_OPERATIONS) -> None:
        self.header = header
        self._chunks: list[Operations] = []
        self._left = max_operations
        self._max = max_operations

    def tap(self, stream: Iterable[Operations]) -> Iterator[Operations]:
        """Pass a stream through, keeping a copy.

        Raises
        ------
        InvalidArgumentError
            EINVAL: more operations than are kept.
        """
        for chunk in stream:
            self._left -= len(chunk)
            if self._left < 0:
                raise InvalidArgumentError(
                    f"more than {self._max:,} operations; up to that many are recorded"
                )
            self._chunks.append(chunk.copy())
            yield chunk

    def trace(self) -> Trace:
        """Return what was kept so far."""
        return Trace(self.header, np.concatenate([np.zeros(0, OPERATION), *self._chunks]))


def record(header: Header, stream: Iterable[Operations], *, max_operations: int = MAX_OPERATIONS) -> Trace:
    """Return a stream as a trace, without running it; see `Recorder`."""
    recorder = Recorder(header, max_operations=max_operations)
    for _ in recorder.tap(stream):
        pass
    return recorder.trace()


# ---- binary -----------------------------------------------------------------------------------------------
def _read_binary(path: str | os.PathLike[str], max_bytes: int) -> Trace:
    container = read(path, "trace", max_bytes=max_bytes)
    operations = container.sections.get(_SECTION)
    if operations is None or container.sections.keys() - {_SECTION, _START}:
        raise TraceError(
            f"sections must be {_SECTION} and perhaps {_START}, not {', '.join(container.sections) or 'none'}"
        )
    start = container.sections.get(_START, np.zeros((0, 3), np.uint64))
    try:
        return Trace(msgspec.convert(container.meta, Header), operations, start)
    except msgspec.ValidationError as error:
        raise TraceError(f"header: {error}") from error


# ---- JSON Lines -------------------------------------------------------------------------------------------
class _FirstLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """`Header`, behind a version, and how many lines follow, so that a file that was cut is detected."""

    trace: int
    name: str
    source: str
    layout: Layout
    seed: int
    operations: int
    vm_type: str = ""
    start: int = 0


class _Start(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Pages that begin otherwise than their region."""

    starts: Literal["private", "shared"]
    gpa: int
    size: int


class _Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """An operation in words."""

    step: str
    gpa: int = 0
    size: int = 0
    attributes: int = 0
    flags: int = 0
    access: str = Access.AS_ATTRIBUTE.name
    page_type: str = PageType.NORMAL.value
    from_source: bool = False
    guest: int = 0
    time_ns: int = 0


_BITS: Final = {
    name: OPERATION[name].itemsize * 8 for name in ("gpa", "size", "attributes", "flags", "guest", "time_ns")
}


def _lines(trace: Trace) -> Iterator[bytes]:
    """Yield the text form, some lines at a time."""
    header, operations = trace.header, trace.operations
    first = _FirstLine(
        trace=_VERSION,
        name=header.name,
        source=header.source,
        layout=header.layout,
        seed=header.seed,
        operations=len(operations),
        vm_type=header.vm_type,
        start=len(trace.start),
    )
    try:
        yield msgspec.json.encode(first) + b"\n"
    except UnicodeEncodeError as error:
        raise ContainerError(f"the header can't be written as JSON: {error}") from error
    yield msgspec.json.Encoder().encode_lines(
        _Start("private" if attributes else "shared", gpa, size)
        for gpa, size, attributes in trace.start.tolist()
    )
    for start in range(0, len(operations), _CHUNK):
        yield msgspec.json.Encoder().encode_lines(map(_to_line, operations[start : start + _CHUNK].tolist()))


def _to_line(row: tuple[int, ...]) -> _Line:
    step, variant, guest, gpa, size, attributes, flags, time_ns = row
    words: dict[str, Any] = {}
    if step in (Step.GUEST_READ, Step.GUEST_WRITE):
        words["access"] = Access(variant).name
    elif step == Step.POPULATE:
        words["page_type"] = tuple(_PAGE_TYPES)[variant & ~FROM_SOURCE]
        words["from_source"] = bool(variant & FROM_SOURCE)
    return _Line(Step(step).name, gpa, size, attributes, flags, **words, guest=guest, time_ns=time_ns)


def _read_text(path: str | os.PathLike[str], max_bytes: int) -> Trace:
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise TraceError(f"must be at most {max_bytes:,} bytes (max_bytes), not {size:,}")
        first = _decoded(_line_of(file, 1, MAX_HEADER), _FirstLine, 1)
        if first.trace != _VERSION:
            raise TraceError(f"line 1: trace version must be {_VERSION}, not {first.trace}")
        header = Header(first.name, first.source, first.layout, first.seed, first.vm_type)
        start = _read_start(file, first, size)
        return Trace(header, _read_lines(file, first, size), start)


def _read_start(file: BinaryIO, first: _FirstLine, size: int) -> NDArray[np.uint64]:
    most = size // _MIN_START
    if not 0 <= first.start <= most:
        raise TraceError(f"line 1: {first.start} ranges of pages; {size:,} bytes have room for {most:,}")
    start = np.zeros((first.start, 3), np.uint64)
    for i in range(first.start):
        line = _decoded(_line_of(file, i + 2, _MAX_LINE), _Start, i + 2)
        if not (0 <= line.gpa < 1 << 64 and 0 <= line.size < 1 << 64):
            raise TraceError(f"line {i + 2}: gpa and size must be unsigned 64 bits")
        start[i] = line.gpa, line.size, MemoryAttribute.PRIVATE if line.starts == "private" else 0
    return start


def _read_lines(file: BinaryIO, first: _FirstLine, size: int) -> Operations:
    """Read the operations into memory that is taken once, and only for lines that the file has room for."""
    most = min(size // _MIN_LINE, MAX_OPERATIONS)
    if not 0 <= first.operations <= most:
        raise TraceError(f"line 1: {first.operations} operations; {size:,} bytes have room for {most:,}")
    operations = np.empty(first.operations, OPERATION)
    rows: list[tuple[int, ...]] = []
    for n in range(first.operations + 1):
        number = first.start + n + 2
        line = _line_of(file, number, _MAX_LINE)
        if bool(line) != (n < first.operations):
            found = "more operations" if line else counted(n, "operation")
            raise TraceError(f"line {number}: {found}; line 1 says {first.operations:,}")
        if line:
            rows.append(_to_row(_decoded(line, _Line, number), number))
        if len(rows) == _CHUNK or not line:
            operations[n + bool(line) - len(rows) : n + bool(line)] = rows
            rows = []
    return operations


def _line_of(file: BinaryIO, number: int, limit: int) -> bytes:
    line = file.readline(limit + 1)
    if len(line) > limit:
        raise TraceError(f"line {number}: longer than {limit:,} bytes")
    return line


def _decoded(line: bytes, kind: type[Any], number: int) -> Any:
    try:
        return msgspec.json.decode(line, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise TraceError(f"line {number}: {error}: {line[:80]!r}") from error
    except GmemError as error:
        raise TraceError(f"line {number}: {error.strerror}") from error


def _to_row(line: _Line, number: int) -> tuple[int, ...]:
    """Return the fields of an operation, in the order of `OPERATION`."""
    for table, word in ((_STEPS, line.step), (_ACCESSES, line.access), (_PAGE_TYPES, line.page_type)):
        if word not in table:
            raise TraceError(f"line {number}: {word[:40]!r}; known: {', '.join(table)}")
    for name, bits in _BITS.items():
        if not 0 <= getattr(line, name) < 1 << bits:
            raise TraceError(
                f"line {number}: {name} {getattr(line, name)}; {bits} unsigned bits are accepted"
            )
    step = _STEPS[line.step]
    access, page_type = _ACCESSES[line.access], _PAGE_TYPES[line.page_type]
    populate = page_type | FROM_SOURCE * line.from_source
    if (access and step not in (Step.GUEST_READ, Step.GUEST_WRITE)) or (populate and step != Step.POPULATE):
        raise TraceError(
            f"line {number}: {line.step}; access is of GUEST_READ and GUEST_WRITE, "
            "page_type and from_source are of POPULATE"
        )
    return (
        step,
        access or populate,
        line.guest,
        line.gpa,
        line.size,
        line.attributes,
        line.flags,
        line.time_ns,
    )
