"""Store: page state and bytes of one file, and the operations on it.

Only stores and owners write page state and guest bytes. A guest_memfd is a store; in `legacy`, the ordinary
host memory next to it is another one. Each method makes one kernel call, which takes the file's lock.
"""

import ctypes
import struct
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gmemcore.engine import kernels as layout
from gmemcore.engine.arguments import as_u64s
from gmemcore.engine.backing import MADV_POPULATE_WRITE, Backing, host_memory
from gmemcore.engine.call import RESULT, SHORT, Call, address_of, idle, new_bytes, take_call
from gmemcore.engine.counters import Counters
from gmemcore.engine.headers import FILES, Header, new_words
from gmemcore.engine.host import available_memory
from gmemcore.engine.host_view import HostView
from gmemcore.engine.jit import callback_address, is_compiled
from gmemcore.engine.owner import Owner
from gmemcore.engine.packed import PLANE_NAMES, totals
from gmemcore.engine.refusals import raise_conversion, raise_for_file, raise_step
from gmemcore.engine.results import BatchResult, ConversionResult, counters_of
from gmemcore.engine.state import (
    Blocks,
    ContentState,
    MappableBlocks,
    PageState,
    Plane,
    Survey,
    fields_of,
    readonly,
    survey_of,
)
from gmemcore.engine.steps import Step
from gmemcore.errors import OutOfMemoryError, UnsupportedOperationError
from gmemcore.uapi import PAGE_SHIFT

_CONVERSION: Final = struct.Struct("=7Q")
"""Words 1 to 7 of a call: file, offset, size, attributes, flags, error_offset, reserved."""
_STEP: Final = struct.Struct("=9Q")
"""The same, then step and data."""
_AT: Final = 8 * int(layout.FILE)
_BLOCK_PAGES: Final = int(layout.BLOCK_PAGES)
_MANY_RUNS: Final = 1 << 21
"""Runs that there is room for at first: 16 MiB, which the allocator has without page faults."""
_FIELDS: Final = ("offset", "size", "attributes", "flags", "error_offset", "reserved")
_REASON_AND_OFFSET: Final = struct.Struct("=2Q")


class Requests(NamedTuple):
    """Requests as kernels read them: columns; steps, attributes and flags can be one number for all."""

    steps: NDArray[np.uint64]
    offsets: NDArray[np.uint64]
    sizes: NDArray[np.uint64]
    attributes: NDArray[np.uint64]
    flags: NDArray[np.uint64]


class Store:
    """Page state and bytes of one file.

    Parameters
    ----------
    n_pages : int
        Pages.
    backing : Backing
        Its memory.
    owner : Owner
        The guest that it belongs to.
    private : bool
        The attribute of every page at creation.
    tracking : int
        The row of a result that counts assignment.
    seed, file_index : int
        Start of the file's key stream.
    threads : int
        Number of threads for long ranges.
    page_order : int
        Order of its huge pages; 0: it has none.
    enforced : bool
        The host has its own mapping, in which private pages are inaccessible.
    deferred : bool
        Operations on bytes are kept as page state until somebody needs the bytes.
    """

    def __init__(
        self,
        n_pages: int,
        backing: Backing,
        owner: Owner,
        *,
        private: bool,
        tracking: int,
        seed: int = 0,
        file_index: int = 0,
        enforced: bool = False,
        threads: int = 1,
        page_order: int = 0,
        deferred: bool = False,
    ) -> None:
        self.n_pages = n_pages
        self.page_order = page_order
        self.backing = backing
        self.owner = owner
        self.has_bytes = len(backing.words) > 0
        self.host_view = HostView(backing, private=private) if enforced else None
        self.state = PageState(n_pages, private=private)
        self.header = Header(int(layout.HEADER_SLOTS), FILES)
        self.address = self.header.address
        header, words = self.header, backing.words
        header[layout.SELF] = self.address
        header[layout.N_PAGES] = n_pages
        header[layout.WORDS] = self.state.words.ctypes.data
        header[layout.LINES] = self.state.lines.ctypes.data
        header[layout.MEMORY] = words.ctypes.data
        header[layout.MEMORY_WORDS] = len(words)
        header[layout.MEMORY_ALIGNED] = words.ctypes.data % 64 == 0
        header[layout.OWNER] = owner.header.address
        header[layout.SEED] = seed
        header[layout.ALLOCATIONS_LEFT] = header[layout.HOST_STEPS_LEFT] = int(layout.NEVER)
        header[layout.TRACKING] = tracking
        header[layout.COMMIT], header[layout.RELEASE] = backing.memory
        header[layout.DESCRIPTOR] = int(layout.NEVER)
        self._set_host_view()
        self._set_threads(threads)
        self._set_folios()
        header[layout.HOST_WORK] = self.host_view is not None or header[layout.COMMIT] != 0 or deferred
        self._set_deferred(deferred)
        self.number(file_index)

    def _set_host_view(self) -> None:
        if self.host_view is not None:
            self._resident, self.header[layout.RESIDENT] = new_words(int(layout.RESIDENT_PAGES) // 8)
            self.header[layout.HOST_VIEW] = self.host_view.address
            if self.host_view.descriptor is not None:
                self.header[layout.DESCRIPTOR] = self.host_view.descriptor

    def _set_threads(self, threads: int) -> None:
        threads = threads if is_compiled() else 1  # plain Python gains nothing from threads
        self.header[layout.THREADS] = threads
        if threads > 1:
            self._tasks, self.header[layout.TASKS] = new_words(threads * int(layout.TASK_WORDS))
            self.header[layout.PART] = callback_address("transform_part")

    def _set_folios(self) -> None:
        if self.page_order:
            self._folios, self.header[layout.FOLIOS] = new_words(self.n_pages >> self.page_order)
            self.header[layout.ORDER] = self.page_order

    def _set_deferred(self, deferred: bool) -> None:
        self.contents = ContentState(self.n_pages) if deferred else None
        lines = self.state.lines if self.contents is None else self.contents.lines
        self.header[layout.DEFERRED_LINES] = lines.ctypes.data  # always an address that can be prefetched
        self._views: dict[int, tuple[_View, _View]] = {}
        if self.contents is not None:
            self.header[layout.DEFERRED] = self.contents.marks.ctypes.data
            self.header[layout.STORE] = MADV_POPULATE_WRITE
            self.header[layout.MOST_STORED] = host_memory() >> PAGE_SHIFT
            self.header[layout.COMMIT] = 0  # an allocated page takes no memory

    def number(self, file_index: int) -> None:
        """Set the index of the file among its owner's, which selects its part of the key stream."""
        self.header[layout.FIRST_WORD] = (file_index << 40) * int(layout.PAGE_WORDS) & (1 << 64) - 1

    @property
    def closed(self) -> bool:
        """Whether it is closed."""
        return bool(self.header[layout.IS_CLOSED])

    # ---- conversions and steps -------------------------------------------------------------------

    def convert(
        self, offset: Any, size: Any, attributes: Any, flags: Any, error_offset: int = 0, reserved: int = 0
    ) -> ConversionResult:
        """Convert a range in place: see `GuestMemfd.set_memory_attributes`.

        Raises
        ------
        GmemError
            The refusal.
        TypeError, InvalidArgumentError
            An argument isn't an unsigned 64-bit integer.
        """
        if (
            type(offset) is not int
            or type(size) is not int
            or type(attributes) is not int
            or type(flags) is not int
            or type(error_offset) is not int
            or type(reserved) is not int
        ):
            request = as_u64s((offset, size, attributes, flags, error_offset, reserved), _FIELDS)
            offset, size, attributes, flags, error_offset, reserved = request
        try:
            call = idle.pop()
        except IndexError:
            call = Call()
        try:
            _CONVERSION.pack_into(
                call.raw, _AT, self.address, offset, size, attributes, flags, error_offset, reserved
            )
        except struct.error:
            as_u64s((offset, size, attributes, flags, error_offset, reserved), _FIELDS)
            raise
        reason = layout.convert_one(call.words)
        result = call.raw[RESULT]
        if reason:
            rules = self.owner.rules_in(call[layout.PHASE_SEEN])
            _, error_offset = _REASON_AND_OFFSET.unpack_from(result)
            request = offset, size, attributes, flags
            raise_conversion(rules, self.n_pages << PAGE_SHIFT, request, reason, error_offset)
        idle.append(call)
        return ConversionResult(result)

    def take(self, step: Step, offset: int, size: int) -> Counters:
        """Take one step other than a conversion, without data.

        Raises
        ------
        GmemError
            The refusal.
        """
        call = self._call(offset, size, step=step)
        result = self._taken(call, step, offset, size)
        idle.append(call)
        return counters_of(result)

    def repeat(self, step: Step, ranges: tuple[NDArray[np.uint64], NDArray[np.uint64]]) -> int:
        """Take a step for each range, in one kernel call; see `Owner.repeat`."""
        call = self._call(step=step)
        done = int(layout.repeat(call.words, layout.CALL_OF_FILE, *ranges, np.zeros_like(ranges[0])))
        idle.append(call)
        return done

    def read(self, offset: int, size: int) -> bytes:
        """Read as the host does; see `take`."""
        call = take_call()
        data, address = b"", call.data
        if SHORT < size <= (self.n_pages << PAGE_SHIFT) - offset:
            data, address = new_bytes(size)
        self._fill(call, offset, size, step=Step.HOST_READ, data=address)
        self._taken(call, Step.HOST_READ, offset, size)
        data = data or call.short_data(size)
        idle.append(call)
        return data

    def write(self, offset: int, data: NDArray[np.uint8]) -> None:
        """Write as the host does; see `take`."""
        size, call = len(data), take_call()
        address = call.put_data(data) if size <= SHORT else address_of(data)
        self._fill(call, offset, size, step=Step.HOST_WRITE, data=address)
        self._taken(call, Step.HOST_WRITE, offset, size)
        idle.append(call)

    def _taken(self, call: Call, step: Step, offset: int, size: int) -> bytearray:
        """Take a step; return its result, or raise if it is refused."""
        reason = layout.take_one(call.words)
        result = call.raw[RESULT]
        if reason:
            _, at = _REASON_AND_OFFSET.unpack_from(result)
            where = offset, size, reason, at, call[layout.ANSWER]
            sizes = self.n_pages << PAGE_SHIFT, 1 << PAGE_SHIFT + self.page_order
            raise_step(self.owner.rules, step, *where, *sizes)
        return result

    def run(self, requests: Requests) -> BatchResult:
        """Take requests in order, in one kernel call.

        Raises
        ------
        BadFileError, UnknownIoctlError
            The file can't take any request.
        """
        results: NDArray[np.uint64] = np.zeros((layout.RESULT_ROWS, len(requests.offsets)), np.uint64)
        call = self._call()
        reason = layout.run(call.words, *requests, results)
        raise_for_file(reason)
        faults = Counters(memory_faults=call[layout.FAULTS_SEEN])
        total = counters_of(call.raw[RESULT]) + faults
        idle.append(call)
        return BatchResult(results, total)

    def _call(
        self, offset: int = 0, size: int = 0, planes: int = 0, unwanted: int = 0, step: int = 0
    ) -> Call:
        call = take_call()
        self._fill(call, offset, size, planes, unwanted, step)
        return call

    def _fill(
        self,
        call: Call,
        offset: int,
        size: int,
        planes: int = 0,
        unwanted: int = 0,
        step: int = 0,
        data: int = 0,
    ) -> None:
        _STEP.pack_into(call.raw, _AT, self.address, offset, size, planes, unwanted, 0, 0, step, data)

    def fail_allocations_after(self, n: int | None) -> None:
        """Let the next n allocations of conversions succeed and the one after fail; None: none fails."""
        raise_for_file(layout.CLOSED_FILE if self.closed else 0)
        self.header[layout.ALLOCATIONS_LEFT] = int(layout.NEVER) if n is None else n

    # ---- page state ------------------------------------------------------------------------------

    @property
    def counters(self) -> Counters:
        """Events since creation."""
        call = self._call()
        layout.count_events(call.words)
        counters = counters_of(call.raw[RESULT])
        idle.append(call)
        return counters

    def _check(self, kernel: Any, call: Call, *more: Any) -> int:
        """Call a kernel that reads page state; return its answer."""
        raise_for_file(kernel(call.words, *more))
        answer = call[layout.ANSWER]
        idle.append(call)
        return answer

    def find(self, start: int, end: int, wanted: Plane, unwanted: Plane = Plane.NONE) -> int | None:
        """Return the first page of [start, end) with all wanted planes and no unwanted one, or None."""
        call = self._call(start, end, fields_of(wanted), fields_of(unwanted))
        page = self._check(layout.find, call)
        return page if page < end else None

    def count(self, wanted: Plane, unwanted: Plane = Plane.NONE) -> int:
        """Count the pages with all wanted planes and no unwanted one."""
        call = self._call(0, self.n_pages, fields_of(wanted), fields_of(unwanted))
        return self._check(layout.count, call)

    def survey(self) -> Survey:
        """Hash, count and check all page state in one pass."""
        out = np.zeros(layout.SURVEY_SLOTS, np.uint64)
        return survey_of(self._check(layout.survey, self._call(), out), out)

    def mappable_blocks(self) -> MappableBlocks:
        """Count the blocks of 2 MiB and of 1 GiB that have one attribute."""
        both = self._check(layout.count_mappable, self._call())
        return MappableBlocks(both & 0xFFFF_FFFF_FFFF, both >> 48)

    def folios(self) -> NDArray[np.uint8]:
        """Copy the state of each huge page, shape (n_pages >> page_order,); empty without huge pages."""
        states: NDArray[np.uint8] = np.zeros(
            self.n_pages >> self.page_order if self.page_order else 0, np.uint8
        )
        self._check(layout.copy_folios, self._call(), states)
        return states

    def runs(self, plane: str = "private") -> tuple[NDArray[np.uint64], bool]:
        """Return the end page of each maximal run of one plane, and whether the first run is in it."""
        call = self._call(planes=PLANE_NAMES.index(plane))
        ends, scratch = np.empty(0, np.uint64), np.empty(layout.RUNS_SCRATCH, np.uint64)
        while (reason := layout.copy_runs(call.words, ends, scratch)) == layout.NO_ROOM:
            enough = call[layout.ANSWER]  # an upper bound: untouched memory costs nothing
            ends = np.empty(enough if len(ends) else min(enough, _MANY_RUNS), np.uint64)
        raise_for_file(reason)
        n_runs, is_first_in = call[layout.ANSWER], bool(call[layout.MORE])
        idle.append(call)
        return ends[:n_runs] if 2 * n_runs > len(ends) else ends[:n_runs].copy(), is_first_in

    def bitmap(self, plane: str) -> NDArray[np.uint64]:
        """Copy one plane as a bitmap, shape (ceil(n_pages / 64),): bit i of word w is page 64·w + i."""
        rows = np.empty(-(-self.n_pages // 64), np.uint64)
        self._check(layout.copy_plane, self._call(planes=PLANE_NAMES.index(plane)), rows)
        return rows

    def plane(self, plane: str) -> NDArray[np.bool_]:
        """Copy one plane as booleans, shape (n_pages,)."""
        bits = np.unpackbits(self.bitmap(plane).view(np.uint8), count=self.n_pages, bitorder="little")
        return bits.view(np.bool_)

    def blocks(self, start: int, end: int) -> Blocks:
        """Copy the state of the blocks that contain pages [start, end)."""
        first, last = start // _BLOCK_PAGES, -(-end // _BLOCK_PAGES)
        words = np.empty(last - first, np.uint64)
        lines = np.empty((len(PLANE_NAMES), 8 * (last - first)), np.uint64)
        self._check(layout.copy_blocks, self._call(first), words, lines)
        return Blocks(self.n_pages, first, words, lines)

    def planes_of(self, pages: Sequence[int]) -> NDArray[np.uint8]:
        """Return the `Plane` bits of each of some pages, shape (n,)."""
        copies: dict[int, Blocks] = {}
        for page in pages:
            if page // _BLOCK_PAGES not in copies:
                copies[page // _BLOCK_PAGES] = self.blocks(page, page + 1)
        return np.array([copies[page // _BLOCK_PAGES].planes_of(page) for page in pages], np.uint8)

    def totals(self) -> dict[str, int]:
        """Count the pages of each plane."""
        words = np.empty(-(-self.n_pages // _BLOCK_PAGES), np.uint64)
        self._check(layout.copy_blocks, self._call(), words, np.empty((len(PLANE_NAMES), 0), np.uint64))
        return totals(words)

    def records(self) -> NDArray[Any]:
        """Return all bitmaps as one read-only record, which is kept up to date from now on.

        Raises
        ------
        UnsupportedOperationError
            EOPNOTSUPP: a NumPy record is smaller than 2 GiB, which is the page state of 10 TiB.
        """
        lines = self.state.lines
        if lines.nbytes >= 1 << 31:
            raise UnsupportedOperationError(
                f"page state of {self.n_pages:,} pages fits no NumPy record; use plane() or packed_state()"
            )
        self._check(layout.keep_lines, self._call())
        return readonly(lines, np.dtype([(name, "<u8", lines.shape[1:]) for name in PLANE_NAMES]))

    # ---- bytes -----------------------------------------------------------------------------------

    def memory(self) -> NDArray[np.uint8]:
        """Return the DRAM of the whole file as a read-only view, shape (size,), up to date while it exists.

        Raises
        ------
        BadFileError
            EBADF: the file is closed.
        OutOfMemoryError
            ENOMEM: see `materialise`.
        """
        if self.contents is None:
            return readonly(self.backing.words, np.dtype(np.uint8))
        view = self._shared_view()
        if not self.header[layout.VIEWED]:
            self.materialise(0, self.n_pages << PAGE_SHIFT, layout.KEEPS_VIEW)
        return view

    def _shared_view(self) -> NDArray[np.uint8]:
        """Return the one raw view that all callers share.

        Its end is noted by C code alone, because a signal handler can interrupt a finalizer in Python.
        """
        forget = partial(self._views.pop, 0)  # the dead reference is its second argument, the default
        clear = partial(_clear, self.header.slot(layout.VIEWED), 0, 8)
        view = None
        while view is None:
            made = readonly(self.backing.words, np.dtype(np.uint8))
            # The later reference is called first. Those of a view that comes too late are gone before it is.
            known = self._views.setdefault(0, (weakref.ref(made, forget), weakref.ref(made, clear)))
            view = known[0]()
        return view

    def materialise(self, offset: int, size: int, view: int = 0) -> None:
        """Do what is due on the bytes of a range of whole pages.

        Parameters
        ----------
        view : int
            `kernels.KEEPS_VIEW` if the caller has a raw view, `kernels.WRITES_VIEW` if it will have one to
            write.

        Raises
        ------
        BadFileError
            EBADF: the file is closed.
        OutOfMemoryError
            ENOMEM: the host has too little memory; no byte was changed.
        """
        available = available_memory()
        call = self._call(offset, size, unwanted=view)
        call.words[layout.MOST] = int(layout.NEVER) if available is None else available >> PAGE_SHIFT
        reason = layout.bring_up_to_date(call.words)
        raise_for_file(reason)
        if reason:
            raise OutOfMemoryError(
                f"deferred contents of {offset:#x}+{size:#x} need {call[layout.ANSWER] << PAGE_SHIFT:#x} "
                "bytes of memory, which the host doesn't have; no byte was changed"
            )
        idle.append(call)

    def stop_deferring(self) -> None:
        """Bring all bytes up to date, and apply operations to them at once from now on; see `materialise`."""
        if self.header[layout.DEFERRED]:
            self.materialise(0, self.n_pages << PAGE_SHIFT, layout.WRITES_VIEW)

    @property
    def stored_pages(self) -> int:
        """The number of pages that take host memory: with deferred contents, those that were written."""
        if self.header[layout.DEFERRED]:
            return self.header[layout.PAGES_STORED]
        return self.count(Plane.ALLOCATED) if self.has_bytes else 0

    def dram(self, offset: int, size: int) -> bytes:
        """Copy the DRAM of a range inside the file, without changing anything; see `memory`."""
        data, address = new_bytes(size)
        call = self._call(offset, size)
        call.words[layout.DATA] = address
        raise_for_file(layout.copy_dram(call.words))
        idle.append(call)
        return data

    def sum_contents(self) -> int:
        """Hash all contents into 64 bits, without changing anything; equal contents have equal hashes."""
        return self._check(layout.sum_contents, self._call()) if self.has_bytes else 0

    def drop_memory(self) -> None:
        """Release the memory of a closed store; existing views keep it alive."""
        self.host_view = None
        self.state = _NO_STATE
        self.contents = None
        self.backing.close()


_View = weakref.ref[NDArray[np.uint8]]
_clear: Final = ctypes.PYFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t, ctypes.py_object)(
    ("memset", ctypes.pythonapi)
)
"""memset as the callback of a weak reference, which is the argument that it ignores."""

_NO_STATE: Final = PageState(1, private=False)
