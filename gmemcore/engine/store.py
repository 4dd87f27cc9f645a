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
from gmemcore.engine.jit import load_kernels
from gmemcore.engine.state import PageState, Plane, readonly
from gmemcore.errors import OutOfMemoryError
from gmemcore.uapi import PAGE_SHIFT, PAGE_SIZE

_REQUEST = struct.Struct(f"={layout.REQUEST_COLUMNS}Q")
_RESULT = struct.Struct(f"={layout.RESULT_COLUMNS}Q")

# What accept and populate do to the bytes of a page of each rank (four bits each).
KEEP_BYTES = 0
READ_AS_ZEROS = int(layout.KEYSTREAM) * 0x0111  # what isn't accepted yet becomes the key stream
ENCRYPT_BYTES = int(layout.XOR) * 0x0111
ACCEPTED_PLANES = Plane.ALLOCATED | Plane.ASSIGNED | Plane.ACCEPTED
EVERYTHING_BUT_PRIVATE = ACCEPTED_PLANES | Plane.PINNED | Plane.POISONED


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
    """

    def __init__(
        self, n_pages: int, backing: Backing, *, private: bool, seed: int, file_index: int, tracking: int
    ) -> None:
        self.n_pages = n_pages
        self.backing = backing
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
        convert = load_kernels().convert
        if not (rules.allocating and self.backing.commits_late):
            convert(*self._arrays, rules.table, requests, results)
            return
        header = self.state.header
        for i in range(len(requests)):
            budget = header[layout.ALLOCATIONS_LEFT]
            promised = self._promise_conversion(rules, requests[i])
            if not promised:
                header[layout.ALLOCATIONS_LEFT] = 0  # the kernel says so, after the checks that come first
            convert(*self._arrays, rules.table, requests[i : i + 1], results[i : i + 1])
            if not promised:
                header[layout.ALLOCATIONS_LEFT] = budget

    def _promise_conversion(self, rules: Rules, request: NDArray[np.uint64]) -> bool:
        """Commit memory for one conversion that allocates; whether what it may need is there."""
        offset, size, attributes, flags = request[:4].tolist()
        within = size > 0 and offset + size <= self.n_pages * PAGE_SIZE and not (offset | size) % PAGE_SIZE
        if not within or (attributes, flags) not in rules.allocating:
            return True
        try:
            self.promise(offset >> PAGE_SHIFT, (offset + size) >> PAGE_SHIFT)
        except OutOfMemoryError:
            return False
        return True

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
        first_word, words = self._guest_words(offset, size)
        return words.view(np.uint8)[offset - first_word * 8 :][:size]

    def write_guest_view(self, offset: int, data: NDArray[np.uint8]) -> None:
        """Write a byte range as a guest with a key does."""
        first_word, words = self._guest_words(offset, len(data))
        words.view(np.uint8)[offset - first_word * 8 :][: len(data)] = data
        self.state.xor_private(first_word, words)
        self.backing.words[first_word : first_word + len(words)] = words

    def _guest_words(self, offset: int, size: int) -> tuple[int, NDArray[np.uint64]]:
        """The whole words around a byte range, in clear, and the number of the first."""
        first_word = offset // 8
        words = self.backing.words[first_word : -(-(offset + size) // 8)].copy()
        self.state.xor_private(first_word, words)
        return first_word, words

    def memory(self) -> NDArray[np.uint8]:
        """DRAM of the whole file: a read-only view, shape (size,), without a copy."""
        return readonly(self.backing.words, np.dtype(np.uint8))

    def page_states(self) -> NDArray[Any]:
        """Page state as a read-only structured array, without a copy; see `PageState.records`."""
        with self.lock:
            return self.state.records()

    def close(self) -> None:
        """Drop the bytes; views that others hold keep the memory alive."""
        with self.lock:
            self.closed = True
            self.backing.close()
            self._arrays = (*self._arrays[:3], self.backing.words)
