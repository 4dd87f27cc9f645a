"""Touches of mapped memory in which a page that can't be touched is an answer, not a signal.

A load or store instruction on such a page ends the process with SIGBUS. The kernel's own copy from or to the
same address fails with EFAULT instead. So memory is read by writing it into a pipe, and written by reading it
from one.
"""

import ctypes
import errno
import fcntl
import mmap
import os

from gmemcore.errors import HostAccessError
from gmemcore.kvm.transport import READ_WRITE

_PROT_NONE, _MAP_FIXED = 0, 0x10  # not in Python's mmap
MAP_FAILED = ctypes.c_void_p(-1).value


def libc() -> ctypes.CDLL:
    """Load the C library, with the calls that Python lacks or checks more strictly."""
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
    library.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    library.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    library.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    for call in (library.read, library.write):
        call.restype = ctypes.c_ssize_t
        call.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    return library


def map_file(
    library: ctypes.CDLL, fd: int, offset: int, size: int, shared: bool, protection: int = READ_WRITE
) -> int:
    """mmap(2). Unlike Python's, a mapping can go beyond the end of the file. fd -1: ordinary memory.

    Raises
    ------
    OSError
        As the system call.
    """
    flags = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE
    flags |= mmap.MAP_ANONYMOUS if fd < 0 else 0
    address = library.mmap(None, size, int(protection), flags, fd, offset)
    if address == MAP_FAILED:
        number = ctypes.get_errno()
        raise OSError(number, f"mmap of {offset:#x}+{size:#x}: {os.strerror(number)}")
    return int(address)


def reserve(library: ctypes.CDLL, address: int, size: int) -> None:
    """Replace a mapping by one that nobody can access, at the same addresses."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
    if library.mmap(address, size, _PROT_NONE, flags, -1, 0) == MAP_FAILED:
        number = ctypes.get_errno()
        raise OSError(number, f"mmap at {address:#x}: {os.strerror(number)}")


class HostTouch:
    """Reads and writes mapped memory through a pipe of its own.

    Parameters
    ----------
    library : ctypes.CDLL
        From `libc`.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._out, self._in = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._room = fcntl.fcntl(self._in, fcntl.F_GETPIPE_SZ)

    def close(self) -> None:
        """Close the pipe."""
        os.close(self._out)
        os.close(self._in)

    def load(self, address: int, size: int) -> bytes:
        """See `Transport.load`."""
        self._touch_pages(address, size)
        if size <= self._room:
            return self._take(address, size)
        end = address + size
        parts = range(address, end, self._room)
        return b"".join(self._take(at, min(self._room, end - at)) for at in parts)

    def store(self, address: int, data: bytes) -> None:
        """See `Transport.store`."""
        self._touch_pages(address, len(data))
        for start in range(0, len(data), self._room):
            part = data[start : start + self._room]
            os.write(self._in, part)
            if self._library.read(self._out, address + start, len(part)) != len(part):
                number = ctypes.get_errno()
                os.read(self._out, self._room)
                raise self._refusal(address + start, number)

    def _touch_pages(self, address: int, size: int) -> None:
        """Touch a byte of each page, where there are several: an access that is refused moves no data."""
        end = address + size
        if (address ^ (end - 1)) < mmap.PAGESIZE:
            return
        for page in range(address & -mmap.PAGESIZE, end, mmap.PAGESIZE):
            self._take(max(page, address), 1)

    def _take(self, address: int, size: int) -> bytes:
        written = self._library.write(self._in, address, size)
        if written == size:
            return os.read(self._out, size)
        number = ctypes.get_errno()
        if written > 0:
            os.read(self._out, written)
        raise self._refusal(address, errno.EFAULT if written > 0 else number)

    def _refusal(self, address: int, number: int) -> OSError:
        if number == errno.EFAULT:
            return HostAccessError(f"host access to address {address:#x}: the page can't be touched (SIGBUS)")
        return OSError(number, f"copy at address {address:#x}: {os.strerror(number)}")
