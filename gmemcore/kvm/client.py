"""KvmVm and KvmFile: a VM and a guest_memfd of a real kernel, with the methods of the model's.

They differ from `gmemcore.machine` in what no kernel tells: there are no counters, planes or runs. Refusals
are the same `GmemError` classes, by errno.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Final, NamedTuple

from gmemcore.errors import (
    ERRNO_NAMES,
    AlreadyExistsError,
    BadAddressError,
    BadFileError,
    GmemError,
    InvalidArgumentError,
    MmioExit,
    NotMappableError,
    OutOfMemoryError,
    PagePinnedError,
    UnknownIoctlError,
    UnsupportedOperationError,
)
from gmemcore.kvm.frames import PrivateFrames
from gmemcore.kvm.own_memory import Placement, place
from gmemcore.kvm.structs import (
    CAPABILITIES,
    CREATE_GUEST_MEMFD_STRUCT,
    KVM_CHECK_EXTENSION,
    KVM_CREATE_GUEST_MEMFD,
    KVM_CREATE_VM,
    KVM_SET_USER_MEMORY_REGION2,
    ORDINARY,
    USER_MEMORY_REGION2_STRUCT,
    VM_TYPE_NUMBERS,
)
from gmemcore.kvm.transport import READ_WRITE, Transport, Vcpu
from gmemcore.uapi import (
    KVM_SET_MEMORY_ATTRIBUTES,
    KVM_SET_MEMORY_ATTRIBUTES2,
    MEMORY_ATTRIBUTES2_ERROR_OFFSET_AT,
    MEMORY_ATTRIBUTES2_RESERVED_WORDS,
    MEMORY_ATTRIBUTES2_STRUCT,
    MEMORY_ATTRIBUTES_STRUCT,
    PAGE_SHIFT,
    PAGE_SIZE,
    FallocateMode,
    GuestMemfdFlag,
    MemoryAttribute,
    MemslotFlag,
    Protection,
    VmType,
)

U64 = (1 << 64) - 1
MOST_ORDINARY: Final = 1 << 30
"""Bytes of an ordinary memslot that memory is mapped for."""

_CLASSES = {
    kind.number: kind
    for kind in (
        *(InvalidArgumentError, UnsupportedOperationError, PagePinnedError, OutOfMemoryError, BadFileError),
        *(AlreadyExistsError, BadAddressError, UnknownIoctlError, NotMappableError),
    )
}
_WRITES_ERROR_OFFSET = {errno.EAGAIN, errno.ENOMEM, errno.EOPNOTSUPP}


class KernelError(GmemError):
    """An errno of the kernel that the model never gives; ``outcome`` is its name."""

    def __init__(self, message: str, number: int, *, error_offset: int | None = None) -> None:
        self.number = number  # type: ignore[misc]  # the one class of this room with the kernel's choice of errno
        self.outcome = ERRNO_NAMES.get(number, errno.errorcode.get(number, str(number)))
        super().__init__(message, error_offset=error_offset)


@contextmanager
def _refusals() -> Iterator[None]:
    """Turn an ``OSError`` of a system call into the `GmemError` of its errno."""
    try:
        yield
    except GmemError:
        raise
    except OSError as error:
        number = error.errno or 0
        kind, why = _CLASSES.get(number), error.strerror or str(error)
        if kind is None:
            raise KernelError(why, number) from error
        raise kind(why) from error


class Slot(NamedTuple):
    """A memslot that was added: where the guest sees which part of which file, or ordinary memory."""

    gpa: int
    size: int
    gmem: "KvmFile | None"
    gmem_offset: int
    userspace_address: int
    memory: int | None
    """Address of ordinary memory that was mapped for it."""
    chosen: bool
    """Whether the userspace address was given."""


class KvmVm:
    """A VM of a kernel. A context manager.

    Parameters
    ----------
    transport : Transport
        The kernel.
    vm_type : VmType
        One that the kernel offers; see `probe`.
    two_backings : bool
        Give every file that the host can't map ordinary memory beside it for what is shared, as before
        conversion in place.

    Raises
    ------
    KvmUnavailableError
        ENODEV: there is no KVM.
    GmemError
        EINVAL: the kernel doesn't offer this VM type.
    """

    def __init__(
        self, transport: Transport, vm_type: VmType = ORDINARY, *, two_backings: bool = False
    ) -> None:
        self.transport = transport
        self.vm_type = vm_type
        self.two_backings = two_backings
        self.files: list[KvmFile] = []
        self.memslots: dict[int, Slot] = {}
        self._reserved: list[tuple[int, int]] = []
        self._vcpu: Vcpu | None = None
        self._own: Placement | None = None
        self._private = PrivateFrames()
        self._mmio_frames: set[int] = set()
        if vm_type not in VM_TYPE_NUMBERS:
            raise InvalidArgumentError(f"KVM has no VM type {vm_type}; known: {', '.join(VM_TYPE_NUMBERS)}")
        kvm = transport.open()
        try:
            with _refusals():
                self.fd = transport.ioctl(kvm, KVM_CREATE_VM, VM_TYPE_NUMBERS[vm_type])
        finally:
            transport.close(kvm)

    def __enter__(self) -> "KvmVm":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check_cap(self, name: str) -> int:
        """Ask a capability whose number is stable, by its name without ``KVM_CAP_``."""
        return check_extension(self.transport, self.fd, name)

    def create_guest_memfd(self, size: int, flags: int = 0) -> "KvmFile":
        """KVM_CREATE_GUEST_MEMFD; see `gmemcore.machine.Vm.create_guest_memfd`."""
        argument = bytearray(CREATE_GUEST_MEMFD_STRUCT.pack(size & U64, flags, *[0] * 6))
        with _refusals():
            fd = self.transport.ioctl(self.fd, KVM_CREATE_GUEST_MEMFD, argument)
        gmem = KvmFile(self, fd, size, flags)
        self.files.append(gmem)
        return gmem

    def add_memslot(
        self,
        slot: int,
        gpa: int,
        size: int,
        gmem: "KvmFile | None",
        gmem_offset: int = 0,
        *,
        flags: int = MemslotFlag.GUEST_MEMFD,
        userspace_address: int | None = None,
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION2; see `gmemcore.machine.Vm.add_memslot`.

        Parameters
        ----------
        flags : int
            KVM_MEM_* flags. Without GUEST_MEMFD the memslot is ordinary memory, and `gmem` isn't looked at.
        userspace_address : int or None
            Where this process has the memory mapped; None: where the file is mapped, 0 if it is not, and
            memory of the memslot's own where it has no file.
        """
        ordinary, chosen = not flags & MemslotFlag.GUEST_MEMFD, userspace_address is not None
        old = self.memslots.get(slot)
        memory = old.memory if old is not None else None
        if ordinary:
            gmem, gmem_offset = None, 0
        fd = gmem.fd if gmem is not None and not gmem.closed else -1
        if userspace_address is None and ordinary:
            if old is None:
                memory = self._ordinary_memory(size)
            there = memory if old is None else old.userspace_address
            userspace_address = 0 if there is None else there
        elif userspace_address is None:
            userspace_address = 0 if gmem is None else gmem.userspace_address(gmem_offset, size)
        self._make_way(gpa, size, slot)
        try:
            with _refusals():
                self._set_region(slot, flags, gpa, size, userspace_address, gmem_offset, fd & 0xFFFFFFFF)
        except GmemError:
            if old is None:
                self._release(memory, size)
            raise
        if size == 0:  # which deletes a memslot, whatever the flags
            self._forget(slot)
            return
        self.memslots[slot] = Slot(gpa, size, gmem, gmem_offset, userspace_address, memory, chosen)

    def _ordinary_memory(self, size: int) -> int | None:
        """Map memory for a memslot; None for one that no process can have, or that needs none."""
        if not 0 < size <= MOST_ORDINARY or size % PAGE_SIZE:
            return None
        with _refusals():
            return self.transport.memory(size)

    def _release(self, address: int | None, size: int) -> None:
        if address is not None:
            self.transport.unmap(address, size)

    def _forget(self, slot: int) -> None:
        """Drop what a deleted memslot had."""
        gone = self.memslots.pop(slot, None)
        if gone is not None:
            self._release(gone.memory, gone.size)

    def delete_memslot(self, slot: int) -> None:
        """KVM_SET_USER_MEMORY_REGION2 with size 0."""
        self._make_way(0, 0, slot)
        with _refusals():
            self._set_region(slot, 0, 0, 0, 0, 0, 0)
        self._forget(slot)

    def _set_region(self, *fields: int) -> None:
        argument = bytearray(USER_MEMORY_REGION2_STRUCT.pack(*fields, *[0] * 15))
        self.transport.ioctl(self.fd, KVM_SET_USER_MEMORY_REGION2, argument)

    def set_memory_attributes(self, address: int, size: int, attributes: int, flags: int = 0) -> None:
        """KVM_SET_MEMORY_ATTRIBUTES on the VM fd; see `gmemcore.machine.Vm.set_memory_attributes`."""
        self._make_way(address, size)
        with _refusals():
            self._set_attributes(address, size, attributes, flags)
        self._note_attributes(address, size, attributes)

    def _set_attributes(self, *fields: int) -> None:
        argument = bytearray(MEMORY_ATTRIBUTES_STRUCT.pack(*fields))
        self.transport.ioctl(self.fd, KVM_SET_MEMORY_ATTRIBUTES, argument)

    def _note_attributes(self, address: int, size: int, attributes: int) -> None:
        private = bool(attributes & MemoryAttribute.PRIVATE)
        self._private.set(address >> PAGE_SHIFT, (address + size) >> PAGE_SHIFT, private)

    def ioctl(self, request: int, argument: bytearray | bytes | None) -> None:
        """An ioctl of the VM fd as it stands; None is an unreadable pointer."""
        too_short = argument is None or len(argument) < MEMORY_ATTRIBUTES_STRUCT.size
        if request != KVM_SET_MEMORY_ATTRIBUTES or argument is None or too_short:
            with _refusals():
                self.transport.raw_ioctl(self.fd, request, argument)
            return
        address, size, attributes, _ = MEMORY_ATTRIBUTES_STRUCT.unpack_from(argument)
        self._make_way(address, size)
        with _refusals():
            self.transport.raw_ioctl(self.fd, request, argument)
        self._note_attributes(address, size, attributes)

    # ---- the guest -----------------------------------------------------------------------------------------

    def guest_read(self, gpa: int, size: int, private: bool | None = None) -> bytes:
        """Read as the guest does, on a vCPU. The kind follows the attribute, and private is ignored."""
        with self._guest_access(gpa, size) as vcpu:
            return vcpu.read(gpa, size)

    def guest_write(self, gpa: int, data: bytes, private: bool | None = None) -> None:
        """Write as the guest does; see `guest_read`."""
        with self._guest_access(gpa, len(data)) as vcpu:
            vcpu.write(gpa, data)

    def guest_touch(self, gpa: int, size: int) -> float:
        """Write a byte to each page of a range as the guest does, at once; return the seconds it ran."""
        with self._guest_access(gpa, size) as vcpu:
            return vcpu.touch(gpa, size)

    @contextmanager
    def _guest_access(self, gpa: int, size: int) -> Iterator[Vcpu]:
        try:
            with _refusals():
                yield self._vcpu_beside(gpa, size)
        except MmioExit as error:
            self._mmio_frames.add(error.gpa >> PAGE_SHIFT)
            raise

    def has_stale_mmio(self, gpa: int, size: int) -> bool:
        """Whether a range has a private frame that was MMIO before. KVM's entry for that outlives it."""
        frames = range(gpa >> PAGE_SHIFT, -(-(gpa + size) >> PAGE_SHIFT))
        return any(
            frame in self._mmio_frames and bool(self._private.runs(frame, frame + 1)) for frame in frames
        )

    @property
    def vcpu(self) -> Vcpu:
        """The vCPU, created at its first use."""
        if self._vcpu is None:
            with _refusals():
                self._vcpu = self.transport.vcpu(self.fd)
        return self._vcpu

    def _vcpu_beside(self, gpa: int, size: int) -> Vcpu:
        """The vCPU, with its own memory where the access doesn't go."""
        vcpu = self.vcpu
        self._make_way(gpa, size)
        if self._own is None:
            runs = self._private.runs(0, 1 << vcpu.address_bits - PAGE_SHIFT)
            own = place(
                vcpu.own_size,
                slots=self.memslots,
                occupied=[*((slot.gpa, slot.size) for slot in self.memslots.values()), (gpa, size)],
                private=[(start << PAGE_SHIFT, (end - start) << PAGE_SHIFT) for start, end in runs],
                address_bits=vcpu.address_bits,
                slot_limit=self.check_cap("NR_MEMSLOTS"),
            )
            for start, length in own.borrowed:
                self._set_attributes(start, length, 0, 0)
            self._own = own
            vcpu.place(own.slot, own.gpa)
        return vcpu

    def _make_way(self, gpa: int, size: int, slot: int | None = None) -> None:
        """Take the vCPU's own memory away from a range, or a slot id, that a request is about."""
        own = self._own
        if own is not None and (own.slot == slot or own.meets(gpa, size)):
            with _refusals():
                self.vcpu.withdraw()
                self._own = None
                for start, length in own.borrowed:
                    self._set_attributes(start, length, MemoryAttribute.PRIVATE, 0)

    def leave(self, gmem: "KvmFile", address: int, size: int) -> None:
        """Unmap a closed file, but keep the addresses that a memslot has from being used again."""
        if any(slot.gmem is gmem for slot in self.memslots.values()):
            self.transport.reserve(address, size)
            self._reserved.append((address, size))
        else:
            self.transport.unmap(address, size)

    def close(self) -> None:
        """Close vCPU, files and VM. Closing twice is allowed."""
        if self._vcpu is not None:
            self._vcpu.close()
            self._vcpu = self._own = None
        for slot in [*self.memslots]:  # no guest runs any more
            self._forget(slot)
        for gmem in self.files:
            gmem.close()
        if self.fd >= 0:
            self.transport.close(self.fd)
            self.fd = -1
        while self._reserved:
            self.transport.unmap(*self._reserved.pop())


class KvmFile:
    """A guest_memfd of a kernel. Made by `KvmVm.create_guest_memfd`.

    Attributes
    ----------
    size : int
        Bytes.
    flags : int
        Flags of creation.
    """

    def __init__(self, vm: KvmVm, fd: int, size: int, flags: int) -> None:
        self.vm = vm
        self.fd = fd
        self.size = size
        self.flags = flags
        self._transport = vm.transport
        self._beside = self._transport.shared_memory(size) if self.two_backings else None
        self._address: int | None = None
        self._pins: dict[int, int] = {}

    def __enter__(self) -> "KvmFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self.fd < 0

    @property
    def two_backings(self) -> bool:
        """Whether shared memory lies beside the file. A file that the host can map is the only backing."""
        return self.vm.two_backings and not self.flags & GuestMemfdFlag.MMAP

    @property
    def mappable(self) -> bool:
        """Whether the host can map what it shares with the guest."""
        return self.two_backings or bool(self.flags & GuestMemfdFlag.MMAP)

    @property
    def host_fd(self) -> int:
        """What the host maps: the file, or the ordinary memory beside it."""
        return self.fd if self._beside is None else self._beside

    def userspace_address(self, offset: int, size: int) -> int:
        """Where this process has a range mapped, for memslots; 0 if it has not, or can't.

        KVM itself reads and writes through this address where it has to emulate the guest's instruction.
        """
        if offset % PAGE_SIZE or offset + size > self.size:
            return 0
        whole = self._whole()
        return 0 if whole is None else whole + offset

    def set_memory_attributes(
        self,
        offset: int,
        size: int,
        attributes: int,
        flags: int = 0,
        *,
        error_offset: int = 0,
        reserved: int = 0,
    ) -> None:
        """KVM_SET_MEMORY_ATTRIBUTES2; see `gmemcore.machine.GuestMemfd.set_memory_attributes`.

        Parameters
        ----------
        reserved : int
            Goes into the last of the reserved words.
        """
        self._require_open()
        words = [0] * (MEMORY_ATTRIBUTES2_RESERVED_WORDS - 1) + [reserved]
        argument = bytearray(
            MEMORY_ATTRIBUTES2_STRUCT.pack(offset, size, attributes, flags, error_offset, *words)
        )
        try:
            with _refusals():
                self._transport.ioctl(self.fd, KVM_SET_MEMORY_ATTRIBUTES2, argument)
        except GmemError as error:
            at = MEMORY_ATTRIBUTES2_ERROR_OFFSET_AT
            written = int.from_bytes(argument[at : at + 8], "little")
            if written != error_offset or error.errno in _WRITES_ERROR_OFFSET:
                error.error_offset = written
            raise

    def ioctl(self, request: int, argument: bytearray | bytes | None) -> None:
        """An ioctl of the guest_memfd as it stands; None is an unreadable pointer."""
        self._require_open()
        with _refusals():
            self._transport.raw_ioctl(self.fd, request, argument)

    def host_read(self, offset: int, size: int) -> bytes:
        """Read through a mapping; see `gmemcore.machine.GuestMemfd.host_read`."""
        with _refusals(), self._mapped(offset, size) as address:
            return self._transport.load(address, size)

    def host_write(self, offset: int, data: bytes) -> None:
        """Write through a mapping; see `host_read`."""
        with _refusals(), self._mapped(offset, len(data)) as address:
            self._transport.store(address, data)

    @contextmanager
    def _mapped(self, offset: int, size: int) -> Iterator[int]:
        """The address of a range: in the mapping that the memslots have, or in one of its own.

        One mapping lives through conversions, so that a page which the kernel forgot to unmap shows.
        """
        self._require_open()
        if offset + size <= self.size and (whole := self._whole()) is not None:
            yield whole + offset
            return
        start = offset & -PAGE_SIZE
        length = offset + size - start
        address = self._transport.map(self.host_fd, start, length)
        try:
            yield address + offset - start
        finally:
            self._transport.unmap(address, length)

    def _whole(self) -> int | None:
        """The address of the mapping of the whole file, or None where it can't be mapped."""
        if self._address is None and self.mappable and not self.closed:
            try:
                self._address = self._transport.map(self.host_fd, 0, self.size)
            except OSError:  # larger than an address space
                return None
        return self._address

    def mmap(self, offset: int, size: int, shared: bool = True, protection: Protection = READ_WRITE) -> None:
        """Map a range of the guest_memfd, and unmap it again."""
        self._require_open()
        with _refusals():
            self._transport.unmap(self._transport.map(self.fd, offset, size, shared, protection), size)

    def call(self, name: str, offset: int, size: int) -> None:
        """Make a system call on the guest_memfd: read, write, pread, pwrite, lseek, ftruncate or fsync."""
        self._require_open()
        with _refusals():
            self._transport.file_call(name, self.fd, offset, size)

    def _require_open(self) -> None:
        if self.closed:
            raise BadFileError("the guest_memfd is closed")

    def fallocate(self, mode: int, offset: int, size: int) -> None:
        """fallocate(2). A punched page drops its pin, which holds on to the page that was there."""
        self._require_open()
        with _refusals():
            self._transport.fallocate(self.fd, mode, offset, size)
        if mode & FallocateMode.PUNCH_HOLE:
            self._drop_pins(offset, size)

    def discard_shared(self, offset: int, size: int) -> None:
        """Discard the host's side of a range: the VMM's step where there are two backings."""
        self._require_open()
        if not self.two_backings:
            raise UnsupportedOperationError("there is one backing, converted in place")
        with _refusals():
            mode = FallocateMode.KEEP_SIZE | FallocateMode.PUNCH_HOLE
            self._transport.fallocate(self.host_fd, mode, offset, size)
        self._drop_pins(offset, size)

    def pin(self, offset: int, size: int) -> None:
        """Take a reference on each page that has none of ours yet: on all of them or none."""
        self._require_open()
        taken: dict[int, int] = {}
        try:
            with _refusals():
                for page in range(offset, offset + size, PAGE_SIZE):
                    if page not in self._pins:
                        with self._mapped(page, PAGE_SIZE) as address:
                            taken[page] = self._transport.pin(address)
        except GmemError:
            for reference in taken.values():
                self._transport.close(reference)
            raise
        self._pins |= taken

    def unpin(self, offset: int, size: int) -> None:
        """Drop our references on pages."""
        self._require_open()
        self._drop_pins(offset, size)

    def _drop_pins(self, offset: int, size: int) -> None:
        for page in [page for page in self._pins if offset <= page < offset + size]:
            self._transport.close(self._pins.pop(page))

    def close(self) -> None:
        """Close the file and what was made for it. Closing twice is allowed."""
        self._drop_pins(0, self.size)
        if self._address is not None:
            self.vm.leave(self, self._address, self.size)
            self._address = None
        for fd in (self.fd, self._beside):
            if fd is not None and fd >= 0:
                self._transport.close(fd)
        self.fd, self._beside = -1, None


def check_extension(transport: Transport, fd: int, name: str) -> int:
    """KVM_CHECK_EXTENSION on /dev/kvm or a VM, for a capability whose number is stable.

    Raises
    ------
    UnsupportedOperationError
        EOPNOTSUPP: no number is known to stand for this name in every kernel.
    """
    if name not in CAPABILITIES:
        known = ", ".join(CAPABILITIES)
        raise UnsupportedOperationError(f"capability {name} has no stable number; known: {known}")
    with _refusals():
        return transport.ioctl(fd, KVM_CHECK_EXTENSION, CAPABILITIES[name])
