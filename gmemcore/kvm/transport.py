"""What the client needs from a kernel. `KernelTransport` is the real one; a test can put the model there.

Open files are integers, as file descriptors are, and so are addresses of mapped memory. A refusal is an
``OSError`` with the kernel's errno; a host access that would be a signal is a `HostAccessError`, and a guest
access that can't go on is the `GuestExit` that ``KVM_RUN`` reports.
"""

import errno
from collections.abc import Callable
from typing import Final, Protocol, TypeVar

from gmemcore.errors import GmemError
from gmemcore.uapi import Protection

READ_WRITE: Final = Protection.READ | Protection.WRITE
_Answer = TypeVar("_Answer")


class KvmUnavailableError(GmemError):
    """ENODEV: this host doesn't offer what was asked of its KVM."""

    number = errno.ENODEV


class Vcpu(Protocol):
    """A vCPU that reads and writes guest memory. It needs memory of its own in the guest to run at all."""

    address_bits: int
    """Bits of a guest physical address."""
    own_size: int
    """Bytes of its own memory."""

    def place(self, slot: int, gpa: int) -> None:
        """Bind its own memory as a memslot."""

    def withdraw(self) -> None:
        """Delete that memslot."""

    def read(self, gpa: int, size: int) -> bytes:
        """Read as the guest; its own memory must be placed, and not where this access goes."""

    def write(self, gpa: int, data: bytes) -> None:
        """Write as the guest; see `read`."""

    def touch(self, gpa: int, size: int) -> float:
        """Write a byte to each page of up to 1 GiB as the guest; return the seconds of KVM_RUN."""

    def close(self) -> None:
        """Give the vCPU back."""


class Transport(Protocol):
    """The system calls, and what takes a process to do: touch mapped memory and run a guest."""

    release: str
    """Release of the kernel, as ``uname -r`` prints it."""

    def open(self) -> int:
        """Open /dev/kvm.

        Raises
        ------
        KvmUnavailableError
            ENODEV: this host has none, or this user can't open it.
        """

    def close(self, fd: int) -> None:
        """close(2)."""

    def ioctl(self, fd: int, request: int, argument: int | bytearray = 0) -> int:
        """ioctl(2) with a number or a whole struct, which is updated in place."""

    def raw_ioctl(self, fd: int, request: int, argument: bytearray | bytes | None) -> None:
        """ioctl(2) with a pointer to exactly these bytes: reading or writing beyond them is EFAULT."""

    def map(self, fd: int, offset: int, size: int, shared: bool = True, protection: int = READ_WRITE) -> int:
        """mmap(2); return the address. Nothing is touched."""

    def memory(self, size: int) -> int:
        """Map ordinary memory of this process alone, all zeros; return the address."""

    def reserve(self, address: int, size: int) -> None:
        """Replace a mapping by one that nobody can access, so that its addresses aren't used again."""

    def unmap(self, address: int, size: int) -> None:
        """munmap(2)."""

    def load(self, address: int, size: int) -> bytes:
        """Read mapped memory: every page is touched before a byte moves.

        Raises
        ------
        HostAccessError
            SIGBUS: a page can't be touched.
        """

    def store(self, address: int, data: bytes) -> None:
        """Write mapped memory; see `load`."""

    def touch_pages(self, address: int, size: int) -> None:
        """Write a byte to each page of mapped memory, at the speed of the processor; a bad page is fatal."""

    def populate(self, address: int, size: int) -> None:
        """madvise(2) with MADV_POPULATE_WRITE."""

    def pin(self, address: int) -> int:
        """Take a reference on the mapped page that lasts until the returned file is closed."""

    def file_call(self, name: str, fd: int, offset: int, size: int) -> None:
        """Make a system call on a file: read, write, pread, pwrite, lseek, ftruncate or fsync."""

    def in_child(self, call: Callable[[], _Answer]) -> _Answer:
        """Return what a call returns in a forked child process."""

    def fallocate(self, fd: int, mode: int, offset: int, size: int) -> None:
        """fallocate(2)."""

    def shared_memory(self, size: int) -> int:
        """Return ordinary memory of the host, as a file."""

    def vcpu(self, vm: int) -> Vcpu:
        """Create the vCPU of a VM; one per VM."""
