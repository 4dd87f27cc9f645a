"""Views of addresses, prefetch and libc calls for kernels that aren't compiled.

Compiled kernels use the functions of the same names in ``instructions.py``. Addresses are integers; the
caller keeps their memory alive.
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
    """Prefetch a word; here it does nothing."""


def zero_line(array: Words, index: int) -> None:
    """Zero the eight words of a cache line without reading it first."""
    array[index : index + 8] = 0


def add_atomically(array: Words, index: int, value: int) -> None:
    """Add to a word, atomically."""
    with _adding:
        array[index] += value


def find_edges(words: Words, index: int, before: int, edges: Words, at: int) -> np.uint64:
    """Find the bits of eight words that differ from the one before them; return which words have any.

    before: the bit before the first word. The edges are written to edges[at] and those after it.
    """
    found = 0
    for k, word in enumerate(words[index : index + 8]):
        edges[at + k] = word ^ (word << 1 | before)
        found |= int(edges[at + k] != 0) << k
        before = word >> 63
    return np.uint64(found)


# ---- views of addresses --------------------------------------------------------------------------


@lru_cache(maxsize=4096)  # a view keeps nothing alive, so equal ones can be shared
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
"""View memory as words, which needn't be aligned."""


# ---- calls of libc -------------------------------------------------------------------------------


@cache
def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def lock(address: int) -> int:
    """Lock the mutex at an address.

    Its thread can lock it again, because an exception in a kernel that is plain Python can leave it locked.
    """
    _locks.setdefault(int(address), threading.RLock()).acquire()
    return 0


def unlock(address: int) -> int:
    """Unlock the mutex at an address."""
    _locks[int(address)].release()
    return 0


def start_thread(handle: int, attributes: int, function: int, argument: int) -> int:
    """Fail to start a thread, so that the caller does its work."""
    return _EAGAIN


def join_thread(handle: int, result: int) -> int:
    """Wait for a thread."""
    return 0


def this_thread() -> int:
    """Return a number that is unique to this thread."""
    return threading.get_ident()


def move_bytes(target: int, source: int, length: int) -> int:
    """Copy bytes; the ranges can overlap."""
    ctypes.memmove(int(target), int(source), int(length))
    return target


def compare_bytes(one: int, other: int, length: int) -> int:
    """Compare bytes; 0: equal."""
    return int(ctypes.string_at(int(one), int(length)) != ctypes.string_at(int(other), int(length)))


def advise(address: int, size: int, advice: int) -> int:
    """Call madvise(2)."""
    arguments = ctypes.c_void_p(int(address)), ctypes.c_size_t(int(size)), ctypes.c_int(int(advice))
    return int(_libc().madvise(*arguments))


def protect(address: int, size: int, protection: int) -> int:
    """Call mprotect(2)."""
    arguments = ctypes.c_void_p(int(address)), ctypes.c_size_t(int(size)), ctypes.c_int(int(protection))
    return int(_libc().mprotect(*arguments))


def seek(descriptor: int, offset: int, whence: int) -> int:
    """Call lseek(2)."""
    function = _libc().lseek
    function.restype = ctypes.c_int64
    return int(
        function(ctypes.c_int(int(descriptor)), ctypes.c_int64(int(offset)), ctypes.c_int(int(whence)))
    )


def list_resident(address: int, size: int, pages: int) -> int:
    """Call mincore(2)."""
    arguments = ctypes.c_void_p(int(address)), ctypes.c_size_t(int(size)), ctypes.c_void_p(int(pages))
    return int(_libc().mincore(*arguments))


def last_error() -> int:
    """Return errno of the previous call."""
    return ctypes.get_errno()
