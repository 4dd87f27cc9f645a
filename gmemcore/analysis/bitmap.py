"""Bitmap: one bit per page, uniform blocks as one value; the algebra that distributions are written in.

A plane of a snapshot is a bitmap, and so is every state that planes together make: "shared and not pinned" is
``~private & ~pinned``. Operations look at the bits of mixed blocks only, so what is uniform costs one byte
per 2 MiB block, and nothing is ever unpacked as a whole.
"""

from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gmemcore.engine.packed import BLOCK_PAGES, LINE_WORDS, block_sizes, existing_bits

_BLOCKS_AT_ONCE: Final = 4096
"""Blocks whose bits are unpacked together when runs are listed: 2 Mi pages, 16 MiB of positions at most."""

_ONE: Final = np.uint64(1)
_TOP: Final = np.uint64(63)

Positions = NDArray[np.int64]


class Bitmap:
    """A set of pages of one file.

    Parameters
    ----------
    n_pages : int
        Pages of the file.
    full : ndarray of bool, shape (n_blocks,)
        The value of each uniform block; False for a mixed one.
    mixed : ndarray of intp, shape (k,)
        Blocks of both values, in order.
    lines : ndarray of uint64, shape (k, 8)
        Their bits: bit i of word w stands for page 64·w + i of the block. Bits beyond the end are 0.
    """

    __slots__ = ("full", "lines", "mixed", "n_pages")

    def __init__(
        self, n_pages: int, full: NDArray[np.bool_], mixed: NDArray[np.intp], lines: NDArray[np.uint64]
    ) -> None:
        self.n_pages, self.full, self.mixed, self.lines = n_pages, full, mixed, lines

    @classmethod
    def uniform(cls, n_pages: int, value: bool) -> "Bitmap":
        """All pages, or none."""
        n_blocks = -(-n_pages // BLOCK_PAGES)
        nothing = np.empty((0, LINE_WORDS), np.uint64)
        return cls(n_pages, np.full(n_blocks, value), np.empty(0, np.intp), nothing)

    @classmethod
    def from_edges(cls, n_pages: int, edges: ArrayLike) -> "Bitmap":
        """Make the set that begins empty and changes at each edge.

        Parameters
        ----------
        n_pages : int
            Pages of the file.
        edges : array of int, shape (n,)
            Pages, increasing: in from each even edge on, out again from the next odd one. A half-open range
            is two edges.
        """
        at = np.asarray(edges, np.int64)
        at = at[at < n_pages]
        n_blocks = -(-n_pages // BLOCK_PAGES)
        # How many edges lie before a block is its first page's value; an edge there isn't inside it.
        before = np.searchsorted(at, np.arange(n_blocks) * BLOCK_PAGES, side="right")
        full = before % 2 == 1
        inner = at[at % BLOCK_PAGES != 0]
        mixed, slot = np.unique(inner // BLOCK_PAGES, return_inverse=True)
        lines = np.zeros(len(mixed) * LINE_WORDS, np.uint64)
        within = inner % BLOCK_PAGES
        np.bitwise_xor.at(lines, slot * LINE_WORDS + within // 64, _ONE << (within % 64).astype(np.uint64))
        lines = _toggled(lines.reshape(-1, LINE_WORDS), full[mixed])
        lines &= existing_bits(n_pages, mixed)
        full[mixed] = False
        return cls(n_pages, full, mixed, lines)

    # ---- algebra -------------------------------------------------------------------------------

    def __and__(self, other: "Bitmap") -> "Bitmap":
        return self._combined(other, np.bitwise_and)

    def __or__(self, other: "Bitmap") -> "Bitmap":
        return self._combined(other, np.bitwise_or)

    def __xor__(self, other: "Bitmap") -> "Bitmap":
        return self._combined(other, np.bitwise_xor)

    def __invert__(self) -> "Bitmap":
        full = ~self.full
        full[self.mixed] = False
        lines = ~self.lines & existing_bits(self.n_pages, self.mixed)
        return Bitmap(self.n_pages, full, self.mixed, lines)

    def _combined(self, other: "Bitmap", operation: Callable[..., NDArray[Any]]) -> "Bitmap":
        if self.n_pages != other.n_pages:
            raise ValueError(f"bitmaps of {self.n_pages} and {other.n_pages} pages")
        if np.array_equal(self.mixed, other.mixed):
            blocks = self.mixed
            lines = operation(self.lines, other.lines)
        else:
            blocks = np.union1d(self.mixed, other.mixed)
            lines = operation(self._lines_of(blocks), other._lines_of(blocks))
        full = operation(self.full, other.full)
        counts = np.bitwise_count(lines).sum(axis=1, dtype=np.uint16)
        sizes = np.full(len(blocks), BLOCK_PAGES, np.uint16)
        if len(blocks) and blocks[-1] == len(full) - 1:
            sizes[-1] = self.n_pages - blocks[-1] * BLOCK_PAGES
        full[blocks] = counts == sizes
        still = (counts != 0) & (counts != sizes)
        return Bitmap(self.n_pages, full, blocks[still], lines[still])

    def _lines_of(self, blocks: NDArray[np.intp]) -> NDArray[np.uint64]:
        """Bits of blocks among which all mixed ones are."""
        lines = np.where(self.full[blocks, None], existing_bits(self.n_pages, blocks), np.uint64(0))
        lines[np.searchsorted(blocks, self.mixed)] = self.lines
        return lines

    # ---- counts --------------------------------------------------------------------------------

    def counts(self) -> NDArray[np.uint16]:
        """How many pages of each block are in, shape (n_blocks,)."""
        counts = np.where(self.full, block_sizes(self.n_pages), np.uint16(0))
        counts[self.mixed] = np.bitwise_count(self.lines).sum(axis=1, dtype=np.uint16)
        return counts

    def count(self) -> int:
        """How many pages are in."""
        return int(self.counts().sum(dtype=np.int64))

    def counts_before(self, pages: ArrayLike) -> Positions:
        """How many pages before each of these page numbers are in.

        Parameters
        ----------
        pages : array of int, shape (n,)
            Page numbers, 0 to n_pages.

        Returns
        -------
        ndarray of int64, shape (n,)
        """
        at = np.asarray(pages, np.int64)
        before = np.concatenate([[0], np.cumsum(self.counts(), dtype=np.int64)])
        block, within = at // BLOCK_PAGES, at % BLOCK_PAGES
        result = before[block]
        inner = np.flatnonzero(within)
        block, within = block[inner], within[inner]
        place = np.searchsorted(self.mixed, block)
        is_mixed = place < len(self.mixed)
        is_mixed[is_mixed] = self.mixed[place[is_mixed]] == block[is_mixed]
        result[inner] += np.where(is_mixed, 0, within * self.full[block])
        lines = self.lines[place[is_mixed]] & _bits_below(within[is_mixed])
        result[inner[is_mixed]] += np.bitwise_count(lines).sum(axis=1, dtype=np.int64)
        return result

    def uniform_blocks(self, blocks: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which naturally aligned groups of blocks are all in, and which are all out.

        Parameters
        ----------
        blocks : int
            2 MiB blocks a group: 1, or 512 for 1 GiB.

        Returns
        -------
        all_in, all_out : ndarray of bool, shape (whole groups,)
            What is left over at the end is in no group.
        """
        whole = self.n_pages // (BLOCK_PAGES * blocks)
        counts = self.counts()[: whole * blocks].reshape(whole, blocks)
        return (counts == BLOCK_PAGES).all(axis=1), (counts == 0).all(axis=1)

    # ---- bits and runs ---------------------------------------------------------------------------

    def bits(self, start: int = 0, end: int | None = None) -> NDArray[np.bool_]:
        """Unpack the pages [start, end): ndarray of bool, shape (end - start,)."""
        end = self.n_pages if end is None else end
        first, last = start // BLOCK_PAGES, -(-end // BLOCK_PAGES)
        pages = np.repeat(self.full[first:last], BLOCK_PAGES).reshape(-1, BLOCK_PAGES)
        low, high = np.searchsorted(self.mixed, [first, last])
        pages[self.mixed[low:high] - first] = _bits(self.lines[low:high]).reshape(-1, BLOCK_PAGES)
        return pages.ravel()[start - first * BLOCK_PAGES : end - first * BLOCK_PAGES]

    @property
    def first(self) -> bool:
        """Whether page 0 is in."""
        return bool(self.bits(0, 1)[0])

    def edges(self) -> Positions:
        """Pages whose value isn't that of the page before, in order; page 0 is never one.

        Returns
        -------
        ndarray of int64, shape (runs - 1,)
        """
        return np.concatenate([np.empty(0, np.int64), *self.edge_chunks()])

    def edge_chunks(self) -> Iterator[Positions]:
        """Yield `edges` in pieces, so that the runs of a terabyte need no memory of its size."""
        first, last = self.full.copy(), self.full.copy()
        first[self.mixed] = self.lines[:, 0] & _ONE
        last[self.mixed] = self.lines[:, -1] >> _TOP
        outer = np.flatnonzero(first[1:] != last[:-1]) + 1  # the end of the last block is nobody's neighbour
        for begin in range(0, len(self.full), _BLOCKS_AT_ONCE):
            end = begin + _BLOCKS_AT_ONCE
            low, high = np.searchsorted(outer, [begin, end])
            pieces = [outer[low:high] * BLOCK_PAGES]
            low, high = np.searchsorted(self.mixed, [begin, end])
            if high > low:
                pieces.append(self._inner_edges(low, high))
            edges = np.concatenate(pieces)
            edges.sort(kind="stable")  # two sorted halves
            yield edges

    def _inner_edges(self, low: int, high: int) -> Positions:
        """Edges within mixed blocks, from the low-th to the high-th of them."""
        lines, blocks = self.lines[low:high], self.mixed[low:high]
        carried = np.empty_like(lines)
        carried[:, 1:] = lines[:, :-1] >> _TOP
        carried[:, 0] = lines[:, 0] & _ONE
        toggles = (lines ^ (lines << _ONE | carried)) & existing_bits(self.n_pages, blocks)
        at = np.flatnonzero(_bits(toggles))
        return blocks[at // BLOCK_PAGES] * BLOCK_PAGES + at % BLOCK_PAGES

    def ranges(self) -> NDArray[np.int64]:
        """Maximal runs of pages that are in, half-open: shape (n, 2)."""
        edges = self.edges()
        if self.first:
            edges = np.concatenate([[0], edges])
        if len(edges) % 2:
            edges = np.concatenate([edges, [self.n_pages]])
        return edges.reshape(-1, 2)


def _bits_below(pages: Positions) -> NDArray[np.uint64]:
    """Lines whose bits are set below a page of their block each, shape (n, 8)."""
    in_word = np.clip(pages[:, None] - np.arange(LINE_WORDS) * 64, 0, 64)
    bits: NDArray[np.uint64] = (_ONE << (in_word % 64).astype(np.uint64)) - _ONE
    bits[in_word == 64] = ~np.uint64(0)
    return bits


def _bits(words: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Unpack words, lowest bit first, into one row of booleans."""
    return np.unpackbits(np.ascontiguousarray(words).view(np.uint8), bitorder="little").view(np.bool_)


def _toggled(toggles: NDArray[np.uint64], first: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """Lines that begin with a value each and change at each toggle: the XOR of all bits up to each one."""
    lines = toggles.copy()
    for shift in (1, 2, 4, 8, 16, 32):
        lines ^= lines << np.uint64(shift)
    ends = np.bitwise_xor.accumulate(lines >> _TOP, axis=1)
    carried = np.concatenate([np.zeros((len(lines), 1), np.uint64), ends[:, :-1]], axis=1)
    odd = np.bitwise_xor(carried, first[:, None], dtype=np.uint64, casting="unsafe")
    lines ^= np.negative(odd)  # -1 is all ones
    return lines
