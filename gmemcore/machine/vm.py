"""Vm: one guest, with its memslots, launch phase, key and guest_memfds; conversion in place.

``VmFace`` is the public face that Vm and LegacyVm (legacy.py) share. They differ in where attributes live and
what stands behind a guest physical address: the three methods at the end of each.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from gmemcore.engine.arguments import U64_MAX, as_int, as_u64, check_aligned
from gmemcore.engine.backing import BACKINGS, Backing
from gmemcore.engine.conversion import (
    ConversionResult,
    Rules,
    compile_rules,
    pack_operations,
    tracking_column,
)
from gmemcore.engine.counters import Counters
from gmemcore.engine.host_view import require_shared
from gmemcore.engine.steps import (
    ACCEPT_OPERATIONS,
    ACCEPT_TERMS,
    GUEST_TERMS,
    NO_PAGE,
    NOT_ACCEPTED,
    hole_of,
)
from gmemcore.engine.store import Store
from gmemcore.errors import (
    AlreadyExistsError,
    BadFileError,
    InvalidArgumentError,
    LaunchFinishError,
    LaunchUpdateError,
    MemoryFaultExit,
    UnsupportedOperationError,
)
from gmemcore.html import facts, table
from gmemcore.machine import access
from gmemcore.machine.access import Segment
from gmemcore.machine.guest_memfd import I64_MAX, GuestMemfd
from gmemcore.machine.launch import Image, LaunchUpdateResult, launch_update
from gmemcore.machine.measurement import VMSA_GPA, LaunchDigest
from gmemcore.machine.memslots import Memslot, Memslots
from gmemcore.names import member
from gmemcore.policy import PLATFORMS, Abi, Platform, Populate, capability, get_abi
from gmemcore.uapi import (
    PAGE_SHIFT,
    PAGE_SIZE,
    ContentMode,
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


class VmFace:
    """What every Vm offers. Build one with `create_vm`, `Vm` or `LegacyVm`.

    Parameters
    ----------
    vm_type : VmType, str or int
        DEFAULT, SW_PROTECTED, SNP, TDX or PKVM, in any case, or KVM's number of the type.
    abi : str or Abi
        Revision of the interface; a user's own `Abi` will do.
    firmware : Firmware or str
        ``today``, or the hypothetical ``cipher``.
    seed : int
        u64: the key of the key stream, a cost model and no encryption, and of SCRAMBLE.
    backing : str or callable
        A name of ``BACKINGS`` (anonymous, memfd, guest_memfd, none), or what makes one of a size.
    huge_pages, prefault : bool
        Passed to the backing where set.
    enforce : {'mprotect'} or None
        Give each file that the host may map a mapping of the host's own, in which private pages really fault
        (`HostMapping.array`). It needs a backing that can be mapped twice: memfd or guest_memfd.
    threads : int
        Threads that transform the bytes of a long range, 1 to 1024; the bytes are the same for any number.
    """

    def __init__(
        self,
        vm_type: VmType | str | int,
        abi: str | Abi = "v5",
        firmware: Firmware | str = Firmware.TODAY,
        seed: int = 0,
        backing: str | Callable[..., Backing] = "anonymous",
        *,
        huge_pages: bool = False,
        prefault: bool = False,
        enforce: str | None = None,
        threads: int = 1,
    ) -> None:
        self.vm_type = member(VmType, vm_type)
        self.firmware = member(Firmware, firmware)
        self.abi = get_abi(abi)
        self.platform: Platform = PLATFORMS[self.vm_type]
        self.seed = as_u64(seed, "seed")
        self.lock = threading.RLock()
        self.files: list[GuestMemfd] = []
        self._files_created = 0
        self._closed = False
        self._closed_files_counters = Counters()
        self._threads = _thread_count(threads)
        self._new_backing = _backing_factory(backing, huge_pages=huge_pages, prefault=prefault)
        self.enforce = _enforcement(enforce, backing)
        self._phase = Phase.LAUNCHING
        self._rules = compile_rules(self.abi, self.vm_type, self.firmware, self._phase)
        self._known_attributes = self.check_cap("MEMORY_ATTRIBUTES")  # of the VM fd
        self._memslots: Memslots[GuestMemfd] = Memslots()
        self._memory_faults = 0
        self._cpuid_correction: bytes | None = None
        self._launch_began = False
        self._has_vcpus = True
        self._launch_digest: LaunchDigest | None = None

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.vm_type}, abi={self.abi.name!r}, firmware={self.firmware.value!r}, "
            f"phase={self._phase.value}, files={len(self.files)}, memslots={len(self._memslots)})"
        )

    def _repr_html_(self) -> str:
        with self.lock:
            slots = [
                (slot.slot, f"{slot.gpa:#x}", f"{slot.size:#x}", slot.gmem.index, f"{slot.gmem_offset:#x}")
                for slot in self._memslots
            ]
            files = [(gmem.index, gmem.n_pages, gmem.flags.name or "none") for gmem in self.files]
            counters = self.counters
        values = {"abi": self.abi.name, "firmware": self.firmware.value, "phase": self._phase.value}
        return facts(
            f"{type(self).__name__}, {self.vm_type}",
            values,
            table("files", ("file", "pages", "flags"), files),
            table("memslots", ("slot", "gpa", "size", "file", "offset"), slots),
            counters._repr_html_(),
        )

    def __enter__(self) -> "VmFace":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- what it is ----------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    @property
    def phase(self) -> Phase:
        """LAUNCHING until `launch_finish`, then RUNNING."""
        return self._phase

    @property
    def rules(self) -> Rules:
        """Policy compiled for this Vm and its phase."""
        return self._rules

    @property
    def memslots(self) -> tuple[Memslot[GuestMemfd], ...]:
        """Memslots, in the order of their addresses."""
        with self.lock:
            return tuple(self._memslots)

    @property
    def counters(self) -> Counters:
        """Events of this Vm since its creation."""
        with self.lock:
            total = self._closed_files_counters + Counters(memory_faults=self._memory_faults)
            for gmem in self.files:
                total += gmem.counters
            return total

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Hold every lock of this Vm: inside the ``with`` nothing changes but by this thread."""
        with self.lock:
            stores = [store for gmem in self.files for store in (gmem._store, gmem._host)]
            with access.locked([Segment(0, 0, store, 0) for store in stores]):
                yield

    def check_cap(self, name: str) -> int:
        """Ask a capability by name, with or without ``KVM_CAP_``; one that the abi lacks answers 0.

        Raises
        ------
        InvalidArgumentError
            EINVAL: no capability of that name exists anywhere.
        """
        return capability(self.abi, _text(name, "capability"), self.vm_type, self.firmware)

    # ---- files and memslots --------------------------------------------------------------------

    def create_guest_memfd(self, size: int | str, flags: GuestMemfdFlag | str | int = 0) -> GuestMemfd:
        """KVM_CREATE_GUEST_MEMFD.

        Parameters
        ----------
        size : int or str
            Bytes, a multiple of PAGE_SIZE, signed 64 bits; or a size as ``"1g"``.
        flags : GuestMemfdFlag, str or int
            MMAP (1), the host can map it; INIT_SHARED (2), its pages start shared; ``"mmap|init_shared"``.

        Raises
        ------
        InvalidArgumentError
            EINVAL: a flag that isn't offered; size zero, negative or unaligned.
        OutOfMemoryError
            ENOMEM: the host can't hold it.

        References
        ----------
        kvm_gmem_create; KVM API 4.142.
        """
        size, flags = as_int(size, "size"), as_u64(flags, "guest_memfd flags")
        offered = self.check_cap("GUEST_MEMFD_FLAGS")
        if flags & ~offered:
            raise InvalidArgumentError(
                f"guest_memfd flags {flags:#x}; bits of {offered:#x} would be accepted"
            )
        if not 0 < size <= I64_MAX or size % PAGE_SIZE:
            raise InvalidArgumentError(
                f"guest_memfd size {size:#x}; a positive multiple of {PAGE_SIZE:#x} below 2^63 is accepted"
            )
        with self.lock:
            if self._closed:
                raise BadFileError("the Vm is closed")
            store, host = self._new_stores(size, GuestMemfdFlag(flags))
            gmem = GuestMemfd(self, store, host, GuestMemfdFlag(flags))
            self.files.append(gmem)
            self._files_created += 1
            return gmem

    def add_memslot(
        self, slot: int, gpa: int | str, size: int | str, gmem: GuestMemfd, gmem_offset: int | str = 0
    ) -> None:
        """Bind a gpa range to a range of one of this Vm's files.

        Raises
        ------
        InvalidArgumentError
            EINVAL: an empty, unaligned or wrapping range; an id above 32763, or one that exists; more than
            2^31 - 1 pages; another Vm's file, or beyond its end.
        BadFileError
            EBADF: not an open guest_memfd.
        AlreadyExistsError
            EEXIST: overlap in gpa, or of the file's range (there EINVAL up to Linux 6.18).

        Notes
        -----
        The checks come in the kernel's order: the region by itself, overlap in gpa, then the file.

        References
        ----------
        KVM_SET_USER_MEMORY_REGION2: kvm_set_memory_region, then kvm_gmem_bind.
        """
        slot, gpa, size = as_int(slot, "slot"), as_u64(gpa, "gpa"), as_u64(size, "size")
        gmem_offset = as_u64(gmem_offset, "gmem_offset")
        if not (self.abi.shared_files or self.platform.private_memory):
            raise InvalidArgumentError(f"a {self.vm_type} VM has no memslots with a guest_memfd before 6.18")
        with self.lock:
            self._memslots.check_region(slot, gpa, size, gmem_offset)
            if not isinstance(gmem, GuestMemfd) or gmem.closed:
                raise BadFileError(f"{gmem!r} isn't an open guest_memfd")
            if gmem.vm is not self:
                raise InvalidArgumentError("the guest_memfd belongs to another Vm")
            overlap = _FILE_OVERLAPS[self.abi.file_overlap]
            self._memslots.bind(Memslot(slot, gpa, size, gmem, gmem_offset), gmem.size, overlap)

    def delete_memslot(self, slot: int) -> None:
        """Delete a memslot; its file and the attributes there stay.

        On TDX its pages leave the S-EPT, which clears them: the guest has to accept them again.

        Raises
        ------
        InvalidArgumentError
            EINVAL: there is none.
        """
        with self.lock:
            deleted = self._memslots.delete(as_int(slot, "slot"))
            if not deleted.gmem.closed:
                start = deleted.gmem_offset >> PAGE_SHIFT
                self.unmap(deleted.gmem, start, start + (deleted.size >> PAGE_SHIFT))

    def unmap(self, gmem: GuestMemfd, start: int, end: int) -> None:
        """Unmap pages of a file from the guest, which leaves them private."""
        if self.platform.unmapping_removes:
            gmem._store.unassign(start, end, pack_operations(self.platform.to_shared))

    # ---- the guest's view ----------------------------------------------------------------------

    def guest_read(self, gpa: int | str, size: int | str, private: bool | None = None) -> bytes:
        """Read as the guest does.

        Parameters
        ----------
        gpa, size : int
            Bytes.
        private : bool or None
            Kind of the access on SNP and TDX; None follows each page's attribute.

        Raises
        ------
        MemoryFaultExit, MmioExit, HwPoisonExit, NotValidatedExit
            The exit that KVM_RUN would make; no data moves.
        """
        gpa, size = as_u64(gpa, "gpa"), as_u64(size, "size")
        with self._checked_access(gpa, size, private) as segments:
            return access.read_segments(segments, self.platform.coco)

    def guest_write(
        self,
        gpa: int | str,
        data: bytes | bytearray | memoryview | NDArray[np.uint8],
        private: bool | None = None,
    ) -> None:
        """Write as the guest does; see `guest_read`."""
        gpa, view = as_u64(gpa, "gpa"), access.as_bytes(data)
        with self._checked_access(gpa, len(view), private) as segments:
            access.write_segments(segments, view, self.platform.coco)

    def guest_touch(self, gpa: int | str, size: int | str, private: bool | None = None) -> None:
        """Access memory as the guest does and move no data; see `guest_read`.

        It has the checks, exits and page state of an access, costs no copy, and works on files that hold
        attributes only.
        """
        gpa, size = as_u64(gpa, "gpa"), as_u64(size, "size")
        with self._checked_access(gpa, size, private, moves_data=False) as segments:
            access.touch_segments(segments)

    def accept(self, gpa: int | str, size: int | str) -> Counters:
        """The guest's accept: PVALIDATE, TDG.MEM.PAGE.ACCEPT. No effect where pages aren't accepted.

        Raises
        ------
        InvalidArgumentError
            EINVAL: empty or unaligned.
        MemoryFaultExit
            No memslot there, or a shared page.
        HwPoisonExit
            A poisoned page.
        """
        gpa, size = as_u64(gpa, "gpa"), as_u64(size, "size")
        check_aligned(gpa, size, "accept")
        if self.platform.accept is None:
            return Counters()
        operations = ACCEPT_OPERATIONS[self.platform.accept]
        with self.lock:
            segments = self._resolve(gpa, size, private_side=True)
            with access.locked(segments):
                self._raise_refused(access.first_refused(segments, ACCEPT_TERMS, NO_PAGE), True)
                access.promise(segments)
                total = Counters()
                for segment in segments:
                    assert segment.store is not None
                    total += segment.store.accept(*segment.pages, operations, promised=True)
                return total

    def _checked_access(
        self, gpa: int, size: int, private: bool | None, *, moves_data: bool = True
    ) -> "_CheckedAccess":
        if private is not None and not isinstance(private, (bool, np.bool_)):
            raise TypeError(f"private is True, False or None, not {type(private).__name__}")
        access.check_guest_range(gpa, size)
        return _CheckedAccess(self, gpa, size, private, moves_data)

    def _raise_refused(self, refused: access.Refused | None, private: bool | None) -> None:
        """Raise the exit of a refused guest access, with what it leaves behind."""
        if refused is None:
            return
        if refused.term.mark:
            assert refused.segment.store is not None
            refused.segment.store.mark(refused.page, refused.term.mark)
        error = access.guest_exit(refused, bool(private))
        if isinstance(error, MemoryFaultExit):
            self._memory_faults += 1
        raise error

    # ---- launch --------------------------------------------------------------------------------

    def launch_update(
        self,
        gpa: int | str,
        size: int | str,
        source: bytes | bytearray | memoryview | NDArray[np.uint8] | None = None,
        page_type: PageType | str | int = PageType.NORMAL,
    ) -> LaunchUpdateResult:
        """Load a part of the initial image (KVM_SEV_SNP_LAUNCH_UPDATE, KVM_TDX_INIT_MEM_REGION).

        Parameters
        ----------
        gpa, size : int
            Bytes, multiples of PAGE_SIZE.
        source : bytes-like or None
            Contents, `size` bytes; None takes what is in place. One that can be written gets the values of a
            corrected CPUID page.
        page_type : PageType, str or int
            ZERO ignores the source; CPUID can be corrected by the firmware (`correct_cpuid`).

        Returns
        -------
        LaunchUpdateResult
            On SNP its ``pages_done`` can be fewer than asked for: a call ends with the memslot of its first
            page, and at the first page that is refused. Call again for the rest, as QEMU does.

        Raises
        ------
        LaunchUpdateError
            With the platform's errno and ``pages_done``; those pages stay, and the one that refused is
            allocated.
        InvalidArgumentError
            EINVAL: empty or unaligned, a VM without launch, a source of another size, a page type that the
            platform doesn't take.

        References
        ----------
        snp_launch_update, tdx_vcpu_init_mem_region, __kvm_gmem_populate.
        """
        gpa, size = as_u64(gpa, "gpa"), as_u64(size, "size")
        kind = member(PageType, page_type)
        rules = self.platform.populate
        if rules is None:
            raise InvalidArgumentError(
                f"a {self.vm_type} VM has no launch; its memory is written by the host"
            )
        check_aligned(gpa, size, "launch update", most=None if rules.one_memslot else U64_MAX)
        view = None if source is None else access.as_bytes(source)
        if view is not None and len(view) != size:
            raise InvalidArgumentError(f"the source must be {size:#x} bytes, not {len(view):#x}")
        image = Image(None if kind == PageType.ZERO else view, kind)
        self._check_populate(rules, image)
        with self.lock:
            if rules.checks_phase and self._phase == Phase.RUNNING:
                raise LaunchUpdateError(
                    "the launch is finished: no more of the image can be loaded", "EINVAL", 0
                )
            if rules.one_memslot:
                slot = self._memslots.at(gpa)
                if slot is None:
                    raise LaunchUpdateError(f"no memslot at gpa {gpa:#x}", "EINVAL", 0)
                size = min(size, slot.gpa + slot.size - gpa)
            segments = self._resolve(gpa, size, private_side=True)
            with access.locked(segments):
                if view is not None or self._launch_digest is not None:
                    access.require_bytes(segments)
                self._launch_began = True
                image.digest = self._launch_digest
                return launch_update(self, segments, image)

    def _check_populate(self, rules: Populate, image: Image) -> None:
        """Refuse an image whatever the pages."""
        if image.page_type in rules.refused_types:
            raise InvalidArgumentError(
                f"a {self.vm_type} VM takes no {image.page_type} pages; pass them to launch_finish"
            )
        if self.abi.legacy and self.platform.coco and image.in_place:
            raise InvalidArgumentError(f"abi {self.abi.name} has no populate in place; a source is needed")

    def launch_finish(
        self, vmsas: Sequence[bytes | bytearray | memoryview | NDArray[np.uint8]] | None = None
    ) -> None:
        """End the launch phase (SNP_LAUNCH_FINISH, TDX finalize).

        Parameters
        ----------
        vmsas : sequence of bytes-like, PAGE_SIZE bytes each, or None
            Each vCPU's VMSA; none for a VM without vCPUs. KVM encrypts and measures these pages before the
            firmware closes the measurement; they aren't guest memory. None: there are vCPUs, and their
            VMSAs don't enter the launch digest.

        Raises
        ------
        InvalidArgumentError
            EINVAL: a VMSA of another size. The launch goes on.
        LaunchFinishError
            SNP and TDX: the launch is finished already. EINVAL; EIO on SNP if the VM has no vCPUs.

        References
        ----------
        snp_launch_finish, snp_launch_update_vmsa; tdx_td_finalize.
        """
        pages = [access.as_bytes(vmsa).tobytes() for vmsa in vmsas or ()]
        for page in pages:
            if len(page) != PAGE_SIZE:
                raise InvalidArgumentError(f"a VMSA must be {PAGE_SIZE} bytes, not {len(page)}")
        with self.lock:
            if self._phase == Phase.LAUNCHING:
                self._has_vcpus = vmsas is None or len(pages) > 0
            elif again := self._finish_again():
                raise LaunchFinishError("the launch is finished already", again)
            with access.locked([Segment(0, 0, gmem._store, 0) for gmem in self.files]):
                if self._launch_digest is not None:
                    for page in pages:
                        self._launch_digest.update(VMSA_GPA, PageType.VMSA, page)
                self._phase = Phase.RUNNING
                self._rules = compile_rules(self.abi, self.vm_type, self.firmware, self._phase)

    def _finish_again(self) -> str | None:
        """Errno name of a second launch_finish, if it is refused."""
        if self._has_vcpus:
            return self.platform.finish_again
        return self.platform.finish_again_without_vcpus

    def start_measurement(self) -> None:
        """Keep a launch digest of every page that a launch update populates from now on (SNP).

        It is opt-in, because hashing costs more than populating. A page is measured in clear, before it is
        encrypted, with the gpa of the call, and only if it was populated. VMSA pages are measured by
        `launch_finish`.

        Raises
        ------
        UnsupportedOperationError
            EOPNOTSUPP: the platform's launch isn't measured here.
        InvalidArgumentError
            EINVAL: twice, or after a launch update or the launch: the digest would lack what came before.
        """
        with self.lock:
            if self.platform.populate is None or not self.platform.populate.measures:
                measured = [name for name, row in PLATFORMS.items() if row.populate and row.populate.measures]
                raise UnsupportedOperationError(
                    f"the launch of a {self.vm_type} VM isn't measured; that of {', '.join(measured)} is"
                )
            if self._launch_began or self._launch_digest is not None or self._phase == Phase.RUNNING:
                raise InvalidArgumentError(
                    "the measurement or the launch has begun; once, before its first update, is accepted"
                )
            self._launch_digest = LaunchDigest()

    @property
    def launch_measurement(self) -> bytes:
        """Launch digest of the pages populated so far, 48 bytes; final after `launch_finish`.

        Raises
        ------
        InvalidArgumentError
            EINVAL: `start_measurement` wasn't called.
        """
        with self.lock:
            if self._launch_digest is None:
                raise InvalidArgumentError(
                    "the launch isn't measured; start_measurement() before its first update would do it"
                )
            return self._launch_digest.digest

    def correct_cpuid(self, corrected: bytes | None) -> None:
        """Let the firmware refuse the next CPUID page and leave these bytes in its place; None: no more."""
        view = None if corrected is None else access.as_bytes(corrected)
        if view is not None and len(view) > PAGE_SIZE:
            raise InvalidArgumentError(f"a correction of {len(view)} bytes; 1 to {PAGE_SIZE} is accepted")
        self._cpuid_correction = None if view is None else view.tobytes()

    def takes_cpuid_correction(self, page_type: PageType) -> bool:
        """Whether a page of this type would be corrected now."""
        return page_type == PageType.CPUID and self._cpuid_correction is not None

    def take_cpuid_correction(self) -> bytes:
        """The firmware's bytes; the correction happens once."""
        corrected, self._cpuid_correction = self._cpuid_correction, None
        assert corrected is not None
        return corrected

    # ---- the VM fd -----------------------------------------------------------------------------

    def set_memory_attributes(
        self,
        address: int | str,
        size: int | str,
        attributes: MemoryAttribute | str | int,
        flags: ContentMode | str | int = 0,
    ) -> ConversionResult:
        """KVM_SET_MEMORY_ATTRIBUTES on the VM fd: `legacy`'s conversion; elsewhere it knows no attribute.

        Parameters
        ----------
        address, size : int or str
            Guest physical bytes, multiples of PAGE_SIZE; no memslot is needed.
        attributes : MemoryAttribute, str or int
            PRIVATE (8) where the capability MEMORY_ATTRIBUTES says so, or 0, ``"shared"``.
        flags : int
            Must be 0.

        Raises
        ------
        InvalidArgumentError
            EINVAL: flags, an attribute it doesn't know, an empty, wrapping or unaligned range.

        References
        ----------
        kvm_vm_ioctl_set_mem_attributes; KVM API 4.141.
        """
        address, size = as_u64(address, "address"), as_u64(size, "size")
        attributes, flags = as_u64(attributes, "attributes"), as_u64(flags, "flags")
        if flags:
            raise InvalidArgumentError(f"flags {flags:#x}; must be 0")
        known = self._known_attributes
        if attributes & ~known:
            raise InvalidArgumentError(f"attributes {attributes:#x} {self._attributes_belong()}")
        check_aligned(address, size, "attribute range", most=U64_MAX)
        private = bool(attributes & MemoryAttribute.PRIVATE)
        return ConversionResult(self._set_vm_attributes(address, size, private))

    def convert(self, address: int | str, size: int | str, to: Direction | str | int) -> ConversionResult:
        """Convert a range of guest frames, on an abi whose attributes belong to the Vm (`legacy`).

        The everyday form of `set_memory_attributes`. In place, `GuestMemfd.convert` is the call.

        Parameters
        ----------
        address, size : int or str
            Guest physical bytes, multiples of PAGE_SIZE, as ``0x1000`` or ``"2m"``.
        to : Direction, str or int
            ``"private"`` or ``"shared"``.

        Raises
        ------
        InvalidArgumentError
            EINVAL: attributes belong to the guest_memfd here, or an empty, wrapping or unaligned range.
        """
        return self.set_memory_attributes(address, size, as_u64(to, "attributes"))

    def _attributes_belong(self) -> str:
        """Say where this Vm's attributes are set, for an error."""
        if self._known_attributes:
            return f"must be PRIVATE ({self._known_attributes:#x}) or 0"
        if self.check_cap("GUEST_MEMFD_MEMORY_ATTRIBUTES"):
            return (
                f"can't be set on the Vm: under abi {self.abi.name} they belong to the guest_memfd; "
                "use GuestMemfd.convert or GuestMemfd.set_memory_attributes"
            )
        return f"must be 0: a {self.vm_type} VM has no private memory under abi {self.abi.name}"

    def ioctl(self, request: int, argument: bytearray | bytes | None) -> None:
        """Raw form of `set_memory_attributes`: request 0x4020AED2 and ``struct kvm_memory_attributes``."""
        from gmemcore.machine.ioctl import vm_ioctl

        vm_ioctl(self, as_u64(request, "request"), argument)

    def close(self) -> None:
        """Close every file of this Vm, and let go of its memslots. Closing twice is allowed.

        Nothing then refers to the files' page state in a circle: it is given back at once, not when Python
        next looks for circles.
        """
        with self.lock:
            self._closed = True
            for gmem in tuple(self.files):
                gmem.close()
            self._memslots = Memslots()

    def forget(self, gmem: GuestMemfd) -> None:
        """Let a file that is being closed go; what it counted stays."""
        with self.lock:
            if gmem in self.files:
                self._closed_files_counters += gmem.counters
                self.files.remove(gmem)

    def count_memory_faults(self, n: int) -> None:
        """Count exits that a batch of accesses made."""
        with self.lock:
            self._memory_faults += n

    # ---- what Vm and LegacyVm do differently -----------------------------------------------------

    def _new_stores(self, size: int, flags: GuestMemfdFlag) -> tuple[Store, Store]:
        """A new file's store, and the store that its host mapping shows."""
        raise NotImplementedError

    def _resolve(self, gpa: int, size: int, *, private_side: bool = False) -> list[Segment]:
        """What stands behind a gpa range now, in order; private_side: the gmem whatever the attribute."""
        raise NotImplementedError

    def _set_vm_attributes(self, address: int, size: int, private: bool) -> Counters:
        """Set the Vm's own attributes over a checked range."""
        raise NotImplementedError

    def _new_store(self, size: int, *, private: bool, host_maps: bool) -> Store:
        return Store(
            size // PAGE_SIZE,
            self._new_backing(size),
            private=private,
            seed=self.seed,
            file_index=self._files_created,
            tracking=tracking_column(self.vm_type),
            enforced=host_maps and self.enforce is not None,
            threads=self._threads,
        )


class Vm(VmFace):
    """One guest whose memory is converted in place: attributes belong to the file."""

    def __init__(
        self, vm_type: VmType | str | int, abi: str | Abi = "v5", *args: Any, **options: Any
    ) -> None:
        super().__init__(vm_type, abi, *args, **options)
        if self.abi.legacy:
            raise InvalidArgumentError(
                f"abi {self.abi.name} has two backings; create_vm makes a LegacyVm of it"
            )

    def _new_stores(self, size: int, flags: GuestMemfdFlag) -> tuple[Store, Store]:
        private, mappable = not flags & GuestMemfdFlag.INIT_SHARED, bool(flags & GuestMemfdFlag.MMAP)
        store = self._new_store(size, private=private, host_maps=mappable)
        return store, store

    def _resolve(self, gpa: int, size: int, *, private_side: bool = False) -> list[Segment]:
        return [
            Segment(start, end - start, None, 0, closed=slot is not None)
            if slot is None or slot.gmem.closed
            else Segment(start, end - start, slot.gmem._store, start - slot.gpa + slot.gmem_offset)
            for start, end, slot in self._memslots.walk(gpa, size)
        ]

    def _set_vm_attributes(self, address: int, size: int, private: bool) -> Counters:
        return Counters()


class _CheckedAccess:
    """The segments of a guest access that may go on, with all locks held inside the ``with``."""

    __slots__ = ("_locks", "_vm", "gpa", "moves_data", "private", "size")

    def __init__(self, vm: VmFace, gpa: int, size: int, private: bool | None, moves_data: bool) -> None:
        self._vm, self.gpa, self.size, self.private = vm, gpa, size, private
        self.moves_data = moves_data

    def __enter__(self) -> list[Segment]:
        vm = self._vm
        vm.lock.acquire()
        try:
            segments = vm._resolve(self.gpa, self.size)
            self._locks = access.locked(segments)
            self._locks.__enter__()
        except BaseException:
            vm.lock.release()
            raise
        require = access.require_bytes if self.moves_data else access.require_open
        try:
            require(segments)
            terms = GUEST_TERMS[vm.platform.coco, self.private]
            refused = access.first_refused(segments, terms, hole_of(vm.platform, self.private))
            vm._raise_refused(refused, self._kind(refused))
        except BaseException:
            self.__exit__()
            raise
        return segments

    def __exit__(self, *_: object) -> None:
        self._locks.__exit__(None, None, None)
        self._vm.lock.release()

    def _kind(self, refused: access.Refused | None) -> bool:
        """Kind of the refused access: the guest's choice, or the page's attribute."""
        if refused is None or (self._vm.platform.coco and self.private is not None):
            return bool(self.private)
        return bool(refused.segment.private) or refused.term is NOT_ACCEPTED


def _thread_count(threads: int) -> int:
    if not 1 <= as_int(threads, "threads") <= MAX_THREADS:
        raise InvalidArgumentError(f"threads {threads}; 1 to {MAX_THREADS} would be accepted")
    return int(threads)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, not {type(value).__name__}")
    return value


def _enforcement(enforce: str | None, backing: str | Callable[..., Backing]) -> str | None:
    """Check what enforces the host's view, and that the backing can be mapped for it."""
    if enforce is None:
        return None
    if _text(enforce, "enforce").lower() != "mprotect":
        raise InvalidArgumentError(f"unknown enforcement {enforce!r}; use 'mprotect' or None")
    if isinstance(backing, str):  # what a factory makes is seen when it has made it
        require_shared(BACKINGS[backing.lower()], repr(backing))
    return "mprotect"


def _backing_factory(backing: str | Callable[..., Backing], **options: bool) -> Callable[[int], Backing]:
    if callable(backing):
        return backing
    name = _text(backing, "backing").lower()
    if name not in BACKINGS:
        raise InvalidArgumentError(f"unknown backing {backing!r}; known: {', '.join(BACKINGS)}")
    chosen = {name: True for name, value in options.items() if value}

    def new(size: int) -> Backing:
        try:
            return BACKINGS[name](size, **chosen)
        except TypeError:
            raise InvalidArgumentError(f"backing {backing!r} doesn't take {', '.join(chosen)}") from None

    return new
