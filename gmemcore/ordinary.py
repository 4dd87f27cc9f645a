"""Ordinary memslots, and what the rest of a kernel answers about a guest_memfd: for vectors.

The model is about guest_memfd. A real VM also has memslots of ordinary memory, which must not overlap others
either. A real file can be read, mapped executable, or used by another process. `VmWithOrdinary` is a Vm
with such memslots; the tables hold what the VFS and memory management answer.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

from gmemcore.errors import (
    AlreadyExistsError,
    BadAddressError,
    GmemError,
    InterruptedCallError,
    InvalidArgumentError,
    MemoryFaultExit,
    MmioExit,
    NotPermittedError,
    NotSeekableError,
)
from gmemcore.machine.memslots import MAX_MEMSLOT_PAGES, MAX_MEMSLOTS
from gmemcore.uapi import PAGE_SIZE, FallocateMode, MemoryAttribute, MemslotFlag, Protection

USER_END: Final = (1 << 47) - PAGE_SIZE
"""End of a process's addresses (x86-64, four levels of page tables)."""
_U64: Final = 1 << 64
_ZEROS: Final = bytes(PAGE_SIZE)

FILE_CALLS: Final[dict[str, type[GmemError]]] = {
    "read": InvalidArgumentError,
    "write": InvalidArgumentError,
    "pread": NotSeekableError,
    "pwrite": NotSeekableError,
    "lseek": NotSeekableError,
    "ftruncate": InvalidArgumentError,
    "fsync": InvalidArgumentError,
}
"""System calls that a guest_memfd refuses, whatever its flags: it has neither read, write nor llseek."""

VM_FD_OPERATIONS: Final = frozenset(
    {"create", "vm_set", "slot_add", "slot_delete", "guest_read", "guest_write"}
)
"""Operations on the VM fd or a vCPU fd: EIO in a process that isn't the VM's (kvm_vm_ioctl)."""


def file_call(name: str, offset: int) -> None:
    """Make a system call on a guest_memfd that it refuses.

    Raises
    ------
    GmemError
        Always: EINVAL or ESPIPE.
    """
    kind = InvalidArgumentError if name in ("pread", "pwrite") and offset < 0 else FILE_CALLS[name]
    raise kind(f"a guest_memfd takes no {name}")


def check_executable(protection: int, offset: int, size: int, *, mappable: bool) -> None:
    """Check the protection of a mapping, in the order of do_mmap: length and alignment come first.

    Parameters
    ----------
    protection : int
        PROT_READ (1), PROT_WRITE (2), PROT_EXEC (4).
    offset, size : int
        Bytes.
    mappable : bool
        Whether guest_memfds can be mapped at all (since 6.18). Their file system then allows no execution.

    Raises
    ------
    NotPermittedError
        EPERM: an executable mapping.
    """
    if mappable and protection & Protection.EXEC and size and not offset % PAGE_SIZE:
        raise NotPermittedError("a guest_memfd can't be mapped executable; drop PROT_EXEC")


def check_interrupted(mode: int, offset: int, size: int, file_size: int) -> None:
    """Check an fallocate while a signal is pending. Other refusals come first.

    Raises
    ------
    InterruptedCallError
        EINTR: an allocation checks for signals before each page (kvm_gmem_allocate).
    """
    aligned = not (offset | size) % PAGE_SIZE
    if mode == FallocateMode.KEEP_SIZE and aligned and size > 0 <= offset <= file_size - size:
        raise InterruptedCallError("a signal is pending; call again")


class _Memory:
    """Sparse bytes, zero until written: a memslot can be larger than this process."""

    def __init__(self) -> None:
        self._pages: dict[int, bytearray] = {}

    def read(self, at: int, size: int) -> bytes:
        """Return bytes from an offset on."""
        pieces = _page_pieces(at, size)
        return b"".join(bytes(self._pages.get(page, _ZEROS)[low:high]) for page, low, high in pieces)

    def write(self, at: int, data: bytes) -> None:
        """Write bytes from an offset on."""
        for page, low, high in _page_pieces(at, len(data)):
            part, data = data[: high - low], data[high - low :]
            self._pages.setdefault(page, bytearray(_ZEROS))[low:high] = part


def _page_pieces(at: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Tile a byte range by pages: number of the page, start and end within it."""
    end = at + size
    while at < end:
        page, low = divmod(at, PAGE_SIZE)
        high = min(PAGE_SIZE, low + end - at)
        yield page, low, high
        at += high - low


@dataclass(frozen=True, slots=True)
class OrdinaryMemslot:
    """A memslot of ordinary memory; bytes throughout.

    Attributes
    ----------
    userspace_address : int or None
        Address at which nothing is mapped; None: the memslot has memory of its own.
    """

    slot: int
    gpa: int
    size: int
    flags: int
    userspace_address: int | None
    memory: _Memory


class VmWithOrdinary:
    """A Vm with ordinary memslots next to its own; everything else is the Vm's.

    Parameters
    ----------
    vm : Vm
        The model's.
    """

    def __init__(self, vm: Any) -> None:
        self.model = vm
        self._ordinary: dict[int, OrdinaryMemslot] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    # ---- memslots ------------------------------------------------------------------------------------------

    def add_memslot(
        self,
        slot: int,
        gpa: int,
        size: int,
        gmem: Any,
        gmem_offset: int = 0,
        *,
        flags: int = MemslotFlag.GUEST_MEMFD,
        userspace_address: int | None = None,
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION2; see `gmemcore.machine.Vm.add_memslot`.

        An ordinary memslot that exists can be moved, and its dirty logging switched.

        Parameters
        ----------
        flags : int
            KVM_MEM_* flags. Without GUEST_MEMFD the memslot is ordinary memory, and `gmem` is ignored.
        userspace_address : int or None
            Address at which nothing is mapped; None: the memslot gets memory of its own.

        Raises
        ------
        InvalidArgumentError
            EINVAL: flags that don't go together, an address that no process has, a change that can't be made.
        AlreadyExistsError
            EEXIST: it overlaps another memslot in gpa.

        References
        ----------
        check_memory_region_flags, kvm_set_memory_region.
        """
        with_file = bool(flags & MemslotFlag.GUEST_MEMFD)
        files = self.model.abi.shared_files or self.model.platform.private_memory
        file_flags = MemslotFlag.GUEST_MEMFD if files else 0
        known = int(file_flags if with_file else MemslotFlag.LOG_DIRTY_PAGES | MemslotFlag.READONLY)
        if flags & ~known:
            raise InvalidArgumentError(f"memslot flags must be bits of {known:#x}, not {flags:#x}")
        address = 0 if userspace_address is None else userspace_address
        if address % PAGE_SIZE or address + size > USER_END:
            raise InvalidArgumentError(f"userspace address {address:#x} can't have {size:#x} bytes")
        if with_file:
            if self._ordinary:
                self._check_region(slot, gpa, size, gmem_offset)
                self._check_free(slot, gpa, size)
            self.model.add_memslot(slot, gpa, size, gmem, gmem_offset)
            return
        self._check_region(slot, gpa, size, 0)
        old = self._ordinary.get(slot)
        if old is not None:
            same_address = userspace_address is None or userspace_address == old.userspace_address
            if not same_address or size != old.size or (flags ^ old.flags) & MemslotFlag.READONLY:
                raise InvalidArgumentError(f"memslot {slot} can't change its memory, size or READONLY flag")
        if old is None or gpa != old.gpa:
            self._check_free(slot, gpa, size, old)
        if old is None:
            old = OrdinaryMemslot(slot, gpa, size, flags, userspace_address, _Memory())
        self._ordinary[slot] = replace(old, gpa=gpa, flags=flags)

    def all_memslots(self) -> list[Any]:
        """Return the memslots of both kinds."""
        return [*self.model.memslots, *self._ordinary.values()]

    def _check_region(self, slot: int, gpa: int, size: int, offset: int) -> None:
        aligned = size > 0 and not (gpa | size | offset) % PAGE_SIZE
        fits = gpa + size < _U64 and offset + size < _U64 and size // PAGE_SIZE <= MAX_MEMSLOT_PAGES
        if not (aligned and fits and 0 <= slot < MAX_MEMSLOTS):
            raise InvalidArgumentError(f"memslot {slot} at {gpa:#x}+{size:#x} isn't valid")

    def _check_free(self, slot: int, gpa: int, size: int, moved: OrdinaryMemslot | None = None) -> None:
        """Check the id, then the range of guest memory, against the memslots of both kinds."""
        others = [each for each in self.all_memslots() if each is not moved]
        if any(other.slot == slot for other in others):
            raise InvalidArgumentError(f"memslot {slot} exists; delete it first")
        if any(gpa < other.gpa + other.size and other.gpa < gpa + size for other in others):
            raise AlreadyExistsError(f"memslot at {gpa:#x}+{size:#x} overlaps another one")

    def delete_memslot(self, slot: int) -> None:
        """Delete a memslot of either kind."""
        if self._ordinary.pop(slot, None) is None:
            self.model.delete_memslot(slot)

    # ---- the guest's view ----------------------------------------------------------------------------------

    def guest_read(self, gpa: int, size: int, private: bool | None = None) -> bytes:
        """Read as the guest does."""
        if not self._ordinary:
            read: bytes = self.model.guest_read(gpa, size, private)
            return read
        pieces = [*self._pieces(gpa, size)]
        self._check_pieces(pieces, private)
        parts = []
        for start, length, slot in pieces:
            if slot is None:
                parts.append(self.model.guest_read(start, length, private))
            else:
                parts.append(slot.memory.read(start - slot.gpa, length))
        return b"".join(parts)

    def guest_write(self, gpa: int, data: bytes, private: bool | None = None) -> None:
        """Write as the guest does. Bytes before a read-only memslot are written, then the write exits."""
        if not self._ordinary:
            self.model.guest_write(gpa, data, private)
            return
        pieces = [*self._pieces(gpa, len(data))]
        self._check_pieces(pieces, private)
        for start, length, slot in pieces:
            part = data[start - gpa :][:length]
            if slot is None:
                self.model.guest_write(start, part, private)
            elif slot.flags & MemslotFlag.READONLY:
                page = start & -PAGE_SIZE
                raise MmioExit(f"the memslot at gpa {page:#x} is read-only", page, PAGE_SIZE)
            else:
                slot.memory.write(start - slot.gpa, part)

    def _pieces(self, gpa: int, size: int) -> Iterator[tuple[int, int, OrdinaryMemslot | None]]:
        """Tile a range by ordinary memslots and what lies between them."""
        end = gpa + size
        for slot in sorted(self._ordinary.values(), key=lambda slot: slot.gpa):
            low, high = max(gpa, slot.gpa), min(end, slot.gpa + slot.size)
            if low < high:
                if gpa < low:
                    yield gpa, low - gpa, None
                yield low, high - low, slot
                gpa = high
        if gpa < end or size <= 0:
            yield gpa, end - gpa, None

    def _check_pieces(
        self, pieces: list[tuple[int, int, OrdinaryMemslot | None]], private: bool | None
    ) -> None:
        """Check all of an access that touches ordinary memory, before any byte moves."""
        if len(pieces) == 1 and pieces[0][2] is None:
            return
        for start, length, slot in pieces:
            if slot is None:
                self.model.guest_touch(start, length, private)
            else:
                self._check_page(start, length, slot, private)

    def _check_page(self, gpa: int, size: int, slot: OrdinaryMemslot, private: bool | None) -> None:
        first = gpa & -PAGE_SIZE
        chosen = private if self.model.platform.coco else None
        page = first if chosen else self._first_private(gpa, size)
        if slot.userspace_address is not None and page != first:  # pages are accessed in order
            raise BadAddressError(f"nothing is mapped at {slot.userspace_address:#x}, for gpa {first:#x}")
        if page is not None:
            kind = MemoryAttribute.PRIVATE if chosen is None or chosen else 0
            raise MemoryFaultExit(f"gpa {page:#x} is private, or taken for it", page, PAGE_SIZE, int(kind))

    def _first_private(self, gpa: int, size: int) -> int | None:
        """Return the first page of a range that the Vm's attributes make private, or None."""
        if not self.model.abi.legacy:
            return None
        first, end = gpa // PAGE_SIZE, -(-(gpa + size) // PAGE_SIZE)
        frames = (max(low, first) for low, high in self.model.private_frames() if low < end and first < high)
        frame = min(frames, default=None)
        return None if frame is None else frame * PAGE_SIZE
