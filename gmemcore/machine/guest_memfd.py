"""GuestMemfd: one file of guest memory, with the operations of its file descriptor."""

from collections.abc import Sequence
from functools import reduce
from itertools import pairwise
from operator import or_
from typing import TYPE_CHECKING, Any, Final, NoReturn, SupportsIndex

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
from gmemcore.machine.huge_pages import Folio, FolioCounts, Reservation, mapped_bytes, vmemmap_pages
from gmemcore.machine.ioctl import gmem_ioctl
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
from gmemcore.units import counted

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
"""Modes that the VFS passes to file systems: one operation, with or without KEEP_SIZE (vfs_fallocate)."""

_RANGE: Final = ("offset", "size")


class GuestMemfd:
    """One guest_memfd, made by `Vm.create_guest_memfd`.

    Parameters
    ----------
    vm : Vm
        Its guest.
    owner : Owner
        The guest's state in the engine.
    sides : Sides
        Its memory: one store for both sides, or two in `legacy`.
    flags : GuestMemfdFlag
        The flags of its creation.
    reserved : Reservation or None
        Its huge pages in the host's pool.
    """

    def __init__(
        self,
        vm: "Vm",
        owner: Owner,
        sides: Sides,
        flags: GuestMemfdFlag,
        reserved: Reservation | None = None,
    ) -> None:
        self.vm = vm
        self.flags = flags
        self._reserved = reserved
        self.index = 0
        """Its index among all files ever created in the Vm."""
        self.sides = sides
        self._owner = owner
        self._store, self._shared = sides

    def __repr__(self) -> str:
        return f"GuestMemfd(size={self.size:#x}, flags={self.flags!r}, closed={self.closed})"

    def _repr_html_(self) -> str:
        if self.closed:
            return facts(f"guest_memfd {self.index}, closed", {})
        totals = self._store.totals()
        rows = [(plane, pages, f"{pages / self.n_pages:.1%}") for plane, pages in totals.items() if pages]
        flags = self.flags.name or "no flags"
        title = f"guest_memfd {self.index}: {counted(self.n_pages, 'page')} ({self.size:#x} bytes), {flags}"
        return table(title, ("plane", "pages", "of all"), rows, self.counters._repr_html_())

    def number(self, index: int) -> None:
        """Set its index among all files of the Vm, before it is used."""
        self.index = index
        for store in self._stores():
            store.number(index)

    def _stores(self) -> tuple[Store, ...]:
        return tuple(dict.fromkeys(self.sides))

    def __reduce_ex__(self, _protocol: SupportsIndex) -> NoReturn:
        raise TypeError(
            "a guest_memfd can't be copied or pickled: it is memory of this process; see gmemcore.take"
        )

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
    def page_order(self) -> int:
        """Order of its huge pages, 9 or 18; 0: it has pages of 4 KiB."""
        return self._store.page_order

    def folio_states(self) -> NDArray[np.uint8]:
        """Copy the state of each huge page: a `Folio`, shape (n_huge_pages,); empty without huge pages."""
        return self._store.folios()

    def folios(self) -> FolioCounts:
        """Count the huge pages that are absent, whole folios, and split."""
        return FolioCounts(*np.bincount(self.folio_states(), minlength=len(Folio)).tolist())

    def mapped_bytes(self) -> dict[int, int]:
        """Return the bytes in use by the size of the largest entry that can map them.

        A whole folio can be mapped by one entry; a split one, and a page of a file of 4 KiB pages, by entries
        of 4 KiB.
        """
        if not self.page_order:
            return {PAGE_SIZE: self.allocated}
        return mapped_bytes(self.folio_states(), self.page_order)

    @property
    def struct_page_bytes(self) -> int:
        """Memory that the split huge pages need for their struct pages, bytes (HVO)."""
        return self.folios().split * vmemmap_pages(self.page_order) * PAGE_SIZE if self.page_order else 0

    @property
    def allocated(self) -> int:
        """Bytes of the allocated pages; in `legacy`, of both sides."""
        return sum(store.count(Plane.ALLOCATED) for store in self._stores()) << PAGE_SHIFT

    @property
    def has_bytes(self) -> bool:
        """Whether the file has bytes, rather than attributes only."""
        return self._store.has_bytes

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._store.closed

    @property
    def counters(self) -> Counters:
        """Events since creation."""
        return sum((store.counters for store in self._stores()), Counters())

    @property
    def memory(self) -> NDArray[np.uint8]:
        """The DRAM as the bus sees it: a live, read-only view, shape (size,).

        If contents are deferred, this brings them up to date, and operations keep them so while the view or a
        slice of it exists.

        Raises
        ------
        NoBytesError
            ENOTSUP: the file has attributes only.
        OutOfMemoryError
            ENOMEM: see `materialize`.
        """
        return self._with_bytes(self._open(self._store)).memory()

    def materialize(self, offset: int | str = 0, size: int | str | None = None) -> None:
        """Do what is due on the bytes of a range, if contents are deferred; otherwise do nothing.

        Parameters
        ----------
        offset, size : int or str
            Bytes, multiples of PAGE_SIZE, within the file. Default: the whole file.

        Raises
        ------
        NoBytesError
            ENOTSUP: the file has attributes only.
        InvalidArgumentError
            EINVAL: an empty or unaligned range, or one beyond the end.
        OutOfMemoryError
            ENOMEM: the host has too little memory; no byte was changed.
        """
        self._with_bytes(self._open(self._store))
        size = self.size - as_u64(offset, "offset") if size is None else size
        offset, size = as_u64s((offset, size), _RANGE)
        check_aligned(offset, size, "materialize")
        if offset + size > self.size:
            raise InvalidArgumentError(
                f"materialize of {offset:#x}+{size:#x} must end at the file's end {self.size:#x} or before"
            )
        self._store.materialise(offset, size)  # shared memory of its own has no key, so nothing is due

    def dram(self, offset: int | str, size: int | str) -> bytes:
        """Copy the DRAM of a range as the bus sees it, whatever the attributes, without changing anything.

        Parameters
        ----------
        offset, size : int or str
            Bytes, within the file.

        Raises
        ------
        NoBytesError
            ENOTSUP: the file has attributes only.
        InvalidArgumentError
            EINVAL: a range beyond the end.
        """
        self._with_bytes(self._open(self._store))
        offset, size = as_u64s((offset, size), _RANGE)
        if offset + size > self.size:
            raise InvalidArgumentError(
                f"DRAM of {offset:#x}+{size:#x} must end at the file's end {self.size:#x} or before"
            )
        return self._store.dram(offset, size)

    @property
    def stored(self) -> int:
        """Bytes of the pages that take host memory; in `legacy`, of both sides.

        If contents are deferred, those that were written; otherwise those that are allocated.
        """
        return sum(store.stored_pages for store in self._stores()) << PAGE_SHIFT

    def page_states(self) -> NDArray[Any]:
        """Return a live view of page state.

        Returns
        -------
        ndarray, structured, read-only, shape (1,)
            One record with a field for each of private, allocated, assigned, accepted, pinned and poisoned:
            a bitmap of uint64, shape (n_rows,), eight words per 2 MiB block; bit i of word w is page
            64·w + i. From the first call on, the file keeps all of its page state written (384 bytes per
            block), which conversions of whole blocks otherwise avoid.

        Raises
        ------
        UnsupportedOperationError
            EOPNOTSUPP: a file of more than 10 TiB; a NumPy record is smaller than 2 GiB.

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
        """Count the 2 MiB and 1 GiB blocks with a single attribute, which one entry can map.

        See Also
        --------
        gmemcore.analysis.mappability : the same for guest memory, with memslots and their alignment.
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
        """Copy all planes in packed form: eight bytes per 2 MiB block, 64 for each mixed plane in it.

        Parameters
        ----------
        host : bool
            The planes of the shared side, which is another memory only in `legacy`.
        """
        frozen = self._owner.freeze([self._shared if host else self._store]).files[0]
        if frozen.state is None:
            raise BadFileError("the guest_memfd is closed")
        return frozen.state

    def state_runs(self, offset: int | str, size: int | str) -> list[tuple[int, int, tuple[str, ...]]]:
        """List maximal runs of pages in one state, over a range.

        Returns
        -------
        list of (first page, end page, names of their planes)

        Raises
        ------
        InvalidArgumentError
            EINVAL: an empty or unaligned range, or one beyond the end.
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

    def planes_of(self, pages: Sequence[int]) -> NDArray[np.uint8]:
        """Return the planes that each of some pages is in, as `Plane` bits, shape (n,).

        Parameters
        ----------
        pages : sequence of int
            Numbers of pages of the file.

        Raises
        ------
        InvalidArgumentError
            EINVAL: a page beyond the end.

        See Also
        --------
        state_runs : the planes of all pages of a range.
        """
        store = self._open(self._store)
        pages = [as_u64(page, "page") for page in pages]
        if pages and max(pages) >= store.n_pages:
            raise InvalidArgumentError(
                f"page {max(pages):#x} must be below {store.n_pages:#x}, the number of pages of the file"
            )
        return store.planes_of(pages)

    def survey(self) -> Survey:
        """Hash, count and check all page state in one pass."""
        return self._store.survey()

    def contents_sum(self) -> int:
        """Hash all bytes into 64 bits, not cryptographically; deferred contents stay deferred.

        It is a sum over pages that aren't zero; a file without bytes has 0.
        """
        return self._store.sum_contents()

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
        """List maximal runs of pages with one attribute, over the whole file.

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
        """Convert a range to private or to shared memory: a simpler form of `set_memory_attributes`.

        Parameters
        ----------
        offset, size : int or str
            Bytes, multiples of PAGE_SIZE, within the file: ``4096``, ``"2m"``.
        to : Direction, MemoryAttribute, str or int
            ``"private"`` or ``"shared"``.
        content : ContentMode, str, int or None
            What happens to the contents: ``"preserve"``, ``"zero"`` or another flag of the abi, by name.
            None: contents are unspecified afterwards.

        Returns
        -------
        ConversionResult
            Its counters.

        Raises
        ------
        GmemError
            See `set_memory_attributes`.

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
            At most one content mode of the abi.
        error_offset : int
            The field's value on input, which must be 0 under some revisions.
        reserved : int
            The reserved words, ORed; must be 0.

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
            EOPNOTSUPP: the content mode isn't supported; ``error_offset`` is the start of the range.
        OutOfMemoryError
            ENOMEM: an allocation failed; ``error_offset`` is the start of the range.
        PagePinnedError
            EAGAIN, to private: ``error_offset`` is the first pinned page.

        Notes
        -----
        After an exception nothing has changed; except under `huge-partial`, in a file of huge pages, where
        the huge pages before the one that failed stay converted.

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
        """Convert many ranges, in order. A refused request doesn't stop the others.

        Parameters
        ----------
        offsets, sizes : array of int, shape (n,)
            Bytes.
        attributes, flags : int or array of int, shape (n,)
            One for all requests, or one per request.

        Returns
        -------
        BatchResult
            errno, error_offset and counters of each request.

        Raises
        ------
        TypeError, InvalidArgumentError
            The arrays have invalid types, lengths or values beyond 64 bits; nothing was done.
        UnknownIoctlError
            ENOTTY: `legacy` has no such ioctl.
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
        """Take many steps of any kind, in order, in one kernel call.

        Page state, outcomes and counters are those of single calls. Ranges are offsets in the file, instead
        of guest physical addresses, and accesses don't copy data.

        Parameters
        ----------
        steps : Step or array of int, shape (n,)
            One for all requests, or one per request; see `gmemcore.engine.steps.Step`.
        offsets, sizes : array of int, shape (n,)
            Bytes.
        attributes : int or array of int, shape (n,)
            Attributes of conversions; other steps ignore them.
        flags : int or array of int, shape (n,)
            Flags of conversions. For guest accesses, 1: shared, 2: private, 0: as the attribute is. Otherwise
            0.

        Returns
        -------
        BatchResult
            Outcome, error_offset and counters of each step.

        Raises
        ------
        TypeError, InvalidArgumentError
            The arrays have invalid types, lengths or values beyond 64 bits; nothing was done.
        UnsupportedOperationError
            EOPNOTSUPP: `legacy`, where attributes don't belong to the file.
        """
        store = self._open(self._store)
        if self._owner.has_two_backings:
            raise UnsupportedOperationError(
                "batches of steps need conversion in place; take the steps of abi legacy one by one"
            )
        return store.run(_requests(steps, offsets, sizes, attributes, flags))

    def ioctl(self, request: int, argument: bytearray | bytes | None) -> None:
        """Do a raw ioctl: the request number and the struct, which is updated as by the kernel.

        Parameters
        ----------
        request : int
            KVM_SET_MEMORY_ATTRIBUTES2 (0xC080AED2), the only one.
        argument : bytearray, bytes or None
            ``struct kvm_memory_attributes2``. None or too few bytes are an invalid pointer; bytes can't be
            written back.

        Raises
        ------
        GmemError
            See `set_memory_attributes`. ENOTTY: another request. EFAULT: the argument can't be read, or
            ``error_offset`` can't be written back.
        """
        gmem_ioctl(self, as_u64(request, "request"), argument)

    # ---- the host's view -----------------------------------------------------------------------

    def mmap(self, offset: int | str, size: int | str, shared: bool = True) -> "HostMapping":
        """Map a range for the host. Private pages, and those beyond the end, fault on access.

        Parameters
        ----------
        offset, size : int
            Bytes; the offset must be a multiple of PAGE_SIZE.
        shared : bool
            MAP_SHARED; must be True.

        Returns
        -------
        HostMapping
            It has checked `read` and `write` and, with ``enforce="mprotect"``, the memory itself as `array`.

        Raises
        ------
        InvalidArgumentError
            EINVAL: an empty or unaligned range (checked first), or a mapping that isn't shared (last).
        NotMappableError
            ENODEV: the file was created without MMAP.

        References
        ----------
        ksys_mmap_pgoff and do_mmap, then kvm_gmem_mmap.
        """
        self._open(self._shared)
        offset, size = as_u64s((offset, size), _RANGE)
        if not isinstance(shared, bool):
            raise TypeError(f"shared must be True or False, not {type(shared).__name__}")
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
            SIGBUS: a page is private, poisoned or beyond the end; no data is copied.
        NoBytesError
            ENOTSUP: the file has attributes only.
        """
        return self._shared.read(*as_u64s((offset, size), _RANGE))

    def host_write(self, offset: int | str, data: Data) -> None:
        """Write as the host does; see `host_read`."""
        self._shared.write(as_u64(offset, "offset"), as_bytes(data))

    def host_touch(self, offset: int | str, size: int | str) -> None:
        """Access memory as the host does, without data; see `host_read`.

        It has the checks and page state of an access, and works on files without bytes.
        """
        self._shared.take(Step.HOST_READ, *as_u64s((offset, size), _RANGE))

    def pin(self, offset: int | str, size: int | str) -> Counters:
        """Take a long-term pin on every page of a range, or on none, as VFIO does.

        Raises
        ------
        BadAddressError
            EFAULT: a page is private, poisoned or beyond the end.
        InvalidArgumentError
            EINVAL: an empty or unaligned range.
        """
        return self._shared.take(Step.PIN, *as_u64s((offset, size), _RANGE))

    def unpin(self, offset: int | str, size: int | str) -> Counters:
        """Drop the pins of a range; pages without one stay as they are.

        Raises
        ------
        BadAddressError
            EFAULT: the range ends beyond the file.
        InvalidArgumentError
            EINVAL: an empty or unaligned range.
        """
        return self._shared.take(Step.UNPIN, *as_u64s((offset, size), _RANGE))

    # ---- the file ------------------------------------------------------------------------------

    def fallocate(self, mode: FallocateMode | str | int, offset: int | str, size: int | str) -> Counters:
        """Allocate pages, or punch a hole.

        Parameters
        ----------
        mode : FallocateMode, str or int
            KEEP_SIZE (1) allocates; KEEP_SIZE | PUNCH_HOLE (3) discards contents and keeps the attribute.
        offset, size : int
            Bytes, multiples of PAGE_SIZE, or of the huge page; signed 64-bit, as in the system call.

        Raises
        ------
        InvalidArgumentError
            EINVAL: an empty, negative or unaligned range; one to allocate that ends beyond the file.
        PagePinnedError
            EAGAIN: in a file of huge pages, one of those to punch is pinned.
        UnsupportedOperationError
            EOPNOTSUPP: another mode.
        FileTooLargeError
            EFBIG: the range ends beyond 2^63 - 1.
        OutOfMemoryError
            ENOMEM: the host has too little memory.

        Notes
        -----
        The order of the checks: an empty or negative range, modes that the VFS refuses, EFBIG, modes that
        guest_memfd refuses, the rest.

        References
        ----------
        vfs_fallocate, then kvm_gmem_fallocate.
        """
        store = self._open(self._store)
        mode, offset, size = as_u64(mode, "mode"), as_int(offset, "offset"), as_int(size, "size")
        if not (0 <= offset <= I64_MAX and 0 < size <= I64_MAX):
            raise InvalidArgumentError(
                f"fallocate of {offset:#x}+{size:#x}: the size must be positive, the offset 0 or more"
            )
        if mode in VFS_FALLOCATE_MODES and offset + size > I64_MAX:
            raise FileTooLargeError(f"fallocate of {offset:#x}+{size:#x} must end at {I64_MAX:#x} or before")
        punch = mode == FallocateMode.KEEP_SIZE | FallocateMode.PUNCH_HOLE
        if not punch and mode != FallocateMode.KEEP_SIZE:
            raise UnsupportedOperationError(
                f"fallocate mode must be KEEP_SIZE (0x1) or KEEP_SIZE|PUNCH_HOLE (0x3), not {mode:#x}"
            )
        return store.take(Step.PUNCH_HOLE if punch else Step.ALLOCATE, *as_u64s((offset, size), _RANGE))

    def discard_shared(self, offset: int | str, size: int | str) -> Counters:
        """Discard the shared side of a range (`legacy`), as a VMM does after a conversion to private.

        Raises
        ------
        UnsupportedOperationError
            EOPNOTSUPP: the file has only one backing.
        InvalidArgumentError
            EINVAL: an empty or unaligned range, or one beyond the end.
        """
        host = self._open(self._shared)
        if host is self._store:
            raise UnsupportedOperationError(
                "the file has only one backing; to discard pages, use fallocate with PUNCH_HOLE"
            )
        offset, size = as_u64s((offset, size), _RANGE)
        check_aligned(offset, size, "discard")
        if offset + size > self.size:
            raise InvalidArgumentError(
                f"discard of {offset:#x}+{size:#x} must end at the file's end {self.size:#x} or before"
            )
        return host.take(Step.PUNCH_HOLE, offset, size)

    def poison(self, offset: int | str) -> None:
        """Mark one allocated page as failed (hardware-poisoned).

        Raises
        ------
        InvalidArgumentError
            EINVAL: an unaligned offset, or a page that is beyond the end or unallocated.

        References
        ----------
        kvm_gmem_error_folio.
        """
        self._store.take(Step.POISON, as_u64(offset, "offset"), PAGE_SIZE)

    def fail_allocations_after(self, n: int | None) -> None:
        """Inject a fault: let the next n allocations of conversions succeed and the one after fail.

        A conversion makes one allocation if it changes attributes, and one for each page that ENCRYPT
        allocates. None: no allocation fails.
        """
        self._store.fail_allocations_after(None if n is None else as_u64(n, "n"))

    def close(self) -> None:
        """Close the file. Closing it again has no effect.

        Existing views keep its memory alive. Its memslots stay: a guest access there is MEMORY_FAULT. On TDX
        its pages leave the S-EPT.
        """
        self._owner.close(self.sides, all_of_it=False)
        self.drop_memory()
        self.vm.forget(self)

    def drop_memory(self) -> None:
        """Release the memory of a closed file; existing views keep it alive."""
        if self._reserved is not None:
            self._reserved.release()
        for store in self.sides:
            store.drop_memory()

    # ---- checks --------------------------------------------------------------------------------

    def _open(self, store: Store) -> Store:
        if store.closed:
            raise BadFileError("the guest_memfd is closed")
        return store

    def _with_bytes(self, store: Store) -> Store:
        if not store.has_bytes:
            raise NoBytesError("this file has attributes only; use a backing with bytes, as 'anonymous'")
        return store

    def _host_memory(self, offset: int, size: int) -> NDArray[np.uint8]:
        view = self._open(self._shared).host_view
        if view is None:
            raise UnsupportedOperationError(
                "a raw view needs a Vm with enforce='mprotect'; otherwise, use read and write"
            )
        if offset + size > self.size:
            raise BadAddressError(
                f"a view of {offset:#x}+{size:#x} must end at the file's end {self.size:#x} or before"
            )
        self._shared.stop_deferring()  # the view can be written at any time, unnoticed
        return view.memory[offset : offset + size]


def _plane_named(name: str | Plane) -> Plane:
    if isinstance(name, Plane):
        return name
    if not isinstance(name, str):
        raise TypeError(f"a plane must be a string, not {type(name).__name__}")
    if name.lower() not in PLANE_NAMES:
        raise InvalidArgumentError(f"unknown plane {name!r}; known: {', '.join(PLANE_NAMES)}")
    return Plane(1 << PLANE_NAMES.index(name.lower()))


def _plane_name(name: str | Plane) -> str:
    return PLANE_NAMES[_plane_named(name).bit_length() - 1]


def _requests(steps: Any, offsets: Any, sizes: Any, attributes: Any, flags: Any) -> Requests:
    """Check columns of requests; steps, attributes and flags can be one number for all.

    Raises
    ------
    TypeError, InvalidArgumentError
        See `GuestMemfd.set_memory_attributes_many`.
    """
    given = {"steps": steps, "offsets": offsets, "sizes": sizes, "attributes": attributes, "flags": flags}
    of_all = {name for name in ("steps", "attributes", "flags") if np.ndim(given[name]) == 0}
    columns = {
        name: np.array([as_u64(value, name)], np.uint64) if name in of_all else as_u64_array(value, name)
        for name, value in given.items()
    }
    lengths = {name: len(column) for name, column in columns.items() if name not in of_all}
    if len(set(lengths.values())) != 1:
        raise InvalidArgumentError(f"all columns must have the same length, not {lengths}")
    return Requests(**columns)


class HostMapping:
    """A host mapping of a range of a guest_memfd; offsets are relative to the mapping.

    `read` and `write` check each access and raise; `array` is the memory itself, and faults.
    """

    __slots__ = ("gmem", "offset", "size")

    def __init__(self, gmem: GuestMemfd, offset: int, size: int) -> None:
        self.gmem, self.offset, self.size = gmem, offset, size

    def __repr__(self) -> str:
        return f"HostMapping(offset={self.offset:#x}, size={self.size:#x}, gmem={self.gmem!r})"

    def read(self, offset: int | str, size: int | str) -> bytes:
        """Read as the host does; see `GuestMemfd.host_read`."""
        return self.gmem.host_read(self.offset + self._within(offset, size), size)

    def write(self, offset: int | str, data: Data) -> None:
        """Write as the host does; see `GuestMemfd.host_read`."""
        view = as_bytes(data)
        self.gmem.host_write(self.offset + self._within(offset, len(view)), view)

    @property
    def array(self) -> NDArray[np.uint8]:
        """The memory itself, writable, shape (size,); only with ``enforce="mprotect"``.

        An access to a private page raises SIGSEGV, which ends the process (a kernel's guest_memfd raises
        SIGBUS). Conversions protect pages before their bytes change, and unprotect them afterwards, in this
        process. The next call after a write finds the page allocated; a read of an unallocated page isn't
        detected. Poison isn't enforced, and a page for which the host has no memory raises SIGBUS. After
        `GuestMemfd.close` the view stays as it is, and keeps the memory alive. Deferred contents are up to
        date from the first view on, and not deferred any more.

        Raises
        ------
        BadFileError
            EBADF: the file is closed.
        UnsupportedOperationError
            EOPNOTSUPP: the Vm has no ``enforce="mprotect"``.
        BadAddressError
            EFAULT: the mapping ends beyond the file.
        """
        return self.gmem._host_memory(self.offset, self.size)

    def _within(self, offset: int | str, size: int | str) -> int:
        offset, size = as_u64(offset, "offset"), as_u64(size, "size")
        if offset + size > self.size:
            raise BadAddressError(f"{offset:#x}+{size:#x} must be inside the mapping of {self.size:#x} bytes")
        return offset
