"""Page state of one file: the arrays that kernels read and write, and copies of them."""

from enum import IntFlag
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gmemcore.engine import kernels as layout
from gmemcore.engine.backing import check_host_can_hold, lazy_words, unwritten_words
from gmemcore.engine.packed import PLANE_NAMES

_BLOCK_PAGES = int(layout.BLOCK_PAGES)
_BLOCK_ROWS = 8
_FIELD_BITS, _FIELD = int(layout.FIELD_BITS), int(layout.FIELD)


class Plane(IntFlag):
    """Planes as bits, for queries about several of them."""

    NONE = 0
    PRIVATE = 1
    ALLOCATED = 2
    ASSIGNED = 4
    ACCEPTED = 8
    PINNED = 16
    POISONED = 32


_FIELDS = tuple(
    sum(_FIELD << _FIELD_BITS * plane for plane in range(len(PLANE_NAMES)) if planes >> plane & 1)
    for planes in range(1 << len(PLANE_NAMES))
)


def fields_of(planes: int) -> int:
    """Return the mask of fields for a set of planes, as kernels use it."""
    return _FIELDS[planes]


class Survey(NamedTuple):
    """Hash, counts and consistency of all page state of a file.

    Attributes
    ----------
    folded : int
        A 128-bit hash of all page state; equal states have equal hashes. Not cryptographic.
    totals : dict of str to int
        Pages of each plane; only up to an inconsistent block, if there is one.
    mixed : int
        2 MiB blocks with both attributes.
    wrong : str
        What is inconsistent, or breaks accepted ⊆ assigned ⊆ allocated ∩ private or
        pinned ⊆ allocated ∩ shared; empty if nothing does.
    """

    folded: int
    totals: dict[str, int]
    mixed: int
    wrong: str


_WRONG = (
    "",
    "a count of pages differs from their bits",
    "a page is accepted but not assigned",
    "a page is assigned but not allocated and private",
    "a page is pinned but not allocated and shared",
    "the state of a folio differs from that of its pages",
)


def survey_of(wrong: int, answers: NDArray[np.uint64]) -> Survey:
    """Return the result of `kernels.survey`."""
    low, high, page, mixed, *totals = answers.tolist()
    return Survey(
        low | high << 64,
        dict(zip(PLANE_NAMES, totals, strict=True)),
        mixed,
        _WRONG[wrong] and f"{_WRONG[wrong]}, in the 2 MiB block at page {page:#x}",
    )


class MappableBlocks(NamedTuple):
    """Whole blocks of a file with a single attribute, which can be mapped by one entry."""

    blocks_2m: int
    blocks_1g: int


class PageState:
    """The six planes of a file, packed (``kernels.py`` has the layout).

    Parameters
    ----------
    n_pages : int
        Pages of the file.
    private : bool
        The attribute of every page at creation.

    Attributes
    ----------
    words : ndarray of uint64, shape (n_blocks,)
        For each block, the number of its pages in each plane.
    lines : ndarray of uint64, shape (6, 8 * n_blocks)
        A bitmap per plane.
    """

    __slots__ = ("lines", "n_pages", "words")

    def __init__(self, n_pages: int, *, private: bool) -> None:
        self.n_pages = n_pages
        n_blocks = -(-n_pages // _BLOCK_PAGES)
        self.words = (unwritten_words if private else lazy_words)(n_blocks)
        n_rows = n_blocks * _BLOCK_ROWS
        # A line is written when it becomes valid, and never read before.
        self.lines = unwritten_words(len(PLANE_NAMES) * n_rows).reshape(-1, n_rows)
        if private:
            check_host_can_hold(n_blocks * 8)  # written at once, unlike the lines
            self.words[:] = layout.BLOCK_PAGES  # of the first field, which is `private`
            self.words[-1] = n_pages - (n_blocks - 1) * _BLOCK_PAGES


class ContentState:
    """The two planes of deferred contents, for kernels (``kernels.py`` has the layout).

    Parameters
    ----------
    n_pages : int
        Pages of the file.

    Attributes
    ----------
    marks : ndarray of uint8, shape (n_blocks,)
        For each block and plane, whether there is a line, and whether it is inverted.
    lines : ndarray of uint64, shape (2, 8 * n_blocks)
        A bitmap per plane.
    """

    __slots__ = ("lines", "marks")

    def __init__(self, n_pages: int) -> None:
        n_blocks = -(-n_pages // _BLOCK_PAGES)
        self.marks = np.zeros(n_blocks, np.uint8)
        self.lines = unwritten_words(2 * n_blocks * _BLOCK_ROWS).reshape(2, -1)


class Blocks(NamedTuple):
    """A copy of some blocks of a file. Its methods use no kernels, so they can check them."""

    n_pages: int
    first: int
    words: NDArray[np.uint64]
    lines: NDArray[np.uint64]

    def runs_of_pages(self, start: int, end: int) -> list[tuple[int, int, int]]:
        """List maximal runs of pages in one state, over [start, end): first page, end page, `Plane` bits.

        Uniform blocks are one piece; only mixed ones are read page by page.
        """
        if end - start == 1:
            return [(start, end, self.planes_of(start))]
        words = self.words
        differ = words[1:] != words[:-1]
        if (self.first + len(words)) * _BLOCK_PAGES >= self.n_pages:
            differ[-1:] = True  # the count of a short, full last block can be that of a mixed one
        edges = (np.flatnonzero(differ) + 1).tolist()
        runs: list[tuple[int, int, int]] = []
        for low, high in pairwise([0, *edges, len(words)]):
            for at, until, planes in self._runs_of_blocks(low, high):
                at, until = max(at, start), min(until, end)
                if runs and runs[-1][2] == planes:
                    runs[-1] = runs[-1][0], until, planes
                elif at < until:
                    runs.append((at, until, planes))
        return runs

    def planes_of(self, page: int) -> int:
        """Return the `Plane` bits of one page."""
        block, at = divmod(page, _BLOCK_PAGES)
        word, pages = int(self.words[block - self.first]), min(_BLOCK_PAGES, self.n_pages - page + at)
        row, planes = (block - self.first) * _BLOCK_ROWS + at // 64, 0
        for plane in range(len(PLANE_NAMES)):
            count = word >> _FIELD_BITS * plane & _FIELD
            if count == pages or (count and int(self.lines[plane, row]) >> at % 64 & 1):
                planes |= 1 << plane
        return planes

    def _runs_of_blocks(self, low: int, high: int) -> list[tuple[int, int, int]]:
        """List the runs of blocks low to high, which have equal words."""
        word = int(self.words[low])
        begin = (self.first + low) * _BLOCK_PAGES
        end = min((self.first + high) * _BLOCK_PAGES, self.n_pages)
        pages = min(_BLOCK_PAGES, end - begin)
        counts = [word >> _FIELD_BITS * plane & _FIELD for plane in range(len(PLANE_NAMES))]
        whole = sum(1 << plane for plane, count in enumerate(counts) if count == pages)
        mixed = [plane for plane, count in enumerate(counts) if 0 < count < pages]
        if not mixed:
            return [(begin, end, whole)]
        states = np.full(end - begin, whole, np.uint8)
        for plane in mixed:
            line = self.lines[plane, low * _BLOCK_ROWS : high * _BLOCK_ROWS].view(np.uint8)
            states |= np.unpackbits(line, count=end - begin, bitorder="little") << np.uint8(plane)
        edges = [0, *(np.flatnonzero(states[1:] != states[:-1]) + 1).tolist(), end - begin]
        return [(begin + at, begin + until, int(states[at])) for at, until in pairwise(edges)]


def readonly(words: NDArray[np.uint64], dtype: np.dtype[Any]) -> NDArray[Any]:
    """View words as another dtype, without a copy, read-only for good."""
    buffer = memoryview(words.view(np.uint8))  # type: ignore[arg-type]  # arrays are buffers at run time
    return np.frombuffer(buffer.toreadonly(), dtype)
