"""Backings: where the bytes of a file live. One class and one row of ``BACKINGS`` each.

A backing promises four things: ``words`` (uint64, the whole file, contiguous; empty if it holds no bytes),
memory that reads zero until it is written, `release` (reads zero again) and `commit` (the range can be
touched without a signal). Nothing here knows of page state.
"""

import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gmemcore.errors import GmemError, OutOfMemoryError, UnsupportedOperationError
from gmemcore.uapi import PAGE_SIZE

MADV_POPULATE_WRITE = 23  # Linux 5.14; the mmap module has no name for it
_F_ADD_SEALS, _F_SEAL_SEAL, _F_SEAL_SHRINK, _F_SEAL_GROW = 1033, 1, 2, 4
_FALLOC_PUNCH_KEEPING_SIZE = 3
_KEPT_BY_THE_ALLOCATOR = 32 << 20  # glibc's largest M_MMAP_THRESHOLD; page state of a guest of 170 GiB
_MAP_NORESERVE = 0x4000  # the mmap module names it from Python 3.13 on


class Backing(Protocol):
    """What the engine asks of a backing."""

    words: NDArray[np.uint64]
    commits_late: bool
    """Whether `commit` must be asked before pages come into being."""

    def release(self, offset: int, size: int) -> None:
        """Give a range back: it reads zeros from now on."""

    def commit(self, offset: int, size: int) -> None:
        """Make sure that a range can be written.

        Raises
        ------
        OutOfMemoryError
            ENOMEM: the host can't.
        """

    def close(self) -> None:
        """Drop the memory; views that others hold keep it alive."""


BackingFactory = Callable[[int], Backing]


def lazy_words(n_words: int) -> NDArray[np.uint64]:
    """A zeroed uint64 array whose pages cost nothing until they are written.

    Raises
    ------
    OutOfMemoryError
        ENOMEM: not even the address space is to be had.
    """
    if n_words == 0:
        return np.zeros(0, np.uint64)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    try:
        return np.frombuffer(mmap.mmap(-1, n_words * 8, flags=flags), np.uint64)
    except (OSError, OverflowError, ValueError) as error:
        raise OutOfMemoryError(f"the host can't map {n_words * 8:#x} bytes: {error}") from error


def unwritten_words(n_words: int) -> NDArray[np.uint64]:
    """A uint64 array of any contents, for a caller that writes a word before it reads it.

    Up to what the allocator keeps for the next one, it is memory that an earlier guest gave back: without the
    page faults and the clearing that new memory costs (4 of the 5 ms of a 64 GiB guest of a fleet).

    Raises
    ------
    OutOfMemoryError
        ENOMEM: not even the address space is to be had.
    """
    if n_words * 8 > _KEPT_BY_THE_ALLOCATOR:
        return lazy_words(n_words)
    try:
        return np.empty(n_words, np.uint64)
    except MemoryError as error:
        raise OutOfMemoryError(f"the host can't map {n_words * 8:#x} bytes: {error}") from error


class AnonymousBacking:
    """Anonymous memory of this process.

    Parameters
    ----------
    size : int
        Bytes, a multiple of PAGE_SIZE.
    huge_pages : bool
        Ask for transparent huge pages (MADV_HUGEPAGE).
    prefault : bool
        Fault every page in at once (MADV_POPULATE_WRITE).
    """

    commits_late = False  # mmap promised the memory

    def __init__(self, size: int, *, huge_pages: bool = False, prefault: bool = False) -> None:
        check_host_can_hold(size)
        try:
            self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError, ValueError) as error:
            raise OutOfMemoryError(f"the host can't map {size:#x} bytes: {error}") from error
        if huge_pages:
            advise_huge_pages(self._map)
        self.words: NDArray[np.uint64] = np.frombuffer(self._map, np.uint64)
        if prefault:
            populate(self._map, self.words, 0, size)

    def release(self, offset: int, size: int) -> None:
        """See `Backing`."""
        self._map.madvise(mmap.MADV_DONTNEED, offset, size)

    def commit(self, offset: int, size: int) -> None:
        """See `Backing`."""

    def close(self) -> None:
        """See `Backing`."""
        if len(self.words):
            self.words = np.zeros(0, np.uint64)
            del self._map


class MemfdBacking:
    """A sealed memfd: shareable, and nobody who holds it can shrink it under us.

    Parameters
    ----------
    size : int
        Bytes, a multiple of PAGE_SIZE.
    prefault : bool
        Fault every page in at once; otherwise memory is committed as pages come into being.
    """

    commits_late = True  # the file has holes, and a hole that can't be filled is SIGBUS
    kind = "memfd"
    _fd = -1

    def __init__(self, size: int, *, prefault: bool = False) -> None:
        check_host_can_hold(size)
        try:
            self._fd = self.open_file(size)
            self._map = mmap.mmap(self._fd, size)
            self.words: NDArray[np.uint64] = np.frombuffer(self._map, np.uint64)
            if prefault:
                populate(self._map, self.words, 0, size)
        except GmemError:
            raise
        except (OSError, OverflowError, ValueError) as error:
            raise OutOfMemoryError(
                f"the host can't hold a {self.kind} of {size:#x} bytes: {error}"
            ) from error

    def open_file(self, size: int) -> int:
        """Return the descriptor of a new file of this size."""
        return open_memfd(size)

    def release(self, offset: int, size: int) -> None:
        """See `Backing`."""
        _fallocate(self._fd, _FALLOC_PUNCH_KEEPING_SIZE, offset, size)

    def commit(self, offset: int, size: int) -> None:
        """See `Backing`."""
        populate(self._map, self.words, offset, size)

    def map_again(self) -> mmap.mmap:
        """See `gmemcore.engine.host_view.SharedBacking`."""
        return mmap.mmap(self._fd, self.words.nbytes)

    def existing(self, offset: int, size: int) -> Iterator[tuple[int, int]]:
        """See `gmemcore.engine.host_view.SharedBacking`."""
        at, end = offset, offset + size
        with suppress(OSError):  # ENXIO: no more of it
            while (at := os.lseek(self._fd, at, os.SEEK_DATA)) < end:
                start, at = at, min(os.lseek(self._fd, at, os.SEEK_HOLE), end)
                yield start, at

    def close(self) -> None:
        """See `Backing`."""
        self.words = np.zeros(0, np.uint64)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            del self._map  # which has a descriptor of its own, and the memory

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)


class GuestMemfdBacking(MemfdBacking):
    """A guest_memfd of the host's kernel, through /dev/kvm: the very memory that is modelled.

    Its page state is still the model's; the kernel only holds the bytes, all of them shared. For this process
    it is a memfd that is opened in another way.
    """

    kind = "guest_memfd"

    def open_file(self, size: int) -> int:
        """Return the descriptor of a new guest_memfd; a `GmemError` where the host has none."""
        from gmemcore.kvm.memory import open_guest_memfd

        return open_guest_memfd(size)

    def existing(self, offset: int, size: int) -> Iterator[tuple[int, int]]:
        """See `gmemcore.engine.host_view.SharedBacking`: by mincore(2), since it can't be sought in."""
        resident = np.zeros(size // PAGE_SIZE + 2, np.uint8)  # with none on either side
        libc: Any = ctypes.CDLL(None, use_errno=True)
        address = ctypes.c_void_p(self.words.ctypes.data + offset)
        if libc.mincore(address, ctypes.c_size_t(size), ctypes.c_void_p(resident[1:].ctypes.data)):
            number = ctypes.get_errno()
            raise OSError(number, f"mincore({offset:#x}, {size:#x}): {os.strerror(number)}")
        edges = offset + np.flatnonzero(np.diff(resident & 1)) * PAGE_SIZE
        yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


class NoBacking:
    """Attributes only: page state of guests of any size, and no bytes."""

    commits_late = False

    def __init__(self, size: int) -> None:
        self.words: NDArray[np.uint64] = np.zeros(0, np.uint64)

    def release(self, offset: int, size: int) -> None:
        """See `Backing`."""

    def commit(self, offset: int, size: int) -> None:
        """See `Backing`."""

    def close(self) -> None:
        """See `Backing`."""


BACKINGS: dict[str, Callable[..., Backing]] = {
    "anonymous": AnonymousBacking,
    "memfd": MemfdBacking,
    "guest_memfd": GuestMemfdBacking,
    "none": NoBacking,
}
"""Backings by name."""


def open_memfd(size: int) -> int:
    """Create a memfd of this size, close-on-exec, and seal the size."""
    fd = os.memfd_create("gmemcore", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_SHRINK | _F_SEAL_GROW | _F_SEAL_SEAL)
    except BaseException:
        os.close(fd)
        raise
    return fd


def advise_huge_pages(mapping: mmap.mmap) -> None:
    """Ask for transparent huge pages.

    Raises
    ------
    UnsupportedOperationError
        EOPNOTSUPP: the host's kernel has none. (One that has them may still give small pages.)
    """
    try:
        mapping.madvise(mmap.MADV_HUGEPAGE)
    except OSError as error:
        raise UnsupportedOperationError(
            f"the host's kernel takes no advice for huge pages: {error}; without huge_pages it would do"
        ) from error


def populate(mapping: mmap.mmap, words: NDArray[np.uint64], offset: int, size: int) -> None:
    """Fault a range of a mapping in for writing, so that a lack of memory is an exception and no signal.

    Raises
    ------
    OutOfMemoryError
        ENOMEM: the host couldn't.
    """
    try:
        mapping.madvise(MADV_POPULATE_WRITE, offset, size)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise OutOfMemoryError(
                f"the host can't provide {size:#x} bytes at {offset:#x}: {error}"
            ) from error
        # Before Linux 5.14: touch a word of every page instead.
        first, end, step = offset // 8, (offset + size) // 8, PAGE_SIZE // 8
        words[first:end:step] |= np.uint64(0)


def check_host_can_hold(size: int) -> None:
    """Refuse more bytes than the host has memory.

    Raises
    ------
    OutOfMemoryError
        ENOMEM, with both figures.
    """
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > total:
        raise OutOfMemoryError(f"{size:#x} bytes are more than this host's memory of {total:#x}")


def _fallocate(fd: int, mode: int, offset: int, size: int) -> None:
    """fallocate(2) with a mode, which the os module doesn't offer."""
    libc: Any = ctypes.CDLL(None, use_errno=True)
    while libc.fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(size)):
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, f"fallocate({mode:#x}, {offset:#x}, {size:#x}): {os.strerror(number)}")
