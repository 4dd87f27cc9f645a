"""The kernel's transport: system calls on file descriptors, through /dev/kvm."""

import ctypes
import errno
import fcntl
import mmap
import os
import platform
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from gmemcore.errors import HostAccessError
from gmemcore.kvm import touch
from gmemcore.kvm.guest import KernelGuest
from gmemcore.kvm.structs import KVM_CREATE_GUEST_MEMFD
from gmemcore.kvm.transport import Guest, KvmUnavailableError
from gmemcore.uapi import PAGE_SIZE

DEVICE = "/dev/kvm"


class KernelTransport:
    """The host's kernel. A context manager; close it to end its helper process.

    Parameters
    ----------
    device : str or None
        The device file of KVM; None: the usual one.
    """

    def __init__(self, device: str | None = None) -> None:
        self.release = os.uname().release
        self._device = DEVICE if device is None else device
        self._libc = touch.libc()
        self._toucher: _Toucher | None = None

    def __enter__(self) -> "KernelTransport":
        return self

    def __exit__(self, *_: object) -> None:
        self.shut_down()

    def shut_down(self) -> None:
        """End the helper process. Open files stay open."""
        if self._toucher is not None:
            self._toucher.close()
            self._toucher = None

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

    def map(self, fd: int, offset: int, size: int, shared: bool = True) -> int:
        """See `Transport`."""
        return touch.map_file(self._libc, fd, offset, size, shared)

    def unmap(self, address: int, size: int) -> None:
        """See `Transport`."""
        self._libc.munmap(address, size)

    def read(self, fd: int, offset: int, size: int) -> bytes:
        """See `Transport`."""
        return self._helper().touch(fd, offset, size, None)

    def write(self, fd: int, offset: int, data: bytes) -> None:
        """See `Transport`."""
        self._helper().touch(fd, offset, len(data), data)

    def pin(self, fd: int, offset: int) -> int:
        """See `Transport`. A pipe that the page was spliced into holds the reference, as in the selftests."""
        address = self.map(fd, offset, PAGE_SIZE)
        reader, writer = os.pipe2(os.O_CLOEXEC)
        try:
            vector = (ctypes.c_size_t * 2)(address, PAGE_SIZE)  # struct iovec
            if self._libc.vmsplice(writer, ctypes.byref(vector), 1, 0) != PAGE_SIZE:
                number = ctypes.get_errno()
                os.close(reader)
                raise OSError(number, f"vmsplice of the page at {offset:#x}: {os.strerror(number)}")
        finally:
            os.close(writer)
            self.unmap(address, PAGE_SIZE)
        return reader

    def _helper(self) -> "_Toucher":
        if self._toucher is None:
            self._toucher = _Toucher()
        return self._toucher

    # ---- guests --------------------------------------------------------------------------------------------

    def guest(self, vm: int) -> Guest:
        """See `Transport`."""
        machine = platform.machine()
        if machine not in ("x86_64", "AMD64"):
            raise KvmUnavailableError(f"the guest program is for x86-64, and this host is {machine}")
        return KernelGuest(self, vm)


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


class _Toucher:
    """The helper process of touch.py, and the talk with it."""

    def __init__(self) -> None:
        self._channel, other = socket.socketpair()
        with other:
            # The script runs alone (-I -S): it needs nothing of this process's packages, and starts sooner.
            self._process = subprocess.Popen(  # noqa: S603  # this interpreter, and a file of this package
                [sys.executable, "-I", "-S", str(Path(touch.__file__)), str(other.fileno())],
                pass_fds=[other.fileno()],
                stdin=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

    def touch(self, fd: int, offset: int, size: int, written: bytes | None) -> bytes:
        """Touch a range of a file; see `Transport.read` and `Transport.write`."""
        request = touch.REQUEST.pack(written is not None, offset, size)
        socket.send_fds(self._channel, [request], [fd])
        if written is not None:
            self._channel.sendall(written)
        kind, number = touch.REPLY.unpack(self._receive(touch.REPLY.size))
        if kind == touch.SIGNALLED:
            name = signal.Signals(number).name
            if name != "SIGBUS":
                raise RuntimeError(f"a touch of {offset:#x}+{size:#x} was ended by {name}")
            raise HostAccessError(f"host access to {offset:#x}+{size:#x}: the kernel sent SIGBUS")
        if kind == touch.REFUSED:
            raise OSError(number, f"mapping {offset:#x}+{size:#x}: {os.strerror(number)}")
        return self._receive(number)

    def _receive(self, size: int) -> bytes:
        data = touch.receive(self._channel, size)
        if len(data) != size:
            raise RuntimeError("the helper process that touches memory is gone")
        return data

    def close(self) -> None:
        """Hang up, which ends the process."""
        self._channel.close()
        self._process.wait()
