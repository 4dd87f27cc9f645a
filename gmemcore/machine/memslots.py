"""Memslots: which file, at which offset, stands behind a guest physical address."""

from bisect import bisect_right, insort
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from gmemcore.engine.arguments import check_aligned
from gmemcore.errors import AlreadyExistsError, InvalidArgumentError

FileT = TypeVar("FileT")


@dataclass(frozen=True, slots=True)
class Memslot(Generic[FileT]):
    """One binding of a gpa range to a range of a file; bytes throughout."""

    slot: int
    gpa: int
    size: int
    gmem: FileT
    gmem_offset: int


class Memslots(Generic[FileT]):
    """The memslots of one Vm, in the order of their addresses; they never overlap."""

    def __init__(self) -> None:
        self._by_gpa: list[Memslot[FileT]] = []

    def __iter__(self) -> Iterator[Memslot[FileT]]:
        return iter(self._by_gpa)

    def __len__(self) -> int:
        return len(self._by_gpa)

    def add(self, new: Memslot[FileT], file_size: int) -> None:
        """Add a memslot.

        Raises
        ------
        InvalidArgumentError
            EINVAL: the id exists; the range is empty, unaligned or beyond the end of the file.
        AlreadyExistsError
            EEXIST: it overlaps a memslot in gpa, or the same file's range in another one.

        References
        ----------
        kvm_gmem_bind and KVM_SET_USER_MEMORY_REGION2.
        """
        if any(slot.slot == new.slot for slot in self._by_gpa):
            raise InvalidArgumentError(f"memslot {new.slot} exists; delete it first")
        check_aligned(new.gpa, new.size, "memslot gpa range")
        check_aligned(new.gmem_offset, new.size, "memslot file range")
        if new.gmem_offset + new.size > file_size:
            raise InvalidArgumentError(
                f"memslot file range {new.gmem_offset:#x}+{new.size:#x} is beyond the end {file_size:#x}"
            )
        for slot in self._by_gpa:
            if _overlap(slot.gpa, new.gpa, slot.size, new.size):
                raise AlreadyExistsError(
                    f"memslot gpa range {new.gpa:#x}+{new.size:#x} overlaps memslot {slot.slot} "
                    f"at {slot.gpa:#x}+{slot.size:#x}"
                )
            if slot.gmem is new.gmem and _overlap(slot.gmem_offset, new.gmem_offset, slot.size, new.size):
                raise AlreadyExistsError(
                    f"memslot file range {new.gmem_offset:#x}+{new.size:#x} is bound by memslot {slot.slot}"
                )
        insort(self._by_gpa, new, key=lambda slot: slot.gpa)

    def delete(self, slot_id: int) -> None:
        """Delete a memslot; the file and its attributes stay.

        Raises
        ------
        InvalidArgumentError
            EINVAL: there is none of this id.
        """
        for i, slot in enumerate(self._by_gpa):
            if slot.slot == slot_id:
                del self._by_gpa[i]
                return
        known = ", ".join(str(slot.slot) for slot in self._by_gpa) or "none"
        raise InvalidArgumentError(f"there is no memslot {slot_id}; existing: {known}")

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
