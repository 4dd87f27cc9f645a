"""RamBlockAttributes: userspace's record of what is shared, and its listeners.

References
----------
QEMU's ``system/ram-block-attributes.c`` and its RamDiscardManager interface, with two differences: a range
with several differing runs is one notification per run (QEMU: one per page), and what was done before a
listener failed is undone (QEMU leaves it).
"""

from collections.abc import Iterable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gmemcore.errors import InvalidArgumentError
from gmemcore.machine import GuestMemfd
from gmemcore.uapi import PAGE_SHIFT, PAGE_SIZE
from gmemcore.vmm.undo import UndoLog

Run = tuple[int, int]
"""First and end page of a maximal stretch of equal state."""


class Listener(Protocol):
    """Something that needs to know which memory is shared. Both call-backs can refuse by raising."""

    def populate(self, block: "RamBlockAttributes", offset: int, size: int) -> None:
        """Called after a range of bytes became shared: it can be mapped."""

    def discard(self, block: "RamBlockAttributes", offset: int, size: int) -> None:
        """Called before a range of bytes becomes private: it must be unmapped and unpinned."""


class RamBlockAttributes:
    """One RAM block: a guest_memfd, one bit per page (1 = shared), and listeners.

    Parameters
    ----------
    gmem : GuestMemfd
        The file.
    shared : iterable of (int, int)
        Page runs that are shared now. They must match the kernel's attributes, which no call returns.

    Attributes
    ----------
    notifications : int
        Call-backs made, including those that undid something.
    """

    def __init__(self, gmem: GuestMemfd, shared: Iterable[Run]) -> None:
        self.gmem = gmem
        self.notifications = 0
        self._bits = np.zeros(-(-gmem.n_pages // 8), np.uint8)
        self._listeners: list[Listener] = []
        self._mark(shared, True)

    # ---- what is shared ------------------------------------------------------------------------

    @property
    def bitmap(self) -> NDArray[np.uint8]:
        """Copy of the bitmap, shape (n_pages / 8 rounded up,): bit i % 8 of byte i // 8 is page i."""
        return self._bits.copy()

    def shared(self, start: int = 0, end: int | None = None) -> NDArray[np.bool_]:
        """Return whether each page of a range is shared, shape (end - start,)."""
        end = self.gmem.n_pages if end is None else end
        first = start // 8
        bits = np.unpackbits(self._bits[first : -(-end // 8)], bitorder="little")
        return bits[start - first * 8 : end - first * 8].astype(np.bool_)

    def runs(self, shared: bool, start: int = 0, end: int | None = None) -> list[Run]:
        """Return the maximal runs of a range that are shared, or that are not, clipped to it."""
        matches = (self.shared(start, end) == shared).astype(np.int8)
        edges = np.flatnonzero(np.diff(matches, prepend=0, append=0)) + start
        return [(int(first), int(last)) for first, last in edges.reshape(-1, 2)]

    # ---- listeners -----------------------------------------------------------------------------

    def register(self, listener: Listener) -> None:
        """Add a listener and replay what is shared; if it refuses, it isn't added."""
        with UndoLog() as undo:
            for run in self.runs(shared=True):
                self._tell(listener, run, shared=True)
                undo.done(self._tell, listener, run, False)
        self._listeners.append(listener)

    def unregister(self, listener: Listener) -> None:
        """Remove a listener, discarding what is shared."""
        for run in self.runs(shared=True):
            self._tell(listener, run, shared=False)
        self._listeners.remove(listener)

    # ---- changes -------------------------------------------------------------------------------

    def state_change(self, offset: int, size: int, to_discard: bool) -> list[Run]:
        """Set the state of a range and notify listeners once per differing run; equal state is silent.

        Parameters
        ----------
        offset, size : int
            Bytes, multiples of PAGE_SIZE, within the block.
        to_discard : bool
            Whether the range becomes private.

        Returns
        -------
        list of (int, int)
            Page runs that differed; `change` with the opposite state undoes it.

        Raises
        ------
        InvalidArgumentError
            EINVAL: empty, unaligned or beyond the block.
        Exception
            What a listener raised; bitmap and listeners are then as before.
        """
        if size <= 0 or offset < 0 or (offset | size) % PAGE_SIZE or offset + size > self.gmem.size:
            raise InvalidArgumentError(
                f"state change of {offset:#x}+{size:#x} must be whole pages within {self.gmem.size:#x}"
            )
        differing = self.runs(to_discard, offset >> PAGE_SHIFT, (offset + size) >> PAGE_SHIFT)
        self.change(differing, shared=not to_discard)
        return differing

    def change(self, runs: list[Run], shared: bool) -> None:
        """Set the state of runs that all differ and notify every listener of each: all or nothing."""
        with UndoLog() as undo:
            self._mark(runs, shared)
            undo.done(self._mark, runs, not shared)
            for run in runs:
                for listener in self._listeners:
                    self._tell(listener, run, shared)
                    undo.done(self._tell, listener, run, not shared)

    def _mark(self, runs: Iterable[Run], shared: bool) -> None:
        """Set the bits of runs."""
        for start, end in runs:
            first, last = start // 8, -(-end // 8)
            bits = np.unpackbits(self._bits[first:last], bitorder="little")
            bits[start - first * 8 : end - first * 8] = shared
            self._bits[first:last] = np.packbits(bits, bitorder="little")

    def _tell(self, listener: Listener, run: Run, shared: bool) -> None:
        """Make one call-back."""
        self.notifications += 1
        call_back = listener.populate if shared else listener.discard
        call_back(self, run[0] << PAGE_SHIFT, (run[1] - run[0]) << PAGE_SHIFT)
