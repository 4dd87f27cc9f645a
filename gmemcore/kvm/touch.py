"""A process that touches mapped memory for another, so that SIGBUS is an answer and no crash.

Run as a script by `gmemcore.kvm.kernel`, with nothing but the standard library: it stays small, has one
thread and can therefore fork for every touch. The file comes with the request (SCM_RIGHTS); the forked child
maps it, touches it and answers. If a signal ends the child, its parent answers in its place.
"""

import ctypes
import errno
import mmap
import os
import resource
import socket
import struct
import sys

REQUEST = struct.Struct("<?QQ")
"""Whether to write, offset, size; what is to be written follows."""
REPLY = struct.Struct("<BQ")
"""How it ended, and a number: bytes that follow, the signal, or the errno."""
DONE, SIGNALLED, REFUSED = range(3)

MAP_FAILED = ctypes.c_void_p(-1).value


def libc() -> ctypes.CDLL:
    """The C library, with the calls that Python has no (or a more careful) form of."""
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
    library.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    library.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    library.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return library


def map_file(library: ctypes.CDLL, fd: int, offset: int, size: int, shared: bool) -> int:
    """mmap(2), which lets a mapping go beyond the end of the file, where Python's refuses.

    Raises
    ------
    OSError
        As the system call.
    """
    address = library.mmap(
        *(None, size, mmap.PROT_READ | mmap.PROT_WRITE),
        *(mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE, fd, offset),
    )
    if address == MAP_FAILED:
        number = ctypes.get_errno()
        raise OSError(number, f"mmap of {offset:#x}+{size:#x}: {os.strerror(number)}")
    return int(address)


def receive(channel: socket.socket, size: int) -> bytes:
    """Receive exactly size bytes, or none if the other side is gone."""
    data = bytearray()
    while len(data) < size:
        part = channel.recv(min(size - len(data), 1 << 20))
        if not part:
            return b""
        data += part
    return bytes(data)


def touch(fd: int, offset: int, size: int, written: bytes | None) -> bytes:
    """Read or write a byte range of a file through a mapping; a page that can't be touched is a signal."""
    start = offset & -mmap.PAGESIZE
    address = map_file(libc(), fd, start, offset + size - start, shared=True)
    for page in range(address, address + (offset - start) + size, mmap.PAGESIZE):
        ctypes.string_at(page, 1)
    if written is None:
        return ctypes.string_at(address + offset - start, size)
    ctypes.memmove(address + offset - start, written, size)
    return b""


def answer(channel: socket.socket, fd: int, offset: int, size: int, written: bytes | None) -> None:
    """Touch, and say what came of it."""
    try:
        data = touch(fd, offset, size, written)
    except OSError as error:
        channel.sendall(REPLY.pack(REFUSED, error.errno or 0))
    else:
        channel.sendall(REPLY.pack(DONE, len(data)) + data)


def serve(channel: socket.socket) -> None:
    """Touch what the other side asks for, until it hangs up."""
    while True:
        head, fds, _, _ = socket.recv_fds(channel, REQUEST.size, 1)
        if len(head) < REQUEST.size or not fds:
            return
        write, offset, size = REQUEST.unpack(head)
        written = receive(channel, size) if write else None
        child = os.fork()
        if not child:
            status = 1
            try:
                answer(channel, fds[0], offset, size, written)
                status = 0
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.close(fds[0])
        if status:
            channel.sendall(REPLY.pack(SIGNALLED, -status) if status < 0 else REPLY.pack(REFUSED, errno.EIO))


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with socket.socket(fileno=int(sys.argv[1])) as other:
        serve(other)
