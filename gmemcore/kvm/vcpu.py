"""The smallest guest: one vCPU in 64-bit mode that copies a few bytes and halts.

Real mode would not reach the addresses of the vectors (4 GiB and above), so KVM is handed a vCPU that is
already in 64-bit mode, with page tables that map two things: the vCPU's own memory at virtual address 0, and
a window of a few pages onto the physical range of the access. The own memory is a memslot that stays where it
is from one access to the next.

References
----------
KVM API documentation, 4.10 (``KVM_RUN``), section 5 (``struct kvm_run``); AMD64 Architecture Programmer's
Manual, volume 2, 5.3 (long-mode page translation) and 14 (processor initialization).
"""

import ctypes
import errno
import mmap
import time
from collections.abc import Callable
from typing import Final

from gmemcore.errors import GuestExit, HwPoisonExit, InvalidArgumentError, MemoryFaultExit, MmioExit
from gmemcore.kvm.alarm import Alarm
from gmemcore.kvm.structs import (
    CONTROL_AT,
    CONTROL_STRUCT,
    CPUID_ADDRESS_SIZES,
    CPUID_ENTRY_STRUCT,
    CPUID_HEADER_STRUCT,
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
    KVM_SET_SIGNAL_MASK,
    KVM_SET_SREGS,
    KVM_SET_USER_MEMORY_REGION2,
    MEMORY_FAULT_EXIT_STRUCT,
    MMIO_EXIT_STRUCT,
    REGS_STRUCT,
    RUN_EXIT_AT,
    RUN_EXIT_REASON_AT,
    RUN_IMMEDIATE_EXIT_AT,
    SEGMENT_STRUCT,
    SIGNAL_MASK_STRUCT,
    SREGS_SIZE,
    SREGS_TR,
    USER_MEMORY_REGION2_STRUCT,
)
from gmemcore.kvm.touch import libc
from gmemcore.kvm.transport import Transport
from gmemcore.uapi import PAGE_SIZE

EHWPOISON = HwPoisonExit.number

PROGRAM = (
    b"\x0f\x20\xd8"  # mov rax, cr3
    b"\x0f\x22\xd8"  # mov cr3, rax: forget translations of an earlier window
    b"\x4d\x85\xc9"  # test r9, r9: pages left to touch
    b"\x74\x0f"  # jz to the copy
    b"\x41\x8a\x00"  # mov al, [r8]
    b"\x49\x81\xc0\x00\x10\x00\x00"  # add r8, 4096
    b"\x49\xff\xc9"  # dec r9
    b"\xeb\xec"  # jmp to the test
    b"\xf3\xa4"  # rep movsb: rcx bytes from [rsi] to [rdi]
    b"\xf4"  # hlt
)
"""Touch every page of the range first: an access that is refused moves no data."""

TOUCH_PROGRAM = (
    b"\x0f\x20\xd8"  # mov rax, cr3
    b"\x0f\x22\xd8"  # mov cr3, rax
    b"\x4d\x85\xc9"  # test r9, r9: pages left to touch
    b"\x74\x0f"  # jz to the end
    b"\x41\x88\x00"  # mov [r8], al
    b"\x49\x81\xc0\x00\x10\x00\x00"  # add r8, 4096
    b"\x49\xff\xc9"  # dec r9
    b"\xeb\xec"  # jmp to the test
    b"\xf4"  # hlt
)
"""Write a byte to each page of a long range."""
TOUCH_AT = 512
"""Offset of that program in the code page."""

# Pages of the own memory.
CODE, ROOT, DIRECTORY_POINTERS, DIRECTORY, OWN_TABLE, WINDOW_TABLE, LONG_DIRECTORY, BUFFER = range(8)
BUFFER_PAGES = 16
OWN_PAGES = BUFFER + BUFFER_PAGES
OWN_SIZE = OWN_PAGES * PAGE_SIZE
WINDOW = 1 << 21
"""Virtual address of the window: the second entry of the page directory."""
LONG_WINDOW = 1 << 30
"""Virtual address of a window of 1 GiB, in pages of 2 MiB: the second entry of the directory pointers."""
RUN_SECONDS: Final = 10.0
"""KVM_RUN ends after this long, whatever the guest does. An access takes microseconds."""
PAGES_PER_SECOND: Final = 10_000
"""What a long touch may take longer; emulated kernels are slow."""

_PRESENT_WRITABLE = 3
_LARGE = 0x80  # a page directory's entry that is a page of 2 MiB
_LARGE_SIZE = 2 << 20
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


class KernelVcpu:
    """A vCPU of a VM; see `Vcpu`.

    Parameters
    ----------
    transport : Transport
        Of the VM's kernel.
    vm : int
        File descriptor of the VM.
    """

    def __init__(self, transport: Transport, vm: int) -> None:
        self.own_size = OWN_SIZE
        self._transport = transport
        self._ioctl = transport.ioctl
        self._vm = vm
        kvm = transport.open()
        try:
            self._cpuid, self.address_bits = _supported_cpuid(transport.ioctl, kvm)
            run_size = transport.ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE)
        finally:
            transport.close(kvm)
        self._slot: int | None = None
        self._vcpu = transport.ioctl(vm, KVM_CREATE_VCPU, 0)
        self._run = mmap.mmap(self._vcpu, run_size)
        self._own = mmap.mmap(-1, OWN_SIZE, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
        self._ioctl(self._vcpu, KVM_SET_CPUID2, self._cpuid)
        self._alarm = Alarm(libc())
        mask = self._alarm.mask
        self._ioctl(self._vcpu, KVM_SET_SIGNAL_MASK, bytearray(SIGNAL_MASK_STRUCT.pack(len(mask)) + mask))

    def close(self) -> None:
        """See `Vcpu`."""
        self._alarm.close()
        self._run.close()
        self._own.close()
        self._transport.close(self._vcpu)

    # ---- own memory ----------------------------------------------------------------------------------------

    def place(self, slot: int, gpa: int) -> None:
        """See `Vcpu`."""
        self.withdraw()
        view = ctypes.c_char.from_buffer(self._own)
        self._set_region(slot, gpa, OWN_SIZE, ctypes.addressof(view))
        del view
        self._slot = slot
        self._own[: len(PROGRAM)] = PROGRAM
        self._own[TOUCH_AT : TOUCH_AT + len(TOUCH_PROGRAM)] = TOUCH_PROGRAM
        for table, entries in (
            (ROOT, [gpa + DIRECTORY_POINTERS * PAGE_SIZE]),
            (DIRECTORY_POINTERS, [gpa + DIRECTORY * PAGE_SIZE, gpa + LONG_DIRECTORY * PAGE_SIZE]),
            (DIRECTORY, [gpa + OWN_TABLE * PAGE_SIZE, gpa + WINDOW_TABLE * PAGE_SIZE]),
            (OWN_TABLE, [gpa + page * PAGE_SIZE for page in range(OWN_PAGES)]),
        ):
            self._write_table(table, entries)
        self._set_special_registers(gpa + ROOT * PAGE_SIZE)

    def withdraw(self) -> None:
        """See `Vcpu`."""
        if self._slot is not None:
            self._set_region(self._slot, 0, 0, 0)
            self._slot = None

    def _set_region(self, slot: int, gpa: int, size: int, address: int) -> None:
        region = USER_MEMORY_REGION2_STRUCT.pack(slot, 0, gpa, size, address, *[0] * (2 + 1 + 14))
        self._ioctl(self._vm, KVM_SET_USER_MEMORY_REGION2, bytearray(region))

    def _write_table(self, table: int, addresses: list[int]) -> None:
        packed = b"".join((address | _PRESENT_WRITABLE).to_bytes(8, "little") for address in addresses)
        self._own[table * PAGE_SIZE : (table + 1) * PAGE_SIZE] = packed.ljust(PAGE_SIZE, b"\0")

    def _set_special_registers(self, root: int) -> None:
        sregs = bytearray(SREGS_SIZE)
        self._ioctl(self._vcpu, KVM_GET_SREGS, sregs)
        for i, segment in enumerate([_CODE_SEGMENT, *[_DATA_SEGMENT] * (SREGS_TR - 1), _TASK_SEGMENT]):
            SEGMENT_STRUCT.pack_into(sregs, i * SEGMENT_STRUCT.size, *segment)
        CONTROL_STRUCT.pack_into(sregs, CONTROL_AT, _CR0, 0, root, _CR4_PAE, 0, _EFER_LONG_MODE)
        self._ioctl(self._vcpu, KVM_SET_SREGS, sregs)

    # ---- accesses ------------------------------------------------------------------------------------------

    def read(self, gpa: int, size: int) -> bytes:
        """See `Vcpu`."""
        parts = []
        for start, length in _chunks(gpa, size):
            self._copy(start, length, write=False)
            parts.append(self._own[BUFFER * PAGE_SIZE :][:length])
        return b"".join(parts)

    def write(self, gpa: int, data: bytes) -> None:
        """See `Vcpu`."""
        chunks = _chunks(gpa, len(data))
        if len(chunks) > 1:  # what one page refuses shall move no data, beyond the window too
            for start, length in chunks:
                self._copy(start, length, write=False)
        for start, length in chunks:
            at = BUFFER * PAGE_SIZE
            self._own[at : at + length] = data[start - gpa :][:length]
            self._copy(start, length, write=True)

    def touch(self, gpa: int, size: int) -> float:
        """See `Vcpu`."""
        start = gpa & -_LARGE_SIZE
        if gpa % PAGE_SIZE or size % PAGE_SIZE or gpa + size > start + LONG_WINDOW:
            raise InvalidArgumentError(f"a guest can't touch {gpa:#x}+{size:#x} at once: at most 1 GiB")
        self._write_table(LONG_DIRECTORY, [page | _LARGE for page in range(start, gpa + size, _LARGE_SIZE)])
        r8, r9 = LONG_WINDOW + gpa - start, size // PAGE_SIZE
        rip = CODE * PAGE_SIZE + TOUCH_AT
        regs = REGS_STRUCT.pack(*[0] * 8, r8, r9, *[0] * 6, rip, _RFLAGS)
        self._ioctl(self._vcpu, KVM_SET_REGS, bytearray(regs))
        began = time.perf_counter()
        self._enter(gpa, size)
        return time.perf_counter() - began

    def _copy(self, gpa: int, size: int, *, write: bool) -> None:
        """Let the guest copy between its buffer and the range; the whole range lies in one window."""
        pages = range(gpa & -PAGE_SIZE, gpa + size, PAGE_SIZE)
        self._write_table(WINDOW_TABLE, list(pages))
        window, buffer = WINDOW + gpa % PAGE_SIZE, BUFFER * PAGE_SIZE
        source, target = (buffer, window) if write else (window, buffer)
        rcx, rsi, rdi, r8, r9 = size, source, target, window, len(pages)
        regs = REGS_STRUCT.pack(0, 0, rcx, 0, rsi, rdi, 0, 0, r8, r9, *[0] * 6, CODE * PAGE_SIZE, _RFLAGS)
        self._ioctl(self._vcpu, KVM_SET_REGS, bytearray(regs))
        self._enter(gpa, size)

    # ---- KVM_RUN -------------------------------------------------------------------------------------------

    def _enter(self, gpa: int, size: int) -> None:
        """Run until the guest halts.

        Raises
        ------
        GuestExit
            It couldn't go on.
        """
        patience = RUN_SECONDS + size / PAGE_SIZE / PAGES_PER_SECOND
        deadline = time.monotonic() + patience
        while True:
            try:
                self._ioctl(self._vcpu, KVM_RUN)
                break
            except OSError as error:
                if error.errno not in (errno.EINTR, errno.EAGAIN):
                    self._raise_failed_run(error, gpa, size)
            self._alarm.take()
            if time.monotonic() > deadline:
                raise GuestStoppedExit(f"KVM_RUN didn't end in {patience:.0f} s", gpa, size, "TIMEOUT")
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
        raise GuestStoppedExit(f"KVM_RUN failed: {error.strerror}", gpa, size, name) from error

    def _exit_reason(self) -> int:
        return int.from_bytes(self._run[RUN_EXIT_REASON_AT : RUN_EXIT_REASON_AT + 4], "little")

    def _finish_instruction(self) -> None:
        """Let KVM complete the instruction that waits for an answer to MMIO, and run no further."""
        self._run[RUN_IMMEDIATE_EXIT_AT] = 1
        try:
            for _ in range(PAGE_SIZE):  # an instruction needs a handful of answers at most
                self._ioctl(self._vcpu, KVM_RUN)
        except OSError as error:
            if error.errno != errno.EINTR:
                raise
        finally:
            self._run[RUN_IMMEDIATE_EXIT_AT] = 0


def _chunks(gpa: int, size: int) -> list[tuple[int, int]]:
    """Cut a range into pieces that fit the buffer, and the window wherever they begin."""
    step = BUFFER_PAGES * PAGE_SIZE
    return [(start, min(step, gpa + size - start)) for start in range(gpa, gpa + size, step)]


def _supported_cpuid(ioctl: Callable[[int, int, bytearray], int], kvm: int) -> tuple[bytearray, int]:
    """What KVM can show a guest of the processor, and its number of physical address bits."""
    cpuid = bytearray(CPUID_HEADER_STRUCT.size + _CPUID_ENTRIES * CPUID_ENTRY_STRUCT.size)
    CPUID_HEADER_STRUCT.pack_into(cpuid, 0, _CPUID_ENTRIES, 0)
    ioctl(kvm, KVM_GET_SUPPORTED_CPUID, cpuid)
    count, _ = CPUID_HEADER_STRUCT.unpack_from(cpuid)
    end = CPUID_HEADER_STRUCT.size + count * CPUID_ENTRY_STRUCT.size
    entries = CPUID_ENTRY_STRUCT.iter_unpack(cpuid[CPUID_HEADER_STRUCT.size : end])
    sizes = next((eax for function, _, _, eax, *_ in entries if function == CPUID_ADDRESS_SIZES), 36)
    return cpuid, sizes & 0xFF
