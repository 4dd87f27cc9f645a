"""Where the vCPU's own memory lies: at a slot id and in guest frames that nothing else uses.

It has to be out of the way of every request, and no attribute of the guest's may apply to it. So it is placed
when a guest access needs it, taken away before a request that it could change the answer of, and placed
somewhere else the next time.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from gmemcore.errors import OutOfMemoryError
from gmemcore.uapi import PAGE_SHIFT, PAGE_SIZE

LOCAL_APIC = (0xFEE00000, PAGE_SIZE)
"""(gpa, size) of the registers of the local APIC, where some processors keep memory of KVM's own."""


class Placement(NamedTuple):
    """A memslot for the vCPU's own memory; borrowed: private frames that must be shared meanwhile."""

    slot: int
    gpa: int
    size: int
    borrowed: tuple[tuple[int, int], ...]

    def meets(self, gpa: int, size: int) -> bool:
        """Whether a range of guest memory overlaps it."""
        return gpa < self.gpa + self.size and self.gpa < gpa + size


def place(
    size: int,
    *,
    slots: Iterable[int],
    occupied: Iterable[tuple[int, int]],
    private: Iterable[tuple[int, int]],
    address_bits: int,
    slot_limit: int,
) -> Placement:
    """Choose a slot id and a gpa.

    Parameters
    ----------
    size : int
        Bytes wanted.
    slots : iterable of int
        Ids that are taken.
    occupied : iterable of (gpa, size)
        Ranges that are taken.
    private : iterable of (gpa, size)
        Ranges that are private. One of them is used only where everything else is taken.
    address_bits : int
        Bits of a guest physical address.
    slot_limit : int
        Slot ids are below this.

    Raises
    ------
    OutOfMemoryError
        ENOMEM: there is no id, or no range, left.
    """
    taken = set(slots)
    slot = next((number for number in range(slot_limit - 1, -1, -1) if number not in taken), None)
    if slot is None:
        raise OutOfMemoryError(f"all {slot_limit} memslots are taken: none is left for the vCPU's own memory")
    ranges, shut = [*occupied, LOCAL_APIC], list(private)
    for avoided in ([*ranges, *shut], ranges):
        for gpa in _candidates(size, avoided, 1 << address_bits):
            if all(gpa + size <= start or start + length <= gpa for start, length in avoided):
                borrowed = tuple(_within(gpa, size, shut))
                return Placement(slot, gpa, size, borrowed)
    raise OutOfMemoryError(f"no {size:#x} bytes of guest memory are left for the vCPU's own memory")


def _candidates(size: int, avoided: list[tuple[int, int]], end: int) -> Iterator[int]:
    """Yield places to try: low, behind each range, before each range, and at the end of the address space."""
    behind = sorted(-(-(start + length) >> PAGE_SHIFT << PAGE_SHIFT) for start, length in avoided)
    before = sorted((start - size) & -PAGE_SIZE for start, _ in avoided)
    for gpa in (size, *behind, *before, end - size):
        if 0 <= gpa <= end - size:
            yield gpa


def _within(gpa: int, size: int, ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    for start, length in ranges:
        low, high = max(gpa, start), min(gpa + size, start + length)
        if low < high:
            yield low, high - low
