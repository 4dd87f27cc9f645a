"""GuestMemfd: one file of guest memory, as its file descriptor shows it to the host."""

from collections.abc import Sequence
from functools import reduce
from itertools import pairwise
from operator import or_
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from gmemcore.engine.arguments import as_int, as_u64, as_u64_array, as_u64s, check_aligned
from gmemcore.engine.counters import Counters
from gmemcore.engine.owner import Owner
from gmemcore.engine.packed import PLANE_NAMES, PackedState
from gmemcore.engine.results import BatchResult, ConversionResult
from gmemcore.engine.state import MappableBlocks, Plane, Survey
from gmemcore.engine.steps import Step
from gmemcore.engine.store import Requests, Store
from gmemcore.errors import (
    BadAddressError,
    BadFileError,
    FileTooLargeError,
    InvalidArgumentError,
    NoBytesError,
    NotMappableError,
    UnsupportedOperationError,
)
from gmemcore.html import facts, table
from gmemcore.machine.access import Data, as_bytes
from gmemcore.machine.layouts import Sides
from gmemcore.policy import flag_bits
from gmemcore.uapi import (
    PAGE_SHIFT,
    PAGE_SIZE,
    ContentMode,
    Direction,
    FallocateMode,
    GuestMemfdFlag,
    MemoryAttribute,
)

if TYPE_CHECKING:
    from gmemcore.machine.vm import Vm

I64_MAX = (1 << 63) - 1

_ALLOCATING_MODES: Final = (0, FallocateMode.ZERO_RANGE, FallocateMode.UNSHARE_RANGE)
VFS_FALLOCATE_MODES: Final = frozenset(
    (
        *_ALLOCATING_MODES,
        *(FallocateMode.KEEP_SIZE | mode for mode in (*_ALLOCATING_MODES, FallocateMode.PUNCH_HOLE)),
        *(FallocateMode.COLLAPSE_RANGE, FallocateMode.INSERT_RANGE, FallocateMode.WRITE_ZEROES),
    )
)
"""Modes that the VFS hands to a file system: one operation, with or without KEEP_SIZE (vfs_fallocate)."""

_RANGE: Final = ("offset", "size")


class GuestMemfd:
    """One guest_memfd. Made by `Vm.create_guest_memfd`.

    Parameters
    ----------
    vm : Vm
        The guest that it belongs to.
    owner : Owner
        The same, as the engine knows it.
    sides : Sides
        Its memory: one store for both sides, or in `legacy` two.
    flags : GuestMemfdFlag
        Flags of creation.
    """

    def __init__(self, vm: "Vm", owner: Owner, sides: Sides, flags: GuestMemfdFlag) -> None:
        self.vm = vm
        self.flags = flags
        self.index = 0
        """Its number among all files of the Vm, from 0."""
        self.sides = sides
        self._owner = owner
        self._store, self._host = sides

    def __repr__(self) -> str:
        return f"GuestMemfd(size={self.size:#x}, flags={self.flags!r}, closed={self.closed})"

    def _repr_html_(self) -> str:
        if self.closed:
            return facts(f"guest_memfd {self.index}, closed", {})
        totals = self._store.totals()
        rows = [(plane, pages, f"{pages / self.n_pages:.1%}") for plane, pages in totals.items() if pages]
        flags = self.flags.name or "no flags"
        title = f"guest_memfd {self.index}: {self.n_pages:,} pages ({self.size:#x} bytes), {flags}"
        return table(title, ("plane", "pages", "of all"), rows, self.counters._repr_html_())

    def number(self, index: int) -> None:
        """Set its number among all files of the Vm, before anybody sees it."""
        self.index = index
        for store in self._stores():
            store.number(index)

    def _stores(self) -> tuple[Store, ...]:
        return tuple(dict.fromkeys(self.sides))

    def __enter__(self) -> "GuestMemfd":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- what it is ----------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._store.n_pages * PAGE_SIZE

    @property
    def n_pages(self) -> int:
        """Pages of the file."""
        return self._store.n_pages

    @property
    def allocated(self) -> int:
        """Bytes of the allocated pages; in `legacy` those of both sides."""
        return sum(store.count(Plane.ALLOCATED) for store in self._stores()) << PAGE_SHIFT

    @property
    def has_bytes(self) -> bool:
        """Whether it holds bytes, and not attributes only."""
        return self._store.has_bytes

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._store.closed

    @property
    def counters(self) -> Counters:
        """Events of this file since its creation."""
        return sum((store.counters for store in self._stores()), Counters())

    @property
    def memory(self) -> NDArray[np.uint8]:
        """DRAM as the bus sees it: a live read-only view, shape (size,), without a copy.

        Raises
        ------
        NoBytesError
            ENOTSUP: an attributes-only file.
        """
        return self._with_bytes(self._open(self._store)).memory()

    def page_states(self) -> NDArray[Any]:
        """Page state without a copy.

        Returns
        -------
        ndarray, structured, read-only, shape (1,)
            One record with a field for each of private, allocated, assigned, accepted, pinned and poisoned:
            a bitmap of uint64, shape (n_rows,), eight a block of 2 MiB, bit i of word w standing for page
            64·w + i. The view is live. Asking for it makes the file keep all of its page state written out
            from then on (384 bytes a block), which a uniform conversion otherwise saves.

        Raises
        ------
        UnsupportedOperationError
            EOPNOTSUPP: a file of more than 10 TiB, since NumPy's records end at 2 GiB.

        See Also
        --------
        plane : one plane as booleans, a copy.
        """
        return self._store.records()

    def plane(self, name: str) -> NDArray[np.bool_]:
        """Copy one plane as booleans, shape (n_pages,).

        Parameters
        ----------
        name : {'private', 'allocated', 'assigned', 'accepted', 'pinned', 'poisoned'}
        """
        return self._store.plane(_plane_name(name))

    def count(self, name: str) -> int:
        """Count the pages set in one plane; reads eight bytes per 2 MiB block.

        Parameters
        ----------
        name : str
            A plane, as `plane` takes it.
        """
        return self._store.count(_plane_named(name))

    def mappable_blocks(self) -> MappableBlocks:
        """Count the blocks of 2 MiB and of 1 GiB that have one attribute: a single entry could map each.

        See Also
        --------
        gmemcore.analysis.mappability : of guest memory, with memslots and their alignment.
        """
        return self._store.mappable_blocks()

    def run_ends(self, name: str = "private") -> NDArray[np.uint64]:
        """Return the end page of each maximal run of one plane, in order; the first run begins at page 0.

        Parameters
        ----------
        name : str
            A plane, as `plane` takes it.

        Returns
        -------
        ndarray of uint64, shape (n_runs,)
        """
        return self._store.runs(_plane_name(name))[0]

    def packed_state(self, *, host: bool = False) -> PackedState:
        """Copy all planes as the engine packs them: eight bytes per 2 MiB block, 64 for each mixed plane in
        it.

        Parameters
        ----------
        host : bool
            What the host's mapping shows: another memory in `legacy`, the same one elsewhere.
        """
        frozen = self._owner.freeze([self._host if host else self._store]).files[0]
        if frozen.state is None:
            raise BadFileError("the guest_memfd is closed")
        return frozen.state

    def state_runs(self, offset: int | str, size: int | str) -> list[tuple[int, int, tuple[str, ...]]]:
        """List maximal runs of pages in one state, over a range.

        Returns
        -------
        list of (first page, end page, names of the planes that are set)

        Raises
        ------
        InvalidArgumentError
            EINVAL: empty, unaligned or beyond the end.
        """
        store = self._open(self._store)
        offset, size = as_u64s((offset, size), _RANGE)
        check_aligned(offset, size, "state")
        start, end = offset >> PAGE_SHIFT, (offset + size) >> PAGE_SHIFT
        if end > store.n_pages:
            raise InvalidArgumentError(
                f"state of {offset:#x}+{size:#x} must end at the file's end {self.size:#x} or before"
            )
        runs = store.blocks(start, end).runs_of_pages(start, end)
        names = {
            planes: tuple(name for i, name in enumerate(PLANE_NAMES) if planes >> i & 1)
            for _, _, planes in runs
        }
        return [(low, high, names[planes]) for low, high, planes in runs]

    def survey(self) -> Survey:
        """Look at all page state in one pass: a fingerprint, totals, and whether it contradicts itself."""
        return self._store.survey()

    def find_page(self, wanted: Sequence[str] = (), unwanted: Sequence[str] = ()) -> int | None:
        """Return the offset in bytes of the first page with all wanted planes and no unwanted one, or None.

        Parameters
        ----------
        wanted, unwanted : sequence of str
            Names of planes, as `plane` takes them.
        """
        planes = [reduce(or_, map(_plane_named, names), Plane.NONE) for names in (wanted, unwanted)]
        page = self._store.find(0, self.n_pages, *planes)
        return None if page is None else page << PAGE_SHIFT

    def runs(self) -> list[tuple[int, int, str]]:
        """List maximal runs of equal attribute, over the whole file.

        Returns
        -------
        list of (first page, end page, "private" or "shared")
        """
        ends, starts_private = self._store.runs()
        words = ("private", "shared") if starts_private else ("shared", "private")
        return [(start, end, words[i % 2]) for i, (start, end) in enumerate(pairwise([0, *ends.tolist()]))]

    # ---- conversion ----------------------------------------------------------------------------

    def convert(
        self,
        offset: int | str,
        size: int | str,
        to: Direction | MemoryAttribute | str | int,
        content: ContentMode | str | int | None = None,
    ) -> ConversionResult:
        """Convert a range to private or to shared memory: the everyday form of `set_memory_attributes`.

        Parameters
        ----------
        offset, size : int or str
            Bytes, multiples of PAGE_SIZE, within the file: ``4096``, ``"2m"``.
        to : Direction, MemoryAttribute, str or int
            ``"private"`` or ``"shared"``.
        content : ContentMode, str, int or None
            What the range must hold afterwards: ``"preserve"``, ``"zero"``, or another flag that the abi
            knows, by name. None asks for nothing, and contents are unspecified.

        Returns
        -------
        ConversionResult
            Its counters.

        Raises
        ------
        GmemError
            As `set_memory_attributes`.

        Examples
        --------
        >>> import gmemcore as gm
        >>> gmem = gm.create_vm("SNP", backing="none").create_guest_memfd("4m", "mmap|init_shared")
        >>> gmem.convert(0, "2m", to="private", content="preserve").counters.pages_changed
        512
        """
        flags = 0 if content is None else content
        if isinstance(flags, str):
            flags = flag_bits(flags, self.vm.abi)
        return self.set_memory_attributes(offset, size, as_u64(to, "attributes"), flags)

    def set_memory_attributes(
        self,
        offset: int | str,
        size: int | str,
        attributes: MemoryAttribute | str | int,
        flags: ContentMode | str | int = 0,
        *,
        error_offset: int = 0,
        reserved: int = 0,
    ) -> ConversionResult:
        """Convert a range in place: KVM_SET_MEMORY_ATTRIBUTES2 on the guest_memfd.

        Parameters
        ----------
        offset, size : int or str
            Bytes, multiples of PAGE_SIZE, within the file.
        attributes : MemoryAttribute, str or int
            PRIVATE (8), or 0 for shared.
        flags : ContentMode, str or int
            At most one content mode that the abi knows.
        error_offset : int
            The field on input; some revisions want 0.
        reserved : int
            The reserved words, or-ed; must be 0.

        Returns
        -------
        ConversionResult
            Its counters.

        Raises
        ------
        UnknownIoctlError
            ENOTTY: `legacy` has no such ioctl.
        InvalidArgumentError
            EINVAL: a check of the arguments failed.
        UnsupportedContentModeError
            EOPNOTSUPP: policy refuses the content mode; ``error_offset`` is the start.
        OutOfMemoryError
            ENOMEM: an allocation failed; ``error_offset`` is the start.
        PagePinnedError
            EAGAIN, to private: ``error_offset`` is that of the first pinned page.

        Notes
        -----
        All or nothing: after an exception nothing has changed.

        References
        ----------
        kvm_gmem_set_attributes and __kvm_gmem_set_attributes; KVM API 4.145.
        """
        return self._store.convert(offset, size, attributes, flags, error_offset, reserved)

    def set_memory_attributes_many(
        self,
        offsets: Sequence[int] | NDArray[Any],
        sizes: Sequence[int] | NDArray[Any],
        attributes: MemoryAttribute | str | int | Sequence[Any] | NDArray[Any],
        flags: ContentMode | str | int | Sequence[Any] | NDArray[Any] = 0,
    ) -> BatchResult:
        """Convert many ranges, in order, as the same requests one by one; a failed one doesn't stop the rest.

        Parameters
        ----------
        offsets, sizes : array of int, shape (n,)
            Bytes.
        attributes, flags : int or array of int, shape (n,)
            One for all, or one each.

        Returns
        -------
        BatchResult
            errno, error_offset and counters of each request.

        Raises
        ------
        TypeError, InvalidArgumentError
            The arrays can't be requests at all (types, lengths, values beyond 64 bits); nothing was done.
        UnknownIoctlError
            ENOTTY: `legacy`.
        """
        return self._store.run(_requests(Step.CONVERT, offsets, sizes, attributes, flags))

    def apply_many(
        self,
        steps: Step | str | int | Sequence[Any] | NDArray[Any],
        offsets: Sequence[int] | NDArray[Any],
        sizes: Sequence[int] | NDArray[Any],
        attributes: MemoryAttribute | str | int | Sequence[Any] | NDArray[Any] = 0,
        flags: ContentMode | str | int | Sequence[Any] | NDArray[Any] = 0,
    ) -> BatchResult:
        """Take many steps of any kind, in order: what hosts, guests and VMMs do, in one kernel call.

        The same page state, outcomes and counters as the single calls, by offset in the file instead of by
        gpa, and with nothing beyond its end; an access touches its pages and moves no data.

        Parameters
        ----------
        steps : Step or array of int, shape (n,)
            One for all, or one each; see `gmemcore.engine.steps.Step`.
        offsets, sizes : array of int, shape (n,)
            Bytes.
        attributes : int or array of int, shape (n,)
            Of conversions; ignored by other steps.
        flags : int or array of int, shape (n,)
            Of conversions; of a guest's access 1 if it is shared, 2 if it is private, 0 if it follows the
            attribute; else 0.

        Returns
        -------
        BatchResult
            Outcome, error_offset and counters of each step.

        Raises
        ------
        TypeError, InvalidArgumentError
            The arrays can't be steps at all (types, lengths, values beyond 64 bits); nothing was done.
        UnsupportedOperationError
            EOPNOTSUPP: `legacy` has two backings, and attributes that no file knows.
        """
        store = self._open(self._store)
        if self._owner.has_two_backings:
            raise UnsupportedOperationError("abi legacy has two backings; its steps are taken one by one")
        return store.run(_requests(steps, offsets, sizes, attributes, flags))

    def ioctl(self, request: int, argument: bytearray | bytes | None) -> None:
        """Raw form: the request number and the struct, updated in place as the kernel would.

        Parameters
        ----------
        request : int
            KVM_SET_MEMORY_ATTRIBUTES2 (0xC080AED2) is the one this fd has.
        argument : bytearray, bytes or None
            ``struct kvm_memory_attributes2``; None or too short is an unreadable pointer, bytes can't be
            written back.

        Raises
        ------
        GmemError
            As `set_memory_attributes`; ENOTTY for another request, EFAULT for an unreadable argument or a
            result that couldn't be copied out.
        """
        from gmemcore.machine.ioctl import gmem_ioctl

        gmem_ioctl(self, as_u64(request, "request"), argument)

    # ---- the host's view -----------------------------------------------------------------------

    def mmap(self, offset: int | str, size: int | str, shared: bool = True) -> "HostMapping":
        """Map a range for the host; private ranges and the file's end matter only when touched.

        Parameters
        ----------
        offset, size : int
            Bytes; the offset must be a multiple of PAGE_SIZE.
        shared : bool
            MAP_SHARED; a private (copy-on-write) mapping is refused.

        Returns
        -------
        HostMapping
            With checked `read` and `write`, and with ``enforce="mprotect"`` the memory itself, as `array`.

        Raises
        ------
        InvalidArgumentError
            EINVAL: empty or unaligned, which comes first; not shared, which comes last.
        NotMappableError
            ENODEV: created without MMAP.

        References
        ----------
        ksys_mmap_pgoff and do_mmap, then kvm_gmem_mmap.
        """
        self._open(self._host)
        offset, size = as_u64s((offset, size), _RANGE)
        if not isinstance(shared, bool):
            raise TypeError(f"shared is True or False, not {type(shared).__name__}")
        if size == 0 or offset % PAGE_SIZE:
            raise InvalidArgumentError(
                f"mmap of {offset:#x}+{size:#x}: the size must be positive, the offset a multiple of 0x1000"
            )
        if not self.flags & GuestMemfdFlag.MMAP:
            raise NotMappableError("the guest_memfd was created without MMAP (flag 1)")
        if not shared:
            raise InvalidArgumentError("a guest_memfd can't be mapped copy-on-write; use MAP_SHARED")
        return HostMapping(self, offset, size)

    def host_read(self, offset: int | str, size: int | str) -> bytes:
        """Read as the host does.

        Raises
        ------
        HostAccessError
            SIGBUS: a private or poisoned page, or beyond the end; no data moves.
        NoBytesError
            ENOTSUP: an attributes-only file.
        """
        return self._host.read(*as_u64s((offset, size), _RANGE))

    def host_write(self, offset: int | str, data: Data) -> None:
        """Write as the host does; see `host_read`."""
        self._host.write(as_u64(offset, "offset"), as_bytes(data))

    def host_touch(self, offset: int | str, size: int | str) -> None:
        """Access memory as the host does and move no data; see `host_read`.

        It has the checks and the page state of an access, and works on files that hold attributes only.
        """
        self._host.take(Step.HOST_READ, *as_u64s((offset, size), _RANGE))

    def pin(self, offset: int | str, size: int | str) -> Counters:
        """Pin pages for long, as VFIO or GUP does: all of them or none.

        Raises
        ------
        BadAddressError
            EFAULT: a private or poisoned page, or one beyond the end.
        InvalidArgumentError
            EINVAL: empty or unaligned.
        """
        return self._host.take(Step.PIN, *as_u64s((offset, size), _RANGE))

    def unpin(self, offset: int | str, size: int | str) -> Counters:
        """Drop pins; pages that have none are left alone.

        Raises
        ------
        BadAddressError
            EFAULT: beyond the end.
        InvalidArgumentError
            EINVAL: empty or unaligned.
        """
        return self._host.take(Step.UNPIN, *as_u64s((offset, size), _RANGE))

    # ---- the file ------------------------------------------------------------------------------

    def fallocate(self, mode: FallocateMode | str | int, offset: int | str, size: int | str) -> Counters:
        """Allocate pages, or punch a hole.

        Parameters
        ----------
        mode : FallocateMode, str or int
            KEEP_SIZE (1) allocates; KEEP_SIZE | PUNCH_HOLE (3) discards contents and keeps the attribute.
        offset, size : int
            Bytes, multiples of PAGE_SIZE; signed 64 bits, as the system call has them.

        Raises
        ------
        InvalidArgumentError
            EINVAL: empty, negative or unaligned; allocating beyond the end (punching there succeeds).
        UnsupportedOperationError
            EOPNOTSUPP: another mode.
        FileTooLargeError
            EFBIG: an end beyond 2^63 - 1.
        OutOfMemoryError
            ENOMEM: the host can't provide the pages.

        Notes
        -----
        EINVAL of an empty or negative range comes first, then modes that the VFS refuses, EFBIG, modes that
        guest_memfd refuses, and the rest.

        References
        ----------
        vfs_fallocate, then kvm_gmem_fallocate.
        """
        store = self._open(self._store)
        mode, offset, size = as_u64(mode, "mode"), as_int(offset, "offset"), as_int(size, "size")
        if not (0 <= offset <= I64_MAX and 0 < size <= I64_MAX):
            raise InvalidArgumentError(f"fallocate of {offset:#x}+{size:#x} is empty or negative")
        if mode in VFS_FALLOCATE_MODES and offset + size > I64_MAX:
            raise FileTooLargeError(f"fallocate of {offset:#x}+{size:#x} must end at {I64_MAX:#x} or before")
        punch = mode == FallocateMode.KEEP_SIZE | FallocateMode.PUNCH_HOLE
        if not punch and mode != FallocateMode.KEEP_SIZE:
            raise UnsupportedOperationError(
                f"fallocate mode must be KEEP_SIZE (0x1) or KEEP_SIZE|PUNCH_HOLE (0x3), not {mode:#x}"
            )
        return store.take(Step.PUNCH_HOLE if punch else Step.ALLOCATE, *as_u64s((offset, size), _RANGE))

    def discard_shared(self, offset: int | str, size: int | str) -> Counters:
        """Discard the host's side of a range (`legacy`): what a VMM does after a conversion to private.

        Raises
        ------
        UnsupportedOperationError
            EOPNOTSUPP: with conversion in place there is no other side.
        InvalidArgumentError
            EINVAL: empty, unaligned or beyond the end.
        """
        host = self._open(self._host)
        if host is self._store:
            raise UnsupportedOperationError("there is one backing, converted in place; only `legacy` has two")
        offset, size = as_u64s((offset, size), _RANGE)
        check_aligned(offset, size, "discard")
        if offset + size > self.size:
            raise InvalidArgumentError(
                f"discard of {offset:#x}+{size:#x} must end at the file's end {self.size:#x} or before"
            )
        return host.take(Step.PUNCH_HOLE, offset, size)

    def poison(self, offset: int | str) -> None:
        """Let the memory of one allocated page fail.

        Raises
        ------
        InvalidArgumentError
            EINVAL: unaligned, beyond the end, or not allocated.

        References
        ----------
        kvm_gmem_error_folio.
        """
        self._store.take(Step.POISON, as_u64(offset, "offset"), PAGE_SIZE)

    def fail_allocations_after(self, n: int | None) -> None:
        """Let n more allocations of conversions succeed and the next one fail; None: no more failures.

        One allocation is made for the attributes of a range that isn't uniform yet, and one for each page
        that ENCRYPT brings into being. A fault injector for tests.
        """
        self._store.fail_allocations_after(None if n is None else as_u64(n, "n"))

    def close(self) -> None:
        """Close the file: its memory goes when the last view of it is gone. Closing twice is allowed.

        Its memslots stay: a guest access there is MEMORY_FAULT. On TDX its pages leave the S-EPT first.
        """
        self._owner.close(self.sides, all_of_it=False)
        self.drop_memory()
        self.vm.forget(self)

    def drop_memory(self) -> None:
        """Drop the memory of a closed file; views that others hold keep it alive."""
        for store in self.sides:
            store.drop_memory()

    # ---- checks --------------------------------------------------------------------------------

    def _open(self, store: Store) -> Store:
        if store.closed:
            raise BadFileError("the guest_memfd is closed")
        return store

    def _with_bytes(self, store: Store) -> Store:
        if not store.has_bytes:
            raise NoBytesError(
                "this file holds attributes only; use a backing that holds bytes, as 'anonymous'"
            )
        return store

    def _host_memory(self, offset: int, size: int) -> NDArray[np.uint8]:
        view = self._open(self._host).host_view
        if view is None:
            raise UnsupportedOperationError(
                "raw views need a Vm made with enforce='mprotect'; use read and write without"
            )
        if offset + size > self.size:
            raise BadAddressError(
                f"a view of {offset:#x}+{size:#x} must end at the file's end {self.size:#x} or before"
            )
        return view.memory[offset : offset + size]


def _plane_named(name: str | Plane) -> Plane:
    if isinstance(name, Plane):
        return name
    if not isinstance(name, str):
        raise TypeError(f"a plane's name must be a string, not {type(name).__name__}")
    if name.lower() not in PLANE_NAMES:
        raise InvalidArgumentError(f"there is no plane {name!r}; known: {', '.join(PLANE_NAMES)}")
    return Plane(1 << PLANE_NAMES.index(name.lower()))


def _plane_name(name: str | Plane) -> str:
    return PLANE_NAMES[_plane_named(name).bit_length() - 1]


def _requests(steps: Any, offsets: Any, sizes: Any, attributes: Any, flags: Any) -> Requests:
    """Return columns of requests, with types, magnitudes and lengths checked; a number stands for all of
    them.

    Raises
    ------
    TypeError, InvalidArgumentError
        As `GuestMemfd.set_memory_attributes_many`.
    """
    given = {"steps": steps, "offsets": offsets, "sizes": sizes, "attributes": attributes, "flags": flags}
    of_all = {name for name in ("steps", "attributes", "flags") if np.ndim(given[name]) == 0}
    columns = {
        name: np.array([as_u64(value, name)], np.uint64) if name in of_all else as_u64_array(value, name)
        for name, value in given.items()
    }
    lengths = {name: len(column) for name, column in columns.items() if name not in of_all}
    if len(set(lengths.values())) != 1:
        raise InvalidArgumentError(f"columns of {lengths} requests; all must have one length")
    return Requests(**columns)


class HostMapping:
    """A host mapping of a range of a guest_memfd; offsets are relative to it.

    `read` and `write` are checked, and refuse with an exception; `array` is memory, and faults.
    """

    __slots__ = ("gmem", "offset", "size")

    def __init__(self, gmem: GuestMemfd, offset: int, size: int) -> None:
        self.gmem, self.offset, self.size = gmem, offset, size

    def read(self, offset: int | str, size: int | str) -> bytes:
        """Read as the host does; see `GuestMemfd.host_read`."""
        return self.gmem.host_read(self.offset + self._within(offset, size), size)

    def write(self, offset: int | str, data: Data) -> None:
        """Write as the host does; see `GuestMemfd.host_read`."""
        view = as_bytes(data)
        self.gmem.host_write(self.offset + self._within(offset, len(view)), view)

    @property
    def array(self) -> NDArray[np.uint8]:
        """The memory itself, writable, shape (size,), without a copy: with ``enforce="mprotect"`` alone.

        A touch of a private page of it is SIGSEGV, which ends the process (the kernel's would be SIGBUS);
        conversions close pages before their bytes change, and open them when they have, in this process. A
        write is noticed at the next call, which finds the page allocated; a read of a page that doesn't exist
        isn't. Poison isn't enforced, and a page that the host has no memory for is SIGBUS. After
        `GuestMemfd.close` the view stays as it is, and keeps the memory alive.

        Raises
        ------
        BadFileError
            EBADF: the file is closed.
        UnsupportedOperationError
            EOPNOTSUPP: nothing would fault there.
        BadAddressError
            EFAULT: the mapping goes beyond the end of the file.
        """
        return self.gmem._host_memory(self.offset, self.size)

    def _within(self, offset: int | str, size: int | str) -> int:
        offset, size = as_u64(offset, "offset"), as_u64(size, "size")
        if offset + size > self.size:
            raise BadAddressError(f"{offset:#x}+{size:#x} is outside of the mapping of {self.size:#x} bytes")
        return offset
