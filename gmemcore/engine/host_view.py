"""HostView: a second mapping of a file's memory, in which private pages are inaccessible.

The engine uses the first mapping, whatever the attributes; this one is what a VMM would have. An access to a
private page through it faults (SIGSEGV; a guest_memfd of the kernel raises SIGBUS). Kernels keep its
protection up to date (``split_view``, ``protect_view``, ``join_view``) and detect writes through it
(``notice_writes``).
"""

import mmap
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from gmemcore.engine import plain
from gmemcore.engine.backing import backings_that
from gmemcore.errors import OutOfMemoryError, UnsupportedOperationError

_NO_ACCESS = 0


@runtime_checkable
class SharedBacking(Protocol):
    """A backing whose memory can be mapped a second time."""

    def map_again(self) -> mmap.mmap:
        """Map the whole file again, readable and writable."""

    @property
    def data_descriptor(self) -> int | None:
        """A descriptor that supports SEEK_DATA; None: writes are found with mincore(2)."""


def require_shared(backing: object, name: str) -> SharedBacking:
    """Raise if the backing cannot be mapped a second time.

    Raises
    ------
    UnsupportedOperationError
        EOPNOTSUPP.
    """
    if not isinstance(backing, SharedBacking):
        able = " or ".join(backings_that("map_again"))
        raise UnsupportedOperationError(f"enforce='mprotect' needs backing {able}, not {name}")
    return backing


class HostView:
    """The host's mapping of a whole file.

    Parameters
    ----------
    backing : object
        A `SharedBacking`.
    private : bool
        The current attribute of all pages.

    Attributes
    ----------
    memory : ndarray of uint8, shape (size,)
        The mapping, writable. It keeps the memory alive.
    address : int
        Address of the mapping.
    descriptor : int or None
        The backing's `SharedBacking.data_descriptor`.

    Raises
    ------
    UnsupportedOperationError
        EOPNOTSUPP: the backing can't be mapped a second time.
    OutOfMemoryError
        ENOMEM: the host can't map it again.
    """

    __slots__ = ("address", "descriptor", "memory")

    def __init__(self, backing: object, *, private: bool) -> None:
        shared = require_shared(backing, type(backing).__name__)
        try:
            self.memory: NDArray[np.uint8] = np.frombuffer(shared.map_again(), np.uint8)
        except (OSError, OverflowError, ValueError) as error:
            raise OutOfMemoryError(f"the host can't map the file a second time: {error}") from error
        self.address = self.memory.ctypes.data
        self.descriptor = shared.data_descriptor
        if private and plain.protect(self.address, len(self.memory), _NO_ACCESS):
            raise OutOfMemoryError(f"the host can't protect a mapping: errno {plain.last_error()}")
