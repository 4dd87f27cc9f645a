"""What kernels ask of the machine, in plain Python: what runs where ``NUMBA_DISABLE_JIT`` is set.

Compiled kernels use the instructions of the same names in ``instructions.py`` instead. Addresses are numbers,
and whoever hands one over keeps its memory alive.
"""

import ctypes
import threading
from functools import cache, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]

_locks: dict[int, Any] = {}
_adding = threading.Lock()
_EAGAIN = 11


def prefetch(array: Any, *index: Any) -> None:
    """Ask for a word that will be needed soon; here it does nothing."""


def zero_line(array: Words, index: int) -> None:
    """Zero the eight words of a cache line without reading it first."""
    array[index : index + 8] = 0


def add_atomically(array: Words, index: int, value: int) -> None:
    """Add to a word, whatever other threads do to it."""
    with _adding:
        array[index] += value


# ---- views of memory that is known by its address ------------------------------------------------


@lru_cache(maxsize=4096)  # a view holds nothing alive, so that one of the same address and length is the same
def _view(element: Any, address: int, length: int) -> NDArray[Any]:
    if length == 0:
        return np.zeros(0, element)
    return np.frombuffer((element * length).from_address(address), element)


def words_at(address: int, length: int) -> Words:
    """View memory as words."""
    return _view(ctypes.c_uint64, int(address), int(length))


def table_at(address: int, rows: int, columns: int) -> Words:
    """View memory as a table of words."""
    return words_at(address, int(rows) * int(columns)).reshape(int(rows), int(columns))


def bytes_at(address: int, length: int) -> NDArray[np.uint8]:
    """View memory as bytes."""
    return _view(ctypes.c_uint8, int(address), int(length))


loose_words_at = words_at
"""View memory that is not aligned as words."""


# ---- calls of libc -------------------------------------------------------------------------------


@cache
def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def lock(address: int) -> int:
    """Take the mutex at an address. It can be taken again by the thread that has it: an interruption of a
    kernel that is plain Python may leave it taken.
    """
    _locks.setdefault(int(address), threading.RLock()).acquire()
    return 0


def unlock(address: int) -> int:
    """Let a mutex go."""
    _locks[int(address)].release()
    return 0


def start_thread(handle: int, attributes: int, function: int, argument: int) -> int:
    """Start a thread: there is none, and whoever asks does its work itself."""
    return _EAGAIN


def join_thread(handle: int, result: int) -> int:
    """Wait for a thread."""
    return 0


def this_thread() -> int:
    """Return a number that no other thread has."""
    return threading.get_ident()


def move_bytes(target: int, source: int, length: int) -> int:
    """Copy bytes, which may overlap."""
    ctypes.memmove(int(target), int(source), int(length))
    return target


def compare_bytes(one: int, other: int, length: int) -> int:
    """Compare bytes; 0: they are equal."""
    return int(ctypes.string_at(int(one), int(length)) != ctypes.string_at(int(other), int(length)))


def advise(address: int, size: int, advice: int) -> int:
    """madvise(2)."""
    arguments = ctypes.c_void_p(int(address)), ctypes.c_size_t(int(size)), ctypes.c_int(int(advice))
    return int(_libc().madvise(*arguments))


def protect(address: int, size: int, protection: int) -> int:
    """mprotect(2)."""
    arguments = ctypes.c_void_p(int(address)), ctypes.c_size_t(int(size)), ctypes.c_int(int(protection))
    return int(_libc().mprotect(*arguments))


def seek(descriptor: int, offset: int, whence: int) -> int:
    """lseek(2)."""
    function = _libc().lseek
    function.restype = ctypes.c_int64
    return int(
        function(ctypes.c_int(int(descriptor)), ctypes.c_int64(int(offset)), ctypes.c_int(int(whence)))
    )


def list_resident(address: int, size: int, pages: int) -> int:
    """mincore(2)."""
    arguments = ctypes.c_void_p(int(address)), ctypes.c_size_t(int(size)), ctypes.c_void_p(int(pages))
    return int(_libc().mincore(*arguments))


def last_error() -> int:
    """Return errno, of the call before."""
    return ctypes.get_errno()
