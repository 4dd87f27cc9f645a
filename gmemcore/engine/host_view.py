"""HostView: a second mapping of a file's memory, in which the host can't touch private pages.

The engine works on the first mapping, whatever the attributes are; this one is what a VMM would have. A touch
of a private page of it really faults (SIGSEGV, where the kernel's guest_memfd has SIGBUS). It costs two
system calls beside the mprotect itself to convert all or nothing:

split    gives the range mappings of its own, by advice that changes nothing else (MADV_DONTDUMP). It is the
         only step that can fail: the host's limit of mappings (vm.max_map_count) is met here.
protect  changes them whole, which needs no further mapping.
join     takes the advice back, and neighbours of one protection become one mapping again.
"""

import ctypes
import mmap
import os
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from gmemcore.errors import OutOfMemoryError, UnsupportedOperationError
from gmemcore.uapi import PAGE_SHIFT

PROT_NONE = 0
PROT_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE


@runtime_checkable
class SharedBacking(Protocol):
    """A backing whose memory can be mapped twice."""

    def map_again(self) -> mmap.mmap:
        """Map the whole file once more, readable and writable."""

    def existing(self, offset: int, size: int) -> Iterable[tuple[int, int]]:
        """Yield the byte ranges within this one that the file holds memory for, in order."""


def require_shared(backing: object, name: str) -> SharedBacking:
    """Refuse a backing that the host can't have a view of its own of.

    Raises
    ------
    UnsupportedOperationError
        EOPNOTSUPP.
    """
    if not isinstance(backing, SharedBacking):
        raise UnsupportedOperationError(
            f"enforce='mprotect' maps memory twice, which backing {name} can't do; "
            "'memfd' and 'guest_memfd' can"
        )
    return backing


class HostView:
    """The host's mapping of a whole file.

    Parameters
    ----------
    backing : object
        A `SharedBacking`.
    private : bool
        The attribute of every page now.

    Attributes
    ----------
    memory : ndarray of uint8, shape (size,)
        What the host sees, writable. It keeps mapping and memory alive.

    Raises
    ------
    UnsupportedOperationError
        EOPNOTSUPP: the backing's memory can't be mapped twice.
    OutOfMemoryError
        ENOMEM: the host can't map it once more.
    """

    __slots__ = ("_address", "_backing", "_map", "memory")

    def __init__(self, backing: object, *, private: bool) -> None:
        self._backing = require_shared(backing, type(backing).__name__)
        try:
            self._map = self._backing.map_again()
        except (OSError, OverflowError, ValueError) as error:
            raise OutOfMemoryError(f"the host can't map the file once more: {error}") from error
        self.memory: NDArray[np.uint8] = np.frombuffer(self._map, np.uint8)
        self._address = self.memory.ctypes.data
        if private:
            self.protect(0, len(self.memory) >> PAGE_SHIFT, private=True)

    def split(self, start: int, end: int) -> bool:
        """Prepare pages [start, end) to be protected; False, and nothing has changed, if the host can't."""
        try:
            self._map.madvise(mmap.MADV_DONTDUMP, start << PAGE_SHIFT, (end - start) << PAGE_SHIFT)
        except OSError:
            self.join(start, end)
            return False
        return True

    def protect(self, start: int, end: int, *, private: bool) -> None:
        """Let the host touch pages [start, end), which are split off, or make each touch a fault."""
        at, size = self._address + (start << PAGE_SHIFT), (end - start) << PAGE_SHIFT
        if _mprotect()(at, size, PROT_NONE if private else PROT_READ_WRITE):
            number = ctypes.get_errno()
            raise OSError(number, f"mprotect of pages {start:#x} to {end:#x}: {os.strerror(number)}")

    def join(self, start: int, end: int) -> None:
        """Undo `split`: mappings are only merged, and one that the kernel leaves apart does no harm."""
        with suppress(OSError):
            self._map.madvise(mmap.MADV_DODUMP, start << PAGE_SHIFT, (end - start) << PAGE_SHIFT)

    def existing(self, start: int, end: int) -> list[tuple[int, int]]:
        """Page ranges within [start, end) that the file holds memory for."""
        ranges = self._backing.existing(start << PAGE_SHIFT, (end - start) << PAGE_SHIFT)
        return [(low >> PAGE_SHIFT, high >> PAGE_SHIFT) for low, high in ranges]


@cache
def _mprotect() -> Any:
    """mprotect(2), which the mmap module doesn't offer."""
    function = ctypes.CDLL(None, use_errno=True).mprotect
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
