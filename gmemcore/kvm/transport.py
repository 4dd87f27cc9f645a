"""What the client needs of a kernel. `KernelTransport` is the real one; a test's may be the model.

Everything is done to integers that stand for open files, as file descriptors do. Refusals are ``OSError``
with the kernel's errno; a host touch that would be a signal is `HostAccessError`, and a guest access that
can't go on the `GuestExit` that ``KVM_RUN`` reports.
"""

import errno
from collections.abc import Sequence
from typing import Protocol

from gmemcore.errors import GmemError


class KvmUnavailableError(GmemError):
    """ENODEV: this host doesn't offer what was asked of its KVM."""

    number = errno.ENODEV


class Guest(Protocol):
    """A vCPU that reads and writes guest memory, with memory of its own beside the memslots."""

    address_bits: int
    """Bits of a guest physical address."""

    def read(self, gpa: int, size: int, occupied: Sequence[tuple[int, int]]) -> bytes:
        """Read as the guest; occupied are the (gpa, size) of all memslots."""

    def write(self, gpa: int, data: bytes, occupied: Sequence[tuple[int, int]]) -> None:
        """Write as the guest."""

    def close(self) -> None:
        """Give the vCPU back."""


class Transport(Protocol):
    """The system calls, and what only a process can do: touch mapped memory and run a guest."""

    release: str
    """Release of the kernel, as ``uname -r`` says it."""

    def open(self) -> int:
        """Open /dev/kvm.

        Raises
        ------
        KvmUnavailableError
            ENODEV: there is none, or not for this user.
        """

    def close(self, fd: int) -> None:
        """close(2)."""

    def ioctl(self, fd: int, request: int, argument: int | bytearray = 0) -> int:
        """ioctl(2) with a number or a whole struct, which is updated in place."""

    def raw_ioctl(self, fd: int, request: int, argument: bytearray | bytes | None) -> None:
        """ioctl(2) with a pointer to exactly these bytes: reading or writing beyond them is EFAULT."""

    def read(self, fd: int, offset: int, size: int) -> bytes:
        """Read through a shared mapping."""

    def write(self, fd: int, offset: int, data: bytes) -> None:
        """Write through a shared mapping; every page is touched before a byte moves."""

    def map(self, fd: int, offset: int, size: int, shared: bool = True) -> int:
        """mmap(2) for reading and writing; returns the address, and touches nothing."""

    def unmap(self, address: int, size: int) -> None:
        """munmap(2)."""

    def fallocate(self, fd: int, mode: int, offset: int, size: int) -> None:
        """fallocate(2)."""

    def pin(self, fd: int, offset: int) -> int:
        """Take a reference on the page there that lasts until the returned file is closed."""

    def shared_memory(self, size: int) -> int:
        """Ordinary memory of the host, as a file."""

    def guest(self, vm: int) -> Guest:
        """Make the guest of a VM; one a VM."""
