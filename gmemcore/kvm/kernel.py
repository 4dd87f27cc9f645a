"""The kernel's transport: system calls on file descriptors, through /dev/kvm."""

import ctypes
import errno
import fcntl
import mmap
import os
import platform
from collections.abc import Callable
from typing import Final, TypeVar

import numpy as np

from gmemcore.kvm import touch
from gmemcore.kvm.child import in_child
from gmemcore.kvm.structs import KVM_CREATE_GUEST_MEMFD
from gmemcore.kvm.transport import READ_WRITE, KvmUnavailableError, Vcpu
from gmemcore.kvm.vcpu import KernelVcpu
from gmemcore.uapi import PAGE_SIZE

_Answer = TypeVar("_Answer")

DEVICE = "/dev/kvm"
MADV_POPULATE_WRITE = 23
"""Since Linux 5.14; Python's mmap doesn't have it."""


class KernelTransport:
    """The host's kernel. A context manager, which closes what it opened for itself.

    Parameters
    ----------
    device : str or None
        The device file of KVM; None: the usual one.
    """

    def __init__(self, device: str | None = None) -> None:
        self.release = os.uname().release
        self._device = DEVICE if device is None else device
        self._libc = touch.libc()
        self._touch: touch.HostTouch | None = None

    def __enter__(self) -> "KernelTransport":
        return self

    def __exit__(self, *_: object) -> None:
        self.shut_down()

    def shut_down(self) -> None:
        """Close what was opened for host accesses. Files and VMs stay open."""
        if self._touch is not None:
            self._touch.close()
            self._touch = None

    # ---- files ---------------------------------------------------------------------------------------------

    def open(self) -> int:
        """See `Transport`."""
        try:
            return os.open(self._device, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise KvmUnavailableError(
                f"{self._device} can't be opened: {error.strerror}; it takes a host with KVM, and a user who "
                "may use it"
            ) from error

    def close(self, fd: int) -> None:
        """See `Transport`."""
        os.close(fd)

    def ioctl(self, fd: int, request: int, argument: int | bytearray = 0) -> int:
        """See `Transport`."""
        if isinstance(argument, int):
            return fcntl.ioctl(fd, request, argument)
        result: int = fcntl.ioctl(fd, request, argument, True)
        if request == KVM_CREATE_GUEST_MEMFD:
            os.set_inheritable(result, False)  # of KVM's files the one that isn't born close-on-exec
        return result

    def raw_ioctl(self, fd: int, request: int, argument: bytearray | bytes | None) -> None:
        """See `Transport`. ``fcntl.ioctl`` would lend the kernel a buffer of its own, and hide the bounds."""
        with _BoundedBytes(self._libc, argument) as (address, read_back):
            failed = self._libc.ioctl(fd, ctypes.c_ulong(request), ctypes.c_void_p(address)) < 0
            number = ctypes.get_errno()
            if isinstance(argument, bytearray):
                argument[:] = read_back()
        if failed:
            raise OSError(number, f"ioctl {request:#x}: {os.strerror(number)}")

    def file_call(self, name: str, fd: int, offset: int, size: int) -> None:
        """See `Transport`."""
        _FILE_CALLS[name](fd, offset, size)

    def in_child(self, call: Callable[[], _Answer]) -> _Answer:
        """See `Transport`."""

        def with_own_pipe() -> _Answer:
            self._touch = None  # the parent's pipe would be written to by both
            return call()

        return in_child(with_own_pipe)

    def fallocate(self, fd: int, mode: int, offset: int, size: int) -> None:
        """See `Transport`."""
        while self._libc.fallocate(fd, mode, offset, size):
            number = ctypes.get_errno()
            if number != errno.EINTR:
                raise OSError(number, f"fallocate({mode:#x}, {offset:#x}, {size:#x}): {os.strerror(number)}")

    def shared_memory(self, size: int) -> int:
        """See `Transport`."""
        fd = os.memfd_create("gmemcore", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size)
        except OSError:
            os.close(fd)
            raise
        return fd

    # ---- mapped memory -------------------------------------------------------------------------------------

    def map(self, fd: int, offset: int, size: int, shared: bool = True, protection: int = READ_WRITE) -> int:
        """See `Transport`."""
        return touch.map_file(self._libc, fd, offset, size, shared, protection)

    def memory(self, size: int) -> int:
        """See `Transport`."""
        return touch.map_file(self._libc, -1, 0, size, shared=False)

    def reserve(self, address: int, size: int) -> None:
        """See `Transport`."""
        touch.reserve(self._libc, address, size)

    def unmap(self, address: int, size: int) -> None:
        """See `Transport`."""
        self._libc.munmap(address, size)

    def load(self, address: int, size: int) -> bytes:
        """See `Transport`."""
        return self._host.load(address, size)

    def store(self, address: int, data: bytes) -> None:
        """See `Transport`."""
        self._host.store(address, data)

    def touch_pages(self, address: int, size: int) -> None:
        """See `Transport`."""
        np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))[::PAGE_SIZE] = 1

    def populate(self, address: int, size: int) -> None:
        """See `Transport`."""
        if self._libc.madvise(address, size, MADV_POPULATE_WRITE):
            number = ctypes.get_errno()
            raise OSError(number, f"MADV_POPULATE_WRITE: {os.strerror(number)}")

    def pin(self, address: int) -> int:
        """See `Transport`. A pipe that the page is spliced into holds the reference, as in the selftests."""
        reader, writer = os.pipe2(os.O_CLOEXEC)
        try:
            vector = (ctypes.c_size_t * 2)(address, PAGE_SIZE)  # struct iovec
            if self._libc.vmsplice(writer, ctypes.byref(vector), 1, 0) != PAGE_SIZE:
                number = ctypes.get_errno()
                os.close(reader)
                raise OSError(number, f"vmsplice of the page at {address:#x}: {os.strerror(number)}")
        finally:
            os.close(writer)
        return reader

    @property
    def _host(self) -> touch.HostTouch:
        if self._touch is None:
            self._touch = touch.HostTouch(self._libc)
        return self._touch

    # ---- guests --------------------------------------------------------------------------------------------

    def vcpu(self, vm: int) -> Vcpu:
        """See `Transport`."""
        machine = platform.machine()
        if machine not in ("x86_64", "AMD64"):
            raise KvmUnavailableError(f"the guest program is for x86-64, and this host is {machine}")
        return KernelVcpu(self, vm)


_FILE_CALLS: Final[dict[str, Callable[[int, int, int], object]]] = {
    "read": lambda fd, offset, size: os.read(fd, size),
    "write": lambda fd, offset, size: os.write(fd, bytes(size)),
    "pread": lambda fd, offset, size: os.pread(fd, size, offset),
    "pwrite": lambda fd, offset, size: os.pwrite(fd, bytes(size), offset),
    "lseek": lambda fd, offset, size: os.lseek(fd, offset, os.SEEK_SET),
    "ftruncate": lambda fd, offset, size: os.ftruncate(fd, offset),
    "fsync": lambda fd, offset, size: os.fsync(fd),
}


class _BoundedBytes:
    """Memory that ends where a guard page begins, holding an ioctl's argument at its very end."""

    def __init__(self, libc: ctypes.CDLL, argument: bytearray | bytes | None) -> None:
        self._libc = libc
        self._argument = argument

    def __enter__(self) -> tuple[int, Callable[[], bytes]]:
        data = b"" if self._argument is None else bytes(self._argument)
        room = -(-len(data) // PAGE_SIZE) * PAGE_SIZE
        self._map = mmap.mmap(-1, room + PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        view = ctypes.c_char.from_buffer(self._map)
        start = ctypes.addressof(view)
        del view
        self._map[room - len(data) : room] = data
        self._libc.mprotect(start + room, PAGE_SIZE, 0)
        if isinstance(self._argument, bytes) and room:
            self._libc.mprotect(start, room, mmap.PROT_READ)
        address = 0 if self._argument is None else start + room - len(data)
        return address, lambda: self._map[room - len(data) : room]

    def __exit__(self, *_: object) -> None:
        self._map.close()
