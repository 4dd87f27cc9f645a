"""Vm: one guest, with its memslots, launch and guest_memfds.

A Vm has no lock: each method makes at most one change, by one kernel call or one new version of `_Parts`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple, NoReturn, SupportsIndex

from gmemcore.engine.arguments import U64_MAX, as_int, as_u64, as_u64s, check_aligned
from gmemcore.engine.backing import BACKINGS, Backing, BackingFactory, backing_factory
from gmemcore.engine.counters import Counters
from gmemcore.engine.host_view import require_shared
from gmemcore.engine.owner import Owner, Slots
from gmemcore.engine.packed import PackedState
from gmemcore.engine.results import ConversionResult
from gmemcore.engine.rules import Rules, compile_rules, tracking_column
from gmemcore.engine.steps import Step
from gmemcore.engine.store import Store
from gmemcore.errors import AlreadyExistsError, BadFileError, InvalidArgumentError
from gmemcore.html import facts, table
from gmemcore.machine.access import Data, as_bytes, check_guest_range, variant_of
from gmemcore.machine.guest_memfd import I64_MAX, GuestMemfd
from gmemcore.machine.huge_pages import HugePagePool, check_order, pool_of
from gmemcore.machine.ioctl import vm_ioctl
from gmemcore.machine.launch import Launch, LaunchUpdateResult
from gmemcore.machine.layouts import layout_of
from gmemcore.machine.memslots import Memslot, Memslots
from gmemcore.machine.versions import Versions
from gmemcore.names import member
from gmemcore.policy import PLATFORMS, Abi, Platform, capability, get_abi
from gmemcore.uapi import (
    PAGE_SIZE,
    ContentMode,
    ContentWork,
    Direction,
    Firmware,
    GuestMemfdFlag,
    MemoryAttribute,
    PageType,
    Phase,
    VmType,
)

MAX_THREADS: Final = 1024
_FILE_OVERLAPS: Final = {"EEXIST": AlreadyExistsError, "EINVAL": InvalidArgumentError}
_RANGE: Final = ("gpa", "size")


class _Parts(NamedTuple):
    """The open files of a Vm, the number ever created, the counters of closed ones, and memslots."""

    files: tuple[GuestMemfd, ...] = ()
    created: int = 0
    closed_files: Counters = Counters()
    memslots: Memslots = Memslots()


class FrozenFile(NamedTuple):
    """One file at one moment; `host` is the state of its shared side if that is a separate memory."""

    gmem: GuestMemfd
    counters: Counters
    state: PackedState
    host: PackedState | None


class FrozenVm(NamedTuple):
    """A Vm at one moment.

    Attributes
    ----------
    phase : Phase
        The launch phase.
    counters : Counters
        Events since creation.
    files : tuple of FrozenFile
        Open files.
    memslots : tuple of Memslot
        In the order of their addresses.
    private_frames : ndarray of uint64, shape (n, 2)
        Runs of private guest frames; empty except in `legacy`.
    """

    phase: Phase
    counters: Counters
    files: tuple[FrozenFile, ...]
    memslots: tuple[Memslot, ...]
    private_frames: Any


class Vm:
    """One guest.

    Parameters
    ----------
    vm_type : VmType, str or int
        DEFAULT, SW_PROTECTED, SNP, TDX or PKVM, in any case, or KVM's number of the type.
    abi : str or Abi
        Revision of the interface: a name (see ``gmemcore policy``) or an `Abi`.
    firmware : Firmware or str
        ``today``, or the hypothetical ``cipher``.
    seed : int
        u64 key of the key stream, which models the cost of encryption and provides no security; and of
        SCRAMBLE.
    backing : str or callable
        ``anonymous``, ``memfd``, ``guest_memfd`` or ``none``, or a function that makes a `Backing` of a size.
    huge_pages : bool, HugePagePool, mapping or int
        The host's pool of huge pages for files with HUGETLB: pages by size, as in ``{"1g": 4}``, one number
        for each size, or a `HugePagePool` that several guests share. A bool asks for transparent huge pages
        of the backing instead, and leaves the pool without a limit.
    prefault : bool
        Allocate all memory at creation: an option of the backing.
    enforce : {'mprotect'} or None
        Make accesses to private pages through `HostMapping.array` fault, using mprotect; for the backings
        memfd and guest_memfd.
    threads : int
        Number of threads for conversions of long ranges, 1 to 1024; affects time only.
    contents : ContentWork or {'eager', 'deferred'}
        When conversions and launch updates change bytes: at once, or when somebody needs them. All results
        are the same. With ``deferred``, a page takes memory only if it was written, and a file can be larger
        than the host's memory. It is for simulation: a benchmark of bytes would measure nothing.
    **options : Any
        Further options of the backing.
    """

    def __init__(
        self,
        vm_type: VmType | str | int,
        abi: str | Abi = "v5",
        firmware: Firmware | str = Firmware.TODAY,
        seed: int = 0,
        backing: str | Callable[..., Backing] = "anonymous",
        *,
        huge_pages: bool | HugePagePool | Mapping[Any, int] | int = False,
        prefault: bool = False,
        enforce: str | None = None,
        threads: int = 1,
        contents: ContentWork | str = ContentWork.EAGER,
        **options: Any,
    ) -> None:
        self.vm_type = member(VmType, vm_type)
        self.firmware = member(Firmware, firmware)
        self.abi = get_abi(abi)
        self.platform: Platform = PLATFORMS[self.vm_type]
        self.seed = as_u64(seed, "seed")
        self._threads = _thread_count(threads)
        self.huge_pages, transparent = pool_of(huge_pages)
        self.contents = member(ContentWork, contents)
        is_deferred = self.contents == ContentWork.DEFERRED
        if is_deferred:
            _check_deferred(backing, prefault=prefault)
        sparse = is_deferred and not callable(backing)
        self._new_backing = _backing_factory(
            backing, huge_pages=transparent, prefault=prefault, sparse=sparse, **options
        )
        self.enforce = _enforcement(enforce, backing)
        self._layout = layout_of(self.abi)
        rules = {phase: compile_rules(self.abi, self.vm_type, self.firmware, phase) for phase in Phase}
        self._owner = Owner(rules, two_backings=self._layout.two_backings)
        self._launch = Launch(self._owner, self.platform, self.abi)
        self._parts: Versions[_Parts] = Versions(_Parts())

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.vm_type}, abi={self.abi.name!r}, firmware={self.firmware.value!r}, "
            f"phase={self.phase.value}, files={len(self.files)}, memslots={len(self.memslots)})"
        )

    def _repr_html_(self) -> str:
        slots = [
            (slot.slot, f"{slot.gpa:#x}", f"{slot.size:#x}", slot.gmem.index, f"{slot.gmem_offset:#x}")
            for slot in self.memslots
        ]
        files = [(gmem.index, gmem.n_pages, gmem.flags.name or "none") for gmem in self.files]
        values = {"abi": self.abi.name, "firmware": self.firmware.value, "phase": self.phase.value}
        return facts(
            f"{type(self).__name__}, {self.vm_type}",
            values,
            table("files", ("file", "pages", "flags"), files),
            table("memslots", ("slot", "gpa", "size", "file", "offset"), slots),
            self.counters._repr_html_(),
        )

    def __reduce_ex__(self, _protocol: SupportsIndex) -> NoReturn:
        raise TypeError("a Vm can't be copied or pickled: it is memory of this process; see gmemcore.take")

    def __enter__(self) -> "Vm":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- what it is ----------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._owner.is_closed

    @property
    def phase(self) -> Phase:
        """LAUNCHING until `launch_finish`, then RUNNING."""
        return self._launch.phase

    @property
    def rules(self) -> Rules:
        """The compiled policy of this Vm in its phase."""
        return self._owner.rules

    @property
    def files(self) -> list[GuestMemfd]:
        """Open files, in the order of their creation."""
        return [gmem for gmem in self._parts.get().files if not gmem.closed]

    @property
    def memslots(self) -> tuple[Memslot, ...]:
        """Memslots, in the order of their addresses."""
        return () if self.closed else self._parts.get().memslots.existing().by_gpa

    @property
    def counters(self) -> Counters:
        """Events since creation; in `legacy`, of both sides."""
        parts = self._parts.get()
        return sum((gmem.counters for gmem in parts.files), parts.closed_files + self._owner.counters)

    def freeze(self, files: Sequence[GuestMemfd] | None = None) -> FrozenVm:
        """Copy page state and counters of all files at one moment.

        Parameters
        ----------
        files : sequence of GuestMemfd or None
            Copy the state of these files only; None: all.

        Returns
        -------
        FrozenVm
            It contains each operation of other threads completely or not at all.

        Raises
        ------
        BadFileError
            EBADF: one of the files is closed.
        """
        while True:
            parts = self._parts.get()
            stores = [*dict.fromkeys(store for gmem in parts.files for store in gmem.sides)]  # in place: one
            moment = self._owner.freeze(stores)
            if parts is self._parts.get():
                break
        frozen = []
        copies = dict(zip(stores, moment.files, strict=True))
        for gmem in parts.files:
            private, shared = copies[gmem.sides.private], copies[gmem.sides.shared]
            same = gmem.sides.private is gmem.sides.shared
            counters = private.counters if same else private.counters + shared.counters
            if private.state is not None:
                frozen.append(FrozenFile(gmem, counters, private.state, None if same else shared.state))
        wanted = frozen if files is None else [file for file in frozen if file.gmem in files]
        if files is not None and len(wanted) != len(files):
            raise BadFileError("the guest_memfd is closed")
        total = sum((file.counters for file in frozen), parts.closed_files + moment.counters)
        return FrozenVm(moment.phase, total, tuple(wanted), parts.memslots.by_gpa, moment.frames)

    def private_frames(self) -> list[tuple[int, int]]:
        """List the runs of private guest frames, half-open; empty except in `legacy`."""
        return self._owner.private_frames()

    def check_cap(self, name: str) -> int:
        """Return the value of a capability, by name with or without ``KVM_CAP_``; 0 if the abi lacks it.

        Raises
        ------
        InvalidArgumentError
            EINVAL: no abi has a capability of that name.
        """
        return capability(self.abi, _text(name, "capability"), self.vm_type, self.firmware)

    # ---- files and memslots --------------------------------------------------------------------

    def create_guest_memfd(
        self, size: int | str, flags: GuestMemfdFlag | str | int = 0, page_order: int = 0
    ) -> GuestMemfd:
        """Create a guest_memfd (KVM_CREATE_GUEST_MEMFD).

        Parameters
        ----------
        size : int or str
            Bytes, a positive multiple of PAGE_SIZE below 2^63, or a size as ``"1g"``.
        flags : GuestMemfdFlag, str or int
            MMAP (1): the host can map it. INIT_SHARED (2): its pages start shared. HUGETLB (4): it consists
            of huge pages, under revisions that have them. Or ``"mmap|init_shared"``.
        page_order : int
            Order of the huge pages: 9 (2 MiB) or 18 (1 GiB). 0 without HUGETLB.

        Raises
        ------
        InvalidArgumentError
            EINVAL: an unsupported flag, order or size; HUGETLB with INIT_SHARED.
        OutOfMemoryError
            ENOMEM: the host has too little memory, or its pool too few huge pages.

        References
        ----------
        kvm_gmem_create; KVM API 4.142.
        """
        size, flags = as_int(size, "size"), as_u64(flags, "guest_memfd flags")
        page_order = as_int(page_order, "page_order")
        offered = self.check_cap("GUEST_MEMFD_FLAGS")
        if flags & ~offered:
            raise InvalidArgumentError(f"guest_memfd flags must be within {offered:#x}, not {flags:#x}")
        check_order(self.abi, GuestMemfdFlag(flags), page_order)
        unit = PAGE_SIZE << page_order
        if not 0 < size <= I64_MAX or size % unit:
            raise InvalidArgumentError(
                f"guest_memfd size must be a positive multiple of {unit:#x} below 2^63, not {size:#x}"
            )
        self._check_open()
        reserved = self.huge_pages.reserve(page_order, size // unit) if page_order else None

        def new_store(*, private: bool, host_maps: bool) -> Store:
            return Store(
                size // PAGE_SIZE,
                self._new_backing(size),
                self._owner,
                private=private,
                seed=self.seed,
                tracking=tracking_column(self.vm_type),
                enforced=host_maps and self.enforce is not None,
                threads=self._threads,
                page_order=page_order,
                deferred=self.contents == ContentWork.DEFERRED,
            )

        wanted = GuestMemfdFlag(flags)
        sides = self._layout.new_sides(new_store, wanted)
        gmem = GuestMemfd(self, self._owner, sides, wanted, reserved)

        def with_it(parts: _Parts) -> _Parts:
            gmem.number(parts.created)
            return parts._replace(files=(*parts.files, gmem), created=parts.created + 1)

        self._parts.update(with_it)
        if self.closed:  # by another thread
            gmem.close()
        self._check_open()
        return gmem

    def _check_open(self) -> None:
        if self.closed:
            raise BadFileError("the Vm is closed")

    def add_memslot(
        self, slot: int, gpa: int | str, size: int | str, gmem: GuestMemfd, gmem_offset: int | str = 0
    ) -> None:
        """Bind a gpa range to a range of one of this Vm's files.

        Raises
        ------
        InvalidArgumentError
            EINVAL: an empty, unaligned or wrapping range; an id above 32763 or in use; more than 2^31 - 1
            pages; a file of another Vm; a range that ends beyond the file; before Linux 6.18, a VM without
            private memory.
        BadFileError
            EBADF: `gmem` isn't an open guest_memfd.
        AlreadyExistsError
            EEXIST: overlap in gpa, or of the file's range (the latter EINVAL up to Linux 6.18).

        Notes
        -----
        The order of the checks is the kernel's: the region alone, overlap in gpa, then the file.

        References
        ----------
        KVM_SET_USER_MEMORY_REGION2: kvm_set_memory_region, then kvm_gmem_bind.
        """
        slot, gpa, size = as_int(slot, "slot"), as_u64(gpa, "gpa"), as_u64(size, "size")
        gmem_offset = as_u64(gmem_offset, "gmem_offset")
        if not (self.abi.shared_files or self.platform.private_memory):
            raise InvalidArgumentError(
                f"a {self.vm_type} VM has no private memory; before 6.18 its memslots have no guest_memfd"
            )

        def with_it(parts: _Parts) -> _Parts:
            memslots = parts.memslots.existing()
            memslots.check_region(slot, gpa, size, gmem_offset)
            if not isinstance(gmem, GuestMemfd) or gmem.closed:
                raise BadFileError(f"{gmem!r} isn't an open guest_memfd")
            if gmem.vm is not self:
                raise InvalidArgumentError("the guest_memfd belongs to another Vm")
            new = Memslot(slot, gpa, size, gmem, gmem_offset)
            return parts._replace(memslots=memslots.bound(new, _FILE_OVERLAPS[self.abi.file_overlap]))

        self._parts.update(with_it)

    def delete_memslot(self, slot: int) -> None:
        """Delete a memslot; its file and the attributes in it stay.

        Raises
        ------
        InvalidArgumentError
            EINVAL: there is no such memslot.
        """
        slot = as_int(slot, "slot")
        deleted = self._parts.get().memslots.existing().named(slot)
        if not self._owner.delete_memslot(*deleted.unmapped):  # another thread deleted it first
            raise InvalidArgumentError(f"there is no memslot {slot}")
        self._parts.update(lambda parts: parts._replace(memslots=parts.memslots.existing()))

    # ---- the guest's view ----------------------------------------------------------------------

    def guest_read(self, gpa: int | str, size: int | str, private: bool | None = None) -> bytes:
        """Read as the guest does.

        Parameters
        ----------
        gpa, size : int
            Bytes.
        private : bool or None
            Kind of the access on SNP and TDX; None: that of each page's attribute.

        Raises
        ------
        MemoryFaultExit, MmioExit, HwPoisonExit, NotValidatedExit
            The exit of KVM_RUN; no data is copied.
        """
        gpa, size = as_u64s((gpa, size), _RANGE)
        variant = variant_of(private)
        check_guest_range(gpa, size)
        return self._owner.read(self._slots(), gpa, size, variant)

    def guest_write(self, gpa: int | str, data: Data, private: bool | None = None) -> None:
        """Write as the guest does; see `guest_read`."""
        gpa, view = as_u64(gpa, "gpa"), as_bytes(data)
        variant = variant_of(private)
        check_guest_range(gpa, len(view))
        self._owner.write(self._slots(), gpa, view, variant)

    def guest_touch(self, gpa: int | str, size: int | str, private: bool | None = None) -> None:
        """Access memory as the guest does, without data; see `guest_read`.

        It has the checks, exits and page state of an access, and works on files without bytes.
        """
        gpa, size = as_u64s((gpa, size), _RANGE)
        variant = variant_of(private)
        check_guest_range(gpa, size)
        self._owner.take(self._slots(), Step.GUEST_READ, gpa, size, variant)

    def accept(self, gpa: int | str, size: int | str) -> Counters:
        """Accept memory as the guest does (PVALIDATE, TDG.MEM.PAGE.ACCEPT); no effect on other VM types.

        Raises
        ------
        InvalidArgumentError
            EINVAL: an empty or unaligned range.
        MemoryFaultExit
            A page is shared, or in no memslot.
        HwPoisonExit
            A page is poisoned.
        """
        gpa, size = as_u64s((gpa, size), _RANGE)
        check_aligned(gpa, size, "accept")
        if self.platform.accept is None:
            return Counters()
        return self._owner.take(self._slots(), Step.ACCEPT, gpa, size)

    def _slots(self) -> Slots:
        return self._parts.get().memslots.slots

    # ---- launch --------------------------------------------------------------------------------

    def launch_update(
        self,
        gpa: int | str,
        size: int | str,
        source: Data | None = None,
        page_type: PageType | str | int = PageType.NORMAL,
    ) -> LaunchUpdateResult:
        """Load part of the initial image (KVM_SEV_SNP_LAUNCH_UPDATE, KVM_TDX_INIT_MEM_REGION).

        Parameters
        ----------
        gpa, size : int
            Bytes, multiples of PAGE_SIZE.
        source : bytes-like or None
            Contents, `size` bytes; None: the contents of the pages. A writable source gets the values of a
            corrected CPUID page.
        page_type : PageType, str or int
            ZERO ignores the source; the firmware can correct a CPUID page (`correct_cpuid`).

        Returns
        -------
        LaunchUpdateResult
            On SNP, ``pages_done`` can be less than requested: a call ends with the memslot of its first page,
            and at the first page that is refused. Call again for the rest, as QEMU does.

        Raises
        ------
        LaunchUpdateError
            With the platform's errno and ``pages_done``. Those pages stay populated, and the refused page is
            allocated.
        InvalidArgumentError
            EINVAL: an empty or unaligned range, a VM type without launch, a source of another size, a page
            type that the platform doesn't support.

        References
        ----------
        snp_launch_update, tdx_vcpu_init_mem_region, __kvm_gmem_populate.
        """
        gpa, size = as_u64s((gpa, size), _RANGE)
        kind = member(PageType, page_type)
        rules = self.platform.populate
        if rules is None:
            raise InvalidArgumentError(
                f"a {self.vm_type} VM has no launch updates; write its memory with host_write"
            )
        check_aligned(gpa, size, "launch update", most=None if rules.one_memslot else U64_MAX)
        view = None if source is None else as_bytes(source)
        if view is not None and len(view) != size:
            raise InvalidArgumentError(f"the source must be {size:#x} bytes, not {len(view):#x}")
        return self._launch.update(self._slots(), gpa, size, view, kind)

    def launch_finish(self, vmsas: Sequence[Data] | None = None) -> None:
        """End the launch phase (SNP_LAUNCH_FINISH, TDX finalize).

        Parameters
        ----------
        vmsas : sequence of bytes-like, PAGE_SIZE bytes each
            Each vCPU's VMSA. KVM encrypts and measures these pages itself, before the firmware finishes the
            measurement; they aren't guest memory. They have no effect unless a launch digest is kept.

        Raises
        ------
        InvalidArgumentError
            EINVAL: a VMSA of another size. The launch phase goes on.
        LaunchFinishError
            With the platform's errno: the launch is already finished.

        References
        ----------
        snp_launch_finish, snp_launch_update_vmsa; tdx_td_finalize.
        """
        self._launch.finish(vmsas)

    def start_measurement(self) -> None:
        """Start keeping a launch digest of all pages that launch updates populate (SNP).

        It is opt-in, because hashing costs more than populating. A page is measured in clear, before it is
        encrypted, with the gpa of the call, and only if it is populated. `launch_finish` measures VMSA pages.

        Raises
        ------
        UnsupportedOperationError
            EOPNOTSUPP: the platform's launch isn't measured.
        InvalidArgumentError
            EINVAL: it was started before, or a launch update or the end of the launch came first.
        """
        self._launch.start_measurement()

    @property
    def launch_measurement(self) -> bytes:
        """The launch digest of the pages populated so far, 48 bytes; final after `launch_finish`.

        Raises
        ------
        InvalidArgumentError
            EINVAL: `start_measurement` wasn't called.
        """
        return self._launch.measurement

    def correct_cpuid(self, corrected: Data | None) -> None:
        """Make the firmware refuse the next CPUID page and leave these bytes in it; None: accept it."""
        self._launch.correct_cpuid(corrected)

    # ---- the VM fd -----------------------------------------------------------------------------

    def set_memory_attributes(
        self,
        address: int | str,
        size: int | str,
        attributes: MemoryAttribute | str | int,
        flags: ContentMode | str | int = 0,
    ) -> ConversionResult:
        """Set attributes of guest frames (KVM_SET_MEMORY_ATTRIBUTES): the conversion of `legacy`.

        Parameters
        ----------
        address, size : int or str
            Guest physical address and size in bytes, multiples of PAGE_SIZE; no memslot is needed.
        attributes : MemoryAttribute, str or int
            PRIVATE (8) if the capability MEMORY_ATTRIBUTES has it, or 0, ``"shared"``.
        flags : int
            Must be 0.

        Raises
        ------
        InvalidArgumentError
            EINVAL: nonzero flags; an unknown attribute (in place: any attribute); an empty, wrapping or
            unaligned range.

        References
        ----------
        kvm_vm_ioctl_set_mem_attributes; KVM API 4.141.
        """
        request = as_u64s((address, size, attributes, flags), ("address", "size", "attributes", "flags"))
        return ConversionResult(self._owner.set_attributes(*request))

    def convert(self, address: int | str, size: int | str, to: Direction | str | int) -> ConversionResult:
        """Convert a range of guest frames in `legacy`: a simpler form of `set_memory_attributes`.

        For conversion in place, use `GuestMemfd.convert`.

        Parameters
        ----------
        address, size : int or str
            Guest physical address and size in bytes, multiples of PAGE_SIZE: ``0x1000`` or ``"2m"``.
        to : Direction, str or int
            ``"private"`` or ``"shared"``.

        Raises
        ------
        InvalidArgumentError
            EINVAL: the abi converts in place, or an empty, wrapping or unaligned range.
        """
        return self.set_memory_attributes(address, size, as_u64(to, "attributes"))

    def ioctl(self, request: int, argument: bytearray | bytes | None) -> None:
        """Do a raw ioctl: request 0x4020AED2 and ``struct kvm_memory_attributes``."""
        vm_ioctl(self, as_u64(request, "request"), argument)

    def close(self) -> None:
        """Close all files of this Vm and drop its memslots. Closing it again has no effect.

        The memory of page state is released at once, without waiting for Python's garbage collector.
        """
        parts = self._parts.get()
        self._owner.close([store for gmem in parts.files for store in gmem.sides], all_of_it=True)
        for gmem in parts.files:
            gmem.drop_memory()
        self._parts.update(lambda parts: _without_closed(parts)._replace(memslots=Memslots()))

    def forget(self, gmem: GuestMemfd) -> None:
        """Drop a closed file; keep its counters in the total."""
        self._parts.update(_without_closed)


class LegacyVm(Vm):
    """A `Vm` of the abi ``legacy``, with two backings."""

    def __init__(
        self, vm_type: VmType | str | int, abi: str | Abi = "legacy", *args: Any, **options: Any
    ) -> None:
        super().__init__(vm_type, abi, *args, **options)
        if not self._layout.two_backings:
            raise InvalidArgumentError(f"abi {self.abi.name} converts in place; use Vm or create_vm")


def _without_closed(parts: _Parts) -> _Parts:
    """Drop closed files, and keep their counters."""
    closed = [gmem for gmem in parts.files if gmem.closed]
    return parts._replace(
        files=tuple(gmem for gmem in parts.files if gmem not in closed),
        closed_files=sum((gmem.counters for gmem in closed), parts.closed_files),
    )


def _thread_count(threads: int) -> int:
    if not 1 <= as_int(threads, "threads") <= MAX_THREADS:
        raise InvalidArgumentError(f"threads must be 1 to {MAX_THREADS}, not {threads}")
    return int(threads)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, not {type(value).__name__}")
    return value


def _check_deferred(backing: str | Callable[..., Backing], *, prefault: bool) -> None:
    """Raise unless contents of a backing can be deferred."""
    if isinstance(backing, str) and backing.lower() == "none":
        raise InvalidArgumentError("deferred contents need a backing with bytes, not none")
    if prefault:
        raise InvalidArgumentError("deferred contents take memory page by page; leave prefault out")


def _enforcement(enforce: str | None, backing: str | Callable[..., Backing]) -> str | None:
    """Check `enforce`, and that the backing supports it."""
    if enforce is None:
        return None
    if _text(enforce, "enforce").lower() != "mprotect":
        raise InvalidArgumentError(f"enforce must be 'mprotect' or None, not {enforce!r}")
    if isinstance(backing, str):  # a factory's backing is checked when it is made
        require_shared(BACKINGS[backing.lower()], backing.lower())
    return "mprotect"


def _backing_factory(backing: str | Callable[..., Backing], **options: object) -> BackingFactory:
    if not callable(backing):
        return backing_factory(_text(backing, "backing").lower(), **options)
    for option, value in options.items():
        if value is not False:
            raise InvalidArgumentError(f"{option} needs a backing by name")
    return backing
