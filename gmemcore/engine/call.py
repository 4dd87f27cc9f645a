"""Call: the memory through which one call of a kernel gets its request and gives its result."""

import ctypes
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from gmemcore.engine import kernels as layout

RESULT: Final = slice(8 * int(layout.RESULT), 8 * (int(layout.RESULT) + layout.RESULT_ROWS))
"""Bytes of a call that are its result: reason, error_offset, then the counters."""
SHORT: Final = layout.CALL_BYTES
"""Bytes of data that a call has room for."""
_DATA_AT: Final = 8 * layout.CALL_SLOTS


class Call:
    """A request and its result, in 64-bit words (`kernels.CALL` and those after it), and room for short data.

    Attributes
    ----------
    raw : bytearray
        What requests are packed into and results are cut from.
    words : ndarray of uint64
        The same memory, as kernels take it.
    data : int
        Address of the room for data.
    """

    __slots__ = ("data", "raw", "words")

    def __init__(self) -> None:
        self.raw = bytearray(_DATA_AT + SHORT)
        self.words: NDArray[np.uint64] = np.frombuffer(self.raw, np.uint64, layout.CALL_SLOTS)
        address = self.words.ctypes.data
        self.words[layout.CALL] = address
        self.data = address + _DATA_AT

    def __getitem__(self, slot: int) -> int:
        return int(self.words[slot])

    def short_data(self, size: int) -> bytes:
        """Copy what a kernel put into the room for data."""
        return bytes(self.raw[_DATA_AT : _DATA_AT + size])

    def put_data(self, data: NDArray[np.uint8]) -> int:
        """Copy short data into the room for it; returns its address."""
        self.raw[_DATA_AT : _DATA_AT + len(data)] = data.data
        return self.data


idle: Final[list[Call]] = []
"""Calls that nobody is making. One is popped off, is then its maker's alone, whatever a signal handler does
meanwhile, and goes back when the result was taken; one that is lost to an interruption is made anew.
"""


def take_call() -> Call:
    """Return a call to be made; give it back by ``idle.append(call)``."""
    try:
        return idle.pop()
    except IndexError:
        return Call()


_new_bytes: Any = ctypes.pythonapi.PyBytes_FromStringAndSize
_new_bytes.restype = ctypes.py_object
_new_bytes.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t)


def new_bytes(size: int) -> tuple[bytes, int]:
    """Return bytes that a kernel is still to write, and their address.

    So that what is read is copied once: Python's C interface has it that a new object may be written until
    somebody else has it.
    """
    data: bytes = _new_bytes(None, size)
    return data, address_of(data)


def address_of(data: bytes | NDArray[np.uint8]) -> int:
    """Return where bytes lie in memory; whoever asks keeps them alive."""
    return int(np.frombuffer(data, np.uint8).ctypes.data)
