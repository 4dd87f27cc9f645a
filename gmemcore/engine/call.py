"""Call: the buffer for the request and the result of one kernel call."""

import ctypes
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from gmemcore.engine import kernels as layout

RESULT: Final = slice(8 * int(layout.RESULT), 8 * (int(layout.RESULT) + layout.RESULT_ROWS))
"""The bytes of a call that are its result: reason, error_offset, counters."""
SHORT: Final = layout.CALL_BYTES
"""The size in bytes of a call's room for data."""
_DATA_AT: Final = 8 * layout.CALL_SLOTS


class Call:
    """A request and its result, in 64-bit words (`kernels.CALL` and those after it), and room for short data.

    Attributes
    ----------
    raw : bytearray
        The memory: requests are packed into it, results sliced from it.
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
        """Copy the data that a kernel wrote into the call."""
        return bytes(self.raw[_DATA_AT : _DATA_AT + size])

    def put_data(self, data: NDArray[np.uint8]) -> int:
        """Copy short data into the call; return its address."""
        self.raw[_DATA_AT : _DATA_AT + len(data)] = data.data
        return self.data


idle: Final[list[Call]] = []
"""Calls that aren't in use. A caller pops one, and appends it again after reading the result.

A signal handler or another thread pops another one. One that an interruption loses is garbage.
"""


def take_call() -> Call:
    """Take a call out of `idle`, or make one. Append it to `idle` afterwards."""
    try:
        return idle.pop()
    except IndexError:
        return Call()


_new_bytes: Any = ctypes.pythonapi.PyBytes_FromStringAndSize
_new_bytes.restype = ctypes.py_object
_new_bytes.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t)


def new_bytes(size: int) -> tuple[bytes, int]:
    """Return uninitialised bytes for a kernel to write, and their address.

    So data is copied once. Python's C API allows it: a new object can be written until it is shared.
    """
    data: bytes = _new_bytes(None, size)
    return data, address_of(data)


def address_of(data: bytes | NDArray[np.uint8]) -> int:
    """Return the address of some bytes, which the caller keeps alive."""
    return int(np.frombuffer(data, np.uint8).ctypes.data)
