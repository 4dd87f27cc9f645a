"""Memory that is allocated and faulted in once, and lent to one Vm after the other.

A fresh Vm gives every sample the same page state at no cost; the bytes behind it stay warm, so that what is
timed is a conversion and not the page faults of the process.
"""

from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from gmemcore.engine.backing import BACKINGS, Backing
from gmemcore.errors import InvalidArgumentError

OPTIONS: Final[dict[str, dict[str, bool]]] = {
    "anonymous": {"huge_pages": True, "prefault": True},
    "memfd": {"prefault": True},
}
"""Backings that hold bytes, and how they are made."""


def new_backing(name: str, size: int) -> Backing:
    """Allocate a backing and fault it in.

    Raises
    ------
    InvalidArgumentError
        EINVAL: no such backing, or one without bytes.
    OutOfMemoryError
        ENOMEM: the host can't hold it.
    """
    if name not in OPTIONS:
        raise InvalidArgumentError(
            f"backing {name!r} holds no bytes to measure or doesn't exist; known: {', '.join(OPTIONS)}"
        )
    return BACKINGS[name](size, **OPTIONS[name])


def warm_words(size: int) -> NDArray[np.uint64]:
    """Return words of anonymous memory in huge pages, faulted in."""
    return new_backing("anonymous", size).words


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

    def close(self) -> None:
        """See `Backing`."""
        self.words = np.zeros(0, np.uint64)


class Memory:
    """Bytes for one Vm at a time.

    Parameters
    ----------
    size : int
        Bytes of a guest_memfd.
    backing : {'anonymous', 'memfd'}
        Where they live.
    """

    def __init__(self, size: int, backing: str = "anonymous") -> None:
        self.size = size
        self.backing = backing
        self._sides: list[Backing] = []
        self.side(0)

    def side(self, number: int) -> Backing:
        """Memory of the guest_memfd (0), or of the ordinary host memory beside it (1, `legacy` only)."""
        while len(self._sides) <= number:
            self._sides.append(new_backing(self.backing, self.size))
        return self._sides[number]

    def lender(self) -> Callable[..., Backing]:
        """Return what a new Vm takes as its backing: it gets side 0 first, then side 1."""
        lent = 0

        def lend(size: int) -> Backing:
            nonlocal lent
            lent += 1
            return Lent(self.side(lent - 1), size)

        return lend

    def close(self) -> None:
        """Give the memory back, unless a view of it is still held."""
        for side in self._sides:
            side.close()
