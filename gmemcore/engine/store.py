"""Store: page state, bytes and the lock of one file, kept together.

The only writer of page state and of guest bytes. A guest_memfd is one store; the ordinary host memory beside
it in `legacy` is another. Every method takes the lock itself; `lock` is public (and re-entrant) for callers
that must look and then act.
"""

import struct
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmemcore.engine import kernels as layout
from gmemcore.engine.backing import Backing
from gmemcore.engine.conversion import Rules
from gmemcore.engine.counters import Counters, counters_of_row
from gmemcore.engine.host_view import HostView
from gmemcore.engine.jit import load_kernels
from gmemcore.engine.state import PageState, Plane, readonly
from gmemcore.errors import OutOfMemoryError
from gmemcore.uapi import PAGE_SHIFT, PAGE_SIZE

_REQUEST = struct.Struct(f"={layout.REQUEST_COLUMNS}Q")
_RESULT = struct.Struct(f"={layout.RESULT_COLUMNS}Q")

PAGE_WORDS = PAGE_SIZE // 8
_PART = 256 << 10  # bytes of a long write that the caches hold
_PRIVATE_ATTRIBUTE = int(layout.PRIVATE_ATTRIBUTE)

# What accept and populate do to the bytes of a page of each rank (four bits each).
KEEP_BYTES = 0
READ_AS_ZEROS = int(layout.KEYSTREAM) * 0x0111  # what isn't accepted yet becomes the key stream
ENCRYPT_BYTES = int(layout.XOR) * 0x0111
ACCEPTED_PLANES = Plane.ALLOCATED | Plane.ASSIGNED | Plane.ACCEPTED
EVERYTHING_BUT_PRIVATE = ACCEPTED_PLANES | Plane.PINNED | Plane.POISONED

# Planes that a page has and hasn't, to look for it with.
_PRIVATE = (Plane.PRIVATE, Plane.NONE)
_SHARED = (Plane.NONE, Plane.PRIVATE)
_SHARED_UNALLOCATED = (Plane.NONE, Plane.PRIVATE | Plane.ALLOCATED)


class Store:
    """Page state and bytes of one file.

    Parameters
    ----------
    n_pages : int
        Pages.
    backing : Backing
        Where the bytes live.
    private : bool
        The attribute of every page at creation.
    seed, file_index : int
        Where the file's key stream begins.
    tracking : int
        Result column in which assignment is counted.
    enforced : bool
        The host has a mapping of its own, in which private pages can't be touched.
    """

    def __init__(
        self,
        n_pages: int,
        backing: Backing,
        *,
        private: bool,
        seed: int,
        file_index: int,
        tracking: int,
        enforced: bool = False,
    ) -> None:
        self.n_pages = n_pages
        self.backing = backing
        self.host_view = HostView(backing, private=private) if enforced else None
        self.state = PageState(n_pages, private, seed, file_index, tracking)
        self.lock = threading.RLock()
        self.closed = False
        self._arrays = (self.state.header, self.state.words, self.state.lines, backing.words)
        self._request_bytes = bytearray(_REQUEST.size)
        self._result_bytes = bytearray(_RESULT.size)
        self._request = np.frombuffer(self._request_bytes, np.uint64).reshape(1, -1)
        self._result = np.frombuffer(self._result_bytes, np.uint64).reshape(1, -1)

    @property
    def has_bytes(self) -> bool:
        """Whether there are bytes behind the attributes."""
        return len(self.backing.words) > 0

    @property
    def counters(self) -> Counters:
        """Events since creation."""
        with self.lock:
            self.notice_writes(0, self.n_pages)
            totals = self.state.header[layout.TOTALS : layout.TOTALS + layout.COUNTERS]
            return Counters(*(int(figure) for figure in totals))

    # ---- conversion ----------------------------------------------------------------------------

    def convert_one(self, rules: Rules, request: tuple[int, ...]) -> tuple[int, ...]:
        """Run one request (six u64, see ``kernels.py``); returns the result row."""
        with self.lock:
            _REQUEST.pack_into(self._request_bytes, 0, *request)
            self._convert(rules, self._request, self._result)
            return _RESULT.unpack(self._result_bytes)

    def convert_many(self, rules: Rules, requests: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Run requests, shape (n, 6), in order under one lock; returns the result rows, shape (n, 12)."""
        results = np.empty((len(requests), layout.RESULT_COLUMNS), np.uint64)
        with self.lock:
            self._convert(rules, requests, results)
        return results

    def _convert(self, rules: Rules, requests: NDArray[np.uint64], results: NDArray[np.uint64]) -> None:
        if self.host_view is None and not (rules.allocating and self.backing.commits_late):
            load_kernels().convert(*self._arrays, rules.table, requests, results)
            return
        for i in range(len(requests)):
            self._convert_prepared(rules, requests[i : i + 1], results[i : i + 1])

    def _convert_prepared(
        self, rules: Rules, requests: NDArray[np.uint64], results: NDArray[np.uint64]
    ) -> None:
        """Run one request, taking the steps first that only the host can refuse."""
        convert, header = load_kernels().convert, self.state.header
        offset, size, attributes, flags = requests[0, :4].tolist()
        if not size or offset + size > self.n_pages * PAGE_SIZE or (offset | size) % PAGE_SIZE:
            convert(*self._arrays, rules.table, requests, results)
            return
        start, end = offset >> PAGE_SHIFT, (offset + size) >> PAGE_SHIFT
        private = bool(attributes & _PRIVATE_ATTRIBUTE)
        self.notice_writes(start, end)
        view = self.host_view
        if view is not None and self.find(start, end, *(_SHARED if private else _PRIVATE)) is None:
            view = None  # no page will change
        prepared = view is None or view.split(start, end)
        if prepared and (attributes, flags) in rules.allocating:
            prepared = self._is_promised(start, end)
        budget = header[layout.ALLOCATIONS_LEFT]
        if not prepared:
            header[layout.ALLOCATIONS_LEFT] = 0  # the kernel says so, after the checks that come first
        results[0, layout.REASON] = layout.NO_MEMORY  # until it has run
        try:
            convert(*self._arrays, rules.table, requests, results)
        finally:
            if not prepared:
                header[layout.ALLOCATIONS_LEFT] = budget
            if view is not None:
                if not results[0, layout.REASON]:
                    view.protect(start, end, private=private)
                view.join(start, end)

    def _is_promised(self, start: int, end: int) -> bool:
        try:
            self.promise(start, end)
        except OutOfMemoryError:
            return False
        return True

    def notice_writes(self, start: int, end: int) -> None:
        """Let pages of [start, end) exist that the host has written to through its own mapping.

        Nobody is told of such a write. But a page that doesn't exist holds zeros, so that one which the file
        has memory for, and which doesn't, has been written to. (A look at it leaves no trace.)
        """
        if self.host_view is None:
            return
        while start < end and (first := self.find(start, end, *_SHARED_UNALLOCATED)) is not None:
            ends = (self.find(first, end, plane) for plane in (Plane.PRIVATE, Plane.ALLOCATED))
            start = min((page for page in ends if page is not None), default=end)
            for low, high in self.host_view.existing(first, start):
                pages = self.backing.words[low * PAGE_WORDS : high * PAGE_WORDS].reshape(-1, PAGE_WORDS)
                for page in low + np.flatnonzero(pages.any(axis=1)):
                    self._apply(int(page), int(page) + 1, KEEP_BYTES, Plane.ALLOCATED, promised=True)

    def fail_allocations_after(self, n: int | None) -> None:
        """Let n more allocations of conversions succeed and the next fail; None: all succeed again."""
        with self.lock:
            self.state.header[layout.ALLOCATIONS_LEFT] = layout.NEVER if n is None else n

    # ---- page state ----------------------------------------------------------------------------

    def touch(self, start: int, end: int, *, promised: bool = False) -> Counters:
        """First use: the pages exist from now on. promised: memory for them is there already."""
        return self._apply(start, end, KEEP_BYTES, Plane.ALLOCATED, promised=promised)

    def assign(self, start: int, end: int) -> Counters:
        """A private guest access reached pages that the guest hasn't accepted."""
        return self._apply(start, end, KEEP_BYTES, Plane.ALLOCATED | Plane.ASSIGNED)

    def accept(self, start: int, end: int, operations: int, *, promised: bool = False) -> Counters:
        """Assign and accept, doing to bytes what the operations say for what isn't accepted yet."""
        return self._apply(start, end, operations, ACCEPTED_PLANES, promised=promised)

    def pin(self, start: int, end: int) -> Counters:
        """Take an unexpected reference on each page."""
        return self._apply(start, end, KEEP_BYTES, Plane.ALLOCATED | Plane.PINNED)

    def unpin(self, start: int, end: int) -> Counters:
        """Drop it again."""
        return self._apply(start, end, KEEP_BYTES, Plane.NONE, Plane.PINNED)

    def poison(self, start: int, end: int) -> Counters:
        """Let the memory of pages fail."""
        return self._apply(start, end, KEEP_BYTES, Plane.POISONED)

    def punch_hole(self, start: int, end: int) -> Counters:
        """Back to unallocated; only the attribute stays."""
        with self.lock:
            self.notice_writes(start, end)
            if self.has_bytes:
                self.backing.release(start << PAGE_SHIFT, (end - start) << PAGE_SHIFT)
            return self._apply(start, end, KEEP_BYTES, Plane.NONE, EVERYTHING_BUT_PRIVATE)

    def find(self, start: int, end: int, wanted: Plane, unwanted: Plane = Plane.NONE) -> int | None:
        """First page of [start, end) with all wanted planes and no unwanted one, or None."""
        with self.lock:
            page = self.state.find(start, end, wanted, unwanted)
        return page if page < end else None

    def _apply(
        self,
        start: int,
        end: int,
        operations: int,
        set_: Plane,
        clear: Plane = Plane.NONE,
        *,
        promised: bool = False,
    ) -> Counters:
        with self.lock:
            if set_ & Plane.ALLOCATED and not promised:
                self.promise(start, end)
            row = self.state.apply(self.backing.words, start, end, operations, int(set_), int(clear))
        return counters_of_row(row)

    def promise(self, start: int, end: int) -> None:
        """Make sure that pages which don't exist yet can come into being.

        Raises
        ------
        OutOfMemoryError
            ENOMEM: the host can't provide them; nothing was changed.
        """
        if self.backing.commits_late:
            first = self.find(start, end, Plane.NONE, Plane.ALLOCATED)
            if first is not None:
                self.backing.commit(first << PAGE_SHIFT, (end - first) << PAGE_SHIFT)

    # ---- bytes ---------------------------------------------------------------------------------

    def raw(self, offset: int, size: int) -> NDArray[np.uint8]:
        """DRAM of a byte range, a writable view: for the machine's checked copies alone."""
        return self.backing.words.view(np.uint8)[offset : offset + size]

    def read_guest_view(self, offset: int, size: int) -> NDArray[np.uint8]:
        """Copy a byte range as a guest with a key reads it: private pages through the key stream."""
        first_word, end_word = offset // 8, -(-(offset + size) // 8)
        words = self.backing.words[first_word:end_word].copy()
        self.state.xor_private(first_word, words)
        return words.view(np.uint8)[offset % 8 :][:size]

    def write_guest_view(self, offset: int, data: NDArray[np.uint8]) -> None:
        """Write a byte range as a guest with a key does.

        What is written goes through the key stream in a buffer of its words, a part at a time that the caches
        hold; what the words at the edges hold beside it is neither read nor written.
        """
        buffer = np.empty(min(len(data), _PART) // 8 + 2, np.uint64)
        for begin in range(0, len(data), _PART):
            part = data[begin : begin + _PART]
            first_word, lead = divmod(offset + begin, 8)
            within = buffer.view(np.uint8)[lead : lead + len(part)]
            within[:] = part
            self.state.xor_private(first_word, buffer[: -(-(lead + len(part)) // 8)])
            self.raw(offset + begin, len(part))[:] = within

    def memory(self) -> NDArray[np.uint8]:
        """DRAM of the whole file: a read-only view, shape (size,), without a copy."""
        return readonly(self.backing.words, np.dtype(np.uint8))

    def plane(self, name: str) -> NDArray[np.bool_]:
        """One plane as booleans, shape (n_pages,), a copy."""
        with self.lock:
            self.notice_writes(0, self.n_pages)
            return self.state.plane(name)

    def page_states(self) -> NDArray[Any]:
        """Page state as a read-only structured array, without a copy; see `PageState.records`."""
        with self.lock:
            self.notice_writes(0, self.n_pages)
            return self.state.records()

    def close(self) -> None:
        """Drop the bytes; views that others hold keep the memory alive."""
        with self.lock:
            self.closed = True
            self.host_view = None
            self.backing.close()
            self._arrays = (*self._arrays[:3], self.backing.words)
