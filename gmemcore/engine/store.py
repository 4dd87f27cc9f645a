"""Store: page state, bytes and the lock of one file, kept together.

The only writer of page state and of guest bytes. A guest_memfd is one store; the ordinary host memory beside
it in `legacy` is another. Every method takes the lock itself; `lock` is public (and re-entrant) for callers
that must look and then act.
"""

import struct
import threading
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gmemcore.engine import kernels as layout
from gmemcore.engine.backing import Backing
from gmemcore.engine.conversion import RESULT, BatchResult, Rules
from gmemcore.engine.counters import Counters, counters_of_row
from gmemcore.engine.host_view import HostView
from gmemcore.engine.jit import load_kernels
from gmemcore.engine.parts import LEAST_PART, in_parts
from gmemcore.engine.state import MappableBlocks, PageState, Plane, fields_of, readonly
from gmemcore.engine.steps import (
    ACCEPTED_PLANES,
    EVERYTHING_BUT_PRIVATE,
    KEEP_BYTES,
    NEVER_ALLOCATE,
    Step,
)
from gmemcore.errors import OutOfMemoryError
from gmemcore.uapi import PAGE_SHIFT, PAGE_SIZE

_REQUEST = struct.Struct("=6Q")  # offset, size, attributes, flags, error_offset, reserved words
_NOTHING_YET = bytes(RESULT.size)
_U0, _REASON, _ERROR_OFFSET = np.uint64(0), int(layout.REASON), int(layout.ERROR_OFFSET)
_CONVERSION: NDArray[np.uint64] = np.zeros(1, np.uint64)
_NO_INPUTS: NDArray[np.uint64] = np.zeros(2, np.uint64)

PAGE_WORDS = PAGE_SIZE // 8
_PART = 256 << 10  # bytes of a long write that the caches hold
_PRIVATE_ATTRIBUTE = int(layout.PRIVATE_ATTRIBUTE)


class Requests(NamedTuple):
    """Requests as kernels take them: uint64 columns; steps, attributes, flags may be one number for all."""

    steps: NDArray[np.uint64]
    offsets: NDArray[np.uint64]
    sizes: NDArray[np.uint64]
    attributes: NDArray[np.uint64]
    flags: NDArray[np.uint64]

    def one(self, i: int) -> "Requests":
        """Request i alone, without a copy."""
        return Requests(*(column[i : i + 1] if len(column) > 1 else column for column in self))

    def numbers(self) -> tuple[int, ...]:
        """The numbers of the first request."""
        return tuple(int(column[0]) for column in self)


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
        Row of a result in which assignment is counted.
    threads : int
        Threads that transform the bytes of a long range.
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
        threads: int = 1,
    ) -> None:
        self.n_pages = n_pages
        self.backing = backing
        self.host_view = HostView(backing, private=private) if enforced else None
        self.state = PageState(n_pages, private, seed, file_index, tracking)
        self.lock = threading.RLock()
        self.closed = False
        self.threads = threads
        self.state.header[layout.LINES_ALIGNED] = backing.words.ctypes.data % 64 == 0
        self._arrays = (self.state.header, self.state.words, self.state.lines, backing.words)
        self._request_bytes = bytearray(_REQUEST.size)
        self._result_bytes = bytearray(RESULT.size)
        request = np.frombuffer(self._request_bytes, np.uint64)
        self._request = Requests(_CONVERSION, *(request[i : i + 1] for i in range(4)))
        self._inputs = request[4:]
        self._result = np.frombuffer(self._result_bytes, np.uint64).reshape(-1, 1)
        self._prepared_for: Rules | None = None

    @property
    def has_bytes(self) -> bool:
        """Whether there are bytes behind the attributes."""
        return len(self.backing.words) > 0

    @property
    def counters(self) -> Counters:
        """Events since creation."""
        with self.lock:
            self.notice_writes(0, self.n_pages)
            return self._totals()

    def _totals(self) -> Counters:
        return Counters(*self.state.header[layout.TOTALS : layout.TOTALS + layout.COUNTERS].tolist())

    # ---- requests ------------------------------------------------------------------------------

    def convert_one(self, rules: Rules, request: tuple[int, ...]) -> bytes:
        """Run one conversion, for a caller who holds the lock.

        Parameters
        ----------
        request : tuple of int
            Six u64: offset, size, attributes, flags, error_offset, reserved words.

        Returns
        -------
        bytes
            The result, see `conversion.RESULT`.
        """
        _REQUEST.pack_into(self._request_bytes, 0, *request)
        self._result_bytes[:] = _NOTHING_YET
        if self._prepared_for is not rules:
            self._prepare_single(rules)
        if self._runs_apart:
            self.notice_writes(*self._pages(*request[:2]))
            self._run_apart(rules, self._request, self._inputs, self._result)
        else:
            load_kernels().run(*self._prepared)
        return bytes(self._result_bytes)

    def _prepare_single(self, rules: Rules) -> None:
        """Put together what single conversions hand over: doing it each time takes a tenth of a short one."""
        self._prepared = (*self._arrays, rules.table, *self._request, self._inputs, self._result)
        self._runs_apart = (
            self.host_view is not None
            or self.threads > 1
            or (self.backing.commits_late and bool(rules.allocating))
        )
        self._prepared_for = rules

    def run_many(self, rules: Rules, requests: Requests) -> BatchResult:
        """Run requests in order under one lock."""
        n = len(requests.offsets)
        results: NDArray[np.uint64] = np.zeros((layout.RESULT_ROWS, n), np.uint64)
        with self.lock:
            if self.host_view is not None:
                for offset, size in zip(requests.offsets.tolist(), requests.sizes.tolist(), strict=True):
                    self.notice_writes(*self._pages(offset, size))
            before = self._totals()
            if self._apart(rules, requests):
                for i in range(n):
                    result = np.zeros((layout.RESULT_ROWS, 1), np.uint64)
                    self._run_apart(rules, requests.one(i), _NO_INPUTS, result)
                    results[:, i] = result[:, 0]
            else:
                load_kernels().run(*self._arrays, rules.table, *requests, _NO_INPUTS, results)
            return BatchResult(results, self._totals() - before)

    def _pages(self, offset: int, size: int) -> tuple[int, int]:
        """First and end page of a byte range, as far as the file reaches."""
        return offset >> PAGE_SHIFT, min(-(-(offset + size) // PAGE_SIZE), self.n_pages)

    def _apart(self, rules: Rules, requests: Requests) -> bool:
        """Whether requests need something done around them that kernels can't do."""
        return bool(
            self.host_view is not None
            or (self.backing.commits_late and (rules.allocating or requests.steps.any()))
            or (self.threads > 1 and (requests.sizes >= 2 * LEAST_PART * PAGE_SIZE).any())
            or (self.has_bytes and (requests.steps == Step.PUNCH_HOLE).any())
        )

    def _run_apart(
        self, rules: Rules, request: Requests, inputs: NDArray[np.uint64], result: NDArray[np.uint64]
    ) -> None:
        """Run one request, taking the steps first that only the host can refuse, and then those it can't."""
        step, offset, size, attributes, flags = request.numbers()
        start, end = self._pages(offset, size)
        if start >= end:
            load_kernels().run(*self._arrays, rules.table, *request, inputs, result)
            return
        if step == Step.CONVERT:
            view = self._view_to_change(start, end, attributes)
            prepared = view is None or view.split(start, end)
            if prepared and (attributes, flags) in rules.allocating:
                prepared = self._is_promised(start, end)
            try:
                self._convert(rules, request, inputs, result, view, prepared)
            finally:
                if view is not None:
                    view.join(start, end)
        elif self._is_step_promised(rules, request):
            load_kernels().run(*self._arrays, rules.table, *request, inputs, result)
        else:
            result[_REASON], result[_ERROR_OFFSET] = layout.NO_MEMORY, offset
        if step == Step.PUNCH_HOLE and self.has_bytes and not result[_REASON]:
            self.backing.release(offset, (end << PAGE_SHIFT) - offset)

    def _view_to_change(self, start: int, end: int, attributes: int) -> HostView | None:
        """The host's own view, if a conversion will change what it may touch."""
        changes = _SHARED if attributes & _PRIVATE_ATTRIBUTE else _PRIVATE
        if self.host_view is None or self.find(start, end, *changes) is None:
            return None
        return self.host_view

    def _is_step_promised(self, rules: Rules, request: Requests) -> bool:
        """Promise the pages that a step will bring into being; what refuses it comes first."""
        step, offset, size, _, variant = (column[0] for column in request)
        if not self.backing.commits_late or int(step) in NEVER_ALLOCATE:
            return True
        if step >= layout.STEP_COUNT or variant >= layout.STEP_VARIANTS:
            return True  # and the kernel refuses it
        kernels, state = load_kernels(), self._arrays[:3]
        found: NDArray[np.uint64] = np.zeros((layout.RESULT_ROWS, 1), np.uint64)
        row = np.uint64(kernels.row_of(step, variant))
        start = int(offset) >> PAGE_SHIFT
        end, refused, mark = map(int, kernels.check_step(*state, rules.table, row, offset, size, found, _U0))
        if (
            mark & layout.ALLOCATED_FIELD
        ):  # the page that refuses is allocated, and only it unless some is done
            start, end = (start if start < end else refused), refused + 1
        return start >= end or self._is_promised(start, end)

    def _is_promised(self, start: int, end: int) -> bool:
        try:
            self.promise(start, end)
        except OutOfMemoryError:
            return False
        return True

    def _convert(
        self,
        rules: Rules,
        request: Requests,
        inputs: NDArray[np.uint64],
        result: NDArray[np.uint64],
        view: HostView | None,
        prepared: bool,
    ) -> None:
        """One conversion in the three steps of ``kernels.convert``, the second on several threads.

        The host's own view is closed before bytes change, and opened when they have.
        """
        kernels, table, state = load_kernels(), rules.table, self._arrays[:3]
        offset, size, attributes, flags = (column[0] for column in request[1:])
        budget = self.state.header[layout.ALLOCATIONS_LEFT]
        if not prepared:
            self.state.header[layout.ALLOCATIONS_LEFT] = 0  # the kernel says so, after the checks before it
        may = kernels.check_conversion(*state, table, offset, size, attributes, flags, inputs, result, _U0)
        if not prepared:
            self.state.header[layout.ALLOCATIONS_LEFT] = budget
        if not may:
            return
        # ---- point of no return: nothing below may fail ----
        cell = np.uint64(kernels.cell_of(attributes, flags))
        start, end = int(offset) >> PAGE_SHIFT, int(offset + size) >> PAGE_SHIFT
        to_private = bool(int(attributes) & _PRIVATE_ATTRIBUTE)
        if view is not None and to_private:
            view.protect(start, end, private=True)
        operations = table[cell + layout.OPERATIONS]
        if operations:
            result += self._transform(operations, start, end)
        kernels.finish_conversion(*state, table, cell, np.uint64(start), np.uint64(end), result, _U0)
        if view is not None and not to_private:
            view.protect(start, end, private=False)

    def _transform(self, operations: np.uint64, start: int, end: int) -> NDArray[np.uint64]:
        """Operate on the bytes of each page by its rank, on all threads; what that counted."""
        transform = load_kernels().transform

        def work(low: int, high: int, result: NDArray[np.uint64]) -> None:
            transform(*self._arrays, operations, np.uint64(low), np.uint64(high), result, _U0)

        return in_parts(work, start, end, self.threads)

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
                edges = low + np.flatnonzero(np.diff(pages.any(axis=1), prepend=False, append=False))
                for written, stop in edges.reshape(-1, 2).tolist():
                    self._apply(written, stop, KEEP_BYTES, Plane.ALLOCATED, promised=True)

    def fail_allocations_after(self, n: int | None) -> None:
        """Let n more allocations of conversions succeed and the next fail; None: all succeed again."""
        with self.lock:
            self.state.header[layout.ALLOCATIONS_LEFT] = layout.NEVER if n is None else n

    # ---- page state ----------------------------------------------------------------------------

    def touch(self, start: int, end: int, *, promised: bool = False) -> Counters:
        """First use: the pages exist from now on. promised: memory for them is there already."""
        return self._apply(start, end, KEEP_BYTES, Plane.ALLOCATED, promised=promised)

    def unassign(self, start: int, end: int, operations: int) -> Counters:
        """Take pages out of the table that assigns them, doing to bytes what the operations say by rank."""
        return self._apply(start, end, operations, Plane.NONE, Plane.ASSIGNED | Plane.ACCEPTED)

    def mark(self, page: int, planes: Plane) -> Counters:
        """Leave a page that refused a step with the planes of the term that it matched."""
        return self._apply(page, page + 1, KEEP_BYTES, planes)

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

    def count(self, wanted: Plane, unwanted: Plane = Plane.NONE) -> int:
        """How many pages have all wanted planes and no unwanted one."""
        with self.lock:
            self.notice_writes(0, self.n_pages)
            return self.state.count(0, self.n_pages, wanted, unwanted)

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
            kernels = load_kernels()
            result: NDArray[np.uint64] = np.zeros((layout.RESULT_ROWS, 1), np.uint64)
            if operations and self.threads > 1:
                result += self._transform(np.uint64(operations), start, end)
                kernels.total_bytes(self.state.header, result, _U0)
                operations = KEEP_BYTES
            numbers = (start, end, operations, fields_of(set_), fields_of(clear))
            kernels.apply(*self._arrays, *map(np.uint64, numbers), result)
        return counters_of_row(result[:, 0].tolist())

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

    def mappable_blocks(self) -> MappableBlocks:
        """Blocks that have one attribute."""
        with self.lock:
            return self.state.mappable_blocks()

    def run_ends(self, name: str) -> NDArray[np.uint64]:
        """End page of each run of one plane; see `PageState.runs`."""
        with self.lock:
            self.notice_writes(0, self.n_pages)
            return self.state.runs(name)

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
            self._prepared_for = None
