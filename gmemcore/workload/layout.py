"""Layouts: where a guest's memory lies. One guest_memfd per region."""

from itertools import pairwise
from typing import Final

import msgspec
import numpy as np

from gmemcore.engine.arguments import as_u64, check_aligned
from gmemcore.errors import InvalidArgumentError
from gmemcore.uapi import PAGE_SIZE
from gmemcore.workload.operations import Operations

MAX_REGIONS: Final = 1024
"""Regions of a layout: more than VMMs have memslots for RAM, and few enough to build in no time."""
_Q35_SPLITS_FROM: Final = 0xB000_0000
_Q35_LOW: Final = 2 << 30
_TOP: Final = 1 << 63
"""End of guest physical memory here: no file can be larger, and no sum wraps."""


class Region(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One stretch of guest memory.

    Attributes
    ----------
    gpa, size : int
        Bytes, multiples of PAGE_SIZE, below 2^63; ``"4g"`` is read as a number.
    private : bool
        Whether its pages are private when the guest is built, where the VM has private memory at all.

    Raises
    ------
    InvalidArgumentError
        EINVAL: empty, unaligned, or beyond 2^63.
    """

    gpa: int
    size: int
    private: bool = False

    def __post_init__(self) -> None:
        for name in ("gpa", "size"):
            msgspec.structs.force_setattr(self, name, as_u64(getattr(self, name), name))
        check_aligned(self.gpa, self.size, "region")
        if self.end > _TOP:
            raise InvalidArgumentError(
                f"the end of a region must be at most 2^63, not {self.gpa:#x}+{self.size:#x}"
            )

    @property
    def end(self) -> int:
        """Address after its last byte."""
        return self.gpa + self.size


class Layout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The regions of a guest, in the order in which their files are created.

    Attributes
    ----------
    regions : tuple of Region
        At least one; none overlaps another.

    Examples
    --------
    >>> Layout.single(1 << 30).size
    1073741824
    """

    regions: tuple[Region, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.regions) <= MAX_REGIONS:
            raise InvalidArgumentError(
                f"a layout must have 1 to {MAX_REGIONS} regions, not {len(self.regions)}"
            )
        for low, high in pairwise(sorted(self.regions, key=lambda region: region.gpa)):
            if high.gpa < low.end:
                raise InvalidArgumentError(
                    f"regions {low.gpa:#x}+{low.size:#x} and {high.gpa:#x}+{high.size:#x} overlap"
                )

    @classmethod
    def single(cls, size: int | str, gpa: int | str = 0, *, private: bool = False) -> "Layout":
        """Return the layout of a guest whose memory is one region."""
        return cls((Region(as_u64(gpa, "gpa"), as_u64(size, "size"), private),))

    @classmethod
    def pc(cls, size: int | str, *, private: bool = False) -> "Layout":
        """Return the layout of QEMU's q35: what doesn't fit below the PCI hole is above 4 GiB."""
        size = as_u64(size, "size")
        low = size if size < _Q35_SPLITS_FROM else _Q35_LOW
        above = (Region(4 << 30, size - low, private),) if size > low else ()
        return cls((Region(0, low, private), *above))

    def part(self, low: float, high: float) -> "Layout":
        """Return the part of the memory between two shares of it, whole pages, for behaviours side by side.

        Raises
        ------
        InvalidArgumentError
            EINVAL: shares that aren't 0 to 1 and ascending, or hold no page.
        """
        if not 0 <= low < high <= 1:
            raise InvalidArgumentError(f"a part of a layout must be within 0 to 1, not {low} to {high}")
        start, end = (int(share * (self.size // PAGE_SIZE)) * PAGE_SIZE for share in (low, high))
        regions, before = [], 0
        for region in self.regions:
            first, last = max(start - before, 0), min(end - before, region.size)
            if first < last:
                regions.append(Region(region.gpa + first, last - first, region.private))
            before += region.size
        return Layout(tuple(regions))

    @property
    def size(self) -> int:
        """Bytes of memory in all."""
        return sum(region.size for region in self.regions)

    def file_memory(self, page_size: int) -> int:
        """Return the bytes of the regions' files in whole pages of a size."""
        return sum(-(-region.size // page_size) * page_size for region in self.regions)

    @property
    def end(self) -> int:
        """Address after the last byte of memory."""
        return max(region.end for region in self.regions)


def spans(operations: Operations, *, gap: int = 0) -> list[tuple[int, int]]:
    """Return the gpa ranges that operations touch, merged and in order: (start, end) in bytes.

    Parameters
    ----------
    operations : Operations
        Those without a size touch nothing. Their ranges must not wrap 2^64.
    gap : int
        Ranges no further apart than this are taken together.
    """
    touching = operations["size"] > 0
    if not touching.any():
        return []
    starts = operations["gpa"][touching]
    ends = np.sort(starts + operations["size"][touching])
    starts.sort()
    # As many ranges end before a place as begin before it: none is over it.
    apart = np.flatnonzero((starts[1:] > ends[:-1]) & (starts[1:] - ends[:-1] > np.uint64(gap)))
    firsts = [0, *(apart + 1).tolist()]
    lasts = [*apart.tolist(), len(starts) - 1]
    return list(zip(starts[firsts].tolist(), ends[lasts].tolist(), strict=True))
