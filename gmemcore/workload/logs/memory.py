"""Guest memory of a log: where RAM is, by what the log, its user or its operations say.

QEMU traces memslots as it sets them (``kvm_set_user_memory``): those with a guest_memfd are the guest's RAM,
at their addresses. Offsets of RAMBlocks become addresses by the same lines.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from gmemcore.errors import InvalidArgumentError
from gmemcore.uapi import PAGE_SIZE
from gmemcore.workload.layout import MAX_REGIONS, Layout, Region, spans
from gmemcore.workload.logs.log import Slot
from gmemcore.workload.operations import Operations

REGION_ALIGN: Final = 2 << 20
"""Regions around what a log touches begin and end at multiples of this: blocks then split as on the host."""
REGION_GAP: Final = 1 << 30
"""Memory that a log names at places no further apart than this is one region: it names few pages of many."""

_MOST_PARTS: Final = 4 * MAX_REGIONS

Range = tuple[int, int]
"""Start and end, bytes."""


@dataclass(frozen=True, slots=True)
class Block:
    """A RAMBlock: where its parts show in guest physical memory.

    Attributes
    ----------
    parts : tuple of (offset, gpa, size)
        Bytes, ascending by offset; none overlaps another.
    """

    parts: tuple[tuple[int, int, int], ...]

    @property
    def size(self) -> int:
        """Bytes in all."""
        return sum(size for _, _, size in self.parts)

    def addresses(self, offset: int, size: int) -> list[Range] | None:
        """Return the ranges of guest memory that a range of the block is; None if a part shows nowhere."""
        found, end = [], offset + size
        for start, gpa, length in self.parts:
            low, high = max(offset, start), min(end, start + length)
            if low < high:
                found.append((gpa + low - start, gpa + high - start))
        return found if sum(high - low for low, high in found) == size else None


@dataclass(frozen=True, slots=True)
class Memory:
    """RAM as memslots or a user have it.

    Attributes
    ----------
    ranges : tuple of Range
        Ascending; one per file and stretch.
    blocks : tuple of Block
        RAMBlocks, the largest first.
    """

    ranges: tuple[Range, ...]
    blocks: tuple[Block, ...]

    def addresses(self, offset: int, size: int) -> list[Range] | None:
        """Return the ranges that an offset in a RAMBlock stands for: of the largest block that has it."""
        return next((found for block in self.blocks if (found := block.addresses(offset, size))), None)


def of_slots(slots: Iterable[Slot]) -> Memory | None:
    """Return the memory that memslots with a guest_memfd describe; None without such memslots.

    QEMU sets memslots again and again while it boots, in smaller parts: memory is what any of them ever was.
    Where two overlap, the earlier one counts.
    """
    covered: list[tuple[int, int, tuple[int | None, int]]] = []  # ascending
    offsets: dict[int, list[tuple[int, int, int]]] = {}
    for slot in dict.fromkeys(slot for slot in slots if slot.is_memory):
        key = (slot.fd, slot.gpa - slot.offset)
        for low, high in _without(slot.gpa, slot.gpa + slot.size, covered):
            covered.append((low, high, key))
            if slot.fd is not None:
                offsets.setdefault(slot.fd, []).append((low - key[1], low, high - low))
        covered.sort()
        if len(covered) > _MOST_PARTS:
            raise InvalidArgumentError(f"memslots in more than {_MOST_PARTS:,} places")
    if not covered:
        return None
    merged: list[tuple[int, int, tuple[int | None, int]]] = []
    for low, high, key in covered:
        if merged and merged[-1][1] == low and merged[-1][2] == key:
            merged[-1] = (merged[-1][0], high, key)
        else:
            merged.append((low, high, key))
    blocks = [Block(tuple(sorted(parts))) for parts in offsets.values()]
    return Memory(
        tuple((low, high) for low, high, _ in merged),
        tuple(sorted(blocks, key=lambda block: -block.size)),
    )


def _without(start: int, end: int, covered: Sequence[tuple[int, int, object]]) -> Iterator[Range]:
    """Yield the parts of a range that no other one covers; the others are ascending."""
    for low, high, _ in covered:
        if high <= start or low >= end:
            continue
        if low > start:
            yield start, low
        start = max(start, high)
    if start < end:
        yield start, end


def of_layout(layout: Layout) -> Memory:
    """Return the memory of a layout that a user gave: one RAMBlock, in the order of its addresses."""
    regions = sorted(layout.regions, key=lambda region: region.gpa)
    parts, offset = [], 0
    for region in regions:
        parts.append((offset, region.gpa, region.size))
        offset += region.size
    return Memory(tuple((region.gpa, region.end) for region in regions), (Block(tuple(parts)),))


def with_ranges(memory: Memory, more: Iterable[Range]) -> Memory:
    """Return memory and what of other ranges lies outside of it."""
    covered = [(low, high, None) for low, high in memory.ranges]
    added = [part for low, high in _merged(more) for part in _without(low, high, covered)]
    return Memory(tuple(sorted([*memory.ranges, *added])), memory.blocks)


def of_operations(operations: Operations) -> Memory:
    """Return regions around what operations touch."""
    ranges = [
        (low // REGION_ALIGN * REGION_ALIGN, -(-high // REGION_ALIGN) * REGION_ALIGN)
        for low, high in spans(operations, gap=REGION_GAP)
    ]
    return Memory(tuple(ranges) or ((0, PAGE_SIZE),), ())


def _merged(ranges: Iterable[Range]) -> list[Range]:
    """Return ranges without overlaps and seams, ascending."""
    merged: list[Range] = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(high, merged[-1][1])
        else:
            merged.append((low, high))
    return merged


def layout_of(memory: Memory, private: Sequence[bool]) -> Layout:
    """Return the layout of memory, whose regions start private where told.

    Raises
    ------
    InvalidArgumentError
        EINVAL: more regions than a layout has.
    """
    if len(memory.ranges) > MAX_REGIONS:
        raise InvalidArgumentError(
            f"the log names memory in {len(memory.ranges):,} places; at most {MAX_REGIONS:,} can be regions"
        )
    pairs = zip(memory.ranges, private, strict=True)
    return Layout(tuple(Region(low, high - low, starts_private) for (low, high), starts_private in pairs))


def stretches(memory: Memory) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Return starts and ends of memory without seams, ascending."""
    table = np.array(_merged(memory.ranges), np.uint64).reshape(-1, 2)
    return table[:, 0].copy(), table[:, 1].copy()
