"""Memslots: which file, at which offset, stands behind a guest physical address."""

from bisect import bisect_right, insort
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from gmemcore.engine.arguments import U64_MAX, check_aligned
from gmemcore.errors import AlreadyExistsError, GmemError, InvalidArgumentError
from gmemcore.uapi import PAGE_SIZE

FileT = TypeVar("FileT")

MAX_MEMSLOTS: Final = 32764
"""Ids of memslots are below this (KVM_USER_MEM_SLOTS)."""
MAX_MEMSLOT_PAGES: Final = (1 << 31) - 1
"""Pages of a memslot (KVM_MEM_MAX_NR_PAGES)."""
_PIECE: Final = 4 << 40  # the largest power of two that a memslot can have


@dataclass(frozen=True, slots=True)
class Memslot(Generic[FileT]):
    """One binding of a gpa range to a range of a file; bytes throughout."""

    slot: int
    gpa: int
    size: int
    gmem: FileT
    gmem_offset: int


def memslot_pieces(size: int) -> Iterator[tuple[int, int]]:
    """Cut RAM into pieces that memslots can hold, as a VMM does: (offset, size) of each in bytes."""
    for offset in range(0, size, _PIECE):
        yield offset, min(_PIECE, size - offset)


class Memslots(Generic[FileT]):
    """The memslots of one Vm, in the order of their addresses; they never overlap."""

    def __init__(self) -> None:
        self._by_gpa: list[Memslot[FileT]] = []

    def __iter__(self) -> Iterator[Memslot[FileT]]:
        return iter(self._by_gpa)

    def __len__(self) -> int:
        return len(self._by_gpa)

    def check_region(self, slot: int, gpa: int, size: int, gmem_offset: int) -> None:
        """Check what KVM checks of a new memslot before it looks at the file.

        Raises
        ------
        InvalidArgumentError
            EINVAL: an empty, unaligned or wrapping range; more pages or a higher id than memslots have; an id
            that exists.
        AlreadyExistsError
            EEXIST: it overlaps a memslot in gpa.

        References
        ----------
        kvm_vm_ioctl_set_memory_region, kvm_set_memory_region.
        """
        check_aligned(gpa, size, "memslot gpa range", most=U64_MAX)
        check_aligned(gmem_offset, size, "memslot file range", most=U64_MAX)
        if not 0 <= slot < MAX_MEMSLOTS:
            raise InvalidArgumentError(f"memslot id {slot}; it must be 0 to {MAX_MEMSLOTS - 1}")
        if size // PAGE_SIZE > MAX_MEMSLOT_PAGES:
            raise InvalidArgumentError(
                f"memslot of {size // PAGE_SIZE:#x} pages; it must be at most {MAX_MEMSLOT_PAGES:#x}"
            )
        for other in self._by_gpa:
            if other.slot == slot:
                raise InvalidArgumentError(f"memslot {slot} exists; delete it first")
        for other in self._by_gpa:
            if _overlap(other.gpa, gpa, other.size, size):
                raise AlreadyExistsError(
                    f"memslot gpa range {gpa:#x}+{size:#x} overlaps memslot {other.slot} "
                    f"at {other.gpa:#x}+{other.size:#x}"
                )

    def bind(
        self, new: Memslot[FileT], file_size: int, overlap: type[GmemError] = AlreadyExistsError
    ) -> None:
        """Add a memslot whose region was checked to a file that takes it.

        Parameters
        ----------
        new : Memslot
            The memslot.
        file_size : int
            Bytes of its file.
        overlap : type of GmemError
            What is raised if the same file's range is in another memslot: EINVAL up to Linux 6.18.

        Raises
        ------
        InvalidArgumentError
            EINVAL: the range goes beyond the end of the file.
        GmemError
            `overlap`: it overlaps the range of the same file in another memslot.

        References
        ----------
        kvm_gmem_bind.
        """
        if new.gmem_offset + new.size > file_size:
            raise InvalidArgumentError(
                f"memslot file range {new.gmem_offset:#x}+{new.size:#x} must end at {file_size:#x} or before"
            )
        for slot in self._by_gpa:
            if slot.gmem is new.gmem and _overlap(slot.gmem_offset, new.gmem_offset, slot.size, new.size):
                raise overlap(
                    f"memslot file range {new.gmem_offset:#x}+{new.size:#x} is bound by memslot {slot.slot}"
                )
        insort(self._by_gpa, new, key=lambda slot: slot.gpa)

    def delete(self, slot_id: int) -> Memslot[FileT]:
        """Delete and return a memslot; the file and its attributes stay.

        Raises
        ------
        InvalidArgumentError
            EINVAL: there is none of this id.
        """
        for i, slot in enumerate(self._by_gpa):
            if slot.slot == slot_id:
                return self._by_gpa.pop(i)
        known = ", ".join(str(slot.slot) for slot in self._by_gpa) or "none"
        raise InvalidArgumentError(f"there is no memslot {slot_id}; existing: {known}")

    def at(self, gpa: int) -> Memslot[FileT] | None:
        """Return the memslot that holds an address, or None."""
        return next(slot for _, _, slot in self.walk(gpa, 1))

    def walk(self, gpa: int, size: int) -> Iterator[tuple[int, int, Memslot[FileT] | None]]:
        """Tile [gpa, gpa + size) in order: (start, end, memslot or None for a hole)."""
        end = gpa + size
        i = max(bisect_right(self._by_gpa, gpa, key=lambda slot: slot.gpa) - 1, 0)
        while gpa < end:
            slot = self._by_gpa[i] if i < len(self._by_gpa) else None
            if slot is not None and slot.gpa + slot.size <= gpa:
                i += 1
                continue
            if slot is None or slot.gpa >= end:
                yield gpa, end, None
                return
            if gpa < slot.gpa:
                yield gpa, slot.gpa, None
                gpa = slot.gpa
            stop = min(end, slot.gpa + slot.size)
            yield gpa, stop, slot
            gpa = stop


def _overlap(start: int, other: int, size: int, other_size: int) -> bool:
    return start < other + other_size and other < start + size
