"""Accesses by the host and by the guest: checked whole, then done.

A request for memory is first resolved into segments, each of them a range of one store (or a hole).  The
first page that one of the access's terms (``engine/steps.py``) finds stops it before any byte moves.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gmemcore.engine.arguments import U64_MAX
from gmemcore.engine.state import Plane
from gmemcore.engine.steps import NO_PAGE, Term
from gmemcore.engine.store import Store
from gmemcore.errors import (
    BadFileError,
    GmemError,
    HostAccessError,
    HwPoisonExit,
    InvalidArgumentError,
    MemoryFaultExit,
    MmioExit,
    NoBytesError,
    NotValidatedExit,
)
from gmemcore.uapi import PAGE_SHIFT, PAGE_SIZE, MemoryAttribute


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of guest physical memory: a byte range of one store, or a hole (store is None).

    `private` is the Vm's attribute there, in `legacy`; None where attributes are the file's. A hole is
    `closed` if there is a memslot, and its file is closed.
    """

    gpa: int
    size: int
    store: Store | None
    offset: int
    private: bool | None = None
    closed: bool = False

    @property
    def pages(self) -> tuple[int, int]:
        """First and end page in the store that the bytes touch."""
        return self.offset >> PAGE_SHIFT, -(-(self.offset + self.size) // PAGE_SIZE)


def check_guest_range(gpa: int, size: int) -> None:
    """Refuse an empty range, or one that wraps.

    Raises
    ------
    InvalidArgumentError
        EINVAL.
    """
    if size <= 0 or gpa + size > U64_MAX + 1:
        raise InvalidArgumentError(f"guest range {gpa:#x}+{size:#x} is empty or wraps 2^64")


def locked(segments: Sequence[Segment]) -> AbstractContextManager[Any]:
    """Hold the locks of all stores of the segments, always taken in the same order."""
    stores = {id(segment.store): segment.store for segment in segments if segment.store is not None}
    if len(stores) == 1:
        return next(iter(stores.values())).lock
    return _all_locked([stores[key] for key in sorted(stores)])


@contextmanager
def _all_locked(stores: Sequence[Store]) -> Iterator[None]:
    with ExitStack() as stack:
        for store in stores:
            stack.enter_context(store.lock)
        yield


def require_open(segments: Sequence[Segment]) -> None:
    """Refuse an access to a file that is gone.

    Raises
    ------
    BadFileError
        EBADF: the file was closed meanwhile.
    """
    for segment in segments:
        if segment.store is not None and segment.store.closed:
            raise BadFileError(f"the file behind gpa {segment.gpa:#x} is closed")


def require_bytes(segments: Sequence[Segment]) -> None:
    """Refuse an access to bytes where there are none.

    Raises
    ------
    NoBytesError
        ENOTSUP: an attributes-only file.
    BadFileError
        EBADF: the file was closed meanwhile.
    """
    require_open(segments)
    for segment in segments:
        if segment.store is not None and not segment.store.has_bytes:
            raise NoBytesError(
                f"the file behind gpa {segment.gpa:#x} holds attributes only; "
                "backing 'anonymous' or 'memfd' would hold bytes"
            )


def promise(segments: Sequence[Segment]) -> None:
    """Make sure, before anything is changed anywhere, that all of the segments can come into being.

    Raises
    ------
    OutOfMemoryError
        ENOMEM: the host can't provide the pages.
    """
    for segment in segments:
        if segment.store is not None:
            segment.store.promise(*segment.pages)


class Refused(NamedTuple):
    """The first page that refuses an access, the term that it matches, and the address of the page."""

    term: Term
    gpa: int
    segment: Segment
    page: int


def first_page(store: Store, start: int, end: int, terms: Sequence[Term]) -> tuple[int, Term | None]:
    """Find the first page of [start, end) that a term matches, and that term; end and None without one."""
    found = None
    for term in terms:
        page = store.find(start, end, term.wanted, term.unwanted) if start < end else None
        if page is not None:
            end, found = page, term
    return end, found


def first_refused(segments: Sequence[Segment], terms: Sequence[Term], hole: Term) -> Refused | None:
    """Find the first page of the segments that a term matches; a hole refuses with a term of its own.

    References
    ----------
    kvm_mmu_faultin_pfn: the attribute comes before the memslot. kvm_gmem_get_pfn: EFAULT of a closed file.
    """
    for segment in segments:
        if segment.store is None:
            hole = NO_PAGE if segment.private or segment.closed else hole
            return Refused(hole, segment.gpa & -PAGE_SIZE, segment, 0)
        page, term = first_page(segment.store, *segment.pages, terms)
        if term is not None:
            return Refused(term, (segment.gpa - segment.offset) + (page << PAGE_SHIFT), segment, page)
    return None


def guest_exit(refused: Refused, private: bool) -> GmemError:
    """Return the exit that a refused guest access makes."""
    refusal = refused.term.refusal
    where = f"guest {'private' if private else 'shared'} access to gpa {refused.gpa:#x}"
    if refusal == "MEMORY_FAULT":
        why = f"the page is {'shared' if private else 'private'}; convert it first"
        if refused.segment.store is None:
            why = "the file of its memslot is closed" if refused.segment.closed else "no memslot there"
        flags = int(MemoryAttribute.PRIVATE) if private else 0
        return MemoryFaultExit(f"{where}: {why}", refused.gpa, PAGE_SIZE, flags)
    if refusal == "MMIO":
        return MmioExit(f"{where}: no memslot there", refused.gpa, PAGE_SIZE)
    if refusal == "EHWPOISON":
        return HwPoisonExit(f"{where}: the page is poisoned; PUNCH_HOLE discards it", refused.gpa, PAGE_SIZE)
    return NotValidatedExit(f"{where}: the guest must accept the page first", refused.gpa, PAGE_SIZE)


def touch_segments(segments: Sequence[Segment]) -> None:
    """Let the pages of the segments exist, all of them or none."""
    promise(segments)
    for segment in segments:
        assert segment.store is not None
        segment.store.touch(*segment.pages, promised=True)


def read_segments(segments: Sequence[Segment], encrypted: bool) -> bytes:
    """Copy the segments' bytes out, touching their pages; encrypted: private pages have a guest's key."""
    touch_segments(segments)
    parts = []
    for segment in segments:
        assert segment.store is not None
        read = segment.store.read_guest_view if encrypted else segment.store.raw
        parts.append(read(segment.offset, segment.size).tobytes())
    return parts[0] if len(parts) == 1 else b"".join(parts)


def write_segments(segments: Sequence[Segment], data: NDArray[np.uint8], encrypted: bool) -> None:
    """Copy bytes into the segments, touching their pages."""
    touch_segments(segments)
    for segment in segments:
        assert segment.store is not None
        part, data = data[: segment.size], data[segment.size :]
        if encrypted:
            segment.store.write_guest_view(segment.offset, part)
        else:
            segment.store.raw(segment.offset, segment.size)[:] = part


def as_bytes(data: bytes | bytearray | memoryview | NDArray[np.uint8]) -> NDArray[np.uint8]:
    """View data to be written as uint8, shape (n,).

    Raises
    ------
    TypeError
        Not contiguous bytes.
    InvalidArgumentError
        EINVAL: empty.
    """
    try:
        buffer = memoryview(data)  # type: ignore[arg-type]  # NumPy arrays are buffers at run time
    except TypeError:
        raise TypeError(f"data must be bytes-like, not {type(data).__name__}") from None
    if not buffer.c_contiguous:
        raise TypeError("data must be contiguous bytes")
    view = np.frombuffer(buffer, np.uint8)
    if not len(view):
        raise InvalidArgumentError("there is nothing to write; at least one byte would be accepted")
    return view


def check_host_touch(store: Store, offset: int, size: int) -> None:
    """Refuse what would be SIGBUS for the host.

    Raises
    ------
    HostAccessError
        SIGBUS: a private or poisoned page, or beyond the end of the file.

    References
    ----------
    kvm_gmem_fault_user_mapping.
    """
    file_size = store.n_pages * PAGE_SIZE
    if offset + size > file_size:
        raise HostAccessError(f"host access to {offset:#x}+{size:#x} is beyond the end {file_size:#x}")
    start, end = offset >> PAGE_SHIFT, -(-(offset + size) // PAGE_SIZE)
    for plane, why in ((Plane.PRIVATE, "private; convert it to shared first"), (Plane.POISONED, "poisoned")):
        page = store.find(start, end, plane)
        if page is not None:
            at = page << PAGE_SHIFT
            raise HostAccessError(f"host access to {offset:#x}+{size:#x}: the page at {at:#x} is {why}")
