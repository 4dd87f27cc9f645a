"""Page state of one file: the arrays that kernels walk, and the questions Python asks of them."""

from enum import IntFlag
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gmemcore.engine import kernels as layout
from gmemcore.engine.backing import check_host_can_hold, lazy_words, unwritten_words
from gmemcore.engine.jit import load_kernels
from gmemcore.engine.packed import PLANE_NAMES, PackedState, pack, totals
from gmemcore.errors import UnsupportedOperationError

_BLOCK_PAGES = int(layout.BLOCK_PAGES)
_BLOCK_ROWS = 8
_BLOCKS_OF_1G = 512
_FIELD_BITS = int(layout.FIELD_BITS)


class Plane(IntFlag):
    """Planes as bits, for questions about several at once."""

    NONE = 0
    PRIVATE = 1
    ALLOCATED = 2
    ASSIGNED = 4
    ACCEPTED = 8
    PINNED = 16
    POISONED = 32


_FIELDS = tuple(
    sum(int(layout.FIELD) << _FIELD_BITS * plane for plane in range(len(PLANE_NAMES)) if planes >> plane & 1)
    for planes in range(1 << len(PLANE_NAMES))
)


def fields_of(planes: int) -> int:
    """The mask of fields that stands for some planes in kernels."""
    return _FIELDS[planes]


class Survey(NamedTuple):
    """All page state of a file, looked at in one pass.

    Attributes
    ----------
    folded : int
        128 bits that depend on every page's state: equal for equal states. No cryptography.
    totals : dict of str to int
        Pages set, by plane; only up to what is wrong, if anything is.
    mixed : int
        2 MiB blocks without one attribute.
    wrong : str
        What contradicts itself, or breaks accepted ⊆ assigned ⊆ allocated ∩ private or pinned ⊆ allocated ∩
        shared; empty if nothing does.
    """

    folded: int
    totals: dict[str, int]
    mixed: int
    wrong: str


_WRONG = (
    "",
    "a count of pages isn't that of their bits",
    "a page is accepted and not assigned",
    "a page is assigned and not allocated and private",
    "a page is pinned and not allocated and shared",
)


class MappableBlocks(NamedTuple):
    """Blocks that lie whole within the file and have one attribute."""

    blocks_2m: int
    blocks_1g: int


class PageState:
    """The six planes of a file, packed (the layout is told in ``kernels.py``).

    Parameters
    ----------
    n_pages : int
        Pages of the file.
    private : bool
        The attribute of every page at creation.
    seed, file_index : int
        Where the file's key stream begins.
    tracking : int
        Row of a result in which assignment is counted.
    """

    __slots__ = ("header", "lines", "n_pages", "words")

    def __init__(self, n_pages: int, private: bool, seed: int, file_index: int, tracking: int) -> None:
        self.n_pages = n_pages
        n_blocks = -(-n_pages // _BLOCK_PAGES)
        self.header: NDArray[np.uint64] = np.zeros(layout.HEADER_SLOTS, np.uint64)
        self.header[layout.N_PAGES] = n_pages
        self.header[layout.SEED] = seed
        self.header[layout.FIRST_WORD] = (file_index << 40) * int(layout.PAGE_WORDS) & (1 << 64) - 1
        self.header[layout.ALLOCATIONS_LEFT] = layout.NEVER
        self.header[layout.TRACKING] = tracking
        self.words = (unwritten_words if private else lazy_words)(n_blocks)
        n_rows = n_blocks * _BLOCK_ROWS
        # A line is written when it becomes true, and not read before.
        self.lines = unwritten_words(len(PLANE_NAMES) * n_rows).reshape(-1, n_rows)
        if private:
            check_host_can_hold(n_blocks * 8)  # written at once, unlike the lines
            self.words[:] = layout.BLOCK_PAGES  # of the first field, which is `private`
            self.words[-1] = n_pages - (n_blocks - 1) * _BLOCK_PAGES

    def find(self, start: int, end: int, wanted: int, unwanted: int = 0) -> int:
        """First page of [start, end) with all wanted planes and no unwanted one; end if there is none."""
        numbers = (start, end, fields_of(wanted), fields_of(unwanted))
        return int(load_kernels().find_page(*self._arrays(), *map(np.uint64, numbers)))

    def count(self, start: int, end: int, wanted: int, unwanted: int = 0) -> int:
        """How many pages of [start, end) have all wanted planes and no unwanted one."""
        numbers = (start, end, fields_of(wanted), fields_of(unwanted))
        return int(load_kernels().count_pages(*self._arrays(), *map(np.uint64, numbers)))

    def mappable_blocks(self) -> MappableBlocks:
        """How many blocks of 2 MiB and of 1 GiB have one attribute."""
        counts = self.block_counts("private")[: self.n_pages // _BLOCK_PAGES]
        whole = len(counts) // _BLOCKS_OF_1G * _BLOCKS_OF_1G
        of_1g = counts[:whole].reshape(-1, _BLOCKS_OF_1G)
        totals = of_1g.sum(axis=1)
        return MappableBlocks(
            len(counts) - int(np.count_nonzero(counts & layout.BLOCK_MASK)),
            int(np.count_nonzero(totals % np.uint64(_BLOCKS_OF_1G * _BLOCK_PAGES) == 0)),
        )

    def runs(self, plane: str = "private") -> NDArray[np.uint64]:
        """End page of each maximal run of one plane, in order; the first run begins at page 0."""
        number = np.uint64(PLANE_NAMES.index(plane))
        kernels = load_kernels()
        # Room for the most there can be: what isn't written costs nothing.
        ends = np.empty(int(kernels.most_runs(self.header, self.words, number)), np.uint64)
        return ends[: kernels.list_runs(*self._arrays(), number, ends)]

    def xor_private(self, first_word: int, buffer: NDArray[np.uint64]) -> None:
        """Turn a copy of DRAM into the guest's view, or back: XOR the key stream into its private pages."""
        load_kernels().xor_private(*self._arrays(), np.uint64(first_word), buffer)

    def plane(self, name: str) -> NDArray[np.bool_]:
        """One plane as booleans, shape (n_pages,), a copy."""
        bits = np.unpackbits(self.bitmap(name).view(np.uint8), count=self.n_pages, bitorder="little")
        return bits.view(np.bool_)

    def bitmap(self, name: str) -> NDArray[np.uint64]:
        """One plane as a bitmap, bit i of word w being page 64·w + i, shape (ceil(n_pages / 64),), a copy."""
        load_kernels().write_lines(*self._arrays())
        return self.lines[PLANE_NAMES.index(name), : -(-self.n_pages // 64)].copy()

    def block_counts(self, name: str) -> NDArray[np.uint64]:
        """How many pages of each 2 MiB block one plane has, shape (n_blocks,), a copy."""
        field = np.uint64(_FIELD_BITS * PLANE_NAMES.index(name))
        return (self.words >> field) & layout.FIELD

    def records(self) -> NDArray[Any]:
        """All bitmaps as one read-only record that stays true: lines are always kept from now on.

        Raises
        ------
        UnsupportedOperationError
            EOPNOTSUPP: NumPy's records end at 2 GiB, which is the page state of 10 TiB.
        """
        if self.lines.nbytes >= 1 << 31:
            raise UnsupportedOperationError(
                f"page state of {self.n_pages} pages fits no NumPy record; plane() and packed_state() have it"
            )
        load_kernels().write_lines(*self._arrays())
        self.header[layout.DENSE] = 1
        return readonly(self.lines, np.dtype([(name, "<u8", self.lines.shape[1:]) for name in PLANE_NAMES]))

    def runs_of_pages(self, start: int, end: int) -> list[tuple[int, int, int]]:
        """Maximal runs of pages in one state, over [start, end): first page, end page, `Plane` bits.

        Mixed blocks are looked into page by page, uniform ones are taken whole: without kernels, since the
        answer is what they are checked by.
        """
        first, last = start // _BLOCK_PAGES, -(-end // _BLOCK_PAGES)
        words = self.words[first:last]
        differ = words[1:] != words[:-1]
        if last == len(self.words):
            differ[-1:] = True  # a last block that is short may be full by the count of a mixed one
        edges = (np.flatnonzero(differ) + 1).tolist()
        runs: list[tuple[int, int, int]] = []
        for low, high in pairwise([0, *edges, len(words)]):
            for at, until, planes in self._runs_of_blocks(first + low, first + high):
                at, until = max(at, start), min(until, end)
                if runs and runs[-1][2] == planes:
                    runs[-1] = runs[-1][0], until, planes
                elif at < until:
                    runs.append((at, until, planes))
        return runs

    def _runs_of_blocks(self, low: int, high: int) -> list[tuple[int, int, int]]:
        """Runs of blocks low to high, whose words are all the same."""
        word = int(self.words[low])
        pages = min(_BLOCK_PAGES, self.n_pages - low * _BLOCK_PAGES)
        counts = [
            word >> int(layout.FIELD_BITS) * plane & int(layout.FIELD) for plane in range(len(PLANE_NAMES))
        ]
        whole = sum(1 << plane for plane, count in enumerate(counts) if count == pages)
        mixed = [plane for plane, count in enumerate(counts) if 0 < count < pages]
        begin, end = low * _BLOCK_PAGES, min(high * _BLOCK_PAGES, self.n_pages)
        if not mixed:
            return [(begin, end, whole)]
        states = np.full(end - begin, whole, np.uint8)
        for plane in mixed:
            line = self.lines[plane, low * _BLOCK_ROWS : high * _BLOCK_ROWS].view(np.uint8)
            states |= np.unpackbits(line, count=end - begin, bitorder="little") << np.uint8(plane)
        edges = [0, *(np.flatnonzero(states[1:] != states[:-1]) + 1).tolist(), end - begin]
        return [(begin + at, begin + until, int(states[at])) for at, until in pairwise(edges)]

    def survey(self) -> "Survey":
        """Look at all page state in one pass."""
        out = np.zeros(layout.SURVEY_SLOTS, np.uint64)
        wrong = int(load_kernels().survey(*self._arrays(), out))
        low, high, page, mixed, *totals = out.tolist()
        return Survey(
            low | high << 64,
            dict(zip(PLANE_NAMES, totals, strict=True)),
            mixed,
            _WRONG[wrong] and f"{_WRONG[wrong]}, in the 2 MiB from page {page:#x}",
        )

    def packed(self) -> PackedState:
        """A copy of all planes, as small as they are uniform."""
        return pack(self.n_pages, self.words, self.lines)

    def totals(self) -> dict[str, int]:
        """How many pages are set, by plane."""
        return totals(self.words)

    def _arrays(self) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64]]:
        return self.header, self.words, self.lines


def readonly(words: NDArray[np.uint64], dtype: np.dtype[Any]) -> NDArray[Any]:
    """View words as another dtype, without a copy and without a way back to writing."""
    buffer = memoryview(words.view(np.uint8))  # type: ignore[arg-type]  # arrays are buffers at run time
    return np.frombuffer(buffer.toreadonly(), dtype)
