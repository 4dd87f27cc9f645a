"""What generators are built from: a guest's memory cut into cells, and operations made by the column."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from gmemcore.engine.steps import Step
from gmemcore.errors import InvalidArgumentError
from gmemcore.uapi import PAGE_SIZE, MemoryAttribute
from gmemcore.units import format_size
from gmemcore.workload.operations import OPERATION, Operations, as_words, empty_operations
from gmemcore.workload.seeds import Stream, Words

if TYPE_CHECKING:
    from gmemcore.workload.layout import Layout

BLOCK: Final = 2048
"""Events that a generator makes at a time. As this never changes, no chunk size changes a stream."""
PRIVATE: Final = int(MemoryAttribute.PRIVATE)
SHARED: Final = 0

Column = Any
"""A uint64 array of shape (n,), or a number for all."""
Range = tuple[int, int]
"""First byte (gpa) and bytes."""


class Grid:
    """Ranges of guest memory cut at multiples of a cell's size; the first and last of each may be short.

    Parameters
    ----------
    ranges : sequence of (gpa, size)
        Bytes, in the order in which cells are numbered.
    cell : int
        Bytes.

    Attributes
    ----------
    count : int
        Cells in all.
    """

    def __init__(self, ranges: Sequence[Range], cell: int) -> None:
        self.cell = np.uint64(cell)
        self._starts = np.array([start for start, _ in ranges], np.uint64)
        self._ends = np.array([start + size for start, size in ranges], np.uint64)
        self._first = self._starts // self.cell
        counts = (self._ends - np.uint64(1)) // self.cell - self._first + np.uint64(1)
        self._until = np.cumsum(counts, dtype=np.uint64)
        self.count = int(self._until[-1]) if len(ranges) else 0

    @cached_property
    def rows(self) -> NDArray[np.uint64]:
        """The ranges as `gmemcore.workload.loops` reads them: uint64, shape (ranges, 4)."""
        before = np.concatenate([np.zeros(1, np.uint64), self._until[:-1]])
        return np.stack([self._until, self._first - before, self._starts, self._ends], axis=1)

    def __getitem__(self, cells: Words) -> tuple[Words, Words]:
        """Return gpa and size of cells by number: two uint64 arrays."""
        if len(self._starts) == 1:  # the usual one, without the search
            start, end, place = self._starts[0], self._ends[0], cells + self._first[0]
        else:
            which = np.searchsorted(self._until, cells, side="right")
            below = np.concatenate([np.zeros(1, np.uint64), self._until[:-1]])
            start, end = self._starts[which], self._ends[which]
            place = cells - below[which] + self._first[which]
        low = place * self.cell
        high = np.minimum(low + self.cell, end)
        low = np.maximum(low, start)
        return low, high - low

    def cells_of(self, start: int, size: int) -> range:
        """Numbers of the cells that a range inside one of the grid's ranges touches."""
        which = int(np.searchsorted(self._starts, np.uint64(start), side="right")) - 1
        before = int(self._until[which - 1]) if which else 0
        first = int(self._first[which])
        cell = int(self.cell)
        return range(before + start // cell - first, before + (start + size - 1) // cell - first + 1)

    def blocks(self, start: int = 0, end: int | None = None) -> Iterator[Words]:
        """Yield the cells' numbers in order, `BLOCK` at a time."""
        end = self.count if end is None else end
        for low in range(start, end, BLOCK):
            yield np.arange(low, min(low + BLOCK, end), dtype=np.uint64)


@lru_cache(maxsize=16)
def _grid(ranges: tuple[Range, ...], cell: int) -> Grid:
    """Return the grid of a layout, which all guests of a fleet have."""
    return Grid(ranges, cell)


@dataclass(frozen=True, slots=True)
class SeededGuest:
    """What a generator is given: the guest's memory, and the random numbers that are its own."""

    ranges: tuple[Range, ...]
    stream: Stream

    @classmethod
    def of(cls, layout: "Layout", stream: Stream) -> "SeededGuest":
        """Return the guest with a layout's memory, in the order of its addresses."""
        return cls(tuple(sorted((region.gpa, region.size) for region in layout.regions)), stream)

    @property
    def memory(self) -> int:
        """Bytes of memory."""
        return sum(size for _, size in self.ranges)

    def grid(self, cell: int) -> Grid:
        """All of the memory, in cells."""
        return _grid(self.ranges, cell)

    def low_range(self) -> Range:
        """The range that DMA memory comes from: the largest that ends below 4 GiB, else the largest."""
        below = [each for each in self.ranges if sum(each) <= 4 << 30]
        return max(below or self.ranges, key=lambda each: each[1])

    def spread(self, name: str, within: Range, n: int, size: int, what: str) -> list[Range]:
        """Return n ranges of `size` bytes that don't overlap, each at a random place of its n-th of a range.

        Raises
        ------
        InvalidArgumentError
            EINVAL: they don't fit.
        """
        start, room = within
        each = room // max(n, 1) // PAGE_SIZE * PAGE_SIZE
        if n and each < size:
            raise InvalidArgumentError(
                f"{n} {what} of {format_size(size)} don't fit in {format_size(max(room, 0))}; "
                "use more memory, or less of what shares it"
            )
        if not n:
            return []
        pages = self.stream.split(name).below((each - size) // PAGE_SIZE + 1, 0, n).tolist()
        return [(start + i * each + page * PAGE_SIZE, size) for i, page in enumerate(pages)]


def operations(
    step: Step | Column,
    gpa: Column,
    size: Column,
    *,
    attributes: Column = 0,
    variant: Column = 0,
    flags: Column = 0,
    n: int | None = None,
) -> Operations:
    """Return operations made of columns; numbers stand for a whole column."""
    made = empty_operations(len(gpa) if n is None else n)
    made["step"] = step
    made["gpa"] = gpa
    made["size"] = size
    if not isinstance(attributes, int) or attributes:
        made["attributes"] = attributes
    if not isinstance(variant, int) or variant:
        made["variant"] = variant
    if not isinstance(flags, int) or flags:
        made["flags"] = flags
    return made


def over(step: Step, ranges: Sequence[Range], attributes: int = 0, variant: int = 0) -> Operations:
    """Return one operation per range."""
    gpas = np.array([gpa for gpa, _ in ranges], np.uint64)
    sizes = np.array([size for _, size in ranges], np.uint64)
    return operations(step, gpas, sizes, attributes=attributes, variant=variant)


def in_turn(
    columns: Sequence[Operations], keep: Sequence[NDArray[np.bool_] | bool] | None = None
) -> Operations:
    """Return the first operation of each column, then the second of each, and so on.

    Parameters
    ----------
    columns : sequence of operations
        Of one length.
    keep : sequence of bool or bool arrays, or None
        Which operations of each column there are; None: all.
    """
    table = np.stack([as_words(column) for column in columns], axis=1)
    if keep is not None:
        table = table[np.stack([np.broadcast_to(each, len(table)) for each in keep], axis=1)]
    return table.view(OPERATION).reshape(-1)


def distinct(stream: Stream, count: int, n: int, start: int = 0, end: int | None = None) -> Words:
    """Return n different numbers below count, ascending: a random one of each n-th; of them start to end."""
    places = np.arange(start, n if end is None else end, dtype=np.uint64)
    each, longer = np.uint64(count // n), np.uint64(count % n)
    first = places * each + np.minimum(places, longer)
    return first + stream.below(each + (places < longer), start, len(places))


@dataclass(slots=True)
class Toggles:
    """Cells that are switched on and off in random order.

    Attributes
    ----------
    stream : Stream
        Where the order comes from.
    on : bool array of shape (cells,)
        Which are on now.
    """

    stream: Stream
    on: NDArray[np.bool_]
    done: int = 0

    def next_block(self) -> tuple[Words, NDArray[np.bool_]]:
        """Return the next `BLOCK` cells to be switched, and whether each comes on."""
        cells = self.stream.below(len(self.on), self.done, BLOCK)
        self.done += BLOCK
        order = np.argsort(cells, kind="stable")
        ordered = cells[order]
        begins = np.empty(BLOCK, np.bool_)
        begins[0] = True
        np.not_equal(ordered[1:], ordered[:-1], out=begins[1:])
        # How often a cell came earlier in this block: its place less the place where its own kind begins.
        places = np.arange(BLOCK)
        earlier = places - np.maximum.accumulate(np.where(begins, places, 0))
        comes_on = self.on[ordered] == (earlier % 2 == 1)
        ends = np.append(begins[1:], True)
        self.on[ordered[ends]] = comes_on[ends]
        result = np.empty(BLOCK, np.bool_)
        result[order] = comes_on
        return cells, result
