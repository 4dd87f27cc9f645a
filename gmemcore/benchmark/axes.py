"""Measurement axes: everything about a case apart from its cell of policy and its sizes.

============== =======================================================================================
fragmentation  how the state of pages alternates within the range
backing        where the bytes live
huge_pages     whether they live in transparent huge pages
threads        how many threads one conversion uses
enforce        whether host accesses to private pages fault, using mprotect
page_size      what pages the guest's file consists of: 4 KiB, or huge pages
============== =======================================================================================

To add a value, add a row. Settings that the host lacks are refused before anything is measured
(`memory.check_host`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from enum import StrEnum
from functools import lru_cache
from itertools import product
from typing import Final

import numpy as np
from numpy.typing import NDArray

from gmemcore.results.bench_tables import words_of_setting
from gmemcore.uapi import PAGE_SIZE

Mask = NDArray[np.bool_]

BLOCK_PAGES: Final = 512
"""Pages of a 2 MiB block; random patterns pick half of each block."""
HOLE_EVERY: Final = 32
"""In a 2 MiB block with holes, every 32nd page is unallocated: 16 pages."""


class Fragmentation(StrEnum):
    """How page state alternates. Pages that a pattern picks start in the highest rank that the cell allows.

    The others are unallocated; in ALTERNATING_ACCEPTED they are allocated, and not accepted by the guest.
    """

    UNIFORM = "uniform"
    ALTERNATING_ALLOCATED = "alternating-allocated"
    ALTERNATING_ACCEPTED = "alternating-accepted"
    RANDOM_HALF = "random-half"
    HOLES = "2m-with-holes"

    @property
    def smallest(self) -> int:
        """Smallest range in bytes that shows the pattern."""
        return {Fragmentation.UNIFORM: PAGE_SIZE, Fragmentation.HOLES: BLOCK_PAGES * PAGE_SIZE}.get(
            self, 2 * PAGE_SIZE
        )

    def mask(self, n_pages: int, range_pages: int) -> Mask:
        """Return which pages the pattern picks.

        Parameters
        ----------
        n_pages : int
            Pages, from the start of memory.
        range_pages : int
            Pages of one range. RANDOM_HALF picks half of each range, or of each 2 MiB if that is smaller.

        Returns
        -------
        ndarray of bool, shape (n_pages,), read-only
        """
        return _mask(self, n_pages, min(range_pages, BLOCK_PAGES))


def _random_halves(n_pages: int, group: int) -> Mask:
    """Pick a random half of each group, always the same."""
    halves = np.tile(np.arange(group) < group // 2, (-(-n_pages // group), 1))
    picked: Mask = np.random.default_rng(1).permuted(halves, axis=1).ravel()[:n_pages]
    return picked


_PATTERNS: Final[dict[Fragmentation, Callable[[int, int], Mask]]] = {
    Fragmentation.UNIFORM: lambda n, _: np.ones(n, np.bool_),
    Fragmentation.ALTERNATING_ALLOCATED: lambda n, _: np.arange(n) % 2 == 0,
    Fragmentation.ALTERNATING_ACCEPTED: lambda n, _: np.arange(n) % 2 == 0,
    Fragmentation.RANDOM_HALF: _random_halves,
    Fragmentation.HOLES: lambda n, _: np.arange(n) % HOLE_EVERY != HOLE_EVERY - 1,
}


@lru_cache(maxsize=8)
def _mask(fragmentation: Fragmentation, n_pages: int, group: int) -> Mask:
    mask = _PATTERNS[fragmentation](n_pages, group)
    mask.flags.writeable = False
    return mask


def runs_of(mask: Mask) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Return offset and size in bytes of each maximal run of picked pages."""
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False)).astype(np.uint64) * np.uint64(
        PAGE_SIZE
    )
    return edges[::2], edges[1::2] - edges[::2]


@dataclass(frozen=True, slots=True)
class Setting:
    """The memory and threads that a case runs with.

    Attributes
    ----------
    backing : str
        ``anonymous``, ``memfd`` or ``guest_memfd``.
    huge_pages : bool
        Use transparent huge pages; anonymous memory only.
    threads : int
        Threads of one conversion.
    enforce : bool
        Make host accesses to private pages of a memfd fault (``enforce="mprotect"``).
    page_size : int
        Bytes of a page of the guest's file: 4 KiB, or a huge page of 2 MiB or 1 GiB.
    """

    backing: str = "anonymous"
    huge_pages: bool = True
    threads: int = 1
    enforce: bool = False
    page_size: int = PAGE_SIZE

    @property
    def possible(self) -> bool:
        """Whether any host offers this combination of backing, pages and enforcement."""
        pages = self.backing == "anonymous" or not self.huge_pages
        return pages and (self.backing == "memfd" or not self.enforce)

    def __str__(self) -> str:
        return words_of_setting(*astuple(self))


DEFAULT_SETTING: Final = Setting()
"""Warm anonymous memory in transparent huge pages, one thread."""


def settings(
    backings: Sequence[str] = ("anonymous",),
    huge_pages: Sequence[bool] | None = None,
    threads: Sequence[int] = (1,),
    enforce: Sequence[bool] = (False,),
    page_sizes: Sequence[int] = (PAGE_SIZE,),
) -> Iterator[Setting]:
    """Yield every possible combination of the given values.

    Parameters
    ----------
    huge_pages : sequence of bool or None
        None: transparent huge pages for anonymous memory, none otherwise.
    """
    for backing in backings:
        usual = (backing == "anonymous",)
        for values in product(usual if huge_pages is None else huge_pages, threads, enforce, page_sizes):
            setting = Setting(backing, *values)
            if setting.possible:
                yield setting
