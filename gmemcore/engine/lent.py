"""Memory that stays when the file that it was lent to is closed."""

import mmap
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from gmemcore.engine.backing import Backing
from gmemcore.engine.host_view import require_shared


class Lent:
    """A backing on loan: closing it leaves the owner's memory as it is."""

    def __init__(self, owner: Backing, size: int) -> None:
        self._owner = owner
        self.words: NDArray[np.uint64] = owner.words[: size // 8]
        self.commits_late = owner.commits_late

    def release(self, offset: int, size: int) -> None:
        """See `Backing`."""
        self._owner.release(offset, size)

    def commit(self, offset: int, size: int) -> None:
        """See `Backing`."""
        self._owner.commit(offset, size)

    def map_again(self) -> mmap.mmap:
        """See `SharedBacking`."""
        return require_shared(self._owner, "of the owner").map_again()

    def existing(self, offset: int, size: int) -> Iterable[tuple[int, int]]:
        """See `SharedBacking`."""
        return require_shared(self._owner, "of the owner").existing(offset, size)

    def close(self) -> None:
        """See `Backing`."""
        self.words = np.zeros(0, np.uint64)
