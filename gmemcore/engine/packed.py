"""Packed page state: a compact copy of the planes of one file.

It takes eight bytes per 2 MiB block, and 64 more for each plane that is mixed in it. A terabyte of uniform
memory takes 4 MiB.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from gmemcore.engine import kernels as layout

PLANE_NAMES: Final = ("private", "allocated", "assigned", "accepted", "pinned", "poisoned")
"""Names of the planes, in the order of their numbers."""

BLOCK_PAGES: Final = int(layout.BLOCK_PAGES)
LINE_WORDS: Final = 8
"""Words of a line: the 512 pages of one plane in one block."""

_FIELD_BITS, _FIELD = int(layout.FIELD_BITS), int(layout.FIELD)
_WHOLE_BIT: Final = BLOCK_PAGES.bit_length() - 1
"""The bit of a field that is set if all pages of a whole block are; lower bits, if some are."""
_SOME: Final = np.uint64(sum((BLOCK_PAGES - 1) << number * _FIELD_BITS for number in range(len(PLANE_NAMES))))
_FIELDS_USED: Final = np.uint64((1 << _FIELD_BITS * len(PLANE_NAMES)) - 1)


@dataclass(frozen=True, slots=True, eq=False)
class PackedState:
    """The six planes of a file at one moment.

    Attributes
    ----------
    n_pages : int
        Pages of the file.
    words : ndarray of uint64, shape (n_blocks,)
        Ten bits per plane: the number of the block's pages in it.
    lines : ndarray of uint64, shape (n_lines, 8)
        The bits of all mixed blocks: plane by plane, in each block by block.
    """

    n_pages: int
    words: NDArray[np.uint64]
    lines: NDArray[np.uint64]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.words.nbytes + self.lines.nbytes

    @property
    def totals(self) -> dict[str, int]:
        """The number of pages in each plane."""
        return totals(self.words)

    def planes(self) -> "Planes":
        """Return for each plane its pages in each block, the mixed blocks, and their lines."""
        full = block_sizes(self.n_pages)
        planes, begin = {}, 0
        for name, counts in zip(PLANE_NAMES, _fields(self.words), strict=True):
            mixed = _mixed(counts, full)
            planes[name] = counts, mixed, self.lines[begin : begin + len(mixed)]
            begin += len(mixed)
        return planes

    def uniform(self) -> dict[str, NDArray[np.bool_]]:
        """Return for each plane which blocks are entirely in it, shape (n_blocks,)."""
        used = int(np.bitwise_or.reduce(self.words)) if len(self.words) else 0
        last = self.n_pages - (len(self.words) - 1) * BLOCK_PAGES
        found = {}
        for number, name in enumerate(PLANE_NAMES):
            shift = number * _FIELD_BITS
            if not used >> shift & _FIELD:
                found[name] = np.zeros(len(self.words), np.bool_)
                continue
            found[name] = (self.words >> np.uint64(shift + _WHOLE_BIT) & np.uint64(1)).astype(np.bool_)
            found[name][-1] = int(self.words[-1]) >> shift & _FIELD == last
        return found

    def mixed(self) -> dict[str, NDArray[np.intp]]:
        """Return for each plane its mixed blocks, in the order of `lines`."""
        some = np.flatnonzero(self.words & _SOME)  # includes a full last block that is shorter
        words = self.words[some]
        sizes = np.full(len(some), BLOCK_PAGES, np.uint64)
        if len(some) and some[-1] == len(self.words) - 1:
            sizes[-1] = self.n_pages - (len(self.words) - 1) * BLOCK_PAGES
        found = {}
        for number, name in enumerate(PLANE_NAMES):
            counts = words >> np.uint64(number * _FIELD_BITS) & np.uint64(_FIELD)
            found[name] = some[(counts != 0) & (counts != sizes)]
        return found

    def check(self) -> "Planes":
        """Raise unless this is a valid state of a file.

        Returns
        -------
        dict
            See `planes`.

        Raises
        ------
        ValueError
            Sizes don't match, a count is more than a block, or a line contradicts its count.
        """
        n_blocks = -(-self.n_pages // BLOCK_PAGES)
        if self.n_pages < 1 or self.words.shape != (n_blocks,):
            raise ValueError(
                f"{self.words.shape} block words for {self.n_pages} pages; {n_blocks} are needed"
            )
        if np.bitwise_or.reduce(self.words) & ~_FIELDS_USED:
            raise ValueError("a block word has bits that belong to no plane")
        full, planes = block_sizes(self.n_pages), self.planes()
        for name, (counts, mixed, lines) in planes.items():
            if counts.max() > BLOCK_PAGES or counts[-1] > full[-1]:
                raise ValueError(f"plane {name} has more pages in a block than the block has")
            if len(lines) != len(mixed):
                raise ValueError(f"plane {name} is mixed in {len(mixed)} blocks and has {len(lines)} lines")
            beyond = np.any(lines[-1:] & ~existing_bits(self.n_pages, mixed[-1:]))
            if beyond or np.any(_popcounts(lines) != counts[mixed]):
                raise ValueError(f"plane {name} has a line that its block's count contradicts")
        n_mixed = sum(len(mixed) for _, mixed, _ in planes.values())
        if n_mixed != len(self.lines):
            raise ValueError(f"{len(self.lines)} lines; the block words need {n_mixed}")
        return planes


Planes = dict[str, tuple[NDArray[np.uint16], NDArray[np.intp], NDArray[np.uint64]]]
"""For each plane its pages in each block, the mixed blocks, and their lines."""


def pack(n_pages: int, words: NDArray[np.uint64], lines: NDArray[np.uint64]) -> PackedState:
    """Copy page state; lines as the engine has them, one bitmap per plane."""
    by_block = lines.reshape(len(PLANE_NAMES), -1, LINE_WORDS)
    mixed = PackedState(n_pages, words, lines).mixed().values()
    kept = [by_block[number, blocks] for number, blocks in enumerate(mixed)]
    return PackedState(n_pages, words.copy(), np.concatenate(kept))


def totals(words: NDArray[np.uint64]) -> dict[str, int]:
    """Count the pages of each plane."""
    counts = zip(PLANE_NAMES, _fields(words), strict=True)
    return {name: int(field.sum(dtype=np.uint64)) for name, field in counts}


def block_sizes(n_pages: int) -> NDArray[np.uint16]:
    """Return the pages of each block: 512, or fewer for the last one."""
    sizes = np.full(-(-n_pages // BLOCK_PAGES), BLOCK_PAGES, np.uint16)
    sizes[-1] = n_pages - (len(sizes) - 1) * BLOCK_PAGES
    return sizes


def existing_bits(n_pages: int, blocks: NDArray[np.intp]) -> NDArray[np.uint64]:
    """Return lines with the bits of all existing pages of some blocks, in order: shape (len(blocks), 8)."""
    bits = np.full((len(blocks), LINE_WORDS), ~np.uint64(0))
    last = (n_pages - 1) // BLOCK_PAGES
    if len(blocks) and blocks[-1] == last and n_pages % BLOCK_PAGES:
        pages = np.arange(BLOCK_PAGES) < n_pages % BLOCK_PAGES
        bits[-1] = np.packbits(pages, bitorder="little").view("<u8")
    return bits


def _fields(words: NDArray[np.uint64]) -> list[NDArray[np.uint16]]:
    """Return the pages of each block, by plane; empty planes, which are common, cost nothing."""
    used = int(np.bitwise_or.reduce(words))
    nowhere = np.zeros(len(words), np.uint16)
    return [
        (words >> np.uint64(shift) & np.uint64(_FIELD)).astype(np.uint16)
        if used >> shift & _FIELD
        else nowhere
        for shift in range(0, _FIELD_BITS * len(PLANE_NAMES), _FIELD_BITS)
    ]


def _mixed(counts: NDArray[np.uint16], full: NDArray[np.uint16]) -> NDArray[np.intp]:
    if not counts.any():
        return np.zeros(0, np.intp)
    one = np.uint16(1)
    return np.flatnonzero(counts - one < full - one)  # 0 - 1 wraps, and is never less


def _popcounts(lines: NDArray[np.uint64]) -> NDArray[np.uint16]:
    """Count the set bits of each line: one byte per word, added in lanes of 16 bits."""
    counts = np.bitwise_count(lines).view(np.uint64).ravel()
    lanes = np.uint64(0x00FF_00FF_00FF_00FF)
    pairs = (counts & lanes) + (counts >> np.uint64(8) & lanes)
    total = pairs * np.uint64(0x0001_0001_0001_0001) >> np.uint64(48)
    return total.astype(np.uint16)
