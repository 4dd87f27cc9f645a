"""The smallest guest: one vCPU in 64-bit mode that copies a few bytes and halts.

Real mode would not reach the addresses of the vectors (4 GiB and above), so KVM is handed a vCPU that is
already in 64-bit mode, with page tables that map two things: the guest's own memory at virtual address 0, and
a window of a few pages onto the physical range of the access. The own memory is a memslot that is there only
while the vCPU runs; deleting it makes KVM forget everything that it cached of the page tables.

References
----------
KVM API documentation, 4.10 (``KVM_RUN``), section 5 (``struct kvm_run``); AMD64 Architecture Programmer's
Manual, volume 2, 5.3 (long-mode page translation) and 14 (processor initialization).
"""

import ctypes
import errno
import mmap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gmemcore.errors import GuestExit, HwPoisonExit, MemoryFaultExit, MmioExit
from gmemcore.kvm.structs import (
    CAPABILITIES,
    CONTROL_AT,
    CONTROL_STRUCT,
    CPUID_ADDRESS_SIZES,
    CPUID_ENTRY_STRUCT,
    CPUID_HEADER_STRUCT,
    KVM_CHECK_EXTENSION,
    KVM_CREATE_VCPU,
    KVM_EXIT_HLT,
    KVM_EXIT_MEMORY_FAULT,
    KVM_EXIT_MMIO,
    KVM_GET_SREGS,
    KVM_GET_SUPPORTED_CPUID,
    KVM_GET_VCPU_MMAP_SIZE,
    KVM_RUN,
    KVM_SET_CPUID2,
    KVM_SET_REGS,
    KVM_SET_SREGS,
    KVM_SET_USER_MEMORY_REGION2,
    MEMORY_FAULT_EXIT_STRUCT,
    MMIO_EXIT_STRUCT,
    REGS_STRUCT,
    RUN_EXIT_AT,
    RUN_EXIT_REASON_AT,
    RUN_IMMEDIATE_EXIT_AT,
    SEGMENT_STRUCT,
    SREGS_SIZE,
    SREGS_TR,
    USER_MEMORY_REGION2_STRUCT,
)
from gmemcore.uapi import PAGE_SIZE

if TYPE_CHECKING:
    from gmemcore.kvm.kernel import KernelTransport

EHWPOISON = HwPoisonExit.number

PROGRAM = (
    b"\x0f\x20\xd8"  # mov rax, cr3
    b"\x0f\x22\xd8"  # mov cr3, rax: forget translations of an earlier window
    b"\xf3\xa4"  # rep movsb: rcx bytes from [rsi] to [rdi]
    b"\xf4"  # hlt
)

# Pages of the guest's own memory.
CODE, ROOT, DIRECTORY_POINTERS, DIRECTORY, OWN_TABLE, WINDOW_TABLE, BUFFER = range(7)
BUFFER_PAGES = 16
OWN_PAGES = BUFFER + BUFFER_PAGES
OWN_SIZE = OWN_PAGES * PAGE_SIZE
WINDOW = 1 << 21
"""Virtual address of the window: the second entry of the page directory."""

_PRESENT_WRITABLE = 3
_CR0 = 0x80050033  # paging, protection, write protection, and what every processor wants set
_CR4_PAE = 0x20
_EFER_LONG_MODE = 0x500  # enabled and active
_RFLAGS = 2
_CODE_SEGMENT = (0, 0xFFFFFFFF, 8, 11, 1, 0, 0, 1, 1, 1, 0)
_DATA_SEGMENT = (0, 0xFFFFFFFF, 16, 3, 1, 0, 1, 1, 0, 1, 0)
_TASK_SEGMENT = (0, 0xFFFF, 0, 11, 1, 0, 0, 0, 0, 0, 0)
_CPUID_ENTRIES = 512


class GuestStoppedExit(GuestExit):
    """The vCPU stopped for a reason that no access should have; ``outcome`` names KVM's number of it."""

    def __init__(self, message: str, gpa: int, size: int, outcome: str) -> None:
        self.outcome = outcome
        super().__init__(message, gpa, size)


class KernelGuest:
    """A vCPU of a VM; see `Guest`.

    Parameters
    ----------
    transport : KernelTransport
        Of the VM's kernel.
    vm : int
        File descriptor of the VM.
    """

    def __init__(self, transport: "KernelTransport", vm: int) -> None:
        self._transport = transport
        self._vm = vm
        kvm = transport.open()
        try:
            self._cpuid, self.address_bits = _supported_cpuid(transport, kvm)
            run_size = transport.ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE)
            self._slot = transport.ioctl(kvm, KVM_CHECK_EXTENSION, CAPABILITIES["NR_MEMSLOTS"]) - 1
        finally:
            transport.close(kvm)
        self._vcpu = transport.ioctl(vm, KVM_CREATE_VCPU, 0)
        self._run = mmap.mmap(self._vcpu, run_size)
        self._own = mmap.mmap(-1, OWN_SIZE, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
        transport.ioctl(self._vcpu, KVM_SET_CPUID2, self._cpuid)

    def close(self) -> None:
        """See `Guest`."""
        self._run.close()
        self._own.close()
        self._transport.close(self._vcpu)

    # ---- accesses ------------------------------------------------------------------------------------------

    def read(self, gpa: int, size: int, occupied: Sequence[tuple[int, int]]) -> bytes:
        """See `Guest`."""
        self._touch_pages(gpa, size, occupied)
        parts = []
        for start, length in _chunks(gpa, size):
            self._copy(start, length, occupied, write=False)
            parts.append(self._own[BUFFER * PAGE_SIZE :][:length])
        return b"".join(parts)

    def write(self, gpa: int, data: bytes, occupied: Sequence[tuple[int, int]]) -> None:
        """See `Guest`."""
        self._touch_pages(gpa, len(data), occupied)
        for start, length in _chunks(gpa, len(data)):
            at = BUFFER * PAGE_SIZE
            self._own[at : at + length] = data[start - gpa :][:length]
            self._copy(start, length, occupied, write=True)

    def _touch_pages(self, gpa: int, size: int, occupied: Sequence[tuple[int, int]]) -> None:
        """Read a byte of each page first, where there are several: what one refuses shall move no data."""
        end = gpa + size
        if gpa // PAGE_SIZE == (end - 1) // PAGE_SIZE:
            return
        for page in range(gpa & -PAGE_SIZE, end, PAGE_SIZE):
            self._copy(max(page, gpa), 1, occupied, write=False)

    def _copy(self, gpa: int, size: int, occupied: Sequence[tuple[int, int]], *, write: bool) -> None:
        """Let the guest copy between its buffer and the range; the whole range lies in one window."""
        base = _free_range([*occupied, (gpa, size)])
        self._place(base, gpa, size)
        window, buffer = WINDOW + gpa % PAGE_SIZE, BUFFER * PAGE_SIZE
        source, target = (buffer, window) if write else (window, buffer)
        self._bind(base, OWN_SIZE)
        try:
            self._set_registers(base, source, target, size)
            self._enter(gpa, size)
        finally:
            self._bind(0, 0)

    def _place(self, base: int, gpa: int, size: int) -> None:
        """Write program and page tables for own memory at base, and a window onto the range."""
        own = self._own
        own[: len(PROGRAM)] = PROGRAM
        for table, entries in (
            (ROOT, [base + DIRECTORY_POINTERS * PAGE_SIZE]),
            (DIRECTORY_POINTERS, [base + DIRECTORY * PAGE_SIZE]),
            (DIRECTORY, [base + OWN_TABLE * PAGE_SIZE, base + WINDOW_TABLE * PAGE_SIZE]),
            (OWN_TABLE, [base + page * PAGE_SIZE for page in range(OWN_PAGES)]),
            (WINDOW_TABLE, list(range(gpa & -PAGE_SIZE, gpa + size, PAGE_SIZE))),
        ):
            packed = b"".join((entry | _PRESENT_WRITABLE).to_bytes(8, "little") for entry in entries)
            own[table * PAGE_SIZE : (table + 1) * PAGE_SIZE] = packed.ljust(PAGE_SIZE, b"\0")

    def _bind(self, base: int, size: int) -> None:
        """Make own memory a memslot; size 0 deletes it."""
        view = ctypes.c_char.from_buffer(self._own)
        region = USER_MEMORY_REGION2_STRUCT.pack(
            *(self._slot, 0, base, size, ctypes.addressof(view)), *[0] * (2 + 1 + 14)
        )
        del view
        self._transport.ioctl(self._vm, KVM_SET_USER_MEMORY_REGION2, bytearray(region))

    def _set_registers(self, base: int, source: int, target: int, count: int) -> None:
        sregs = bytearray(SREGS_SIZE)
        self._transport.ioctl(self._vcpu, KVM_GET_SREGS, sregs)
        for i, segment in enumerate([_CODE_SEGMENT, *[_DATA_SEGMENT] * (SREGS_TR - 1), _TASK_SEGMENT]):
            SEGMENT_STRUCT.pack_into(sregs, i * SEGMENT_STRUCT.size, *segment)
        control = (_CR0, 0, base + ROOT * PAGE_SIZE, _CR4_PAE, 0, _EFER_LONG_MODE)
        CONTROL_STRUCT.pack_into(sregs, CONTROL_AT, *control)
        self._transport.ioctl(self._vcpu, KVM_SET_SREGS, sregs)
        rcx, rsi, rdi = count, source, target
        regs = REGS_STRUCT.pack(0, 0, rcx, 0, rsi, rdi, *[0] * 10, CODE * PAGE_SIZE, _RFLAGS)
        self._transport.ioctl(self._vcpu, KVM_SET_REGS, bytearray(regs))

    # ---- KVM_RUN -------------------------------------------------------------------------------------------

    def _enter(self, gpa: int, size: int) -> None:
        """Run until the guest halts.

        Raises
        ------
        GuestExit
            It couldn't go on.
        """
        while True:
            try:
                self._transport.ioctl(self._vcpu, KVM_RUN)
                break
            except OSError as error:
                if error.errno in (errno.EINTR, errno.EAGAIN):
                    continue
                self._raise_failed_run(error, gpa, size)
        reason = self._exit_reason()
        if reason == KVM_EXIT_HLT:
            return
        if reason == KVM_EXIT_MMIO:
            at, *_ = MMIO_EXIT_STRUCT.unpack_from(self._run, RUN_EXIT_AT)
            self._finish_instruction()
            raise MmioExit(f"guest access to gpa {at:#x}: no memory there", at & -PAGE_SIZE, PAGE_SIZE)
        raise GuestStoppedExit(f"KVM_RUN ended with exit {reason}", gpa, size, f"EXIT_{reason}")

    def _raise_failed_run(self, error: OSError, gpa: int, size: int) -> None:
        if error.errno == errno.EFAULT and self._exit_reason() == KVM_EXIT_MEMORY_FAULT:
            flags, at, length = MEMORY_FAULT_EXIT_STRUCT.unpack_from(self._run, RUN_EXIT_AT)
            raise MemoryFaultExit(f"guest access to gpa {at:#x}: memory fault", at, length, flags) from error
        if error.errno == EHWPOISON:
            raise HwPoisonExit(f"guest access to {gpa:#x}+{size:#x}: poisoned memory", gpa, size) from error
        name = errno.errorcode.get(error.errno or 0, str(error.errno))
        raise GuestStoppedExit(f"KVM_RUN failed: {error}", gpa, size, name) from error

    def _exit_reason(self) -> int:
        return int.from_bytes(self._run[RUN_EXIT_REASON_AT : RUN_EXIT_REASON_AT + 4], "little")

    def _finish_instruction(self) -> None:
        """Let KVM complete what waits for an answer to MMIO, without running on."""
        self._run[RUN_IMMEDIATE_EXIT_AT] = 1
        try:
            while True:
                self._transport.ioctl(self._vcpu, KVM_RUN)
        except OSError as error:
            if error.errno != errno.EINTR:
                raise
        finally:
            self._run[RUN_IMMEDIATE_EXIT_AT] = 0


def _chunks(gpa: int, size: int) -> list[tuple[int, int]]:
    """Cut a range into pieces of the buffer's size."""
    step = BUFFER_PAGES * PAGE_SIZE
    return [(start, min(step, gpa + size - start)) for start in range(gpa, gpa + size, step)]


def _free_range(occupied: Sequence[tuple[int, int]]) -> int:
    """A base for own memory that overlaps nothing: low, or where one of the ranges ends."""
    ends = sorted(-(-(start + size) // PAGE_SIZE) * PAGE_SIZE for start, size in occupied)
    for base in (OWN_SIZE, *ends):
        if all(base + OWN_SIZE <= start or start + size <= base for start, size in occupied):
            return base
    raise AssertionError("nothing lies beyond the last end")


def _supported_cpuid(transport: "KernelTransport", kvm: int) -> tuple[bytearray, int]:
    """What KVM can show a guest of the processor, and its number of physical address bits."""
    cpuid = bytearray(CPUID_HEADER_STRUCT.size + _CPUID_ENTRIES * CPUID_ENTRY_STRUCT.size)
    CPUID_HEADER_STRUCT.pack_into(cpuid, 0, _CPUID_ENTRIES, 0)
    transport.ioctl(kvm, KVM_GET_SUPPORTED_CPUID, cpuid)
    count, _ = CPUID_HEADER_STRUCT.unpack_from(cpuid)
    end = CPUID_HEADER_STRUCT.size + count * CPUID_ENTRY_STRUCT.size
    entries = CPUID_ENTRY_STRUCT.iter_unpack(cpuid[CPUID_HEADER_STRUCT.size : end])
    sizes = next((eax for function, _, _, eax, *_ in entries if function == CPUID_ADDRESS_SIZES), 36)
    return cpuid, sizes & 0xFF
