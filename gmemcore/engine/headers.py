"""Headers: the words that describe a file or an owner to kernels, including its lock.

Every header is in a list, in the order of addresses, until it is garbage. A fork takes all locks first and
releases them afterwards, in the parent and in the child. So the child never sees a file that another thread
was changing, and never waits for a thread that it doesn't have.
"""

import ctypes
import os
import weakref
from contextlib import suppress
from functools import cache, partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from gmemcore.engine import kernels as layout
from gmemcore.engine.jit import is_compiled, load_kernels

Words = NDArray[np.uint64]


def new_words(n: int) -> tuple[Words, int]:
    """Return an array of zeros and its address."""
    words: Words = np.zeros(n, np.uint64)
    return words, words.ctypes.data


class _List:
    """A list of headers, which is a header itself.

    Attributes
    ----------
    garbage : list of int
        Addresses of headers that nobody uses any more. Finalizers only append to it, because the collector
        can run them in the middle of a kernel that is plain Python. `sweep` removes them, and so does the
        next `add`.
    """

    def __init__(self) -> None:
        self.words, self.address = new_words(int(layout.NEXT) + 1)
        self.garbage: list[int] = []
        self._memory: dict[int, Words] = {}

    def add(self, words: Words, address: int) -> None:
        """Insert a header, and keep its memory until it is garbage and removed."""
        self.sweep()
        self._memory[address] = words
        layout.enlist(_LOCKS, self.address, address)

    def sweep(self) -> None:
        """Remove the headers that nobody uses any more."""
        while self.garbage:
            self._remove_one()

    def _remove_one(self) -> None:
        with suppress(IndexError):  # another thread took the last one
            address = self.garbage.pop()
            layout.delist(_LOCKS, self.address, address)
            self._memory.pop(address, None)


OWNERS: Final = _List()
FILES: Final = _List()
"""Locks are taken in this order, and within a list in the order of addresses."""

_LOCKS: Final = np.array([0, 0, OWNERS.address, FILES.address], np.uint64)


class Header:
    """The words of one file or owner.

    Parameters
    ----------
    slots : int
        Number of words; they start as 0.
    among : _List
        `OWNERS` or `FILES`.
    """

    __slots__ = ("__weakref__", "address", "words")

    def __init__(self, slots: int, among: _List) -> None:
        load_kernels()
        _take_locks_at_fork()
        self.words, self.address = new_words(slots)
        weakref.finalize(self, among.garbage.append, self.address).atexit = False
        among.add(self.words, self.address)

    def __getitem__(self, slot: int) -> int:
        return int(self.words[slot])

    def __setitem__(self, slot: int, value: int) -> None:
        self.words[slot] = value

    def slot(self, slot: int) -> Any:
        """Return one word for C functions that take a pointer; it keeps the words alive."""
        return ctypes.byref(ctypes.c_uint64.from_buffer(self.words.data, 8 * int(slot)))


@cache
def _take_locks_at_fork() -> None:
    """Make forks take all locks.

    The kernels are the hooks, without a Python function that could be interrupted. A fork also waits for a
    compilation to end, because the child couldn't finish it.
    """
    none = np.array([1, 0], np.uint64)
    layout.lock_all(none)  # compiles it
    layout.unlock_all(none)
    take, release = partial(layout.lock_all, _LOCKS), partial(layout.unlock_all, _LOCKS)
    os.register_at_fork(before=take, after_in_parent=release, after_in_child=release)
    if is_compiled():
        from gmemcore.engine.kernel_cache import compiling

        os.register_at_fork(
            before=compiling.acquire, after_in_parent=compiling.release, after_in_child=compiling.release
        )
