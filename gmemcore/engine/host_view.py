"""HostView: a second mapping of a file's memory, in which the host can't touch private pages.

The engine works on the first mapping, whatever the attributes are; this one is what a VMM would have. A touch
of a private page of it really faults (SIGSEGV, where the kernel's guest_memfd has SIGBUS). Kernels keep it up
to date (``split_view``, ``protect_view``, ``join_view``), and notice what was written through it
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
    """A backing whose memory can be mapped twice."""

    def map_again(self) -> mmap.mmap:
        """Map the whole file once more, readable and writable."""

    @property
    def data_descriptor(self) -> int | None:
        """What SEEK_DATA finds the file's memory by; None: memory is asked for by mincore(2)."""


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
        The attribute of every page now.

    Attributes
    ----------
    memory : ndarray of uint8, shape (size,)
        What the host sees, writable. It keeps mapping and memory alive.
    address : int
        Where it begins.
    descriptor : int or None
        The backing's `SharedBacking.data_descriptor`.

    Raises
    ------
    UnsupportedOperationError
        EOPNOTSUPP: the backing's memory can't be mapped twice.
    OutOfMemoryError
        ENOMEM: the host can't map it once more.
    """

    __slots__ = ("address", "descriptor", "memory")

    def __init__(self, backing: object, *, private: bool) -> None:
        shared = require_shared(backing, type(backing).__name__)
        try:
            self.memory: NDArray[np.uint8] = np.frombuffer(shared.map_again(), np.uint8)
        except (OSError, OverflowError, ValueError) as error:
            raise OutOfMemoryError(f"the host can't map the file once more: {error}") from error
        self.address = self.memory.ctypes.data
        self.descriptor = shared.data_descriptor
        if private and plain.protect(self.address, len(self.memory), _NO_ACCESS):
            raise OutOfMemoryError(f"the host can't protect a mapping: errno {plain.last_error()}")
