"""Lent: memory that is kept when the file that uses it is closed."""

import mmap

import numpy as np
from numpy.typing import NDArray

from gmemcore.engine.backing import Backing
from gmemcore.engine.host_view import require_shared


class Lent:
    """A backing that uses the memory of another one. Closing it leaves that memory alone."""

    def __init__(self, owner: Backing, size: int) -> None:
        self._owner = owner
        self.words: NDArray[np.uint64] = owner.words[: size // 8]
        self.memory = owner.memory

    def map_again(self) -> mmap.mmap:
        """See `SharedBacking`."""
        return require_shared(self._owner, type(self._owner).__name__).map_again()

    @property
    def data_descriptor(self) -> int | None:
        """See `SharedBacking`."""
        return require_shared(self._owner, type(self._owner).__name__).data_descriptor

    def close(self) -> None:
        """See `Backing`."""
        self.words = np.zeros(0, np.uint64)
